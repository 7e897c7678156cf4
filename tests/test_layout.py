"""The core imports nothing around it, and scripts set up threads before torch."""

import ast
import sys

from common import ROOT

CORE = [
    "regularizer.py",
    "model.py",
    "generator.py",
    "train.py",
    "evaluate.py",
    "bon.py",
    "common.py",
    "data/dataset.py",
    "data/batch.py",
    "data/tokenizer.py",
    "data/toy.py",
    "data/toy_words.py",
]
# tiktoken needs regex, and brings tiktoken_ext.
PACKAGES = {"torch", "numpy", "tiktoken", "tiktoken_ext", "regex", "tqdm"}


def module_level_imports(path):
    """Modules that a file imports when it is imported itself, with dots."""
    names = []
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        for node in ast.walk(statement):
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                continue
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names.append(node.module)
                names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def project_file(name):
    """The project's file that a dotted name refers to, or None."""
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    return str(path.relative_to(ROOT)) if path.exists() else None


def test_the_core_imports_only_the_core():
    for file in CORE:
        for name in module_level_imports(ROOT / file):
            imported = project_file(name)
            assert imported is None or imported in CORE, f"{file} imports {imported}"


def test_the_project_imports_only_its_packages():
    for path in ROOT.rglob("*.py"):
        if {"tests", ".venv", "out"} & set(path.relative_to(ROOT).parts):
            continue
        for name in module_level_imports(path):
            root = name.split(".")[0]
            is_own = (ROOT / root).is_dir() or (ROOT / f"{root}.py").exists()
            is_local = (path.parent / f"{root}.py").exists()
            standard = root in sys.stdlib_module_names
            assert is_own or is_local or standard or root in PACKAGES, (path, name)


def test_scripts_import_common_before_torch():
    """common.py sets how idle threads wait. OpenMP reads that with torch."""
    n_scripts = 0
    for path in ROOT.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "tests" in path.parts or "    run_script(" not in text:
            continue
        names = module_level_imports(path)
        torch_modules = {"torch", "data", "evaluate", "generator", "model", "train"}
        first = [i for i, n in enumerate(names) if n.split(".")[0] in torch_modules]
        if path.name != "common.py" and first:
            n_scripts += 1
            assert names.index("common") < first[0], path
    assert n_scripts >= 8
