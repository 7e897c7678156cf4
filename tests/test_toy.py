"""The toy world: its exact quantities against enumeration and against sampling."""

import dataclasses
import itertools
import math
import random
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from conftest import small_generator

from common import UserError, file_sha256, write_json
from data import toy
from data.dataset import open_dataset
from data.tokenizer import make_tokenizer
from data.toy import (
    EVIDENCE,
    KINDS,
    QUALITIES,
    REMARK_TEXTS,
    State,
    World,
    sample_pairs,
    split_worlds,
)
from generator import Probs

SPLITS = split_worlds(World())
WORLDS = [
    World(),
    World(reward_rule="veto"),
    World(filler_clauses_first=3),
    World(fillers=1),
    World(fillers=144),
    World(reward_rule="veto", filler_clauses_first=2),
    World(fidelity=0.5),
    World(fidelity=1.0),
    *SPLITS.values(),
]


@pytest.fixture(scope="module")
def bpe():
    texts = itertools.chain(*sample_pairs(World(), 150, "bpe"))
    return make_tokenizer("bpe:1280", texts)


def sample_choice(world, state, rng):
    choices = world.choices(state)
    return rng.choices(choices, [p for p, *_ in choices])[0]


@pytest.mark.parametrize("world", WORLDS)
def test_probabilities_sum_to_one_and_the_value_is_the_mean_of_what_follows(world, bpe):
    rng, encode = random.Random(5), lru_cache(None)(bpe.encode)
    for _ in range(5):
        state, text, probability = State(), "", 1.0
        while world.choices(state):
            choices = world.choices(state)
            assert sum(p for p, *_ in choices) == pytest.approx(1.0)
            mean = sum(p * world.value(after) for p, _, _, after in choices)  # Eq. 3
            assert world.value(state) == pytest.approx(mean)
            texts = sorted(piece for _, _, piece, _ in choices)
            for first, second in zip(texts, texts[1:]):
                assert not second.startswith(first)
            p, _, piece, state = sample_choice(world, state, rng)
            text, probability = text + piece, probability * p
        assert world.true_quality(text) == state.quality
        tokens = [*encode(text), bpe.end_of_text]
        trace = world.trace(tokens, encode, bpe.end_of_text)
        product = math.prod(p for p, *_ in trace)
        assert product == pytest.approx(probability)
        # Only evidence changes the value, or filler where evidence was possible.
        for (_, before, _, _), (p, value, _, kind) in zip(trace, trace[1:]):
            changes = abs(value - before) > 1e-9
            if world.reward_rule == "sum" and kind == 2:
                assert changes
            assert not changes or kind == 2 or (kind == 0 and p < 0.5)


def test_the_probabilities_of_all_possible_next_tokens_sum_to_one(bpe):
    world, encode = World(), lru_cache(None)(bpe.encode)
    text = world.sample(random.Random(3))
    response = encode(text)
    n_marks = sum(text.count(mark) for mark in ":,;.")
    assert len(response) == len(text.split()) + n_marks  # every word is one token
    for length in (0, 4, 5, 6, 10, 11, len(response)):
        total = 0.0
        for token in range(bpe.vocab_size):
            tokens = [*response[:length], token]
            try:
                total += world.trace(tokens, encode, bpe.end_of_text)[-1][0]
            except ValueError:  # the world cannot produce it
                continue
        assert total == pytest.approx(1.0)


def test_the_first_token_of_a_text_is_marked_even_if_texts_begin_alike():
    bpe = make_tokenizer("bpe:257", [])  # single bytes
    world, rng, state, tokens, kinds = World(), random.Random(5), State(), [], []
    while world.choices(state):
        _, kind, piece, state = sample_choice(world, state, rng)
        encoded = bpe.encode(piece)
        tokens += encoded
        kinds += [KINDS.get(kind, 0)] + [0] * (len(encoded) - 1)
    trace = world.trace([*tokens, bpe.end_of_text], bpe.encode, bpe.end_of_text)
    assert [kind for *_, kind in trace] == [*kinds, 0] and set(kinds) == {0, 1, 2}


def enumerate_outcomes(world, n_clauses, quality=0):
    """[(final quality, probability)] of all courses of clauses that may be evidence."""
    outcomes = []
    for pieces in itertools.product((-1, 0, 1), repeat=n_clauses):
        p = 1.0
        for piece in pieces:
            p *= 0.3 if piece else 0.4
        final = quality + sum(pieces)
        if world.reward_rule == "veto" and min(quality, *pieces, 0) < 0:
            final = -1
        outcomes.append((final, p))
    return outcomes


@pytest.mark.parametrize(
    "world", [World(), World(filler_clauses_first=3), World(reward_rule="veto")]
)
@pytest.mark.parametrize(
    "clauses, quality, pending",
    [(0, 0, None), (3, 1, None), (4, -1, 40), (5, 2, 3), (6, 1, None)],
)
def test_the_exact_value_equals_enumeration(world, clauses, quality, pending):
    most = 6 - world.filler_clauses_first
    n_left = 6 - clauses
    if pending is not None:
        n_left -= 1
    expected = 0.0
    for own, p in enumerate_outcomes(world, min(n_left, most), quality):
        for other, q in enumerate_outcomes(world, most):
            if own > other:
                expected += p * q
            elif own == other:
                expected += p * q / 2
    value = world.value(State(4 + clauses, quality, pending))
    assert value == pytest.approx(expected)


def test_the_settings_of_a_world_do_what_they_say():
    texts = "".join(World().sample(random.Random(i)) for i in range(500))
    numbers = []
    for phrase, remark in re.findall(r" ([^:;,.]+), ([^:;,.]+)", texts):
        numbers.append((EVIDENCE.index(phrase), REMARK_TEXTS.index(remark)))
    assert len(numbers) / 3000 == pytest.approx(0.6, abs=0.02)
    own_remark = np.mean([i == j for i, j in numbers])
    assert own_remark == pytest.approx(0.98, abs=0.01)

    opposite = set()
    for remark, quality in zip(REMARK_TEXTS, QUALITIES):
        if quality == -QUALITIES[5]:
            opposite.add(remark)
    choices = SPLITS["swapped"].choices(State(4, 1, 5))
    assert {text[1:-1] for _, _, text, _ in choices} == opposite

    late = World(filler_clauses_first=3)
    for step in range(4, 10):
        kinds = {kind for _, kind, *_ in late.choices(State(step))}
        assert kinds == ({"filler"} if step < 7 else {"filler", "evidence"})
    for n in (1, 24, 144):
        choices = World(fillers=n).choices(State(4))
        assert len(set(choices)) == n + len(EVIDENCE)


def test_the_true_quality_counts_evidence_only():
    quality, veto = World().true_quality, World(reward_rule="veto").true_quality
    good, bad = EVIDENCE[0], EVIDENCE[-1]
    assert veto(f": {good}, x; joy was told; {good}, x.") == 2
    assert veto(": joy was told.") == 0
    assert veto(f": {good}, x; {bad}, x; {good}, x.") == -1
    assert quality(f": {good}, x; {bad}, x; {good}, x.") == 1
    assert quality(": laughter filled the moon, x; trams run daily") == 0
    assert quality("laughter") == 0
    text = ": calm lasted on today, anything; joy was told; calm lasted on today."
    assert quality(text) == 2


def test_pairs_are_the_same_for_a_seed_and_the_chosen_response_is_better():
    first = sample_pairs(World(), 20, "7 train")
    assert first == sample_pairs(World(), 20, "7 train")
    assert first != sample_pairs(World(), 20, "8 train")
    quality = World().true_quality
    for _, chosen, rejected in first:
        assert quality(chosen) > quality(rejected)
    n_wrong = 0
    world = World(label_noise=0.2)
    noisy = sample_pairs(world, 1000, "noise", has_true_labels=False)
    for _, chosen, rejected in noisy:
        n_wrong += quality(chosen) < quality(rejected)
    assert 160 < n_wrong < 240
    texts = [{prompt + a, prompt + b} for prompt, a, b in noisy]
    clean = sample_pairs(world, 1000, "noise")
    assert texts == [{prompt + a, prompt + b} for prompt, a, b in clean]


NOISY_WORLDS = [
    World(label_noise=0.2),
    World(label_model="bradley_terry", tau=2.0),
    World(reward_rule="veto", label_noise=0.4),
]


@pytest.mark.parametrize("world", NOISY_WORLDS)
def test_the_target_is_what_the_training_labels_imply(world):
    """The share of chosen ones among training responses with the same first clause."""
    counts = {kind: [0, 0] for kind in ("good", "bad", "filler")}
    n_wrong, pairs = 0, sample_pairs(world, 3000, "target", has_true_labels=False)
    for _, *responses in pairs:
        qualities = [world.true_quality(text) for text in responses]
        n_wrong += qualities[0] < qualities[1]
        for is_chosen, text in zip((1, 0), responses):
            phrase = re.search(": ([^;,.]+)", text)[1]
            kind = "filler"
            if phrase in toy.QUALITY_OF:
                kind = "good" if toy.QUALITY_OF[phrase] > 0 else "bad"
            counts[kind][0] += is_chosen
            counts[kind][1] += 1
    states = {
        "good": State(5, world.add_evidence(0, 1)),
        "bad": State(5, world.add_evidence(0, -1)),
        "filler": State(5, 0),
    }
    for kind, (n_chosen, n) in counts.items():
        target = world.target(states[kind])
        assert n_chosen / n == pytest.approx(target, abs=4 * (0.25 / n) ** 0.5), kind
    assert world.target(State()) == pytest.approx(0.5)
    if world.label_model == "flip":
        assert n_wrong / 3000 == pytest.approx(world.label_noise, abs=0.03)
        for state in states.values():  # C = e + (1 - 2 e) P
            clean = dataclasses.replace(world, label_noise=0.0).target(state)
            shrunk = world.label_noise + (1 - 2 * world.label_noise) * clean
            assert world.target(state) == pytest.approx(shrunk)


# The dataset --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A toy dataset of 200 training pairs, in the current folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("toy"))
        config = toy.ToyConfig(
            "toy-1", 1, train=200, test=5, label_noise=0.3, fillers=100
        )
        toy.main(config)
        yield open_dataset("toy-1")


def test_exact_values_are_stored_beside_the_tokens(dataset):
    worlds = split_worlds(World(**dataset.metadata["world"]))
    assert dataset.kind == "toy" and worlds["train"] == World(
        fillers=100, label_noise=0.3
    )
    for name, world in worlds.items():
        split, wrong = dataset.split(name), []
        arrays = [dataset.array(name, key) for key in toy.ARRAYS]
        for i, (prompt, responses) in enumerate(split):
            start, qualities = split.starts[i], []
            for array in arrays:
                assert not array[start : start + len(prompt)].any()
            for side, response in enumerate(responses):
                text = dataset.tokenizer.decode(response)
                quality = World().true_quality(text)
                qualities.append(quality)
                p, V, C, kinds = (split.response_values(a, i)[side] for a in arrays)
                step = 4 + world.clauses
                final = world.value(State(step, quality))
                assert V[-1] == pytest.approx(final)
                assert C[-1] == pytest.approx(world.target(State(step, quality)))
                assert p[-1] == 1 and (p > 0).all()
                assert (kinds == 1).sum() == (kinds == 2).sum()
            wrong.append(qualities[0] < qualities[1])
        if name == "train":
            assert 0.2 < np.mean(wrong) < 0.4
        else:
            assert not any(wrong)


def write_exact_p(dataset, folder, data_fingerprint):
    """Write the exact p as if a generator had computed it for this data."""
    np.save(folder / "p.npy", dataset.array("train", "exact-p"))
    digest = file_sha256(folder / "p.npy")
    write_json(folder / "p.json", {"data": data_fingerprint, "digest": digest})


def test_exact_p_is_aligned_with_a_generators_p(dataset, tmp_path):
    write_exact_p(dataset, tmp_path, dataset.fingerprint)
    probs = Probs("generator", dataset, tmp_path)
    exact = Probs("exact", dataset, tmp_path)
    for i in range(len(dataset.split("train"))):
        for own, expected in zip(probs[i], exact[i], strict=True):
            assert np.array_equal(own, expected)


def test_p_of_other_data_is_refused(dataset, tmp_path):
    small_generator("toy-1", "out/g", steps=2, temperature=0.5)
    write_exact_p(dataset, Path("out/g"), "other")
    with pytest.raises(UserError, match="other data than data/toy-1") as error:
        Probs("generator", dataset, Path("out/g"))
    command = "python generator.py --dataset=toy-1 --n_layer=1 --n_head=2 --n_embd=32"
    assert command in str(error.value)
    assert "--temperature=0.5 --out_dir=out/g" in str(error.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"label_noise": 2.0}, "--label_noise must be at least 0 and at most 1"),
        ({"tau": 0.0}, "--tau must be above 0"),
        ({"label_model": "x"}, "unknown label_model"),
        ({"reward_rule": "product"}, "unknown reward_rule 'product'"),
        ({"filler_clauses_first": 6}, "--filler_clauses_first must be at least 0"),
        ({"fillers": 145}, "--fillers must be at least 1 and at most 144"),
    ],
)
def test_settings_that_make_no_world_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        toy.main(toy.ToyConfig(name="toy-1", **settings))
