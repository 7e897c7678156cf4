"""The laboratory's study on the toy world: read-out, regularizer and p, for accuracy, for the truth
of prefixes, for search and for policies.

    python lab/study.py                 run what is missing, then print the tables
    python lab/study.py --tables=True   print the tables of lab/study.jsonl; nothing is trained
    python lab/study.py --tables=True --svg=lab/search.svg      and draw what search picks

A draw is a dataset, a generator, a training seed and candidates of its own; every arm meets the
same draws and all differences are paired by draw. A run is `python train.py` with its defaults but
for the arm's settings. A draw's runs are written when all are done, and are not repeated.
"""
import os
import shutil
import sys
from dataclasses import dataclass
from itertools import product
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import HERE, in_range, run_other, run_script
import numpy as np
import torch
from tqdm import tqdm

from benchmarks import mean_and_half_width
from bon import (BonConfig, best_of_n, exact_values, halve, obtain_candidates, open_generator,
                 same_tokens)
from data.dataset import open_dataset
from data.files import read_json, read_records, write_records, write_text
from evaluate import load_reward_model, prefix_rewards
from report import CSS, chart, ticks

RESULTS = HERE / "lab" / "study.jsonl"
DRAWS = range(300, 320)     # decided before any was made; settings were chosen on 100 to 103
FEW_DRAWS = range(320, 325)     # of the regimes
POLICY_DRAWS = range(300, 310)
# World: settings of its data, of its generator. The first two have all arms.
WORLDS = {
    "sum": ({}, {}), "veto": ({"gold": "veto"}, {}),
    "as it is": ({}, {}), "125 pairs": ({"train": 125}, {}), "2,000 pairs": ({"train": 2000}, {}),
    "144 fillers": ({"fillers": 144}, {}), "20% wrong labels": ({"noise": 0.2}, {}),
    "late evidence": ({"late": 3}, {}), "one layer": ({}, {"n_layer": 1}),
    "width 128": ({}, {"n_embd": 128}), "poor generator": ({}, {"steps": 100}),
}
HALVE = {"25%": (6, 11, 16), "38%": (12, 20, 28), "50%": (19, 30, 41)}     # of all tokens: places
CANDIDATES = BonConfig(prompts=60, samples=64, max_new_tokens=100, device="cpu")


@dataclass(frozen=True)
class StudyConfig:
    workers: int = 2        # draws at a time, one thread each
    tables: bool = False    # print the tables of lab/study.jsonl and train nothing
    svg: str = ""           # draw what search picks, by tokens written


class Arm(NamedTuple):
    """One way to train a reward model."""
    regularizer: str = "none"
    readout: str = "last"
    probs: str = "generator"

    @property
    def name(self):
        return "-".join(self)


BASE = Arm()
USES_P = ("icrm", "icrm_gap_bound", "quiet")
FACTORIAL = [Arm(*pair) for pair in product(
    ("none", "icrm", "dense_bt", "icrm_gap_bound", "quiet", "td_lambda"), ("last", "mean", "sum"))]
CONTROLS = [Arm(name, "last", probs) for name in USES_P
            for probs in ("generator", "uniform", "shuffled", "exact")]
POLICIES = [BASE, Arm("icrm"), Arm("none", "sum"), Arm("icrm", "sum")]
FIRST = [*POLICIES, Arm("none", "mean"), Arm("dense_bt"), Arm("icrm_gap_bound")]    # of all
IN_REGIMES = POLICIES[:3]
ACCURACY = {"val": ("val", "accuracy"), "decoupled": ("decoupled", "accuracy"),
            "swapped": ("swapped", "accuracy"), "longer": ("longer", "accuracy"),
            "corr(z,V)": ("val", "correlation"), "calib.": ("val", "calibration_error"),
            "leak": ("val", "credit_leak")}
JUDGES = ("exact value", "no judge")    # two more rows of what is asked of search
SEARCH = ("best of 16", "best of 64", "fewer", *HALVE)
BRIEF = ("val", "swapped", "corr(z,V)", "best of 64", "38%")
PAIRS_FROM = {"": "sampled", "swapped": "swapped"}     # dpo.py's setting: the name of its column
POLICY = [f"{what}, {name}" for name in PAIRS_FROM.values() for what in ("gold", "KL")]
PREFIXES = "38% less best of 64"    # what is gained by judging half-written answers alone
# Question: its worlds, arms, columns. A world's first row is what its others differ from.
TABLES = {
    "In short": (["sum"], [BASE, Arm("icrm"), Arm("icrm", "last", "uniform"), *FIRST[4:],
                         *POLICIES[2:]], BRIEF),
    "Which regularizer?": (["sum"], [arm for arm in FACTORIAL if arm.readout == "last"], ACCURACY),
    "Which p?": (["sum"], [BASE, *CONTROLS], ACCURACY),
    "Read-out and regularizer": (["sum"], FACTORIAL, ACCURACY),
    "Search": (["sum"], FACTORIAL, (*SEARCH, PREFIXES)),
    "Which p, in search?": (["sum"], [BASE, *CONTROLS], SEARCH),
    **{f"Against {base.name}": (["sum"], [base, *others], (*BRIEF, "leak")) for base, *others in [
        FACTORIAL[3::3] + CONTROLS[1:4], CONTROLS[4:8], CONTROLS[8:], FACTORIAL[1::3],
        FACTORIAL[2::3]]},
    "A gold that is no sum": (["veto"], FACTORIAL, ACCURACY),
    "Search, where gold is no sum": (["veto"], FACTORIAL, SEARCH),
    "Policies": (["sum"], POLICIES, POLICY),
    "Regimes": (list(WORLDS)[2:], IN_REGIMES, BRIEF),
}


# Runs --------------------------------------------------------------------------------------------

def search_measures(rewards, worth):
    """Of every candidate its prefixes' rewards and its gold, sets of them -> what picks are worth.
    fewer: best of as many candidates as the tokens of halving at 38% write whole."""
    final, found = [[r[-1] for r in some] for some in rewards], {}
    for n in (16, 64):
        found[f"best of {n}"] = [best_of_n(r, w, min(n, len(w))) for r, w in zip(final, worth)]
    for name, places in HALVE.items():
        picks = [halve(some, places) for some in rewards]
        found[name] = [w[pick] for w, (pick, _) in zip(worth, picks)]
        spent = [written / sum(map(len, some)) for some, (_, written) in zip(rewards, picks)]
        found[f"spent {name}"] = spent
        if name == "38%":
            found["fewer"] = list(map(same_tokens, final, worth, spent))
    return {name: float(np.mean(values)) for name, values in found.items()}


def run_arm(draw, arm, names, rows, worth, with_policies):
    """Train one arm on a draw and measure it; names: settings of data and generator."""
    folder = f"{names['generator'].removesuffix('generator')}{arm.name}"
    shutil.rmtree(folder, ignore_errors=True)       # of a study that was stopped
    run_other("train.py", quiet=True, out_dir=folder, seed=draw, eval_interval=80, **names,
              **arm._asdict())
    splits = read_json(f"{folder}/eval.json", "lab/study.py")["splits"]
    found = {name: splits[split][key] for name, (split, key) in ACCURACY.items()}
    model, _, _ = load_reward_model(folder, "cpu")
    found |= search_measures(prefix_rewards(model, rows), worth)
    for pairs_from, name in PAIRS_FROM.items() if with_policies else ():
        out = f"{folder}-policy-{name}"
        run_other("dpo.py", quiet=True, checkpoint=folder, out_dir=out, seed=draw,
                  pairs_from=pairs_from)
        policy = read_json(f"{out}/results.json", "lab/study.py")["policy"]
        found |= {f"gold, {name}": policy["gold"], f"KL, {name}": policy["kl"]}
        shutil.rmtree(out)
    shutil.rmtree(folder)
    return found


def run_draw(job):
    """Everything that is missing of one draw of one world -> its runs: (world, draw, arms)."""
    world, draw, arms = job
    data, how = WORLDS[world]
    name = f"lab-{list(WORLDS).index(world)}-{draw}"
    names = {"dataset": name, "generator": f"out/lab/{name}-generator"}
    start = {"settings": names, "inputs": {"data": None, "p": ""}}
    run_other("data/toy/prepare.py", quiet=True, name=name, seed=draw, **data)
    run_other("generator.py", quiet=True, dataset=name, out_dir=names["generator"], seed=draw,
              **how)
    tokenizer = open_dataset(name).tokenizer
    generator, dataset, gold_of = open_generator(tokenizer, start, CANDIDATES)
    rows = obtain_candidates(generator, dataset, CANDIDATES)
    worth = gold_of(rows)
    chance = float(np.mean([np.mean(some) for some in worth]))
    exact = search_measures(exact_values(dataset, rows), worth)
    found = dict(zip(JUDGES, (exact, dict.fromkeys(SEARCH, chance))))
    for arm in arms:
        with_policies = world == "sum" and arm in POLICIES and draw in POLICY_DRAWS
        found[arm.name] = run_arm(draw, arm, names, rows, worth, with_policies)
    shutil.rmtree(names["generator"])
    shutil.rmtree(f"data/{name}")
    return [{"world": world, "draw": draw, "arm": arm} | {
        key: round(value, 4) for key, value in some.items()} for arm, some in found.items()]


def to_do(runs):
    """[(world, draw, arms without a run)], those first that most depends on."""
    known, jobs = {(run["world"], run["draw"], run["arm"]) for run in runs}, []
    for first, (i, world) in product((True, False), enumerate(WORLDS)):
        arms = dict.fromkeys(([*FACTORIAL, *CONTROLS], FACTORIAL, IN_REGIMES)[min(i, 2)])
        for draw in DRAWS if i < 2 else FEW_DRAWS:
            missing = [arm for arm in arms if (arm in FIRST) == first
                       and (world, draw, arm.name) not in known]
            jobs += [(world, draw, missing)] if missing else []
    return jobs


def run_all(run_job, jobs, results, workers):
    """Do jobs, so many at a time with one thread each, and add their runs to a file of results."""
    runs = read_records(results)
    os.environ["OMP_NUM_THREADS"] = "1"     # of the commands
    torch.set_num_threads(1)
    with ThreadPool(workers) as pool:
        for found in tqdm(pool.imap_unordered(run_job, jobs), "jobs", len(jobs)):
            runs += [one for one in found if one not in runs]   # the judges come with every job
            write_records(results, runs)


# Tables ------------------------------------------------------------------------------------------

def sign_flip_p(differences):
    """Two-sided p of a mean of paired differences: of all 2^n ways to flip their signs the share
    with a sum as far from 0. Exact, by the sums of both halves."""
    halves = np.array_split(np.asarray(differences, dtype=float), 2)
    first, second = (np.array(list(product((-1, 1), repeat=len(half)))) @ half for half in halves)
    seen, second = abs(np.sum(differences)) * (1 - 1e-9), np.sort(second)
    above = len(second) - np.searchsorted(second, seen - first, "left")
    below = np.searchsorted(second, -seen - first, "right")
    return float(np.minimum(above + below, len(second)).sum() / len(first) / len(second))


def number_of_looks():
    """How many differences the tables show."""
    return len({(world, arm, arms[0], column) for worlds, arms, columns in TABLES.values()
                for arm in [*arms, *JUDGES * ("38%" in columns)] if arm != arms[0]
                for world, column in product(worlds, columns)})


def draws_of(known, world, arm, column):
    """{draw: value} of an arm."""
    return {draw: one[column] for (place, name, draw), one in known.items()
            if (place, name) == (world, arm) and column in one}


def cell(known, world, arm, column, base=BASE.name):
    """An arm's mean, and its difference to the base's ± half its 95% interval, paired by draw;
    bold where that excludes 0, with a dagger where its p times the number of looks (Bonferroni) is
    below 0.05 too."""
    mine, its = (draws_of(known, world, which, column) for which in (arm, base))
    if len(mine) < len(FEW_DRAWS):
        return ""
    mean = f"{np.mean(list(mine.values())):.3f}"
    differences = [mine[draw] - its[draw] for draw in mine if draw in its]
    if arm == base or len(differences) < 2:
        return mean
    difference, half = mean_and_half_width(differences)
    sure = "†" * (sign_flip_p(differences) * number_of_looks() < 0.05)
    text = f"{difference:+.3f} ± {half:.3f}{sure}"
    return f"{mean} (**{text}**)" if abs(difference) > half else f"{mean} ({text})"


def table(runs, worlds, arms, columns):
    """The lines of a Markdown table of the arms with enough draws; under what is asked of search,
    two judges more."""
    known = {(one["world"], one["arm"], one["draw"]): one | (
        {PREFIXES: one["38%"] - one["best of 64"]} if "38%" in one else {}) for one in runs}
    head = [*["world"] * (len(worlds) > 1), "regularizer", "p", "read-out", "draws", *columns]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    rows = [(arm.name, f"`{arm.regularizer}`", arm.probs if arm.regularizer in USES_P else "",
             arm.readout) for arm in arms]
    rows += [(name, name, "", "") for name in JUDGES if "38%" in columns]
    for world, (name, *about) in product(worlds, rows):
        count = max(len(draws_of(known, world, name, column)) for column in columns)
        if count >= len(FEW_DRAWS):
            cells = [cell(known, world, name, column, arms[0].name) for column in columns]
            cells = [world, *about, str(count), *cells][len(worlds) == 1:]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


DRAWN = {"exact value": ("exact value", "thin"), "none-sum-generator": ("none, sum", "own"),
         "icrm-last-generator": ("icrm", "own"), BASE.name: ("none", "other")}


def picture(runs):
    """What a pick is worth in the first world against the share of the tokens that halving writes,
    under several judges; at 1 all candidates are written."""
    lines, labels = [], []
    for arm, (label, style) in DRAWN.items():
        some = [one for one in runs if (one["world"], one["arm"]) == ("sum", arm) and "38%" in one]
        points = [(np.mean([one[f"spent {name}"] for one in some]),
                   np.mean([one[name] for one in some])) for name in HALVE]
        points.append((1.0, np.mean([one["best of 64"] for one in some])))
        lines += [(style, points), ("dots", points)]
        labels.append((*points[0], label))
    golds = [y for _, points in lines for _, y in points]
    return chart(lines, ticks(0, 1), ticks(min(golds) - 0.2, max(golds), 5),
                 ("share of all tokens written", "gold of the pick"), labels=labels, style=CSS)


def tables(runs):
    found = {question: table(runs, *about) for question, about in TABLES.items()}
    return "\n".join("\n".join([f"### {question}", "", *lines, ""])
                     for question, lines in found.items() if len(lines) > 2)


def main(config):
    in_range(config, 1, 64, "workers")
    if not config.tables:
        run_all(run_draw, to_do(read_records(RESULTS)), RESULTS, config.workers)
    runs = read_records(RESULTS)
    print(tables(runs))
    if config.svg:
        write_text(config.svg, picture(runs))


if __name__ == "__main__":
    run_script(StudyConfig, main)
