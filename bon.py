"""Best-of-N: how much better is the response that the reward model picks out of N?

    python bon.py --checkpoint=CKPT --candidates=FILE.jsonl --json=OUT.json
    python bon.py --checkpoint=out/toy-icrm-seed0       the toy world: sampled from the generator, judged by gold

From M scored candidates of a prompt the expected worth of the best of n drawn without replacement has an
unbiased closed form (no resampling): with candidates in the order of their reward, the i-th is the best of a
subset of n with probability C(i-1, n-1) / C(M, n). Candidates of equal reward share theirs.
"""
import dataclasses
import math
import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from config import UserError, in_range, run_script, show, write_json
from data.batches import make_row
from data.pairs import Candidates, read_candidates
from data.toy.world import gold, question
from evaluate import load_reward_model, print_lines, score
from generator import load_generator, sample
from model import pick_device


@dataclass(frozen=True)
class BonConfig:
    checkpoint: str = ""        # a reward model: its ckpt.pt, or the folder that holds it
    candidates: str = ""        # JSONL of prompt and responses; empty: sampled from the generator (toy world)
    json: str = ""              # write the results here
    prompts: int = 100          # prompts to sample for
    samples: int = 64           # responses to sample for each
    temperature: float = 1.0    # of sampling
    top_p: float = 1.0          # of sampling
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


def kl_of_best_of_n(n):
    """KL divergence of the best-of-n policy from the one sampled: log n - (n-1)/n."""
    return math.log(n) - (n - 1) / n


def bootstrap_interval(values, seed, draws=1000):
    """95% interval of the mean of values, resampled over prompts."""
    values = np.asarray(values)
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    return [float(x) for x in np.quantile(values[picks].mean(1), [0.025, 0.975])]


def curve(rewards, worth, seed=0):
    """Best-of-n for n = 1, 2, 4, ... up to the candidates, over the prompts that have n of them.

    rewards, worth: one list per prompt. Each row: n, the number of prompts, kl, reward_model (with its
    interval), random (one candidate at random) and oracle (the worth itself as the reward: pass@n).
    """
    rows, most, n = [], max(map(len, rewards)), 1
    while n <= most:
        some = [i for i, r in enumerate(rewards) if len(r) >= n]
        picked = [best_of_n(rewards[i], worth[i], n) for i in some]
        low, high = bootstrap_interval(picked, seed)
        rows.append({"n": n, "prompts": len(some), "kl": kl_of_best_of_n(n), "reward_model": float(np.mean(picked)),
                     "low": low, "high": high, "random": float(np.mean([np.mean(worth[i]) for i in some])),
                     "oracle": float(np.mean([best_of_n(worth[i], worth[i], n) for i in some]))})
        n *= 2
    return rows


def sample_candidates(generator, tokenizer, config, device):
    """Toy prompts and the generator's responses to them, worth their gold: a list of Candidates."""
    rng = random.Random(f"{config.seed} prompts")
    prompts = [question(rng) for _ in range(config.prompts)]
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    draws, found = torch.Generator(device).manual_seed(config.seed), {}
    for length in sorted({len(tokens) for tokens in encoded}):      # prompts of one length are read together
        group = [i for i, tokens in enumerate(encoded) if len(tokens) == length]
        for start in range(0, len(group), 16):
            part = group[start:start + 16]
            tokens = torch.tensor([encoded[i] for i in part], device=device)
            drawn = sample(generator, tokens, config.samples, tokenizer.end_of_text, draws,
                           temperature=config.temperature, top_p=config.top_p)
            found |= {i: [tokenizer.decode(response) for response in responses] for i, responses in zip(part, drawn)}
    return [Candidates(prompts[i], tuple(found[i]), tuple(float(gold(text)) for text in found[i]))
            for i in range(len(prompts))]


def evaluate_candidates(model, tokenizer, candidates, device, seed=0):
    """Score every candidate and put the results together; candidates too long for the context are left out."""
    block_size = model.transformer.config.block_size
    rows, worth, owner, long = [], [], [], 0
    for number, item in enumerate(candidates):
        for text, correct in zip(item.responses, item.correct):
            row = make_row(item.prompt, text, tokenizer, block_size)
            if row is None:
                long += 1
                continue
            rows.append(row), worth.append(correct), owner.append(number)
    if not rows:
        raise UserError(f"no candidate fits into the context of {block_size} tokens")
    rewards = np.array([r[-1] for r in score(model, rows, device)])
    if not np.isfinite(rewards).all():
        raise UserError("the reward of a candidate is not finite")
    owner, worth = np.array(owner), np.array(worth)
    groups = [np.flatnonzero(owner == number) for number in np.unique(owner)]
    return {"curve": curve([rewards[g] for g in groups], [worth[g] for g in groups], seed),
            "prompts": len(groups), "candidates": len(rows), "too_long": long}


def main(config):
    show(config)
    in_range(config, 1, 10**9, "prompts", "samples")
    in_range(config, 0, 10**9, "seed", "temperature")
    in_range(config, 1e-9, 1, "top_p")
    device = pick_device(config.device)
    model, tokenizer, checkpoint = load_reward_model(config.checkpoint, device)
    skipped = 0
    if config.candidates:
        candidates, skipped = read_candidates(config.candidates, config.strict, config.as_dialogue)
    elif checkpoint["dataset_kind"] == "toy":
        generator, found = load_generator(checkpoint["settings"]["generator"], device)
        if found.fingerprint != tokenizer.fingerprint:
            raise UserError("the generator and the reward model read different vocabularies")
        candidates = sample_candidates(generator, tokenizer, config, device)
    else:
        raise UserError("name a file of scored candidates with --candidates=FILE.jsonl; "
                        "only the toy world can judge sampled ones")
    results = evaluate_candidates(model, tokenizer, candidates, device, config.seed) | {"skipped": skipped}
    print_lines([["n", "prompts", "KL", "reward model", "95% interval", "random", "oracle"]] + [
        [str(row["n"]), str(row["prompts"]), f"{row['kl']:.2f}", f"{row['reward_model']:.3f}",
         f"{row['low']:.3f} to {row['high']:.3f}", f"{row['random']:.3f}", f"{row['oracle']:.3f}"]
        for row in results["curve"]])
    print(f"{results['candidates']} candidates of {results['prompts']} prompts; left out: {skipped} bad rows, "
          f"{results['too_long']} candidates longer than the context")
    if config.json:
        write_json(config.json, dict(results, settings=dataclasses.asdict(config)))


if __name__ == "__main__":
    run_script(BonConfig, main)
