"""p as training reads it: the generator's, or a control in its place, for every regularizer.

    generator   out/NAME-generator/p.npy
    uniform     1 on every token: do the generator's probabilities matter?
    shuffled    the generator's, permuted inside each response (its links, so not the first token)
    exact       the toy world's own
"""
from pathlib import Path

import numpy as np

from config import UserError, choose
from data.dataset import open_array
from data.files import read_json

PROBS = ("generator", "uniform", "shuffled", "exact")


def described(generator, trained_on=""):
    """What p.json says of a generator's p; trained_on: what a checkpoint says that it must be."""
    about = read_json(Path(generator) / "p.json", "generator.py")
    if trained_on and about["digest"] not in trained_on:
        raise UserError(f"{generator} was made anew since it gave a reward model p; train again")
    return about


class Probs:
    """probs[i] -> p of the tokens of item i's first and second response, two arrays of float32."""

    def __init__(self, kind, dataset, generator):
        choose("probs", kind, PROBS)
        self.kind, self.split = kind, dataset.split("train")
        about = described(generator)
        if about.get("data") != dataset.fingerprint:
            raise UserError(f"{generator}/p.npy was written for other data than data/"
                            f"{dataset.folder.name}; run generator.py again")
        self.fingerprint = f"{kind} {about['digest']}"
        if kind == "exact":
            if dataset.kind != "toy":
                raise UserError("--probs=exact is known on toy worlds alone")
            self.array = dataset.array("train", "exact-p")
        else:
            self.array = open_array(Path(generator) / "p.npy", about["digest"])

    def __getitem__(self, i):
        parts = self.split.of_responses(self.array, i)
        # task 5
        if self.kind == "uniform":
            return [np.ones(len(p), np.float32) for p in parts]
        if self.kind == "shuffled":
            return [np.concatenate([p[:1], np.random.default_rng([i, side]).permutation(p[1:])])
                    for side, p in enumerate(parts)]
        return parts
        # end
