"""The study on the toy world: regularizers, prefix rewards and sources of p.

    python lab/study.py --results=out/study.jsonl    run what is missing there
    python lab/study.py --tables=True                print the tables of stored runs

A seed is a new dataset, generator, training run and set of candidates. All arms use
the same seeds, and differences are paired by seed. An arm is trained by `python
train.py` with the defaults of all other settings. A finished run is one line of the
results and is not repeated. lab/study.jsonl holds runs of versions 2 and 3.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_range, lock, read_json, run_script
import numpy as np

from bon import (
    BonConfig,
    best_of_n,
    best_of_n_at_budget,
    candidate_rewards,
    exact_values,
    halve,
    sample_candidates,
)
from data.dataset import dataset_folder, open_dataset
from data.toy import World
from evaluate import load_reward_model, score
from generator import load_generator
from lab.intervals import mean_and_half_width, sign_flip_p
from lab.runs import (
    VERSION,
    check_version,
    markdown_table,
    read_records,
    run_command,
    run_jobs,
)

SEEDS = range(300, 320)  # settings were chosen on seeds 100 to 102
FEW_SEEDS = range(320, 325)
POLICY_SEEDS = range(300, 310)
TUNING_SEEDS = range(500, 508)
MAIN_SEEDS = range(600, 620)
CANDIDATES = BonConfig(prompts=60, samples=64, max_new_tokens=100, device="cpu")
HALVING_LENGTHS = {  # percent of all tokens -> lengths at which half is dropped
    "25": (6, 11, 16),
    "38": (12, 20, 28),
    "50": (19, 30, 41),
}
USES_P = ("icrm", "icrm_gap_bound", "reward_smoothness")


@dataclass(frozen=True)
class StudyConfig:
    results: str = "lab/study.jsonl"  # one line per finished run
    tables: bool = False  # print the tables of the results, and run nothing
    worlds: str = ""  # run the worlds whose names start so. empty: all
    workers: int = 2  # seeds at a time, one thread each


# What is run --------------------------------------------------------------------------


class Arm(NamedTuple):
    """One way to train a reward model, or a reference that ranks the candidates."""

    regularizer: str = "none"
    prefix_reward: str = "last"
    p_source: str = "generator"
    steps: int = 0  # 0: those of the condition, likewise for the next two
    learning_rate: float = 0.0
    reg_weight: float = 0.0


NONE, ICRM, ICRM_SUM = Arm("none"), Arm("icrm"), Arm("icrm", "sum")
NONE_MEAN, NONE_SUM = Arm("none", "mean"), Arm("none", "sum")
EXACT_VALUE, RANDOM = Arm("exact value", "", ""), Arm("random candidate", "", "")
REFERENCES = [EXACT_VALUE, RANDOM]
REGULARIZERS = ("icrm", "dense_bt", "icrm_gap_bound", "reward_smoothness", "td_lambda")
LAST = [Arm(name) for name in REGULARIZERS]
MEAN = [Arm(name, "mean") for name in REGULARIZERS]
SUM = [Arm(name, "sum") for name in REGULARIZERS]
FACTORIAL = [NONE, NONE_MEAN, NONE_SUM, *LAST, *MEAN, *SUM]
OTHER_P = ("uniform", "shuffled", "exact")
ICRM_P = [Arm("icrm", "last", p) for p in OTHER_P]
P_SOURCE_ARMS = [NONE]
for name in USES_P:
    P_SOURCE_ARMS += [Arm(name), *(Arm(name, "last", p) for p in OTHER_P)]
POLICIES = [NONE, ICRM, NONE_SUM, ICRM_SUM]
REGIME_ARMS = [NONE, ICRM, NONE_SUM, *REFERENCES]
SUMMARY = [NONE, *LAST, Arm("icrm", "last", "uniform"), NONE_MEAN, NONE_SUM, ICRM_SUM]


class Condition(NamedTuple):
    """A toy world, its generator, and the training of its arms.

    data: settings of data/toy.py. Labels are right unless it says otherwise
    has_search: whether the arms also select among sampled candidates
    """

    data: dict = {}
    generator: dict = {}
    arms: list = REGIME_ARMS
    seeds: range = FEW_SEEDS
    train: dict = {"steps": 80, "learning_rate": 2e-3}
    has_search: bool = True
    measures_fit: bool = False  # of the wrong training labels


# Records hold these names. "sum" and "veto" are reward rules of the world, and have
# nothing to do with the prefix reward `sum`. "default" is "sum" with few seeds.
WORLDS = {
    "sum": Condition(arms=[*REFERENCES, *FACTORIAL, *P_SOURCE_ARMS], seeds=SEEDS),
    "veto": Condition({"reward_rule": "veto"}, {}, [*REFERENCES, *FACTORIAL], SEEDS),
    "default": Condition(),
    "125 pairs": Condition({"train": 125}),
    "2,000 pairs": Condition({"train": 2000}),
    "144 fillers": Condition({"fillers": 144}),
    "20% wrong labels": Condition({"label_noise": 0.2}),
    "late evidence": Condition({"filler_clauses_first": 3}),
    "one layer": Condition(generator={"n_layer": 1}),
    "width 128": Condition(generator={"n_embd": 128}),
    "poor generator": Condition(generator={"steps": 100}),
}
P_ONE, P_INVERSE = Arm("icrm", "last", "uniform"), Arm("icrm", "last", "inverse")
SQUARE = [NONE, Arm("response_mae"), Arm("dense_bt"), Arm("dense_mae")]
MAIN = [*SQUARE, ICRM, P_ONE, P_INVERSE, Arm("icrm_gap_bound"), NONE_SUM, ICRM_SUM]
WORLDS["20% wrong, 500 pairs"] = Condition(
    {"label_noise": 0.2},
    arms=[*MAIN, *REFERENCES],
    seeds=MAIN_SEEDS,
    train={},
    measures_fit=True,
)
TUNING = []
for regularizer in ("none", "icrm"):
    for learning_rate in (2e-3, 4e-3, 8e-3):
        for steps in (20, 40, 80):
            arm = Arm(regularizer, steps=steps, learning_rate=learning_rate)
            TUNING.append(arm)
    for steps in (30, 60):
        TUNING.append(Arm(regularizer, steps=steps, learning_rate=2e-3))
for reg_weight in (0.25, 0.75):
    arm = Arm("icrm", steps=40, learning_rate=2e-3, reg_weight=reg_weight)
    TUNING.append(arm)
WORLDS["tuning"] = Condition(
    {"label_noise": 0.2}, arms=TUNING, seeds=TUNING_SEEDS, train={}, has_search=False
)
REGIME_WORLDS = [world for world in WORLDS if WORLDS[world].arms is REGIME_ARMS]


# Runs ---------------------------------------------------------------------------------


def measure_search(rewards, qualities):
    """True quality of the response that each strategy selects, mean over prompts.

    rewards: for each prompt, the prefix rewards of every candidate
    qualities: for each prompt, the true quality of every candidate
    halving_gain: quality by halving (38% of the tokens) minus quality by best-of-64
    tokens_38: share of all tokens that this halving generates
    """
    values = defaultdict(list)
    for candidates, quality in zip(rewards, qualities):
        final = [prefix_rewards[-1] for prefix_rewards in candidates]
        for n in (16, 64):
            selected = best_of_n(final, quality, min(n, len(final)))
            values[f"best_of_{n}"].append(selected)
        n_tokens = sum(len(prefix_rewards) for prefix_rewards in candidates)
        for percent, lengths in HALVING_LENGTHS.items():
            winner, n_generated = halve(candidates, lengths)
            values[f"halving_{percent}"].append(quality[winner])
            values[f"tokens_{percent}"].append(n_generated / n_tokens)
        at_budget = best_of_n_at_budget(final, quality, values["tokens_38"][-1])
        values["best_of_n_38"].append(at_budget)
        gain = values["halving_38"][-1] - values["best_of_64"][-1]
        values["halving_gain"].append(gain)
    return {name: float(np.mean(array)) for name, array in values.items()}


def share_of_wrong_labels_fitted(model, dataset):
    """The share of training pairs with a wrong label that the model ranks like it."""
    world, fitted = World(**dataset.metadata["world"]), []
    examples = list(dataset.split("train"))
    for example, (chosen, rejected) in zip(examples, score(model, examples)):
        texts = map(dataset.tokenizer.decode, example.responses)
        chosen_quality, rejected_quality = map(world.true_quality, texts)
        if chosen_quality < rejected_quality:
            fitted.append(chosen[-1] > rejected[-1])
    return float(np.mean(fitted))


def measure_arm(world, arm, seed, settings, dataset, examples, qualities):
    """Train an arm and measure it. Its checkpoint is deleted afterwards.

    settings: of train.py: the dataset, the generator, steps and learning rate
    """
    folder = Path(settings["generator"]).parent / "-".join(map(str, arm))
    changed = {name: value for name, value in arm._asdict().items() if value}
    settings = {**settings, **changed, "seed": seed}
    settings["eval_interval"] = 10**6  # evaluate at the end only
    run_command("train.py", out_dir=folder, **settings)
    splits = read_json(folder / "eval.json", "lab/study.py")["splits"]
    metrics = {}
    for split in ("val", "decoupled", "swapped", "longer"):
        metrics[split] = splits[split]["accuracy"]
    metrics["correlation"] = splits["val"]["correlation"]
    metrics["calibration"] = splits["val"]["calibration_error"]
    metrics["remark_change"] = splits["val"]["remark_change"]
    model, _, _ = load_reward_model(folder, "cpu")
    if WORLDS[world].measures_fit:
        metrics["wrong_fitted"] = share_of_wrong_labels_fitted(model, dataset)
    if examples:
        metrics.update(measure_search(candidate_rewards(model, examples), qualities))
    if world == "sum" and arm in POLICIES and seed in POLICY_SEEDS:
        for pairs, pairs_split in (("sampled", ""), ("swapped", "swapped")):
            out_dir = folder / f"policy-{pairs}"
            settings = {"pairs_split": pairs_split, "seed": seed, "out_dir": out_dir}
            run_command("dpo.py", checkpoint=folder, **settings)
            policy = read_json(out_dir / "results.json", "lab/study.py")["policy"]
            metrics[f"policy_quality_{pairs}"] = policy["gold"]
            metrics[f"policy_kl_{pairs}"] = policy["kl"]
            (out_dir / "ckpt.pt").unlink()
    (folder / "ckpt.pt").unlink()
    return metrics


def run_seed(world, seed, arms):
    """Run these arms with one seed, and yield a record of each."""
    condition = WORLDS[world]
    name = f"study-{world}-{seed}".replace(" ", "-").replace(",", "")
    generator_folder = Path("out/study") / name / "generator"
    settings = {"dataset": name, "generator": generator_folder, **condition.train}
    data = {"label_noise": 0.0, **condition.data}
    run_command("data/toy.py", name=name, seed=seed, **data)
    run_command(
        "generator.py",
        dataset=name,
        out_dir=generator_folder,
        seed=seed,
        **condition.generator,
    )
    dataset, examples, qualities = open_dataset(name), [], []
    if condition.has_search:
        generator, tokenizer = load_generator(generator_folder, "cpu")
        examples = sample_candidates(generator, dataset, CANDIDATES)
    toy_world = World(**dataset.metadata["world"])
    for example in examples:
        texts = map(tokenizer.decode, example.responses)
        qualities.append([float(toy_world.true_quality(text)) for text in texts])
    for arm in arms:
        if arm == EXACT_VALUE:
            metrics = measure_search(exact_values(dataset, examples), qualities)
        elif arm == RANDOM:
            mean = float(np.mean([np.mean(quality) for quality in qualities]))
            metrics = dict.fromkeys(SELECTED, mean)
        else:
            metrics = measure_arm(
                world, arm, seed, settings, dataset, examples, qualities
            )
        record = {"version": VERSION, "world": world, "seed": seed, **arm._asdict()}
        for key, value in metrics.items():
            record[key] = round(value, 4)
        yield record
    for path in dataset_folder(name).glob("*.npy"):
        path.unlink()


def find_jobs(records, prefix=""):
    """[(world, seed, arms without a record), ...] of worlds that start with prefix."""
    results, jobs = index_records(records), []
    for world, condition in WORLDS.items():
        if not world.startswith(prefix):
            continue
        for seed in condition.seeds:
            missing = []
            for arm in dict.fromkeys(condition.arms):
                if seed not in results[world, arm]:
                    missing.append(arm)
            if missing:
                jobs.append((world, seed, missing))
    return jobs


# Tables -------------------------------------------------------------------------------

INTRODUCTION = """A cell is the mean over seeds. In parentheses is its difference from
the table's first row of the same world, over the seeds that both have, with the
half-width of its 95% interval. Differences are paired by seed. A bold one is
significant in an exact sign-flip test, after Bonferroni correction over all
{comparisons} differences of these tables. The column p is empty for regularizers that
ignore p. The worlds `sum` and `default` are both the toy world with right labels, with
different seeds. Worlds of version 3 of the project: {current}. All others are of
version 2 (commit ff3cabb), with 80 steps.
"""
COLUMNS = {  # key of a record -> column, explanation
    "val": ("val", "accuracy on val, which has the training distribution"),
    "decoupled": ("decoupled", "accuracy where remarks do not depend on the evidence"),
    "swapped": ("swapped", "accuracy where remarks come from the opposite evidence"),
    "longer": ("longer", "accuracy where responses have more clauses"),
    "wrong_fitted": (
        "wrong labels fitted",
        "share of the wrong training labels that the reward model agrees with",
    ),
    "correlation": ("correlation", "of predicted and exact value V, prefixes of val"),
    "calibration": (
        "calibration",
        "mean gap between predicted value and C, what the labels imply "
        "(version 2: V), in ten bins of predicted value",
    ),
    "remark_change": (
        "remarks / evidence",
        "mean absolute reward change at remarks, divided by that at evidence",
    ),
    "best_of_16": ("best of 16", "true quality of the selected response, best-of-16"),
    "best_of_64": ("best of 64", "the same, best of all 64 candidates"),
    "best_of_n_38": (
        "best-of-n, 38%",
        "best-of-n with the token budget of halving, 38%",
    ),
    "halving_25": (
        "halving, 25%",
        "successive halving that generates about 26% of all tokens",
    ),
    "halving_38": (
        "halving, 38%",
        "the same with 38% (late evidence: 46%)",
    ),
    "halving_50": (
        "halving, 50%",
        "the same with 51% (late evidence: 63%)",
    ),
    "halving_gain": (
        "halving 38% - best of 64",
        "difference of the two columns of that name",
    ),
    "policy_quality_sampled": (
        "quality, sampled",
        "true quality of a DPO policy's responses, from pairs of sampled responses",
    ),
    "policy_kl_sampled": ("KL, sampled", "its KL divergence from the generator"),
    "policy_quality_swapped": ("quality, swapped", "the same, from pairs of swapped"),
    "policy_kl_swapped": ("KL, swapped", "its KL divergence from the generator"),
}
ACCURACY = ["val", "decoupled", "swapped", "longer"]
ACCURACY += ["correlation", "calibration", "remark_change"]
SELECTED = ["best_of_16", "best_of_64", "best_of_n_38"]
SELECTED += ["halving_25", "halving_38", "halving_50"]
BRIEF = ["val", "swapped", "correlation", "best_of_64", "halving_38"]
COMPARED = [*BRIEF, "remark_change"]
POLICY = ["policy_quality_sampled", "policy_kl_sampled"]
POLICY += ["policy_quality_swapped", "policy_kl_swapped"]


class Table(NamedTuple):
    """Differences are from the first arm."""

    title: str
    worlds: list
    arms: list
    columns: list


NOISY = "20% wrong, 500 pairs"
VERSUS_ICRM = [ICRM, P_ONE, P_INVERSE, Arm("dense_mae"), Arm("icrm_gap_bound")]
VERSUS_DENSE_BT = [Arm("dense_bt"), Arm("dense_mae"), ICRM]
NOISY_ACCURACY = [*ACCURACY, "wrong_fitted"]
NOISY_ALL = [*NOISY_ACCURACY, "best_of_64", "halving_38"]
NOISY_SUMMARY = ["val", "decoupled", "swapped", "correlation", "calibration"]
NOISY_SUMMARY += ["best_of_64", "halving_38"]
TABLES = [
    Table("Choice of steps and learning rate", ["tuning"], TUNING, ["val"]),
    Table("Noisy labels: summary", [NOISY], MAIN, NOISY_SUMMARY),
    Table("Noisy labels: accuracy", [NOISY], MAIN, NOISY_ACCURACY),
    Table("Noisy labels: search", [NOISY], [*MAIN, *REFERENCES], SELECTED),
    Table("Noisy labels: compared with icrm", [NOISY], VERSUS_ICRM, NOISY_ALL),
    Table("Noisy labels: compared with dense_bt", [NOISY], VERSUS_DENSE_BT, NOISY_ALL),
    Table("Summary", ["sum"], [*SUMMARY, *REFERENCES], BRIEF),
    Table("Regularizers and prefix rewards", ["sum"], FACTORIAL, ACCURACY),
    Table("Sources of p", ["sum"], P_SOURCE_ARMS, ACCURACY),
    Table("Search", ["sum"], [*FACTORIAL, *REFERENCES], [*SELECTED, "halving_gain"]),
    Table("Search by source of p", ["sum"], P_SOURCE_ARMS, SELECTED),
    Table("Compared with icrm", ["sum"], [*LAST, *ICRM_P, *REFERENCES], COMPARED),
    Table("Compared with the mean", ["sum"], [NONE_MEAN, *MEAN, *REFERENCES], COMPARED),
    Table("Compared with the sum", ["sum"], [NONE_SUM, *SUM, *REFERENCES], COMPARED),
    Table("Veto: accuracy", ["veto"], FACTORIAL, ACCURACY),
    Table("Veto: search", ["veto"], [*FACTORIAL, *REFERENCES], SELECTED),
    Table("Policies", ["sum"], POLICIES, POLICY),
    Table("Regimes", REGIME_WORLDS, REGIME_ARMS, BRIEF),
]


def count_comparisons():
    """The number of different comparisons in the tables (for Bonferroni)."""
    comparisons = set()
    for table in TABLES:
        if table.arms is TUNING:  # its table shows no differences
            continue
        for world in table.worlds:
            for arm in table.arms[1:]:
                for column in table.columns:
                    comparisons.add((world, arm, table.arms[0], column))
    return len(comparisons)


def index_records(records):
    """{(world, arm): {seed: record}}"""
    results = defaultdict(dict)
    for record in records:
        fields = {}
        for name, default in Arm._field_defaults.items():
            fields[name] = record.get(name, default)
        arm = Arm(**fields)
        results[record["world"], arm][record["seed"]] = record
    return results


def format_cell(results, world, arm, base, column):
    """The mean, and its difference from the base with half of its 95% interval.

    A difference is bold if it is significant after Bonferroni's correction.
    """
    values, base_values = results[world, arm], results[world, base]
    seeds = [seed for seed in values if column in values[seed]]
    if not seeds:
        return ""
    mean = f"{np.mean([values[seed][column] for seed in seeds]):.3f}"
    differences = []
    for seed in seeds:
        if column in base_values.get(seed, {}):
            differences.append(values[seed][column] - base_values[seed][column])
    if arm == base or len(differences) < 2:
        return mean
    difference, half_width = mean_and_half_width(differences)
    text = f"{difference:+.3f} ± {half_width:.3f}"
    if sign_flip_p(differences) * count_comparisons() < 0.05:
        text = f"**{text}**"
    return f"{mean} ({text})"


def format_table(results, table):
    """The lines of a table. Arms with fewer than len(FEW_SEEDS) seeds are left out."""
    header = ["world", "regularizer", "p", "prefix reward"]
    is_tuning = table.arms is TUNING
    if is_tuning:
        header += ["steps", "learning rate", "λ"]
    header += ["seeds"]
    header += [COLUMNS[column][0] for column in table.columns]
    rows = []
    for world in table.worlds:
        for arm in table.arms:
            n_seeds = 0
            for record in results[world, arm].values():
                n_seeds += any(column in record for column in table.columns)
            if n_seeds < len(FEW_SEEDS):
                continue
            p_source = arm.p_source if arm.regularizer in USES_P else ""
            row = [world, arm.regularizer, p_source, arm.prefix_reward]
            if is_tuning:
                row += [str(arm.steps), str(arm.learning_rate)]
                row += [str(arm.reg_weight or "") if arm.regularizer != "none" else ""]
            row += [str(n_seeds)]
            for column in table.columns:
                base = arm if is_tuning else table.arms[0]
                row.append(format_cell(results, world, arm, base, column))
            rows.append(row)
    return markdown_table(header, rows)


def format_tables(records):
    """All tables, as Markdown, with an explanation of the columns."""
    results = index_records(records)
    current = {record["world"] for record in records if record["version"] == VERSION}
    introduction = INTRODUCTION.format(
        comparisons=count_comparisons(), current=" and ".join(sorted(current)) or "none"
    )
    lines = ["## The study on the toy world", "", introduction]
    lines += markdown_table(["column", "meaning"], list(COLUMNS.values()))
    for table in TABLES:
        rows = format_table(results, table)
        if len(rows) > 2:
            lines += ["", f"### {table.title}", "", *rows]
    return "\n".join(lines)


def main(config):
    check_range(config, 1, 64, "workers")
    path = Path(config.results)
    if not config.tables:
        records = read_records(path)
        check_version(path, records)
        with lock("out/study"):
            run_jobs(run_seed, find_jobs(records, config.worlds), path, config.workers)
    print(format_tables(read_records(path)))


if __name__ == "__main__":
    run_script(StudyConfig, main)
