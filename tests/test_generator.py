"""The generator: its probabilities, written once, and sampling."""
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import generator
from config import UserError
from conftest import quick_generator
from data.dataset import open_array, open_dataset
from data.files import file_digest, load_checkpoint, read_json
from generator import Sampling, draw, load_generator, sample_rows
from model import LanguageModel, ModelConfig


@pytest.fixture
def trained(inside):
    model, tokenizer = load_generator("out/toy-generator", "cpu")
    return model, tokenizer, open_dataset("toy").split("train")


def kill_after(function, calls):
    """The function, until it is interrupted at a call (train.update in the middle of a run)."""
    left = iter(range(calls))

    def wrapped(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*arguments)
    return wrapped


# The probabilities ------------------------------------------------------------------------------

def naive_p(logits, token, top_p):
    """From the definition: the smallest set that holds top_p is kept and scaled to 1."""
    probs, kept, total = logits.double().softmax(0), [], 0.0
    for word in probs.argsort(descending=True).tolist():
        if total < top_p:
            kept.append(word)
            total += probs[word].item()
    return probs[token].item() / total if token in kept else 0.0


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.8)])
def test_p_stands_beside_the_tokens_and_is_the_samplers(trained, tmp_path, monkeypatch,
                                                        temperature, top_p):
    """And that of each response read alone."""
    model, _, split = trained
    settings = {"temperature": temperature, "top_p": top_p}
    monkeypatch.setattr(generator, "ROWS", 7)
    generator.write_p(model, split, tmp_path, settings)
    p = open_array(tmp_path / "p.npy")
    mean = pytest.approx(p.sum() / split.lengths[:, 1:].sum())
    about = read_json(tmp_path / "p.json", "generator.py")
    assert about == settings | {"digest": file_digest(tmp_path / "p.npy"), "mean": mean}
    for i in range(4):
        prompt, responses, _ = split[i]
        assert not p[split.starts[i]:][:len(prompt)].any()
        for response, found in zip(responses, split.of_responses(p, i)):
            tokens = torch.tensor([*prompt.tolist(), *response.tolist()])
            hidden = model.model(tokens[None], torch.arange(len(tokens))[None])[0]
            logits = model.lm_head(hidden)[len(prompt) - 1:-1] / temperature
            expected = [naive_p(*pair, top_p) for pair in zip(logits, tokens[len(prompt):])]
            assert found.tolist() == pytest.approx(expected, abs=1e-5)


# Runs -------------------------------------------------------------------------------------------

def test_a_killed_generator_goes_on_to_the_same_bits(inside):
    settings = dict(steps=6, batch_size=4, warmup=2)
    with mock.patch.multiple(generator, SAVE_EVERY=2, LOG_EVERY=1):
        quick_generator("toy", "out/g-whole", **settings)
        with mock.patch.object(generator, "update", kill_after(generator.update, 3)):
            with pytest.raises(KeyboardInterrupt):
                quick_generator("toy", "out/g-killed", **settings)
        with pytest.raises(UserError, match="unfinished"):
            load_generator("out/g-killed", "cpu")
        with pytest.raises(UserError, match="--batch_size=4, not 5"):
            quick_generator("toy", "out/g-killed", **dict(settings, batch_size=5), resume=True)
        quick_generator("toy", "out/g-killed", **settings, resume=True)
    for name in ("p.npy", "log.jsonl"):
        whole, killed = (Path(f"out/g-{end}/{name}").read_bytes() for end in ("whole", "killed"))
        assert whole == killed


def test_a_mistake_keeps_the_generator_and_a_loss_that_is_not_finite_the_checkpoint(inside):
    quick_generator("toy", "out/g-again", steps=1)
    for more in (dict(dtype="float8"), dict(top_p=0.0), dict(init_from="out")):
        with pytest.raises(UserError):
            quick_generator("toy", "out/g-again", **more)
    losses = iter([1.0, 1.0, float("nan")])

    def poison(logprobs, *arguments):
        return logprobs.mean() * next(losses)
    with mock.patch.multiple(generator, length_normalised_nll=poison, SAVE_EVERY=1):
        with pytest.raises(UserError, match="not finite at step 3"):
            quick_generator("toy", "out/g-again", steps=9)
    steps = [load_checkpoint(f"out/g-again{end}", "generator")["step"] for end in (".previous", "")]
    assert steps == [1, 2]


# Sampling ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
def test_sampling_with_a_cache_equals_sampling_without(trained, temperature):
    """The same random numbers give the same tokens as reading the whole prefix again every time."""
    model, tokenizer, split = trained
    prompt, end = torch.tensor(split[0].prompt.astype(np.int64))[None], tokenizer.end_of_text
    fast = Sampling(model, prompt, 3, end, torch.Generator().manual_seed(5), 25, temperature)
    fast.write()
    rng, tokens = torch.Generator().manual_seed(5), prompt.repeat(3, 1)
    done = torch.zeros(3, dtype=torch.bool)
    for _ in range(fast.tokens.size(1)):
        positions = torch.arange(tokens.size(1)).expand(3, -1)
        token = draw(model.lm_head(model.model(tokens, positions)[:, -1]), rng, temperature)
        token = torch.where(done, end, token)
        done |= token == end
        tokens = torch.cat([tokens, token[:, None]], 1)
    assert torch.equal(tokens[:, prompt.size(1):], fast.tokens)


def test_rows_that_are_dropped_leave_the_others_as_they_would_be(trained):
    model, tokenizer, split = trained
    prompt = torch.tensor(split[0].prompt.astype(np.int64))
    prompts, end = torch.stack([prompt, prompt.flip(0)]), tokenizer.end_of_text
    found = []
    for rows in (range(6), [5, 0, 2]):
        rng = torch.Generator().manual_seed(5)
        sampling = Sampling(model, prompts, 3, end, rng, 12, temperature=2.0)
        assert len(set(map(bytes, sampling.write(4)))) == 6
        sampling.keep(torch.tensor(rows))
        sampling.temperature = 0
        sampling.write()
        found.append(sampling.tokens)
    assert torch.equal(found[0][[5, 0, 2]], found[1])


@pytest.mark.parametrize("rows", [4, 256])
def test_responses_to_prompts_of_any_length_come_in_their_order(trained, rows, monkeypatch):
    """Greedy, so that each is the one that its prompt has alone, up to the end."""
    monkeypatch.setattr(generator, "draw", lambda logits, rng, temperature: logits.argmax(1))
    model, tokenizer, split = trained
    prompts = [split[i].prompt[:n].astype(np.int64) for i, n in enumerate((5, 3, 5, 4, 5))]
    end = tokenizer.end_of_text
    found = sample_rows(model, tokenizer, prompts, 2, 0, 30, rows=rows)
    for prompt, row in zip(prompts, found, strict=True):
        alone = Sampling(model, torch.from_numpy(prompt)[None], 1, end, None, 30)
        alone.write()
        tokens = alone.tokens[0].tolist()
        until_end = tokens[:tokens.index(end) + 1] if end in tokens else tokens
        assert [response.tolist() for response in row.responses] == [until_end] * 2
        assert row.prompt is prompt


@pytest.mark.parametrize("temperature, expected", [
    (1.0, [0.5, 0.3, 0.15, 0.05]), (0.5, [0.685, 0.247, 0.062, 0.007]), (0, [1.0, 0, 0, 0])])
def test_samples_follow_the_probabilities(temperature, expected):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(20000, 1)
    tokens = draw(logits, torch.Generator().manual_seed(0), temperature)
    found = torch.bincount(tokens, minlength=4) / len(tokens)
    assert found.tolist() == pytest.approx(expected, abs=0.015)


def test_sampling_stops_at_the_context_and_refuses_a_prompt_that_fills_it():
    model = LanguageModel(ModelConfig(20, 8, 1, 1, 4)).eval()
    rng = torch.Generator().manual_seed(0)
    prompts = torch.ones(2, 5, dtype=torch.long)
    assert max(map(len, Sampling(model, prompts, 4, 19, rng).write())) <= 3
    with pytest.raises(UserError, match="fills the context"):
        Sampling(model, torch.ones(1, 8, dtype=torch.long), 4, 19, rng)
