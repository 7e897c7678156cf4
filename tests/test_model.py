"""The transformer: causality, padding, cache, heads."""
import math

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import model
from conftest import plain_rewards
from data.batches import Row, collate, pack, pair_rows
from model import KVCache, LanguageModel, ModelConfig, RewardModel, learning_rate, token_logprobs

SIZES = ModelConfig(vocab_size=50, block_size=24, n_layer=2, n_head=2, n_embd=16)


@torch.no_grad()
def test_changing_token_t_never_changes_a_reward_before_t(tiny):
    tokens = torch.randint(0, 50, (2, 12))
    rewards = plain_rewards(tiny.model, tokens)
    for t in (0, 5, 11):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 50
        found = plain_rewards(tiny.model, changed)
        assert torch.equal(found[:, :t], rewards[:, :t])
        assert (found[:, t] != rewards[:, t]).all()


def some_rows():
    """Pairs: two that share their prompt, one whose prompts differ, one of the first's prompt again, in both orders of length."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, 49, n).astype(np.int32)
    prompts, other = [draw(4), draw(7), draw(3)], draw(2)
    chosen = [Row(prompt, draw(n), False) for prompt, n in zip((*prompts, prompts[0]), (5, 3, 9, 1))]
    rejected = [Row(prompt, draw(n), False) for prompt, n in zip((prompts[0], prompts[1], other, prompts[0]), (2, 8, 9, 6))]
    return chosen + rejected


@pytest.mark.parametrize("options", [{}, dict(share_prompts=False), dict(groups=1), dict(groups=100), dict(width=20)])
def test_packed_rows_have_the_rewards_likelihoods_and_gradients_of_each_row_read_on_its_own(tiny, options):
    """The slow twin of reading every prompt once, without padding: row after row, from its start."""
    rows = some_rows()
    packed = pack(rows, 4, **options)
    rewards, logprobs = tiny.model(packed, 1.0)
    assert rewards.shape == (8, 20 if "width" in options else 15)
    weights = torch.randn(8, 15)
    slow_logprobs, slow_total = [], 0.0
    for i, row in enumerate(rows):
        tokens = torch.tensor([[*row.prompt.tolist(), *row.response.tolist()]])
        alone = plain_rewards(tiny.model, tokens)[0]
        assert torch.allclose(rewards[i, :len(row)], alone, atol=1e-5)
        slow_total = slow_total + (alone * weights[i, :len(row)])[len(row.prompt):].sum()
        if i < 4:
            every = tiny.model.lm_head(tiny.model.transformer(tokens))[0].log_softmax(-1)
            slow_logprobs += [every[t, tokens[0, t + 1]] for t in range(len(row.prompt) - 1, len(row) - 1)]
    slow_logprobs = torch.stack(slow_logprobs)
    assert torch.allclose(logprobs, slow_logprobs, atol=1e-5)
    mask = collate(rows).mask
    total = (rewards[:, :15] * weights)[mask].sum()
    parameters = list(tiny.model.parameters())
    fast = torch.autograd.grad(total + logprobs.sum(), parameters)
    slow = torch.autograd.grad(slow_total + slow_logprobs.sum(), parameters)
    for a, b in zip(fast, slow):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_a_prompt_of_several_rows_is_read_once_and_no_padding_is_read():
    rows = some_rows()
    distinct = {row.prompt.tobytes(): len(row.prompt) for row in rows}
    assert len(pack(rows).tokens) == sum(distinct.values()) + sum(len(row.response) for row in rows)
    assert len(pack(rows, share_prompts=False).tokens) == sum(map(len, rows))
    packed = pack(rows)
    flat = torch.cat([cells.flatten() for cells in packed.groups])
    assert torch.equal(flat[packed.places], torch.arange(len(packed.tokens)))     # what is dealt out is collected


@torch.no_grad()
def test_reading_token_by_token_through_the_cache_equals_reading_at_once():
    torch.manual_seed(0)
    trunk = LanguageModel(SIZES).eval().transformer
    tokens = torch.randint(0, 50, (3, 10))
    cache = KVCache(SIZES, 3, SIZES.block_size, "cpu", torch.float32)
    parts = [trunk(tokens[:, :4], cache)] + [trunk(tokens[:, t:t + 1], cache) for t in range(4, 10)]
    assert torch.allclose(torch.cat(parts, 1), trunk(tokens), atol=1e-5)


def test_parameter_names_are_gpt2s():
    names = set(LanguageModel(SIZES).state_dict())
    block = {f"transformer.h.1.{name}.{kind}" for name in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
             for kind in ("weight", "bias")}
    assert block | {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "lm_head.weight"} <= names


def test_the_forward_pass_equals_gpt2s_equations_written_with_loops():
    torch.manual_seed(1)
    config = ModelConfig(vocab_size=11, block_size=6, n_layer=1, n_head=2, n_embd=8)
    model = RewardModel(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    tokens, w = torch.tensor([[3, 1, 7, 7, 0]]), {name: p.detach() for name, p in model.named_parameters()}

    def norm(x, name):
        centred = x - x.mean()
        return centred / (centred.pow(2).mean() + 1e-5).sqrt() * w[f"transformer.{name}.weight"] + w[f"transformer.{name}.bias"]

    def linear(x, name):
        return w[f"transformer.h.0.{name}.weight"] @ x + w[f"transformer.h.0.{name}.bias"]

    x = [w["transformer.wte.weight"][token] + w["transformer.wpe.weight"][t] for t, token in enumerate(tokens[0])]
    qkv = [linear(norm(v, "h.0.ln_1"), "attn.c_attn").split(8) for v in x]
    for t in range(5):
        heads = []
        for h in range(2):
            part = slice(4 * h, 4 * h + 4)
            logits = torch.stack([qkv[t][0][part] @ qkv[s][1][part] / 2 for s in range(t + 1)])
            heads.append(sum(a * qkv[s][2][part] for s, a in enumerate(logits.softmax(0))))
        y = x[t] + linear(torch.cat(heads), "attn.c_proj")
        hidden = linear(norm(y, "h.0.ln_2"), "mlp.c_fc")
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden ** 3)))
        y = y + linear(hidden, "mlp.c_proj")
        reward = model.transformer(tokens)[0, t] @ w["score.weight"][0]
        assert (norm(y, "ln_f") @ w["score.weight"][0]).item() == pytest.approx(reward.item(), rel=1e-9)


def test_the_reward_is_fp32_under_autocast(tiny):
    with torch.autocast("cpu", torch.bfloat16):
        rewards, logprobs = tiny.model(pack(some_rows()), 0.001)
    assert rewards.dtype == logprobs.dtype == torch.float32


def test_logits_in_chunks_give_the_same_values_and_gradients(tiny, monkeypatch):
    packed, found = pack(some_rows()), []
    for logits in (10 ** 9, 5 * 50):
        monkeypatch.setattr(model, "LOGITS", logits)
        tiny.model.zero_grad()
        logprobs = token_logprobs(tiny.model.transformer(packed.tokens, packed=packed), tiny.model.lm_head, packed)
        logprobs.sum().backward()
        found.append((logprobs.detach(), tiny.model.transformer.wte.weight.grad.clone()))
    tiny.model.zero_grad()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found))


@pytest.mark.parametrize("logits", [2 ** 26, 50 * 20])
def test_the_forward_pass_compiles_into_one_graph_and_not_again_for_every_length(monkeypatch, logits):
    """The tracing alone (no code is generated): one graph, made again when sizes that were equal by chance differ, and for
    every doubling of the parts that logits come in."""
    monkeypatch.setattr(model, "LOGITS", logits)
    compiler = CompileCounter()
    reward_model = RewardModel(ModelConfig(vocab_size=50, block_size=24, n_layer=1, n_head=2, n_embd=16))
    compiled = torch.compile(reward_model, dynamic=True, fullgraph=True, backend=compiler)
    rng = np.random.default_rng(0)
    draw = lambda low, high: rng.integers(0, 49, rng.integers(low, high)).astype(np.int32)
    for _ in range(8):
        pairs = [(Row(prompt, draw(2, 12), False), Row(prompt, draw(2, 12), False)) for prompt in (draw(1, 12) for _ in range(8))]
        packed = pack(pair_rows(pairs), 8)
        for ours, plain in zip(compiled(packed, 0.001), reward_model(packed, 0.001)):
            assert torch.allclose(ours, plain, atol=1e-5)
    assert compiler.frame_count <= 3


def test_a_reward_model_starts_as_its_generator_with_an_untied_lm_head():
    generator = LanguageModel(SIZES)
    model = RewardModel.from_generator(generator)
    tokens = torch.randint(0, 50, (2, 7))
    assert torch.equal(model.transformer(tokens), generator.transformer(tokens))
    assert torch.equal(model.lm_head.weight, generator.lm_head.weight)
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert generator.lm_head.weight is generator.transformer.wte.weight


def test_learning_rate_warms_up_then_falls_to_a_tenth():
    rates = [learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == rates[10] == 1.0 and rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
