"""How good is a reward model? Accuracy on pairs, and on the toy world the distance from the truth.

    python evaluate.py --checkpoint=out/toy-icrm-seed0                      the dataset's own splits
    python evaluate.py --checkpoint=CKPT --data=pairs.jsonl --json=OUT.json any file of pairs; RewardBench and
                                                                            RM-Bench are known by their subsets
    python evaluate.py --checkpoint=CKPT --steps=test.jsonl --threshold_from=val.jsonl      the first wrong step
    python evaluate.py --compare=out/toy-none-seed0,out/toy-icrm-seed0      runs side by side
    python evaluate.py --compare=none.jsonl,icrm.jsonl                      two models on the same pairs (--examples)
    python evaluate.py --checkpoint=CKPT --export=FOLDER                    for transformers, TRL and RewardBench

A response's reward is read at its end-of-text token, in fp32 (with TF32 products on a GPU), in eval mode; it is a
function of the prompt and the response alone, whatever the batch. Accuracy is strict (a tie is wrong) and taken once over all pairs.
"""
import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import (best_threshold, first_error_scores, print_benchmarks, reliability, rewardbench_sections, rm_bench,
                        sigmoid, write_rewardbench)
from compare import compare_examples, compare_runs, print_lines
from config import UserError, fingerprint, in_range, load_checkpoint, run_script, show, write_atomically, write_json
from data import tokenizer as tokenizers
from data.batches import (PairData, fit_row, in_length_order, load_contrasts, load_pairs, load_responses, pack, pair_rows,
                          print_left_out)
from data.pairs import read_steps
from data.prepare import open_dataset
from data.toy.truth import compare_with_truth
from data.toy.world import World, split_worlds
from model import ModelConfig, RewardModel, pick_device
from pretrained import export_reward_model, import_reward_model, load_weights


@dataclass(frozen=True)
class EvalConfig:
    checkpoint: str = ""            # a reward model: its ckpt.pt, or the folder that holds it
    data: str = ""                  # a JSONL file of pairs; empty: the splits of the checkpoint's dataset
    steps: str = ""                 # a JSONL file of steps: where is the first wrong one?
    threshold_from: str = ""        # another file of steps, on which the threshold is chosen
    json: str = ""                  # write the results here
    examples: str = ""              # write every pair's rewards here, as JSONL (with --data)
    rewardbench: str = ""           # write RewardBench's own result files into this folder (with --data)
    export: str = ""                # write a folder here that transformers loads, and nothing else
    show: int = 0                   # print so many pairs, their tokens coloured by reward (with --data)
    compare: str = ""               # evaluated runs to show side by side: DIR,DIR,...; or files of --examples
    as_dialogue: bool = False       # write plain prompts as one Human turn
    batch_size: int = 64            # rows at a time; changes no result
    device: str = "auto"            # auto, cpu, cuda, cuda:N
    strict: bool = False            # stop at the first bad row


def load_reward_model(path, device):
    """A checkpoint or an exported folder -> (RewardModel in eval mode, its tokenizer, the checkpoint's dictionary)."""
    if not path:
        raise UserError("name a reward model with --checkpoint=FOLDER")
    if (Path(path) / "icrm.json").is_file():
        checkpoint = import_reward_model(path)
    else:
        checkpoint = load_checkpoint(path, "reward model")
    model = RewardModel(ModelConfig(**checkpoint["model_config"])).to(device)
    load_weights(model, checkpoint["model"], path)
    return model.eval(), tokenizers.from_dict(checkpoint["tokenizer"]), checkpoint


def check_fit(what, model, its_tokenizer, tokenizer, context=0):
    """A UserError unless a model beside the reward model reads its vocabulary, and rows of this many tokens."""
    if its_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"the {what} and the reward model read different vocabularies")
    if model.transformer.config.block_size < context:
        raise UserError(f"the {what} has a context of {model.transformer.config.block_size} tokens, the generator one of {context}")


@torch.no_grad()
def score(model, rows, device, batch_size=64, name="response {}".format):
    """Rewards of every response prefix: a list of float32 arrays (response tokens,), one per row.

    The last entry of each is the response's reward. Equal rows are read once. A reward that is not finite is a
    UserError with the row's name (of its number from 1).
    """
    training = model.training
    model.eval()
    index = {}
    for row in rows:
        index.setdefault((row.prompt.tobytes(), row.response.tobytes()), row)
    distinct = list(index.values())
    found = {}
    for indices in in_length_order(distinct, batch_size):
        rewards = model(pack([distinct[i] for i in indices], scored=0).to(device))[0].cpu().numpy()
        for i, row_rewards in zip(indices, rewards):
            row = distinct[i]
            found[row.prompt.tobytes(), row.response.tobytes()] = row_rewards[len(row.prompt):len(row)]
    model.train(training)
    rewards = [found[row.prompt.tobytes(), row.response.tobytes()] for row in rows]
    for i, r in enumerate(rewards):
        if not np.isfinite(r).all():
            raise UserError(f"a reward of {name(i + 1)} is not finite")
    return rewards


def example_name(pair):
    """A pair's id, or where it has none one made of its texts, the same whatever else is in the file."""
    return pair.id or fingerprint("\0".join((pair.prompt, pair.chosen, pair.rejected)).encode("utf-8", "replace").decode())[:12]


def values_against(rewards, opponent):
    """sigma(r - mean of the opposing response's r) of every prefix of one response: Eq. 4's z on a chosen response, and
    not turned round on a rejected one, so that it is comparable with a value.  (tokens,), (its tokens,) -> (tokens,)"""
    return sigmoid(rewards - opponent.mean())


def model_name(path):
    """What to call a checkpoint: its folder, or its file where that is not ckpt.pt."""
    return Path(path).parent.name if Path(path).name == "ckpt.pt" else Path(path).name.removesuffix(".pt")


def wilson(successes, n, z=1.96):
    """Wilson's 95% interval of a proportion."""
    centre, half = successes + z * z / 2, z * math.sqrt(successes * (n - successes) / n + z * z / 4)
    return (centre - half) / (n + z * z), (centre + half) / (n + z * z)


def pair_accuracy(chosen, rejected):
    """Final rewards of chosen and rejected responses -> accuracy (strict >), its interval, ties and n."""
    chosen, rejected = np.asarray(chosen), np.asarray(rejected)
    right, n = int((chosen > rejected).sum()), len(chosen)
    low, high = wilson(right, n)
    return {"accuracy": right / n, "low": low, "high": high, "ties": int((chosen == rejected).sum()), "n": n}


def evaluate_pairs(model, data, device, batch_size=64):
    """PairData -> (metrics, rewards of every prefix of chosen then rejected rows)."""
    n = len(data.rows)
    rewards = score(model, pair_rows(data.rows), device, batch_size, lambda number: (
        f"pair {example_name(pair := data.pairs[(number - 1) % n])} (prompt {pair.prompt[:40]!r})"))
    final = np.array([r[-1] for r in rewards])
    chosen, rejected = final[:n], final[n:]
    results = pair_accuracy(chosen, rejected)
    lengths = np.array([[len(row.response) for row in pair] for pair in data.rows])
    results |= {"longer_accuracy": float((lengths[:, 0] > lengths[:, 1]).mean()), "skipped": data.skipped,
                "margin": float((chosen - rejected).mean()), "min_reward": float(final.min()),
                "mean_reward": float(final.mean()), "max_reward": float(final.max()),
                "truncated": sum(a.truncated or b.truncated for a, b in data.rows),
                "reliability": reliability(chosen - rejected)}
    subsets, cells = defaultdict(list), defaultdict(lambda: defaultdict(list))
    for i, pair in enumerate(data.pairs):
        subsets[pair.subset or "(none)"].append(i)
        if pair.cell:
            cells[pair.subset or "(none)"][pair.cell].append(chosen[i] > rejected[i])
    if set(subsets) != {"(none)"}:
        results["subsets"] = {name: pair_accuracy(chosen[i], rejected[i]) for name, i in sorted(subsets.items())}
        sections = rewardbench_sections({name: part["accuracy"] for name, part in results["subsets"].items()})
        results |= {"rewardbench": sections} if sections["sections"] else {}
    for name, wins in sorted(cells.items()):
        try:
            results.setdefault("rm_bench", {})[name] = rm_bench(wins)
        except ValueError as error:     # every pair of a cell was left out
            print(f"no RM-Bench scores of {name}: {error}")
    return results, rewards


def example_records(data, rewards):
    """Every pair's id, subset, rewards and lengths in tokens, in the file's order; what evaluate_pairs was given and gave."""
    n = len(data.rows)
    return [{"id": example_name(pair), "subset": pair.subset} | ({"cell": pair.cell} if pair.cell else {}) |
            {"chosen_reward": float(rewards[i][-1]), "rejected_reward": float(rewards[n + i][-1]),
             "prompt_tokens": len(chosen.prompt), "chosen_tokens": len(chosen.response),
             "rejected_tokens": len(rejected.response), "truncated": chosen.truncated or rejected.truncated}
            for i, (pair, (chosen, rejected)) in enumerate(zip(data.pairs, data.rows))]


def evaluate_labels(model, data, device, batch_size=64):
    """Responses with labels -> (metrics, rewards of every prefix). Accuracy is the share with r > 0 where the label
    is correct and r < 0 where it is not; auc the probability that a correct response has the higher reward of two
    (ties count half)."""
    rewards = score(model, data.rows, device, batch_size)
    final = np.array([r[-1] for r in rewards])
    correct, incorrect = final[:data.chosen], np.sort(final[data.chosen:])
    results = pair_accuracy(np.concatenate([correct, -incorrect]), np.zeros(len(final)))
    if len(correct) and len(incorrect):
        below = np.searchsorted(incorrect, correct, "left") + np.searchsorted(incorrect, correct, "right")
        results["auc"] = float(below.mean() / 2 / len(incorrect))
    return results | {"skipped": data.skipped, "correct": len(correct), "mean_reward": float(final.mean()),
                      "truncated": sum(row.truncated for row in data.rows)}, rewards


def step_rewards(model, path, tokenizer, device, config):
    """A file of steps -> (Steps that fit into the context, the reward after each step of each, what was left out).

    One forward pass per solution: a step's reward is the prefix's at the step's last token. Steps are joined by newlines.
    """
    items, bad = read_steps(path, config.strict, config.as_dialogue)
    block_size = model.transformer.config.block_size
    rows, ends, kept = [], [], []
    for item in items:
        parts = [tokenizer.encode(step + "\n") for step in item.steps[:-1]] + [tokenizer.encode(item.steps[-1])]
        response = [token for part in parts for token in part] + [tokenizer.end_of_text]
        row = fit_row(tokenizer.encode(item.prompt), response, block_size)
        if row is not None:
            kept.append(item), rows.append(row), ends.append(np.cumsum([len(part) for part in parts]) - 1)
    long = len(items) - len(kept)
    print_left_out(path, "solutions", len(kept), bad, long, sum(row.truncated for row in rows), block_size, config.strict)
    rewards = score(model, rows, device, config.batch_size, lambda i: f"solution {kept[i - 1].id or kept[i - 1].prompt[:40]!r}")
    return kept, [r[at] for r, at in zip(rewards, ends)], bad + long


def evaluate_steps(model, tokenizer, device, config):
    """First-error localisation on config.steps, with the threshold that is best on config.threshold_from."""
    if not config.threshold_from or Path(config.threshold_from).resolve() == Path(config.steps).resolve():
        raise UserError("name another file of steps, on which the threshold is chosen, with --threshold_from=FILE")
    tuning, tuning_rewards, _ = step_rewards(model, config.threshold_from, tokenizer, device, config)
    errors = [item.first_error for item in tuning]
    if min(errors) >= 0 or max(errors) < 0:
        raise UserError(f"{config.threshold_from}: a threshold is chosen on right and wrong solutions, and these are all of one kind")
    threshold = best_threshold(tuning_rewards, errors)
    items, rewards, left_out = step_rewards(model, config.steps, tokenizer, device, config)
    results = {"(all)": first_error_scores(rewards, [item.first_error for item in items], threshold)}
    for subset in sorted({item.subset for item in items} - {""}):
        part = [i for i, item in enumerate(items) if item.subset == subset]
        results[subset] = first_error_scores([rewards[i] for i in part], [items[i].first_error for i in part], threshold)
    keys = ("f1", "error_accuracy", "within_one", "correct_accuracy", "wrong", "right")
    print_lines([["subset", *keys]] + [[name] + ["" if part[key] is None else f"{part[key]:.3f}" if isinstance(part[key], float)
                                                 else str(part[key]) for key in keys] for name, part in results.items()])
    print(f"threshold {threshold:.4f}, chosen on {config.threshold_from}; left out: {left_out}")
    return results | {"left_out": left_out}


def evaluate_split(model, data, device, batch_size=64):
    """PairData or labelled Responses -> (metrics, rewards of every prefix)."""
    return (evaluate_pairs if isinstance(data, PairData) else evaluate_labels)(model, data, device, batch_size)


def load_splits(dataset, block_size, strict=False):
    """{split: PairData} for every split of a Dataset but `train`; labelled responses as such, and as pairs too."""
    if dataset.kind == "labels":
        pairs = load_contrasts(dataset, "val", block_size, strict)
        return {"val": load_responses(dataset, "val", block_size, strict)} | ({"val pairs": pairs} if pairs else {})
    return {split: load_pairs(dataset.path(split), dataset.tokenizer, block_size, strict)
            for split in (split_worlds(World()) if dataset.kind == "toy" else ["val"])}


def evaluate_splits(model, dataset, splits, device, batch_size=64):
    """What load_splits returned, or the training pairs as a PairData under `train` -> {split: metrics}."""
    results = {}
    for split, data in splits.items():
        results[split], rewards = evaluate_split(model, data, device, batch_size)
        if dataset.kind == "toy":
            world = World(**dataset.world)      # of the training pairs and of val
            world = split_worlds(world).get(split, world)
            results[split] |= compare_with_truth(world, pair_rows(data.rows), rewards, dataset.tokenizer)
    return results


# Tables ---------------------------------------------------------------------------------------------

COLUMNS = {"accuracy": "accuracy", "interval": "95% interval", "ties": "ties", "n": "n", "longer_accuracy": "by length", "auc": "AUC",
           "correlation": "corr(z,V)", "calibration_error": "calib.", "credit_leak": "leak"}


def print_table(results):
    """{split or subset: metrics} as one table."""
    rows = []
    for name, metrics in results.items():
        cells = dict(metrics, interval=f"{metrics['low']:.3f}-{metrics['high']:.3f}")
        rows.append([name] + [cells.get(key, "") for key in COLUMNS])
    used = [i for i in range(len(COLUMNS) + 1) if any(row[i] != "" for row in rows)]
    lines = [["split", *COLUMNS.values()]] + [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    print_lines([[line[i] for i in used] for line in lines])


SHADES = (33, 75, 117, 153, 231, 223, 216, 215, 208)    # blue to orange in the terminal's 256 colours


def show_pairs(data, rewards, tokenizer, count, coloured):
    """Print the first pairs, each token of a response on a colour for z = sigma(r - mean of the opposing response's r):
    blue below 1/2, orange above; plain text where not coloured."""
    n = len(data.rows)
    for i in range(min(count, n)):
        print(f"\npair {data.pairs[i].id or i + 1}: ...{data.pairs[i].prompt[-70:].strip()!r}")
        for name, row, mine, other in zip(("chosen", "rejected"), data.rows[i], (i, n + i), (n + i, i)):
            z = values_against(rewards[mine], rewards[other])
            shades = [SHADES[min(int(value * len(SHADES)), len(SHADES) - 1)] for value in z]
            text = [piece.replace("\033", "\ufffd") for piece in tokenizer.pieces(row.response[:-1])]
            if coloured:
                text = [f"\033[48;5;{shade};38;5;16m{piece}\033[0m" for piece, shade in zip(text, shades)]
            print(f"{name:8s} {rewards[mine][-1]:+.3f} {''.join(text)}")


def main(config):
    if config.compare:
        names = [name for name in config.compare.split(",") if name]
        runs = (compare_examples if names and all(name.endswith(".jsonl") for name in names) else compare_runs)(names)
        if config.json:
            write_json(config.json, runs)
        return
    show(config)
    in_range(config, 1, 10**9, "batch_size")
    in_range(config, 0, 10**9, "show")
    if not config.data and (config.examples or config.rewardbench or config.show):
        raise UserError("--examples, --rewardbench and --show are for a file of pairs; name it with --data=FILE")
    if config.data and config.steps or config.threshold_from and not config.steps:
        raise UserError("one thing at a time: --data=FILE, or --steps=FILE with --threshold_from=FILE")
    device = pick_device(config.device)
    model, tokenizer, checkpoint = load_reward_model(config.checkpoint, device)
    if config.export:
        export_reward_model(model, tokenizer, checkpoint, config.export)
        print(f"wrote {config.export}")
        return
    if config.data:
        data = load_pairs(config.data, tokenizer, model.transformer.config.block_size, config.strict, config.as_dialogue)
        results, rewards = evaluate_pairs(model, data, device, config.batch_size)
        records = example_records(data, rewards)
        print_table({"(all)": results, **results.get("subsets", {})})
        print_benchmarks(results)
        print(f"left out: {results['skipped']}   prompts cut at their start: {results['truncated']}")
        if config.examples:
            text = "".join(json.dumps(record) + "\n" for record in records)
            write_atomically(config.examples, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        if config.rewardbench:
            write_rewardbench(config.rewardbench, model_name(config.checkpoint), data, records, results)
        show_pairs(data, rewards, tokenizer, config.show, sys.stdout.isatty())
    elif config.steps:
        results = evaluate_steps(model, tokenizer, device, config)
    else:
        dataset = open_dataset(checkpoint["settings"]["dataset"])
        if dataset.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(f"{dataset.folder} was prepared again with another vocabulary than the checkpoint's")
        splits = load_splits(dataset, model.transformer.config.block_size, config.strict)
        splits = evaluate_splits(model, dataset, splits, device, config.batch_size)
        print_table(splits)
        results = {"splits": splits}
    if config.json:
        write_json(config.json, results)


if __name__ == "__main__":
    run_script(EvalConfig, main)
