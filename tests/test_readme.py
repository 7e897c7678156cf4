"""README's commands, settings, files and code exist, and its table is printed."""

import importlib
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch

import regularizer
from common import ROOT, parse_settings
from conftest import copy_core

PAGES = {}
for path in [ROOT / "README.md", *ROOT.glob("*/*.md")]:
    PAGES[str(path.relative_to(ROOT))] = path.read_text(encoding="utf-8")
README = PAGES["README.md"]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.M | re.S)


def find_commands(page):
    """Commands of the form `python SCRIPT.py --setting=value ...` on a page."""
    text = page.replace("\\\n", " ")
    found = re.findall(r"python ([\w/]+\.py)((?: +--\w+=[^\s`<&]+)*)", text)
    return sorted({(script, options.strip()) for script, options in found})


COMMANDS = []
for name, page in PAGES.items():
    COMMANDS += [(name, *command) for command in find_commands(page)]


def settings_class(script):
    """The dataclass of settings that a script declares."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    for name, value in vars(module).items():
        own = getattr(value, "__module__", "") == module.__name__
        if name.endswith("Config") and own and is_dataclass(value):
            return value
    return None


@pytest.mark.parametrize("page, script, options", COMMANDS)
def test_every_command_of_a_page_is_understood(page, script, options):
    assert (ROOT / script).is_file(), page
    if options:
        parse_settings(settings_class(script), options.split())


@pytest.mark.parametrize(
    "recipe", ["unified40k", "unified400k", "skywork", "math x.jsonl"]
)
def test_every_command_of_the_recipes_is_understood(tmp_path, recipe):
    calls = tmp_path / "calls"
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    (tmp_path / "python").chmod(0o755)
    subprocess.run(
        ["bash", ROOT / "lab/recipes.sh", *recipe.split()],
        check=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )
    folders, evaluated = [], set()
    for line in calls.read_text().splitlines():
        script, *options = line.split()
        config = parse_settings(settings_class(script), options)
        if script == "train.py":
            folders.append(config.out_dir)
        if script == "evaluate.py" and config.checkpoint:
            evaluated.add(config.checkpoint)
    assert len(folders) == 3 and evaluated == set(folders)
    assert all(name.startswith(f"out/{recipe.split()[0]}-") for name in folders)


def test_every_setting_and_file_on_a_page_exists():
    names = {"help", "setting", "standalone", "nproc_per_node", "nproc"}
    for path in ROOT.rglob("*.py"):
        if {"tests", ".venv", "out"} & set(path.relative_to(ROOT).parts):
            continue
        if "Config:\n" in path.read_text(encoding="utf-8"):
            config_class = settings_class(str(path.relative_to(ROOT)))
            names |= {field.name for field in fields(config_class)}
    for page, text in PAGES.items():
        assert set(re.findall(r"--(\w+)=", text)) <= names, page
    for name in re.findall(r"`([\w/]+\.(?:py|md|txt|svg|sh))`", README):
        assert (ROOT / name).is_file() or (ROOT / "data" / name).is_file(), name
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("https:") or (ROOT / target).exists(), target


def test_the_paper_to_code_table_names_functions_that_exist():
    rows = re.findall(r"^\|.*\| `([\w/]+)\.py`: (.*) \|$", README, flags=re.M)
    checked = 0
    for module, cell in rows:
        for function in re.findall(r"`(\w+)`", cell.split(", checked by")[0]):
            assert hasattr(importlib.import_module(module), function), function
            checked += 1
    assert checked >= 9


def test_the_regularizer_of_the_readme_works_as_it_stands():
    (code,) = [block for language, block in BLOCKS if language == "python"]
    namespace = dict(vars(regularizer))
    exec(code, namespace)
    rewards = torch.randn(4, 7).requires_grad_()
    mask = torch.ones(4, 7, dtype=torch.bool)
    absolute_gap = namespace["absolute_gap"]
    penalty, scale = absolute_gap(rewards, torch.full((4, 6), 0.99), mask)
    penalty.backward()
    assert penalty > 0 and scale is None and rewards.grad.abs().sum() > 0
    assert absolute_gap(rewards, torch.zeros(4, 6), mask)[0] == 0


@pytest.mark.slow
def test_python_train_py_prints_the_table_of_the_readme(tmp_path):
    (table,) = [block for _, block in BLOCKS if block.startswith("split ")]
    quoted = table.splitlines()
    copy_core(tmp_path)
    done = subprocess.run(
        [sys.executable, "train.py", "--device=cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout[done.stdout.index("split ") :].splitlines()
    assert printed[0] == quoted[0]
    for line, expected in zip(printed[1:], quoted[1:]):
        cells, quoted_cells = line.split(), expected.split()
        columns = dict(zip(quoted[0].split(), cells))
        quoted_columns = dict(zip(quoted[0].split(), quoted_cells))
        for name in ("split", "pairs", "longer", "exact"):
            assert columns[name] == quoted_columns[name]
        if columns["split"] == "val":  # the shifted splits vary more between CPUs
            for name, tolerance in (("accuracy", 0.03), ("correlation", 0.05)):
                quoted_value = float(quoted_columns[name])
                assert float(columns[name]) == pytest.approx(
                    quoted_value, abs=tolerance
                )
    p = np.load(tmp_path / "out/toy-generator/p.npy")
    exact = np.load(tmp_path / "data/toy/train-exact-p.npy")
    assert np.abs(p - exact)[exact > 0].mean() < 0.02  # the generator learned the world
