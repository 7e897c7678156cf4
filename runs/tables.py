"""The tables of the laboratory, as they stand in runs/README.md and, the first one, in the README: from runs to Markdown.

    python runs/study.py --part=tables

A run is a record of runs/study.json. Everything is paired by draw: means with their standard errors over draws, and
differences with half a 95% t interval, bold where it excludes 0.
"""
import math
from collections import defaultdict

import numpy as np

from compare import mean_and_half_width

METRICS = {
    "val": ("val", "accuracy"), "decoupled": ("decoupled", "accuracy"), "swapped": ("swapped", "accuracy"),
    "longer": ("longer", "accuracy"), "best of 16": ("val", "best_of_16"), "best of 16, swapped": ("swapped", "best_of_16"),
    "corr(z,V)": ("val", "correlation"), "calib.": ("val", "calibration_error"), "leak": ("val", "credit_leak"),
}


def table(header, rows):
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def values(runs, metric):
    """{draw: value}"""
    split, key = METRICS[metric]
    return {run["seed"]: run[split][key] for run in runs}


def mean_and_error(runs, metric):
    """'mean ± standard error' over draws."""
    found = list(values(runs, metric).values())
    return f"{np.mean(found):.3f} ± {np.std(found, ddof=1) / math.sqrt(len(found)):.3f}"


def difference(runs, others, metric):
    """'mean ± half a 95% t interval' of the differences paired by draw; bold where the interval excludes 0."""
    mine, theirs = values(runs, metric), values(others, metric)
    mean, half = mean_and_half_width([mine[draw] - theirs[draw] for draw in mine if draw in theirs])
    text = f"{mean:+.3f} ± {half:.3f}"
    return f"**{text}**" if abs(mean) > half else text


def grouped(runs, *keys):
    groups = defaultdict(list)
    for run in runs:
        groups[tuple(run[key] for key in keys)].append(run)
    return groups


def main_tables(groups, steps):
    """The arms of one number of steps: mean and standard error, and the difference to `none`."""
    arms = [arm for arm in groups if arm[2] == steps]
    name = lambda arm: [f"`{arm[0]}`", "" if arm[0] == "none" else str(arm[1])]
    means = [name(arm) + [mean_and_error(groups[arm], metric) for metric in METRICS] for arm in arms]
    differences = [name(arm) + [difference(groups[arm], groups["none", 0.5, steps], metric) for metric in METRICS]
                   for arm in arms if arm[0] != "none"]
    head = ["regularizer", "λ", *METRICS]
    return table(head, means) + "\n\n" + table(head, differences)


def summary_table(groups, steps):
    """Five arms in short: the mean, and in brackets the difference to `none`."""
    rows, metrics = [], ("val", "decoupled", "swapped", "best of 16, swapped", "corr(z,V)", "leak")
    for name in ("none", "icrm", "icrm_uniform", "dense_bt", "icrm_gap_bound"):
        arm, none = groups[name, 0.5, steps], groups["none", 0.5, steps]
        rows.append([f"`{name}`"] + [f"{np.mean(list(values(arm, metric).values())):.3f}" + (
            "" if arm is none else f" ({difference(arm, none, metric)})") for metric in metrics])
    return table(["regularizer", *metrics], rows)


CONTRASTS = [("icrm", "icrm_uniform"), ("icrm", "icrm_shuffled"), ("icrm", "dense_bt"), ("icrm", "td_lambda"),
             ("icrm_gap_bound", "icrm"), ("icrm_gap_bound", "icrm_gap_bound_uniform"), ("icrm_gap_bound", "icrm_gap_bound_shuffled"),
             ("icrm_gap_bound", "kappa_gap_bound"), ("icrm_gap_bound", "dense_bt"), ("icrm_gap_bound", "td_lambda")]


def contrast_table(groups, steps):
    """Arms with lambda = 0.5 against each other, paired by draw."""
    some = [(a, b) for a, b in CONTRASTS if (a, 0.5, steps) in groups and (b, 0.5, steps) in groups]
    return table(["difference", *METRICS], [[f"`{a}` − `{b}`"] + [
        difference(groups[a, 0.5, steps], groups[b, 0.5, steps], metric) for metric in METRICS] for a, b in some])


def tune_table(runs):
    """Val and, for the rule, the training responses, by kappa and steps."""
    rows = []
    for (name, steps), group in grouped(runs, "regularizer", "steps").items():
        mean = lambda split, key: f"{np.mean([run[split][key] for run in group]):.3f}"
        rows.append([f"`{name}`", str(steps), mean("val", "accuracy"), mean("train", "correlation"), mean("val", "correlation"),
                     mean("val", "credit_leak")])
    return table(["regularizer@κ", "steps", "val", "corr(z,V), training responses", "corr(z,V), val", "leak, val"], rows)


def reading_table(runs):
    """Weight of evidence and remark in the final reward, first and last three clauses, as shares of all the weight."""
    rows = []
    for (name,), group in grouped(runs, "regularizer").items():
        shares = []
        for run in group:
            weights = np.array([run["reading"]["evidence"], run["reading"]["remark"]]).reshape(2, 2, 3).sum(2)     # kind, half
            shares.append((weights / weights.sum()).T.ravel())
        means, errors = np.mean(shares, 0), np.std(shares, 0, ddof=1) / math.sqrt(len(shares))
        rows.append([f"`{name}`"] + [f"{mean:.2f} ± {error:.2f}" for mean, error in zip(means, errors)])
    return table(["regularizer", "evidence, clauses 1–3", "remarks, 1–3", "evidence, clauses 4–6", "remarks, 4–6"], rows)


def regimes_table(runs, default):
    """One line per regime: `none`, and what icrm and icrm_gap_bound add to it. The first line is the default world."""
    rows = []
    draws = {run["seed"] for run in runs}
    default = [run for run in default if run["seed"] in draws]
    for (variant,), group in {("default",): default, **grouped(runs, "variant")}.items():
        arms = {name: part for (name,), part in grouped(group, "regularizer").items()}
        none, bound, paper = arms["none"], arms["icrm_gap_bound"], arms["icrm"]
        rows.append([variant] + [mean_and_error(none, metric) for metric in ("val", "swapped")] +
                    [difference(paper, none, metric) for metric in ("decoupled", "swapped")] +
                    [difference(bound, none, metric) for metric in ("decoupled", "swapped")] +
                    [" / ".join(f"{np.mean(list(values(arms[name], 'leak').values())):.2f}" for name in ("none", "icrm", "icrm_gap_bound"))])
    return table(["regime", "none: val", "none: swapped", "icrm: decoupled", "icrm: swapped", "bound: decoupled",
                  "bound: swapped", "leak: none / icrm / bound"], rows)


def mismatch_table(runs, default):
    """Where p comes from, and what is left of the difference to p = 1."""
    rows = []
    for name in ("icrm", "icrm_gap_bound"):
        arms = grouped(default, "regularizer")
        sources = {"p of the generator": arms[name,], **{variant: part for (variant,), part in grouped(
            [run for run in runs if run["regularizer"] == name], "variant").items()}}
        rows += [[f"`{name}`, {source}"] + [difference(part, arms[name + "_uniform",], metric) for metric in
                                            ("val", "decoupled", "swapped", "corr(z,V)", "leak")] for source, part in sources.items()]
    return table(["difference to p = 1", "val", "decoupled", "swapped", "corr(z,V)", "leak"], rows)


def print_tables(runs):
    parts = {part: group for (part,), group in grouped(runs, "part").items()}
    main = grouped(parts.get("main", []), "regularizer", "reg_weight", "steps")
    default = [run for run in parts.get("main", []) if (run["reg_weight"], run["steps"]) == (0.5, 160)]
    tables = {"tune": tune_table, "reading": reading_table, "regimes": lambda runs: regimes_table(runs, default),
              "mismatch": lambda runs: mismatch_table(runs, default)}
    if "confirm" in parts:
        confirm = grouped(parts["confirm"], "regularizer", "reg_weight", "steps")
        print(f"in short, twenty fresh draws\n\n{summary_table(confirm, 160)}")
        print(f"\nconfirm\n\n{main_tables(confirm, 160)}\n\n{contrast_table(confirm, 160)}")
    for steps in (160, 80) if main else ():
        print(f"\n{steps} steps: mean ± standard error; difference to `none` ± half a 95% interval; pair by pair\n")
        print(main_tables(main, steps) + "\n\n" + contrast_table(main, steps))
    for part, make in tables.items():
        if part in parts and (main or part in ("tune", "reading")):
            print(f"\n{part}\n\n{make(parts[part])}")
