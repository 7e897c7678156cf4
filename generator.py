"""The generator: a language model that provides p, the next-token probabilities.

    python generator.py --dataset=toy

It is trained on the responses of the training pairs, chosen and rejected, and then
frozen (section 4 of the paper). Its probability p of every response token is computed
once and stored: OUT_DIR/p.npy is an array of the same length as the tokens of the
training split, 0 on prompts, described by p.json. `python train.py` does this if a
dataset has no generator yet. A pretrained model is used unchanged (--steps=0).

`# task N` and `# end` enclose a solution of the course (exercises/README.md).
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from common import (
    POSITIVE,
    Run,
    UserError,
    autocast,
    check_choice,
    check_all_finite,
    check_range,
    file_sha256,
    is_finished,
    load_checkpoint,
    lock,
    pick_device,
    read_json,
    run_script,
    write_atomically,
    write_json,
)
import numpy as np
import torch
from tqdm import tqdm

from data.batch import BatchSchedule, collate, map_examples
from data.dataset import ArrayWriter, chunks, open_array, open_dataset
from data.tokenizer import from_dict
from model import (
    LanguageModel,
    ModelConfig,
    learning_rate,
    length_normalized_nll,
    load_language_model,
    make_optimizer,
    update,
)

LOG_INTERVAL, SAVE_INTERVAL = 100, 250  # updates
EXAMPLES_AT_ONCE = 512  # examples whose p is computed and written together
P_SOURCES = ("generator", "uniform", "inverse", "shuffled", "exact")


@dataclass(frozen=True)
class GeneratorConfig:
    dataset: str = "toy"  # a folder under data/
    out_dir: str = ""  # empty: out/DATASET-generator
    resume: bool = False  # continue from the last checkpoint in out_dir
    seed: int = 0  # random seed of the initial weights and the order of the data
    init_from: str = ""  # a pretrained model: a folder, or owner/model on the hub
    n_layer: int = 2  # transformer blocks. With init_from, sizes are that model's
    n_head: int = 4  # attention heads
    n_embd: int = 64  # channels
    steps: int = 500  # updates. 0: use the weights of init_from unchanged
    batch_size: int = 16  # pairs (or labelled responses) per update
    learning_rate: float = 0.0  # peak. 0: 4e-3, or 1e-5 with init_from
    warmup: int = 20  # updates of linear warm-up
    temperature: float = 1.0  # at which p is computed
    top_p: float = 1.0  # p is 0 outside the smallest set of tokens with this mass
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto (bfloat16 on CUDA), float32, bfloat16


def build_generator(config, dataset):
    """A new LanguageModel, with random or pretrained weights."""
    tokenizer, block_size = dataset.tokenizer, dataset.block_size
    default = GeneratorConfig()
    sizes = config.n_layer, config.n_head, config.n_embd
    has_default_sizes = sizes == (default.n_layer, default.n_head, default.n_embd)
    if tokenizer.is_pretrained and not config.init_from and has_default_sizes:
        raise UserError(
            f"the dataset has the tokenizer of {tokenizer.name}. Start from that model "
            f"with --init_from={tokenizer.name}, or set the sizes of a random one "
            "(--n_layer, --n_head, --n_embd)"
        )
    if config.init_from:
        from pretrained.weights import load_pretrained

        return load_pretrained(config.init_from, tokenizer, block_size)
    return LanguageModel(ModelConfig(tokenizer.vocab_size, block_size, *sizes))


def train_generator(config, dataset, device):
    """Train or resume training. Return the frozen LanguageModel."""
    split = dataset.split("train")
    torch.manual_seed(config.seed)
    model = build_generator(config, dataset).to(device)
    optimizer = make_optimizer(model, config.learning_rate)
    run = Run("generator", config, {"data": dataset.fingerprint})
    first_step = run.resume(model, optimizer)
    schedule = BatchSchedule(split.example_lengths, config.batch_size, config.seed)
    steps, history = range(first_step, config.steps), []
    for step in tqdm(steps, "generator", disable=None, leave=False):
        batch = collate([split[i] for i in schedule[step]]).to(device)
        with autocast(device, config.dtype):
            logprobs = model.lm_logprobs(model.hidden_states(batch), batch)  # (2B, T)
        loss = length_normalized_nll(logprobs, batch.mask)
        loss.backward()
        rate = learning_rate(step, config.steps, config.learning_rate, config.warmup)
        grad_norm = update(model, optimizer, rate)
        history.append(torch.stack([loss.detach(), grad_norm]))

        done = step + 1
        is_last = done == config.steps
        if done % LOG_INTERVAL == 0 or is_last:
            record = {
                "step": done,
                "loss": loss.item(),
                "grad_norm": grad_norm.item(),
                "learning_rate": rate,
            }
            check_all_finite(done, history)
            history = []
            run.log(record)
            tqdm.write(
                f"generator step {done:5d}  loss {record['loss']:.4f}"
                f"  grad_norm {record['grad_norm']:.3f}"
            )
        if done % SAVE_INTERVAL == 0 and not is_last:
            run.save(done, model, optimizer, dataset.tokenizer)
    run.save(config.steps, model, optimizer, dataset.tokenizer)
    return model.eval().requires_grad_(False)


def load_generator(folder, device, p_fingerprint=""):
    """Load a finished generator or policy. Return the frozen model and its tokenizer.

    p_fingerprint: Probs.fingerprint of a reward model. Raises a UserError if p was
        computed again since
    """
    checkpoint = load_checkpoint(folder, "generator", "policy")
    if not is_finished(checkpoint):
        raise UserError(
            f"the {checkpoint['kind']} in {folder} is not finished. Run its command "
            "again with --resume=True"
        )
    if p_fingerprint:
        read_p_metadata(folder, p_fingerprint)
    model = load_language_model(checkpoint).to(pick_device(device))
    return model, from_dict(checkpoint["tokenizer"])


# Next-token probabilities -------------------------------------------------------------


@torch.no_grad()
def response_logprobs(model, examples, temperature=1.0, top_p=1.0):
    """log p of every response token given all before it.

    Returns, for each Example, a list of float32 arrays, one per response. Tokens
    outside top_p have -inf.
    """

    def compute_logprobs(batch):
        batch = batch.to(model.device)
        hidden = model.hidden_states(batch)  # (B, L, C)
        states, targets = model.states_and_targets(hidden, batch)  # (M, C), (M,)
        logprobs = []
        for part, part_targets in zip(states.split(512), targets.split(512)):
            all_logprobs = sampling_logprobs(model.lm_head(part), temperature, top_p)
            part_targets = part_targets[:, None]
            logprobs.append(all_logprobs.gather(1, part_targets).squeeze(1))
        logprobs = torch.cat(logprobs).cpu().numpy()  # (M,), response by response
        lengths = batch.mask.sum(1).tolist()
        return np.split(logprobs, np.cumsum(lengths)[:-1])

    return map_examples(examples, compute_logprobs)


def sampling_logprobs(logits, temperature, top_p):
    """log p of the next token after temperature and nucleus (top-p) truncation.

    (rows, V) -> same
    """
    logprobs = (logits.float() / temperature).log_softmax(1)
    if top_p < 1:
        sorted_logprobs, order = logprobs.sort(1, descending=True)
        probs = sorted_logprobs.exp()
        mass_before = probs.cumsum(1) - probs  # the token that crosses top_p stays
        sorted_logprobs[mass_before >= top_p] = -torch.inf
        logprobs = logprobs.scatter(1, order, sorted_logprobs.log_softmax(1))
    return logprobs


def write_p(model, split, folder, metadata):
    """Write p of every response token of a Split to folder/p.npy, 0 on prompts.

    metadata: for p.json: the data's fingerprint, temperature and top_p
    """
    temperature, top_p = metadata["temperature"], metadata["top_p"]

    def write(temporary):
        writer = ArrayWriter(temporary, "<f4")
        progress = tqdm(range(len(split)), "p", disable=None, leave=False)
        for indices in chunks(progress, EXAMPLES_AT_ONCE):
            examples = [split[i] for i in indices]
            logprobs = response_logprobs(model, examples, temperature, top_p)
            for example, parts in zip(examples, logprobs):
                writer.append(np.zeros(len(example.prompt)))
                writer.append(np.exp(np.concatenate(parts)))
        writer.close()

    write_atomically(folder / "p.npy", write)
    p = open_array(folder / "p.npy")
    n_response_tokens = int(split.lengths[:, 1:].sum(dtype=np.int64))
    mean = float(p.sum(dtype=np.float64) / n_response_tokens)
    digest = file_sha256(folder / "p.npy")
    write_json(folder / "p.json", {**metadata, "digest": digest, "mean": mean})
    print(
        f"wrote {folder}/p.npy: {n_response_tokens} response tokens, mean p {mean:.3f}"
    )


def read_p_metadata(folder, p_fingerprint=""):
    """Read p.json. p_fingerprint: Probs.fingerprint that it must match."""
    metadata = read_json(Path(folder) / "p.json", "python generator.py")
    if p_fingerprint and metadata["digest"] not in p_fingerprint:
        raise UserError(
            f"p in {folder} was computed again after the reward model was trained. "
            "Train the reward model again"
        )
    return metadata


def generator_command(folder):
    """The command that makes the generator in a folder anew."""
    settings = load_checkpoint(folder, "generator", "policy")["settings"]
    parts = ["python generator.py"]
    for field in dataclasses.fields(GeneratorConfig):
        value = settings.get(field.name, field.default)
        if value != field.default:
            parts.append(f"--{field.name}={value}")
    return " ".join([*parts, f"--out_dir={folder}"])


class Probs:
    """The p that training reads: the generator's, or a control in its place.

    generator  the generator's probabilities
    uniform    1 at every token: do the probabilities matter?
    inverse    1 - p: the same information, used the wrong way round
    shuffled   the generator's, permuted inside each response. The first token's p
               stays in place, because no transition uses it
    exact      the toy world's exact probabilities

    probs[i] -> p of the tokens of pair i's first and second response, two arrays
    """

    def __init__(self, p_source, dataset, folder):
        check_choice("p_source", p_source, P_SOURCES)
        self.p_source, self.split = p_source, dataset.split("train")
        metadata = read_p_metadata(folder)
        if metadata["data"] != dataset.fingerprint:
            raise UserError(
                f"{folder}/p.npy was computed for other data than "
                f"{dataset.folder}. Run again: {generator_command(folder)}"
            )
        self.fingerprint = f"{p_source} {metadata['digest']}"
        if p_source != "exact":
            self.array = open_array(Path(folder) / "p.npy", metadata["digest"])
        elif dataset.kind == "toy":
            self.array = dataset.array("train", "exact-p")
        else:
            raise UserError("--p_source=exact needs a toy dataset")

    def __getitem__(self, i):
        parts = self.split.response_values(self.array, i)
        # task 5
        if self.p_source == "uniform":
            return [np.ones(len(p), np.float32) for p in parts]
        if self.p_source == "inverse":
            return [1 - p for p in parts]
        if self.p_source == "shuffled":
            shuffled = []
            for side, p in enumerate(parts):
                rng = np.random.default_rng([i, side])
                shuffled.append(np.concatenate([p[:1], rng.permutation(p[1:])]))
            return shuffled
        return list(parts)
        # end


def main(config):
    rate = config.learning_rate or (1e-5 if config.init_from else 4e-3)
    config = dataclasses.replace(
        config,
        out_dir=config.out_dir or f"out/{config.dataset}-generator",
        learning_rate=rate,
    )
    check_range(config, 1, 10**9, "n_layer", "n_head", "n_embd", "batch_size")
    check_range(config, 0, 10**9, "seed", "learning_rate", "warmup", "steps")
    check_range(config, POSITIVE, 10**9, "temperature")
    check_range(config, POSITIVE, 1, "top_p")
    device, dataset = pick_device(config.device), open_dataset(config.dataset)
    with lock(config.out_dir):
        model = train_generator(config, dataset, device)
        metadata = {
            "data": dataset.fingerprint,
            "temperature": config.temperature,
            "top_p": config.top_p,
        }
        with autocast(device, config.dtype):
            write_p(model, dataset.split("train"), Path(config.out_dir), metadata)


if __name__ == "__main__":
    run_script(GeneratorConfig, main)
