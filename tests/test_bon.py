"""Best-of-n: the closed form against brute force over subsets, and candidates from end to end."""
import itertools
import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import bon
import evaluate
from conftest import save_edited
from config import UserError, parse
from data.files import load_checkpoint
from data import tokenizer as tokenizers
from data.dataset import open_dataset
from data.rows import Row
from evaluate import load_reward_model, score


def brute_force(M, n, worth_of):
    """Mean over all subsets of n of M of what worth_of makes of one."""
    return np.mean([worth_of(subset) for subset in itertools.combinations(range(M), n)])


def test_halving_equals_its_description_step_by_step():
    rng = np.random.default_rng(0)
    for places in ((), (3,), (2, 5, 9)):
        rewards = [rng.normal(size=n) for n in rng.integers(1, 12, size=9)]
        alive, seen = set(range(9)), {}
        for place in places:
            seen |= {i: len(rewards[i][:place]) for i in alive}
            ranked = sorted(alive, key=lambda i: rewards[i][:place][-1], reverse=True)
            alive = set(ranked[:(len(alive) + 1) // 2])
        seen |= {i: len(rewards[i]) for i in alive}
        best = max(alive, key=lambda i: rewards[i][-1])
        assert bon.halve(rewards, places) == (best, sum(seen.values()))
    assert bon.halve([[0, 9], [1, 2], [0, 5]], [1]) == (0, 5)       # as its docstring says
    assert bon.halve([[2, 0], [2, 1], [9, -1]], [1, 1]) == (2, 4)    # never finished: no rival left


def test_ways_to_pick_are_compared_at_their_share_of_the_tokens():
    rewards = [[[0, 5], [1, 1], [2, 0], [3, 3, 3, 3]], [[0, 1, 2], [1], [0, 0]]]
    worth = [[4.0, 0.0, 2.0, 1.0], [1.0, 0.0, 0.0]]
    found = {(row["judge"], row["way"]): row
             for row in bon.compare_ways(rewards, worth, "ab", [1], rewards)}
    expected = {("random", "one"): ([7 / 4, 1 / 3], [10 / 4, 6 / 3]),
                ("reward model", "best of all"): ([4, 1], [10, 6]),
                # two of four go on: 1 + 1 + 2 + 4 tokens; of three, two: 3 + 1 + 1
                ("reward model", "halving"): ([1, 1], [8, 5]),
                ("exact value", "halving"): ([1, 1], [8, 5]),
                ("oracle", "best of all"): ([4, 1], [10, 6])}
    for key, (values, tokens) in expected.items():
        assert found[key]["worth"] == pytest.approx(np.mean(values)), key
        assert found[key]["tokens"] == pytest.approx(np.mean(tokens)), key
    final = [[r[-1] for r in some] for some in rewards]
    for share, n in ((1.0, 4), (0.5, 2), (0.1, 1)):
        assert bon.same_tokens(final[0], worth[0], share) == bon.best_of_n(final[0], worth[0], n)
    between = bon.same_tokens(final[0], worth[0], 0.65)     # 2.6 of four
    assert between == pytest.approx(0.4 * bon.best_of_n(final[0], worth[0], 2)
                                    + 0.6 * bon.best_of_n(final[0], worth[0], 3))


@pytest.mark.parametrize("text", ["12,x", "0", "5,5", "8,3", "-1"])
def test_places_that_do_not_rise_are_refused(text):
    with pytest.raises(UserError, match="rising numbers"):
        bon.read_places(text)


def test_the_majority_vote_equals_brute_force_and_a_sample_of_subsets_comes_near():
    answers, worth = list("aabbbcda"), [1, 1, 0, 0, 0, 0, 0, 1]

    def worth_of_vote(subset):
        votes = [answers[i] for i in subset]
        most = [a for a in set(votes) if votes.count(a) == max(map(votes.count, votes))]
        return np.mean([np.mean([w for b, w in zip(answers, worth) if a == b]) for a in most])

    slow = [brute_force(8, n, worth_of_vote) for n in range(1, 9)]
    assert [bon.majority_of_n(answers, worth, n, None) for n in range(1, 9)] == pytest.approx(slow)
    sampled = bon.majority_of_n(answers, worth, 4, np.random.default_rng(0), draws=60)
    assert sampled == pytest.approx(slow[3], abs=0.15)


def test_the_curve_uses_the_prompts_that_have_enough_candidates():
    one, two = bon.curve([[1, 2, 3], [1]], [[0, 0, 1], [1]], "ab", [["x", "y", "y"], ["x"]])
    assert [(row["n"], row["prompts"]) for row in (one, two)] == [(1, 2), (2, 1)]
    means = [one[key] for key in ("reward_model", "random", "oracle", "majority")]
    assert means == pytest.approx([(1 / 3 + 1) / 2] * 4)
    assert two["reward_model"] == pytest.approx(2 / 3) == pytest.approx(two["oracle"])
    assert two["kl_at_most"] == pytest.approx(math.log(2) - 0.5)
    assert "majority" not in bon.curve([[1.0]] * 2, [[1.0]] * 2, "ab", [["x"], []])[0]


def test_rows_of_one_prompt_are_one_case_of_the_interval():
    values, names = np.random.default_rng(0).normal(size=12), [str(i) for i in range(12)]
    once, repeated, apart = (
        np.array(bon.interval_by_prompt(np.tile(values, times), prompts, np.random.default_rng(1)))
        for times, prompts in ((1, names), (9, names * 9), (9, range(108))))
    assert once[0] < values.mean() < once[1] and repeated == pytest.approx(once)
    assert np.ptp(apart) < 0.5 * np.ptp(once)


def test_every_candidate_has_the_reward_it_has_alone_and_equal_ones_are_read_once(tiny):
    rng = np.random.default_rng(0)
    prompt, some = rng.integers(50, size=3), [rng.integers(50, size=k % 7 + 1) for k in range(20)]
    rows = [Row(prompt, tuple(responses)) for responses in (some[:1], some, some[:2] * 6, ())]
    with mock.patch.object(evaluate, "score", side_effect=evaluate.score) as scored:
        found = bon.final_rewards(tiny, rows)
    assert [len(row.responses) for row in scored.call_args.args[1]] == [1, 8, 8, 4, 2]
    assert len(set(found[2].tolist())) == 2
    for row, rewards in zip(rows, found, strict=True):
        alone = [score(tiny, [Row(row.prompt, (one,))])[0][0][-1] for one in row.responses]
        assert rewards == pytest.approx(alone, abs=1e-5)


def run(**settings):
    settings = dict(checkpoint="out/run", json="bon.json", device="cpu") | settings
    bon.main(parse(bon.BonConfig, [f"--{key}={value}" for key, value in settings.items()]))
    return json.loads(Path("bon.json").read_text())


def test_sampled_responses_that_end_are_worth_their_gold_or_a_judges_reward(inside):
    results = run(prompts=3, samples=8)
    first, *_, last = results["curve"]
    assert 0 < results["candidates"] < 24 and first["n"] == 1 and first["prompts"] <= 3
    assert first["reward_model"] == pytest.approx(first["random"]) == pytest.approx(first["oracle"])
    assert last["oracle"] >= last["reward_model"] - 1e-9 and last["oracle"] > first["oracle"]
    opposite = load_checkpoint("out/run", "reward model")
    opposite["model"]["score.weight"] *= -1
    save_edited(opposite, "opposite.pt")
    last = run(prompts=4, samples=8, judge="opposite.pt")["curve"][-1]
    assert last["reward_model"] < last["random"] < last["oracle"]


def test_halving_saves_tokens_and_without_dropping_is_best_of_all(inside):
    found = run(prompts=3, samples=8, max_new_tokens=60, halve="6,12")["ways"]
    tokens = {(row["judge"], row["way"]): row["tokens"] for row in found}
    # 8 to place 6, 4 to place 12, 2 to the end, all but those that end before
    assert tokens["reward model", "halving as it is written"] <= 8 * 6 + 4 * 6 + 2 * 48
    assert tokens["reward model", "halving"] == tokens["reward model", "best of as many tokens"]
    assert tokens["exact value", "halving"] < tokens["reward model", "best of all"]
    last = run(prompts=1, samples=8, halve="1000", judge="out/run")["ways"]
    worth = {(row["judge"], row["way"]): row["worth"] for row in last}
    assert (worth["reward model", "best of all"] == worth["reward model", "halving"]
            == worth["reward model", "halving as it is written"])      # from the same draws


def test_the_exact_value_of_what_the_world_could_not_have_written_stays(inside):
    dataset = open_dataset("toy")
    tokens = dataset.split("val")[0].responses[0]
    wrong = np.concatenate([tokens[:9], tokens[:3]])
    (right, broken), = bon.exact_values(dataset, [Row(tokens[:1], (tokens, wrong))])
    exact = dataset.split("val").of_responses(dataset.array("val", "exact-value"), 0)[0]
    assert right == pytest.approx(exact, abs=1e-6) and broken == right[:9] + [right[8]] * 3


def test_candidates_of_a_file_may_be_unequal_in_number_wrong_or_too_long(inside):
    texts = {"P": ["+a", "b", "+a", "c"], "Q": ["+a", "+b"], "R": ["a"], "S": [], "T": ["x " * 300]}
    rows = [{"prompt": prompt, "responses": [
        {"text": text, "answer": text.strip("+"), "correct": "+" in text} for text in some]}
        for prompt, some in texts.items()]
    Path("c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = run(candidates="c.jsonl", halve="1", skip_bad=True)
    assert {row["judge"] for row in results["ways"]} == {"random", "reward model", "oracle"}
    assert [row["prompts"] for row in results["curve"]] == [3, 2, 1] and results["candidates"] == 7
    assert results["curve"][0]["majority"] == pytest.approx((0.5 + 1 + 0) / 3)


def test_what_does_not_fit_is_one_line(inside):
    _, tokenizer, _ = load_reward_model("out/run", "cpu")
    with pytest.raises(UserError, match="the judge and the reward model read different vocab"):
        bon.check_fit("judge", tokenizers.make("bpe:300", ["words"]), tokenizer)
    with mock.patch.object(bon, "open_dataset", return_value=mock.Mock(tokenizer=tokenizer)):
        with pytest.raises(UserError, match="name a judge"):
            run()
    for settings, message in ((dict(judge="x", candidates="y"), "leave out --judge"),
                              (dict(prompts=2, max_new_tokens=1), "raise --max_new_tokens")):
        with pytest.raises(UserError, match=message):
            run(**settings)
