"""The laboratory: its runs, its pairing and its tables."""
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

import data.prepare
import regularizer

PATH = Path(__file__).resolve().parents[1] / "runs" / "study.py"


@pytest.fixture
def study(monkeypatch):
    spec = importlib.util.spec_from_file_location("study", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "study", module)
    spec.loader.exec_module(module)
    box = dict(regularizer.REGULARIZERS)
    module.lab_regularizers()
    yield module
    regularizer.REGULARIZERS.clear()
    regularizer.REGULARIZERS.update(box)


@pytest.mark.parametrize("part", ["tune", "main", "confirm", "reading", "regimes", "mismatch"])
def test_every_run_has_a_folder_of_its_own_a_known_regularizer_and_settings(study, part):
    jobs = study.jobs_of(part, 0)
    assert len({job.folder for job in jobs}) == len(jobs)
    for job in jobs:
        assert job.regularizer in study.REGULARIZERS and study.settings_of(job).seed == job.world
    generators = {}
    for job in jobs:        # one generator folder never serves two kinds of generator
        config = study.settings_of(job)
        kind = (config.dataset, config.n_layer, config.n_embd, str(study.VARIANTS[job.variant][2]))
        assert generators.setdefault(config.generator, kind) == kind
    assert not {job.world for job in jobs} & {100, 101, 102, 103} or part == "tune"


def test_a_study_runs_resumes_and_keeps_the_other_parts(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.prepare, "DATA", tmp_path / "data")
    monkeypatch.setattr(study, "HERE", tmp_path)
    small = dict(batch_size=4, n_layer=1, n_head=2, n_embd=16)
    monkeypatch.setattr(study, "VARIANTS", {"": (dict(train=30, test=10), small, dict(steps=3, n_layer=1, n_head=2, n_embd=16))})
    monkeypatch.setattr(study, "run_all", lambda work, jobs, workers, title: [done.append(job) or work(job) for job in jobs])
    jobs = {"main": [study.Job("main", world, name, steps=2) for world in (0, 1) for name in ("none", "icrm")],
            "tune": [study.Job("tune", 100, "icrm_gap_bound@8", steps=2)]}
    monkeypatch.setattr(study, "jobs_of", lambda part, worlds: jobs[part])
    done = []
    study.study("main", 0, 1)
    assert len(done) == 2 + 4       # two worlds with a generator each, four runs
    done.clear()
    study.study("main", 0, 1)
    study.study("tune", 0, 1)
    assert [job.part for job in done] == ["tune", "tune"]
    runs = json.loads((tmp_path / "study.json").read_text())
    assert [(run["part"], run["regularizer"], run["seed"]) for run in runs] == [
        ("main", "none", 0), ("main", "icrm", 0), ("main", "none", 1), ("main", "icrm", 1), ("tune", "icrm_gap_bound@8", 100)]
    jobs["main"] = jobs["main"][:2]     # fewer draws leave the others' runs where they are
    study.study("main", 0, 1)
    assert len(json.loads((tmp_path / "study.json").read_text())) == 5
    assert set(runs[0]["swapped"]) == {"accuracy", "correlation", "calibration_error", "credit_leak", "best_of_16"}
    assert "decoupled" not in runs[4] and "swapped" not in runs[4] and 0 <= runs[4]["train"]["accuracy"] <= 1
    assert all("generator" in path.parent.name for path in tmp_path.glob("out/study/*/ckpt.pt"))    # the rest is deleted


def test_differences_are_paired_by_draw(study):
    runs = lambda values: [{"seed": seed, "val": {"accuracy": value}} for seed, value in values.items()]
    a, b = runs({0: 0.9, 1: 0.5, 2: 0.7}), runs({2: 0.6, 0: 0.8, 1: 0.4})
    assert study.tables.difference(a, b, "val") == "**+0.100 ± 0.000**"
    assert study.tables.mean_and_error(a, "val") == f"0.700 ± {0.2 / math.sqrt(3):.3f}"
    assert not study.tables.difference(a, runs({0: 0.5, 1: 0.9, 2: 0.6}), "val").startswith("**")


def test_what_a_reward_reads_is_found_again(study, monkeypatch):
    """A reward made of evidence and, in the first clause alone, of the remark: the coefficients come back."""
    import numpy as np

    from data.batches import PairData
    from data.pairs import Pair
    from data.toy.world import EVIDENCE, QUALITY, REMARK, World, pairs, parse
    data = PairData([Pair(row["prompt"], row["chosen"], row["rejected"]) for row in pairs(World(remarks="random"), 100, "reading")], [], 0)
    worth = dict(zip(EVIDENCE + REMARK, QUALITY + QUALITY))
    def reward(text):
        clauses = [[worth.get(part, 0) for part in clause] for clause in parse(text)]
        return np.array([3.0 + 2 * sum(evidence for evidence, _ in clauses) - 0.5 * clauses[0][1]])
    monkeypatch.setattr(study, "evaluate_pairs", lambda model, data, device: (
        None, [reward(pair.chosen) for pair in data.pairs] + [reward(pair.rejected) for pair in data.pairs]))
    found = study.reading(None, data)
    assert found["evidence"] == pytest.approx([2.0] * 6) and found["remark"] == pytest.approx([-0.5] + [0.0] * 5, abs=1e-6)
