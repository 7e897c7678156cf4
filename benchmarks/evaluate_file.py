"""Evaluate a file of pairs: accuracy, subsets, RewardBench and RM-Bench scores."""

import textwrap
from collections import defaultdict

import numpy as np

from benchmarks.rewardbench import rewardbench_sections
from benchmarks.rm_bench import rm_bench
from data.formats import print_prompt_hint, read_pairs
from evaluate import evaluate_pairs, print_table, score


def evaluate_file(model, tokenizer, config, trained_on_chat):
    """Evaluate and print. Returns the metrics and every pair's rewards."""
    items, examples, n_skipped = read_pairs(
        config.data,
        tokenizer,
        model.config.block_size,
        config.wrap_as_chat,
        config.max_bad_fraction,
    )
    print_prompt_hint(config.data, items, tokenizer, trained_on_chat)
    rewards = score(model, examples, lambda i: f"pair {items[i - 1].id or i}")
    prompts = [item.prompt for item in items]
    results = evaluate_pairs(examples, rewards, prompts)
    results["skipped"] = n_skipped
    by_subset, wins = group_by_subset(items, examples, rewards)
    if set(by_subset) != {"(none)"}:
        results["subsets"] = {}
        for name in sorted(by_subset):
            results["subsets"][name] = evaluate_pairs(*by_subset[name])
        accuracies = {}
        for name, metrics in results["subsets"].items():
            accuracies[name] = metrics["accuracy"]
        sections = rewardbench_sections(accuracies)
        if sections["sections"]:
            results["rewardbench"] = sections
    for name in sorted(wins):
        try:
            results.setdefault("rm_bench", {})[name] = rm_bench(wins[name])
        except ValueError as error:  # all pairs of two styles were skipped
            print(f"no RM-Bench scores for {name}: {error}")
    results["pairs"] = []
    for item, (chosen, rejected) in zip(items, rewards):
        pair = {"id": item.id, "subset": item.subset, "cell": list(item.cell)}
        pair["chosen"], pair["rejected"] = float(chosen[-1]), float(rejected[-1])
        results["pairs"].append(pair)
    print_results(results)
    return results


def group_by_subset(items, examples, rewards):
    """The arguments of evaluate_pairs, and RM-Bench's wins, of every subset.

    item.cell holds the styles of an RM-Bench pair (chosen, rejected). It is empty in
    other pairs.
    """
    by_subset = defaultdict(lambda: ([], [], []))
    wins = defaultdict(lambda: defaultdict(list))
    for item, example, (chosen, rejected) in zip(items, examples, rewards):
        name = item.subset or "(none)"
        subset_examples, subset_rewards, prompts = by_subset[name]
        subset_examples.append(example)
        subset_rewards.append((chosen, rejected))
        prompts.append(item.prompt)
        if item.cell:
            wins[name][item.cell].append(chosen[-1] > rejected[-1])
    return by_subset, wins


def print_results(results):
    print_table({"(all)": results, **results.get("subsets", {})})
    if "rewardbench" in results:
        scores = {**results["rewardbench"]["sections"]}
        scores["overall"] = results["rewardbench"]["overall"]
        parts = [f"{name} {value:.3f}" for name, value in scores.items()]
        print("RewardBench:", ", ".join(parts))
        for key, label in (
            ("missing", "subsets without pairs"),
            ("unknown", "subsets of no section"),
        ):
            names = results["rewardbench"][key]
            if names:
                text = f"{label}: {', '.join(names)}"
                print(textwrap.fill(text, break_on_hyphens=False))
    for name, scores in results.get("rm_bench", {}).items():
        parts = [
            f"{key} {scores[key]:.3f}" for key in ("easy", "normal", "hard", "mean")
        ]
        print(f"RM-Bench {name}: {', '.join(parts)}")
        print("accuracy by chosen style (row) and rejected style (column):")
        print(np.round(scores["matrix"], 3))
    error = results["reliability"]["ece"]
    print(f"calibration error of sigma(|margin|): {error:.3f}")
