"""Evaluation: exact counts, independence of the batch, and the truth of the toy world."""
import json

import numpy as np
import pytest
import torch

import compare
import evaluate
from config import UserError, parse
from conftest import plain_rewards
from data.batches import load_pairs, pair_rows
from data.prepare import open_dataset
from data.toy.truth import compare_with_truth
from data.toy.world import World


def main(*arguments):
    evaluate.main(parse(evaluate.EvalConfig, list(arguments)))


@pytest.fixture
def loaded(inside):
    model, tokenizer, checkpoint = evaluate.load_reward_model("out/run", "cpu")
    return model, tokenizer, load_pairs(open_dataset("toy").path("val"), tokenizer, 160)


def test_a_tie_is_wrong_and_counted():
    found = evaluate.pair_accuracy([1.0, 2.0, 0.0, 5.0], [0.0, 2.0, 1.0, 4.0])
    assert (found["accuracy"], found["ties"], found["n"]) == (0.5, 1, 4)


def test_wilson_interval_against_its_definition():
    """The interval's ends are the proportions from which the observed one is 1.96 standard errors away."""
    for successes, n in ((0, 5), (3, 10), (50, 50), (431, 1000)):
        for end in evaluate.wilson(successes, n):
            assert abs(successes / n - end) == pytest.approx(1.96 * (end * (1 - end) / n) ** 0.5, abs=1e-12)


def test_rewards_are_the_same_at_any_batch_size_and_in_any_order(loaded):
    model, _, data = loaded
    rows = pair_rows(data.rows)
    reference = evaluate.score(model, rows, "cpu", batch_size=64)
    for batch_size in (1, 7):
        found = evaluate.score(model, rows[::-1], "cpu", batch_size)[::-1]
        assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(reference, found))
    assert [len(r) for r in reference] == [len(row.response) for row in rows]


def test_equal_rows_are_read_once_and_scored_alike(loaded):
    model, _, data = loaded
    rows = [data.rows[0][0], data.rows[1][0], data.rows[0][0]]
    first, _, again = evaluate.score(model, rows, "cpu")
    assert first is again


def test_evaluation_leaves_training_mode_and_the_random_stream_alone(loaded):
    model, _, data = loaded
    model.train()
    state = torch.get_rng_state()
    evaluate.score(model, pair_rows(data.rows), "cpu")
    assert model.training and torch.equal(state, torch.get_rng_state())


def test_the_truth_itself_has_correlation_one_and_no_leak(loaded):
    """A reward whose sigmoid is the exact value: perfect calibration, correlation 1, no credit on remarks."""
    _, tokenizer, data = loaded
    rows = pair_rows(data.rows)
    traces = [World().trace(row.response.tolist(), tokenizer.encode, tokenizer.end_of_text) for row in rows]
    logit = [np.array([np.log(v / (1 - v)) for _, v, _, _ in trace]) for trace in traces]
    centre = np.concatenate(logit).mean()
    found = compare_with_truth(World(), rows, [x - centre for x in logit], tokenizer)
    assert found["correlation"] > 0.99 and found["credit_leak"] == pytest.approx(0, abs=1e-9)
    noise = [np.random.default_rng(0).normal(size=len(x)) for x in logit]
    found = compare_with_truth(World(), rows, noise, tokenizer)
    assert abs(found["correlation"]) < 0.1 and 0.7 < found["credit_leak"] < 1.4


def test_a_file_of_pairs_is_scored_by_subset_and_bad_rows_are_counted(inside, tmp_path, capsys):
    path, out = tmp_path / "pairs.jsonl", tmp_path / "o.json"
    rows = [{"prompt": "How?", "chosen": " a b", "rejected": " c", "subset": name} for name in ("x", "y", "x", "")]
    rows += [{"prompt": "How?", "chosen": " a", "rejected": 1}, {"prompt": "How?", "chosen": "w " * 400, "rejected": "c"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main("--checkpoint=out/run/ckpt.pt", f"--data={path}", f"--json={out}")
    found = json.loads(out.read_text())
    assert (found["n"], found["skipped"], found["longer_accuracy"]) == (4, 2, 1.0)
    assert {name: part["n"] for name, part in found["subsets"].items()} == {"x": 2, "y": 1, "(none)": 1}
    assert {"accuracy", "ties"} <= set(found)
    first = out.read_bytes()
    main("--checkpoint=out/run/ckpt.pt", f"--data={path}", f"--json={out}", "--batch_size=1")
    assert json.loads(out.read_text())["accuracy"] == found["accuracy"]
    main("--checkpoint=out/run/ckpt.pt", f"--data={path}", f"--json={out}")
    assert out.read_bytes() == first


def test_the_datasets_own_splits_are_the_ones_that_training_reported(inside, tmp_path):
    main("--checkpoint=out/run", f"--json={tmp_path / 'o.json'}")
    reported = json.loads((inside / "out/run/eval.json").read_text())["splits"]
    assert json.loads((tmp_path / "o.json").read_text())["splits"] == reported


def test_rewards_that_are_not_finite_are_an_error_that_names_the_pair(loaded):
    model, _, data = loaded
    model.score.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="a reward of pair .*How is .* is not finite"):
        evaluate.evaluate_pairs(model, data, "cpu")


def test_compare_pairs_runs_by_seed(inside, capsys, tmp_path):
    values = {("none", 0): 0.5, ("none", 1): 0.7, ("icrm", 0): 0.6, ("icrm", 1): 0.9}
    for (name, seed), accuracy in values.items():
        (tmp_path / f"{name}{seed}").mkdir()
        (tmp_path / f"{name}{seed}" / "eval.json").write_text(json.dumps(
            {"settings": {"regularizer": name, "reg_weight": 0.5, "seed": seed, "dataset": "d"}, "splits": {"val": {"accuracy": accuracy}}}))
    folders = [str(tmp_path / f"{name}{seed}") for name, seed in values]
    main("--compare=" + ",".join(folders), f"--json={tmp_path / 'runs.json'}")
    assert [run["seed"] for run in json.loads((tmp_path / "runs.json").read_text())] == [0, 1, 0, 1]
    with pytest.raises(UserError, match="named before"):
        main(f"--compare={folders[0]},{folders[0]}")
    printed = capsys.readouterr().out
    half = 12.706 * 0.05     # two differences, 0.1 and 0.2: standard error 0.05
    assert printed.startswith("regularizer ") and f"+0.150 +-{half:.3f}" in printed and "0.600" in printed


def test_students_t_against_the_printed_table():
    for degrees, value in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert compare.student_t(degrees) == pytest.approx(value, abs=5e-3 * value)


def test_compare_and_checkpoint_errors_are_one_line(inside, tmp_path):
    with pytest.raises(UserError, match="eval.json is missing"):
        main("--compare=out/nowhere,out/run")
    with pytest.raises(UserError, match="no checkpoint"):
        main("--checkpoint=out/nowhere")
    with pytest.raises(UserError, match="name a reward model"):
        main()
    with pytest.raises(UserError, match="holds no reward model"):
        main("--checkpoint=out/toy-generator")
    cut, text = tmp_path / "cut.pt", tmp_path / "text.pt"
    cut.write_bytes((inside / "out/run/ckpt.pt").read_bytes()[:5000])
    text.write_text("hello")
    for path in (cut, text):
        with pytest.raises(UserError, match="is not a checkpoint"):
            main(f"--checkpoint={path}")


def test_rm_bench_real_file(inside, real_data, tmp_path):
    main("--checkpoint=out/run", f"--data={real_data / 'rmbench_chat.jsonl'}", "--as_dialogue=True",
         f"--json={tmp_path / 'o.json'}")
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["n"] + found["skipped"] == 9 * 129
    assert set(found["subsets"]) == {"chat"}


def test_rm_bench_of_a_reward_that_likes_style(loaded, monkeypatch, tmp_path):
    """Rewards of 10 for being chosen and 4 for each step of style: the matrix cell by cell, on the file's own form."""
    model, tokenizer, _ = loaded
    worth = {"a0": 10.0, "a1": 14.0, "a2": 18.0, "b0": 0.0, "b1": 12.0, "b2": 16.0}
    rows = [{"prompt": f"Q{i}", "chosen": [f" a{j}" for j in range(3)], "rejected": [f" b{j}" for j in range(3)],
             "meta": {"domain": "chat"}, "subset": "x"} for i in range(4)]
    data = load_pairs(write(tmp_path / "rm.jsonl", rows), tokenizer, 160)
    monkeypatch.setattr(evaluate, "score", lambda model, rows, device, batch_size, name: [
        np.array([worth[tokenizer.decode(row.response).strip()]]) for row in rows])
    found = evaluate.evaluate_pairs(model, data, "cpu")[0]["rm_bench"]["chat"]
    assert found["matrix"] == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert (found["easy"], found["normal"], found["hard"]) == (1.0, pytest.approx(1.0), 0.0)


REWARDBENCH = [{"prompt": f"How? {i}", "chosen": f" a b {i}", "rejected": f" c {i}", "subset": name, "id": i}
               for i, name in enumerate(("mt-bench-easy", "mt-bench-med", "refusals-offensive", "mine", "mt-bench-easy"))]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rewardbench_files_examples_and_sections(inside, tmp_path, capsys):
    path, out = write(tmp_path / "rb.jsonl", REWARDBENCH), tmp_path / "examples.jsonl"
    command = ["--checkpoint=out/run", f"--data={path}", f"--json={tmp_path / 'o.json'}", f"--examples={out}",
               f"--rewardbench={tmp_path / 'results'}"]
    main(*command)
    printed = capsys.readouterr().out
    assert "RewardBench  Chat" in printed and "subsets of no section: mine" in printed and "math-prm" in printed
    found = json.loads((tmp_path / "o.json").read_text())
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["subset"]) for row in rows] == [(str(r["id"]), r["subset"]) for r in REWARDBENCH]
    right = [row["chosen_reward"] > row["rejected_reward"] for row in rows]
    assert sum(right) / 5 == found["accuracy"] and all(row["chosen_tokens"] >= 4 and not row["truncated"] for row in rows)
    chat = (28 * (right[0] + right[4]) / 2 + 40 * right[1]) / 68
    assert found["rewardbench"]["sections"]["Chat"] == pytest.approx(chat)
    scores = json.loads((tmp_path / "results/eval-set-scores/run.json").read_text())
    assert scores["results"] == [int(x) for x in right] and scores["text_chosen"][0] == "How? 0 a b 0" and scores["model"] == "run"
    grouped = json.loads((tmp_path / "results/eval-set/run.json").read_text())
    assert grouped["mt-bench-easy"] == (right[0] + right[4]) / 2 and grouped["Chat"] == pytest.approx(chat)
    first = out.read_bytes(), (tmp_path / "o.json").read_bytes()
    main(*command)
    assert first == (out.read_bytes(), (tmp_path / "o.json").read_bytes())
    main(*command, "--batch_size=1")
    for a, b in zip(rows, map(json.loads, out.read_text().splitlines())):
        assert a["chosen_reward"] == pytest.approx(b["chosen_reward"], abs=1e-5) and a["id"] == b["id"]


def test_two_models_on_the_same_pairs_are_compared_pair_by_pair(inside, tmp_path, capsys):
    records = lambda wins: [{"id": str(i), "subset": "", "chosen_reward": float(win), "rejected_reward": 0.5} for i, win in enumerate(wins)]
    a, b = write(tmp_path / "a.jsonl", records([1] * 9 + [0] * 2 + [1] * 5)), write(tmp_path / "b.jsonl", records([0] * 9 + [1] * 2 + [1] * 5))
    main(f"--compare={a},{b}", f"--json={tmp_path / 'o.json'}")
    _, second = json.loads((tmp_path / "o.json").read_text())
    assert (second["only_first"], second["only_this"]) == (9, 2) and second["difference"] == pytest.approx(-7 / 16)
    assert second["low"] < -7 / 16 < second["high"] < 0.1 and second["p"] == pytest.approx(0.0654, abs=1e-4)
    with pytest.raises(UserError, match="other pairs"):
        main(f"--compare={a},{write(tmp_path / 'c.jsonl', records([1] * 3))}")
    with pytest.raises(UserError, match="not written by"):
        main(f"--compare={a},{write(tmp_path / 'd.jsonl', [{'x': 1}])}")


def test_steps_are_read_from_one_pass_and_the_threshold_from_another_file(inside, tmp_path, capsys):
    rows = [{"prompt": "How is it?", "steps": [" first one", "second", "third two"], "first_error": i % 4 - 1, "subset": "xy"[i % 2]}
            for i in range(8)]
    test, val = write(tmp_path / "test.jsonl", rows), write(tmp_path / "val.jsonl", rows[:5])
    main("--checkpoint=out/run", f"--steps={test}", f"--threshold_from={val}", f"--json={tmp_path / 'o.json'}")
    found = json.loads((tmp_path / "o.json").read_text())
    assert (found["(all)"]["wrong"], found["(all)"]["right"], found["left_out"]) == (6, 2, 0) and {"x", "y"} <= set(found)
    model, tokenizer, _ = evaluate.load_reward_model("out/run", "cpu")
    config = evaluate.EvalConfig()
    _, rewards, _ = evaluate.step_rewards(model, test, tokenizer, "cpu", config)
    for k in range(3):      # the reward after step k is that of the response cut there
        text = "\n".join(rows[0]["steps"][:k + 1]) + ("\n" if k < 2 else "")
        tokens = tokenizer.encode(rows[0]["prompt"]) + [t for step in text.splitlines(keepends=True) for t in tokenizer.encode(step)]
        assert rewards[0][k] == pytest.approx(plain_rewards(model, torch.tensor([tokens]))[0, -1].item(), abs=1e-5)
    for more in ([], [f"--threshold_from={test}"]):
        with pytest.raises(UserError, match="another file of steps"):
            main("--checkpoint=out/run", f"--steps={test}", *more)


def test_shown_pairs_are_plain_off_a_terminal_and_coloured_on_one(loaded, capsys):
    _, tokenizer, data = loaded
    rewards = [np.linspace(-4, 4, len(row.response)) for row in pair_rows(data.rows)]
    evaluate.show_pairs(data, rewards, tokenizer, 2, coloured=False)
    plain = capsys.readouterr().out
    assert data.pairs[0].chosen in plain and data.pairs[1].rejected in plain and "\033" not in plain and data.pairs[2].chosen not in plain
    evaluate.show_pairs(data, rewards, tokenizer, 1, coloured=True)
    assert "\033[48;5;33;" in (shown := capsys.readouterr().out) and "\033[48;5;208;" in shown
