"""Best-of-n: how much better is the response that the reward model picks out of n?

    python bon.py --checkpoint=out/toy-icrm-seed0                   sampled; worth their gold
    python bon.py --checkpoint=CKPT --judge=OTHER --json=OUT.json   sampled; worth OTHER's reward
    python bon.py --checkpoint=CKPT --candidates=FILE.jsonl         stored, each with its worth
    python bon.py --checkpoint=CKPT --halve=12,20,28                drop the worse half on the way

Of M candidates, n drawn without replacement are all among the c of lowest reward with probability
C(c, n) / C(M, n): what the best of n is worth is known without resampling. Where every response has
a final `answer`, the majority vote stands beside. --halve drops candidates half-written, by
their prefixes' rewards (successive halving, as speculative rejection, arXiv 2410.20290, does for
whole batches). Left out: votes weighted by reward.
"""
import dataclasses
import itertools
import math
from dataclasses import dataclass
from functools import lru_cache, partial

from config import UserError, in_range, run_script
import numpy as np
import torch
from tqdm import tqdm

from data.dataset import open_dataset
from data.files import write_json
from data.jsonl import read_candidate_rows
from data.rows import Row
from data.toy.world import World
from evaluate import (check_fit, final_rewards, load_reward_model, prefix_rewards, print_lines,
                      text_of)
from generator import Sampling, finished, load_generator, sample_rows


@dataclass(frozen=True)
class BonConfig:
    checkpoint: str = ""        # a reward model: its ckpt.pt, or the folder that holds it
    candidates: str = ""        # JSONL of prompt and responses; empty: sampled from its generator
    judge: str = ""             # another reward model: what sampled responses are worth to it
    json: str = ""              # write the results here
    prompts: int = 100          # held-out prompts to sample for
    samples: int = 64           # responses to sample for each
    halve: str = ""             # after so many tokens each drop the worse half: 12,20,28
    max_new_tokens: int = 256   # longest response; those without an end by then are left out
    seed: int = 0               # of sampling
    as_dialogue: bool = False   # write plain prompts as one Human turn
    skip_bad: bool = False      # go on where much of a file is left out
    device: str = "auto"        # auto, cpu, cuda, cuda:N


# Estimators --------------------------------------------------------------------------------------

def best_of_n(rewards, worth, n):
    """Expected worth of the candidate of highest reward among n of M; equal ones share.
    best_of_n([0.1, 0.9, 0.5], [0, 3, 0], 2) is 2.0: the middle one is in two of three subsets."""
    # task 6
    _, place, size = np.unique(rewards, return_inverse=True, return_counts=True)
    among = [math.comb(int(c), n) / math.comb(len(place), n) for c in (0, *size.cumsum())]
    chances = np.diff(among) / size     # of each candidate of a reward
    return float(chances[place] @ np.asarray(worth, dtype=float))
    # end


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


# Search ------------------------------------------------------------------------------------------

def same_tokens(rewards, worth, share):
    """Best-of-n with a share of the tokens of all M candidates: n = share M, in expectation."""
    whole, rest = divmod(max(1.0, share * len(worth)), 1)
    more = best_of_n(rewards, worth, int(whole) + 1) if rest else 0.0
    return (1 - rest) * best_of_n(rewards, worth, int(whole)) + rest * more


def compare_ways(rewards, worth, prompts, places, exact=None):
    """What a pick is worth by halving, and by its rivals, and how many tokens each writes for it.

    rewards: of every prefix, for each set of candidates a list of arrays; exact: on the toy world
    the same of the exact value. -> rows of a table"""
    final = [[r[-1] for r in some] for some in rewards]
    everything = np.array([sum(map(len, some)) for some in rewards])
    best = [best_of_n(r, w, len(w)) for r, w in zip(final, worth)]
    found = [("random", "one", list(map(np.mean, worth)), everything / list(map(len, worth))),
             ("reward model", "best of all", best, everything)]
    for judge, theirs in {"reward model": rewards, "exact value": exact or []}.items():
        picks = [halve(some, places) for some in theirs]
        tokens = [written for _, written in picks]
        if judge == "reward model":
            fair = list(map(same_tokens, final, worth, tokens / everything))
            found.append((judge, "best of as many tokens", fair, tokens))
        if picks:
            chosen = [w[pick] for w, (pick, _) in zip(worth, picks)]
            found.append((judge, "halving", chosen, tokens))
    found.append(("oracle", "best of all", list(map(max, worth)), everything))
    return [summary(*one, prompts) for one in found]


def summary(judge, way, worth, tokens, prompts):
    """One row of the table of ways: means, and the interval of what a pick is worth."""
    low, high = interval_by_prompt(worth, prompts, np.random.default_rng(0))
    return {"judge": judge, "way": way, "tokens": float(np.mean(tokens)),
            "worth": float(np.mean(worth)), "low": low, "high": high}


def read_places(text):
    """'12,20,28' -> (12, 20, 28), rising."""
    places = tuple(int(part) if part.isdecimal() else 0 for part in text.split(",") if part)
    if any(b <= a for a, b in zip((0, *places), places)):
        raise UserError(f"--halve takes rising numbers of tokens such as 12,20,28, not {text!r}")
    return places


def search(model, generator, dataset, rows, places, config, worth_of):
    """Halving as it saves tokens: candidates are dropped while they are written, for the prompts of
    these Rows of whole candidates.  -> one more row of compare_ways'"""
    rng = torch.Generator(generator.lm_head.weight.device).manual_seed(config.seed)
    end, picks, tokens = dataset.tokenizer.end_of_text, [], []
    for prompt, whole, _ in tqdm(rows, "halving", disable=None, leave=False):
        start = torch.tensor(prompt.astype(np.int64), device=rng.device)[None]      # (1, T)
        sampling = Sampling(generator, start, config.samples, end, rng, config.max_new_tokens)
        tokens.append(0)
        for place in (*places, config.max_new_tokens):
            some = sampling.write(place - sampling.tokens.size(1))
            order = np.argsort(-final_rewards(model, [Row(prompt, tuple(some))])[0], kind="stable")
            kept, dropped = np.split(order, [math.ceil(len(order) / 2)])
            tokens[-1] += sum(len(some[i]) for i in dropped)
            sampling.keep(torch.tensor(kept, device=rng.device))
        tokens[-1] += sum(len(some[i]) for i in kept)
        ended = tuple(some[i] for i in order if some[i][-1] == end)
        picks.append(Row(prompt, ended[:1] or whole[:1]))       # none ended: any one
    values = [some[0] for some in worth_of(picks)]
    return summary("reward model", "halving as it is written", values, tokens, range(len(rows)))


# Candidates --------------------------------------------------------------------------------------

def open_generator(tokenizer, checkpoint, config):
    """The reward model's own generator and dataset, and what responses are worth: to the judge or,
    on the toy world, their gold.  -> LanguageModel, Dataset, a function of Rows to lists of worths
    """
    generator, _ = load_generator(checkpoint["settings"]["generator"], config.device,
                                  checkpoint["inputs"]["p"])
    dataset = open_dataset(checkpoint["settings"]["dataset"], checkpoint["inputs"]["data"])
    if config.judge:
        judge, its_tokenizer, _ = load_reward_model(config.judge, config.device)
        check_fit("judge", its_tokenizer, tokenizer, judge, generator)
        return generator, dataset, partial(final_rewards, judge)
    if dataset.kind != "toy":
        raise UserError("name a judge of sampled responses with --judge=CHECKPOINT")
    world = World(**dataset.about["world"])
    return generator, dataset, lambda rows: [[float(world.gold_of(tokenizer.decode(response)))
                                              for response in row.responses] for row in rows]


def obtain_candidates(generator, dataset, config):
    """Responses of the generator to prompts of val: Rows of those that ended."""
    prompts = dataset.split("val").prompts()[:config.prompts]
    rows = sample_rows(generator, dataset.tokenizer, prompts, config.samples, config.seed,
                       config.max_new_tokens)
    rows = [row for row in finished(rows, dataset.tokenizer) if row.responses]
    if not rows:
        raise UserError("no response ended; raise --max_new_tokens")
    print(sum(len(row.responses) for row in rows), "responses ended by themselves")
    return rows


def exact_values(dataset, rows):
    """The toy world's exact value of every prefix: for each Row a list of lists."""
    world, encode = World(**dataset.about["world"]), lru_cache(dataset.tokenizer.encode)
    end = dataset.tokenizer.end_of_text
    return [[[value for _, value, _ in world.trace(response.tolist(), encode, end, strict=False)]
             for response in row.responses] for row in rows]


def print_rows(rows):
    print_lines([[key.replace("_", " ") for key in rows[0]]]
                + [list(map(text_of, row.values())) for row in rows])


def main(config):
    in_range(config, 1, 10**9, "prompts", "samples", "max_new_tokens")
    in_range(config, 0, 10**9, "seed")
    places = read_places(config.halve)
    if config.candidates and config.judge:
        raise UserError("--candidates=FILE says what its responses are worth; leave out --judge")
    model, tokenizer, checkpoint = load_reward_model(config.checkpoint, config.device)
    answers = exact = None
    if config.candidates:
        items, rows, _ = read_candidate_rows(
            config.candidates, tokenizer, model.model.config.block_size, config.as_dialogue,
            config.skip_bad)
        worth, prompts, answers = zip(*((one.correct, one.prompt, one.answers) for one in items))
    else:
        generator, dataset, worth_of = open_generator(tokenizer, checkpoint, config)
        rows = obtain_candidates(generator, dataset, config)
        worth, prompts = worth_of(rows), range(len(rows))
        exact = exact_values(dataset, rows) if places and dataset.kind == "toy" else None
    rewards = prefix_rewards(model, rows)
    found = {"candidates": sum(map(len, worth)), "settings": dataclasses.asdict(config),
             "curve": curve([[r[-1] for r in some] for some in rewards], worth, prompts, answers)}
    print_rows(found["curve"])
    if places:
        found["ways"] = compare_ways(rewards, worth, prompts, places, exact)
        if not config.candidates:
            found["ways"].append(search(model, generator, dataset, rows, places, config, worth_of))
        print_rows(found["ways"])
    if config.json:
        write_json(config.json, found)


if __name__ == "__main__":
    run_script(BonConfig, main)
