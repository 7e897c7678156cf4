"""DPO: its loss, its pairs, and a policy that is trained, killed and resumed."""

import json
import math
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import dpo
from bon import final_rewards
from common import UserError, load_checkpoint, parse_settings, read_json
from data.batch import Example
from data.dataset import open_dataset
from evaluate import load_reward_model
from generator import load_generator, response_logprobs
from test_generator import interrupt_after


def run(out_dir, **changes):
    """Train a small policy. Returns results.json and the lines of the log."""
    settings = {
        "checkpoint": "out/run",
        "prompts": 24,
        "samples": 4,
        "held_out": 5,
        "steps": 4,
        "batch_size": 4,
        "device": "cpu",
        "out_dir": out_dir,
        **changes,
    }
    options = [f"--{name}={value}" for name, value in settings.items()]
    intervals = {"LOG_INTERVAL": 1, "SAVE_INTERVAL": 2, "EVAL_SAMPLES": 3}
    with mock.patch.multiple(dpo, **intervals):
        dpo.main(parse_settings(dpo.DPOConfig, options))
    lines = Path(out_dir, "log.jsonl").read_text().splitlines()
    results = read_json(Path(out_dir, "results.json"), "dpo.py")
    return results, [json.loads(line) for line in lines]


def test_the_loss_is_the_mean_of_log_sigmoids():
    margins = [0.3, -2.0, 5.0]
    losses = [math.log(1 + math.exp(-0.7 * margin)) for margin in margins]
    loss = dpo.dpo_loss(torch.tensor(margins).double(), 0.7).item()
    assert loss == pytest.approx(np.mean(losses))
    assert dpo.dpo_loss(torch.tensor([-1e4]), 1.0).isfinite()


def test_the_best_and_the_worst_make_a_pair_if_their_rewards_differ():
    prompt, a, b, c = (np.array([token, 9]) for token in range(4))
    candidates = [(a, b, c), (a, b), (a,), (), (b, c, a)]
    rewards = [[0.1, 0.9, -3.0], [0.2, 0.2], [1.0], [], [1.0, 3.0, 2.0]]
    examples = [Example(prompt, responses) for responses in candidates]
    pairs = dpo.select_best_and_worst(examples, [np.array(r) for r in rewards])
    assert [pair.responses for pair in pairs] == [(b, c), (c, b)]


def test_held_out_prompts_are_not_trained_on(inside):
    dataset = open_dataset("toy")
    prompts = {}
    for split in ("train", "val"):
        own = dataset.split(split).prompts()
        prompts[split] = {prompt.tobytes() for prompt in own}
    config = dpo.DPOConfig(prompts=150, held_out=9)
    train, held_out = dpo.select_prompts(dataset, config)
    train_keys = {example.prompt.tobytes() for example in train}
    held_out_keys = {prompt.tobytes() for prompt in held_out}
    assert len(train) == 150  # with repetitions
    assert len(held_out_keys) == len(held_out) == 9
    assert held_out_keys <= prompts["val"] and prompts["train"] & prompts["val"]
    assert train_keys == prompts["train"] - held_out_keys


def test_pairs_may_come_from_a_split(inside):
    dataset = open_dataset("toy")
    reward_model, tokenizer, _ = load_reward_model("out/run", "cpu")
    config = dpo.DPOConfig(pairs_split="swapped", prompts=20, held_out=9)
    examples, held_out = dpo.select_prompts(dataset, config)
    used = {example.prompt.tobytes() for example in examples}
    assert not used & {prompt.tobytes() for prompt in held_out}
    reference, _ = load_generator("out/toy-generator", "cpu")
    arguments = reference, reward_model, tokenizer, examples, config
    pairs, _ = dpo.make_pairs(*arguments)
    known = set()
    for _, (first, second) in dataset.split("swapped"):
        known |= {(first.tobytes(), second.tobytes())}
        known |= {(second.tobytes(), first.tobytes())}
    assert len(pairs) == 20
    for pair, (better, worse) in zip(pairs, final_rewards(reward_model, pairs)):
        chosen, rejected = pair.responses
        assert better > worse and (chosen.tobytes(), rejected.tobytes()) in known
    with pytest.raises(UserError, match="unknown pairs_split 'swaped'. Choose one"):
        run("out/dpo-no-split", pairs_split="swaped")


def reversed_pairs(examples, rewards, select=dpo.select_best_and_worst):
    return select(examples, rewards)[::-1]


def test_a_policy_is_trained_killed_resumed_and_evaluated(inside):
    results, log = run("out/dpo", judge="out/run")
    assert 8 < results["pairs"] <= 24 and len(results["win_rate"]) == 2
    for name in ("generator", "policy"):
        keys = {"gold", "reward", "finished", "length", "distinct"}
        assert keys <= set(results[name])
    with mock.patch.object(dpo, "update", interrupt_after(dpo.update, 3)):
        with pytest.raises(KeyboardInterrupt):
            run("out/dpo-killed", judge="out/run")
    with pytest.raises(UserError, match="the policy in out/dpo-killed is not finished"):
        load_generator("out/dpo-killed", "cpu")
    resumed, resumed_log = run("out/dpo-killed", judge="out/run", resume=True)
    whole = load_checkpoint("out/dpo", "policy")["model"]
    other = load_checkpoint("out/dpo-killed", "policy")["model"]
    assert all(torch.equal(weight, other[name]) for name, weight in whole.items())
    assert {**resumed, "settings": 0} == {**results, "settings": 0}
    assert resumed_log == log
    with pytest.raises(UserError, match="--beta=0.1, not 0.2"):
        run("out/dpo", judge="out/run", beta=0.2, resume=True)
    # Another device may sample other responses.
    with mock.patch.object(dpo, "select_best_and_worst", reversed_pairs):
        with pytest.raises(UserError, match="was trained with another pairs"):
            run("out/dpo", judge="out/run", resume=True)


def test_a_second_round_starts_from_the_first_policy(inside):
    run("out/dpo-first-round")
    options = ["--checkpoint=out/run", "--generator=out/dpo-first-round", "--steps=1"]
    options += ["--prompts=12", "--samples=4", "--held_out=5", "--device=cpu"]
    dpo.main(parse_settings(dpo.DPOConfig, options))
    assert Path("out/dpo-run-dpo-first-round-seed0/ckpt.pt").exists()


def test_training_starts_at_margin_zero(inside):
    """Pairs carry the reference's log-probabilities."""
    reference, tokenizer = load_generator("out/toy-generator", "cpu")
    config = dpo.DPOConfig(prompts=6)
    examples, _ = dpo.select_prompts(open_dataset("toy"), config)
    reward_model, *_ = load_reward_model("out/run", "cpu")
    pairs, logprobs = dpo.make_pairs(
        reference, reward_model, tokenizer, examples, config
    )
    for pair, own in zip(pairs, logprobs, strict=True):
        alone = []
        for response in pair.responses:
            example = Example(pair.prompt, (response,))
            alone.append(response_logprobs(reference, [example])[0][0].sum())
        assert own.numpy() == pytest.approx(alone, abs=1e-3)
    _, (first,) = run("out/dpo-margin", steps=1)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert first["margin"] == pytest.approx(0, abs=1e-3)


def test_the_policy_learns_its_pairs(inside):
    """Chosen responses of a few pairs become more likely than rejected ones."""
    changes = {"prompts": 8, "steps": 12, "learning_rate": 3e-3}
    results, (first, *_, last) = run("out/dpo-few", **changes)
    assert last["accuracy"] > 0.9 and last["margin"] > 1
    assert last["loss"] < first["loss"] and results["policy"]["kl"] > 0


def test_win_rates_compare_all_responses_to_a_prompt():
    policy = [np.array([2.0, 1.0]), np.array([0.0])]
    reference = [np.array([1.0, 0.0])] * 2
    with mock.patch.object(dpo, "final_rewards", lambda judge, rewards: rewards):
        rate, half_width = dpo.win_rate(None, policy, reference)
        mirrored = dpo.win_rate(None, reference, policy)
        assert mirrored == pytest.approx((1 - rate, half_width))
        unfinished = policy + [np.array([])], reference + reference[:1]
        assert dpo.win_rate(None, *unfinished) == (rate, half_width)
        assert dpo.win_rate(None, policy[:1], reference[:1]) is None
    rates = [(1 + 1 + 0.5 + 1) / 4, (0 + 0.5) / 2]
    assert rate == pytest.approx(np.mean(rates))
    standard_error = np.std(rates, ddof=1) / math.sqrt(2)
    assert half_width == pytest.approx(1.96 * standard_error)


def test_mistakes_are_one_line_and_cost_no_run(inside):
    for changes, message in (
        ({"max_new_tokens": 1}, "no prompt has two .*--max_new_tokens than 1"),
        ({"samples": 1}, "--samples must be at least 2"),
        ({"beta": 0}, "--beta must be above 0"),
        ({"resume": True}, "there is no checkpoint at out/dpo-bad"),
    ):
        with pytest.raises(UserError, match=message):
            run("out/dpo-bad", **changes)
    shutil.copytree("out/run", "out/dpo-kept", dirs_exist_ok=True)
    with pytest.raises(UserError, match="no prompt has two"):
        run("out/dpo-kept", max_new_tokens=1)
    assert Path("out/dpo-kept/ckpt.pt").exists()
