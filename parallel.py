"""Several processes on one batch: torchrun's, and what each of them reads.

    torchrun --standalone --nproc_per_node=K train.py

Every process knows the whole batch and reads its own parts of it; the rewards of the others come to it without
gradient (train.backward). Left out: more than one machine, and a model that does not fit on one device.
"""
import contextlib
import dataclasses
import os
import sys
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from model import pick_device


def start_processes(config):
    """Join the other processes, where torchrun started this one; the first one alone prints. -> config, with its device"""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        on_gpu = config.device in ("auto", "cuda") and torch.cuda.is_available()
        if on_gpu:
            config = dataclasses.replace(config, device=f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(pick_device(config.device))
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(days=7))    # a generator takes its time
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")
    return config


def processes():
    """(number of this process, how many torchrun started)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def first_process_first():
    """The first process runs the block before the others do, and these find what it has made."""
    rank, world = processes()
    if rank > 0:
        dist.barrier()
    yield
    if world > 1 and rank == 0:
        dist.barrier()


def part_of_batch(part, parts, chosen, rows, paired):
    """Which of a batch's rows make up one of its parts, and how many of these are chosen (they come first)."""
    items = np.arange(part, chosen if paired else rows, parts)
    return (np.concatenate([items, chosen + items]), len(items)) if paired else (items, int((items < chosen).sum()))
