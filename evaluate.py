"""Evaluate a reward model: accuracy on pairs, and agreement with the exact value.

    python evaluate.py --checkpoint=out/toy-icrm-seed0       the splits of its dataset
    python evaluate.py --checkpoint=DIR --data=pairs.jsonl   a file, or a benchmark's
    python evaluate.py --checkpoint=DIR --steps=A.jsonl --threshold_from=B.jsonl
                                                             find the first wrong step
    python evaluate.py --compare=out/toy-none-seed0,out/toy-icrm-seed0

The reward of a response is that of the prefix that ends with end-of-text. A tie counts
as wrong. Intervals are Wilson's, with an effective sample size for pairs that share a
prompt.
"""

import dataclasses
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from common import (
    UserError,
    check_range,
    format_json,
    is_finished,
    load_checkpoint,
    open_output,
    pick_device,
    read_json,
    run_script,
    sha256_of,
)
import json

import numpy as np
import torch

from data.batch import map_examples
from data.dataset import open_dataset
from data.tokenizer import from_dict
from model import ModelConfig, RewardModel, load_weights

COLUMNS = {  # key of the metrics -> column of the table
    "n": "pairs",
    "accuracy": "accuracy",
    "interval": "interval",
    "longer_accuracy": "longer",
    "auc": "AUC",
    "exact_accuracy": "exact",
    "correlation": "correlation",
    "calibration_error": "calibration",
}
COMPARED = ("accuracy", "auc", "correlation", "calibration_error")


@dataclass(frozen=True)
class EvalConfig:
    checkpoint: str = ""  # a reward model: its folder or ckpt.pt
    data: str = ""  # a JSONL file of pairs. empty: the splits of the model's dataset
    steps: str = ""  # a JSONL file of solutions in steps: find the first wrong step
    threshold_from: str = ""  # another such file, to choose the threshold on
    compare: str = ""  # evaluated runs to show side by side: DIR,DIR,...
    json: str = ""  # write the results to this file
    wrap_as_chat: bool = False  # wrap plain prompts as one user message
    max_bad_fraction: float = 0.05  # largest share of rows skipped for one reason
    device: str = "auto"  # auto, cpu, cuda, cuda:N


# Scoring ------------------------------------------------------------------------------


def load_reward_model(path, device):
    """Load a checkpoint. Return RewardModel (eval mode), tokenizer, checkpoint."""
    if not path:
        raise UserError("name a reward model with --checkpoint=DIR")
    checkpoint = load_checkpoint(path, "reward model")
    settings = checkpoint["settings"]
    if not is_finished(checkpoint):
        step, steps = checkpoint["step"], settings["steps"]
        print(f"{path} is unfinished ({step:,} of {steps:,} steps)")
    config = ModelConfig(**checkpoint["model_config"])
    model = load_weights(RewardModel(config, settings["prefix_reward"]), checkpoint)
    model = model.to(pick_device(device)).eval()
    return model, from_dict(checkpoint["tokenizer"]), checkpoint


@torch.no_grad()
def score(model, examples, describe=lambda number: f"row {number}"):
    """The rewards of every prefix of every response.

    Returns, for each Example, a list of float32 arrays, one per response. The last
    entry of an array is the reward of the response. describe: names example i (from
    1) in the error message if a reward is not finite
    """

    def compute_rewards(batch):
        batch = batch.to(model.device)
        rewards = model.prefix_rewards(model.hidden_states(batch), batch).cpu().numpy()
        lengths = batch.mask.sum(1).tolist()
        return [row[:length] for row, length in zip(rewards, lengths)]

    rewards = map_examples(examples, compute_rewards)
    for number, responses in enumerate(rewards, start=1):
        if not all(np.isfinite(response).all() for response in responses):
            raise UserError(f"a reward of {describe(number)} is not finite")
    return rewards


# Statistics ---------------------------------------------------------------------------


def sigmoid(x):
    """1 / (1 + exp(-x)) of an array, without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x)))


def wilson(share, n, z=1.96):
    """Wilson's 95% interval of a proportion of n independent cases."""
    center = share * n + z * z / 2
    half_width = z * math.sqrt(n * share * (1 - share) + z * z / 4)
    return (center - half_width) / (n + z * z), (center + half_width) / (n + z * z)


def effective_sample_size(correct, prompts):
    """The effective sample size of cases that are clustered by prompt.

    It is the variance of one case divided by the cluster-robust variance of the mean,
    at most len(correct). If the latter is 0, it is the number of prompts. For example,
    [1, 1, 0, 0] of two prompts with two cases each is 2.0.
    """
    share, totals = float(np.mean(correct)), defaultdict(float)
    for is_correct, prompt in zip(correct, prompts):
        totals[prompt] += is_correct - share
    squares = [total**2 for total in totals.values()]
    variance = sum(squares) / len(correct) ** 2
    if variance < 1e-12:
        return float(len(totals))
    return float(min(share * (1 - share) / variance, len(correct)))


def accuracy_with_interval(correct, ties, prompts):
    """Accuracy, its 95% interval by prompt, and counts. correct, ties: (n,) bool"""
    accuracy = float(np.mean(correct))
    low, high = wilson(accuracy, effective_sample_size(correct, prompts))
    return {
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "ties": int(np.sum(ties)),
        "n": len(correct),
        "prompts": len(set(prompts)),
    }


def calibration(predicted, actual, low=0.0, n_bins=10):
    """Mean gap between predicted and actual, in equal-width bins of predicted.

    The bins cover [low, 1].

    Returns the error, and one {"predicted", "actual", "n"} per bin that is not empty.
    """
    numbers = ((predicted - low) / (1 - low) * n_bins).astype(int)
    numbers = np.minimum(numbers, n_bins - 1)
    bins, error = [], 0.0
    for number in np.unique(numbers):
        inside = numbers == number
        mean_predicted = float(predicted[inside].mean())
        mean_actual = float(actual[inside].mean())
        count = int(inside.sum())
        bins.append({"predicted": mean_predicted, "actual": mean_actual, "n": count})
        error += count * abs(mean_predicted - mean_actual)
    return error / len(predicted), bins


def reliability(margins):
    """Expected calibration error of sigma(|margin|) as the confidence of a ranking.

    margins: reward of chosen - reward of rejected. A margin above 0 is right, a tie
    half right. Returns the error and the bins of its diagram.
    """
    margins = np.asarray(margins, dtype=float)
    correct = np.where(margins == 0, 0.5, margins > 0)
    error, bins = calibration(sigmoid(np.abs(margins)), correct, low=0.5)
    return {"ece": error, "bins": bins}


def value_agreement(rewards, values, targets, kinds):
    """Compare predicted and exact values of all prefixes of a split (toy world).

    The predicted value is z = sigma(r - mean r), with the mean over all prefixes. It is
    not flipped for rejected responses, unlike z in Eq. 4.

    rewards, values, targets, kinds: one array per response, chosen and rejected of each
        pair in turn. values: the exact value V. targets: the value that the training
        labels imply. kinds: 1 at a remark's first token, 2 at evidence's, else 0
    correlation        Pearson's, of z and V. None if all rewards are equal
    calibration_error  over ten bins of z: mean gap between z and the target. None
                       likewise
    remark_change      mean |r_t - r_t-1| at the first token of remarks, relative to
                       that of evidence. None if rewards do not change at evidence
    exact_accuracy     accuracy when pairs are ranked by V at the last token
    """
    changes = np.concatenate([np.abs(np.diff(r, prepend=r[0])) for r in rewards])
    all_rewards = np.concatenate(rewards).astype(float)
    kinds, V = np.concatenate(kinds), np.concatenate(values).astype(float)
    z = sigmoid(all_rewards - all_rewards.mean())
    error, bins = calibration(z, np.concatenate(targets).astype(float))
    correlation = remark_change = None
    if np.ptp(all_rewards) > 0:
        correlation = float(np.corrcoef(z, V)[0, 1])
    else:
        error = None
    evidence_change = changes[kinds == 2].mean()
    if evidence_change > 0:
        remark_change = float(changes[kinds == 1].mean() / evidence_change)
    final_values = np.array([value[-1] for value in values])
    return {
        "correlation": correlation,
        "calibration_error": error,
        "value_bins": bins,
        "remark_change": remark_change,
        "exact_accuracy": float((final_values[0::2] > final_values[1::2]).mean()),
    }


# Metrics ------------------------------------------------------------------------------


def evaluate_pairs(examples, rewards, prompts=()):
    """Examples with two responses and their rewards (from `score`) -> metrics.

    prompts: the prompts' texts, if the examples hold truncated ones
    """
    chosen = np.array([first[-1] for first, _ in rewards])
    rejected = np.array([second[-1] for _, second in rewards])
    prompts = prompts or [example.prompt.tobytes() for example in examples]
    distinct, longer = set(), []
    for prompt, example in zip(prompts, examples):
        first, second = example.responses
        distinct.add((prompt, first.tobytes(), second.tobytes()))
        longer.append(0.5 * (1 + np.sign(len(first) - len(second))))
    return {
        **accuracy_with_interval(chosen > rejected, chosen == rejected, prompts),
        "duplicates": len(examples) - len(distinct),
        "longer_accuracy": float(np.mean(longer)),
        "margin": float(np.mean(chosen - rejected)),
        "reliability": reliability(chosen - rejected),
    }


def evaluate_split(model, dataset, name):
    """Evaluate one split. Returns {name: metrics}.

    For labelled responses, "NAME pairs" has the metrics of pairs made from them.
    """
    split = dataset.split(name)
    examples = list(split)
    rewards = score(model, examples)
    if dataset.kind == "labels":
        from benchmarks.labels import evaluate_labels

        return evaluate_labels(name, examples, rewards)
    metrics = evaluate_pairs(examples, rewards)
    if dataset.kind == "toy":
        response_rewards, columns = [], []
        for i in range(len(split)):
            response_rewards += rewards[i]
        for array_name in ("exact-value", "exact-target", "kind"):
            array, column = dataset.array(name, array_name), []
            for i in range(len(split)):
                column += split.response_values(array, i)
            columns.append(column)
        metrics.update(value_agreement(response_rewards, *columns))
    return {name: metrics}


def evaluate_run(model, dataset, settings, done=None):
    """Evaluate every split but the training one, and print a table.

    done: {split: metrics} that are already computed. Returns the contents of eval.json
    """
    results = dict(done or {})
    for name in dataset.split_names:
        if name != "train" and name not in results:
            results.update(evaluate_split(model, dataset, name))
    print_table(results)
    digests = json.dumps(dataset.metadata["digests"], sort_keys=True)
    return {"settings": settings, "splits": results, "data": sha256_of(digests)}


# Tables -------------------------------------------------------------------------------


def format_cell(value):
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def print_lines(lines):
    """Print rows of text in columns: the first one left-aligned, the rest right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        for cell, width in zip(line[1:], widths[1:]):
            cells.append(cell.rjust(width))
        print("  ".join(cells).rstrip())


def table_lines(results):
    """{split or subset: metrics} -> the rows of one table, its header first."""
    used = []
    for key in COLUMNS:
        if key == "interval" or any(key in metrics for metrics in results.values()):
            used.append(key)
    lines = [["split", *(COLUMNS[key] for key in used)]]
    for name, metrics in results.items():
        interval = f"{metrics['low']:.3f}-{metrics['high']:.3f}"
        cells = {**metrics, "interval": interval}
        lines.append([name, *(format_cell(cells.get(key)) for key in used)])
    return lines


def print_table(results):
    """Print {split or subset: metrics} as one table."""
    print_lines(table_lines(results))
    for name, metrics in results.items():
        if metrics["ties"]:
            print(f"{name}: {metrics['ties']} ties, counted as wrong")
        if metrics.get("duplicates"):
            print(f"{name}: {metrics['duplicates']} pairs are repeated")


def compare_runs(folders):
    """Print the metrics of several runs side by side. Returns {folder: eval.json}."""
    if not folders:
        raise UserError("name the runs to compare: --compare=DIR,DIR")
    runs, datasets = {}, set()
    for folder in folders:
        run = read_json(Path(folder) / "eval.json", "python train.py")
        if "splits" not in run:
            raise UserError(f"{folder}/eval.json is not the result of a training run")
        runs[folder] = run
        datasets.add(f"{run['settings']['dataset']} ({run['data'][:8]})")
    if len(datasets) > 1:
        names = ", ".join(sorted(datasets))
        raise UserError(f"runs on different data cannot be compared: {names}")
    first = runs[folders[0]]["splits"]
    lines = [["", *(Path(folder).name for folder in folders)]]
    for split in first:
        for key in COMPARED:
            values = []
            for run in runs.values():
                values.append(run["splits"].get(split, {}).get(key))
            if None in values:
                continue
            cells = [format_cell(values[0])]
            for value in values[1:]:
                cells.append(f"{value:.3f} ({value - values[0]:+.3f})")
            lines.append([f"{split} {COLUMNS[key]}", *cells])
    print_lines(lines)
    print("In parentheses: difference from the first run. These are single runs.")
    print("The spread between seeds is often larger than that between methods.")
    return runs


# Command ------------------------------------------------------------------------------


def main(config):
    check_range(config, 0, 1, "max_bad_fraction")
    if config.compare:
        runs = compare_runs([name for name in config.compare.split(",") if name])
        save_results(config, {"runs": runs})
        return
    if config.data and config.steps:
        raise UserError("--data and --steps are different evaluations. Choose one")
    if config.threshold_from and not config.steps:
        raise UserError("--threshold_from needs --steps=FILE")
    model, tokenizer, checkpoint = load_reward_model(config.checkpoint, config.device)
    if config.data:
        from benchmarks.evaluate_file import evaluate_file

        results = evaluate_file(model, tokenizer, config, checkpoint["is_chat"])
    elif config.steps:
        from benchmarks.first_error import evaluate_steps

        results = evaluate_steps(model, tokenizer, config, checkpoint["is_chat"])
    else:
        settings = checkpoint["settings"]
        dataset = open_dataset(settings["dataset"], checkpoint)
        results = evaluate_run(model, dataset, settings)
    save_results(config, results)


def save_results(config, results):
    """Write --json, if asked for, with the settings of this command."""
    results = {"evaluation": dataclasses.asdict(config), **results}
    if config.json:
        inputs = (config.checkpoint, config.data, config.steps, config.threshold_from)
        with open_output(config.json, *inputs, *config.compare.split(",")) as file:
            file.write(format_json(results))


if __name__ == "__main__":
    run_script(EvalConfig, main)
