"""Benchmark scores, against published figures and slow reference implementations."""

import json
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from benchmarks import first_error
from benchmarks.first_error import best_threshold, first_error_scores
from benchmarks.labels import label_metrics, labels_to_pairs
from benchmarks.rewardbench import SECTIONS, rewardbench_sections
from benchmarks.rm_bench import rm_bench
from common import UserError
from data.batch import Example
from evaluate import load_reward_model
from test_evaluate import evaluate_command, rewards_alone, write


@pytest.mark.skipif("ICRM_REAL_DATA" not in os.environ, reason="needs real files")
def test_rewardbench_sections_are_the_published_ones():
    path = Path(os.environ["ICRM_REAL_DATA"], "rewardbench_golden.json")
    golden = json.loads(path.read_text())
    scores = rewardbench_sections(golden["subsets"])
    for key in ("sections", "overall"):
        assert scores[key] == pytest.approx(golden[key], abs=1e-12)


def test_missing_and_unknown_subsets_are_named_and_never_count_as_zero():
    """All of RewardBench's 2,985 prompts count. math-prm has 447, but weight 984."""
    accuracies = {"mt-bench-easy": 1.0, "mt-bench-med": 0.5}
    accuracies.update({"refusals-offensive": 0.25, "my-own": 0.0})
    scores, chat = rewardbench_sections(accuracies), (28 + 20) / 68
    assert scores["sections"] == pytest.approx({"Chat": chat, "Safety": 0.25})
    assert scores["overall"] == pytest.approx((chat + 0.25) / 2)
    weights = []
    for section in SECTIONS.values():
        weights += section.values()
    assert sum(weights) - 984 + 447 == 2985
    assert scores["unknown"] == ["my-own"]
    assert len(scores["missing"]) == len(weights) - 3
    assert rewardbench_sections({"x": 1.0})["overall"] is None


def test_rm_bench_hard_cells_have_the_richer_rejected_style():
    wins = {(i, j): [10 * i + j] for i in range(3) for j in range(3)}
    scores = rm_bench(wins)  # the number of a cell shows where it went
    assert scores["matrix"][0][2] == 2
    assert scores["hard"] == pytest.approx((1 + 2 + 12) / 3)
    assert scores["normal"] == pytest.approx(11)
    assert scores["easy"] == pytest.approx(51 / 3)
    assert scores["mean"] == pytest.approx(np.mean(list(wins.values())))
    message = "no pair of chosen style 0 and rejected style 1"
    with pytest.raises(ValueError, match=message):
        rm_bench({(0, 0): [True], (2, 1): [True]})


def test_the_first_error_is_the_first_step_below_the_threshold():
    rewards = [[1, -1, -1], [1, 1, -1], [1, 1], [-1, 1], [1, 1, 1]]
    scores = first_error_scores(rewards, [1, 1, -1, -1, 0], 0.0)
    assert (scores["n_wrong"], scores["n_correct"]) == (3, 2)
    assert scores["error_accuracy"] == pytest.approx(1 / 3)
    assert scores["correct_accuracy"] == 0.5
    assert scores["f1"] == pytest.approx(2 * (1 / 3) * 0.5 / (1 / 3 + 0.5))
    assert first_error_scores([[1.0]], [-1], 0.0)["f1"] is None
    assert first_error_scores([[1.0], [1.0]], [0, -1], 0.0)["f1"] == 0.0


def test_the_best_threshold_has_the_highest_f1():
    rng = np.random.default_rng(2)
    errors, rewards = rng.integers(-1, 5, size=60), []
    for error in errors:
        means = np.where(np.arange(5) == error, -1, 2)
        rewards.append(rng.normal(means, 1.5))
    best = first_error_scores(rewards, errors, best_threshold(rewards, errors))["f1"]
    for threshold in range(-4, 5):
        assert first_error_scores(rewards, errors, threshold)["f1"] <= best
    assert best > 0.3 and best_threshold([[0.5], [0.5]], [-1, 0]) == 0.5


def test_labelled_responses_are_scored_as_loops_do():
    """Responses to three prompts with random rewards, several of them equal."""
    rng, empty = np.random.default_rng(0), np.array([], int)
    labels, final = rng.random(40) < 0.4, rng.integers(-3, 4, 40)
    examples, rewards, correct, higher = [], [], [], []
    for i, label in enumerate(labels):
        response, reward = np.array([1, i]), np.array([9, final[i]])
        responses, own = (empty, response), [empty, reward]
        if label:
            responses, own = (response, empty), [reward, empty]
        examples.append(Example(np.array([i % 3]), responses))
        rewards.append(own)
        correct.append(final[i] > 0 if label else final[i] < 0)
    for a in final[labels]:
        for b in final[~labels]:
            higher.append(1.0 if a > b else 0.5 if a == b else 0.0)
    metrics = label_metrics(examples, rewards)
    assert metrics["accuracy"] == pytest.approx(np.mean(correct))
    assert metrics["n_correct"] == labels.sum()
    assert metrics["ties"] == (final == 0).sum() > 0
    assert metrics["auc"] == pytest.approx(np.mean(higher))

    pairs, pair_rewards = labels_to_pairs(examples, rewards)
    expected = []
    for i in range(40):
        for j in range(40):
            if labels[i] and not labels[j] and i % 3 == j % 3:
                expected.append((i, j))
    numbers = [(a[-1], b[-1]) for _, (a, b) in pairs]
    assert sorted(numbers) == expected
    for (a, b), (reward_a, reward_b) in zip(numbers, pair_rewards):
        assert (reward_a[-1], reward_b[-1]) == (final[a], final[b])
    same = np.array([1])  # one text with both labels makes no pair
    both = [Example(same, (same, empty)), Example(same, (empty, same))]
    assert labels_to_pairs(both, [[same, empty], [empty, same]])[0] == []


# Files --------------------------------------------------------------------------------


def test_a_file_of_pairs_is_scored_by_subset(inside, tmp_path, capsys):
    """Four prompts differ only where they are truncated. Nine cells are one prompt."""
    subsets = "mt-bench-easy", "mt-bench-med", "refusals-offensive", "mine"
    rows = []
    for i, name in enumerate((*subsets, "mt-bench-easy", "")):
        row = {"id": i, "prompt": f"{i % 4}" + " How?" * 300, "subset": name}
        rows.append({**row, "chosen": f" a b {i}", "rejected": f" c {i}"})
    lists = {"chosen": ["a", "ab", "abc"], "rejected": ["b", "bc", "bcd"]}
    rows.append({"prompt": "Q", "domain": "chat", **lists})
    rows.append({"rejected": 1})
    rows.append({"prompt": "How?", "chosen": "w " * 400, "rejected": "c"})
    path, output = write(tmp_path / "rb.jsonl", rows), tmp_path / "o.json"
    options = f"--data={path}", f"--json={output}", "--max_bad_fraction=1"
    evaluate_command("--checkpoint=out/run/ckpt.pt", *options)
    printed, results = capsys.readouterr().out, json.loads(output.read_text())
    assert "RewardBench: Chat" in printed
    assert "of no section: (none), chat, mine" in printed
    counts = (results["n"], results["skipped"], results["prompts"])
    assert counts == (15, 2, 5)
    sizes = [metrics["n"] for _, metrics in sorted(results["subsets"].items())]
    assert sizes == [1, 9, 1, 2, 1, 1]
    pairs = results["pairs"]
    assert [pair["id"] for pair in pairs][:6] == list("012345")
    correct = [pair["chosen"] > pair["rejected"] for pair in pairs]
    assert sum(correct) / 15 == pytest.approx(results["accuracy"])
    chat = (28 * (correct[0] + correct[4]) / 2 + 40 * correct[1]) / 68
    assert results["rewardbench"]["sections"]["Chat"] == pytest.approx(chat)
    for pair, is_correct in zip(pairs[6:], correct[6:], strict=True):
        i, j = pair["cell"]
        assert results["rm_bench"]["chat"]["matrix"][i][j] == is_correct


def test_steps_are_scored_as_prefixes_and_the_threshold_is_from_another_file(
    inside, tmp_path
):
    steps, rows = [" first one", "second", "third two"], []
    for i in range(8):
        row = {"prompt": "How is it?", "steps": steps, "first_error": i % 4 - 1}
        rows.append({**row, "subset": "xy"[i % 2]})
    test = write(tmp_path / "test.jsonl", rows)
    tuning, output = write(tmp_path / "val.jsonl", rows[:5]), tmp_path / "o.json"
    options = ["--checkpoint=out/run", f"--steps={test}"]
    choose = mock.Mock(return_value=0.0)
    with mock.patch.object(first_error, "best_threshold", choose):
        files = f"--threshold_from={tuning}", f"--json={output}"
        evaluate_command(*options, *files)
    rewards, errors = choose.call_args.args
    results = json.loads(output.read_text())
    assert errors == [-1, 0, 1, 2, -1]
    assert results["skipped"] == 0 and results["evaluation"]["steps"] == str(test)
    subsets = results["subsets"]
    assert subsets.keys() == {"(all)", "x", "y"}
    assert (subsets["(all)"]["n_wrong"], subsets["(all)"]["n_correct"]) == (6, 2)
    model, tokenizer, _ = load_reward_model("out/run", "cpu")
    prompt = tokenizer.encode("How is it?")
    parts = [" first one\n", "second\n", "third two"]
    for k in range(3):  # the reward after step k is that of the response cut there
        response = []
        for part in parts[: k + 1]:
            response += tokenizer.encode(part)
        expected = rewards_alone(model, prompt, response)[-1]
        assert rewards[0][k] == pytest.approx(expected, abs=1e-5)
    correct_only = write(tmp_path / "correct.jsonl", rows[:1])
    for path, message in ((test, "another file"), (correct_only, "needs both correct")):
        with pytest.raises(UserError, match=message):
            evaluate_command(*options, f"--threshold_from={path}")
