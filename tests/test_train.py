"""The objective, the training loop, and several processes."""

import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from common import ROOT, UserError, load_checkpoint
from conftest import copy_core, run_python, small_generator, small_run
from data.batch import BatchSchedule
from data.dataset import dataset_folder, open_dataset, write_dataset
from evaluate import load_reward_model, score
from generator import load_generator
from model import RewardModel, update
from regularizer import icrm
from test_generator import interrupt_after


def run(out_dir, **changes):
    train.main(small_run(out_dir, **changes))


def command(script, out_dir, **changes):
    """The arguments of `python train.py` for the same run."""
    settings = vars(small_run(out_dir, **changes))
    return [script, *(f"--{name}={value}" for name, value in settings.items())]


def read_log(folder):
    lines = Path(folder, "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def read_splits(folder):
    return json.loads(Path(folder, "eval.json").read_text())["splits"]


def same_weights(folder, other, tolerance=0.0):
    first = load_checkpoint(folder, "reward model")["model"]
    second = load_checkpoint(other, "reward model")["model"]
    gaps = [(value - second[name]).abs().max() for name, value in first.items()]
    return max(gaps) <= tolerance


@pytest.fixture
def labelled(inside):
    """data/labelled: the responses of the toy pairs, with labels."""
    if not Path("data/labelled").exists():
        toy, rows = open_dataset("toy"), []
        for name in ("train", "val"):
            for prompt, responses in toy.split(name):
                prompt = toy.tokenizer.decode(prompt)
                chosen, rejected = map(toy.tokenizer.decode, responses)
                rows.append((name, prompt, chosen, None))
                rows.append((name, prompt, None, rejected))
        folder = dataset_folder("labelled")
        sizes = toy.tokenizer, toy.block_size
        write_dataset(folder, rows, ("train", "val"), *sizes, kind="labels")
        small_generator("labelled", "out/labelled-generator")
    return inside


# Objective ----------------------------------------------------------------------------


def slow_terms(model, dataset, p, numbers):
    """L_SFT, L_BT and L_reg with its scale, from every response read alone."""
    split = dataset.split("train")
    n, rewards, lm_losses = len(numbers), torch.zeros(2 * len(numbers), 160), []
    mask, probs = torch.zeros(rewards.shape, dtype=torch.bool), rewards[:, 1:].clone()
    for row in range(2 * n):
        i, side = numbers[row % n], row // n
        prompt, responses = split[i]
        length = len(responses[side])
        if length == 0:
            continue
        tokens = torch.tensor([*prompt.tolist(), *responses[side].tolist()])
        positions = torch.arange(len(tokens))[None]
        hidden = model.model(tokens[None], positions)[0, len(prompt) - 1 :]
        scores = hidden[1:] @ model.score.weight[0]
        if model.prefix_reward == "sum":
            scores = 0.1 * scores.cumsum(0)
        rewards[row, :length] = scores
        mask[row, :length] = True
        p_of_response = split.response_values(p, i)[side]
        probs[row, : length - 1] = torch.from_numpy(p_of_response[1:])
        if side == 0:
            logprobs = model.lm_head(hidden[:-1]).log_softmax(1)
            targets = tokens[len(prompt) :, None]
            lm_losses.append(-logprobs.gather(1, targets).mean())
    final = torch.zeros(2 * n)
    for row in range(2 * n):
        if mask[row].any():
            final[row] = rewards[row][mask[row]][-1]
    loss_bt = -F.logsigmoid(final[:n] - final[n:]).mean()
    return torch.stack(lm_losses).mean(), loss_bt, *icrm(rewards, probs, mask)


@pytest.mark.parametrize(
    "dataset, p_source, prefix_reward",
    [
        ("toy", "generator", "last"),
        ("toy", "exact", "sum"),
        ("labelled", "generator", "last"),
    ],
)
def test_the_gradient_of_the_first_step_is_that_of_the_objective(
    labelled, dataset, p_source, prefix_reward
):
    """L_SFT + lambda L_reg + (1 - lambda) L_BT.

    Below the LM head, a thousandth of L_SFT's gradient counts.
    """
    captured = {}

    def capture(model, *arguments):
        for name, parameter in model.named_parameters():
            captured[name] = parameter.grad.clone()
        return update(model, *arguments)

    with mock.patch.object(train, "update", capture):
        run(
            "out/gradient",
            dataset=dataset,
            p_source=p_source,
            prefix_reward=prefix_reward,
            steps=1,
            seed=1,
            reg_weight=0.3,
            lm_weight=0.7,
        )
    weights, _ = load_generator(f"out/{dataset}-generator", "cpu")
    torch.manual_seed(1)
    model = RewardModel.from_generator(weights, prefix_reward)
    data = open_dataset(dataset)
    p = np.load(f"out/{dataset}-generator/p.npy")
    if p_source == "exact":
        p = np.load("data/toy/train-exact-p.npy")
    numbers = BatchSchedule(data.split("train").example_lengths, 8, seed=1)[0]
    loss_lm, loss_bt, penalty, scale = slow_terms(model, data, p, numbers)
    S = 0.95 * 0.5 + 0.05 * scale.item()
    (record,) = read_log("out/gradient")
    assert record["lm"] == pytest.approx(loss_lm.item(), rel=1e-5)
    assert record["bt"] == pytest.approx(loss_bt.item(), rel=1e-5)
    assert record["reg"] == pytest.approx(penalty.item() / S, rel=1e-5)
    assert record["S"] == pytest.approx(S, rel=1e-5)
    names, parameters = zip(*model.named_parameters())
    options = {"retain_graph": True, "allow_unused": True}
    lm_gradients = torch.autograd.grad(loss_lm, parameters, **options)
    rest = 0.3 * penalty / S + 0.7 * loss_bt
    rest_gradients = torch.autograd.grad(rest, parameters, **options)
    for name, of_lm, of_rest in zip(names, lm_gradients, rest_gradients):
        share = 0.7 if name == "lm_head.weight" else 0.7e-3
        expected = torch.zeros_like(captured[name])
        if of_lm is not None:
            expected = expected + share * of_lm
        if of_rest is not None:
            expected = expected + of_rest
        assert torch.allclose(captured[name], expected, rtol=1e-3, atol=1e-7), name


def test_the_regularizer_none_ignores_the_weight_lambda(inside):
    run("out/none-a", regularizer="none", reg_weight=0.3)
    run("out/none-b", regularizer="none", reg_weight=0.9)
    run("out/icrm-0", reg_weight=0.0)
    assert read_log("out/none-a") == read_log("out/none-b")
    assert same_weights("out/none-a", "out/none-b")
    assert same_weights("out/none-a", "out/icrm-0")
    assert not same_weights("out/none-a", "out/run")


def test_eight_pairs_are_overfitted(inside):
    schedule = mock.Mock(return_value=[np.arange(8)] * 60)
    with mock.patch.object(train, "BatchSchedule", schedule):
        run("out/overfitted", steps=60, learning_rate=1e-2, eval_interval=100)
    last = read_log("out/overfitted")[-1]
    assert last["accuracy"] == 1 and last["bt"] < 0.1


def test_losses_are_finite_for_extreme_rewards_and_short_responses(inside):
    mask = torch.tensor([[True, True], [True, False]])
    for size in (1.0, 1e4):
        rewards = size * torch.tensor([[1.0, -1.0], [1.0, 9.0]])
        rewards = rewards.bfloat16().requires_grad_()
        for name, regularizer in train.REGULARIZERS.items():
            for p in (0.0, 1.0):
                probs, S = torch.full((2, 1), p), torch.tensor(0.5)
                penalty, scale = regularizer(rewards, probs, mask)
                loss_reg, _ = train.divide_by_running_mean(penalty, scale, S)
                loss_bt, _ = train.bradley_terry(rewards, mask)
                loss = loss_reg + loss_bt
                (gradient,) = torch.autograd.grad(loss, rewards)
                assert gradient.isfinite().all() and loss.isfinite(), name
    S = torch.tensor(0.5)
    for _ in range(10_000):  # p = 0: S falls to its floor
        loss_reg, S = train.divide_by_running_mean(S * 0, S * 0, S)
    assert S == pytest.approx(train.MIN_S) and loss_reg == 0
    run("out/bf16", dtype="bfloat16", steps=3)
    for record in read_log("out/bf16"):
        assert np.isfinite(list(record.values())).all()


# Runs ---------------------------------------------------------------------------------


def test_a_run_logs_every_term_and_writes_its_results(inside):
    records, splits = read_log("out/run"), read_splits("out/run")
    assert [record["step"] for record in records] == [2, 4, 6, 8, 10, 12]
    terms = "step bt reg lm accuracy margin grad_norm learning_rate S"
    assert set(records[0]) == set(terms.split())
    evaluated = [record["step"] for record in records if "val_accuracy" in record]
    assert evaluated == [4, 8, 12]
    assert set(splits) == {"val", "decoupled", "swapped", "longer"}
    assert splits["val"]["n"] == 20
    assert splits["val"]["accuracy"] == records[-1]["val_accuracy"]
    assert load_checkpoint("out/run", "reward model")["S"] == records[-1]["S"] != 0.5


@pytest.mark.parametrize("killed_at", [5, 8])
def test_a_killed_run_resumes_to_the_same_bits(inside, killed_at):
    out = f"out/killed-{killed_at}"
    with mock.patch.object(train, "update", interrupt_after(train.update, killed_at)):
        with pytest.raises(KeyboardInterrupt):
            run(out)
    with open(f"{out}/log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # a line that was being written
    run(out, resume=True, gradient_checkpointing=True)
    assert read_log(out) == read_log("out/run") and same_weights(out, "out/run")
    assert read_splits(out) == read_splits("out/run")


def test_resuming_refuses_other_settings_data_and_p_by_name(inside):
    def refuses(message, **changes):
        with pytest.raises(UserError, match=message):
            run("out/fixed", resume=True, **changes)

    refuses("there is no checkpoint at out/fixed")
    shutil.copytree("out/run", "out/fixed", dirs_exist_ok=True)
    refuses("--learning_rate=0.002, not 0.1", learning_rate=0.1)
    refuses("--p_source=generator, not uniform", p_source="uniform")
    for name in ("data", "p", "regularizer.py"):
        checkpoint = load_checkpoint("out/run", "reward model")
        checkpoint["inputs"][name] = "of yesterday"
        torch.save(checkpoint, "out/fixed/ckpt.pt")
        refuses(f"was trained with another {name}")


def test_an_unfinished_generator_is_resumed_with_its_own_settings(inside):
    small_generator("toy", "out/g-half", dtype="bfloat16")
    Path("out/g-half/p.json").unlink()
    train.prepare_inputs(small_run("out/never", generator="out/g-half"))
    assert Path("out/g-half/p.json").exists()


def test_an_edited_regularizer_takes_effect(inside, tmp_path):
    """As a student does it: edit `icrm` in a copy, and run train.py again."""
    copy_core(tmp_path)
    code = (tmp_path / "regularizer.py").read_text()
    code = code.replace("return penalty, scale\n", "return 7 * penalty, scale\n", 1)
    (tmp_path / "regularizer.py").write_text(code)
    shutil.copytree("out/run", "out/student")
    arguments = command(tmp_path / "train.py", "out/student")
    done = run_python(*arguments, "--resume=True")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    message = "error: out/student was trained with another regularizer.py"
    assert done.stderr.startswith(message)
    done = run_python(*arguments)
    assert done.returncode == 0, done.stderr
    assert "kept in out/student/previous" in done.stdout
    old, new = read_log("out/student/previous"), read_log("out/student")
    assert old == read_log("out/run") and new[0]["reg"] > 5 * old[0]["reg"]


@pytest.mark.parametrize("step", [6, 8])  # one that is logged only, and an evaluation
def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(inside, step):
    factors = iter([0.0] * (step - 2) + [float("nan")] * 2)

    def poison(rewards, probs, mask):
        return rewards.sum() * next(factors), None

    with mock.patch.dict(train.REGULARIZERS, icrm=poison):
        # The loss at step - 1 is the first that is not finite.
        with pytest.raises(UserError, match=f"not finite at step {step - 1}"):
            run("out/poisoned")
    assert load_checkpoint("out/poisoned", "reward model")["step"] == 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "--steps must be at least 1, not 0"),
        ({"learning_rate": "nan"}, "--learning_rate must be"),
        ({"seed": -1}, "--seed must be"),
        ({"reg_weight": 1.5}, "--reg_weight must be at least 0 and at most 1, not 1.5"),
        ({"regularizer": "icmr"}, "unknown regularizer 'icmr'. Choose one of: none"),
        ({"p_source": "none"}, "unknown p_source"),
        ({"prefix_reward": "first"}, "Choose one of: last, mean"),
        ({"dtype": "float8"}, "unknown dtype"),
        ({"device": "meta"}, "Choose one of: auto, cpu"),
        ({"device": "cuda:99"}, "cannot be used"),
        ({"train_last_layers": 9}, "--train_last_layers=9, but the model has 1"),
        ({"dataset": "toys"}, "data/toys/dataset.json .* is missing"),
        ({"dataset": "labelled"}, "other data than data/labelled"),
        ({"dataset": "labelled", "p_source": "exact"}, "needs a toy dataset"),
    ],
)
def test_a_mistake_is_one_line_and_touches_no_run(labelled, changes, message):
    if not Path("out/kept").exists():
        shutil.copytree("out/run", "out/kept")
    folder = "out/labelled-generator" if "p_source" in changes else "out/toy-generator"
    with pytest.raises(UserError, match=message):
        run("out/kept", **{"generator": folder, **changes})
    for name in ("ckpt.pt", "log.jsonl", "eval.json"):
        kept, original = Path("out/kept", name), Path("out/run", name)
        assert kept.read_bytes() == original.read_bytes()


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(inside):
    run("out/compiled", compile=True)
    for record, compiled in zip(
        read_log("out/run"), read_log("out/compiled"), strict=True
    ):
        assert record["bt"] == pytest.approx(compiled["bt"], abs=1e-3)


def test_evaluation_uses_the_prefix_reward_of_training(labelled):
    """The default folder names the settings that differ from the paper's."""
    run("", dataset="labelled", prefix_reward="sum")
    splits = read_splits("out/labelled-icrm-sum-seed0")
    assert (splits["val"]["n"], splits["val"]["n_correct"]) == (40, 20)
    assert splits["val pairs"]["n"] >= 20
    model, _, _ = load_reward_model("out/labelled-icrm-sum-seed0", "cpu")
    examples = [open_dataset("toy").split("val")[0]]
    sums = score(model, examples)[0][1]
    model.prefix_reward = "last"
    expected = 0.1 * np.cumsum(score(model, examples)[0][1])
    assert np.allclose(sums, expected, atol=1e-5)


def test_epochs_set_the_steps_by_the_size_of_the_data(inside, capsys):
    run("out/epochs", epochs=1.6, steps=1)
    output = capsys.readouterr().out
    assert "12 steps of 8 pairs are 1.6 epochs of 60 pairs" in output
    assert same_weights("out/epochs", "out/run")


def test_the_evaluation_interval_changes_no_weight(inside):
    run("out/interval-100", eval_interval=100)
    assert same_weights("out/interval-100", "out/run")


# Several processes --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"dataset": "toy"}, {"dataset": "labelled", "prefix_reward": "sum"}]
)
def test_two_processes_equal_one(labelled, changes):
    run("out/one-process", seed=3, **changes)
    arguments = command(ROOT / "train.py", "out/two-processes", seed=3, **changes)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run_python(*launcher, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote out/two-processes") == 1
    for one, two in zip(
        read_log("out/one-process"), read_log("out/two-processes"), strict=True
    ):
        assert one == pytest.approx(two, rel=1e-5, abs=1e-5)
    # Adam amplifies rounding errors of small gradients.
    assert same_weights("out/one-process", "out/two-processes", tolerance=1e-4)


def test_a_batch_size_that_does_not_divide_is_refused(inside, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="--batch_size=8 must be a multiple of the 3"):
        run("out/thirds")
