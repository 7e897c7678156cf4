"""Tokenizers: any text comes back as it was, and BPE merges as its definition says."""

import json
import random
import re
from collections import Counter
from unittest import mock

import pytest

from common import UserError
from data import tokenizer
from data.tokenizer import Tokenizer, from_dict, make_tokenizer, train_bpe

WORDS = [
    "\u0939\u093f\u0928\u094d\u0926\u0940",  # Hindi
    "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22",  # Thai
    "\u0627\u0644\u0633\u0651\u064e\u0644\u0627\u0645",  # Arabic with marks
    "e\u0301te\u0301",  # combining accents
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # Persian, with a joiner
]
TEXTS = [
    "the cat \u2028 s\u00e4t \U0001f600!",
    "na\u00efve caf\u00e9 \u00b2\u00bd \u203f_x \U0001d518\U0001d52b\U0001d526",
    "a\r\n\t  c",
    "'twas she'll",
    "<|endoftext|><|im_end|>",
    "\x00\x07\x1b[31m",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\ud800 lone surrogate",
    "".join(random.Random(0).choices("abcdefgh", k=20_000)),
    *WORDS,
]


@pytest.fixture(scope="module")
def bpe():
    text = "the cat sat on the mat, the dog sat on the log"
    return make_tokenizer("bpe:300", [text] * 3)


def test_any_text_comes_back_as_it_was(bpe):
    rows = bpe.encode_rows([["", text] for text in TEXTS * 10])
    for text, (_, (*tokens, end)) in zip(TEXTS * 10, rows):
        readable = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert tokens == bpe.encode(text)
        assert end == bpe.end_of_text and end not in tokens
        assert bpe.decode(tokens) == readable
        assert "".join(bpe.token_texts(tokens)) == readable


def test_a_character_of_several_tokens_is_shown_at_its_last(bpe):
    texts = bpe.token_texts([*bpe.encode(TEXTS[0]), bpe.end_of_text])
    assert "" in texts[:-1] and "\U0001f600" in texts and texts[-1] == ""


def test_a_tokenizer_is_saved_as_a_dictionary(bpe):
    saved = json.loads(json.dumps(bpe.to_dict()))
    copy = from_dict(saved)
    assert copy.fingerprint == bpe.fingerprint and not copy.is_pretrained
    for text in TEXTS[:6]:
        assert copy.encode(text) == bpe.encode(text)


def test_marks_and_joiners_belong_to_words_in_training_and_encoding_alike():
    text, pattern = " ".join(WORDS), tokenizer.split_pattern()
    pieces = [WORDS[0], *(f" {word}" for word in WORDS[1:])]
    assert re.findall(pattern, text) == pieces
    bpe = make_tokenizer("bpe:2000", [text] * 9)
    assert [bpe.decode([token]) for token in bpe.encode(text)] == pieces


def test_training_and_encoding_cut_any_text_alike():
    rng, characters = random.Random(0), []
    for _ in range(20_000):
        low, high = rng.randrange(0x3000), rng.randrange(0xE000, 0x20000)
        characters.append(chr(rng.choice([low, high, 32, 97])))
    text = "".join(characters)
    pieces = re.findall(tokenizer.split_pattern(), text)
    ranks = {bytes([byte]): byte for byte in range(256)}
    for piece in pieces:
        ranks.setdefault(piece.encode(), len(ranks))
    whole = Tokenizer("bpe:1", ranks)  # every piece is one token
    assert "".join(pieces) == text
    assert whole.encode(text) == [ranks[piece.encode()] for piece in pieces]


def slow_bpe(texts, n_merges):
    """Count all pairs again for every merge. Ties: the smaller pair of bytes."""
    words, merges = [], []
    for text in texts:
        for word in re.findall(tokenizer.split_pattern(), text):
            encoded = word.encode("utf-8", "replace")
            words.append([bytes([byte]) for byte in encoded])
    for _ in range(n_merges):
        counts = Counter()
        for word in words:
            counts.update(zip(word, word[1:]))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best[0] + best[1])
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
                i += 1
    return list(dict.fromkeys(merges))


@pytest.mark.parametrize(
    "texts",
    [
        [" sat"] * 6 + [" the"] * 9 + ["the"] * 3,
        ["aaaa aaaaa aaaaaaa aa", "abab ababab bababa"],
        TEXTS[:8] + WORDS,
        ["", "a"],
    ],
)
def test_bpe_merges_the_most_frequent_neighbors_first(texts):
    expected = slow_bpe(texts, 40)
    ranks = train_bpe(texts, 256 + len(expected))
    trained = sorted(ranks, key=ranks.get)
    assert trained[:256] == [bytes([byte]) for byte in range(256)]
    assert trained[256:] == expected


def test_gpt2_without_a_network_and_unknown_tokenizers_say_what_to_do(monkeypatch):
    for error in (ConnectionError, ValueError("Hash mismatch for data downloaded")):
        gpt2 = mock.Mock(side_effect=error)
        monkeypatch.setattr(tokenizer.openai_public, "gpt2", gpt2)
        with pytest.raises(UserError, match="--tokenizer=bpe:4096"):
            make_tokenizer("gpt2", [])
    for name in ("words", "bpe:12"):
        with pytest.raises(UserError, match="257"):
            make_tokenizer(name, [])
