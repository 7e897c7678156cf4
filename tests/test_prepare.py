"""Preparing datasets from files and published collections."""

import json
import math
import os
import random
import sys
import threading
from pathlib import Path

import pytest

from common import UserError, parse_settings
from data import prepare
from data.dataset import open_dataset
from data.formats import read_candidates, read_pairs
from data.tokenizer import make_tokenizer
from test_formats import PAIR, messages, write


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*rows, **settings):
    """Prepare a file of rows. Returns training rows, held-out rows, and the Dataset."""
    settings = {"tokenizer": "bpe:300", "val_share": 0.3, **settings}
    if rows:
        settings["input"] = write(Path("x.jsonl"), *rows)
    options = [f"--{name}={value}" for name, value in settings.items()]
    prepare.main(parse_settings(prepare.PrepareConfig, options))
    dataset = open_dataset(settings.get("name") or settings["source"])
    parts = []
    for name in ("train", "val"):
        texts = []
        for prompt, responses in dataset.split(name):
            texts.append(tuple(map(dataset.tokenizer.decode, (prompt, *responses))))
        parts.append(texts)
    return *parts, dataset


def pairs(count, **changes):
    return [{**PAIR, "prompt": f"Q{i}?", **changes} for i in range(count)]


def labelled(values, count=60):
    rows = []
    for i in range(count):
        label = values[i % len(values)]
        rows.append({"prompt": f"Q{i}", "completion": f"a{i}", "label": label})
    return rows


def test_any_jsonl_becomes_a_dataset_with_no_prompt_in_both_parts():
    rows = []
    for i in range(80):
        rows.append({**PAIR, "prompt": f"Question {i // 2}?", "chosen": f"yes {i}"})
    train, val, dataset = run(*rows, {"prompt": "Q"}, name="mine")
    assert sorted(train + val) == sorted(tuple(row.values()) for row in rows)
    assert not {row[0] for row in train} & {row[0] for row in val}
    assert dataset.kind == "pairs"
    assert dataset.metadata["skipped"] == {"chosen is missing": 1}
    for subsample in (2, 3):  # the file has an empty line after each row
        train, val, _ = run(*rows, name="mine", subsample=subsample)
        expected = [tuple(row.values()) for row in rows[::subsample]]
        assert sorted(train + val) == sorted(expected)


def test_the_keys_that_were_read_are_printed_and_repeated_rows_counted(capsys):
    rows = [{**row, "score": 1} for row in pairs(40)]
    opposite = {"prompt": "Q1?", "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    run(*rows, rows[0], opposite, name="mine")
    output = capsys.readouterr().out
    assert "x.jsonl: read prompt, chosen, rejected. Ignored: score" in output
    assert "1 (repeated rows), 1 (rows that contradict another row)" in output
    run(*[{**row, "label": 0, "responses": []} for row in rows], name="both")
    assert "rejected. Ignored: score, label, responses\n" in capsys.readouterr().out


def test_many_skipped_rows_are_an_error_unless_allowed():
    bad = [{"prompt": "Q"}] * 4
    with pytest.raises(UserError, match="4 of 44 rows.*missing.*--max_bad_fraction"):
        run(*pairs(40), *bad, name="other")
    assert not Path("data/other/dataset.json").exists()
    run(*pairs(40), *bad, name="other", max_bad_fraction=0.1)


def test_labels_are_mapped_or_refused(capsys):
    run(*labelled([-1, 1]), name="signs")
    message = "-1.0 means incorrect, 1.0 means correct"
    assert message in capsys.readouterr().out
    with pytest.raises(UserError, match="labels from 0.0 to 4.0. .*--threshold=X"):
        run(*labelled(range(5)), name="scores")
    run(*labelled(range(5)), name="scores", threshold=2)
    for name, share in (("signs", 1 / 2), ("scores", 3 / 5)):
        has_response = open_dataset(name).split("train").lengths[:, 1:] > 0
        assert has_response[:, 0].mean() == pytest.approx(share, abs=0.1)
        assert (has_response.sum(1) == 1).all()
    with pytest.raises(UserError, match="This file has pairs"):
        run(*pairs(40), name="pairs", threshold=3)
    with pytest.raises(UserError, match="all responses of train have the same label"):
        run(*labelled([1]), name="ones")
    assert not Path("data/ones/dataset.json").exists()


def test_a_labelled_response_is_on_the_side_of_its_label():
    train, val, dataset = run(*labelled([0, 1]), name="mine")
    expected = []
    for i in range(60):
        text = f"a{i}"
        expected.append((f"Q{i}", text, "") if i % 2 else (f"Q{i}", "", text))
    assert dataset.kind == "labels" and sorted(train + val) == sorted(expected)
    assert not Path("data/mine/candidates.jsonl").exists()
    with pytest.raises(UserError, match="not both"):
        run(*labelled([0, 1]), PAIR, name="mine")


def test_a_pipe_is_read_and_nothing_of_it_is_left():
    content = write(Path("y.jsonl"), *pairs(40)).read_bytes()
    os.mkfifo("pipe")
    thread = threading.Thread(target=Path("pipe").write_bytes, args=[content])
    thread.start()
    train, val, _ = run(input="pipe", name="mine")
    thread.join()
    assert len(train) + len(val) == 40
    assert not list(Path("data/mine").glob("*.tmp"))
    Path("data/mine/own.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="is in the folder to write"):
        run(input="data/mine/own.jsonl", name="mine")
    assert Path("data/mine/own.jsonl").read_bytes() == content


def test_texts_of_every_kind_come_back_as_they_were():
    texts = [
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\u0645\u064f\u062d\u064e \u202eab",
        "\x00\x07\x1b[31m",
        "a\u2028b\x85c",
        "'\"<&>",
        "<|endoftext|><|im_end|>",
        "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e01\u0e33",
        "e\u0301\u0302",
        "".join(random.Random(0).choices("abcdefgh", k=20_000)),
    ]
    rows = []
    for i in range(8):
        for text in texts:
            rows.append({"prompt": f"{i}{text[:90]}", "chosen": text, "rejected": "no"})
    rows.append({"prompt": "a surrogate", "chosen": "\ud800 x", "rejected": "no"})
    Path("y.jsonl").write_text("\n".join(map(json.dumps, rows)))  # ASCII, with escapes
    train, val, dataset = run(input="y.jsonl", name="mine", max_bad_fraction=1)
    assert dataset.metadata["skipped"] == {"a response longer than 1023 tokens": 8}
    expected = set()
    for row in rows:
        chosen = row["chosen"].replace("\ud800", "\ufffd")
        if len(chosen) < 1000:
            expected.add((row["prompt"], chosen, "no"))
    assert {*train, *val} == expected


# Published collections ----------------------------------------------------------------


def test_candidates_become_labelled_responses_and_held_out_ones_are_kept():
    answers = {"x\nA: $1,200": "1200", "A: 3\nA: 4 dogs": "4 dogs", "no line": "none"}
    texts, correct = tuple(answers), (1.0, 0.0, 1.0)
    plain, raw = [], {}
    for text, label in zip(texts, correct):
        plain.append({"text": text, "correct": label})
        raw[text] = {"solution": text, "is_correct": label}
    rows, expected = [], []
    for i in range(20):
        rows.append({**raw, "question": f"{i}+1?", "ground_truth": "2"})  # GSM8K's form
        rows.append({"prompt": f"{i}-1?", "responses": plain})
        for prompt in (f"{i}+1?", f"{i}-1?"):
            for text, label in zip(texts, correct):
                row = (prompt, text, "") if label else (prompt, "", text)
                expected.append(row)
    bad = [{"text": "third", "correct": 0.3}, {"text": "half", "correct": 0.5}]
    rows.append({"prompt": "Q", "responses": bad})
    train, val, dataset = run(*rows, source="gsm8k", val_share=0)
    assert dataset.metadata["val_share"] == 0.2
    assert list(dataset.metadata["skipped"].values()) == [2]
    assert sorted(train + val) == sorted(expected)
    held_out, path = {row[0] for row in val}, Path("data/gsm8k/candidates.jsonl")
    items, _, _ = read_candidates(path, dataset.tokenizer, 64)
    prompts = {item.prompt for item in items} - {"Q"}
    assert prompts == held_out - {row[0] for row in train}
    for item in items:
        if item.prompt != "Q":
            assert item[1:4] == (texts, correct, tuple(answers.values()))
    run(*pairs(40), name="gsm8k")
    assert open_dataset("gsm8k").kind == "pairs" and not path.exists()


def test_benchmarks_are_kept_as_they_are():
    row = {
        "prompt": "q",
        "chosen": ["a", "aa", "aaa"],
        "rejected": ["b", "bb", "bbb"],
        "domain": "chat",
    }
    config = prepare.PrepareConfig(source="rm_bench", input=write(Path("x.jsonl"), row))
    prepare.main(config)
    path, bpe = Path("data/rm_bench/test.jsonl"), make_tokenizer("bpe:300", ["x"])
    items, examples, _ = read_pairs(path, bpe, 64, wrap_as_chat=True)
    assert json.loads(path.read_text()) == row and len(items) == 9
    prompt = bpe.decode(examples[0].prompt)
    assert prompt == items[0].prompt == "\n\nHuman: q\n\nAssistant:"


def test_hh_rlhf_rows_are_two_conversations_with_one_prompt():
    rows, expected = [], []
    for i in range(30):
        prompt = f"\n\nHuman: q {i}\n\nAssistant:"
        rows.append({"chosen": prompt + " good", "rejected": prompt + " bad"})
        expected.append((prompt, " good", " bad"))
    # Conversations that differ before the last response, and one without a response.
    rows += [{"chosen": rows[1]["chosen"], "rejected": rows[2]["rejected"]}]
    rows += [{"chosen": "x"}]
    train, val, dataset = run(*rows, source="hh_rlhf", max_bad_fraction=0.1)
    assert sorted(train + val) == sorted(expected)
    skipped = dataset.metadata["skipped"]
    assert sorted(skipped.values()) == [1, 1] and dataset.is_chat()
    assert "two conversations that differ before the last response" in skipped


def test_prompts_that_differ_in_case_or_spaces_are_in_one_part():
    rows = []
    for i in range(40):
        for prompt in (f"Why {i}?", f" why  {i}?\n", f"WHY {i}?"):
            rows.append({**PAIR, "prompt": prompt, "chosen": f"yes {len(rows)}"})
    train, val, dataset = run(*rows, name="mine")
    parts = []
    for part in (train, val):
        parts.append({" ".join(row[0].lower().split()) for row in part})
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 40
    assert not dataset.is_chat()


def test_long_responses_are_counted_in_a_small_file_too():
    rows = pairs(40) + pairs(5, chosen="yes " * 200)
    with pytest.raises(UserError, match="5 of 45 rows are skipped .a response longer"):
        run(*rows, name="mine", block_size=64)
    assert not Path("data/mine/dataset.json").exists()


def test_unified_feedback_rows_are_ordered_by_rating_and_ties_dropped():
    rows, expected = [], []
    for i in range(60):
        row = {
            "conv_A": messages(f"q {i}", "good"),
            "conv_B": messages(f"q {i}", "bad"),
            "conv_A_rating": float(i % 3),
            "conv_B_rating": 1.0,
        }
        rows.append(row)
        prompt = f"\n\nHuman: q {i}\n\nAssistant:"
        if i % 3 == 2:
            expected.append((prompt, " good", " bad"))
        if i % 3 == 0:
            expected.append((prompt, " bad", " good"))
    bad = [{"conv_A": []}, {**rows[0], "conv_A_rating": float("nan")}]
    settings = {"subsample": 1, "max_bad_fraction": 0.1}
    train, val, dataset = run(*rows, *bad, source="unified_feedback", **settings)
    assert sorted(train + val) == sorted(expected)
    reason = "conv_A_rating or conv_B_rating is not a number"
    expected = {reason: 2, "neither response is preferred": 20}
    assert dataset.metadata["skipped"] == expected


@pytest.mark.parametrize(
    "settings, message",
    [
        *[({"source": name}, "--input=FILE") for name in prepare.SOURCES],
        ({"name": "mine"}, "--source=NAME"),
        ({"source": "other"}, "Choose one of: hh_rlhf"),
        ({"name": "../x", "input": "x"}, "one folder"),
        ({"input": "x", "val_share": 1.5}, "at most 1"),
        ({"input": "x", "threshold": math.nan}, "--threshold must be .*, not nan"),
        ({"name": "x", "input": "nowhere.jsonl"}, "No such file"),
        (
            {"name": "x", "input": "one.jsonl"},
            "no row is left for .*more different prompts may",
        ),
        ({"name": "toy", "input": "one.jsonl"}, "made by data/toy.py"),
        ({"name": "Toy", "input": "one.jsonl"}, "made by data/toy.py"),
    ],
)
def test_a_mistake_and_a_missing_network_are_one_line(monkeypatch, settings, message):
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    write(Path("one.jsonl"), PAIR)
    with pytest.raises(UserError, match=message):
        run(**settings)
