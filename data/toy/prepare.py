"""Write the toy world's splits and its vocabulary: seconds, no network, the same bytes on every machine.

    python data/toy/prepare.py
    python data/toy/prepare.py --name=toy-1 --seed=1    # another draw, for a dataset per seed
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from config import in_range, run_script, show
from data.prepare import dataset_folder, write_dataset
from data.toy.world import SPLITS, World, pairs


@dataclass(frozen=True)
class ToyConfig:
    name: str = "toy"       # the dataset's name: its folder under data/
    seed: int = 0           # seed of every split
    train: int = 500        # training pairs: few, so that generalisation is the question
    test: int = 1000        # pairs in each of val, decoupled, swapped and longer


def prepare(config):
    splits = {"train": list(pairs(World(), config.train, f"{config.seed} train"))}
    for name, world in SPLITS.items():
        splits[name] = list(pairs(world, config.test, f"{config.seed} {name}"))
    write_dataset(dataset_folder(config.name), splits, "bpe:1280", kind="toy")


def main(config):
    show(config)
    in_range(config, 1, 10**6, "train", "test")
    prepare(config)


if __name__ == "__main__":
    run_script(ToyConfig, main)
