"""Runs that are killed, stopped or collide, full disks, and files from strangers."""

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

import bon
import common
import dpo
import evaluate
import generator
import train
from common import Run, UserError, load_checkpoint, parse_settings, read_json
from conftest import fork, small_run
from data import prepare
from data.dataset import open_array, open_dataset
from data.formats import read_candidates, read_pairs, read_steps
from data.tokenizer import make_tokenizer
from generator import Probs
from pretrained.tokenizer import read_tokenizer
from pretrained.weights import load_pretrained, read_safetensors

MODELS = Path(__file__).parent / "pretrained"
KINDS = ("reward model", "generator", "policy")
LEFTOVERS = {"ckpt.pt.tmp", "log.jsonl.new"}  # what a kill may leave


def start(settings, prepare=None):
    """Start a process that runs a script like the command line. prepare: called first.

    Its standard error goes to the file `stderr`.
    """

    def child():
        os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr, sys.stdout = os.fdopen(2, "w"), open(os.devnull, "w")
        options = [f"--{name}={value}" for name, value in vars(settings).items()]
        sys.argv = ["script", *options]
        if prepare:
            prepare()
        module = sys.modules[type(settings).__module__]
        common.run_script(type(settings), module.main)

    return fork(child)


def script_settings(script, out, **changes):
    """A small run of one of the scripts, with many checkpoints."""
    if script == "train":
        return small_run(out, eval_interval=1, log_interval=1, **changes)
    if script == "dpo":
        settings = {"prompts": 12, "samples": 4, "held_out": 5, "batch_size": 4}
        return dpo.DPOConfig(
            "out/run", out_dir=out, steps=6, device="cpu", **settings, **changes
        )
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "steps": 12}
    return generator.GeneratorConfig(
        dataset="toy", out_dir=out, device="cpu", **sizes, **changes
    )


def run_to_end(script, out, **changes):
    process = start(script_settings(script, out, **changes))
    process.join()
    return process.exitcode, Path("stderr").read_text()


def weights_of(out):
    weights = load_checkpoint(out, *KINDS)["model"]
    return {name: weight.numpy().tobytes() for name, weight in weights.items()}


def content_of(out):
    """Everything that a run writes and that does not depend on its folder's name."""
    content = [weights_of(out)]
    for name in ("log.jsonl", "p.npy"):
        path = Path(out, name)
        content.append(path.read_bytes() if path.exists() else b"")
    return content


# Kills and signals --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, times", [("train", 30), ("generator", 10), ("dpo", 10)]
)
def test_a_run_killed_at_any_instant_resumes_to_the_same_bits(
    inside, monkeypatch, script, times
):
    monkeypatch.setattr(generator, "SAVE_INTERVAL", 2)
    monkeypatch.setattr(dpo, "SAVE_INTERVAL", 2)
    rng, started = random.Random(1), time.time()
    assert run_to_end(script, f"out/whole-{script}")[0] == 0
    seconds = time.time() - started
    whole, out = content_of(f"out/whole-{script}"), f"out/cut-{script}"
    names = {path.name for path in Path(f"out/whole-{script}").iterdir()}
    for _ in range(times):
        shutil.rmtree(out, ignore_errors=True)
        process = start(script_settings(script, out))
        time.sleep(rng.uniform(0.1, 1.0) * seconds)
        process.kill()
        process.join()
        has_checkpoint = Path(out, "ckpt.pt").exists()
        if Path(out).exists():
            left = {path.name for path in Path(out).iterdir()}
            assert left <= names | LEFTOVERS | {"eval.json.tmp", "p.npy.tmp"}
        assert run_to_end(script, out, resume=has_checkpoint)[0] == 0
        assert content_of(out) == whole
        left = {path.name for path in Path(out).iterdir()}
        assert left - {"previous", "log.jsonl.new"} == names


@pytest.mark.slow
def test_preparing_that_is_killed_at_any_instant_can_start_again(tmp_path, monkeypatch):
    """From a pipe, which is copied. The temporary files lie beside the dataset."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for i in range(3000):
        row = {"prompt": f"Question {i}?", "chosen": f"yes {i}", "rejected": "no"}
        rows.append(json.dumps(row))
    text = "\n".join(rows)

    def prepare_dataset(name, seconds):
        """Prepare data/NAME from a pipe. Kill it after some seconds."""
        Path("pipe").unlink(missing_ok=True)
        os.mkfifo("pipe")
        settings = prepare.PrepareConfig(name, "", "pipe", "bpe:400", 64, val_share=0.2)
        process = start(settings)
        writer = fork(lambda: Path("pipe").write_text(text))
        process.join(seconds)
        process.kill()
        process.join()
        writer.kill()
        return process.exitcode

    def content(name):
        folder = Path("data", name)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    started = time.time()
    assert prepare_dataset("whole", 60) == 0
    seconds, rng = time.time() - started, random.Random(2)
    files, temporary = content("whole"), set(os.listdir(tempfile.gettempdir()))
    for _ in range(10):
        prepare_dataset("cut", rng.uniform(0.1, 1.0) * seconds)
        if Path("data/cut").exists():
            for name in set(content("cut")) - set(files):
                assert name.endswith(".tmp")
        assert set(os.listdir(tempfile.gettempdir())) <= temporary
        assert prepare_dataset("cut", 60) == 0
        assert content("cut") == files
        shutil.rmtree("data/cut")


def test_a_killed_process_blocks_no_other():
    def killed():
        with tqdm.get_lock():
            os.kill(os.getpid(), signal.SIGKILL)

    tqdm(disable=True)  # creates the lock
    for child, code in (
        (killed, -signal.SIGKILL),
        (lambda: tqdm.write("the lock was free"), 0),
    ):
        process = fork(child)
        process.join(20)
        assert process.exitcode == code


@pytest.mark.parametrize("moment", ["before the rename", "while writing"])
def test_a_kill_during_a_write_loses_no_checkpoint(inside, moment):
    """The third checkpoint is half written, or complete but not renamed yet."""

    def prepare():
        saved, save = [], torch.save

        def kill_at_third(checkpoint, path):
            save(checkpoint, path)
            saved.append(path)
            if len(saved) == 3:
                if moment == "while writing":
                    os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = kill_at_third

    process = start(script_settings("train", "out/torn"), prepare)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert Path("out/torn/ckpt.pt.tmp").exists()
    assert load_checkpoint("out/torn", "reward model")["step"] == 2
    assert run_to_end("train", "out/torn", resume=True)[0] == 0
    assert not Path("out/torn/ckpt.pt.tmp").exists()
    assert weights_of("out/torn") == weights_of("out/run")
    shutil.rmtree("out/torn")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_with_one_line(inside, number):
    shutil.rmtree("out/stopped", ignore_errors=True)
    settings = small_run("out/stopped", steps=400, eval_interval=2, log_interval=1)
    process = start(settings)
    while not Path("out/stopped/ckpt.pt").exists():
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == 128 + number
    last = Path("stderr").read_text().strip().splitlines()[-1]
    name = signal.Signals(number).name
    assert last.startswith(f"stopped by {name}. --resume=True continues")
    n_steps = Path("out/stopped/log.jsonl").read_text().count("\n")
    saved = load_checkpoint("out/stopped", "reward model")["step"]
    assert 0 <= n_steps - saved <= 2
    assert not Path("out/stopped/eval.json").exists()


# One run in a folder ------------------------------------------------------------------


def test_a_run_touches_its_own_files_only(inside):
    """Three starts in a folder with other files, which is a link."""
    Path("scratch").mkdir()
    Path("scratch/notes.txt").write_text("mine")
    Path("scratch/src").mkdir()
    Path("out/linked").symlink_to(Path("scratch").resolve())
    for seed in (1, 2, 3):
        train.main(small_run("out/linked", seed=seed, steps=2))
    assert Path("out/linked").is_symlink()
    names = {path.name for path in Path("scratch").iterdir()}
    own = {"ckpt.pt", "log.jsonl", "eval.json", "previous"}
    assert names == own | {"notes.txt", "src"}
    assert Path("scratch/notes.txt").read_text() == "mine"
    for folder, seed in (("out/linked", 3), ("out/linked/previous", 2)):
        checkpoint = load_checkpoint(folder, "reward model")
        assert checkpoint["settings"]["seed"] == seed
        results = read_json(Path(folder, "eval.json"), "")
        assert results["settings"]["seed"] == seed


def test_previous_holds_the_last_finished_run_whatever_fails_after_it(inside):
    train.main(small_run("out/kept-run", seed=5, steps=2))
    names = ("ckpt.pt", "log.jsonl", "eval.json")
    finished = {name: Path("out/kept-run", name).read_bytes() for name in names}

    def poison(rewards, probs, mask):
        return rewards.sum() * float("nan"), None

    regularizers = dict(train.REGULARIZERS)
    train.REGULARIZERS["icrm"] = poison
    try:
        with pytest.raises(UserError, match="not finite"):  # before a checkpoint
            train.main(small_run("out/kept-run", seed=6))
        for name, content in finished.items():
            assert Path("out/kept-run", name).read_bytes() == content
    finally:
        train.REGULARIZERS.update(regularizers)
    for seed in (7, 8):  # two starts that are interrupted after a checkpoint

        def stop(model, dataset, name):
            if Path("out/kept-run/previous").exists():
                raise KeyboardInterrupt
            return evaluate.evaluate_split(model, dataset, name)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "evaluate_split", stop)
            settings = small_run("out/kept-run", seed=seed, eval_interval=1)
            with pytest.raises(KeyboardInterrupt):
                train.main(settings)
        for name, content in finished.items():
            assert Path("out/kept-run/previous", name).read_bytes() == content


def test_a_kill_between_two_moves_leaves_the_finished_run_in_one_place(
    inside, monkeypatch
):
    """The first checkpoint of a new run is interrupted at every change of a file."""
    names, replace, unlink = (
        ("ckpt.pt", "log.jsonl", "eval.json"),
        os.replace,
        Path.unlink,
    )
    remaining = []

    def count_down():
        remaining[0] -= 1
        if remaining[0] < 0:
            raise KeyboardInterrupt

    def interrupted_replace(*arguments):
        count_down()
        replace(*arguments)

    def interrupted_unlink(path, missing_ok=False):
        count_down()
        unlink(path, missing_ok=missing_ok)

    n_interrupted = 0
    for n_changes in range(40):
        shutil.rmtree("out/moves", ignore_errors=True)
        train.main(small_run("out/moves", seed=5, steps=1))
        finished = {name: Path("out/moves", name).read_bytes() for name in names}
        remaining[:] = [n_changes]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", interrupted_replace)
            patch.setattr(Path, "unlink", interrupted_unlink)
            try:
                train.main(small_run("out/moves", seed=6, steps=1))
                break
            except KeyboardInterrupt:
                n_interrupted += 1
        complete = []
        for folder in ("out/moves", "out/moves/previous"):
            same = True
            for name, content in finished.items():
                path = Path(folder, name)
                same = same and path.exists() and path.read_bytes() == content
            complete.append(same)
        new = Path("out/moves/ckpt.pt")
        is_new = new.exists() and new.read_bytes() != finished["ckpt.pt"]
        assert any(complete) and (complete[1] or not is_new), n_changes
        if not is_new:  # the next start keeps it, too
            train.main(small_run("out/moves", seed=7, steps=1))
            for name, content in finished.items():
                assert Path("out/moves/previous", name).read_bytes() == content
    assert n_interrupted >= 8


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint(inside, tiny):
    run = Run("reward model", small_run("out/spoiled"), {})
    optimizer = torch.optim.SGD(tiny.parameters(), 0.1)
    run.save(3, tiny, optimizer, make_tokenizer("bpe:257", []))
    before = Path("out/spoiled/ckpt.pt").read_bytes()
    tiny.score.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite at step 4"):
        run.save(4, tiny, optimizer, make_tokenizer("bpe:257", []))
    assert Path("out/spoiled/ckpt.pt").read_bytes() == before


def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(inside):
    """The first run waits at its checkpoint until the others were refused."""

    def prepare():
        save = Run.save

        def wait_and_save(*arguments, **extras):
            while not Path("refused").exists():
                time.sleep(0.02)
            save(*arguments, **extras)

        Run.save = wait_and_save

    process = start(small_run("out/busy", log_interval=1), prepare)
    while not Path("out/busy/log.jsonl.new").exists():
        time.sleep(0.02)
    for changes in ({}, {"resume": True}):
        with pytest.raises(UserError, match="another process is running in out/busy"):
            train.main(small_run("out/busy", **changes))
    Path("refused").touch()
    process.join()
    assert process.exitcode == 0 and weights_of("out/busy") == weights_of("out/run")


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(inside):
    """No file may grow beyond half a checkpoint."""
    assert run_to_end("train", "out/full")[0] == 0
    before = Path("out/full/ckpt.pt").read_bytes()

    def prepare():
        size = len(before) // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    process = start(small_run("out/full", steps=14), prepare)
    process.join()
    lines = Path("stderr").read_text().strip().splitlines()
    assert process.exitcode == 2 and lines[-1].startswith("error: cannot write ")
    assert Path("out/full/ckpt.pt").read_bytes() == before
    assert not Path("out/full/ckpt.pt.tmp").exists()


def test_a_read_only_folder_is_one_line(inside):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    Path("out/locked").mkdir(mode=0o500)
    code, stderr = run_to_end("train", "out/locked/run")
    assert code == 2 and stderr.strip().splitlines()[-1].startswith("error: ")


def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_line(tmp_path):
    torch.save({"kind": "reward model", "checksum": "0" * 64}, tmp_path / "ckpt.pt")
    message = "comes from another version of this project. Train again"
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path, "reward model")


def test_the_optimizer_is_not_read_into_memory(tmp_path):
    """A checkpoint with 128 MiB of optimizer states takes less than a quarter."""
    checkpoint = {"kind": "policy", "format": common.FORMAT_VERSION}
    checkpoint["optimizer"] = {"state": torch.zeros(2**25)}
    checkpoint["model"] = {"weight": torch.ones(8)}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    del checkpoint

    def memory():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    before = memory()
    checkpoint = load_checkpoint(tmp_path, "policy")
    assert checkpoint["model"]["weight"].sum() == 8
    assert memory() - before < 2**25


def test_a_checkpoint_that_declares_more_than_it_holds_is_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)
    with pytest.raises(UserError, match="is not a checkpoint, or damaged"):
        load_checkpoint(path, "policy")


def test_evaluating_an_unfinished_run_says_so(inside, capsys):
    settings = small_run("out/half", eval_interval=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "log", interrupt_at_step(3))
        with pytest.raises(KeyboardInterrupt):
            train.main(settings)
    evaluate.load_reward_model("out/half", "cpu")
    assert "out/half is unfinished (2 of 12 steps)\n" in capsys.readouterr().out


def interrupt_at_step(last):
    def log(run, step, *arguments):
        if step == last:
            raise KeyboardInterrupt

    return log


def test_results_are_the_same_twice(inside, tmp_path):
    results = []
    for name in ("a", "b"):
        path = tmp_path / name
        options = ["--checkpoint=out/run", "--device=cpu", f"--json={path}"]
        evaluate.main(parse_settings(evaluate.EvalConfig, options))
        evaluation = json.loads(path.read_text())
        options += ["--prompts=3", "--samples=4", "--halving_lengths=4"]
        bon.main(parse_settings(bon.BonConfig, options))
        best_of_n = json.loads(path.read_text())
        for key in ("settings", "checksum"):  # they hold the output's name
            best_of_n.pop(key)
        for key in ("evaluation", "checksum"):
            evaluation.pop(key)
        results.append((evaluation, best_of_n))
    assert results[0] == results[1]


# Files from strangers -----------------------------------------------------------------


def mutations(content, count, rng):
    """Truncated at every 5%, with flipped bits, and with parts overwritten or moved."""
    for twentieth in range(20):
        yield content[: len(content) * twentieth // 20]
    for _ in range(count - 20):
        data = bytearray(content)
        start = rng.randrange(min(2000, len(data)))
        if rng.random() < 0.5:
            start = rng.randrange(len(data))
        kind, length = rng.randrange(4), rng.randrange(1, 40)
        if kind == 0:
            data[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[start : start + 8] = rng.randbytes(8)
        elif kind == 2:
            del data[start : start + length]
        else:
            data[start:start] = data[start : start + length]
        yield bytes(data)


ODD_VALUES = [
    None,
    -1,
    0,
    10**30,
    1e308,
    float("nan"),
    "",
    "x\ny",
    "\ud800",
    [],
    {},
    True,
    [[[]]],
    "../../x",
    {"a": {}},
]


def edit(value, rng):
    """A JSON value in which one part, anywhere, is replaced."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        return {**value, key: edit(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        i = rng.randrange(len(value))
        return [*value[:i], edit(value[i], rng), *value[i + 1 :]]
    return rng.choice(ODD_VALUES)


def reads_or_refuses(read, path):
    """Reading works, or is an error of one line."""
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
            reads_or_refuses(read, path)
        for _ in range(count if as_json else 0):
            text = json.dumps(edit(json.loads(content), rng))
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            reads_or_refuses(read, path)
    finally:
        path.write_bytes(content)


@pytest.mark.slow
def test_damaged_files_are_one_line_each(inside, tmp_path):
    shutil.copytree("out/run", tmp_path / "run")
    run, toy = tmp_path / "run", open_dataset("toy")
    fuzz(run / "ckpt.pt", lambda: evaluate.load_reward_model(run, "cpu"), 200, 0)
    compare = lambda: evaluate.compare_runs([run, run])  # noqa: E731
    fuzz(run / "eval.json", compare, 80, 1, as_json=True)
    fuzz(run / "log.jsonl", lambda: resume_in(run), 100, 2)
    shutil.copytree("out/toy-generator", tmp_path / "generator")
    folder = tmp_path / "generator"
    for name, seed in (("p.npy", 3), ("p.json", 4)):
        fuzz(
            folder / name,
            lambda: Probs("generator", toy, folder)[0],
            80,
            seed,
            as_json=name == "p.json",
        )
    shutil.copytree("data/toy", "data/fuzzed")
    for name, seed in (
        ("dataset.json", 5),
        ("val-tokens.npy", 6),
        ("val-lengths.npy", 7),
    ):
        fuzz(
            Path("data/fuzzed", name),
            lambda: list(open_dataset("fuzzed").split("val")),
            60,
            seed,
            as_json=name == "dataset.json",
        )
    shutil.rmtree("data/fuzzed")


def resume_in(folder):
    settings = vars(small_run(folder, resume=True))
    checkpoint = load_checkpoint(folder, "reward model")
    settings = {**settings, **checkpoint["settings"]}
    run = Run("reward model", train.TrainConfig(**settings), checkpoint["inputs"])
    model, _, _ = evaluate.load_reward_model(folder, "cpu")
    optimizer = train.make_optimizer(model, 1e-3)
    assert run.resume(model, optimizer) == 12


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_damaged_pretrained_models_are_one_line_each(tmp_path, kind):
    shutil.copytree(MODELS / kind, tmp_path / "model")
    folder = tmp_path / "model"
    fuzz(folder / "config.json", lambda: load_pretrained(folder), 80, 8, as_json=True)
    fuzz(folder / "model.safetensors", lambda: load_pretrained(folder), 120, 9)
    shutil.copy(MODELS / "tokenizers" / "qwen.json", folder / "tokenizer.json")
    path = folder / "tokenizer.json"
    fuzz(path, lambda: read_tokenizer(str(folder)), 60, 10, as_json=True)


@pytest.mark.parametrize(
    "tensors, reason",
    [
        (
            {"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [0, 8])},
            "inside another tensor",
        ),
        ({"a": ("F32", [2], [-8, 0])}, "outside the file"),
        ({"a": ("F32", [2], [8, 0])}, "outside"),
        ({"a": ("F32", [10**12], [0, 8])}, "shape"),
        ({"a": ("F64", [1], [0, 8])}, "F64"),
        ({"a": ("F32", [2], [0, 10**15])}, "outside"),
        ({"a": ("F16", [4], [0, 8])}, "not finite"),
        ({"a": ("F32", [2], [0, 9])}, "outside"),
        ({"a": ("F32", [2], 3)}, "TypeError"),
        ({"a": ("F32", [3], [0, 8])}, "shape"),
        ({"a": ("F32", [2**70], [0, 8])}, ""),
    ],
)
def test_weights_that_overlap_or_exceed_the_file_are_refused(tmp_path, tensors, reason):
    header = {}
    for name, (dtype, shape, offsets) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    header = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    content = len(header).to_bytes(8, "little") + header
    content += np.array([0.0, np.nan], np.float16).tobytes() * 2
    damaged = [b"\xff" * 8 + content[8:], content[:5], content[:40], b""]
    for data, expected in [(content, reason), *((data, "") for data in damaged)]:
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"model.safetensors .*{expected}"):
            read_safetensors(path)


PAIR = {
    "id": "a",
    "prompt": [{"role": "user", "content": "Hi?"}],
    "chosen": "a",
    "rejected": "b",
    "history": [["a", "b"]],
    "system": "s",
    "subset": "x",
    "meta": {"domain": "y"},
}
CANDIDATES = {
    "prompt": "Q",
    "responses": [{"text": "a", "correct": True}, {"text": "b", "correct": 0.5}],
}
STEPS = {"prompt": "Q", "steps": ["a", "b"], "first_error": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "read, row",
    [(read_pairs, PAIR), (read_candidates, CANDIDATES), (read_steps, STEPS)],
)
def test_damaged_rows_are_skipped_or_one_line(inside, tmp_path, read, row):
    path, tokenizer = tmp_path / "x.jsonl", open_dataset("toy").tokenizer
    rng, good = random.Random(11), json.dumps(row)

    def read_file():
        read(path, tokenizer, 64, True, 1.0)

    for _ in range(200):
        edited = json.dumps(edit(row, rng))
        path.write_bytes(f"{good}\n{edited}\n".encode("utf-8", "surrogatepass"))
        reads_or_refuses(read_file, path)
    path.write_text(good + "\n")
    fuzz(path, read_file, 60, 12)


def test_nothing_in_a_pickle_is_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"kind": "reward model", "model": Payload()}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="is not a checkpoint"):
        load_checkpoint(tmp_path, "reward model")
    np.save(tmp_path / "p.npy", np.array([Payload()]), allow_pickle=True)
    with pytest.raises(UserError, match="missing or damaged"):
        open_array(tmp_path / "p.npy")
    assert not (tmp_path / "executed").exists()
