"""Frozen blocks are read once: the hidden states below the trained ones, stored beside the tokens.

    FOLDER/SPLIT-below-K.npy    (N, C) float16, of each of a split's tokens what block K reads

Training the blocks from K on starts there (`python train.py --unfrozen=...`).
"""
from pathlib import Path

from tqdm import tqdm

from config import UserError, fingerprint, read_json, write_json
from data.dataset import chunks, open_array, write_array
from data.rows import in_batches, make_group

ROWS = 512      # read and written at a time


def store_states(trunk, dataset, split, folder):
    """Write a split's hidden states before the trunk's first trained block, if they are not there.
    -> (N, C) float16, mapped"""
    path = Path(folder) / f"{split}-below-{trunk.frozen}.npy"
    frozen = {name: weight for name, weight in trunk.state_dict().items() if is_below(name, trunk)}
    about = {"data": dataset.about["splits"][split]["fingerprint"], "blocks": trunk.frozen,
             "weights": fingerprint(frozen)}
    described = path.with_suffix(".json")
    if not described.exists() or read_json(described, "train.py") != about:
        data = dataset.split(split)
        shape = len(data.tokens), trunk.config.n_embd
        bar = tqdm(range(len(data)), f"{split}: frozen blocks", disable=None, leave=False)
        rows = (data[i] for i in bar)
        write_array(path, shape, "<f2", states_of(trunk, rows))
        write_json(described, about)
    return open_array(path)


def is_below(name, trunk):
    """Whether a trunk's parameter acts before the first trained block."""
    part, *rest = name.split(".")
    return part == "embed_tokens" or part == "layers" and int(rest[0]) < trunk.frozen


def states_of(trunk, rows):
    """Yield the hidden states of each row's tokens, (tokens, C) float16, in the rows' order."""
    device = trunk.embed_tokens.weight.device
    for some in chunks(rows, ROWS):
        found = [None] * len(some)
        for numbers in in_batches(some):
            group = make_group([some[i] for i in numbers])
            states = trunk.frozen_states(group.to(device)).half().cpu()      # (b, T, C)
            if not states.isfinite().all():
                raise UserError("hidden states do not fit float16; leave out --unfrozen")
            for i, one in zip(numbers, states.numpy()):
                found[i] = one[:some[i].size]
        yield from found
