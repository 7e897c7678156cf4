"""The transformer: its equations, batches, the cache, the heads, the optimizer."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

import model
from common import UserError
from data.batch import Example, attention_mask, collate
from model import (
    KVCache,
    LanguageModel,
    ModelConfig,
    RewardModel,
    Transformer,
    learning_rate,
    length_normalized_nll,
    make_optimizer,
    prefix_rewards_from_scores,
    update,
)

CONFIG = ModelConfig(
    vocab_size=50,
    block_size=24,
    n_layer=2,
    n_head=4,
    n_embd=16,
    n_kv_head=2,
    qkv_bias=True,
    qk_norm=True,
)
PAIRS = [(4, 5, 2), (7, 3, 8), (3, 9, 9), (1, 1, 6), (5, 4, 0), (5, 0, 6)]
CANDIDATES = [(6, 3, 1, 8, 2), (2, 1, 1, 1, 7)]


def randomize(module):
    """Large random weights, biases and norms, so that every one of them matters."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        mean = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(parameter, mean=mean, std=0.3)
    return module


@pytest.fixture
def reward_model():
    return randomize(RewardModel(CONFIG))


def example_of(prompt, *responses):
    """An Example of random tokens with these lengths."""
    rng = np.random.default_rng([prompt, *responses])
    parts = [rng.integers(0, 49, length) for length in (prompt, *responses)]
    return Example(parts[0], tuple(parts[1:]))


def read_batch(reward_model, batch):
    """Prefix rewards and log-probabilities of all response tokens."""
    hidden = reward_model.hidden_states(batch)
    rewards = reward_model.prefix_rewards(hidden, batch)
    logprobs = reward_model.lm_logprobs(hidden, batch)
    return rewards[batch.mask], logprobs[batch.mask]


def read_alone(reward_model, prompt, response):
    """The same of one response, by the plain causal transformer without padding."""
    tokens = torch.from_numpy(np.concatenate([prompt, response]))[None]  # (1, L)
    positions = torch.arange(tokens.size(1))[None]
    hidden = reward_model.model(tokens, positions)[0]  # (L, C)
    logits = reward_model.lm_head(hidden[:-1])
    logprobs = logits.log_softmax(1).gather(1, tokens[0, 1:, None])[:, 0]
    scores = hidden @ reward_model.score.weight[0]
    return scores[len(prompt) :], logprobs[len(prompt) - 1 :]


@pytest.mark.parametrize("lengths", [PAIRS, CANDIDATES, [(4, 5), (2, 7)]])
def test_a_batch_reads_each_response_as_if_alone(reward_model, lengths):
    """Rewards to 1e-5 and gradients to 1e-4 of a reference that repeats the prompts."""
    examples = [example_of(*numbers) for numbers in lengths]
    rewards, logprobs = [], []
    for number in range(len(examples[0].responses)):
        for example in examples:
            response = example.responses[number]
            alone = read_alone(reward_model, example.prompt, response)
            rewards.append(alone[0])
            logprobs.append(alone[1])
    slow = torch.cat(rewards), torch.cat(logprobs)
    fast = read_batch(reward_model, collate(examples))
    weights, gradients = torch.randn(len(slow[0])), []
    for reward, logprob in (fast, slow):
        loss = (weights * reward).sum() + logprob.sum()
        parameters = list(reward_model.parameters())
        gradients.append(torch.autograd.grad(loss, parameters))
    for own, reference in zip(fast, slow):
        assert torch.allclose(own, reference, atol=1e-5)
    for own, reference in zip(*gradients):
        assert (own - reference).norm() <= 1e-4 * reference.norm()


def test_rewards_and_logprobs_are_float32_under_autocast(reward_model):
    batch = collate([example_of(*numbers) for numbers in PAIRS])
    with torch.autocast("cpu", torch.bfloat16):
        rewards, logprobs = read_batch(reward_model, batch)
    assert rewards.dtype == logprobs.dtype == torch.float32


@torch.no_grad()
def test_the_forward_pass_equals_its_equations_written_with_loops():
    """One block with grouped heads, biases and normed queries and keys, over a pair.

    A token sees the prompt and its own response, up to itself. Positions continue from
    the prompt.
    """
    config = dataclasses.replace(
        CONFIG, n_layer=1, n_embd=6, head_dim=4, rope_theta=99.0
    )
    transformer = randomize(Transformer(config)).double()
    block, batch = transformer.layers[0], collate([example_of(2, 3, 2)])
    attention = block.self_attn
    segments, positions = [0, 0, 1, 1, 1, 2, 2], [0, 1, 2, 3, 4, 2, 3]

    def norm(x, module):
        return x / (x.pow(2).mean() + 1e-5).sqrt() * module.weight

    def rotate(x, position):
        angles = position * torch.tensor([1.0, 99.0**-0.5])  # of channels 0, 2 and 1, 3
        turned = torch.complex(x[:2], x[2:]) * torch.polar(torch.ones(2), angles)
        return torch.cat([turned.real, turned.imag])

    def rotated_heads(project, head_norm):
        tokens = []
        for y, position in zip(normed, positions):
            heads = project(y).split(4)
            tokens.append([rotate(norm(head, head_norm), position) for head in heads])
        return tokens

    x = transformer.embed_tokens(batch.tokens[0])
    normed = [norm(y, block.input_layernorm) for y in x]
    q = rotated_heads(attention.q_proj, attention.q_norm)
    k = rotated_heads(attention.k_proj, attention.k_norm)
    v = [attention.v_proj(y).split(4) for y in normed]
    output = transformer(batch.tokens, batch.positions, attention_mask(batch))[0]
    for t in range(7):
        visible = [s for s in range(t + 1) if segments[s] in (0, segments[t])]
        heads = []
        for h in range(4):  # two query heads share one head of keys and values
            logits = [q[t][h] @ k[s][h // 2] / 2 for s in visible]
            shares = torch.stack(logits).softmax(0)
            heads.append(sum(share * v[s][h // 2] for s, share in zip(visible, shares)))
        y = x[t] + attention.o_proj(torch.cat(heads))
        z = norm(y, block.post_attention_layernorm)
        gate = block.mlp.gate_proj(z)
        gate = gate / (1 + (-gate).exp())
        y = y + block.mlp.down_proj(gate * block.mlp.up_proj(z))
        expected = norm(y, transformer.norm)
        assert torch.allclose(output[t], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_reading_through_the_cache_equals_reading_the_whole():
    """Each prompt is read once and continued in three ways."""
    transformer = randomize(Transformer(CONFIG))
    cache = KVCache(CONFIG, 2, 9, "cpu", torch.float32)
    tokens, positions = torch.randint(0, 49, (6, 9)), torch.arange(9).expand(6, -1)
    tokens[:, :4] = tokens[::3, :4].repeat_interleave(3, dim=0)
    prompts = transformer(tokens[::3, :4], positions[::3, :4], cache=cache)
    cache.select_rows(torch.tensor([0, 0, 0, 1, 1, 1]))
    parts = [prompts.repeat_interleave(3, dim=0)]
    for t in range(4, 9):
        token, position = tokens[:, t : t + 1], positions[:, t : t + 1]
        parts.append(transformer(token, position, cache=cache))
    assert torch.allclose(
        torch.cat(parts, 1), transformer(tokens, positions), atol=1e-4
    )


def test_logits_in_parts_and_gradient_checkpointing_change_no_gradient(
    reward_model, monkeypatch
):
    batch = collate([example_of(*numbers) for numbers in PAIRS])
    results = []
    for max_logits, checkpointing in ((10**9, False), (5 * 50, True)):
        monkeypatch.setattr(model, "MAX_LOGITS", max_logits)
        reward_model.model.gradient_checkpointing = checkpointing
        rewards, logprobs = read_batch(reward_model, batch)
        loss = rewards.sum() + logprobs.sum()
        gradients = torch.autograd.grad(loss, list(reward_model.parameters()))
        results.append([logprobs, *gradients])
    for first, second in zip(*results):
        assert torch.allclose(first, second, atol=1e-5)


def test_prefix_rewards_are_the_last_the_mean_and_the_sum_of_scores():
    scores = torch.tensor([[1.0, 3.0, 5.0], [2.0, 9.0, float("nan")]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    last = prefix_rewards_from_scores(scores, mask, "last")
    mean = prefix_rewards_from_scores(scores, mask, "mean")
    total = prefix_rewards_from_scores(scores, mask, "sum")
    assert last[mask].tolist() == [1, 3, 5, 2, 9]
    assert mean[mask].tolist() == [1, 2, 3, 2, 5.5]
    assert torch.allclose(total[mask], 0.1 * torch.tensor([1.0, 4, 9, 2, 11]))


def test_the_language_model_loss_is_normalized_by_each_length():
    logprobs = torch.tensor([[-1.0, -2.0], [-5.0, float("nan")], [0.0, 0.0]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    assert length_normalized_nll(logprobs, mask).item() == (1.5 + 5) / 2
    assert length_normalized_nll(logprobs, mask, 10).item() == pytest.approx(0.65)


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_starts_as_its_generator_with_its_own_lm_head(tied):
    generator = randomize(LanguageModel(dataclasses.replace(CONFIG, tied=tied)))
    is_tied = generator.lm_head.weight is generator.model.embed_tokens.weight
    assert is_tied == tied
    reward_model = RewardModel.from_generator(generator)
    weights = reward_model.state_dict()
    for name, weight in generator.state_dict().items():
        assert torch.equal(weights[name], weight)
    assert reward_model.lm_head.weight is not reward_model.model.embed_tokens.weight


def test_training_the_last_layers_freezes_the_rest(reward_model):
    reward_model.train_last_layers(1)
    trained = [n for n, p in reward_model.named_parameters() if p.requires_grad]
    assert {"model.norm.weight", "score.weight", "lm_head.weight"} <= set(trained)
    rest = set(trained) - {"model.norm.weight", "score.weight", "lm_head.weight"}
    assert rest and all(name.startswith("model.layers.1.") for name in rest)
    with pytest.raises(UserError, match="--train_last_layers=3, but the model has 2"):
        reward_model.train_last_layers(3)


def test_gradients_are_clipped_and_the_lm_heads_separately(reward_model):
    """An LM head that is the embedding is clipped with the others."""
    for module, separate in (
        (reward_model, {"lm_head.weight"}),
        (LanguageModel(CONFIG), set()),
    ):
        before, gradients = copy.deepcopy(module.state_dict()), {}
        for name, parameter in module.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradients[name] = parameter.grad.clone()
        squares = [gradients[n].norm() ** 2 for n in gradients.keys() - separate]
        norm = sum(squares) ** 0.5
        optimizer = torch.optim.SGD(module.parameters())
        assert update(module, optimizer, 0.5) == pytest.approx(norm)
        for name, parameter in module.named_parameters():
            own_norm = gradients[name].norm() if name in separate else norm
            step = 0.5 * model.CLIP_NORM / own_norm * gradients[name]
            assert torch.allclose(before[name] - parameter, step, atol=1e-6), name
            assert parameter.grad is None


def test_weight_decay_is_on_matrices_and_no_parameter_is_left_out(reward_model):
    optimizer = make_optimizer(reward_model, 0.1)
    before = copy.deepcopy(reward_model.state_dict())
    for parameter in reward_model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, weights in reward_model.state_dict().items():
        factor = 1.0 if weights.dim() < 2 else 1 - 0.1 * model.WEIGHT_DECAY
        assert torch.allclose(weights, factor * before[name]), name


def test_the_learning_rate_warms_up_and_then_falls_to_a_tenth():
    rates = [learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == rates[10] == 1.0
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert learning_rate(0, 1, 1.0, 0) == 1.0


def test_impossible_sizes_are_named():
    for sizes, message in (
        ((3, 16), "--n_embd=16 is not a multiple of --n_head=3"),
        ((4, 16, 3), "4 attention heads are not a multiple of the 3"),
        ((2, 6), "a head has 3 channels"),
    ):
        with pytest.raises(UserError, match=message):
            ModelConfig(9, 9, 1, *sizes)
