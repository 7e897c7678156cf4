"""Examples -> padded tensors.

A pair is one row: prompt, chosen response, rejected response. Both responses attend to
the prompt but not to each other, so the prompt is read once per pair and each response
is scored as if it stood alone.
"""

from typing import NamedTuple

import numpy as np
import torch

# Maximum tokens, with padding, of a batch in a forward pass without gradient. On a CPU
# such a batch is fast when it fits into the cache.
MAX_TOKENS = 2**14 if torch.cuda.is_available() else 2**11


class Example(NamedTuple):
    prompt: np.ndarray  # (P,) token ids, at least one
    responses: tuple  # arrays of token ids. An empty array is a missing response

    @property
    def length(self):
        """Tokens of the prompt and all responses."""
        return len(self.prompt) + sum(len(response) for response in self.responses)


class Batch(NamedTuple):
    """B examples with k responses each, padded on the right.

    L is the length of the longest row, T that of the longest response. Response fields
    have one row per response: all chosen ones first, then all rejected.
    """

    tokens: torch.Tensor  # (B, L) token ids: prompt | chosen | rejected
    positions: torch.Tensor  # (B, L) position ids. A response continues the prompt
    segments: torch.Tensor  # (B, L) 0 prompt, i the i-th response, -1 padding
    response_positions: torch.Tensor  # (k*B, T) index of each token in tokens.flatten()
    previous_positions: torch.Tensor  # (k*B, T) index of the token that predicts it
    mask: torch.Tensor  # (k*B, T) True on response tokens

    def to(self, device):
        return Batch(*(to_device(tensor, device) for tensor in self))


def to_device(tensor, device):
    """Copy a tensor to the device. Copies to a GPU are asynchronous."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def collate(examples):
    """Pad examples that have the same number of responses into one Batch."""
    tokens, positions, segments = [], [], []
    for example in examples:
        prompt_length = len(example.prompt)
        row_positions = [np.arange(prompt_length)]
        row_segments = [np.zeros(prompt_length, dtype=np.int64)]
        for number, response in enumerate(example.responses, start=1):
            row_positions.append(prompt_length + np.arange(len(response)))
            row_segments.append(np.full(len(response), number))
        tokens.append(np.concatenate([example.prompt, *example.responses]))
        positions.append(np.concatenate(row_positions))
        segments.append(np.concatenate(row_segments))
    tokens = pad(tokens)  # (B, L)

    response_positions, previous_positions = [], []
    for number in range(len(examples[0].responses)):
        for row, example in enumerate(examples):
            prompt_end = row * tokens.size(1) + len(example.prompt) - 1
            start = prompt_end + 1
            for earlier_response in example.responses[:number]:
                start += len(earlier_response)
            indices = np.arange(start, start + len(example.responses[number]))
            response_positions.append(indices)
            # The first token of every response is predicted by the prompt's last token.
            previous = np.concatenate([[prompt_end], indices])
            previous_positions.append(previous[: len(indices)])

    mask = pad([np.ones(len(indices)) for indices in response_positions]).bool()
    return Batch(
        tokens,
        pad(positions),
        pad(segments, value=-1),
        pad(response_positions),
        pad(previous_positions),
        mask,
    )


def pad(arrays, value=0, dtype=np.int64):
    """Stack 1-D arrays of unequal length into one tensor, padded by value."""
    longest = max(len(array) for array in arrays)
    padded = np.full((len(arrays), longest), value, dtype=dtype)
    for row, array in enumerate(arrays):
        padded[row, : len(array)] = array
    return torch.from_numpy(padded)


def attention_mask(batch):
    """Causal attention in which a response sees the prompt and itself.

    Returns (B, 1, L, L) bool, or None if every row has one response. Then the plain
    causal mask is enough. Padding is on the right, so no other token attends to it.
    """
    if len(batch.mask) == len(batch.tokens):
        return None
    query, key = batch.segments[:, :, None], batch.segments[:, None, :]
    visible = (key == query) | (key == 0)  # (B, L, L)
    return visible.tril()[:, None]


def gather_responses(per_token, positions):
    """Select response tokens. (B, L, ...), (k*B, T) -> (k*B, T, ...)"""
    selected = per_token.flatten(0, 1).index_select(0, positions.flatten())
    return selected.view(*positions.shape, *per_token.shape[2:])


def epoch_batches(lengths, batch_size, seed, epoch):
    """Example numbers of every batch of one epoch, a list of arrays.

    Examples of similar length share a batch, so that little padding is computed: the
    shuffled epoch is cut into chunks of at most 32 batches and about a quarter of the
    epoch, and each chunk is sorted by length. The result depends on the arguments
    alone, so a run can resume at any step. An incomplete last batch is
    dropped. A dataset smaller than one batch is one batch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    batch_size = min(batch_size, len(order))
    n_batches = len(order) // batch_size
    chunk_size = batch_size * max(1, min(32, n_batches // 4))
    batches = []
    for start in range(0, n_batches * batch_size, chunk_size):
        chunk = order[start : min(start + chunk_size, n_batches * batch_size)]
        by_length = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches.extend(by_length.reshape(-1, batch_size))
    rng.shuffle(batches)
    return batches


class BatchSchedule:
    """The example numbers of each training step's batch, epoch after epoch."""

    def __init__(self, lengths, batch_size, seed):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.steps_per_epoch = max(1, len(lengths) // batch_size)
        self.epoch, self.batches = None, None

    def __getitem__(self, step):
        epoch, number = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.batches = epoch_batches(
                self.lengths, self.batch_size, self.seed, epoch
            )
        return self.batches[number]


def length_batches(examples, max_tokens):
    """Group examples of similar length and with equally many responses.

    Yields lists of example indices. With padding, a group has at most max_tokens,
    unless it is a single longer example.
    """

    def sort_key(number):
        return len(examples[number].responses), examples[number].length

    group = []
    for number in sorted(range(len(examples)), key=sort_key):
        n_responses, length = sort_key(number)
        if group:
            same_kind = n_responses == sort_key(group[0])[0]
            if not same_kind or (len(group) + 1) * length > max_tokens:
                yield group
                group = []
        group.append(number)
    if group:
        yield group


def map_examples(examples, function, max_tokens=MAX_TOKENS):
    """Apply function to all examples, in batches of similar length.

    function: Batch -> one value per response, in the order of Batch.mask's rows
    Returns, for every example, the list of its responses' values.
    """
    values = [[] for _ in examples]
    for group in length_batches(examples, max_tokens):
        if not examples[group[0]].responses:
            continue
        results = function(collate([examples[number] for number in group]))
        for row, result in enumerate(results):
            # Rows: the first response of all examples, then the second one, ...
            values[group[row % len(group)]].append(result)
    return values
