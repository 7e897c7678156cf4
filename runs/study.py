"""The regularizer laboratory: every regularizer, its controls and its rivals on ten draws of the toy world.

    python runs/study.py                    the main tables
    python runs/study.py --part=confirm     six of its arms on twenty other draws
    python runs/study.py --part=tune        kappa and the number of steps, chosen on other draws
    python runs/study.py --part=reading     what the final reward reads, evidence or remarks, clause by clause
    python runs/study.py --part=regimes     the main contenders in worlds, models and data of other kinds
    python runs/study.py --part=mismatch    p from elsewhere than a well-trained generator
    python runs/study.py --part=tables      print the tables of runs/study.json again; nothing is trained

A draw of the world is a dataset, a generator and a training seed of its own; everything is paired by draw. A
finished run is not repeated: delete out/study to start over. All runs of all parts are in runs/study.json.
The rule for kappa and steps: of all settings with val accuracy within 0.01 of the best, the one with the highest
correlation with the exact value on the training responses. (When it was made, and what came of it: runs/README.md.)
"""
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import random
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]
import tables
import train
from bon import evaluate_candidates
from config import choose, in_range, run_script, show, write_atomically
from data.batches import load_pairs
from data.pairs import Candidates
from data.prepare import dataset_folder
from data.toy.prepare import ToyConfig, prepare
from data.toy.world import EVIDENCE, QUALITY, REMARK, World, gold, parse, question, split_worlds
from evaluate import evaluate_pairs, evaluate_splits
from generator import GeneratorConfig, train_generator
from regularizer import KAPPA, REGULARIZERS, gap_bound, icrm_gap_bound, icrm_gap_bound_uniform, squared_gap

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class StudyConfig:
    part: str = "main"      # main, confirm, tune, reading, regimes, mismatch or tables
    workers: int = 2        # processes, one thread each
    worlds: int = 0         # draws of the world; 0: as many as the part has in the README


@dataclass(frozen=True)
class Job:
    """One reward model to train and to evaluate."""
    part: str
    world: int              # seed of the data, of the generator's data and of the training
    regularizer: str
    reg_weight: float = 0.5
    steps: int = 160
    variant: str = ""       # a name in VARIANTS

    @property
    def folder(self):
        words = (self.part, self.variant, self.regularizer, self.reg_weight, self.steps, self.world)
        return Path("out/study") / "-".join(str(word) for word in words if word != "")


# What differs from the default world, from the default training, and from the default generator.
VARIANTS = {
    "": ({}, {}, {}),
    "1 filler": (dict(fillers=1), {}, {}),
    "144 fillers": (dict(fillers=144), {}, {}),
    "20% wrong labels": (dict(noise=0.2), {}, {}),
    "evidence in the last 3 clauses": (dict(late=3), {}, {}),
    "fidelity 0.5": (dict(fidelity=0.5), {}, {}),
    "fidelity 0.75": (dict(fidelity=0.75), {}, {}),
    "fidelity 1.0": (dict(fidelity=1.0), {}, {}),
    "125 pairs": (dict(train=125), {}, {}),
    "2000 pairs": (dict(train=2000), {}, {}),
    "1 layer, 32 channels": ({}, dict(n_layer=1, n_embd=32), {}),
    "generator of 50 steps": ({}, {}, dict(steps=50)),
    "320 steps": ({}, dict(steps=320), {}),
    "p exact": ({}, dict(probs_from="exact"), {}),
    "p of 50 steps": ({}, dict(probs_from="out/study/p of 50 steps"), {}),
    "p of another world": ({}, dict(probs_from="out/study/p of another world"), {}),
}
PARTS = ("main", "confirm", "tune", "reading", "regimes", "mismatch")
FROM_ELSEWHERE = [name for name in VARIANTS if name.startswith("p ")]
KAPPAS = (8, 32, 128, 512)


def lab_regularizers():
    """What only this study needs, put into the box as a student would."""
    for kappa in KAPPAS:
        REGULARIZERS[f"icrm_gap_bound@{kappa}"] = functools.partial(icrm_gap_bound, kappa=kappa)
    REGULARIZERS["icrm_gap_bound_uniform@8"] = functools.partial(icrm_gap_bound_uniform, kappa=8)
    for name, term in (("kappa_squared_gap", squared_gap), ("kappa_gap_bound", gap_bound)):
        REGULARIZERS[name] = functools.partial(weighted, term, KAPPA)


def weighted(term, kappa, rewards, probs, mask):
    """kappa times a gap term on its own, without the paper's."""
    return kappa * term(rewards, probs, mask)[0], None


def jobs_of(part, worlds):
    """The runs of one part, draw after draw."""
    if part == "tune":
        names = ["none", "icrm"] + [f"icrm_gap_bound@{kappa}" for kappa in KAPPAS]
        return [Job(part, 100 + world, name, steps=steps) for world in range(worlds or 4)
                for steps in (80, 160) for name in names]
    if part == "main":
        half = ["icrm", "icrm_uniform", "icrm_shuffled", "dense_bt", "td_lambda", "kappa_squared_gap", "kappa_gap_bound",
                "icrm_squared_gap", "icrm_gap_bound", "icrm_gap_bound_uniform", "icrm_gap_bound_shuffled"]
        arms = [("none", 0.5, 160)] + [(name, 0.5, 160) for name in half]
        arms += [(name, 0.1, 160) for name in ("icrm", "dense_bt", "td_lambda", "tcrm_smooth", "icrm_gap_bound")]
        arms += [("tcrm_lookahead", 0.01, 160)]
        arms += [(name, 0.5, 80) for name in ("none", "icrm", "icrm_uniform", "icrm_shuffled", "dense_bt", "icrm_gap_bound",
                                              "icrm_gap_bound_uniform", "icrm_gap_bound@8", "icrm_gap_bound_uniform@8")]
        arms += [("icrm", 0.1, 80)]
        return [Job(part, world, *arm) for world in range(worlds or 10) for arm in arms]
    if part == "confirm":
        return [Job(part, 10 + world, name) for world in range(worlds or 20)
                for name in ("none", "icrm", "icrm_uniform", "dense_bt", "icrm_gap_bound", "icrm_gap_bound_uniform")]
    names = ["none", "icrm", "icrm_gap_bound", "icrm_gap_bound_uniform"]
    if part == "reading":
        return [Job(part, world, name) for world in range(worlds or 10) for name in names]
    if part == "regimes":
        return [Job(part, world, name, variant=variant) for variant in VARIANTS
                if variant and variant not in FROM_ELSEWHERE for world in range(worlds or 5) for name in names[:3]]
    return [Job(part, world, name, variant=variant) for world in range(worlds or 10)
            for variant in FROM_ELSEWHERE for name in ("icrm", "icrm_gap_bound")]


# One run --------------------------------------------------------------------------------------------

def start_worker():
    torch.set_num_threads(1)
    lab_regularizers()


def settings_of(job):
    """A Job's TrainConfig."""
    world, training, generator = VARIANTS[job.variant]
    dataset = f"toy-{job.world}" + "".join(f"-{key}-{value}" for key, value in world.items())
    own = generator | {key: value for key, value in training.items() if key in ("n_layer", "n_embd")}
    settings = dict(dataset=dataset, generator="-".join(map(str, ("out/study/generator", dataset, *sum(own.items(), ())))),
                    out_dir=str(job.folder), regularizer=job.regularizer, reg_weight=job.reg_weight, seed=job.world,
                    steps=job.steps, device="cpu") | training
    if settings.get("probs_from", "exact") != "exact":
        settings["probs_from"] += f" {job.world}"
    return train.TrainConfig(**settings | dict(log_interval=40, eval_interval=settings["steps"], save_interval=settings["steps"]))


def quietly(work):
    """work(job) with its output in the log of the job's folder."""
    @functools.wraps(work)
    def done(job):
        job.folder.mkdir(parents=True, exist_ok=True)
        with open(job.folder / "output.txt", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            return work(job)
    return done


@quietly
def prepare_job(job):
    """The dataset and the generators that a job needs, where they are absent."""
    config = settings_of(job)
    world, _, generator = VARIANTS[job.variant]
    if not (dataset_folder(config.dataset) / "dataset.json").exists():
        prepare(ToyConfig(name=config.dataset, seed=job.world, **world))
    if generator:
        train_generator(GeneratorConfig(dataset=config.dataset, out_dir=config.generator, device="cpu", **generator))
    train.obtain_generator(config)
    if job.variant == "p of 50 steps":
        train_generator(GeneratorConfig(dataset=config.dataset, out_dir=config.probs_from, steps=50, device="cpu"))
    if job.variant == "p of another world":
        other = f"{config.dataset}-random"
        if not (dataset_folder(other) / "dataset.json").exists():
            prepare(ToyConfig(name=other, seed=job.world, remarks="random", vocabulary=config.dataset))
        train_generator(GeneratorConfig(dataset=other, out_dir=config.probs_from, device="cpu"))


def candidates_of(world, seed, prompts=100, n=16):
    """n responses of a world to each of some prompts, worth their gold."""
    rng = random.Random(f"{seed} candidates")
    texts = [(question(rng), [world.sample(rng) for _ in range(n)]) for _ in range(prompts)]
    return [Candidates(prompt, tuple(responses), tuple(float(gold(text)) for text in responses)) for prompt, responses in texts]


def reading(model, data):
    """What the final reward of a response reads: least squares on the quality (-1, 0, 1) of the evidence and of the
    remark in each clause, on a split where the two are independent -> {"evidence": [clauses], "remark": [clauses]}."""
    _, rewards = evaluate_pairs(model, data, "cpu")
    texts = [pair.chosen for pair in data.pairs] + [pair.rejected for pair in data.pairs]
    quality = dict(zip(EVIDENCE + REMARK, QUALITY + QUALITY))
    read = np.array([[quality.get(part, 0) for clause in parse(text) for part in clause] for text in texts])
    found, *_ = np.linalg.lstsq(np.c_[read, np.ones(len(read))], np.array([r[-1] for r in rewards]), rcond=None)
    return {"evidence": found[:-1:2].round(3).tolist(), "remark": found[1:-1:2].round(3).tolist()}


@quietly
def run_job(job):
    """Train and evaluate; returns the run's record and writes it to run.json."""
    config = settings_of(job)
    model, dataset, data, splits = train.train(config)
    record = dataclasses.asdict(job) | {"steps": config.steps, "seed": job.world}
    if job.part == "tune":      # nothing but the training distribution is looked at
        splits = {"val": splits["val"], "train": load_pairs(dataset.path("train"), dataset.tokenizer, config.block_size)}
    worlds = split_worlds(World(**dataset.world))
    results = evaluate_splits(model, dataset, splits, "cpu")
    for split, metrics in results.items():
        record[split] = {key: round(metrics[key], 4) for key in ("accuracy", "correlation", "calibration_error", "credit_leak")}
    if job.part != "tune":
        for split in ("val", "swapped"):
            found = evaluate_candidates(model, dataset.tokenizer, candidates_of(worlds[split], job.world), "cpu")
            record[split]["best_of_16"] = round(found["curve"][-1]["reward_model"], 4)
    if job.part == "reading":
        record["reading"] = reading(model, splits["decoupled"])
    (job.folder / "ckpt.pt").unlink()
    write_atomically(job.folder / "run.json", lambda temporary: temporary.write_text(json.dumps(record)))
    return record


# The study ------------------------------------------------------------------------------------------

def run_all(work, jobs, workers, title):
    """work(job) for every job in a few processes, with a progress bar; the first error stops the study."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            for future in tqdm(as_completed(futures), title, len(jobs), disable=None):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def study(part, worlds, workers):
    """Run what is not finished of one part and put it into runs/study.json."""
    jobs = jobs_of(part, worlds)
    missing = [job for job in jobs if not (job.folder / "run.json").exists()]
    print(f"{part}: {len(jobs)} runs, {len(jobs) - len(missing)} of them finished before")
    firsts = {(job.world, job.variant): job for job in reversed(missing)}
    generators = {settings_of(job).generator: job for job in reversed(firsts.values())}
    elsewhere = [job for job in firsts.values() if job.variant in FROM_ELSEWHERE and job not in generators.values()]
    run_all(prepare_job, list(generators.values()), workers, "worlds and generators")
    run_all(prepare_job, elsewhere, workers, "other generators")
    run_all(run_job, missing, workers, "reward models")
    key = lambda run: tuple(run[name] for name in ("part", "variant", "regularizer", "reg_weight", "steps", "seed"))
    found = {key(run): run for run in read_runs()}
    found |= {key(run): run for run in (json.loads((job.folder / "run.json").read_text()) for job in jobs)}
    runs = sorted(found.values(), key=lambda run: PARTS.index(run["part"]))
    text = "[\n" + ",\n".join(json.dumps(run) for run in runs) + "\n]\n"
    write_atomically(HERE / "study.json", lambda temporary: temporary.write_text(text))


def read_runs():
    path = HERE / "study.json"
    return json.loads(path.read_text()) if path.exists() else []


def main(config):
    show(config)
    in_range(config, 1, 1000, "workers")
    in_range(config, 0, 1000, "worlds")
    choose("part", config.part, (*PARTS, "tables"))
    if config.part != "tables":
        study(config.part, config.worlds, config.workers)
    tables.print_tables(read_runs())


if __name__ == "__main__":
    run_script(StudyConfig, main)
