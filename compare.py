"""Reward models side by side: runs averaged over seeds, or two models on the same pairs. `python evaluate.py --compare=...`

Runs that differ in seed or dataset alone are averaged, differences are paired by dataset and seed, intervals are
Student's t. On the same pairs, differences are paired by pair: a bootstrap interval and McNemar's exact test.
"""
import json
import math
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np

from benchmarks import mcnemar
from config import UserError
from data.pairs import lines_of


def print_lines(lines):
    """Rows of text in columns, the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join([line[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]))


@lru_cache(maxsize=None)
def student_t(degrees, level=0.975):
    """The quantile of Student's t, by adding up its density."""
    x = np.linspace(0, 100, 1_000_001)
    density = (1 + x * x / degrees) ** (-(degrees + 1) / 2)
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    return float(np.interp(level - 0.5, np.cumsum(density) * constant * (x[1] - x[0]), x))


def mean_and_half_width(values):
    """Mean and half the width of its 95% t interval (nan for one value)."""
    n = len(values)
    half = student_t(n - 1) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), float(half)


def compare_runs(folders):
    """Print evaluated runs side by side; runs that differ in their seed or dataset alone are averaged.

    Under each group but the first: the difference to the first, paired by dataset and seed, with a 95% interval.
    Returns the runs as a list of dictionaries.
    """
    runs = []
    for folder in folders:
        path = Path(folder) / "eval.json"
        if not path.is_file():
            raise UserError(f"{path} is missing; finish the run with train.py, or name another folder")
        try:
            run = json.loads(path.read_text())
            runs.append((run["settings"], run["splits"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not the result of train.py; run its command again") from None
    if not runs:
        raise UserError("name evaluated runs with --compare=DIR,DIR,...")
    apart = ("seed", "dataset", "out_dir", "generator", "device", "overwrite")
    keys = [key for key in sorted(runs[0][0], key=lambda key: (key != "regularizer", key))
            if key not in apart and len({str(settings.get(key)) for settings, _ in runs}) > 1]
    groups = defaultdict(dict)
    for folder, (settings, splits) in zip(folders, runs):
        members = groups[" ".join(str(settings.get(key)) for key in keys) or "all"]
        if (pair := (settings["dataset"], settings["seed"])) in members:
            raise UserError(f"{folder} has the settings, dataset and seed of a run named before it")
        members[pair] = splits
    names = [(split, key) for split, metrics in runs[0][1].items() for key in ("accuracy", "auc", "correlation", "credit_leak")
             if all(key in splits.get(split, {}) for _, splits in runs)]
    base = next(iter(groups))
    lines = [[", ".join(keys), *groups]]
    for split, key in names:
        line, differences = [f"{split} {key}"], ["  difference"]
        for label, members in groups.items():
            mean, half = mean_and_half_width([metrics[split][key] for metrics in members.values()])
            line.append(f"{mean:.3f}" + (f" +-{half:.3f}" if half == half else ""))
            paired = [metrics[split][key] - groups[base][pair][split][key]
                      for pair, metrics in members.items() if pair in groups[base]]
            mean, half = mean_and_half_width(paired) if paired and label != base else (math.nan, math.nan)
            differences.append("" if mean != mean else f"{mean:+.3f}" + (f" +-{half:.3f}" if half == half else ""))
        lines += [line, differences]
    print_lines([line for line in lines if any(line[1:])])
    several = any(len(members) > 1 for members in groups.values())
    print(f"runs in each: {', '.join(str(len(members)) for members in groups.values())}; differences are to {base}, paired by "
          "dataset and seed" + ("; +- is half a 95% t interval" if several else ""))
    return [{key: settings[key] for key in ("regularizer", "reg_weight", "dataset", "seed")} | {"splits": splits}
            for settings, splits in runs]


def compare_examples(paths, draws=10000):
    """Print models that scored the same pairs (files of --examples) side by side: each against the first.

    The interval is that of a paired bootstrap over pairs; McNemar's exact test asks whether each model is right where
    the other is wrong equally often. Both take the pairs as independent: with several pairs of one prompt (RM-Bench has
    nine) they are too sure.
    """
    right, keys = {}, None
    for path in paths:
        try:
            rows = [json.loads(line) for line in lines_of(path) if line]
            found = [(row["id"], row["subset"], row.get("cell")) for row in rows]
            right[path] = np.array([row["chosen_reward"] > row["rejected_reward"] for row in rows])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} was not written by evaluate.py --examples=FILE") from None
        if not found:
            raise UserError(f"{path} holds no pairs")
        if keys not in (None, found):
            raise UserError(f"{path} holds other pairs than {paths[0]}")
        keys = found
    base, results, lines = right[paths[0]], [], [["pairs scored by", "accuracy", "difference", "95% interval", "only first",
                                                  "only this", "p"]]
    rng = np.random.default_rng(0)
    for path, hits in right.items():
        difference = hits.astype(float) - base
        first, this, p = mcnemar(base, hits)
        n = len(base)       # a resample of the pairs is a draw of how many of each kind it holds
        counts = rng.multinomial(n, [first / n, this / n, 1 - (first + this) / n], size=draws)
        low, high = np.quantile((counts[:, 1] - counts[:, 0]) / n, [0.025, 0.975])
        results.append({"examples": str(path), "accuracy": float(hits.mean()), "difference": float(difference.mean()),
                        "low": float(low), "high": float(high), "only_first": first, "only_this": this, "p": p})
        lines.append([str(path), f"{hits.mean():.3f}"] + ([""] * 5 if path == paths[0] else [
            f"{difference.mean():+.3f}", f"{low:+.3f} to {high:+.3f}", str(first), str(this), f"{p:.2g}"]))
    print_lines(lines)
    return results
