"""RewardBench (Lambert et al. 2024, arXiv 2403.13787): 2,985 pairs in 23 subsets of four sections.

    python data/rewardbench/prepare.py
    python evaluate.py --checkpoint=CKPT --data=data/rewardbench/test.jsonl --as_dialogue=True

The last setting writes prompts as one Human turn, as in the training data. Nothing is trained on it.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from config import run_script
from data.prepare import BenchmarkConfig, write_benchmark


def main(config):
    write_benchmark(config, "rewardbench", "allenai/reward-bench", split="filtered")


if __name__ == "__main__":
    run_script(BenchmarkConfig, main)
