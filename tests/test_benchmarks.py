"""Intervals and benchmarks' scores, against figures printed elsewhere and against slow twins."""
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

import benchmarks


def test_wilson_against_its_definition():
    """The ends are the proportions from which the observed one is 1.96 standard errors away."""
    for share, n in ((0.0, 5), (0.3, 10), (1.0, 50), (0.431, 1000)):
        for end in benchmarks.wilson(share, n):
            assert abs(share - end) == pytest.approx(1.96 * (end * (1 - end) / n) ** 0.5, abs=1e-12)


def test_intervals_count_prompts_not_rows():
    right = np.random.default_rng(0).random(200) < 0.7
    exact = pytest.approx(benchmarks.wilson(right.mean(), 200), abs=1e-12)
    for times in (1, 3):
        found = benchmarks.share_right(np.tile(right, times), np.tile(~right, times),
                                       list(range(200)) * times)
        assert (found["low"], found["high"]) == exact
        assert (found["n"], found["prompts"]) == (200 * times, 200)
        assert found["ties"] == (~right).sum() * times
    assert benchmarks.independent_cases([1] * 9, ["the same"] * 9) == 1
    prompts, share = np.random.default_rng(1).integers(0, 60, 200), right.mean()
    spread = sum((right[i] - share) * (right[j] - share) for i in range(200) for j in range(200)
                 if prompts[i] == prompts[j])
    expected = min(200, share * (1 - share) * 200 ** 2 / spread)
    assert benchmarks.independent_cases(right, prompts) == pytest.approx(expected)


def test_half_widths_are_students():
    for df, t in ((1, 12.706), (4, 2.776), (10, 2.228), (11, 2.201), (30, 2.042), (120, 1.980)):
        some = np.arange(df + 1.0)
        expected = t * some.std(ddof=1) / math.sqrt(df + 1)
        assert benchmarks.mean_and_half_width(some) == pytest.approx((df / 2, expected), rel=2e-3)


@pytest.mark.skipif("ICRM_REAL_DATA" not in os.environ, reason="it names a folder of real files")
def test_rewardbench_sections_are_the_published_ones():
    golden = json.loads(Path(os.environ["ICRM_REAL_DATA"], "rewardbench_golden.json").read_text())
    found = benchmarks.rewardbench_sections(golden["subsets"])
    for key in ("sections", "overall"):
        assert found[key] == pytest.approx(golden[key], abs=1e-12)


def test_what_is_missing_or_unknown_is_named_and_never_a_zero():
    """And RewardBench's 2,985 prompts are all there: math-prm has 447 but counts as 984."""
    some = {"mt-bench-easy": 1.0, "mt-bench-med": 0.5, "refusals-offensive": 0.25, "my-own": 0.0}
    found = benchmarks.rewardbench_sections(some)
    assert found["sections"] == pytest.approx({"Chat": (28 + 20) / 68, "Safety": 0.25})
    assert found["overall"] == pytest.approx(((28 + 20) / 68 + 0.25) / 2)
    weights = [w for section in benchmarks.SECTIONS.values() for w in section.values()]
    assert sum(weights) - 984 + 447 == 2985
    assert found["unknown"] == ["my-own"] and len(found["missing"]) == len(weights) - 3
    assert benchmarks.rewardbench_sections({"x": 1.0})["overall"] is None


def test_rm_bench_hard_cells_are_those_with_the_richer_rejected_style():
    wins = {(i, j): [10 * i + j] for i in range(3) for j in range(3)}      # a number tells the cell
    found = benchmarks.rm_bench(wins)
    assert found["matrix"][0][2] == 2 and found["hard"] == pytest.approx((1 + 2 + 12) / 3)
    assert found["normal"] == pytest.approx(11) and found["easy"] == pytest.approx(51 / 3)
    assert found["mean"] == pytest.approx(np.mean(list(wins.values())))
    with pytest.raises(ValueError, match="no pair of chosen style 0 and rejected style 1"):
        benchmarks.rm_bench({(0, 0): [True], (2, 1): [True]})


def test_calibration_error_equals_a_loop_over_bins():
    margins = np.append(np.random.default_rng(0).normal(scale=2, size=400), [0.0, 0.0, 90.0, -90.0])
    total = 0.0
    for b in range(10):
        part = []
        for m in margins:
            confidence = 1 / (1 + math.exp(-abs(m)))
            if b == min(int((confidence - 0.5) * 20), 9):
                part.append(confidence - (1.0 if m > 0 else 0.5 if m == 0 else 0.0))
        total += abs(sum(part)) / len(margins)
    assert benchmarks.reliability(margins)["ece"] == pytest.approx(total, abs=1e-9)


def test_the_first_error_is_the_first_step_below_the_threshold_and_the_best_one_is_found():
    rewards = [[1, -1, -1], [1, 1, -1], [1, 1], [-1, 1], [1, 1, 1]]
    found = benchmarks.first_error_scores(rewards, [1, 1, -1, -1, 0], 0.0)
    assert (found["wrong"], found["right"]) == (3, 2)
    assert found["error_accuracy"] == pytest.approx(1 / 3)
    assert found["correct_accuracy"] == 0.5
    assert found["f1"] == pytest.approx(2 * (1 / 3) * 0.5 / (1 / 3 + 0.5))
    assert benchmarks.first_error_scores([[1.0]], [-1], 0.0)["f1"] is None
    assert benchmarks.first_error_scores([[1.0], [1.0]], [0, -1], 0.0)["f1"] == 0.0
    rng = np.random.default_rng(2)
    errors = rng.integers(-1, 5, size=60)
    rewards = [rng.normal(np.where(np.arange(5) == e, -1, 2), 1.5) for e in errors]
    best = benchmarks.best_threshold(rewards, errors)
    found = [benchmarks.first_error_scores(rewards, errors, t) for t in (best, *range(-4, 5))]
    assert max(scores["f1"] for scores in found) == found[0]["f1"] > 0.3
    assert benchmarks.best_threshold([[0.5], [0.5]], [-1, 0]) == 0.5
