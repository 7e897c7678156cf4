"""What reading every prompt once, unpadded and with p stored is worth: the same batches in turn.

    python bench.py                     minutes on two CPU cores
    python bench.py --device=cuda --n_layer=12 --n_head=12 --n_embd=768 --vocab_size=50257

The padded step is the obvious one: every response is a row that begins with its prompt, all rows
are padded to the longest of the batch, and the generator reads them too, at every step (or p is
stored). The last step is train.py's. All make logits for the chosen responses only. Lengths are
those of real pairs (data/lengths.json), tokens are random: speed does not depend on them. Ratios
are within a turn: a machine that drifts drifts for all. The fraction of the peak is that of useful
work, every distinct token counted once, against a large matrix product timed in the same turn.
Left out: memory, sampling, evaluation, other people's trainers.
"""
import json
import platform
import time
from dataclasses import dataclass
from functools import partial

from config import HERE, autocast, choose, in_range, pick_device, run_script
import numpy as np
import torch
from tqdm import tqdm

from data.rows import Row, make_batch, make_targets
from model import LanguageModel, ModelConfig
from train import (REGULARIZERS, RewardModel, bradley_terry, forward, make_optimizer, normalised,
                   read_out, update)

STEPS = ("padded, p at each step", "padded, p stored", "train.py's step")


@dataclass(frozen=True)
class BenchConfig:
    lengths: str = "hh"         # of real pairs, in tokens: hh (HH-RLHF) or gsm8k
    n_layer: int = 6            # transformer blocks, of reward model and generator
    n_head: int = 6             # attention heads
    n_embd: int = 384           # channels
    vocab_size: int = 4096      # tokens in the vocabulary
    pairs: int = 16             # pairs per batch
    repeats: int = 5            # turns; each takes another batch
    device: str = "auto"        # auto, cpu, cuda, cuda:N
    dtype: str = "auto"         # auto (bfloat16 on CUDA), float32, bfloat16
    compile: bool = False       # torch.compile the transformer


def random_pairs(lengths, config, turn):
    """One turn's batch: Rows as long as real pairs, and p of both responses of each."""
    rng, rows = np.random.default_rng(turn), []
    for i in rng.permutation(len(lengths))[:config.pairs]:
        prompt, *sides = (rng.integers(config.vocab_size, size=n) for n in lengths[i])
        rows.append(Row(prompt, tuple(sides)))
    return rows, [[rng.random(len(side), np.float32) for side in row.responses] for row in rows]


def padded(rows, asked):
    """Every response a row from its prompt's start, in one group; with the likelihoods of the first
    `asked` of them.  -> Batch"""
    apart = [Row(row.prompt, (row.responses[side],)) for side in (0, 1) for row in rows]
    return make_batch(apart, asked, [range(len(apart))])


class Bench:
    """A generator and a reward model; step(name, ...) is one update in one of the ways."""

    def __init__(self, config, device, block_size):
        torch.manual_seed(0)
        self.config, self.device, self.S = config, device, torch.tensor(0.5, device=device)
        self.generator = LanguageModel(ModelConfig(
            config.vocab_size, block_size, config.n_layer, config.n_head, config.n_embd))
        self.generator.to(device).eval().requires_grad_(False)
        self.model = RewardModel.from_generator(self.generator).to(device)
        self.optimizer = make_optimizer(self.model, 1e-5)
        if config.compile:
            self.model.model.compile(dynamic=True)

    def step(self, name, rows, probs):
        """One update with train.py's default objective; -> its terms"""
        B, (mask, p) = len(rows), make_targets(probs)                   # (2B, T), (2B, T-1)
        mask, p = mask.to(self.device), p.to(self.device)
        with autocast(self.device, self.config.dtype):
            if name == STEPS[0]:
                p = self.generator(padded(rows, 2 * B).to(self.device)).exp()       # (M,)
                p = torch.zeros(mask.shape, device=self.device).masked_scatter(mask, p)[:, 1:]
            batch = make_batch(rows, B) if name == STEPS[2] else padded(rows, B)
            a, lm = forward(self.model, batch.to(self.device), B, 1.0)  # (2B, T), ()
        r = read_out(a, mask, "last")
        bt, _ = bradley_terry(r, mask)
        reg, self.S = normalised(*REGULARIZERS["icrm"](r, p, mask), self.S)
        (lm + 0.5 * reg + 0.5 * bt).backward()
        update(self.model, self.optimizer, 1e-5)
        return {"bt": bt.item(), "reg": reg.item(), "lm": lm.item()}


def useful_work(rows, model):
    """Operations of a step that nothing can do without: forward and backward of the blocks on every
    distinct token, of attention to what it sees, and of the LM head on the chosen responses."""
    sizes, tokens, seen = model.model.config, sum(row.size for row in rows), 0
    weights = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    for prompt, responses, _ in rows:
        for before, part in ((0, prompt), *((len(prompt), response) for response in responses)):
            seen += len(part) * before + len(part) * (len(part) + 1) // 2
    attention = 4 * sizes.n_layer * sizes.n_head * sizes.head_dim * seen
    head = 2 * model.lm_head.weight.numel() * sum(len(row.responses[0]) for row in rows)
    return 3 * (2 * weights * tokens + attention + head)


def seconds(call, device):
    """How long a call takes, the device's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    wait(device)
    started = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - started


def matrix_peak(device, dtype):
    """Operations per second of a large matrix product in the step's precision, just now."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device)
    with autocast(device, dtype):
        return max(2 * n ** 3 / seconds(partial(torch.matmul, a, b), device) for _ in range(4))


def measure_steps(bench, lengths):
    """Print the speed of every step on the same batches in turn."""
    config, device = bench.config, bench.device
    found, work, tokens = [], [], []
    turns = range(-1 - config.compile, config.repeats)      # the first ones warm up
    for turn in tqdm(turns, "steps", disable=None, leave=False):
        rows, probs = random_pairs(lengths, config, turn + 2)
        times = [seconds(partial(bench.step, name, rows, probs), device) for name in STEPS]
        if turn >= 0:
            found.append(times)
            work.append(useful_work(rows, bench.model) / matrix_peak(device, config.dtype))
            tokens.append(sum(row.size for row in rows))
    times = np.array(found).T                                           # (steps, turns)
    print(f"{'step':24}{'pairs/s':>9}{'tokens/s':>10}{'of peak':>9}  its time / train.py's")
    for name, t in zip(STEPS, times):
        low, middle, high = np.quantile(t / times[2], (0, 0.5, 1))
        print(f"{name:24}{np.median(config.pairs / t):9.2f}{np.median(tokens / t):10.0f}"
              f"{np.median(work / t):9.2f}  {middle:.2f} ({low:.2f} to {high:.2f})")


def main(config):
    everything = json.loads((HERE / "data" / "lengths.json").read_text())
    choose("lengths", config.lengths, everything)
    lengths = everything[config.lengths]
    in_range(config, 1, 10**6, "n_layer", "n_head", "n_embd", "vocab_size", "repeats")
    in_range(config, 1, len(lengths), "pairs")
    device = pick_device(config.device)
    longest = max(prompt + max(sides) for prompt, *sides in lengths)
    bench = Bench(config, device, longest)
    cpu = f"{torch.get_num_threads()} threads of {platform.machine()}"
    print(torch.cuda.get_device_name(device) if device.type == "cuda" else cpu, torch.__version__)
    measure_steps(bench, lengths)


if __name__ == "__main__":
    run_script(BenchConfig, main)
