"""The laboratory's main study: regularizer, p and read-out on ten draws of the toy world.

    python lab/study.py                 train what is missing, then print the tables
    python lab/study.py --tables=True   print the tables of lab/study.json; nothing is trained

A draw is a dataset, a generator and a training seed of its own; every arm meets the same draws and
all differences are paired by draw. Every run is `python train.py` with its defaults but for the
arm's settings. A finished run is not repeated: delete out/lab to start over.
"""
import os
import sys
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import mean_and_half_width
from config import HERE, in_range, read_json, run_other, run_script, show, write_json

DRAWS = range(200, 210)     # decided before they were made; settings were chosen on 100 to 103
RESULTS = HERE / "lab" / "study.json"


@dataclass(frozen=True)
class StudyConfig:
    workers: int = 2        # runs at a time, one thread each
    tables: bool = False    # print the tables of lab/study.json and train nothing


@dataclass(frozen=True)
class Arm:
    """One way to train a reward model."""
    regularizer: str = "none"
    probs: str = "generator"
    readout: str = "last"

    @property
    def name(self):
        return "-".join((self.regularizer, self.probs, self.readout))


CONTENDERS = ("none", "icrm", "dense_bt", "icrm_gap_bound")
USES_P = ("icrm", "icrm_gap_bound")
TABLES = {
    "Which regularizer?": [Arm(name) for name in CONTENDERS],
    "Which p?": [Arm()] + [Arm(name, probs) for name in USES_P
                           for probs in ("generator", "exact", "uniform", "shuffled")],
    "Which read-out?": [Arm(name, "generator", readout) for readout in ("last", "mean", "sum")
                        for name in ("none", "icrm")],
}
ARMS = list(dict.fromkeys(arm for arms in TABLES.values() for arm in arms))
COLUMNS = {"val": ("val", "accuracy"), "decoupled": ("decoupled", "accuracy"),
           "swapped": ("swapped", "accuracy"), "longer": ("longer", "accuracy"),
           "corr(z,V)": ("val", "correlation"), "calib.": ("val", "calibration_error"),
           "leak": ("val", "credit_leak")}


def make_draw(draw):
    """The dataset and the generator of one draw, where they are not there yet."""
    if not Path(f"data/toy-{draw}/dataset.json").exists():
        run_other("data/toy/prepare.py", quiet=True, name=f"toy-{draw}", seed=draw)
    if not Path(f"out/lab/{draw}-generator/p.json").exists():
        run_other("generator.py", quiet=True, dataset=f"toy-{draw}", seed=draw,
                  out_dir=f"out/lab/{draw}-generator")


def run(job):
    """Train and evaluate one arm on one draw: (draw, arm)."""
    draw, arm = job
    folder = Path(f"out/lab/{draw}-{arm.name}")
    if not (folder / "eval.json").exists():
        run_other("train.py", quiet=True, dataset=f"toy-{draw}", seed=draw,
                  generator=f"out/lab/{draw}-generator", out_dir=folder,
                  regularizer=arm.regularizer, probs=arm.probs, readout=arm.readout)
    splits = read_json(folder / "eval.json", "lab/study.py")["splits"]
    numbers = {name: round(splits[split][key], 4) for name, (split, key) in COLUMNS.items()}
    return {"draw": draw, "arm": arm.name, **numbers}


def in_parallel(workers, name, function, jobs):
    """function(job) of all jobs, in their order; the first that fails ends it."""
    with ThreadPool(workers) as pool:
        return list(tqdm(pool.imap(function, jobs), name, len(jobs), disable=None))


def table(runs, arms):
    """Means over draws, and the difference to the first arm with half its 95% interval, paired by
    draw (bold where it excludes 0): the lines of a Markdown table."""
    value = {(one["arm"], one["draw"]): one for one in runs}
    lines = ["| " + " | ".join(["regularizer", "p", "read-out", *COLUMNS]) + " |",
             "|" + " --- |" * (3 + len(COLUMNS))]
    for arm in arms:
        p = arm.probs if arm.regularizer in USES_P else ""
        cells = [f"`{arm.regularizer}`", p, arm.readout]
        for name in COLUMNS:
            mine = [value[arm.name, draw][name] for draw in DRAWS]
            base = [value[arms[0].name, draw][name] for draw in DRAWS]
            mean, half = mean_and_half_width([a - b for a, b in zip(mine, base)])
            difference = f"{mean:+.3f} ± {half:.3f}"
            difference = f"**{difference}**" if abs(mean) > half else difference
            average, _ = mean_and_half_width(mine)
            cells.append(f"{average:.3f}" + (f" ({difference})" if arm != arms[0] else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def tables(runs):
    return "\n".join("\n".join([f"### {question}", "", *table(runs, arms), ""])
                     for question, arms in TABLES.items())


def main(config):
    show(config)
    in_range(config, 1, 64, "workers")
    if not config.tables:
        os.environ["OMP_NUM_THREADS"] = "1"     # of the commands
        in_parallel(config.workers, "draws", make_draw, DRAWS)
        jobs = [(draw, arm) for draw in DRAWS for arm in ARMS]
        write_json(RESULTS, {"runs": in_parallel(config.workers, "runs", run, jobs)})
    print(tables(read_json(RESULTS, "lab/study.py")["runs"]))


if __name__ == "__main__":
    run_script(StudyConfig, main)
