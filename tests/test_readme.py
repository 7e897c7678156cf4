"""The README says what the code does: its commands are read by the scripts' own settings, its output is made again."""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest

import config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.M | re.S)
COMMANDS = [line.split("#")[0].strip() for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
SCRIPTS = [part for line in COMMANDS for part in map(str.strip, line.split("&&")) if re.match(r"python \S+\.py", part)]
MODULES = {}


def settings_of(script):
    """The dataclass of settings that a script declares, or None."""
    if script not in MODULES:
        spec = importlib.util.spec_from_file_location("script", ROOT / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        MODULES[script] = next((value for name, value in vars(module).items() if name.endswith("Config")
                                and is_dataclass(value) and value.__module__ == "script"), None)
    return MODULES[script]


@pytest.mark.parametrize("command", sorted(set(SCRIPTS)))
def test_every_command_of_the_readme_is_understood(command):
    _, script, *arguments = command.split()
    assert (ROOT / script).is_file()
    if arguments:
        config.parse(settings_of(script), arguments)


def test_the_two_commands_start_from_nothing():
    setup = "python -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    assert setup + "python train.py" in COMMANDS and setup + "python -m pytest" in COMMANDS


def test_every_setting_named_in_the_readme_exists():
    known = {"help", "key", "standalone", "nproc_per_node"}
    for script in ("train.py", "generator.py", "evaluate.py", "bon.py", "report.py", "dpo.py", "data/prepare.py", "data/toy/prepare.py",
                   "data/hh_rlhf/prepare.py", "data/gsm8k/prepare.py", "runs/study.py", "runs/policies.py", "bench.py"):
        known |= set(settings_of(script).__dataclass_fields__)
    text = re.sub(r"```.*?```", "", README, flags=re.S)
    assert set(re.findall(r"--(\w+)", text)) <= known


def test_every_file_named_in_the_readme_exists():
    for name in re.findall(r"`([\w/]+\.(?:py|sh|txt))`", README):
        assert (ROOT / name).is_file(), name


def test_the_tables_of_the_laboratory_are_those_of_its_runs(capsys):
    spec = importlib.util.spec_from_file_location("tables", ROOT / "runs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    tables.print_tables(json.loads((ROOT / "runs" / "study.json").read_text()))
    printed = set(capsys.readouterr().out.splitlines())
    laboratory = (ROOT / "runs" / "README.md").read_text(encoding="utf-8")
    sections = (README[README.index("## The laboratory"):README.index("## Real labels")],
                laboratory[laboratory.index("## The arms"):laboratory.index("## Policies")])
    for section, lines in zip(sections, (7, 100)):
        quoted = [line for line in section.splitlines() if line.startswith("|")]
        assert len(quoted) >= lines and not [line for line in quoted if line not in printed]


@pytest.mark.slow
def test_python_train_py_prints_the_table_quoted_in_the_readme(tmp_path):
    quoted = next(block for _, block in BLOCKS if block.startswith("split "))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("*.jsonl", "*.json", "__pycache__", "toy-*"))
    done = subprocess.run([sys.executable, "train.py", "--device=cpu"], cwd=tmp_path, capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS="2"))
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    printed = done.stdout[done.stdout.index("split "):].splitlines()
    assert printed[0] == quoted.splitlines()[0]
    for line, expected in zip(printed[1:], quoted.splitlines()[1:]):
        (split, accuracy, _, _, *data, correlation, _, _), other = line.split(), expected.split()
        assert (split, *data) == (other[0], *other[4:6])        # the data are the same bytes everywhere
        if split == "val":      # on the shifted splits rounding alone decides too much, as the README says
            assert float(accuracy) == pytest.approx(float(other[1]), abs=0.03)
            assert float(correlation) == pytest.approx(float(other[6]), abs=0.05)


def test_the_regularizer_of_the_readme_works_as_it_stands():
    import torch

    import regularizer
    code = next(block for kind, block in BLOCKS if kind == "python")
    exec(code, namespace := dict(vars(regularizer)))
    rewards = torch.randn(4, 7).requires_grad_()
    mask = torch.ones(4, 7, dtype=torch.bool)
    penalty, scale = namespace["stay_close"](rewards, torch.full((4, 6), 0.99), mask)
    penalty.backward()
    assert penalty > 0 and scale is None and rewards.grad.abs().sum() > 0
    assert namespace["stay_close"](rewards, torch.zeros(4, 6), mask)[0] == 0     # surprising tokens are free
