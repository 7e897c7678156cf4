"""The properties that a task must have, in float64 and against slow twins: what grade.py runs.

    cd COPY; python .../exercises/checks.py TASK FILE      writes into FILE why it fails, or nothing

The copy's functions of the task are checked; all others are this folder's, so that one mistake does
not cost two tasks.
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

from tasks import EXPERIMENT, ROOT, TASKS

NAN = math.nan


class Lost(Exception):
    """Why the points of a task are lost."""


def expect(right, why):
    if not right:
        raise Lost(why)


def near(a, b, why):
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    expect(a.shape == b.shape, f"{why}: the shape is {tuple(a.shape)}, not {tuple(b.shape)}")
    expect(torch.allclose(a, b, rtol=1e-9, atol=1e-9), why)


def batch(dirty=True, seed=0, lengths=(5, 2, 3, 6)):
    """Two pairs: rewards, probs and mask, with NaN where nothing is."""
    rng = torch.Generator().manual_seed(seed)
    rewards = torch.randn(len(lengths), 7, generator=rng, dtype=torch.float64)
    probs = torch.rand(len(lengths), 6, generator=rng, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    if dirty:
        rewards = torch.where(mask, rewards, NAN)
        probs = torch.where(mask[:, 1:], probs, NAN)
    return rewards, probs, mask, lengths


def values(rewards, lengths):
    """z of every token of the response i, by Eq. 4: a list for each row."""
    B, z = len(lengths) // 2, []
    for i, length in enumerate(lengths):
        other = (i + B) % (2 * B)
        mean = sum(rewards[other][:lengths[other]].tolist()) / max(1, lengths[other])
        sign = 1 if i < B else -1
        z.append([1 / (1 + math.exp(-sign * (r - mean))) for r in rewards[i][:length].tolist()])
    return z


def task_1(module):
    _, _, mask, lengths = batch()
    expected = [[t + 1 < length for t in range(6)] for length in lengths]
    found = module.link_mask(mask)
    expect(found.dtype == torch.bool, "link_mask is not of True and False")
    expect(found.tolist() == expected, "a link needs both its ends, t and t+1, inside the response")
    gap = torch.tensor([[True, True, False], [False, True, False]])
    expect(module.link_mask(gap).tolist() == [[True, False], [False, False]],
           "a link needs both its ends, t and t+1, inside the response")
    x = torch.tensor([[1.0, 3.0, NAN], [NAN, 5.0, NAN]]).double()
    mask = torch.tensor([[True, True, False], [False, True, False]])
    expect(torch.isfinite(module.masked_mean(x, mask)), "what is masked out came through: NaN "
           "times 0 is NaN")
    near(module.masked_mean(x, mask), 3.0, "masked_mean is not the mean of what is marked")
    near(module.masked_mean(x, mask, dim=1), [2.0, 5.0], "masked_mean of each row (dim=1)")
    near(module.masked_mean(x, ~mask & False), 0.0, "masked_mean is not 0 where nothing is marked")
    x.requires_grad_()
    gradient, = torch.autograd.grad(module.masked_mean(x, mask), x)
    near(gradient, mask.double() / 3, "what is masked out must have no gradient, not even NaN")


def task_2(module):
    rewards, _, mask, lengths = batch()
    logits, expected = module.value_logits(rewards, mask), values(rewards, lengths)
    near(logits.shape, mask.shape, "the shape of value_logits")
    expect(torch.isfinite(logits).all(), "what is masked out may be NaN, and no logit is")
    for i, row in enumerate(expected):
        found = logits[i, :lengths[i]]
        expect(not np.allclose(found.detach(), row), "this is z itself, and its logit is asked for")
        near(torch.sigmoid(found), row, "sigma of what is returned is not z: chosen z_t = sigma("
             "r_t - mean of the rejected response), rejected z_t = 1 - sigma(r_t - mean of the "
             "chosen one), row i of B against row B + i, means over real tokens alone")
    rewards.requires_grad_()
    gradient, = torch.autograd.grad(module.value_logits(rewards, mask)[mask].sum(), rewards)
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0]).double()[:, None] * mask
    near(gradient * ~mask, 0.0 * signs, "a gradient, or NaN, reaches the padding")
    near(gradient, signs, "a gradient reaches the opponent's mean, where the stop-gradient stands, "
         "or none reaches r_t, where none stands")


def task_3(module):
    rewards, probs, mask, lengths = batch()
    z, links = values(rewards, lengths), sum(length - 1 for length in lengths)
    p, penalty, scale = probs.tolist(), 0.0, 0.0
    weights, gradient = torch.zeros(4, 7).double(), torch.zeros(4, 7).double()
    for i, t in ((i, t) for i, length in enumerate(lengths) for t in range(length - 1)):
        a, b = z[i][t], z[i][t + 1]
        penalty -= p[i][t] * (b * math.log(a) + a * math.log(b)) / links
        scale += p[i][t] * (a + b) / links
        weights[i, t] += p[i][t] * b
        weights[i, t + 1] += p[i][t] * a
    for i, t in ((i, t) for i, length in enumerate(lengths) for t in range(length)):
        gradient[i, t] = (-1 if i < 2 else 1) * weights[i, t] * (1 - z[i][t]) / links
    rewards.requires_grad_()
    found, its_scale = module.icrm(rewards, probs, mask)
    expect(isinstance(its_scale, torch.Tensor), "icrm returns two numbers, penalty and scale")
    near(found, penalty, "the penalty is the mean over links of 2 p_t l_t, p_t of token t+1")
    near(its_scale, scale, "the scale is the mean over links of 2 p_t (z_t + z_t+1) / 2")
    expect(not its_scale.requires_grad, "the scale carries a gradient; it is only measured")
    its_gradient = torch.autograd.grad(found, rewards)[0]
    expect(torch.isfinite(its_gradient).all(), "the gradient is NaN: what is masked out of rewards "
           "or probs may be NaN, and takes part")
    near(its_gradient, gradient, "the gradient: in each of the two terms z "
         "stands still (sg) and log z moves")
    large = (1e4 * rewards.detach()).requires_grad_()
    penalty = module.icrm(large, probs, mask)[0]
    expect(torch.isfinite(penalty) and torch.isfinite(torch.autograd.grad(penalty, large)[0]).all(),
           "rewards of 10,000 make it infinite: log sigma in one step is F.logsigmoid")
    near(module.label_weights(rewards, probs, mask), weights, "w_t = p_t-1 z_t-1 + p_t z_t+1")
    expect(not module.label_weights(rewards, probs, mask).requires_grad, "w_t stands still (sg)")


def task_4(module):
    rewards, probs, mask, lengths = batch()
    probs = torch.where(mask[:, 1:], 0.5 + probs / 2, NAN)
    z, links = values(rewards, lengths), sum(length - 1 for length in lengths)
    terms = [max(0.0, abs(z[i][t] - z[i][t + 1]) - (1 - probs[i, t].item())) ** 2
             for i, length in enumerate(lengths) for t in range(length - 1)]
    rewards.requires_grad_()
    found, scale = module.gap_bound(rewards, probs, mask)
    near(found, sum(terms) / links, "mean over links of max(0, |z_t - z_t+1| - (1 - p_t))^2")
    expect(scale is None, "the bound needs no scale")
    gradient, = torch.autograd.grad(found, rewards)
    expect(torch.isfinite(gradient).all(), "the gradient is finite, also beside padding")
    ends = torch.tensor([[2.0, -2.0], [0.0, 0.0]]).double().requires_grad_()
    term, _ = module.gap_bound(ends, torch.ones(2, 1).double(), torch.ones(2, 2).bool())
    up, down = torch.autograd.grad(term, ends)[0][0]
    expect(up > 0 > down, "both ends of a link must move")


def task_5(module):
    probs = object.__new__(module.Probs)
    rng = np.random.default_rng(0)
    table = [list(rng.random((2, 30), np.float32)) for _ in range(200)]

    class Split:
        def of_responses(self, array, i):
            return table[i]

    probs.split, probs.array = Split(), None
    probs.kind = "generator"
    expect(all(map(np.array_equal, probs[0], table[0])), "the generator's p is p as it is")
    probs.kind = "uniform"
    expect(all((one == 1).all() and len(one) == len(p) for i in range(9)
               for one, p in zip(probs[i], table[i], strict=True)), "uniform: 1 on every token")
    probs.kind = "shuffled"
    correlations, orders = [], set()
    for i, parts in enumerate(table):
        for side, (one, p) in enumerate(zip(probs[i], parts, strict=True)):
            expect(np.array_equal(one, probs[i][side]), "a shuffle is drawn once: the same again")
            expect(one[0] == p[0], "the first token has no link; it stays where it is")
            expect(sorted(one) == sorted(p), "a shuffle keeps the values of its own response")
            correlations.append(np.corrcoef(one[1:], p[1:])[0, 1])
            orders.add(tuple(map(p.tolist().index, one.tolist())))
    expect(abs(np.mean(correlations)) < 0.05, "it is no shuffle: it correlates with p itself")
    expect(len(orders) == 400, "every response has a permutation of its own")


def task_6(bon, dpo):
    rng = np.random.default_rng(0)
    for rewards in (rng.normal(size=6), [1, 2, 2, 0, 2, 1], [3] * 6):
        worth = rng.normal(size=6)
        for n in range(1, 7):
            slow = []
            for subset in itertools.combinations(range(6), n):
                best = max(rewards[i] for i in subset)
                slow.append(np.mean([worth[i] for i in subset if rewards[i] == best]))
            near(bon.best_of_n(rewards, worth, n), np.mean(slow), "best_of_n is the mean over all "
                 "subsets of n, without replacement; equal rewards share")
    margin = torch.tensor([0.3, -2.0, 5.0]).double()
    slow = sum(math.log(1 + math.exp(-0.7 * m)) for m in margin.tolist()) / 3
    near(dpo.dpo_loss(margin, 0.7), slow, "dpo_loss: the mean of -log sigma(beta margin)")
    expect(torch.isfinite(dpo.dpo_loss(-1e4 * margin, 1.0)), "dpo_loss of a large margin is finite")


def task_7(module):
    rewards, probs, mask, _ = batch(dirty=False)
    dirty, dirty_probs, _, _ = batch()
    found, scale = module.quiet(rewards, probs, mask)
    expect(found.shape == () and torch.isfinite(found), "the penalty is one finite number")
    expect(scale is None or scale.shape == () and not scale.requires_grad, "the scale: None or one "
           "number without gradient")
    before = dirty.clone(), dirty_probs.clone()
    dirty.requires_grad_()
    again, _ = module.quiet(dirty, dirty_probs, mask)
    near(again, found, "what stands in the padding, NaN for one, changes nothing")
    gradient, = torch.autograd.grad(again, dirty)
    expect(torch.isfinite(gradient).all() and (gradient[~mask] == 0).all(), "padding has no "
           "gradient, and nothing has an infinite one")
    expect((gradient != 0).any(), "nothing moves: the gradient is 0 everywhere")
    for a, b in zip(before, (dirty, dirty_probs)):
        expect(torch.equal(a.nan_to_num(-9), b.nan_to_num(-9)), "an input was changed in place")
    a, b, c, d = (module.quiet(rewards * torch.tensor([[i], [j], [i], [j]]), probs, mask)[0]
                  for i, j in ((1, 1), (2, 1), (1, 2), (2, 2)))
    near(b - a, d - c, "what one pair adds depends on its batch-mates")
    other, _ = module.quiet(rewards, probs.roll(1, 1), mask)
    expect((other - found).abs() > 1e-12, "it does not depend on p")
    wide = [torch.nn.functional.pad(x, (0, 3), value=NAN) for x in (dirty.detach(), dirty_probs)]
    near(module.quiet(*wide, torch.nn.functional.pad(mask, (0, 3)))[0], found,
         "longer padding changes nothing")
    large = (1e4 * rewards).requires_grad_()
    module.quiet(large, probs, mask)[0].backward()
    expect(torch.isfinite(large.grad).all(), "rewards of 10,000 have a finite gradient")


def task_8():
    path = Path(EXPERIMENT)
    expect(path.is_file(), f"{EXPERIMENT} is missing; make it with exercises/experiment.py")
    found = json.loads(path.read_text(encoding="utf-8"))
    differences = np.array(found["differences"], dtype=float)
    expect(len(differences) == len(set(found["draws"])) >= 5, "five draws or more, each once")
    expect(np.isfinite(differences).all() and differences.std() > 0, "a difference for each draw")
    mean, half = found["mean"], found["half_width"]
    near([mean, half], original("benchmarks").mean_and_half_width(differences), "the mean of the "
         "differences and half its 95% t interval")
    expect(found["beats"] is bool(mean - half > 0), "it beats the other where the interval lies "
           "above 0, and only there")


def original(name):
    """A module of this folder, whatever the copy has."""
    path = ROOT / f"{name.replace('.', '/')}.py"
    spec = importlib.util.spec_from_file_location(f"original_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def copies_of(task):
    """The copy's modules that a task is about, with this folder's functions for all other ones."""
    sys.path.insert(0, str(Path.cwd()))
    every = {about for one in TASKS.values() for about in one.functions}
    modules = {name: importlib.import_module(name) for name, _ in TASKS[task].functions}
    for name, function in every.difference(TASKS[task].functions):
        if name in modules:
            setattr(modules[name], function, getattr(original(name), function))
    return modules.values()


def main(task, said):
    torch.manual_seed(0)
    try:
        globals()[f"task_{task}"](*copies_of(task))
        why = ""
    except Lost as lost:
        why = str(lost)
    except Exception as error:      # a student's code may fail in any way
        frames = traceback.extract_tb(error.__traceback__)
        where = [f" ({frame.name}, line {frame.lineno} of {Path(frame.filename).name})"
                 for frame in frames[1:] if str(Path.cwd()) in frame.filename]
        why = f"{type(error).__name__}: {error}" + "".join(where[-1:])
    Path(said).write_text(why, encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
