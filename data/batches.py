"""Rows of tokens, and batches that carry their lengths.

A row is one prompt and one response; the end-of-text token closes the response and its reward is
the response's reward. The objective sees rows padded on the right (`collate`); the model reads them
packed (`pack`): every distinct prompt once, and no padding. Nothing is inferred from token ids.
"""
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from config import UserError
from data.pairs import contrasts, read_labelled, read_pairs


class Row(NamedTuple):
    prompt: np.ndarray      # token ids, the oldest cut off where the context is too short
    response: np.ndarray    # token ids, end-of-text last, never cut
    truncated: bool         # whether the prompt was cut

    def __len__(self):
        return len(self.prompt) + len(self.response)


def make_row(prompt, response, tokenizer, block_size):
    """Text -> Row, or None where the response and one token of prompt do not fit into the context."""
    return fit_row(tokenizer.encode(prompt), tokenizer.encode(response) + [tokenizer.end_of_text], block_size)


def fit_row(prompt, response, block_size):
    """Token ids -> Row, the prompt cut at its start to fit, or None."""
    room = block_size - len(response)
    if room < 1:
        return None
    return Row(np.array(prompt[-room:], np.int32), np.array(response, np.int32), len(prompt) > room)


@dataclass
class PairData:
    pairs: list     # Pair, those that fit into the context
    rows: list      # (chosen Row, rejected Row) of each
    skipped: int    # bad rows and pairs with a response too long for the context


@dataclass
class Responses:
    rows: list      # Row: the chosen (or correct) responses, then the rejected (or incorrect) ones
    chosen: int     # how many of the rows are chosen
    paired: bool    # whether row i and row chosen + i are a pair; else each row has a label of its own
    skipped: int    # what was left out of the file

    def __len__(self):
        """Items that a batch counts: pairs, or labelled responses."""
        return self.chosen if self.paired else len(self.rows)

    def batch_rows(self, items):
        """Numbers of a batch's items -> the numbers of its rows, chosen ones first, and how many are chosen."""
        if self.paired:
            return items + [self.chosen + item for item in items], len(items)
        return sorted(items), sum(item < self.chosen for item in items)


def load_responses(dataset, split, block_size, strict=False):
    """The pairs or labelled responses of a Dataset, to train on -> Responses."""
    path = dataset.path(split)
    if dataset.kind != "labels":
        data = load_pairs(path, dataset.tokenizer, block_size, strict)
        return Responses(pair_rows(data.rows), len(data.rows), True, data.skipped)
    labelled, bad = read_labelled(path, strict)
    labelled.sort(key=lambda item: not item.label)      # stable
    rows = [make_row(item.prompt, item.completion, dataset.tokenizer, block_size) for item in labelled]
    chosen = sum(item.label and row is not None for item, row in zip(labelled, rows))
    kept = [row for row in rows if row is not None]
    long = len(rows) - len(kept)
    print_left_out(path, "responses", len(kept), bad, long, sum(row.truncated for row in kept), block_size, strict)
    return Responses(kept, chosen, False, bad + long)


def load_contrasts(dataset, split, block_size, strict=False):
    """Labelled responses as pairs, each correct one of a prompt with each incorrect one -> PairData; None without any."""
    labelled, bad = read_labelled(dataset.path(split), strict)
    pairs = contrasts(labelled)
    return tokenise_pairs(dataset.path(split), pairs, bad, dataset.tokenizer, block_size, strict) if pairs else None


def load_pairs(path, tokenizer, block_size, strict=False, as_dialogue=False):
    """A JSONL file of pairs, read, checked and tokenised; what is left out is printed and counted."""
    pairs, bad = read_pairs(path, strict, as_dialogue)
    return tokenise_pairs(path, pairs, bad, tokenizer, block_size, strict)


def tokenise_pairs(path, pairs, bad, tokenizer, block_size, strict):
    both = [(make_row(pair.prompt, pair.chosen, tokenizer, block_size),
             make_row(pair.prompt, pair.rejected, tokenizer, block_size)) for pair in pairs]
    kept = [index for index, rows in enumerate(both) if None not in rows]
    rows = [both[index] for index in kept]
    long = len(pairs) - len(kept)
    cut = sum(chosen.truncated or rejected.truncated for chosen, rejected in rows)
    print_left_out(path, "pairs", len(kept), bad, long, cut, block_size, strict)
    return PairData([pairs[i] for i in kept], rows, bad + long)


def print_left_out(path, noun, kept, bad, long, cut, block_size, strict):
    """Print what was left out of a file, or stop because of it."""
    if long and strict:
        raise UserError(f"{path}: {long} {noun} are longer than the context of {block_size} tokens")
    if bad or long or cut:
        print(f"{path}: {kept} {noun}; left out {bad} bad rows and {long} with a response longer than the "
              f"context ({block_size} tokens); prompts cut at their start: {cut}")
    if not kept:
        raise UserError(f"{path}: none of its {noun} fits into the context of {block_size} tokens")


def to_device(tensor, device):
    """A copy on the device; a GPU's is made from pinned memory, so that nobody waits for it."""
    return (tensor.pin_memory() if torch.device(device).type == "cuda" else tensor).to(device, non_blocking=True)


class Batch(NamedTuple):
    mask: torch.Tensor      # (rows, T) bool, True on response tokens
    last: torch.Tensor      # (rows,) int64, the position of each response's last token
    probs: torch.Tensor     # (rows, T-1), the generator's probability of token t+1; 0 where it is not known

    def to(self, device):
        return Batch(*(to_device(part, device) for part in self))


def collate(rows, probs=None):
    """Rows (and the probabilities of each one's response tokens) -> Batch, padded on the right to the longest."""
    longest = max(map(len, rows))
    mask = np.zeros((len(rows), longest), bool)
    link_probs = np.zeros((len(rows), longest - 1), np.float32)
    for i, row in enumerate(rows):
        start, end = len(row.prompt), len(row)
        mask[i, start:end] = True
        if probs is not None:
            link_probs[i, start - 1:end - 1] = probs[i]
    last = torch.tensor([len(row) - 1 for row in rows])
    return Batch(torch.from_numpy(mask), last, torch.from_numpy(link_probs))


class Packed(NamedTuple):
    """R rows as the model reads them: N tokens, every distinct prompt once and every response, without padding.

    All but attention treats each token on its own. For attention the tokens are dealt out to their rows again
    (`groups`), rows of similar length together, and collected from there (`places`).
    """
    tokens: torch.Tensor    # (N,) int64
    positions: torch.Tensor # (N,) int64, counted from the start of the token's row
    groups: tuple           # of (rows, longest) int64: which of the N tokens stands there; any one on padding
    places: torch.Tensor    # (N,) int64, where each token is in the groups, flattened and joined
    rows: torch.Tensor      # (R, T) int64: as groups, for all rows in their own order
    sources: torch.Tensor   # (M,) int64, for every response token whose likelihood is asked for: the token before it,
    targets: torch.Tensor   # (M,) int64, its id,
    owners: torch.Tensor    # (M,) int64, its row
    lengths: torch.Tensor   # (R,) int64, tokens of each response

    def to(self, device):
        move = lambda part: to_device(part, device)
        return Packed(*(tuple(map(move, part)) if isinstance(part, tuple) else move(part) for part in self))


def pack(rows, scored=None, width=0, share_prompts=True, groups=8):
    """Rows -> Packed. scored: of how many rows, from the first, the response's likelihood is asked for (None: all).

    width: T, where it is not the longest row's; groups: into how many the rows are dealt out for attention.
    """
    tokens, positions, starts, indices, count = [], [], {}, [], 0
    for number, row in enumerate(rows):
        key = row.prompt.tobytes() if share_prompts else number
        if key not in starts:
            starts[key] = count
            tokens.append(row.prompt), positions.append(np.arange(len(row.prompt)))
            count += len(row.prompt)
        tokens.append(row.response), positions.append(np.arange(len(row.prompt), len(row)))
        indices.append(np.r_[starts[key]:starts[key] + len(row.prompt), count:count + len(row.response)])
        count += len(row.response)
    order = np.array_split(sorted(range(len(rows)), key=lambda i: len(rows[i])), min(groups, len(rows)))
    dealt = [pad_right([indices[i] for i in group]) for group in order]
    places, offset = np.zeros(count, np.int64), 0
    for group, cells in zip(order, dealt):
        for i in group:
            places[indices[i]] = offset + np.arange(len(indices[i]))
            offset += cells.shape[1]
    some = range(len(rows) if scored is None else scored)
    sources = [indices[i][len(rows[i].prompt) - 1:-1] for i in some]
    arrays = (np.concatenate(tokens), np.concatenate(positions), dealt, places, pad_right(indices, width),
              np.concatenate([[], *sources]), np.concatenate([[], *(rows[i].response for i in some)]),
              np.repeat(some, [len(rows[i].response) for i in some]), np.array([len(row.response) for row in rows]))
    as_tensor = lambda array: torch.from_numpy(array.astype(np.int64))
    return Packed(*(tuple(map(as_tensor, part)) if isinstance(part, list) else as_tensor(part) for part in arrays))


def pad_right(arrays, width=0):
    """Arrays of whole numbers -> (arrays, longest or width), zeros behind each."""
    padded = np.zeros((len(arrays), max(width, *map(len, arrays))), np.int64)
    for i, array in enumerate(arrays):
        padded[i, :len(array)] = array
    return padded


def pair_rows(pairs):
    """[(chosen, rejected), ...] -> 2B rows: all chosen first, then the rejected in the same order."""
    return [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]


def in_length_order(rows, batch_size):
    """Indices of rows in batches of similar length, for evaluation: every row once, little padding."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    return [order[start:start + batch_size] for start in range(0, len(order), batch_size)]


def training_indices(step, count, batch_size, seed):
    """Which of `count` items make up the batch of one step: epoch after epoch, each in its own order.

    A function of its arguments alone, so that a run is continued at any step by its number.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(permutation(count, seed, position // count)[position % count]) for position in positions]


@lru_cache(maxsize=8)
def permutation(count, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(count)
