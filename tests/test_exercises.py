"""The grader grades: blanks have no points, the source has all, and each of many well-known wrong
answers loses the points of its own task and no others."""
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import fork

ROOT = Path(__file__).resolve().parents[1]
EXERCISES = ROOT / "exercises"
sys.path.append(str(EXERCISES))
tasks = importlib.import_module("tasks")

SOLVED = ("regularizer.py", "bon.py", "dpo.py", "data/probs.py")
LOGITS = "value_logits(rewards, mask)"
QUIET = "masked_mean(p * (rewards[:, 1:] - rewards[:, :-1]) ** 2, links)"
# Name: (task, what stands in one of its files, what a student writes).
WRONG = {
    "mean over padding": (1, "mask.sum(dim).clamp(min=1)", "torch.ones_like(x).sum(dim)"),
    "padding times zero": (1, "torch.where(mask, x, 0.0).sum(dim)", "(mask * x).sum(dim)"),
    "no clamp": (1, "mask.sum(dim).clamp(min=1)", "mask.sum(dim)"),
    "sum for mean": (1, " / mask.sum(dim).clamp(min=1)", ""),
    "mask on one end": (1, "return mask[:, :-1] & mask[:, 1:]", "return mask[:, :-1]"),
    "links of neighbours too many": (1, "return mask[:, :-1] & mask[:, 1:]",
                                     "return mask[:, :-1] | mask[:, 1:]"),
    "missing detach": (2, "dim=1).detach()[:, None]", "dim=1)[:, None]"),
    "wrong detach": (2, "rewards[:B] - means[B:]", "rewards[:B].detach() - means[B:]"),
    "sigma outside the mean": (2, "masked_mean(rewards, mask, dim=1)",
                               "masked_mean(torch.sigmoid(rewards), mask, dim=1)"),
    "own mean": (2, "rewards[:B] - means[B:]", "rewards[:B] - means[:B]"),
    "rejected not negated": (2, "means[:B] - rewards[B:]", "rewards[B:] - means[:B]"),
    "one mean for the batch": (2, "masked_mean(rewards, mask, dim=1).detach()",
                               "masked_mean(rewards, mask).expand(len(mask)).detach()"),
    "z for its logit": (2, "torch.cat([rewards[:B] - means[B:], means[:B] - "
                        "rewards[B:]])", "torch.cat([rewards[:B] - means[B:], means[:B] - "
                        "rewards[B:]]).sigmoid()"),
    "padding goes on": (2, "rewards = torch.where(mask, rewards, 0.0)\n    means", "means"),
    "log of sigma z": (3, f"F.logsigmoid({LOGITS}){' ' * 19}# (2B, T)\n    z =",
                       f"torch.sigmoid({LOGITS}).log()\n    z ="),
    "padding of p": (3, f"p, links = links_of(probs, mask){' ' * 36}# (2B, T-1)\n",
                     "p, links = probs, link_mask(mask)\n"),
    "z moves": (3, "z = log_z.detach().exp()", "z = log_z.exp()"),
    "p of the wrong token": (3, "penalty = masked_mean(2 * p * l, links)",
                             "penalty = masked_mean(2 * p.roll(1, 1) * l, links)"),
    "half of the loss": (3, " + z[:, :-1] * log_z[:, 1:])", ")"),
    "a token with itself": (3, "(z[:, 1:] * log_z[:, :-1]", "(z[:, :-1] * log_z[:, :-1]"),
    "not by p": (3, "masked_mean(2 * p * l, links)", "masked_mean(2 * l, links)"),
    "one neighbour's weight": (3, " + F.pad(p * z[:, 1:], (0, 1))", ""),
    "p where 1 - p stands": (4, ".abs() - (1 - p)) ** 2", ".abs() - p) ** 2"),
    "one-sided gap": (4, "(z[:, 1:] - z[:, :-1]).abs() - (1", "(z[:, 1:] - z[:, :-1]) - (1"),
    "not squared": (4, " - (1 - p)) ** 2, links)", " - (1 - p)), links)"),
    "one end stands still": (4, "(z[:, 1:] - z[:, :-1]).abs()",
                             "(z[:, 1:].detach() - z[:, :-1]).abs()"),
    "zeros for uniform": (5, "np.ones(len(p), np.float32)", "np.zeros(len(p), np.float32)"),
    "a shift is no shuffle": (5, "np.random.default_rng([i, side]).permutation("
                              "p[1:])", "np.roll(p[1:], 1)"),
    "one permutation for all": (5, "default_rng([i, side])", "default_rng(0)"),
    "another shuffle every time": (5, "default_rng([i, side])", "default_rng()"),
    "the first token moves": (5, "np.concatenate([p[:1], np.random.default_rng("
                              "[i, side]).permutation(p[1:])])",
                              "np.random.default_rng([i, side]).permutation(p)"),
    "with replacement": (6, "math.comb(int(c), n) / math.comb(len(place), n)",
                         "(int(c) / len(place)) ** n"),
    "ties go to the first": (6, "np.diff(among) / size", "np.diff(among)"),
    "the sum of losses": (6, "F.logsigmoid(beta * margin).mean()",
                          "F.logsigmoid(beta * margin).sum()"),
    "log of sigma": (6, "F.logsigmoid(beta * margin)", "torch.sigmoid(beta * margin).log()"),
    "padding is read": (7, QUIET, QUIET.replace("masked_mean", "torch.mean").replace(
        ", links", "")),
    "in place": (7, f"return {QUIET}", f"probs[:] = 0.5\n    return {QUIET}"),
    "a constant": (7, QUIET, "rewards.sum() * 0 + 1"),
    "batch-mates": (7, QUIET, QUIET.replace("rewards[:, :-1]", "rewards[mask].mean()")),
    "without p": (7, QUIET, QUIET.replace("p * ", "")),
}


def points_lost(folder):
    """The tasks that a copy fails, and why; in a process that has imported torch already."""
    def child():
        os.chdir(folder)
        sys.path.insert(0, str(EXERCISES))
        checks = importlib.import_module("checks")
        for task in tasks.TASKS:
            for name, module in list(sys.modules.items()):      # each task has the project's anew
                file = getattr(module, "__file__", None) or ""
                if file.startswith((str(ROOT), str(folder))) and "site-packages" not in file:
                    del sys.modules[name]
            sys.modules["tasks"] = tasks
            checks.main(task, folder / f"said-{task}")

    fork(child).join(60)
    said = {task: (folder / f"said-{task}").read_text() for task in tasks.TASKS}
    return {task: why for task, why in said.items() if why}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A student's copy with everything solved; experiment.json is the source's."""
    folder = tmp_path_factory.mktemp("copy") / "copy"
    subprocess.run([sys.executable, EXERCISES / "start.py", folder], check=True)
    for name in (*SOLVED, tasks.EXPERIMENT):
        (folder / name).write_text((ROOT / name).read_text())
    return folder


def test_the_source_has_all_points_and_blanks_have_none(copy, tmp_path):
    assert points_lost(copy) == {}
    subprocess.run([sys.executable, EXERCISES / "start.py", tmp_path / "blank"], check=True)
    lost = points_lost(tmp_path / "blank")
    assert lost.keys() == tasks.TASKS.keys()
    assert all(f"task {task}" in why for task, why in lost.items() if task < 8)
    again = subprocess.run([sys.executable, EXERCISES / "start.py", tmp_path / "blank"],
                           capture_output=True, text=True)
    assert again.returncode == 1 and "is not empty" in again.stderr
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for path in (ROOT / "lab").glob("*.*"):     # the project's own tests come along, and pass
        assert path.name not in tests or (copy / "lab" / path.name).exists(), path
    for wrong, said in ((copy / "README.md", "is not empty"), ("--help", "python exercises")):
        done = subprocess.run([sys.executable, EXERCISES / "start.py", wrong], capture_output=True,
                              text=True, cwd=tmp_path)
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "--help").exists()


def test_every_task_but_the_experiment_has_wrong_answers():
    assert {task for task, *_ in WRONG.values()} == set(tasks.TASKS) - {8} and len(WRONG) >= 20


@pytest.mark.parametrize("name", [      # every third one in the quick suite
    pytest.param(name, marks=[pytest.mark.slow] * bool(i % 3)) for i, name in enumerate(WRONG)])
def test_a_wrong_answer_loses_the_points_of_its_task_alone(copy, name):
    task, right, wrong = WRONG[name]
    path, = (copy / file for file in SOLVED if right in (copy / file).read_text())
    text = path.read_text()
    assert text.count(right) == 1, name
    path.write_text(text.replace(right, wrong))
    try:
        assert points_lost(copy).keys() == {task}
    finally:
        path.write_text(text)


@pytest.mark.parametrize("changes", [
    {"beats": True, "differences": [0.1, -0.2, 0.3, 0.0, 0.1]}, {"draws": [1, 1, 2, 3, 4]},
    {"mean": 0.5}, {"half_width": 0.01}])
def test_an_experiment_that_claims_more_than_it_found_has_no_points(copy, changes):
    path = copy / tasks.EXPERIMENT
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | changes))
    assert points_lost(copy).keys() == {8}
    path.write_text(text)


@pytest.mark.slow
def test_grading_prints_points_and_survives_a_loop_and_an_exit(copy, monkeypatch):
    path = copy / "regularizer.py"
    text = path.read_text()
    grade = importlib.import_module("grade")
    monkeypatch.setattr(grade, "SECONDS", 4)
    path.write_text(text + "\nwhile True:\n    pass\n")
    assert grade.check(copy, 1) == "it takes longer than 4 seconds"
    path.write_text(text + "\nimport os\nos._exit(0)\n")
    done = subprocess.run([sys.executable, EXERCISES / "grade.py", copy], capture_output=True,
                          text=True)
    path.write_text(text)
    found = json.loads((copy / "grade.json").read_text())
    assert "the process ended early" in done.stdout and done.returncode == 0
    assert found["total"] <= 40 and found["points"]["8"] == 10


@pytest.mark.parametrize("command, message", [
    ("grade.py nowhere", "error: no copy of the project: nowhere"),
    ("start.py file/copy", "error: .*Not a directory"), ("start.py .", "error: . is not empty"),
    ("experiment.py --regularizer=quite", "error: unknown regularizer 'quite'; choose one of: ")])
def test_a_mistake_in_a_command_of_the_course_is_one_line(command, message, tmp_path):
    (tmp_path / "file").write_text("")
    script, argument = command.split()
    done = subprocess.run([sys.executable, EXERCISES / script, argument], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode and len(done.stderr.splitlines()) == 1
    assert re.match(message, done.stderr)
