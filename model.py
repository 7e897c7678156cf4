"""The transformer that small open models share (Llama's), and the two heads of a reward model.

RMSNorm before each sublayer, rotary positions, grouped-query attention, SwiGLU; `qkv_bias` makes it
Qwen 2.5's, `qk_norm` Qwen 3's; parameters have Hugging Face's names. LanguageModel, the generator,
is trunk and LM head; RewardModel is the trunk, a linear score of each token, and an LM head of its
own for L_SFT (GRM, arXiv 2406.10216). Left out: dropout, sliding windows, scaled rotary positions.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from config import UserError

LOGITS = 2 ** 26                # logits in memory at once, a quarter of a GiB in fp32
WEIGHT_DECAY, CLIP = 0.1, 1.0   # of matrices; the largest gradient norm


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    block_size: int     # longest prompt and response, in tokens
    n_layer: int
    n_head: int
    n_embd: int
    n_kv_head: int = 0  # heads of keys and values; 0: n_head
    head_dim: int = 0   # channels of a head; 0: n_embd / n_head
    n_hidden: int = 0   # channels inside the MLP; 0: 8/3 n_embd, up to a multiple of 16
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = True   # whether the generator's LM head is its embedding

    def __post_init__(self):
        if not self.head_dim and self.n_embd % self.n_head:
            raise UserError(f"--n_embd={self.n_embd} does not divide by --n_head={self.n_head}")
        for name, value in (("n_kv_head", self.n_head), ("head_dim", self.n_embd // self.n_head),
                            ("n_hidden", -(-self.n_embd * 8 // 48) * 16)):
            object.__setattr__(self, name, getattr(self, name) or value)
        if self.n_head % self.n_kv_head or self.head_dim % 2:
            raise UserError(f"{self.n_head} heads do not divide by {self.n_kv_head} of keys and "
                            f"values, or {self.head_dim} channels of a head by 2")


class KVCache:
    """Keys and values of the tokens read so far, with room for `longest` tokens in every row."""
    def __init__(self, config, rows, longest, device, dtype):
        shape = (2, config.n_layer, rows, config.n_kv_head, longest, config.head_dim)
        self.stored, self.length = torch.zeros(shape, device=device, dtype=dtype), 0

    def append(self, layer, k, v):
        """Store k, v (rows, n_kv_head, T, head_dim) behind what is there; -> all of the layer's."""
        assert k.size(2) == 1 or self.length == 0, "several tokens go into an empty cache only"
        end = self.length + k.size(2)
        self.stored[:, layer, :, :, self.length:end] = torch.stack([k, v])
        return self.stored[:, layer, :, :, :end]


def rotary(positions, head_dim, theta):
    """cos and sin of each position's angles (arXiv 2104.09864).  (b, T) -> (b, 1, T, head_dim)"""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    angles = (positions[:, None, :, None] * frequencies).repeat(1, 1, 1, 2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Each pair of channels (i, i + head_dim / 2) turned by its angle."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer, d = config, layer, config.head_dim
        self.q_proj = nn.Linear(config.n_embd, config.n_head * d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, config.n_kv_head * d, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, config.n_kv_head * d, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_head * d, config.n_embd, bias=False)
        self.q_norm = nn.RMSNorm(d, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(d, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, angles, visible=None, cache=None):
        """(b, T, C) -> same. A token sees what is visible, by default all before it in its row."""
        b, T, _ = x.shape
        q, k, v = (project(x).view(b, T, -1, self.config.head_dim).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))     # (b, heads, T, d)
        q, k = rotate(self.q_norm(q), *angles), rotate(self.k_norm(k), *angles)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        shared = self.config.n_head // self.config.n_kv_head
        if shared > 1:
            k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        causal = visible is None and (cache is None or cache.length == 0)
        y = F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal)
        return self.o_proj(y.transpose(1, 2).reshape(b, T, -1))


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

    def forward(self, x, angles, visible=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), angles, visible, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """tokens (b, T), positions (b, T), visible (b, 1, T, T) or None -> hidden states (b, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.config, self.frozen = config, 0    # blocks that are not trained, from the first
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.recompute = False      # make a block's activations again in the backward pass
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:    # what is added to the residual starts smaller
                terms = 2 * config.n_layer if "o_proj" in name or "down_proj" in name else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(terms))

    def freeze(self, count):
        """Train no embedding and none of the first `count` blocks."""
        self.frozen = count
        self.embed_tokens.requires_grad_(False)
        self.layers[:count].requires_grad_(False)

    def through(self, layers, x, positions, visible=None, cache=None):
        """Hidden states (b, T, C) -> the same behind these blocks."""
        angles = rotary(positions, self.config.head_dim, self.config.rope_theta)
        for block in layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, angles, visible, use_reentrant=False)
            else:
                x = block(x, angles, visible, cache)
        return x

    def forward(self, tokens, positions, visible=None, cache=None, below=None):
        """below: the hidden states before the first block that is not frozen, if they are known."""
        first = 0 if below is None else self.frozen
        x = self.embed_tokens(tokens) if below is None else below.float()   # (b, T, C)
        x = self.through(self.layers[first:], x, positions, visible, cache)
        if cache is not None:
            cache.length += tokens.size(1)
        return self.norm(x)

    @torch.no_grad()
    def frozen_states(self, group):
        """A Group's hidden states before the first block that is not frozen, (b, T, C)."""
        x = self.embed_tokens(group.tokens)
        return self.through(self.layers[:self.frozen], x, group.positions, visible(group.segments))

    def read(self, batch):
        """A Batch -> the hidden states of all its groups' positions, joined, (N, C)."""
        return torch.cat([self(group.tokens, group.positions, visible(group.segments),
                               below=group.below).flatten(0, 1) for group in batch.groups])


def visible(segments):
    """A token sees the prompt and its own response, up to itself.  (b, T) -> (b, 1, T, T)"""
    if segments is None:
        return None
    query, key = segments[:, None, :, None], segments[:, None, None, :]
    return ((key == 0) | (key == query)).tril()


class LanguageModel(nn.Module):
    """The generator: trunk and an LM head, tied to the embedding where the config says so."""
    def __init__(self, config):
        super().__init__()
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, batch):
        """A Batch -> log-probability of each of its M response tokens, (M,)."""
        return token_logprobs(self.model.read(batch), self.lm_head, batch)


class RewardModel(nn.Module):
    """The trunk, a score of every token (rewards by `readout`), and an LM head of its own."""
    def __init__(self, config, readout="last"):
        super().__init__()
        self.readout = readout
        self.model = Trunk(config)
        self.score = nn.Linear(config.n_embd, 1, bias=False)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)

    @classmethod
    def from_generator(cls, generator, readout="last"):
        """Trunk and LM head are copies of the generator's; the score is new."""
        model = cls(generator.model.config, readout)
        model.load_state_dict(generator.state_dict() | {"score.weight": model.score.weight})
        return model

    def scores(self, hidden, batch):
        """The score a_t of each response token, in fp32, any value on padding.  (N, C) -> (R, T)"""
        scores = (hidden.float() * self.score.weight[0]).sum(-1)    # no matrix product: never TF32
        return scores.index_select(0, batch.places.flatten()).view_as(batch.places)


def token_logprobs(hidden, lm_head, batch):
    """log P(token | all before it) of the M tokens that a Batch asks for: logits of those alone, at
    most LOGITS at a time, several parts again in the backward pass.  (N, C) -> (M,) in fp32"""
    def logprobs(states, targets):
        return -F.cross_entropy(lm_head(states).float(), targets, reduction="none")
    states = hidden.index_select(0, batch.sources)                      # (M, C)
    size = max(1, LOGITS // lm_head.out_features)
    if len(states) <= size:
        return logprobs(states, batch.targets)
    return torch.cat([checkpoint(logprobs, *part, use_reentrant=False)
                      for part in zip(states.split(size), batch.targets.split(size))])


def length_normalised_nll(logprobs, batch, responses):
    """-1/|y| sum_t log P(y_t | x, y_<t), summed over responses and divided by their number.

    logprobs: (M,) of a Batch's targets -> ()"""
    return -(logprobs / batch.lengths[batch.owners]).sum() / responses


def pretrained_language_model(sizes, weights, where):
    """A folder's model; weights, {name: tensor}, that are missing, unknown or misshapen are an
    error."""
    config, embedding = ModelConfig(**sizes), weights.get("model.embed_tokens.weight")
    if config.tied and embedding is not None:
        weights = {"lm_head.weight": embedding} | weights
        if not torch.equal(weights["lm_head.weight"], embedding):
            raise UserError(f"{where} says that its LM head is its embedding, and holds two")
    try:
        with torch.device("meta"):      # without memory: config.json may ask for any
            model = LanguageModel(config)
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the weights of {where} do not fit: {reason:.200}") from None
    if config.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def frozen_language_model(checkpoint):
    """The LanguageModel of a generator's or a policy's checkpoint."""
    model = LanguageModel(ModelConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval().requires_grad_(False)


def make_optimizer(model, learning_rate):
    """AdamW; weight decay on matrices only (not on biases and norms)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.95), fused=parameters[0].is_cuda)


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up to peak over `warmup` steps, then a half cosine down to a tenth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def update(model, optimizer, rate):
    """One step along the clipped gradient, which then is gone; -> its norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    rest = dict(model.named_parameters())       # names no tied LM head: it is the embedding
    if "lm_head.weight" in rest:    # clipped apart, so that L_SFT cannot shrink the others' step
        nn.utils.clip_grad_norm_(rest.pop("lm_head.weight"), CLIP)
    norm = nn.utils.clip_grad_norm_(rest.values(), CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
