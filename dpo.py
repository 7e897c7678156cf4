"""A policy aligned with a reward model by direct preference optimisation (DPO, Rafailov et al. 2023, arXiv 2305.18290).

    python dpo.py --checkpoint=out/toy-icrm-seed0 --json=OUT.json
    python dpo.py --checkpoint=CKPT --judge=OTHER       win, tie and lose rates by another reward model too

The paper's third claim: a better reward model picks better pairs, and so makes a better policy. For each prompt n
responses are sampled from the generator and scored; the best and the worst make a pair. The policy starts from the
generator and is trained on the pairs, with the frozen generator as the reference. Then both answer held-out prompts;
on the toy world the truth judges them. Left out: on-policy rounds, and a reward model of another vocabulary.
"""
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from compare import mean_and_half_width, print_lines
from config import (TINY, Run, UserError, check_finite, choose, fingerprint, in_range, load_checkpoint, run_script, show,
                    write_atomically, write_json)
from data.batches import Row, pack, pair_rows, to_device, training_indices
from data.prepare import open_dataset
from data.toy.world import gold
from evaluate import check_fit, load_reward_model, model_name, score
from generator import load_generator, response_logprobs, sample_responses
from model import LanguageModel, autocast, learning_rate, make_optimizer, pick_device, update


@dataclass(frozen=True)
class DPOConfig:
    checkpoint: str = ""            # the reward model that picks the pairs
    generator: str = ""             # policy to start from and reference; empty: the reward model's own generator
    judge: str = ""                 # another reward model that compares the policy with the generator
    out_dir: str = ""               # empty: out/dpo-LOSS-CHECKPOINT-seedSEED
    json: str = ""                  # write the results here too
    loss: str = "dpo"               # a name in LOSSES
    beta: float = 0.1               # strength of the pull to the reference
    prompts: int = 200              # training prompts, used again where there are fewer distinct ones
    samples: int = 8                # responses to each
    temperature: float = 1.0        # of sampling them
    top_p: float = 1.0              # of sampling them
    max_new_tokens: int = 100       # longest response
    held_out: int = 50              # prompts to judge the policy on, none of them trained on
    answers: int = 8                # responses to each of those, at temperature 1
    seed: int = 0                   # sampling and order of the data
    steps: int = 60                 # updates
    batch_size: int = 16            # pairs per update
    learning_rate: float = 1e-4     # peak
    warmup: int = 10                # updates of linear warm-up
    weight_decay: float = 0.0       # on matrices
    clip: float = 1.0               # largest gradient norm
    log_interval: int = 10          # updates between log lines
    save_interval: int = 30         # updates between checkpoints
    device: str = "auto"            # auto, cpu, cuda, cuda:N
    dtype: str = "auto"             # auto (bfloat16 on CUDA), float32, bfloat16
    overwrite: bool = False         # start over where out_dir holds another run


# The losses: margin = log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l), one per pair.  (B,) -> ()

def dpo(margin, beta):
    """-log sigma(beta margin) (Rafailov et al. 2023, Eq. 7)."""
    return -F.logsigmoid(beta * margin).mean()


def ipo(margin, beta):
    """(margin - 1 / (2 beta))^2 (Azar et al. 2023, arXiv 2310.12036, Eq. 17): a target instead of ever more."""
    return ((margin - 1 / (2 * beta)) ** 2).mean()


def cdpo(margin, beta, smoothing=0.1):
    """DPO with labels that are wrong in a share `smoothing`: -(1 - s) log sigma(beta margin) - s log sigma(-beta margin)."""
    return -((1 - smoothing) * F.logsigmoid(beta * margin) + smoothing * F.logsigmoid(-beta * margin)).mean()


LOSSES = {"dpo": dpo, "ipo": ipo, "cdpo": cdpo}


def prompts_of(dataset, config):
    """(training prompts, held-out prompts) of a Dataset: distinct, none in both; the training ones repeated as asked."""
    held_out = dataset.prompts("val")[:config.held_out]
    train = [prompt for prompt in dataset.prompts("train") if prompt not in set(held_out)]
    if not train:
        raise UserError("every training prompt is held out too; hold out fewer with --held_out=N")
    if len(held_out) < config.held_out:
        print(f"held out: {len(held_out)} prompts, all that val has")
    return [train[i % len(train)] for i in range(config.prompts)], held_out


def answers_of(model, tokenizer, prompts, n, config, temperature, top_p, device):
    """n responses of a language model to each prompt, as Rows: a list of n of them for each prompt that leaves room."""
    rng = torch.Generator(device).manual_seed(config.seed)
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    room = model.transformer.config.block_size - config.max_new_tokens - 1
    fitting = [tokens for tokens in encoded if len(tokens) <= room]
    if len(fitting) < len(encoded):
        print(f"left out: {len(encoded) - len(fitting)} prompts that leave no room for --max_new_tokens={config.max_new_tokens}")
    if not fitting:
        raise UserError(f"every prompt fills the context of {room + config.max_new_tokens + 1} tokens; lower --max_new_tokens")
    sampled = sample_responses(model, fitting, n, tokenizer.end_of_text, rng, config.max_new_tokens, temperature, top_p)
    return [[Row(np.array(prompt, np.int32), response, False) for response in responses]
            for prompt, responses in zip(fitting, sampled)]


def finished(row, tokenizer):
    """Whether a response ended by itself within max_new_tokens."""
    return row.response[-1] == tokenizer.end_of_text


def best_and_worst(groups, rewards, tokenizer):
    """Rows and final rewards of each prompt's responses -> ([(best Row, worst Row), ...], how many prompts gave none, by
    reason). Only finished responses count: the others have no last token to read a reward at."""
    pairs, left_out = [], {"equal rewards": 0, "equal texts": 0, "fewer than two finished": 0}
    for rows, r in zip(groups, rewards):
        some = [i for i, row in enumerate(rows) if finished(row, tokenizer)]
        best, worst = max(some, key=lambda i: r[i], default=0), min(some, key=lambda i: r[i], default=0)
        if len(some) < 2:
            left_out["fewer than two finished"] += 1
        elif len({tokenizer.decode(rows[i].response) for i in some}) == 1:
            left_out["equal texts"] += 1
        elif r[best] == r[worst]:
            left_out["equal rewards"] += 1
        else:
            pairs.append((rows[best], rows[worst]))
    return pairs, left_out


def obtain_pairs(reference, reward_model, tokenizer, prompts, config, device, key):
    """The preference pairs and the reference's log-probability of every response, made once: out_dir/pairs.pt.

    Returns (rows: B chosen then B rejected, log-probabilities (2B,), what was left out)."""
    path = Path(config.out_dir) / "pairs.pt"
    if path.exists() and not config.overwrite:
        stored = load_checkpoint(path, "dpo pairs")
        if stored["key"] == key:
            return [Row(*(part.numpy() for part in row), False) for row in stored["rows"]], stored["logprobs"], stored["left_out"]
    groups = answers_of(reference, tokenizer, prompts, config.samples, config, config.temperature, config.top_p, device)
    flat = score(reward_model, [row for rows in groups for row in rows], device)
    final = np.split(np.array([r[-1] for r in flat]), np.cumsum([len(rows) for rows in groups])[:-1])
    pairs, left_out = best_and_worst(groups, final, tokenizer)
    if not pairs:
        raise UserError(f"no prompt gave a usable pair ({', '.join(f'{count} {why}' for why, count in left_out.items())}); "
                        "raise --samples or --temperature")
    rows = pair_rows(pairs)
    with autocast(device, config.dtype):    # as the policy's will be, so that the margins start near 0
        logprobs = torch.tensor([float(row.sum(dtype=np.float64)) for row in response_logprobs(reference, rows)])
    found = dict(kind="dpo pairs", key=key, logprobs=logprobs, left_out=left_out,
                 rows=[tuple(map(torch.from_numpy, row[:2])) for row in rows])
    write_atomically(path, lambda temporary: torch.save(found, temporary))
    return rows, logprobs, left_out


def train_policy(config, reference, tokenizer, rows, logprobs, run, device):
    """Train a copy of the reference on the pairs; returns the frozen policy."""
    policy = LanguageModel(reference.transformer.config).to(device)
    policy.load_state_dict(reference.state_dict())
    optimizer = make_optimizer(policy, config.learning_rate, config.weight_decay)
    first, B, logprobs = run.restore(policy, optimizer), len(rows) // 2, logprobs.to(device)
    if first < config.steps:
        print(" step    loss accuracy  margin grad_norm")
    for step in tqdm(range(first, config.steps), "policy", config.steps, initial=first, disable=None, leave=False):
        rate = learning_rate(step, config.steps, config.learning_rate, config.warmup)
        numbers = training_indices(step, B, config.batch_size, config.seed)
        numbers += [B + i for i in numbers]
        packed = pack([rows[i] for i in numbers]).to(device)
        with autocast(device, config.dtype):
            ours = policy(packed)                                                       # (M,)
        ours = torch.zeros(len(numbers), device=device).index_add(0, packed.owners, ours)      # (2b,), summed over responses
        chosen, rejected = (ours - logprobs[to_device(torch.tensor(numbers), device)]).chunk(2)    # (b,) each
        loss = LOSSES[config.loss](chosen - rejected, config.beta)
        loss.backward()
        grad_norm = update(policy, optimizer, rate, config.clip)
        done = step + 1
        if done % config.log_interval == 0 or done % config.save_interval == 0 or done == config.steps:
            record = {"step": done, "loss": loss.item(), "accuracy": (chosen > rejected).float().mean().item(),
                      "margin": (chosen - rejected).mean().item(), "grad_norm": grad_norm.item(), "learning_rate": rate}
            check_finite(done, record["loss"], record["grad_norm"])
            run.log(record)
            tqdm.write(f"{done:5d} {record['loss']:7.3f} {record['accuracy']:8.3f} {record['margin']:7.2f} {record['grad_norm']:9.3f}")
        if done % config.save_interval == 0 or done == config.steps:
            run.save(done, policy, optimizer, model_config=dataclasses.asdict(reference.transformer.config),
                     tokenizer=tokenizer.to_dict())
    return policy.eval().requires_grad_(False)


def judge_policy(policy, reference, reward_model, tokenizer, prompts, config, device, is_toy):
    """Responses of a policy to held-out prompts -> (metrics, its Rows by prompt, those at temperature 1).

    kl: mean over responses y at temperature 1 of log pi(y) - log pi_ref(y), an estimate of KL(policy || reference).
    finished: the share that ended within max_new_tokens. reward: of the finished ones (None where there are none).
    """
    found, texts = {}, lambda rows: [tokenizer.decode(row.response) for row in rows]
    for name, n, temperature in (("", config.answers, 1.0), ("greedy_", 1, 0.0)):
        groups = answers_of(policy, tokenizer, prompts, n, config, temperature, 1.0, device)
        rows = [row for group in groups for row in group]
        ended = [row for row in rows if finished(row, tokenizer)]
        found[name + "reward"] = float(np.mean([r[-1] for r in score(reward_model, ended, device)])) if ended else None
        if is_toy:
            found[name + "gold"] = float(np.mean([gold(text) for text in texts(rows)]))
        if not name:
            found["finished"] = len(ended) / len(rows)
            found["length"] = float(np.mean([len(row.response) for row in rows]))
            found["distinct"] = len(set(texts(rows))) / len(rows)
            ours, theirs = (np.array([row.sum(dtype=np.float64) for row in response_logprobs(model, rows)])
                            for model in (policy, reference))
            found["kl"] = float(np.mean(ours - theirs))
            sampled = groups
    return found, sampled


def win_rates(judge, ours, theirs, device):
    """Two sets of responses to the same prompts -> win, tie and lose rates of the first by a judge's rewards, each
    with half a 95% t interval over prompts. Every response meets every other one of its prompt; as the judge
    scores one response at a time, the other order gives the same rates with win and lose exchanged."""
    rates = []
    for a, b in zip(ours, theirs):
        ra, rb = (np.array([r[-1] for r in score(judge, rows, device)]) for rows in (a, b))
        difference = ra[:, None] - rb[None, :]
        rates.append([(difference > 0).mean(), (difference == 0).mean(), (difference < 0).mean()])
    found = {}
    for i, name in enumerate(("win", "tie", "lose")):
        mean, half = mean_and_half_width([rate[i] for rate in rates])
        found[name] = {"rate": mean, "half": half if half == half else None}    # one prompt has no interval
    return found


def main(config):
    device = pick_device(config.device)
    reward_model, tokenizer, checkpoint = load_reward_model(config.checkpoint, device)
    name = model_name(config.checkpoint)
    config = dataclasses.replace(config, generator=config.generator or checkpoint["settings"]["generator"],
                                 out_dir=config.out_dir or f"out/dpo-{config.loss}-{name}-seed{config.seed}")
    show(config)
    in_range(config, 1, 10**9, "prompts", "held_out", "answers", "steps", "batch_size", "log_interval", "save_interval", "max_new_tokens")
    in_range(config, 2, 10**9, "samples")
    in_range(config, 0, 10**9, "seed", "learning_rate", "warmup", "weight_decay", "temperature")
    in_range(config, TINY, 10**9, "beta", "clip")
    in_range(config, TINY, 1, "top_p")
    choose("loss", config.loss, LOSSES)
    autocast(device, config.dtype)
    reference, its_tokenizer = load_generator(config.generator, device)
    context, judge = reference.transformer.config.block_size, None
    check_fit("generator", reference, its_tokenizer, tokenizer)
    check_fit("reward model", reward_model, tokenizer, tokenizer, context)
    if config.judge:
        judge, its_tokenizer, _ = load_reward_model(config.judge, device)
        check_fit("judge", judge, its_tokenizer, tokenizer, context)
    prompts, held_out = prompts_of(open_dataset(checkpoint["settings"]["dataset"]), config)
    run = Run(config.out_dir, "policy", config, config.overwrite)
    inputs = dict(generator=fingerprint(reference.state_dict()), reward_model=fingerprint(reward_model.state_dict()))
    key = fingerprint(inputs, json.dumps([prompts, config.samples, config.temperature, config.top_p, config.seed, config.max_new_tokens]))
    run.match(**inputs, pairs=key)
    rows, logprobs, left_out = obtain_pairs(reference, reward_model, tokenizer, prompts, config, device, key)
    print(f"{len(rows) // 2} pairs from {config.prompts} prompts; left out: " + ", ".join(f"{n} {why}" for why, n in left_out.items()))
    policy = train_policy(config, reference, tokenizer, rows, logprobs, run, device)

    is_toy = checkpoint["dataset_kind"] == "toy"
    before, theirs = judge_policy(reference, reference, reward_model, tokenizer, held_out, config, device, is_toy)
    after, ours = judge_policy(policy, reference, reward_model, tokenizer, held_out, config, device, is_toy)
    results = {f"{key}_{when}": value for when, part in (("before", before), ("after", after)) for key, value in part.items()
               if key != "kl"} | {"kl": after["kl"], "pairs": len(rows) // 2, "left_out": left_out}
    print_lines([["held-out prompts", "before", "after"]] + [
        [key.replace("_", " "), *("" if part[key] is None else f"{part[key]:.3f}" for part in (before, after))] for key in before])
    if judge:
        results["judge"] = win_rates(judge, ours, theirs, device)
        print("policy against generator by the judge: " + ", ".join(
            f"{name} {part['rate']:.3f}" + (f" +-{part['half']:.3f}" if part["half"] else "") for name, part in results["judge"].items()))
    results["settings"] = dataclasses.asdict(config)
    write_json(Path(config.out_dir) / "results.json", results)
    if config.json:
        write_json(config.json, results)
    print(f"wrote {config.out_dir}/ckpt.pt, log.jsonl and results.json")


if __name__ == "__main__":
    run_script(DPOConfig, main)
