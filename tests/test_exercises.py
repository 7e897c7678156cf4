"""The grader: blanks have no points, the source has all of them, and each of many wrong
answers loses the points of its own task and of no other."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest

from common import ROOT
from conftest import fork

EXERCISES = ROOT / "exercises"
sys.path.append(str(EXERCISES))
tasks = importlib.import_module("tasks")

SOLVED = ("regularizer.py", "bon.py", "dpo.py", "generator.py")
SMOOTHNESS = "masked_mean(p * changes**2, transitions), None\n    # end\n\n\ndef td"
SHUFFLE = "np.concatenate([p[:1], rng.permutation(p[1:])])"
PERMUTE_ALL = "rng.permutation(p)"
# Name: (task, text of one of its files, what a student writes instead)
WRONG_ANSWERS = {
    "mean over padding": (
        1,
        "mask.sum(dim).clamp",
        "torch.ones_like(x).sum(dim).clamp",
    ),
    "padding times zero": (
        1,
        "total = torch.where(mask, x, 0.0).sum(dim)",
        "total = (mask * x).sum(dim)",
    ),
    "no clamp": (1, "mask.sum(dim).clamp(min=1)", "mask.sum(dim)"),
    "sum instead of mean": (1, "total / mask.sum(dim).clamp(min=1)", "total"),
    "mask of one token": (
        1,
        "return mask[:, :-1] & mask[:, 1:]",
        "return mask[:, :-1]",
    ),
    "mask of either token": (
        1,
        "return mask[:, :-1] & mask[:, 1:]",
        "return mask[:, :-1] | mask[:, 1:]",
    ),
    "no stop-gradient": (2, "dim=1).detach()[:, None]", "dim=1)[:, None]"),
    "stop-gradient on r": (
        2,
        "= chosen_rewards - rejected_means",
        "= chosen_rewards.detach() - rejected_means",
    ),
    "sigma inside the mean": (
        2,
        "masked_mean(rewards, mask, dim=1)",
        "masked_mean(torch.sigmoid(rewards), mask, dim=1)",
    ),
    "own mean": (2, "chosen_rewards - rejected_means", "chosen_rewards - chosen_means"),
    "rejected not negated": (
        2,
        "chosen_means - rejected_rewards",
        "rejected_rewards - chosen_means",
    ),
    "one mean of the batch": (
        2,
        "masked_mean(rewards, mask, dim=1).detach()",
        "masked_mean(rewards, mask).expand(len(mask)).detach()",
    ),
    "z instead of its logit": (
        2,
        "return torch.cat([chosen_logits, rejected_logits])",
        "return torch.cat([chosen_logits, rejected_logits]).sigmoid()",
    ),
    "padding is used": (
        2,
        "rewards = torch.where(mask, rewards, 0.0)\n    means",
        "means",
    ),
    "log of sigma": (
        3,
        "log_z = F.logsigmoid(value_logits(rewards, mask))  # (2B, T)\n    z =",
        "log_z = torch.sigmoid(value_logits(rewards, mask)).log()\n    z =",
    ),
    "padding of p": (
        3,
        "p, transitions = masked_transitions(probs, mask)  # (2B, T-1)\n",
        "p, transitions = probs, transition_mask(mask)\n",
    ),
    "z has gradient": (3, "z = log_z.detach().exp()", "z = log_z.exp()"),
    "p of the wrong token": (
        3,
        "masked_mean(2 * p * l, transitions)",
        "masked_mean(2 * p.roll(1, 1) * l, transitions)",
    ),
    "half of the loss": (
        3,
        "(z_after * before + z_before * after)",
        "z_after * before",
    ),
    "a token with itself": (3, "(z_after * before +", "(z_before * before +"),
    "without p": (
        3,
        "masked_mean(2 * p * l, transitions)",
        "masked_mean(2 * l, transitions)",
    ),
    "one neighbour": (3, "return from_previous + from_next", "return from_previous"),
    "p instead of 1 - p": (4, "F.relu(gap - (1 - p))", "F.relu(gap - p)"),
    "one-sided gap": (
        4,
        "gap = (z[:, 1:] - z[:, :-1]).abs()",
        "gap = z[:, 1:] - z[:, :-1]",
    ),
    "not squared": (
        4,
        "masked_mean(excess**2, transitions)",
        "masked_mean(excess, transitions)",
    ),
    "one value detached": (
        4,
        "gap = (z[:, 1:] - z[:, :-1])",
        "gap = (z[:, 1:].detach() - z[:, :-1])",
    ),
    "zeros for uniform": (
        5,
        "np.ones(len(p), np.float32)",
        "np.zeros(len(p), np.float32)",
    ),
    "a shift": (5, "rng.permutation(p[1:])", "np.roll(p[1:], 1)"),
    "one permutation for all": (5, "default_rng([i, side])", "default_rng(0)"),
    "a new shuffle every time": (5, "default_rng([i, side])", "default_rng()"),
    "the first token moves": (5, SHUFFLE, PERMUTE_ALL),
    "with replacement": (
        6,
        "ways = math.comb(n_not_above, n) - math.comb(n_below, n)",
        "ways = math.comb(M, n) * ((n_not_above / M) ** n - (n_below / M) ** n)",
    ),
    "ties go to the first": (
        6,
        "gold_scores[tied].mean()",
        "gold_scores[tied][0]",
    ),
    "sum of the losses": (
        6,
        "F.logsigmoid(beta * margins).mean()",
        "F.logsigmoid(beta * margins).sum()",
    ),
    "log of sigma in DPO": (
        6,
        "F.logsigmoid(beta * margins)",
        "torch.sigmoid(beta * margins).log()",
    ),
    "padding is averaged": (
        7,
        SMOOTHNESS,
        SMOOTHNESS.replace(
            "masked_mean(p * changes**2, transitions)", "changes.mean()"
        ),
    ),
    "an input changes": (
        7,
        "changes = rewards[:, 1:] - rewards[:, :-1]",
        "changes = rewards[:, 1:] - rewards[:, :-1]\n    probs[:] = 0.5",
    ),
    "a constant": (
        7,
        SMOOTHNESS,
        SMOOTHNESS.replace("masked_mean(", "0 * masked_mean("),
    ),
    "the other pairs count": (
        7,
        "changes = rewards[:, 1:] - rewards[:, :-1]",
        "changes = rewards[:, 1:] - rewards[mask].mean()",
    ),
    "p is ignored": (7, SMOOTHNESS, SMOOTHNESS.replace("p * ", "")),
}


def find_lost_points(folder):
    """{task: reason} of the tasks that a copy fails."""

    def child():
        os.chdir(folder)
        sys.path.insert(0, str(EXERCISES))
        checks = importlib.import_module("checks")
        for task in tasks.TASKS:
            # Each task imports the project's modules again.
            for name, module in list(sys.modules.items()):
                file = getattr(module, "__file__", None) or ""
                if file.startswith((str(ROOT), str(folder))):
                    if "site-packages" not in file:
                        del sys.modules[name]
            sys.modules["tasks"] = tasks
            checks.main(task, folder / f"verdict-{task}")

    fork(child).join(60)
    lost = {}
    for task in tasks.TASKS:
        reason = (folder / f"verdict-{task}").read_text()
        if reason:
            lost[task] = reason
    return lost


def run_exercise(script, *arguments, **options):
    return subprocess.run(
        [sys.executable, EXERCISES / script, *arguments],
        capture_output=True,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A student's copy with everything solved, and the project's experiment.json."""
    folder = tmp_path_factory.mktemp("copy") / "copy"
    assert run_exercise("start.py", folder).returncode == 0
    for name in (*SOLVED, tasks.EXPERIMENT):
        (folder / name).write_text((ROOT / name).read_text())
    return folder


def test_the_source_has_all_points_and_blanks_have_none(copy, tmp_path):
    assert find_lost_points(copy) == {}
    assert run_exercise("start.py", tmp_path / "blank").returncode == 0
    lost = find_lost_points(tmp_path / "blank")
    assert lost.keys() == tasks.TASKS.keys()
    for task, reason in lost.items():
        assert task == 8 or f"task {task}" in reason


def test_a_copy_is_complete_and_nothing_is_overwritten(copy, tmp_path):
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for path in (ROOT / "lab").glob("*.*"):  # files that the tests read
        assert path.name not in tests or (copy / "lab" / path.name).exists(), path
    for argument, message in (
        (copy, "is not empty"),
        (copy / "README.md", "is not empty"),
        ("--help", "python exercises"),
    ):
        done = run_exercise("start.py", argument, cwd=tmp_path)
        assert done.returncode == 1 and message in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "--help").exists()


def test_every_task_but_the_experiment_has_wrong_answers():
    covered = {task for task, *_ in WRONG_ANSWERS.values()}
    assert covered == set(tasks.TASKS) - {8} and len(WRONG_ANSWERS) >= 20


def some_slow(names):
    """Two of three cases run with the slow tests only."""
    cases = []
    for i, name in enumerate(names):
        marks = [pytest.mark.slow] if i % 3 else []
        cases.append(pytest.param(name, marks=marks))
    return cases


@pytest.mark.parametrize("name", some_slow(WRONG_ANSWERS))
def test_a_wrong_answer_loses_the_points_of_its_task_only(copy, name):
    task, right, wrong = WRONG_ANSWERS[name]
    files = [copy / file for file in SOLVED if right in (copy / file).read_text()]
    (path,) = files
    source = path.read_text()
    if source.count(right) > 1:  # the same line in another function
        start = source.index(f"# task {task}")
        start = source.index(right, start)
        edited = source[:start] + wrong + source[start + len(right) :]
    else:
        edited = source.replace(right, wrong)
    path.write_text(edited)
    try:
        assert find_lost_points(copy).keys() == {task}
    finally:
        path.write_text(source)


@pytest.mark.parametrize(
    "changes",
    [
        {"is_better": True, "differences": [0.1, -0.2, 0.3, 0.0, 0.1]},
        {"seeds": [1, 1, 2, 3, 4]},
        {"mean": 0.5},
        {"half_width": 0.01},
    ],
)
def test_an_experiment_that_claims_too_much_has_no_points(copy, changes):
    path = copy / tasks.EXPERIMENT
    text = path.read_text()
    path.write_text(json.dumps({**json.loads(text), **changes}))
    assert find_lost_points(copy).keys() == {8}
    path.write_text(text)


@pytest.mark.slow
def test_grading_survives_an_endless_loop_and_an_exit(copy, monkeypatch):
    path = copy / "regularizer.py"
    source = path.read_text()
    grade = importlib.import_module("grade")
    monkeypatch.setattr(grade, "SECONDS", 4)
    path.write_text(source + "\nwhile True:\n    pass\n")
    assert grade.check(copy, 1) == "it takes longer than 4 seconds"
    path.write_text(source + "\nimport os\nos._exit(0)\n")
    done = run_exercise("grade.py", copy)
    path.write_text(source)
    results = json.loads((copy / "grade.json").read_text())
    assert "the process ended early" in done.stdout and done.returncode == 0
    assert results["total"] <= 40 and results["points"]["8"] == 10


@pytest.mark.parametrize(
    "command, message",
    [
        ("grade.py nowhere", "error: not a copy of the project: nowhere"),
        ("start.py file/copy", "error: .*Not a directory"),
        ("start.py .", "error: . is not empty"),
        ("experiment.py --regularizer=quite", "error: unknown regularizer 'quite'"),
    ],
)
def test_a_mistake_in_a_command_is_one_line(command, message, tmp_path):
    (tmp_path / "file").write_text("")
    script, argument = command.split()
    done = run_exercise(script, argument, cwd=tmp_path)
    assert done.returncode and len(done.stderr.splitlines()) == 1
    assert re.match(message, done.stderr)
