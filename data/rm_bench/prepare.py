"""RM-Bench (Liu et al. 2024, arXiv 2410.16184): prompts with three chosen and three rejected texts each, from the plainest style to the richest.

    python data/rm_bench/prepare.py
    python evaluate.py --checkpoint=CKPT --data=data/rm_bench/test.jsonl --as_dialogue=True

The last setting writes prompts as one Human turn, as in the training data. Nothing is trained on it.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from config import run_script
from data.prepare import BenchmarkConfig, write_benchmark


def main(config):
    write_benchmark(config, "rm_bench", "THU-KEG/RM-Bench", split="train")


if __name__ == "__main__":
    run_script(BenchmarkConfig, main)
