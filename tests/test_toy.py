"""The toy world knows its own truth: exact quantities against sampling and enumeration."""
import contextlib
import itertools
import math
import random
import re
from functools import lru_cache

import numpy as np
import pytest

from config import UserError
from data import tokenizer as tokenizers
from data.dataset import open_dataset
from data.files import file_digest, write_json
from data.probs import PROBS, Probs
from data.toy.prepare import ToyConfig, main
from data.toy.world import (EVIDENCE, KINDS, QUALITY, REMARK, State, World, pairs,
                            split_worlds)

SPLITS = split_worlds(World())
WORLDS = [World(), World(gold="veto"), World(late=3), World(fillers=1), World(fillers=144),
          World(gold="veto", late=2), World(fidelity=0.5),
          World(fidelity=1.0), *SPLITS.values()]


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.make("bpe:1280", itertools.chain(*pairs(World(), 150, "bpe")))


@pytest.mark.parametrize("world", WORLDS)
def test_in_every_world_p_sums_to_one_multiplies_along_a_text_and_V_is_the_mean_of_what_follows(
        world, bpe):
    rng, encode = random.Random(5), lru_cache(None)(bpe.encode)
    for _ in range(5):
        state, text, probability = State(), "", 1.0
        while options := world.choices(state):
            assert sum(p for p, *_ in options) == pytest.approx(1.0)
            mean = sum(p * world.value(after) for p, _, _, after in options)      # Eq. 3
            assert world.value(state) == pytest.approx(mean)
            texts = sorted(piece for _, _, piece, _ in options)
            assert not any(b.startswith(a) for a, b in zip(texts, texts[1:]))
            p, _, piece, state = rng.choices(options, [p for p, *_ in options])[0]
            text, probability = text + piece, probability * p
        assert world.gold_of(text) == state.gold
        trace = world.trace(encode(text) + [bpe.end_of_text], encode, bpe.end_of_text)
        assert math.prod(p for p, *_ in trace) == pytest.approx(probability)
        for (_, before, _), (p, value, kind) in zip(trace, trace[1:]):  # evidence alone is news
            moved = abs(value - before) > 1e-9
            if world.gold == "sum" and kind == 2:
                assert moved
            assert not moved or kind == 2 or (kind == 0 and p < 0.5)


def test_every_word_is_one_token_and_the_chances_of_all_that_can_follow_sum_to_one(bpe):
    encode, world, text = lru_cache(None)(bpe.encode), World(), World().sample(random.Random(3))
    response = encode(text)
    assert len(response) == len(text.split()) + sum(text.count(mark) for mark in ":,;.")
    for length in (0, 4, 5, 6, 10, 11, len(response)):
        total = 0.0
        for token in range(bpe.vocab_size):
            with contextlib.suppress(ValueError):   # one that the world cannot write
                total += world.trace([*response[:length], token], encode, bpe.end_of_text)[-1][0]
        assert total == pytest.approx(1.0)


def test_a_text_is_marked_at_its_first_token_where_others_begin_with_the_same_one():
    bpe = tokenizers.make("bpe:257", [])        # single bytes
    world, rng, state, tokens, kinds = World(), random.Random(5), State(), [], []
    while options := world.choices(state):
        _, kind, piece, state = rng.choices(options, [p for p, *_ in options])[0]
        tokens += bpe.encode(piece)
        kinds += [KINDS.get(kind, 0)] + [0] * (len(bpe.encode(piece)) - 1)
    trace = world.trace([*tokens, bpe.end_of_text], bpe.encode, bpe.end_of_text)
    assert [kind for *_, kind in trace] == [*kinds, 0] and set(kinds) == {0, 1, 2}


@pytest.mark.parametrize("world", [World(), World(late=3), World(gold="veto")])
@pytest.mark.parametrize("done, so_far, pending", [
    (0, 0, None), (3, 1, None), (4, -1, 40), (5, 2, 3), (6, 1, None)])
def test_the_exact_value_equals_enumeration(world, done, so_far, pending):
    def courses(n, so_far=0):       # of n clauses that may be evidence
        for pieces in itertools.product((-1, 0, 1), repeat=n):
            spoiled = world.gold == "veto" and min(so_far, *pieces, 0) < 0
            p = math.prod(0.3 if piece else 0.4 for piece in pieces)
            yield (-1 if spoiled else so_far + sum(pieces)), p
    most = 6 - world.late
    mine = list(courses(min(6 - done - (pending is not None), most), so_far))
    expected = sum(p * q * ((a > b) + 0.5 * (a == b)) for a, p in mine for b, q in courses(most))
    assert world.value(State(4 + done, so_far, pending)) == pytest.approx(expected)


def test_the_settings_of_a_world_change_what_they_say():
    texts = "".join(World().sample(random.Random(i)) for i in range(500))
    found = [(EVIDENCE.index(phrase), REMARK.index(remark))
             for phrase, remark in re.findall(r" ([^:;,.]+), ([^:;,.]+)", texts)]
    assert len(found) / 3000 == pytest.approx(0.6, abs=0.02)
    assert np.mean([i == j for i, j in found]) == pytest.approx(0.98, abs=0.01)
    swapped = {text[1:-1] for _, _, text, _ in SPLITS["swapped"].choices(State(4, 1, 5))}
    assert swapped == {remark for remark, sign in zip(REMARK, QUALITY) if sign == -QUALITY[5]}
    kinds = [{kind for _, kind, *_ in World(late=3).choices(State(step))} for step in range(4, 10)]
    assert kinds == [{"filler"}] * 3 + [{"filler", "evidence"}] * 3
    fillers = (len(set(World(fillers=n).choices(State(4)))) - len(EVIDENCE) for n in (1, 24, 144))
    assert list(fillers) == [1, 24, 144]
    good, bad = EVIDENCE[0], EVIDENCE[-1]
    for text, gold in ((f": {good}, x; joy was told; {good}, x.", 2), (": joy was told.", 0),
                       (f": {good}, x; {bad}, x; {good}, x.", -1)):
        assert World(gold="veto").gold_of(text) == gold


def test_pairs_are_the_same_for_a_seed_and_the_chosen_one_has_more_gold():
    first, again = list(pairs(World(), 20, "7 train")), list(pairs(World(), 20, "7 train"))
    assert first == again != list(pairs(World(), 20, "8 train"))
    gold = World().gold_of
    assert all(gold(chosen) > gold(rejected) for _, chosen, rejected in first)
    noisy = list(pairs(World(), 1000, "noise", noise=0.2))
    assert 0.16 < sum(gold(a) < gold(b) for _, a, b in noisy) / 1000 < 0.24
    assert gold(": laughter filled the moon, x; trams run daily") == gold("laughter") == 0
    assert gold(": calm lasted on today, anything; joy was told; calm lasted on today.") == 2


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A prepared dataset of 200 training pairs; its folder is of a generator with the exact p."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("toy"))
        main(ToyConfig(name="toy-1", seed=1, train=200, test=5, fillers=100, noise=0.3))
        dataset = open_dataset("toy-1")
        np.save(dataset.folder / "p.npy", dataset.array("train", "exact-p"))
        digest = file_digest(dataset.folder / "p.npy")
        write_json(dataset.folder / "p.json", {"data": dataset.fingerprint, "digest": digest})
        yield dataset


def test_what_is_known_of_the_tokens_stands_at_their_places(toy):
    worlds = split_worlds(World(**toy.about["world"]))
    assert toy.kind == "toy" and worlds["train"] == World(fillers=100)
    for name, world in worlds.items():
        split, wrong = toy.split(name), []
        p, V, kind = (toy.array(name, part) for part in ("exact-p", "exact-value", "kind"))
        for i, row in enumerate(split):
            assert not p[split.starts[i]:][:len(row.prompt)].any()    # nothing is known of prompts
            golds = [World().gold_of(toy.tokenizer.decode(tokens)) for tokens in row.responses]
            wrong.append(golds[0] < golds[1])
            for side, final in enumerate(golds):
                mine = [split.of_responses(array, i)[side] for array in (p, V, kind)]
                assert mine[1][-1] == pytest.approx(world.value(State(4 + world.clauses, final)))
                assert mine[0][-1] == 1 and (mine[0] > 0).all()
                assert (mine[2] == 1).sum() == (mine[2] == 2).sum()
        assert 0.2 < np.mean(wrong) < 0.4 if name == "train" else not any(wrong)


def test_p_of_every_kind_is_that_of_the_same_responses(toy):
    """What uniform and shuffled make of them: exercises/checks.py."""
    probs = [Probs(kind, toy, toy.folder) for kind in PROBS]
    generator, _, _, exact = ([part for i in range(200) for part in one[i]] for one in probs)
    assert all(map(np.array_equal, generator, exact)) and len(generator) == 400
    assert len({one.fingerprint for one in probs}) == 4


def test_p_of_other_data_and_settings_that_make_no_world_are_refused(toy, tmp_path):
    write_json(tmp_path / "p.json", {"data": "other", "digest": "1"})
    with pytest.raises(UserError, match="written for other data than data/toy-1"):
        Probs("generator", toy, tmp_path)
    with pytest.raises(UserError, match="noise"):
        main(ToyConfig(name="toy-1", noise=2.0))
