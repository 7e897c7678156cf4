"""RM-Bench (Liu et al. 2024, arXiv 2410.16184): prompts with three chosen and three rejected texts each, from the plainest style to the richest.

    python data/rm_bench/prepare.py
    python evaluate.py --checkpoint=CKPT --data=data/rm_bench/test.jsonl --as_dialogue=True

The last setting writes prompts as one Human turn, as in the training data. Nothing is trained on it.
"""
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from config import run_script, show
from data.prepare import from_hub, write_benchmark


@dataclass(frozen=True)
class BenchmarkConfig:
    name: str = "rm_bench"      # the folder under data/ for test.jsonl
    input: str = ""                 # a local copy as JSONL (.gz is read too); empty: download
    strict: bool = False            # stop at the first bad row


def main(config):
    show(config)
    with tempfile.TemporaryDirectory() as folder:
        path = config.input or from_hub("THU-KEG/RM-Bench", folder, split="train")
        write_benchmark(config.name, path, config.strict)


if __name__ == "__main__":
    run_script(BenchmarkConfig, main)
