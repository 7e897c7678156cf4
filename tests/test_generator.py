"""The generator: its probabilities, their cache, and sampling."""

import numpy as np
import pytest
import torch

from config import UserError
from data.batches import Row, load_pairs, pack, pair_rows
from data.prepare import open_dataset
from data.toy.world import World
from generator import (GeneratorConfig, draw, length_normalised_nll, load_generator, response_probs, sample, sampling_probs,
                       stored_probs, train_generator)
from model import LanguageModel, ModelConfig


@pytest.fixture
def trained(inside):
    model, tokenizer = load_generator("out/toy-generator", "cpu")
    return model, tokenizer, pair_rows(load_pairs(open_dataset("toy").path("train"), tokenizer, 160).rows)


def test_cached_p_equals_live_p_one_row_at_a_time(trained, tmp_path):
    model, _, rows = trained
    stored = stored_probs(model, rows[:12], tmp_path)
    for row, p in zip(rows, stored):
        tokens = torch.from_numpy(np.concatenate([row.prompt, row.response])).long()
        logits = model.lm_head(model.transformer(tokens[None])[0])
        live = logits.softmax(-1)[:-1].gather(1, tokens[1:, None])[len(row.prompt) - 1:, 0]
        assert p.dtype == np.float32 and np.allclose(p, live.numpy(), atol=1e-5)


def test_p_at_a_temperature_and_top_p_is_that_of_the_sampler(trained, tmp_path):
    """Written from the definition: probabilities sharpened, the smallest set that holds top_p kept and scaled to 1."""
    model, _, rows = trained
    found = response_probs(model, rows[:6], temperature=0.7, top_p=0.8)
    for row, p in zip(rows, found):
        tokens = torch.from_numpy(np.concatenate([row.prompt, row.response])).long()
        logits = model.lm_head(model.transformer(tokens[None])[0])
        for t, (token, value) in enumerate(zip(row.response.tolist(), p), start=len(row.prompt) - 1):
            sharpened = ((logits[t] / 0.7).double().softmax(0)).tolist()
            kept, total = [], 0.0
            for word in sorted(range(len(sharpened)), key=lambda word: -sharpened[word]):
                if total >= 0.8:
                    break
                kept.append(word)
                total += sharpened[word]
            assert value == pytest.approx(sharpened[token] / total if token in kept else 0.0, abs=1e-5)
    plain = stored_probs(model, rows[:6], tmp_path)
    assert not np.allclose(np.concatenate(plain), np.concatenate(stored_probs(model, rows[:6], tmp_path, 0.7, 0.8)))
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.allclose(sampling_probs(torch.zeros(1, 4), 1.0, 1.0), torch.full((1, 4), 0.25))


def test_a_cache_is_found_again_by_its_key_alone(trained, tmp_path):
    model, _, rows = trained
    first = stored_probs(model, rows[:4], tmp_path)
    path, = tmp_path.iterdir()
    before = path.stat().st_mtime_ns
    assert all(np.array_equal(a, b) for a, b in zip(first, stored_probs(model, rows[:4], tmp_path)))
    assert path.stat().st_mtime_ns == before
    assert sum(len(row.response) for row in rows[:4]) * 4 <= path.stat().st_size < sum(len(row.response) for row in rows[:4]) * 4 + 3000

    other_rows = [rows[1], rows[0], *rows[2:4]]
    joined = [Row(np.concatenate([rows[0].prompt, rows[0].response[:1]]), rows[0].response[1:], False), *rows[1:4]]
    weights = LanguageModel(model.transformer.config)
    for other_model, some in ((model, other_rows), (model, joined), (weights, rows[:4])):
        count = len(list(tmp_path.iterdir()))
        stored_probs(other_model, some, tmp_path)
        assert len(list(tmp_path.iterdir())) == count + 1


def test_a_cache_that_does_not_fit_its_key_is_refused(trained, tmp_path):
    model, _, rows = trained
    stored_probs(model, rows[:4], tmp_path)
    path, = tmp_path.iterdir()
    saved = torch.load(path, weights_only=True)
    for damaged in (dict(saved, key="0" * 64), dict(saved, probs=saved["probs"][:-1])):
        torch.save(damaged, path)
        with pytest.raises(UserError, match="does not belong"):
            stored_probs(model, rows[:4], tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cut short"):
        stored_probs(model, rows[:4], tmp_path)


def test_each_response_is_normalised_by_its_own_length():
    rows = [Row(np.array([1]), np.array([2, 3]), False), Row(np.array([4, 5]), np.array([6]), False)]
    logprobs = torch.tensor([-1.0, -3.0, -2.0])
    assert length_normalised_nll(logprobs, pack(rows), 2).item() == pytest.approx((4 / 2 + 2 / 1) / 2)


def test_sampling_with_a_cache_equals_sampling_without(trained):
    """The same random numbers give the same tokens as reading the whole prefix again for every token."""
    model, tokenizer, rows = trained
    prompt = torch.from_numpy(rows[0].prompt).long()[None]
    fast = sample(model, prompt, 3, tokenizer.end_of_text, torch.Generator().manual_seed(5), max_new_tokens=25)
    rng, tokens = torch.Generator().manual_seed(5), prompt.repeat(3, 1)
    done = torch.zeros(3, dtype=torch.bool)
    for _ in range(fast.size(2)):
        token = draw(model.lm_head(model.transformer(tokens)[:, -1]), rng, 1.0, 1.0)
        token = torch.where(done, tokenizer.end_of_text, token)
        done |= token == tokenizer.end_of_text
        tokens = torch.cat([tokens, token[:, None]], 1)
    assert torch.equal(tokens[:, prompt.size(1):], fast[0])


def test_samples_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(20000, 1)
    rng = torch.Generator().manual_seed(0)
    share = lambda tokens: torch.bincount(tokens, minlength=4) / len(tokens)
    assert torch.allclose(share(draw(logits, rng, 1.0, 1.0)), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.02)
    assert torch.allclose(share(draw(logits, rng, 1.0, 0.7)), torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.02)
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert torch.allclose(share(draw(logits, rng, 0.5, 1.0)), squared / squared.sum(), atol=0.02)
    assert (draw(logits, rng, 0, 1.0) == 0).all()


def test_sampling_stops_at_the_context_and_refuses_a_prompt_that_fills_it():
    model = LanguageModel(ModelConfig(20, 8, 1, 1, 4)).eval()
    rng = torch.Generator().manual_seed(0)
    assert sample(model, torch.ones(2, 5, dtype=torch.long), 4, 19, rng).shape[2] <= 3
    with pytest.raises(UserError, match="fills the context"):
        sample(model, torch.ones(1, 8, dtype=torch.long), 4, 19, rng)


def test_a_killed_generator_continues_to_the_same_bits(inside, tmp_path):
    settings = dict(n_layer=1, n_head=2, n_embd=16, steps=6, batch_size=4, save_interval=2, warmup=2, device="cpu")
    whole = train_generator(GeneratorConfig(out_dir=str(tmp_path / "whole"), **settings))
    import generator
    from unittest import mock
    with mock.patch.object(generator, "update", side_effect=kill_after(generator.update, 3)):
        with pytest.raises(KeyboardInterrupt):
            train_generator(GeneratorConfig(out_dir=str(tmp_path / "killed"), **settings))
    with pytest.raises(UserError, match="unfinished"):
        load_generator(tmp_path / "killed", "cpu")
    continued = train_generator(GeneratorConfig(out_dir=str(tmp_path / "killed"), recompute=True, **settings))
    assert continued.transformer.recompute      # less memory from here on, and nothing else
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), continued.state_dict().values()))
    with pytest.raises(UserError, match="--n_embd=16, not 32"):
        train_generator(GeneratorConfig(out_dir=str(tmp_path / "killed"), **dict(settings, n_embd=32)))


def kill_after(function, calls):
    def wrapped(*arguments):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise KeyboardInterrupt
        return function(*arguments)
    return wrapped


@pytest.mark.slow
def test_p_agrees_with_the_worlds_exact_probability_on_held_out_text(tmp_path, monkeypatch):
    import data.prepare
    from data.toy.prepare import ToyConfig, prepare
    monkeypatch.setattr(data.prepare, "DATA", tmp_path / "data")
    prepare(ToyConfig(test=100))
    model = train_generator(GeneratorConfig(out_dir=str(tmp_path / "generator")))
    tokenizer = open_dataset("toy").tokenizer
    rows = pair_rows(load_pairs(open_dataset("toy").path("val"), tokenizer, 160).rows)
    exact = [[p for p, *_ in World().trace(row.response.tolist(), tokenizer.encode, tokenizer.end_of_text)] for row in rows]
    difference = np.abs(np.concatenate(exact) - np.concatenate(response_probs(model, rows)))
    print(f"mean |p - exact p| = {difference.mean():.4f} over {len(difference)} held-out tokens")
    assert difference.mean() < 0.05
