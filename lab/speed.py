"""How much faster the training step is than a simple padded one, on the same lengths.

    python lab/speed.py                     minutes on two CPU cores
    python lab/speed.py --lengths=gsm8k
    python lab/speed.py --device=cuda --n_layer=12 --n_head=12 --n_embd=768 \\
        --vocab_size=50257

1. The padded step has one row per response, prompt and response, so each prompt is
   computed twice. Its batches are random. The generator runs in every step.
2. The same, but p is stored.
3. train.py's step reads one row per pair, in batches of similar length. p is stored.

In all three, the reward model's LM head sees chosen responses only. The generator of
step 1 computes the logits of both.

Lengths are those of 512 real pairs (lab/lengths.json). Tokens are random, which does
not change the speed. In a turn, train.py's step
reads all pairs and the padded steps read a few batches. Relative times compare
steps of the same turn, because the speed of a machine varies. "Of peak" is the useful
work per second, relative to a large matrix product in the same turn. Useful work counts
every prompt once, and no padding.
"""

import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ROOT, autocast, check_choice, check_range, pick_device, run_script
import numpy as np
import torch
from tqdm import tqdm

from data.batch import Example, collate, epoch_batches
from model import (
    LanguageModel,
    ModelConfig,
    RewardModel,
    length_normalized_nll,
    make_optimizer,
    update,
)
from regularizer import icrm
from train import (
    LM_GRADIENT_SCALE,
    bradley_terry,
    collate_probs,
    divide_by_running_mean,
    scale_gradient,
)

STEPS = ("padded, generator in every step", "padded, p stored", "train.py's step")


@dataclass(frozen=True)
class SpeedConfig:
    lengths: str = "hh"  # of real pairs, in tokens: hh (HH-RLHF) or gsm8k
    n_layer: int = 6  # transformer blocks of reward model and generator
    n_head: int = 6  # attention heads
    n_embd: int = 384  # channels
    vocab_size: int = 4096  # tokens in the vocabulary
    pairs: int = 16  # pairs per batch
    padded_batches: int = 4  # about so many batches the padded steps read per turn
    turns: int = 3  # passes of train.py's step over all pairs
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto (bfloat16 on CUDA), float32, bfloat16
    compile: bool = False  # torch.compile the transformer


def random_pairs(lengths, indices, config, seed):
    """Random tokens with the lengths of these pairs.

    Returns Examples, and random p of both responses of each.
    """
    rng = np.random.default_rng(seed)
    examples, probs = [], []
    for i in indices:
        parts = [rng.integers(config.vocab_size, size=length) for length in lengths[i]]
        examples.append(Example(parts[0], tuple(parts[1:])))
        probs.append([rng.random(len(part), np.float32) for part in parts[1:]])
    return examples, probs


def collate_padded(examples):
    """One row for every response, beginning with its prompt. Chosen rows come first."""
    rows = []
    for side in (0, 1):
        for example in examples:
            rows.append(Example(example.prompt, (example.responses[side],)))
    return collate(rows)


class Benchmark:
    """A generator and a reward model. step(name, ...) is one update of the latter."""

    def __init__(self, config, device, block_size):
        torch.manual_seed(0)
        sizes = config.n_layer, config.n_head, config.n_embd
        self.config, self.device = config, device
        self.S = torch.tensor(0.5, device=device)
        self.generator = LanguageModel(
            ModelConfig(config.vocab_size, block_size, *sizes)
        )
        self.generator.to(device).eval().requires_grad_(False)
        self.model = RewardModel.from_generator(self.generator).to(device)
        self.optimizer = make_optimizer(self.model, 1e-5)
        if config.compile:
            self.model.model.compile(dynamic=True)

    def step(self, name, examples, probs):
        """One update with train.py's default objective. Returns its terms."""
        collate_batch = collate if name == STEPS[2] else collate_padded
        batch = collate_batch(examples).to(self.device)
        with autocast(self.device, self.config.dtype):
            if name == STEPS[0]:
                hidden = self.generator.hidden_states(batch)
                p = self.generator.lm_logprobs(hidden, batch).exp()[:, 1:]
            else:
                p, _ = collate_probs(probs)
                p = p.to(self.device)  # (2B, T-1)
            hidden = self.model.hidden_states(batch)
            rewards = self.model.prefix_rewards(hidden, batch)  # (2B, T)
            n_pairs = len(examples)
            hidden = scale_gradient(hidden, LM_GRADIENT_SCALE)
            logprobs = self.model.lm_logprobs(hidden, batch, first_rows=n_pairs)
            loss_lm = length_normalized_nll(logprobs, batch.mask[:n_pairs])
        loss_bt, _ = bradley_terry(rewards, batch.mask)
        penalty, scale = icrm(rewards, p, batch.mask)
        loss_reg, self.S = divide_by_running_mean(penalty, scale, self.S)
        (loss_lm + 0.5 * loss_reg + 0.5 * loss_bt).backward()
        update(self.model, self.optimizer, 1e-5)
        return {"bt": loss_bt.item(), "reg": loss_reg.item(), "lm": loss_lm.item()}


def useful_work(examples, model):
    """Floating-point operations that a training step cannot avoid.

    Forward and backward pass of the blocks on every token of the pairs, of attention on
    what the token sees, and of the LM head on the chosen responses.
    """
    config, n_tokens, n_visible, n_chosen = model.config, 0, 0, 0
    for prompt, responses in examples:
        n_tokens += len(prompt) + sum(map(len, responses))
        n_visible += len(prompt) * (len(prompt) + 1) // 2
        for response in responses:
            n_visible += len(response) * len(prompt)
            n_visible += len(response) * (len(response) + 1) // 2
        n_chosen += len(responses[0])
    weights = 0
    for parameter in model.model.layers.parameters():
        if parameter.dim() == 2:
            weights += parameter.numel()
    attention = 4 * config.n_layer * config.n_head * config.head_dim * n_visible
    lm_head = 2 * model.lm_head.weight.numel() * n_chosen
    return 3 * (2 * weights * n_tokens + attention + lm_head)


def measure_seconds(device, function, *arguments):
    """How long a call takes, including the work that it started on the device."""
    wait_for_device(device)
    started = time.perf_counter()
    function(*arguments)
    wait_for_device(device)
    return time.perf_counter() - started


def wait_for_device(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_peak(device, dtype):
    """Operations per second of a large matrix product in this precision."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device)
    seconds = []
    with autocast(device, dtype):
        for _ in range(4):
            seconds.append(measure_seconds(device, torch.matmul, a, b))
    return 2 * n**3 / min(seconds)


def measure_turn(benchmark, lengths, turn):
    """{step: (pairs, tokens, useful operations, seconds)} of one turn.

    train.py's step reads all pairs, in the batches of one epoch. The padded steps read
    a few random batches, spread over the turn.
    """
    config, totals = benchmark.config, {}
    n_tokens = np.array([prompt + sum(responses) for prompt, *responses in lengths])
    epoch = epoch_batches(n_tokens, config.pairs, turn, epoch=0)
    shuffled = np.random.default_rng(turn).permutation(len(lengths))
    every = max(1, len(epoch) // config.padded_batches)
    for number, batch in enumerate(epoch):
        add_step(benchmark, STEPS[2], lengths, batch, totals)
        if number % every == 0:
            start = number * config.pairs
            batch = shuffled[start : start + config.pairs]
            for name in STEPS[:2]:
                add_step(benchmark, name, lengths, batch, totals)
    return totals


def add_step(benchmark, name, lengths, batch, totals):
    """Run a step on these pairs, and add its measurements to totals[name]."""
    examples, probs = random_pairs(lengths, batch, benchmark.config, seed=0)
    arguments = name, examples, probs
    seconds = measure_seconds(benchmark.device, benchmark.step, *arguments)
    n_tokens = sum(example.length for example in examples)
    work = useful_work(examples, benchmark.model)
    measured = np.array([len(examples), n_tokens, work, seconds])
    totals[name] = totals.get(name, 0) + measured


def measure_steps(benchmark, lengths):
    """Print the speed of every step, and its time per pair relative to train.py's."""
    config, device = benchmark.config, benchmark.device
    rates = {name: [] for name in STEPS}
    for name in STEPS * 2:  # warm up
        add_step(benchmark, name, lengths, range(config.pairs), {})
    for turn in tqdm(range(config.turns), "turns", disable=None):
        totals = measure_turn(benchmark, lengths, turn)
        peak = measure_peak(device, config.dtype)
        train_pairs, _, _, train_seconds = totals[STEPS[2]]
        for name, (pairs, tokens, work, seconds) in totals.items():
            relative_time = (seconds / pairs) / (train_seconds / train_pairs)
            speeds = pairs / seconds, tokens / seconds, work / seconds / peak
            rates[name].append([*speeds, relative_time])
    print(f"{'step':32}{'pairs/s':>8}{'tokens/s':>10}{'of peak':>8}  relative time")
    for name in STEPS:
        pairs, tokens, of_peak, ratio = np.median(rates[name], axis=0)
        ratios = [rate[3] for rate in rates[name]]
        print(
            f"{name:32}{pairs:8.2f}{tokens:10.0f}{of_peak:8.2f}"
            f"  {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def main(config):
    all_lengths = json.loads((ROOT / "lab" / "lengths.json").read_text())
    check_choice("lengths", config.lengths, all_lengths)
    lengths = all_lengths[config.lengths]
    check_range(config, 1, 10**6, "n_layer", "n_head", "n_embd", "vocab_size", "turns")
    check_range(config, 1, len(lengths), "pairs")
    check_range(config, 1, len(lengths) // config.pairs, "padded_batches")
    device = pick_device(config.device)
    block_size = max(prompt + max(responses) for prompt, *responses in lengths)
    benchmark = Benchmark(config, device, block_size)
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device), torch.__version__)
    else:
        threads, machine = torch.get_num_threads(), platform.machine()
        print(f"{threads} threads of {machine}, torch {torch.__version__}")
    measure_steps(benchmark, lengths)


if __name__ == "__main__":
    run_script(SpeedConfig, main)
