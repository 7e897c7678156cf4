"""A student's copy of the project, in which the bodies of the tasks are blank.

    python exercises/start.py FOLDER
"""
import shutil
import sys
from pathlib import Path

from tasks import EXPERIMENT, ROOT, TASKS, blank

COPIED = ("*.py", "*.md", "LICENSE", ".gitignore", "requirements.txt", "pyproject.toml",
          "data/*.py", "data/*.md", "data/lengths.json", "data/toy/*.py", "lab/*",
          "tests/**/*", "exercises/*.md", "exercises/*.py")
NOT_COPIED = (EXPERIMENT, "exercises/TEACHER.md", "tests/test_exercises.py")    # with the answers


def start(folder):
    """Write the copy; a folder that holds anything is refused."""
    if folder.is_file() or folder.exists() and list(folder.iterdir()):
        sys.exit(f"error: {folder} is not empty")
    for path in {path for pattern in COPIED for path in ROOT.glob(pattern) if path.is_file()}:
        target = folder / path.relative_to(ROOT)
        if "__pycache__" not in path.parts and path.relative_to(ROOT).as_posix() not in NOT_COPIED:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    for name in {name for task in TASKS.values() for name, _ in task.functions}:
        path = folder / f"{name.replace('.', '/')}.py"
        path.write_text(blank(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        start(Path(sys.argv[1]))
    except OSError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {sys.argv[1]}; read exercises/README.md there, and grade it with\n"
          f"    cd {sys.argv[1]}; python exercises/grade.py")
