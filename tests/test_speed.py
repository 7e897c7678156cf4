"""The speed benchmark compares steps that compute one loss and one gradient."""

import numpy as np
import pytest
import torch

from common import UserError, parse_settings
from data.batch import Example
from generator import response_logprobs
from lab import speed

SMALL = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "vocab_size": 300,
    "pairs": 4,
    "padded_batches": 2,
    "turns": 1,
    "device": "cpu",
}
LENGTHS = [[20, 9, 30], [3, 14, 5], [40, 12, 12], [7, 1, 2]]


def config(**changes):
    settings = {**SMALL, **changes}
    options = [f"--{name}={value}" for name, value in settings.items()]
    return parse_settings(speed.SpeedConfig, options)


def test_every_step_has_the_loss_and_the_gradient_of_the_padded_one(monkeypatch):
    """Where the padded step's generator computes p, the stored p is the same."""
    examples, _ = speed.random_pairs(LENGTHS, range(4), config(), seed=0)
    terms, gradients = [], []

    def capture(model, optimizer, rate):
        parts = [parameter.grad.flatten() for parameter in model.parameters()]
        gradients.append(torch.cat(parts))

    monkeypatch.setattr(speed, "update", capture)
    for name in speed.STEPS:
        benchmark = speed.Benchmark(config(), torch.device("cpu"), 80)
        torch.nn.init.normal_(benchmark.model.score.weight)
        probs = []
        for responses in response_logprobs(benchmark.generator, examples):
            probs.append([np.exp(logprobs) for logprobs in responses])
        if name == speed.STEPS[0]:  # it must not use the stored p
            probs = [[0 * p for p in responses] for responses in probs]
        loss_terms = benchmark.step(name, examples, probs)
        terms.append({**loss_terms, "S": benchmark.S.item()})
    assert gradients[0].norm() > 0.1
    for own_terms, gradient in zip(terms, gradients):
        assert own_terms == pytest.approx(terms[0], rel=1e-5)
        assert (gradient - gradients[0]).norm() < 1e-4 * gradients[0].norm()


def test_the_padded_step_reads_every_prompt_twice():
    examples, _ = speed.random_pairs(LENGTHS, range(4), config(), seed=0)
    assert speed.collate_padded(examples).tokens.shape == (8, 40 + 12)


def test_a_turn_trains_on_every_pair_and_the_padded_steps_read_random_ones(monkeypatch):
    lengths = np.random.default_rng(0).integers(1, 40, (64, 3)).tolist()
    read = {name: [] for name in speed.STEPS}

    def record(name, examples, probs):
        for prompt, responses in examples:
            read[name].append([len(prompt), *map(len, responses)])

    benchmark = speed.Benchmark(config(), torch.device("cpu"), 80)
    monkeypatch.setattr(benchmark, "step", record)
    totals = speed.measure_turn(benchmark, lengths, turn=0)
    generated, stored, trained = read.values()
    assert sorted(trained) == sorted(lengths)
    assert generated == stored and len(stored) == 2 * 4
    assert [totals[name][0] for name in speed.STEPS] == [8, 8, 64]


def test_useful_work_counts_every_distinct_token_once():
    sizes = config(n_layer=1, n_head=1, n_embd=2, vocab_size=10)
    benchmark = speed.Benchmark(sizes, torch.device("cpu"), 8)
    example = Example(np.arange(3), (np.arange(2), np.arange(1)))
    visible = (1 + 2 + 3) + (4 + 5) + 4  # responses see the prompt and themselves
    weights = 4 * 2 * 2 + 3 * 2 * benchmark.model.config.n_hidden
    forward = 2 * weights * 6 + 4 * 2 * visible + 2 * 2 * 10 * 2
    assert speed.useful_work([example], benchmark.model) == 3 * forward


def test_the_table_has_a_line_for_every_step(capsys):
    lengths = np.random.default_rng(0).integers(1, 40, (64, 3)).tolist()
    benchmark = speed.Benchmark(config(), torch.device("cpu"), 80)
    speed.measure_steps(benchmark, lengths)
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(speed.STEPS)]
    assert len(rows) == 3 and rows[-1].endswith("1.00 (1.00 to 1.00)")
    assert max(len(line) for line in lines) <= 80


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="Choose one of: hh, gsm8k"):
        speed.main(config(lengths="mine"))
    with pytest.raises(UserError, match="--pairs must be at least 1 and at most 512"):
        speed.main(config(pairs=600))
