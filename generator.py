"""The generator: a language model whose next-token probabilities say which prefixes must agree.

    python generator.py --dataset=toy

It is trained on the responses of the training pairs, chosen and rejected, each normalised by its
own length, and then frozen (section 4 of the paper). From then on its probability p of every
response token never changes, so p is written once: OUT_DIR/p.npy, beside the dataset's tokens place
by place, and p.json, which says of what. It also samples responses, for best-of-N and DPO.
`python train.py` runs this command by itself where a dataset has no generator yet.
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from config import (TINY, Stopping, UserError, autocast, check_finite, in_range, pick_device,
                    run_script)
import numpy as np
import torch
from tqdm import tqdm

from data import tokenizer as tokenizers
from data.dataset import chunks, open_array, open_dataset, write_array
from data.files import Run, file_digest, load_checkpoint, write_json
from data.probs import described
from data.rows import Row, batch_of, make_batch, row_by_row
from data.weights import read_folder
from model import (KVCache, LanguageModel, ModelConfig, frozen_language_model, learning_rate,
                   length_normalised_nll, make_optimizer, pretrained_language_model, update)

LOG_EVERY, SAVE_EVERY = 100, 250    # updates
ROWS = 512      # read, sorted by length and written at a time
CACHE = 2 ** 31     # bytes of keys and values while sampling, if one prompt's rows allow it


@dataclass(frozen=True)
class GeneratorConfig:
    dataset: str = "toy"            # a folder under data/, made by its prepare.py
    out_dir: str = ""               # empty: out/DATASET-generator
    resume: bool = False            # go on from out_dir's last checkpoint
    seed: int = 0                   # initial weights and order of the data
    init_from: str = ""             # weights to start from: a folder, or owner/model on the hub
    n_layer: int = 2                # transformer blocks (init_from brings its own sizes)
    n_head: int = 4                 # attention heads
    n_embd: int = 64                # channels
    steps: int = 500                # updates; 0: none, init_from's weights as they are
    batch_size: int = 16            # pairs per update (or labelled responses)
    learning_rate: float = 0.0      # peak; 0: 4e-3, with init_from 1e-5
    warmup: int = 20                # updates of linear warm-up
    temperature: float = 1.0        # at which p is taken
    top_p: float = 1.0              # p of a token outside the smallest set that holds top_p is 0
    device: str = "auto"            # auto, cpu, cuda, cuda:N
    dtype: str = "auto"             # auto (bfloat16 on CUDA), float32, bfloat16


def train_generator(config, dataset, device):
    """Train, or go on; -> the frozen LanguageModel."""
    tokenizer, data = dataset.tokenizer, dataset.split("train")
    precision = autocast(device, config.dtype)
    torch.manual_seed(config.seed)
    if config.init_from:
        found = read_folder(config.init_from, tokenizer, dataset.block_size)
        model = pretrained_language_model(*found, config.init_from)
    else:
        model = LanguageModel(ModelConfig(tokenizer.vocab_size, dataset.block_size, config.n_layer,
                                          config.n_head, config.n_embd))
    model.to(device)
    optimizer = make_optimizer(model, config.learning_rate)
    run = Run("generator", config, {"data": dataset.fingerprint})
    first = run.restore(model, optimizer)
    bar = tqdm(range(first, config.steps), "generator", config.steps, initial=first, disable=None,
               leave=False)
    for step in bar:
        rate = learning_rate(step, config.steps, config.learning_rate, config.warmup)
        rows = [data[i] for i in batch_of(step, len(data), config.batch_size, config.seed)]
        batch = make_batch(rows, likelihoods=None).to(device)
        with precision:
            loss = length_normalised_nll(model(batch), batch, (batch.lengths > 0).sum())
        loss.backward()
        norm = update(model, optimizer, rate)
        done = step + 1
        if done % LOG_EVERY == 0 or done % SAVE_EVERY == 0 or done == config.steps:
            record = {"step": done, "loss": loss.item(), "grad_norm": norm.item(),
                      "learning_rate": rate}
            check_finite(done, record["loss"], record["grad_norm"])
            run.log(record)
            tqdm.write(f"generator step {done:5d}  loss {record['loss']:.4f}"
                       f"  grad_norm {record['grad_norm']:.3f}")
        if (done % SAVE_EVERY == 0 or Stopping.asked) and done < config.steps:
            run.save(done, model, optimizer, tokenizer)
    run.save(config.steps, model, optimizer, tokenizer)
    return model.eval().requires_grad_(False)


def load_generator(folder, device, trained_on=""):
    """A finished generator's (or policy's) folder -> (frozen LanguageModel, its tokenizer).
    device: as in the settings; trained_on: what a reward model's checkpoint says of its p."""
    checkpoint = load_checkpoint(folder, "generator", "policy")
    if checkpoint["step"] < checkpoint["settings"]["steps"]:
        raise UserError(f"the {checkpoint['kind']} in {folder} is unfinished; give its command "
                        "again with --resume=True")
    if trained_on:
        described(folder, trained_on)
    model = frozen_language_model(checkpoint).to(pick_device(device))
    return model, tokenizers.from_dict(checkpoint["tokenizer"])


# The probabilities ------------------------------------------------------------------------------

@torch.no_grad()
def response_logprobs(model, rows, temperature=1.0, top_p=1.0):
    """log p of every response token given all before it: for each Row a list of float32 arrays, one
    per response, -inf where top_p leaves no p."""
    device = model.lm_head.weight.device

    def logprobs_of(batch):
        batch = batch.to(device)
        states = model.model.read(batch)[batch.sources]                 # (M, C)
        logprobs = torch.cat([
            sampling_logprobs(model.lm_head(part), temperature, top_p)
            .gather(1, targets[:, None]).squeeze(1)
            for part, targets in zip(states.split(512), batch.targets.split(512))])
        return np.split(logprobs.cpu().numpy(), np.cumsum(batch.lengths.tolist())[:-1])

    return row_by_row(rows, logprobs_of, likelihoods=None)


def sampling_logprobs(logits, temperature, top_p):
    """log p of the next token at a temperature (> 0), within the smallest set that holds top_p.
    (rows, V) -> same"""
    logprobs = (logits.float() / temperature).log_softmax(1)
    if top_p < 1:
        ordered, index = logprobs.sort(1, descending=True)
        probs = ordered.exp()
        ordered[probs.cumsum(1) - probs >= top_p] = -torch.inf  # the one that crosses top_p stays
        logprobs = logprobs.scatter(1, index, ordered.log_softmax(1))
    return logprobs


def write_p(model, split, folder, about):
    """p of every response token of a Split -> folder/p.npy, 0 on prompts; then folder/p.json.
    about: what p.json says of it, with the temperature and top_p at which p is taken."""
    def p_of_rows():
        bar = tqdm(range(len(split)), "p", disable=None, leave=False)
        for rows in chunks((split[i] for i in bar), ROWS):
            found = response_logprobs(model, rows, about["temperature"], about["top_p"])
            for row, parts in zip(rows, found):
                yield np.zeros(len(row.prompt))
                yield np.exp(np.concatenate(parts))

    write_array(folder / "p.npy", split.tokens.shape, "<f4", p_of_rows())
    p, count = open_array(folder / "p.npy"), split.lengths[:, 1:].sum(dtype=np.int64)
    mean = float(p.sum(dtype=np.float64) / count)
    write_json(folder / "p.json", about | {"digest": file_digest(folder / "p.npy"), "mean": mean})
    print(f"wrote {folder}/p.npy: p of {count} response tokens, mean {mean:.3f}")


# Sampling ---------------------------------------------------------------------------------------

class Sampling:
    """n continuations of each prompt, written token by token; the prompt is read once, and its keys
    and values serve all its rows.

    prompts (P, T) int64, all of one length; rng: torch.Generator on their device. temperature 0 is
    greedy. `tokens` (P n, t) is what is written, prompt by prompt, end-of-text in every place after
    a response's end."""

    @torch.no_grad()
    def __init__(self, model, prompts, n, end_of_text, rng, max_new_tokens=10**9, temperature=1.0):
        self.model, self.end_of_text, self.rng = model, end_of_text, rng
        self.temperature = temperature
        config, (P, T) = model.model.config, prompts.shape
        self.room = min(max_new_tokens, config.block_size - T)
        if self.room < 1:
            raise UserError(f"the prompt fills the context of {config.block_size} tokens")
        self.cache = KVCache(config, P, T + self.room, prompts.device, model.lm_head.weight.dtype)
        positions = torch.arange(T, device=prompts.device).expand(P, -1)
        self.hidden = model.model(prompts, positions, cache=self.cache)[:, -1]      # (P, C)
        self.tokens = torch.empty(P, 0, dtype=torch.int64, device=prompts.device)
        self.keep(torch.arange(P, device=prompts.device).repeat_interleave(n))

    def keep(self, rows):
        """Go on with these rows alone, by number (m,); a number that stands there twice is two."""
        self.hidden, self.tokens = self.hidden[rows], self.tokens[rows]
        self.cache.stored = self.cache.stored[:, :, rows]

    @torch.no_grad()
    def write(self, count=10**9):
        """Write so many tokens to every row, fewer where there is no room or all have ended.
        -> all that is written: an array for each row, up to its end-of-text"""
        for _ in range(min(count, self.room - self.tokens.size(1))):
            done = (self.tokens == self.end_of_text).any(1)                         # (P n,)
            if done.all():
                break
            if self.tokens.size(1):
                here = torch.full_like(self.tokens[:, :1], self.cache.length)
                self.hidden = self.model.model(self.tokens[:, -1:], here, cache=self.cache)[:, -1]
            logits = self.model.lm_head(self.hidden)
            token = draw(logits, self.rng, self.temperature)                        # (P n,)
            token = torch.where(done, self.end_of_text, token)
            self.tokens = torch.cat([self.tokens, token[:, None]], 1)
        written = self.tokens.cpu().numpy()
        sizes = (written != self.end_of_text).sum(1) + 1
        return [row[:size] for row, size in zip(written, sizes)]


def draw(logits, rng, temperature):
    """One token from each row of logits: (rows, V) -> (rows,)."""
    if temperature == 0:
        return logits.argmax(1)
    probs = (logits.float() / temperature).softmax(1)
    clocks = -torch.rand(probs.shape, generator=rng, device=probs.device).log() / probs
    return clocks.argmin(1)     # exponential clocks of rates p: each is first with probability p


def sample_rows(model, tokenizer, prompts, n, seed, max_new_tokens=10**9, rows=256):
    """n responses to each prompt (token ids) -> a Row for each.

    Prompts of one length are read together, about `rows` responses at a time, fewer where their
    keys and values would not fit CACHE. A response ends with end-of-text, but for those that had no
    end within max_new_tokens.
    """
    device, config, found = model.lm_head.weight.device, model.model.config, {}
    rng = torch.Generator(device).manual_seed(seed)
    per_token = 2 * config.n_layer * config.n_kv_head * config.head_dim * 4     # bytes
    progress = tqdm(total=len(prompts), desc="sampling", disable=None, leave=False)
    for length in sorted({len(tokens) for tokens in prompts}):
        group = (i for i, tokens in enumerate(prompts) if len(tokens) == length)
        longest = min(length + max_new_tokens, config.block_size)
        together = max(1, min(rows, CACHE // (per_token * longest)) // n)
        for part in chunks(group, together):
            some = np.stack([prompts[i] for i in part]).astype(np.int64)
            some = torch.from_numpy(some).to(device)
            written = Sampling(model, some, n, tokenizer.end_of_text, rng, max_new_tokens).write()
            for i, responses in zip(part, chunks(written, n)):
                found[i] = Row(prompts[i], tuple(responses))
            progress.update(len(part))
    progress.close()
    return [found[i] for i in range(len(prompts))]


def finished(rows, tokenizer):
    """Rows with those responses alone that ended by themselves: the others have no reward yet."""
    return [row._replace(responses=tuple(tokens for tokens in row.responses
                                         if tokenizer.end_of_text in tokens[-1:])) for row in rows]


def main(config):
    folder = config.out_dir or f"out/{config.dataset}-generator"
    rate = config.learning_rate or (1e-5 if config.init_from else 4e-3)
    config = dataclasses.replace(config, out_dir=folder, learning_rate=rate)
    in_range(config, 1, 10**9, "n_layer", "n_head", "n_embd", "batch_size")
    in_range(config, 0, 10**9, "seed", "learning_rate", "warmup", "steps")
    in_range(config, TINY, 10**9, "temperature")
    in_range(config, TINY, 1, "top_p")
    device, dataset = pick_device(config.device), open_dataset(config.dataset)
    model = train_generator(config, dataset, device)
    about = {"data": dataset.fingerprint, "temperature": config.temperature, "top_p": config.top_p}
    with autocast(device, config.dtype):
        write_p(model, dataset.split("train"), Path(config.out_dir), about)


if __name__ == "__main__":
    run_script(GeneratorConfig, main)
