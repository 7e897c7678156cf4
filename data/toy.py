"""The toy world: short reviews in which the exact value of every prefix is known.

    python data/toy.py                      writes data/toy, in seconds
    python data/toy.py --name=toy-1 --seed=1

    How is the theatre in Lagos?  Monday people returned twice: banks change often; joy
    ruled there always, coins seemed new under a clock; lies lasted on anyway, ...

A response is four opening words and six clauses. A clause is neutral filler, or
evidence (one of 30 good and 30 bad phrases) followed by a neutral remark. In the
training distribution, each evidence phrase has its own remark 98% of the time. So the
remark is predictable, and a reward model may read it instead of the evidence. In the
shifted splits the remark is random, or comes from evidence of the opposite quality.

The true quality of a response is #good - #bad evidence. The response with the higher
true quality is chosen. As with human annotators, some labels of training pairs are
wrong. The other splits have true labels.

Beside the tokens, the dataset stores for every response token its exact probability
(`exact-p`), the exact value V of the prefix that it ends (`exact-value`), the value C
that the training labels imply (`exact-target`) and its `kind`: 1 for the first token of
a remark, 2 for that of evidence, else 0. On prompts they are 0.
"""

import math
import random
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import POSITIVE, check_choice, check_range, run_script
import numpy as np

from data.dataset import dataset_folder, write_dataset
from data.tokenizer import make_tokenizer
from data.toy_words import (
    BAD,
    FACTS,
    FILLER,
    GOOD,
    LOOKS,
    OPENING,
    PLACES,
    PREDICATES,
    REMARKS,
    TOWNS,
)

EVIDENCE = [f"{noun} {predicate}" for noun, predicate in zip(GOOD + BAD, PREDICATES)]
QUALITIES = [+1] * len(GOOD) + [-1] * len(BAD)
QUALITY_OF = dict(zip(EVIDENCE, QUALITIES))
REMARK_TEXTS = [f"{noun} {look}" for noun, look in zip(REMARKS, LOOKS)]
FILLER_TEXTS = []
for shift in range(len(FACTS)):
    for i, noun in enumerate(FILLER):
        FILLER_TEXTS.append(f"{noun} {FACTS[(i + shift) % len(FACTS)]}")
KINDS = {"remark": 1, "evidence": 2}
ARRAYS = {
    "exact-p": np.float32,
    "exact-value": np.float32,
    "exact-target": np.float32,
    "kind": np.uint8,
}
LABEL_MODELS = ("flip", "bradley_terry")


@dataclass(frozen=True)
class ToyConfig:
    name: str = "toy"  # the dataset's name, a folder under data/
    seed: int = 0  # random seed of all splits
    train: int = 500  # training pairs
    test: int = 1000  # pairs in each of val, decoupled, swapped and longer
    label_model: str = "flip"  # of training pairs: flip, or bradley_terry
    label_noise: float = 0.2  # flip: share of training pairs with the wrong label
    tau: float = 1.0  # bradley_terry: P(better one chosen) = sigma(difference / tau)
    reward_rule: str = "sum"  # sum: #good - #bad. veto: #good, but -1 after a bad piece
    filler_clauses_first: int = 0  # clauses at the start that are always filler
    fillers: int = 24  # different filler clauses


class State(NamedTuple):
    """The state of the process that generates a response."""

    step: int = 0  # opening words and clauses that are complete
    quality: int = 0  # true quality so far
    pending: int | None = None  # index of the evidence whose remark follows


class Hypothesis(NamedTuple):
    """A text that fits the tokens so far."""

    weight: float  # its probability given the tokens so far
    kind: str  # opening, evidence, remark, filler or end
    remaining: tuple  # the text's tokens that are still to come
    next_state: State  # after the text


@dataclass(frozen=True)
class World:
    clauses: int = 6  # of a response
    evidence: float = 0.6  # probability that a clause is evidence
    fidelity: float = 0.98  # probability of the evidence's own remark, else any of 60
    remarks: str = "usual"  # usual, random or opposite
    reward_rule: str = "sum"  # sum or veto
    filler_clauses_first: int = 0
    fillers: int = len(FILLER)  # up to 144. Above 24, nouns occur with several facts
    label_model: str = "flip"  # of training pairs
    label_noise: float = 0.0
    tau: float = 1.0

    # The process that generates responses

    def add_evidence(self, quality, piece):
        """The true quality after one more piece of evidence (+1 or -1)."""
        if self.reward_rule == "veto" and (quality < 0 or piece < 0):
            return -1
        return quality + piece

    @lru_cache(maxsize=None)
    def choices(self, state):
        """What may follow a state: [(probability, kind, text, next state), ...].

        There are none at the end. The texts are prefix-free.
        """
        clause = state.step - len(OPENING)
        if clause < 0:
            return self.opening_choices(state.step)
        if clause == self.clauses:
            return []
        end = "." if clause == self.clauses - 1 else ";"
        next_state, choices = State(state.step + 1, state.quality), []
        if state.pending is not None:
            probabilities = self.remark_probabilities(state.pending)
            for p, remark in zip(probabilities, REMARK_TEXTS):
                if p > 0:
                    choices.append((p, "remark", f" {remark}{end}", next_state))
            return choices
        share = self.evidence if clause >= self.filler_clauses_first else 0.0
        if share > 0:
            for i, phrase in enumerate(EVIDENCE):
                quality = self.add_evidence(state.quality, QUALITIES[i])
                pending = State(state.step, quality, i)
                choices.append(
                    (share / len(EVIDENCE), "evidence", f" {phrase},", pending)
                )
        p = (1 - share) / self.fillers
        for filler in FILLER_TEXTS[: self.fillers]:
            choices.append((p, "filler", f" {filler}{end}", next_state))
        return choices

    def opening_choices(self, step):
        words = OPENING[step]
        end = ":" if step == len(OPENING) - 1 else ""
        choices = []
        for word in words:
            choices.append(
                (1 / len(words), "opening", f" {word}{end}", State(step + 1))
            )
        return choices

    def remark_probabilities(self, evidence):
        """The probability of each of the 60 remarks after a piece of evidence."""
        n, probabilities = len(REMARK_TEXTS), []
        for i in range(n):
            if self.remarks == "random":
                p = 1 / n
            elif self.remarks == "opposite":
                p = 2 / n if QUALITIES[i] != QUALITIES[evidence] else 0.0
            else:
                p = (1 - self.fidelity) / n
                if i == evidence:
                    p += self.fidelity
            probabilities.append(p)
        return probabilities

    def sample(self, rng):
        """One response. It only calls rng.random(), so all Python versions agree."""
        state, text = State(), ""
        choices = self.choices(state)
        while choices:
            u = rng.random()
            for p, _, piece, next_state in choices:
                u -= p
                if u < 0:
                    break
            text, state = text + piece, next_state
            choices = self.choices(state)
        return text

    # What is known exactly

    def true_quality(self, text):
        """The true quality of a response. Only its evidence counts."""
        quality = 0
        for clause in re.split("[;.]", text.partition(":")[2]):
            phrase = clause.partition(",")[0].strip()
            if phrase in QUALITY_OF:
                quality = self.add_evidence(quality, QUALITY_OF[phrase])
        return quality

    @lru_cache(maxsize=None)
    def outcomes(self, state):
        """{final true quality: probability} of the responses that continue a state."""
        if state.pending is not None:  # the remark cannot change it
            return self.outcomes(State(state.step + 1, state.quality))
        outcomes = Counter()
        for p, _, _, next_state in self.choices(state):
            for quality, q in self.outcomes(next_state).items():
                outcomes[quality] += p * q
        return outcomes or {state.quality: 1.0}

    @lru_cache(maxsize=None)
    def value(self, state):
        """The exact value V: P(better) + 1/2 P(equal).

        A response that continues the state is compared with an independent random one.
        """
        value = 0.0
        for quality, p in self.outcomes(state).items():
            for other_quality, q in self.outcomes(State()).items():
                if quality > other_quality:
                    value += p * q
                elif quality == other_quality:
                    value += p * q * 0.5
        return value

    def wrong_label_probability(self, difference):
        """P(a training label is wrong), for a pair with this difference in quality."""
        if self.label_model == "bradley_terry":
            return 1 / (1 + math.exp(abs(difference) / self.tau))
        return self.label_noise

    @lru_cache(maxsize=None)
    def target(self, state):
        """The value C that the training labels imply.

        It is the probability that a training response that continues the state is the
        chosen one. Unlike in V, there are no ties, and some labels are wrong.
        """
        chosen = total = 0.0
        for quality, p in self.outcomes(state).items():
            for other_quality, q in self.outcomes(State()).items():
                if quality == other_quality:
                    continue
                is_chosen = self.wrong_label_probability(quality - other_quality)
                if quality > other_quality:
                    is_chosen = 1 - is_chosen
                chosen += p * q * is_chosen
                total += p * q
        return chosen / total

    def trace(self, tokens, encode, end_of_text, strict=True):
        """Exact probability, value, target and kind of every token of a response.

        The forward algorithm: it tracks all texts that fit the tokens so far. The kind
        is marked at the first token of a text, once the text is complete.

        tokens: the response, end-of-text last. encode: text -> token ids
        strict: a token that the world cannot produce is a ValueError. Otherwise p is 0
            and the value stays the same from there on
        Returns a list of [p, value, target, kind].
        """
        hypotheses, rows = [Hypothesis(1.0, "", (), State())], []
        for token in tokens:
            if not hypotheses[0].remaining:  # a text is complete: predict the next one
                first = len(rows)
                next_state = hypotheses[0].next_state
                hypotheses = self.next_texts(next_state, encode, end_of_text)
            hypotheses = [h for h in hypotheses if h.remaining[0] == token]  # observe
            if not hypotheses:
                if strict:
                    raise ValueError(f"the world cannot produce token {len(rows)}")
                value, target = self.value(State()), self.target(State())
                if rows:
                    _, value, target, _ = rows[-1]
                return rows + [[0.0, value, target, 0]] * (len(tokens) - len(rows))
            p, shifted = sum(h.weight for h in hypotheses), []
            value = target = 0.0
            for h in hypotheses:
                value += h.weight * self.value(h.next_state)
                target += h.weight * self.target(h.next_state)
                shifted.append(
                    h._replace(weight=h.weight / p, remaining=h.remaining[1:])
                )
            rows.append([p, value / p, target / p, 0])
            hypotheses = shifted
            if not hypotheses[0].remaining:
                rows[first][3] = KINDS.get(hypotheses[0].kind, 0)
        return rows

    @lru_cache(maxsize=None)
    def next_texts(self, state, encode, end_of_text):
        """A Hypothesis for every text that may follow a state, or for the end."""
        hypotheses = []
        for p, kind, text, next_state in self.choices(state):
            hypotheses.append(Hypothesis(p, kind, tuple(encode(text)), next_state))
        return hypotheses or [Hypothesis(1.0, "end", (end_of_text,), state)]


def split_worlds(world):
    """The worlds of a dataset's splits. `val` has the training distribution."""
    return {
        "train": world,
        "val": world,
        "decoupled": replace(world, remarks="random"),
        "swapped": replace(world, remarks="opposite"),
        "longer": replace(world, clauses=10, remarks="random"),
    }


def sample_pairs(world, count, seed, has_true_labels=True):
    """Sample `count` triples of a prompt, a chosen and a rejected response.

    The response with the higher true quality is chosen, unless the world's label model
    makes some labels wrong. The texts do not depend on the labels.
    """
    rng, label_rng, pairs = random.Random(seed), random.Random(f"{seed} labels"), []
    while len(pairs) < count:
        place = PLACES[int(rng.random() * len(PLACES))]
        town = TOWNS[int(rng.random() * len(TOWNS))]
        first, second = world.sample(rng), world.sample(rng)
        first_quality = world.true_quality(first)
        second_quality = world.true_quality(second)
        if first_quality == second_quality:
            continue
        first_is_chosen = first_quality > second_quality
        wrong = world.wrong_label_probability(first_quality - second_quality)
        if not has_true_labels and label_rng.random() < wrong:
            first_is_chosen = not first_is_chosen
        chosen, rejected = (first, second) if first_is_chosen else (second, first)
        pairs.append((f"How is the {place} in {town}?", chosen, rejected))
    return pairs


def main(config):
    check_range(config, 1, 10**6, "train", "test")
    check_range(config, 0, 1, "label_noise")
    check_range(config, POSITIVE, 10**9, "tau")
    check_choice("label_model", config.label_model, LABEL_MODELS)
    check_range(config, 0, World.clauses - 1, "filler_clauses_first")
    check_range(config, 1, len(FILLER_TEXTS), "fillers")
    check_choice("reward_rule", config.reward_rule, ("sum", "veto"))
    world = World(
        reward_rule=config.reward_rule,
        filler_clauses_first=config.filler_clauses_first,
        fillers=config.fillers,
        label_model=config.label_model,
        label_noise=config.label_noise,
        tau=config.tau,
    )
    worlds, rows, train_texts = split_worlds(world), [], []
    for split, split_world in worlds.items():
        is_train = split == "train"
        count = config.train if is_train else config.test
        seed = f"{config.seed} {split}"
        pairs = sample_pairs(split_world, count, seed, has_true_labels=not is_train)
        for pair in pairs:
            rows.append((split, *pair))
            if split == "train":
                train_texts += pair
    tokenizer = make_tokenizer("bpe:1280", train_texts)
    encode = lru_cache(maxsize=None)(tokenizer.encode)

    def exact_arrays(split, prompt, responses):
        traces = [[0.0, 0.0, 0.0, 0]] * len(prompt)
        for response in responses:
            traces += worlds[split].trace(response, encode, tokenizer.end_of_text)
        return dict(zip(ARRAYS, zip(*traces)))

    write_dataset(
        dataset_folder(config.name),
        rows,
        worlds,
        tokenizer,
        block_size=160,
        kind="toy",
        token_arrays=(ARRAYS, exact_arrays),
        world=asdict(world),
    )


if __name__ == "__main__":
    run_script(ToyConfig, main)
