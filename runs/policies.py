"""Does a better reward model make a better policy? DPO and best-of-n with the reward models of the study, judged by gold.

    python runs/policies.py                 five draws of the toy world, five reward models each
    python runs/policies.py --part=tables   print the tables of runs/policies.json again; nothing is trained

Each reward model of a draw picks the pairs for one policy (dpo.py) and the best of up to 64 responses (bon.py), twice: with the
draw's own generator, and with one trained on the decoupled world, where remarks are random and a reward model that reads them misleads.
Finished runs are not repeated: delete out/policies to start over.
"""
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]
import study
from bon import BonConfig, evaluate_candidates, kl_of_best_of_n, sample_candidates, toy_questions, worth_of_gold
from compare import mean_and_half_width
from config import choose, in_range, run_script, show, write_atomically
from dpo import DPOConfig
from dpo import main as align
from evaluate import load_reward_model
from generator import load_generator
from tables import table
from train import train

ARMS = ("none", "icrm", "icrm_uniform", "dense_bt", "icrm_gap_bound")
WORLDS = {"usual": "", "decoupled": "p of another world"}    # the world of the policy's generator: a variant of the study


@dataclass(frozen=True)
class PoliciesConfig:
    workers: int = 2        # processes, one thread each
    worlds: int = 5         # draws of the world
    part: str = "all"       # all, or tables: print those of runs/policies.json


@dataclass(frozen=True)
class PolicyJob(study.Job):
    @property
    def folder(self):
        return Path("out/policies") / f"{self.regularizer}-{self.world}"


def prepare_job(job):
    """The draw's dataset, its generator and the one of the decoupled world."""
    study.prepare_job(dataclasses.replace(job, variant=WORLDS["decoupled"]))


@study.quietly
def run_job(job):
    """One reward model, its two policies and its two best-of-n curves; the record is written to run.json."""
    config = study.settings_of(job)
    train(config)
    model, tokenizer, _ = load_reward_model(config.out_dir, "cpu")
    record = {"regularizer": job.regularizer, "seed": job.world}
    for name, variant in WORLDS.items():
        generator = study.settings_of(dataclasses.replace(job, variant=variant)).probs_from or config.generator
        found = job.folder / f"{name}.json"
        align(DPOConfig(checkpoint=config.out_dir, generator=generator, out_dir=str(job.folder / name), json=str(found),
                        seed=job.world, device="cpu"))
        results = json.loads(found.read_text())
        bon = BonConfig(seed=job.world)
        candidates = sample_candidates(load_generator(generator, "cpu")[0], tokenizer, toy_questions(bon), worth_of_gold, bon, "cpu")
        curve = evaluate_candidates(model, tokenizer, candidates, "cpu")["curve"]
        record[name] = {key: round(value, 4) for key, value in results.items() if isinstance(value, float)} | {
            "pairs": results["pairs"], "best_of_n": {str(row["n"]): round(row["reward_model"], 4) for row in curve}}
    write_atomically(job.folder / "run.json", lambda temporary: temporary.write_text(json.dumps(record)))


def paired(runs, name, value):
    """One cell: mean over draws, and the difference to `none` paired by draw with half a 95% t interval."""
    found = {run["seed"]: value(run) for run in runs if run["regularizer"] == name}
    base = {run["seed"]: value(run) for run in runs if run["regularizer"] == "none"}
    text = f"{sum(found.values()) / len(found):.2f}"
    if name == "none":
        return text
    mean, half = mean_and_half_width([found[seed] - base[seed] for seed in found])
    return f"{text} ({mean:+.2f} ± {half:.2f})"


def print_tables(runs):
    keys = {"gold after DPO": "gold_after", "greedy gold": "greedy_gold_after", "KL": "kl", "length": "length_after"}
    for world in WORLDS:
        before = [run[world]["gold_before"] for run in runs if run["regularizer"] == "none"]
        print(f"\n{world} world: DPO (gold before it {sum(before) / len(before):.2f}), then best of n\n")
        rows = [[f"`{name}`"] + [paired(runs, name, lambda run: run[world][key]) for key in keys.values()] for name in ARMS]
        print(table(["reward model", *keys], rows) + "\n")
        sizes = ("4", "16", "64")
        rows = [[f"`{name}`"] + [paired(runs, name, lambda run: run[world]["best_of_n"][n]) for n in sizes] for name in ARMS]
        print(table(["reward model", *(f"best of {n} (KL {kl_of_best_of_n(int(n)):.2f})" for n in sizes)], rows))


def main(config):
    show(config)
    in_range(config, 1, 1000, "workers", "worlds")
    path = study.HERE / "policies.json"
    choose("part", config.part, ("all", "tables"))
    if config.part == "all":
        jobs = [PolicyJob("policies", world, name) for world in range(config.worlds) for name in ARMS]
        missing = [job for job in jobs if not (job.folder / "run.json").exists()]
        print(f"{len(jobs)} reward models, {len(jobs) - len(missing)} of them finished before")
        study.run_all(prepare_job, list({job.world: job for job in missing}.values()), config.workers, "worlds and generators")
        study.run_all(run_job, missing, config.workers, "reward models and policies")
        runs = [json.loads((job.folder / "run.json").read_text()) for job in jobs]
        text = "[\n" + ",\n".join(json.dumps(run) for run in runs) + "\n]\n"
        write_atomically(path, lambda temporary: temporary.write_text(text))
    print_tables(json.loads(path.read_text()))


if __name__ == "__main__":
    run_script(PoliciesConfig, main)
