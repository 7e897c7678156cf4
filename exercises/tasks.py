"""The tasks of the course, and the marks between which a student's copy is blank.

A task's text is the source itself: what stands between `# task N` and `# end`.
"""
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = "exercises/experiment.json"


class Task(NamedTuple):
    points: int
    title: str
    functions: tuple    # (file, name), which are blank in a student's copy


TASKS = {
    1: Task(10, "link mask and masked mean",
            (("regularizer", "masked_mean"), ("regularizer", "link_mask"))),
    2: Task(10, "the value of a prefix and its stop-gradient (Eq. 4)",
            (("regularizer", "value_logits"),)),
    3: Task(20, "the paper's loss, by links and as weights of the label",
            (("regularizer", "icrm"), ("regularizer", "label_weights"))),
    4: Task(10, "the gap bound", (("regularizer", "gap_bound"),)),
    5: Task(10, "p: uniform and shuffled", (("data.probs", "Probs.__getitem__"),)),
    6: Task(15, "best-of-n and DPO", (("bon", "best_of_n"), ("dpo", "dpo_loss"))),
    7: Task(15, "a regularizer of your own", (("regularizer", "quiet"),)),
    8: Task(10, "an experiment, honestly reported", ()),
}


def blank(text):
    """Source code without what stands between the marks of tasks."""
    lines, task = [], None
    for line in text.splitlines(keepends=True):
        mark = line.strip()
        if mark.startswith("# task "):
            task = int(mark.removeprefix("# task "))
            lines.append(line + line.partition("#")[0]
                         + f'raise NotImplementedError("task {task}: {TASKS[task].title}")\n')
        if task is None or mark == "# end":
            lines.append(line)
            task = None
    return "".join(lines)
