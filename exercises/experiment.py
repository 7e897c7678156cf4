"""Task 8: does your regularizer beat `dense_bt` at search with half of the tokens?

    python exercises/experiment.py --regularizer=quiet

Trains both on draws of the toy world (minutes each on two CPU cores), lets both halve the same
candidates, and writes exercises/experiment.json: the gold of the picks, `quiet` less `dense_bt`,
draw by draw, the mean with half its 95% interval, and whether it lies above 0.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import mean_and_half_width
from config import choose, in_range, run_script
from exercises.tasks import EXPERIMENT
from lab.study import Arm, run_draw
from regularizer import REGULARIZERS


@dataclass(frozen=True)
class ExperimentConfig:
    regularizer: str = "quiet"  # yours
    against: str = "dense_bt"   # the one to beat
    first_draw: int = 400       # of the world; the study's are 300 to 324
    draws: int = 5              # how many


def main(config):
    in_range(config, 5, 100, "draws")
    for name in (config.regularizer, config.against):
        choose("regularizer", name, REGULARIZERS)
    arms, differences = [Arm(config.against), Arm(config.regularizer)], []
    draws = list(range(config.first_draw, config.first_draw + config.draws))
    for draw in draws:
        runs = {run["arm"]: run["50%"] for run in run_draw(("sum", draw, arms))}
        differences.append(runs[arms[1].name] - runs[arms[0].name])
        print(f"draw {draw}: {differences[-1]:+.3f}")
    mean, half = mean_and_half_width(differences)
    result = {"regularizer": config.regularizer, "against": config.against, "draws": draws,
              "differences": differences, "mean": mean, "half_width": half,
              "beats": mean - half > 0}
    print(f"{mean:+.3f} ± {half:.3f}: it {'beats' if result['beats'] else 'does not beat'} "
          f"{config.against}")
    (ROOT / EXPERIMENT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(ExperimentConfig, main)
