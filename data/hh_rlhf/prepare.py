"""HH-RLHF (Bai et al. 2022, arXiv 2204.05862): human preferences between two replies in a dialogue.

    python data/hh_rlhf/prepare.py --input=harmless-base/train.jsonl.gz
    python data/hh_rlhf/prepare.py                  # downloads with the `datasets` package

A raw row is two whole dialogues. They are cut before the last reply; a row whose dialogues
part before it has two prompts and is left out.
"""
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from config import run_script, show
from data.pairs import TURN, BadRow, check_text, checked, read_rows
from data.prepare import from_hub, prepare_rows


@dataclass(frozen=True)
class HHConfig:
    name: str = "hh_rlhf"           # the dataset's name: its folder under data/
    input: str = ""                 # a raw file (.jsonl or .jsonl.gz); empty: download
    subset: str = "harmless-base"   # which folder of the collection to download
    tokenizer: str = "gpt2"         # gpt2, or bpe:SIZE for a vocabulary trained on the pairs
    val_share: float = 0.1          # share of prompts held out as val.jsonl
    strict: bool = False            # stop at the first bad row


def parse(row):
    """{'chosen': dialogue, 'rejected': dialogue} -> one Pair."""
    for key in ("chosen", "rejected"):
        check_text(key, row.get(key))
    (prompt, turn, chosen), (other, _, rejected) = row["chosen"].rpartition(TURN), row["rejected"].rpartition(TURN)
    if prompt != other or not turn:
        raise BadRow("the two dialogues part before the last reply")
    return [checked(prompt + turn, chosen, rejected)]


def main(config):
    show(config)
    with tempfile.TemporaryDirectory() as folder:
        path = config.input or from_hub("Anthropic/hh-rlhf", folder, data_dir=config.subset, split="train")
        pairs, _ = read_rows(path, parse, config.strict)
    prepare_rows(config.name, path, pairs, config)


if __name__ == "__main__":
    run_script(HHConfig, main)
