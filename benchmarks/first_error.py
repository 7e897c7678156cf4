"""Find the first wrong step of a solution (ProcessBench, arXiv 2412.06559).

The predicted step is the first one whose reward is below a threshold. The threshold is
chosen on another file.
"""

from pathlib import Path
from statistics import harmonic_mean

import numpy as np

from common import UserError
from data.formats import print_prompt_hint, read_steps
from evaluate import format_cell, print_lines, score

MAX_THRESHOLDS = 200  # that are tried
COLUMNS = ("f1", "error_accuracy", "correct_accuracy", "n_wrong", "n_correct")


def first_below(rewards, threshold):
    """The first step whose reward is below the threshold, or -1."""
    for step, reward in enumerate(rewards):
        if reward < threshold:
            return step
    return -1


def first_error_scores(rewards, first_errors, threshold):
    """ProcessBench's scores.

    rewards: for each solution, the rewards of its steps
    first_errors: its first wrong step, -1 if all are correct
    error_accuracy    share of wrong solutions whose first error is predicted
    correct_accuracy  share of correct solutions in which no error is predicted
    f1                their harmonic mean
    An accuracy without solutions, and then also f1, is None.
    """
    hits_on_wrong, hits_on_correct = [], []
    for steps, first_error in zip(rewards, first_errors):
        is_hit = first_below(steps, threshold) == first_error
        hits = hits_on_wrong if first_error >= 0 else hits_on_correct
        hits.append(is_hit)
    error_accuracy = float(np.mean(hits_on_wrong)) if hits_on_wrong else None
    correct_accuracy = float(np.mean(hits_on_correct)) if hits_on_correct else None
    f1 = None
    if hits_on_wrong and hits_on_correct:
        f1 = float(harmonic_mean([error_accuracy, correct_accuracy]))
    return {
        "error_accuracy": error_accuracy,
        "correct_accuracy": correct_accuracy,
        "f1": f1,
        "n_wrong": len(hits_on_wrong),
        "n_correct": len(hits_on_correct),
        "threshold": threshold,
    }


def best_threshold(rewards, first_errors):
    """The threshold with the highest F1, of midpoints between step rewards.

    At most MAX_THRESHOLDS are tried, evenly spaced in their order.
    """
    values = np.unique(np.concatenate([np.asarray(r, dtype=float) for r in rewards]))
    thresholds = values
    if len(values) > 1:
        thresholds = (values[1:] + values[:-1]) / 2
    tried = np.linspace(0, len(thresholds) - 1, MAX_THRESHOLDS).astype(int)
    thresholds = thresholds[np.unique(tried)]
    scores = []
    for threshold in thresholds:
        scores.append(first_error_scores(rewards, first_errors, threshold)["f1"])
    return float(thresholds[int(np.argmax(scores))])


def score_steps(model, tokenizer, config, path):
    """Read a file. Return items, their steps' rewards, and how many rows it skipped."""
    items, examples, positions, n_skipped = read_steps(
        path,
        tokenizer,
        model.config.block_size,
        config.wrap_as_chat,
        config.max_bad_fraction,
    )
    rewards = score(model, examples, lambda i: f"solution {i} of {path}")
    step_rewards = []
    for (prefix_rewards,), step_positions in zip(rewards, positions):
        step_rewards.append(prefix_rewards[step_positions])
    return items, step_rewards, n_skipped


def evaluate_steps(model, tokenizer, config, trained_on_chat):
    """Scores on the file --steps, with the threshold chosen on --threshold_from."""
    threshold_file = Path(config.threshold_from or config.steps)
    if threshold_file.resolve() == Path(config.steps).resolve():
        raise UserError("choose the threshold on another file: --threshold_from=FILE")
    items, rewards, _ = score_steps(model, tokenizer, config, config.threshold_from)
    errors = [item.first_error for item in items]
    if min(errors) >= 0 or max(errors) < 0:
        raise UserError(
            f"{config.threshold_from} needs both correct and wrong solutions"
        )
    threshold = best_threshold(rewards, errors)

    items, rewards, n_skipped = score_steps(model, tokenizer, config, config.steps)
    print_prompt_hint(config.steps, items, tokenizer, trained_on_chat)
    subsets = sorted({item.subset for item in items if item.subset})
    results = {}
    for name in ("(all)", *subsets):
        subset_rewards, subset_errors = [], []
        for item, step_rewards in zip(items, rewards):
            if name in ("(all)", item.subset):
                subset_rewards.append(step_rewards)
                subset_errors.append(item.first_error)
        results[name] = first_error_scores(subset_rewards, subset_errors, threshold)
    lines = [["subset", *(column.replace("_", " ") for column in COLUMNS)]]
    for name, scores in results.items():
        lines.append([name, *(format_cell(scores[column]) for column in COLUMNS)])
    print_lines(lines)
    print(f"threshold {threshold:.4f}, chosen on {config.threshold_from}")
    return {"subsets": results, "skipped": n_skipped}
