"""A dataset on disk: one flat array of tokens per split, and arrays beside it.

    data/NAME/SPLIT-tokens.npy   (N,) uint32: prompt and two responses of every example
    data/NAME/SPLIT-lengths.npy  (n, 3) int32: tokens of prompt, first, second response
    data/NAME/dataset.json       kind, tokenizer, counts and digests, written last

The first response is the chosen (or a correct) one, the second the rejected (or an
incorrect) one. A missing response has length 0. Other values per token, such as the
generator's p, are arrays of the same N. Arrays are memory-mapped.
"""

import os
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np

from common import (
    UserError,
    file_sha256,
    find_near,
    lock,
    read_json,
    sha256_of,
    write_json,
)
from data.batch import Example
from data.tokenizer import from_dict

TURN = "\n\nAssistant:"  # how the prompt of a conversation ends
ROWS_AT_ONCE = 4096  # rows that are tokenized and written together
TRUNCATED = "prompts truncated on the left"
REPEATED_PROMPT = "responses that repeated their prompt"
LONG_CANDIDATE = "candidates longer than the context"
PARTIAL_ANSWERS = "candidate sets in which some final answers are missing"
SAME_TOKENS = "chosen and rejected have the same tokens"
TIED = "neither response is preferred"
# Reasons that are counted although the row is kept.
KEPT_ROW_NOTES = (TRUNCATED, REPEATED_PROMPT, LONG_CANDIDATE, PARTIAL_ANSWERS)
# Reasons that never refuse a file. A tie is nothing wrong.
NOT_BAD = (TRUNCATED, REPEATED_PROMPT, PARTIAL_ANSWERS, TIED)


def dataset_folder(name):
    """data/NAME. Raises a UserError unless NAME is the name of one plain folder."""
    if not name or Path(name).name != name or name.startswith("."):
        raise UserError(
            f"a dataset's name must be one folder inside data/, not {name!r}"
        )
    return Path("data") / name


# Arrays -------------------------------------------------------------------------------


class ArrayWriter:
    """Writes an .npy file whose length is only known at the end."""

    def __init__(self, path, dtype, row_shape=()):
        self.dtype, self.row_shape, self.count = np.dtype(dtype), row_shape, 0
        self.file = open(path, "wb")
        self.write_header()

    def write_header(self):
        # numpy pads the header, so one with a larger count has the same size.
        header = {
            "shape": (self.count, *self.row_shape),
            "fortran_order": False,
            "descr": self.dtype.str,
        }
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, array):
        array = np.ascontiguousarray(array, self.dtype).reshape(-1, *self.row_shape)
        self.count += len(array)
        self.file.write(array)

    def close(self):
        self.write_header()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def open_array(path, digest=None):
    """Memory-map an .npy file. digest: the sha256 that it must have."""
    if digest not in (None, file_sha256(path)):
        raise UserError(f"{path} does not match its checksum. Make it again")
    try:
        # Slicing a plain array is ten times faster than slicing a memmap.
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError, EOFError):
        raise UserError(f"{path} is missing or damaged. Make it again") from None


# Reading ------------------------------------------------------------------------------


class Split:
    """The examples of one split. split[i] is Example i."""

    def __init__(self, tokens, lengths):
        self.tokens, self.lengths = tokens, lengths  # (N,), (n, 3)
        self.example_lengths = lengths.sum(1, dtype=np.int64)  # (n,)
        self.starts = np.cumsum(self.example_lengths) - self.example_lengths  # (n,)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError(i)
        start = self.starts[i]
        prompt = self.tokens[start : start + self.lengths[i, 0]]
        return Example(prompt, self.response_values(self.tokens, i))

    def response_values(self, array, i):
        """The values of example i's first and second response in a per-token array."""
        prompt_length, first_length, second_length = self.lengths[i]
        first = self.starts[i] + prompt_length
        second = first + first_length
        return array[first:second], array[second : second + second_length]

    def prompts(self):
        """The distinct prompts in their order, a list of token arrays."""
        prompts = {}
        for example in self:
            prompts.setdefault(example.prompt.tobytes(), example.prompt)
        return list(prompts.values())


class Dataset:
    """A prepared dataset: its tokenizer, its splits and the arrays beside them."""

    def __init__(self, folder, metadata):
        self.folder, self.metadata = folder, metadata
        self.tokenizer = from_dict(metadata["tokenizer"])
        self.kind = metadata["kind"]  # "pairs", "labels" (one response each) or "toy"
        self.block_size = metadata[
            "block_size"
        ]  # maximum tokens of a prompt plus its longer response
        self.split_names = list(metadata["splits"])
        digests = metadata["digests"]
        self.fingerprint = sha256_of(
            digests["train-tokens.npy"], digests["train-lengths.npy"]
        )
        self.arrays = {}

    def split(self, name):
        return Split(self.array(name, "tokens"), self.array(name, "lengths"))

    def is_chat(self):
        """Whether the training prompts end with "Assistant:", as in a conversation."""
        split = self.split("train")
        n_prompts, n_chat = min(100, len(split)), 0
        for i in range(n_prompts):
            if self.tokenizer.decode(split[i].prompt).endswith(TURN):
                n_chat += 1
        return n_chat > n_prompts / 2

    def array(self, split, name):
        """An array of a split, such as `tokens`, or `exact-p` on the toy world."""
        file = f"{split}-{name}.npy"
        if file not in self.arrays:
            digest = self.metadata["digests"].get(file)
            if digest is None:
                raise UserError(f"{self.folder} has no {file}")
            self.arrays[file] = open_array(self.folder / file, digest)
        return self.arrays[file]


def open_dataset(name, checkpoint=None):
    """Open data/NAME. checkpoint: of a reward model that was trained on it, if any."""
    command = f"python data/prepare.py --name={name} --input=FILE"
    if name.startswith("toy"):
        command = f"python data/toy.py --name={name}"
    folder = dataset_folder(name)
    if checkpoint:
        folder = find_near(checkpoint, folder)
    dataset = Dataset(folder, read_json(folder / "dataset.json", command))
    if checkpoint and checkpoint["inputs"]["data"] != dataset.fingerprint:
        raise UserError(
            f"the training split in {folder} is not the one that the model was trained "
            "on. Train again"
        )
    return dataset


# Writing ------------------------------------------------------------------------------


def write_dataset(
    folder,
    rows,
    splits,
    tokenizer,
    block_size,
    kind="pairs",
    skipped=None,
    token_arrays=({}, None),
    check=lambda: None,
    **metadata,
):
    """Tokenize rows and write them as a dataset.

    rows: an iterable of (split, prompt, first response, second response). These are
        texts, or None for a missing response. If it raises an error, the dataset that
        is in the folder stays
    skipped: a Counter of skipped rows by reason, which is updated
    token_arrays: ({name: dtype}, function) for arrays beside the tokens. The function
        gets a split's name, the prompt's tokens and a list of both responses' tokens.
        It returns {name: one value for each of these tokens}
    check: called when all rows are tokenized, before the dataset is replaced. It may
        raise an error too
    metadata: further entries of dataset.json
    """
    skipped = Counter() if skipped is None else skipped
    dtypes, compute_arrays = token_arrays
    counts = {split: {"examples": 0, "tokens": 0} for split in splits}
    with lock(folder):
        writers = {}
        for split in splits:
            writers[f"{split}-tokens.npy"] = ("<u4", ())
            writers[f"{split}-lengths.npy"] = ("<i4", (3,))
            for name, dtype in dtypes.items():
                writers[f"{split}-{name}.npy"] = (dtype, ())
        for file, (dtype, row_shape) in writers.items():
            writers[file] = ArrayWriter(folder / f"{file}.tmp", dtype, row_shape)
        for texts in chunks(rows, ROWS_AT_ONCE):
            tokenized = tokenize_rows(texts, tokenizer, block_size, skipped)
            for split, (prompt, *responses) in tokenized:
                tokens = np.concatenate([prompt, *responses])
                lengths = [len(prompt), *map(len, responses)]
                writers[f"{split}-tokens.npy"].append(tokens)
                writers[f"{split}-lengths.npy"].append(lengths)
                if compute_arrays:
                    arrays = compute_arrays(split, prompt, responses)
                    for name, values in arrays.items():
                        writers[f"{split}-{name}.npy"].append(values)
                counts[split]["examples"] += 1
                counts[split]["tokens"] += len(tokens)
        check()
        for split, count in counts.items():
            if not count["examples"]:
                raise UserError(
                    f"no row is left for split {split}. Skipped: "
                    f"{format_counts(skipped)}. Rows are split by their prompt, so "
                    "more different prompts may help"
                )
        digests = {}
        for file, writer in writers.items():
            writer.close()
            digests[file] = file_sha256(folder / f"{file}.tmp")
        for file in writers:
            os.replace(folder / f"{file}.tmp", folder / file)
        description = {
            "kind": kind,
            **metadata,
            "block_size": block_size,
            "splits": counts,
            "digests": digests,
            "skipped": skipped,
            "tokenizer": tokenizer.to_dict(),
        }
        write_json(folder / "dataset.json", description)
    sizes = ", ".join(f"{split} {count['examples']}" for split, count in counts.items())
    notes = format_counts(skipped)
    print(f"wrote {folder}: {sizes} examples. Skipped or changed: {notes}")


def tokenize_rows(rows, tokenizer, block_size, skipped, are_pairs=True):
    """[(key, prompt, response, ...), ...] -> [(key, [prompt, response, ...]), ...]

    The texts become lists of token ids. key: anything, such as the row's split.

    A long prompt loses its oldest tokens. A response is never cut: a row with a
    response that leaves no room for a prompt is skipped. So is a pair of two responses
    with the same tokens.
    """
    tokenized = []
    token_rows = tokenizer.encode_rows([texts for _, *texts in rows])
    for (key, *_), (prompt, *responses) in zip(rows, token_rows):
        room = block_size - max(len(response) for response in responses)
        if room < 1:
            skipped[f"a response longer than {block_size - 1} tokens"] += 1
            continue
        if len(prompt) > room:
            skipped[TRUNCATED] += 1
            prompt = tokenizer.truncate_prompt(prompt, room)
        if are_pairs and responses[0] == responses[1]:
            skipped[SAME_TOKENS] += 1
            continue
        tokenized.append((key, [prompt, *responses]))
    return tokenized


def format_counts(counts):
    """{reason: count} as text."""
    parts = [f"{count} ({reason})" for reason, count in counts.items()]
    return ", ".join(parts) or "nothing"


def chunks(items, size):
    """Yield lists of `size` items. The last one may be shorter."""
    items = iter(items)
    chunk = list(islice(items, size))
    while chunk:
        yield chunk
        chunk = list(islice(items, size))
