"""DPO: its loss, its pairs, and a policy that is trained, killed, continued and judged."""
import json
import math
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import dpo
from config import UserError, parse
from data.dataset import open_dataset
from data.files import load_checkpoint, read_json
from data.rows import Row
from evaluate import load_reward_model
from generator import load_generator, response_logprobs
from test_generator import kill_after


def run(out_dir, **more):
    """Log and save often; -> results.json, and the lines of the log"""
    settings = dict(checkpoint="out/run", prompts=24, samples=4, held_out=5, steps=4, batch_size=4,
                    device="cpu", out_dir=out_dir) | more
    with mock.patch.multiple(dpo, LOG_EVERY=1, SAVE_EVERY=2, ANSWERS=3):
        dpo.main(parse(dpo.DPOConfig, [f"--{key}={value}" for key, value in settings.items()]))
    lines = Path(out_dir, "log.jsonl").read_text().splitlines()
    return read_json(Path(out_dir, "results.json"), "dpo.py"), list(map(json.loads, lines))


def test_the_best_and_the_worst_make_a_pair_where_they_differ():
    prompt, a, b, c = (np.array([token, 9]) for token in range(4))
    rows = [Row(prompt, some) for some in ((a, b, c), (a, b), (a,), (), (b, c, a))]
    rewards = [[0.1, 0.9, -3.0], [0.2, 0.2], [1.0], [], [1.0, 3.0, 2.0]]
    pairs = dpo.best_and_worst(rows, list(map(np.array, rewards)))
    assert [row.responses for row in pairs] == [(b, c), (c, b)]


def test_held_out_prompts_are_not_trained_on_and_the_others_come_again(inside):
    dataset = open_dataset("toy")
    every = {split: {prompt.tobytes() for prompt in dataset.split(split).prompts()}
             for split in ("train", "val")}
    train, held_out = dpo.prompts_of(dataset, dpo.DPOConfig(prompts=150, held_out=9))
    kept = {row.prompt.tobytes() for row in train}
    known = {prompt.tobytes() for prompt in held_out}
    assert len(train) == 150 and len(known) == len(held_out) == 9 and known <= every["val"]
    assert kept == every["train"] - known and every["train"] & every["val"]


def test_pairs_may_be_those_of_a_split_as_the_reward_model_ranks_them(inside):
    dataset, (reward_model, tokenizer, _) = open_dataset("toy"), load_reward_model("out/run", "cpu")
    config = dpo.DPOConfig(pairs_from="swapped", prompts=20, held_out=9)
    rows, held_out = dpo.prompts_of(dataset, config)
    assert not {row.prompt.tobytes() for row in rows} & {prompt.tobytes() for prompt in held_out}
    reference, _ = load_generator("out/toy-generator", "cpu")
    pairs, _ = dpo.make_pairs(reference, reward_model, tokenizer, rows, config)
    known = {tuple(part.tobytes() for part in row.responses) for row in dataset.split("swapped")}
    assert len(pairs) == 20
    for row, (better, worse) in zip(pairs, dpo.final_rewards(reward_model, pairs)):
        pair = tuple(part.tobytes() for part in row.responses)
        assert better > worse and known & {pair, pair[::-1]}
    with pytest.raises(UserError, match="unknown pairs_from 'swaped'; choose one of: train, val"):
        run("out/dpo-of-no-split", pairs_from="swaped")


def reversed_pairs(rows, rewards, best_and_worst=dpo.best_and_worst):
    return best_and_worst(rows, rewards)[::-1]


def test_a_policy_is_trained_killed_continued_and_judged(inside):
    found, log = run("out/dpo", judge="out/run")
    assert 8 < found["pairs"] <= 24 and len(found["win_rate"]) == 2
    for name in ("generator", "policy"):
        assert {"gold", "reward", "finished", "length", "distinct"} <= set(found[name])
    with mock.patch.object(dpo, "update", kill_after(dpo.update, 3)):
        with pytest.raises(KeyboardInterrupt):
            run("out/dpo-killed", judge="out/run")
    with pytest.raises(UserError, match="the policy in out/dpo-killed is unfinished"):
        load_generator("out/dpo-killed", "cpu")
    continued, its_log = run("out/dpo-killed", judge="out/run", resume=True)
    whole, other = (load_checkpoint(out, "policy") for out in ("out/dpo", "out/dpo-killed"))
    assert all(torch.equal(a, other["model"][name]) for name, a in whole["model"].items())
    assert {**continued, "settings": 0} == {**found, "settings": 0} and its_log == log
    with pytest.raises(UserError, match="--beta=0.1, not 0.2"):
        run("out/dpo", judge="out/run", beta=0.2, resume=True)
    with mock.patch.object(dpo, "best_and_worst", reversed_pairs):      # as another device samples
        with pytest.raises(UserError, match="another pairs than there is now"):
            run("out/dpo", judge="out/run", resume=True)
    args = ["--checkpoint=out/run", "--generator=out/dpo", "--steps=1", "--prompts=12"]
    dpo.main(parse(dpo.DPOConfig, [*args, "--samples=4", "--held_out=5", "--device=cpu"]))
    assert Path("out/dpo-run-dpo-seed0/ckpt.pt").exists()   # a second round starts from the first


def test_pairs_carry_the_references_log_probabilities_and_training_starts_at_margin_zero(inside):
    reference, tokenizer = load_generator("out/toy-generator", "cpu")
    rows, _ = dpo.prompts_of(open_dataset("toy"), dpo.DPOConfig(prompts=6))
    reward_model, *_ = load_reward_model("out/run", "cpu")
    pairs = dpo.make_pairs(reference, reward_model, tokenizer, rows, dpo.DPOConfig())
    for row, found in zip(*pairs, strict=True):
        alone = [response_logprobs(reference, [Row(row.prompt, (response,))])[0][0].sum()
                 for response in row.responses]
        assert found.numpy() == pytest.approx(alone, abs=1e-3)
    _, (first,) = run("out/dpo-first", steps=1)
    assert (first["loss"], first["margin"]) == pytest.approx((math.log(2), 0), abs=1e-3)


def test_the_policy_learns_what_its_pairs_say(inside):
    """Chosen responses of few pairs become likelier than rejected ones, against the reference."""
    found, (first, *_, last) = run("out/dpo-few", prompts=8, steps=12, learning_rate=3e-3)
    assert last["accuracy"] > 0.9 and last["margin"] > 1 and last["loss"] < first["loss"]
    assert found["policy"]["kl"] > 0


def test_win_rates_are_over_all_meetings_of_a_prompt_and_mirror():
    ours, theirs = [np.array([2.0, 1.0]), np.array([0.0])], [np.array([1.0, 0.0])] * 2
    with mock.patch.object(dpo, "final_rewards", lambda judge, rewards: rewards):
        rate, half = dpo.win_rate(None, ours, theirs)
        assert dpo.win_rate(None, theirs, ours) == pytest.approx((1 - rate, half))
        assert dpo.win_rate(None, ours + [np.array([])], theirs + theirs[:1]) == (rate, half)
        assert dpo.win_rate(None, ours[:1], theirs[:1]) is None     # nobody else has finished
    shares = [(1 + 1 + 0.5 + 1) / 4, (0 + 0.5) / 2]
    assert rate == pytest.approx(np.mean(shares))
    assert half == pytest.approx(1.96 * np.std(shares, ddof=1) / math.sqrt(2))


def test_bad_input_is_one_line(inside):
    for settings, message in (({"max_new_tokens": 1}, "no pair; .*--max_new_tokens than 1"),
                              ({"samples": 1}, "--samples must be at least 2"),
                              ({"beta": 0}, "--beta must be above 0"),
                              ({"resume": True}, "no checkpoint at out/dpo-bad")):
        with pytest.raises(UserError, match=message):
            run("out/dpo-bad", **settings)
    shutil.copytree("out/run", "out/dpo-kept", dirs_exist_ok=True)
    with pytest.raises(UserError, match="no pair"):
        run("out/dpo-kept", max_new_tokens=1)
    assert Path("out/dpo-kept/ckpt.pt").exists()        # a mistake costs no run
