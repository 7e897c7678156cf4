"""Settings, errors in one line, and files that are never half written."""

import dataclasses
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common
from common import (
    POSITIVE,
    ROOT,
    UserError,
    check_range,
    open_output,
    parse_settings,
    read_json,
    run_script,
    write_atomically,
    write_json,
)
from train import TrainConfig

SCRIPTS = []
for path in sorted(ROOT.rglob("*.py")):
    parts = path.relative_to(ROOT).parts
    is_ours = not {".venv", "tests", "out"} & set(parts)
    if is_ours and re.search(r"^    run_script\(", path.read_text(), re.MULTILINE):
        SCRIPTS.append(path)


@dataclasses.dataclass(frozen=True)
class ExampleConfig:
    rate: float = 0.5  # how fast
    count: int = 3  # how many
    name: str = "x"  # of the example
    loud: bool = False  # whether to shout, at 100%


# Settings -----------------------------------------------------------------------------


def test_the_value_is_all_that_follows_the_first_equals_sign():
    arguments = ["--name=a=b", "--rate=1", "--count=-2", "--loud=True"]
    assert parse_settings(ExampleConfig, arguments) == ExampleConfig(
        1.0, -2, "a=b", True
    )
    assert parse_settings(ExampleConfig, ["--name="]).name == ""
    assert parse_settings(ExampleConfig, ["--loud=False"]).loud is False


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--cuont=3", "unknown setting --cuont. Did you mean --count"),
        (
            "--coun=3",
            "unknown setting --coun. Did you mean --count",
        ),  # no abbreviations
        ("--count=3.5", "argument --count: invalid int value: '3.5'"),
        ("--rate=fast", "argument --rate: invalid float value: 'fast'"),
        ("--loud=yes", "takes True or False, not 'yes'"),
        ("--loud", "expected one argument"),
        ("count=3", "Write --setting=value"),
    ],
)
def test_a_bad_setting_is_named(argument, message):
    with pytest.raises(UserError, match=message):
        parse_settings(ExampleConfig, [argument])


def test_a_renamed_setting_names_the_new_one():
    for old, new in (("unfrozen", "train_last_layers"), ("probs", "p_source")):
        with pytest.raises(UserError, match=f"--{old} is now called --{new}"):
            parse_settings(TrainConfig, [f"--{old}=1"])


def test_a_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_settings(ExampleConfig, ["--name=~/a"]).name == "/home/me/a"
    assert parse_settings(ExampleConfig, ["--name=a~b"]).name == "a~b"


@pytest.mark.parametrize(
    "low, high, rate, message",
    [
        (1, 10**9, 0, "at least 1, not 0"),
        (0, 1, 2, "at most 1, not 2"),
        (POSITIVE, 1, 0, "above 0 and at most 1, not 0"),
        (0, 10**9, float("nan"), "at least 0, not nan"),
    ],
)
def test_ranges_are_named(low, high, rate, message):
    with pytest.raises(UserError, match=f"--rate must be .*{message}"):
        check_range(ExampleConfig(rate), low, high, "rate")


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_help_explains_every_setting_and_every_setting_is_used(path, capsys):
    parts = path.relative_to(ROOT).with_suffix("").parts
    module, source = importlib.import_module(".".join(parts)), path.read_text()
    class_name = re.search(r"^    run_script\((\w+),", source, re.MULTILINE)[1]
    with pytest.raises(SystemExit) as stop:
        parse_settings(getattr(module, class_name), ["--help"])
    output = capsys.readouterr().out
    assert stop.value.code == 0 and module.__doc__.splitlines()[0] in output
    readers = source + (ROOT / "common.py").read_text()
    if path.stem == "evaluate":
        readers += "".join(p.read_text() for p in ROOT.glob("benchmarks/*.py"))
    for field in dataclasses.fields(getattr(module, class_name)):
        assert re.search(rf"--{field.name} +\n? *\w", output), field.name
        assert re.search(rf"\bconfig\.{field.name}\b", readers), field.name


# Errors and signals -------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch):
    """Make run_script usable in a test. Signal handlers are restored afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    monkeypatch.setattr(sys, "argv", ["script"])
    monkeypatch.setattr(sys, "stdout", open("/dev/null", "w"))
    yield numbers
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def test_a_signal_ends_a_script_with_one_line_and_its_own_status(script, capsys):
    for number in script:
        with pytest.raises(SystemExit) as stop:
            run_script(ExampleConfig, lambda config, n=number: os.kill(os.getpid(), n))
        assert stop.value.code == 128 + number
        name = signal.Signals(number).name
        assert capsys.readouterr().err == f"stopped by {name}\n"
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    run_script(ExampleConfig, lambda config: os.kill(os.getpid(), signal.SIGHUP))


@pytest.mark.parametrize(
    "error, message",
    [
        (UserError("no such thing"), "no such thing"),
        (OSError("disk\nfull"), "disk full"),
        (MemoryError("too large"), "too large"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 4 bytes"),
            "out of memory: DefaultCPUAllocator: can't allocate memory: 4 bytes",
        ),
    ],
)
def test_an_error_of_the_user_is_one_line(error, message, script, capsys):
    def main(config):
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script(ExampleConfig, main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_fault_of_the_program_is_a_traceback(script):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_script(ExampleConfig, lambda config: torch.zeros(2, 3) @ torch.zeros(2, 3))


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from dataclasses import dataclass
from common import run_script, write_json

@dataclass(frozen=True)
class Config:
    out: str = ""  # a file

def main(config):
    for number in range(5000):
        print(f"line {{number}} of {{config.out}}")
    print("the end", file=sys.stderr)
    if config.out:
        write_json(config.out, {{"out": config.out}})

run_script(Config, main)
"""


@pytest.mark.parametrize(
    "redirection, output, errors",
    [
        (">&-", b"", b"the end\n"),
        ("2>&-", b"line 4999", b""),
        (">&- 2>&-", b"", b""),
        ("| head -n 1", b"settings", b""),
        ("--out=$(printf 'x\\xff') | tail -n 1", b"line 4999 of x\\udcff", b"the end"),
    ],
)
def test_closed_outputs_and_odd_paths_are_no_traceback(
    tmp_path, redirection, output, errors
):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(root=str(ROOT)))
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {path} {redirection}"],
        capture_output=True,
        cwd=tmp_path,
    )
    assert output in done.stdout and errors in done.stderr
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    if "--out" in redirection:
        assert os.fsencode(tmp_path) + b"/x\xff" in map(os.fsencode, tmp_path.iterdir())


def test_ctrl_c_during_imports_is_one_line():
    """At four instants, from when common.py has imported the standard library."""
    for delay in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", IMPORTING],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        process.stdout.readline()  # common.py comes next
        time.sleep(0.1 + 0.2 * delay)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        if process.returncode != 0:
            assert errors == "stopped by SIGINT\n"
        else:
            break
    assert delay > 1


IMPORTING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
print("start", flush=True)
import train
signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is imported
"""


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_part_of_torchruns_variables_is_one_line(name, script, capsys, monkeypatch):
    monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit):
        run_script(ExampleConfig, lambda config: None)
    assert f"error: {name} is set without" in capsys.readouterr().err


# Files --------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def fail(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(UserError, match="cannot write .*disk full"):
        write_atomically(path, fail)
    with pytest.raises(UserError, match="is not finite"):
        write_json(path, {"x": float("nan")})
    assert read_json(path, "") == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    write_json(link, {"a": 1})
    assert link.is_symlink() and read_json(target, "") == {"a": 1}


def test_a_json_file_that_is_missing_damaged_or_edited_says_how_to_make_it(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(UserError, match="is missing. Make it with generator.py"):
        read_json(path, "generator.py")
    for text in ("{", "[1]", "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match="is damaged. Make it again"):
            read_json(path, "generator.py")
    write_json(path, {"a": 1})
    path.write_text(path.read_text().replace('"a": 1', '"a": 2'))
    with pytest.raises(UserError, match="was edited"):
        read_json(path, "generator.py")


def test_a_file_of_another_version_is_refused(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"a": 1})
    monkeypatch.setattr(common, "FORMAT_VERSION", 3)
    with pytest.raises(UserError, match="another version"):
        read_json(tmp_path / "x.json", "generator.py")


def test_an_output_may_be_any_file_but_an_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/ckpt.pt").write_text("weights")
    Path("x.jsonl").write_text("rows")
    for output in ("x.jsonl", "./x.jsonl", "y/../x.jsonl", "run/ckpt.pt"):
        with pytest.raises(UserError, match="is an input of this command"):
            open_output(output, "x.jsonl", "run", "")
    with open_output("run/report.html", "run") as file:
        file.write("page")
    with open_output("/dev/null", "run") as file:
        file.write("page")
    assert Path("x.jsonl").read_text() == "rows"
