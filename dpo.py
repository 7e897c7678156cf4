"""A policy aligned with a reward model by direct preference optimisation (arXiv 2305.18290).

    python dpo.py --checkpoint=out/toy-icrm-seed0
    python dpo.py --checkpoint=CKPT --judge=OTHER       win rates by another reward model too

A better reward model picks better pairs, and so makes a better policy (the paper's third claim). Of
the responses that the generator samples to a prompt, the best and the worst by reward make a pair;
the policy starts from the generator, the reference. Then both answer held-out prompts, on the toy
world judged by the truth. --pairs_from=swapped takes the responses of that split in place of its
own, --generator=OUT_DIR is a second round. Left out: sampling anew in training, other losses.
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from config import (TINY, Stopping, UserError, autocast, check_finite, choose, in_range,
                    run_script)
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.dataset import open_dataset
from data.files import Run, fingerprint, write_json
from data.rows import Row, batch_of, make_batch
from data.toy.world import World
from evaluate import check_fit, final_rewards, load_reward_model, print_lines, text_of
from generator import finished, load_generator, response_logprobs, sample_rows
from model import LanguageModel, learning_rate, make_optimizer, update

WARMUP, LOG_EVERY, SAVE_EVERY = 10, 10, 30  # updates
ANSWERS = 8     # responses to every held-out prompt


@dataclass(frozen=True)
class DPOConfig:
    checkpoint: str = ""        # the reward model that picks the pairs
    generator: str = ""         # where the policy starts; empty: the reward model's own generator
    judge: str = ""             # another reward model that compares the policy with the generator
    out_dir: str = ""           # empty: out/dpo-CHECKPOINT-seedSEED
    resume: bool = False        # go on from out_dir's last checkpoint
    beta: float = 0.1           # strength of the pull to the reference
    pairs_from: str = ""        # a split whose responses make the pairs; empty: sampled ones
    prompts: int = 200          # training prompts, used again where there are fewer
    samples: int = 8            # responses to each
    max_new_tokens: int = 100   # longest response
    held_out: int = 50          # prompts to judge the policy on, none of them trained on
    seed: int = 0               # of sampling and the order of the data
    steps: int = 60             # updates
    batch_size: int = 16        # pairs per update
    learning_rate: float = 1e-4 # peak
    device: str = "auto"        # auto, cpu, cuda, cuda:N


def dpo_loss(margin, beta):
    """-log sigma(beta margin), margin = log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l) of each
    pair (Rafailov et al., Eq. 7).  (B,) -> ()"""
    # task 6
    return -F.logsigmoid(beta * margin).mean()
    # end


# Pairs -------------------------------------------------------------------------------------------

def prompts_of(dataset, config):
    """-> Rows to train on, as many as asked, of a prompt alone or a prompt and a split's responses;
    and held-out prompts, none of them in both"""
    held_out = dataset.split("val").prompts()[:config.held_out]
    known = {prompt.tobytes() for prompt in held_out}
    rows = (list(dataset.split(config.pairs_from)) if config.pairs_from else
            [Row(prompt, ()) for prompt in dataset.split("train").prompts()])
    rows = [row for row in rows if row.prompt.tobytes() not in known]
    if not rows or len(held_out) < 2:
        raise UserError(f"{len(held_out)} prompts to hold out leave {len(rows)} to train on")
    return [rows[i % len(rows)] for i in range(config.prompts)], held_out


def best_and_worst(rows, rewards):
    """Responses to each prompt and their rewards -> Rows of the best and the worst, where two are
    unequal."""
    return [Row(row.prompt, (row.responses[r.argmax()], row.responses[r.argmin()]))
            for row, r in zip(rows, rewards) if len(set(r)) > 1]


def sums(model, rows):
    """log P of every response: an array for each Row."""
    with autocast(model.lm_head.weight.device, "auto"):     # as the policy is trained
        return [np.array([part.sum(dtype=np.float64) for part in parts])
                for parts in response_logprobs(model, rows)]


def make_pairs(reference, reward_model, tokenizer, rows, config):
    """-> Rows of two and the reference's log P of both (pairs, 2), the same whenever it is asked"""
    if not config.pairs_from:
        rows = sample_rows(reference, tokenizer, [row.prompt for row in rows], config.samples,
                           config.seed, config.max_new_tokens)
    rows = finished(rows, tokenizer)
    pairs = best_and_worst(rows, final_rewards(reward_model, rows))
    if not pairs:
        raise UserError(f"no pair; another --pairs_from than {config.pairs_from!r}, or more "
                        f"--samples or --max_new_tokens than {config.max_new_tokens}, may help")
    print(f"{len(pairs)} pairs from {len(rows)} prompts")
    return pairs, torch.from_numpy(np.stack(sums(reference, pairs))).float()


# Training ----------------------------------------------------------------------------------------

def train_policy(config, reference, tokenizer, pairs, logprobs, run):
    """Train a copy of the reference on pairs; -> the frozen policy."""
    sizes, device = reference.model.config, reference.lm_head.weight.device
    policy, logprobs = LanguageModel(sizes).to(device), logprobs.to(device)     # (pairs, 2)
    policy.load_state_dict(reference.state_dict())
    optimizer = make_optimizer(policy, config.learning_rate)
    first = run.restore(policy, optimizer)
    print(" step      loss    margin  accuracy  grad_norm")
    for step in tqdm(range(first, config.steps), "policy", config.steps, initial=first,
                     disable=None, leave=False):
        items = batch_of(step, len(pairs), config.batch_size, config.seed)
        batch = make_batch([pairs[i] for i in items], likelihoods=None).to(device)
        with autocast(device, "auto"):
            each = policy(batch)                                                # (M,)
        ours = each.new_zeros(2 * len(items)).index_add(0, batch.owners, each)  # (2B,)
        chosen, rejected = ours.view(2, -1) - logprobs[items].T                 # (B,) each
        margin = chosen - rejected
        loss = dpo_loss(margin, config.beta)
        loss.backward()
        rate = learning_rate(step, config.steps, config.learning_rate, WARMUP)
        norm = update(policy, optimizer, rate)
        done = step + 1
        if done % LOG_EVERY == 0 or done == config.steps:
            record = {"step": done, "loss": loss.item(), "margin": margin.mean().item(),
                      "accuracy": (margin > 0).double().mean().item(), "grad_norm": norm.item()}
            check_finite(*record.values())
            run.log(record)
            tqdm.write("{:5d}{:10.3f}{:10.3f}{:10.3f}{:11.3f}".format(*record.values()))
        if done % SAVE_EVERY == 0 or done == config.steps or Stopping.asked:
            run.save(done, policy, optimizer, tokenizer)
    return policy.eval().requires_grad_(False)


# What the policy is worth ------------------------------------------------------------------------

def describe(rows, reward_model, dataset):
    """Responses to held-out prompts -> metrics; reward: of those that ended (None: none did)."""
    texts = [dataset.tokenizer.decode(response) for row in rows for response in row.responses]
    rewards = np.concatenate(final_rewards(reward_model, finished(rows, dataset.tokenizer)))
    found = {}
    if dataset.kind == "toy":
        gold_of = World(**dataset.about["world"]).gold_of
        found["gold"] = float(np.mean(list(map(gold_of, texts))))
    return found | {"reward": float(rewards.mean()) if len(rewards) else None,
                    "finished": len(rewards) / len(texts),
                    "length": float(np.mean([len(part) for row in rows for part in row.responses])),
                    "distinct": len(set(texts)) / len(texts)}


def win_rate(judge, ours, theirs):
    """Responses of two models to the same prompts -> how often the first's has the higher reward by
    a judge, each against every other one of its prompt, a tie counting half; and 1.96 standard
    errors of it over prompts. None where there are not two prompts that both have answered."""
    rewards = zip(final_rewards(judge, ours), final_rewards(judge, theirs))
    shares = [(1 + np.sign(a[:, None] - b)).mean() / 2 for a, b in rewards if len(a) and len(b)]
    if len(shares) > 1:
        return float(np.mean(shares)), float(1.96 * np.std(shares, ddof=1) / len(shares) ** 0.5)


def compare(policy, reference, reward_model, judge, dataset, prompts, config):
    """Both answer held-out prompts: prints and -> results. kl: mean over the policy's responses of
    log pi(y) - log pi_ref(y), an estimate of KL(pi || pi_ref)."""
    theirs, ours = (sample_rows(model, dataset.tokenizer, prompts, ANSWERS, config.seed,
                                config.max_new_tokens) for model in (reference, policy))
    results = {"generator": describe(theirs, reward_model, dataset),
               "policy": describe(ours, reward_model, dataset)}
    results["policy"]["kl"] = float(np.mean(np.subtract(sums(policy, ours), sums(reference, ours))))
    print_lines([[f"{len(prompts)} held-out prompts", *results]] + [
        [key, *(text_of(part.get(key)) for part in results.values())] for key in results["policy"]])
    if judge:
        found = win_rate(judge, *(finished(rows, dataset.tokenizer) for rows in (ours, theirs)))
        results["win_rate"] = found
        print("the judge prefers the policy's response at a rate of {:.3f} +-{:.3f}".format(*found)
              if found else "too few responses ended for the judge to compare")
    return results


def main(config):
    name = Path(config.checkpoint.removesuffix("ckpt.pt")).name
    words = ("out/dpo", name, Path(config.generator).name, config.pairs_from, f"seed{config.seed}")
    config = dataclasses.replace(config, out_dir=config.out_dir or "-".join(filter(None, words)))
    in_range(config, 1, 10**9, "prompts", "max_new_tokens", "steps", "batch_size")
    in_range(config, 2, 10**9, "samples", "held_out")
    in_range(config, 0, 10**9, "seed", "learning_rate")
    in_range(config, TINY, 10**9, "beta")
    reward_model, tokenizer, checkpoint = load_reward_model(config.checkpoint, config.device)
    settings, judge = checkpoint["settings"], None
    reference, its_tokenizer = load_generator(
        config.generator or settings["generator"], config.device,
        "" if config.generator else checkpoint["inputs"]["p"])
    dataset = open_dataset(settings["dataset"], checkpoint["inputs"]["data"])
    check_fit("generator", its_tokenizer, tokenizer)
    check_fit("reward model", tokenizer, tokenizer, reward_model, reference)
    if config.judge:
        judge, its_tokenizer, _ = load_reward_model(config.judge, config.device)
        check_fit("judge", its_tokenizer, tokenizer, judge, reference)
    if config.pairs_from:
        choose("pairs_from", config.pairs_from, dataset.about["splits"])
    rows, held_out = prompts_of(dataset, config)
    pairs, logprobs = make_pairs(reference, reward_model, tokenizer, rows, config)
    run = Run("policy", config, {"data": dataset.fingerprint, "pairs": fingerprint(pairs),
                                 "generator": fingerprint(reference.state_dict()),
                                 "reward model": fingerprint(reward_model.state_dict())})
    policy = train_policy(config, reference, tokenizer, pairs, logprobs, run)
    results = compare(policy, reference, reward_model, judge, dataset, held_out, config)
    results |= {"pairs": len(pairs), "settings": dataclasses.asdict(config)}
    write_json(Path(config.out_dir) / "results.json", results)
    print(f"wrote {config.out_dir}/ckpt.pt, log.jsonl, results.json")


if __name__ == "__main__":
    run_script(DPOConfig, main)
