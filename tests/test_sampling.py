"""Sampling from the generator, with its cache."""

import numpy as np
import pytest
import torch

import bon
from bon import Sampler, sample_responses, sample_token
from common import UserError
from data.dataset import open_dataset
from generator import load_generator
from model import LanguageModel, ModelConfig


@pytest.fixture
def trained(inside):
    model, tokenizer = load_generator("out/toy-generator", "cpu")
    return model, tokenizer, open_dataset("toy").split("train")


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
def test_sampling_with_a_cache_equals_sampling_without(trained, temperature):
    """The same random numbers give the same tokens as without a cache."""
    model, tokenizer, split = trained
    prompt = torch.tensor(split[0].prompt.astype(np.int64))[None]
    end = tokenizer.end_of_text
    rng = torch.Generator().manual_seed(5)
    sampler = Sampler(model, prompt, 3, end, rng, 25, temperature)
    sampler.generate()
    rng, tokens = torch.Generator().manual_seed(5), prompt.repeat(3, 1)
    finished = torch.zeros(3, dtype=torch.bool)
    for _ in range(sampler.tokens.size(1)):
        positions = torch.arange(tokens.size(1)).expand(3, -1)
        logits = model.lm_head(model.model(tokens, positions)[:, -1])
        token = sample_token(logits, rng, temperature)
        token = torch.where(finished, end, token)
        finished |= token == end
        tokens = torch.cat([tokens, token[:, None]], 1)
    assert torch.equal(tokens[:, prompt.size(1) :], sampler.tokens)


def test_dropping_rows_does_not_change_the_others(trained):
    model, tokenizer, split = trained
    prompt = torch.tensor(split[0].prompt.astype(np.int64))
    prompts, end = torch.stack([prompt, prompt.flip(0)]), tokenizer.end_of_text
    results = []
    for rows in (list(range(6)), [5, 0, 2]):
        rng = torch.Generator().manual_seed(5)
        sampler = Sampler(model, prompts, 3, end, rng, 12, temperature=2.0)
        assert len({row.tobytes() for row in sampler.generate(4)}) == 6
        sampler.select_rows(torch.tensor(rows))
        sampler.temperature = 0
        sampler.generate()
        results.append(sampler.tokens)
    assert torch.equal(results[0][[5, 0, 2]], results[1])


@pytest.mark.parametrize("max_rows", [4, 256])
def test_responses_come_back_in_the_order_of_the_prompts(
    trained, max_rows, monkeypatch
):
    """Greedy, so each response is the one that its prompt has alone."""
    monkeypatch.setattr(bon, "sample_token", lambda logits, *_: logits.argmax(1))
    model, tokenizer, split = trained
    prompts = []
    for i, length in enumerate((5, 3, 5, 4, 5)):
        prompts.append(split[i].prompt[:length].astype(np.int64))
    end = tokenizer.end_of_text
    examples = sample_responses(model, tokenizer, prompts, 2, 0, 30, max_rows=max_rows)
    for prompt, example in zip(prompts, examples, strict=True):
        alone = Sampler(model, torch.from_numpy(prompt)[None], 1, end, None, 30)
        (expected,) = alone.generate()
        assert example.prompt is prompt
        for response in example.responses:
            assert response.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "temperature, expected",
    [
        (1.0, [0.5, 0.3, 0.15, 0.05]),
        (0.5, [0.685, 0.247, 0.062, 0.007]),
        (0, [1.0, 0, 0, 0]),
    ],
)
def test_samples_follow_the_probabilities(temperature, expected):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(20000, 1)
    tokens = sample_token(logits, torch.Generator().manual_seed(0), temperature)
    shares = torch.bincount(tokens, minlength=4) / len(tokens)
    assert shares.tolist() == pytest.approx(expected, abs=0.015)


def test_sampling_stops_at_the_end_of_the_context():
    model = LanguageModel(ModelConfig(20, 8, 1, 1, 4)).eval()
    rng = torch.Generator().manual_seed(0)
    prompts = torch.ones(2, 5, dtype=torch.long)
    responses = Sampler(model, prompts, 4, 19, rng).generate()
    assert max(len(response) for response in responses) <= 3
    with pytest.raises(UserError, match="fills the context"):
        Sampler(model, torch.ones(1, 8, dtype=torch.long), 4, 19, rng)
