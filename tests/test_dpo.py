"""DPO: its losses, its pairs, and a policy that is trained, killed, continued and judged."""
import json
import math
from unittest import mock

import numpy as np
import pytest
import torch

import dpo
from config import UserError, load_checkpoint, parse
from data.batches import Row
from generator import load_generator, response_probs, sample_responses
from types import SimpleNamespace
from test_generator import kill_after


def run(*arguments, **more):
    settings = dict(checkpoint="out/run", prompts=24, samples=4, held_out=5, answers=3, steps=4, batch_size=4, save_interval=2,
                    log_interval=1, warmup=1, max_new_tokens=60, device="cpu") | more
    dpo.main(parse(dpo.DPOConfig, [f"--{key}={value}" for key, value in settings.items()] + list(arguments)))


def test_the_losses_equal_their_equations():
    margin, beta = torch.tensor([0.7, -2.0, 30.0], dtype=torch.float64), 0.1
    sigma = [1 / (1 + math.exp(-beta * m)) for m in margin.tolist()]
    assert dpo.dpo(margin, beta).item() == pytest.approx(-sum(map(math.log, sigma)) / 3)
    assert dpo.ipo(margin, beta).item() == pytest.approx(sum((m - 5) ** 2 for m in margin.tolist()) / 3)
    smoothed = -sum(0.8 * math.log(s) + 0.2 * math.log(1 - s) for s in sigma) / 3
    assert dpo.cdpo(margin, beta, smoothing=0.2).item() == pytest.approx(smoothed)
    assert dpo.cdpo(margin, beta, smoothing=0.0).item() == pytest.approx(dpo.dpo(margin, beta).item())


def test_the_best_and_the_worst_make_a_pair_and_equal_ones_are_counted():
    row = lambda *tokens: Row(np.array([1]), np.array(tokens), False)
    tokenizer = SimpleNamespace(end_of_text=9, decode=lambda tokens: "".join("abcdefghij"[t % 10] for t in tokens))
    groups = [[row(2, 9), row(3, 9), row(4, 9)], [row(5, 9), row(15, 9)], [row(6, 9), row(7, 9)], [row(2, 9), row(3, 4)],
              [row(1, 2), row(3, 9), row(4, 9)]]
    pairs, left_out = dpo.best_and_worst(groups, [[0.1, 0.9, -3.0], [0.5, 0.7], [0.2, 0.2], [0, 1], [9, 1, 2]], tokenizer)
    assert [(best.response[0], worst.response[0]) for best, worst in pairs] == [(3, 4), (4, 3)]
    assert left_out == {"equal rewards": 1, "equal texts": 1, "fewer than two finished": 1}     # 5 and 15 decode alike


def test_responses_stop_at_end_of_text_and_stand_at_their_prompts(inside):
    model, tokenizer = load_generator("out/toy-generator", "cpu")
    prompts = [tokenizer.encode(text) for text in ("How is the cafe in Oslo?", "How?", "How is the hotel in Riga?")]
    found = sample_responses(model, prompts, 3, tokenizer.end_of_text, torch.Generator().manual_seed(0), max_new_tokens=12)
    assert [len(responses) for responses in found] == [3, 3, 3]
    for responses in found:
        for tokens in responses:
            assert (tokens[:-1] != tokenizer.end_of_text).all()
            assert len(tokens) == 12 or tokens[-1] == tokenizer.end_of_text and len(tokens) < 12
    greedy = sample_responses(model, prompts, 1, tokenizer.end_of_text, torch.Generator(), 5, temperature=0)
    for prompt, (tokens,) in zip(prompts, greedy):
        best = model.lm_head(model.transformer(torch.tensor([prompt]))[0, -1]).argmax().item()
        assert tokens[0] == best


def test_a_policy_is_trained_killed_continued_and_judged(inside, capsys):
    run(f"--json={inside / 'o.json'}", "--judge=out/run", out_dir="out/dpo")
    found = json.loads((inside / "o.json").read_text())
    assert {"gold_before", "gold_after", "greedy_gold_after", "reward_after", "kl", "length_after", "distinct_after"} <= set(found)
    assert found["pairs"] + sum(found["left_out"].values()) == 24
    judged = found["judge"]
    assert sum(judged[name]["rate"] for name in ("win", "tie", "lose")) == pytest.approx(1)
    with mock.patch.object(dpo, "update", side_effect=kill_after(dpo.update, 3)):
        with pytest.raises(KeyboardInterrupt):
            run(out_dir="out/dpo-killed")
    run(out_dir="out/dpo-killed")
    whole, continued = load_checkpoint("out/dpo", "policy"), load_checkpoint("out/dpo-killed", "policy")
    assert all(torch.equal(a, continued["model"][name]) for name, a in whole["model"].items())
    assert json.loads((inside / "out/dpo-killed/results.json").read_text())["gold_after"] == found["gold_after"]
    assert load_generator("out/dpo", "cpu")[1].fingerprint == load_generator("out/toy-generator", "cpu")[1].fingerprint
    with pytest.raises(UserError, match="--beta=0.1, not 0.2"):
        run(out_dir="out/dpo", beta=0.2)


def test_the_stored_log_probabilities_are_the_references_and_training_starts_at_margin_zero(inside):
    run(out_dir="out/dpo-first", steps=1)
    first = json.loads((inside / "out/dpo-first/log.jsonl").read_text())
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)      # -log sigma(0)
    stored = load_checkpoint("out/dpo-first/pairs.pt", "dpo pairs")
    reference, _ = load_generator("out/toy-generator", "cpu")
    rows = [Row(*(part.numpy() for part in row), False) for row in stored["rows"]]
    expected = [np.log(p.astype(np.float64)).sum() for p in response_probs(reference, rows)]
    assert np.allclose(stored["logprobs"].numpy(), expected, atol=1e-3)


def test_the_policy_learns_what_its_pairs_say(inside):
    """After training on few pairs, the chosen ones are likelier than the rejected ones, relative to the reference."""
    run(out_dir="out/dpo-long", steps=30, learning_rate=3e-3)
    log = [json.loads(line) for line in (inside / "out/dpo-long/log.jsonl").read_text().splitlines()]
    assert log[-1]["accuracy"] > 0.9 and log[-1]["margin"] > 1 and log[-1]["loss"] < 0.65
    assert json.loads((inside / "out/dpo-long/results.json").read_text())["kl"] > 0


def test_win_rates_add_up_and_mirror(inside):
    rewards = {1: 0.0, 2: 1.0, 3: 1.0, 4: 2.0}
    row = lambda token: Row(np.array([9]), np.array([token]), False)
    ours, theirs = [[row(4), row(2)], [row(1)]], [[row(3), row(1)], [row(2)]]
    with mock.patch.object(dpo, "score", lambda judge, rows, device: [np.array([rewards[int(r.response[0])]]) for r in rows]):
        found, mirrored = dpo.win_rates(None, ours, theirs, "cpu"), dpo.win_rates(None, theirs, ours, "cpu")
    assert all(part["half"] > 0 for part in found.values())
    assert (found["win"]["rate"], found["tie"]["rate"], found["lose"]["rate"]) == (0.375, 0.125, 0.5)
    assert mirrored["lose"]["rate"] == found["win"]["rate"] and mirrored["win"]["rate"] == found["lose"]["rate"]


def test_bad_input_is_one_line(inside):
    with pytest.raises(UserError, match="fills the context"):
        run(out_dir="out/dpo-bad", max_new_tokens=155)
    with pytest.raises(UserError, match="no prompt gave a usable pair"):
        run(out_dir="out/dpo-bad", temperature=0)
    with pytest.raises(UserError, match="choose one of: dpo, ipo, cdpo"):
        run(out_dir="out/dpo-bad", loss="kto")
    import data.prepare
    if not (data.prepare.dataset_folder("words") / "dataset.json").exists():
        data.prepare.prepare_rows("words", "x", data.prepare.read_pairs(data.prepare.open_dataset("toy").path("train"))[0],
                                  data.prepare.PrepareConfig(tokenizer="bpe:300"))
    import generator
    generator.train_generator(generator.GeneratorConfig(dataset="words", out_dir="out/words-g", steps=1, n_layer=1, n_head=1,
                                                        n_embd=8, batch_size=2, device="cpu", block_size=400))
    with pytest.raises(UserError, match="generator and the reward model read different vocabularies"):
        run(out_dir="out/dpo-bad", generator="out/words-g")
