"""The benchmark measures what it says: one loss and one gradient, whichever way it is computed."""
import numpy as np
import pytest
import torch

import bench
from config import UserError, parse
from data.rows import Row
from generator import response_logprobs

SMALL = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=300, pairs=4, repeats=1, device="cpu")
LENGTHS = [[20, 9, 30], [3, 14, 5], [40, 12, 12], [7, 1, 2]]


def config(**more):
    return parse(bench.BenchConfig, [f"--{key}={value}" for key, value in (SMALL | more).items()])


def test_every_step_has_the_terms_and_the_gradient_of_the_padded_one(monkeypatch):
    """Where the padded step's generator gives p, the stored p is what it gives."""
    rows, _ = bench.random_pairs(LENGTHS, config(), turn=0)
    terms, gradients = [], []
    monkeypatch.setattr(bench, "update", lambda model, optimizer, rate: gradients.append(
        torch.cat([parameter.grad.flatten() for parameter in model.parameters()])))
    for name in bench.STEPS:
        run = bench.Bench(config(), torch.device("cpu"), 80)
        torch.nn.init.normal_(run.model.score.weight)
        probs = [[np.exp(part) * (name != bench.STEPS[0]) for part in parts]
                 for parts in response_logprobs(run.generator, rows)]
        terms.append(run.step(name, rows, probs) | {"S": run.S.item()})
    assert gradients[0].norm() > 0.1
    for name, found, gradient in zip(bench.STEPS, terms, gradients):
        assert found == pytest.approx(terms[0], rel=1e-5), name
        assert (gradient - gradients[0]).norm() < 1e-4 * gradients[0].norm(), name


def test_the_padded_step_reads_every_prompt_twice_and_pads_to_the_longest():
    rows, _ = bench.random_pairs(LENGTHS, config(), turn=0)
    group, = bench.padded(rows, asked=4).groups
    assert group.tokens.shape == (8, 40 + 12) and group.segments is None
    read = sum(part.tokens.numel() for part in bench.make_batch(rows, 4).groups)
    assert sum(row.size for row in rows) <= read < group.tokens.numel()


def test_useful_work_counts_every_token_once():
    run = bench.Bench(config(n_layer=1, n_head=1, n_embd=2, vocab_size=10), torch.device("cpu"), 8)
    row = Row(np.arange(3), (np.arange(2), np.arange(1)))
    seen = (1 + 2 + 3) + (4 + 5) + 4        # each response's tokens see the prompt and their own
    weights = 4 * 2 * 2 + 3 * 2 * run.model.model.config.n_hidden
    forward = 2 * weights * 6 + 4 * 2 * seen + 2 * 2 * 10 * 2
    assert bench.useful_work([row], run.model) == 3 * forward


def test_the_bench_prints_every_step_and_its_own_is_the_measure(capsys):
    bench.main(config(lengths="gsm8k"))
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.startswith(bench.STEPS)]
    assert len(lines) == 3 and lines[-1].endswith("1.00 (1.00 to 1.00)")


def test_what_it_cannot_measure_is_refused():
    with pytest.raises(UserError, match="choose one of: hh, gsm8k"):
        bench.main(config(lengths="mine"))
    with pytest.raises(UserError, match="--pairs must be at least 1 and at most 512"):
        bench.main(config(pairs=600))
