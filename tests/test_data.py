"""Reading, checking, tokenising, writing and batching."""
import gzip
import json
import math
import os
import random
import re
import sys
import threading
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from config import UserError, parse
from data import prepare
from data import tokenizer as tokenizers
from data.dataset import dataset_folder, open_dataset, write_dataset
from data.jsonl import read_candidate_rows, read_items, read_pair_rows, read_step_rows
from data.pairs import parse_candidates, parse_pairs, parse_steps
from data.rows import Row, batch_of, in_batches, make_batch, make_targets

GOOD = {"prompt": "Q\u2028?", "chosen": "yes\x85\x0b", "rejected": "no"}     # no ends of lines


def write(path, *rows):
    """Rows as JSON lines with all that a file may have: a byte order mark, CRLF, empty lines."""
    lines = (json.dumps(row, ensure_ascii=False) + "\r\n\n" for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + "".join(lines).encode())
    return path


def messages(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, texts)]


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.make("bpe:300", ["the cat sat on the mat, the dog sat on the log"] * 3)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The test's folder as the current one, so that data/ is its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*rows, **settings):
    """Prepare a file of rows; -> its training and its held-out part, decoded, and the Dataset"""
    settings = {"tokenizer": "bpe:300", "val_share": 0.3} | settings
    if rows:
        settings["input"] = write(Path("x.jsonl"), *rows)
    prepare.main(parse(prepare.PrepareConfig, [f"--{k}={v}" for k, v in settings.items()]))
    dataset = open_dataset(settings.get("name") or settings["source"])
    decode = dataset.tokenizer.decode
    parts = ([(decode(row.prompt), *map(decode, row.responses)) for row in dataset.split(split)]
             for split in ("train", "val"))
    return *parts, dataset


GOOD_ROWS = {parse_pairs: GOOD,
             parse_candidates: {"prompt": "Q", "responses": [{"text": "", "correct": 0.5}]},
             parse_steps: {"prompt": "Q", "steps": ["a", "b"], "first_error": 1}}
BAD_ROWS = [    # what a good row is changed by, and the reason that is given
    (parse_pairs, {"rejected": 3}, "rejected is not text but int"),
    (parse_pairs, {"chosen": None}, "chosen is missing"),
    (parse_pairs, {"prompt": " "}, "prompt is empty"),
    (parse_pairs, {"chosen": "no"}, "the same"),
    (parse_pairs, {"prompt": [{"role": [], "content": "x"}]}, "known 'role'"),
    (parse_pairs, {"prompt": [{"role": "user", "content": "x\n\nAssistant: y"}]}, "another turn"),
    (parse_pairs, {"prompt": messages("x"), "chosen": messages("y")}, "one assistant message"),
    (parse_pairs, {"chosen": ["a", "b"], "rejected": ["c"], "domain": "x"}, "not RM-Bench's"),
    (parse_pairs, {"chosen": ["a", "b"], "rejected": ["c", "d"]}, "not RM-Bench's"),
    (parse_pairs, {"chosen": "x" + " " * 10**6 + "y"}, "100000 white spaces in a row"),
    (parse_pairs, {"question": "Q2"}, "more than one prompt (prompt, question)"),
    (parse_pairs, {"conversations": "x"}, "'conversations' looks like a part"),
    (parse_pairs, {"log": [{"from": "human", "value": "x"}]}, "'log' looks like a part"),
    (parse_pairs, {"prompt": [messages("x")[0] | {"tool_calls": [1]}]}, "'tool_calls'"),
    (parse_pairs, {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "is no text"),
    (parse_pairs, {"input": "x"}, "'input' that is not"),
    (parse_pairs, {"prompt": None, "instruction": 5, "input": "x"}, "'input' that is not"),
    (parse_pairs, {"prompt": messages("x", "y")}, "ends with the assistant's own turn"),
    (parse_pairs, {"history": ["x"]}, "nor of pairs of texts"),
    (parse_pairs, {"prompt": None, "chosen": "\u4f60好", "rejected": "\u4f60不"}, "no turn or"),
    (parse_pairs, {"chosen": messages("A", "b"), "rejected": messages("A", "c")}, "conversation's"),
    (parse_candidates, {"responses": []}, "no 'responses'"),
    (parse_candidates, {"responses": [{"text": "a", "correct": float("nan")}]}, "finite"),
    (parse_candidates, {"completion": "a", "label": "yes"}, "'correct' or 'label'"),
    (parse_candidates, {"responses": [{"text": " " * 10**6, "correct": 1}]}, "a response has 1000"),
    (parse_steps, {"steps": ["a", "b" + "\n" * 10**6 + "b"]}, "a solution has 100000 white"),
    (parse_steps, {"steps": ["a", " "]}, "no 'steps'"),
    (parse_steps, {"first_error": 2}, "from -1 to 1")]


@pytest.mark.parametrize("parse_row, changes, reason", BAD_ROWS)
def test_a_bad_row_is_reported_counted_and_left_out(tmp_path, capsys, parse_row, changes, reason):
    good, left_out = GOOD_ROWS[parse_row], Counter()
    path = write(tmp_path / "x.jsonl", good, *[good | changes] * 9)
    assert list(read_items(path, parse_row, left_out=left_out, skip_bad=True)) == parse_row(good)
    printed = capsys.readouterr().out
    assert reason in printed and printed.count(", row ") == 5 and list(left_out.values()) == [9]
    assert list(read_items(path, parse_row)) == parse_row(good) and not capsys.readouterr().out


@pytest.mark.parametrize("name, content, message", [
    ("x.jsonl", b"\xff\xfe{}", "cannot be read .*utf-8"), ("x.jsonl", b"", "no usable row"),
    ("x.jsonl", b'{"prompt": "Q"}\n[1]\n"x"\n{"pro\n' + b"[" * 100_000, "no usable row .5 bad"),
    ("x.jsonl.gz", gzip.compress(json.dumps(GOOD).encode() * 50)[:-20], "cannot be read"),
    ("x.jsonl", None, "No such file"), (".", None, "directory")])
def test_a_file_that_is_no_pair_file_is_one_clear_error(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_items(tmp_path / name, parse_pairs))


def test_the_four_forms_of_a_pair_are_the_same_pair():
    user, pair = messages("Hi?")[0], ("\n\nHuman: Hi?\n\nAssistant:", (" Hello.", " Go."))
    said = {"chosen": messages("Hi?", "Hello.")[1:], "rejected": messages("Hi?", "Go.")[1:]}
    forms = [{"prompt": pair[0], "chosen": pair[1][0], "rejected": pair[1][1]},
             {"chosen": pair[0] + pair[1][0], "rejected": pair[0] + pair[1][1]},
             {"prompt": [user], **said}, {name: [user] + reply for name, reply in said.items()}]
    assert [parse_pairs(form)[0][:2] for form in forms] == [pair] * 4
    plain = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go."}
    assert parse_pairs(plain, as_dialogue=True) == parse_pairs(forms[0], as_dialogue=True)
    labelled, = parse_candidates({"prompt": [user], "completion": said["chosen"], "label": False})
    assert labelled[:3] == (pair[0], pair[1][:1], (0.0,))


@pytest.mark.parametrize("before, row", [
    ("Hi?", {"question": "Hi?"}), ("Do.\nx", {"instruction": "Do.", "input": "x"}),
    ("\n\nSystem: S\n\nHuman: Hi?\n\nAssistant:", {"question": "Hi?", "system": "S"}),
    ("\n\nHuman: a\n\nAssistant: b\n\nHuman: Hi?\n\nAssistant:",
     {"instruction": "Hi?", "history": [["a", "b"]]}),
    ("\n\nHuman: a\n\nAssistant: b\n\nHuman: Hi?\n\nAssistant:",
     {"messages": messages("Hi?"), "history": messages("a", "b")}),
    ("\n\nHuman: a b\n\nAssistant:", {"prompt": [{"role": "user", "content": [
        {"type": "text", "text": text} for text in ("a ", "b")]}]})])
def test_other_names_and_parts_of_a_prompt_are_read(before, row):
    pair, = parse_pairs(row | {"chosen": "yes", "rejected": "no"})
    assert pair.prompt == before and [text.strip() for text in pair.responses] == ["yes", "no"]
    one, = parse_candidates(row | {"completion": "yes", "label": 1})
    assert one.prompt == before


@pytest.mark.parametrize("start", [
    "<|im_start|>user\nWhat\nis it?<|im_end|>\n<|im_start|>assistant\n",
    "### Instruction:\nSay.\n\n### Response:\n", "[INST] Say. [/INST]", "Say 1 or 2.\n"])
def test_whole_texts_are_cut_behind_the_last_turn_that_both_share(start):
    pair, = parse_pairs({"chosen": start + "one two", "rejected": start + "one three"})
    assert pair[:2] == (start, ("one two", "one three"))


def test_a_prompt_that_its_responses_repeat_is_taken_off_and_counted():
    said = {"chosen": messages("Hi?", "yes"), "rejected": messages("Hi?", "no")}
    pair, = parse_pairs({"prompt": "Hi?", **said})      # the form of ultrafeedback_binarized
    assert pair == parse_pairs(said)[0]
    assert parse_pairs({"prompt": "Hi?", "chosen": said["chosen"][1:],
                        "rejected": said["rejected"][1:]})[0] == pair
    prompt = "What is the capital of France?"
    pair, = parse_pairs({"prompt": prompt, "chosen": f"{prompt} yes", "rejected": f"{prompt} no"})
    assert pair[:2] == (prompt, (" yes", " no")) and "repeat" in pair.note
    pair, = parse_pairs({"prompt": "Hi", "chosen": "High five!", "rejected": "Hi."})    # by chance
    assert pair[1] == ("High five!", "Hi.")
    both = parse_pairs({"prompt": "Hi?", "messages": said["chosen"], **said})
    assert both == parse_pairs(said)


def test_empty_columns_and_empty_system_messages_are_no_conversation():
    row = {"prompt": messages("Hi?"), "chosen": "yes", "rejected": "no"}
    plain = parse_pairs(row)
    for more in ({"tools": None}, {"context": ""}, {"turns": 1}, {"history": None}, {"system": ""},
                 {"prompt": [{"role": "system", "content": ""}, *messages("Hi?")]}):
        assert parse_pairs(row | more) == plain


def test_what_was_read_is_said_and_much_that_is_left_out_is_an_error(here, capsys):
    rows = [dict(GOOD, prompt=f"Q{i}?", score=i) for i in range(40)]
    run(*rows, rows[0], GOOD | {"prompt": "Q1?", "chosen": "no", "rejected": GOOD["chosen"]},
        name="mine")
    said = capsys.readouterr().out
    assert "x.jsonl: read prompt, chosen, rejected; not read: score" in said
    assert "1 (rows that stand there once more), 1 (rows whose opposite stands there too)" in said
    run(*(row | {"label": 0, "responses": []} for row in rows), name="both")
    assert "rejected; not read: score, label, responses\n" in capsys.readouterr().out
    bad = [{"prompt": "Q"}] * 4
    with pytest.raises(UserError, match="4 of 44 are left out .chosen is missing.*--skip_bad"):
        run(*rows, *bad, name="other")
    assert not Path("data/other").exists()
    run(*rows, *bad, name="other", skip_bad=True)


def test_labels_are_mapped_or_refused(here, capsys):
    def labelled(values):
        return [{"prompt": f"Q{i}", "completion": f"a{i}", "label": values[i % len(values)]}
                for i in range(60)]

    run(*labelled([-1, 1]), name="signs")
    assert "-1.0 is read as incorrect, 1.0 as correct" in capsys.readouterr().out
    with pytest.raises(UserError, match="labels from 0.0 to 4.0; .*--threshold=X"):
        run(*labelled(range(5)), name="scores")
    run(*labelled(range(5)), name="scores", threshold=2)
    for name, share in (("signs", 1 / 2), ("scores", 3 / 5)):
        sides = open_dataset(name).split("train").lengths[:, 1:] > 0
        assert sides[:, 0].mean() == pytest.approx(share, abs=0.1)
        assert (sides.sum(1) == 1).all()
    with pytest.raises(UserError, match="this file holds pairs"):
        run(*[dict(GOOD, prompt=f"Q{i}?") for i in range(40)], name="pairs", threshold=3)
    with pytest.raises(UserError, match="in train all labels are of one kind"):
        run(*labelled([1]), name="ones")


def test_inputs_that_are_no_jsonl_have_a_remedy_and_a_pipe_is_read(here):
    for name, content, remedy in (("x.parquet", b"PAR1", "read_parquet"), ("x.csv", b"a", "csv"),
                                  ("x.jsonl.zst", b"x", "zstd"), ("x.json", b"[\n{}]", "jq")):
        (here / name).write_bytes(content)
        with pytest.raises(UserError, match=remedy):
            run(input=name, name="mine")
    rows = [dict(GOOD, prompt=f"Q{i}?") for i in range(40)]
    text = write(here / "y.jsonl", *rows).read_bytes()
    os.mkfifo(here / "pipe")
    thread = threading.Thread(target=(here / "pipe").write_bytes, args=[text], daemon=True)
    thread.start()
    train, val, _ = run(input="pipe", name="mine")
    thread.join()
    assert len(train) + len(val) == 40
    (here / "data/mine/own.jsonl").write_bytes(text)
    with pytest.raises(UserError, match="lies in the folder that is written"):
        run(input="data/mine/own.jsonl", name="mine")
    assert (here / "data/mine/own.jsonl").read_bytes() == text


HINDI, THAI = "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0e01\u0e33"
ARABIC = "\u0645\u064f\u062d\u064e"
FAMILY, JOINED = "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u062e\u0648\u200c\u0646"


def test_texts_of_every_kind_come_back_as_they_were(here):
    kinds = [FAMILY, f"{ARABIC} \u202eab", "\x00\x07\x1b[31m", "a\u2028b\x85c", "'\"<&>",
             "<|endoftext|><|im_end|>", f"{HINDI} {THAI}", "e\u0301\u0302",
             "".join(random.Random(0).choices("abcdefgh", k=20_000))]
    rows = [{"prompt": f"{i}{text[:90]}", "chosen": text, "rejected": "no"}
            for i in range(8) for text in kinds]
    rows.append({"prompt": "a lone surrogate", "chosen": "\ud800 x", "rejected": "no"})
    (here / "y.jsonl").write_text("\n".join(map(json.dumps, rows)))     # ASCII, with escapes
    train, val, dataset = run(input="y.jsonl", name="mine", skip_bad=True)
    assert dataset.about["left_out"] == {"a response longer than 1023 tokens": 8}
    wanted = {(row["prompt"], row["chosen"].replace("\ud800", "\ufffd"), "no") for row in rows}
    assert {*train, *val} == {row for row in wanted if len(row[1]) < 1000}


def test_marks_and_joiners_belong_to_words_in_training_and_encoding_alike():
    words = [HINDI, THAI, ARABIC, "e\u0301te\u0301", JOINED]
    spaced, pattern = [words[0], *(f" {word}" for word in words[1:])], tokenizers.split_pattern()
    assert re.findall(pattern, " ".join(words)) == spaced
    bpe = tokenizers.make("bpe:2000", [" ".join(words)] * 9)
    assert [bpe.decode([i]) for i in bpe.encode(" ".join(words))] == spaced     # merged to the end
    rng = random.Random(0)
    text = "".join(chr(rng.choice([rng.randrange(0x3000), rng.randrange(0xe000, 0x20000), 32, 97]))
                   for _ in range(20_000))
    pieces = re.findall(pattern, text)
    ranks = {bytes([byte]): byte for byte in range(256)}
    for piece in pieces:
        ranks.setdefault(piece.encode(), len(ranks))
    whole = tokenizers.Tokenizer("bpe:1", ranks)        # every piece is one token
    assert "".join(pieces) == text
    assert whole.encode(text) == [ranks[piece.encode()] for piece in pieces]


def test_rows_of_a_file_have_cut_prompts_and_what_does_not_fit_is_counted(tmp_path, bpe, capsys):
    path = write(tmp_path / "x.jsonl", GOOD, GOOD | {"chosen": "the cat " * 50}, {"prompt": "Q"})
    with pytest.raises(UserError, match="1 of 3 are left out"):
        read_pair_rows(path, bpe, 9)
    (_,), _, left_out = read_pair_rows(path, bpe, 9, skip_bad=True)
    assert left_out == 2 and "1 (a response longer than 8 tokens)" in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing is left of .*longer than 2"):
        read_pair_rows(path, bpe, 3, skip_bad=True)
    texts = {"prompt": "the cat", "responses": [
        {"text": " the" * count, "correct": count} for count in (3, 0)]}
    _, (row,), _ = read_candidate_rows(write(path, texts), bpe, 5)
    assert [len(part) for part in (row.prompt, *row.responses)] == [1, 4, 1]    # end-of-text
    (item,), (row,), _ = read_candidate_rows(path, bpe, 4)      # the long one goes alone
    assert item.correct == (0.0,) and [len(part) for part in row.responses] == [1]
    _, (row,), (ends,) = read_step_rows(write(path, GOOD_ROWS[parse_steps]), bpe, 64, True)
    assert [bpe.decode(row.responses[0][:end + 1]) for end in ends] == [" a\n", " a\nb"]


def test_bpe_round_trips_any_text_and_pieces_put_a_character_at_its_last_token(bpe):
    texts = ["the cat \u2028 s\u00e4t \U0001f600!", "naïve café ²½ ‿_x 𝔘𝔫𝔦", "a\r\n\t  c",
             "'twas she'll", "<|endoftext|>", "\ud800 lone"] * 100
    for text, (_, (*tokens, end)) in zip(texts, bpe.encode_rows([["", text] for text in texts])):
        plain = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert tokens == bpe.encode(text) and end == bpe.end_of_text not in tokens
        assert bpe.decode(tokens) == plain == "".join(bpe.pieces(tokens))
    pieces = bpe.pieces(bpe.encode(texts[0]) + [bpe.end_of_text])
    assert "" in pieces[:-1] and "\U0001f600" in pieces and pieces[-1] == ""
    saved = json.loads(json.dumps(bpe.to_dict()))
    assert tokenizers.from_dict(saved).encode(texts[0]) == bpe.encode(texts[0])


def test_bpe_merges_the_most_frequent_neighbours_first():
    texts = [" sat"] * 6 + [" the"] * 9 + ["the"] * 3
    slow, words = [], [list(map(chr, word.encode())) for word in texts]
    for _ in range(3):   # a slow twin: count all neighbours again for every merge
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        slow.append("".join(best))
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if tuple(word[i:i + 2]) == best:
                    word[i:i + 2] = ["".join(best)]
    ranks = tokenizers.train_bpe(texts, 259)
    assert [token.decode() for token in sorted(ranks, key=ranks.get)[256:]] == slow


def test_gpt2_without_a_network_and_unknown_tokenizers_say_what_to_do(monkeypatch):
    for error in (ConnectionError, ValueError("Hash mismatch for data downloaded")):
        gpt2 = mock.Mock(side_effect=error)
        monkeypatch.setattr(tokenizers.openai_public, "gpt2", gpt2)
        with pytest.raises(UserError, match="--tokenizer=bpe:4096"):
            tokenizers.make("gpt2", [])
    for name in ("words", "bpe:12"):
        with pytest.raises(UserError, match="257"):
            tokenizers.make(name, [])


ROWS = [("train", "the cat sat on the mat", " no", " on the log, the log"),
        ("val", "the dog", " a cat", None), ("train", "the dog sat", None, " on the mat, the dog")]


def test_what_is_written_is_read_back_and_the_arrays_are_plain_npy_files(here, bpe):
    write_dataset(dataset_folder("mine"), ROWS * 3000, ("train", "val"), bpe, 64)
    split = open_dataset("mine").split("train")
    slow = [part for _, prompt, *sides in ROWS[::2] for part in (
        bpe.encode(prompt), *([*bpe.encode(text), bpe.end_of_text] if text else []
                              for text in sides))] * 3000
    tokens, lengths = (np.load(f"data/mine/train-{name}.npy") for name in ("tokens", "lengths"))
    assert tokens.dtype == np.uint32 and np.array_equal(tokens, np.concatenate(slow))
    assert lengths.flatten().tolist() == list(map(len, slow))
    assert len(split.prompts()) == 2 and len(split) == 6000
    first, last = (split.of_responses(np.arange(len(tokens)), i) for i in (0, 5999))
    assert first[0][0] == lengths[0, 0] and last[1][-1] == len(tokens) - 1


def test_a_long_prompt_loses_its_oldest_tokens_for_both_and_a_response_is_never_cut(here, bpe):
    prompt, *sides = (bpe.encode(text) for text in ROWS[0][1:])
    for room in (len(prompt), 2, 0):
        rows, size = [ROWS[0], ("train", "the", " cat", None)], len(sides[1]) + 1 + room
        write_dataset(dataset_folder("mine"), rows, ["train"], bpe, size)
        row, *others = open_dataset("mine").split("train")
        if room:    # one prompt, whichever response is read
            assert row.prompt.tolist() == prompt[-room:] and len(others) == 1
            assert [part.tolist()[:-1] for part in row.responses] == sides
        assert open_dataset("mine").about["left_out"] == {
            len(prompt): {}, 2: {"the oldest tokens of a prompt": 1},
            0: {f"a response longer than {size - 1} tokens": 1}}[room]


def test_a_failure_touches_no_dataset_that_is_there(here, bpe):
    folder, splits = dataset_folder("mine"), ("train", "val")
    write_dataset(folder, ROWS, splits, bpe, 64)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for target in (folder, dataset_folder("new")):
        with pytest.raises(UserError, match="nothing is left for val; left out: 1 .a response"):
            write_dataset(target, [ROWS[0], ("val", "Q", "cat" * 99, None)], splits, bpe, 64)
        with pytest.raises(ZeroDivisionError):
            write_dataset(target, (1 / 0 for _ in "x"), splits, bpe, 64)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in (here / "data").iterdir()] == ["mine"]


def test_a_damaged_an_old_and_an_unknown_dataset_are_one_line(here, bpe):
    write_dataset(dataset_folder("mine"), ROWS, ("train", "val"), bpe, 64)
    path, dataset = here / "data/mine/train-tokens.npy", open_dataset("mine")
    content = path.read_bytes()
    for other in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
        path.write_bytes(other)
        with pytest.raises(UserError, match="train-tokens.npy is damaged"):
            open_dataset("mine").split("train")
    for about, message in (([], "damaged"), (dataset.about | {"kind": "labels"}, "edited"),
                           (dataset.about, "another edition.*data/prepare.py")):
        (here / "data/mine/dataset.json").write_text(json.dumps(about))
        with pytest.raises(UserError, match=message):
            open_dataset("mine")
    with pytest.raises(UserError, match="data/toy/prepare.py --name=toy-1"):
        open_dataset("toy-1")


def test_any_jsonl_becomes_a_dataset_with_no_prompt_in_both_parts(here):
    rows = [dict(GOOD, prompt=f"Question {i // 2}?", chosen=f"yes {i}") for i in range(80)]
    train, val, dataset = run(*rows, {"prompt": "Q"}, name="mine")
    assert sorted(train + val) == sorted(tuple(row.values()) for row in rows)
    assert not {prompt for prompt, *_ in train} & {prompt for prompt, *_ in val}
    assert dataset.kind == "pairs" and dataset.about["left_out"] == {"chosen is missing": 1}
    for every in (2, 3):        # the file has an empty line between any two
        train, val, _ = run(*rows, name="mine", every=every)
        assert sorted(train + val) == sorted(tuple(row.values()) for row in rows[::every])


def test_labelled_rows_have_one_side_and_pairs_among_them_are_refused(here):
    rows = [{"prompt": f"Q{i}", "completion": f"a{i}", "label": i % 2} for i in range(60)]
    train, val, dataset = run(*rows, name="mine")
    assert dataset.kind == "labels" and sorted(train + val) == sorted(
        (f"Q{i}", f"a{i}", "") if i % 2 else (f"Q{i}", "", f"a{i}") for i in range(60))
    assert not (here / "data/mine/candidates.jsonl").exists()
    with pytest.raises(UserError, match="not both"):
        run(*rows, GOOD, name="mine")


def test_candidates_become_labelled_responses_and_the_held_out_ones_stay_for_best_of_n(here):
    answers = {"x\nA: $1,200": "1200", "A: 3\nA: 4 dogs": "4 dogs", "no line": "none"}
    texts, correct = tuple(answers), (1.0, 0.0, 1.0)
    plain = {"responses": [{"text": text, "correct": c} for text, c in zip(texts, correct)]}
    raw = {text: {"solution": text, "is_correct": c} for text, c in zip(texts, correct)}
    rows = [raw | {"question": f"{i}+1?", "ground_truth": "2"} for i in range(20)]  # GSM8K's form
    rows += [plain | {"prompt": f"{i}-1?"} for i in range(20)]
    bad = [{"text": " ", "correct": True}, {"text": "half", "correct": 0.5}]
    train, val, dataset = run(*rows, {"prompt": "Q", "responses": bad}, source="gsm8k", val_share=0)
    assert dataset.about["val_share"] == 0.2 and list(dataset.about["left_out"].values()) == [2]
    assert sorted(train + val) == sorted(
        (f"{i}{sign}1?", text, "") if c else (f"{i}{sign}1?", "", text)
        for i in range(20) for sign in "+-" for text, c in zip(texts, correct))
    held_out, path = {prompt for prompt, *_ in val}, here / "data/gsm8k/candidates.jsonl"
    kept, _, _ = read_candidate_rows(path, dataset.tokenizer, 64)
    assert {item.prompt for item in kept} - {"Q"} == held_out - {prompt for prompt, *_ in train}
    assert {item[1:4] for item in kept[:-1]} == {(texts, correct, tuple(answers.values()))}
    run(*(dict(GOOD, prompt=f"Question {i}?") for i in range(40)), name="gsm8k")
    assert open_dataset("gsm8k").kind == "pairs" and not path.exists()


def test_benchmarks_are_kept_as_they_are_and_lists_of_three_are_nine_pairs(here, bpe):
    row = {"prompt": "q", "chosen": ["a", "aa", "aaa"], "rejected": ["b", "bb", "bbb"],
           "domain": "chat"}
    prepare.main(prepare.PrepareConfig(source="rm_bench", input=write(here / "x.jsonl", row)))
    path = here / "data/rm_bench/test.jsonl"
    found, rows, _ = read_pair_rows(path, bpe, 64, as_dialogue=True)
    assert json.loads(path.read_text()) == row
    assert bpe.decode(rows[0].prompt) == found[0].prompt == "\n\nHuman: q\n\nAssistant:"
    assert {item.cell: item.responses for item in found} == {
        (i, j): (" a" + "a" * i, " b" + "b" * j) for i in range(3) for j in range(3)}
    row |= {"domain": "", "subset": "x", "meta": {"domain": "safety"}}
    assert {item.subset for item in parse_pairs(row)} == {"safety"}


def test_hh_rlhf_and_unified_feedback_rows_are_two_dialogues_with_one_prompt(here):
    text = "\n\nHuman: q {}\n\nAssistant:"
    rows = [{"chosen": text.format(i) + " good", "rejected": text.format(i) + " bad"}
            for i in range(30)]
    bad = [{"chosen": text.format(1) + " y", "rejected": text.format(2) + " n"}, {"chosen": "x"}]
    train, val, dataset = run(*rows, *bad, source="hh_rlhf", skip_bad=True)
    assert sorted(train + val) == sorted((text.format(i), " good", " bad") for i in range(30))
    assert list(dataset.about["left_out"].values()) == [2]      # they part before the last reply
    rows = [{"conv_A": messages(f"q {i}", "good"), "conv_B": messages(f"q {i}", "bad"),
             "conv_A_rating": float(i % 3), "conv_B_rating": 1.0} for i in range(60)]
    bad = [{"conv_A": []}, rows[0] | {"conv_A_rating": float("nan")}]
    train, val, dataset = run(*rows, *bad, source="unified_feedback", every=1, skip_bad=True)
    assert sorted(train + val) == sorted(       # equal ratings are dropped
        (text.format(i), " good", " bad") if i % 3 else (text.format(i), " bad", " good")
        for i in range(60) if i % 3 != 1)
    assert dataset.about["left_out"] == {"conv_A_rating or conv_B_rating is no number": 2}


@pytest.mark.parametrize("settings, message", [
    *[({"source": name}, "--input=FILE") for name in prepare.SOURCES],
    ({"name": "mine"}, "--source=NAME"), ({"source": "other"}, "choose one of: hh_rlhf"),
    ({"name": "../x", "input": "x"}, "one folder"), ({"input": "x", "val_share": 1.5}, "at most 1"),
    ({"input": "x", "threshold": math.nan}, "--threshold must be at least -inf, not nan"),
    ({"name": "x", "input": "nowhere.jsonl"}, "No such file"),
    ({"name": "x", "input": "one.jsonl"}, "nothing is left for .*; more rows may help")])
def test_a_wrong_setting_and_a_hub_out_of_reach_are_one_line(here, monkeypatch, settings, message):
    monkeypatch.setitem(sys.modules, "datasets", None)      # not installed
    write(here / "one.jsonl", GOOD)
    with pytest.raises(UserError, match=message):
        run(**settings)


def some_rows(seed, most, sides):
    rng = np.random.default_rng(seed)
    return [Row(rng.integers(1, 50, rng.integers(1, most)),
                tuple(rng.integers(1, 50, rng.integers(1, most)) for _ in range(sides)))
            for _ in range(9)]


@pytest.mark.parametrize("sides", [1, 2, 3])
def test_the_groups_of_a_batch_hold_every_token_once_and_places_find_them(sides):
    rows = some_rows(sides, 12, sides)
    batch = make_batch(rows, likelihoods=None)
    joined = torch.cat([group.tokens.flatten() for group in batch.groups])
    every = np.concatenate([part for row in rows for part in (row.prompt, *row.responses)])
    assert sorted(joined[joined > 0].tolist()) == sorted(every)
    responses = [row.responses[side] for side in range(sides) for row in rows]
    assert batch.lengths.tolist() == batch.owners.bincount().tolist() == list(map(len, responses))
    before = [part for side in range(sides) for row in rows
              for part in (row.prompt[-1:], row.responses[side][:-1])]
    assert joined[batch.sources].tolist() == np.concatenate(before).tolist()
    for found in (batch.targets, joined[batch.places[batch.mask]]):
        assert found.tolist() == np.concatenate(responses).tolist()
    assert make_batch(rows, 3).owners.unique().tolist() == [0, 1, 2]
    one_side = Row(np.array([7]), (np.array([], int), np.array([4, 5])))
    assert make_batch([one_side]).groups[0].segments is None     # the causal mask is enough


def test_targets_put_each_probability_on_its_link_and_an_empty_side_nowhere():
    mask, links = make_targets([[np.array([.1, .2, .3]), np.array([.4])], [[], np.array([.5, .6])]])
    assert mask.int().tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert links.numpy() == pytest.approx(np.array([[.2, .3], [0, 0], [0, 0], [.6, 0]]))


def test_every_row_is_evaluated_once_and_every_pair_is_trained_on_once_an_epoch():
    rows = some_rows(5, 30, 2)
    batches = in_batches(rows, tokens=150)
    assert sorted(sum(batches, [])) == list(range(9)) and len(batches) > 1
    assert all(len(some) * max(rows[i].size for i in some) <= 150 for some in batches)
    drawn = [i for step in range(7) for i in batch_of(step, 7, 3, seed=1)]
    epochs = [drawn[k:k + 7] for k in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1]
    assert batch_of(5, 7, 3, seed=1) == drawn[15:18] != batch_of(5, 7, 3, seed=2)
