"""A Llama-style decoder-only transformer, and the heads of a reward model.

RMSNorm before each sublayer, rotary positions, grouped-query attention and SwiGLU. With
`qkv_bias` it matches Qwen 2.5, with `qk_norm` Qwen 3. Parameters have Hugging Face's
names. LanguageModel, the generator, is the transformer and an LM head. RewardModel adds
a linear score of each token, and its own LM head for L_SFT (GRM, arXiv 2406.10216).

A Batch has B examples. Each is one row of L tokens: the prompt, then its k responses
(k = 2 for a pair), which do not attend to each other. Tensors of responses have k*B
rows of T tokens: all chosen responses, then all rejected ones.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import UserError
from data.batch import attention_mask, gather_responses

MAX_LOGITS = 2**26  # logits in memory at once, a quarter of a GiB in float32
WEIGHT_DECAY = 0.1  # of matrices. Biases and norms have none
CLIP_NORM = 1.0  # largest gradient norm
BETAS = (0.9, 0.95)  # of AdamW
FINAL_RATE = 0.1  # of the peak learning rate, at the last step
SUM_SCALE = 0.1  # the prefix reward `sum` is this times the sum of the token scores
PREFIX_REWARDS = ("last", "mean", "sum")


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    block_size: int  # maximum tokens of a prompt plus one response
    n_layer: int
    n_head: int
    n_embd: int
    n_kv_head: int = 0  # heads of keys and values. 0: n_head
    head_dim: int = 0  # channels of a head. 0: n_embd / n_head
    n_hidden: int = 0  # channels inside the MLP. 0: 8/3 n_embd, a multiple of 16
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = True  # whether the LM head shares the embedding's weights

    def __post_init__(self):
        if not self.head_dim and self.n_embd % self.n_head:
            raise UserError(
                f"--n_embd={self.n_embd} is not a multiple of --n_head={self.n_head}"
            )
        defaults = {
            "n_kv_head": self.n_head,
            "head_dim": self.n_embd // self.n_head,
            "n_hidden": math.ceil(self.n_embd * 8 / 3 / 16) * 16,
        }
        for name, value in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or value)
        if self.n_head % self.n_kv_head:
            raise UserError(
                f"{self.n_head} attention heads are not a multiple of the "
                f"{self.n_kv_head} key-value heads"
            )
        if self.head_dim % 2:
            raise UserError(
                f"a head has {self.head_dim} channels. Rotary positions need an even "
                "number"
            )


# Transformer --------------------------------------------------------------------------


class KVCache:
    """Keys and values of the tokens read so far, with room for max_tokens per row."""

    def __init__(self, config, rows, max_tokens, device, dtype):
        heads, head_dim = config.n_kv_head, config.head_dim
        shape = (2, config.n_layer, rows, heads, max_tokens, head_dim)
        self.stored = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer, k, v):
        """Store k and v (rows, n_kv_head, T, head_dim). Return all of this layer's."""
        if k.size(2) > 1 and self.length > 0:
            raise ValueError("several tokens can only be added to an empty cache")
        end = self.length + k.size(2)
        self.stored[:, layer, :, :, self.length : end] = torch.stack([k, v])
        return self.stored[:, layer, :, :, :end]

    def select_rows(self, rows):
        self.stored = self.stored[:, :, rows]


def rotary_angles(positions, head_dim, theta):
    """cos and sin of every position's angles (arXiv 2104.09864).

    (B, L) -> two tensors (B, 1, L, head_dim)
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
    frequencies = 1.0 / theta**exponents  # (head_dim / 2,)
    angles = positions[:, None, :, None] * frequencies  # (B, 1, L, head_dim / 2)
    angles = angles.repeat(1, 1, 1, 2)  # (B, 1, L, head_dim)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate every pair of channels (i, i + head_dim / 2) by its angle."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        width, d, bias = config.n_embd, config.head_dim, config.qkv_bias
        self.q_proj = nn.Linear(width, config.n_head * d, bias=bias)
        self.k_proj = nn.Linear(width, config.n_kv_head * d, bias=bias)
        self.v_proj = nn.Linear(width, config.n_kv_head * d, bias=bias)
        self.o_proj = nn.Linear(config.n_head * d, width, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(d, config.norm_eps)
            self.k_norm = nn.RMSNorm(d, config.norm_eps)

    def forward(self, x, angles, mask=None, cache=None):
        """(B, L, C) -> same. mask: (B, 1, L, L) bool, by default causal."""
        B, L, _ = x.shape
        shape = (B, L, -1, self.config.head_dim)
        q = self.q_proj(x).view(shape).transpose(1, 2)  # (B, heads, L, head_dim)
        k = self.k_proj(x).view(shape).transpose(1, 2)  # (B, kv heads, L, head_dim)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *angles), rotate(k, *angles)
        is_causal = mask is None
        if cache is not None:
            is_causal = cache.length == 0
            k, v = cache.append(self.layer, k, v)
        group_size = self.config.n_head // self.config.n_kv_head
        if group_size > 1:
            k = k.repeat_interleave(group_size, dim=1)
            v = v.repeat_interleave(group_size, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)
        return self.o_proj(y.transpose(1, 2).reshape(B, L, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, angles, mask=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), angles, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """tokens (B, L), positions (B, L) -> hidden states (B, L, C)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.gradient_checkpointing = False
        for name, parameter in self.named_parameters():
            if parameter.dim() != 2:
                continue
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * config.n_layer)  # they add to the residual stream
            nn.init.normal_(parameter, std=std)

    def forward(self, tokens, positions, mask=None, cache=None):
        x = self.embed_tokens(tokens)  # (B, L, C)
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        for block in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, angles, mask, use_reentrant=False)
            else:
                x = block(x, angles, mask, cache)
        if cache is not None:
            cache.length += tokens.size(1)
        return self.norm(x)


# Language model and reward model ------------------------------------------------------


class LanguageModel(nn.Module):
    """The generator: the transformer and an LM head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self):
        if self.config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self):
        return self.lm_head.weight.device

    def hidden_states(self, batch):
        """Batch -> (B, L, C)"""
        return self.model(batch.tokens, batch.positions, attention_mask(batch))

    def states_and_targets(self, hidden, batch, first_rows=None):
        """Response tokens, and the hidden states that predict them.

        first_rows: use only the first so many of the k*B responses. B: the chosen ones
        (B, L, C) -> (M, C), (M,), where M is the number of tokens in these responses
        """
        mask = batch.mask[:first_rows]
        previous = batch.previous_positions[:first_rows]
        states = gather_responses(hidden, previous[mask])
        positions = batch.response_positions[:first_rows]
        targets = batch.tokens.flatten()[positions[mask]]
        return states, targets

    def lm_logprobs(self, hidden, batch, first_rows=None):
        """log P(token | all before it) of response tokens, in float32.

        first_rows: use only the first so many of the k*B responses. B: the chosen ones
        (B, L, C) -> (k*B or first_rows, T), 0 on padding
        """
        states, targets = self.states_and_targets(hidden, batch, first_rows)
        size = max(1, MAX_LOGITS // self.config.vocab_size)
        if len(states) <= size:
            logprobs = self.token_logprobs(states, targets)
        else:  # compute the logits in parts, and again in the backward pass
            parts = []
            for part in zip(states.split(size), targets.split(size)):
                parts.append(
                    checkpoint(self.token_logprobs, *part, use_reentrant=False)
                )
            logprobs = torch.cat(parts)
        mask = batch.mask[:first_rows]
        padded = torch.zeros(mask.shape, device=mask.device)
        return padded.masked_scatter(mask, logprobs)

    def token_logprobs(self, states, targets):
        """(M, C), (M,) -> (M,)"""
        logits = self.lm_head(states).float()
        return -F.cross_entropy(logits, targets, reduction="none")


class RewardModel(LanguageModel):
    """The transformer with a score of every token, and its own LM head for L_SFT."""

    def __init__(self, config, prefix_reward="last"):
        super().__init__(dataclasses.replace(config, tied=False))
        self.prefix_reward = prefix_reward
        self.score = nn.Linear(config.n_embd, 1, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)

    @classmethod
    def from_generator(cls, generator, prefix_reward="last"):
        """Copy the generator's transformer and LM head. The score head is new."""
        model = cls(generator.config, prefix_reward)
        weights = generator.state_dict()
        model.load_state_dict({**weights, "score.weight": model.score.weight})
        return model

    def train_last_layers(self, count):
        """Freeze the embedding and all blocks but the last `count`."""
        if count > self.config.n_layer:
            raise UserError(
                f"--train_last_layers={count}, but the model has {self.config.n_layer}"
            )
        self.model.embed_tokens.requires_grad_(False)
        self.model.layers[: self.config.n_layer - count].requires_grad_(False)

    def prefix_rewards(self, hidden, batch):
        """The rewards of all prefixes. (B, L, C) -> (k*B, T) in float32"""
        # Elementwise product and sum, in float32. A matrix product would use TF32 or
        # bfloat16 on a GPU.
        scores = (hidden.float() * self.score.weight[0]).sum(-1)  # (B, L)
        scores = gather_responses(scores, batch.response_positions)  # (k*B, T)
        return prefix_rewards_from_scores(scores, batch.mask, self.prefix_reward)


def prefix_rewards_from_scores(scores, mask, kind):
    """Turn the scores a_t of tokens into rewards r_t of prefixes. (R, T) -> (R, T)

    last  r_t = a_t                       the paper
    mean  r_t = (1/t) sum_{s<=t} a_s      Q-RM (arXiv 2505.23363)
    sum   r_t = c sum_{s<=t} a_s          the reward as a sum of increments
    """
    scores = torch.where(mask, scores, 0.0)
    if kind == "last":
        return scores
    totals = scores.cumsum(1)
    if kind == "sum":
        return SUM_SCALE * totals
    return totals / torch.arange(1, scores.size(1) + 1, device=scores.device)


def length_normalized_nll(logprobs, mask, n_responses=None):
    """-1/|y| sum_t log P(y_t | x, y_<t), mean over responses.

    logprobs, mask: (R, T). Rows without a response do not count
    n_responses: divide the sum by this number instead (a batch split over processes)
    """
    lengths = mask.sum(1)
    per_response = -torch.where(mask, logprobs, 0.0).sum(1) / lengths.clamp(min=1)
    if n_responses is None:
        n_responses = (lengths > 0).sum()
    return per_response.sum() / n_responses


def load_weights(model, checkpoint):
    """Load a checkpoint's weights into a model of its configuration."""
    try:
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the checkpoint's weights do not fit: {reason:.200}") from None
    return model


def load_language_model(checkpoint):
    """The frozen LanguageModel of a generator's or a policy's checkpoint."""
    model = LanguageModel(ModelConfig(**checkpoint["model_config"]))
    return load_weights(model, checkpoint).eval().requires_grad_(False)


# Optimization -------------------------------------------------------------------------


def make_optimizer(model, learning_rate):
    """AdamW over the trainable parameters, with weight decay on matrices."""
    matrices, vectors = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            group = matrices if parameter.dim() >= 2 else vectors
            group.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = model.device.type == "cuda"
    return torch.optim.AdamW(groups, learning_rate, betas=BETAS, fused=fused)


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over `warmup` steps, then a cosine down to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def update(model, optimizer, rate):
    """Clip the gradient, update the weights, clear the gradient.

    Returns the gradient norm before clipping, excluding an untied LM head. That head is
    clipped separately, so that L_SFT cannot shrink the step of the other weights.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    parameters = dict(model.named_parameters())  # a tied LM head is not listed
    lm_head = parameters.pop("lm_head.weight", None)
    if lm_head is not None:
        nn.utils.clip_grad_norm_(lm_head, CLIP_NORM)
    norm = nn.utils.clip_grad_norm_(parameters.values(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
