"""What the solution of a task must do, checked in float64. grade.py runs this file.

    cd COPY && python .../exercises/checks.py TASK FILE

Writes into FILE why the points are lost, or nothing. Functions of other tasks are those
of this folder, so that one mistake does not cost two tasks.
"""

import importlib
import importlib.util
import itertools
import json
import math
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tasks import EXPERIMENT, ROOT, TASKS

NAN = math.nan
LENGTHS = (5, 2, 3, 6)  # of the responses of two pairs, chosen ones first


class PointsLost(Exception):
    """args[0] says why."""


def expect(condition, reason):
    if not condition:
        raise PointsLost(reason)


def expect_close(value, expected, reason):
    value = torch.as_tensor(value, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    shapes = f"shape {list(value.shape)}, not {list(expected.shape)}"
    expect(value.shape == expected.shape, f"{reason}: {shapes}")
    expect(torch.allclose(value, expected, rtol=1e-9, atol=1e-9), reason)


def expect_finite(values, reason):
    expect(torch.isfinite(values).all(), reason)


def make_batch(padding=NAN):
    """rewards (4, 7), probs (4, 6) and mask (4, 7) of two pairs."""
    rng = torch.Generator().manual_seed(0)
    rewards = torch.randn(4, 7, generator=rng, dtype=torch.float64)
    probs = torch.rand(4, 6, generator=rng, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    rewards = torch.where(mask, rewards, padding)
    return rewards, torch.where(mask[:, 1:], probs, padding), mask


def slow_values(rewards):
    """z of every response token, by Eq. 4: a list for each row."""
    values = []
    for row, length in enumerate(LENGTHS):
        other = (row + 2) % 4
        mean = rewards[other, : LENGTHS[other]].mean()
        z = torch.sigmoid(rewards[row, :length] - mean)
        if row >= 2:  # a rejected response
            z = 1 - z
        values.append(z.tolist())
    return values


def transitions():
    """(row, t) of every transition."""
    for row, length in enumerate(LENGTHS):
        for t in range(length - 1):
            yield row, t


def gradient_of(output, inputs):
    return torch.autograd.grad(output, inputs)[0]


# Tasks --------------------------------------------------------------------------------


def check_task_1(module):
    _, _, mask = make_batch()
    expected = torch.zeros(4, 6).bool()
    for row, t in transitions():
        expected[row, t] = True
    result = module.transition_mask(mask)
    expect(result.dtype == torch.bool, "transition_mask does not return booleans")
    reason = "a transition needs both its tokens, t and t+1, inside the response"
    expect(torch.equal(result, expected), reason)
    mask = torch.tensor([[True, True, False], [False, True, False]])
    result = module.transition_mask(mask)
    expect(result.tolist() == [[True, False], [False, False]], reason)

    x = torch.tensor([[1.0, 3.0, NAN], [NAN, 5.0, NAN]]).double()
    mean = module.masked_mean(x, mask)
    expect_finite(mean, "masked entries are used. NaN times 0 is NaN")
    expect_close(mean, 3.0, "masked_mean is not the mean where mask is True")
    by_row = module.masked_mean(x, mask, dim=1)
    expect_close(by_row, [2.0, 5.0], "masked_mean of each row (dim=1)")
    mean = module.masked_mean(x, torch.zeros_like(mask))
    expect_close(mean, 0.0, "masked_mean is not 0 where no entry is True")
    x.requires_grad_()
    gradient = gradient_of(module.masked_mean(x, mask), x)
    expect_close(3 * gradient, mask, "masked entries must have gradient 0, not NaN")


def check_task_2(module):
    rewards, _, mask = make_batch()
    logits = module.value_logits(rewards, mask)
    expect(logits.shape == mask.shape, "value_logits has another shape than mask")
    expect_finite(logits, "logits must be finite, also on padding")
    for row, values in enumerate(slow_values(rewards)):
        own = logits[row, : LENGTHS[row]]
        expect(not np.allclose(own, values), "this is z, but the task is its logit")
        expect_close(
            torch.sigmoid(own),
            values,
            "sigma of the result is not z. Row i is compared with row B + i. The mean "
            "is over the tokens of the other response. Rejected: 1 - sigma",
        )
    rewards.requires_grad_()
    gradient = gradient_of(module.value_logits(rewards, mask)[mask].sum(), rewards)
    signs = torch.tensor([[1], [1], [-1], [-1]]) * mask
    expect((gradient[~mask] == 0).all(), "gradient, or NaN, on the padding")
    reason = "the mean needs a stop-gradient, and r_t needs a gradient"
    expect_close(gradient, signs, reason)


def check_task_3(module):
    rewards, probs, mask = make_batch()
    z, n = slow_values(rewards), len(list(transitions()))
    penalty = scale = 0.0
    weights = torch.zeros(4, 7).double()
    for row, t in transitions():
        p, before, after = probs[row, t].item(), z[row][t], z[row][t + 1]
        penalty -= p * (after * math.log(before) + before * math.log(after)) / n
        scale += p * (before + after) / n
        weights[row, t] += p * after
        weights[row, t + 1] += p * before
    gradient = torch.zeros(4, 7).double()
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            gradient[row, t] = weights[row, t] * (1 - z[row][t]) / n
    gradient[:2] *= -1  # z of a chosen response rises with r
    rewards.requires_grad_()
    own_penalty, own_scale = module.icrm(rewards, probs, mask)
    is_tensor = isinstance(own_scale, torch.Tensor)
    expect(is_tensor, "icrm returns two scalars, penalty and scale")
    expect_close(own_penalty, penalty, "the penalty: mean of 2 p_t l_t, p of token t+1")
    expect_close(own_scale, scale, "the scale: mean of 2 p_t (z_t + z_{t+1}) / 2")
    expect(not own_scale.requires_grad, "the scale must have no gradient")
    own_gradient = gradient_of(own_penalty, rewards)
    expect_finite(own_gradient, "the gradient is NaN. Padding may be NaN")
    reason = "the gradient: in both terms z has a stop-gradient and log z has none"
    expect_close(own_gradient, gradient, reason)
    large = (1e4 * rewards.detach()).requires_grad_()
    penalty, _ = module.icrm(large, probs, mask)
    reason = "not finite for rewards of 10,000. Use F.logsigmoid"
    expect_finite(penalty, reason)
    expect_finite(gradient_of(penalty, large), reason)
    own_weights = module.label_weights(rewards, probs, mask)
    expect_close(own_weights, weights, "w_t = p_{t-1} z_{t-1} + p_t z_{t+1}")
    expect(not own_weights.requires_grad, "w_t must have a stop-gradient")


def check_task_4(module):
    rewards, probs, mask = make_batch()
    probs = torch.where(mask[:, 1:], 0.5 + probs / 2, NAN)
    z, terms = slow_values(rewards), []
    for row, t in transitions():
        gap = abs(z[row][t] - z[row][t + 1])
        terms.append(max(0.0, gap - (1 - probs[row, t].item())) ** 2)
    rewards.requires_grad_()
    penalty, scale = module.gap_bound(rewards, probs, mask)
    reason = "mean over transitions of max(0, |z_t - z_{t+1}| - (1 - p_t))^2"
    expect_close(penalty, sum(terms) / len(terms), reason)
    expect(scale is None, "return None as the scale")
    gradient = gradient_of(penalty, rewards)
    expect_finite(gradient, "the gradient must be finite, also on padding")
    pair = torch.tensor([[2.0, -2.0], [0.0, 0.0]], requires_grad=True)
    penalty, _ = module.gap_bound(pair, torch.ones(2, 1), torch.ones(2, 2).bool())
    first, second = gradient_of(penalty, pair)[0]
    expect(first > 0 > second, "both values of a transition must get gradient")


def check_task_5(module):
    rng = np.random.default_rng(0)
    pairs = [list(rng.random((2, 30), np.float32)) for _ in range(200)]

    class FakeSplit:
        def response_values(self, array, i):
            return pairs[i]

    probs = object.__new__(module.Probs)
    probs.split, probs.array, probs.p_source = FakeSplit(), None, "generator"
    expect(np.array_equal(probs[0], pairs[0]), "generator: p must be the stored one")
    probs.p_source = "uniform"
    ones = np.ones((2, 30))
    expect(np.array_equal(probs[0], ones), "uniform: 1 at every token")
    probs.p_source = "inverse"
    inverse = [1 - p for p in pairs[0]]
    expect(np.allclose(probs[0], inverse), "inverse: 1 - p at every token")
    probs.p_source = "shuffled"
    correlations, permutations = [], set()
    for i, pair in enumerate(pairs):
        for side, (own, p) in enumerate(zip(probs[i], pair, strict=True)):
            reason = "shuffled: the same permutation whenever it is read"
            expect(np.array_equal(own, probs[i][side]), reason)
            expect(own[0] == p[0], "shuffled: the first token's p stays in place")
            expect(sorted(own) == sorted(p), "shuffled: keep the response's own values")
            correlations.append(np.corrcoef(own[1:], p[1:])[0, 1])
            permutations.add(tuple(p.tolist().index(value) for value in own.tolist()))
    expect(abs(np.mean(correlations)) < 0.05, "shuffled: correlated with p itself")
    is_own = len(permutations) == 400
    expect(is_own, "shuffled: every response needs its own permutation")


def check_task_6(bon, dpo):
    rng = np.random.default_rng(0)
    for rewards in (rng.normal(size=6), [1, 2, 2, 0, 2, 1], [3] * 6):
        gold_scores = rng.normal(size=6)
        for n in range(1, 7):
            subset_scores = []
            for subset in itertools.combinations(range(6), n):
                best = max(rewards[i] for i in subset)
                tied = [gold_scores[i] for i in subset if rewards[i] == best]
                subset_scores.append(np.mean(tied))
            expect_close(
                bon.best_of_n(rewards, gold_scores, n),
                np.mean(subset_scores),
                "best_of_n is the mean over all subsets of n candidates, drawn without "
                "replacement. Tied candidates are averaged",
            )
    margins = torch.tensor([0.3, -2.0, 5.0]).double()
    losses = [math.log(1 + math.exp(-0.7 * margin)) for margin in margins.tolist()]
    loss = dpo.dpo_loss(margins, 0.7)
    expect_close(loss, np.mean(losses), "the mean of -log sigma(beta * margin)")
    loss = dpo.dpo_loss(-1e4 * margins, 1.0)
    expect_finite(loss, "dpo_loss must be finite for large margins")


def check_task_7(module):
    penalize = module.reward_smoothness
    clean_rewards, clean_probs, mask = make_batch(padding=0.0)
    rewards, probs, _ = make_batch()
    penalty, scale = penalize(clean_rewards, clean_probs, mask)
    expect(penalty.shape == (), "the penalty must be one number")
    expect_finite(penalty, "the penalty must be finite")
    is_valid = scale is None or (scale.shape == () and not scale.requires_grad)
    expect(is_valid, "the scale must be None, or one number without gradient")
    rewards.requires_grad_()
    with_nan, _ = penalize(rewards, probs, mask)
    expect_close(with_nan, penalty, "padding, which may be NaN, changes the result")
    gradient = gradient_of(with_nan, rewards)
    expect_finite(gradient, "the gradient must be finite, also on padding")
    expect((gradient[~mask] == 0).all(), "the gradient must be 0 on padding")
    expect((gradient != 0).any(), "the gradient is 0 everywhere")
    for before, after in zip(make_batch(), (rewards, probs, mask)):
        is_same = torch.equal(before.nan_to_num(-9), after.nan_to_num(-9))
        expect(is_same, "an input was changed in place")

    def penalty_with(first_factor, second_factor):
        factors = [first_factor, second_factor] * 2  # for the two pairs
        scaled = clean_rewards * torch.tensor(factors).double()[:, None]
        return penalize(scaled, clean_probs, mask)[0]

    change = penalty_with(2, 1) - penalty_with(1, 1)
    other_change = penalty_with(2, 2) - penalty_with(1, 2)
    expect_close(change, other_change, "a pair's penalty depends on the other pair")
    other, _ = penalize(clean_rewards, clean_probs.roll(1, 1), mask)
    expect(abs(other - penalty) > 1e-12, "the penalty does not depend on p")
    padded = [F.pad(x, (0, 3), value=NAN) for x in (rewards.detach(), probs)]
    longer, _ = penalize(*padded, F.pad(mask, (0, 3)))
    expect_close(longer, penalty, "longer padding changes the result")
    large = (1e4 * clean_rewards).requires_grad_()
    gradient = gradient_of(penalize(large, clean_probs, mask)[0], large)
    expect_finite(gradient, "not finite for rewards of 10,000")


def check_task_8():
    path = Path(EXPERIMENT)
    reason = f"{EXPERIMENT} is missing. Make it with exercises/experiment.py"
    expect(path.is_file(), reason)
    report = json.loads(path.read_text(encoding="utf-8"))
    differences = np.array(report["differences"], dtype=float)
    n_seeds = len(set(report["seeds"]))
    expect(len(differences) == n_seeds >= 5, "at least five different seeds")
    is_valid = np.isfinite(differences).all() and differences.std() > 0
    expect(is_valid, "one difference for every seed")
    mean, half_width = report["mean"], report["half_width"]
    expected = original_module("lab/intervals").mean_and_half_width(differences)
    reason = "the mean of the differences, and half the width of its 95% t interval"
    expect_close([mean, half_width], expected, reason)
    is_honest = report["is_better"] is bool(mean - half_width > 0)
    expect(is_honest, "it is better only if the whole interval is above 0")


# Running a task -----------------------------------------------------------------------


def original_module(name):
    """A module of this folder, whatever the copy has."""
    path = ROOT / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"original_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_copy(task):
    """The copy's modules of a task, with this folder's functions for other tasks."""
    sys.path.insert(0, str(Path.cwd()))
    modules = {}
    for name, _ in TASKS[task].functions:
        modules[name] = importlib.import_module(name)
    for number, other_task in TASKS.items():
        for name, function in other_task.functions:
            if number != task and name in modules:
                original = getattr(original_module(name), function)
                setattr(modules[name], function, original)
    return modules.values()


def main(task, verdict):
    torch.manual_seed(0)
    try:
        globals()[f"check_task_{task}"](*load_copy(task))
        reason = ""
    except PointsLost as lost:
        reason = str(lost)
    except Exception as error:  # a student's code may fail in any way
        place = ""
        for frame in traceback.extract_tb(error.__traceback__)[1:]:
            if str(Path.cwd()) in frame.filename:
                file = Path(frame.filename).name
                place = f" ({frame.name}, line {frame.lineno} of {file})"
        reason = f"{type(error).__name__}: {error}{place}"
    Path(verdict).write_text(reason, encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
