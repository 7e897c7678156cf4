"""Metrics of responses that are labelled correct or incorrect one by one."""

from collections import defaultdict

import numpy as np

from data.batch import Example
from evaluate import accuracy_with_interval, evaluate_pairs


def evaluate_labels(name, examples, rewards):
    """Metrics of a split. Returns {name: ..., "name pairs": ...}.

    The second entry compares the correct and incorrect responses to the same prompt.
    """
    results = {name: label_metrics(examples, rewards)}
    pairs, pair_rewards = labels_to_pairs(examples, rewards)
    if pairs:
        results[f"{name} pairs"] = evaluate_pairs(pairs, pair_rewards)
    return results


def label_metrics(examples, rewards):
    """Examples with one labelled response -> metrics.

    An Example has two slots. A correct response is in the first, an incorrect one in
    the second. The other slot is empty.
    A correct response should have a reward above 0, an incorrect one below 0. auc:
    probability that a correct response has a higher reward than an incorrect one
    (ties count half).
    """
    is_correct = np.array([len(example.responses[0]) > 0 for example in examples])
    final = np.array([max(responses, key=len)[-1] for responses in rewards])
    signed = np.where(is_correct, final, -final)
    prompts = [example.prompt.tobytes() for example in examples]
    metrics = accuracy_with_interval(signed > 0, signed == 0, prompts)
    metrics["n_correct"] = int(is_correct.sum())
    correct, incorrect = final[is_correct], np.sort(final[~is_correct])
    if len(correct) and len(incorrect):
        below = np.searchsorted(incorrect, correct, "left").mean()
        not_above = np.searchsorted(incorrect, correct, "right").mean()
        metrics["auc"] = float((below + not_above) / 2 / len(incorrect))
    return metrics


def labels_to_pairs(examples, rewards):
    """Pair every correct response with every incorrect one of the same prompt.

    Pairs with the same tokens are left out.
    Returns Examples with two responses, and their rewards.
    """
    by_prompt = defaultdict(lambda: ([], []))
    for example, responses in zip(examples, rewards):
        side = 0 if len(example.responses[0]) > 0 else 1
        case = example.prompt, example.responses[side], responses[side]
        by_prompt[example.prompt.tobytes()][side].append(case)
    pairs, pair_rewards = [], []
    for correct_cases, incorrect_cases in by_prompt.values():
        for prompt, correct, correct_rewards in correct_cases:
            for _, incorrect, incorrect_rewards in incorrect_cases:
                if not np.array_equal(correct, incorrect):
                    pairs.append(Example(prompt, (correct, incorrect)))
                    pair_rewards.append([correct_rewards, incorrect_rewards])
    return pairs, pair_rewards
