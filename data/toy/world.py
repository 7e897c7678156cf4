"""The toy world: short reviews in which the truth of every prefix is known exactly.

    How is the theatre in Lagos?  Monday people returned twice: banks change often; joy ruled
    there always, coins seemed new under a clock; lies lasted on anyway, wheels were round ...

A response is four opening words and then clauses. A clause is *evidence* (one of 60 phrases, 30
good and 30 bad, decided by the first word) with a *remark* behind it, or neutral *filler*. In the
training distribution a piece of evidence is followed by its own usual remark 98% of the time: a
predictable and spurious companion, which a reward model may read instead of the evidence. In the
shifted worlds the remark is drawn at random, or from the evidence of the opposite quality.
Gold, what a response is worth, is #good - #bad; under a `veto` #good, or -1 where one piece is
bad: no sum. All is read off the choices that follow a state (`World.choices`).
"""
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import NamedTuple

from data.toy.words import (BAD, FACTS, FILLER, GOOD, LOOKS, OPENING, PLACES, PREDICATES, REMARKS,
                            TOWNS)

EVIDENCE = [f"{noun} {predicate}" for noun, predicate in zip(GOOD + BAD, PREDICATES)]
QUALITY = [+1] * len(GOOD) + [-1] * len(BAD)
REMARK = [f"{noun} {look}" for noun, look in zip(REMARKS, LOOKS)]
NEUTRAL = [f"{noun} {FACTS[(i + shift) % len(FACTS)]}"
           for shift in range(len(FACTS)) for i, noun in enumerate(FILLER)]
WORTH = dict(zip(EVIDENCE, QUALITY))
KINDS = {"remark": 1, "evidence": 2}    # how the first token of such a text is marked


class State(NamedTuple):
    """Where a response stands: steps done (opening words, then clauses), gold so far, and the
    evidence (its number) whose remark is still to come, or None."""
    step: int = 0
    gold: int = 0
    pending: int | None = None


class Hypothesis(NamedTuple):
    """What may be going on inside a response: a text that is being written, and where it leads."""
    weight: float       # its probability given the tokens so far
    kind: str           # of the text: opening, evidence, remark, filler or end
    ahead: tuple        # the tokens of the text that are still to come
    after: State        # where the response stands behind the text


@dataclass(frozen=True)
class World:
    clauses: int = 6            # clauses of a response
    evidence: float = 0.6       # probability that a clause is evidence
    fidelity: float = 0.98      # probability of the usual remark (the rest: any of the 60)
    remarks: str = "usual"      # usual | random | opposite
    gold: str = "sum"           # sum | veto
    late: int = 0               # clauses at the start that are always filler
    fillers: int = len(FILLER)  # filler clauses, up to 144: beyond 24 a noun leaves its fact open

    def with_piece(self, so_far, quality):
        """Gold with one more piece of evidence."""
        if self.gold == "veto" and min(so_far, quality) < 0:
            return -1
        return so_far + quality

    def gold_of(self, text):
        """The gold of a response: of the evidence among its clauses; all else counts nothing."""
        clauses = re.split("[;.]", text.partition(":")[2])
        pieces = [clause.partition(",")[0].strip() for clause in clauses]
        return reduce(self.with_piece, [WORTH[piece] for piece in pieces if piece in WORTH], 0)

    @lru_cache(maxsize=None)
    def choices(self, state):
        """[(probability, kind, text, next state)] of what follows a state; [] at the end. No text
        begins another one, so that all that may be going on in a response ends at one token."""
        step, clause = state.step, state.step - len(OPENING)
        if clause < 0:
            words, mark = OPENING[step], ":" if clause == -1 else ""
            return [(1 / len(words), "opening", f" {word}{mark}", State(step + 1))
                    for word in words]
        if clause == self.clauses:
            return []
        mark, done = "." if clause == self.clauses - 1 else ";", State(step + 1, state.gold)
        if state.pending is not None:
            return [(p, "remark", f" {REMARK[i]}{mark}", done)
                    for i, p in enumerate(self.remark_probabilities(state.pending)) if p > 0]
        share = self.evidence * (clause >= self.late)
        found = [(share / len(EVIDENCE), "evidence", f" {phrase},",
                  State(step, self.with_piece(state.gold, QUALITY[i]), i))
                 for i, phrase in enumerate(EVIDENCE) if share]
        return found + [((1 - share) / self.fillers, "filler", f" {fact}{mark}", done)
                        for fact in NEUTRAL[:self.fillers]]

    def remark_probabilities(self, evidence):
        """Probability of each of the 60 remarks behind a piece of evidence."""
        n = len(REMARK)
        if self.remarks == "random":
            return [1 / n] * n
        if self.remarks == "opposite":
            return [2 / n if QUALITY[i] != QUALITY[evidence] else 0.0 for i in range(n)]
        return [(1 - self.fidelity) / n + self.fidelity * (i == evidence) for i in range(n)]

    def sample(self, rng):
        """One response, drawn by rng.random() alone, which is the same on every machine."""
        state, text = State(), ""
        while options := self.choices(state):
            u = rng.random()
            for p, _, piece, after in options:
                u -= p
                if u < 0:
                    break
            text, state = text + piece, after
        return text

    @lru_cache(maxsize=None)
    def outcomes(self, state):
        """{final gold: probability} from a state on. A pending remark cannot change it."""
        if state.pending is not None:
            return self.outcomes(State(state.step + 1, state.gold))
        merged = Counter()
        for p, _, _, after in self.choices(state):
            for total, q in self.outcomes(after).items():
                merged[total] += p * q
        return merged or {state.gold: 1.0}

    @lru_cache(maxsize=None)
    def value(self, state):
        """V = P(gold(y) > gold(y')) + 1/2 P(gold(y) = gold(y')), y from a state on, y' any."""
        mine, other = self.outcomes(state), self.outcomes(State())
        return sum(p * q * ((a > b) + 0.5 * (a == b))
                   for a, p in mine.items() for b, q in other.items())

    def trace(self, tokens, encode, end_of_text, strict=True):
        """What the world knows of a response's tokens, end-of-text last, by the forward algorithm:
        of each its exact probability given all before it, the exact value of the prefix that ends
        with it, and its kind (KINDS), told where a text ends: several may begin alike. A token that
        it could not have written is a ValueError, or (not strict) the value stays from there on."""
        known, rows = [Hypothesis(1.0, "", (), State())], []
        for token in tokens:
            if not known[0].ahead:      # a text has ended, alone: predict those that may follow
                first = len(rows)
                known = self.texts_after(known[0].after, encode, end_of_text)
            known = [one for one in known if one.ahead[0] == token]             # observe
            if not known and strict:
                raise ValueError(f"token {len(rows)} is none that this world could have written")
            if not known:
                value = rows[-1][1] if rows else self.value(State())
                return rows + [[0.0, value, 0]] * (len(tokens) - len(rows))
            p = sum(one.weight for one in known)
            value = sum(one.weight * self.value(one.after) for one in known) / p
            rows.append([p, value, 0])
            known = [one._replace(weight=one.weight / p, ahead=one.ahead[1:])   # renormalise
                     for one in known]
            if not known[0].ahead:
                rows[first][2] = KINDS.get(known[0].kind, 0)
        return rows

    @lru_cache(maxsize=None)
    def texts_after(self, state, encode, end_of_text):
        """A Hypothesis for each text that may follow a state, or for the end."""
        found = [Hypothesis(p, kind, tuple(encode(text)), after)
                 for p, kind, text, after in self.choices(state)]
        return found or [Hypothesis(1.0, "end", (end_of_text,), state)]


def split_worlds(world):
    """The worlds of a dataset's splits. `val` is the training distribution."""
    return {"train": world, "val": world, "decoupled": replace(world, remarks="random"),
            "swapped": replace(world, remarks="opposite"),
            "longer": replace(world, clauses=10, remarks="random")}


def pairs(world, count, seed, noise=0.0):
    """Yield `count` times a prompt and two responses: the one with the higher gold is chosen and
    comes first, but for a share `noise`."""
    rng = random.Random(seed)
    while count:
        place, town = (words[int(rng.random() * len(words))] for words in (PLACES, TOWNS))
        prompt, a, b = f"How is the {place} in {town}?", world.sample(rng), world.sample(rng)
        more, less = world.gold_of(a), world.gold_of(b)
        if more != less:
            wrong = noise > 0 and rng.random() < noise
            yield prompt, *((a, b) if (more > less) != wrong else (b, a))
            count -= 1
