"""Every setting of every script with odd values: no traceback."""

import dataclasses
import importlib
import os
import re
import resource
import shutil
import sys
from pathlib import Path

import pytest

import common
from common import ROOT
from conftest import fork
from test_common import SCRIPTS

VALUES = (
    "",
    "-1",
    "0",
    "nan",
    "inf",
    str(10**18),
    str(10**9),
    "../y",
    "\udcff\n",
    "out",
)
SECONDS = 3  # of a run. Then it is stopped: the value is accepted
SMALL = {
    "train": ["--steps=2", "--batch_size=4", "--out_dir=out/odd"],
    "generator": ["--steps=2", "--n_embd=32", "--batch_size=4", "--out_dir=out/odd"],
    "evaluate": ["--checkpoint=out/run"],
    "bon": ["--checkpoint=out/run", "--prompts=2", "--samples=2"],
    "dpo": ["--checkpoint=out/run", "--prompts=4", "--steps=2", "--out_dir=out/odd"],
    "report": ["--checkpoint=out/run", "--count=1", "--out=report.html"],
    "toy": ["--train=5", "--test=2", "--name=odd"],
    "prepare": ["--input=odd.jsonl", "--name=odd", "--tokenizer=bpe:300"],
    "export": ["--checkpoint=out/run", "--out=exported"],
}


def run_stopped(module, config_class, arguments):
    """Run a script's command line for some seconds. Returns its standard error."""

    def child():
        os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = os.fdopen(2, "w", errors="backslashreplace")
        sys.stdout = open(os.devnull, "w")
        resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
        os.setpgid(0, 0)
        sys.argv = ["script", *arguments]
        common.run_script(config_class, module.main)

    process = fork(child)
    process.join(SECONDS)
    if process.is_alive():
        os.kill(process.pid, 15)
        process.join(5)
        process.kill()
        process.join()
    return Path("stderr").read_text(errors="replace")


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_odd_values_of_settings_are_no_traceback(inside, tmp_path, monkeypatch, path):
    shutil.copytree(inside, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    rows = []
    for i in range(40):
        rows.append(f'{{"prompt": "Q{i}", "chosen": "yes", "rejected": "no"}}\n')
    Path("odd.jsonl").write_text("".join(rows))
    module_name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(module_name)
    name = re.search(r"^    run_script\((\w+),", path.read_text(), re.MULTILINE)[1]
    config_class = getattr(module, name)
    failures = []
    for field in dataclasses.fields(config_class):
        for value in VALUES:
            arguments = [*SMALL.get(path.stem, []), f"--{field.name}={value}"]
            stderr = run_stopped(module, config_class, arguments)
            n_lines = len(re.findall(r"^(?:error|stopped)", stderr, re.MULTILINE))
            if "Traceback" in stderr or n_lines > 1:
                failures.append((arguments, stderr[-600:]))
    assert not failures, failures
