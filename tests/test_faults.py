"""Runs that are killed, stopped or collide, disks that are full, and files from strangers."""
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

import bon
import config
import dpo
import evaluate
import generator
import train
from config import UserError
from conftest import fork, read_model, small_run
from data import files
from data.dataset import open_array, open_dataset
from data.files import Run, load_checkpoint, read_json
from data.jsonl import read_candidate_rows, read_pair_rows, read_step_rows
from data.probs import Probs
from data.tokenizer import make
from data.tokenizer_json import read_tokenizer
from data.weights import read_safetensors

FOLDERS = Path(__file__).parent / "pretrained"


def start(settings, before=None):
    """A process that runs a script's main as the command line would; before: called first."""
    def child():
        os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr, sys.stdout = os.fdopen(2, "w"), open(os.devnull, "w")
        sys.argv = ["script", *(f"--{key}={value}" for key, value in vars(settings).items())]
        if before:
            before()
        config.run_script(type(settings), sys.modules[type(settings).__module__].main)
    return fork(child)


def settings_of(what, out, **more):
    """A small run of one of the scripts, with many checkpoints."""
    if what == "train":
        return small_run(out, eval_interval=1, log_interval=1, **more)
    if what == "dpo":
        return dpo.DPOConfig(checkpoint="out/run", out_dir=out, prompts=12, samples=4, held_out=5,
                             steps=6, batch_size=4, device="cpu", **more)
    return generator.GeneratorConfig(dataset="toy", out_dir=out, n_layer=1, n_head=2, n_embd=32,
                                     steps=12, device="cpu", **more)


def run_whole(what, out, **more):
    process = start(settings_of(what, out, **more))
    process.join()
    return process.exitcode, Path("said").read_text()


def content_of(out):
    """What a run leaves, but for what depends on its folder's name."""
    kinds = "reward model", "generator", "policy"
    log = Path(out, "log.jsonl").read_text() if Path(out, "log.jsonl").exists() else ""
    p = Path(out, "p.npy").read_bytes() if Path(out, "p.npy").exists() else b""
    return files.fingerprint(load_checkpoint(out, *kinds)["model"]), log, p


@pytest.mark.slow
@pytest.mark.parametrize("what, times", [("train", 30), ("generator", 12), ("dpo", 12)])
def test_a_run_that_is_killed_at_any_instant_goes_on_to_the_same_bits(inside, monkeypatch, what,
                                                                      times):
    """From its start to somewhat behind its end; what it leaves is that of a run not killed."""
    monkeypatch.setattr(generator, "SAVE_EVERY", 2)
    monkeypatch.setattr(dpo, "SAVE_EVERY", 2)
    rng, began = random.Random(1), time.time()
    assert run_whole(what, f"out/whole-{what}")[0] == 0
    usual = time.time() - began
    for i in range(times):
        shutil.rmtree(f"out/cut-{what}", ignore_errors=True)
        process = start(settings_of(what, f"out/cut-{what}"))
        time.sleep(rng.uniform(0.1, 1.0) * usual)
        process.kill()
        process.join()
        begun = Path(f"out/cut-{what}/ckpt.pt").exists()
        assert run_whole(what, f"out/cut-{what}", resume=begun)[0] == 0
        assert content_of(f"out/cut-{what}") == content_of(f"out/whole-{what}")
        assert not list(Path(f"out/cut-{what}").glob(".*"))     # no temporary file is left
        shutil.rmtree(f"out/cut-{what}.previous", ignore_errors=True)


def test_a_killed_process_stops_no_other():
    def killed():
        with tqdm.get_lock():
            os.kill(os.getpid(), signal.SIGKILL)

    tqdm(disable=True)      # the lock exists, as after any run in this process
    for child, code in ((killed, -signal.SIGKILL), (lambda: tqdm.write("the lock was free"), 0)):
        process = fork(child)
        process.join(20)
        assert process.exitcode == code


@pytest.mark.parametrize("when", ["before the rename", "in the middle"])
def test_a_kill_inside_a_write_loses_no_checkpoint(inside, when):
    """The third checkpoint is half written, or whole and not in its place yet."""
    def arm():
        written, real_save = [], torch.save

        def save(checkpoint, path):
            real_save(checkpoint, path)
            written.append(path)
            if len(written) == 3:
                if when == "in the middle":
                    os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        torch.save = save

    process = start(settings_of("train", "out/torn"), arm)
    process.join()
    left = [path.name for path in Path("out/torn").glob(".*")]
    assert process.exitcode == -signal.SIGKILL and left == [f".ckpt.pt.{process.pid}"]
    assert load_checkpoint("out/torn", "reward model")["step"] == 2
    assert run_whole("train", "out/torn", resume=True)[0] == 0
    assert not list(Path("out/torn").glob(".*"))
    assert content_of("out/torn")[0] == files.fingerprint(
        load_checkpoint("out/run", "reward model")["model"])
    shutil.rmtree("out/torn")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_for_the_step_and_its_checkpoint(inside, number):
    shutil.rmtree("out/stopped", ignore_errors=True)
    process = start(small_run("out/stopped", steps=400, eval_interval=1000, log_interval=1))
    log = Path("out/stopped/log.jsonl")
    while not log.exists() or log.read_text().count("\n") < 3:
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number
    stopping, last = Path("said").read_text().strip().splitlines()[-2:]
    assert stopping.startswith("stopping when this step") and signal.Signals(number).name in last
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert load_checkpoint("out/stopped", "reward model")["step"] == steps[-1] >= 3
    assert not Path("out/stopped/eval.json").exists()


def test_weights_that_are_no_numbers_do_not_replace_a_checkpoint(inside, tiny):
    """Between two steps that are logged a run may be stopped, and nobody has looked at the loss."""
    run = Run("reward model", small_run("out/spoilt"), {})
    optimizer = torch.optim.SGD(tiny.parameters(), 0.1)
    run.save(3, tiny, optimizer, make("bpe:257", []))
    whole = Path("out/spoilt/ckpt.pt").read_bytes()
    tiny.score.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite at step 4"):
        run.save(4, tiny, optimizer, make("bpe:257", []))
    assert Path("out/spoilt/ckpt.pt").read_bytes() == whole


def test_a_folder_in_use_is_refused_and_the_first_run_goes_on(inside):
    """The first one waits at its checkpoint until the others were refused."""
    def arm():
        real_save = Run.save

        def save(*about, **more):
            while not Path("refused").exists():
                time.sleep(0.02)
            real_save(*about, **more)
        Run.save = save

    shutil.rmtree("out/busy", ignore_errors=True)
    process = start(small_run("out/busy", log_interval=1), arm)
    while not Path("out/busy/log.jsonl").exists():
        time.sleep(0.02)
    for more in ({}, {"resume": True}):
        with pytest.raises(UserError, match="out/busy is in use by a running process"):
            train.main(small_run("out/busy", **more))
    Path("refused").touch()
    process.join()
    assert process.exitcode == 0 and content_of("out/busy")[0] == content_of("out/run")[0]


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(inside):
    """No file may grow beyond half a checkpoint."""
    shutil.rmtree("out/full", ignore_errors=True)
    assert run_whole("train", "out/full")[0] == 0
    before = Path("out/full/ckpt.pt").read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    process = start(small_run("out/full", steps=14), limit)
    process.join()
    said = Path("said").read_text().strip().splitlines()
    assert process.exitcode == 2 and said[-1].startswith("error: cannot write ")
    assert Path("out/full.previous/ckpt.pt").read_bytes() == before
    assert [path.name for path in Path("out/full").iterdir()] in (["log.jsonl"], [])
    shutil.rmtree("out/full.previous")


# Outputs -----------------------------------------------------------------------------------------

def test_a_link_stays_a_link_a_pipe_is_written_through_and_the_project_is_not_written(
        tmp_path, monkeypatch):
    target, link, pipe = (tmp_path / name for name in ("target", "link", "pipe"))
    target.write_text("old")
    link.symlink_to(target)
    files.write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    os.mkfifo(pipe)
    reader = fork(lambda: target.write_text(pipe.read_text()))
    files.write_json(pipe, {"a": 1})
    reader.join()
    assert pipe.is_fifo() and read_json(target, "")["a"] == 1
    root = Path(config.__file__).parent
    for path in (root / "README.md", root / "regularizer.py", root / "data" / "lengths.json",
                 root / "lab" / "study.jsonl", root / "tests/pretrained/llama/config.json",
                 tmp_path / ".git" / "config"):
        with pytest.raises(UserError, match="belongs to the project"):
            files.write_text(path, "gone")
    monkeypatch.setattr(files, "HERE", tmp_path)        # what only sounds alike is the user's
    for name in ("requests.json", "study.jsonl", "data/mine/lengths.json", "out/mine/README.md"):
        files.write_text(tmp_path / name, "old")
        files.write_text(tmp_path / name, "new")
    with pytest.raises(UserError, match="cannot write .*irectory"):
        files.write_text(tmp_path, "x")


def test_what_a_dead_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    gone, mine, other = (tmp_path / f".x.json.{end}" for end in ("4194300", os.getppid(), "y"))
    for path in (gone, mine, other):
        path.write_text("{")
    files.write_json(tmp_path / "x.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [mine.name, other.name, "x.json"])


# Files from strangers ----------------------------------------------------------------------------

def mutations(content, count, rng):
    """Truncated at every 5%, with flipped bits, with a part doubled, overwritten or taken out."""
    for twentieth in range(20):
        yield content[:len(content) * twentieth // 20]
    for _ in range(count - 20):
        data = bytearray(content)
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(2000, len(data)))
        kind = rng.randrange(4)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:at + 8] = rng.randbytes(8)
        elif kind == 2:
            del data[at:at + rng.randrange(1, 40)]
        else:
            data[at:at] = data[at:at + rng.randrange(1, 40)]
        yield bytes(data)


def edits(value, rng):
    """A JSON value with one part of it, anywhere, made another."""
    odd = [None, -1, 0, 10 ** 30, 1e308, float("nan"), "", "x\ny", "\ud800", [], {}, True,
           [[[]]], "../../x", {"a": {}}]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        return value | {key: edits(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        i = rng.randrange(len(value))
        return value[:i] + [edits(value[i], rng)] + value[i + 1:]
    return rng.choice(odd)


def survives(read, path):
    """Reading works, or is a UserError of one line that names the file."""
    try:
        read()
    except UserError as error:
        assert "\n" not in str(error).replace("\\n", ""), error
    except OSError as error:
        assert path.name in str(error)


def fuzz(path, read, count, seed, as_json=False):
    content, rng = path.read_bytes(), random.Random(seed)
    try:
        for data in mutations(content, count, rng):
            path.write_bytes(data)
            survives(read, path)
        for _ in range(count if as_json else 0):
            text = json.dumps(edits(json.loads(content), rng))
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            survives(read, path)
    finally:
        path.write_bytes(content)


@pytest.mark.slow
def test_two_thousand_damaged_files_are_one_line_each(inside, tmp_path):
    shutil.copytree("out/run", tmp_path / "run")
    run, toy = tmp_path / "run", open_dataset("toy")
    fuzz(run / "ckpt.pt", lambda: evaluate.load_reward_model(run, "cpu"), 200, 0)
    fuzz(run / "eval.json", lambda: evaluate.compare_runs([run, run]), 80, 1, as_json=True)
    fuzz(run / "log.jsonl", lambda: restore(run), 100, 2)
    shutil.copytree("out/toy-generator", tmp_path / "generator")
    for name, seed in (("p.npy", 3), ("p.json", 4)):
        fuzz(tmp_path / "generator" / name,
             lambda: [Probs("generator", toy, tmp_path / "generator")[i] for i in range(3)],
             80, seed, as_json=name == "p.json")
    shutil.copytree("data/toy", "data/fuzzed")
    for name, seed in (("dataset.json", 5), ("val-tokens.npy", 6), ("val-lengths.npy", 7)):
        fuzz(Path("data/fuzzed", name), lambda: list(open_dataset("fuzzed").split("val")), 60, seed,
             as_json=name == "dataset.json")
    shutil.rmtree("data/fuzzed")


def restore(folder):
    settings = vars(small_run(folder, resume=True))
    checkpoint = load_checkpoint(folder, "reward model")
    settings |= checkpoint["settings"]
    run = Run("reward model", train.TrainConfig(**settings), checkpoint["inputs"])
    model, _, _ = evaluate.load_reward_model(folder, "cpu")
    optimizer = train.make_optimizer(model, 1e-3)
    assert run.restore(model, optimizer) == 12


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_damaged_models_of_strangers_are_one_line_each(tmp_path, kind):
    shutil.copytree(FOLDERS / kind, tmp_path / "model")
    folder = tmp_path / "model"
    fuzz(folder / "config.json", lambda: read_model(folder), 80, 8, as_json=True)
    fuzz(folder / "model.safetensors", lambda: read_model(folder), 120, 9)
    shutil.copy(FOLDERS / "tokenizers" / "qwen.json", folder / "tokenizer.json")
    fuzz(folder / "tokenizer.json", lambda: read_tokenizer(str(folder)), 60, 10, as_json=True)


@pytest.mark.parametrize("tensors, reason", [
    ({"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [0, 8])}, "inside another tensor"),
    ({"a": ("F32", [2], [-8, 0])}, "outside the file"), ({"a": ("F32", [2], [8, 0])}, "outside"),
    ({"a": ("F32", [10 ** 12], [0, 8])}, "shape"), ({"a": ("F64", [1], [0, 8])}, "F64"),
    ({"a": ("F32", [2], [0, 10 ** 15])}, "outside"), ({"a": ("F16", [4], [0, 8])}, "not finite"),
    ({"a": ("F32", [2], [0, 9])}, "outside"), ({"a": ("F32", [2], 3)}, "TypeError"),
    ({"a": ("F32", [3], [0, 8])}, "shape"), ({"a": ("F32", [2 ** 70], [0, 8])}, "")])
def test_weights_that_overlap_exceed_the_file_or_are_no_numbers_are_refused(tmp_path, tensors,
                                                                            reason):
    names = ("dtype", "shape", "data_offsets")
    header = json.dumps({name: dict(zip(names, about)) for name, about in tensors.items()}).encode()
    path = tmp_path / "model.safetensors"
    whole = len(header).to_bytes(8, "little") + header
    whole += np.array([0.0, np.nan], np.float16).tobytes() * 2
    for content, why in ((whole, reason), (b"\xff" * 8 + whole[8:], ""), (whole[:5], ""),
                         (whole[:40], ""), (b"", "")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"model.safetensors is missing, damaged .*{why}"):
            read_safetensors(path)


PAIR = {"id": "a", "prompt": [{"role": "user", "content": "Hi?"}], "chosen": "a", "rejected": "b",
        "history": [["a", "b"]], "system": "s", "subset": "x", "meta": {"domain": "y"}}
CANDIDATES = {"prompt": "Q", "responses": [{"text": "a", "correct": True, "answer": "1"},
                                           {"text": "b", "correct": 0.5, "answer": "2"}]}
STEPS = {"prompt": "Q", "steps": ["a", "b"], "first_error": 1}


@pytest.mark.slow
@pytest.mark.parametrize("read, row", [
    (read_pair_rows, PAIR), (read_candidate_rows, CANDIDATES), (read_step_rows, STEPS)])
def test_damaged_rows_are_left_out_or_one_line(inside, tmp_path, read, row):
    path, tokenizer = tmp_path / "x.jsonl", open_dataset("toy").tokenizer
    rng, good = random.Random(11), json.dumps(row)
    for _ in range(200):
        other = json.dumps(edits(row, rng))
        path.write_bytes(f"{good}\n{other}\n".encode("utf-8", "surrogatepass"))
        survives(lambda: read(path, tokenizer, 64, True, skip_bad=True), path)
    path.write_text(good + "\n")
    fuzz(path, lambda: read(path, tokenizer, 64, True, skip_bad=True), 60, 12)


def test_nothing_in_a_pickle_is_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"kind": "reward model", "model": Payload()}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="is no checkpoint"):
        load_checkpoint(tmp_path, "reward model")
    np.save(tmp_path / "p.npy", np.array([Payload()]), allow_pickle=True)
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(UserError):
        files.read_json(tmp_path / "p.json", "generator.py")
    with pytest.raises(UserError, match="missing or damaged"):
        open_array(tmp_path / "p.npy")
    assert not (tmp_path / "executed").exists()


def test_results_are_the_same_bytes_twice(inside, tmp_path):
    for name in ("a", "b"):
        evaluate.main(config.parse(evaluate.EvalConfig, [
            "--checkpoint=out/run", f"--json={tmp_path / name}-eval", "--device=cpu"]))
        bon.main(config.parse(bon.BonConfig, [
            "--checkpoint=out/run", "--prompts=3", "--samples=4", "--device=cpu", "--halve=4",
            "--json=bon.json"]))
        shutil.copy("bon.json", tmp_path / f"{name}-bon")
    for kind in ("eval", "bon"):
        a, b = (read_json(tmp_path / f"{name}-{kind}", "") for name in "ab")
        assert {**a, "settings": 0} == {**b, "settings": 0}


def test_the_evaluation_interval_changes_no_weight(inside):
    train.main(small_run("out/every-100", eval_interval=100))
    assert content_of("out/every-100")[0] == content_of("out/run")[0]
