"""Grade students' copies: points for each task, and why points were lost.

    python exercises/grade.py                   this folder
    python exercises/grade.py FOLDER [FOLDER]   one or more copies

Each task is checked in a process of its own, with a time limit. Functions of other
tasks are those of the folder that this file is in. So in a teacher's folder, a mistake
only costs the points of its own task.
Writes FOLDER/grade.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tasks import ROOT, TASKS

SECONDS = 30  # for a task


def check(folder, task):
    """Why the points of a task are lost, or ''."""
    with tempfile.TemporaryDirectory() as temporary:
        verdict = Path(temporary) / "verdict"
        script = ROOT / "exercises" / "checks.py"
        try:
            subprocess.run(
                [sys.executable, script, str(task), verdict],
                cwd=folder,
                timeout=SECONDS,
                capture_output=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        except subprocess.TimeoutExpired:
            return f"it takes longer than {SECONDS} seconds"
        if not verdict.exists():
            return "the process ended early"
        return verdict.read_text(encoding="utf-8")


def grade(folder):
    """Print and write the points of a copy."""
    points, reasons, possible = {}, {}, 0
    for number, task in TASKS.items():
        reasons[number] = check(folder, number)
        points[number] = 0 if reasons[number] else task.points
        possible += task.points
        print(f"{number}. {task.title:55}{points[number]:4d} of {task.points}")
        if reasons[number]:
            print(f"   {reasons[number]}")
    if folder == ROOT and (reasons[1] or reasons[2]):
        print("In your own copy, later tasks use tasks 1 and 2. Solve those first.")
    total = sum(points.values())
    print(f"{folder}: {total} of {possible}\n")
    results = {"total": total, "points": points, "lost": reasons}
    text = json.dumps(results, indent=1) + "\n"
    (folder / "grade.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    not_copies = []
    for name in sys.argv[1:] or [str(ROOT)]:
        if not (Path(name) / "regularizer.py").is_file():
            not_copies.append(name)
            continue
        try:
            grade(Path(name).resolve())
        except KeyboardInterrupt:  # the check that was running has ended, too
            sys.exit("stopped by SIGINT")
    if not_copies:
        sys.exit(f"error: not a copy of the project: {', '.join(not_copies)}")
