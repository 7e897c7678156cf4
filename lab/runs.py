"""What both studies share: commands, records of runs, and tables."""

import json
import os
import subprocess
import sys
from multiprocessing.pool import ThreadPool

from common import ROOT, UserError
import torch
from tqdm import tqdm

VERSION = 3  # of the project, stored in every record
running = []  # processes that this one has started


# Runs ---------------------------------------------------------------------------------


def run_command(script, **settings):
    """Run `python SCRIPT --name=value ...` in a process of its own."""
    options = [f"--{name}={value}" for name, value in settings.items()]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    running.append(process)
    _, errors = process.communicate()
    if process.returncode != 0:
        reason = errors.strip().splitlines() or ["no message"]
        command = " ".join(["python", script, *options])
        raise UserError(f"{command} failed: {reason[-1]}")


def run_jobs(function, jobs, path, workers):
    """Call function(*job) for every job, `workers` at a time with one thread each.

    function: a generator of records. Each record is appended to the file at path as
    soon as it is there. A process that still runs at the end, after an error or a
    signal, is terminated.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

    def run_job(job):
        for record in function(*job):
            append_record(path, record)

    try:
        with ThreadPool(workers) as pool:
            for _ in tqdm(pool.imap_unordered(run_job, jobs), "jobs", len(jobs)):
                pass
    finally:
        for process in running:
            process.terminate()


def append_record(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_records(path):
    """The records of a file, one JSON object per line. An empty list without a file."""
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}, line {number} is damaged. Delete it") from None
    return records


def check_version(path, records):
    """Raise a UserError if records are of another version than new runs would be."""
    for record in records:
        if record["version"] != VERSION:
            raise UserError(
                f"{path} has runs of version {record['version']}, which are not mixed "
                "with new ones. Name another file with --results=FILE"
            )


# Tables -------------------------------------------------------------------------------


def markdown_table(header, rows):
    """The lines of a Markdown table."""
    lines = []
    for cells in [header, ["---"] * len(header), *rows]:
        lines.append("| " + " | ".join(cells) + " |")
    return lines
