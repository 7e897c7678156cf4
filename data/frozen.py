"""Frozen blocks are read once: the hidden states below the trained ones, stored beside the tokens.

    FOLDER/SPLIT-below-K.npy    (N, C) float16, of each of a split's tokens what block K reads

Training the blocks from K on starts there (`python train.py --unfrozen=...`). They are computed in
the precision of training; evaluate.py, which reads all blocks in float32, may differ by as much.
"""
import dataclasses
from pathlib import Path

import torch
from tqdm import tqdm

from config import UserError
from data.dataset import chunks, open_array, write_array
from data.files import file_digest, fingerprint, read_json, write_json
from data.rows import in_batches, make_group

ROWS = 512      # read, sorted by length and written at a time


def store_states(trunk, dataset, splits, folder):
    """Write these splits' hidden states before the trunk's first trained block, where they are not
    there yet.  -> {split: (N, C) float16, mapped}"""
    device = trunk.embed_tokens.weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else "float32"
    below = trunk.embed_tokens.state_dict(), trunk.layers[:trunk.frozen].state_dict()
    common = {"weights": fingerprint(*below), "config": dataclasses.asdict(trunk.config),
              "dtype": str(dtype)}
    found = {}
    for name in splits:
        split, path = dataset.split(name), Path(folder) / f"{name}-below-{trunk.frozen}.npy"
        about = common | {"data": dataset.fingerprint_of(name)}
        described = path.with_suffix(".json")
        if not is_described(path, described, about):
            size = len(split.tokens) * trunk.config.n_embd * 2 / 2 ** 30
            print(f"writing {path}: the states below the last blocks, {size:.2f} GiB")
            bar = tqdm(range(len(split)), "frozen blocks", disable=None, leave=False)
            write_array(path, (len(split.tokens), trunk.config.n_embd), "<f2",
                        states_of(trunk, (split[i] for i in bar)))
            write_json(described, about | {"digest": file_digest(path)})
        found[name] = open_array(path)
    return found


def is_described(path, described, about):
    """Whether the states in a file are these, and whole."""
    try:
        return read_json(described, "train.py") == about | {"digest": file_digest(path)}
    except UserError:
        return False


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
