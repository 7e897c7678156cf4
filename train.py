"""Train a reward model with intra-trajectory consistency (ICRM, arXiv 2506.09096).

    python train.py                                     the toy world, about a minute
    python train.py --regularizer=none                  the baseline
    python train.py --dataset=mine                      your own pairs (data/prepare.py)
    torchrun --standalone --nproc_per_node=K train.py   K processes share each batch

Prepares the toy world and the generator if they are missing, trains the reward model
from the generator's weights, and evaluates it on every split. Writes OUT_DIR/ckpt.pt,
log.jsonl and eval.json. Every start trains from scratch, unless --resume=True. The last
finished run is kept in OUT_DIR/previous.

Objective:  L = lm_weight L_SFT + lambda L_reg + (1 - lambda) L_BT. The released code's
"GRM" baseline has lambda = 0. Plain Bradley-Terry also has --lm_weight=0. If responses
are labelled correct or incorrect, L_BT is binary cross-entropy (the paper's mathematics
runs).
"""

import dataclasses
import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from common import (
    ROOT,
    Run,
    UserError,
    autocast,
    check_choice,
    check_all_finite,
    check_range,
    file_sha256,
    is_main_process,
    load_checkpoint,
    lock,
    pick_device,
    run_script,
    write_json,
)
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import toy
from data.batch import BatchSchedule, collate, pad
from data.dataset import open_dataset
from evaluate import evaluate_run, evaluate_split
from generator import P_SOURCES, GeneratorConfig, Probs
from generator import main as run_generator
from model import (
    PREFIX_REWARDS,
    RewardModel,
    learning_rate,
    length_normalized_nll,
    load_language_model,
    make_optimizer,
    update,
)
from regularizer import REGULARIZERS, last_tokens

LM_GRADIENT_SCALE = 1e-3  # share of L_SFT's gradient that reaches the transformer (GRM)
S_MOMENTUM = 0.95  # of S, a running mean of the regularizer's scale
INITIAL_S = 0.5  # an untrained model has z = 1/2, so its scale is the mean p
MIN_S = 1e-6  # S would vanish if p is 0 everywhere
WARMUP_SHARE = 0.25  # of all steps
LOG_COLUMNS = {
    "bt": "bt",
    "accuracy": "accuracy",
    "margin": "margin",
    "reg": "reg",
    "lm": "lm",
    "grad_norm": "grad_norm",
    "val_accuracy": "val acc",
    "val_correlation": "val corr",
}


@dataclass(frozen=True)
class TrainConfig:
    dataset: str = "toy"  # a folder under data/
    generator: str = ""  # folder of the generator. empty: out/DATASET-generator
    out_dir: str = ""  # empty: out/DATASET-REGULARIZER[-P][-PREFIX_REWARD]-seedSEED
    resume: bool = False  # continue from the last checkpoint in out_dir
    regularizer: str = "icrm"  # a name in regularizer.REGULARIZERS
    p_source: str = "generator"  # generator, uniform, inverse, shuffled, exact
    prefix_reward: str = "last"  # last, mean or sum of token scores (export: last)
    reg_weight: float = 0.5  # lambda. The regularizer `none` uses 0
    lm_weight: float = 1.0  # weight of L_SFT. 0 skips it
    seed: int = 0  # of the reward head and the order of the data
    steps: int = 40  # updates
    epochs: float = 0.0  # if above 0, sets the steps by the size of the data
    batch_size: int = 32  # pairs (or labelled responses) per update
    learning_rate: float = 0.0  # peak. 0: 2e-3, or 3e-4 with a pretrained model
    train_last_layers: int = 0  # train only the last N blocks and the heads. 0: all
    log_interval: int = 10  # updates between log lines
    eval_interval: int = 20  # updates between checkpoints, each evaluated on val
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto (bfloat16 on CUDA), float32, bfloat16
    compile: bool = False  # torch.compile the transformer
    gradient_checkpointing: bool = False  # less memory, more computation
    deterministic: bool = False  # deterministic algorithms on CUDA


# Objective ----------------------------------------------------------------------------


def bradley_terry(rewards, mask):
    """L_BT: -log sigma(reward of chosen - reward of rejected), mean over pairs.

    A response's reward is that of the prefix that ends at its last token. A missing
    response has reward 0, so a single labelled response gets binary cross-entropy.
    (2B, T), (2B, T) -> loss (), margins (B,)
    """
    final_rewards = torch.where(last_tokens(mask), rewards, 0.0).sum(1)  # (2B,)
    chosen, rejected = final_rewards.chunk(2)  # (B,) each
    margins = chosen - rejected
    return -F.logsigmoid(margins).mean(), margins


def divide_by_running_mean(penalty, scale, S):
    """L_reg = penalty / S, where S is a running mean of scale. Returns L_reg and S."""
    if scale is None:
        return penalty, S
    S = S_MOMENTUM * S + (1 - S_MOMENTUM) * scale.detach()
    S = S.clamp(min=MIN_S)
    return penalty / S, S


def scale_gradient(x, factor):
    """x, with its gradient multiplied by factor."""
    return factor * x + (1 - factor) * x.detach()


# Training -----------------------------------------------------------------------------


def collate_probs(pairs):
    """Pad the p of pairs. [[p of chosen, p of rejected], ...] -> (2B, T-1), (2B, T)

    Returns p_t, the probability of response token t+1 (0 on padding), and the mask of
    response tokens. Chosen responses come first, as in a Batch.
    """
    responses = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    mask = pad([np.ones(len(p)) for p in responses]).bool()
    return pad([p[1:] for p in responses], dtype=np.float32), mask


def train(config, dataset, probs, device):
    """Train the reward model. Return it, and the last metrics of val."""
    model, optimizer, run, first_step, S = build_or_resume(
        config, dataset, probs, device
    )
    regularizer = REGULARIZERS[config.regularizer]
    lambda_ = 0.0 if config.regularizer == "none" else config.reg_weight
    split, val_metrics = dataset.split("train"), {}
    schedule = BatchSchedule(split.example_lengths, config.batch_size, config.seed)
    rank, world_size = process_rank(), process_count()
    print(" step" + "".join(f"{name:>10}" for name in LOG_COLUMNS.values()))
    steps, history = range(first_step, config.steps), []
    # With disable=None, tqdm shows a bar only in a terminal.
    disable = None if is_main_process() else True
    for step in tqdm(steps, "reward model", disable=disable, leave=False):
        indices = schedule[step]
        p, mask = collate_probs([probs[i] for i in indices])
        p, mask = p.to(device), mask.to(device)  # (2B, T-1), (2B, T)
        # With several processes, each one reads its share of the B pairs.
        batch = collate([split[i] for i in indices[rank::world_size]]).to(device)

        with autocast(device, config.dtype):
            hidden = model.hidden_states(batch)  # (B, L, C)
            rewards = model.prefix_rewards(hidden, batch)  # (2B, T)
            loss_lm = lm_loss(model, hidden, batch, mask, config.lm_weight)
        rewards = gather_rewards(rewards, mask)  # of all processes
        loss_bt, margins = bradley_terry(rewards, mask)
        penalty, scale = regularizer(rewards, p, mask)
        loss_reg, S = divide_by_running_mean(penalty, scale, S)
        loss = config.lm_weight * loss_lm + lambda_ * loss_reg + (1 - lambda_) * loss_bt

        loss.backward()
        gradients = [w.grad for w in model.parameters() if w.grad is not None]
        loss_lm = loss_lm.detach()
        sum_over_processes([loss_lm, *gradients])
        rate = learning_rate(
            step, config.steps, config.learning_rate, int(WARMUP_SHARE * config.steps)
        )
        grad_norm = update(model, optimizer, rate)
        history.append(torch.stack([loss.detach(), grad_norm]))

        done = step + 1
        evaluates = done % config.eval_interval == 0 or done == config.steps
        if done % config.log_interval == 0 or evaluates:
            metrics = {
                "bt": loss_bt,
                "accuracy": (margins > 0).float().mean(),
                "margin": margins.mean(),
                "reg": loss_reg,
                "lm": loss_lm,
                "grad_norm": grad_norm,
                "S": S,
            }
            metrics = {name: value.item() for name, value in metrics.items()}
            check_all_finite(done, history)
            history = []
            if evaluates and is_main_process():
                val_metrics = evaluate_split(model, dataset, "val")
            log(run, done, rate, metrics, val_metrics if evaluates else {})
        if evaluates:
            extras = {"S": S.item(), "is_chat": dataset.is_chat()}
            run.save(done, model, optimizer, dataset.tokenizer, **extras)
    return model, val_metrics


def lm_loss(model, hidden, batch, mask, lm_weight):
    """L_SFT on the chosen responses. mask: (2B, T) of the whole batch -> ()"""
    if lm_weight == 0:
        return torch.zeros((), device=hidden.device)
    n_pairs = len(batch.tokens)
    chosen_mask, _ = mask.chunk(2)  # (B, T)
    n_responses = chosen_mask.any(1).sum().clamp(min=1)
    hidden = scale_gradient(hidden, LM_GRADIENT_SCALE)
    logprobs = model.lm_logprobs(hidden, batch, first_rows=n_pairs)  # (B, T)
    return length_normalized_nll(logprobs, batch.mask[:n_pairs], n_responses)


def build_or_resume(config, dataset, probs, device):
    """The model, its optimizer, its Run, the next step's number, and S."""
    generator = load_language_model(load_checkpoint(config.generator, "generator"))
    torch.manual_seed(config.seed)
    model = RewardModel.from_generator(generator, config.prefix_reward)
    model = model.to(device).train()
    if config.train_last_layers:
        model.train_last_layers(config.train_last_layers)
    model.model.gradient_checkpointing = config.gradient_checkpointing
    if config.compile:
        model.model.compile(dynamic=True)
    inputs = {
        "data": dataset.fingerprint,
        "p": probs.fingerprint,
        "regularizer.py": file_sha256(ROOT / "regularizer.py"),
    }
    run = Run("reward model", config, inputs, writes=is_main_process())
    optimizer = make_optimizer(model, config.learning_rate)
    first_step = run.resume(model, optimizer)
    S = run.checkpoint["S"] if config.resume else INITIAL_S
    return model, optimizer, run, first_step, torch.tensor(S, device=device)


def log(run, step, rate, metrics, val_metrics):
    """Log and print one line."""
    record = {"step": step, "learning_rate": rate, **metrics}
    for name in ("accuracy", "correlation"):
        if val_metrics.get("val", {}).get(name) is not None:
            record[f"val_{name}"] = val_metrics["val"][name]
    run.log(record)
    columns = [f"{record[name]:10.3f}" for name in LOG_COLUMNS if name in record]
    tqdm.write(f"{step:5d}" + "".join(columns))


# Several processes (torchrun) ---------------------------------------------------------
#
# Each process reads its share of the pairs and receives the rewards of the others
# without gradient. All compute the same L_BT and L_reg, and L_SFT of their own share.
# The sum of their gradients is the gradient of one process that reads the whole batch.


def process_rank():
    return int(os.environ.get("RANK", "0"))


def process_count():
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_processes(device_name):
    """Connect the processes of torchrun, if any. Return this process's device."""
    if process_count() == 1:
        return device_name
    use_gpu = device_name in ("auto", "cuda") and torch.cuda.is_available()
    backend = "nccl" if use_gpu else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=7))
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")
    return f"cuda:{os.environ['LOCAL_RANK']}" if use_gpu else device_name


def wait_for_processes():
    if process_count() > 1:
        dist.barrier()


def gather_rewards(rewards, mask):
    """The rewards of the whole batch. Only this process's b pairs have gradient.

    (2b, t) -> (2B, T)
    """
    if process_count() == 1:
        return rewards
    rewards = F.pad(rewards, (0, mask.size(1) - rewards.size(1)))  # (2b, T)
    shares = [torch.empty_like(rewards) for _ in range(process_count())]
    dist.all_gather(shares, rewards.detach())
    shares[process_rank()] = rewards
    # Row i of rank r is row i * process_count() + r of the whole batch.
    return torch.stack(shares, 1).flatten(0, 1)  # (2B, T)


def sum_over_processes(tensors):
    """Replace each tensor by its sum over the processes."""
    if process_count() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


# Command ------------------------------------------------------------------------------


def prepare_inputs(config):
    """Prepare the toy world and the generator, if they are missing."""
    if config.dataset == "toy" and not Path("data/toy/dataset.json").exists():
        print("+ python data/toy.py")
        toy.main(toy.ToyConfig())
    folder = Path(config.generator)
    if (folder / "p.json").exists():
        return
    settings = {"dataset": config.dataset, "dtype": config.dtype}
    if (folder / "ckpt.pt").exists():  # an unfinished generator
        checkpoint = load_checkpoint(folder, "generator")
        settings = {**checkpoint["settings"], "resume": True}
    else:
        tokenizer = open_dataset(config.dataset).tokenizer
        if tokenizer.is_pretrained:  # use the pretrained model itself as the generator
            settings.update(init_from=tokenizer.name, steps=0)
    settings.update(out_dir=config.generator, device=config.device)
    options = [f"--{name}={value}" for name, value in settings.items()]
    print("+ python generator.py", *options)
    run_generator(GeneratorConfig(**settings))


def add_defaults(config):
    """Fill in the settings whose defaults depend on others."""
    name = f"{config.dataset}-{config.regularizer}"
    if config.p_source != "generator":
        name += f"-{config.p_source}"
    if config.prefix_reward != "last":
        name += f"-{config.prefix_reward}"
    return dataclasses.replace(
        config,
        generator=config.generator or f"out/{config.dataset}-generator",
        out_dir=config.out_dir or f"out/{name}-seed{config.seed}",
    )


def set_steps(config, dataset):
    """Apply --epochs, and print how long the training is."""
    n_examples = len(dataset.split("train"))
    if config.epochs:
        steps = max(1, round(config.epochs * n_examples / config.batch_size))
        config = dataclasses.replace(config, steps=steps)
    epochs = config.steps * config.batch_size / n_examples
    unit = "responses" if dataset.kind == "labels" else "pairs"
    print(
        f"{config.steps} steps of {config.batch_size} {unit} are {epochs:.3g} epochs "
        f"of {n_examples:,} {unit}"
    )
    return config


def main(config):
    check_choice("regularizer", config.regularizer, REGULARIZERS)
    check_choice("p_source", config.p_source, P_SOURCES)
    check_choice("prefix_reward", config.prefix_reward, PREFIX_REWARDS)
    check_range(config, 1, 10**9, "steps", "batch_size", "log_interval")
    check_range(config, 1, 10**9, "eval_interval")
    check_range(config, 0, 10**9, "seed", "learning_rate", "train_last_layers")
    check_range(config, 0, 10**9, "lm_weight", "epochs")
    check_range(config, 0, 1, "reg_weight")
    if config.batch_size % process_count():
        raise UserError(
            f"--batch_size={config.batch_size} must be a multiple of the "
            f"{process_count()} processes"
        )
    config, started = add_defaults(config), time.time()
    device_name = start_processes(config.device)
    device = pick_device(device_name, config.deterministic)
    if is_main_process():
        prepare_inputs(config)
    wait_for_processes()
    dataset = open_dataset(config.dataset)
    if not config.learning_rate:
        rate = 3e-4 if dataset.tokenizer.is_pretrained else 2e-3
        config = dataclasses.replace(config, learning_rate=rate)
    probs = Probs(config.p_source, dataset, config.generator)
    config = set_steps(config, dataset)
    with lock(config.out_dir):
        model, val_metrics = train(config, dataset, probs, device)
        if is_main_process():
            settings = dataclasses.asdict(config)
            results = evaluate_run(model, dataset, settings, val_metrics)
            write_json(Path(config.out_dir) / "eval.json", results)
    seconds = time.time() - started
    print(f"wrote {config.out_dir}/ckpt.pt, log.jsonl, eval.json in {seconds:.0f}s")
    wait_for_processes()
    if process_count() > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(TrainConfig, main)
