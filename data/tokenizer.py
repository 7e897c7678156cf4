"""Byte-level BPE tokenizers, run by tiktoken: GPT-2's, or one trained on the dataset.

A tokenizer is saved as a dictionary inside its dataset and inside every checkpoint. A
special token's name that occurs in data is encoded as plain text. Tokenizers of
pretrained models are in pretrained/tokenizer.py.
"""

import base64
import codecs
import heapq
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext import openai_public

from common import UserError, sha256_of


@lru_cache(maxsize=None)
def split_pattern():
    """The regular expression that splits text into words before merging.

    Words are contractions, letters with their marks and the space before them, digits,
    other signs, and white space. All characters are listed, so that Python's re (in
    training) and tiktoken split alike.
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
        self.name, self.normalization = name, normalization
        self.special = special or {end: len(ranks)}
        self.end_of_text = self.special[end]
        self.vocab_size = 1 + max(*ranks.values(), *self.special.values())
        # tiktoken needs all 256 bytes. Missing ones get ids that encode() removes.
        all_ranks = dict(ranks)
        for byte in range(256):
            all_ranks.setdefault(bytes([byte]), self.vocab_size + byte)
        self.drops_bytes = len(all_ranks) > len(ranks)
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
        """Text -> token ids. Bytes that the vocabulary lacks are dropped."""
        if self.normalization:
            text = unicodedata.normalize(self.normalization, text)
        tokens = self.encoding.encode_ordinary(text)
        if self.drops_bytes:
            tokens = [token for token in tokens if token < self.vocab_size]
        return tokens

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

        with ThreadPoolExecutor() as pool:  # tiktoken runs outside of Python's lock
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
    words = Words(frequency)
    changed_pairs = words.count_pairs(np.arange(len(words.symbols)), +1)
    while len(ranks) < size:
        for pair in changed_pairs:
            left, right = pair
            heapq.heappush(heap, (-words.counts[pair], tokens[left], tokens[right]))
        pair = pop_most_frequent(heap, words.counts, ranks)
        if pair is None:
            break
        merged = tokens[pair[0]] + tokens[pair[1]]
        if merged not in ranks:  # two pairs can make the same token
            ranks[merged] = len(ranks)
            tokens.append(merged)
        changed_pairs = words.merge(pair, ranks[merged])
    return ranks


def pop_most_frequent(heap, counts, ranks):
    """Remove the most frequent pair from the heap, or return None if it is empty.

    Counts that have fallen since they were pushed are corrected here.
    """
    while heap:
        negative_count, left, right = heapq.heappop(heap)
        pair = ranks[left], ranks[right]
        if counts[pair] == -negative_count:
            return pair
        if counts[pair] > 0:
            heapq.heappush(heap, (-counts[pair], left, right))
    return None


class Words:
    """All distinct words as one array of token ids, with counts of neighbouring pairs.

    A word is a linked list inside the array, so a merge changes only the places where
    it happens. -1 marks the end of a word, and places whose token was merged away.
    """

    def __init__(self, frequency):
        words = [word.encode("utf-8", "replace") + b"\0" for word in frequency]
        lengths = [len(word) for word in words]
        self.symbols = np.frombuffer(b"".join(words), np.uint8).astype(np.int64)
        self.symbols[np.cumsum(lengths, dtype=np.int64) - 1] = -1
        self.weights = np.repeat(list(frequency.values()), lengths).astype(np.int64)
        numbers = np.arange(len(self.symbols))
        self.next, self.previous = np.roll(numbers, -1), np.roll(numbers, 1)
        self.counts = Counter()  # (left, right) -> weighted count
        self.places = defaultdict(list)  # pair -> arrays of places, some outdated

    def count_pairs(self, places, sign):
        """Add (+1) or subtract (-1) the pairs that start at these places.

        Returns the pairs.
        """
        places = np.unique(places)
        left, right = self.symbols[places], self.symbols[self.next[places]]
        is_pair = (left >= 0) & (right >= 0)
        places, keys = places[is_pair], (left << 32 | right)[is_pair]
        order = np.argsort(keys, kind="stable")
        keys, starts = np.unique(keys[order], return_index=True)
        pairs = list(zip((keys >> 32).tolist(), (keys & (2**32 - 1)).tolist()))
        for pair, own_places in zip(pairs, np.split(places[order], starts[1:])):
            self.counts[pair] += sign * int(self.weights[own_places].sum())
            if sign > 0:
                self.places[pair].append(own_places)
        return pairs

    def merge(self, pair, token):
        """Replace every occurrence of the pair by token. Returns the new pairs."""
        left, right = pair
        first = np.unique(np.concatenate(self.places.pop(pair)))
        is_current = self.symbols[first] == left
        is_current &= self.symbols[self.next[first]] == right
        first = first[is_current]
        if left == right:
            first = self.drop_overlaps(first)
        second = self.next[first]
        after = self.next[second]
        affected = np.concatenate([self.previous[first], first, second])
        self.count_pairs(affected, -1)
        self.symbols[first], self.symbols[second] = token, -1
        self.next[first], self.previous[after] = after, first
        return self.count_pairs(np.concatenate([self.previous[first], first]), +1)

    def drop_overlaps(self, first):
        """Of overlapping occurrences such as those of `aa` in `aaa`, keep every other.

        first: where the occurrences start, in increasing order
        """
        numbers = np.arange(len(first))
        starts_run = np.ones(len(first), dtype=bool)
        starts_run[1:] = first[1:] != self.next[first[:-1]]
        run_start = np.maximum.accumulate(np.where(starts_run, numbers, 0))
        return first[(numbers - run_start) % 2 == 0]
