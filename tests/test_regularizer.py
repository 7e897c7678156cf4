"""The regularizers against slow references written from the equations, token by token.

The references read lists of unequal length, without padding or masks. They take two
sets of rewards: the live ones, and those inside the equations' stop-gradients. With
both the same they give the values. Their finite differences in the live ones are the
gradients, which differ wherever a detach is missing.
"""

import math
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import pad

from regularizer import (
    GAP_BOUND_WEIGHT,
    REGULARIZERS,
    TD_LAMBDA,
    enumerated_world,
    expected_icrm,
    expected_weights,
    icrm,
    icrm_by_token,
    icrm_rest_point,
    prefix_probabilities,
    transition_mask,
)

# Lengths of the first responses, then of the second ones. An empty response makes its
# pair a labelled response.
SHAPES = {"pairs": (7, 11, 1, 9, 4, 6), "mixed": (7, 3, 0, 5, 6, 0)}


def random_batch(lengths, T=11):
    """Random rewards, probs, and the mask of responses of these lengths."""
    rng = torch.Generator().manual_seed(0)
    rewards = torch.randn(len(lengths), T, generator=rng, dtype=torch.float64)
    probs = torch.rand(len(lengths), T - 1, generator=rng, dtype=torch.float64)
    return rewards, probs, torch.arange(T) < torch.tensor(lengths)[:, None]


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def batch(request):
    return random_batch(request.param)


def as_lists(x, mask):
    return [row[row_mask].tolist() for row, row_mask in zip(x, mask)]


# Slow references ----------------------------------------------------------------------


def mean(values):
    values = list(values)
    return sum(values) / max(len(values), 1)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def slow_values(live, fixed):
    """z of Eq. 4. The opposing mean is of the fixed rewards, 0 without an opponent."""
    B, values = len(live) // 2, []
    for row, response in enumerate(live):
        opposing_mean = mean(fixed[(row + B) % (2 * B)])
        z = [sigmoid(reward - opposing_mean) for reward in response]
        values.append(z if row < B else [1 - value for value in z])
    return values


def lambda_return(values, t):
    """The target of td_lambda as a sum of n-step values. The label is the last one."""
    n_left = len(values) - 1 - t
    target = TD_LAMBDA**n_left
    for n in range(1, n_left + 1):
        target += (1 - TD_LAMBDA) * TD_LAMBDA ** (n - 1) * values[t + n]
    return target


def slow_penalties(live, fixed, p):
    """{name: penalty} of every regularizer, and {"scale of NAME": its scale}."""
    z, sg = slow_values(live, fixed), slow_values(fixed, fixed)
    terms = defaultdict(list)
    for i, r in enumerate(live):
        for t in range(len(r) - 1):
            a, b, p_t = z[i][t], z[i][t + 1], p[i][t]
            l = -0.5 * (sg[i][t + 1] * math.log(a) + sg[i][t] * math.log(b))
            terms["icrm"].append(2 * p_t * l)
            terms["scale of icrm"].append(2 * p_t * (a + b) / 2)
            terms["squared_gap"].append(p_t * (a - b) ** 2)
            terms["gap_bound"].append(max(abs(a - b) - (1 - p_t), 0) ** 2)
            terms["reward_smoothness"].append(p_t * (r[t + 1] - r[t]) ** 2)
        for t in range(len(r)):
            target = lambda_return(sg[i], t)
            cross_entropy = target * math.log(z[i][t])
            cross_entropy += (1 - target) * math.log(1 - z[i][t])
            terms["none"].append(0.0)
            terms["dense_bt"].append(-math.log(z[i][t]))
            terms["dense_mae"].append(1 - z[i][t])
            terms["scale of dense_mae"].append(z[i][t])
            terms["td_lambda"].append(-cross_entropy)
    B = len(live) // 2
    for chosen, rejected in zip(live[:B], live[B:]):
        margin = (chosen or [0.0])[-1] - (rejected or [0.0])[-1]
        terms["response_mae"].append(1 - sigmoid(margin))
        terms["scale of response_mae"].append(sigmoid(margin))
    penalties = {name: mean(values) for name, values in terms.items()}
    bound = GAP_BOUND_WEIGHT * penalties["gap_bound"]
    penalties["icrm_gap_bound"] = penalties["icrm"] + bound
    penalties["scale of icrm_gap_bound"] = penalties["scale of icrm"]
    return penalties


def slow_gradients(live, p, step=1e-5):
    """{(row, t): {name: slope}} by central differences in the live rewards."""
    slopes = {}
    for i, row in enumerate(live):
        for t in range(len(row)):
            ends = []
            for sign in (1, -1):
                moved = [list(rewards) for rewards in live]
                moved[i][t] += sign * step
                ends.append(slow_penalties(moved, live, p))
            slopes[i, t] = {}
            for name in ends[0]:
                slopes[i, t][name] = (ends[0][name] - ends[1][name]) / (2 * step)
    return slopes


def test_every_regularizer_equals_its_slow_reference(batch):
    """In value, scale and gradient."""
    rewards, probs, mask = batch
    live, p = as_lists(rewards, mask), as_lists(probs, transition_mask(mask))
    expected, slopes = slow_penalties(live, live, p), slow_gradients(live, p)
    assert expected["gap_bound"] > 0 and REGULARIZERS.keys() <= expected.keys()
    for name in REGULARIZERS:
        inputs = rewards.clone().requires_grad_()
        penalty, scale = REGULARIZERS[name](inputs, probs, mask)
        assert penalty.item() == pytest.approx(expected[name], rel=1e-12), name
        expected_scale = expected.get(f"scale of {name}")
        assert (scale is None) == (expected_scale is None), name
        if scale is not None:
            assert scale.item() == pytest.approx(expected_scale, rel=1e-12), name
        penalty.backward()
        for (i, t), slope in slopes.items():
            gradient = inputs.grad[i, t].item()
            assert gradient == pytest.approx(slope[name], rel=1e-6, abs=1e-8), name


# Proofs -------------------------------------------------------------------------------


def test_icrm_by_token_is_icrm(batch):
    """Proof 2, in value, scale and gradient: the label at every token, with weights."""
    results = []
    for regularizer in (icrm, icrm_by_token):
        rewards = batch[0].clone().requires_grad_()
        penalty, scale = regularizer(rewards, *batch[1:])
        gradient = torch.autograd.grad(penalty, rewards)[0]
        results.append((penalty, scale, gradient))
    for by_transition, by_token in zip(*results):
        assert torch.allclose(by_transition, by_token, rtol=1e-12, atol=1e-15)
        assert by_transition.abs().sum() > 0


def test_the_gap_bound_holds_and_is_tight():
    """Proof 1: r_m - r_{m+1} = (1 - p) (E[r | another token] - r_{m+1})."""
    probs, rewards = enumerated_world(depth=5, vocabulary=4, seed=3)
    largest = 0.0
    for m, table in enumerate(probs):
        for prefix, row in enumerate(table.tolist()):
            after = rewards[m + 1].view_as(table)[prefix].tolist()
            for token, p in enumerate(row):
                total = weight = 0.0
                for other in range(4):
                    if other != token:
                        total += row[other] * after[other]
                        weight += row[other]
                gap = rewards[m][prefix].item() - after[token]
                expected = (1 - p) * (total / weight - after[token])
                assert gap == pytest.approx(expected, abs=1e-12)
                assert abs(gap) <= 1 - p + 1e-12
                largest = max(largest, abs(gap) / (1 - p))
    assert largest > 0.99


@pytest.mark.parametrize("reward", [-2.0, 0.3, 4.0])
def test_icrm_has_the_gradient_of_the_absolute_error_where_neighbours_are_equal(reward):
    """Statement 3: twice inside the response, once at both ends, if p = 1."""
    gradients = []
    for name in ("icrm", "dense_mae"):
        gradient = gradient_of(name, [reward] * 7, [reward / 2] * 7, p=1.0)
        n = {"icrm": 2 * 6, "dense_mae": 2 * 7}[name]  # what the mean is over
        gradients.append(n * gradient)
    ratio = torch.ones(7, dtype=torch.float64)
    ratio[1:-1] = 2
    assert torch.allclose(gradients[0], ratio * gradients[1], rtol=1e-6, atol=0)


def test_flipped_labels_move_the_minimiser_of_cross_entropy_only():
    """Statement 3, on a grid of values."""
    s = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    for C in (0.1, 0.35, 0.6, 0.8):
        best = {}
        for noise in (0.0, 0.1, 0.4):
            share = noise + (1 - 2 * noise) * C
            cross_entropy = -share * s.log() - (1 - share) * (1 - s).log()
            absolute_error = share * (1 - s) + (1 - share) * s
            assert s[cross_entropy.argmin()] == pytest.approx(share, abs=0.0051)
            best[noise] = s[absolute_error.argmin()].item()
        assert set(best.values()) == {0.99 if C > 0.5 else 0.01}


def slow_expected_icrm(rewards, probs, shares):
    """The expectation of icrm over complete responses, one by one, and their labels."""
    K, depth = probs[0].size(1), len(probs)
    total = 0.0
    for leaf in range(K**depth):
        probability, prefixes = 1.0, [0]
        tokens = [leaf // K ** (depth - 1 - t) % K for t in range(depth)]
        for t, token in enumerate(tokens):
            probability *= probs[t][prefixes[-1], token]
            prefixes.append(prefixes[-1] * K + token)
        p = [probs[t][prefixes[t], tokens[t]] for t in range(1, depth)]
        C = shares[depth][leaf]
        r = [rewards[t][prefixes[t]] for t in range(1, depth + 1)]
        for share, sign in ((C, 1), (1 - C, -1)):
            for t in range(depth - 1):
                a, b = torch.sigmoid(sign * r[t]), torch.sigmoid(sign * r[t + 1])
                l = b.detach() * a.log() + a.detach() * b.log()
                total = total - probability * share * p[t] * l
    return total


@pytest.mark.parametrize("seed, noise", [(0, 0.1), (1, 0.2), (2, 0.3)])
def test_the_gradient_is_zero_where_statement_4_says(seed, noise):
    """By summing over complete responses. icrm is overconfident there."""
    probs, exact = enumerated_world(depth=4, seed=seed)
    shares = [noise + (1 - 2 * noise) * V for V in exact]
    values = icrm_rest_point(probs, shares)
    rewards = [s.logit().requires_grad_() for s in values]
    loss = slow_expected_icrm(rewards, probs, shares)
    assert loss.item() == pytest.approx(expected_icrm(rewards, probs, shares).item())
    weights = prefix_probabilities(probs)
    for m, gradient in enumerate(torch.autograd.grad(loss, rewards[1:]), start=1):
        assert (gradient.abs() / weights[m]).max() < 1e-6
        chosen, rejected = expected_weights(values, probs, shares, m)
        odds = shares[m] * chosen / ((1 - shares[m]) * rejected)
        assert torch.allclose(values[m], odds / (1 + odds), rtol=0, atol=1e-6)
    mass, C, s = torch.cat(weights[1:]), torch.cat(shares[1:]), torch.cat(values[1:])
    uncertainty = [(mass * torch.minimum(x, 1 - x)).sum() for x in (s, C)]
    assert uncertainty[0] < 0.6 * uncertainty[1]


def test_a_weight_of_the_prefix_alone_cancels():
    """Statement 4: dense_bt, with any such weights, has gradient zero at s = C."""
    rng = torch.Generator().manual_seed(0)
    C = torch.rand(50, generator=rng, dtype=torch.float64)
    w = 0.1 + torch.rand(50, generator=rng, dtype=torch.float64)
    for weights in (torch.ones_like(w), w):
        r = C.logit().requires_grad_()
        log_s, log_not_s = F.logsigmoid(r), F.logsigmoid(-r)
        loss = -(weights * (C * log_s + (1 - C) * log_not_s)).sum()
        assert torch.autograd.grad(loss, r)[0].abs().max() < 1e-12


# Directions ---------------------------------------------------------------------------


def gradient_of(name, chosen, rejected, p=0.9):
    """The gradient on a chosen response's rewards, and on a rejected one's."""
    rewards = torch.tensor([chosen, rejected], dtype=torch.float64, requires_grad=True)
    probs = torch.full((2, len(chosen) - 1), p, dtype=torch.float64)
    mask = torch.ones(2, len(chosen), dtype=torch.bool)
    REGULARIZERS[name](rewards, probs, mask)[0].backward()
    return rewards.grad


def test_icrm_pushes_chosen_up_and_rejected_down_even_if_consistent():
    for chosen, rejected in (
        ([0.0] * 6, [0.0] * 6),
        ([-3.0, 2.0, 1.0], [0.5, -1.0, 4.0]),
    ):
        gradient = gradient_of("icrm", chosen, rejected)
        assert (gradient[0] < 0).all() and (gradient[1] > 0).all()


def test_two_sided_terms_pull_unequal_values_together_and_leave_equal_ones():
    for name in ("squared_gap", "gap_bound", "reward_smoothness"):
        assert (gradient_of(name, [0.4, 0.4], [0.4, 0.4]) == 0).all()
        low, high = gradient_of(name, [-1.0, 1.5], [0.0, 0.0])[0]
        assert low < 0 < high
        surprising = gradient_of(name, [-1.0, 1.5], [0.0, 0.0], p=0.0)
        assert (surprising == 0).all()


# The contract -------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGULARIZERS)
class TestEveryRegularizer:
    """A student's own regularizer is tested too, once it is in REGULARIZERS."""

    @pytest.mark.parametrize("lengths", [*SHAPES.values(), (1, 1)])
    @pytest.mark.parametrize("size", [1.0, 1e4])
    def test_is_a_finite_scalar_with_a_finite_gradient(self, name, lengths, size):
        rewards, probs, mask = random_batch(lengths)
        rewards = (size * rewards.float()).requires_grad_()
        penalty, scale = REGULARIZERS[name](rewards, probs.float(), mask)
        assert penalty.shape == () and penalty.isfinite()
        if scale is not None:
            assert scale.shape == () and scale.isfinite() and not scale.requires_grad
        penalty.backward()
        assert rewards.grad.isfinite().all()

    def test_padding_and_the_order_of_pairs_change_nothing(self, name, batch):
        """Not even NaN in the padding."""
        rewards, probs, mask = batch
        rewards = torch.where(mask, rewards, math.nan)
        probs = torch.where(transition_mask(mask), probs, math.nan)
        order = torch.tensor([2, 0, 1, 5, 3, 4])
        rewards = pad(rewards, (0, 5), value=math.nan)[order].requires_grad_()
        probs = pad(probs, (0, 5), value=math.nan)[order]
        mask = pad(mask, (0, 5))[order]
        results = REGULARIZERS[name](rewards, probs, mask)
        for result, expected in zip(results, REGULARIZERS[name](*batch)):
            assert (result is None) == (expected is None)
            if result is not None:
                assert result.item() == pytest.approx(expected.item(), rel=1e-12)
        results[0].backward()
        assert rewards.grad.isfinite().all() and (rewards.grad[~mask] == 0).all()

    @pytest.mark.parametrize("lengths", [(9, 6, 4, 11), (9, 6, 0, 0), (0, 6, 5, 0)])
    def test_a_pair_does_not_depend_on_the_others(self, name, lengths):
        """A change of one pair adds the same, whatever the other pair is."""
        _, probs, mask = random_batch(lengths)
        rewards, _, _ = random_batch((0,) * 8)
        first, second = rewards.view(2, 2, 2, 11)  # pair, version, side, T

        def penalty(a, b):
            rows = [first[a, 0], second[b, 0], first[a, 1], second[b, 1]]
            return REGULARIZERS[name](torch.stack(rows), probs, mask)[0].item()

        change = penalty(0, 0) - penalty(1, 0)
        expected = penalty(0, 1) - penalty(1, 1)
        assert change == pytest.approx(expected, rel=1e-9, abs=1e-12)
