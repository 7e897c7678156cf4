"""Grade a student's copy: points by task, and why one was lost.

    python exercises/grade.py                   this folder
    python exercises/grade.py FOLDER [FOLDER]   one copy or many

Each task is checked by a process of its own, with a time limit, against the functions of this
folder: a mistake costs the points of its own task and no others. Writes FOLDER/grade.json.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tasks import ROOT, TASKS

SECONDS = 30        # for a task


def check(folder, task):
    """-> '' or why the task's points are lost, in words."""
    with tempfile.TemporaryDirectory() as place:
        said = Path(place) / "said"
        try:
            subprocess.run([sys.executable, ROOT / "exercises" / "checks.py", str(task), said],
                           cwd=folder, timeout=SECONDS, capture_output=True,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
        except subprocess.TimeoutExpired:
            return f"it takes longer than {SECONDS} seconds"
        return said.read_text(encoding="utf-8") if said.exists() else "the process ended early"


def grade(folder):
    """Print and write the points of a copy; -> their sum"""
    lost = {task: check(folder, task) for task in TASKS}
    points = {task: 0 if lost[task] else TASKS[task].points for task in TASKS}
    for task, about in TASKS.items():
        print(f"{task}. {about.title:55}{points[task]:4d} of {about.points}"
              + f"\n   {lost[task]}" * bool(lost[task]))
    if folder == ROOT and (lost[1] or lost[2]):
        print("In a copy of one's own, tasks 3, 4 and 7 build on 1 and 2: mend those first.")
    total = sum(points.values())
    print(f"{folder}: {total} of {sum(task.points for task in TASKS.values())}\n")
    text = json.dumps({"total": total, "points": points, "lost": lost}, indent=1)
    (folder / "grade.json").write_text(text + "\n", encoding="utf-8")
    return total


if __name__ == "__main__":
    others = []
    for name in sys.argv[1:] or [str(ROOT)]:
        if (Path(name) / "regularizer.py").is_file():
            grade(Path(name).resolve())
        else:
            others.append(name)
    if others:
        sys.exit(f"error: no copy of the project: {', '.join(others)}")
