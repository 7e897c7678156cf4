"""The transformer: its equations, rows of several responses, cache, heads, the optimizer's step."""
import copy
import dataclasses

import numpy as np
import pytest
import torch

import model
from config import UserError
from data import rows
from data.rows import Row, make_batch
from model import (KVCache, LanguageModel, ModelConfig, RewardModel, Trunk, learning_rate,
                   make_optimizer, token_logprobs, update, visible)

SIZES = ModelConfig(vocab_size=50, block_size=24, n_layer=2, n_head=4, n_embd=16, n_kv_head=2,
                    qkv_bias=True, qk_norm=True)
# Lengths of prompt and responses: pairs, labelled responses of either side, four candidates.
LENGTHS = (4, 5, 2), (7, 3, 8), (3, 9, 9), (1, 1, 6), (5, 4, 0), (5, 0, 6), (6, 3, 1, 8, 2)


def randomised(module):
    """The module with large random weights, biases and norms, so that every one of them matters."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return module


@pytest.fixture
def reward_model():
    return randomised(RewardModel(SIZES))


def row_of(prompt, *responses):
    """A Row of random tokens of these lengths."""
    rng = np.random.default_rng([prompt, *responses])
    return Row(rng.integers(0, 49, prompt), tuple(rng.integers(0, 49, n) for n in responses))


def single_rows(some):
    """A row of its own for every response, in a Batch's order."""
    width = max(len(row.responses) for row in some)
    return [Row(row.prompt, (row.responses[side],)) for side in range(width) for row in some
            if side < len(row.responses)]


def read_batch(ours, batch):
    """Scores and log-probabilities of all response tokens, one response after the other."""
    hidden = ours.model.read(batch)
    return ours.scores(hidden, batch)[batch.mask], token_logprobs(hidden, ours.lm_head, batch)


def read_alone(ours, row):
    """The same of a row with one response, by the plain causal transformer."""
    tokens = torch.from_numpy(np.concatenate([row.prompt, *row.responses]))[None]
    hidden = ours.model(tokens, torch.arange(tokens.size(1))[None])[0]                  # (T, C)
    logprobs = ours.lm_head(hidden).log_softmax(1)[:-1].gather(1, tokens[0, 1:, None])[:, 0]
    return (hidden @ ours.score.weight[0])[len(row.prompt):], logprobs[len(row.prompt) - 1:]


@pytest.mark.parametrize("similar, singly", [(1.3, False), (1.0, False), (99, False), (99, True)])
def test_a_batch_reads_each_response_as_if_alone(reward_model, monkeypatch, similar, singly):
    """Groups joined, one padded group, a row for each: rewards, likelihoods and gradients."""
    monkeypatch.setattr(rows, "SIMILAR", similar)
    some = [row_of(*lengths) for lengths in LENGTHS]
    batch = make_batch(single_rows(some) if singly else some, likelihoods=None)
    assert (len(batch.groups) == 1) == (similar == 99)
    each = [read_alone(reward_model, row) for row in single_rows(some)]
    fast, slow = read_batch(reward_model, batch), [torch.cat(parts) for parts in zip(*each)]
    weights, gradients = torch.randn(len(slow[0])), []
    for scores, logprobs in (fast, slow):
        loss = (weights * scores).sum() + logprobs.sum()
        gradients.append(torch.autograd.grad(loss, list(reward_model.parameters())))
    assert all(torch.allclose(*both, atol=1e-5) for both in zip(fast, slow))
    assert all((ours - twin).norm() <= 1e-4 * twin.norm() for ours, twin in zip(*gradients))
    with torch.autocast("cpu", torch.bfloat16):     # these stay fp32
        assert {found.dtype for found in read_batch(reward_model, batch)} == {torch.float32}


@torch.no_grad()
def test_the_forward_pass_equals_its_equations_written_with_loops():
    """One block with grouped heads, biases, normed queries and keys, over a pair's row: a token
    sees the prompt and its own response, up to itself, and counts on from the prompt."""
    config = dataclasses.replace(SIZES, n_layer=1, n_embd=6, head_dim=4, rope_theta=99.0)
    trunk = randomised(Trunk(config)).double()
    block, (group,) = trunk.layers[0], make_batch([row_of(2, 3, 2)]).groups
    attention, segment, positions = block.self_attn, [0, 0, 1, 1, 1, 2, 2], [0, 1, 2, 3, 4, 2, 3]

    def norm(x, module):
        return x / (x.pow(2).mean() + 1e-5).sqrt() * module.weight

    def rotated(x, position):
        angles = position * torch.tensor([1.0, 99.0 ** -0.5])   # of channels 0, 2 and of 1, 3
        turned = torch.complex(x[:2], x[2:]) * torch.polar(torch.ones(2), angles)
        return torch.cat([turned.real, turned.imag])

    def heads(project, module):
        return [[rotated(norm(head, module), position) for head in project(y).split(4)]
                for y, position in zip(normed, positions)]

    x = trunk.embed_tokens(group.tokens[0])
    normed = [norm(y, block.input_layernorm) for y in x]
    q, k = heads(attention.q_proj, attention.q_norm), heads(attention.k_proj, attention.k_norm)
    v = [attention.v_proj(y).split(4) for y in normed]
    found = trunk(group.tokens, group.positions, visible(group.segments))[0]
    for t in range(7):
        seen, read = [s for s in range(t + 1) if segment[s] in (0, segment[t])], []
        for h in range(4):      # two heads share one of keys and values
            odds = torch.stack([q[t][h] @ k[s][h // 2] / 2 for s in seen]).softmax(0)
            read.append(sum(share * v[s][h // 2] for s, share in zip(seen, odds)))
        y = x[t] + attention.o_proj(torch.cat(read))
        z = norm(y, block.post_attention_layernorm)
        gate = block.mlp.gate_proj(z)
        y = y + block.mlp.down_proj(gate / (1 + (-gate).exp()) * block.mlp.up_proj(z))
        assert torch.allclose(found[t], norm(y, trunk.norm), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_reading_through_the_cache_equals_reading_the_whole():
    """Heads share keys and values; each prompt is read once and continued three ways."""
    trunk, cache = randomised(Trunk(SIZES)), KVCache(SIZES, 2, 9, "cpu", torch.float32)
    tokens, positions = torch.randint(0, 49, (6, 9)), torch.arange(9).expand(6, -1)
    tokens[:, :4] = tokens[::3, :4].repeat_interleave(3, dim=0)
    prompts = trunk(tokens[::3, :4], positions[::3, :4], cache=cache)
    cache.stored = cache.stored.repeat_interleave(3, dim=2)
    found = [trunk(tokens[:, t:t + 1], positions[:, t:t + 1], cache=cache) for t in range(4, 9)]
    found = torch.cat([prompts.repeat_interleave(3, dim=0), *found], dim=1)
    assert torch.allclose(found, trunk(tokens, positions), atol=1e-4)


def test_logits_in_parts_and_blocks_read_again_change_no_gradient(reward_model, monkeypatch):
    batch, found = make_batch([row_of(*each) for each in LENGTHS], likelihoods=None), []
    for logits, recompute in ((10 ** 9, False), (5 * 50, True)):
        monkeypatch.setattr(model, "LOGITS", logits)
        reward_model.model.recompute = recompute
        scores, logprobs = read_batch(reward_model, batch)
        loss = scores.sum() + logprobs.sum()
        found.append([logprobs, *torch.autograd.grad(loss, list(reward_model.parameters()))])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found))


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_starts_as_its_generator_with_an_lm_head_of_its_own(tied):
    start = randomised(LanguageModel(dataclasses.replace(SIZES, tied=tied)))
    assert (start.lm_head.weight is start.model.embed_tokens.weight) == tied
    ours = RewardModel.from_generator(start)
    assert all(torch.equal(ours.state_dict()[name], w) for name, w in start.state_dict().items())
    assert ours.lm_head.weight is not ours.model.embed_tokens.weight


def test_gradients_are_clipped_the_lm_heads_apart_and_then_gone(reward_model):
    """So L_SFT cannot shrink the others' step; an LM head that is the embedding is one of them."""
    for module, apart in ((reward_model, {"lm_head.weight"}), (LanguageModel(SIZES), set())):
        before, gradients = copy.deepcopy(module.state_dict()), {}
        for name, parameter in module.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradients[name] = parameter.grad.clone()
        rest = sum(gradients[name].norm() ** 2 for name in gradients.keys() - apart) ** 0.5
        assert update(module, torch.optim.SGD(module.parameters()), 0.5) == pytest.approx(rest)
        for name, parameter in module.named_parameters():
            norm = gradients[name].norm() if name in apart else rest
            step = 0.5 * model.CLIP / norm * gradients[name]
            assert torch.allclose(before[name] - parameter, step, atol=1e-6), name
            assert parameter.grad is None


def test_weight_decay_is_on_matrices_alone_and_no_parameter_is_left_out(reward_model):
    optimizer, before = make_optimizer(reward_model, 0.1), copy.deepcopy(reward_model.state_dict())
    for parameter in reward_model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, weights in reward_model.state_dict().items():
        kept = 1.0 if weights.dim() < 2 else 1 - 0.1 * model.WEIGHT_DECAY
        assert torch.allclose(weights, kept * before[name]), name


def test_learning_rate_warms_up_then_falls_to_a_tenth():
    rates = [learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == rates[10] == 1.0
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert rates[-1] == pytest.approx(0.1, abs=1e-3) and learning_rate(0, 1, 1.0, 0) == 1.0


def test_sizes_that_make_no_model_are_named():
    for sizes, message in (((3, 16), "--n_embd=16 does not divide by --n_head=3"),
                           ((4, 16, 3), "4 heads do not divide by 3"),
                           ((2, 6), "3 channels of a head by 2")):
        with pytest.raises(UserError, match=message):
            ModelConfig(9, 9, 1, *sizes)
