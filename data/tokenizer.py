"""Byte-level BPE tokenizers, run by tiktoken: GPT-2's, or one trained on the dataset.

A tokenizer is saved as a dictionary inside its dataset and inside every checkpoint. If
data contains the name of a special token, such as <|endoftext|>, it is encoded as plain
text. Tokenizers of pretrained models are in pretrained/tokenizer.py.
"""

import base64
import codecs
import heapq
import re
import sys
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext import openai_public
from tqdm import tqdm

from common import UserError, sha256_of


@lru_cache(maxsize=None)
def split_pattern():
    """The regular expression that splits text into words before merging.

    A word is one of these: a contraction's ending ('s, 'll), a run of letters with
    their marks, of digits, or of other characters, each optionally after one space, or
    a run of white space. All characters are listed, so that Python's re (in training)
    and tiktoken split alike.
    """
    letters = character_ranges(("L", "M"), extra="\u200c\u200d")
    digits, space = character_ranges(("Nd",)), r"\s\x1c-\x1f"
    return (
        rf"'(?:[sdmt]|ll|ve|re)| ?[{letters}]+| ?[{digits}]+"
        rf"| ?[^{space}{letters}{digits}]+|[{space}]+(?![^{space}])|[{space}]+"
    )


def character_ranges(categories, extra=""):
    """Unicode characters of some categories, as ranges of a regular expression."""
    ranges = []
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        category = unicodedata.category(character)
        if category.startswith(categories) or character in extra:
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


class Tokenizer:
    """A byte-level BPE vocabulary.

    ranks: {bytes: token id}. The pair that makes the smallest id is merged first
    pattern: how text is split before merging. Empty: split_pattern()
    special: {name: token id}
    end: the special token that ends a response
    normalization: a Unicode normal form that is applied to text first, such as NFC
    """

    is_pretrained = False

    def __init__(
        self,
        name,
        ranks,
        pattern="",
        special=None,
        end="<|endoftext|>",
        normalization="",
    ):
        pattern = pattern or split_pattern()
        self.name, self.ranks = name, ranks
        self.pattern, self.normalization = pattern, normalization
        self.special = special or {end: len(ranks)}
        self.end_of_text = self.special[end]
        self.vocab_size = 1 + max(*ranks.values(), *self.special.values())
        all_ranks = dict(ranks)
        for byte in range(256):  # tiktoken needs all. Missing ones get unused ids
            all_ranks.setdefault(bytes([byte]), self.vocab_size + byte)
        self.encoding = tiktoken.Encoding(
            name,
            pat_str=pattern,
            special_tokens=self.special,
            mergeable_ranks=all_ranks,
        )
        lines = []
        for token, rank in ranks.items():  # the format of tiktoken's files
            lines.append(f"{base64.b64encode(token).decode()} {rank}\n")
        self.saved = {
            "name": name,
            "vocabulary": "".join(lines),
            "pattern": pattern,
            "special": self.special,
            "end": end,
            "normalization": normalization,
        }
        self.fingerprint = sha256_of(repr(self.saved))

    def to_dict(self):
        return self.saved

    def encode(self, text):
        """Text -> token ids."""
        if self.normalization:
            text = unicodedata.normalize(self.normalization, text)
        return self.encoding.encode_ordinary(text)

    def encode_prompt(self, text):
        return self.encode(text)

    def encode_response(self, text):
        """A response -> token ids, the end token last."""
        return [*self.encode(text), self.end_of_text]

    def encode_rows(self, rows):
        """Rows of a prompt and responses (None: missing) -> lists of token ids."""

        def encode_row(row):
            prompt, *responses = row
            tokens = [self.encode_prompt(prompt)]
            for text in responses:
                tokens.append([] if text is None else self.encode_response(text))
            return tokens

        with ThreadPoolExecutor() as pool:  # tiktoken releases the GIL
            return list(pool.map(encode_row, rows))

    def truncate_prompt(self, tokens, room):
        """The newest `room` tokens of a prompt."""
        return tokens[-room:]

    def decode(self, tokens):
        """Token ids -> text. Invalid UTF-8 becomes the replacement character."""
        tokens = [token for token in map(int, tokens) if token != self.end_of_text]
        return self.encoding.decode(tokens)

    def token_texts(self, tokens):
        """The text that each token adds.

        A character that is made of several tokens is added by the last one.
        """
        decoder, texts = codecs.getincrementaldecoder("utf-8")("replace"), []
        for token in map(int, tokens):
            if token == self.end_of_text:
                texts.append("")
            else:
                token_bytes = self.encoding.decode_single_token_bytes(token)
                texts.append(decoder.decode(token_bytes))
        return texts


def from_dict(saved):
    """The tokenizer that to_dict saved."""
    settings = dict(saved)
    name, ranks = settings.pop("name"), {}
    for line in settings.pop("vocabulary").splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    if "chat_format" in settings:
        from pretrained.tokenizer import PretrainedTokenizer

        return PretrainedTokenizer(name, ranks, **settings)
    return Tokenizer(name, ranks, **settings)


def gpt2():
    try:
        settings = openai_public.gpt2()
    except (OSError, ValueError) as error:  # no network, or another hash
        raise UserError(
            f"GPT-2's vocabulary could not be downloaded ({type(error).__name__}). Set "
            "TIKTOKEN_CACHE_DIR to a folder with it, or use --tokenizer=bpe:4096"
        ) from None
    return Tokenizer(
        "gpt2",
        settings["mergeable_ranks"],
        settings["pat_str"],
        settings["special_tokens"],
    )


def make_tokenizer(name, texts):
    """Build the tokenizer that --tokenizer names.

    gpt2, bpe:SIZE (at most SIZE tokens, trained on texts), or a pretrained model: a
    folder with tokenizer.json, or owner/model on the hub
    """
    kind, _, size = name.partition(":")
    if name == "gpt2":
        return gpt2()
    if kind == "bpe" and size.isdecimal() and int(size) >= 257:
        return Tokenizer(name, train_bpe(texts, int(size) - 1))
    if "/" not in name and not Path(name).is_dir():
        raise UserError(
            f"unknown tokenizer {name!r}. Choose gpt2, bpe:SIZE with a size of at "
            "least 257, or the folder or owner/model of a pretrained model"
        )
    from pretrained.tokenizer import read_tokenizer

    return read_tokenizer(name)


# Training -----------------------------------------------------------------------------


def train_bpe(texts, size):
    """Train byte-pair encoding (Sennrich et al. 2016). Returns {bytes: rank}.

    Merges the most frequent pair of neighbours until there are `size` tokens or every
    word is one token. Of equally frequent pairs, the smaller pair of bytes is merged.
    """
    frequency = Counter()
    for text in texts:
        frequency.update(re.findall(split_pattern(), text))
    ranks = {bytes([byte]): byte for byte in range(256)}
    tokens, heap = list(ranks), []
    symbols, weights = flatten_words(frequency)
    counts = count_pairs(symbols, weights, np.arange(len(symbols) - 1))
    changed_pairs = list(counts)
    progress = tqdm(desc="bpe", total=size - len(ranks), disable=None, leave=False)
    while len(ranks) < size:
        for pair in changed_pairs:
            if counts[pair]:
                left, right = pair
                heapq.heappush(heap, (-counts[pair], tokens[left], tokens[right]))
        changed_pairs = []
        if not heap:
            break
        negative_count, left, right = heapq.heappop(heap)
        pair = ranks[left], ranks[right]
        if counts[pair] != -negative_count:
            continue  # the count has changed since it was pushed
        if left + right not in ranks:  # two pairs can make the same token
            ranks[left + right] = len(ranks)
            tokens.append(left + right)
            progress.update()

        first = find_pair(symbols, pair)
        touching = np.concatenate([first - 1, first, first + 1])
        removed = count_pairs(symbols, weights, touching)
        symbols[first] = ranks[left + right]
        symbols, weights = np.delete(symbols, first + 1), np.delete(weights, first + 1)
        first -= np.arange(len(first))  # each deletion moves what follows it
        added = count_pairs(symbols, weights, np.concatenate([first - 1, first]))
        counts.subtract(removed)
        counts.update(added)
        changed_pairs = removed | added
    progress.close()
    return ranks


def flatten_words(frequency):
    """All distinct words, one after another, as one array of token ids.

    Also returns, for each id, the frequency of its word. -1 stands before the first
    word and after every word.
    """
    words = [b"\0"]
    words += [word.encode("utf-8", "replace") + b"\0" for word in frequency]
    lengths = [len(word) for word in words]
    symbols = np.frombuffer(b"".join(words), np.uint8).astype(np.int64)
    symbols[np.cumsum(lengths) - 1] = -1
    return symbols, np.repeat([0, *frequency.values()], lengths)


def count_pairs(symbols, weights, places):
    """Count the pairs that start at these places. Returns {(left, right): count}."""
    places = np.unique(places)
    left, right = symbols[places], symbols[places + 1]
    is_pair = (left >= 0) & (right >= 0)
    keys = (left << 32 | right)[is_pair]
    keys, numbers = np.unique(keys, return_inverse=True)
    totals = np.bincount(numbers, weights[places][is_pair]).astype(np.int64)
    pairs = zip((keys >> 32).tolist(), (keys & (2**32 - 1)).tolist())
    return Counter(dict(zip(pairs, totals.tolist())))


def find_pair(symbols, pair):
    """Where a pair starts. Of overlapping pairs, as in `aaa`, the first is kept."""
    left, right = pair
    is_first = (symbols[:-1] == left) & (symbols[1:] == right)
    kept = []
    for place in np.flatnonzero(is_first).tolist():
        if not kept or kept[-1] != place - 1:
            kept.append(place)
    return np.array(kept)
