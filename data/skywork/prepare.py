"""Skywork-Reward-Preference-80K-v0.2 (Liu et al. 2024, arXiv 2410.18451): a small, curated set of preferences.

    python data/skywork/prepare.py
    python data/skywork/prepare.py --input=rows.jsonl

A row holds two whole conversations, `chosen` and `rejected`; what they share is the prompt.
"""
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from config import run_script, show
from data.pairs import name_of, parse_pairs, read_rows
from data.prepare import from_hub, prepare_rows


@dataclass(frozen=True)
class SkyworkConfig:
    name: str = "skywork"           # the dataset's name: its folder under data/
    input: str = ""                 # a local copy as JSONL (.gz is read too); empty: download
    tokenizer: str = "gpt2"         # gpt2, or bpe:SIZE for a vocabulary trained on the pairs
    val_share: float = 0.02         # share of prompts held out as val.jsonl
    strict: bool = False            # stop at the first bad row


def parse(row):
    return parse_pairs(dict(row, subset=name_of(row, "source")), as_dialogue=False)


def main(config):
    show(config)
    with tempfile.TemporaryDirectory() as folder:
        path = config.input or from_hub("Skywork/Skywork-Reward-Preference-80K-v0.2", folder, split="train")
        pairs, _ = read_rows(path, parse, config.strict)
    prepare_rows(config.name, path, pairs, config)


if __name__ == "__main__":
    run_script(SkyworkConfig, main)
