"""Best-of-n: the closed form against brute force over subsets, and candidates from end to end."""
import itertools
import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import bon
import evaluate
from config import UserError, parse
from data import tokenizer as tokenizers
from data.rows import Row
from evaluate import load_reward_model, score


def brute_force(M, n, worth_of):
    """Mean over all subsets of n of M of what worth_of makes of one."""
    return np.mean([worth_of(subset) for subset in itertools.combinations(range(M), n)])


@pytest.mark.parametrize("M", [1, 5, 8])
def test_best_of_n_equals_brute_force_over_subsets_and_ties_share(M):
    rng = np.random.default_rng(M)
    worth = rng.integers(0, 2, M).astype(float)

    def worth_of_best(subset):
        best = max(rewards[i] for i in subset)
        return np.mean([worth[i] for i in subset if rewards[i] == best])

    for n in range(1, M + 1):
        for rewards in (rng.normal(size=M), rng.integers(0, 3, M), worth):      # the last: pass@n
            slow = brute_force(M, n, worth_of_best)
            assert bon.best_of_n(rewards, worth, n) == pytest.approx(slow)


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
    opposite = torch.load("out/run/ckpt.pt", weights_only=True)
    opposite["model"]["score.weight"] *= -1
    torch.save(opposite, "opposite.pt")
    last = run(prompts=4, samples=8, judge="opposite.pt")["curve"][-1]
    assert last["reward_model"] < last["random"] < last["oracle"]


def test_candidates_of_a_file_may_be_unequal_in_number_wrong_or_too_long(inside):
    texts = {"P": ["+a", "b", "+a", "c"], "Q": ["+a", "+b"], "R": ["a"], "S": [], "T": ["x " * 300]}
    rows = [{"prompt": prompt, "responses": [
        {"text": text, "answer": text.strip("+"), "correct": "+" in text} for text in some]}
        for prompt, some in texts.items()]
    Path("c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = run(candidates="c.jsonl")
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
