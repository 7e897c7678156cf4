"""The maths of regularizer.py against slow twins written from the equations."""
import math

import pytest
import torch

from regularizer import (KAPPA, REGULARIZERS, enumerated_world, icrm, icrm_gap_bound, largest_gap, link_gradient, link_mask,
                         masked_mean, shuffled, total_probability, value_logits)
from train import against_nobody

NAMES = sorted(REGULARIZERS)


def random_batch(B=3, T=11, seed=0, dtype=torch.float64):
    """Rewards, probs and a mask with prompts and paddings of unequal length."""
    rng = torch.Generator().manual_seed(seed)
    rewards = torch.randn(2 * B, T, generator=rng, dtype=dtype)
    probs = torch.rand(2 * B, T - 1, generator=rng, dtype=dtype)
    start = torch.randint(0, 4, (2 * B, 1), generator=rng)
    end = torch.randint(6, T + 1, (2 * B, 1), generator=rng)
    t = torch.arange(T)
    return rewards, probs, (t >= start) & (t < end)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def slow_values(rewards, mask):
    """z of the paper's Eq. 4 with loops: {(row, t): z}."""
    B, z = len(rewards) // 2, {}
    for row in range(2 * B):
        opponent = row + B if row < B else row - B
        others = [float(rewards[opponent, t]) for t in range(rewards.size(1)) if mask[opponent, t]]
        for t in range(rewards.size(1)):
            if mask[row, t]:
                centred = sigmoid(float(rewards[row, t]) - sum(others) / len(others))
                z[row, t] = centred if row < B else 1 - centred
    return z


def test_icrm_equals_a_double_loop():
    rewards, probs, mask = random_batch()
    z, penalty, scale, links = slow_values(rewards, mask), 0.0, 0.0, 0
    for row in range(len(rewards)):
        for t in range(rewards.size(1) - 1):
            if mask[row, t] and mask[row, t + 1]:
                a, b, p = z[row, t], z[row, t + 1], float(probs[row, t])
                penalty += 2 * p * -0.5 * (b * math.log(a) + a * math.log(b))
                scale += 2 * p * (a + b) / 2
                links += 1
    found, found_scale = icrm(rewards, probs, mask)
    assert found.item() == pytest.approx(penalty / links, rel=1e-12)
    assert found_scale.item() == pytest.approx(scale / links, rel=1e-12)


def test_icrm_uniform_is_icrm_with_p_one_and_ignores_p():
    rewards, probs, mask = random_batch()
    uniform = REGULARIZERS["icrm_uniform"]
    assert uniform(rewards, probs, mask)[0] == icrm(rewards, torch.ones_like(probs), mask)[0]
    assert uniform(rewards, probs * 0.3, mask)[0] == uniform(rewards, probs, mask)[0]


def test_dense_bt_and_squared_gap_equal_loops():
    rewards, probs, mask = random_batch()
    z = slow_values(rewards, mask)
    dense = [-math.log(value) for value in z.values()]
    gaps = [float(probs[row, t]) * (z[row, t] - z[row, t + 1]) ** 2 for row, t in z if (row, t + 1) in z]
    assert REGULARIZERS["dense_bt"](rewards, probs, mask)[0].item() == pytest.approx(sum(dense) / len(dense), rel=1e-12)
    assert REGULARIZERS["squared_gap"](rewards, probs, mask)[0].item() == pytest.approx(sum(gaps) / len(gaps), rel=1e-12)


def each_link(rewards, probs, mask):
    """(row, t, z_t, z_t+1, p) of every link, z by loops."""
    z = slow_values(rewards, mask)
    return [(row, t, z[row, t], z[row, t + 1], float(probs[row, t])) for row, t in z if (row, t + 1) in z]


def test_the_gap_bound_penalty_equals_a_loop():
    rewards, probs, mask = random_batch()
    links = each_link(rewards, probs, mask)
    expected = sum(max(abs(a - b) - (1 - p), 0) ** 2 for _, _, a, b, p in links) / len(links)
    assert expected > 0
    assert REGULARIZERS["gap_bound"](rewards, probs, mask)[0].item() == pytest.approx(expected, rel=1e-12)


def test_the_combined_terms_are_sums():
    rewards, probs, mask = random_batch()
    paper, scale = icrm(rewards, probs, mask)
    for name in ("gap_bound", "squared_gap"):
        found, found_scale = REGULARIZERS["icrm_" + name](rewards, probs, mask)
        assert found.item() == pytest.approx((paper + KAPPA * REGULARIZERS[name](rewards, probs, mask)[0]).item(), rel=1e-12)
        assert found_scale == scale
    stronger = paper + 7 * REGULARIZERS["gap_bound"](rewards, probs, mask)[0]
    assert icrm_gap_bound(rewards, probs, mask, kappa=7)[0].item() == pytest.approx(stronger.item(), rel=1e-12)


def test_the_controls_of_the_gap_bound_are_it_with_p_one_and_with_p_elsewhere():
    rewards, probs, mask = random_batch()
    links = each_link(rewards, probs, mask)
    expected = sum(-(b * math.log(a) + a * math.log(b)) + KAPPA * (a - b) ** 2 for _, _, a, b, _ in links) / len(links)
    assert REGULARIZERS["icrm_gap_bound_uniform"](rewards, probs, mask)[0].item() == pytest.approx(expected, rel=1e-12)
    moved = REGULARIZERS["icrm_gap_bound_shuffled"](rewards, probs, mask)[0]
    assert moved == icrm_gap_bound(rewards, shuffled(probs, mask), mask)[0] != icrm_gap_bound(rewards, probs, mask)[0]
    for row in range(len(probs)):
        inside = link_mask(mask)[row]
        assert sorted(shuffled(probs, mask)[row][inside].tolist()) == sorted(probs[row][inside].tolist())


def test_labelled_responses_are_pairs_against_nobody():
    """Pointwise z = sigma(r) of a correct response and 1 - sigma(r) of an incorrect one, with nothing to centre on."""
    rewards, probs, mask = random_batch(B=3)
    correct = 2
    z = {(row, t): sigmoid(float(rewards[row, t]) * (1 if row < correct else -1)) for row, t in mask.nonzero().tolist()}
    links = [(a, z[row, t + 1], float(probs[row, t])) for (row, t), a in z.items() if (row, t + 1) in z]
    paper = sum(-p * (b * math.log(a) + a * math.log(b)) for a, b, p in links) / len(links)
    dense = -sum(map(math.log, z.values())) / len(z)
    gap = sum(max(abs(a - b) - (1 - p), 0) ** 2 for a, b, p in links) / len(links)
    batch = against_nobody(rewards, probs, mask, correct)
    for name, expected in (("icrm", paper), ("dense_bt", dense), ("gap_bound", gap)):
        assert REGULARIZERS[name](*batch)[0].item() == pytest.approx(expected, rel=1e-12)


def test_shuffling_keeps_each_responses_probabilities_and_moves_them():
    """With p shuffled, the scale of constant values is that of `icrm`; with varying values the penalty is not."""
    rewards, probs, mask = random_batch(B=2, T=40)
    mask[:] = True
    mask[1, 30:] = False
    shuffle = REGULARIZERS["icrm_shuffled"]
    flat = torch.zeros_like(rewards)
    for row in range(4):    # one response's links at a time: the multiset of p within it is unchanged
        alone = mask.clone()
        alone[torch.arange(4) != row] = False
        assert shuffle(flat, probs, alone)[1].item() == pytest.approx(icrm(flat, probs, alone)[1].item(), rel=1e-12)
    assert shuffle(rewards, probs, mask)[0] != icrm(rewards, probs, mask)[0]
    assert shuffle(rewards, probs, mask)[0] == shuffle(rewards, probs, mask)[0]
    moved = sum(shuffle(rewards, only_link(probs, t), mask)[0] != icrm(rewards, only_link(probs, t), mask)[0] for t in range(39))
    assert moved > 30       # nearly every link's p goes to another link


def only_link(probs, t):
    """p = 1 at link t alone."""
    one = torch.zeros_like(probs)
    one[:, t] = 1
    return one


def test_the_td_rivals_equal_loops():
    rewards, probs, mask = random_batch()
    z, links = slow_values(rewards, mask), each_link(rewards, probs, mask)
    smooth = sum(float(rewards[row, t] - rewards[row, t + 1]) ** 2 for row, t, *_ in links) / len(links)
    last = {row: max(t for r, t in z if r == row) for row, _ in z}
    ahead = sum(float(rewards[row, t] - rewards[row, last[row]]) ** 2 for row, t in z if t < last[row]) / len(links)
    assert REGULARIZERS["tcrm_smooth"](rewards, probs, mask)[0].item() == pytest.approx(smooth, rel=1e-12)
    assert REGULARIZERS["tcrm_lookahead"](rewards, probs, mask)[0].item() == pytest.approx(ahead, rel=1e-12)
    total = 0.0
    for row, t in z:
        # the lambda-return written as a sum of n-step values, the label being the last one
        steps = last[row] - t
        target = sum(0.1 * 0.9 ** (n - 1) * z[row, t + n] for n in range(1, steps + 1)) + 0.9 ** steps
        total -= target * math.log(z[row, t]) + (1 - target) * math.log(1 - z[row, t])
    assert REGULARIZERS["td_lambda"](rewards, probs, mask)[0].item() == pytest.approx(total / len(z), rel=1e-12)


def test_the_td_targets_carry_no_gradient():
    mask = torch.ones(2, 3, dtype=torch.bool)
    for name, expected in (("tcrm_smooth", [2 * (1 - 4) / 4, 2 * (4 - 2) / 4, 0]), ("tcrm_lookahead", [2 * (1 - 2) / 4, 2 * (4 - 2) / 4, 0])):
        rewards = torch.tensor([[1.0, 4.0, 2.0], [0.0, 0.0, 0.0]], requires_grad=True)
        REGULARIZERS[name](rewards, torch.ones(2, 2), mask)[0].backward()
        assert rewards.grad[0].tolist() == pytest.approx(expected)


def test_two_sided_terms_are_zero_at_equal_values_and_icrm_is_not():
    for name in ("squared_gap", "gap_bound"):
        assert link_gradient(name, 0.4, 0.4) == pytest.approx(0, abs=1e-12)
        assert link_gradient(name, 0.3, 0.8) < 0 < link_gradient(name, 0.8, 0.3)
    assert link_gradient("icrm", 0.8, 0.3) == pytest.approx(2 * 0.9 * -0.5 * 0.3 * 0.2)


def test_icrm_gradient_stops_where_the_paper_stops_it():
    """One chosen link: dl/dr_t = -1/2 z_t+1 (1 - z_t), and the mirror on the other end. With a gradient through
    either sg[z] or through the opposing mean this would not hold."""
    rewards = torch.tensor([[0.3, -0.8], [0.1, 0.4]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 2, dtype=torch.bool)
    probs = torch.tensor([[0.7], [0.0]], dtype=torch.float64)      # the rejected link has no weight
    penalty, scale = icrm(rewards, probs, mask)
    penalty.backward()
    z, z_next = torch.sigmoid(rewards[0] - 0.25).tolist()
    per_link = 2 * 0.7 / 2                                          # 2 p over two links
    expected = [-0.5 * z_next * (1 - z) * per_link, -0.5 * z * (1 - z_next) * per_link]
    assert rewards.grad[0].tolist() == pytest.approx(expected, rel=1e-12)
    assert rewards.grad[1].tolist() == [0.0, 0.0]                   # the opposing mean carries no gradient
    assert not scale.requires_grad


def test_icrm_pushes_chosen_up_and_rejected_down_even_at_equal_values():
    rewards = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 6, dtype=torch.bool)
    icrm(rewards, torch.full((2, 5), 0.9, dtype=torch.float64), mask)[0].backward()
    assert (rewards.grad[0] < 0).all() and (rewards.grad[1] > 0).all()


def test_the_opposing_mean_is_over_the_response_alone():
    rewards, _, mask = random_batch()
    changed = torch.where(mask, rewards, rewards + 100.0)
    assert torch.equal(value_logits(rewards, mask)[mask], value_logits(changed, mask)[mask])


def test_masked_mean_of_nothing_is_zero():
    assert masked_mean(torch.ones(3), torch.zeros(3, dtype=torch.bool)) == 0


@pytest.mark.parametrize("name", NAMES)
class TestEveryRegularizer:
    def test_returns_a_scalar_and_a_detached_scale(self, name):
        rewards, probs, mask = random_batch()
        penalty, scale = REGULARIZERS[name](rewards.requires_grad_(), probs, mask)
        assert penalty.shape == () and torch.isfinite(penalty)
        assert scale is None or (scale.shape == () and not scale.requires_grad)

    def test_padding_never_changes_it(self, name):
        rewards, probs, mask = random_batch()
        wider = [torch.nn.functional.pad(x, (0, 5)) for x in (rewards, probs, mask)]
        for a, b in zip(REGULARIZERS[name](rewards, probs, mask), REGULARIZERS[name](*wider)):
            assert a is b is None or a.item() == pytest.approx(b.item(), rel=1e-12)

    def test_nan_in_prompt_or_padding_never_leaks(self, name):
        rewards, probs, mask = random_batch()
        expected, _ = REGULARIZERS[name](rewards, probs, mask)
        dirty = torch.where(mask, rewards, math.nan).requires_grad_()
        dirty_probs = torch.where(link_mask(mask), probs, math.nan)
        penalty, scale = REGULARIZERS[name](dirty, dirty_probs, mask)
        assert penalty.item() == pytest.approx(expected.item(), rel=1e-12)
        assert scale is None or torch.isfinite(scale)
        penalty.backward()
        assert torch.isfinite(dirty.grad).all() and (dirty.grad[~mask] == 0).all()

    def test_order_of_the_pairs_never_changes_it(self, name):
        rewards, probs, mask = random_batch(B=3)
        order = torch.tensor([2, 0, 1, 5, 3, 4])
        a, b = REGULARIZERS[name](rewards, probs, mask), REGULARIZERS[name](rewards[order], probs[order], mask[order])
        assert a[0].item() == pytest.approx(b[0].item(), rel=1e-12)

    def test_a_pair_is_the_same_with_any_batch_mates(self, name):
        """A sum over pairs, whatever it is divided by: what a change of one pair adds, it adds beside any other."""
        _, probs, mask = random_batch(B=2)
        a, b, c, d = torch.randn(4, 2, mask.size(1), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        penalty = lambda one, two: REGULARIZERS[name](torch.stack([one[0], two[0], one[1], two[1]]), probs, mask)[0].item()
        assert penalty(a, b) - penalty(c, b) == pytest.approx(penalty(a, d) - penalty(c, d), rel=1e-9, abs=1e-12)

    def test_a_labelled_response_is_the_same_with_any_batch_mates(self, name):
        _, probs, mask = random_batch(B=1)
        a, b, c, d = torch.randn(4, mask.size(1), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        penalty = lambda *rows: REGULARIZERS[name](*against_nobody(torch.stack(rows), probs, mask, 1))[0].item()
        assert penalty(a, b) - penalty(c, b) == pytest.approx(penalty(a, d) - penalty(c, d), rel=1e-9, abs=1e-12)

    def test_extreme_rewards_stay_finite(self, name):
        rewards, probs, mask = random_batch(dtype=torch.float32)
        rewards = (rewards * 1e4).requires_grad_()
        penalty, _ = REGULARIZERS[name](rewards, probs, mask)
        assert torch.isfinite(penalty)
        penalty.backward()
        assert torch.isfinite(rewards.grad).all()

    def test_responses_of_one_token_give_a_finite_penalty(self, name):
        rewards, probs, _ = random_batch(B=1, T=8)
        mask = torch.zeros(2, 8, dtype=torch.bool)
        mask[:, 2] = True
        penalty, scale = REGULARIZERS[name](rewards, probs, mask)
        assert torch.isfinite(penalty) and (scale is None or torch.isfinite(scale))
        assert name != "icrm" or penalty == scale == 0      # no link


def test_the_gap_bound_holds_exactly_in_the_enumerated_world():
    probs, rewards = enumerated_world(depth=6, vocabulary=4, seed=3)
    reached = 0.0
    for m, p in enumerate(probs):
        assert torch.allclose(total_probability(p, rewards[m + 1].view_as(p)), rewards[m], atol=1e-15)
        gap = (rewards[m][:, None] - rewards[m + 1].view_as(p)).abs()
        assert (gap <= largest_gap(p) + 1e-15).all()
        reached = max(reached, (gap / largest_gap(p)).max().item())
    assert reached > 0.99     # and it is tight: somewhere the gap reaches its bound
