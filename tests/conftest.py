"""Shared by the tests: a small toy dataset and one small finished run on it, made once."""
import signal
import threading
from multiprocessing import get_context

import pytest
import torch
from tqdm import tqdm

import generator
import train
from config import parse
from data.files import EDITION, fingerprint
from data.toy.prepare import ToyConfig
from data.toy.prepare import main as prepare_toy
from data.weights import read_folder
from model import ModelConfig, RewardModel, pretrained_language_model

torch.set_num_threads(1)     # the models are tiny, and the machine may be busy
signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background, and nohup, have
signal.signal(signal.SIGHUP, signal.SIG_DFL)                # them ignored, and scripts obey that


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder with data/toy (60 training pairs), out/toy-generator, whose responses end, and
    out/run, a reward model of 12 steps."""
    root = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        prepare_toy(ToyConfig(train=60, test=20))
        quick_generator("toy", "out/toy-generator", steps=40, learning_rate=2e-2)
        train.main(small_run("out/run"))
    return root


@pytest.fixture
def inside(workspace, monkeypatch):
    """Run the test with the workspace as the current folder: data/ and out/ are the workspace's."""
    monkeypatch.chdir(workspace)
    return workspace


def small_run(out_dir, **more):
    """The TrainConfig of a small run."""
    settings = dict(out_dir=out_dir, steps=12, batch_size=8, log_interval=2, eval_interval=4,
                    device="cpu") | more
    return parse(train.TrainConfig, [f"--{key}={value}" for key, value in settings.items()])


def quick_generator(dataset, out_dir, steps=20, **more):
    """A small generator that has hardly learned, and its p, for tests that need any."""
    generator.main(generator.GeneratorConfig(dataset=dataset, out_dir=out_dir, n_layer=1, n_head=2,
                                             n_embd=32, steps=steps, device="cpu", **more))


def read_model(folder, tokenizer=None, block_size=0):
    """The model in a folder of Hugging Face's layout, as generator.py starts from it."""
    return pretrained_language_model(*read_folder(folder, tokenizer, block_size), folder)


def save_edited(checkpoint, path):
    """Write a checkpoint that was read and changed as one that is whole."""
    torch.save(checkpoint | {"checksum": fingerprint(EDITION, checkpoint)}, path)


def fork(child):
    """A started process that has imported torch already. It shares no lock with the others: tqdm's
    is in memory that a fork shares, and a child killed while it holds that would stop them all."""
    def begin():
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())
        child()

    process = get_context("fork").Process(target=begin, daemon=True)
    process.start()
    return process


@pytest.fixture
def tiny():
    """A random reward model of 50 tokens."""
    torch.manual_seed(0)
    sizes = ModelConfig(vocab_size=50, block_size=24, n_layer=2, n_head=2, n_embd=16)
    model = RewardModel(sizes).eval()
    torch.nn.init.normal_(model.score.weight)
    return model
