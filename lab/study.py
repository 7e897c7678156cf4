"""The laboratory's main study: regularizer, p and read-out on ten draws of the toy world.

    python lab/study.py                 train what is missing, then print the tables
    python lab/study.py --tables=True   print the tables of lab/study.json; nothing is trained

A draw is a dataset, a generator and a training seed of its own; every arm meets the same draws and
all differences are paired by draw. Every run is `python train.py` with its defaults but for the
arm's settings. A finished run is not repeated: delete out/lab to start over.
"""
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import mean_and_half_width
from config import UserError, in_range, read_json, run_script, show, write_json

DRAWS = range(200, 210)     # decided before they were made; settings were chosen on 100 to 103
RESULTS = ROOT / "lab" / "study.json"


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


def command(script, **settings):
    """Run a script of ours on one thread; what it prints is kept for the day it fails."""
    words = [f"--{key}={value}" for key, value in settings.items()]
    done = subprocess.run([sys.executable, ROOT / script, *words], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise UserError(f"{script} {' '.join(words)} failed:\n{done.stdout}{done.stderr}")


def make_draw(draw):
    """The dataset and the generator of one draw, where they are not there yet."""
    if not Path(f"data/toy-{draw}/dataset.json").exists():
        command("data/toy/prepare.py", name=f"toy-{draw}", seed=draw)
    if not Path(f"out/lab/{draw}-generator/p.json").exists():
        command("generator.py", dataset=f"toy-{draw}", seed=draw,
                out_dir=f"out/lab/{draw}-generator")


def run(draw, arm):
    """Train and evaluate one arm on one draw."""
    folder = Path(f"out/lab/{draw}-{arm.name}")
    if not (folder / "eval.json").exists():
        command("train.py", dataset=f"toy-{draw}", seed=draw, generator=f"out/lab/{draw}-generator",
                out_dir=folder, regularizer=arm.regularizer, probs=arm.probs, readout=arm.readout)
    splits = read_json(folder / "eval.json", "lab/study.py")["splits"]
    numbers = {name: round(splits[split][key], 4) for name, (split, key) in COLUMNS.items()}
    return {"draw": draw, "arm": arm.name, **numbers}


def in_parallel(workers, name, function, jobs):
    """function(*job) for all jobs, the results as they come."""
    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(function, *job) for job in jobs]
        bar = tqdm(as_completed(running), name, len(jobs), disable=None)
        return [done.result() for done in bar]


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
        in_parallel(config.workers, "draws", make_draw, [(draw,) for draw in DRAWS])
        jobs = [(draw, arm) for draw in DRAWS for arm in ARMS]
        runs = in_parallel(config.workers, "runs", run, jobs)
        runs.sort(key=lambda one: (one["draw"], one["arm"]))
        write_json(RESULTS, {"runs": runs})
    print(tables(read_json(RESULTS, "lab/study.py")["runs"]))


if __name__ == "__main__":
    run_script(StudyConfig, main)
