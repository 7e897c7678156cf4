"""The study on real preference pairs: a pretrained model, HH-RLHF and three benchmarks.

    python lab/real.py --results=out/real.jsonl --name=harmless --pairs=A \\
        --rm_bench=B --candidates=C --steps=D    run what is missing there
    python lab/real.py --tables=True             print the tables of stored runs

`python train.py` trains the last blocks of a pretrained model on the pairs. Every run
is measured on held-out pairs, RM-Bench, selection among candidates, and the first wrong
steps of solutions. A finished run is one line of the results, with the outcome of every
case, and is not repeated. lab/real.jsonl holds runs of version 2.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import harmonic_mean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import UserError, autocast, check_range, lock, run_script
import numpy as np

from benchmarks.first_error import best_threshold, first_below
from bon import halve
from data.dataset import dataset_folder, open_dataset
from data.formats import read_candidates, read_pairs, read_steps
from evaluate import load_reward_model, score
from lab.intervals import mean_and_half_width
from lab.runs import (
    VERSION,
    append_record,
    check_version,
    markdown_table,
    read_records,
    run_command,
    run_jobs,
)
from lab.study import USES_P

SEEDS = (0, 1, 2)
N_CANDIDATE_SETS = 150  # the first so many prompts of the file
HALVING_LENGTHS = (20, 40)
TRAINING = {  # chosen on a third of the training prompts
    "train_last_layers": 3,
    "steps": 45,
    "eval_interval": 45,
    "batch_size": 32,
    "learning_rate": 3e-4,
    "lm_weight": 0.0,
}


@dataclass(frozen=True)
class RealConfig:
    results: str = "lab/real.jsonl"  # one line per finished run
    init_from: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # a folder, or owner/model
    name: str = "harmless"  # of the pairs, and of the dataset made of them
    pairs: str = ""  # JSONL of pairs. A fifth of the prompts is held out
    rm_bench: str = ""  # JSONL of RM-Bench's pairs
    candidates: str = ""  # JSONL of prompts with correct and incorrect responses
    steps: str = ""  # JSONL of solutions in steps, with the first wrong one
    dtype: str = "auto"  # auto (bfloat16 on CUDA), float32, bfloat16
    workers: int = 2  # runs at a time, one thread each
    tables: bool = False  # print the tables of the results, and run nothing


class Arm(NamedTuple):
    """One way to train a reward model, or a reference on the same cases."""

    prefix_reward: str = "last"
    regularizer: str = "none"
    reg_weight: float = 0.5
    p_source: str = "generator"
    generator: str = "pretrained"  # scratch (random weights): only in old records


LENGTH = Arm("", "length", 0.0, "", "")
RANDOM = Arm("", "random", 0.0, "", "")
REFERENCES = [LENGTH, RANDOM]
BASELINE, SCRATCH = Arm("last"), Arm("last", generator="scratch")
ARMS = []
for prefix_reward in ("last", "sum", "mean"):
    ARMS += [
        Arm(prefix_reward),
        Arm(prefix_reward, "icrm"),
        Arm(prefix_reward, "icrm", reg_weight=0.1),
        Arm(prefix_reward, "icrm", p_source="uniform"),
        Arm(prefix_reward, "dense_bt"),
        Arm(prefix_reward, "icrm_gap_bound"),
    ]


# Measuring ----------------------------------------------------------------------------


class Benchmarks:
    """The cases that every run is measured on.

    The outcome of a case is a whole number from 0 to the maximum in COLUMNS.
    """

    def __init__(self, config, dataset):
        wrap_as_chat = True
        arguments = dataset.tokenizer, dataset.block_size, wrap_as_chat
        self.pairs = list(dataset.split("val"))
        self.rm_bench, self.rm_bench_pairs, _ = read_pairs(config.rm_bench, *arguments)
        items, examples, _ = read_candidates(config.candidates, *arguments)
        self.candidates = examples[:N_CANDIDATE_SETS]
        self.correct = [item.labels for item in items]
        items, self.solutions, self.step_ends, _ = read_steps(config.steps, *arguments)
        self.first_errors = np.array([item.first_error for item in items])
        numbers = {}
        for item in items:
            numbers.setdefault(item.prompt, len(numbers))
        self.halves = np.array([numbers[item.prompt] % 2 for item in items])

    def evaluate(self, compute_rewards):
        """compute_rewards: Examples -> prefix rewards, in the shape of `score`'s.

        Returns {measure: the outcomes of its cases, one digit each, as text}.
        """
        held_out = []
        for chosen, rejected in compute_rewards(self.pairs):
            held_out.append(chosen[-1] > rejected[-1])
        wins, hard_wins = Counter(), Counter()  # of the nine pairs of a prompt
        rewards = compute_rewards(self.rm_bench_pairs)
        for item, (chosen, rejected) in zip(self.rm_bench, rewards):
            chosen_style, rejected_style = item.cell
            won = int(chosen[-1] > rejected[-1])
            wins[item.prompt] += won
            if chosen_style < rejected_style:  # 0 is the plainest style, 2 the richest
                hard_wins[item.prompt] += won
        best, halving = [], []
        for rewards, correct in zip(compute_rewards(self.candidates), self.correct):
            best.append(correct[halve(rewards, ())[0]])
            halving.append(correct[halve(rewards, HALVING_LENGTHS)[0]])
        step_rewards = []
        for (rewards,), ends in zip(compute_rewards(self.solutions), self.step_ends):
            step_rewards.append(rewards[[0, *ends]])
        cases = {
            "held_out": held_out,
            "rm_bench": wins.values(),
            "rm_bench_hard": hard_wins.values(),
            "best_of_4": best,
            "halving": halving,
            **self.find_errors(step_rewards),
        }
        results = {}
        for name, outcomes in cases.items():
            results[name] = "".join(str(int(outcome)) for outcome in outcomes)
        return results

    def find_errors(self, step_rewards):
        """Outcomes of the search for the first wrong step. All solutions have one.

        step_rewards: for each solution, the rewards at its first token and at the end
            of every step
        first_error        the first step below a threshold is the wrong one
        none_before_error  no step before the wrong one is below the threshold, for
            solutions with such steps
        largest_drop       the reward falls most at the wrong step
        The threshold for one half of the prompts is chosen on the other half, where
        the steps before the first wrong one serve as correct solutions.
        """
        rewards = [solution[1:] for solution in step_rewards]
        thresholds = [self.choose_threshold(rewards, half) for half in (1, 0)]
        found_error, none_before_error, largest_drop = [], [], []
        for i, error in enumerate(self.first_errors):
            predicted = first_below(rewards[i], thresholds[self.halves[i]])
            found_error.append(predicted == error)
            if error > 0:
                none_before_error.append(predicted < 0 or predicted >= error)
            largest_drop.append(np.argmin(np.diff(step_rewards[i])) == error)
        return {
            "first_error": found_error,
            "none_before_error": none_before_error,
            "largest_drop": largest_drop,
        }

    def choose_threshold(self, rewards, half):
        """The best threshold on one half of the prompts."""
        solutions, errors = [], []
        for i in np.flatnonzero(self.halves == half):
            error = self.first_errors[i]
            solutions.append(rewards[i])
            errors.append(error)
            if error > 0:
                solutions.append(rewards[i][:error])
                errors.append(-1)
        return best_threshold(solutions, errors)


def reference_rewards(reference, seed, examples):
    """The rewards of LENGTH (the number of tokens) or RANDOM."""
    rng, results = np.random.default_rng(seed), []
    for example in examples:
        rewards = []
        for response in example.responses:
            if reference == RANDOM:
                rewards.append(rng.random(len(response)))
            else:
                rewards.append(np.arange(len(response)))
        results.append(rewards)
    return results


# Runs ---------------------------------------------------------------------------------


def generator_folder(config):
    return Path("out/real") / config.name / Path(config.init_from).name


def training_settings(config):
    """The settings of train.py that are not fields of an arm."""
    generator = str(generator_folder(config))
    return {**TRAINING, "dtype": config.dtype, "generator": generator}


def prepare(config):
    """Make the dataset, and store the pretrained model's p, unless they exist."""
    if not (dataset_folder(config.name) / "dataset.json").exists():
        settings = {"name": config.name, "input": config.pairs, "val_share": 0.2}
        run_command("data/prepare.py", tokenizer=config.init_from, **settings)
    folder = generator_folder(config)
    if not (folder / "p.json").exists():
        settings = {"dataset": config.name, "out_dir": folder, "dtype": config.dtype}
        run_command("generator.py", init_from=config.init_from, steps=0, **settings)


def run_arm(config, benchmarks, arm, seed):
    """Train and measure one arm, and yield its record. The checkpoint is deleted."""
    name = "-".join(str(part) for part in arm)
    folder = Path("out/real") / config.name / f"{name}-seed{seed}"
    settings = {**arm._asdict(), **training_settings(config), "seed": seed}
    run_command("train.py", dataset=config.name, out_dir=folder, **settings)
    model, _, _ = load_reward_model(folder, "auto")
    with autocast(model.device, config.dtype):
        results = benchmarks.evaluate(partial(score, model))
    (folder / "ckpt.pt").unlink()
    yield make_record(config, arm, seed, training_settings(config), results)


def make_record(config, arm, seed, settings, results):
    return {
        "version": VERSION,
        "pairs": config.name,
        "seed": seed,
        **arm._asdict(),
        "settings": settings,
        **results,
    }


def find_jobs(config, records):
    """[(arm, seed), ...] without a record. References are not among them."""
    results, jobs = index_records(records, config.name), []
    settings = training_settings(config)
    for arm in ARMS:
        for seed in SEEDS:
            record = results.get((arm, seed))
            if record is None:
                jobs.append((arm, seed))
            elif record["settings"] != settings:
                raise UserError(
                    f"{config.results} has runs with other settings. Name another "
                    "file with --results=FILE"
                )
    return jobs


def run_study(config):
    path = Path(config.results)
    records = read_records(path)
    check_version(path, records)
    prepare(config)
    benchmarks = Benchmarks(config, open_dataset(config.name))
    results = index_records(records, config.name)
    for arm in REFERENCES:
        for seed in SEEDS:
            if (arm, seed) not in results:
                measured = benchmarks.evaluate(partial(reference_rewards, arm, seed))
                append_record(path, make_record(config, arm, seed, {}, measured))
    jobs = find_jobs(config, records)
    run_jobs(partial(run_arm, config, benchmarks), jobs, path, config.workers)


# Tables -------------------------------------------------------------------------------

INTRODUCTION = """A cell is the mean over three seeds. In parentheses is a difference,
with the half-widths of its 95% intervals over cases and over seeds. Over cases,
outcomes are averaged over seeds first. A regularizer is compared with `none` at the
same prefix reward. Other rows with three seeds are compared with the first one.
`length` prefers the longer response, and `random` has random rewards. Start: the
pretrained model, or random weights (scratch, one seed, all blocks trained).
"""
COLUMNS = {  # key of a record -> largest outcome of a case, column, explanation
    "held_out": (1, "held out", "accuracy on pairs of other prompts"),
    "rm_bench": (9, "RM-Bench", "accuracy on its chat subset, 9 pairs per prompt"),
    "rm_bench_hard": (
        3,
        "RM-Bench hard",
        "the pairs in which the chosen response has the plainer style",
    ),
    "best_of_4": (1, "best of 4", "how often the selected one of 4 answers is correct"),
    "halving": (1, "halving", "the same, half is dropped after 20 and after 40 tokens"),
    "first_error": (
        1,
        "first error",
        "how often the first step below a threshold is the first wrong one",
    ),
    "none_before_error": (
        1,
        "none before",
        "how often no step before the first wrong one is below the threshold",
    ),
    "f1": (1, "F1", "harmonic mean of the two columns before, ± over seeds"),
    "largest_drop": (
        1,
        "largest drop",
        "how often the reward falls most at the first wrong step",
    ),
}
TABLES = {
    "Pairs and candidates": [
        "held_out",
        "rm_bench",
        "rm_bench_hard",
        "best_of_4",
        "halving",
    ],
    "First wrong steps": ["first_error", "none_before_error", "f1", "largest_drop"],
}


def index_records(records, pairs):
    """{(arm, seed): record} of one set of pairs."""
    results = {}
    for record in records:
        if record["pairs"] == pairs:
            arm = Arm(*(record[field] for field in Arm._fields))
            results[arm, record["seed"]] = record
    return results


def read_cases(results, arm, column):
    """The outcome of every case, from 0 to 1. -> (seeds, cases)"""
    cases = []
    for seed in SEEDS:
        if (arm, seed) in results:
            cases.append([int(digit) for digit in results[arm, seed][column]])
    return np.array(cases) / COLUMNS[column][0]


def format_cell(results, arm, base, column):
    """The mean, and its difference from the base with two 95% intervals (half-widths).

    The first one is over cases, with outcomes averaged over seeds. The second one is
    over seeds.
    """
    if column == "f1":
        return format_f1(results, arm)
    cases = read_cases(results, arm, column)  # (seeds, cases)
    base_cases = read_cases(results, base, column)
    mean = f"{cases.mean():.3f}"
    if arm == base or len(cases) < 2 or len(cases) != len(base_cases):
        return mean
    differences = cases - base_cases  # (seeds, cases)
    by_case = differences.mean(0)
    half_width = 1.96 * by_case.std(ddof=1) / np.sqrt(len(by_case))
    difference, seed_half_width = mean_and_half_width(differences.mean(1))
    return f"{mean} ({difference:+.3f} ± {half_width:.3f} ± {seed_half_width:.3f})"


def format_f1(results, arm):
    """ProcessBench's F1: the mean over seeds, and half of its 95% interval."""
    error_accuracies = read_cases(results, arm, "first_error").mean(1).tolist()
    none_before = read_cases(results, arm, "none_before_error").mean(1).tolist()
    scores = [harmonic_mean(pair) for pair in zip(error_accuracies, none_before)]
    if len(scores) == 1:
        return f"{scores[0]:.3f}"
    mean, half_width = mean_and_half_width(scores)
    return f"{mean:.3f} ± {half_width:.3f}"


def format_table(records, pairs, columns):
    """The lines of a table of the arms with all their seeds.

    A regularizer is compared with `none` and its prefix reward, all else with `none`
    and `last`.
    """
    header = ["pairs", "prefix reward", "regularizer", "λ", "p", "start"]
    header += [COLUMNS[column][1] for column in columns]
    results, rows = index_records(records, pairs), []
    for arm in [*ARMS, SCRATCH, *REFERENCES]:
        n_seeds = sum((arm, seed) in results for seed in SEEDS)
        if n_seeds < (1 if arm == SCRATCH else len(SEEDS)):
            continue
        base, reg_weight, p_source = BASELINE, "", ""
        if arm in ARMS and arm.regularizer != "none":
            base, reg_weight = Arm(arm.prefix_reward), str(arm.reg_weight)
        if arm.regularizer in USES_P:
            p_source = arm.p_source
        row = [pairs, arm.prefix_reward, arm.regularizer]
        row += [reg_weight, p_source, arm.generator]
        for column in columns:
            row.append(format_cell(results, arm, base, column))
        rows.append(row)
    return markdown_table(header, rows)


def format_tables(records):
    """All tables, as Markdown, with an explanation of the columns."""
    explanations = [(title, meaning) for _, title, meaning in COLUMNS.values()]
    lines = ["## The study on real pairs", "", INTRODUCTION]
    lines += markdown_table(["column", "meaning"], explanations)
    for pairs in dict.fromkeys(record["pairs"] for record in records):
        for title, columns in TABLES.items():
            lines += ["", f"### {title}: {pairs}", ""]
            lines += format_table(records, pairs, columns)
    return "\n".join(lines)


def main(config):
    check_range(config, 1, 64, "workers")
    if not config.tables:
        with lock("out/real"):
            run_study(config)
    print(format_tables(read_records(Path(config.results))))


if __name__ == "__main__":
    run_script(RealConfig, main)
