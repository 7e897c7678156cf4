"""A pair is one row: `prompt | chosen | rejected`; and the batches that a model reads.

A response sees the prompt and itself, not the other one, and its positions go on from the prompt's,
so every prompt is read once and each response is scored as if it stood there alone.
"""
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

SIMILAR = 1.3       # the longest row of a group has at most so many times the shortest one's tokens
# Most tokens of a group that is read without gradient; a CPU is twice as fast within its cache.
TOKENS = 2 ** 14 if torch.cuda.is_available() else 2 ** 11


class Row(NamedTuple):
    prompt: np.ndarray      # token ids
    responses: tuple        # of arrays of token ids, end-of-text last; an empty one is no response
    below: np.ndarray | None = None     # (tokens, C): the hidden states below what is trained

    @property
    def size(self):     # len() counts a tuple's fields
        return len(self.prompt) + sum(map(len, self.responses))


class Group(NamedTuple):
    """Rows of similar length, padded on the right to the longest."""
    tokens: torch.Tensor        # (b, T) int64
    positions: torch.Tensor     # (b, T) int64, counted from the prompt's start for every response
    segments: torch.Tensor      # (b, T) int64: 0 the prompt, 1, 2, ... its responses, -1 padding;
                                # or None, where no row has two responses: the causal mask is enough
    below: torch.Tensor | None  # (b, T, C) float16, of rows that know them

    def to(self, device):
        return Group(*(on(device, part) for part in self))


class Batch(NamedTuple):
    """Rows in groups, and where their R responses are among the N positions of all groups joined:
    every row's first, then every row's second (so chosen, then rejected), ..."""
    groups: tuple           # of Group
    places: torch.Tensor    # (R, T) int64, of response token t; 0 on padding
    mask: torch.Tensor      # (R, T) bool, True on response tokens
    sources: torch.Tensor   # (M,) int64: the position before each token whose likelihood counts
    targets: torch.Tensor   # (M,) int64: that token
    owners: torch.Tensor    # (M,) int64: its response

    @property
    def lengths(self):
        return self.mask.sum(1)     # (R,) tokens of each response

    def to(self, device):
        groups = tuple(group.to(device) for group in self.groups)
        return Batch(groups, *(on(device, part) for part in self[1:]))


def on(device, part):
    """A tensor, or None, on the device; from pinned memory to a GPU, so that nobody waits."""
    if part is None:
        return None
    if device.type == "cuda":
        part = part.pin_memory()
    return part.to(device, non_blocking=True)


def make_batch(rows, likelihoods=0, together=None):
    """Rows -> Batch. likelihoods: of how many responses, from the first, there are sources and
    targets (None: of all); together: numbers of the rows of each group (None: similar ones)."""
    groups, starts, offset = [], {}, 0      # starts: row -> its first position among the N
    for members in together or in_batches(rows, np.inf, SIMILAR):
        groups.append(make_group([rows[i] for i in members]))
        for i in members:
            starts[i] = offset
            offset += groups[-1].tokens.size(1)
    before, places = [], []
    for side, i in in_order(rows):
        prompt, responses = rows[i].prompt, rows[i].responses
        first = starts[i] + len(prompt) + sum(map(len, responses[:side]))
        before.append(starts[i] + len(prompt) - 1)
        places.append(np.arange(first, first + len(responses[side])))
    mask, places = pad([np.ones(len(part)) for part in places], dtype=bool), pad(places)
    before = torch.cat([torch.tensor(before)[:, None], places[:, :-1]], 1)              # (R, T)
    tokens = torch.cat([group.tokens.flatten() for group in groups])                    # (N,)
    asked = mask[:likelihoods]
    targets = tokens[places[:likelihoods][asked]]                                       # (M,)
    return Batch(tuple(groups), places, mask, before[:likelihoods][asked], targets,
                 asked.nonzero()[:, 0])


def make_targets(probs):
    """p of the tokens of both responses of each pair -> what the objective sees beside rewards,
    chosen responses first: mask (2B, T) bool, True on response tokens; probs (2B, T-1), p of
    response token t+1 at t, 0 on padding."""
    sides = [pair[side] for side in (0, 1) for pair in probs]
    mask = pad([np.ones(len(p)) for p in sides], dtype=bool)
    return mask, pad([p[1:] for p in sides], dtype=np.float32)


def make_group(rows):
    """Rows -> Group."""
    tokens, positions, segments = [], [], []
    for prompt, responses, _ in rows:
        after = [len(prompt) + np.arange(len(part)) for part in responses]
        tokens.append(np.concatenate([prompt, *responses]).astype(np.int64))
        positions.append(np.concatenate([np.arange(len(prompt)), *after]))
        segments.append(np.repeat(np.arange(1 + len(after)), [len(prompt), *map(len, after)]))
    several = any(sum(len(part) > 0 for part in row.responses) > 1 for row in rows)
    below = None if rows[0].below is None else pad([row.below for row in rows], 0, np.float16)
    return Group(pad(tokens), pad(positions), pad(segments, -1) if several else None, below)


def pad(arrays, value=0, dtype=np.int64):
    """Arrays -> tensor (arrays, the longest, ...), the value behind each."""
    longest = max(map(len, arrays))
    padded = np.full((len(arrays), longest, *arrays[0].shape[1:]), value, dtype)
    for i, array in enumerate(arrays):
        padded[i, :len(array)] = array
    return torch.from_numpy(padded)


def batch_of(step, count, batch_size, seed):
    """Which of `count` items make up a step's batch: epoch after epoch, each in its own order. A
    function of its arguments alone, so that a run goes on at any step by its number."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [int(permutation(count, seed, place // count)[place % count]) for place in places]


@lru_cache(maxsize=8)
def permutation(count, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(count)


def in_batches(rows, tokens=TOKENS, similar=np.inf):
    """Numbers of rows in groups, the shortest first, of at most so many tokens with padding, the
    longest row at most `similar` times the shortest."""
    groups = []
    for i in sorted(range(len(rows)), key=lambda i: rows[i].size):
        size = rows[i].size
        if (not groups or (len(groups[-1]) + 1) * size > tokens
                or size > similar * rows[groups[-1][0]].size):
            groups.append([])
        groups[-1].append(i)
    return groups


def row_by_row(rows, read, likelihoods=0):
    """Read rows in batches; read: a Batch -> one value per response, in the Batch's order.
    -> a list for each row"""
    found = [[] for _ in rows]
    for numbers in in_batches(rows):
        some = [rows[i] for i in numbers]
        for (_, i), value in zip(in_order(some), read(make_batch(some, likelihoods))):
            found[numbers[i]].append(value)
    return found


def in_order(rows):
    """(side, row's number) of the responses as a Batch has them: first every row's first, ..."""
    return sorted((side, i) for i, row in enumerate(rows) for side in range(len(row.responses)))
