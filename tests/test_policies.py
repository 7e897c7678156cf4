"""The recipe of aligned policies: its runs and its tables."""
import importlib.util
import json
import sys
from pathlib import Path

import pytest

RUNS = Path(__file__).resolve().parents[1] / "runs"


@pytest.fixture
def policies(monkeypatch):
    for name in ("study", "policies"):
        spec = importlib.util.spec_from_file_location(name, RUNS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    return module


def test_each_reward_model_has_a_folder_and_starts_from_its_draws_generator(policies):
    jobs = [policies.PolicyJob("policies", world, name) for world in range(3) for name in policies.ARMS]
    assert len({job.folder for job in jobs}) == len(jobs)
    for job in jobs:
        config = policies.study.settings_of(job)
        assert config.out_dir == str(job.folder) and config.generator.endswith(f"toy-{job.world}") and not config.probs_from


def test_cells_are_means_and_differences_paired_by_draw(policies, capsys):
    gold = {("none", 0): 1.0, ("none", 1): 2.0, ("icrm", 0): 1.5, ("icrm", 1): 2.7}
    runs = [{"regularizer": name, "seed": seed, "usual": {"gold_after": value}} for (name, seed), value in gold.items()]
    value = lambda run: run["usual"]["gold_after"]
    assert policies.paired(runs, "none", value) == "1.50"
    assert policies.paired(runs, "icrm", value) == f"2.10 (+0.60 ± {12.706 * 0.1:.2f})"     # differences 0.5 and 0.7
    part = {key: 1.0 for key in ("gold_before", "gold_after", "greedy_gold_after", "kl", "length_after")} | {"best_of_n": {"4": 1.0, "16": 2.0, "64": 3.0}}
    policies.print_tables([{"regularizer": name, "seed": seed, "usual": part, "decoupled": part}
                           for name in policies.ARMS for seed in (0, 1)])
    printed = capsys.readouterr().out
    assert printed.count("| `icrm_uniform` |") == 4 and "best of 64" in printed


def test_the_tables_of_the_readmes_are_those_of_its_runs(policies, capsys):
    policies.print_tables(json.loads((RUNS / "policies.json").read_text()))
    printed = set(capsys.readouterr().out.splitlines())
    text = (RUNS.parent / "README.md").read_text(encoding="utf-8")
    laboratory = (RUNS / "README.md").read_text(encoding="utf-8")
    for section, lines in ((text[text.index("## Policies"):text.index("## Speed")], 7), (laboratory[laboratory.index("## Policies"):], 28)):
        quoted = [line for line in section.splitlines() if line.startswith("|")]
        assert len(quoted) == lines and not [line for line in quoted if line not in printed]
