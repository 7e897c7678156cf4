"""Datasets on disk: what is written is read back, and failures keep what is there."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from common import UserError
from data.dataset import ArrayWriter, dataset_folder, open_dataset, write_dataset
from data.tokenizer import make_tokenizer

ROWS = [
    ("train", "the cat sat on the mat", " no", " on the log, the log"),
    ("val", "the dog", " a cat", None),
    ("train", "the dog sat", None, " on the mat, the dog"),
]
SPLITS = ("train", "val")


@pytest.fixture(scope="module")
def bpe():
    text = "the cat sat on the mat, the dog sat on the log"
    return make_tokenizer("bpe:300", [text] * 3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return dataset_folder("mine")


def test_what_is_written_is_read_back_and_arrays_are_plain_npy_files(folder, bpe):
    write_dataset(folder, ROWS * 3000, SPLITS, bpe, 64)
    split, parts = open_dataset("mine").split("train"), []
    for _, prompt, *responses in ROWS[::2]:
        parts.append(bpe.encode(prompt))
        for text in responses:
            parts.append([*bpe.encode(text), bpe.end_of_text] if text else [])
    tokens = np.load("data/mine/train-tokens.npy")
    lengths = np.load("data/mine/train-lengths.npy")
    assert tokens.dtype == np.uint32
    assert np.array_equal(tokens, np.concatenate(parts * 3000))
    assert lengths.flatten().tolist() == [len(part) for part in parts] * 3000
    assert len(split.prompts()) == 2 and len(split) == 6000
    numbers = np.arange(len(tokens))
    first, last = (
        split.response_values(numbers, 0),
        split.response_values(numbers, 5999),
    )
    assert first[0][0] == lengths[0, 0] and last[1][-1] == len(tokens) - 1
    assert split.example_lengths.tolist() == lengths.sum(1).tolist()


def test_arrays_beside_the_tokens(folder, bpe):
    def compute(split, prompt, responses):
        lengths = [len(prompt), *map(len, responses)]
        return {"place": np.repeat([0, 1, 2], lengths)}

    arrays = {"place": np.uint8}, compute
    write_dataset(folder, ROWS, SPLITS, bpe, 64, token_arrays=arrays, note="x")
    dataset = open_dataset("mine")
    assert dataset.metadata["note"] == "x"
    for name in SPLITS:
        split, place = dataset.split(name), dataset.array(name, "place")
        assert place.dtype == np.uint8 and len(place) == len(split.tokens)
        for i in range(len(split)):
            first, second = split.response_values(place, i)
            assert (first == 1).all() and (second == 2).all()
    with pytest.raises(UserError, match="has no train-exact-p.npy"):
        dataset.array("train", "exact-p")


def test_a_long_prompt_loses_its_oldest_tokens_and_a_response_is_never_cut(folder, bpe):
    prompt, *responses = [bpe.encode(text) for text in ROWS[0][1:]]
    notes = {
        len(prompt): {},
        2: {"prompts truncated on the left": 1},
        0: {"a response longer than SIZE tokens": 1},
    }
    for room, expected in notes.items():
        size = len(responses[1]) + 1 + room
        rows = [ROWS[0], ("train", "the", " cat", None)]
        write_dataset(folder, rows, ["train"], bpe, size)
        example, *rest = open_dataset("mine").split("train")
        if room:
            assert example.prompt.tolist() == prompt[-room:] and len(rest) == 1
            kept = [response.tolist()[:-1] for response in example.responses]
            assert kept == responses
        skipped = json.dumps(open_dataset("mine").metadata["skipped"])
        assert json.loads(skipped.replace(str(size - 1), "SIZE")) == expected


def test_a_failure_keeps_the_dataset_that_is_there(folder, bpe):
    write_dataset(folder, ROWS, SPLITS, bpe, 64)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    too_long = [ROWS[0], ("val", "Q", "cat" * 99, None)]
    with pytest.raises(UserError, match="no row is left for split val. Skipped: 1 .a"):
        write_dataset(folder, too_long, SPLITS, bpe, 64)
    with pytest.raises(ZeroDivisionError):
        write_dataset(folder, (1 / 0 for _ in "x"), SPLITS, bpe, 64)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name, content in before.items():
        assert after[name] == content
    assert all(name.endswith(".tmp") for name in after.keys() - before.keys())


def test_a_dataset_folder_that_is_a_link_stays_one(folder, bpe, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "notes.txt").write_text("mine")
    folder.parent.mkdir()
    os.symlink(tmp_path / "disk", folder)
    for _ in range(2):
        write_dataset(folder, ROWS, SPLITS, bpe, 64)
    assert folder.is_symlink() and len(open_dataset("mine").split("train")) == 2
    assert (tmp_path / "disk" / "notes.txt").read_text() == "mine"


def test_a_damaged_old_or_unknown_dataset_is_one_line(folder, bpe):
    write_dataset(folder, ROWS, SPLITS, bpe, 64)
    path, metadata = folder / "train-tokens.npy", open_dataset("mine").metadata
    content = path.read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="train-tokens.npy does not match"):
            open_dataset("mine").split("train")
    for saved, message in (
        ([], "damaged"),
        ({**metadata, "kind": "labels"}, "was edited"),
        (metadata, "another version.*python data/prepare.py"),
    ):
        (folder / "dataset.json").write_text(json.dumps(saved))
        with pytest.raises(UserError, match=message):
            open_dataset("mine")
    with pytest.raises(UserError, match="python data/toy.py --name=toy-1"):
        open_dataset("toy-1")
    for name in ("", "../x", ".hidden", "a/b"):
        with pytest.raises(UserError, match="one folder inside data/"):
            open_dataset(name)


def test_an_array_of_unknown_length(tmp_path):
    writer = ArrayWriter(tmp_path / "x.npy", "<i4", (3,))
    for count in (0, 1, 10**5):
        writer.append(np.arange(3 * count).reshape(count, 3))
    writer.close()
    array = np.load(tmp_path / "x.npy")
    assert array.shape == (10**5 + 1, 3) and array.dtype == np.int32
    assert np.array_equal(array[1:], np.arange(3 * 10**5).reshape(-1, 3))
    assert Path(tmp_path / "x.npy").stat().st_size == 128 + array.nbytes
