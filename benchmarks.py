"""What published benchmarks make of rewards: RewardBench's sections, RM-Bench's matrix, first errors, calibration.

Functions of numbers, and two that show what came of them; evaluate.py scores the responses and calls them. Sources:
RewardBench v1 (Lambert et al. 2024, arXiv 2403.13787; rewardbench/constants.py), RM-Bench (Liu et al. 2024, arXiv
2410.16184), ProcessBench (Zheng et al. 2024, arXiv 2412.06559). Left out: RewardBench's "prior sets" and RewardBench 2.
"""
import itertools
import math
import textwrap
from pathlib import Path

import numpy as np

from config import write_json
from data.pairs import TURN

# RewardBench v1: the number of prompts of each subset is its weight in its section.
SECTIONS = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
                  "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
               "xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984} | {f"hep-{language}": 164 for language in ("cpp", "go", "java", "js", "python", "rust")},
}


def sigmoid(x):
    """1 / (1 + exp(-x)) of an array, without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x)))


def rewardbench_sections(accuracies):
    """{subset: accuracy} -> {"sections", "overall", "missing", "unknown"}.

    A section is the weighted mean of its subsets that are present, the overall score the mean of the sections
    that are. What is absent is named, never counted as 0; subsets of no section are named too.
    """
    sections = {}
    for section, weights in SECTIONS.items():
        present = {subset: weight for subset, weight in weights.items() if subset in accuracies}
        if present:
            sections[section] = sum(accuracies[subset] * w for subset, w in present.items()) / sum(present.values())
    known = [subset for weights in SECTIONS.values() for subset in weights]
    return {"sections": sections, "overall": sum(sections.values()) / len(sections) if sections else None,
            "missing": [subset for subset in known if subset not in accuracies],
            "unknown": [subset for subset in accuracies if subset not in known]}


def rm_bench(wins):
    """{(i, j): [whether the chosen text of style i beat the rejected one of style j, per prompt]} -> one domain's scores.

    Styles go from the plainest to the richest. hard: the rejected text has the richer style (j > i); normal: equal;
    easy: plainer. Each is the mean of its cells, `mean` that of all cells.
    """
    k = 1 + max(max(cell) for cell in wins)
    for i, j in itertools.product(range(k), repeat=2):
        if not wins.get((i, j)):
            raise ValueError(f"no pair of chosen style {i} and rejected style {j}")
    matrix = np.array([[np.mean(wins[i, j]) for j in range(k)] for i in range(k)])
    upper = np.triu_indices(k, 1)
    return {"matrix": matrix.tolist(), "hard": float(matrix[upper].mean()), "normal": float(matrix.diagonal().mean()),
            "easy": float(matrix.T[upper].mean()), "mean": float(matrix.mean())}


def reliability(margins, bins=10):
    """Margins r(chosen) - r(rejected) -> expected calibration error of sigma, and the bins of its diagram.

    Confidence is sigma(|margin|), from 1/2 to 1, and a pair is right where its margin is positive (a tie counts half).
    """
    margins = np.asarray(margins, dtype=float)
    confidence = sigmoid(np.abs(margins))
    right = (margins > 0) + 0.5 * (margins == 0)
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    rows = [{"confidence": float(confidence[which == b].mean()), "accuracy": float(right[which == b].mean()),
             "n": int((which == b).sum())} for b in range(bins) if (which == b).any()]
    return {"ece": sum(row["n"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / len(margins), "bins": rows}


def predicted_error(step_rewards, threshold):
    """The first step whose reward is below the threshold, -1 where none is."""
    below = np.flatnonzero(np.asarray(step_rewards) < threshold)
    return int(below[0]) if len(below) else -1


def first_error_scores(rewards, first_errors, threshold):
    """Step rewards of each solution and its first wrong step (-1: none) -> ProcessBench's scores.

    error_accuracy: share of wrong solutions whose first error is found exactly; within_one: to one step;
    correct_accuracy: share of right solutions in which none is found; f1: harmonic mean of the first and the third.
    A kind of solution that does not occur has no accuracy (None), and then there is no f1.
    """
    found = [predicted_error(r, threshold) for r in rewards]
    wrong = [(a, b) for a, b in zip(found, first_errors) if b >= 0]
    right = [a == -1 for a, b in zip(found, first_errors) if b < 0]
    error = sum(a == b for a, b in wrong) / len(wrong) if wrong else None
    near = sum(a >= 0 and abs(a - b) <= 1 for a, b in wrong) / len(wrong) if wrong else None
    correct = sum(right) / len(right) if right else None
    f1 = None if error is None or correct is None else 2 * error * correct / (error + correct) if error + correct else 0.0
    return {"error_accuracy": error, "within_one": near, "correct_accuracy": correct, "f1": f1,
            "wrong": len(wrong), "right": len(right), "threshold": threshold}


def best_threshold(rewards, first_errors):
    """The threshold with the highest f1, among the midpoints of the step rewards (at most 200 of them, evenly spread)."""
    values = np.unique(np.concatenate([np.asarray(r, dtype=float) for r in rewards]))
    middles = (values[1:] + values[:-1]) / 2 if len(values) > 1 else values
    middles = middles[np.unique(np.linspace(0, len(middles) - 1, 200).astype(int))]
    scores = [first_error_scores(rewards, first_errors, t)["f1"] for t in middles]
    return float(middles[int(np.argmax([-1 if f1 is None else f1 for f1 in scores]))])


def mcnemar(a, b):
    """Which examples two models got right -> (only the first, only the second, two-sided exact p of McNemar's test)."""
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    first, second = int((a & ~b).sum()), int((b & ~a).sum())
    n, k = first + second, min(first, second)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return first, second, float(min(1.0, 2 * tail / 2 ** n)) if n else 1.0


def print_benchmarks(results):
    """RewardBench's sections and RM-Bench's matrix, where the subsets have them, and the calibration."""
    if "rewardbench" in results:
        found = results["rewardbench"]
        print("RewardBench  " + "  ".join(f"{section} {value:.3f}" for section, value in found["sections"].items())
              + f"  overall {found['overall']:.3f}")
        for key, text in (("missing", "subsets without pairs"), ("unknown", "subsets of no section")):
            if found[key]:
                print(textwrap.fill(f"{text}: {', '.join(found[key])}", 80))
    for name, found in results.get("rm_bench", {}).items():
        print(f"RM-Bench {name}: easy {found['easy']:.3f}  normal {found['normal']:.3f}  hard {found['hard']:.3f}  "
              f"mean {found['mean']:.3f}; chosen style (row) against rejected style:")
        for i, row in enumerate(found["matrix"]):
            print(f"  {i}  " + "  ".join(f"{value:.3f}" for value in row))
    print(f"calibration error of sigma(r(chosen) - r(rejected)): {results['reliability']['ece']:.3f}")


def write_rewardbench(folder, name, data, records, results):
    """RewardBench's two result files, eval-set/NAME.json and eval-set-scores/NAME.json; the first has the section scores too."""
    model = {"model": name, "model_type": "Seq. Classifier", "chat_template": "dialogue" if TURN in data.pairs[0].prompt else "none"}
    accuracies = {subset: part["accuracy"] for subset, part in results.get("subsets", {}).items()}
    write_json(Path(folder) / "eval-set" / f"{name}.json", model | accuracies | results.get("rewardbench", {}).get("sections", {}))
    columns = {"text_chosen": [pair.prompt + pair.chosen for pair in data.pairs],
               "text_rejected": [pair.prompt + pair.rejected for pair in data.pairs],
               "id": [record["id"] for record in records], "subset": [record["subset"] for record in records],
               "scores_chosen": [record["chosen_reward"] for record in records],
               "scores_rejected": [record["rejected_reward"] for record in records],
               "results": [int(record["chosen_reward"] > record["rejected_reward"]) for record in records]}
    write_json(Path(folder) / "eval-set-scores" / f"{name}.json", model | columns)
