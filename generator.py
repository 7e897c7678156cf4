"""The generator: a language model whose next-token probabilities say which prefixes must agree.

It is trained on the responses of the training pairs, chosen and rejected, each normalised by its own
length, and then frozen (section 4 of the paper). From then on its probability p of every response token
never changes, so p is written down once. It also samples responses, for best-of-N.

    python generator.py --dataset=toy

`python train.py` does this by itself where no generator is found.
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import (TINY, Run, UserError, check_finite, fingerprint, in_range, load_checkpoint, run_script, show,
                    write_atomically)
from data import tokenizer as tokenizers
from data.batches import in_length_order, load_responses, pack, training_indices
from data.prepare import open_dataset
from model import (KVCache, LanguageModel, ModelConfig, autocast, learning_rate, make_optimizer, pick_device, update)
from pretrained import load_weights, obtain_folder, read_pretrained, read_sizes


@dataclass(frozen=True)
class GeneratorConfig:
    dataset: str = "toy"            # a folder under data/, made by its prepare.py
    out_dir: str = ""               # empty: out/DATASET-generator
    seed: int = 0                   # initial weights and order of the data
    init_from: str = ""             # weights to start from: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder in that layout
    n_layer: int = 2                # transformer blocks (these three are those of init_from, where it is given)
    n_head: int = 4                 # attention heads
    n_embd: int = 64                # channels
    block_size: int = 160           # longest row, in tokens
    steps: int = 500                # updates
    batch_size: int = 16            # pairs per update, twice as many responses (or labelled responses)
    learning_rate: float = 4e-3     # peak
    warmup: int = 20                # updates of linear warm-up
    weight_decay: float = 0.1       # on matrices
    clip: float = 1.0               # largest gradient norm
    log_interval: int = 100         # updates between log lines
    save_interval: int = 250        # updates between checkpoints
    device: str = "auto"            # auto, cpu, cuda, cuda:N
    dtype: str = "auto"             # auto (bfloat16 on CUDA), float32, bfloat16
    recompute: bool = False         # keep no activations inside the blocks: less memory, a third more work
    strict: bool = False            # stop at the first bad row
    overwrite: bool = False         # start over where out_dir holds another run


def length_normalised_nll(logprobs, packed, responses):
    """-1/|y| sum_t log P(y_t | x, y_<t), summed over the responses of a Packed batch and divided by `responses`; (M,) -> ()."""
    return -(logprobs / packed.lengths[packed.owners]).sum() / responses


def train_generator(config):
    """Train, or continue, or just load the generator in config.out_dir; returns the frozen LanguageModel."""
    in_range(config, 1, 10**9, "n_layer", "n_head", "n_embd", "block_size", "steps", "batch_size", "log_interval",
             "save_interval")
    in_range(config, 0, 10**9, "seed", "learning_rate", "warmup", "weight_decay")
    in_range(config, TINY, 10**9, "clip")
    device, dataset = pick_device(config.device), open_dataset(config.dataset)
    autocast(device, config.dtype)
    tokenizer = dataset.tokenizer
    sizes = ModelConfig(tokenizer.vocab_size, config.block_size, config.n_layer, config.n_head, config.n_embd)
    run = Run(config.out_dir, "generator", config, config.overwrite)
    run.match(data=dataset.fingerprint, vocabulary=tokenizer.fingerprint)
    torch.manual_seed(config.seed)
    model = LanguageModel(sizes).to(device)
    model.transformer.recompute = config.recompute
    if config.init_from and run.checkpoint is None:
        load_weights(model, read_pretrained(config.init_from)[1], config.init_from)
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay)
    first = run.restore(model, optimizer)
    if first < config.steps:
        data = load_responses(dataset, "train", config.block_size, config.strict)
        for step in tqdm(range(first, config.steps), "generator", config.steps, initial=first, disable=None, leave=False):
            rate = learning_rate(step, config.steps, config.learning_rate, config.warmup)
            numbers, _ = data.batch_rows(training_indices(step, len(data), config.batch_size, config.seed))
            packed = pack([data.rows[i] for i in numbers]).to(device)
            with autocast(device, config.dtype):
                loss = length_normalised_nll(model(packed), packed, len(numbers))
            loss.backward()
            grad_norm = update(model, optimizer, rate, config.clip)
            done = step + 1
            if done % config.log_interval == 0 or done % config.save_interval == 0 or done == config.steps:
                record = {"step": done, "loss": loss.item(), "grad_norm": grad_norm.item(), "learning_rate": rate}
                check_finite(done, record["loss"], record["grad_norm"])
                run.log(record)
                tqdm.write(f"generator step {done:5d}  loss {record['loss']:.4f}  grad_norm {record['grad_norm']:.3f}")
            if done % config.save_interval == 0 or done == config.steps:
                run.save(done, model, optimizer, model_config=dataclasses.asdict(sizes), tokenizer=tokenizer.to_dict())
    return model.eval().requires_grad_(False)


def load_generator(folder, device):
    """A finished generator's (or policy's) folder -> (frozen LanguageModel, its tokenizer)."""
    checkpoint = load_checkpoint(folder, ("generator", "policy"))
    if checkpoint["step"] < checkpoint["settings"]["steps"]:
        raise UserError(f"the generator in {folder} is unfinished; continue it with the command that started it")
    model = LanguageModel(ModelConfig(**checkpoint["model_config"])).to(device)
    model.load_state_dict(checkpoint["model"])
    return model.eval().requires_grad_(False), tokenizers.from_dict(checkpoint["tokenizer"])


def response_probs(model, rows, temperature=1.0, top_p=1.0):
    """p of every response token given all before it: a list of float32 arrays, one per row.

    With a temperature or top_p it is the token's probability under `sampling_probs`: 0 where it would not be drawn.
    """
    return [torch.from_numpy(logprobs).exp().numpy() for logprobs in response_logprobs(model, rows, temperature, top_p)]


@torch.no_grad()
def response_logprobs(model, rows, temperature=1.0, top_p=1.0, batch_size=64):
    """log p of every response token, as response_probs: a list of float32 arrays, one per row."""
    device = model.lm_head.weight.device
    found = [None] * len(rows)
    for indices in in_length_order(rows, batch_size):
        packed = pack([rows[i] for i in indices]).to(device)
        if temperature == top_p == 1:
            logprobs = model(packed)                                            # (M,)
        else:
            hidden = model.transformer(packed.tokens, packed=packed)            # (N, C)
            logprobs = torch.cat([
                sampling_probs(model.lm_head(hidden[sources]), temperature, top_p).gather(1, targets[:, None]).squeeze(1).log()
                for sources, targets in zip(packed.sources.split(512), packed.targets.split(512))])
        ends = np.cumsum([len(rows[i].response) for i in indices])
        for i, row_logprobs in zip(indices, np.split(logprobs.cpu().numpy(), ends[:-1])):
            found[i] = row_logprobs.copy()
    return found


def stored_probs(model, rows, folder, temperature=1.0, top_p=1.0):
    """response_probs, computed once: 4 bytes per response token in folder/probs-KEY.pt.

    KEY is the fingerprint of the weights, of the rows and of how p is taken, so that nothing else ever
    finds this file; a file whose content does not fit its key is refused.
    """
    key = fingerprint(model.state_dict(), *(part for row in rows for part in row[:2]),
                      np.array([len(part) for row in rows for part in row[:2]]), f"{temperature} {top_p}")
    path = Path(folder) / f"probs-{key[:16]}.pt"
    lengths = [len(row.response) for row in rows]
    if not path.exists():
        flat = torch.from_numpy(np.concatenate(response_probs(model, rows, temperature, top_p)))
        write_atomically(path, lambda temporary: torch.save({"kind": "probs", "key": key, "probs": flat}, temporary))
    stored = load_checkpoint(path, "probs")
    if stored["key"] != key or len(stored["probs"]) != sum(lengths):
        raise UserError(f"{path} does not belong to this generator and these pairs; delete it to have it made again")
    return np.split(stored["probs"].numpy(), np.cumsum(lengths)[:-1])


@torch.no_grad()
def sample(model, prompts, n, end_of_text, rng, max_new_tokens=10**9, temperature=1.0, top_p=1.0):
    """Continue each prompt n ways; the prompt is read once and its keys and values serve all n rows.

    prompts (P, T) int64, all of one length; rng: torch.Generator on their device.
    Returns (P, n, new tokens), end-of-text in every place after a response's end.
    temperature 0 is greedy; top_p keeps the smallest set of tokens with that much probability.
    """
    block_size = model.transformer.config.block_size
    room = min(max_new_tokens, block_size - prompts.size(1))
    if room < 1:
        raise UserError(f"the prompt fills the context of {block_size} tokens; nothing can be sampled")
    cache = KVCache(model.transformer.config, len(prompts), prompts.size(1) + room, prompts.device, model.lm_head.weight.dtype)
    hidden = model.transformer(prompts, cache)[:, -1].repeat_interleave(n, dim=0)   # (P n, C)
    cache.repeat(n)
    done = torch.zeros(len(hidden), dtype=torch.bool, device=prompts.device)
    found = []
    while True:
        token = draw(model.lm_head(hidden), rng, temperature, top_p)
        token = torch.where(done, end_of_text, token)
        found.append(token)
        done |= token == end_of_text
        if len(found) == room or done.all():
            return torch.stack(found, 1).view(len(prompts), n, -1)
        hidden = model.transformer(token[:, None], cache)[:, -1]


def sample_responses(model, prompts, n, end_of_text, rng, max_new_tokens=10**9, temperature=1.0, top_p=1.0, rows=256):
    """n responses to each prompt (a list of token ids): a list of n int32 arrays for each.

    Prompts of one length are read together, about `rows` responses at a time. A response ends with end-of-text,
    but for those that had no end within max_new_tokens.
    """
    device, found = model.lm_head.weight.device, {}
    progress = tqdm(total=len(prompts), desc="sampling", disable=None, leave=False)
    for length in sorted({len(tokens) for tokens in prompts}):
        group = [i for i, tokens in enumerate(prompts) if len(tokens) == length]
        for start in range(0, len(group), max(1, rows // n)):
            part = group[start:start + max(1, rows // n)]
            drawn = sample(model, torch.tensor([list(prompts[i]) for i in part], device=device), n, end_of_text, rng,
                           max_new_tokens, temperature, top_p)
            for i, responses in zip(part, drawn.cpu().numpy().astype(np.int32)):
                ends = [np.append(np.flatnonzero(tokens == end_of_text) + 1, len(tokens))[0] for tokens in responses]
                found[i] = [tokens[:end] for tokens, end in zip(responses, ends)]
            progress.update(len(part))
    progress.close()
    return [found[i] for i in range(len(prompts))]


def sampling_probs(logits, temperature, top_p):
    """Probabilities of the next token at a temperature (> 0), within the smallest set that holds top_p.  (rows, V) -> same"""
    probs = (logits.float() / temperature).softmax(1)
    if top_p < 1:
        ordered, index = probs.sort(1, descending=True)
        ordered[ordered.cumsum(1) - ordered >= top_p] = 0.0  # the token that crosses top_p stays
        probs = torch.zeros_like(probs).scatter_(1, index, ordered / ordered.sum(1, keepdim=True))
    return probs


def draw(logits, rng, temperature, top_p):
    """One token from each row of logits: (rows, V) -> (rows,)."""
    if temperature == 0:
        return logits.argmax(1)
    probs = sampling_probs(logits, temperature, top_p)
    clocks = -torch.rand(probs.shape, generator=rng, device=probs.device).log() / probs     # exponential, with rates p:
    return clocks.argmin(1)                                                                 # each is the first with probability p


def with_pretrained_sizes(config):
    """Settings with the sizes of the weights that they start from, if any; those must know the dataset's tokens."""
    if not config.init_from:
        return config
    sizes = read_sizes(obtain_folder(config.init_from))
    vocab_size = open_dataset(config.dataset).tokenizer.vocab_size
    if sizes.vocab_size != vocab_size:
        raise UserError(f"{config.init_from} knows {sizes.vocab_size} tokens, the dataset {config.dataset} has {vocab_size}; "
                        "for GPT-2's weights prepare it with --tokenizer=gpt2")
    if config.block_size > sizes.block_size:
        raise UserError(f"--block_size={config.block_size} is more than the {sizes.block_size} positions of {config.init_from}")
    return dataclasses.replace(config, n_layer=sizes.n_layer, n_head=sizes.n_head, n_embd=sizes.n_embd)


def main(config):
    config = with_pretrained_sizes(config)
    show(config)
    train_generator(dataclasses.replace(config, out_dir=config.out_dir or f"out/{config.dataset}-generator"))


if __name__ == "__main__":
    run_script(GeneratorConfig, main)
