"""Tokenizers: GPT-2's, or a byte-pair vocabulary trained on the dataset itself; both run in tiktoken.

A tokenizer travels as one dictionary (name, vocabulary, fingerprint) inside its dataset's folder
and inside every checkpoint, so that a checkpoint can always read text the way it was trained to.
"""
import base64
import codecs
import heapq
import re
from collections import Counter, defaultdict

import tiktoken

from config import UserError, fingerprint

# How text is cut before merging: contractions, words with their leading space, numbers, punctuation, white space.
# Written so that Python's re (training) and tiktoken's engine (encoding) read it alike.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """A tiktoken encoding with one end-of-text token; special-token strings in data are plain text."""

    def __init__(self, encoding, name):
        self.encoding, self.name = encoding, name
        self.end_of_text, self.split = encoding.eot_token, encoding._pat_str
        self.vocab_size = encoding.n_vocab
        self.fingerprint = fingerprint(name, self.vocabulary())

    def encode(self, text):
        """text -> list of token ids, without end-of-text."""
        return self.encoding.encode_ordinary(text)

    def decode(self, tokens):
        """Token ids -> text; bytes that are not UTF-8 become the replacement character."""
        return self.encoding.decode([token for token in map(int, tokens) if token != self.end_of_text])

    def pieces(self, tokens):
        """Token ids -> the text that each adds; a character spread over several tokens goes to its last."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return [decoder.decode(b"" if token == self.end_of_text else self.encoding.decode_single_token_bytes(token))
                for token in map(int, tokens)]

    def ranks(self):
        """{bytes: rank} of every token but end-of-text."""
        return {self.encoding.decode_single_token_bytes(rank): rank for rank in range(self.end_of_text)}

    def vocabulary(self):
        """The vocabulary in tiktoken's file format ('' for GPT-2's, which tiktoken brings itself)."""
        if self.name == "gpt2":
            return ""
        return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in self.ranks().items())

    def to_dict(self):
        return {"name": self.name, "vocabulary": self.vocabulary(), "fingerprint": self.fingerprint}


def from_dict(saved):
    """The tokenizer that to_dict described."""
    if saved["name"] == "gpt2":
        return gpt2()
    lines = (line.split() for line in saved["vocabulary"].splitlines())
    tokenizer = from_ranks({base64.b64decode(token): int(rank) for token, rank in lines}, saved["name"])
    if tokenizer.fingerprint != saved["fingerprint"]:
        raise UserError("the vocabulary does not match its fingerprint; prepare the dataset again")
    return tokenizer


def gpt2():
    """GPT-2's tokenizer; tiktoken downloads its vocabulary once."""
    try:
        return Tokenizer(tiktoken.get_encoding("gpt2"), "gpt2")
    except OSError as error:
        raise UserError("GPT-2's vocabulary could not be downloaded by tiktoken "
                        f"({type(error).__name__}); connect once, or point TIKTOKEN_CACHE_DIR at a folder "
                        "that holds it, or use a vocabulary of the data's own: --tokenizer=bpe:4096") from None


def from_ranks(ranks, name):
    """A tokenizer from {bytes: rank}; end-of-text takes the rank after the last."""
    return Tokenizer(tiktoken.Encoding(name, pat_str=SPLIT, mergeable_ranks=ranks,
                                       special_tokens={END_OF_TEXT: len(ranks)}), name)


def make(name, texts):
    """'gpt2', or 'bpe:SIZE': a vocabulary of at most SIZE tokens trained on texts."""
    kind, _, size = name.partition(":")
    if name == "gpt2":
        return gpt2()
    if kind != "bpe":
        raise UserError(f"unknown tokenizer {name!r}; choose gpt2, or bpe:SIZE")
    if not size.isdecimal() or int(size) < 257:
        raise UserError(f"--tokenizer={name}: write bpe:SIZE with SIZE at least 257 (256 bytes and end-of-text)")
    return from_ranks(train_bpe(texts, int(size) - 1), name)


def train_bpe(texts, size):
    """Byte-pair encoding (Sennrich et al. 2016): merge the most frequent neighbours until `size` tokens.

    Returns {bytes: rank}. Ties go to the smaller pair of bytes, so the result depends on the texts alone.
    Stops early when every word is one token.

    >>> sorted(train_bpe(["low low low lot"], 258).items(), key=lambda item: item[1])[256:]
    [(b'lo', 256), (b' lo', 257)]
    """
    counts = Counter()
    for text in texts:
        counts.update(re.findall(SPLIT, text))
    words = [[bytes([byte]) for byte in word.encode("utf-8", "replace")] for word in counts]
    frequency = list(counts.values())
    ranks = {bytes([byte]): byte for byte in range(256)}
    pair_count, where = Counter(), defaultdict(set)
    for index, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_count[pair] += frequency[index]
            where[pair].add(index)
    heap = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(heap)
    while len(ranks) < size and heap:
        count, pair = heapq.heappop(heap)
        if pair_count[pair] != -count:  # counted again since it was pushed
            continue
        token = pair[0] + pair[1]
        ranks.setdefault(token, len(ranks))  # two pairs may spell one token
        changed = set()
        for index in where.pop(pair):
            changed |= merge(words, index, pair, token, frequency[index], pair_count, where)
        pair_count[pair] = 0
        for other in changed:
            if pair_count[other] > 0:
                heapq.heappush(heap, (-pair_count[other], other))
    return ranks


def merge(words, index, pair, token, frequency, pair_count, where):
    """Replace pair by token in one word and count its pairs again; returns the pairs that changed."""
    old, new, position = words[index], [], 0
    while position < len(old):
        if tuple(old[position:position + 2]) == pair:
            new.append(token)
            position += 2
        else:
            new.append(old[position])
            position += 1
    before, after = Counter(zip(old, old[1:])), Counter(zip(new, new[1:]))
    for other, times in before.items():
        pair_count[other] -= times * frequency
    for other, times in after.items():
        pair_count[other] += times * frequency
        where[other].add(index)
    words[index] = new
    return set(before) | set(after)
