"""Tokenizers: GPT-2's, or a byte-pair vocabulary trained on the dataset itself; tiktoken runs both.

A tokenizer travels as a dictionary inside its dataset's folder and inside every checkpoint.
"""
import base64
import codecs
import heapq
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import tiktoken

from config import UserError, fingerprint

# How text is cut before merging: contractions, words with the space before them, numbers, other
# signs, white space. Written so that Python's re (training) and tiktoken (encoding) read it alike.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
SHARE = 64      # lists that a thread encodes at a time: handing out each one costs more than it


class Tokenizer:
    """A byte-pair vocabulary, {bytes: rank}, and an end-of-text token behind it, whose name in data
    is plain text. Without ranks it is GPT-2's, which tiktoken downloads once."""

    def __init__(self, name, ranks=None):
        self.name, self.vocabulary = name, ""       # GPT-2's need not be kept
        if ranks:
            lines = (f"{base64.b64encode(token).decode()} {ranks[token]}\n" for token in ranks)
            self.vocabulary = "".join(lines)        # in tiktoken's file format
        self.encoding = load_gpt2() if not ranks else tiktoken.Encoding(
            name, pat_str=SPLIT, mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": len(ranks)})
        self.encode = self.encoding.encode_ordinary     # text -> token ids, without end-of-text
        self.end_of_text, self.vocab_size = self.encoding.eot_token, self.encoding.n_vocab
        self.fingerprint = fingerprint(name, self.vocabulary)

    def encode_lists(self, lists):
        """Lists of texts -> the same lists of token ids, on all cores."""
        def encode_some(start):
            return [list(map(self.encode, texts)) for texts in lists[start:start + SHARE]]
        with ThreadPoolExecutor() as pool:
            shares = pool.map(encode_some, range(0, len(lists), SHARE))
            return [texts for some in shares for texts in some]

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
        return {"name": self.name, "vocabulary": self.vocabulary, "fingerprint": self.fingerprint}


def from_dict(saved):
    """The tokenizer that to_dict described."""
    lines = map(str.split, saved["vocabulary"].splitlines())
    tokenizer = Tokenizer(saved["name"], {base64.b64decode(token): int(i) for token, i in lines})
    if tokenizer.fingerprint != saved["fingerprint"]:
        raise UserError("a vocabulary does not match its fingerprint; prepare the dataset again")
    return tokenizer


def load_gpt2():
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise UserError(f"GPT-2's vocabulary could not be downloaded ({type(error).__name__}): set "
                        "TIKTOKEN_CACHE_DIR to a folder with it, or --tokenizer=bpe:4096") from None


def make(name, texts):
    """'gpt2', or 'bpe:SIZE': a vocabulary of at most SIZE tokens trained on texts."""
    kind, _, size = name.partition(":")
    if name == "gpt2":
        return Tokenizer(name)
    if kind != "bpe" or not size.isdecimal() or int(size) < 257:
        raise UserError(f"unknown tokenizer {name!r}; choose gpt2, or bpe:SIZE of at least 257")
    return Tokenizer(name, train_bpe(texts, int(size) - 1))


def train_bpe(texts, size):
    """Byte-pair encoding (Sennrich et al. 2016): merge the most frequent neighbours, of equal ones
    the smaller pair of bytes, until there are `size` tokens or every word is one; -> {bytes: rank}.
    """
    frequency = Counter()
    for text in texts:
        frequency.update(re.findall(SPLIT, text))
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
