"""Prepare a dataset, data/NAME, from a JSONL file or a published collection.

    python data/prepare.py --name=mine --input=FILE.jsonl --tokenizer=bpe:4096
    python data/prepare.py --source=hh_rlhf                     needs `datasets`
    python data/prepare.py --source=gsm8k --input=LOCAL.jsonl   a local copy of its rows
    python train.py --dataset=mine

A file holds pairs, labelled responses or candidates (data/README.md). Prompts are split
into training and held-out ones. Held-out candidates are also kept as text, for bon.py:
data/NAME/candidates.jsonl. Benchmarks are only copied to data/NAME/test.jsonl, for
evaluate.py --wrap_as_chat=True.
"""

import json
import math
import re
import shutil
import sys
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import (
    UserError,
    check_choice,
    check_range,
    lock,
    run_script,
    write_atomically,
)
from data.dataset import TIED, dataset_folder, format_counts, write_dataset
from data.formats import (
    BadRow,
    check_skipped,
    is_list_of,
    parse_candidates,
    parse_pairs,
    read_items,
    read_lines,
    read_number,
)
from data.tokenizer import make_tokenizer

NO_LABEL = "a response whose label means neither correct nor incorrect"
BYTES_IN_MEMORY = 10**8  # of text that a tokenizer is trained on


@dataclass(frozen=True)
class PrepareConfig:
    name: str = ""  # a folder under data/. empty: the name of the source
    source: str = ""  # a published collection, a key of SOURCES. empty: your own file
    input: str = ""  # a JSONL file (also .gz, or a pipe). empty: download the source
    tokenizer: str = "gpt2"  # gpt2, bpe:SIZE, or a model's folder or owner/model
    block_size: int = 1024  # maximum tokens of a prompt plus its longer response
    val_share: float = 0.0  # share of prompts to hold out. 0: the source's, or 0.1
    subsample: int = 0  # keep every N-th row. 0: the source's value, or 1
    wrap_as_chat: bool = False  # wrap plain prompts as one user message
    threshold: float = -math.inf  # labels >= this are correct. -inf: the larger label
    max_bad_fraction: float = 0.05  # largest share of rows skipped for one reason


# Published collections: a raw row -> a row that data/formats.py reads -----------------


def convert_unified(row):
    """Two conversations with ratings."""
    ratings = row.get("conv_A_rating"), row.get("conv_B_rating")
    ratings = [read_number(rating) for rating in ratings]
    if None in ratings:
        raise BadRow("conv_A_rating or conv_B_rating is not a number")
    if ratings[0] == ratings[1]:
        raise BadRow(TIED)
    chosen, rejected = row.get("conv_A"), row.get("conv_B")
    if ratings[0] < ratings[1]:
        chosen, rejected = rejected, chosen
    return {"chosen": chosen, "rejected": rejected}


def convert_gsm8k(row):
    """{'question', MODEL: {'solution', 'is_correct'}, ...} -> candidates with answers.

    A row that has 'responses' already only gets the answers.
    The final answer is in the last line that begins with 'A:'.
    """
    responses = row.get("responses")
    if not is_list_of(dict, responses):
        responses = []
        for value in row.values():
            if isinstance(value, dict):
                text, correct = value.get("solution"), value.get("is_correct")
                responses.append({"text": text, "correct": correct})
    for response in responses:
        lines = re.findall(r"^A:\s*(\S.*)$", str(response.get("text")), flags=re.M)
        answer = lines[-1].strip() if lines else "none"
        response["answer"] = answer.replace(",", "").replace("$", "")
    prompt = row.get("question", row.get("prompt"))
    return {"prompt": prompt, "responses": responses}


class Source(NamedTuple):
    hub: str  # its name on the hub, or where its file is
    options: dict | None  # of load_dataset. None: it is not on the hub
    convert: Callable = dict  # one of the functions above
    val_share: float = 0.1
    subsample: int = 1
    is_benchmark: bool = False  # never trained on


SOURCES = {
    "hh_rlhf": Source("Anthropic/hh-rlhf", {"data_dir": "harmless-base"}),
    # Every 20th row gives the paper's 40K pairs, --subsample=2 its 400K.
    "unified_feedback": Source(
        "llm-blender/Unified-Feedback", {"name": "all"}, convert_unified, 0.02, 20
    ),
    "skywork": Source("Skywork/Skywork-Reward-Preference-80K-v0.2", {}, val_share=0.02),
    "gsm8k": Source(
        "example_model_solutions.jsonl of github.com/openai/grade-school-math",
        None,
        convert_gsm8k,
        0.2,
    ),
    "rewardbench": Source(
        "allenai/reward-bench", {"split": "filtered"}, is_benchmark=True
    ),
    "rm_bench": Source("THU-KEG/RM-Bench", {}, is_benchmark=True),
}


def download(source, path):
    """Download a source from the hub and write it as a JSONL file."""
    if source.options is None:
        raise UserError(
            f"name a file of {source.hub} with --input=FILE, or a collection on the "
            f"hub with --source=NAME ({', '.join(SOURCES)})"
        )
    try:
        from datasets import load_dataset

        rows = load_dataset(source.hub, **{"split": "train", **source.options})
        rows.to_json(path)
    except Exception as error:  # the package and the network fail in many ways
        raise UserError(
            f"{source.hub} could not be downloaded ({type(error).__name__}). Install "
            "`datasets` and connect, or name a copy with --input=FILE"
        ) from None


# Items -> rows of a dataset -----------------------------------------------------------


def parse_row(row, wrap_as_chat):
    """Parse a row of pairs, labelled responses or candidates."""
    is_labelled = "responses" in row or "completion" in row
    if is_labelled and "chosen" not in row:
        return parse_candidates(row, wrap_as_chat)
    return parse_pairs(row, wrap_as_chat)


def read_file(config, source, path, skipped=None, subsample=None):
    """Yield the items of a file."""
    return read_items(
        path,
        parse_row,
        config.wrap_as_chat,
        skipped,
        config.max_bad_fraction,
        source.convert,
        subsample or config.subsample,
    )


def find_labels(config, source, path):
    """Which label values mean incorrect and correct: {value: 0 or 1}. Skip the rest."""
    distinct = set()
    for item in read_file(config, source, path):
        distinct.update(item.labels)
    values = sorted(distinct)
    if config.threshold > -math.inf:
        return {value: int(value >= config.threshold) for value in values}
    if len(values) > 2 and {0.0, 1.0} < distinct and source.convert is not dict:
        values = [0.0, 1.0]  # published collections use others for unknown labels
    if len(values) > 2:
        raise UserError(
            f"{path} has labels from {values[0]} to {values[-1]}. Set the smallest "
            "label that means correct with --threshold=X"
        )
    if len(values) == 2 and values != [0.0, 1.0]:
        print(f"labels: {values[0]} means incorrect, {values[1]} means correct")
    return dict(zip(values, (0, 1)))


class RowMaker:
    """Turns items into rows of (split, prompt, first response, second response).

    A labelled response is the first one if it is correct, else the second one.
    """

    def __init__(self, kind, val_share, labels):
        self.kind, self.val_share, self.labels = kind, val_share, labels
        self.held_out = []  # candidates of held-out prompts, as JSON lines
        self.skipped, self.notes = Counter(), Counter()
        self.row_counts = Counter()  # (split, whether there is a first response): rows
        self.hashes = set()  # of rows

    def make_rows(self, items):
        for item in items:
            # The split depends on the prompt alone, not on its case and spaces.
            prompt = " ".join(item.prompt.split()).casefold()
            digest = zlib.crc32(prompt.encode("utf-8", "surrogatepass"))
            split = "val" if digest % 10000 < self.val_share * 10000 else "train"
            if bool(item.labels) != (self.kind == "labels"):
                raise UserError("a file holds pairs or labelled responses, not both")
            if self.kind == "pairs":
                yield self.counted(split, item.prompt, *item.responses)
            elif split == "val" and len(item.responses) > 1:
                self.held_out.append(format_candidates(item))
            for text, correct in zip(item.responses, item.labels):
                label = self.labels.get(correct)
                if label is None:
                    self.skipped[NO_LABEL] += 1
                elif label == 1:
                    yield self.counted(split, item.prompt, text, None)
                else:
                    yield self.counted(split, item.prompt, None, text)

    def counted(self, split, prompt, first, second):
        """Return a row. Count it, and whether it or its opposite is there already."""
        if hash((prompt, first, second)) in self.hashes:
            self.notes["repeated rows"] += 1
        if hash((prompt, second, first)) in self.hashes:
            self.notes["rows that contradict another row"] += 1
        self.hashes.add(hash((prompt, first, second)))
        self.row_counts[split, first is not None] += 1
        return split, prompt, first, second

    def check(self, config, path):
        """Raise a UserError if nothing could be learned from the rows."""
        n_rows = self.row_counts.total() + self.skipped[NO_LABEL]
        check_skipped(path, self.skipped, n_rows, config.max_bad_fraction)
        for split in ("train", "val"):
            both = self.row_counts[split, True] and self.row_counts[split, False]
            if self.kind == "labels" and not both:
                raise UserError(
                    f"{path}: all responses of {split} have the same label. Nothing "
                    "can be learned from that, or measured. (Rows are split by prompt)"
                )
        if self.notes:
            print(f"{path}: {format_counts(self.notes)}")


def format_candidates(item):
    """The JSON line that parse_candidates turns into the same item."""
    responses = []
    for i, text in enumerate(item.responses):
        response = {"text": text, "correct": item.labels[i]}
        if item.answers:
            response["answer"] = item.answers[i]
        responses.append(response)
    return json.dumps({"prompt": item.prompt, "responses": responses}) + "\n"


def prepare(config, source, path):
    """Write the dataset data/NAME."""
    bad_rows, folder = Counter(), dataset_folder(config.name)
    items = read_file(config, source, path, bad_rows)
    first = next(items)
    kind, labels = "pairs", {}
    if first.labels:
        kind, labels = "labels", find_labels(config, source, path)
    elif config.threshold > -math.inf:
        raise UserError("--threshold needs labelled responses. This file has pairs")

    def train_texts():
        subsample = config.subsample
        subsample *= 1 + Path(path).stat().st_size // BYTES_IN_MEMORY
        items = read_file(config, source, path, subsample=subsample)
        for split, *texts in RowMaker(kind, config.val_share, labels).make_rows(items):
            if split == "train":
                yield from filter(None, texts)

    tokenizer = make_tokenizer(config.tokenizer, train_texts())  # only bpe reads them
    maker = RowMaker(kind, config.val_share, labels)

    def check():
        maker.check(config, path)
        maker.skipped.update(bad_rows)

    write_dataset(
        folder,
        maker.make_rows(chain([first], items)),
        ("train", "val"),
        tokenizer,
        config.block_size,
        kind,
        maker.skipped,
        check=check,
        source=config.source or config.input,
        val_share=config.val_share,
        subsample=config.subsample,
        notes=maker.notes,
    )
    candidates = folder / "candidates.jsonl"
    candidates.unlink(missing_ok=True)
    if maker.held_out:
        write_text(candidates, "".join(maker.held_out))


def write_text(path, text):
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def copy_pipe(config, path):
    """Return a path that can be read twice. A pipe is copied to `path` first."""
    source = Path(config.input)
    if path.parent.resolve() in source.resolve().parents:
        raise UserError(f"{source} is in the folder to write. Move it elsewhere first")
    if not source.exists() or source.is_file() or source.is_dir():
        return source
    with open(source, "rb") as pipe, open(path, "wb") as file:
        shutil.copyfileobj(pipe, file)
    return path


def main(config):
    if config.source:
        check_choice("source", config.source, SOURCES)
    source = SOURCES.get(config.source, Source("your own file", None))
    config = replace(
        config,
        name=config.name or config.source,
        subsample=config.subsample or source.subsample,
        val_share=config.val_share or source.val_share,
    )
    check_range(config, 0, 1, "val_share", "max_bad_fraction")
    check_range(config, -math.inf, math.inf, "threshold")  # refuses NaN
    check_range(config, 1, 10**6, "subsample", "block_size")
    if config.name.lower() == "toy":  # some disks do not distinguish case
        raise UserError("'toy' is made by data/toy.py. Choose another --name")
    if not config.tokenizer:
        raise UserError("name a tokenizer, such as --tokenizer=gpt2")
    if "/" in config.tokenizer or Path(config.tokenizer).is_dir():
        from pretrained.weights import check_config

        check_config(config.tokenizer)
    folder = dataset_folder(config.name)
    temporary = folder / "rows.jsonl.tmp"  # a download, or the copy of a pipe
    folder.mkdir(parents=True, exist_ok=True)
    try:
        path = temporary
        if config.input:
            path = copy_pipe(config, temporary)
        else:
            download(source, temporary)
        if not source.is_benchmark:
            prepare(config, source, path)
            return
        n_pairs = sum(1 for _ in read_items(path, parse_pairs, True, Counter(), 1.0))
        with lock(folder):
            write_text(folder / "test.jsonl", "\n".join(read_lines(path)))
        print(f"wrote {folder}/test.jsonl: {n_pairs} pairs")
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    run_script(PrepareConfig, main)
