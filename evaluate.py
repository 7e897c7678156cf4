"""How good is a reward model? Accuracy on pairs, and on the toy world the distance from the truth.

    python evaluate.py --checkpoint=out/toy-icrm-seed0          the splits of its own dataset
    python evaluate.py --checkpoint=CKPT --data=pairs.jsonl     a file of pairs, or a benchmark's
    python evaluate.py --checkpoint=CKPT --steps=A --threshold_from=B   where is the first error?
    python evaluate.py --compare=out/toy-none-seed0,out/toy-icrm-seed0      runs side by side

A response's reward is read at its end-of-text token. Accuracy is strict: a tie is wrong. Intervals
are Wilson's, with the number of independent prompts in place of the number of pairs.
"""
import itertools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from config import UserError, pick_device, run_script
import numpy as np
import torch

from benchmarks import (best_threshold, compare_with_truth, first_error_scores, print_benchmarks,
                        print_lines, reliability, rewardbench_sections, rm_bench, share_right,
                        text_of)
from data import tokenizer as tokenizers
from data.dataset import chunks, open_dataset
from data.files import fingerprint, load_checkpoint, read_json, write_json
from data.jsonl import read_pair_rows, read_step_rows
from data.rows import Row, row_by_row
from model import ModelConfig, RewardModel
from regularizer import read_out

AT_ONCE = 8     # responses in one row: attention over a row costs its length squared

@dataclass(frozen=True)
class EvalConfig:
    checkpoint: str = ""        # a reward model: its ckpt.pt, or the folder that holds it
    data: str = ""              # a JSONL file of pairs; empty: the splits of the model's dataset
    steps: str = ""             # a JSONL file of steps: where is the first wrong one?
    threshold_from: str = ""    # another file of steps, on which the threshold is chosen
    compare: str = ""           # evaluated runs to show side by side: DIR,DIR,...
    json: str = ""              # write the results here, with --data every pair's rewards too
    as_dialogue: bool = False   # write plain prompts as one Human turn
    skip_bad: bool = False      # go on where much of a file is left out
    device: str = "auto"        # auto, cpu, cuda, cuda:N


def load_reward_model(path, device):
    """A checkpoint -> (RewardModel in eval mode, its tokenizer, the checkpoint's dictionary).
    device: as in the settings."""
    if not path:
        raise UserError("name a reward model with --checkpoint=FOLDER")
    checkpoint = load_checkpoint(path, "reward model")
    sizes = ModelConfig(**checkpoint["model_config"])
    model = RewardModel(sizes, checkpoint["settings"]["readout"])
    model.load_state_dict(checkpoint["model"])
    model = model.to(pick_device(device)).eval()
    return model, tokenizers.from_dict(checkpoint["tokenizer"]), checkpoint


@torch.no_grad()
def score(model, rows, name="row {}".format):
    """Rewards of every response prefix: for each Row a list of float32 arrays, one per response;
    the last entry is the response's reward. One that is not finite is a UserError with the row's
    name (of its number from 1)."""
    device = model.score.weight.device

    def rewards_of(batch):
        batch = batch.to(device)
        scores = model.scores(model.model.read(batch), batch)           # (R, T)
        rewards = read_out(scores, batch.mask, model.readout).cpu().numpy()
        return [r[:length] for r, length in zip(rewards, batch.lengths.tolist())]

    found = row_by_row(rows, rewards_of)
    for i, parts in enumerate(found):
        if not all(np.isfinite(r).all() for r in parts):
            raise UserError(f"a reward of {name(i + 1)} is not finite")
    return found


def prefix_rewards(model, rows):
    """Rewards of every prefix of every response, equal ones read once: a list for each Row."""
    parts = [(i, some) for i, row in enumerate(rows)
             for some in chunks({r.tobytes(): r for r in row.responses}.values(), AT_ONCE)]
    found = score(model, [Row(rows[i].prompt, tuple(some)) for i, some in parts])
    known = {(i, response.tobytes()): r for (i, some), several in zip(parts, found)
             for response, r in zip(some, several)}
    return [[known[i, response.tobytes()] for response in row.responses]
            for i, row in enumerate(rows)]


def final_rewards(model, rows):
    """The reward of every response: an array for each Row."""
    return [np.array([r[-1] for r in some]) for some in prefix_rewards(model, rows)]


def check_fit(what, its_tokenizer, tokenizer, model=None, generator=None):
    """A UserError unless `what` has a reward model's vocabulary, and a generator's context."""
    if its_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"the {what} and the reward model read different vocabularies")
    if generator and model.model.config.block_size < generator.model.config.block_size:
        raise UserError(f"the {what} reads fewer tokens than the generator writes")


# Accuracy ----------------------------------------------------------------------------------------

def evaluate_pairs(rows, rewards, prompts=()):
    """Rows of two responses and their rewards (score's) -> metrics. prompts: theirs, uncut."""
    chosen, rejected = np.array([[a[-1], b[-1]] for a, b in rewards]).T
    prompts = prompts or [row.prompt.tobytes() for row in rows]
    whole = {(prompt, *(part.tobytes() for part in row.responses))
             for prompt, row in zip(prompts, rows)}
    longer = np.mean([len(a) > len(b) for a, b in (row.responses for row in rows)])
    return share_right(chosen > rejected, chosen == rejected, prompts) | {
        "duplicates": len(rows) - len(whole), "longer_accuracy": float(longer),
        "margin": float(np.mean(chosen - rejected)), "reliability": reliability(chosen - rejected)}


def evaluate_labels(rows, rewards):
    """Rows of one labelled response on its label's side -> metrics. Right is r > 0 where the label
    is correct, r < 0 where it is not; auc: the probability that a correct response has the higher
    reward of two (ties count half)."""
    final = np.array([max(parts, key=len)[-1] for parts in rewards])
    label = np.array([len(row.responses[0]) > 0 for row in rows])
    signed = np.where(label, final, -final)
    results = share_right(signed > 0, signed == 0, [row.prompt.tobytes() for row in rows])
    correct, incorrect = final[label], np.sort(final[~label])
    if len(correct) and len(incorrect):
        sides = (np.searchsorted(incorrect, correct, side) for side in ("left", "right"))
        results["auc"] = float(sum(below.mean() for below in sides) / 2 / len(incorrect))
    return results | {"correct": len(correct)}


def contrasts(rows, rewards):
    """Labelled responses -> every correct one of a prompt against every incorrect one of it: a list
    of (Row of two, their rewards)."""
    sides, pairs = defaultdict(lambda: ([], [])), []
    for row, parts in zip(rows, rewards):
        side = int(len(row.responses[0]) == 0)
        sides[row.prompt.tobytes()][side].append((row, row.responses[side], parts[side]))
    for correct, incorrect in sides.values():
        pairs += [(Row(row.prompt, (a, b)), [ra, rb])
                  for row, a, ra in correct for _, b, rb in incorrect if not np.array_equal(a, b)]
    return pairs


# Datasets ----------------------------------------------------------------------------------------

def evaluate_split(model, dataset, name):
    """One split of a Dataset -> {split (of labels also `split pairs`): metrics}."""
    split = dataset.split(name)
    rows = list(split)
    rewards = score(model, rows)
    if dataset.kind == "labels":
        found, pairs = {name: evaluate_labels(rows, rewards)}, contrasts(rows, rewards)
        return found | ({f"{name} pairs": evaluate_pairs(*zip(*pairs))} if pairs else {})
    results = evaluate_pairs(rows, rewards)
    if dataset.kind == "toy":
        arrays = [dataset.array(name, what) for what in ("exact-value", "kind")]
        truth = ([part for i in range(len(split)) for part in split.of_responses(array, i)]
                 for array in arrays)
        results |= compare_with_truth([r for parts in rewards for r in parts], *truth)
    return {name: results}


def evaluate_run(model, dataset, settings, known=None):
    """Every split but the training one, as a table; known: found before. -> what eval.json holds"""
    found = dict(known or {})
    for name in dataset.about["splits"]:
        if name != "train" and name not in found:
            found |= evaluate_split(model, dataset, name)
    print_table(found)
    return {"settings": settings, "splits": found, "data": fingerprint(dataset.about["digests"])}


# Files -------------------------------------------------------------------------------------------

def evaluate_file(model, tokenizer, config):
    """A file of pairs -> metrics, those of its subsets, and every pair's rewards."""
    pairs, rows, left_out = read_pair_rows(config.data, tokenizer, model.model.config.block_size,
                                           config.as_dialogue, config.skip_bad)
    rewards = score(model, rows, lambda i: f"pair {pairs[i - 1].id or i}")
    results = evaluate_pairs(rows, rewards, [p.prompt for p in pairs]) | {"left_out": left_out}
    subsets, cells = defaultdict(list), defaultdict(lambda: defaultdict(list))
    for pair, row, (a, b) in zip(pairs, rows, rewards):
        name = pair.subset or "(none)"
        subsets[name].append((row, (a, b), pair.prompt))
        if pair.cell:
            cells[name][pair.cell].append(a[-1] > b[-1])
    if set(subsets) != {"(none)"}:
        results["subsets"] = {name: evaluate_pairs(*zip(*some))
                              for name, some in sorted(subsets.items())}
        found = {name: part["accuracy"] for name, part in results["subsets"].items()}
        sections = rewardbench_sections(found)
        results |= {"rewardbench": sections} if sections["sections"] else {}
    for name, wins in sorted(cells.items()):
        try:
            results.setdefault("rm_bench", {})[name] = rm_bench(wins)
        except ValueError as error:     # every pair of a cell was left out
            print(f"no RM-Bench scores of {name}: {error}")
    results["pairs"] = [{"id": pair.id, "subset": pair.subset, "cell": list(pair.cell),
                         "chosen": float(a[-1]), "rejected": float(b[-1])}
                        for pair, (a, b) in zip(pairs, rewards)]
    return results


def evaluate_steps(model, tokenizer, config):
    """First-error localisation on config.steps, the threshold chosen on config.threshold_from."""
    if Path(config.threshold_from or config.steps).resolve() == Path(config.steps).resolve():
        raise UserError("choose the threshold on another file of steps: --threshold_from=FILE")

    def step_rewards(path):
        items, rows, ends = read_step_rows(path, tokenizer, model.model.config.block_size,
                                           config.as_dialogue, config.skip_bad)
        rewards = score(model, rows, lambda i: f"solution {i} of {path}")
        return items, [r[at] for (r,), at in zip(rewards, ends)]
    tuning, rewards = step_rewards(config.threshold_from)
    errors = [item.first_error for item in tuning]
    if min(errors) >= 0 or max(errors) < 0:
        raise UserError(f"{config.threshold_from}: no threshold, solutions are all of one kind")
    threshold = best_threshold(rewards, errors)
    items, rewards = step_rewards(config.steps)
    results = {}
    for name in ("(all)", *sorted({item.subset for item in items} - {""})):
        some = [(r, item.first_error) for r, item in zip(rewards, items)
                if name in ("(all)", item.subset)]
        results[name] = first_error_scores(*zip(*some), threshold)
    keys = ("f1", "error_accuracy", "correct_accuracy", "wrong", "right")
    print_lines([["subset", *keys]] + [[name, *(text_of(part[key]) for key in keys)]
                                       for name, part in results.items()])
    print(f"threshold {threshold:.4f}, chosen on {config.threshold_from}")
    return results


# Tables ------------------------------------------------------------------------------------------

COLUMNS = {"accuracy": "accuracy", "interval": "95% interval", "ties": "ties", "n": "n",
           "longer_accuracy": "by length", "oracle": "oracle", "auc": "AUC",
           "correlation": "corr(z,V)", "calibration_error": "calib.", "credit_leak": "leak"}


def table_lines(results):
    """{split or subset: metrics} as the lines of one table, its head first."""
    cells = {name: part | {"interval": f"{part['low']:.3f}-{part['high']:.3f}"}
             for name, part in results.items()}
    used = [key for key in COLUMNS if any(key in part for part in cells.values())]
    return [["split", *(COLUMNS[key] for key in used)]] + [
        [name, *(text_of(part.get(key)) for key in used)] for name, part in cells.items()]


def print_table(results):
    """{split or subset: metrics} as one table."""
    print_lines(table_lines(results))
    for name, part in results.items():
        if part.get("duplicates"):
            print(f"{name}: {part['duplicates']} pairs stand there once more")


def compare_runs(folders):
    """Print runs, one column each, differences to the first in brackets; -> {folder: eval.json}."""
    runs = {one: read_json(Path(one) / "eval.json", "train.py [--resume=True]") for one in folders}
    for folder, run in runs.items():
        if "splits" not in run:
            raise UserError(f"{folder}/eval.json is of a file, not of the run's own splits")
    datasets = sorted({f"{run['settings']['dataset']} ({str(run.get('data'))[:8]})"
                       for run in runs.values()})
    if len(datasets) > 1:
        raise UserError(f"runs on different datasets are not compared: {', '.join(datasets)}")
    lines = [["", *(Path(folder).name for folder in runs)]]
    names = dict.fromkeys(split for run in runs.values() for split in run["splits"])
    for split, key in itertools.product(names, ("accuracy", "auc", "correlation", "credit_leak")):
        values = [run["splits"].get(split, {}).get(key) for run in runs.values()]
        if None not in values:
            differences = (f"{value:.3f} ({value - values[0]:+.3f})" for value in values[1:])
            lines.append([f"{split} {COLUMNS[key]}", text_of(values[0]), *differences])
    print_lines(lines)
    print("in brackets: less the first run. One draw each, and draws differ more than methods do")
    return runs


def main(config):
    if config.compare:
        results = compare_runs([name for name in config.compare.split(",") if name])
    else:
        if config.data and config.steps or config.threshold_from and not config.steps:
            raise UserError("one thing at a time: --data=FILE, or --steps=A --threshold_from=B")
        model, tokenizer, checkpoint = load_reward_model(config.checkpoint, config.device)
        if config.data:
            results = evaluate_file(model, tokenizer, config)
            print_table({"(all)": results, **results.get("subsets", {})})
            print_benchmarks(results)
        elif config.steps:
            results = evaluate_steps(model, tokenizer, config)
        else:
            dataset = open_dataset(checkpoint["settings"]["dataset"], checkpoint["inputs"]["data"])
            results = evaluate_run(model, dataset, checkpoint["settings"])
    if config.json:
        write_json(config.json, results)


if __name__ == "__main__":
    run_script(EvalConfig, main)
