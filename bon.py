"""Best-of-N: how much better is the response that the reward model picks out of N?

    python bon.py --checkpoint=CKPT --candidates=FILE.jsonl --json=OUT.json
    python bon.py --checkpoint=out/toy-icrm-seed0       the toy world: sampled from the generator, worth their gold
    python bon.py --checkpoint=CKPT --judge=OTHER       real text: sampled, worth another reward model's reward

From M scored candidates of a prompt the expected worth of the best of n drawn without replacement has an
unbiased closed form (no resampling): with candidates in the order of their reward, the i-th is the best of a
subset of n with probability C(i-1, n-1) / C(M, n). Candidates of equal reward share theirs. Prompts may have
unequal numbers of candidates: those with fewer than n are left out at n, and the table says how many are in.
Where every response has a final `answer`, the majority vote stands beside it.
"""
import dataclasses
import itertools
import math
import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from compare import print_lines
from config import TINY, UserError, in_range, run_script, show, write_json
from data.batches import make_row
from data.pairs import Candidates, read_candidates
from data.prepare import open_dataset
from data.toy.world import gold, question
from evaluate import check_fit, load_reward_model, score
from generator import load_generator, sample_responses
from model import pick_device


@dataclass(frozen=True)
class BonConfig:
    checkpoint: str = ""        # a reward model: its ckpt.pt, or the folder that holds it
    candidates: str = ""        # JSONL of prompt and responses; empty: sampled from the generator
    judge: str = ""             # another reward model: what it makes of sampled responses is their worth
    json: str = ""              # write the results here
    prompts: int = 100          # prompts to sample for
    samples: int = 64           # responses to sample for each
    temperature: float = 1.0    # of sampling
    top_p: float = 1.0          # of sampling
    max_new_tokens: int = 256   # longest response; those that have no end by then are left out
    seed: int = 0               # of prompts, sampling and bootstrap
    as_dialogue: bool = False   # write plain prompts as one Human turn
    device: str = "auto"        # auto, cpu, cuda, cuda:N
    strict: bool = False        # stop at the first bad row


@lru_cache(maxsize=None)
def best_probabilities(M, n):
    """P(the i-th lowest of M is the best of n drawn) = C(i-1, n-1) / C(M, n), i = 1..M.  -> (M,)"""
    return np.array([math.comb(i - 1, n - 1) / math.comb(M, n) for i in range(1, M + 1)])


def best_of_n(rewards, worth, n):
    """Expected worth of the candidate with the highest reward among n of M.  (M,), (M,) -> float

    >>> best_of_n([0.1, 0.9, 0.5], [0.0, 1.0, 0.0], 2)      # two of the three subsets hold the best
    0.6666666666666666
    """
    order = np.argsort(rewards, kind="stable")
    rewards, worth = np.asarray(rewards)[order], np.asarray(worth, dtype=float)[order]
    _, group, size = np.unique(rewards, return_inverse=True, return_counts=True)
    shared = np.bincount(group, best_probabilities(len(rewards), n)) / size      # equal rewards, equal shares
    return float(shared[group] @ worth)


def majority_of_n(answers, worth, n, rng, draws=500):
    """Expected worth of the commonest answer among n of M drawn without replacement; equally common ones share.

    Over all subsets where there are at most `draws` of them, else over that many random ones. (An answer is
    worth the mean of its responses.)
    """
    M, answers, worth = len(answers), np.asarray(answers), np.asarray(worth, dtype=float)
    kinds, kind = np.unique(answers, return_inverse=True)
    value = np.bincount(kind, worth) / np.bincount(kind)
    some = itertools.combinations(range(M), n) if math.comb(M, n) <= draws else \
        (rng.permutation(M)[:n] for _ in range(draws))
    votes = (np.bincount(kind[list(subset)], minlength=len(kinds)) for subset in some)
    return float(np.mean([value[count == count.max()].mean() for count in votes]))


def kl_of_best_of_n(n):
    """KL divergence of the best-of-n policy from the one sampled: log n - (n-1)/n."""
    return math.log(n) - (n - 1) / n


def bootstrap_interval(values, seed, draws=1000):
    """95% interval of the mean of values, resampled over prompts."""
    values = np.asarray(values)
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    return [float(x) for x in np.quantile(values[picks].mean(1), [0.025, 0.975])]


def curve(rewards, worth, seed=0, answers=None):
    """Best-of-n for n = 1, 2, 4, ... up to the candidates, over the prompts that have n of them.

    rewards, worth (and answers): one list per prompt. Each row: n, the number of prompts, kl, reward_model (with
    its interval), random (one candidate at random), oracle (the worth itself as the reward: pass@n) and majority.
    """
    rows, most, n, rng = [], max(map(len, rewards)), 1, np.random.default_rng(seed)
    while n <= most:
        some = [i for i, r in enumerate(rewards) if len(r) >= n]
        picked = [best_of_n(rewards[i], worth[i], n) for i in some]
        low, high = bootstrap_interval(picked, seed)
        rows.append({"n": n, "prompts": len(some), "kl": kl_of_best_of_n(n), "reward_model": float(np.mean(picked)),
                     "low": low, "high": high, "random": float(np.mean([np.mean(worth[i]) for i in some])),
                     "oracle": float(np.mean([best_of_n(worth[i], worth[i], n) for i in some]))})
        if answers is not None:
            rows[-1]["majority"] = float(np.mean([majority_of_n(answers[i], worth[i], n, rng) for i in some]))
        n *= 2
    return rows


def toy_questions(config):
    rng = random.Random(f"{config.seed} prompts")
    return [question(rng) for _ in range(config.prompts)]


def sample_candidates(generator, tokenizer, prompts, worth_of, config, device):
    """The generator's responses to prompts, as Candidates; worth_of: prompt, texts -> what each is worth.

    Left out, and counted on the screen: responses without an end, and prompts that leave no room or have no response."""
    draws, room = torch.Generator(device).manual_seed(config.seed), generator.transformer.config.block_size - 1
    encoded = [(prompt, tokens) for prompt in prompts if len(tokens := tokenizer.encode(prompt)) <= room]
    if not encoded:
        raise UserError(f"every prompt fills the context of {room + 1} tokens; nothing can be sampled")
    sampled = sample_responses(generator, [tokens for _, tokens in encoded], config.samples, tokenizer.end_of_text, draws,
                               config.max_new_tokens, config.temperature, config.top_p)
    found, ended = [], 0
    for (prompt, _), responses in zip(encoded, sampled):
        texts = tuple(tokenizer.decode(tokens) for tokens in responses if tokens[-1] == tokenizer.end_of_text)
        ended += len(texts)
        found += [Candidates(prompt, texts, tuple(worth_of(prompt, texts)))] if texts else []
    total = len(encoded) * config.samples
    if total > ended or len(found) < len(prompts):
        print(f"left out: {total - ended} of {total} responses without an end, {len(prompts) - len(found)} prompts")
    if not found:
        raise UserError(f"no response ended within {config.max_new_tokens} tokens; raise --max_new_tokens")
    return found


def worth_of_gold(prompt, texts):
    """The toy world's truth."""
    return [float(gold(text)) for text in texts]


def worth_by_judge(judge, tokenizer, device):
    """What another reward model makes of the responses, as a function for sample_candidates."""
    def worth(prompt, texts):
        rows = [make_row(prompt, text, tokenizer, judge.transformer.config.block_size) for text in texts]
        return [float(r[-1]) for r in score(judge, rows, device)]
    return worth


def evaluate_candidates(model, tokenizer, candidates, device, seed=0):
    """Score every candidate and put the results together; candidates too long for the context are left out."""
    block_size = model.transformer.config.block_size
    rows, worth, answers, owner, long = [], [], [], [], 0
    for number, item in enumerate(candidates):
        for text, correct, answer in itertools.zip_longest(item.responses, item.correct, item.answers):
            row = make_row(item.prompt, text, tokenizer, block_size)
            if row is None:
                long += 1
                continue
            rows.append(row), worth.append(correct), answers.append(answer), owner.append(number)
    if not rows:
        raise UserError(f"no candidate fits into the context of {block_size} tokens")
    rewards = np.array([r[-1] for r in score(model, rows, device, name=lambda i: (
        f"a candidate of prompt {owner[i - 1] + 1} ({candidates[owner[i - 1]].prompt[:40]!r})"))])
    voted = None not in answers
    owner, worth, answers = np.array(owner), np.array(worth), np.array(answers)
    groups = [np.flatnonzero(owner == number) for number in np.unique(owner)]
    return {"curve": curve([rewards[g] for g in groups], [worth[g] for g in groups], seed,
                           [answers[g] for g in groups] if voted else None),
            "prompts": len(groups), "candidates": len(rows), "too_long": long, "truncated": sum(row.truncated for row in rows),
            "all_right": sum(bool((worth[g] == 1).all()) for g in groups),
            "none_right": sum(bool((worth[g] == 0).all()) for g in groups)}


def obtain_candidates(tokenizer, checkpoint, config, device):
    """Sampled from the reward model's own generator: toy questions, or the held-out prompts of its dataset."""
    is_toy, settings = checkpoint["dataset_kind"] == "toy", checkpoint["settings"]
    if not (is_toy or config.judge):
        raise UserError("name a judge of sampled responses with --judge=CHECKPOINT, or a file of scored ones with "
                        "--candidates=FILE.jsonl; only in the toy world is the truth known")
    generator, its_tokenizer = load_generator(settings["generator"], device)
    check_fit("generator", generator, its_tokenizer, tokenizer)
    worth_of = worth_of_gold
    if config.judge:
        judge, its_tokenizer, _ = load_reward_model(config.judge, device)
        check_fit("judge", judge, its_tokenizer, tokenizer, generator.transformer.config.block_size)
        worth_of = worth_by_judge(judge, tokenizer, device)
    prompts = toy_questions(config) if is_toy else open_dataset(settings["dataset"]).prompts("val")[:config.prompts]
    return sample_candidates(generator, tokenizer, prompts, worth_of, config, device)


def main(config):
    show(config)
    in_range(config, 1, 10**9, "prompts", "samples", "max_new_tokens")
    in_range(config, 0, 10**9, "seed", "temperature")
    in_range(config, TINY, 1, "top_p")
    device = pick_device(config.device)
    model, tokenizer, checkpoint = load_reward_model(config.checkpoint, device)
    skipped = 0
    if config.candidates and config.judge:
        raise UserError("one thing at a time: --candidates=FILE says what its responses are worth, --judge is for sampled ones")
    if config.candidates:
        candidates, skipped = read_candidates(config.candidates, config.strict, config.as_dialogue)
    else:
        candidates = obtain_candidates(tokenizer, checkpoint, config, device)
    results = evaluate_candidates(model, tokenizer, candidates, device, config.seed) | {"skipped": skipped}
    others = ["random", "oracle"] + ["majority"] * ("majority" in results["curve"][0])
    print_lines([["n", "prompts", "KL", "reward model", "95% interval", *others]] + [
        [str(row["n"]), str(row["prompts"]), f"{row['kl']:.2f}", f"{row['reward_model']:.3f}",
         f"{row['low']:.3f} to {row['high']:.3f}", *(f"{row[key]:.3f}" for key in others)] for row in results["curve"]])
    print(f"{results['candidates']} candidates of {results['prompts']} prompts; left out: {skipped} bad rows, "
          f"{results['too_long']} candidates longer than the context; prompts cut at their start: {results['truncated']}")
    if config.candidates:
        print(f"prompts with every candidate right: {results['all_right']}; with none right: {results['none_right']}")
    if config.json:
        write_json(config.json, dict(results, settings=dataclasses.asdict(config)))


if __name__ == "__main__":
    run_script(BonConfig, main)
