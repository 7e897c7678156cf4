"""Unified-Feedback (llm-blender): eight collections of preferences with ratings, the paper's training data.

    python data/unified_feedback/prepare.py                             # 40K: every 20th pair
    python data/unified_feedback/prepare.py --name=unified_400k --every=2

Pairs of equal rating are dropped first, then every 20th (40K) or every 2nd (400K) of the rest is kept, as in the
reference. A row holds two conversations, `conv_A` and `conv_B`, and their ratings.
"""
import itertools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from config import in_range, run_script, show
from data.pairs import BadRow, name_of, parse_pairs, read_rows
from data.prepare import from_hub, prepare_rows


@dataclass(frozen=True)
class UnifiedConfig:
    name: str = "unified_feedback"  # the dataset's name: its folder under data/
    input: str = ""                 # a local copy as JSONL (.gz is read too); empty: download
    every: int = 20                 # which of the pairs with unequal ratings are kept: 20 for 40K, 2 for 400K
    tokenizer: str = "gpt2"         # gpt2, or bpe:SIZE for a vocabulary trained on the pairs
    val_share: float = 0.02         # share of prompts held out as val.jsonl
    strict: bool = False            # stop at the first bad row


def parse_every(every):
    """A function that makes of a row no Pair or one: of those with unequal ratings the first, and every so many after it."""
    count = itertools.count()

    def parse(row):
        ratings = row.get("conv_A_rating"), row.get("conv_B_rating")
        if not all(isinstance(rating, (int, float)) for rating in ratings):
            raise BadRow("conv_A_rating or conv_B_rating is missing")
        if ratings[0] == ratings[1] or next(count) % every:
            return []
        better, worse = ("conv_A", "conv_B") if ratings[0] > ratings[1] else ("conv_B", "conv_A")
        return parse_pairs({"chosen": row.get(better), "rejected": row.get(worse), "id": row.get("id"),
                            "subset": name_of(row, "source")}, as_dialogue=False)
    return parse


def main(config):
    show(config)
    in_range(config, 1, 10**6, "every")
    with tempfile.TemporaryDirectory() as folder:
        path = config.input or from_hub("llm-blender/Unified-Feedback", folder, name="all", split="train")
        pairs, _ = read_rows(path, parse_every(config.every), config.strict)
    prepare_rows(config.name, path, pairs, config)


if __name__ == "__main__":
    run_script(UnifiedConfig, main)
