"""A dataset is one line of tokens, and what is known of a token stands at its place.

    data/NAME/SPLIT-tokens.npy      (N,) uint32: each item's prompt and two responses, end to end
    data/NAME/SPLIT-lengths.npy     (n, 3) int32: tokens of prompt, first and second response
    data/NAME/dataset.json          kind, tokenizer, counts, what was left out; written last

The first response is the chosen (or a correct) one, the second the rejected (or an incorrect) one;
an empty side is no response. Whatever else is known of the tokens is an array of the same N, such
as the generator's p. Arrays are mapped; a file is read once, when it is opened, for its digest.
"""
import os
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import numpy as np

from config import UserError
from data import tokenizer as tokenizers
from data.files import (file_digest, fingerprint, read_json, temporary_beside, write_atomically,
                        write_json)
from data.rows import Row

ROWS = 4096     # tokenised and written at a time
# What is counted beside the rows that are left out: what was left out of rows that were kept.
NOTED = OLDEST, REPEATED, LONG_CANDIDATE, SOME_ANSWERS = (
    "the oldest tokens of a prompt", "a prompt that its responses repeat",
    "a candidate as long as the context", "final answers of a set that lacks some")


def dataset_folder(name):
    """data/NAME, refusing names that are not one plain folder."""
    if not name or Path(name).name != name or name.startswith("."):
        raise UserError(f"a dataset's --name is one folder's name under data/, not {name!r}")
    return Path("data") / name


def write_array(path, shape, dtype, parts):
    """Write arrays that come one after another as one .npy file, all of it or none."""
    def write(temporary):
        with open(temporary, "wb") as file:
            about = {"shape": shape, "fortran_order": False, "descr": dtype}
            np.lib.format.write_array_header_1_0(file, about)
            for part in parts:
                file.write(np.ascontiguousarray(part, dtype))
    write_atomically(path, write)


def open_array(path, digest=None):
    """A .npy file, mapped; a UserError where it is damaged, or not the file of this digest."""
    if digest not in (None, file_digest(path)):
        raise UserError(f"{path} is damaged; make it again")
    try:    # still mapped; slices of a plain array cost a tenth of a memmap's
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError, EOFError):
        raise UserError(f"{path} is missing or damaged; make it again") from None


class Split:
    """Items of a dataset, read where they are needed. split[i] is the Row of item i."""

    def __init__(self, tokens, lengths, below=None):
        self.tokens, self.lengths = tokens, lengths     # (N,), (n, 3)
        self.starts = np.concatenate([[0], np.cumsum(lengths.sum(1, dtype=np.int64))])
        self.below = below      # (N, C): the hidden states below what is trained, or None

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        start = self.starts[i]
        prompt = self.tokens[start:start + self.lengths[i, 0]]
        below = None if self.below is None else self.below[start:self.starts[i + 1]]
        return Row(prompt, self.of_responses(self.tokens, i), below)

    def of_responses(self, array, i):
        """The parts of an array beside the tokens that are item i's first and second response's."""
        prompt, first, _ = self.lengths[i]
        here = array[self.starts[i] + prompt:self.starts[i + 1]]
        return here[:first], here[first:]

    def prompts(self):
        """The distinct prompts, in their order: a list of token arrays."""
        return list({row.prompt.tobytes(): row.prompt for row in self}.values())


class Dataset:
    """A prepared dataset: its splits, the arrays beside them and what dataset.json says (about)."""

    def __init__(self, folder, about):
        self.folder, self.about = folder, about
        self.tokenizer = tokenizers.from_dict(about["tokenizer"])
        self.kind = about["kind"]   # pairs, labels (one response each, on its label's side) or toy
        self.block_size = about["block_size"]   # most tokens of a prompt and its longer response
        self.fingerprint = self.fingerprint_of("train")
        self.arrays = {}        # {file: array}: each is checked once
        self.below = {}         # {split: array}, the hidden states below what is trained, if stored

    def split(self, name):
        return Split(self.array(name, "tokens"), self.array(name, "lengths"), self.below.get(name))

    def array(self, split, name):
        """An array of a split: its tokens, or what stands beside them, such as `exact-p` on the toy
        world; a UserError where it is not what was written."""
        file = f"{split}-{name}.npy"
        if file not in self.arrays:
            self.arrays[file] = open_array(self.folder / file, self.about["digests"][file])
        return self.arrays[file]

    def fingerprint_of(self, split):
        """Of a split's tokens and lengths."""
        return fingerprint([self.about["digests"][f"{split}-{what}.npy"]
                            for what in ("tokens", "lengths")])


def open_dataset(name, trained_on=None):
    """A prepared dataset's name -> Dataset; trained_on: the fingerprint that it must have."""
    make = f"data/prepare.py --name={name} --input=FILE (or data/toy/prepare.py --name={name})"
    path = dataset_folder(name) / "dataset.json"
    dataset = Dataset(path.parent, read_json(path, make))
    if trained_on not in (None, dataset.fingerprint):
        raise UserError(f"data/{name} was made anew since the model was trained on it; train again")
    return dataset


def write_dataset(folder, rows, splits, tokenizer, block_size, kind="pairs", left_out=None,
                  finish=None, **about):
    """Tokenise rows and write them as a dataset, all of it or none.

    rows: an iterable of (split, prompt, first, second), texts, or None for no response; left_out: a
    Counter by reason; finish: called with the folder of the written tokens, to put arrays beside
    them; about: more for dataset.json."""
    left_out = Counter() if left_out is None else left_out
    with temporary_beside(folder) as temporary:
        temporary.mkdir()
        parts = {split: {"items": 0, "tokens": 0} for split in splits}
        for some in chunks(rows, ROWS):
            found = tokenise(some, tokenizer, block_size, left_out)
            for split, part in parts.items():
                append([row for name, row in found if name == split], part, f"{temporary}/{split}")
        for split, part in parts.items():
            if not part["items"]:
                raise UserError(f"nothing is left for {split}; left out: {listed(left_out)}; "
                                "more rows may help")
        if finish:
            finish(temporary)
        digests = {path.name: file_digest(path) for path in temporary.iterdir()}
        folder.mkdir(exist_ok=True)
        for name in ("dataset.json", "candidates.jsonl"):
            (folder / name).unlink(missing_ok=True)
        for path in temporary.iterdir():
            path.replace(folder / path.name)
        write_json(folder / "dataset.json", {
            "kind": kind, **about, "block_size": block_size, "splits": parts,
            "digests": digests, "left_out": left_out, "tokenizer": tokenizer.to_dict()})
    counts = ", ".join(f"{split} {part['items']}" for split, part in parts.items())
    print(f"wrote {folder}: {counts}; left out: {listed(left_out)}")


def append(rows, part, start):
    """Append rows of (prompt, first, second), lists of token ids, to the files of a split that
    begin with start, and count them in part, what dataset.json says of it."""
    lengths = np.array([[len(tokens) for tokens in row] for row in rows], "<i4").reshape(-1, 3)
    tokens = np.fromiter(chain(*chain(*rows)), "<u4", lengths.sum())
    part["items"] += len(rows)
    part["tokens"] += len(tokens)
    for path, array, count in ((f"{start}-tokens.npy", tokens, part["tokens"]),
                               (f"{start}-lengths.npy", lengths, part["items"])):
        with open(path, "r+b" if os.path.exists(path) else "wb") as file:
            header = {"shape": (count, *array.shape[1:]), "fortran_order": False,
                      "descr": array.dtype.str}
            np.lib.format.write_array_header_1_0(file, header)      # leaves room for it to grow
            file.seek(0, os.SEEK_END)
            file.write(array)


def tokenise(rows, tokenizer, block_size, left_out):
    """[(name, prompt, responses...), ...] as texts -> [(name, [the same as token ids]), ...].

    A prompt loses the oldest tokens, for all responses the same; a response is never cut: a row
    with one that leaves no room for a prompt is left out."""
    found = []
    encoded = tokenizer.encode_rows([texts for _, *texts in rows])
    for (name, *_), (prompt, *sides) in zip(rows, encoded):
        room = block_size - max(map(len, sides))
        if room < 1:
            left_out[f"a response longer than {block_size - 1} tokens"] += 1
            continue
        if len(prompt) > room:
            left_out[OLDEST] += 1
        found.append((name, [tokenizer.cut(prompt, room), *sides]))
    return found


def listed(left_out):
    """{reason: count} as text."""
    return ", ".join(f"{count} ({reason})" for reason, count in left_out.items()) or "nothing"


def chunks(items, size):
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while some := list(islice(items, size)):
        yield some
