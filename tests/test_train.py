"""The objective and the loop."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import data.prepare
import train
from config import UserError, load_checkpoint, parse
from conftest import quick_generator, small_run
from data.batches import Row, collate, pack
from data.toy.prepare import ToyConfig
from data.toy.prepare import prepare as prepare_toy
from generator import length_normalised_nll
from model import ModelConfig, RewardModel, make_optimizer, scale_gradient, update
from parallel import part_of_batch
from regularizer import icrm
from test_generator import kill_after


def run(out_dir, **more):
    train.main(parse(train.TrainConfig, small_run(out_dir, **more)))


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def random_rows(count, rng=None):
    rng = rng or torch.Generator().manual_seed(0)
    draw = lambda low, high: torch.randint(0, 49, (int(torch.randint(low, high, (), generator=rng)),), generator=rng).int().numpy()
    return [Row(draw(2, 5), draw(3, 10), False) for _ in range(count)]


def test_bradley_terry_reads_the_last_token():
    rewards = torch.tensor([[9.0, 1.0, 9.0], [9.0, 9.0, 3.0], [9.0, 0.0, 9.0], [2.5, 9.0, 9.0]])
    loss, margins = train.bradley_terry(rewards, torch.tensor([1, 2, 1, 0]))
    assert margins.tolist() == [1.0, 0.5]
    assert loss.item() == pytest.approx(-(F.logsigmoid(torch.tensor(1.0)) + F.logsigmoid(torch.tensor(0.5))).item() / 2)


def test_the_pointwise_loss_is_the_cross_entropy_of_the_label_at_the_last_token():
    rewards = torch.tensor([[9.0, 1.5, 9.0], [9.0, 9.0, -0.5], [2.0, 9.0, 9.0]])
    loss, margins = train.label_cross_entropy(rewards, torch.tensor([1, 2, 0]), correct=2)
    expected = F.binary_cross_entropy_with_logits(torch.tensor([1.5, -0.5, 2.0]), torch.tensor([1.0, 1.0, 0.0]))
    assert loss.item() == pytest.approx(expected.item()) and margins.tolist() == [1.5, -0.5, -2.0]


def test_scaled_gradient_keeps_the_value():
    x = torch.randn(5, requires_grad=True)
    y = scale_gradient(x, 0.001)
    assert torch.allclose(y, x)
    y.sum().backward()
    assert torch.allclose(x.grad, torch.full((5,), 0.001))


def test_the_language_model_loss_reaches_the_trunk_a_thousandth_and_its_head_in_full(tiny):
    packed = pack(random_rows(4), 2)
    gradients = {}
    for share in (1.0, 0.001):
        tiny.model.zero_grad()
        length_normalised_nll(tiny.model(packed, share)[1], packed, 2).backward()
        gradients[share] = {name: p.grad.clone() for name, p in tiny.model.named_parameters() if p.grad is not None}
    tiny.model.zero_grad()
    for name, full in gradients[1.0].items():
        expected = full if name == "lm_head.weight" else full * 0.001
        assert torch.allclose(gradients[0.001][name], expected, rtol=1e-3, atol=1e-9), name
    assert "score.weight" not in gradients[1.0]


def test_the_language_model_loss_reads_the_chosen_rows_alone(tiny):
    rows = random_rows(4)
    packed = pack(rows, 2)
    slow = []
    for row in rows[:2]:
        tokens = torch.tensor([*row.prompt.tolist(), *row.response.tolist()])
        logprobs = tiny.model.lm_head(tiny.model.transformer(tokens[None]))[0].log_softmax(-1)
        steps = range(len(row.prompt) - 1, len(row) - 1)
        slow.append(-sum(logprobs[t, tokens[t + 1]] for t in steps) / len(steps))
    loss = length_normalised_nll(tiny.model(packed, 1.0)[1], packed, 2)
    assert loss.item() == pytest.approx((sum(slow) / 2).item(), rel=1e-5)


def test_a_pairs_loss_and_rewards_never_depend_on_its_batch_mates(tiny):
    rows = random_rows(8)
    whole, rewards = collate(rows), tiny.model(pack(rows))[0]
    for i in range(4):
        two = [rows[i], rows[i + 4]]
        alone, pair = collate(two), tiny.model(pack(two))[0]
        assert torch.allclose(pair[alone.mask], rewards[[i, i + 4]][whole.mask[[i, i + 4]]], atol=1e-5)
        assert icrm(pair, alone.probs + 0.5, alone.mask)[0].item() == pytest.approx(
            icrm(rewards[[i, i + 4]], whole.probs[[i, i + 4]] + 0.5, whole.mask[[i, i + 4]])[0].item(), rel=1e-5)


def test_eight_pairs_are_overfitted_to_100_percent_in_seconds():
    torch.manual_seed(0)
    model = RewardModel(ModelConfig(vocab_size=50, block_size=24, n_layer=2, n_head=2, n_embd=32))
    optimizer = make_optimizer(model, 1e-2, 0.0)
    batch, packed = collate(random_rows(16)), pack(random_rows(16))
    for _ in range(60):
        rewards, _ = model(packed)
        bt, margins = train.bradley_terry(rewards, batch.last)
        penalty, scale = icrm(rewards, torch.full_like(batch.probs, 0.8), batch.mask)
        (bt + 0.3 * penalty / scale).backward()
        update(model, optimizer, 1e-2, 1.0)
    assert (margins > 0).all() and bt < 0.05


def test_a_run_logs_every_term_and_writes_its_results(inside):
    records = log_of(inside / "out" / "run")
    assert [record["step"] for record in records] == [2, 4, 6, 8, 10, 12]
    assert {"loss", "outcome", "reg", "lm", "accuracy", "margin", "grad_norm", "learning_rate", "S"} <= set(records[0])
    assert "eval_accuracy" in records[2] and "eval_accuracy" in records[5]
    for r in records:
        assert r["loss"] == pytest.approx(r["lm"] + 0.5 * r["reg"] + 0.5 * r["outcome"], rel=1e-5)
    results = json.loads((inside / "out" / "run" / "eval.json").read_text())
    assert set(results["splits"]) == {"val", "decoupled", "swapped", "longer"}
    assert results["splits"]["val"]["n"] == 20


def test_none_is_the_grm_baseline_whatever_the_weight(inside):
    run("out/none-a", regularizer="none", reg_weight=0.3)
    run("out/none-b", regularizer="none", reg_weight=0.9)
    a, b = log_of(inside / "out/none-a"), log_of(inside / "out/none-b")
    assert a == b and all(r["loss"] == pytest.approx(r["lm"] + r["outcome"], rel=1e-6) for r in a)


@pytest.mark.parametrize("killed_at", [3, 4, 7])
def test_a_killed_run_continues_to_the_same_bits(inside, killed_at):
    out = f"out/killed-{killed_at}"
    with mock.patch.object(train, "update", side_effect=kill_after(train.update, killed_at)):
        with pytest.raises(KeyboardInterrupt):
            run(out)
    run(out)
    whole, continued = load_checkpoint("out/run", "reward model"), load_checkpoint(out, "reward model")
    assert all(torch.equal(a, continued["model"][name]) for name, a in whole["model"].items())
    assert whole["S"] == continued["S"]
    assert log_of(inside / "out/run") == log_of(inside / out)
    assert json.loads((inside / out / "eval.json").read_text())["splits"] == \
        json.loads((inside / "out/run/eval.json").read_text())["splits"]


def test_looking_at_val_more_often_changes_nothing_in_training(inside):
    run("out/watched", eval_interval=1)
    a, b = load_checkpoint("out/run", "reward model"), load_checkpoint("out/watched", "reward model")
    assert all(torch.equal(x, b["model"][name]) for name, x in a["model"].items())


def test_a_finished_run_is_shown_again_and_another_setting_is_refused_by_name(inside, capsys):
    before = (inside / "out/run/ckpt.pt").read_bytes()
    run("out/run")
    assert "decoupled" in capsys.readouterr().out
    assert (inside / "out/run/ckpt.pt").read_bytes() == before
    with pytest.raises(UserError, match="--learning_rate=0.001, not 0.1"):
        run("out/run", learning_rate=0.1)
    run("out/again", seed=1)
    run("out/again", seed=2, overwrite=True)
    assert load_checkpoint("out/again", "reward model")["settings"]["seed"] == 2


def test_a_context_too_short_for_a_split_is_refused_before_training(inside):
    with pytest.raises(UserError, match="longer.jsonl: none of its pairs fits"):
        run("out/short", block_size=60, generator="out/short-generator")
    assert not (inside / "out/short").exists() and not (inside / "out/short-generator").exists()


def test_a_generator_of_another_size_is_refused(inside):
    with pytest.raises(UserError, match="--n_embd=32, not 16"):
        run("out/other", n_embd=16)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(inside):
    def poison(rewards, probs, mask):
        poison.calls += 1
        return rewards.sum() * (float("nan") if poison.calls > 5 else 0.0), None
    poison.calls = 0
    with mock.patch.dict(train.REGULARIZERS, icrm=poison), pytest.raises(UserError, match="not finite at step 6"):
        run("out/poisoned")
    checkpoint = load_checkpoint("out/poisoned", "reward model")
    assert checkpoint["step"] == 4 and all(torch.isfinite(p).all() for p in checkpoint["model"].values())


def test_overwrite_deletes_nothing_before_the_new_run_begins(inside):
    run("out/kept", seed=5)
    before = (inside / "out/kept/ckpt.pt").read_bytes()
    for more in (dict(dtype="float8"), dict(n_embd=16), dict(steps=0)):
        with pytest.raises(UserError):
            run("out/kept", **dict(more, overwrite=True))
    assert (inside / "out/kept/ckpt.pt").read_bytes() == before


def test_a_dataset_made_again_is_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.prepare, "DATA", tmp_path / "data")
    prepare_toy(ToyConfig(train=60, test=20))
    quick_generator("toy", "out/toy-generator")
    run("out/first")
    prepare_toy(ToyConfig(train=60, test=20, seed=1))
    with pytest.raises(UserError, match="generator in out/toy-generator was trained with another data .*python generator.py"):
        run("out/first")
    with pytest.raises(UserError, match="--generator=out/toy-generator, not out/other"):
        run("out/first", generator="out/other")


@pytest.mark.parametrize("more, message", [
    (dict(steps=0), "--steps must be at least 1, not 0"), (dict(learning_rate="nan"), "--learning_rate must be"),
    (dict(reg_weight=1.5), "--reg_weight must be at least 0 and at most 1, not 1.5"), (dict(top_p=0), "--top_p must be above 0 and at most 1, not 0"), (dict(seed=-1), "--seed must be"),
    (dict(device="meta"), "choose auto, cpu"),
    (dict(regularizer="icmr"), "choose one of: none, icrm"), (dict(dataset="toys"), "no dataset 'toys'"),
    (dict(device="cuda:99"), "cannot be used"), (dict(dtype="float8"), "unknown dtype"),
])
def test_unknown_values_are_one_line_errors(inside, more, message):
    with pytest.raises(UserError, match=message):
        run("out/bad", **more)


@pytest.fixture
def labelled(inside):
    """data/labelled: the workspace's toy pairs as responses with labels, with the toy vocabulary."""
    toy = data.prepare.open_dataset("toy")
    splits = {}
    for split in ("train", "val"):
        pairs = [json.loads(line) for line in toy.path(split).read_text().splitlines()]
        splits[split] = [{"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
                         for pair in pairs for key in ("chosen", "rejected")]
    data.prepare.write_dataset(data.prepare.dataset_folder("labelled"), splits, toy.tokenizer, kind="labels")
    quick_generator("labelled", "out/labelled-generator")
    return inside


def test_labelled_responses_are_trained_pointwise_and_evaluated_one_by_one(labelled):
    more = dict(dataset="labelled", generator="out/labelled-generator", temperature=0.7, top_p=0.8, learning_rate=5e-3)
    run("out/labelled", **more)
    results = json.loads((labelled / "out/labelled/eval.json").read_text())
    val, pairs = results["splits"]["val"], results["splits"]["val pairs"]
    assert results["train"]["n"] == 120 and (val["n"], val["correct"]) == (40, 20) and 0 <= val["auc"] <= 1
    assert pairs["n"] >= 20
    records = log_of(labelled / "out/labelled")
    for r in records:
        assert r["loss"] == pytest.approx(r["lm"] + 0.5 * r["reg"] + 0.5 * r["outcome"], rel=1e-5)
    with mock.patch.object(train, "update", side_effect=kill_after(train.update, 5)):
        with pytest.raises(KeyboardInterrupt):
            run("out/labelled-killed", **more)
    run("out/labelled-killed", **more)
    assert log_of(labelled / "out/labelled-killed") == records


def test_p_may_come_from_the_world_itself_or_from_another_generator(inside, capsys):
    run("out/exact", probs_from="exact")
    assert "from exact; mean 0.8" in capsys.readouterr().out
    data.prepare.prepare_rows("words", "x", data.prepare.read_pairs(data.prepare.open_dataset("toy").path("train"))[0],
                              data.prepare.PrepareConfig(tokenizer="bpe:300"))
    quick_generator("words", "out/words-generator")
    run("out/words", dataset="words", generator="out/words-generator")
    with pytest.raises(UserError, match="another vocabulary"):
        run("out/foreign", probs_from="out/words-generator")
    with pytest.raises(UserError, match="is for toy worlds"):
        run("out/words-exact", dataset="words", generator="out/words-generator", probs_from="exact")
    with pytest.raises(UserError, match="another probs"):
        settings = load_checkpoint("out/exact", "reward model")
        torch.save(dict(settings, inputs=dict(settings["inputs"], probs="0" * 64)), "out/exact/ckpt.pt")
        run("out/exact", probs_from="exact")


def test_training_in_bfloat16_follows_float32(inside):
    run("out/bf16", dtype="bfloat16")
    assert log_of(inside / "out/bf16")[-1]["outcome"] == pytest.approx(log_of(inside / "out/run")[-1]["outcome"], abs=0.05)


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(inside):
    run("out/compiled", compile=True)
    for a, b in zip(log_of(inside / "out/run"), log_of(inside / "out/compiled")):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-3)


def assert_same_run(folder, other):
    """Every logged term of every step agrees to 1e-5, the gradient's norm and S among them. (Weights need not: where a
    gradient is 0 but for rounding, a key's bias, Adam makes a step of it.)"""
    for a, b in zip(log_of(folder), log_of(other), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("dataset, regularizer", [("toy", "icrm"), ("toy", "icrm_shuffled"), ("labelled", "icrm")])
def test_a_batch_read_in_parts_gives_the_losses_of_one_read_whole(labelled, dataset, regularizer):
    more = dict(dataset=dataset, regularizer=regularizer, generator="out/toy-generator" if dataset == "toy" else "out/labelled-generator")
    for parts in (1, 4):
        run(f"out/{parts}-parts", accumulate=parts, overwrite=True, **more)
    assert_same_run(labelled / "out/1-parts", labelled / "out/4-parts")


def test_a_pair_is_never_split_and_every_row_is_read_once():
    for paired, chosen, rows in ((True, 6, 12), (False, 5, 12), (False, 0, 12)):
        parts = [part_of_batch(part, 3, chosen, rows, paired) for part in range(3)]
        assert sorted(i for some, _ in parts for i in some) == list(range(rows))
        for some, count in parts:
            assert all(i < chosen for i in some[:count]) and all(i >= chosen for i in some[count:])
            assert not paired or (some[count:] == some[:count] + chosen).all()


def test_two_processes_give_the_losses_of_one(inside, tmp_path):
    repository = Path(train.__file__).parent
    for source in (*repository.glob("*.py"), *repository.glob("data/**/*.py")):
        target = tmp_path / source.relative_to(repository)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    for made in ("data/toy", "out/toy-generator"):
        shutil.copytree(made, tmp_path / made, dirs_exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    done = subprocess.run([*command, *small_run("out/two", accumulate=2)], cwd=tmp_path, capture_output=True, text=True,
                          timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training took") == 1                 # the first process alone prints
    assert_same_run(inside / "out/run", tmp_path / "out/two")
    assert json.loads((tmp_path / "out/two/eval.json").read_text())["splits"]["val"]["n"] == 20


def test_a_batch_that_does_not_divide_is_refused(inside):
    with pytest.raises(UserError, match="--batch_size=8 does not divide into 1 processes times --accumulate=3"):
        run("out/thirds", accumulate=3)
