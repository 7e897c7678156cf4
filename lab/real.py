"""Real labels and a real instruct model: what the arms are worth on HH-RLHF.

    python lab/real.py --name=harmless --pairs=A --rm_bench=B --candidates=C --steps=D
    python lab/real.py --tables=True        print the tables of lab/real.jsonl; nothing is trained

The last blocks of a pretrained model are trained on pairs by `python train.py`; what lies below is
read once. A run is measured on held-out pairs, on RM-Bench, by what it picks of candidates, whole
or half-written, and by the first wrong steps it finds; if lab/real.jsonl has it, it's not repeated.
"""
import sys
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import harmonic_mean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import HERE, UserError, autocast, in_range, pick_device, run_other, run_script
import numpy as np

from benchmarks import best_threshold, first_below, mean_and_half_width
from bon import halve
from data.dataset import chunks, open_array, open_dataset, write_array
from data.files import fingerprint, load_checkpoint, read_records, write_records
from data.frozen import states_of, store_states
from data.jsonl import read_candidate_rows, read_pair_rows, read_step_rows
from data.rows import Row
from evaluate import load_reward_model, score
from lab.study import USES_P, run_all
from model import frozen_language_model

RESULTS = HERE / "lab" / "real.jsonl"
SEEDS = (0, 1, 2)
CANDIDATES = 150        # of the prompts with candidates, the first so many
HALVE = (20, 40)        # response tokens after which half of the candidates are dropped
# Chosen on a third of the training prompts alone (lab/README.md).
UNFROZEN, TRAINING = 3, dict(steps=45, batch_size=32, learning_rate=3e-4, lm_weight=0.0)
SCRATCH = dict(n_layer=30, n_head=9, n_embd=576)    # about the pretrained one's size


@dataclass(frozen=True)
class RealConfig:
    init_from: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # a folder, or owner/model on the hub
    name: str = "harmless"  # of the pairs, and of the dataset made of them
    pairs: str = ""         # JSONL of pairs; a fifth of the prompts is held out
    rm_bench: str = ""      # JSONL of RM-Bench's pairs
    candidates: str = ""    # JSONL of prompts with correct and incorrect responses
    steps: str = ""         # JSONL of solutions in steps, with the first wrong one
    dtype: str = "auto"     # auto (bfloat16 on CUDA), float32, bfloat16
    workers: int = 2        # runs at a time, one thread each
    tables: bool = False    # print the tables of lab/real.jsonl and train nothing


class Arm(NamedTuple):
    """One way to train a reward model."""
    readout: str = "last"
    regularizer: str = "none"
    reg_weight: float = 0.5
    probs: str = "generator"
    generator: str = "pretrained"   # or scratch: all blocks trained, from random weights

    @property
    def name(self):
        return "-".join(map(str, self))


WAYS = (("none",), ("icrm",), ("icrm", 0.1), ("icrm", 0.5, "uniform"), ("dense_bt",),
        ("icrm_gap_bound",))
ARMS = [Arm(readout, *way) for readout in ("last", "sum", "mean") for way in WAYS]
ARMS.append(Arm(generator="scratch"))
FIRST = [*ARMS[:6], Arm("sum"), Arm("mean"), Arm("sum", "icrm")]    # on which most depends
JUDGES = ("length", "chance")   # to compare with: the longer one, a random reward
# What is measured, and the highest digit that a case has in lab/real.jsonl.
MEASURES = {"held out": 1, "RM-Bench": 9, "RM-Bench hard": 3, "best of 4": 1, "halving": 1,
            "first error": 1, "none before it": 1, "largest drop": 1}
# The columns of each table; F1 is of both shares before it.
TABLES = {"Pairs and candidates": [*MEASURES][:5],
          "First wrong steps": ["first error", "none before it", "F1", "largest drop"]}


# What is measured --------------------------------------------------------------------------------

def with_states(rows, trunk, folder, dtype):
    """Rows with the hidden states below the trained blocks, kept by a fingerprint of both."""
    sizes = [row.size for row in rows]
    which = fingerprint(dtype, *(part for row in rows for part in (row.prompt, *row.responses)))
    path = folder / f"{which[:16]}-below-{trunk.frozen}.npy"
    if not path.exists():
        write_array(path, (sum(sizes), trunk.config.n_embd), "<f2", states_of(trunk, rows))
    parts = np.split(open_array(path), np.cumsum(sizes)[:-1])
    return [row._replace(below=part) for row, part in zip(rows, parts)]


def three_by_three(rows):
    """RM-Bench's nine pairs of a prompt -> a Row of its chosen and rejected ones, by style."""
    chosen = [row.responses[0] for row in rows[::3]]
    rejected = [row.responses[1] for row in rows[:3]]
    return Row(rows[-1].prompt, (*chosen, *rejected))


class Measures:
    """The rows that every run is measured on, with the states below the trained blocks."""

    def __init__(self, config):
        folder, dataset = folder_of(config, "pretrained"), open_dataset(config.name)
        checkpoint = load_checkpoint(folder, "generator")
        if checkpoint["settings"]["init_from"] != config.init_from:     # a namesake
            raise UserError(f"{folder} is of {checkpoint['settings']['init_from']}; move it away")
        trunk = frozen_language_model(checkpoint).model.to(pick_device("auto"))
        trunk.freeze(len(trunk.layers) - UNFROZEN)
        self.frozen, split = trunk.frozen, dataset.split("val")
        split.below = store_states(trunk, dataset, ("train", "val"), folder)["val"]
        self.pairs = [split[i] for i in range(len(split))]
        about = dataset.tokenizer, dataset.block_size, True     # plain prompts are dialogues
        below = trunk, folder, config.dtype
        items, rows, _ = read_pair_rows(config.rm_bench, *about)
        if [item.cell for item in items] != [*product(range(3), repeat=2)] * (len(rows) // 9):
            raise UserError(f"{config.rm_bench}: a prompt has not nine pairs")
        self.styles = with_states([three_by_three(some) for some in chunks(rows, 9)], *below)
        self.items, rows, _ = read_candidate_rows(config.candidates, *about)
        self.candidates = with_states(rows[:CANDIDATES], *below)
        self.solutions, rows, self.ends = read_step_rows(config.steps, *about)
        self.steps = with_states(rows, *below)

    def of(self, rewards_of):
        """The rewards of rows by a judge (a function) -> a digit of each case of each measure."""
        final = np.array([[r[-1] for r in some] for some in rewards_of(self.styles)])
        won = final[:, :3, None] > final[:, None, 3:]       # (prompts, chosen, rejected style)
        wins, hard = (some.sum((1, 2)) for some in (won, np.triu(won, 1)))
        rewards = rewards_of(self.candidates)
        picks = [[int(item.correct[halve(some, places)[0]]) for item, some in
                  zip(self.items, rewards)] for places in ((), HALVE)]
        hits = [int(a[-1] > b[-1]) for a, b in rewards_of(self.pairs)]
        steps = [r[[0, *at]] for (r,), at in zip(rewards_of(self.steps), self.ends)]
        spent = [halve(some, HALVE)[1] / sum(map(len, some)) for some in rewards]
        digits = dict(zip(MEASURES, (hits, wins, hard, *picks, *self.find_errors(steps))))
        return {"spent": float(np.mean(spent))} | {
            name: "".join(map(str, values)) for name, values in digits.items()}

    def find_errors(self, rewards):
        """Rewards of wrong solutions, at their first token and behind every step -> digits:
        whether the first step below a threshold is the first wrong one; where there are steps
        before that one (a right solution, if an unfinished one), whether none of them is below;
        whether the reward falls most at that step. The threshold of one half of the prompts is
        chosen on the other half."""
        falls, rewards = map(list, zip(*((np.argmin(np.diff(r)), r[1:]) for r in rewards)))
        prompts = {item.prompt: i % 2 for i, item in enumerate(self.solutions)}
        half = np.array([prompts[item.prompt] for item in self.solutions])
        errors = np.array([item.first_error for item in self.solutions])
        first = np.zeros(len(half), int)
        for part in (0, 1):
            others = [(r, error) for r, error, i in zip(rewards, errors, half) if i != part]
            others += [(r[:error], -1) for r, error in others if error > 0]
            threshold = best_threshold(*zip(*others))
            for i in np.flatnonzero(half == part):
                first[i] = first_below(rewards[i], threshold)
        before = ((first < 0) | (first >= errors))[errors > 0]
        return [digits.astype(int) for digits in (first == errors, before, falls == errors)]


def run_as_judge(model, whole, rows):
    """A trained model's rewards; whole: all blocks were trained, so they are read."""
    return score(model, [row._replace(below=None) for row in rows] if whole else rows)


def as_judge(name, seed, rows):
    """The rewards of one of JUDGES."""
    rng = np.random.default_rng(seed)
    return [[rng.random(len(one)) if name == "chance" else np.arange(len(one))
             for one in row.responses] for row in rows]


# Runs --------------------------------------------------------------------------------------------

def folder_of(config, name):
    model = name if name == "scratch" else Path(config.init_from).name
    return Path(f"out/real/{config.name}/{model}")


def make_generator(config, name):
    """One of the two models to start from, where it is not there yet."""
    folder = folder_of(config, name)
    how = SCRATCH if name == "scratch" else {"init_from": config.init_from}
    if not (folder / "p.json").exists():
        run_other("generator.py", dataset=config.name, out_dir=folder, steps=0,
                  dtype=config.dtype, **how)


def settings_of(config, arm):
    """What of an arm's training is not its name."""
    whole = arm.generator == "scratch"
    return TRAINING | {"unfrozen": 0 if whole else UNFROZEN, "dtype": config.dtype,
                       "generator": str(folder_of(config, arm.generator))}


def run(config, measures, job):
    """Train and measure one arm with one seed; its checkpoint is not kept.  -> what was measured"""
    arm, seed = job
    folder = Path(f"out/real/{config.name}/{arm.name}-seed{seed}")
    how = settings_of(config, arm)
    make_generator(config, arm.generator)
    run_other("train.py", quiet=True, dataset=config.name, out_dir=folder, seed=seed,
              eval_interval=10**6, recompute=not how["unfrozen"], **arm._asdict() | how)
    model, _, _ = load_reward_model(folder, "auto")
    model.model.frozen = measures.frozen
    with autocast(pick_device("auto"), config.dtype):
        numbers = measures.of(partial(run_as_judge, model, not how["unfrozen"]))
    (folder / "ckpt.pt").unlink()
    return [{"pairs": config.name, "arm": arm.name, "seed": seed, "how": how, **numbers}]


def to_do(config, runs):
    """The (arm, seed) that have no run yet; one of other settings is refused."""
    known = {(one["arm"], one["seed"]): one["how"] for one in runs if one["pairs"] == config.name}
    jobs = [*product(dict.fromkeys([*FIRST, *ARMS[:-1]]), SEEDS), (ARMS[-1], SEEDS[0])]
    for arm, seed in jobs:
        if known.get((arm.name, seed), settings_of(config, arm)) != settings_of(config, arm):
            raise UserError(f"{RESULTS} has {arm.name} with other settings; take it out there")
    return [(arm, seed) for arm, seed in jobs if (arm.name, seed) not in known]


# Tables ------------------------------------------------------------------------------------------

def shares(runs, arm, name):
    """What was measured of an arm with each seed, from 0 to 1 for each case.  -> (seeds, cases)"""
    digits = [list(map(int, runs[arm, seed][name])) for seed in SEEDS if (arm, seed) in runs]
    return np.array(digits) / MEASURES[name]


def cell(runs, arm, base, name):
    """An arm's mean, and its difference to the base ± half a 95% interval over cases (pairs or
    prompts), the seeds' mean of each, ± over seeds."""
    mine, its = (shares(runs, one, name) for one in (arm, base))
    mean = f"{mine.mean():.3f}"
    if arm == base or not 1 < len(mine) == len(its):
        return mean
    by_case = 1.96 * (mine - its).mean(0).std(ddof=1) / np.sqrt(mine.shape[1])
    difference, by_seed = mean_and_half_width((mine - its).mean(1))
    return f"{mean} ({difference:+.3f} ± {by_case:.3f} ± {by_seed:.3f})"


def f1_cell(runs, arm):
    """ProcessBench's F1 of an arm, its mean ± half a 95% interval over seeds."""
    both = (shares(runs, arm, name).mean(1).tolist() for name in ("first error", "none before it"))
    scores = list(map(harmonic_mean, zip(*both)))       # of each seed
    if len(scores) < 2:
        return f"{scores[0]:.3f}"
    return "{:.3f} ± {:.3f}".format(*mean_and_half_width(scores))


def table(found, columns):
    """The lines of a Markdown table of the arms that have all their seeds (from scratch: one); the
    base of a regularizer is none with its read-out, of all others none with the first."""
    runs = {(one["arm"], one["seed"]): one for one in found}
    lines = ["| " + " | ".join(["read-out", "regularizer", "λ", "p", *columns]) + " |",
             "|" + " --- |" * (4 + len(columns))]
    rows = [(arm.name, Arm("last" if arm.regularizer == "none" else arm.readout).name, arm.readout,
             f"`{arm.regularizer}`" + ", from random weights" * (arm.generator == "scratch"),
             "" if arm.regularizer == "none" else str(arm.reg_weight),
             arm.probs if arm.regularizer in USES_P else "") for arm in ARMS]
    rows += [(name, ARMS[0].name, "", name, "", "") for name in JUDGES]
    for name, base, *about in rows:
        seeds = [seed for seed in SEEDS if (name, seed) in runs]
        if len(seeds) == len(SEEDS) or seeds and name == ARMS[-1].name:
            cells = [f1_cell(runs, name) if column == "F1" else
                     cell(runs, name, base, column) for column in columns]
            lines.append("| " + " | ".join([*about, *cells]) + " |")
    return lines


def tables(found):
    lines = []
    for name, title in product(dict.fromkeys(one["pairs"] for one in found), TABLES):
        some = [one for one in found if one["pairs"] == name]
        lines += [f"### {title}: {name}", "", *table(some, TABLES[title]), ""]
    return lines


def main(config):
    in_range(config, 1, 64, "workers")
    if not config.tables:
        if not Path(f"data/{config.name}/dataset.json").exists():
            run_other("data/prepare.py", name=config.name, input=config.pairs, val_share=0.2,
                      tokenizer=config.init_from)
        make_generator(config, "pretrained")
        with autocast(pick_device("auto"), config.dtype):
            measures = Measures(config)
        judged = [{"pairs": config.name, "arm": name, "seed": seed, "how": {},
                   **measures.of(partial(as_judge, name, seed))}
                  for name, seed in product(JUDGES, SEEDS)]
        runs = read_records(RESULTS)
        write_records(RESULTS, runs + [one for one in judged if one not in runs])
        run_all(partial(run, config, measures), to_do(config, read_records(RESULTS)), RESULTS,
                config.workers)
    print("\n".join(tables(read_records(RESULTS))))


if __name__ == "__main__":
    run_script(RealConfig, main)
