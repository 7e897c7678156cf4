"""The laboratory: its arms, its pairing, and tables that are those of its runs."""
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from config import UserError, read_json
from data.pairs import Item
from data.probs import PROBS
from regularizer import READOUTS, REGULARIZERS

ROOT = Path(__file__).resolve().parents[1]


def load(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, ROOT / "lab" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def study(monkeypatch):
    return load("study", monkeypatch)


@pytest.fixture
def real(monkeypatch):
    return load("real", monkeypatch)


def test_arms_are_known_distinct_and_start_with_the_baseline(study):
    assert len({arm.name for arm in study.ARMS}) == len(study.ARMS)
    for arm in study.ARMS:
        assert arm.regularizer in REGULARIZERS and arm.probs in PROBS and arm.readout in READOUTS
    assert all(arms[0] == study.Arm("none", "generator", "last") for arms in study.TABLES.values())
    assert not set(study.DRAWS) & set(range(100, 104))      # what settings were chosen on


def test_differences_are_paired_by_draw(study, monkeypatch):
    monkeypatch.setattr(study, "DRAWS", range(3))
    arms = [study.Arm("none"), study.Arm("icrm")]
    runs = [{"draw": draw, "arm": arm.name} | {name: 0.1 * draw + 0.2 * (arm.regularizer == "icrm")
                                               for name in study.COLUMNS}
            for arm in arms for draw in (2, 0, 1)]
    *_, line = study.table(runs, arms)
    assert line.startswith("| `icrm` | generator | last | 0.300 (**+0.200 ± 0.000**) |")


def test_a_study_trains_what_is_missing_and_nothing_twice(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = []

    def run_other(script, quiet, **settings):
        commands.append((script, settings))
        if script == "train.py":
            part = {key: 0.5 for _, key in study.COLUMNS.values()}
            study.write_json(f"{settings['out_dir']}/eval.json",
                             {"splits": {name: part for name, _ in study.COLUMNS.values()}})

    monkeypatch.setattr(study, "run_other", run_other)
    study.make_draw(200)
    for _ in range(2):
        found = study.run((200, study.Arm("icrm", "shuffled", "sum")))
    assert [script for script, _ in commands] == ["data/toy/prepare.py", "generator.py", "train.py"]
    last = commands[-1][1]
    assert (last["dataset"], last["seed"], last["probs"]) == ("toy-200", 200, "shuffled")
    assert found["arm"] == "icrm-shuffled-sum" and found["val"] == 0.5


def test_the_first_run_that_fails_ends_the_study(study):
    """As one line that says why; the jobs behind it never start."""
    started = []

    def job(number):
        started.append(number)
        study.run_other("train.py", quiet=True, steps=number)

    with pytest.raises(UserError, match="^python train.py --steps=0 failed: error: --st.*$"):
        study.in_parallel(1, "runs", job, range(0, -50, -1))
    assert len(started) < 10


def test_tables_in_the_pages_are_those_of_the_runs(study):
    printed = set(study.tables(read_json(study.RESULTS, "")["runs"]).splitlines())
    laboratory = (ROOT / "lab" / "README.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = readme[readme.index("## What was found"):readme.index("## The toy world")]
    for page, least in ((laboratory, 18), (found, 7)):
        quoted = [line for line in page.splitlines() if line.startswith("| `none")
                  or line.startswith("| `icrm") or line.startswith("| `dense")]
        assert len(quoted) >= least and not [line for line in quoted if line not in printed]


# Real labels -------------------------------------------------------------------------------------

def test_arms_on_real_labels_are_known_and_distinct(real):
    assert len({arm.name for arm in real.ARMS}) == len(real.ARMS) == 19
    assert real.ARMS[0] == real.Arm("last", "none")
    for arm in real.ARMS:
        assert arm.regularizer in REGULARIZERS and arm.probs in PROBS and arm.readout in READOUTS


def test_differences_on_real_labels_are_paired_by_case_and_by_seed(real):
    rng = np.random.default_rng(0)
    keys = [(arm, seed) for arm in ("none", "icrm") for seed in (0, 1, 2)]
    digits = {key: rng.integers(0, 10, 50) for key in keys}
    runs = {key: {"RM-Bench": "".join(map(str, value))} for key, value in digits.items()}
    gaps = np.array([digits["icrm", seed] - digits["none", seed] for seed in (0, 1, 2)]) / 9
    cases = [np.mean([gap[i] for gap in gaps]) for i in range(50)]
    by_case = 1.96 * math.sqrt(sum((c - np.mean(cases)) ** 2 for c in cases) / 49 / 50)
    seeds = [gap.mean() for gap in gaps]
    by_seed = 4.303 * math.sqrt(sum((s - np.mean(seeds)) ** 2 for s in seeds) / 2 / 3)
    mean = np.mean([digits["icrm", seed] for seed in (0, 1, 2)]) / 9
    assert real.cell(runs, "icrm", "none", "RM-Bench") == (
        f"{mean:.3f} ({np.mean(cases):+.3f} ± {by_case:.3f} ± {by_seed:.3f})")
    assert "(" not in real.cell(runs, "none", "none", "RM-Bench")


def test_first_wrong_steps_are_found_by_a_threshold_chosen_on_the_other_prompts(real):
    """Rewards of odd prompts are lower by 10: the threshold chosen on them finds no step of even
    ones, and that of even ones finds the first step of each odd one; the fall tells all."""
    items = [(prompt, error) for prompt in range(4) for error in (0, 1, 2)]
    measures = object.__new__(real.Measures)
    measures.solutions = [Item(str(prompt), ("",), first_error=error) for prompt, error in items]
    rewards = [np.array([1, *(1 if t < error else -1 for t in range(3))]) - 10 * (prompt % 2)
               for prompt, error in items]
    found, none_before, falls = measures.find_errors(rewards)
    assert found.tolist() == [int(prompt % 2 and error == 0) for prompt, error in items]
    assert none_before.tolist() == [int(prompt % 2 == 0) for prompt, error in items if error]
    assert falls.all()


def test_a_run_on_real_labels_that_stands_in_the_results_is_not_repeated(real):
    config, every = real.RealConfig(name="mine"), real.to_do(real.RealConfig(), [])
    assert len(every) == len(set(every)) == 3 * (len(real.ARMS) - 1) + 1
    runs = [{"pairs": "mine", "arm": arm.name, "seed": seed, "how": real.settings_of(config, arm)}
            for arm, seed in every[:5]]
    assert real.to_do(config, runs) == every[5:] and real.to_do(real.RealConfig(), runs) == every
    runs[0]["how"] = runs[0]["how"] | {"steps": 1}
    with pytest.raises(UserError, match="last-none-0.5-generator-pretrained with other settings"):
        real.to_do(config, runs)
