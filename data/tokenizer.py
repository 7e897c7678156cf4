"""Tokenizers, all run by tiktoken: GPT-2's, a byte-pair vocabulary trained on the dataset, or the
one of a pretrained model (data/tokenizer_json.py).

A tokenizer travels as a dictionary inside its dataset's folder and inside every checkpoint. It
knows how its model writes dialogues (FORMATS: no system message is added, a text is not stripped)
and the token that ends a reply. What stands in data is never read as a special token.
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
from typing import NamedTuple

import tiktoken
from tiktoken_ext import openai_public

from config import UserError
from data.files import fingerprint

SPEAKER = re.compile(r"\n\n(System|Human|Assistant):")   # HH-RLHF's dialogues, as data has them
ROLE_OF = {"System": "system", "Human": "user", "Assistant": "assistant"}


class Format(NamedTuple):
    """How a model's dialogues are written: special tokens by name, and texts between them."""
    start: tuple    # before the first turn
    head: tuple     # before a turn's text, which the last of them is joined to
    end: tuple      # behind a turn's text; the first ends a reply


FORMATS = {
    "chatml": Format((), ("<|im_start|>", "{role}\n"), ("<|im_end|>", "\n")),
    "llama3": Format(("<|begin_of_text|>",),
                     ("<|start_header_id|>", "{role}", "<|end_header_id|>", "\n\n"),
                     ("<|eot_id|>",)),
    "plain": None}      # dialogues stay as they are in data


@lru_cache(maxsize=None)
def split_pattern():
    """How text is cut before merging: contractions, words with their marks and the space before
    them, numbers, other signs, white space. Every character is named, so that Python's re, which
    training uses, and tiktoken read it alike."""
    letters, digits, space = members(("L", "M"), "\u200c\u200d"), members("Nd"), r"\s\x1c-\x1f"
    return (rf"'(?:[sdmt]|ll|ve|re)| ?[{letters}]+| ?[{digits}]+| ?[^{space}{letters}{digits}]+"
            rf"|[{space}]+(?![^{space}])|[{space}]+")


def members(categories, others=""):
    """The characters of some categories of Unicode, and others, as the ranges of a class."""
    known = [i for i in range(sys.maxunicode + 1) if chr(i) in others
             or unicodedata.category(chr(i)).startswith(categories)]
    starts = [i for i, before in zip(known, [-2, *known]) if i != before + 1]
    ends = [i for i, after in zip(known, [*known[1:], -2]) if i != after - 1]
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in zip(starts, ends))


class Tokenizer:
    """A byte-pair vocabulary, {bytes: token id}, of which the smaller id is merged first.

    pattern: how text is cut before merging, empty for split_pattern's; special: {name: token id};
    end: the special token that ends a response; turns: a key of FORMATS; normal_form: of Unicode,
    applied to text first."""

    def __init__(self, name, ranks, pattern="", special=None, end="<|endoftext|>",
                 turns="plain", normal_form=""):
        pattern = pattern or split_pattern()
        self.name, self.turns, self.normal_form = name, FORMATS[turns], normal_form
        self.special = special or {end: len(ranks)}
        self.end_of_text = self.special[end]
        self.vocab_size = 1 + max(*ranks.values(), *self.special.values())
        lacking = sorted({bytes([byte]) for byte in range(256)} - ranks.keys())
        dropped = {byte: self.vocab_size + i for i, byte in enumerate(lacking)}
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, special_tokens=self.special,
                                          mergeable_ranks=ranks | dropped)
        self.about = {
            "vocabulary": "".join(f"{base64.b64encode(token).decode()} {i}\n"   # tiktoken's files'
                                  for token, i in ranks.items()),
            "pattern": pattern, "special": self.special, "end": end, "turns": turns,
            "normal_form": normal_form}
        self.fingerprint = fingerprint(repr(self.about))

    @property
    def pretrained(self):
        """Whether it is a pretrained model's, which its name then says."""
        return self.name != "gpt2" and not self.name.startswith("bpe:")

    def encode(self, text):
        """Text -> token ids; bytes that the vocabulary lacks are dropped."""
        if self.normal_form:
            text = unicodedata.normalize(self.normal_form, text)
        tokens = self.encoding.encode_ordinary(text)
        if self.encoding.n_vocab == self.vocab_size:
            return tokens
        return [i for i in tokens if i < self.vocab_size]

    def encode_prompt(self, text):
        """A prompt -> token ids; a dialogue in the model's own turns, open for the reply."""
        if not self.turns:
            return self.encode(text)
        parts = list(self.turns.start)
        for role, content in turns_of(text):
            *head, joint = (part.format(role=role) for part in self.turns.head)
            parts += [*head, joint + content, *self.turns.end]
        parts += [part.format(role="assistant") for part in self.turns.head]
        tokens = []
        for part in parts:
            tokens += [self.special[part]] if part in self.special else self.encode(part)
        return tokens

    def cut(self, prompt, room):
        """A prompt's newest tokens, behind those that every dialogue of the model starts with."""
        if len(prompt) <= room:
            return prompt
        start = prompt[:min(len(self.turns.start), room - 1)] if self.turns else []
        return start + prompt[len(start) - room:]

    def encode_reply(self, text):
        """A response -> token ids, the end token last."""
        if self.turns:
            text = text.removeprefix(" ")       # it stood between "Assistant:" and the reply
        return self.encode(text) + [self.end_of_text]

    def encode_rows(self, rows):
        """Rows of a prompt and its responses (None: no response) -> the same as token ids, on all
        cores; no response has no tokens."""
        def encode_row(row):
            prompt, *texts = row
            return [self.encode_prompt(prompt), *([] if text is None else self.encode_reply(text)
                                                  for text in texts)]
        with ThreadPoolExecutor() as pool:
            return list(pool.map(encode_row, rows))

    def decode(self, tokens):
        """Token ids -> text; bytes that are not UTF-8 become the replacement character."""
        return self.encoding.decode([i for i in map(int, tokens) if i != self.end_of_text])

    def pieces(self, tokens):
        """Token ids -> the text that each adds; a character of several tokens goes to its last."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        bytes_of = self.encoding.decode_single_token_bytes
        return ["" if i == self.end_of_text else decoder.decode(bytes_of(i))
                for i in map(int, tokens)]

    def to_dict(self):
        return {"name": self.name, **self.about}


def turns_of(text):
    """A dialogue as HH-RLHF writes it, up to "Assistant:" -> [(role, text of the turn), ...]; any
    other text is one turn of the user's."""
    before, *found = SPEAKER.split("\n\n" + text.strip())    # before, speaker, text, speaker, ...
    if before or not found or found[-2:] != ["Assistant", ""]:
        return [("user", text)]
    return [(ROLE_OF[name], content.removeprefix(" "))
            for name, content in zip(found[:-2:2], found[1:-2:2])]


def from_dict(saved):
    """The tokenizer that to_dict described."""
    about = dict(saved)
    name, vocabulary = about.pop("name"), about.pop("vocabulary")
    lines = map(str.split, vocabulary.splitlines())
    ranks = {base64.b64decode(token): int(i) for token, i in lines}
    return Tokenizer(name, ranks, **about)


def gpt2():
    try:
        found = openai_public.gpt2()
    except (OSError, ValueError) as error:      # the second: it has another hash
        raise UserError(f"GPT-2's vocabulary could not be downloaded ({type(error).__name__}): set "
                        "TIKTOKEN_CACHE_DIR to a folder with it, or --tokenizer=bpe:4096") from None
    return Tokenizer("gpt2", found["mergeable_ranks"], found["pat_str"], found["special_tokens"])


def make(name, texts):
    """'gpt2'; 'bpe:SIZE', a vocabulary of at most SIZE tokens trained on texts; or a pretrained
    model's: a folder with its tokenizer.json, or its owner/model on the hub."""
    kind, _, size = name.partition(":")
    if name == "gpt2":
        return gpt2()
    if kind == "bpe" and size.isdecimal() and int(size) >= 257:
        return Tokenizer(name, train_bpe(texts, int(size) - 1))
    if "/" not in name and not Path(name).is_dir():
        raise UserError(f"unknown tokenizer {name!r}; choose gpt2, bpe:SIZE of at least 257, or a "
                        "pretrained model's folder or owner/model")
    from data.tokenizer_json import read_tokenizer      # which builds on this file
    return read_tokenizer(name)


def train_bpe(texts, size):
    """Byte-pair encoding (Sennrich et al. 2016): merge the most frequent neighbours, of equal ones
    the smaller pair of bytes, until there are `size` tokens or every word is one; -> {bytes: rank}.
    """
    frequency = Counter()
    for text in texts:
        frequency.update(re.findall(split_pattern(), text))
    words = {word: [bytes([byte]) for byte in word.encode("utf-8", "replace")]
             for word in frequency}
    ranks = {bytes([byte]): byte for byte in range(256)}
    pair_count, where, changed, heap = Counter(), defaultdict(set), set(), []

    def count_pairs(word, sign):
        for pair in zip(words[word], words[word][1:]):
            pair_count[pair] += sign * frequency[word]
            where[pair].add(word)
            changed.add(pair)

    for word in words:
        count_pairs(word, +1)
    while len(ranks) < size:
        for pair in changed:
            if pair_count[pair]:
                heapq.heappush(heap, (-pair_count[pair], pair))
        changed.clear()
        if not heap:
            break
        count, pair = heapq.heappop(heap)
        if pair_count[pair] == -count:      # else it was counted again since it was pushed
            ranks.setdefault(pair[0] + pair[1], len(ranks))     # two pairs may spell one token
            for word in where.pop(pair):
                count_pairs(word, -1)
                words[word] = merge(words[word], pair)
                count_pairs(word, +1)
    return ranks


def merge(word, pair):
    """A word's tokens with each such pair as one token."""
    merged = []
    for token in word:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged
