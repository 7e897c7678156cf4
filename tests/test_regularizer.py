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
from torch.nn.functional import pad

from regularizer import (
    GAP_BOUND_WEIGHT,
    REGULARIZERS,
    TD_LAMBDA,
    enumerated_world,
    icrm,
    icrm_by_token,
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
    """{name: penalty} of every regularizer, and {"scale": that of icrm}."""
    z, sg = slow_values(live, fixed), slow_values(fixed, fixed)
    terms = defaultdict(list)
    for i, r in enumerate(live):
        for t in range(len(r) - 1):
            a, b, p_t = z[i][t], z[i][t + 1], p[i][t]
            l = -0.5 * (sg[i][t + 1] * math.log(a) + sg[i][t] * math.log(b))
            terms["icrm"].append(2 * p_t * l)
            terms["scale"].append(2 * p_t * (a + b) / 2)
            terms["squared_gap"].append(p_t * (a - b) ** 2)
            terms["gap_bound"].append(max(abs(a - b) - (1 - p_t), 0) ** 2)
            terms["reward_smoothness"].append(p_t * (r[t + 1] - r[t]) ** 2)
        for t in range(len(r)):
            target = lambda_return(sg[i], t)
            cross_entropy = target * math.log(z[i][t])
            cross_entropy += (1 - target) * math.log(1 - z[i][t])
            terms["none"].append(0.0)
            terms["dense_bt"].append(-math.log(z[i][t]))
            terms["td_lambda"].append(-cross_entropy)
    penalties = {name: mean(values) for name, values in terms.items()}
    bound = GAP_BOUND_WEIGHT * penalties["gap_bound"]
    penalties["icrm_gap_bound"] = penalties["icrm"] + bound
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
    assert expected["gap_bound"] > 0 and len(expected) == len(REGULARIZERS) + 1
    for name in expected.keys() - {"scale"}:
        inputs = rewards.clone().requires_grad_()
        penalty, scale = REGULARIZERS[name](inputs, probs, mask)
        assert penalty.item() == pytest.approx(expected[name], rel=1e-12), name
        assert (scale is not None) == name.startswith("icrm")
        if scale is not None:
            assert scale.item() == pytest.approx(expected["scale"], rel=1e-12), name
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
