"""Best-of-n: how much better is the response that the reward model selects out of n?

    python bon.py --checkpoint=out/toy-icrm-seed0
    python bon.py --checkpoint=out/toy-icrm-seed0 --halving_lengths=12,20,28
    python bon.py --checkpoint=DIR --judge=OTHER         scored by another reward model
    python bon.py --checkpoint=DIR --candidates=F.jsonl  stored responses and scores

The generator samples candidates for held-out prompts. A selected response is judged by
its gold score: its true quality on the toy world, the judge's reward, or the score
stored in the file. Best-of-n over subsets of the candidates is computed exactly.

--halving_lengths does successive halving: whenever the candidates reach one of these
lengths, the half with the lower prefix rewards is dropped (related to speculative
rejection, arXiv 2410.20290). It is compared with best-of-n at the same token budget.

`# task N` and `# end` enclose a solution of the course (exercises/README.md).
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache, partial

from common import (
    UserError,
    check_range,
    find_near,
    format_json,
    open_output,
    run_script,
)
import numpy as np
import torch
from tqdm import tqdm

from data.batch import Example
from data.dataset import chunks, open_dataset
from data.toy import World
from evaluate import format_cell, load_reward_model, print_lines, score
from generator import load_generator
from model import KVCache

BOOTSTRAP_SAMPLES = 1000
MAX_CACHE = 2**31  # bytes of keys and values while sampling
# At most so many responses share a row of a batch. Attention costs length squared.
RESPONSES_PER_ROW = 8


@dataclass(frozen=True)
class BonConfig:
    checkpoint: str = ""  # a reward model: its folder or ckpt.pt
    candidates: str = ""  # JSONL of prompts and responses. empty: sample them
    judge: str = ""  # another reward model that gives the gold scores
    json: str = ""  # write the results to this file
    prompts: int = 100  # held-out prompts to sample for
    samples: int = 64  # responses to each prompt
    halving_lengths: str = ""  # numbers of tokens after which half is dropped: 12,20,28
    max_new_tokens: int = 256  # longest response. Unfinished ones are left out
    seed: int = 0  # random seed of sampling
    wrap_as_chat: bool = False  # wrap plain prompts as one user message
    max_bad_fraction: float = 0.05  # largest share of rows skipped for one reason
    device: str = "auto"  # auto, cpu, cuda, cuda:N


# Sampling -----------------------------------------------------------------------------


class Sampler:
    """Samples n responses to each prompt, token by token.

    The model reads a prompt once. Its keys and values are copied to its n rows.

    prompts: (P, T) int64, all of one length
    rng: torch.Generator on the prompts' device
    temperature: 0 is greedy decoding
    tokens: (P*n, t) the tokens so far, prompt by prompt. A finished response is filled
        up with end-of-text
    """

    @torch.no_grad()
    def __init__(
        self, model, prompts, n, end_of_text, rng, max_new_tokens=10**9, temperature=1.0
    ):
        self.model, self.end_of_text, self.rng = model, end_of_text, rng
        self.temperature = temperature
        n_prompts, length = prompts.shape
        self.max_new_tokens = min(max_new_tokens, model.config.block_size - length)
        if self.max_new_tokens < 1:
            context = model.config.block_size
            raise UserError(
                f"a prompt of {length} tokens fills the context of {context}"
            )
        size, device = length + self.max_new_tokens, prompts.device
        dtype = model.lm_head.weight.dtype
        self.cache = KVCache(model.config, n_prompts, size, device, dtype)
        positions = torch.arange(length, device=device).expand(n_prompts, -1)
        hidden = model.model(prompts, positions, cache=self.cache)
        self.hidden = hidden[:, -1]  # (P, C)
        self.tokens = torch.empty(n_prompts, 0, dtype=torch.int64, device=device)
        rows = torch.arange(n_prompts, device=device)
        self.select_rows(rows.repeat_interleave(n))

    def select_rows(self, rows):
        """Continue with these rows only, in this order. A row may be repeated."""
        self.hidden, self.tokens = self.hidden[rows], self.tokens[rows]
        self.cache.select_rows(rows)

    @torch.no_grad()
    def generate(self, count=10**9):
        """Sample up to `count` more tokens in every row.

        Returns all sampled tokens, one array per row, up to its end-of-text.
        """
        for _ in range(min(count, self.max_new_tokens - self.tokens.size(1))):
            finished = (self.tokens == self.end_of_text).any(1)  # (P*n,)
            if finished.all():
                break
            if self.tokens.size(1) > 0:
                last = self.tokens[:, -1:]
                positions = torch.full_like(last, self.cache.length)
                hidden = self.model.model(last, positions, cache=self.cache)
                self.hidden = hidden[:, -1]  # (P*n, C)
            logits = self.model.lm_head(self.hidden)  # (P*n, V)
            token = sample_token(logits, self.rng, self.temperature)
            token = torch.where(finished, self.end_of_text, token)
            self.tokens = torch.cat([self.tokens, token[:, None]], 1)
        responses = []
        for row in self.tokens.cpu().numpy():
            length = (row != self.end_of_text).sum() + 1  # with end-of-text, if any
            responses.append(row[:length])
        return responses


def sample_token(logits, rng, temperature):
    """Sample one token from each row of logits. (rows, V) -> (rows,)"""
    if temperature == 0:
        return logits.argmax(1)
    probs = (logits.float() / temperature).softmax(1)
    # Exponential race: of waiting times with rates p, each is the shortest with
    # probability p.
    uniform = torch.rand(probs.shape, generator=rng, device=probs.device)
    waiting_times = -uniform.log() / probs
    return waiting_times.argmin(1)


def sample_responses(
    model, tokenizer, prompts, n, seed, max_new_tokens=10**9, max_rows=256
):
    """Sample n responses to each prompt (token ids). Return an Example for each.

    Prompts of one length are sampled together, in batches of about max_rows responses,
    or fewer if their keys and values need more than MAX_CACHE bytes. A response ends
    with end-of-text, unless it reaches max_new_tokens before.
    """
    config = model.config
    rng = torch.Generator(model.device).manual_seed(seed)
    bytes_per_token = 2 * config.n_layer * config.n_kv_head * config.head_dim * 4
    examples = [None] * len(prompts)
    progress = tqdm(total=len(prompts), desc="sampling", disable=None, leave=False)
    for length in sorted({len(prompt) for prompt in prompts}):
        same_length = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        max_tokens = min(length + max_new_tokens, config.block_size)
        rows = min(max_rows, MAX_CACHE // (bytes_per_token * max_tokens))
        for group in chunks(same_length, max(1, rows // n)):
            tokens = np.stack([prompts[i] for i in group]).astype(np.int64)
            tokens = torch.from_numpy(tokens).to(model.device)
            sampler = Sampler(
                model, tokens, n, tokenizer.end_of_text, rng, max_new_tokens
            )
            responses = sampler.generate()
            for i, own_responses in zip(group, chunks(responses, n)):
                examples[i] = Example(prompts[i], tuple(own_responses))
            progress.update(len(group))
    progress.close()
    return examples


def keep_finished(examples, tokenizer):
    """Keep only the responses that end with end-of-text."""
    finished = []
    for example in examples:
        responses = []
        for response in example.responses:
            if len(response) and response[-1] == tokenizer.end_of_text:
                responses.append(response)
        finished.append(Example(example.prompt, tuple(responses)))
    return finished


# Scoring candidates -------------------------------------------------------------------


def candidate_rewards(model, examples):
    """`score` for many responses per prompt. Equal responses are scored once."""
    parts, example_indices = [], []
    for i, example in enumerate(examples):
        distinct = {response.tobytes(): response for response in example.responses}
        for responses in chunks(distinct.values(), RESPONSES_PER_ROW):
            parts.append(Example(example.prompt, tuple(responses)))
            example_indices.append(i)
    rewards_of = [{} for _ in examples]
    for i, part, rewards in zip(example_indices, parts, score(model, parts)):
        for response, reward in zip(part.responses, rewards):
            rewards_of[i][response.tobytes()] = reward
    results = []
    for rewards, example in zip(rewards_of, examples):
        results.append([rewards[response.tobytes()] for response in example.responses])
    return results


def final_rewards(model, examples):
    """The reward of every response, one array per Example."""
    results = []
    for rewards in candidate_rewards(model, examples):
        results.append(np.array([response[-1] for response in rewards]))
    return results


def check_same_tokenizer(name, its_tokenizer, tokenizer):
    if its_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"the {name} and the reward model use different tokenizers")


# Best-of-n ----------------------------------------------------------------------------


def best_of_n(rewards, gold_scores, n):
    """Expected gold score of the highest-reward candidate among n of M, exactly.

    The n candidates are drawn without replacement. All are among the c lowest rewards
    with probability C(c, n) / C(M, n). Tied candidates are averaged.
    For example, best_of_n([0.1, 0.9, 0.5], [0, 3, 0], 2) is 2.0, because the second
    candidate is in two of the three subsets.
    """
    # task 6
    M, expected, n_below = len(rewards), 0.0, 0
    rewards, gold_scores = np.asarray(rewards), np.asarray(gold_scores, dtype=float)
    for reward in np.unique(rewards):
        tied = rewards == reward
        n_not_above = n_below + int(tied.sum())
        ways = math.comb(n_not_above, n) - math.comb(n_below, n)
        expected += ways / math.comb(M, n) * gold_scores[tied].mean()
        n_below = n_not_above
    return float(expected)
    # end


def interval_by_prompt(values, prompts, rng):
    """95% bootstrap interval of the mean of values. It resamples whole prompts."""
    indices = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    prompt_indices = [indices[prompt] for prompt in prompts]
    totals = np.bincount(prompt_indices, values)  # (prompts,)
    counts = np.bincount(prompt_indices)  # (prompts,)
    samples = rng.integers(len(totals), size=(BOOTSTRAP_SAMPLES, len(totals)))
    means = totals[samples].sum(1) / counts[samples].sum(1)  # (BOOTSTRAP_SAMPLES,)
    return np.quantile(means, [0.025, 0.975]).tolist()


def best_of_n_curve(rewards, gold_scores, prompts):
    """Best-of-n for n = 1, 2, 4, ..., as rows of a table.

    All rows use the sets with at least as many candidates as the largest n. That is the
    largest power of two that at least half of the sets reach.

    rewards, gold_scores: one list per set of candidates. prompts: the sets' prompts
    random, oracle: a random candidate, and the best of n by gold score
    kl_at_most: upper bound of the KL divergence from the generator, log n - (n - 1) / n
    """
    rows, rng, n = [], np.random.default_rng(0), 1
    median_size = sorted(map(len, rewards))[len(rewards) // 2]
    largest_n = 2 ** int(math.log2(median_size))
    sets = []
    for candidates in zip(rewards, gold_scores, prompts):
        if len(candidates[0]) >= largest_n:
            sets.append(candidates)
    n_small = len(rewards) - len(sets)
    if n_small > 0:
        print(
            f"{n_small} of {len(rewards)} prompts are left out of the curve. They have "
            f"fewer than {largest_n} candidates"
        )
    used_prompts = [prompt for _, _, prompt in sets]
    while n <= largest_n:
        selected, random, oracle = [], [], []
        for r, gold, _ in sets:
            selected.append(best_of_n(r, gold, n))
            random.append(np.mean(gold))
            oracle.append(best_of_n(gold, gold, n))
        low, high = interval_by_prompt(selected, used_prompts, rng)
        row = {
            "n": n,
            "prompts": len(set(used_prompts)),
            "kl_at_most": math.log(n) - (n - 1) / n,
            "reward_model": float(np.mean(selected)),
            "low": low,
            "high": high,
            "random": float(np.mean(random)),
            "oracle": float(np.mean(oracle)),
        }
        rows.append(row)
        n *= 2
    return rows


# Successive halving -------------------------------------------------------------------


def halve(rewards, lengths):
    """Drop the worse half of the candidates at each of these lengths.

    rewards: for each candidate, the rewards of all its prefixes
    lengths: increasing numbers of tokens
    Returns the index of the selected candidate, and the tokens generated in all.
    For example, halve([[0, 9], [1, 2], [0, 5]], [1]) is (0, 5). After one token,
    candidates 1 and 0 are kept and generated to the end. Then 0 has the higher reward.
    """
    alive, generated = list(range(len(rewards))), [0] * len(rewards)
    longest = max(len(prefix_rewards) for prefix_rewards in rewards)
    for length in (*lengths, longest):
        for i in alive:
            generated[i] = min(length, len(rewards[i]))
        alive.sort(key=lambda i: rewards[i][generated[i] - 1], reverse=True)
        alive = alive[: math.ceil(len(alive) / 2)]
    return alive[0], sum(generated)


def best_of_n_at_budget(rewards, gold_scores, share):
    """Best-of-n with n = share * M, interpolated between whole numbers."""
    n, remainder = divmod(max(1.0, share * len(gold_scores)), 1)
    value = best_of_n(rewards, gold_scores, int(n))
    if remainder > 0:
        next_value = best_of_n(rewards, gold_scores, int(n) + 1)
        value += remainder * (next_value - value)
    return value


def compare_strategies(rewards, gold_scores, prompts, lengths, exact=None):
    """Gold score and generated tokens per prompt of several ways to select a response.

    rewards: for each set of candidates, a list of arrays of prefix rewards
    exact: the toy world's exact values in the same shape. They are used for halving too
    Returns the rows of a table.
    """
    n_candidates = np.array([len(candidates) for candidates in rewards])
    all_tokens = np.array([sum(map(len, candidates)) for candidates in rewards])
    random = [np.mean(gold) for gold in gold_scores]
    rows = [
        summarize("random", "single sample", random, all_tokens / n_candidates, prompts)
    ]
    final, best = [], []
    for candidates, gold in zip(rewards, gold_scores):
        final.append([prefix_rewards[-1] for prefix_rewards in candidates])
        best.append(best_of_n(final[-1], gold, len(gold)))
    rows.append(summarize("reward model", "best of all", best, all_tokens, prompts))
    selected, tokens = select_by_halving(rewards, gold_scores, lengths)
    at_budget = list(map(best_of_n_at_budget, final, gold_scores, tokens / all_tokens))
    rows.append(
        summarize("reward model", "best-of-n, same tokens", at_budget, tokens, prompts)
    )
    rows.append(summarize("reward model", "halving", selected, tokens, prompts))
    if exact is not None:
        selected, tokens = select_by_halving(exact, gold_scores, lengths)
        rows.append(summarize("exact value", "halving", selected, tokens, prompts))
    oracle = [max(gold) for gold in gold_scores]
    rows.append(summarize("oracle", "best of all", oracle, all_tokens, prompts))
    return rows


def select_by_halving(rewards, gold_scores, lengths):
    """The selected candidates' gold scores, and the tokens generated per prompt."""
    selected, tokens = [], []
    for candidates, gold in zip(rewards, gold_scores):
        winner, n_tokens = halve(candidates, lengths)
        selected.append(gold[winner])
        tokens.append(n_tokens)
    return selected, np.array(tokens)


def summarize(selector, strategy, gold_scores, tokens, prompts):
    """One row of the table of strategies, with the interval of the gold score."""
    low, high = interval_by_prompt(gold_scores, prompts, np.random.default_rng(0))
    return {
        "selector": selector,
        "strategy": strategy,
        "tokens": float(np.mean(tokens)),
        "gold": float(np.mean(gold_scores)),
        "low": low,
        "high": high,
    }


def halving_online(model, generator, dataset, examples, lengths, config, score_gold):
    """Halving while sampling, which is what saves tokens. One more row of the table.

    examples: prompts with finished candidates. If no survivor finishes, the first one
        of these is selected
    score_gold: Examples -> a list of gold scores for each
    """
    rng = torch.Generator(generator.device).manual_seed(config.seed)
    end, selected, tokens = dataset.tokenizer.end_of_text, [], []
    for prompt, complete in tqdm(examples, "halving", disable=None, leave=False):
        prompt_tokens = torch.from_numpy(prompt.astype(np.int64))[None]  # (1, T)
        prompt_tokens = prompt_tokens.to(generator.device)
        sampler = Sampler(
            generator, prompt_tokens, config.samples, end, rng, config.max_new_tokens
        )
        n_tokens = 0
        for length in (*lengths, config.max_new_tokens):
            responses = sampler.generate(length - sampler.tokens.size(1))
            rewards = final_rewards(model, [Example(prompt, tuple(responses))])[0]
            order = np.argsort(-rewards, kind="stable")
            n_kept = math.ceil(len(order) / 2)
            n_tokens += sum(len(responses[i]) for i in order[n_kept:])
            kept = order[:n_kept]
            sampler.select_rows(torch.from_numpy(kept).to(generator.device))
        tokens.append(n_tokens + sum(len(responses[i]) for i in kept))
        finished = [responses[i] for i in order if responses[i][-1] == end]
        winner = finished[0] if finished else complete[0]
        selected.append(Example(prompt, (winner,)))
    gold_scores = [scores[0] for scores in score_gold(selected)]
    strategy = "halving while sampling"
    prompt_indices = range(len(examples))
    return summarize("reward model", strategy, gold_scores, tokens, prompt_indices)


def parse_lengths(text):
    """'12,20,28' -> [12, 20, 28]. They must increase."""
    lengths = [int(part) if part.isdecimal() else 0 for part in text.split(",") if part]
    for before, after in zip([0, *lengths], lengths):
        if after <= before:
            raise UserError(
                "--halving_lengths takes increasing numbers of tokens such as "
                f"12,20,28, not {text!r}"
            )
    return lengths


# Candidates ---------------------------------------------------------------------------


def open_generator(tokenizer, checkpoint, config):
    """The reward model's generator and dataset, and the function that scores gold.

    Returns LanguageModel, Dataset, and a function: Examples -> a list of gold scores
    for each. The scores are the judge's rewards, or the toy world's true qualities.
    """
    settings, inputs = checkpoint["settings"], checkpoint["inputs"]
    folder = find_near(checkpoint, settings["generator"])
    generator, _ = load_generator(folder, config.device, inputs["p"])
    dataset = open_dataset(settings["dataset"], checkpoint)
    if config.judge:
        judge, its_tokenizer, _ = load_reward_model(config.judge, config.device)
        check_same_tokenizer("judge", its_tokenizer, tokenizer)
        if judge.config.block_size < generator.config.block_size:
            raise UserError("the judge's context is shorter than the generator's")
        return generator, dataset, partial(final_rewards, judge)
    if dataset.kind != "toy":
        raise UserError("name a judge of the sampled responses with --judge=DIR")
    world = World(**dataset.metadata["world"])

    def score_quality(examples):
        scores = []
        for example in examples:
            texts = map(tokenizer.decode, example.responses)
            scores.append([float(world.true_quality(text)) for text in texts])
        return scores

    return generator, dataset, score_quality


def sample_candidates(generator, dataset, config):
    """Sample responses to prompts of val. Returns Examples with finished responses."""
    prompts = dataset.split("val").prompts()[: config.prompts]
    examples = sample_responses(
        generator,
        dataset.tokenizer,
        prompts,
        config.samples,
        config.seed,
        config.max_new_tokens,
    )
    finished = keep_finished(examples, dataset.tokenizer)
    finished = [example for example in finished if example.responses]
    if not finished:
        raise UserError("no response was finished. Raise --max_new_tokens")
    total = sum(len(example.responses) for example in finished)
    print(f"{total} of {len(prompts) * config.samples} responses were finished")
    return finished


def exact_values(dataset, examples):
    """The toy world's exact value of every prefix, in the shape of `score`'s result."""
    world, encode = World(**dataset.metadata["world"]), dataset.tokenizer.encode
    encode, end = lru_cache(maxsize=None)(encode), dataset.tokenizer.end_of_text
    values = []
    for example in examples:
        values.append([])
        for response in example.responses:
            rows = world.trace(response.tolist(), encode, end, strict=False)
            values[-1].append(np.array([value for _, value, _, _ in rows]))
    return values


def print_rows(rows):
    """Print dictionaries with the same keys as a table."""
    lines = [[key.replace("_", " ") for key in rows[0]]]
    for row in rows:
        lines.append([format_cell(value) for value in row.values()])
    print_lines(lines)


def main(config):
    check_range(config, 1, 10**9, "prompts", "samples", "max_new_tokens")
    check_range(config, 0, 10**9, "seed")
    check_range(config, 0, 1, "max_bad_fraction")
    lengths = parse_lengths(config.halving_lengths)
    if config.candidates and config.judge:
        raise UserError("--candidates=FILE already holds scores. Leave out --judge")
    model, tokenizer, checkpoint = load_reward_model(config.checkpoint, config.device)
    exact = None
    if config.candidates:
        from data.formats import print_prompt_hint, read_candidates

        items, examples, n_skipped = read_candidates(
            config.candidates,
            tokenizer,
            model.config.block_size,
            config.wrap_as_chat,
            config.max_bad_fraction,
        )
        print_prompt_hint(config.candidates, items, tokenizer, checkpoint["is_chat"])
        gold_scores = [item.labels for item in items]
        prompts = [item.prompt for item in items]
    else:
        generator, dataset, score_gold = open_generator(tokenizer, checkpoint, config)
        examples = sample_candidates(generator, dataset, config)
        gold_scores, prompts = score_gold(examples), list(range(len(examples)))
        n_finished = sum(len(example.responses) for example in examples)
        n_prompts = min(config.prompts, len(dataset.split("val").prompts()))
        n_skipped = n_prompts * config.samples - n_finished
        if lengths and dataset.kind == "toy":
            exact = exact_values(dataset, examples)
    rewards = candidate_rewards(model, examples)
    final = []
    for candidates in rewards:
        final.append([prefix_rewards[-1] for prefix_rewards in candidates])
    results = {
        "candidates": sum(len(scores) for scores in gold_scores),
        "skipped": n_skipped,  # rows of the file, or unfinished responses
        "settings": dataclasses.asdict(config),
        "curve": best_of_n_curve(final, gold_scores, prompts),
    }
    print_rows(results["curve"])
    if lengths:
        rows = compare_strategies(rewards, gold_scores, prompts, lengths, exact)
        if not config.candidates:
            rows.append(
                halving_online(
                    model, generator, dataset, examples, lengths, config, score_gold
                )
            )
        results["strategies"] = rows
        print_rows(rows)
    if config.json:
        inputs = config.checkpoint, config.candidates, config.judge
        with open_output(config.json, *inputs) as file:
            file.write(format_json(results))


if __name__ == "__main__":
    run_script(BonConfig, main)
