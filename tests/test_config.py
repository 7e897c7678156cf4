"""Settings and whole-program behaviour: exit status 2, one line, no traceback."""
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from config import UserError, choose, fingerprint, parse, usage, write_atomically

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Example:
    rate: float = 0.5       # how fast
    count: int = 3          # how many
    name: str = "x"         # what to call it
    loud: bool = False      # whether to shout


def test_the_value_is_all_that_follows_the_first_equals_sign():
    assert parse(Example, ["--name=a=b", "--rate=1", "--count=-2", "--loud=True"]) == Example(1.0, -2, "a=b", True)
    assert parse(Example, ["--name="]).name == ""


@pytest.mark.parametrize("argument, message", [
    ("--cuont=3", "did you mean --count"), ("--count=3.5", "whole number"), ("--rate=fast", "a number"),
    ("--loud=yes", "True or False"), ("--loud", "--key=value"), ("count=3", "--key=value"),
])
def test_a_bad_setting_is_named(argument, message):
    with pytest.raises(UserError, match=message):
        parse(Example, [argument])


def test_help_lists_every_setting_with_its_comment():
    assert "\n".join(usage(Example)).count("how many") == 1 and len(usage(Example)) == 6


def test_choose_lists_the_options():
    choose("colour", "red", ["red"])
    with pytest.raises(UserError, match="unknown colour 'blue'; choose one of: red"):
        choose("colour", "blue", ["red"])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.txt"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("ne")
        raise RuntimeError("disk full")
    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x.json", tmp_path):
        with pytest.raises(UserError, match="cannot write"):
            write_atomically(path, lambda temporary: temporary.write_text("x"))


def test_fingerprints_differ_where_the_content_does():
    import torch
    a, b = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    assert fingerprint(a) == fingerprint({"w": torch.zeros(2)}) != fingerprint(b)
    assert fingerprint("ab") != fingerprint("a")


@pytest.mark.parametrize("command", [
    "train.py --regularizer=icmr", "train.py --rgularizer=icrm", "train.py --dataset=nowhere", "evaluate.py --checkpoint=nowhere",
    "evaluate.py --compare=nowhere", "bon.py --checkpoint=README.md", "generator.py --steps=many",
    "data/hh_rlhf/prepare.py --input=nowhere", "data/prepare.py --name=x --input=README.md",
])
def test_a_users_error_is_one_line_with_exit_status_2(command):
    script, *arguments = command.split()
    done = subprocess.run([sys.executable, ROOT / script, *arguments], cwd=ROOT, capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
