"""The README says what the code does, and the house keeps its measures."""
import ast
import importlib
import re
import shutil
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import config
import regularizer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.M | re.S)
COMMANDS = [line.split("#")[0].strip() for kind, block in BLOCKS if kind == "bash"
            for line in block.splitlines()]
COMMANDS += [" ".join(one.split()) for one in re.findall(r"`(python\s[^`]+)`", README)]
SCRIPTS = [part for line in COMMANDS for part in map(str.strip, line.split("&&"))
           if re.match(r"python \S+\.py", part)]
SOURCES = sorted(path for path in ROOT.rglob("*.py") if not {".venv", "out"} & set(path.parts))


def settings_of(script):
    """The dataclass of settings that a script declares, or None."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    return next((value for name, value in vars(module).items() if name.endswith("Config")
                 and is_dataclass(value) and value.__module__ == module.__name__), None)


@pytest.mark.parametrize("command", sorted(set(SCRIPTS)))
def test_every_command_of_the_readme_is_understood(command):
    _, script, *arguments = command.split()
    assert (ROOT / script).is_file()
    if arguments:
        config.parse(settings_of(script), arguments)


@pytest.mark.parametrize("setting", ["unified40k", "unified400k", "skywork", "math x.jsonl"])
def test_every_command_of_the_recipes_is_understood(tmp_path, setting):
    said = tmp_path / "said"
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
    (tmp_path / "python").chmod(0o755)
    subprocess.run(["bash", ROOT / "lab/recipes.sh", *setting.split()], check=True,
                   env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    commands = [line.split() for line in said.read_text().splitlines()]
    found = [(script, config.parse(settings_of(script), arguments))
             for script, *arguments in commands]
    models = [one.out_dir for script, one in found if script == "train.py"]
    assert len(models) == 3 and all(one.startswith(f"out/{setting.split()[0]}-") for one in models)
    judged = {one.checkpoint for script, one in found if script == "evaluate.py"} - {""}
    assert judged == set(models)


def test_every_setting_and_file_named_in_the_readme_exists():
    known = {"help", "key", "standalone", "nproc_per_node"}
    for path in SOURCES:
        if "Config:\n" in path.read_text(encoding="utf-8") and "tests" not in path.parts:
            known |= set(settings_of(str(path.relative_to(ROOT))).__dataclass_fields__)
    assert set(re.findall(r"--(\w+)", README)) <= known
    for name in re.findall(r"`([\w/]+\.(?:py|md|txt|svg))`", README):
        assert (ROOT / name).is_file(), name


def test_the_regularizer_of_the_readme_works_as_it_stands():
    code = next(block for kind, block in BLOCKS if kind == "python")
    namespace = dict(vars(regularizer))
    exec(code, namespace)
    rewards = torch.randn(4, 7).requires_grad_()
    mask = torch.ones(4, 7, dtype=torch.bool)
    penalty, scale = namespace["stay_close"](rewards, torch.full((4, 6), 0.99), mask)
    penalty.backward()
    assert penalty > 0 and scale is None and rewards.grad.abs().sum() > 0
    assert namespace["stay_close"](rewards, torch.zeros(4, 6), mask)[0] == 0    # surprise is free


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_columns_and_lengths(path):
    text = path.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if len(line) > 100] == []
    assert len(text.splitlines()) <= 300 or "tests" in path.parts
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno >= 50] == []


def test_size_and_rooms():
    house = [path for path in SOURCES if "tests" not in path.parts]
    rooms = {path.stem for path in house} | {"data", "toy"}
    imports = {(path.stem, room) for path in house if (ROOT / path.name).is_file()
               for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
               for room in imported(node) if room in rooms and room != path.stem}
    assert len(README.splitlines()) <= 220
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in house) <= 6149
    assert len(imports) <= 35, sorted(imports)


def test_scripts_say_how_threads_wait_before_torch_is_loaded():
    """config.py sets it, and torch reads it when it is loaded."""
    scripts = [path for path in SOURCES if "run_script(" in path.read_text(encoding="utf-8")]
    for path in scripts:
        nodes = ast.parse(path.read_text(encoding="utf-8")).body
        names = [name for node in nodes for name in imported(node)]
        others = {"torch", "data", "evaluate", "generator", "model", "train", "bon"} & set(names)
        if path.parts[-2] != "tests" and path.stem != "config" and others:
            assert names.index("config") < min(map(names.index, others)), path
    assert len(scripts) > 10


def imported(node):
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module.split(".")[0]]
    names = node.names if isinstance(node, ast.Import) else []
    return [alias.name.split(".")[0] for alias in names]


@pytest.mark.slow
def test_python_train_py_prints_the_table_quoted_in_the_readme(tmp_path):
    quoted = next(block for _, block in BLOCKS if block.startswith("split ")).splitlines()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "data", tmp_path / "data",
                    ignore=shutil.ignore_patterns("*.npy", "dataset.json", "toy-*", "__pycache__"))
    done = subprocess.run([sys.executable, "train.py", "--device=cpu"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout[done.stdout.index("split "):].splitlines()
    assert printed[0] == quoted[0]
    for line, expected in zip(printed[1:], quoted[1:]):
        (split, accuracy, _, *data), other = line.split(), expected.split()
        assert (split, data[:4]) == (other[0], other[3:7])      # ties, n, by length, oracle
        if split == "val":      # elsewhere rounding decides too much
            assert float(accuracy) == pytest.approx(float(other[1]), abs=0.03)
            assert float(data[4]) == pytest.approx(float(other[7]), abs=0.05)
    p = np.load(tmp_path / "out/toy-generator/p.npy")
    exact = np.load(tmp_path / "data/toy/train-exact-p.npy")
    assert np.abs(p - exact)[exact > 0].mean() < 0.02       # the generator has learned the world
