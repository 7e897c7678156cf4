"""The objective and the loop."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import generator
import train
from config import UserError
from conftest import quick_generator, save_edited, small_run
from data.dataset import dataset_folder, open_dataset, write_dataset
from data.files import load_checkpoint
from data.rows import batch_of
from evaluate import load_reward_model, score
from generator import load_generator
from model import RewardModel, update
from regularizer import icrm
from test_generator import kill_after

ROOT = Path(train.__file__).parent


def run(out_dir, **more):
    train.main(small_run(out_dir, **more))


def command(out_dir, **more):
    """The arguments of `python train.py` for the same run."""
    settings = vars(small_run(out_dir, **more)).items()
    return [str(ROOT / "train.py"), *(f"--{key}={value}" for key, value in settings)]


def execute(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def log_of(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def results_of(folder):
    return json.loads(Path(folder, "eval.json").read_text())["splits"]


def same_weights(folder, other, within=0.0):
    first, second = (load_checkpoint(each, "reward model")["model"] for each in (folder, other))
    return all((value - second[name]).abs().max() <= within for name, value in first.items())


@pytest.fixture
def labelled(inside):
    """data/labelled: the workspace's toy pairs as responses with labels."""
    if not Path("data/labelled").exists():
        toy, rows = open_dataset("toy"), []
        for name in ("train", "val"):
            split = toy.split(name)
            for prompt, responses, _ in (split[i] for i in range(len(split))):
                prompt, first, second = map(toy.tokenizer.decode, (prompt, *responses))
                rows += [(name, prompt, first, None), (name, prompt, None, second)]
        write_dataset(dataset_folder("labelled"), rows, ("train", "val"), toy.tokenizer,
                      toy.block_size, "labels")
        quick_generator("labelled", "out/labelled-generator")
    return inside


# The objective ----------------------------------------------------------------------------------

def naive_terms(model, dataset, p, items):
    """L_SFT, L_BT and L_reg with its scale, every response read alone from its prompt's start."""
    split = dataset.split("train")
    n, lm, rewards = len(items), [], torch.zeros(2 * len(items), 160)
    mask, probs = rewards > 0, rewards[:, 1:].clone()
    for row in range(2 * n):
        i, side = items[row % n], row // n
        (prompt, responses, _), length = split[i], int(split.lengths[i, 1 + side])
        if length:
            tokens = torch.tensor([*prompt.tolist(), *responses[side].tolist()])
            hidden = model.model(tokens[None], torch.arange(len(tokens))[None])[0, len(prompt) - 1:]
            scores = hidden[1:] @ model.score.weight[0]
            rewards[row, :length] = scores if model.readout == "last" else 0.1 * scores.cumsum(0)
            mask[row, :length] = True
            probs[row, :length - 1] = torch.from_numpy(split.of_responses(p, i)[side][1:])
            logprobs = model.lm_head(hidden[:-1]).log_softmax(1)
            lm += [] if side else [-logprobs.gather(1, tokens[len(prompt):, None]).mean()]
    last = torch.stack([r[m][-1] if m.any() else torch.tensor(0.0) for r, m in zip(rewards, mask)])
    margins = last[:n] - last[n:]       # of a labelled response: its own, by its label's sign
    return torch.stack(lm).mean(), -F.logsigmoid(margins).mean(), *icrm(rewards, probs, mask)


@pytest.mark.parametrize("dataset, probs, readout", [
    ("toy", "generator", "last"), ("toy", "exact", "sum"), ("labelled", "generator", "last")])
def test_the_first_steps_gradient_is_the_objectives(labelled, dataset, probs, readout):
    """L_SFT + lambda L_reg + (1 - lambda) L_BT; below its head L_SFT's gradient is a thousandth."""
    taken, generator = {}, f"out/{dataset}-generator"

    def capture(model, *arguments):
        taken.update({name: p.grad.clone() for name, p in model.named_parameters()})
        return update(model, *arguments)
    with mock.patch.object(train, "update", capture):
        run("out/gradient", dataset=dataset, probs=probs, readout=readout, steps=1,
            reg_weight=0.3, lm_weight=0.7)
    weights, _ = load_generator(generator, "cpu")
    torch.manual_seed(0)
    model, data = RewardModel.from_generator(weights, readout), open_dataset(dataset)
    p = np.load("data/toy/train-exact-p.npy" if probs == "exact" else f"{generator}/p.npy")
    items = batch_of(0, len(data.split("train")), 8, 0)
    lm, bt, penalty, scale = naive_terms(model, data, p, items)
    S, (record,) = 0.95 * 0.5 + 0.05 * scale.item(), log_of("out/gradient")
    for name, value in (("lm", lm), ("bt", bt), ("reg", penalty / S), ("S", torch.tensor(S))):
        assert record[name] == pytest.approx(value.item(), rel=1e-5), name
    names, parameters = zip(*model.named_parameters())
    gradients = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                 for loss in (lm, 0.3 * penalty / S + 0.7 * bt)]
    for name, of_lm, of_rest in zip(names, *gradients):
        share = 0.7 if name == "lm_head.weight" else 0.7e-3
        expected = sum(s * g for s, g in ((share, of_lm), (1, of_rest)) if g is not None)
        assert torch.allclose(taken[name], expected, rtol=1e-3, atol=1e-7), name


def test_lambda_is_0_for_none_whatever_the_weight(inside):
    run("out/none-a", regularizer="none", reg_weight=0.3)
    run("out/none-b", regularizer="none", reg_weight=0.9)
    run("out/icrm-0", reg_weight=0.0)
    assert log_of("out/none-a") == log_of("out/none-b")
    assert same_weights("out/none-a", "out/none-b") and same_weights("out/none-a", "out/icrm-0")
    assert not same_weights("out/none-a", "out/run")


def test_eight_pairs_are_overfitted_to_100_percent(inside):
    with mock.patch.object(train, "batch_of", return_value=list(range(8))):
        run("out/overfitted", steps=60, learning_rate=1e-2, eval_interval=100)
    last = log_of("out/overfitted")[-1]
    assert last["accuracy"] == 1 and last["bt"] < 0.1


def test_bfloat16_and_responses_of_a_token_give_a_finite_loss(inside):
    mask = torch.tensor([[True, True], [True, False]])
    for size in (1.0, 1e4):
        rewards = (size * torch.tensor([[1.0, -1.0], [1.0, 9.0]])).bfloat16().requires_grad_()
        for name, regularize in train.REGULARIZERS.items():
            for p in (0.0, 1.0):
                probs = torch.full((2, 1), p)
                reg, _ = train.normalised(*regularize(rewards, probs, mask), torch.tensor(0.5))
                bt, _ = train.bradley_terry(rewards, mask)
                gradient, = torch.autograd.grad(reg + bt, rewards)
                assert torch.isfinite(gradient).all() and torch.isfinite(reg + bt), name
    run("out/bf16", dtype="bfloat16", steps=3)
    assert all(np.isfinite(list(record.values())).all() for record in log_of("out/bf16"))


# Runs -------------------------------------------------------------------------------------------

def test_a_run_logs_every_term_and_writes_its_results(inside):
    records, splits = log_of("out/run"), results_of("out/run")
    assert [record["step"] for record in records] == [2, 4, 6, 8, 10, 12]
    assert {"step", "bt", "reg", "lm", "accuracy", "margin", "grad_norm", "learning_rate",
            "S"} == set(records[0])
    assert [record["step"] for record in records if "val_accuracy" in record] == [4, 8, 12]
    assert set(splits) == {"val", "decoupled", "swapped", "longer"} and splits["val"]["n"] == 20
    assert splits["val"]["accuracy"] == records[-1]["val_accuracy"]
    assert load_checkpoint("out/run", "reward model")["S"] == records[-1]["S"] != 0.5


@pytest.mark.parametrize("killed_at", [5, 8])
def test_a_killed_run_goes_on_to_the_same_bits(inside, killed_at):
    out = f"out/killed-{killed_at}"
    with mock.patch.object(train, "update", kill_after(train.update, killed_at)):
        with pytest.raises(KeyboardInterrupt):
            run(out)
    with open(f"{out}/log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')      # a line that was being written
    run(out, resume=True, recompute=True)
    assert log_of(out) == log_of("out/run") and same_weights(out, "out/run")
    assert results_of(out) == results_of("out/run")


def test_a_second_run_keeps_the_first_as_previous_one_generation(inside, capsys):
    for seed in (1, 2, 3):
        run("out/again", seed=seed, steps=2)
    assert capsys.readouterr().out.count("kept as out/again.previous") == 2
    for end, seed in (("", 3), (".previous", 2)):
        assert load_checkpoint(f"out/again{end}", "reward model")["settings"]["seed"] == seed


def test_a_mistake_costs_no_run(inside):
    shutil.copytree("out/run", "out/kept")
    with pytest.raises(UserError, match="--unfrozen=9, and there are"):
        run("out/kept", unfrozen=9)
    assert Path("out/kept/ckpt.pt").exists() and not Path("out/kept.previous").exists()


def test_resume_refuses_other_settings_data_and_p_by_name(inside):
    def refused(message, **more):
        with pytest.raises(UserError, match=message):
            run("out/fixed", resume=True, **more)
    refused("no checkpoint at out/fixed")
    shutil.copytree("out/run", "out/fixed")
    refused("--learning_rate=0.002, not 0.1", learning_rate=0.1)
    refused("--probs=generator, not uniform", probs="uniform")
    for name in ("data", "p", "regularizer.py"):
        checkpoint = load_checkpoint("out/run", "reward model")
        checkpoint["inputs"][name] = "of yesterday"
        save_edited(checkpoint, "out/fixed/ckpt.pt")
        refused(f"another {name} than there is now")


def test_a_generator_that_was_interrupted_goes_on_in_its_own_dtype(inside):
    quick_generator("toy", "out/g-half", dtype="bfloat16")
    Path("out/g-half/p.json").unlink()

    def here(script, **how):
        assert script == "generator.py"
        generator.main(generator.GeneratorConfig(**how))
    with mock.patch.object(train, "run_other", here):
        train.obtain_inputs(small_run("out/never", generator="out/g-half"))
    assert Path("out/g-half/p.json").exists()


def test_an_edited_regularizer_is_never_answered_with_an_old_result(inside, tmp_path):
    """The student's way, as commands: edit icrm in a copy of the repository, run train.py again."""
    for source in (*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py")):
        target = tmp_path / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    code = (tmp_path / "regularizer.py").read_text()
    code = code.replace("return penalty, scale\n", "return 7 * penalty, scale\n")
    (tmp_path / "regularizer.py").write_text(code)
    shutil.copytree("out/run", "out/student")
    _, *settings = command("out/student")
    done = execute(tmp_path / "train.py", *settings, "--resume=True")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: out/student holds a run with another regularizer.py")
    done = execute(tmp_path / "train.py", *settings)
    assert done.returncode == 0 and "kept as out/student.previous" in done.stdout, done.stderr
    old, new = log_of("out/student.previous"), log_of("out/student")
    assert old == log_of("out/run") and new[0]["reg"] > 5 * old[0]["reg"]


@pytest.mark.parametrize("step", [6, 8])        # one that is logged alone, and a look at val
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(inside, step):
    factors = iter([0.0] * (step - 2) + [float("nan")] * 2)

    def poison(rewards, probs, mask):
        return rewards.sum() * next(factors), None
    with mock.patch.dict(train.REGULARIZERS, icrm=poison):
        with pytest.raises(UserError, match=f"not finite at step {step}"):
            run("out/poisoned")
    assert load_checkpoint("out/poisoned", "reward model")["step"] == 4


@pytest.mark.parametrize("more, message", [
    (dict(steps=0), "--steps must be at least 1, not 0"),
    (dict(learning_rate="nan"), "--learning_rate must be"), (dict(seed=-1), "--seed must be"),
    (dict(reg_weight=1.5), "--reg_weight must be at least 0 and at most 1, not 1.5"),
    (dict(regularizer="icmr"), "unknown regularizer 'icmr'; choose one of: none, icrm"),
    (dict(probs="none"), "unknown probs"), (dict(readout="first"), "choose one of: last, mean"),
    (dict(dtype="float8"), "unknown dtype"), (dict(device="meta"), "choose one of: auto, cpu"),
    (dict(device="cuda:99"), "cannot be used"),
    (dict(dataset="toys", generator="out/toy-generator"), "data/toys/dataset.json is missing"),
    (dict(dataset="labelled", generator="out/toy-generator"), "other data than data/labelled"),
    (dict(dataset="labelled", probs="exact"), "is known on toy worlds alone")])
def test_a_mistake_is_one_line_and_touches_no_run(labelled, more, message):
    Path("out/bad").mkdir(exist_ok=True)
    Path("out/bad/log.jsonl").touch()
    with pytest.raises(UserError, match=message):
        run("out/bad", **more)
    assert not Path("out/bad.previous").exists()


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(inside):
    run("out/compiled", compile=True)
    for a, b in zip(log_of("out/run"), log_of("out/compiled"), strict=True):
        assert a["bt"] == pytest.approx(b["bt"], abs=1e-3)


def test_labels_and_the_readout_of_training_are_those_of_evaluation(labelled):
    """The default folder is named by what is not the paper's."""
    run("", dataset="labelled", readout="sum")
    splits = results_of("out/labelled-icrm-sum-seed0")
    assert (splits["val"]["n"], splits["val"]["correct"]) == (40, 20)
    assert splits["val pairs"]["n"] >= 20
    model, _, _ = load_reward_model("out/labelled-icrm-sum-seed0", "cpu")
    rows = [open_dataset("toy").split("val")[0]]
    found, model.readout = score(model, rows)[0][1], "last"
    assert np.allclose(found, 0.1 * np.cumsum(score(model, rows)[0][1]), atol=1e-5)


# Several processes ------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("more", [dict(dataset="toy"), dict(dataset="labelled", readout="sum")])
def test_two_processes_equal_one(labelled, more):
    run("out/one", seed=3, **more)
    done = execute("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                   *command("out/two", seed=3, **more))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote out/two") == 1                  # the first process alone prints
    for a, b in zip(log_of("out/one"), log_of("out/two"), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    assert same_weights("out/one", "out/two", within=1e-5)


def test_a_batch_that_does_not_divide_is_refused(inside):
    with mock.patch.object(train, "Team", return_value=mock.Mock(size=3)):
        with pytest.raises(UserError, match="--batch_size=8 does not divide by 3"):
            run("out/thirds")
