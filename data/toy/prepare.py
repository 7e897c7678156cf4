"""Write the toy world's splits and its vocabulary: seconds, no network, the same bytes on every machine.

    python data/toy/prepare.py
    python data/toy/prepare.py --name=toy-1 --seed=1    # another draw, for a dataset per seed
"""
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from config import choose, in_range, run_script, show
from data.prepare import dataset_folder, open_dataset, write_dataset
from data.toy.world import NEUTRAL, World, pairs, split_worlds


@dataclass(frozen=True)
class ToyConfig:
    name: str = "toy"       # the dataset's name: its folder under data/
    seed: int = 0           # seed of every split
    train: int = 500        # training pairs: few, so that generalisation is the question
    test: int = 1000        # pairs in each of val, decoupled, swapped and longer
    noise: float = 0.0      # share of training pairs with the wrong label
    fidelity: float = 0.98  # how often evidence has its usual remark, where remarks are usual
    remarks: str = "usual"  # in train and val: usual, random or opposite
    late: int = 0           # clauses at the start (of six) that are always filler
    fillers: int = 24       # different filler clauses
    vocabulary: str = ""    # a dataset whose vocabulary to take over; empty: train one


def prepare(config):
    world = World(fidelity=config.fidelity, remarks=config.remarks, late=config.late, fillers=config.fillers)
    splits = {"train": list(pairs(world, config.train, f"{config.seed} train", config.noise))}
    for name, shifted in split_worlds(world).items():
        splits[name] = list(pairs(shifted, config.test, f"{config.seed} {name}"))
    tokenizer = open_dataset(config.vocabulary).tokenizer if config.vocabulary else "bpe:1280"
    write_dataset(dataset_folder(config.name), splits, tokenizer, kind="toy", world=asdict(world))


def main(config):
    show(config)
    in_range(config, 1, 10**6, "train", "test")
    in_range(config, 0, 1, "noise", "fidelity")
    in_range(config, 0, World.clauses - 1, "late")
    in_range(config, 1, len(NEUTRAL), "fillers")
    choose("remarks", config.remarks, ("usual", "random", "opposite"))
    prepare(config)


if __name__ == "__main__":
    run_script(ToyConfig, main)
