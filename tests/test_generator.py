"""The generator: its probabilities, its runs, and sampling."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import generator
from common import UserError, file_sha256, load_checkpoint, read_json
from conftest import small_generator
from data.dataset import open_array, open_dataset
from generator import Probs, load_generator


@pytest.fixture
def trained(inside):
    model, tokenizer = load_generator("out/toy-generator", "cpu")
    return model, tokenizer, open_dataset("toy").split("train")


def interrupt_after(function, calls):
    """The function, until it is interrupted at a call."""
    remaining = iter(range(calls))

    def wrapped(*arguments):
        if next(remaining, None) is None:
            raise KeyboardInterrupt
        return function(*arguments)

    return wrapped


# Next-token probabilities -------------------------------------------------------------


def slow_p(logits, token, top_p):
    """From the definition: keep the smallest set with mass top_p, and renormalize."""
    probs, kept, total = logits.double().softmax(0), [], 0.0
    for word in probs.argsort(descending=True).tolist():
        if total < top_p:
            kept.append(word)
            total += probs[word].item()
    return probs[token].item() / total if token in kept else 0.0


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.8)])
def test_p_is_that_of_each_response_read_alone(
    trained, tmp_path, monkeypatch, temperature, top_p
):
    model, _, split = trained
    settings = {"temperature": temperature, "top_p": top_p}
    monkeypatch.setattr(generator, "EXAMPLES_AT_ONCE", 7)
    generator.write_p(model, split, tmp_path, settings)
    p = open_array(tmp_path / "p.npy")
    metadata = read_json(tmp_path / "p.json", "generator.py")
    assert metadata == {
        **settings,
        "digest": file_sha256(tmp_path / "p.npy"),
        "mean": pytest.approx(p.sum() / split.lengths[:, 1:].sum()),
    }
    for i in range(4):
        prompt, responses = split[i]
        start = split.starts[i]
        assert not p[start : start + len(prompt)].any()
        for response, stored in zip(responses, split.response_values(p, i)):
            tokens = torch.tensor([*prompt.tolist(), *response.tolist()])
            positions = torch.arange(len(tokens))[None]
            hidden = model.model(tokens[None], positions)[0]
            logits = model.lm_head(hidden)[len(prompt) - 1 : -1] / temperature
            expected = []
            for row, token in zip(logits, tokens[len(prompt) :]):
                expected.append(slow_p(row, token, top_p))
            assert stored.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_controls_of_p(inside):
    dataset = open_dataset("toy")
    probs = {}
    for source in generator.P_SOURCES:
        probs[source] = Probs(source, dataset, "out/toy-generator")
    assert len({own.fingerprint for own in probs.values()}) == 5
    for i in range(3):
        for side in (0, 1):
            p, shuffled = probs["generator"][i][side], probs["shuffled"][i][side]
            assert (probs["uniform"][i][side] == 1).all()
            assert np.allclose(probs["inverse"][i][side], 1 - p)
            assert shuffled[0] == p[0] and not np.array_equal(shuffled, p)
            assert sorted(shuffled) == sorted(p)
            assert np.array_equal(shuffled, probs["shuffled"][i][side])
            exact = dataset.split("train").response_values(
                dataset.array("train", "exact-p"), i
            )
            assert np.array_equal(probs["exact"][i][side], exact[side])


# Runs ---------------------------------------------------------------------------------


def test_a_killed_generator_resumes_to_the_same_bits(inside):
    settings = {"steps": 6, "batch_size": 4, "warmup": 2}
    with mock.patch.multiple(generator, SAVE_INTERVAL=2, LOG_INTERVAL=1):
        small_generator("toy", "out/g-whole", **settings)
        interrupted = interrupt_after(generator.update, 3)
        with mock.patch.object(generator, "update", interrupted):
            with pytest.raises(KeyboardInterrupt):
                small_generator("toy", "out/g-killed", **settings)
        with pytest.raises(UserError, match="not finished"):
            load_generator("out/g-killed", "cpu")
        with pytest.raises(UserError, match="--batch_size=4, not 5"):
            changed = {**settings, "batch_size": 5}
            small_generator("toy", "out/g-killed", **changed, resume=True)
        small_generator("toy", "out/g-killed", **settings, resume=True)
    for name in ("p.npy", "log.jsonl"):
        whole = Path("out/g-whole", name).read_bytes()
        assert whole == Path("out/g-killed", name).read_bytes()


def test_a_mistake_or_a_diverged_loss_keeps_the_finished_generator(inside):
    small_generator("toy", "out/g-again", steps=1)
    for mistake in ({"dtype": "float8"}, {"top_p": 0.0}, {"init_from": "out"}):
        with pytest.raises(UserError):
            small_generator("toy", "out/g-again", **mistake)
    losses = iter([1.0, 1.0, float("nan")])

    def poison(logprobs, *arguments):
        return logprobs.mean() * next(losses)

    with mock.patch.multiple(generator, length_normalized_nll=poison, SAVE_INTERVAL=1):
        with mock.patch.object(generator, "LOG_INTERVAL", 1):
            with pytest.raises(UserError, match="not finite at step 3"):
                small_generator("toy", "out/g-again", steps=9)
    assert load_checkpoint("out/g-again", "generator")["step"] == 2
    assert load_checkpoint("out/g-again/previous", "generator")["step"] == 1
    assert Path("out/g-again/previous/p.npy").exists()
    assert not Path("out/g-again/p.npy").exists()
