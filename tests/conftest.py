"""Shared by the tests: a small toy dataset and a small finished run, made once."""

import os
import signal
import subprocess
import sys
import threading
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import generator
import train
from common import ROOT, parse_settings
from data import toy
from model import ModelConfig, RewardModel

torch.set_num_threads(1)  # the models are tiny, and the machine may be busy
# Scripts ignore signals that are ignored when they start, as under nohup.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder with a toy dataset, a generator and a reward model.

    data/toy has 60 training pairs. out/toy-generator finishes its responses. out/run is
    a reward model that was trained for 12 steps.
    """
    root = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        toy.main(toy.ToyConfig(train=60, test=20))
        small_generator("toy", "out/toy-generator", steps=40, learning_rate=2e-2)
        train.main(small_run("out/run"))
    return root


@pytest.fixture
def inside(workspace, monkeypatch):
    """Run the test inside the workspace: data/ and out/ are the workspace's."""
    monkeypatch.chdir(workspace)
    return workspace


def small_run(out_dir, **changes):
    """The TrainConfig of a small run."""
    settings = {
        "out_dir": out_dir,
        "steps": 12,
        "batch_size": 8,
        "log_interval": 2,
        "eval_interval": 4,
        "device": "cpu",
        **changes,
    }
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    return parse_settings(train.TrainConfig, arguments)


def small_generator(dataset, out_dir, steps=20, **changes):
    """Train a small generator and write its p, for tests that need any."""
    settings = {"n_layer": 1, "n_head": 2, "n_embd": 32, "device": "cpu", **changes}
    config = generator.GeneratorConfig(
        dataset=dataset, out_dir=out_dir, steps=steps, **settings
    )
    generator.main(config)


def run_python(*arguments, **environment):
    """Run Python with one thread. Returns the finished process and its output."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def copy_core(folder):
    """Copy the Python files that `python train.py` needs."""
    for source in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]:
        target = Path(folder) / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text())


def fork(child):
    """Start a process that has imported torch already.

    It gets its own tqdm lock. tqdm's lock is in memory that forks share, so a child
    that is killed while it holds the lock would block all others.
    """

    def begin():
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())
        child()

    process = get_context("fork").Process(target=begin, daemon=True)
    process.start()
    return process


@pytest.fixture
def tiny():
    """A random reward model with a vocabulary of 50 tokens."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=50, block_size=24, n_layer=2, n_head=2, n_embd=16)
    model = RewardModel(config).eval()
    torch.nn.init.normal_(model.score.weight)
    return model
