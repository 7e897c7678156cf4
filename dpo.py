"""Align a policy with a reward model by direct preference optimization (DPO).

    python dpo.py --checkpoint=out/toy-icrm-seed0
    python dpo.py --checkpoint=DIR --judge=OTHER    win rates by another reward model

The paper claims that a better reward model gives better pairs, and so a better policy.
Of the responses that the generator samples to a prompt, those with the highest and the
lowest reward make a pair. The policy starts from the generator, which is also the
reference (arXiv 2305.18290). Then both answer held-out prompts. On the toy world the
true quality of their responses is known.

--pairs_split=swapped takes the responses of that split instead of sampled ones.
--generator=OUT_DIR continues with an earlier policy.

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
    find_near,
    lock,
    run_script,
    sha256_of,
    write_json,
)
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from bon import (
    check_same_tokenizer,
    keep_finished,
    final_rewards,
    sample_responses,
)
from data.batch import BatchSchedule, Example, collate
from data.dataset import open_dataset
from data.toy import World
from evaluate import format_cell, load_reward_model, print_lines
from generator import load_generator, response_logprobs
from model import LanguageModel, learning_rate, make_optimizer, update

WARMUP, LOG_INTERVAL, SAVE_INTERVAL = 10, 10, 30  # updates
EVAL_SAMPLES = 8  # responses to each held-out prompt


@dataclass(frozen=True)
class DPOConfig:
    checkpoint: str = ""  # the reward model that selects the pairs
    generator: str = ""  # reference and start. empty: the reward model's generator
    judge: str = ""  # another reward model, for win rates
    out_dir: str = ""  # empty: out/dpo-CHECKPOINT[-GENERATOR][-SPLIT]-seedSEED
    resume: bool = False  # continue from the last checkpoint in out_dir
    beta: float = 0.1  # strength of the implicit KL penalty
    pairs_split: str = ""  # a split whose responses make the pairs. empty: sample them
    prompts: int = 200  # training prompts, repeated if there are fewer
    samples: int = 8  # responses sampled per training prompt
    max_new_tokens: int = 100  # longest response
    held_out: int = 50  # held-out prompts for the evaluation
    seed: int = 0  # random seed of sampling and the order of the pairs
    steps: int = 60  # updates
    batch_size: int = 16  # pairs per update
    learning_rate: float = 1e-4  # peak
    device: str = "auto"  # auto, cpu, cuda, cuda:N


def dpo_loss(margins, beta):
    """The DPO loss: -log sigma(beta * margin), mean over pairs.

    Rafailov et al. (arXiv 2305.18290), Eq. 7.

    margins: (B,) log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l)
    """
    # task 6
    return -F.logsigmoid(beta * margins).mean()
    # end


# Pairs --------------------------------------------------------------------------------


def select_prompts(dataset, config):
    """Examples to train on (--prompts of them), and other prompts, which are held out.

    The Examples hold a prompt, and a split's responses with --pairs_split.
    """
    held_out = dataset.split("val").prompts()[: config.held_out]
    held_out_keys = {prompt.tobytes() for prompt in held_out}
    if config.pairs_split:
        examples = list(dataset.split(config.pairs_split))
    else:
        examples = [Example(prompt, ()) for prompt in dataset.split("train").prompts()]
    examples = [e for e in examples if e.prompt.tobytes() not in held_out_keys]
    if not examples or len(held_out) < 2:
        raise UserError(
            f"too few prompts: {len(held_out)} held out, {len(examples)} to train on. "
            "Change --held_out, or prepare more data"
        )
    return [examples[i % len(examples)] for i in range(config.prompts)], held_out


def select_best_and_worst(examples, rewards):
    """Pairs of the responses with the highest and the lowest reward of a prompt."""
    pairs = []
    for example, r in zip(examples, rewards):
        if len(set(r)) > 1:
            best, worst = example.responses[r.argmax()], example.responses[r.argmin()]
            pairs.append(Example(example.prompt, (best, worst)))
    return pairs


def make_pairs(reference, reward_model, tokenizer, examples, config):
    """The preference pairs, and the reference's log P of both responses (pairs, 2)."""
    if not config.pairs_split:
        examples = sample_responses(
            reference,
            tokenizer,
            [example.prompt for example in examples],
            config.samples,
            config.seed,
            config.max_new_tokens,
        )
    examples = keep_finished(examples, tokenizer)
    pairs = select_best_and_worst(examples, final_rewards(reward_model, examples))
    if not pairs:
        raise UserError(
            "no prompt has two finished responses with different rewards. Try more "
            f"--samples or --max_new_tokens than {config.max_new_tokens}"
        )
    print(f"{len(pairs)} pairs from {len(examples)} prompts")
    logprobs = np.stack(sequence_logprobs(reference, pairs))
    return pairs, torch.from_numpy(logprobs).float()


def sequence_logprobs(model, examples):
    """log P of every response, the sum over its tokens. One array per Example."""
    results = []
    with autocast(model.device, "auto"):  # as in training
        for responses in response_logprobs(model, examples):
            sums = [response.sum(dtype=np.float64) for response in responses]
            results.append(np.array(sums))
    return results


def fingerprint_pairs(pairs):
    parts = []
    for prompt, (chosen, rejected) in pairs:
        parts += [prompt.tobytes(), chosen.tobytes(), rejected.tobytes()]
    return sha256_of(*parts)


# Training -----------------------------------------------------------------------------


def train_policy(config, reference, tokenizer, pairs, reference_logprobs, run):
    """Train a copy of the reference on the pairs. Return the frozen policy."""
    policy = LanguageModel(reference.config).to(reference.device)
    policy.load_state_dict(reference.state_dict())
    reference_logprobs = reference_logprobs.to(policy.device)  # (pairs, 2)
    optimizer = make_optimizer(policy, config.learning_rate)
    first_step = run.resume(policy, optimizer)
    lengths = np.array([pair.length for pair in pairs])
    schedule = BatchSchedule(lengths, config.batch_size, config.seed)
    print(" step      loss    margin  accuracy  grad_norm")
    steps, history = range(first_step, config.steps), []
    for step in tqdm(steps, "policy", disable=None, leave=False):
        indices = schedule[step]
        batch = collate([pairs[i] for i in indices]).to(policy.device)
        with autocast(policy.device, "auto"):
            logprobs = policy.lm_logprobs(policy.hidden_states(batch), batch)  # (2B, T)
        chosen, rejected = logprobs.sum(1).chunk(2)  # (B,) each
        reference_chosen, reference_rejected = reference_logprobs[indices].unbind(1)
        margins = (chosen - reference_chosen) - (rejected - reference_rejected)
        loss = dpo_loss(margins, config.beta)
        loss.backward()
        rate = learning_rate(step, config.steps, config.learning_rate, WARMUP)
        grad_norm = update(policy, optimizer, rate)
        history.append(torch.stack([loss.detach(), grad_norm]))

        done = step + 1
        is_last = done == config.steps
        if done % LOG_INTERVAL == 0 or is_last:
            record = {
                "step": done,
                "loss": loss.item(),
                "margin": margins.mean().item(),
                "accuracy": (margins > 0).float().mean().item(),
                "grad_norm": grad_norm.item(),
            }
            check_all_finite(done, history)
            history = []
            run.log(record)
            tqdm.write("{:5d}{:10.3f}{:10.3f}{:10.3f}{:11.3f}".format(*record.values()))
        if done % SAVE_INTERVAL == 0 or is_last:
            run.save(done, policy, optimizer, tokenizer)
    return policy.eval().requires_grad_(False)


# Evaluation ---------------------------------------------------------------------------


def policy_metrics(examples, reward_model, dataset):
    """Metrics of the responses to held-out prompts.

    gold: mean true quality (toy world). reward: mean over finished responses
    """
    tokenizer = dataset.tokenizer
    responses = [response for example in examples for response in example.responses]
    texts = [tokenizer.decode(response) for response in responses]
    finished = keep_finished(examples, tokenizer)
    rewards = np.concatenate(final_rewards(reward_model, finished))
    metrics = {}
    if dataset.kind == "toy":
        world = World(**dataset.metadata["world"])
        metrics["gold"] = float(np.mean([world.true_quality(text) for text in texts]))
    metrics["reward"] = float(rewards.mean()) if len(rewards) else None
    metrics["finished"] = len(rewards) / len(texts)
    metrics["length"] = float(np.mean([len(response) for response in responses]))
    metrics["distinct"] = len(set(texts)) / len(texts)
    return metrics


def win_rate(judge, policy_examples, reference_examples):
    """How often the policy's response has the higher reward by the judge.

    Each response is compared with each of the other model's to the same prompt. A tie
    counts half. Returns the rate and 1.96 standard errors over prompts, or None if
    fewer than two prompts have finished responses of both.
    """
    policy_rewards = final_rewards(judge, policy_examples)
    reference_rewards = final_rewards(judge, reference_examples)
    rates = []
    for a, b in zip(policy_rewards, reference_rewards):
        if len(a) and len(b):
            signs = np.sign(a[:, None] - b)  # 1: the policy wins, -1: it loses
            rates.append(float((1 + signs).mean() / 2))
    if len(rates) < 2:
        return None
    standard_error = np.std(rates, ddof=1) / len(rates) ** 0.5
    return float(np.mean(rates)), float(1.96 * standard_error)


def compare(policy, reference, reward_model, judge, dataset, prompts, config):
    """Compare policy and reference on held-out prompts: print and return the metrics.

    kl: mean of log pi(y) - log pi_ref(y) over the policy's responses, an estimate of
    KL(pi || pi_ref)
    """
    tokenizer = dataset.tokenizer
    arguments = prompts, EVAL_SAMPLES, config.seed, config.max_new_tokens
    reference_examples = sample_responses(reference, tokenizer, *arguments)
    policy_examples = sample_responses(policy, tokenizer, *arguments)
    results = {
        "generator": policy_metrics(reference_examples, reward_model, dataset),
        "policy": policy_metrics(policy_examples, reward_model, dataset),
    }
    log_ratios = []
    for own, other in zip(
        sequence_logprobs(policy, policy_examples),
        sequence_logprobs(reference, policy_examples),
    ):
        log_ratios.append(own - other)
    results["policy"]["kl"] = float(np.mean(np.concatenate(log_ratios)))
    lines = [[f"{len(prompts)} held-out prompts", *results]]
    for key in results["policy"]:
        cells = [format_cell(metrics.get(key)) for metrics in results.values()]
        lines.append([key, *cells])
    print_lines(lines)
    if judge:
        finished_policy = keep_finished(policy_examples, tokenizer)
        finished_reference = keep_finished(reference_examples, tokenizer)
        rate = win_rate(judge, finished_policy, finished_reference)
        results["win_rate"] = rate
        if rate is None:
            print("too few finished responses for a win rate")
        else:
            print(f"win rate by the judge: {rate[0]:.3f} +-{rate[1]:.3f}")
    return results


def main(config):
    parts = ["out/dpo", Path(config.checkpoint.removesuffix("ckpt.pt")).name]
    parts += [Path(config.generator).name, config.pairs_split, f"seed{config.seed}"]
    default = "-".join(part for part in parts if part)
    config = dataclasses.replace(config, out_dir=config.out_dir or default)
    check_range(config, 1, 10**9, "prompts", "max_new_tokens", "steps", "batch_size")
    check_range(config, 2, 10**9, "samples", "held_out")
    check_range(config, 0, 10**9, "seed")
    check_range(config, POSITIVE, 10**9, "beta", "learning_rate")
    reward_model, tokenizer, checkpoint = load_reward_model(
        config.checkpoint, config.device
    )
    settings, inputs = checkpoint["settings"], checkpoint["inputs"]
    folder, p_fingerprint = find_near(checkpoint, settings["generator"]), inputs["p"]
    if config.generator:
        folder, p_fingerprint = config.generator, ""
    reference, its_tokenizer = load_generator(folder, config.device, p_fingerprint)
    check_same_tokenizer("generator", its_tokenizer, tokenizer)
    scorers, judge = {"reward model": reward_model}, None
    if config.judge:
        judge, its_tokenizer, _ = load_reward_model(config.judge, config.device)
        check_same_tokenizer("judge", its_tokenizer, tokenizer)
        scorers["judge"] = judge
    for name, scorer in scorers.items():
        if scorer.config.block_size < reference.config.block_size:
            raise UserError(f"the {name}'s context is shorter than the generator's")
    dataset = open_dataset(settings["dataset"], checkpoint)
    if config.pairs_split:
        check_choice("pairs_split", config.pairs_split, dataset.split_names)
    with lock(config.out_dir):
        examples, held_out = select_prompts(dataset, config)
        pairs, logprobs = make_pairs(
            reference, reward_model, tokenizer, examples, config
        )
        run_inputs = {
            "data": dataset.fingerprint,
            "pairs": fingerprint_pairs(pairs),
            "generator": file_sha256(Path(folder) / "ckpt.pt"),
        }
        run = Run("policy", config, run_inputs)
        policy = train_policy(config, reference, tokenizer, pairs, logprobs, run)
        results = compare(
            policy, reference, reward_model, judge, dataset, held_out, config
        )
        results["pairs"], results["settings"] = len(pairs), dataclasses.asdict(config)
        write_json(Path(config.out_dir) / "results.json", results)
    print(f"wrote {config.out_dir}/ckpt.pt, log.jsonl, results.json")


if __name__ == "__main__":
    run_script(DPOConfig, main)
