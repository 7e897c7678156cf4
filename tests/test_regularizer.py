"""The maths of regularizer.py against slow twins written from the equations, token by token.

The twins read lists of unequal length, without padding or masks, and two sets of rewards: the live
ones, and those inside the equations' stop-gradients. With both the same they give the values; their
finite differences in the live ones alone are the gradients, others wherever a detach is missing.
"""
import math
from collections import defaultdict

import pytest
import torch
from torch.nn.functional import pad

from regularizer import (KAPPA, READOUTS, REGULARIZERS, SEGMENT_P, SUM_SCALE, TD_LAMBDA,
                         enumerated_world, icrm, icrm_by_token, link_mask, read_out)

# Lengths of first sides, then of second ones; an empty side makes its item a labelled response.
SHAPES = {"pairs": (7, 11, 1, 9, 4, 6), "mixed": (7, 3, 0, 5, 6, 0)}


def random_batch(lengths, T=11):
    """Random rewards, probs and the mask of left-aligned responses of these lengths."""
    rng = torch.Generator().manual_seed(0)
    rewards = torch.randn(len(lengths), T, generator=rng, dtype=torch.float64)
    probs = torch.rand(len(lengths), T - 1, generator=rng, dtype=torch.float64)
    return rewards, probs, torch.arange(T) < torch.tensor(lengths)[:, None]


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def batch(request):
    return random_batch(request.param)


def as_lists(x, mask):
    return [row[inside].tolist() for row, inside in zip(x, mask)]


# Slow twins --------------------------------------------------------------------------------------

def mean(values):
    values = list(values)
    return sum(values) / max(len(values), 1)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def slow_values(live, fixed):
    """z of Eq. 4; the opposing response's mean is of the fixed rewards, 0 where nobody opposes."""
    B, z = len(live) // 2, []
    for row, response in enumerate(live):
        centred = [sigmoid(r - mean(fixed[(row + B) % (2 * B)])) for r in response]
        z.append(centred if row < B else [1 - value for value in centred])
    return z


def slow_segment_bt(live, p):
    read = []
    for response, odds in zip(live, p):
        starts = [t + 1 for t, surprise in enumerate(odds) if surprise < SEGMENT_P]
        read.append(mean(response[end - 1] for end in [*starts, len(response)] if response))
    B = len(live) // 2
    return [-math.log(sigmoid(chosen - rejected)) for chosen, rejected in zip(read[:B], read[B:])]


def slow_penalties(live, fixed, p):
    """{name: penalty} of every regularizer that the project has, and {"scale": icrm's}."""
    z, sg, terms = slow_values(live, fixed), slow_values(fixed, fixed), defaultdict(list)
    for i, r in enumerate(live):
        for t in range(len(r) - 1):
            a, b, odds = z[i][t], z[i][t + 1], p[i][t]
            l = -0.5 * (sg[i][t + 1] * math.log(a) + sg[i][t] * math.log(b))
            terms["icrm"].append(2 * odds * l)
            terms["scale"].append(2 * odds * (a + b) / 2)
            terms["squared_gap"].append(odds * (a - b) ** 2)
            terms["gap_bound"].append(max(abs(a - b) - (1 - odds), 0) ** 2)
            terms["quiet"].append(odds * (r[t + 1] - r[t]) ** 2)
            terms["tcrm_smooth"].append((r[t] - fixed[i][t + 1]) ** 2)
            terms["tcrm_lookahead"].append((r[t] - fixed[i][-1]) ** 2)
        for t in range(len(r)):
            part = (t + 0.5) / len(r)
            terms["none"].append(0.0)
            terms["dense_bt"].append(-math.log(z[i][t]))
            terms["dense_bt_early"].append(-2 * (1 - part) * math.log(z[i][t]))
            terms["dense_bt_late"].append(-2 * part * math.log(z[i][t]))
            # the lambda-return as a sum of n-step values, the label being the last one
            left = len(r) - 1 - t
            target = TD_LAMBDA ** left + sum((1 - TD_LAMBDA) * TD_LAMBDA ** (n - 1) * sg[i][t + n]
                                             for n in range(1, left + 1))
            terms["td_lambda"].append(-target * math.log(z[i][t])
                                      - (1 - target) * math.log(1 - z[i][t]))
    terms["segment_bt"] = slow_segment_bt(live, p)
    found = {name: mean(values) for name, values in terms.items()}
    return found | {"icrm_gap_bound": found["icrm"] + KAPPA * found["gap_bound"]}


def slow_gradients(live, p, step=1e-5):
    """{(row, t): {name: slope}} by central differences, what stands inside stop-gradients held."""
    slopes = {}
    for i, t in ((i, t) for i, row in enumerate(live) for t in range(len(row))):
        ends = []
        for sign in (1, -1):
            moved = [list(row) for row in live]
            moved[i][t] += sign * step
            ends.append(slow_penalties(moved, live, p))
        slopes[i, t] = {name: (ends[0][name] - ends[1][name]) / (2 * step) for name in ends[0]}
    return slopes


def test_every_regularizer_equals_its_slow_twin_in_value_scale_and_gradient(batch):
    rewards, probs, mask = batch
    live, p = as_lists(rewards, mask), as_lists(probs, link_mask(mask))
    expected, slopes = slow_penalties(live, live, p), slow_gradients(live, p)
    assert expected["gap_bound"] > 0 and len(expected) == 14
    for name in expected.keys() - {"scale"}:
        inputs = rewards.clone().requires_grad_()
        penalty, scale = REGULARIZERS[name](inputs, probs, mask)
        assert penalty.item() == pytest.approx(expected[name], rel=1e-12), name
        assert (scale is not None) == name.startswith("icrm")
        if scale is not None:
            assert scale.item() == pytest.approx(expected["scale"], rel=1e-12), name
        penalty.backward()
        for (i, t), slope in slopes.items():
            assert inputs.grad[i, t].item() == pytest.approx(slope[name], rel=1e-6, abs=1e-8), name


@pytest.mark.parametrize("kind", READOUTS)
def test_a_read_out_equals_its_loop_and_reads_no_later_token(kind, batch):
    scores, _, mask = batch
    found = read_out(torch.where(mask, scores, math.nan), mask, kind)
    for response, rewards in zip(as_lists(scores, mask), as_lists(found, mask)):
        for t, reward in enumerate(rewards):
            so_far = response[:t + 1]
            expected = {"last": so_far[-1], "mean": mean(so_far), "sum": SUM_SCALE * sum(so_far)}
            assert reward == pytest.approx(expected[kind], rel=1e-12)
    scores[:, 3] += 1
    assert torch.equal(read_out(scores, mask, kind)[:, :3], found[:, :3])
    assert torch.isfinite(found).all()


# Proofs ------------------------------------------------------------------------------------------

def test_icrm_by_token_is_icrm_in_value_scale_and_gradient(batch):
    """Proof 2: the paper's loss is the label at every token, by detached weights."""
    found = []
    for regularizer in (icrm, icrm_by_token):
        rewards = batch[0].clone().requires_grad_()
        penalty, scale = regularizer(rewards, *batch[1:])
        found.append((penalty, scale, *torch.autograd.grad(penalty, rewards)))
    for by_link, by_token in zip(*found):
        assert torch.allclose(by_link, by_token, rtol=1e-12, atol=1e-15) and by_link.abs().sum() > 0


def test_the_gap_bounds_identity_and_bound_hold_and_the_bound_is_tight():
    """Proof 1: r_m - r_m+1 = (1 - p) (E[r | another token] - r_m+1), so |r_m - r_m+1| <= 1 - p."""
    probs, rewards = enumerated_world(depth=5, vocabulary=4, seed=3)
    reached = 0.0
    for m, table in enumerate(probs):
        for prefix, row in enumerate(table.tolist()):
            after = rewards[m + 1].view_as(table)[prefix].tolist()
            for token, p in enumerate(row):
                others = [u for u in range(4) if u != token]
                expected = sum(row[u] * after[u] for u in others) / sum(row[u] for u in others)
                gap = rewards[m][prefix].item() - after[token]
                assert gap == pytest.approx((1 - p) * (expected - after[token]), abs=1e-12)
                assert abs(gap) <= 1 - p + 1e-12
                reached = max(reached, abs(gap) / (1 - p))
    assert reached > 0.99


# What pushes where -------------------------------------------------------------------------------

def gradient_of(name, chosen, rejected, p=0.9):
    """Gradient on a chosen response's rewards, and on a rejected one's."""
    rewards = torch.tensor([chosen, rejected], dtype=torch.float64, requires_grad=True)
    probs = torch.full((2, len(chosen) - 1), p, dtype=torch.float64)
    REGULARIZERS[name](rewards, probs, torch.ones(2, len(chosen), dtype=torch.bool))[0].backward()
    return rewards.grad


def test_icrm_pushes_chosen_up_and_rejected_down_whether_consistent_or_not():
    for chosen, rejected in (([0.0] * 6, [0.0] * 6), ([-3.0, 2.0, 1.0], [0.5, -1.0, 4.0])):
        gradient = gradient_of("icrm", chosen, rejected)
        assert (gradient[0] < 0).all() and (gradient[1] > 0).all()


def test_two_sided_terms_rest_at_equal_values_and_pull_unequal_ones_together():
    for name in ("squared_gap", "gap_bound", "quiet"):
        assert (gradient_of(name, [0.4, 0.4], [0.4, 0.4]) == 0).all()
        low, high = gradient_of(name, [-1.0, 1.5], [0.0, 0.0])[0]
        assert low < 0 < high
        assert (gradient_of(name, [-1.0, 1.5], [0.0, 0.0], p=0.0) == 0).all()     # news is free


# The contract ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", REGULARIZERS)
class TestEveryRegularizer:
    @pytest.mark.parametrize("lengths", [*SHAPES.values(), (1, 1)], ids=[*SHAPES, "one token"])
    @pytest.mark.parametrize("size", [1.0, 1e4])
    def test_is_a_finite_scalar_with_a_finite_gradient(self, name, lengths, size):
        rewards, probs, mask = random_batch(lengths)
        rewards = (size * rewards.float()).requires_grad_()
        penalty, scale = REGULARIZERS[name](rewards, probs.float(), mask)
        assert penalty.shape == () and torch.isfinite(penalty)
        if scale is not None:
            assert scale.shape == () and torch.isfinite(scale) and not scale.requires_grad
        penalty.backward()
        assert torch.isfinite(rewards.grad).all()

    def test_padding_changes_nothing_not_even_as_nan_nor_does_the_order_of_pairs(self, name, batch):
        rewards, probs, mask = batch
        dirty = torch.where(mask, rewards, math.nan), torch.where(link_mask(mask), probs, math.nan)
        order = torch.tensor([2, 0, 1, 5, 3, 4])
        rewards, probs = (pad(x, (0, 5), value=math.nan)[order].requires_grad_() for x in dirty)
        mask = pad(mask, (0, 5))[order]
        found = REGULARIZERS[name](rewards, probs, mask)
        for a, b in zip(REGULARIZERS[name](*batch), found):
            assert a is b is None or a.item() == pytest.approx(b.item(), rel=1e-12)
        found[0].backward()
        assert torch.isfinite(rewards.grad).all() and (rewards.grad[~mask] == 0).all()

    @pytest.mark.parametrize("lengths", [(9, 6, 4, 11), (9, 6, 0, 0), (0, 6, 5, 0)])
    def test_an_item_is_the_same_with_any_batch_mates(self, name, lengths):
        """A sum over items, whatever divides it: a change of one adds the same beside any other."""
        _, probs, mask = random_batch(lengths)
        first, second = random_batch((0,) * 8)[0].view(2, 2, 2, 11)

        def penalty(a, b):
            both = torch.stack([first[a, 0], second[b, 0], first[a, 1], second[b, 1]])
            return REGULARIZERS[name](both, probs, mask)[0].item()

        change = penalty(0, 0) - penalty(1, 0)
        assert change == pytest.approx(penalty(0, 1) - penalty(1, 1), rel=1e-9, abs=1e-12)
