"""Train a reward model with intra-trajectory consistency (ICRM, arXiv 2506.09096, section 4).

    python train.py                                     the toy world, from nothing, half a minute on a laptop
    python train.py --regularizer=none                  the baseline: the same without the regularizer
    python train.py --dataset=hh_rlhf --n_layer=4 ...   real pairs, prepared by data/hh_rlhf/prepare.py

Prepares the toy world and trains the generator where they are absent, then trains the reward model from
the generator's weights, evaluates it on the dataset's splits and prints one table. Out comes
OUT_DIR/ckpt.pt, log.jsonl and eval.json. The same command continues a killed run (on a CPU to the same bits).

Objective:  L = L_SFT + lambda L_reg + (1 - lambda) L_BT. The released code's "GRM" baseline is lambda = 0,
plain Bradley-Terry is that with --lm_weight=0. On a dataset of responses labelled correct or not, binary
cross-entropy takes the place of L_BT (the paper's mathematics runs, with p at --temperature=0.7 --top_p=0.8).

    torchrun --standalone --nproc_per_node=K train.py       K processes share each batch, on K GPUs where there are any

With them, or with --accumulate=K, the result is that of one process with the same batch: every mean of the
objective is over the whole batch.
"""
import contextlib
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from config import (TINY, Run, UserError, check_finite, choose, fingerprint, in_range, load_checkpoint, run_script, show,
                    write_json)
from data.batches import collate, load_responses, pack, to_device, training_indices
from data.prepare import dataset_folder, open_dataset
from data.toy.prepare import ToyConfig
from data.toy.prepare import prepare as prepare_toy
from data.toy.truth import exact_traces
from data.toy.world import World
from evaluate import evaluate_split, evaluate_splits, load_splits, print_table
from generator import (GeneratorConfig, length_normalised_nll, load_generator, stored_probs, train_generator,
                       with_pretrained_sizes)
from model import RewardModel, autocast, learning_rate, make_optimizer, pick_device, update
from parallel import first_process_first, part_of_batch, processes, start_processes
from regularizer import REGULARIZERS


SHOWN = ("loss", "outcome", "reg", "lm", "accuracy", "margin", "grad_norm", "eval_accuracy")     # columns of the printed log


@dataclass(frozen=True)
class TrainConfig:
    dataset: str = "toy"            # a folder under data/, made by its prepare.py
    generator: str = ""             # folder of the generator, trained there if absent; empty: out/DATASET-generator
    probs_from: str = ""            # another generator's folder to take p from, or `exact`: the toy world's own
    temperature: float = 1.0        # at which p is taken
    top_p: float = 1.0              # p of a token outside the smallest set that holds top_p is 0
    out_dir: str = ""               # empty: out/DATASET-REGULARIZER-seedSEED
    regularizer: str = "icrm"       # a name in regularizer.REGULARIZERS
    reg_weight: float = 0.5         # lambda of the objective; `none` takes 0
    lm_weight: float = 1.0          # weight of L_SFT; 0 leaves it out
    lm_trunk_gradient: float = 1e-3 # share of L_SFT's gradient that reaches the trunk
    seed: int = 0                   # reward head and order of the data
    init_from: str = ""             # pretrained weights for generator and reward model: gpt2, ..., or a folder (generator.py)
    n_layer: int = 2                # transformer blocks (these four are the generator's as well)
    n_head: int = 4                 # attention heads
    n_embd: int = 64                # channels
    block_size: int = 160           # longest row, in tokens
    steps: int = 80                 # updates
    batch_size: int = 32            # pairs (or labelled responses) per update, over all processes
    accumulate: int = 1             # parts that each process reads its share of the batch in, to save memory (and not time)
    learning_rate: float = 1e-3     # peak
    warmup: int = 20                # updates of linear warm-up
    weight_decay: float = 0.1       # on matrices
    clip: float = 1.0               # largest gradient norm
    log_interval: int = 10          # updates between log lines
    eval_interval: int = 40         # updates between looks at val
    save_interval: int = 40         # updates between checkpoints
    device: str = "auto"            # auto, cpu, cuda, cuda:N
    dtype: str = "auto"             # auto (bfloat16 on CUDA), float32, bfloat16
    unfrozen: int = -1              # blocks that learn, the last ones, with the last layer norm and the heads; -1: everything
    recompute: bool = False         # keep no activations inside the blocks: less memory, a third more work
    compile: bool = False           # torch.compile the reward model
    strict: bool = False            # stop at the first bad row
    overwrite: bool = False         # start over where out_dir holds another run


def bradley_terry(rewards, last):
    """L_BT = -log sigma(r_last^w - r_last^l), mean over pairs; also the B margins.  (2B, T), (2B,) -> (), (B,)"""
    chosen, rejected = rewards.gather(1, last[:, None]).squeeze(1).chunk(2)     # (B,), (B,)
    return -F.logsigmoid(chosen - rejected).mean(), chosen - rejected


def label_cross_entropy(rewards, last, correct):
    """The pointwise L_BT: -log sigma(r_last) of the first `correct` rows, -log(1 - sigma(r_last)) of the others,
    mean over rows; also the R margins, r_last and -r_last.  (R, T), (R,) -> (), (R,)"""
    final = rewards.gather(1, last[:, None]).squeeze(1)             # (R,)
    margins = torch.cat([final[:correct], -final[correct:]])
    return -F.logsigmoid(margins).mean(), margins


def against_nobody(rewards, probs, mask, correct):
    """Labelled responses as pairs whose other side is empty, so that Eq. 4 has nothing to centre on and every
    regularizer reads z = sigma(r) of the first `correct` rows, 1 - sigma(r) of the others.  (R, ...) -> (2R, ...)"""
    chosen = torch.arange(len(mask), device=mask.device)[:, None] < correct         # (R, 1)
    return torch.cat([rewards, rewards]), torch.cat([probs, probs]), torch.cat([mask & chosen, mask & ~chosen])


def terms_of_rewards(config, rewards, batch, chosen, paired, S):
    """L_BT, L_reg = penalty / S and the new S of a whole batch, and its margins.  (rows, T) -> (), (), (), (B,)"""
    regularize = REGULARIZERS[config.regularizer]
    if paired:
        outcome, margins = bradley_terry(rewards, batch.last)
        penalty, scale = regularize(rewards, batch.probs, batch.mask)
    else:
        outcome, margins = label_cross_entropy(rewards, batch.last, chosen)
        penalty, scale = regularize(*against_nobody(rewards, batch.probs, batch.mask, chosen))
    if scale is None:
        return outcome, penalty, S, margins
    S = 0.95 * S + 0.05 * scale.detach()
    return outcome, penalty / S, S, margins


def objective(config, outcome, reg, lm):
    """L = L_SFT + lambda L_reg + (1 - lambda) L_BT, where L_SFT has the weight of the settings and `none` takes lambda = 0."""
    lam = 0.0 if config.regularizer == "none" else config.reg_weight
    return config.lm_weight * lm + lam * reg + (1 - lam) * outcome


def obtain_generator(config):
    """The frozen generator in config.generator, trained or continued there first, of the data and sizes asked for."""
    folder = Path(config.generator)
    shared = {key: getattr(config, key) for key in ("dataset", "init_from", "n_layer", "n_head", "n_embd", "block_size")}
    settings = GeneratorConfig(**shared, dtype=config.dtype, strict=config.strict)
    if (folder / "ckpt.pt").exists():
        settings = GeneratorConfig(**load_checkpoint(folder, "generator")["settings"])
        for key, value in shared.items():
            if getattr(settings, key) != value:
                raise UserError(f"the generator in {folder} has --{key}={getattr(settings, key)}, not {value}; "
                                "choose another folder with --generator=FOLDER")
    elif config.init_from:
        raise UserError("pretrained weights want a gentle generator; train it first: python generator.py "
                        f"--dataset={config.dataset} --init_from={config.init_from} --block_size={config.block_size} "
                        f"--out_dir={config.generator} --learning_rate=2e-5 --steps=N")
    return train_generator(dataclasses.replace(settings, out_dir=config.generator, device=config.device))


def obtain_probs(config, dataset, generator, rows):
    """p of every response token, from where the settings say: a list of float32 arrays, one per row."""
    if config.probs_from == "exact":
        if dataset.kind != "toy" or (config.temperature, config.top_p) != (1.0, 1.0):
            raise UserError("--probs_from=exact is for toy worlds, at temperature 1 and top_p 1; name a generator's folder")
        return [np.array([p for p, *_ in trace], np.float32)
                for trace in exact_traces(World(**dataset.world), rows, dataset.tokenizer)]
    folder = config.generator
    if config.probs_from:
        folder = config.probs_from
        generator, tokenizer = load_generator(folder, pick_device(config.device))
        if tokenizer.fingerprint != dataset.tokenizer.fingerprint:
            raise UserError(f"the generator in {folder} reads another vocabulary than the dataset {config.dataset}")
        if generator.transformer.config.block_size < config.block_size:
            raise UserError(f"the generator in {folder} has a context of {generator.transformer.config.block_size} tokens, "
                            f"less than --block_size={config.block_size}")
    return stored_probs(generator, rows, folder, config.temperature, config.top_p)


def backward(config, forward, rows, batch, chosen, paired, S):
    """Add up the gradient of the objective over this process's parts of a batch -> (new S, the terms of the loss).

    rows: the batch's Rows, the first `chosen` of them chosen (or correct) responses; batch: the same, collated.
    paired: row i and row chosen + i are a pair; else each row has a label of its own.
    L_reg and L_BT are means over the whole batch, so each part meets the rewards of all others, without gradient:
    those of other processes come from them, those of this one from a first pass where there are several parts.
    """
    (rank, world), in_parts, device = processes(), config.accumulate > 1, batch.mask.device
    members, packs = [], []
    for part in range(rank, world * config.accumulate, world):
        numbers, scored = part_of_batch(part, world * config.accumulate, chosen, len(rows), paired)
        members.append(to_device(torch.from_numpy(numbers), device))
        packs.append(pack([rows[i] for i in numbers], scored, batch.mask.size(1)).to(device))
    all_rewards = torch.zeros(batch.mask.shape, device=device)                          # (rows, T)
    lm_gradient = config.lm_trunk_gradient if config.lm_weight > 0 else None
    with autocast(device, config.dtype), torch.set_grad_enabled(not in_parts):
        outputs = [forward(packed, None if in_parts else lm_gradient) for packed in packs]    # (rows, T), (M,) of each part
    for numbers, (rewards, _) in zip(members, outputs):
        all_rewards[numbers] = rewards.detach()
    if world > 1:
        dist.all_reduce(all_rewards)
    total_lm = 0.0
    for k, (numbers, packed) in enumerate(zip(members, packs)):
        with forward.no_sync() if world > 1 and k < len(packs) - 1 else contextlib.nullcontext():
            if in_parts:
                with autocast(device, config.dtype):
                    outputs[k] = forward(packed, lm_gradient)
            rewards, logprobs = outputs[k]
            rewards = all_rewards.index_copy(0, numbers, rewards)                       # (rows, T)
            outcome, reg, new_S, margins = terms_of_rewards(config, rewards, batch, chosen, paired, S)
            lm = length_normalised_nll(logprobs, packed, max(1, chosen)) if logprobs is not None else torch.zeros((), device=device)
            (world * objective(config, outcome, reg, lm)).backward()    # DistributedDataParallel takes the mean over processes
        total_lm = total_lm + lm.detach()
    return new_S, {"outcome": outcome.detach(), "reg": reg.detach(), "lm": total_lm, "margins": margins.detach()}


def train(config):
    """Train, or continue, or just load the reward model in config.out_dir -> (RewardModel, Dataset, its training data, its splits)."""
    choose("regularizer", config.regularizer, REGULARIZERS)
    device, (rank, world) = pick_device(config.device), processes()
    dataset = open_dataset(config.dataset)
    tokenizer = dataset.tokenizer
    run = Run(config.out_dir, "reward model", config, config.overwrite, writes=rank == 0)
    data = load_responses(dataset, "train", config.block_size, config.strict)
    splits = load_splits(dataset, config.block_size, config.strict)
    with first_process_first():
        generator = obtain_generator(config)
        probs = obtain_probs(config, dataset, generator, data.rows)
    run.match(data=dataset.fingerprint, vocabulary=tokenizer.fingerprint, generator=fingerprint(generator.state_dict()),
              probs=fingerprint(*probs))
    print(f"p of {sum(map(len, probs))} response tokens from {config.probs_from or config.generator}; "
          f"mean {sum(p.sum() for p in probs) / sum(map(len, probs)):.3f}")

    torch.manual_seed(config.seed)
    model, sizes = RewardModel.from_generator(generator).to(device), dataclasses.asdict(generator.transformer.config)
    del generator       # its place on the device is free again
    model.transformer.recompute = config.recompute
    if config.unfrozen >= 0:
        model.transformer.freeze(config.unfrozen)
    model.lm_head.requires_grad_(config.lm_weight > 0)
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay)
    first = run.restore(model, optimizer)
    S = torch.tensor(run.checkpoint["S"] if run.checkpoint else 0.5, device=device)  # the running normaliser
    save = lambda step: run.save(step, model, optimizer, S=S.item(), dataset_kind=dataset.kind,
                                 tokenizer=tokenizer.to_dict(), model_config=sizes)
    forward = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    forward = torch.compile(forward, dynamic=True) if config.compile else forward
    model.train()
    if first < config.steps:
        print(" step " + " ".join(f"{key:>6}" for key in SHOWN))
    bar = tqdm(range(first, config.steps), "reward model", config.steps, initial=first, disable=rank > 0 or None, leave=False)
    for step in bar:
        rate = learning_rate(step, config.steps, config.learning_rate, config.warmup)
        numbers, chosen = data.batch_rows(training_indices(step, len(data), config.batch_size, config.seed))
        rows = [data.rows[i] for i in numbers]
        batch = collate(rows, [probs[i] for i in numbers]).to(device)
        S, terms = backward(config, forward, rows, batch, chosen, data.paired, S)
        grad_norm = update(model, optimizer, rate, config.clip)

        done, last = step + 1, step + 1 == config.steps
        saves, evaluates = done % config.save_interval == 0 or last, done % config.eval_interval == 0 or last
        if done % config.log_interval == 0 or saves or evaluates:
            if world > 1:
                dist.all_reduce(terms["lm"])
            margins = terms.pop("margins")
            terms = {key: value.item() for key, value in terms.items()}
            record = {"step": done, "loss": objective(config, **terms), **terms, "accuracy": (margins > 0).float().mean().item(),
                      "margin": margins.mean().item(), "grad_norm": grad_norm.item(), "learning_rate": rate, "S": S.item()}
            check_finite(done, record["loss"], record["grad_norm"])
            if evaluates and rank == 0:
                record["eval_accuracy"] = evaluate_split(model, splits["val"], device)[0]["accuracy"]
            run.log(record)
            tqdm.write(f"{done:5d} " + " ".join(f"{record[key]:{max(6, len(key))}.3f}" for key in SHOWN if key in record))
        if saves:
            save(done)
    return model, dataset, data, splits


def main(config):
    config = dataclasses.replace(
        config, generator=config.generator or f"out/{config.dataset}-generator",
        out_dir=config.out_dir or f"out/{config.dataset}-{config.regularizer}-seed{config.seed}")
    config = start_processes(config)
    with first_process_first():     # downloads, if there are any
        config = with_pretrained_sizes(config)
    show(config)
    in_range(config, 1, 10**9, "steps", "batch_size", "accumulate", "log_interval", "eval_interval", "save_interval")
    in_range(config, 0, 10**9, "seed", "learning_rate", "warmup", "weight_decay", "lm_weight")
    in_range(config, 0, 1, "reg_weight", "lm_trunk_gradient")
    in_range(config, -1, config.n_layer, "unfrozen")
    in_range(config, TINY, 10**9, "temperature", "clip")
    in_range(config, TINY, 1, "top_p")
    autocast(pick_device(config.device), config.dtype)
    rank, world = processes()
    if config.batch_size % (world * config.accumulate):
        raise UserError(f"--batch_size={config.batch_size} does not divide into {world} processes times --accumulate={config.accumulate}")
    with first_process_first():
        if config.dataset == "toy" and not (dataset_folder("toy") / "dataset.json").exists():
            prepare_toy(ToyConfig())
    started = time.time()
    model, dataset, data, splits = train(config)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    print(f"data, generator and training took {time.time() - started:.0f} s; evaluating")
    results = evaluate_splits(model, dataset, splits, pick_device(config.device))
    write_json(Path(config.out_dir) / "eval.json", {"settings": dataclasses.asdict(config), "splits": results,
                                                    "train": {"n": len(data), "skipped": data.skipped}})
    print_table(results)
    print(f"wrote {config.out_dir}/ckpt.pt, log.jsonl and eval.json")


if __name__ == "__main__":
    run_script(TrainConfig, main)
