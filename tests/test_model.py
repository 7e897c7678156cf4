"""The transformer: causality, padding, cache, heads."""
import math

import pytest
import torch

import model
from model import KVCache, LanguageModel, ModelConfig, RewardModel, learning_rate, token_logprobs

SIZES = ModelConfig(vocab_size=50, block_size=24, n_layer=2, n_head=2, n_embd=16)


@torch.no_grad()
def test_changing_token_t_never_changes_a_reward_before_t(tiny):
    tokens = torch.randint(0, 50, (2, 12))
    rewards, _ = tiny.model(tokens)
    for t in (0, 5, 11):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 50
        found, _ = tiny.model(changed)
        assert torch.equal(found[:, :t], rewards[:, :t])
        assert (found[:, t] != rewards[:, t]).all()


@torch.no_grad()
def test_padding_and_batch_mates_change_no_reward(tiny):
    tokens = torch.randint(0, 50, (4, 12))
    alone, _ = tiny.model(tokens[1:2, :9])
    together, _ = tiny.model(tokens)
    assert torch.allclose(alone[0], together[1, :9], atol=1e-5)


@torch.no_grad()
def test_reading_token_by_token_through_the_cache_equals_reading_at_once():
    torch.manual_seed(0)
    trunk = LanguageModel(SIZES).eval().transformer
    tokens = torch.randint(0, 50, (3, 10))
    cache = KVCache(SIZES, 3, "cpu", torch.float32)
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
        rewards, hidden = tiny.model(torch.randint(0, 50, (2, 5)))
    assert rewards.dtype == torch.float32


def test_token_logprobs_equal_a_full_softmax_at_response_tokens_and_are_zero_elsewhere(tiny):
    tokens = torch.randint(0, 50, (3, 9))
    t = torch.arange(9)
    mask = (t >= torch.tensor([[2], [0], [5]])) & (t < torch.tensor([[9], [6], [8]]))
    hidden = tiny.model.transformer(tokens)
    full = tiny.model.lm_head(hidden[:, :-1]).log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    expected = torch.where(mask[:, 1:], full, 0.0)
    assert torch.allclose(token_logprobs(hidden, tiny.model.lm_head, tokens, mask), expected, atol=1e-5)


def test_logits_in_chunks_give_the_same_values_and_gradients(tiny, monkeypatch):
    tokens, mask = torch.randint(0, 50, (3, 9)), torch.ones(3, 9, dtype=torch.bool)
    found = []
    for chunk in (4096, 5):
        monkeypatch.setattr(model, "CHUNK", chunk)
        tiny.model.zero_grad()
        logprobs = token_logprobs(tiny.model.transformer(tokens), tiny.model.lm_head, tokens, mask)
        logprobs.sum().backward()
        found.append((logprobs.detach(), tiny.model.transformer.wte.weight.grad.clone()))
    tiny.model.zero_grad()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found))


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
