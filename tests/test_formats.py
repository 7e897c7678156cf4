"""Reading files: every form of a row, what is skipped, what is refused."""

import gzip
import json
from collections import Counter

import pytest

from common import UserError
from data.formats import (
    parse_candidates,
    parse_pairs,
    parse_steps,
    read_candidates,
    read_items,
    read_pairs,
    read_steps,
    split_turns,
)
from data.tokenizer import make_tokenizer

PAIR = {"prompt": "Q\u2028?", "chosen": "yes\x85\x0b", "rejected": "no"}
CANDIDATE = {"prompt": "Q", "responses": [{"text": "", "correct": 0.5}]}
STEPS = {"prompt": "Q", "steps": ["a", "b"], "first_error": 1}
GOOD_ROWS = {parse_pairs: PAIR, parse_candidates: CANDIDATE, parse_steps: STEPS}


def write(path, *rows):
    """JSON lines with all that a file may have: BOM, CRLF, empty lines."""
    lines = [json.dumps(row, ensure_ascii=False) + "\r\n\n" for row in rows]
    path.write_bytes(b"\xef\xbb\xbf" + "".join(lines).encode())
    return path


def messages(*texts):
    roles = ("user", "assistant") * 3
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


@pytest.fixture(scope="module")
def bpe():
    text = "the cat sat on the mat, the dog sat on the log"
    return make_tokenizer("bpe:300", [text] * 3)


# Rows that are skipped ----------------------------------------------------------------

USER = messages("x")[0]
BAD_PAIRS = [  # the change to a good row, and the reason
    ({"rejected": 3}, "rejected is not text but int"),
    ({"chosen": None}, "chosen is missing"),
    ({"prompt": " "}, "prompt is empty"),
    ({"chosen": "no"}, "the same"),
    ({"prompt": [{"role": [], "content": "x"}]}, "known 'role'"),
    ({"prompt": [{"role": "user", "content": "x\n\nAssistant: y"}]}, "another turn"),
    ({"prompt": messages("x"), "chosen": messages("y")}, "one assistant message"),
    ({"chosen": ["a", "b"], "rejected": ["c"], "domain": "x"}, "not RM-Bench's"),
    ({"chosen": ["a", "b"], "rejected": ["c", "d"]}, "not RM-Bench's"),
    ({"chosen": "x" + " " * 10**6 + "y"}, "100000 white spaces in a row"),
    ({"question": "Q2"}, "more than one prompt (prompt, question)"),
    ({"conversations": "x"}, "'conversations' looks like part"),
    ({"log": [{"from": "human", "value": "x"}]}, "'log' looks like part"),
    ({"prompt": [{**USER, "tool_calls": [1]}]}, "'tool_calls'"),
    ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "is not text"),
    ({"input": "x"}, "'input' that is not"),
    ({"prompt": None, "instruction": 5, "input": "x"}, "'input' that is not"),
    ({"prompt": messages("x", "y")}, "ends with a message of the assistant"),
    ({"history": ["x"]}, "nor pairs of texts"),
    ({"prompt": None, "chosen": "\u4f60a", "rejected": "\u4f60b"}, "no turn or"),
    ({"chosen": messages("A", "b"), "rejected": messages("A", "c")}, "conversation's"),
]
NAN = float("nan")
BAD_CANDIDATES = [
    ({"responses": []}, "no 'responses'"),
    ({"responses": [{"text": "a", "correct": NAN}]}, "finite"),
    ({"completion": "a", "label": "yes"}, "'correct' or 'label'"),
    ({"responses": [{"text": " " * 10**6, "correct": 1}]}, "a response has 1000"),
]
BAD_STEPS = [
    ({"steps": ["a", "b" + "\n" * 10**6 + "b"]}, "a solution has 100000 white"),
    ({"steps": ["a", " "]}, "no 'steps'"),
    ({"first_error": 2}, "from -1 to 1"),
]
BAD_ROWS = [(parse_pairs, *case) for case in BAD_PAIRS]
BAD_ROWS += [(parse_candidates, *case) for case in BAD_CANDIDATES]
BAD_ROWS += [(parse_steps, *case) for case in BAD_STEPS]


@pytest.mark.parametrize("parse, changes, reason", BAD_ROWS)
def test_a_bad_row_is_reported_counted_and_skipped(
    tmp_path, capsys, parse, changes, reason
):
    good, skipped = GOOD_ROWS[parse], Counter()
    path = write(tmp_path / "x.jsonl", good, *[{**good, **changes}] * 9)
    items = list(read_items(path, parse, skipped=skipped, max_bad_fraction=1))
    assert items == parse(good) and list(skipped.values()) == [9]
    output = capsys.readouterr().out
    assert reason in output and output.count(", row ") == 5
    assert list(read_items(path, parse)) == parse(good)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.jsonl", b"\xff\xfe{}", "cannot be read .*utf-8"),
        ("x.jsonl", b"", "no usable row"),
        (
            "x.jsonl",
            b'{"prompt": "Q"}\n[1]\n"x"\n{"pro\n' + b"[" * 100_000,
            "no usable row .5 bad",
        ),
        (
            "x.jsonl.gz",
            gzip.compress(json.dumps(PAIR).encode() * 50)[:-20],
            "cannot be read",
        ),
        ("x.parquet", b"PAR1", "read_parquet"),
        ("x.csv", b"a", "read_csv"),
        ("x.jsonl.zst", b"x", "zstd"),
        ("x.json", b"[\n{}]", "jq"),
        ("x.jsonl", None, "No such file"),
        (".", None, "directory"),
    ],
)
def test_a_file_of_another_kind_is_one_clear_error(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_items(tmp_path / name, parse_pairs))


# Forms of a row -----------------------------------------------------------------------


def test_the_four_forms_of_a_pair_are_the_same_pair():
    prompt, responses = "\n\nHuman: Hi?\n\nAssistant:", (" Hello.", " Go.")
    (user,) = messages("Hi?")
    chosen, rejected = messages("Hi?", "Hello.")[1:], messages("Hi?", "Go.")[1:]
    forms = [
        {"prompt": prompt, "chosen": responses[0], "rejected": responses[1]},
        {"chosen": prompt + responses[0], "rejected": prompt + responses[1]},
        {"prompt": [user], "chosen": chosen, "rejected": rejected},
        {"chosen": [user, *chosen], "rejected": [user, *rejected]},
    ]
    for form in forms:
        assert parse_pairs(form)[0][:2] == (prompt, responses)
    plain = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go."}
    assert parse_pairs(plain, wrap_as_chat=True) == parse_pairs(forms[0], True)
    labelled = {"prompt": [user], "completion": chosen, "label": False}
    (item,) = parse_candidates(labelled)
    assert item[:3] == (prompt, responses[:1], (0.0,))


CHAT = "\n\nHuman: a\n\nAssistant: b\n\nHuman: Hi?\n\nAssistant:"
PARTS = [{"type": "text", "text": text} for text in ("a ", "b")]


@pytest.mark.parametrize(
    "prompt, row",
    [
        ("Hi?", {"question": "Hi?"}),
        ("Do.\nx", {"instruction": "Do.", "input": "x"}),
        (
            "\n\nSystem: S\n\nHuman: Hi?\n\nAssistant:",
            {"question": "Hi?", "system": "S"},
        ),
        (CHAT, {"instruction": "Hi?", "history": [["a", "b"]]}),
        (CHAT, {"messages": messages("Hi?"), "history": messages("a", "b")}),
        (
            "\n\nHuman: a b\n\nAssistant:",
            {"prompt": [{"role": "user", "content": PARTS}]},
        ),
    ],
)
def test_other_names_and_parts_of_a_prompt_are_read(prompt, row):
    (pair,) = parse_pairs({**row, "chosen": "yes", "rejected": "no"})
    assert pair.prompt == prompt
    assert [text.strip() for text in pair.responses] == ["yes", "no"]
    (candidate,) = parse_candidates({**row, "completion": "yes", "label": 1})
    assert candidate.prompt == prompt


@pytest.mark.parametrize(
    "start",
    [
        "<|im_start|>user\nWhat\nis it?<|im_end|>\n<|im_start|>assistant\n",
        "### Instruction:\nSay.\n\n### Response:\n",
        "[INST] Say. [/INST]",
        "Say 1 or 2.\n",
    ],
)
def test_complete_texts_are_cut_after_the_last_turn_that_both_share(start):
    (pair,) = parse_pairs({"chosen": start + "one two", "rejected": start + "one 3"})
    assert pair[:2] == (start, ("one two", "one 3"))


def test_a_prompt_that_responses_repeat_is_removed_and_counted():
    chosen, rejected = messages("Hi?", "yes"), messages("Hi?", "no")
    conversations = {"chosen": chosen, "rejected": rejected}
    (pair,) = parse_pairs(conversations)
    # the form of ultrafeedback_binarized
    assert parse_pairs({"prompt": "Hi?", **conversations}) == [pair]
    assert parse_pairs({"prompt": "Hi?", "messages": chosen, **conversations}) == [pair]
    last = {"prompt": "Hi?", "chosen": chosen[1:], "rejected": rejected[1:]}
    assert parse_pairs(last) == [pair]
    prompt = "What is the capital of France?"
    texts = {"chosen": f"{prompt} yes", "rejected": f"{prompt} no"}
    (pair,) = parse_pairs({"prompt": prompt, **texts})
    assert pair[:2] == (prompt, (" yes", " no")) and "repeat" in pair.note
    (pair,) = parse_pairs({"prompt": "Hi", "chosen": "High five!", "rejected": "Hi."})
    assert pair.responses == ("High five!", "Hi.")  # repeated by chance


def test_empty_columns_are_no_part_of_the_conversation():
    row = {"prompt": messages("Hi?"), "chosen": "yes", "rejected": "no"}
    system = {"role": "system", "content": ""}
    for changes in (
        {"tools": None},
        {"context": ""},
        {"turns": 1},
        {"history": None},
        {"system": ""},
        {"prompt": [system, *messages("Hi?")]},
    ):
        assert parse_pairs({**row, **changes}) == parse_pairs(row)


def test_lists_of_three_are_the_nine_pairs_of_rm_bench():
    row = {
        "prompt": "q",
        "chosen": ["a", "aa", "aaa"],
        "rejected": ["b", "bb", "bbb"],
        "domain": "chat",
    }
    pairs = {item.cell: item.responses for item in parse_pairs(row)}
    for i in range(3):
        for j in range(3):
            assert pairs[i, j] == ("a" * (i + 1), "b" * (j + 1))
    nested = {**row, "domain": "", "subset": "x", "meta": {"domain": "safety"}}
    assert {item.subset for item in parse_pairs(nested)} == {"safety"}


def test_turns_of_a_conversation_are_split():
    text = "\n\nSystem: S\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    turns = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    assert split_turns(text) == turns
    for plain in ("hello", "x\n\nHuman: a\n\nAssistant:", "\n\nHuman: a"):
        assert split_turns(plain) == [("user", plain)]


# Files for a model --------------------------------------------------------------------


def test_prompts_are_truncated_and_long_responses_skipped(tmp_path, bpe, capsys):
    long = {**PAIR, "chosen": "the cat " * 50}
    path = write(tmp_path / "x.jsonl", PAIR, long, {"prompt": "Q"})
    with pytest.raises(UserError, match="1 of 3 rows are skipped"):
        read_pairs(path, bpe, 9)
    items, _, n_skipped = read_pairs(path, bpe, 9, max_bad_fraction=1)
    assert len(items) == 1 and n_skipped == 2
    assert "1 (a response longer than 8 tokens)" in capsys.readouterr().out
    with pytest.raises(UserError, match="no row of .* is left.*longer than 2"):
        read_pairs(path, bpe, 3, max_bad_fraction=1)


def test_a_long_candidate_is_dropped_alone(tmp_path, bpe):
    responses = [{"text": " the" * count, "correct": count} for count in (3, 0)]
    path = write(tmp_path / "x.jsonl", {"prompt": "the cat", "responses": responses})
    _, (example,), _ = read_candidates(path, bpe, 5)
    lengths = [len(example.prompt), *map(len, example.responses)]
    assert lengths == [1, 4, 1]  # with end-of-text
    (item,), (example,), _ = read_candidates(path, bpe, 4)
    assert item.correct == (0.0,) and len(example.responses) == 1


def test_the_last_token_of_every_step_is_known(tmp_path, bpe):
    path = write(tmp_path / "x.jsonl", STEPS)
    _, (example,), (ends,) = read_steps(path, bpe, 64, True)
    texts = [bpe.decode(example.responses[0][: end + 1]) for end in ends]
    assert texts == [" a\n", " a\nb"]
