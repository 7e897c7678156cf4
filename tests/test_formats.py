"""Reading files: every form of a row, what is skipped, what is refused."""

import gzip
import json
from collections import Counter

import pytest

from common import UserError
from data import formats
from data.formats import (
    parse_candidates,
    parse_pairs,
    parse_steps,
    print_prompt_hint,
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
CHAT = "\n\nHuman: a\n\nAssistant: b\n\nHuman: Hi?\n\nAssistant:"
OTHER_CHAT = CHAT.replace("Hi", "Ho") + " y"
CHATML = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
BAD_PAIRS = [  # the change to a good row, and the reason
    ({"rejected": 3}, "rejected is not text but int"),
    ({"chosen": None}, "chosen is missing"),
    ({"prompt": " "}, "prompt is empty"),
    ({"chosen": "no"}, "the same"),
    ({"score_chosen": 4.0, "score_rejected": "4"}, "neither response is preferred"),
    ({"chosen-rating": 5, "rejected-rating": 5}, "neither response is preferred"),
    ({"preference_strength": 0}, "neither response is preferred"),
    ({"chosen": "[{'role': 'user', 'content': 'x'}]"}, "printed as text"),
    ({"prompt": '[{"from": "human", "value": "x"}]'}, "printed as text"),
    (
        {"prompt": None, "chosen": CHAT + " x", "rejected": OTHER_CHAT},
        "before the last",
    ),
    (
        {"prompt": CHATML.replace("<|im_end|>", "")},
        "ChatML's template with a turn that",
    ),
    ({"prompt": "<|im_start|>assistant\n"}, "without a turn of the user"),
    ({"prompt": CHATML, "chosen": f"x<|im_end|>\n{CHATML}"}, "another turn"),
    ({"prompt": [{"role": "user", "content": CHATML}]}, "another turn"),
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
    ({"steps": ["", " "]}, "all 'steps' are blank"),
    ({"steps": ["a", 1]}, "no 'steps'"),
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
        ("x.csv", b"a", "read_csv.*dtype=str, keep_default_na=False"),
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


def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_LINE", 1000)
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b"{}\n" + b" " * 10**6))
    with pytest.raises(UserError, match="line 2 is longer than 1,000 characters"):
        list(read_items(path, parse_pairs))


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
        "### Instruction:\nSay.\n\n### Response:\n",
        "[INST] Say. [/INST]",
        "Say 1 or 2.\n",
    ],
)
def test_complete_texts_are_cut_after_the_last_turn_that_both_share(start):
    (pair,) = parse_pairs({"chosen": start + "one two", "rejected": start + "one 3"})
    assert pair[:2] == (start, ("one two", "one 3"))


TEMPLATES = {
    "ChatML": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi\n?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "Llama 3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "S<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi\n?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "Zephyr": "<|system|>\nS</s>\n<|user|>\nHi\n?</s>\n<|assistant|>\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_that_a_chat_template_has_formatted_is_read_as_turns(name):
    """With a `prompt`, in complete texts, with end marks, and without the header."""
    start = TEMPLATES[name]
    end = {"ChatML": "<|im_end|>\n", "Llama 3": "<|eot_id|>", "Zephyr": "</s>\n"}[name]
    user_end = start.rindex(end) + len(end)
    header = start[user_end:]
    for row in (
        {"prompt": start, "chosen": "yes", "rejected": "no"},
        {"prompt": start, "chosen": "yes" + end, "rejected": "no" + end},
        {"chosen": start + "yes" + end, "rejected": start + "no" + end},
        {
            "prompt": start[:user_end],
            "chosen": f"{header}yes{end}",
            "rejected": f"{header}no{end}",
        },
    ):
        (pair,) = parse_pairs(row)
        assert split_turns(pair.prompt) == [("system", "S"), ("user", "Hi\n?")]
        assert pair.responses == (" yes", " no")
    mentioned = f"What does {start} mean?"  # not formatted by a template
    (pair,) = parse_pairs({"prompt": mentioned, "chosen": start, "rejected": "no"})
    assert pair[:2] == (mentioned, (start, "no"))


def test_an_empty_response_is_a_response(tmp_path, bpe):
    path = write(tmp_path / "x.jsonl", {"prompt": "Q", "chosen": "no", "rejected": ""})
    _, (example,), _ = read_pairs(path, bpe, 64)
    assert example.responses[1].tolist() == [bpe.end_of_text]
    row = {"prompt": messages("Q"), "chosen": messages("", "x")[1:], "rejected": ""}
    assert parse_pairs(row)[0].responses == (" x", "")


@pytest.mark.parametrize(
    "steps, first_error, expected",
    [
        (["a", "", "b"], 2, (["a\n", "b"], 1)),
        (["a", " ", "b"], 1, (["a\n ", "b"], 0)),
        (["", "\n", "a", "b"], 3, (["\n\n\na", "b"], 1)),
        (["", "a"], -1, (["\na"], -1)),
        (["a", "b"], 1, (["a", "b"], 1)),
    ],
)
def test_blank_steps_belong_to_their_neighbours(steps, first_error, expected):
    (item,) = parse_steps({"prompt": "Q", "steps": steps, "first_error": first_error})
    merged, merged_error = expected
    assert item.responses == ("\n".join(steps),) == ("\n".join(merged),)
    assert item.first_error == merged_error
    starts = [0, *item.ends]
    texts = [item.responses[0][a:b] for a, b in zip(starts, starts[1:])]
    assert "\n".join(merged) == "".join(texts)
    assert texts[:-1] == [step + "\n" for step in merged[:-1]]


def test_labels_may_be_text_as_in_a_converted_csv():
    for text, label in (("1", 1.0), ("0.5", 0.5), ("True", 1.0), ("false", 0.0)):
        (item,) = parse_candidates({"prompt": "Q", "completion": "a", "label": text})
        assert item.labels == (label,)


def test_keys_of_responses_that_are_not_read_are_printed(tmp_path, capsys):
    response = {"text": "a", "correct": 1, "score": 3, "model": "m"}
    path = write(tmp_path / "x.jsonl", {"prompt": "Q", "responses": [response]})
    list(read_items(path, parse_candidates, skipped=Counter()))
    output = capsys.readouterr().out
    assert "read prompt, responses. Ignored: responses." in output
    assert "responses.score" in output and "responses.model" in output


def test_pairs_with_the_same_tokens_are_skipped_and_counted(tmp_path, bpe):
    class Stripping(type(bpe)):  # as pretrained tokenizers do after "Assistant:"
        def encode_response(self, text):
            return super().encode_response(text.removeprefix(" "))

    tokenizer = Stripping("bpe:257", {bytes([i]): i for i in range(256)})
    same = {**PAIR, "chosen": " yes", "rejected": "yes"}
    path = write(tmp_path / "x.jsonl", PAIR, same)
    with pytest.raises(UserError, match="1 of 2 rows are skipped .*the same tokens"):
        read_pairs(path, tokenizer, 64)
    items, _, n_skipped = read_pairs(path, tokenizer, 64, max_bad_fraction=1)
    assert len(items) == n_skipped == 1
    candidates = {"prompt": "Q", "responses": [{"text": "a", "correct": 1}] * 2}
    path = write(tmp_path / "y.jsonl", candidates)
    _, (example,), _ = read_candidates(path, tokenizer, 64)
    assert len(example.responses) == 2  # a repeated candidate is one


def test_ties_do_not_refuse_a_file(tmp_path, bpe):
    tied = {**PAIR, "score_chosen": 1, "score_rejected": 1}
    path = write(tmp_path / "x.jsonl", PAIR, tied)
    items, _, n_skipped = read_pairs(path, bpe, 64)
    assert len(items) == n_skipped == 1


def test_a_file_with_other_prompts_than_in_training_is_noticed(bpe, capsys):
    (plain,), (chat,) = parse_pairs(PAIR), parse_pairs(PAIR, wrap_as_chat=True)
    for item, trained_on_chat, message in (
        (plain, True, "x do not. --wrap_as_chat=True adds it"),
        (chat, False, "the training prompts do not"),
        (plain, False, ""),
        (chat, True, ""),
    ):
        print_prompt_hint("x", [item] * 3, bpe, trained_on_chat)
        output = capsys.readouterr().out
        assert message in output and bool(message) == bool(output)


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
    with pytest.raises(UserError, match="1 of 2 candidates are skipped"):
        read_candidates(path, bpe, 4)
    (item,), (example,), _ = read_candidates(path, bpe, 4, max_bad_fraction=1)
    assert item.labels == (0.0,) and len(example.responses) == 1


def test_the_last_token_of_every_step_is_known(tmp_path, bpe):
    path = write(tmp_path / "x.jsonl", STEPS)
    _, (example,), (ends,), _ = read_steps(path, bpe, 64, True)
    texts = [bpe.decode(example.responses[0][: end + 1]) for end in ends]
    assert texts == [" a\n", " a\nb"]
