"""Evaluation: exact counts, independence of the batch, and the truth of the toy world."""
import json
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import bon
import dpo
import evaluate
import pretrained
import report
from config import UserError, parse
from conftest import save_edited
from data import rows as rows_of_data
from data.dataset import open_dataset
from data.files import fingerprint, load_checkpoint, read_json, write_json
from data.rows import Row, in_batches


def main(*arguments):
    evaluate.main(parse(evaluate.EvalConfig, list(arguments)))


@pytest.fixture
def loaded(inside):
    """The workspace's reward model, its tokenizer and the rows of val."""
    model, tokenizer, _ = evaluate.load_reward_model("out/run", "cpu")
    return model, tokenizer, list(open_dataset("toy").split("val"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain_rewards(model, prompt, response):
    """The rewards of one response, read from its prompt's start, without padding or company."""
    tokens = torch.tensor([*map(int, prompt), *map(int, response)])
    hidden = model.model(tokens[None], torch.arange(len(tokens))[None])[0]
    return (hidden @ model.score.weight[0])[len(prompt):].detach().numpy()


# Scores -----------------------------------------------------------------------------------------

def test_rewards_do_not_depend_on_batch_mates_and_scoring_disturbs_nothing(loaded):
    model, _, rows = loaded
    model.train()
    state = torch.get_rng_state()
    whole = evaluate.score(model, rows)
    assert model.training and torch.equal(state, torch.get_rng_state())

    def few(some, tokens=100, *more):
        return in_batches(some, tokens, *more)

    with mock.patch.object(rows_of_data, "in_batches", few):
        in_parts = evaluate.score(model, rows[::-1])[::-1]
    for row, a, b in zip(rows, whole, in_parts):
        for response, first, second in zip(row.responses, a, b, strict=True):
            assert np.allclose(first, plain_rewards(model, row.prompt, response), atol=1e-5)
            assert np.allclose(first, second, atol=1e-5) and len(first) == len(response)


def test_a_reward_that_is_not_finite_is_an_error_that_names_the_row(loaded):
    model, _, rows = loaded
    poison = int(rows[7].responses[1][-2])
    model.model.embed_tokens.weight.data[poison] = float("nan")
    first = next(i for i, row in enumerate(rows, 1) if poison in np.concatenate(row.responses))
    with pytest.raises(UserError, match=f"a reward of row {first} is not finite"):
        evaluate.score(model, rows)


# Accuracy ---------------------------------------------------------------------------------------

def test_a_tie_is_wrong_and_counted_and_so_are_repeated_pairs():
    rows = [Row(np.array([i]), (np.array([1, 2, i]), np.array([3]))) for i in range(4)]
    rewards = [[np.array([9, 9, c]), np.array([r])] for c, r in ((1, 0), (2, 2), (0, 1), (5, 4))]
    found = evaluate.evaluate_pairs(rows, rewards)
    assert (found["accuracy"], found["ties"], found["n"], found["prompts"]) == (0.5, 1, 4, 4)
    assert (found["duplicates"], found["longer_accuracy"], found["margin"]) == (0, 1.0, 0.25)
    twice = evaluate.evaluate_pairs(rows * 2, rewards * 2)
    assert (twice["duplicates"], twice["n"]) == (4, 8)
    assert (twice["low"], twice["high"]) == pytest.approx((found["low"], found["high"]))


def test_labels_are_scored_one_by_one_and_against_each_other_as_loops_do():
    """Labelled responses to three prompts, with random rewards, some of them equal."""
    rng, nothing = np.random.default_rng(0), np.array([], int)
    labels, final = rng.random(40) < 0.4, rng.integers(-3, 4, 40)
    rows, rewards = [], []
    for i, label in enumerate(labels):
        response, r = np.array([1, i]), np.array([9, final[i]])
        rows.append(Row(np.array([i % 3]), (response, nothing) if label else (nothing, response)))
        rewards.append([r, nothing] if label else [nothing, r])
    found = evaluate.evaluate_labels(rows, rewards)
    right = [r > 0 if label else r < 0 for r, label in zip(final, labels)]
    assert found["accuracy"] == pytest.approx(np.mean(right)) and found["correct"] == labels.sum()
    assert found["ties"] == (final == 0).sum() > 0
    higher = [(a > b) + 0.5 * (a == b) for a in final[labels] for b in final[~labels]]
    assert found["auc"] == pytest.approx(np.mean(higher))
    pairs, their_rewards = zip(*evaluate.contrasts(rows, rewards))
    assert sorted((a[-1], b[-1]) for _, (a, b), _ in pairs) == [
        (i, j) for i in range(40) for j in range(40)
        if labels[i] and not labels[j] and i % 3 == j % 3]
    for row, (ra, rb) in zip(pairs, their_rewards):
        assert [ra[-1], rb[-1]] == [final[part[-1]] for part in row.responses]
    same = np.array([1])        # one text of both labels is no contrast
    both = [Row(same, (same, nothing)), Row(same, (nothing, same))]
    assert evaluate.contrasts(both, [[same, nothing], [nothing, same]]) == []


# Distance from the truth ------------------------------------------------------------------------

@pytest.fixture
def truth(inside):
    """Exact values and kinds of val's responses, pair by pair."""
    dataset = open_dataset("toy")
    split, names = dataset.split("val"), ("exact-value", "kind")
    return [[part for i in range(len(split)) for part in split.of_responses(array, i)]
            for array in (dataset.array("val", name) for name in names)]


def test_the_truth_itself_has_correlation_one_no_leak_and_accuracy_one(truth):
    logits = [np.log(V.astype(float) / (1 - V)) for V in truth[0]]
    found = evaluate.compare_with_truth(logits, *truth)
    assert found["correlation"] > 0.99 and found["credit_leak"] == pytest.approx(0, abs=1e-5)
    assert found["oracle"] == 1.0


def test_the_distance_from_the_truth_equals_loops(truth):
    rewards = [np.random.default_rng(len(V)).normal(size=len(V)) for V in truth[0]]
    found = evaluate.compare_with_truth(rewards, *truth)
    everything = [r for part in rewards for r in part]
    mean, bins, jumps, pairs = sum(everything) / len(everything), {}, {0: [], 1: [], 2: []}, []
    for r, V, kind in zip(rewards, *truth):
        for t in range(len(r)):
            z = 1 / (1 + np.exp(mean - r[t]))
            pairs.append((z, float(V[t])))
            bins.setdefault(int(z * 10), []).append(pairs[-1])
            jumps[kind[t]].append(abs(r[t] - r[t - 1]) if t else 0.0)
    error = sum(abs(sum(z - V for z, V in part)) for part in bins.values()) / len(pairs)
    assert found["calibration_error"] == pytest.approx(error, abs=1e-9)
    assert found["credit_leak"] == pytest.approx(np.mean(jumps[1]) / np.mean(jumps[2]))
    assert found["correlation"] == pytest.approx(np.corrcoef(*zip(*pairs))[0, 1])


def test_the_datasets_own_splits_are_the_ones_that_training_reported(inside, tmp_path):
    main("--checkpoint=out/run", f"--json={tmp_path / 'o.json'}")
    reported = json.loads(Path("out/run/eval.json").read_text())["splits"]
    assert json.loads((tmp_path / "o.json").read_text())["splits"] == reported
    again = tmp_path / "again" / "eval.json"    # as whoever evaluates a run anew writes it
    main("--checkpoint=out/run", f"--json={again}")
    main(f"--compare=out/run,{again.parent}")
    write_json(again, {"accuracy": 0.5})
    with pytest.raises(UserError, match="eval.json is of a file, not of the run's own splits"):
        main(f"--compare=out/run,{again.parent}")
    digests = open_dataset("toy").about["digests"]      # other held-out data are other data
    assert read_json("out/run/eval.json", "")["data"] == fingerprint(digests)


@pytest.mark.parametrize("script", [
    lambda path: main(f"--checkpoint={path}"),
    lambda path: report.open_model(path, "cpu"),
    lambda path: bon.main(bon.BonConfig(path, device="cpu")),
    lambda path: dpo.main(dpo.DPOConfig(path, out_dir="out/never", device="cpu"))])
def test_a_dataset_that_was_made_anew_is_no_held_out_data(inside, tmp_path, script):
    checkpoint = load_checkpoint("out/run", "reward model")
    checkpoint["inputs"]["data"] = "another"        # as if prepared again since
    save_edited(checkpoint, tmp_path / "earlier.pt")
    with pytest.raises(UserError, match="data/toy was made anew since the model was trained"):
        script(str(tmp_path / "earlier.pt"))


@pytest.mark.parametrize("script", [
    lambda path: report.main(report.ReportConfig(path, device="cpu")),
    lambda path: bon.main(bon.BonConfig(path, device="cpu")),
    lambda path: pretrained.main(pretrained.ExportConfig(path, path + "-export")),
    lambda path: dpo.main(dpo.DPOConfig(path, out_dir="out/never", device="cpu"))])
def test_a_generator_that_was_made_anew_is_no_longer_the_reward_models(inside, tmp_path, script):
    checkpoint = load_checkpoint("out/run", "reward model")
    checkpoint["inputs"]["p"] = "generator another"
    save_edited(checkpoint, tmp_path / "earlier.pt")
    with pytest.raises(UserError, match="out/toy-generator was made anew since it gave"):
        script(str(tmp_path / "earlier.pt"))


# Files and runs ---------------------------------------------------------------------------------

def test_a_file_of_pairs_is_scored_by_subset_and_bad_rows_are_counted(inside, tmp_path, capsys):
    """Its first four prompts differ only where they are cut; nine cells are one prompt."""
    subsets = "mt-bench-easy", "mt-bench-med", "refusals-offensive", "mine", "mt-bench-easy", ""
    rows = [{"id": i, "prompt": f"{i % 4}" + " How?" * 300, "chosen": f" a b {i}",
             "rejected": f" c {i}", "subset": name} for i, name in enumerate(subsets)]
    rows += [{"prompt": "Q", "chosen": ["a", "ab", "abc"], "rejected": ["b", "bc", "bcd"],
              "domain": "chat"}]
    bad = [{"rejected": 1}, {"prompt": "How?", "chosen": "w " * 400, "rejected": "c"}]
    path, out = write(tmp_path / "rb.jsonl", rows + bad), tmp_path / "o.json"
    main("--checkpoint=out/run/ckpt.pt", f"--data={path}", f"--json={out}", "--skip_bad=True")
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "RewardBench  Chat" in printed and "of no section: (none), chat, mine" in printed
    assert (found["n"], found["left_out"], found["prompts"]) == (15, 2, 5)
    assert [part["n"] for _, part in sorted(found["subsets"].items())] == [1, 9, 1, 2, 1, 1]
    assert [pair["id"] for pair in found["pairs"]][:6] == list("012345")
    right = [pair["chosen"] > pair["rejected"] for pair in found["pairs"]]
    assert sum(right) / 15 == pytest.approx(found["accuracy"])
    chat = (28 * (right[0] + right[4]) / 2 + 40 * right[1]) / 68
    assert found["rewardbench"]["sections"]["Chat"] == pytest.approx(chat)
    for pair, won in zip(found["pairs"][6:], right[6:], strict=True):
        style, other = pair["cell"]
        assert found["rm_bench"]["chat"]["matrix"][style][other] == won


def test_steps_are_read_in_one_pass_and_the_threshold_from_another_file(inside, tmp_path):
    rows = [{"prompt": "How is it?", "steps": [" first one", "second", "third two"],
             "first_error": i % 4 - 1, "subset": "xy"[i % 2]} for i in range(8)]
    test, val = write(tmp_path / "test.jsonl", rows), write(tmp_path / "val.jsonl", rows[:5])
    model, tokenizer, _ = evaluate.load_reward_model("out/run", "cpu")
    out, command = tmp_path / "o.json", ["--checkpoint=out/run", f"--steps={test}"]
    with mock.patch.object(evaluate, "best_threshold", return_value=0.0) as choose:
        main(*command, f"--threshold_from={val}", f"--json={out}")
    (rewards, errors), found = choose.call_args.args, read_json(out, "evaluate.py")
    assert errors == [-1, 0, 1, 2, -1] and found.keys() == {"(all)", "x", "y"}
    assert (found["(all)"]["wrong"], found["(all)"]["right"]) == (6, 2)
    prompt, *steps = map(tokenizer.encode, ("How is it?", " first one\n", "second\n", "third two"))
    for k in range(3):      # the reward after step k is that of the response cut there
        plain = plain_rewards(model, prompt, sum(steps[:k + 1], []))
        assert rewards[0][k] == pytest.approx(plain[-1], abs=1e-5)
    only = write(tmp_path / "only.jsonl", rows[:1])
    for path, message in ((test, "another file"), (only, "all of one kind")):
        with pytest.raises(UserError, match=message):
            main(*command, f"--threshold_from={path}")


def test_runs_stand_side_by_side_with_their_differences_to_the_first(tmp_path, capsys):
    for name, accuracy, data, made in (
            ("none", 0.5, "toy", "first"), ("icrm", 0.75, "toy", "first"),
            ("dense", 0.25, "toy", "first"), ("other", 0.9, "mine", "its"),
            ("later", 0.9, "toy", "later")):
        write_json(tmp_path / name / "eval.json", {
            "splits": {"val": {"accuracy": accuracy}}, "settings": {"dataset": data}, "data": made})
    main("--compare=" + ",".join(f"{tmp_path}/{name}" for name in ("none", "icrm", "dense")))
    head, line, _ = capsys.readouterr().out.splitlines()
    assert head.split() == ["none", "icrm", "dense"]
    assert line.split() == "val accuracy 0.500 0.750 (+0.250) 0.250 (-0.250)".split()
    for name, which in (("other", "mine (its), toy (first)"), ("later", "toy (first), toy (lat")):
        with pytest.raises(UserError, match=re.escape(f"datasets are not compared: {which}")):
            main(f"--compare={tmp_path}/none,{tmp_path}/{name}")


@pytest.mark.parametrize("arguments, message", [
    ("--compare=out/nowhere,out/run", "eval.json is missing"),
    ("--checkpoint=out/nowhere", "no checkpoint"), ("--json=x", "name a reward model"),
    ("--checkpoint=out/toy-generator", "holds no reward model"),
    ("--checkpoint=out/cut.pt", "no checkpoint, or cut short"),
    ("--checkpoint=out/run --data=a --steps=b", "one thing at a time"),
    ("--checkpoint=out/run --threshold_from=b", "one thing at a time"),
    ("--checkpoint=out/run --data=nowhere.jsonl", "nowhere.jsonl")])
def test_mistakes_are_one_line_errors(inside, arguments, message):
    Path("out/cut.pt").write_bytes(Path("out/run/ckpt.pt").read_bytes()[:5000])
    with pytest.raises(UserError, match=message):
        main(*arguments.split())
