"""Evaluation: exact counts, independence of the batch, and the exact value."""

import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import bon
import dpo
import evaluate
import report
from common import UserError, load_checkpoint, parse_settings, write_json
from data import batch, toy
from data.batch import Example
from data.dataset import open_dataset
from pretrained import export


def evaluate_command(*arguments):
    evaluate.main(parse_settings(evaluate.EvalConfig, list(arguments)))


@pytest.fixture
def loaded(inside):
    """The workspace's reward model, its tokenizer and the examples of val."""
    model, tokenizer, _ = evaluate.load_reward_model("out/run", "cpu")
    return model, tokenizer, list(open_dataset("toy").split("val"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rewards_alone(model, prompt, response):
    """The prefix rewards of one response, read alone and without padding."""
    tokens = torch.tensor([*map(int, prompt), *map(int, response)])
    hidden = model.model(tokens[None], torch.arange(len(tokens))[None])[0]
    return (hidden @ model.score.weight[0])[len(prompt) :].detach().numpy()


# Scores -------------------------------------------------------------------------------


def test_rewards_do_not_depend_on_the_batch(loaded, monkeypatch):
    model, _, examples = loaded
    model.train()
    state = torch.get_rng_state()
    together = evaluate.score(model, examples)
    assert model.training and torch.equal(state, torch.get_rng_state())
    monkeypatch.setattr(batch.map_examples, "__defaults__", (100,))
    in_parts = evaluate.score(model, examples[::-1])[::-1]
    for example, first, second in zip(examples, together, in_parts):
        for response, a, b in zip(example.responses, first, second, strict=True):
            alone = rewards_alone(model, example.prompt, response)
            assert len(a) == len(response)
            assert np.allclose(a, alone, atol=1e-5) and np.allclose(a, b, atol=1e-5)


def test_a_reward_that_is_not_finite_names_the_row(loaded):
    model, _, examples = loaded
    token = int(examples[7].responses[1][-2])
    model.model.embed_tokens.weight.data[token] = float("nan")
    for number, example in enumerate(examples, start=1):
        if token in np.concatenate(example.responses):
            break
    with pytest.raises(UserError, match=f"a reward of row {number} is not finite"):
        evaluate.score(model, examples)


def test_candidates_get_the_rewards_of_score_and_repeated_ones_are_scored_once(
    loaded, monkeypatch
):
    model, _, examples = loaded
    responses = []
    for example in examples[:12]:
        responses += example.responses
    candidates = [
        Example(examples[0].prompt, (*responses, responses[0])),
        Example(examples[1].prompt, (responses[3],)),
    ]
    results = bon.candidate_rewards(model, candidates)
    for example, rewards in zip(candidates, results):
        for response, reward in zip(example.responses, rewards, strict=True):
            alone = rewards_alone(model, example.prompt, response)
            assert np.allclose(reward, alone, atol=1e-5)
    final = bon.final_rewards(model, candidates)
    assert [len(rewards) for rewards in final] == [25, 1]


# Statistics ---------------------------------------------------------------------------


def test_wilsons_interval_against_its_definition():
    """Its ends are the proportions 1.96 standard errors away from the observed one."""
    for share, n in ((0.0, 5), (0.3, 10), (1.0, 50), (0.431, 1000)):
        for end in evaluate.wilson(share, n):
            error = (end * (1 - end) / n) ** 0.5
            assert abs(share - end) == pytest.approx(1.96 * error, abs=1e-12)


def test_intervals_count_prompts_and_not_rows():
    correct = np.random.default_rng(0).random(200) < 0.7
    expected = evaluate.wilson(correct.mean(), 200)
    for times in (1, 3):
        metrics = evaluate.accuracy_with_interval(
            np.tile(correct, times), np.tile(~correct, times), list(range(200)) * times
        )
        interval = metrics["low"], metrics["high"]
        assert interval == pytest.approx(expected, abs=1e-12)
        assert (metrics["n"], metrics["prompts"]) == (200 * times, 200)
        assert metrics["ties"] == (~correct).sum() * times
    assert evaluate.effective_sample_size([1] * 9, ["the same"] * 9) == 1
    assert evaluate.effective_sample_size([1, 1, 0, 0], "aabb") == 2


def test_effective_sample_size_equal_a_double_loop():
    rng = np.random.default_rng(1)
    correct, prompts = rng.random(200) < 0.7, rng.integers(0, 60, 200)
    share, covariance = correct.mean(), 0.0
    for i in range(200):
        for j in range(200):
            if prompts[i] == prompts[j]:
                covariance += (correct[i] - share) * (correct[j] - share)
    expected = min(200, share * (1 - share) * 200**2 / covariance)
    cases = evaluate.effective_sample_size(correct, prompts)
    assert cases == pytest.approx(expected)


def test_the_calibration_error_equals_a_loop_over_bins():
    margins = np.random.default_rng(0).normal(scale=2, size=400)
    margins, total = np.append(margins, [0.0, 0.0, 90.0, -90.0]), 0.0
    for number in range(10):
        gaps = []
        for margin in margins:
            confidence = 1 / (1 + math.exp(-abs(margin)))
            if number == min(int((confidence - 0.5) * 20), 9):
                correct = 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
                gaps.append(confidence - correct)
        total += abs(sum(gaps)) / len(margins)
    assert evaluate.reliability(margins)["ece"] == pytest.approx(total, abs=1e-9)


def test_a_tie_is_wrong_and_repeated_pairs_are_counted():
    examples, rewards = [], []
    for i, (chosen, rejected) in enumerate([(1, 0), (2, 2), (0, 1), (5, 4)]):
        responses = np.array([1, 2, i]), np.array([3])
        examples.append(Example(np.array([i]), responses))
        rewards.append([np.array([9, 9, chosen]), np.array([rejected])])
    metrics = evaluate.evaluate_pairs(examples, rewards)
    assert (metrics["accuracy"], metrics["ties"]) == (0.5, 1)
    assert (metrics["n"], metrics["prompts"], metrics["duplicates"]) == (4, 4, 0)
    assert (metrics["longer_accuracy"], metrics["margin"]) == (1.0, 0.25)
    twice = evaluate.evaluate_pairs(examples * 2, rewards * 2)
    assert (twice["duplicates"], twice["n"]) == (4, 8)
    assert twice["low"] == pytest.approx(metrics["low"])
    assert twice["high"] == pytest.approx(metrics["high"])


def test_the_length_baseline_counts_half_for_equal_lengths():
    examples = []
    for lengths in ((1, 1), (1, 3), (3, 1), (3, 1)):
        responses = tuple(np.arange(length) for length in lengths)
        examples.append(Example(np.array([0]), responses))
    rewards = [[np.array([1.0]), np.array([0.0])]] * 4
    metrics = evaluate.evaluate_pairs(examples, rewards)
    assert metrics["longer_accuracy"] == (0.5 + 0 + 1 + 1) / 4


# Distance from the exact value --------------------------------------------------------


@pytest.fixture
def exact(inside):
    """Values, targets and kinds of the responses of val, pair by pair."""
    dataset = open_dataset("toy")
    split, columns = dataset.split("val"), []
    for name in ("exact-value", "exact-target", "kind"):
        columns.append([])
        for i in range(len(split)):
            columns[-1] += split.response_values(dataset.array("val", name), i)
    return columns


def test_the_exact_value_has_correlation_one_no_leak_and_accuracy_one(exact):
    logits = [np.log(V.astype(float) / (1 - V)) for V in exact[0]]
    metrics = evaluate.value_agreement(logits, *exact)
    assert metrics["correlation"] > 0.99 and metrics["exact_accuracy"] == 1.0
    assert metrics["remark_change"] == pytest.approx(0, abs=1e-5)


def test_the_agreement_with_the_exact_value_equals_loops(exact):
    rewards = [np.random.default_rng(len(V)).normal(size=len(V)) for V in exact[0]]
    metrics = evaluate.value_agreement(rewards, *exact)
    mean = np.concatenate(rewards).mean()
    bins, changes, points = {}, {0: [], 1: [], 2: []}, []
    for r, V, C, kind in zip(rewards, *exact):
        for t in range(len(r)):
            z = 1 / (1 + np.exp(mean - r[t]))
            points.append((z, float(V[t])))
            bins.setdefault(int(z * 10), []).append(z - float(C[t]))
            changes[kind[t]].append(abs(r[t] - r[t - 1]) if t > 0 else 0.0)
    error = sum(abs(sum(gaps)) for gaps in bins.values()) / len(points)
    leak = np.mean(changes[1]) / np.mean(changes[2])
    assert metrics["calibration_error"] == pytest.approx(error, abs=1e-9)
    assert metrics["remark_change"] == pytest.approx(leak)
    correlation = np.corrcoef(*zip(*points))[0, 1]
    assert metrics["correlation"] == pytest.approx(correlation)


def test_equal_rewards_have_no_correlation_and_no_warning(exact, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewards = [np.full(len(V), 0.3, np.float32) for V in exact[0]]
        metrics = evaluate.value_agreement(rewards, *exact)
    absent = {"correlation", "calibration_error", "remark_change"}
    assert {key for key, value in metrics.items() if value is None} == absent
    table = evaluate.table_lines({"val": {"n": 1, "low": 0.0, "high": 1.0, **metrics}})
    assert table[1][-2:] == ["", ""]


# Runs ---------------------------------------------------------------------------------


def test_a_checkpoint_finds_its_dataset_and_generator(inside, tmp_path, monkeypatch):
    """From another folder, which has another dataset of the same name."""
    checkpoint = Path("out/run").resolve()
    monkeypatch.chdir(tmp_path)
    toy.main(toy.ToyConfig(train=5, test=2, seed=3))
    evaluate_command(f"--checkpoint={checkpoint}", "--json=x.json")
    expected = json.loads((checkpoint / "eval.json").read_text())
    assert json.loads(Path("x.json").read_text())["splits"] == expected["splits"]
    options = [f"--checkpoint={checkpoint}", "--prompts=2", "--samples=2"]
    bon.main(parse_settings(bon.BonConfig, options))
    with pytest.raises(UserError, match=f"no checkpoint at out/run .in {tmp_path}"):
        evaluate_command("--checkpoint=out/run")


def test_evaluating_a_run_again_gives_what_training_reported(inside, tmp_path):
    folder = tmp_path / "again"
    folder.mkdir()
    evaluate_command("--checkpoint=out/run", f"--json={folder / 'eval.json'}")
    reported = json.loads(Path("out/run/eval.json").read_text())
    again = json.loads((folder / "eval.json").read_text())
    assert again["splits"] == reported["splits"] and again["data"] == reported["data"]
    evaluate_command(f"--compare=out/run,{folder}")
    write_json(folder / "eval.json", {"accuracy": 0.5})
    with pytest.raises(UserError, match="not the result of a training run"):
        evaluate_command(f"--compare=out/run,{folder}")


def test_the_table_fits_80_columns(inside, capsys):
    evaluate_command("--checkpoint=out/run")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


COMMANDS = [
    lambda path: bon.main(bon.BonConfig(path, device="cpu")),
    lambda path: dpo.main(dpo.DPOConfig(path, out_dir="out/never", device="cpu")),
    lambda path: report.main(report.ReportConfig(path, device="cpu")),
]


@pytest.mark.parametrize(
    "command", [lambda path: evaluate_command(f"--checkpoint={path}"), *COMMANDS]
)
def test_data_that_were_prepared_again_are_refused(inside, tmp_path, command):
    checkpoint = load_checkpoint("out/run", "reward model")
    checkpoint["inputs"]["data"] = "other data"
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(
        UserError, match="the training split in data/toy is not the one"
    ):
        command(str(tmp_path / "ckpt.pt"))


@pytest.mark.parametrize(
    "command",
    [lambda path: export.main(export.ExportConfig(path, path + "-export")), *COMMANDS],
)
def test_a_generator_that_was_trained_again_is_refused(inside, tmp_path, command):
    checkpoint = load_checkpoint("out/run", "reward model")
    checkpoint["inputs"]["p"] = "generator another"
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="p in out/toy-generator was computed again"):
        command(str(tmp_path / "ckpt.pt"))


def test_runs_are_compared_with_the_first(tmp_path, capsys):
    runs = [
        ("none", 0.5, "toy", "first"),
        ("icrm", 0.75, "toy", "first"),
        ("dense", 0.25, "toy", "first"),
        ("other", 0.9, "mine", "its"),
        ("later", 0.9, "toy", "later"),
    ]
    for name, accuracy, dataset, data in runs:
        results = {
            "splits": {"val": {"accuracy": accuracy}},
            "settings": {"dataset": dataset},
            "data": data,
        }
        write_json(tmp_path / name / "eval.json", results)
    folders = [f"{tmp_path}/{name}" for name in ("none", "icrm", "dense")]
    evaluate_command(f"--compare={','.join(folders)}")
    header, line, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == ["none", "icrm", "dense"]
    expected = "val accuracy 0.500 0.750 (+0.250) 0.250 (-0.250)"
    assert line.split() == expected.split()
    for name, datasets in (
        ("other", "mine (its), toy (first)"),
        ("later", "toy (first), toy (lat"),
    ):
        message = re.escape(f"different data cannot be compared: {datasets}")
        with pytest.raises(UserError, match=message):
            evaluate_command(f"--compare={tmp_path}/none,{tmp_path}/{name}")


@pytest.mark.parametrize(
    "options, message",
    [
        ("--compare=out/nowhere,out/run", "eval.json .* is missing"),
        ("--compare=,", "name the runs to compare"),
        ("--checkpoint=out/nowhere", "there is no checkpoint"),
        ("--json=x", "name a reward model"),
        ("--checkpoint=out/toy-generator", "holds a generator, not a reward model"),
        ("--checkpoint=out/cut.pt", "is not a checkpoint, or damaged"),
        ("--checkpoint=out/run --data=a --steps=b", "Choose one"),
        ("--checkpoint=out/run --threshold_from=b", "needs --steps"),
        ("--checkpoint=out/run --data=nowhere.jsonl", "nowhere.jsonl"),
        ("--checkpoint=out/run --json=out/run/ckpt.pt", "is an input of this"),
    ],
)
def test_mistakes_are_errors_of_one_line(inside, options, message):
    content = Path("out/run/ckpt.pt").read_bytes()
    Path("out/cut.pt").write_bytes(content[:5000])
    with pytest.raises(UserError, match=message):
        evaluate_command(*options.split())
