"""Train a reward model with intra-trajectory consistency (ICRM, arXiv 2506.09096, section 4).

    python train.py                                     the toy world, from nothing, a minute
    python train.py --regularizer=none                  the baseline, without the regularizer
    python train.py --dataset=mine                      your own pairs (data/prepare.py)
    torchrun --standalone --nproc_per_node=K train.py   K processes read each batch together

Makes the toy world and the generator where they are absent, trains the reward model from the
generator's weights and evaluates it on every split; out come OUT_DIR/ckpt.pt, log.jsonl and
eval.json. It trains whenever it is started: the run before it is kept as OUT_DIR.previous.

Objective:  L = L_SFT + lambda L_reg + (1 - lambda) L_BT. The released code's "GRM" baseline is
lambda = 0, plain Bradley-Terry is that with --lm_weight=0. On responses labelled correct or not,
binary cross-entropy takes the place of L_BT (the paper's mathematics runs).
"""
import dataclasses
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from config import (HERE, Stopping, UserError, autocast, check_finite, choose, in_range,
                    pick_device, run_other, run_script)
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data.dataset import open_dataset
from data.files import Run, fingerprint, load_checkpoint, write_json
from data.frozen import store_states
from data.probs import PROBS, Probs
from data.rows import batch_of, make_batch, make_targets
from evaluate import evaluate_run, evaluate_split
from model import (RewardModel, frozen_language_model, learning_rate, length_normalised_nll,
                   make_optimizer, token_logprobs, update)
from regularizer import READOUTS, REGULARIZERS, last_tokens, read_out

SHOWN = {"bt": "bt", "accuracy": "accuracy", "margin": "margin", "reg": "reg", "lm": "lm",
         "grad_norm": "grad_norm", "val_accuracy": "val acc", "val_correlation": "corr(z,V)"}
LM_TRUNK_GRADIENT = 1e-3    # share of L_SFT's gradient that reaches the trunk (GRM's released code)


@dataclass(frozen=True)
class TrainConfig:
    dataset: str = "toy"            # a folder under data/, made by its prepare.py
    generator: str = ""             # folder of the generator; empty: out/DATASET-generator
    out_dir: str = ""               # empty: out/DATASET-REGULARIZER[-PROBS][-READOUT]-seedSEED
    resume: bool = False            # go on from out_dir's last checkpoint
    regularizer: str = "icrm"       # a name in regularizer.REGULARIZERS
    probs: str = "generator"        # p: generator, uniform (1), shuffled, exact (toy worlds)
    readout: str = "last"           # reward of a prefix: last, mean or sum of its tokens' scores
    reg_weight: float = 0.5         # lambda of the objective; `none` takes 0
    lm_weight: float = 1.0          # weight of L_SFT; 0 leaves it out
    seed: int = 0                   # reward head and order of the data
    steps: int = 80                 # updates
    batch_size: int = 32            # pairs (or labelled responses) per update, over all processes
    learning_rate: float = 0.0      # peak, after a quarter of the steps; 0: 2e-3, pretrained 3e-4
    unfrozen: int = 0               # train the last so many blocks alone; 0: all, and the embedding
    log_interval: int = 10          # updates between log lines
    eval_interval: int = 40         # updates between checkpoints and looks at val
    device: str = "auto"            # auto, cpu, cuda, cuda:N
    dtype: str = "auto"             # auto (bfloat16 on CUDA), float32, bfloat16
    compile: bool = False           # torch.compile the transformer
    recompute: bool = False         # keep no activations inside the blocks: less memory, more work


# The objective ----------------------------------------------------------------------------------

def bradley_terry(rewards, mask):
    """L_BT = -log sigma(r_last^w - r_last^l), mean over items; and the differences, the margins.

    A side without a response counts as r_last = 0, so a labelled response has binary cross-entropy:
    -log sigma(r_last) where it is correct, -log(1 - sigma(r_last)) where it is not.
    (2B, T), (2B, T) -> (), (B,)"""
    last = torch.where(last_tokens(mask), rewards, 0.0).sum(1)              # (2B,)
    chosen, rejected = last.chunk(2)
    margins = chosen - rejected
    return -F.logsigmoid(margins).mean(), margins


def normalised(penalty, scale, S):
    """L_reg = penalty / S, and S, which follows scale where there is one.  (), (), () -> (), ()"""
    if scale is None:
        return penalty, S
    S = 0.95 * S + 0.05 * scale.detach()
    return penalty / S, S


# Training ---------------------------------------------------------------------------------------

def forward(model, batch, responses, lm_weight):
    """A Batch -> token scores (R, T) and its share of L_SFT, a mean over so many responses, ()."""
    hidden = model.model.read(batch)                                        # (N, C)
    if not lm_weight:
        return model.scores(hidden, batch), torch.zeros((), device=hidden.device)
    states = LM_TRUNK_GRADIENT * hidden + (1 - LM_TRUNK_GRADIENT) * hidden.detach()
    logprobs = token_logprobs(states, model.lm_head, batch)                 # (M,)
    return model.scores(hidden, batch), length_normalised_nll(logprobs, batch, responses)


def train(config, dataset, probs, team):
    """-> the trained RewardModel, and what the last look at val found"""
    regularize, precision = REGULARIZERS[config.regularizer], autocast(team.device, config.dtype)
    lam = 0.0 if config.regularizer == "none" else config.reg_weight
    model, optimizer, run, first = start(config, dataset, probs, team)
    data, val = dataset.split("train"), {}
    S = torch.tensor(run.checkpoint["S"] if first else 0.5, device=team.device)
    print(" step" + "".join(f"{name:>10}" for name in SHOWN.values()))
    for step in tqdm(range(first, config.steps), "reward model", config.steps, initial=first,
                     disable=None if team.first else True, leave=False):
        items = batch_of(step, len(data), config.batch_size, config.seed)
        mask, p = make_targets([probs[i] for i in items])
        mask, p = mask.to(team.device), p.to(team.device)                   # (2B, T), (2B, T-1)
        rows = [data[i] for i in items[team.rank::team.size]]               # this process's share
        batch = make_batch(rows, likelihoods=len(rows)).to(team.device)

        with precision:
            responses = mask[:len(items), 0].sum().clamp(min=1)             # chosen ones
            a, lm = forward(model, batch, responses, config.lm_weight)      # (2b, t), ()
        a = team.join(a, mask.shape)                                        # (2B, T)
        r = read_out(a, mask, config.readout)                               # (2B, T)
        bt, margins = bradley_terry(r, mask)
        reg, S = normalised(*regularize(r, p, mask), S)
        loss = config.lm_weight * lm + lam * reg + (1 - lam) * bt
        loss.backward()
        lm = lm.detach()
        team.add_up([lm, *(q.grad for q in model.parameters() if q.grad is not None)])
        rate = learning_rate(step, config.steps, config.learning_rate, config.steps // 4)
        norm = update(model, optimizer, rate)

        done = step + 1
        looks = done % config.eval_interval == 0 or done == config.steps
        if done % config.log_interval == 0 or looks:
            terms = {"bt": bt, "accuracy": (margins > 0).float().mean(), "margin": margins.mean(),
                     "reg": reg, "lm": lm, "grad_norm": norm, "S": S}
            check_finite(done, *(value.item() for value in terms.values()))
            val = evaluate_split(model, dataset, "val") if looks and team.first else {}
            log(run, done, rate, terms, val)
        if looks or Stopping.asked:
            run.save(done, model, optimizer, dataset.tokenizer, S=S.item())
    return model, val


def start(config, dataset, probs, team):
    """The model, new from the generator's weights or as the checkpoint has it.
    -> RewardModel, optimizer, Run, number of the first step"""
    generator = frozen_language_model(load_checkpoint(config.generator, "generator"))
    torch.manual_seed(config.seed)
    model = RewardModel.from_generator(generator, config.readout).to(team.device).train()
    del generator       # its weights are the model's
    inputs = {"data": dataset.fingerprint, "p": probs.fingerprint,
              "regularizer.py": fingerprint((HERE / "regularizer.py").read_text(encoding="utf-8"))}
    if config.unfrozen:
        freeze(model.model, config, dataset, team)
    run = Run("reward model", config, inputs, writes=team.first)
    model.model.recompute = config.recompute
    if config.compile:
        model.model.compile(dynamic=True)
    optimizer = make_optimizer(model, config.learning_rate)
    return model, optimizer, run, run.restore(model, optimizer)


def freeze(trunk, config, dataset, team):
    """Freeze all but the last blocks and start above them: what they read is stored, once."""
    if config.unfrozen > len(trunk.layers):
        raise UserError(f"--unfrozen={config.unfrozen}, and there are {len(trunk.layers)} blocks")
    trunk.freeze(len(trunk.layers) - config.unfrozen)
    with team.first_alone(), autocast(team.device, config.dtype):
        dataset.below = store_states(trunk, dataset, ("train", "val"), config.generator)


def log(run, step, rate, terms, val):
    """Write and print one line of the log, with what a look at val found, if there was one."""
    record = {"step": step, "learning_rate": rate}
    record |= {name: value.item() + 0.0 for name, value in terms.items()}   # -0.0 becomes 0.0
    found = val.get("val", {})
    record |= {f"val_{key}": found[key] for key in ("accuracy", "correlation") if key in found}
    run.log(record)
    tqdm.write(f"{step:5d}" + "".join(f"{record[key]:10.3f}" for key in SHOWN if key in record))


class Team:
    """The processes that torchrun started, one by default. Each reads its share of every batch and
    meets the others' rewards without gradient; gradients are added up."""

    def __init__(self, device):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.first = self.rank == 0
        if self.size > 1:
            gpu = device in ("auto", "cuda") and torch.cuda.is_available()
            device = f"cuda:{os.environ['LOCAL_RANK']}" if gpu else device
            dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(days=7))
        self.device = pick_device(device)
        if not self.first:
            sys.stdout = open(os.devnull, "w")

    @contextmanager
    def first_alone(self):
        """The first process does it while the others wait, then they."""
        if not self.first:
            dist.barrier()
        yield
        if self.first and self.size > 1:
            dist.barrier()

    def join(self, a, shape):
        """This process's scores in their places among all.  (2b, t) -> (2B, T)"""
        if self.size == 1:
            return a
        a = F.pad(a, (0, shape[1] - a.size(1)))
        everyone = [torch.empty_like(a) for _ in range(self.size)]
        dist.all_gather(everyone, a.detach())
        everyone[self.rank] = a
        return torch.stack(everyone, 1).flatten(0, 1)       # as items[rank::size] took them

    def add_up(self, tensors):
        for tensor in tensors if self.size > 1 else ():
            dist.all_reduce(tensor)


def obtain_inputs(config):
    """Run the commands that make the toy world and the generator, where they are absent."""
    if config.dataset == "toy" and not Path("data/toy/dataset.json").exists():
        run_other("data/toy/prepare.py")
    if (Path(config.generator) / "p.json").exists():
        return
    tokenizer = open_dataset(config.dataset).tokenizer
    how = {"dataset": config.dataset, "dtype": config.dtype}
    if tokenizer.pretrained:        # a pretrained model's: it is the generator, as it is
        how |= {"init_from": tokenizer.name, "steps": 0}
    if (Path(config.generator) / "ckpt.pt").exists():       # it goes on as it began
        how = load_checkpoint(config.generator, "generator")["settings"] | {"resume": True}
    run_other("generator.py", **how | {"out_dir": config.generator, "device": config.device})


def main(config):
    words = [config.dataset, config.regularizer, config.probs, config.readout, f"seed{config.seed}"]
    name = "-".join(word for word in words if word not in ("generator", "last"))    # the paper's
    config = dataclasses.replace(
        config, generator=config.generator or f"out/{config.dataset}-generator",
        out_dir=config.out_dir or f"out/{name}")
    choose("regularizer", config.regularizer, REGULARIZERS)
    choose("probs", config.probs, PROBS)
    choose("readout", config.readout, READOUTS)
    in_range(config, 1, 10**9, "steps", "batch_size", "log_interval", "eval_interval")
    in_range(config, 0, 10**9, "seed", "learning_rate", "unfrozen", "lm_weight")
    in_range(config, 0, 1, "reg_weight")
    team, started = Team(config.device), time.time()
    if config.batch_size % team.size:
        raise UserError(f"--batch_size={config.batch_size} does not divide by {team.size}")
    with team.first_alone():
        obtain_inputs(config)
    dataset = open_dataset(config.dataset)
    if not config.learning_rate:
        rate = 3e-4 if dataset.tokenizer.pretrained else 2e-3
        config = dataclasses.replace(config, learning_rate=rate)
    probs = Probs(config.probs, dataset, config.generator)
    model, val = train(config, dataset, probs, team)
    if team.first:
        results = evaluate_run(model, dataset, dataclasses.asdict(config), val)
        write_json(Path(config.out_dir) / "eval.json", results)
        print(f"wrote {config.out_dir}/ckpt.pt, log.jsonl, eval.json; {time.time() - started:.0f}s")
    if team.size > 1:
        dist.barrier()      # nobody leaves while the first one evaluates
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(TrainConfig, main)
