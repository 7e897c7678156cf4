"""What every trick of the training step is worth: the plain step and then one trick after the other, in one run.

    python bench.py                                     the table on this machine; about ten minutes on two CPU cores
    python bench.py --device=cuda --n_layer=12 --n_head=12 --n_embd=768 --vocab_size=50257 --compile=True
                                                        GPT-2's size; --pairs=4 where the plain step's logits do not fit

The plain step is the obvious one: the generator reads the batch at every step, every row is read from its start and
padded to the longest of the batch, and the logits of every position are made. The last line is train.py's own step.
Lengths are those of real pairs (runs/lengths.json: HH-RLHF and GSM8K, in tokens of a byte-pair vocabulary of 4096 and
2048), the tokens are random: speed does not depend on them. All variants take the same batches in turn, so that
a machine that drifts drifts for all; speed-ups are ratios within a turn. Useful work counts every distinct
token once, and the peak that it is divided by is a large matrix product's, measured in every turn.
"""
import dataclasses
import json
import platform
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from compare import print_lines
from config import choose, in_range, run_script, show, write_json
from data.batches import Row, collate, pack, pad_right, pair_rows
from evaluate import score
from generator import draw, length_normalised_nll, sample
from model import LanguageModel, ModelConfig, RewardModel, autocast, make_optimizer, pick_device, scale_gradient, update
from regularizer import icrm
from train import TrainConfig, backward, bradley_terry

TRICKS = ("plain step", "+ p stored", "+ logits only where needed", "+ no padding", "+ every prompt read once")
LENGTHS = Path(__file__).resolve().parent / "runs" / "lengths.json"


@dataclass(frozen=True)
class BenchConfig:
    lengths: str = "hh,gsm8k"   # sets of lengths in runs/lengths.json
    n_layer: int = 6            # transformer blocks, of reward model and generator
    n_head: int = 6             # attention heads
    n_embd: int = 384           # channels
    block_size: int = 1024      # longest row, in tokens
    vocab_size: int = 4096      # tokens in the vocabulary
    pairs: int = 16             # pairs per batch
    repeats: int = 5            # turns; each takes another batch
    memory_pairs: int = 4       # pairs per batch where memory is measured, with GPT-2's 50257 tokens
    new_tokens: int = 128       # tokens to sample
    samples: int = 16           # responses to sample at once
    json: str = ""              # write the results here
    seed: int = 0               # of weights, tokens and batches
    device: str = "auto"        # auto, cpu, cuda, cuda:N
    dtype: str = "auto"         # auto (bfloat16 on CUDA), float32, bfloat16
    compile: bool = False       # one line more: the last step through torch.compile


def random_pairs(lengths, config, turn, pairs):
    """One batch of a turn: pairs of Rows with these lengths of prompt, chosen and rejected, and p of each response token."""
    rng = np.random.default_rng([config.seed, turn])
    tokens = lambda n: rng.integers(config.vocab_size, size=n).astype(np.int32)
    found = []
    for i in rng.permutation(len(lengths))[:pairs]:
        prompt, chosen, rejected = lengths[i]
        prompt = tokens(min(prompt, config.block_size - max(chosen, rejected)))
        found.append((Row(prompt, tokens(chosen), False), Row(prompt, tokens(rejected), False)))
    rows = pair_rows(found)
    return rows, [rng.random(len(row.response), np.float32) for row in rows]


class Bench:
    """A reward model, its generator and its optimizer; step(trick, rows, probs) is one update in one of the ways."""

    def __init__(self, config, device):
        torch.manual_seed(config.seed)
        sizes = ModelConfig(config.vocab_size, config.block_size, config.n_layer, config.n_head, config.n_embd)
        self.config, self.device = config, device
        self.generator = LanguageModel(sizes).to(device).eval().requires_grad_(False)
        self.model = RewardModel.from_generator(self.generator).to(device)
        self.optimizer = make_optimizer(self.model, 1e-5, 0.1)
        self.settings = TrainConfig(dtype=config.dtype, device=config.device)
        self.compiled = torch.compile(self.model, dynamic=True) if config.compile else None
        self.S = torch.tensor(0.5, device=device)

    def step(self, trick, rows, probs):
        """The gradient of one batch by the tricks up to this one, and an update; returns the terms of the loss."""
        level = TRICKS.index(trick) if trick in TRICKS else len(TRICKS)
        batch = collate(rows, probs).to(self.device)
        if level >= len(TRICKS) - 1:
            forward = self.compiled if trick not in TRICKS else self.model
            self.S, terms = backward(self.settings, forward, rows, batch, len(rows) // 2, True, self.S)
        else:
            terms = self.slower_step(level, rows, batch)
        update(self.model, self.optimizer, 1e-5, 1.0)
        return terms

    def slower_step(self, level, rows, batch):
        B, settings = len(rows) // 2, self.settings
        tokens, mask, share = padded_tokens(rows).to(self.device), batch.mask, settings.lm_trunk_gradient
        with autocast(self.device, settings.dtype):
            p = batch.probs
            if level < 1:
                with torch.no_grad():
                    p = every_logprob(self.generator.transformer(tokens), self.generator.lm_head, tokens).exp()     # (2B, T-1)
            packed = pack(rows, B, share_prompts=False).to(self.device) if level >= 2 else None
            if level < 3:
                hidden = self.model.transformer(tokens)                                                             # (2B, T, C)
                rewards = (hidden.float() * self.model.score.weight[0]).sum(-1)                                     # (2B, T)
            if level < 2:
                logprobs = every_logprob(scale_gradient(hidden[:B], share), self.model.lm_head, tokens[:B])         # (B, T-1)
                lm = -(torch.where(mask[:B, 1:], logprobs, 0.0).sum(1) / mask[:B, 1:].sum(1)).mean()
            elif level < 3:
                wanted = mask[:B, 1:]
                states = scale_gradient(hidden[:B, :-1][wanted], share)                                             # (M, C)
                logprobs = -F.cross_entropy(self.model.lm_head(states).float(), tokens[:B, 1:][wanted], reduction="none")
                lm = length_normalised_nll(logprobs, packed, B)
            else:
                rewards, logprobs = self.model(packed, share)
                lm = length_normalised_nll(logprobs, packed, B)
        bt, margins = bradley_terry(rewards, batch.last)
        reg, scale = icrm(rewards, p, mask)
        self.S = 0.95 * self.S + 0.05 * scale.detach()
        reg = reg / self.S
        (settings.lm_weight * lm + settings.reg_weight * reg + (1 - settings.reg_weight) * bt).backward()
        return {"outcome": bt.detach(), "reg": reg.detach(), "lm": lm.detach(), "margins": margins.detach()}


def padded_tokens(rows):
    """Rows read each from its start, padded on the right to the longest.  -> (rows, T)"""
    return torch.from_numpy(pad_right([np.concatenate([row.prompt, row.response]) for row in rows]))


def every_logprob(hidden, lm_head, tokens):
    """log P of every next token from the logits of every position.  (rows, T, C), (rows, T) -> (rows, T-1)"""
    return lm_head(hidden).float().log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)


def useful_work(rows, config, vocab_size):
    """Floating-point operations of a step that nothing could do without: forward and backward of the trunk on every
    distinct token, of attention to what stands before it, and of the LM head on the chosen responses."""
    packed, C = pack(rows), config.n_embd
    trunk = config.n_layer * (24 * C * C * len(packed.tokens) + 4 * C * float((packed.positions + 1).sum()))
    head = 2 * C * vocab_size * int(packed.lengths[:len(rows) // 2].sum())
    return 3 * (trunk + head)


def seconds(call, device):
    """How long a call takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def matrix_peak(device, dtype):
    """A function that measures operations per second of a large matrix product in the precision of the step."""
    n = 8192 if device.type == "cuda" else 2048
    with autocast(device, dtype):
        low = torch.is_autocast_enabled(device.type)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if low else torch.float32) for _ in range(2))
    return lambda: max(2 * n ** 3 / seconds(lambda: a @ b, device) for _ in range(4))


def bench_steps(bench, lengths, peak, name):
    """Every trick on the same batches in turn -> (rows of the table, the summary of this set of lengths)."""
    config, device = bench.config, bench.device
    variants = list(TRICKS) + ["+ torch.compile"] * config.compile
    times, peaks, work, real = {variant: [] for variant in variants}, [], [], []
    read, share = {variant: [] for variant in variants}, []
    for turn in tqdm(range(-2 if config.compile else -1, config.repeats), f"steps, {name}", disable=None, leave=False):
        rows, probs = random_pairs(lengths, config, turn + 2, config.pairs)
        found = {variant: seconds(lambda: bench.step(variant, rows, probs), device) for variant in variants}
        if turn < 0:    # the first ones warm up
            continue
        for variant in variants:
            times[variant].append(found[variant])
            level = variants.index(variant)
            read[variant].append(len(rows) * max(map(len, rows)) if level < 3 else len(pack(rows, share_prompts=level > 3).tokens))
        peaks.append(peak())
        work.append(useful_work(rows, config, config.vocab_size))
        real.append(sum(map(len, rows)))
        batch = collate(rows, probs).to(device)
        share.append(seconds(lambda: regularizer_alone(batch), device) / found[TRICKS[-1]])
    plain, fast = np.array(times[TRICKS[0]]), np.array(times[TRICKS[-1]])
    rows = []
    for variant in variants:
        t, padded = np.array(times[variant]), variants.index(variant) < 3
        ratio = plain / t
        rows.append({"trick": variant, "pairs_per_s": float(np.median(config.pairs / t)), "tokens_per_s": float(np.median(real / t)),
                     "padding": float(1 - np.sum(real) / np.sum(read[variant])) if padded else 0.0, "positions_per_pair": float(np.mean(read[variant]) / config.pairs),
                     "peak_fraction": float(np.median(np.array(work) / t / peaks)), "speedup": float(np.median(ratio)),
                     "low": float(ratio.min()), "high": float(ratio.max())})
    return {"speedup": float(np.median(plain / fast)), "peak_fraction": float(np.median(np.array(work) / fast / peaks)),
            "regularizer_share": float(np.median(share)), "peak": float(np.median(peaks)), "steps": rows}


def regularizer_alone(batch):
    """What the regularizer adds to a step: its own forward and backward pass, down to the rewards."""
    rewards = torch.zeros(batch.mask.shape, device=batch.mask.device, requires_grad=True)
    icrm(rewards, batch.probs, batch.mask)[0].backward()


def bare_fraction(bench, peak, width=256):
    """Fraction of the peak of a step with nothing to save: full rows, no shared prompt, Bradley-Terry alone."""
    config, device = bench.config, bench.device
    rng = np.random.default_rng(config.seed)
    rows = [Row(tokens[:8], tokens[8:], False) for tokens in rng.integers(config.vocab_size, size=(2 * config.pairs, width)).astype(np.int32)]
    batch, found = collate(rows).to(device), []

    def step():
        with autocast(device, config.dtype):
            rewards, _ = bench.model(pack(rows, 0).to(device))
        bradley_terry(rewards, batch.last)[0].backward()
        update(bench.model, bench.optimizer, 1e-5, 1.0)
    for _ in range(config.repeats + 1):
        found.append(useful_work(rows, config, 0) / seconds(step, device) / peak())
    return float(np.median(found[1:]))


def bench_sampling(bench):
    """Tokens per second of sampling with the KV cache, and the ratio to reading every prefix again."""
    config, device, model = bench.config, bench.device, bench.generator
    prompt = torch.randint(config.vocab_size, (1, 64), device=device)

    def again():
        rng, tokens = torch.Generator(device).manual_seed(0), prompt.repeat(config.samples, 1)
        for _ in range(config.new_tokens):
            token = draw(model.lm_head(model.transformer(tokens)[:, -1]), rng, 1.0, 1.0)
            tokens = torch.cat([tokens, token[:, None]], 1)
        return tokens[:, 64:]
    cached = lambda: sample(model, prompt, config.samples, -1, torch.Generator(device).manual_seed(0), config.new_tokens)[0]
    with torch.no_grad():
        same = torch.equal(again(), cached())
        slow, fast = ([seconds(call, device) for _ in range(2)] for call in (again, cached))
    ratios = np.array(slow) / fast
    return {"tokens_per_s": config.samples * config.new_tokens / float(np.median(fast)), "speedup": float(np.median(ratios)),
            "low": float(ratios.min()), "high": float(ratios.max()), "same_tokens": same}


def bench_scoring(bench, lengths):
    """Pairs per second of evaluation, and the ratio to reading the rows as they come, padded, 64 at a time."""
    config, device, ratios, fast = bench.config, bench.device, [], []
    for turn in range(3):
        rows, _ = random_pairs(lengths, config, 100 + turn, 64)

        @torch.no_grad()
        def plain():
            for start in range(0, len(rows), 64):
                bench.model.transformer(padded_tokens(rows[start:start + 64]).to(device))
        bare = seconds(plain, device)
        fast.append(seconds(lambda: score(bench.model, rows, device), device))
        ratios.append(bare / fast[-1])
    return {"pairs_per_s": 64 / float(np.median(fast)), "speedup": float(np.median(ratios)), "low": min(ratios), "high": max(ratios)}


def most_resident():
    """The most memory that this process ever had, in bytes."""
    if Path("/proc/self/status").exists():      # getrusage would count the process that started this one
        return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def peak_memory(config, trick, lengths):
    """GiB that a step takes at most, with GPT-2's vocabulary, in a process of its own: (before the step, at its peak)."""
    config = dataclasses.replace(config, vocab_size=50257, compile=False)
    device = pick_device(config.device)
    bench = Bench(config, device)
    rows, probs = random_pairs(lengths, config, 0, config.memory_pairs)
    size = (lambda: torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else most_resident
    before = size()
    for _ in range(2):      # the second one meets the optimizer's state
        bench.step(trick, rows, probs)
    return before / 2 ** 30, size() / 2 ** 30


def main(config):
    show(config)
    in_range(config, 1, 10**6, "n_layer", "n_head", "n_embd", "block_size", "vocab_size", "repeats", "samples")
    device = pick_device(config.device)
    lengths = json.loads(LENGTHS.read_text())
    names = config.lengths.split(",")
    for name in names:
        choose("lengths", name, lengths)
        in_range(config, 1 + max(max(responses) for _, *responses in lengths[name]), 10**6, "block_size")
        in_range(config, 1, len(lengths[name]), "pairs", "memory_pairs")
    in_range(config, 1, config.block_size - 64, "new_tokens")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads of {platform.machine()}"
    bench, peak = Bench(config, device), matrix_peak(device, config.dtype)
    results = {"device": where, "torch": torch.__version__, "settings": dataclasses.asdict(config)}
    print(f"{where}, torch {torch.__version__}")
    for name in names:
        results[name] = found = bench_steps(bench, lengths[name], peak, name)
        print(f"\n{name}: {config.pairs} pairs per batch, median of {config.repeats}; peak {found['peak'] / 1e9:.0f} GFLOP/s; "
              f"the regularizer is {found['regularizer_share']:.1%} of the last step")
        print_lines([["step", "pairs/s", "tokens/s", "padding", "read/pair", "of peak", "speed-up"]] + [
            [row["trick"], f"{row['pairs_per_s']:.2f}", f"{row['tokens_per_s']:.0f}", f"{row['padding']:.0%}", f"{row['positions_per_pair']:.0f}",
             f"{row['peak_fraction']:.2f}", f"{row['speedup']:.2f} ({row['low']:.2f} to {row['high']:.2f})"] for row in found["steps"]])
    first = results[names[0]]
    results |= {key: first[key] for key in ("peak_fraction", "regularizer_share")} | {"bare_fraction": bare_fraction(bench, peak)}
    print(f"\na bare step on full rows: {results['bare_fraction']:.2f} of the peak")
    results["sampling"] = found = bench_sampling(bench)
    print(f"sampling {config.samples} responses of {config.new_tokens} tokens: {found['tokens_per_s']:.0f} tokens/s, {found['speedup']:.1f} "
          f"({found['low']:.1f} to {found['high']:.1f}) times as fast as without the cache, {'the same' if found['same_tokens'] else 'OTHER'} tokens")
    results["scoring"] = found = bench_scoring(bench, lengths[names[0]])
    print(f"scoring: {found['pairs_per_s']:.1f} pairs/s, {found['speedup']:.2f} ({found['low']:.2f} to {found['high']:.2f}) times the plain forward pass")
    del bench, peak     # what they hold on a GPU would be missing below
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        memory = {trick: pool.submit(peak_memory, config, trick, lengths[names[0]]).result() for trick in (TRICKS[0], TRICKS[-1])}
    results["memory_gib"] = {trick: {"before": before, "peak": most} for trick, (before, most) in memory.items()}
    results["memory_ratio"] = memory[TRICKS[-1]][1] / memory[TRICKS[0]][1]
    print(f"peak memory with 50257 tokens, {config.memory_pairs} pairs: " + ", ".join(f"{trick} {most:.2f} GiB" for trick, (_, most) in memory.items())
          + f"; ratio {results['memory_ratio']:.2f}")
    if config.json:
        write_json(config.json, results)


if __name__ == "__main__":
    run_script(BenchConfig, main)
