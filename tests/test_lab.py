"""The laboratory: its arms, its pairing, and tables that are those of its runs."""
import itertools
import math
from pathlib import Path
from statistics import harmonic_mean, stdev

import numpy as np
import pytest

from bon import best_of_n, halve, same_tokens
from config import UserError, parse
from data.files import read_records
from data.pairs import Item
from data.probs import PROBS
from data.toy.prepare import ToyConfig
from generator import GeneratorConfig
from lab import real, study
from regularizer import READOUTS, REGULARIZERS

ROOT = Path(__file__).resolve().parents[1]


def test_arms_are_known_distinct_and_meet_the_baseline():
    for worlds, arms, _ in study.TABLES.values():
        assert {*worlds} <= {*study.WORLDS} and len(set(arms)) == len(arms)
        for arm in arms:
            assert arm.regularizer in REGULARIZERS
            assert arm.probs in PROBS and arm.readout in READOUTS
    assert study.BASE == study.Arm("none", "last", "generator")
    draws = [*study.DRAWS, *study.FEW_DRAWS, *range(100, 104)]      # the last: settings' choice
    assert len(set(draws)) == 29 and set(study.POLICY_DRAWS) < set(study.DRAWS)
    everything = study.to_do([])
    assert sum(len(arms) for *_, arms in everything) == 20 * 27 + 20 * 18 + 9 * 5 * 3
    jobs = [(world, draw, arm) for world, draw, arms in everything for arm in arms]
    assert len(set(jobs)) == len(jobs) and set(study.IN_REGIMES) < set(study.FIRST)
    assert [world for world, *_ in everything[:21]] == ["sum"] * 20 + ["veto"]


def test_a_draws_missing_arms_alone_are_run():
    runs = [{"world": "sum", "draw": 300, "arm": arm.name} for arm in study.FACTORIAL]
    jobs = study.to_do(runs)
    assert jobs[0][:2] == ("sum", 301) and set(jobs[0][2]) == set(study.FIRST)
    missing, = (arms for world, draw, arms in jobs if (world, draw) == ("sum", 300))
    assert set(missing) == set(study.CONTROLS) - set(study.FACTORIAL)


def test_settings_of_every_world_are_understood():
    for data, how in study.WORLDS.values():
        parse(ToyConfig, [f"--{key}={value}" for key, value in data.items()])
        parse(GeneratorConfig, [f"--{key}={value}" for key, value in how.items()])


def test_differences_are_paired_by_draw(monkeypatch):
    arms = [study.BASE, study.Arm("icrm")]
    monkeypatch.setattr(study, "FEW_DRAWS", range(3))
    runs = [{"world": "sum", "draw": draw, "arm": arm.name, "val": 0.1 * draw + 0.2 * i}
            for i, arm in enumerate(arms) for draw in (2, 0, 1)]
    runs += [{"world": "veto", "draw": 2, "arm": arm.name, "val": 0.5} for arm in arms]
    *_, line = study.table(runs, ["sum"], arms, ["val", "swapped"])
    assert line == "| `icrm` | generator | last | 3 | 0.300 (**+0.200 ± 0.000**) |  |"


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_the_sign_flip_p_is_that_of_all_flips(n):
    differences = np.random.default_rng(n).normal(0.5, 1, n).round(1)   # ties and zeros too
    sums = [abs(sum(s * d for s, d in zip(signs, differences)))
            for signs in itertools.product((-1, 1), repeat=n)]
    expected = np.mean([one >= abs(sum(differences)) - 1e-9 for one in sums])
    assert study.sign_flip_p(differences) == pytest.approx(expected)


def test_a_dagger_stands_for_what_survives_all_looks():
    arms, rng = [study.BASE, study.Arm("icrm")], np.random.default_rng(0)
    noise = rng.normal(size=20)
    for gain, mark in ((2.0, "†**)"), (0.8, "**)")):
        runs = [{"world": "sum", "draw": draw, "arm": arm.name, "val": i * (gain + noise[draw])}
                for i, arm in enumerate(arms) for draw in range(20)]
        text = study.cell({(one["world"], one["arm"], one["draw"]): one for one in runs},
                          "sum", arms[1].name, "val")
        assert text.endswith(mark) and text.count("†") == mark.count("†")


def test_what_search_picks_is_what_bon_says_of_each_prompt():
    rng = np.random.default_rng(1)
    rewards = [[rng.normal(size=n) for n in rng.integers(20, 60, 64)] for _ in range(3)]
    worth = [rng.integers(-3, 5, 64).tolist() for _ in rewards]
    found = study.search_measures(rewards, worth)
    picks = [w[halve(r, (12, 20, 28))[0]] for r, w in zip(rewards, worth)]
    assert found["38%"] == pytest.approx(np.mean(picks))
    final = [[one[-1] for one in r] for r in rewards]
    assert found["best of 64"] == np.mean([w[np.argmax(r)] for r, w in zip(final, worth)])
    best = [best_of_n(r, w, 16) for r, w in zip(final, worth)]
    assert found["best of 16"] == pytest.approx(np.mean(best))
    spent = [halve(r, (12, 20, 28))[1] / sum(map(len, r)) for r in rewards]
    fewer = list(map(same_tokens, final, worth, spent))
    assert found["fewer"] == pytest.approx(np.mean(fewer))
    assert found["spent 25%"] < found["spent 38%"] < found["spent 50%"] < 1
    assert set(found) >= set(study.SEARCH)


@pytest.mark.slow
def test_a_draw_of_the_study_is_run_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "CANDIDATES", study.BonConfig(prompts=4, samples=64, device="cpu"))
    monkeypatch.setitem(study.WORLDS, "veto", ({"gold": "veto", "train": 60, "test": 40},
                                               {"steps": 60}))
    exact, chance, run = study.run_draw(("veto", 7, [study.Arm("icrm", "sum", "shuffled")]))
    assert run["arm"] == "icrm-sum-shuffled" and set(run) >= {*study.ACCURACY, *study.SEARCH}
    assert exact["best of 64"] >= run["best of 64"] and chance["38%"] == chance["25%"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_tables_in_the_pages_are_those_of_the_runs():
    runs = read_records(study.RESULTS)
    printed = {*study.tables(runs).splitlines(), *real.tables(read_records(real.RESULTS))}
    assert (ROOT / "lab" / "search.svg").read_text(encoding="utf-8") == study.picture(runs)
    laboratory = (ROOT / "lab" / "README.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = readme[readme.index("## What was found"):readme.index("## The toy world")]
    for page, least in ((laboratory[laboratory.index("## Tables"):], 100), (found, 9)):
        quoted = {line for line in page.splitlines() if line.startswith("|")}
        assert len(quoted) >= least and quoted <= printed


# Real labels -------------------------------------------------------------------------------------

def test_arms_on_real_labels_are_known_and_distinct():
    assert len({arm.name for arm in real.ARMS}) == len(real.ARMS) == 19
    assert real.ARMS[0] == real.Arm("last", "none")
    for arm in real.ARMS:
        assert arm.regularizer in REGULARIZERS and arm.probs in PROBS and arm.readout in READOUTS


def test_differences_on_real_labels_are_paired_by_case_and_by_seed():
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
    for some in ({("none", 0)}, {("none", 0), ("none", 1), ("none", 2)}):   # one seed of icrm
        fewer = {key: run for key, run in runs.items() if key in some | {("icrm", 0)}}
        assert real.cell(fewer, "icrm", "none", "RM-Bench") == f"{digits['icrm', 0].mean() / 9:.3f}"


def test_f1_is_that_of_each_seed():
    runs = {("none", seed): {"first error": first, "none before it": none}
            for seed, first, none in ((0, "1000", "10"), (1, "1100", "11"), (2, "0000", "10"))}
    scores = [harmonic_mean(pair) for pair in ((0.25, 0.5), (0.5, 1.0), (0.0, 0.5))]
    half = 4.303 * stdev(scores) / math.sqrt(3)
    assert real.f1_cell(runs, "none") == f"{np.mean(scores):.3f} ± {half:.3f}"


def test_first_wrong_steps_are_found_by_a_threshold_chosen_on_the_other_prompts():
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


def test_a_run_on_real_labels_that_stands_in_the_results_is_not_repeated():
    config, every = real.RealConfig(name="mine"), real.to_do(real.RealConfig(), [])
    assert len(every) == len(set(every)) == 3 * (len(real.ARMS) - 1) + 1
    runs = [{"pairs": "mine", "arm": arm.name, "seed": seed, "how": real.settings_of(config, arm)}
            for arm, seed in every[:5]]
    assert real.to_do(config, runs) == every[5:] and real.to_do(real.RealConfig(), runs) == every
    runs[0]["how"] = runs[0]["how"] | {"steps": 1}
    with pytest.raises(UserError, match="last-none-0.5-generator-pretrained with other settings"):
        real.to_do(config, runs)
