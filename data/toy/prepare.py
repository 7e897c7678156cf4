"""Write the toy world's splits, its vocabulary and its truth: seconds, the same on every machine.

    python data/toy/prepare.py --name=toy-1 --seed=1    # another draw than data/toy

Beside the tokens stand `exact-p` (given all before it), `exact-value` (V of the prefix that ends
there) and `kind` (1: a remark's first token, 2: evidence's, else 0); on prompts they are 0.
"""
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from config import choose, in_range, run_script
from data import tokenizer as tokenizers
from data.dataset import Split, dataset_folder, open_array, write_dataset
from data.toy.world import NEUTRAL, World, pairs, split_worlds

KNOWN = {"exact-p": np.float32, "exact-value": np.float32, "kind": np.uint8}


@dataclass(frozen=True)
class ToyConfig:
    name: str = "toy"       # the dataset's name: its folder under data/
    seed: int = 0           # seed of every split
    train: int = 500        # training pairs: few, so that generalisation is the question
    test: int = 1000        # pairs in each of val, decoupled, swapped and longer
    noise: float = 0.0      # share of training pairs with the wrong label
    gold: str = "sum"       # good less bad evidence; veto: good evidence, -1 where one piece is bad
    late: int = 0           # clauses at the start (of six) that are always filler
    fillers: int = 24       # different filler clauses


def write_truth(worlds, tokenizer, folder):
    """Write what the worlds know of every response token as arrays beside the tokens."""
    encode = lru_cache(maxsize=None)(tokenizer.encode)
    for name, world in worlds.items():
        known = []      # (exact-p, exact-value, kind) of each token
        arrays = (open_array(folder / f"{name}-{what}.npy") for what in ("tokens", "lengths"))
        for prompt, responses, _ in Split(*arrays):
            known += [(0, 0, 0)] * len(prompt)
            for response in responses:
                known += world.trace(response.tolist(), encode, tokenizer.end_of_text)
        for (what, dtype), values in zip(KNOWN.items(), zip(*known)):
            np.save(folder / f"{name}-{what}.npy", np.array(values, dtype))


def main(config):
    in_range(config, 1, 10**6, "train", "test")
    in_range(config, 0, 1, "noise")
    in_range(config, 0, World.clauses - 1, "late")
    in_range(config, 1, len(NEUTRAL), "fillers")
    choose("gold", config.gold, ("sum", "veto"))
    usual = World(gold=config.gold, late=config.late, fillers=config.fillers)
    worlds = split_worlds(usual)
    texts = {split: pairs(world, config.test, f"{config.seed} {split}")
             for split, world in worlds.items()}
    texts["train"] = list(pairs(usual, config.train, f"{config.seed} train", config.noise))
    tokenizer = tokenizers.make("bpe:1280", [text for three in texts["train"] for text in three])
    rows = ((split, *three) for split in texts for three in texts[split])
    write_dataset(dataset_folder(config.name), rows, worlds, tokenizer, block_size=160, kind="toy",
                  finish=partial(write_truth, worlds, tokenizer), world=asdict(usual))


if __name__ == "__main__":
    run_script(ToyConfig, main)
