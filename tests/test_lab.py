"""The studies: arms, pairing, tables, and pages that show the stored runs."""

import itertools
import json
import math
import re
import time
from statistics import harmonic_mean, stdev

import numpy as np
import pytest

from bon import best_of_n, best_of_n_at_budget, halve
from common import ROOT, UserError, parse_settings
from data.dataset import open_dataset
from data.toy import ToyConfig
from generator import P_SOURCES, GeneratorConfig
from lab import real, runs, study
from lab.intervals import mean_and_half_width, sign_flip_p
from lab.study import Arm, Condition
from model import PREFIX_REWARDS
from regularizer import REGULARIZERS

STUDY_RECORDS = runs.read_records(ROOT / "lab" / "study.jsonl")
REAL_RECORDS = runs.read_records(ROOT / "lab" / "real.jsonl")


def make_record(arm, seed, world="sum", **metrics):
    return {"version": 3, "world": world, "seed": seed, **arm._asdict(), **metrics}


# Commands and records -----------------------------------------------------------------


def test_a_command_that_fails_is_an_error_with_its_last_line(inside):
    with pytest.raises(UserError, match="python train.py --steps=0 failed: .*--steps"):
        runs.run_command("train.py", steps=0)


def test_an_error_in_one_job_ends_the_commands_of_the_others(tmp_path):
    script = tmp_path / "wait.py"
    script.write_text("import time\ntime.sleep(100)\n")

    def work(name):
        if name == "wait":
            runs.run_command(script)
        while not runs.running:
            time.sleep(0.1)
        raise UserError("this job fails")
        yield

    with pytest.raises(UserError, match="this job fails"):
        runs.run_jobs(work, [("wait",), ("fail",)], tmp_path / "records", 2)
    assert runs.running.pop().wait(timeout=10) != 0


def test_every_record_is_appended_as_soon_as_it_is_there(tmp_path):
    path = tmp_path / "folder" / "records.jsonl"
    assert runs.read_records(path) == []

    def work(number):
        yield {"number": number}
        assert {"number": number} in runs.read_records(path)

    runs.run_jobs(work, [(1,), (2,)], path, workers=2)
    numbers = sorted(record["number"] for record in runs.read_records(path))
    assert numbers == [1, 2]
    path.write_text('{"number": 1}\n{"numb')
    with pytest.raises(UserError, match="line 2 is damaged"):
        runs.read_records(path)


@pytest.mark.parametrize("module", [study, real])
def test_runs_of_two_versions_are_not_mixed(module):
    config_class = module.StudyConfig if module is study else module.RealConfig
    config = config_class(results=str(ROOT / "lab" / f"{module.__name__[4:]}.jsonl"))
    with pytest.raises(UserError, match="version 2.*--results=FILE"):
        module.main(config)


# Statistics ---------------------------------------------------------------------------


@pytest.mark.parametrize("n, t", [(2, 12.706), (10, 2.262), (20, 2.093), (100, 1.984)])
def test_half_widths_are_those_of_students_t(n, t):
    values = np.random.default_rng(n).normal(size=n)
    mean, half_width = mean_and_half_width(values)
    assert mean == pytest.approx(np.mean(values))
    assert half_width == pytest.approx(t * stdev(values) / math.sqrt(n), rel=1e-3)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_the_sign_flip_p_counts_all_flips(n):
    differences = np.random.default_rng(n).normal(0.5, 1, n).round(1)  # has ties
    observed, n_extreme = abs(sum(differences)), 0
    for signs in itertools.product((-1, 1), repeat=n):
        n_extreme += abs(sum(signs * differences)) >= observed - 1e-9
    assert sign_flip_p(differences) == pytest.approx(n_extreme / 2**n)


# The study on the toy world -----------------------------------------------------------


def test_arms_exist_and_are_distinct():
    for table in study.TABLES:
        assert set(table.worlds) <= set(study.WORLDS), table.title
        assert len(set(table.arms)) == len(table.arms), table.title
        assert set(table.columns) <= set(study.COLUMNS), table.title
        for world in table.worlds:
            assert set(table.arms) <= set(study.WORLDS[world].arms), table.title
    for condition in study.WORLDS.values():
        for arm in set(condition.arms) - set(study.REFERENCES):
            assert arm.regularizer in REGULARIZERS
            assert arm.prefix_reward in PREFIX_REWARDS
            assert arm.p_source in P_SOURCES
    n_runs = sum(len(arms) for _, _, arms in study.find_jobs([]))
    noisy = 20 * (10 + 2) + 8 * (2 * (9 + 2) + 2)
    assert n_runs == 20 * (27 + 2) + 20 * (18 + 2) + 9 * 5 * (3 + 2) + noisy


def test_settings_of_every_world_are_understood():
    for condition in study.WORLDS.values():
        data = [f"--{name}={value}" for name, value in condition.data.items()]
        generator = [f"--{name}={value}" for name, value in condition.generator.items()]
        parse_settings(ToyConfig, data)
        parse_settings(GeneratorConfig, generator)


def test_only_missing_arms_are_run():
    records = []
    for arm in [*study.REFERENCES, *study.FACTORIAL]:
        records.append(make_record(arm, 300))
    jobs = study.find_jobs(records)
    assert jobs[0][:2] == ("sum", 300)
    assert set(jobs[0][2]) == set(study.P_SOURCE_ARMS) - set(study.FACTORIAL)
    assert jobs[1][:2] == ("sum", 301) and len(jobs[1][2]) == 29


def test_search_is_measured_as_bon_does():
    rng = np.random.default_rng(1)
    lengths, rewards, qualities = (12, 20, 28), [], []
    for _ in range(3):
        rewards.append([rng.normal(size=n) for n in rng.integers(20, 60, 64)])
        qualities.append(rng.integers(-3, 5, 64).tolist())
    best, at_budget, halved = [], [], []
    for candidates, quality in zip(rewards, qualities):
        final = [prefix_rewards[-1] for prefix_rewards in candidates]
        winner, n_tokens = halve(candidates, lengths)
        share = n_tokens / sum(map(len, candidates))
        best.append(best_of_n(final, quality, 16))
        at_budget.append(best_of_n_at_budget(final, quality, share))
        halved.append(quality[winner])
    metrics = study.measure_search(rewards, qualities)
    assert metrics["best_of_16"] == pytest.approx(np.mean(best))
    assert metrics["best_of_n_38"] == pytest.approx(np.mean(at_budget))
    assert metrics["halving_38"] == pytest.approx(np.mean(halved))
    gain = metrics["halving_38"] - metrics["best_of_64"]
    assert metrics["halving_gain"] == pytest.approx(gain)
    assert metrics["tokens_25"] < metrics["tokens_38"] < metrics["tokens_50"] < 1
    assert set(study.SELECTED) < set(metrics)


def test_differences_are_paired_by_seed():
    records = []
    for seed in (4, 2, 0, 1, 3):
        records.append(make_record(study.NONE, seed, val=0.1 * seed))
        records.append(make_record(study.ICRM, seed, val=0.1 * seed + 0.2))
    records.append(make_record(study.ICRM, 7, "veto", val=0.9))
    records.append(make_record(study.NONE, 8, val=0.2))
    table = study.Table("", ["sum"], [study.NONE, study.ICRM], ["val", "swapped"])
    *_, line = study.format_table(study.index_records(records), table)
    cells = "| 5 | 0.400 (+0.200 ± 0.000) |  |"
    assert line == f"| sum | icrm | generator | last {cells}"


@pytest.mark.parametrize("gain, is_bold", [(2.0, True), (0.8, False)])
def test_bold_differences_are_significant_after_correction(gain, is_bold):
    noise, records = np.random.default_rng(0).normal(size=20), []
    for seed in range(20):
        records.append(make_record(study.NONE, seed, val=0.0))
        records.append(make_record(study.ICRM, seed, val=gain + noise[seed]))
    results = study.index_records(records)
    cell = study.format_cell(results, "sum", study.ICRM, study.NONE, "val")
    assert cell.endswith("**)") == is_bold
    differences = gain + noise
    p = sign_flip_p(differences)
    assert (p * study.count_comparisons() < 0.05) == is_bold and p < 0.05


@pytest.mark.slow
def test_a_seed_of_the_study_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    candidates = study.BonConfig(prompts=4, samples=64, device="cpu")
    arm = Arm("icrm", "sum", "shuffled")
    data = {"train": 200, "test": 40}
    monkeypatch.setattr(study, "CANDIDATES", candidates)
    monkeypatch.setattr(study, "POLICIES", [arm])
    monkeypatch.setattr(study, "POLICY_SEEDS", [7])
    condition = Condition(data, {"steps": 200}, [*study.REFERENCES, arm], [7])
    monkeypatch.setattr(study, "WORLDS", {"sum": condition})
    ((world, seed, arms),) = study.find_jobs([])
    exact, random, record = study.run_seed(world, seed, arms)
    assert record["regularizer"] == "icrm" and record["p_source"] == "shuffled"
    columns = [*study.ACCURACY, *study.SELECTED, "halving_gain", *study.POLICY]
    assert set(record) >= {"version", "world", "seed", *columns}
    assert random["halving_38"] == random["best_of_16"] < exact["best_of_16"]
    assert study.find_jobs([exact, random, record]) == []
    (checkpoint,) = tmp_path.rglob("ckpt.pt")
    assert checkpoint.parent.name == "generator"
    assert not list((tmp_path / "data").rglob("*.npy"))


# The study on real pairs --------------------------------------------------------------


def test_arms_on_real_pairs_exist_and_are_distinct():
    assert len(set(real.ARMS)) == len(real.ARMS) == 18
    assert real.ARMS[0] == real.BASELINE
    for arm in real.ARMS:
        assert arm.regularizer in REGULARIZERS
        assert arm.prefix_reward in PREFIX_REWARDS
        assert arm.p_source in P_SOURCES


def test_differences_on_real_pairs_are_by_case_and_by_seed():
    rng = np.random.default_rng(0)
    icrm, results, digits = real.Arm("last", "icrm"), {}, {}
    for arm in (real.BASELINE, icrm):
        for seed in (0, 1, 2):
            digits[arm, seed] = rng.integers(0, 10, 50)
            results[arm, seed] = {"rm_bench": "".join(map(str, digits[arm, seed]))}
    gaps = []
    for seed in (0, 1, 2):
        gaps.append((digits[icrm, seed] - digits[real.BASELINE, seed]) / 9)
    cases = [sum(case) / 3 for case in zip(*gaps)]
    seeds = [sum(gap) / 50 for gap in gaps]
    by_case = 1.96 * stdev(cases) / math.sqrt(50)
    by_seed = 4.303 * stdev(seeds) / math.sqrt(3)
    mean = np.mean([digits[icrm, seed] for seed in (0, 1, 2)]) / 9
    difference = f"{np.mean(cases):+.3f} ± {by_case:.3f} ± {by_seed:.3f}"
    cell = real.format_cell(results, icrm, real.BASELINE, "rm_bench")
    assert cell == f"{mean:.3f} ({difference})"
    assert "(" not in real.format_cell(results, icrm, icrm, "rm_bench")
    del results[icrm, 1], results[icrm, 2]
    mean = digits[icrm, 0].mean() / 9
    cell = real.format_cell(results, icrm, real.BASELINE, "rm_bench")
    assert cell == f"{mean:.3f}"


def test_f1_is_computed_for_each_seed():
    results = {}
    for seed, first, none in ((0, "1000", "10"), (1, "1100", "11"), (2, "0000", "10")):
        record = {"first_error": first, "none_before_error": none}
        results[real.BASELINE, seed] = record
    scores = [harmonic_mean(pair) for pair in ((0.25, 0.5), (0.5, 1.0), (0.0, 0.5))]
    half_width = 4.303 * stdev(scores) / math.sqrt(3)
    expected = f"{np.mean(scores):.3f} ± {half_width:.3f}"
    assert real.format_f1(results, real.BASELINE) == expected


def test_thresholds_for_wrong_steps_are_chosen_on_the_other_prompts():
    """Rewards of odd prompts are lower by 10.

    So the threshold chosen on them is below every reward of even prompts, and that of
    even prompts is above every reward of odd ones.
    """
    benchmarks = object.__new__(real.Benchmarks)
    benchmarks.first_errors = np.array([0, 1, 2] * 4)
    benchmarks.halves = np.array([0, 0, 0, 1, 1, 1] * 2)
    step_rewards = []
    for half, error in zip(benchmarks.halves, benchmarks.first_errors):
        rewards = np.array([1.0, *(1.0 if step < error else -1.0 for step in range(3))])
        step_rewards.append(rewards - 10 * half)
    outcomes = benchmarks.find_errors(step_rewards)
    for half, error, is_found in zip(
        benchmarks.halves, benchmarks.first_errors, outcomes["first_error"]
    ):
        assert is_found == (half == 1 and error == 0)
    assert outcomes["none_before_error"] == [True, True, False, False] * 2
    assert all(outcomes["largest_drop"])


def test_finished_runs_on_real_pairs_are_not_repeated():
    config = real.RealConfig(name="mine")
    jobs = real.find_jobs(config, [])
    assert len(set(jobs)) == len(jobs) == 3 * 18
    settings, records = real.training_settings(config), []
    for arm, seed in jobs[:5]:
        records.append(real.make_record(config, arm, seed, settings, {}))
    assert real.find_jobs(config, records) == jobs[5:]
    assert len(real.find_jobs(real.RealConfig(), records)) == 3 * 18
    records[0]["settings"] = {**settings, "steps": 1}
    with pytest.raises(UserError, match="other settings"):
        real.find_jobs(config, records)


def write_benchmarks(folder):
    """Small files in the formats of RM-Bench, candidates and solutions."""
    styles = ["s", "a longer one", "the longest of the three"]
    rejected = [f"{style}, but wrong" for style in styles]
    pair = {"prompt": "Why?", "chosen": styles, "rejected": rejected, "domain": "chat"}
    responses = []
    for number in range(4):
        responses.append({"text": "so " * (number + 1), "correct": number == 3})
    rows = {
        "rm_bench": [pair, {**pair, "prompt": "How?"}],
        "candidates": [{"prompt": "Which?", "responses": responses}],
        "steps": [],
    }
    for number in range(4):
        steps = ["one step", "two steps", "three"]
        row = {"prompt": f"{number}?", "steps": steps, "first_error": number % 3}
        rows["steps"].append(row)
    files = {}
    for name, lines in rows.items():
        files[name] = str(folder / f"{name}.jsonl")
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    return files


def test_benchmarks_count_what_a_judge_prefers(inside, tmp_path):
    config = real.RealConfig(**write_benchmarks(tmp_path))
    benchmarks = real.Benchmarks(config, open_dataset("toy"))

    def compute_rewards(examples):
        return real.reference_rewards(real.LENGTH, 0, examples)

    results = benchmarks.evaluate(compute_rewards)
    assert len(results["held_out"]) == 20
    assert results["rm_bench"] == "33" or results["rm_bench"] < "99"
    assert results["rm_bench_hard"] == "00"
    assert results["best_of_4"] == "1" and results["halving"] == "1"
    assert len(results["first_error"]) == len(results["largest_drop"]) == 4
    assert len(results["none_before_error"]) == 2


# Pages --------------------------------------------------------------------------------


def printed_rows():
    """The values of every row of the printed tables: labels, means and differences."""
    text = study.format_tables(STUDY_RECORDS) + "\n" + real.format_tables(REAL_RECORDS)
    rows = []
    for line in text.splitlines():
        if line.startswith("|"):
            values = set()
            for cell in line.strip("| ").split("|"):
                values |= {part.strip() for part in re.split(r"[()]", cell)}
            rows.append(values)
    return rows


def round_numbers(text):
    """Numbers with two decimals in place of three."""

    def shorten(match):
        sign = "+" if match[0].startswith("+") else ""
        return f"{float(match[0]):{sign}.2f}"

    return re.sub(r"[+-]?\d+\.\d{3}\b", shorten, text)


def table_rows(page):
    """The cells of the rows of all Markdown tables, without their headers."""
    rows, lines = [], page.splitlines()
    for number, line in enumerate(lines):
        is_header = number + 1 < len(lines) and lines[number + 1].startswith("|-")
        if line.startswith("| ") and not is_header:
            cells = line.strip("| ").split("|")
            rows.append({cell.strip().replace("`", "") for cell in cells} - {""})
    return rows


def test_tables_md_is_what_the_commands_print():
    page = (ROOT / "lab" / "tables.md").read_text(encoding="utf-8")
    assert study.format_tables(STUDY_RECORDS) in page
    assert page.endswith(real.format_tables(REAL_RECORDS) + "\n")


def test_tables_of_the_laboratory_are_of_its_records():
    page = (ROOT / "lab" / "README.md").read_text(encoding="utf-8")
    printed, n_rows = printed_rows(), 0
    for row in table_rows(page[: page.index("## Speed")]):
        assert any(row <= values for values in printed), row
        n_rows += 1
    assert n_rows > 30


def test_the_table_of_the_readme_is_of_the_records():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    section = page[page.index("## What was found") :].split("\n## ")[0]
    printed = []
    for values in printed_rows():
        printed.append(values | {round_numbers(value) for value in values})
    rows = table_rows(section)
    assert len(rows) >= 5
    for row in rows:
        labels = {"icrm, p = 1": {"icrm", "uniform"}}
        cells = set()
        for cell in row:
            cells |= labels.get(cell, {cell})
        assert any(cells <= values for values in printed), row


def test_intervals_in_the_text_are_of_the_records():
    page = (ROOT / "lab" / "README.md").read_text(encoding="utf-8")
    text = "\n".join(line for line in page.splitlines() if not line.startswith("|"))
    known = " ".join(" ".join(values) for values in printed_rows())
    intervals = re.findall(r"\d\.\d{3} ± \d\.\d{3}", text)
    assert intervals
    for interval in intervals:
        assert interval in known, interval
