"""Settings, one-line errors and files that are never half written."""
import dataclasses
import importlib
import os
import re
import signal
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

import config
import evaluate
from data import files
from config import Stopping, UserError, in_range, parse, run_script, usage
from data.files import fingerprint, read_json
from train import TrainConfig

ROOT = Path(config.__file__).parent
FOLDERS = ("", "data", "data/toy", "lab")
SCRIPTS = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))
           if re.search(r"^    run_script\(", path.read_text(), re.MULTILINE)]


@dataclasses.dataclass(frozen=True)
class Example:
    rate: float = 0.5       # how fast
    count: int = 3          # how many
    name: str = "x"         # what to call it
    loud: bool = False      # whether to shout


def test_the_value_is_all_that_follows_the_first_equals_sign():
    found = parse(Example, ["--name=a=b", "--rate=1", "--count=-2", "--loud=True"])
    assert found == Example(1.0, -2, "a=b", True) and parse(Example, ["--name="]).name == ""


@pytest.mark.parametrize("argument, message", [
    ("--cuont=3", "did you mean --count"), ("--count=3.5", "whole number"),
    ("--rate=fast", "a number"), ("--loud=yes", "True or False"), ("--loud", "write --loud=VALUE"),
    ("count=3", "--key=value")])
def test_a_bad_setting_is_named(argument, message):
    with pytest.raises(UserError, match=message):
        parse(Example, [argument])


def test_a_file_that_is_read_is_not_written():
    for written in ("x.json", "./x.json", "y/../x.json"):
        with pytest.raises(UserError, match=f"--json={written} is a file to read"):
            parse(evaluate.EvalConfig, ["--compare=y", "--data=x.json", f"--json={written}"])
    parse(evaluate.EvalConfig, ["--data=", "--json=", "--checkpoint=x", "--steps=x"])


@pytest.mark.parametrize("low, high, rate, message", [
    (1, 10**9, 0, "at least 1, not 0"), (0, 1, 2, "at most 1, not 2"),
    (config.TINY, 1, 0, "above 0 and at most 1, not 0"),
    (0, 10**9, float("nan"), "at least 0, not nan")])
def test_ranges_are_named(low, high, rate, message):
    with pytest.raises(UserError, match=f"--rate must be .*{message}"):
        in_range(Example(rate), low, high, "rate")


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_help_has_a_line_for_every_setting_and_every_setting_a_reader(path, capsys):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    source = path.read_text()
    readers = source + (ROOT / "data/files.py").read_text()
    settings = getattr(module, re.search(r"^    run_script\((\w+),", source, re.MULTILINE)[1])
    with pytest.raises(SystemExit) as stop:
        parse(settings, ["--help"])
    assert stop.value.code == 0 and module.__doc__.strip() in capsys.readouterr().out
    for field, line in zip(dataclasses.fields(settings), usage(settings), strict=True):
        assert line.startswith(f"  --{field.name}={field.default}  ")
        assert re.search(rf"\bconfig\.{field.name}\b", readers)
    most = {"train": 20, "generator": 16, "dpo": 16}.get(path.stem, 99)
    assert len(dataclasses.fields(settings)) <= most


def test_a_home_is_expanded_and_initials_are_understood(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse(Example, ["--name=~/a,~/b"]).name == "/home/me/a,/home/me/b"
    assert parse(Example, ["--name=a~b"]).name == "a~b"
    for key, meant in (("lr", "learning_rate"), ("bs", "batch_size"), ("batchsize", "batch_size")):
        with pytest.raises(UserError, match=f"did you mean --{meant}"):
            parse(TrainConfig, [f"--{key}=1"])


@pytest.fixture
def handlers():
    """Signals' handlers as they are, afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield numbers
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def test_a_signal_ends_a_script_with_one_line_and_its_own_status(handlers, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script"])
    monkeypatch.setattr(sys, "stdout", open("/dev/null", "w"))
    for number, saved in product(handlers, (False, True)):      # nothing to go on from, or a step
        monkeypatch.setattr(Stopping, "saved", saved)
        with pytest.raises(SystemExit) as stop:
            run_script(Example, lambda settings, number=number: os.kill(os.getpid(), number))
        assert stop.value.code == 128 + number
        assert re.fullmatch(rf"stopped by {signal.Signals(number).name}"
                            + "; script goes on with --resume=True" * saved + "\n",
                            capsys.readouterr().err)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)        # as nohup has it
    run_script(Example, lambda settings: os.kill(os.getpid(), signal.SIGHUP))


@pytest.mark.parametrize("error", [
    UserError("no such thing"), OSError("disk\nfull"), MemoryError("too large"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")])
def test_a_users_error_is_one_line_with_exit_status_2(error, capsys, monkeypatch, handlers):
    def main(settings):
        raise error
    monkeypatch.setattr(sys, "argv", ["script"])
    monkeypatch.setattr(sys, "stdout", open("/dev/null", "w"))
    with pytest.raises(SystemExit) as stop:
        run_script(Example, main)
    text = str(error).replace("\n", " ")
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {text}\n"


def test_a_fault_of_ours_is_a_traceback(monkeypatch, handlers):
    def main(settings):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_script(Example, main)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.txt"
    files.write_text(path, "old")

    def fail(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")
    with pytest.raises(UserError, match="cannot write .*disk full"):
        files.write_atomically(path, fail)
    with pytest.raises(UserError, match="is not finite"):
        files.write_json(path, {"x": float("nan")})
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_a_json_file_that_is_missing_or_damaged_says_how_to_make_it(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(UserError, match="is missing; make it with generator.py"):
        read_json(path, "generator.py")
    for text in ("{", "[1]", "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match="damaged"):
            read_json(path, "generator.py")


def test_a_damaged_line_of_records_is_named(tmp_path):
    files.write_records(tmp_path / "x.jsonl", [{"a": 1}, {"a": 2}])
    assert files.read_records(tmp_path / "x.jsonl") == [{"a": 1}, {"a": 2}]
    with open(tmp_path / "x.jsonl", "a") as file:
        file.write("<<<<<<< HEAD\n")
    with pytest.raises(UserError, match="x.jsonl is damaged; take out"):
        files.read_records(tmp_path / "x.jsonl")


def test_fingerprints_differ_where_the_content_does():
    zeros, ones = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    assert fingerprint(zeros) == fingerprint({"w": torch.zeros(2).numpy()}) != fingerprint(ones)
    assert len({fingerprint(part) for part in ("ab", "a", {"a": "b"}, {"b": "a"})}) == 4
