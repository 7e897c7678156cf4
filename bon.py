"""Best-of-n: how much better is the response that the reward model picks out of n?

    python bon.py --checkpoint=out/toy-icrm-seed0                   sampled; worth their gold
    python bon.py --checkpoint=CKPT --judge=OTHER --json=OUT.json   sampled; worth OTHER's reward
    python bon.py --checkpoint=CKPT --candidates=FILE.jsonl         stored, each with its worth

Of M candidates, n drawn without replacement are all among the c of lowest reward with probability
C(c, n) / C(M, n): what the best of n is worth is known without resampling. Where every response has
a final `answer`, the majority vote stands beside. Left out: votes weighted by reward, early drops.
"""
import dataclasses
import itertools
import math
from dataclasses import dataclass

import numpy as np

from config import UserError, in_range, run_script, show, write_json
from data.dataset import open_dataset
from data.pairs import read_candidate_rows
from data.toy.world import gold
from evaluate import check_fit, final_rewards, load_reward_model, print_lines, text_of
from generator import finished, load_generator, sample_rows


@dataclass(frozen=True)
class BonConfig:
    checkpoint: str = ""        # a reward model: its ckpt.pt, or the folder that holds it
    candidates: str = ""        # JSONL of prompt and responses; empty: sampled from its generator
    judge: str = ""             # another reward model: what sampled responses are worth to it
    json: str = ""              # write the results here
    prompts: int = 100          # held-out prompts to sample for
    samples: int = 64           # responses to sample for each
    max_new_tokens: int = 256   # longest response; those without an end by then are left out
    seed: int = 0               # of sampling
    as_dialogue: bool = False   # write plain prompts as one Human turn
    device: str = "auto"        # auto, cpu, cuda, cuda:N


# Estimators --------------------------------------------------------------------------------------

def best_of_n(rewards, worth, n):
    """Expected worth of the candidate of highest reward among n of M; equal ones share.
    best_of_n([0.1, 0.9, 0.5], [0, 3, 0], 2) is 2.0: the middle one is in two of three subsets."""
    _, place, size = np.unique(rewards, return_inverse=True, return_counts=True)
    among = [math.comb(int(c), n) / math.comb(len(place), n) for c in (0, *size.cumsum())]
    chances = np.diff(among) / size     # of each candidate of a reward
    return float(chances[place] @ np.asarray(worth, dtype=float))


def halve(rewards, places):
    """Successive halving: after so many tokens each (places, rising) keep the better half of the
    candidates by the reward of what is written, and finish the survivors.

    rewards: of every prefix, one array per candidate. -> number of the best survivor, and the
    tokens written in all. halve([[0, 9], [1, 2], [0, 5]], [1]) is (0, 5): two survive their first
    token, 1 and, of equals, 0; those are finished."""
    alive, written = list(range(len(rewards))), [0] * len(rewards)
    for place in (*places, max(map(len, rewards))):
        for i in alive:
            written[i] = min(place, len(rewards[i]))
        alive.sort(key=lambda i: -rewards[i][written[i] - 1])
        alive = alive[:math.ceil(len(alive) / 2)]
    return alive[0], sum(written)


def majority_of_n(answers, worth, n, rng, draws=500):
    """Expected worth of the commonest answer among n of M; equally common ones share, and each is
    worth the mean of its responses. Over all subsets, or `draws` random ones of more than those."""
    kinds, kind = np.unique(answers, return_inverse=True)
    value = np.bincount(kind, worth) / np.bincount(kind)
    subsets = map(list, itertools.combinations(range(len(answers)), n))
    if math.comb(len(answers), n) > draws:
        subsets = (rng.permutation(len(answers))[:n] for _ in range(draws))
    votes = (np.bincount(kind[subset], minlength=len(kinds)) for subset in subsets)
    return float(np.mean([value[count == count.max()].mean() for count in votes]))


def interval_by_prompt(values, prompts, rng, draws=1000):
    """95% bootstrap interval of the mean of values; those of one prompt go together."""
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    whose = [number[prompt] for prompt in prompts]
    sums, counts = np.bincount(whose, values), np.bincount(whose)           # (prompts,) each
    picks = rng.integers(len(sums), size=(draws, len(sums)))
    means = sums[picks].sum(1) / counts[picks].sum(1)                       # (draws,)
    return np.quantile(means, [0.025, 0.975]).tolist()


def curve(rewards, worth, prompts, answers=None):
    """Best-of-n for n = 1, 2, 4, ..., over the sets of candidates that are at least n.

    rewards, worth (and answers): one list per set; prompts: whose each is. random is any candidate,
    oracle the worth itself as the reward (pass@n), low and high the reward model's interval."""
    rows, rng = [], np.random.default_rng(0)
    for n in (2 ** k for k in range(max(map(len, rewards)).bit_length())):
        some = [i for i, r in enumerate(rewards) if len(r) >= n]
        theirs = [prompts[i] for i in some]
        picked = [best_of_n(rewards[i], worth[i], n) for i in some]
        low, high = interval_by_prompt(picked, theirs, rng)
        others = {"random": [np.mean(worth[i]) for i in some],
                  "oracle": [best_of_n(worth[i], worth[i], n) for i in some]}
        if answers and all(answers):
            others["majority"] = [majority_of_n(answers[i], worth[i], n, rng) for i in some]
        rows.append({"n": n, "prompts": len(set(theirs)), "kl_at_most": math.log(n) - (n - 1) / n,
                     "reward_model": float(np.mean(picked)), "low": low, "high": high,
                     **{name: float(np.mean(values)) for name, values in others.items()}})
    return rows


# Candidates --------------------------------------------------------------------------------------

def obtain_candidates(tokenizer, checkpoint, config):
    """Responses of the reward model's own generator to prompts of val, worth what the judge makes
    of them or, on the toy world, their gold: -> Rows, and a list of worths for each."""
    generator, its_tokenizer = load_generator(checkpoint["settings"]["generator"], config.device)
    dataset = open_dataset(checkpoint["settings"]["dataset"])
    check_fit("generator", its_tokenizer, tokenizer)
    check_fit("dataset", dataset.tokenizer, tokenizer)
    if config.judge:
        judge, its_tokenizer, _ = load_reward_model(config.judge, config.device)
        check_fit("judge", its_tokenizer, tokenizer, judge, generator)
    elif dataset.kind != "toy":
        raise UserError("name a judge of sampled responses with --judge=CHECKPOINT")
    prompts = dataset.split("val").prompts()[:config.prompts]
    rows = sample_rows(generator, tokenizer, prompts, config.samples, config.seed,
                       config.max_new_tokens)
    rows = [row for row in finished(rows, tokenizer) if row.responses]
    if not rows:
        raise UserError("no response ended; raise --max_new_tokens")
    print(sum(len(row.responses) for row in rows), "responses ended by themselves")
    if config.judge:
        return rows, final_rewards(judge, rows)
    return rows, [[float(gold(tokenizer.decode(response))) for response in row.responses]
                  for row in rows]


def main(config):
    show(config)
    in_range(config, 1, 10**9, "prompts", "samples", "max_new_tokens")
    in_range(config, 0, 10**9, "seed")
    if config.candidates and config.judge:
        raise UserError("--candidates=FILE says what its responses are worth; leave out --judge")
    model, tokenizer, checkpoint = load_reward_model(config.checkpoint, config.device)
    if config.candidates:
        items, rows, _ = read_candidate_rows(
            config.candidates, tokenizer, model.model.config.block_size, config.as_dialogue)
        worth, prompts, answers = zip(*((one.correct, one.prompt, one.answers) for one in items))
    else:
        rows, worth = obtain_candidates(tokenizer, checkpoint, config)
        prompts, answers = range(len(rows)), None
    found = curve(final_rewards(model, rows), worth, prompts, answers)
    lines = [[key.replace("_", " ") for key in found[0]]]
    print_lines(lines + [list(map(text_of, row.values())) for row in found])
    if config.json:
        write_json(config.json, {"curve": found, "candidates": sum(map(len, worth)),
                                 "settings": dataclasses.asdict(config)})


if __name__ == "__main__":
    run_script(BonConfig, main)
