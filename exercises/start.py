"""Make a student's copy of the project, in which the solutions are removed.

python exercises/start.py FOLDER
"""

import shutil
import sys
from pathlib import Path

from tasks import EXPERIMENT, ROOT, TASKS, remove_solutions

COPIED = (
    "*.py",
    "*.md",
    "LICENSE",
    ".gitignore",
    "requirements.txt",
    "pyproject.toml",
    "data/*.py",
    "data/*.md",
    "pretrained/*.py",
    "benchmarks/*.py",
    "lab/*",
    "tests/**/*",
    "exercises/*.md",
    "exercises/*.py",
)
# These contain answers.
NOT_COPIED = (EXPERIMENT, "exercises/TEACHER.md", "tests/test_exercises.py")


def start(folder):
    """Write the copy. A folder that is not empty is refused."""
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        sys.exit(f"error: {folder} is not empty")
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            relative = path.relative_to(ROOT)
            is_cache = "__pycache__" in path.parts
            if path.is_dir() or is_cache or relative.as_posix() in NOT_COPIED:
                continue
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    for task in TASKS.values():
        for module, _ in task.functions:
            path = folder / f"{module}.py"
            source = remove_solutions(path.read_text(encoding="utf-8"))
            path.write_text(source, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        start(Path(sys.argv[1]))
    except OSError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {sys.argv[1]}. Read exercises/README.md there. Grade it with")
    print(f"    cd {sys.argv[1]} && python exercises/grade.py")
