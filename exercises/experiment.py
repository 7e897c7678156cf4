"""Task 8: is your regularizer better than `dense_bt` at halving, with half the tokens?

    python exercises/experiment.py --regularizer=reward_smoothness

Trains both on several seeds of the toy world (minutes each on two CPU cores). Both
select from the same candidates. Writes exercises/experiment.json: for every seed the
true quality of the selected response, yours minus that of `dense_bt`. Also the mean
difference with its 95% interval, and whether the interval is above 0.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import check_choice, check_range, run_script
from exercises.tasks import EXPERIMENT
from lab.intervals import mean_and_half_width
from lab.study import Arm, run_seed
from regularizer import REGULARIZERS


@dataclass(frozen=True)
class ExperimentConfig:
    regularizer: str = "reward_smoothness"  # yours
    against: str = "dense_bt"  # the one to compare with
    first_seed: int = 400  # of the toy world. The study uses 300 to 324
    seeds: int = 5  # how many


def main(config):
    check_range(config, 5, 100, "seeds")
    for name in (config.regularizer, config.against):
        check_choice("regularizer", name, REGULARIZERS)
    arms = [Arm(config.regularizer), Arm(config.against)]
    seeds = list(range(config.first_seed, config.first_seed + config.seeds))
    differences = []
    for seed in seeds:
        quality = {}
        for run in run_seed("sum", seed, arms):
            quality[run["regularizer"]] = run["halving_50"]
        differences.append(quality[config.regularizer] - quality[config.against])
        print(f"seed {seed}: {differences[-1]:+.3f}")
    mean, half_width = mean_and_half_width(differences)
    result = {
        "regularizer": config.regularizer,
        "against": config.against,
        "seeds": seeds,
        "differences": differences,
        "mean": mean,
        "half_width": half_width,
        "is_better": mean - half_width > 0,
    }
    verdict = "better" if result["is_better"] else "not better"
    print(f"{mean:+.3f} +- {half_width:.3f}: {verdict} than {config.against}")
    text = json.dumps(result, indent=1) + "\n"
    (ROOT / EXPERIMENT).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_script(ExperimentConfig, main)
