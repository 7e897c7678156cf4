"""Best-of-n against brute force over subsets, halving, and candidates end to end."""

import itertools
import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import bon
from common import UserError, load_checkpoint, parse_settings
from data.batch import Example
from data.dataset import open_dataset
from data.tokenizer import make_tokenizer
from evaluate import load_reward_model


@pytest.mark.parametrize("rewards", [[0.3, -1.0, 2.0, 0.1], [1, 2, 2, 0], [3] * 4])
def test_best_of_n_equals_the_mean_over_all_subsets(rewards):
    gold_scores = [1.0, -2.0, 5.0, 0.5]
    for n in range(1, 5):
        scores = []
        for subset in itertools.combinations(range(4), n):
            best = max(rewards[i] for i in subset)
            tied = [gold_scores[i] for i in subset if rewards[i] == best]
            scores.append(np.mean(tied))
        expected = np.mean(scores)
        assert bon.best_of_n(rewards, gold_scores, n) == pytest.approx(expected)
    assert bon.best_of_n([0.1, 0.9, 0.5], [0, 3, 0], 2) == 2.0  # its docstring


def test_halving_equals_its_description_step_by_step():
    rng = np.random.default_rng(0)
    for lengths in ((), (3,), (2, 5, 9)):
        rewards = [rng.normal(size=n) for n in rng.integers(1, 12, size=9)]
        alive, generated = set(range(9)), {}
        for length in lengths:
            for i in alive:
                generated[i] = len(rewards[i][:length])
            ranked = sorted(alive, key=lambda i: rewards[i][:length][-1], reverse=True)
            alive = set(ranked[: (len(alive) + 1) // 2])
        for i in alive:
            generated[i] = len(rewards[i])
        best = max(alive, key=lambda i: rewards[i][-1])
        assert bon.halve(rewards, lengths) == (best, sum(generated.values()))
    assert bon.halve([[0, 9], [1, 2], [0, 5]], [1]) == (0, 5)  # its docstring


def test_strategies_are_compared_at_their_token_budgets():
    rewards = [[[0, 5], [1, 1], [2, 0], [3, 3, 3, 3]], [[0, 1, 2], [1], [0, 0]]]
    gold = [[4.0, 0.0, 2.0, 1.0], [1.0, 0.0, 0.0]]
    rows = {}
    for row in bon.compare_strategies(rewards, gold, "ab", [1], rewards):
        rows[row["selector"], row["strategy"]] = row
    expected = {
        ("random", "single sample"): ([7 / 4, 1 / 3], [10 / 4, 6 / 3]),
        ("reward model", "best of all"): ([4, 1], [10, 6]),
        # Two of four go on: 1 + 1 + 2 + 4 tokens. Of three, two: 3 + 1 + 1.
        ("reward model", "halving"): ([1, 1], [8, 5]),
        ("exact value", "halving"): ([1, 1], [8, 5]),
        ("oracle", "best of all"): ([4, 1], [10, 6]),
    }
    for key, (scores, tokens) in expected.items():
        assert rows[key]["gold"] == pytest.approx(np.mean(scores)), key
        assert rows[key]["tokens"] == pytest.approx(np.mean(tokens)), key
    final = [prefix_rewards[-1] for prefix_rewards in rewards[0]]
    for share, n in ((1.0, 4), (0.5, 2), (0.1, 1)):
        expected = bon.best_of_n(final, gold[0], n)
        assert bon.best_of_n_at_budget(final, gold[0], share) == expected
    between = 0.4 * bon.best_of_n(final, gold[0], 2)  # 0.65 of four are 2.6
    between += 0.6 * bon.best_of_n(final, gold[0], 3)
    value = bon.best_of_n_at_budget(final, gold[0], 0.65)
    assert value == pytest.approx(between)


@pytest.mark.parametrize("text", ["12,x", "0", "5,5", "8,3", "-1"])
def test_lengths_that_do_not_increase_are_refused(text):
    with pytest.raises(UserError, match="increasing numbers of tokens"):
        bon.parse_lengths(text)


def test_all_rows_of_the_curve_use_the_same_prompts(capsys):
    first, second = bon.best_of_n_curve([[1, 2, 3], [1]], [[0, 0, 1], [1]], "ab")
    assert (first["n"], first["prompts"]) == (1, 1)
    assert (second["n"], second["prompts"]) == (2, 1)
    assert "1 of 2 prompts are left out of the curve" in capsys.readouterr().out
    for key in ("reward_model", "random", "oracle"):
        assert first[key] == pytest.approx(1 / 3)
    assert first["random"] == second["random"]
    assert second["reward_model"] == second["oracle"] == pytest.approx(2 / 3)
    assert second["kl_at_most"] == pytest.approx(math.log(2) - 0.5)
    sizes = [[0] * 5] * 3 + [[0] * 7] * 2 + [[0]] * 4  # five of nine have four or more
    rows = bon.best_of_n_curve(sizes, sizes, range(9))
    assert [row["n"] for row in rows] == [1, 2, 4]
    assert {row["prompts"] for row in rows} == {5}


def test_the_interval_counts_prompts_and_not_rows():
    values = np.random.default_rng(0).normal(size=12)

    def interval(times, prompts):
        rng = np.random.default_rng(1)
        return np.array(bon.interval_by_prompt(np.tile(values, times), prompts, rng))

    prompts = list(range(12))
    once, repeated = interval(1, prompts), interval(9, prompts * 9)
    assert once[0] < values.mean() < once[1] and repeated == pytest.approx(once)
    assert np.ptp(interval(9, range(108))) < 0.5 * np.ptp(once)


# End to end ---------------------------------------------------------------------------


def run(**settings):
    settings = {"checkpoint": "out/run", "json": "bon.json", **settings}
    options = [f"--{name}={value}" for name, value in settings.items()]
    bon.main(parse_settings(bon.BonConfig, [*options, "--device=cpu"]))
    return json.loads(Path("bon.json").read_text())


def strategies(results, key):
    return {(r["selector"], r["strategy"]): r[key] for r in results["strategies"]}


def test_finished_responses_get_their_true_quality_or_a_judges_reward(inside):
    results = run(prompts=3, samples=8)
    first, *_, last = results["curve"]
    assert 0 < results["candidates"] < 24
    assert first["n"] == 1 and first["prompts"] <= 3
    assert first["reward_model"] == pytest.approx(first["random"])
    assert first["reward_model"] == pytest.approx(first["oracle"])
    assert last["oracle"] >= last["reward_model"] - 1e-9
    assert last["oracle"] > first["oracle"]
    opposite = load_checkpoint("out/run", "reward model")
    opposite["model"]["score.weight"] *= -1
    torch.save(opposite, "opposite.pt")
    last = run(prompts=4, samples=8, judge="opposite.pt")["curve"][-1]
    assert last["reward_model"] < last["random"] < last["oracle"]


def test_halving_saves_tokens_and_without_dropping_is_best_of_all(inside):
    results = run(prompts=3, samples=8, max_new_tokens=60, halving_lengths="6,12")
    tokens = strategies(results, "tokens")
    # 8 candidates to length 6, 4 to length 12, 2 to the end. Some end before.
    most = 8 * 6 + 4 * 6 + 2 * 48
    assert tokens["reward model", "halving while sampling"] <= most
    at_budget = tokens["reward model", "best-of-n, same tokens"]
    assert tokens["reward model", "halving"] == at_budget
    everything = tokens["reward model", "best of all"]
    assert tokens["exact value", "halving"] < everything
    results = run(prompts=1, samples=8, halving_lengths="1000", judge="out/run")
    gold = strategies(results, "gold")  # from the same samples
    best = gold["reward model", "best of all"]
    assert gold["reward model", "halving"] == best
    online = gold["reward model", "halving while sampling"]
    assert online == pytest.approx(best, abs=1e-5)


def test_the_exact_value_stays_after_a_token_that_the_world_cannot_produce(inside):
    dataset = open_dataset("toy")
    split = dataset.split("val")
    tokens = split[0].responses[0]
    wrong = np.concatenate([tokens[:9], tokens[:3]])
    example = Example(tokens[:1], (tokens, wrong))
    ((right, broken),) = bon.exact_values(dataset, [example])
    exact = split.response_values(dataset.array("val", "exact-value"), 0)[0]
    assert right == pytest.approx(exact, abs=1e-6)
    assert broken.tolist() == [*right[:9], *[right[8]] * 3]


def test_candidates_of_a_file_may_differ_in_number_and_be_too_long(inside):
    texts = {
        "P": ["+a", "b", "+a", "c"],
        "Q": ["+a", "+b"],
        "R": ["a"],
        "S": [],
        "T": ["x " * 300],
    }
    lines = []
    for prompt, candidates in texts.items():
        responses = []
        for text in candidates:
            responses.append({"text": text, "correct": "+" in text})
        lines.append(json.dumps({"prompt": prompt, "responses": responses}))
    Path("c.jsonl").write_text("\n".join(lines))
    results = run(candidates="c.jsonl", halving_lengths="1", max_bad_fraction=1)
    judges = {judge for judge, _ in strategies(results, "gold")}
    assert judges == {"random", "reward model", "oracle"}
    assert [row["prompts"] for row in results["curve"]] == [2, 2]
    assert results["candidates"] == 7


def test_mistakes_are_one_line(inside):
    _, tokenizer, _ = load_reward_model("out/run", "cpu")
    other = make_tokenizer("bpe:300", ["words"])
    with pytest.raises(UserError, match="the judge and the reward model use different"):
        bon.check_same_tokenizer("judge", other, tokenizer)
    dataset = mock.Mock(tokenizer=tokenizer)
    with mock.patch.object(bon, "open_dataset", return_value=dataset):
        with pytest.raises(UserError, match="name a judge"):
            run()
    with pytest.raises(UserError, match="Leave out --judge"):
        run(judge="x", candidates="y")
    with pytest.raises(UserError, match="Raise --max_new_tokens"):
        run(prompts=2, max_new_tokens=1)
