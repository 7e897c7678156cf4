"""Best-of-N: the closed form against brute force over subsets."""
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

import bon
import data.prepare
import dpo
import train
from config import UserError, parse
from conftest import quick_generator, small_run


def brute_force(rewards, worth, n):
    """Mean over all subsets of n of the worth of the best, ties split evenly."""
    picked = []
    for subset in itertools.combinations(range(len(rewards)), n):
        best = max(rewards[i] for i in subset)
        tied = [i for i in subset if rewards[i] == best]
        picked.append(sum(worth[i] for i in tied) / len(tied))
    return sum(picked) / len(picked)


@pytest.mark.parametrize("M", [1, 2, 5, 8])
def test_the_unbiased_best_of_n_equals_brute_force_over_subsets(M):
    rng = np.random.default_rng(M)
    rewards, worth = rng.normal(size=M), rng.integers(0, 2, M).astype(float)
    for n in range(1, M + 1):
        assert bon.best_of_n(rewards, worth, n) == pytest.approx(brute_force(rewards, worth, n))


def test_equal_rewards_share_as_in_brute_force():
    rewards, worth = [1.0, 0.5, 1.0, 0.5, 1.0, -2.0], [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    for n in range(1, 7):
        assert bon.best_of_n(rewards, worth, n) == pytest.approx(brute_force(rewards, worth, n))


def test_the_oracle_is_pass_at_n_and_one_is_random():
    worth = [1.0, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    for n in range(1, 11):
        assert bon.best_of_n(worth, worth, n) == pytest.approx(1 - math.comb(7, n) / math.comb(10, n))
    assert bon.best_of_n(np.arange(10.0), worth, 1) == pytest.approx(0.3)


def test_the_curve_uses_the_prompts_that_have_enough_candidates():
    rows = bon.curve([[1.0, 2.0, 3.0], [1.0]], [[0.0, 0.0, 1.0], [1.0]])
    assert [(row["n"], row["prompts"]) for row in rows] == [(1, 2), (2, 1)]
    assert rows[0]["reward_model"] == rows[0]["random"] == pytest.approx((1 / 3 + 1) / 2)
    assert rows[1]["reward_model"] == rows[1]["oracle"] == pytest.approx(2 / 3)
    assert rows[1]["kl"] == pytest.approx(math.log(2) - 0.5)


def test_toy_candidates_are_judged_by_gold_and_written(inside, capsys):
    bon.main(parse(bon.BonConfig, ["--checkpoint=out/run", "--prompts=3", "--samples=4", "--json=bon.json"]))
    results = json.loads((inside / "bon.json").read_text())
    assert [row["n"] for row in results["curve"]] == [1, 2, 4] and results["prompts"] == 3
    assert results["curve"][0]["reward_model"] == pytest.approx(results["curve"][0]["random"])
    assert results["curve"][2]["oracle"] >= results["curve"][2]["reward_model"]


def test_sampled_responses_to_real_prompts_are_worth_a_judges_reward(inside, capsys):
    """On a dataset without a truth: best-of-n, and the policy of dpo.py, go from end to end."""
    if not Path("data/plain/dataset.json").exists():
        toy = data.prepare.open_dataset("toy")
        splits = {split: [json.loads(line) for line in toy.path(split).read_text().splitlines()] for split in ("train", "val")}
        data.prepare.write_dataset(data.prepare.dataset_folder("plain"), splits, toy.tokenizer)
    quick_generator("plain", "out/plain-generator", 200)
    for seed in (0, 1):
        train.main(parse(train.TrainConfig, small_run(f"out/plain-{seed}", dataset="plain", seed=seed)))
    settings = ["--checkpoint=out/plain-0", "--prompts=4", "--samples=4", "--max_new_tokens=130", "--json=judged.json"]
    with pytest.raises(UserError, match="name a judge"):
        bon.main(parse(bon.BonConfig, settings))
    with pytest.raises(UserError, match="raise --max_new_tokens"):
        bon.main(parse(bon.BonConfig, [*settings, "--judge=out/plain-1", "--max_new_tokens=1"]))
    with pytest.raises(UserError, match="one thing at a time"):
        bon.main(parse(bon.BonConfig, [*settings, "--judge=out/plain-1", "--candidates=x.jsonl"]))
    for judge in (0, 1):
        bon.main(parse(bon.BonConfig, [*settings, f"--judge=out/plain-{judge}"]))
        rows = json.loads((inside / "judged.json").read_text())["curve"]
        assert all(row["reward_model"] <= row["oracle"] + 1e-6 for row in rows) and rows[-1]["n"] <= 4
        if judge == 0:      # judged by itself it is the oracle
            assert all(row["reward_model"] == pytest.approx(row["oracle"]) for row in rows)
    dpo.main(parse(dpo.DPOConfig, ["--checkpoint=out/plain-0", "--judge=out/plain-1", "--prompts=12", "--samples=4", "--steps=2",
                                   "--held_out=3", "--answers=2", "--json=policy.json", "--out_dir=out/plain-policy"]))
    found = json.loads((inside / "policy.json").read_text())
    assert "gold_after" not in found and {"kl", "length_after", "distinct_after", "judge"} <= set(found)


def test_candidates_from_a_file_with_unequal_numbers(inside, tmp_path):
    path = tmp_path / "c.jsonl"
    rows = [{"prompt": "How?", "responses": [{"text": " a", "correct": True}, {"text": " b", "correct": False}]},
            {"prompt": "How?", "responses": [{"text": " word" * 300, "correct": True}, {"text": " c", "correct": True}]},
            {"prompt": "How?", "responses": "none"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bon.main(parse(bon.BonConfig, ["--checkpoint=out/run", f"--candidates={path}", f"--json={tmp_path / 'o.json'}"]))
    results = json.loads((tmp_path / "o.json").read_text())
    assert (results["candidates"], results["too_long"], results["skipped"]) == (3, 1, 1)
    with pytest.raises(UserError, match="row 3"):
        bon.main(parse(bon.BonConfig, ["--checkpoint=out/run", f"--candidates={path}", "--strict=True"]))


def test_gsm8k_real_candidates(inside, real_data, tmp_path):
    bon.main(parse(bon.BonConfig, ["--checkpoint=out/run", f"--candidates={real_data / 'gsm8k_model_solutions.jsonl'}",
                                   f"--json={tmp_path / 'o.json'}"]))
    results = json.loads((tmp_path / "o.json").read_text())
    assert results["candidates"] + results["too_long"] == 4 * 1319 and results["skipped"] == 0


def brute_majority(answers, worth, n):
    """Mean over all subsets of n of the worth of the commonest answer, ties split evenly."""
    value = {a: np.mean([w for b, w in zip(answers, worth) if a == b]) for a in answers}
    picked = []
    for subset in itertools.combinations(answers, n):
        most = max(subset.count(a) for a in subset)
        picked.append(np.mean([value[a] for a in set(subset) if subset.count(a) == most]))
    return np.mean(picked)


def test_the_majority_vote_equals_brute_force_and_a_sample_of_subsets_comes_near():
    answers, worth = list("aabbbcda"), [1, 1, 0, 0, 0, 0, 0, 1]
    for n in range(1, 9):
        expected = brute_majority(answers, worth, n)
        assert bon.majority_of_n(answers, worth, n, None) == pytest.approx(expected)
    sampled = bon.majority_of_n(answers, worth, 4, np.random.default_rng(0), draws=60)
    assert sampled == pytest.approx(brute_majority(answers, worth, 4), abs=0.15)


def test_unequal_numbers_of_candidates_answers_and_repeats(inside, tmp_path, capsys):
    """Ragged prompts drop out at n, equal texts share, prompts all right and all wrong are counted."""
    respond = lambda *pairs: [{"text": f" {text}", "correct": correct, "answer": text} for text, correct in pairs]
    rows = [{"prompt": "Q1", "responses": respond(("a", True), ("b", False), ("a", True), ("c", False))},
            {"prompt": "Q2", "responses": respond(("a", True), ("b", True))},
            {"prompt": "Q3", "responses": respond(("a", False))}, {"prompt": "Q4", "responses": []}]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bon.main(parse(bon.BonConfig, ["--checkpoint=out/run", f"--candidates={path}", f"--json={tmp_path / 'o.json'}"]))
    found = json.loads((tmp_path / "o.json").read_text())
    assert [row["prompts"] for row in found["curve"]] == [3, 2, 1] and found["skipped"] == 1
    assert (found["all_right"], found["none_right"]) == (1, 1)
    assert found["curve"][0]["majority"] == pytest.approx((0.5 + 1 + 0) / 3) and found["curve"][2]["majority"] == 1.0
    assert "majority" in capsys.readouterr().out
