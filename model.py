"""A GPT-2 shaped transformer, written out, with the two heads of a reward model.

The trunk has GPT-2's architecture and parameter names (Radford et al. 2019), so that its published
weights map by name. `LanguageModel` is the generator: trunk and tied LM head. `RewardModel` is the
trunk, a linear head that reads a reward at every prefix, and an untied LM head for the language-model
term of the objective (GRM, Yang et al., arXiv 2406.10216).

A batch is read packed (data/batches.py): every distinct prompt once, no padding, and only attention
sees rows. Left out: dropout, and any attention mask but the causal one (rows are padded on the right,
where no real token looks).
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from config import UserError, choose

DTYPES = ("auto", "float32", "bfloat16")
LOGITS = 2 ** 26    # logits in memory at once, a quarter of a GiB in fp32


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    block_size: int     # longest row, in tokens
    n_layer: int
    n_head: int
    n_embd: int

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise UserError(f"--n_embd={self.n_embd} does not divide by --n_head={self.n_head}")


class KVCache:
    """Keys and values of the tokens read so far: (rows, n_head, longest, head size) per layer, and their number."""

    def __init__(self, config, rows, longest, device, dtype):
        shape = (config.n_layer, rows, config.n_head, longest, config.n_embd // config.n_head)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.length = 0

    def append(self, layer, k, v):
        """Store k, v (rows, n_head, T, head size) behind what is there; returns all keys and values of the layer."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length:end], self.values[layer, :, :, self.length:end] = k, v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def repeat(self, n):
        """Every row n times, neighbours: one prompt read once and continued n ways."""
        self.keys = self.keys.repeat_interleave(n, dim=1)
        self.values = self.values.repeat_interleave(n, dim=1)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.layer = config.n_head, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, packed=None):
        """x (rows, T, C) -> the same; or of a Packed batch, (N, C) -> the same."""
        qkv = self.c_attn(x)                                                    # (rows, T, 3C) or (N, 3C)
        if packed is None:
            return self.c_proj(self.attend(qkv, cache))
        dealt = [self.attend(F.embedding(cells, qkv)).flatten(0, 1) for cells in packed.groups]
        return self.c_proj(F.embedding(packed.places, torch.cat(dealt)))        # (N, C)

    def attend(self, qkv, cache=None):
        """Every token looks at itself and at what stands before it in its row.  (rows, T, 3C) -> (rows, T, C)"""
        rows, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
        q, k, v = (part.view(rows, T, self.n_head, -1).transpose(1, 2)          # (rows, n_head, T, head size)
                   for part in qkv.split(C, dim=2))
        from_start = cache is None or cache.length == 0
        if cache is not None:
            assert T == 1 or from_start, "several tokens are read into an empty cache only"
            k, v = cache.append(self.layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=from_start)   # one new token sees everything before it
        return y.transpose(1, 2).reshape(rows, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, packed=None):
        x = x + self.attn(self.ln_1(x), cache, packed)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The trunk: tokens (rows, T) -> hidden states (rows, T, C), after the last layer norm.

    With packed, a Packed batch, its tokens (N,) -> (N, C).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.recompute = False      # whether a block's activations are made again in the backward pass
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # residual projections start smaller, as many as are summed
                nn.init.normal_(parameter, std=0.02 / (2 * config.n_layer) ** (0.5 if "c_proj" in name else 0))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens, cache=None, packed=None):
        start = cache.length if cache is not None else 0
        where = self.wpe.weight[start:start + tokens.size(1)] if packed is None else self.wpe(packed.positions)
        x = self.wte(tokens) + where                                            # (rows, T, C) or (N, C)
        for block in self.h:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cache, packed, use_reentrant=False)
            else:
                x = block(x, cache, packed)
        if cache is not None:
            cache.length += tokens.size(1)
        return self.ln_f(x)

    def freeze(self, unfrozen):
        """Let only the last `unfrozen` blocks and the last layer norm learn."""
        self.requires_grad_(False)
        for part in (*self.h[len(self.h) - unfrozen:], self.ln_f):
            part.requires_grad_(True)


class LanguageModel(nn.Module):
    """The generator: trunk and an LM head tied to the embedding."""

    def __init__(self, config):
        super().__init__()
        self.transformer = GPT(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, packed):
        """A Packed batch -> log-probability of each of its M response tokens, (M,)."""
        return token_logprobs(self.transformer(packed.tokens, packed=packed), self.lm_head, packed)


class RewardModel(nn.Module):
    """The trunk, a reward head read at every prefix, and an LM head of its own."""

    def __init__(self, config):
        super().__init__()
        self.transformer = GPT(config)
        self.score = nn.Linear(config.n_embd, 1, bias=False)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    @classmethod
    def from_generator(cls, generator):
        """Trunk and LM head are copies of the generator's; the reward head is new."""
        model = cls(generator.transformer.config)
        model.transformer.load_state_dict(generator.transformer.state_dict())
        model.lm_head.load_state_dict(generator.lm_head.state_dict())
        return model

    def forward(self, packed, lm_trunk_gradient=None):
        """A Packed batch of R rows -> rewards (R, T) in fp32, one per prefix, any value on padding; and None, or with
        lm_trunk_gradient, the share of L_SFT's gradient that reaches the trunk, the log-probability of each of its
        M response tokens, (M,)."""
        hidden = self.transformer(packed.tokens, packed=packed)                         # (N, C)
        with torch.autocast(hidden.device.type, enabled=False):     # a sum: a matrix product may use TF32
            rewards = (hidden.float() * self.score.weight[0]).sum(-1)                   # (N,)
        rewards = rewards[packed.rows]                                                  # (R, T)
        if lm_trunk_gradient is None:
            return rewards, None
        return rewards, token_logprobs(scale_gradient(hidden, lm_trunk_gradient), self.lm_head, packed)


def scale_gradient(x, s):
    """The value of x with s times its gradient."""
    return s * x + (1 - s) * x.detach()


def token_logprobs(hidden, lm_head, packed):
    """log P(y_t | all before it) of the response tokens asked for in a Packed batch, from hidden (N, C): (M,) in fp32.

    Logits are made for those positions only, at most LOGITS at a time, and made again in the backward pass where they
    come in several parts (2, 4, 8, ..., so that few numbers of parts are ever compiled).
    """
    def logprobs(states, targets):
        return -F.cross_entropy(lm_head(states).float(), targets, reduction="none")

    states, parts = F.embedding(packed.sources, hidden), 1                              # (M, C)
    while len(states) > parts * max(1, LOGITS // lm_head.out_features):
        parts *= 2
    if parts == 1:
        return logprobs(states, packed.targets)
    ends = [len(states) * part // parts for part in range(parts + 1)]       # tensor_split would compile a graph for each remainder
    return torch.cat([checkpoint(logprobs, states[start:end], packed.targets[start:end], use_reentrant=False)
                      for start, end in zip(ends, ends[1:])])


def make_optimizer(model, learning_rate, weight_decay):
    """AdamW; weight decay on matrices only (not on biases and layer norms)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95),
                             fused=parameters[0].device.type == "cuda")


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up to peak over `warmup` steps, then a half cosine down to a tenth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def update(model, optimizer, rate, clip):
    """One step of the optimizer along the gradient, which is clipped and then gone; returns its norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def pick_device(name):
    """'auto', 'cpu', 'cuda' or 'cuda:N' -> torch.device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("choose auto, cpu, cuda or cuda:N")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={name} cannot be used here ({str(error).splitlines()[0]})") from None
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cuda.enable_cudnn_sdp(False)     # it would plan anew for every length of rows
    return device


def autocast(device, dtype):
    """Mixed precision for a forward pass: dtype 'auto' is bfloat16 on CUDA and float32 elsewhere."""
    choose("dtype", dtype, DTYPES)
    low = dtype == "bfloat16" or dtype == "auto" and device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16, enabled=low)
