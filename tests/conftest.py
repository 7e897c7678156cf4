"""Shared by the tests: a small toy dataset and one small finished run on it, made once."""
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data.prepare
import train
from config import parse
from data.toy.prepare import ToyConfig
from data.toy.prepare import prepare as prepare_toy
from generator import GeneratorConfig, train_generator
from model import ModelConfig, RewardModel

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder with data/toy (60 training pairs), out/toy-generator and out/run, a reward model of 12 steps."""
    root = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(data.prepare, "DATA", root / "data")
        prepare_toy(ToyConfig(train=60, test=20))
        train.main(parse(train.TrainConfig, small_run("out/run")))
    return root


@pytest.fixture
def inside(workspace, monkeypatch):
    """Run the test with the workspace as the current folder and its data/ as the datasets' folder."""
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(data.prepare, "DATA", workspace / "data")
    return workspace


def small_run(out_dir, **more):
    settings = dict(out_dir=out_dir, steps=12, batch_size=8, n_embd=32, n_layer=1, n_head=2, save_interval=4,
                    log_interval=2, eval_interval=6, warmup=2, device="cpu") | more
    return [f"--{key}={value}" for key, value in settings.items()]


def quick_generator(dataset, out_dir, steps=20):
    """A generator of small_run's sizes that has hardly learned, for tests that need any."""
    train_generator(GeneratorConfig(dataset=dataset, out_dir=out_dir, n_layer=1, n_head=2, n_embd=32, steps=steps, device="cpu"))


@pytest.fixture(scope="session")
def tiny():
    """A random reward model of 50 tokens and a random batch of rows of unequal length."""
    torch.manual_seed(0)
    model = RewardModel(ModelConfig(vocab_size=50, block_size=24, n_layer=2, n_head=2, n_embd=16)).eval()
    torch.nn.init.normal_(model.score.weight)
    return SimpleNamespace(model=model)


def plain_rewards(model, tokens):
    """The reward of every prefix of rows of tokens, each row read on its own from its start.  (rows, T) -> (rows, T)"""
    return (model.transformer(tokens) * model.score.weight[0]).sum(-1)


@pytest.fixture
def real_data():
    """The folder of real files named by ICRM_REAL_DATA; the test is skipped without it."""
    if not os.environ.get("ICRM_REAL_DATA"):
        pytest.skip("ICRM_REAL_DATA names no folder of real files")
    return Path(os.environ["ICRM_REAL_DATA"])
