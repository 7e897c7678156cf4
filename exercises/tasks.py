"""The tasks of the course, and how a student's copy is made blank.

A task's solution is the source itself: what stands between `# task N` and `# end`.
"""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = "exercises/experiment.json"


class Task(NamedTuple):
    points: int
    title: str
    functions: tuple  # (module, name) of what is blank in a student's copy


TASKS = {
    1: Task(
        10,
        "transition mask and masked mean",
        (("regularizer", "masked_mean"), ("regularizer", "transition_mask")),
    ),
    2: Task(
        10,
        "the value of a prefix and its stop-gradient (Eq. 4)",
        (("regularizer", "value_logits"),),
    ),
    3: Task(
        20,
        "the paper's loss, and its weights per token",
        (("regularizer", "icrm"), ("regularizer", "label_weights")),
    ),
    4: Task(10, "the gap bound", (("regularizer", "gap_bound"),)),
    5: Task(10, "p: uniform and shuffled", (("generator", "Probs.__getitem__"),)),
    6: Task(15, "best-of-n and DPO", (("bon", "best_of_n"), ("dpo", "dpo_loss"))),
    7: Task(15, "a regularizer of your own", (("regularizer", "reward_smoothness"),)),
    8: Task(10, "an experiment, honestly reported", ()),
}


def remove_solutions(source):
    """Source code in which every task's lines raise NotImplementedError instead."""
    lines, inside_task = [], False
    for line in source.splitlines(keepends=True):
        mark = line.strip()
        if mark == "# end":
            inside_task = False
        if not inside_task:
            lines.append(line)
        if mark.startswith("# task "):
            inside_task = True
            number = int(mark.removeprefix("# task "))
            indent = line.partition("#")[0]
            message = f"task {number}: {TASKS[number].title}"
            lines.append(f'{indent}raise NotImplementedError("{message}")\n')
    return "".join(lines)
