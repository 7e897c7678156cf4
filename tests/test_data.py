"""Reading, checking, tokenising and batching."""
import gzip
import importlib
import json
import sys

import numpy as np
import pytest

import data.prepare
from config import UserError, parse
from data import tokenizer as tokenizers
from data.batches import (collate, in_length_order, load_contrasts, load_pairs, load_responses, make_row,
                          training_indices)
from data.pairs import contrasts, read_candidates, read_labelled, read_pairs, read_steps

GOOD = {"prompt": "Q?", "chosen": "yes", "rejected": "no"}


def write(path, *rows, raw=b""):
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows) + raw)
    return path


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.make("bpe:300", ["the cat sat on the mat, the dog sat on the log"] * 3)


@pytest.mark.parametrize("row, reason", [
    ({"chosen": "a", "rejected": 3}, "rejected is not text but int"),
    ({"prompt": "Q", "chosen": True, "rejected": "b"}, "chosen is not text but bool"),
    ({"prompt": "Q", "rejected": "b"}, "no 'chosen'"),
    ({"prompt": "Q", "chosen": "a"}, "no 'rejected'"),
    ({"prompt": " ", "chosen": "a", "rejected": "b"}, "prompt is empty"),
    ({"prompt": "Q", "chosen": "\n", "rejected": "b"}, "chosen is empty"),
    ({"prompt": "Q", "chosen": "a", "rejected": "a"}, "the same"),
    ({"prompt": None, "chosen": "a", "rejected": "b"}, "prompt is missing"),
    ({"prompt": 7, "chosen": "a", "rejected": "b"}, "prompt is not text but int"),
    ({"prompt": "Q", "chosen": ["a", "b"], "rejected": ["c"]}, "2 chosen and 1 rejected"),
    ({"prompt": "Q", "chosen": [], "rejected": []}, "chosen is not text but list"),
    ({"chosen": "entirely", "rejected": "different"}, "prompt is empty"),
    ({"prompt": [{"role": "alien", "content": "x"}], "chosen": "a", "rejected": "b"}, "known 'role'"),
    ({"prompt": [{"role": [], "content": "x"}], "chosen": "a", "rejected": "b"}, "known 'role'"),
    ({"prompt": [{"role": "user", "content": ""}], "chosen": "a", "rejected": "b"}, "content is empty"),
    ([1, 2], "a list where an object"),
    ("text", "a str where an object"),
])
def test_a_bad_row_is_reported_counted_and_left_out(tmp_path, capsys, row, reason):
    path = write(tmp_path / "pairs.jsonl", GOOD, row)
    pairs, bad = read_pairs(path)
    assert (len(pairs), bad) == (1, 1)
    assert "row 2" in (printed := capsys.readouterr().out) and reason in printed
    with pytest.raises(UserError, match="row 2"):
        read_pairs(path, strict=True)


def test_broken_json_is_a_bad_row_and_only_the_first_few_are_shown(tmp_path, capsys):
    path = write(tmp_path / "pairs.jsonl", GOOD, raw=b'{"prompt": "Q", "cho\n' * 9)
    pairs, bad = read_pairs(path)
    assert (len(pairs), bad) == (1, 9)
    assert (printed := capsys.readouterr().out).count("broken JSON") == 5 and "4 more bad rows" in printed


@pytest.mark.parametrize("content, message", [
    (b"\xff\xfe{}", "not UTF-8"), (b"not json\n", "no JSON lines"), (b"", "no JSON lines"),
    (b'{"prompt": "Q"}\n', "no usable row"),
])
def test_a_file_that_is_no_pair_file_is_one_clear_error(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_pairs(tmp_path / "x.jsonl")


def test_missing_file_folder_and_damaged_gzip(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="a folder"):
        read_pairs(tmp_path)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode() * 50)[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        read_pairs(tmp_path / "x.jsonl.gz")


def test_line_separators_inside_texts_and_crlf_line_ends_read_correctly(tmp_path):
    row = {"prompt": "a\u2028b", "chosen": "c\u0085d\x0b", "rejected": "e\u2029"}
    line = json.dumps(row, ensure_ascii=False).encode()
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\r\n")
    pairs, bad = read_pairs(tmp_path / "x.jsonl")
    assert bad == 0 and len(pairs) == 2
    assert (pairs[0].prompt, pairs[0].chosen, pairs[0].rejected) == ("a\u2028b", "c\u0085d\x0b", "e\u2029")


def test_the_four_forms_of_a_pair_are_the_same_pair(tmp_path):
    user = [{"role": "user", "content": "Hi?"}]
    said = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "Hello."), ("rejected", "Go."))}
    forms = [
        {"prompt": "\n\nHuman: Hi?\n\nAssistant:", "chosen": " Hello.", "rejected": " Go."},
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi?\n\nAssistant: Go."},
        {"prompt": user, **said},
        {name: user + reply for name, reply in said.items()},
    ]
    pairs, bad = read_pairs(write(tmp_path / "x.jsonl", *forms))
    assert bad == 0 and len(set(pairs)) == 1
    assert pairs[0].prompt + pairs[0].chosen == "\n\nHuman: Hi?\n\nAssistant: Hello."


def test_an_implicit_prompt_is_cut_between_words(tmp_path):
    path = write(tmp_path / "x.jsonl", {"chosen": "2 + 2 is four", "rejected": "2 + 2 is fish"})
    assert read_pairs(path)[0][0].prompt == "2 + 2 is"


def test_lists_of_three_become_nine_pairs_with_their_cells(tmp_path):
    path = write(tmp_path / "x.jsonl", {"prompt": "Q", "chosen": ["a", "b", "c"], "rejected": ["x", "y", "z"], "domain": "chat"})
    cells = {pair.cell: (pair.chosen, pair.rejected) for pair in read_pairs(path)[0]}
    assert cells == {(i, j): (a, x) for i, a in enumerate("abc") for j, x in enumerate("xyz")}
    assert {pair.subset for pair in read_pairs(path)[0]} == {"chat"}


@pytest.mark.parametrize("row, reason", [
    ({"prompt": "Q", "steps": [], "first_error": -1}, "no 'steps'"), ({"prompt": "Q", "steps": ["a", " "], "first_error": 0}, "no 'steps'"),
    ({"prompt": "Q", "steps": ["a"], "first_error": 1}, "from -1 to 0"), ({"prompt": "Q", "steps": ["a"]}, "first_error"),
    ({"prompt": "Q", "steps": ["a"], "first_error": True}, "first_error"), ({"steps": ["a"], "first_error": 0}, "prompt is missing"),
])
def test_bad_steps_are_reported(tmp_path, capsys, row, reason):
    found, bad = read_steps(write(tmp_path / "x.jsonl", {"prompt": "Q", "steps": ["a", "b"], "first_error": 1}, row))
    assert bad == 1 and (found[0].steps, found[0].first_error) == (("a", "b"), 1) and reason in capsys.readouterr().out


def test_candidates_are_checked(tmp_path, capsys):
    rows = [{"prompt": "Q", "responses": [{"text": "a", "correct": True}, {"text": "b", "correct": 0.5}]},
            {"prompt": "Q", "responses": []}, {"prompt": "Q", "responses": [{"text": "a"}]},
            {"prompt": "Q", "responses": [{"text": 3, "correct": True}]}, {"prompt": "", "responses": [{"text": "a", "correct": 1}]},
            {"prompt": "Q", "responses": [{"text": "a", "correct": float("nan")}]},
            {"prompt": "Q", "responses": [{"text": "a", "correct": 10 ** 400}]}]
    candidates, bad = read_candidates(write(tmp_path / "x.jsonl", *rows))
    assert bad == 6 and candidates[0].correct == (1.0, 0.5)


def test_bpe_round_trips_any_text(bpe):
    for text in ("the cat", "naïve café ²½ ‿_x 𝔘𝔫𝔦", "a\u2028b\r\n\t  c", "<|endoftext|>", "'twas she'll", "\ud800 lone"):
        tokens = bpe.encode(text)
        assert bpe.end_of_text not in tokens
        assert bpe.decode(tokens) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_bpe_merges_the_most_frequent_neighbours_first(bpe):
    assert len(bpe.encode(" the")) == 1 and bpe.vocab_size <= 300
    slow, words = [], [list(map(chr, word.encode())) for word in [" sat"] * 6 + [" the"] * 9 + ["the"] * 3]
    for _ in range(3):   # a slow twin: count all neighbours again for every merge
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        slow.append("".join(best))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = ["".join(best)]
                i += 1
    ranks = tokenizers.train_bpe([" sat"] * 6 + [" the"] * 9 + ["the"] * 3, 259)
    assert [token.decode() for token, rank in sorted(ranks.items(), key=lambda item: item[1]) if rank >= 256] == slow


def test_pieces_put_a_character_of_several_tokens_at_its_last(bpe):
    text = "the cat \u2028 s\u00e4t \U0001f600!"
    tokens = bpe.encode(text)
    pieces = bpe.pieces(tokens + [bpe.end_of_text])
    assert "".join(pieces) == text and len(pieces) == len(tokens) + 1 and "" in pieces and pieces[-1] == ""


def test_a_tokenizer_travels_as_a_dictionary_and_a_changed_one_is_refused(bpe):
    saved = bpe.to_dict()
    assert tokenizers.from_dict(saved).encode("the cat sat") == bpe.encode("the cat sat")
    with pytest.raises(UserError, match="fingerprint"):
        tokenizers.from_dict(dict(saved, fingerprint="0" * 64))


def test_gpt2_without_a_network_says_what_to_do(monkeypatch):
    def refuse(name):
        raise ConnectionError("no network")
    monkeypatch.setattr(tokenizers.tiktoken, "get_encoding", refuse)
    with pytest.raises(UserError, match="--tokenizer=bpe:4096"):
        tokenizers.make("gpt2", [])
    with pytest.raises(UserError, match="unknown tokenizer"):
        tokenizers.make("words", [])
    with pytest.raises(UserError, match="at least 257"):
        tokenizers.make("bpe:12", [])


def test_a_long_prompt_loses_its_oldest_tokens_and_a_response_is_never_cut(bpe):
    prompt, response = "the cat sat on the mat", " on the log"
    whole = make_row(prompt, response, bpe, 100)
    size = len(whole.response) + 2
    cut = make_row(prompt, response, bpe, size)
    assert not whole.truncated and cut.truncated and len(cut) == size
    assert np.array_equal(cut.response, whole.response) and np.array_equal(cut.prompt, whole.prompt[-2:])
    assert whole.response[-1] == bpe.end_of_text
    assert make_row(prompt, response, bpe, len(whole.response)) is None


def test_pairs_too_long_for_the_context_are_counted(tmp_path, bpe, capsys):
    path = write(tmp_path / "x.jsonl", GOOD, dict(GOOD, chosen="the cat " * 50), {"prompt": "Q"})
    data = load_pairs(path, bpe, 30)
    assert len(data.rows) == 1 and data.skipped == 2
    assert "left out 1 bad rows and 1 with a response longer" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of its pairs fits"):
        load_pairs(path, bpe, 3)


def test_a_batch_marks_response_tokens_and_puts_each_probability_on_its_link(bpe):
    rows = [make_row("the cat", " sat", bpe, 50), make_row("the dog on", " the log mat", bpe, 50)]
    probs = [np.linspace(0.1, 0.9, len(row.response), dtype=np.float32) for row in rows]
    batch = collate(rows, probs)
    for i, row in enumerate(rows):
        assert batch.mask[i].nonzero().flatten().tolist() == list(range(len(row.prompt), len(row)))
        assert batch.last[i] == len(row) - 1
        assert np.array_equal(batch.probs[i][batch.mask[i, 1:]], probs[i])
    assert batch.probs[~batch.mask[:, 1:]].abs().sum() == 0


def test_every_row_is_evaluated_once_and_every_pair_is_trained_on_once_an_epoch():
    rows = [range(n) for n in (5, 1, 9, 3, 3, 7, 2)]
    assert sorted(i for part in in_length_order(rows, 3) for i in part) == list(range(7))
    drawn = [i for step in range(7) for i in training_indices(step, 7, 3, seed=1)]
    assert all(sorted(drawn[epoch * 7:epoch * 7 + 7]) == list(range(7)) for epoch in range(3))
    assert training_indices(5, 7, 3, seed=1) == drawn[15:18] != training_indices(5, 7, 3, seed=2)


def test_any_jsonl_becomes_a_dataset_with_no_prompt_in_both_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(data.prepare, "DATA", tmp_path / "data")
    source = write(tmp_path / "mine.jsonl", *[dict(GOOD, prompt=f"Question {i // 2}?", chosen=f"yes {i}") for i in range(80)])
    data.prepare.main(parse(data.prepare.PrepareConfig, ["--name=mine", f"--input={source}", "--tokenizer=bpe:300",
                                                         "--val_share=0.25"]))
    dataset = data.prepare.open_dataset("mine")
    folder = dataset.folder
    prompts = {split: {pair.prompt for pair in read_pairs(dataset.path(split))[0]} for split in ("train", "val")}
    assert dataset.kind == "pairs" and prompts["train"] and prompts["val"] and not prompts["train"] & prompts["val"]
    assert not list(folder.glob(".prepare*")) and not list(folder.glob(".dataset*"))


CANDIDATES = [{"prompt": f"Question {i}?", "responses": [{"text": f"yes {j}", "correct": j < i % 3} for j in range(3)]}
              for i in range(40)]


def test_candidates_become_labelled_responses_split_by_prompt_and_the_rest_goes_to_best_of_n(tmp_path, monkeypatch):
    monkeypatch.setattr(data.prepare, "DATA", tmp_path / "data")
    source = write(tmp_path / "mine.jsonl", *CANDIDATES)
    data.prepare.main(parse(data.prepare.PrepareConfig, ["--name=mine", f"--input={source}", "--tokenizer=bpe:300",
                                                         "--val_share=0.25"]))
    dataset = data.prepare.open_dataset("mine")
    train, val = (read_labelled(dataset.path(split))[0] for split in ("train", "val"))
    held_out, _ = read_candidates(dataset.path("candidates"))
    assert dataset.kind == "labels" and len(train) + len(val) == 120
    assert {item.prompt for item in held_out} == {item.prompt for item in val}
    assert not {item.prompt for item in train} & {item.prompt for item in val}
    found = load_responses(dataset, "train", 100)
    assert len(found) == len(train) == len(found.rows) and found.chosen == sum(item.label for item in train)
    assert found.batch_rows([found.chosen, 0, found.chosen - 1]) == ([0, found.chosen - 1, found.chosen], 2)
    expected = sum(sum(item.correct) * (3 - sum(item.correct)) for item in held_out)
    assert len(load_contrasts(dataset, "val", 100).rows) == expected == len(contrasts(val))
    # the written labelled rows are a form of input themselves
    data.prepare.main(parse(data.prepare.PrepareConfig, ["--name=again", f"--input={dataset.path('train')}", "--tokenizer=bpe:300",
                                                         "--val_share=0.5"]))
    assert data.prepare.open_dataset("again").kind == "labels"
    with pytest.raises(UserError, match="correct or not"):
        CANDIDATES[0]["responses"][0]["correct"], kept = 0.5, CANDIDATES[0]["responses"][0]["correct"]
        source = write(tmp_path / "graded.jsonl", *CANDIDATES)
        CANDIDATES[0]["responses"][0]["correct"] = kept
        data.prepare.main(parse(data.prepare.PrepareConfig, ["--name=graded", f"--input={source}", "--tokenizer=bpe:300"]))


@pytest.mark.parametrize("row, reason", [
    ({"prompt": "Q", "completion": "a"}, "no 'label'"), ({"prompt": "Q", "completion": "a", "label": "yes"}, "no 'label'"),
    ({"prompt": "Q", "completion": "a", "label": 2}, "no 'label'"), ({"prompt": "Q", "label": True}, "completion is missing"),
    ({"completion": "a", "label": True}, "prompt is missing"), ({"prompt": "Q", "completion": " ", "label": 1}, "is empty"),
])
def test_a_bad_labelled_row_is_reported(tmp_path, capsys, row, reason):
    path = write(tmp_path / "x.jsonl", {"prompt": "Q", "completion": "a", "label": 1}, row)
    found, bad = read_labelled(path)
    assert (len(found), bad, found[0].label) == (1, 1, True) and reason in capsys.readouterr().out


def test_messages_are_labelled_responses_too(tmp_path):
    path = write(tmp_path / "x.jsonl", {"prompt": [{"role": "user", "content": "hi"}],
                                        "completion": [{"role": "assistant", "content": "yes"}], "label": False})
    item, = read_labelled(path)[0]
    assert (item.prompt, item.completion, item.label) == ("\n\nHuman: hi\n\nAssistant:", " yes", False)


def test_gsm8k_rows_are_one_problem_and_its_models_solutions():
    from data.gsm8k.prepare import parse as parse_gsm8k
    from data.pairs import BadRow
    row = {"question": "1+1?", "ground_truth": "2", "6b_finetuning": {"solution": "A: 3", "is_correct": False},
           "175b_verification": {"solution": "A: 2", "is_correct": True}}
    item, = parse_gsm8k(row)
    assert (item.prompt, item.responses, item.correct, item.answers) == ("1+1?", ("A: 3", "A: 2"), (0.0, 1.0), ("3", "2"))
    assert parse_gsm8k({"prompt": "1+1?", "responses": [{"text": "A: 2", "correct": True}]})[0].correct == (1.0,)
    from data.gsm8k.prepare import final_answer
    assert [final_answer(text) for text in ("x\nA: $1,200", "A: 3\nA: 4 dogs", "no line")] == ["1200", "4 dogs", "none"]
    with pytest.raises(BadRow, match="none of 6b_finetuning"):
        parse_gsm8k({"question": "1+1?"})
    with pytest.raises(BadRow, match="without 'correct'"):
        parse_gsm8k(dict(row, **{"6b_finetuning": {"solution": "A: 3"}}))


def test_gsm8k_real_file(real_data):
    from data.gsm8k.prepare import parse as parse_gsm8k
    from data.pairs import read_rows
    found, bad = read_rows(real_data / "gsm8k_model_solutions.jsonl", parse_gsm8k, strict=False)
    assert len(found) + bad == 1319 and sum(sum(item.correct) for item in found) / sum(len(item.correct) for item in found) \
        == pytest.approx(0.3793, abs=1e-3)


def conversation(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, texts)]


def test_unified_feedback_drops_equal_ratings_first_and_then_keeps_every_so_many(tmp_path, monkeypatch):
    from data.unified_feedback import prepare as unified
    monkeypatch.setattr(data.prepare, "DATA", tmp_path / "data")
    rows = [{"id": i, "source": "s", "conv_A": conversation(f"question {i}", f"good {i}"), "conv_B": conversation(f"question {i}", f"bad {i}"),
             "conv_A_rating": float(i % 3), "conv_B_rating": 1.0} for i in range(60)]
    source = write(tmp_path / "rows.jsonl", *rows, {"conv_A": [], "conv_B": []})
    unified.main(parse(unified.UnifiedConfig, [f"--input={source}", "--every=2", "--tokenizer=bpe:300", "--val_share=0.3"]))
    dataset = data.prepare.open_dataset("unified_feedback")
    pairs = [pair for split in ("train", "val") for pair in read_pairs(dataset.path(split))[0]]
    unequal = [i for i in range(60) if i % 3 != 1]
    assert sorted(int(pair.id) for pair in pairs) == unequal[::2]
    for pair in pairs:
        i = int(pair.id)
        assert pair.prompt == f"\n\nHuman: question {i}\n\nAssistant:" and pair.subset == "s"
        assert pair.chosen == (f" good {i}" if i % 3 == 2 else f" bad {i}")


def test_skywork_rows_are_two_conversations_with_a_common_start(tmp_path, monkeypatch):
    from data.skywork import prepare as skywork
    monkeypatch.setattr(data.prepare, "DATA", tmp_path / "data")
    rows = [{"chosen": conversation("hi", "hello", f"q{i}", "yes"), "rejected": conversation("hi", "hello", f"q{i}", "no"), "source": "magpie"}
            for i in range(30)]
    skywork.main(parse(skywork.SkyworkConfig, [f"--input={write(tmp_path / 'rows.jsonl', *rows)}", "--tokenizer=bpe:300", "--val_share=0.3"]))
    pair = read_pairs(data.prepare.open_dataset("skywork").path("train"))[0][0]
    assert pair.prompt.startswith("\n\nHuman: hi\n\nAssistant: hello\n\nHuman: q") and (pair.chosen, pair.rejected) == (" yes", " no")


def test_benchmarks_are_checked_and_kept_as_they_are(tmp_path, monkeypatch, capsys):
    from data.rewardbench import prepare as rewardbench
    from data.rm_bench import prepare as rm_bench
    monkeypatch.setattr(data.prepare, "DATA", tmp_path / "data")
    pair = {"id": 1, "prompt": "q", "chosen": "a", "rejected": "b", "subset": "alpacaeval-easy"}
    styles = {"id": 1, "prompt": "q", "chosen": ["a", "aa", "aaa"], "rejected": ["b", "bb", "bbb"], "domain": "chat"}
    for module, name, row, count in ((rewardbench, "rewardbench", pair, 1), (rm_bench, "rm_bench", styles, 9)):
        source = write(tmp_path / f"{name}.jsonl", row)
        module.main(parse(module.BenchmarkConfig, [f"--input={source}"]))
        found, _ = read_pairs(tmp_path / "data" / name / "test.jsonl", as_dialogue=True)
        assert len(found) == count and found[0].prompt == "\n\nHuman: q\n\nAssistant:" and f"{count} pairs" in capsys.readouterr().out
        assert found[0].subset == row.get("subset", row.get("domain"))


@pytest.mark.parametrize("name", ["hh_rlhf", "unified_feedback", "skywork", "rewardbench", "rm_bench"])
def test_a_hub_that_cannot_be_reached_says_what_to_do(name, monkeypatch):
    script = importlib.import_module(f"data.{name}.prepare")
    settings = next(value for key, value in vars(script).items() if key.endswith("Config"))
    monkeypatch.setitem(sys.modules, "datasets", None)      # not installed
    with pytest.raises(UserError, match="could not be downloaded .*--input=FILE"):
        script.main(settings())


def test_the_name_of_a_dataset_with_its_own_prepare_py_is_refused(tmp_path):
    with pytest.raises(UserError, match="data/toy/prepare.py"):
        data.prepare.main(parse(data.prepare.PrepareConfig, ["--name=toy", "--input=x"]))
    with pytest.raises(UserError, match="--input=FILE"):
        data.prepare.main(parse(data.prepare.PrepareConfig, ["--name=mine"]))


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden"])
def test_a_dataset_name_that_is_no_folder_name_is_refused(name):
    with pytest.raises(UserError, match="one folder"):
        data.prepare.open_dataset(name)


def test_an_unknown_dataset_says_how_to_make_it():
    with pytest.raises(UserError, match="python data/prepare.py --name=nowhere"):
        data.prepare.open_dataset("nowhere")


def test_hh_rlhf_dialogues_are_cut_before_the_last_reply(tmp_path):
    from data.hh_rlhf.prepare import parse as parse_hh
    from data.pairs import BadRow
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    pair, = parse_hh({"chosen": text + " yes", "rejected": text + " no"})
    assert (pair.prompt, pair.chosen, pair.rejected) == (text, " yes", " no")
    with pytest.raises(BadRow, match="part before"):
        parse_hh({"chosen": text + " yes", "rejected": text.replace("c", "d") + " no"})
    with pytest.raises(BadRow, match="missing"):
        parse_hh({"chosen": text})


def test_hh_rlhf_real_file(real_data):
    from data.hh_rlhf.prepare import parse as parse_hh
    from data.pairs import read_rows
    pairs, bad = read_rows(real_data / "raw" / "hh_harmless_base_test.jsonl.gz", parse_hh, strict=False)
    known = {(pair.prompt, pair.chosen, pair.rejected) for pair in read_pairs(real_data / "hh_harmless_base_test.jsonl")[0]}
    assert len(pairs) + bad == 2312 and {(pair.prompt, pair.chosen, pair.rejected) for pair in pairs} == known
