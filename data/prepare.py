"""Make a dataset, data/NAME, of a JSONL file or of a published collection.

    python data/prepare.py --name=mine --input=FILE.jsonl --tokenizer=bpe:4096
    python data/prepare.py --source=hh_rlhf                     downloads with `datasets`
    python data/prepare.py --source=gsm8k --input=LOCAL.jsonl   a local copy of its raw rows
    python train.py --dataset=mine

A file holds pairs, labelled responses or candidates (data/pairs.py). A held-out prompt is nowhere
in the training part; its candidates are kept as text too, for bon.py: data/NAME/candidates.jsonl.
Benchmarks are only copied, to data/NAME/test.jsonl, for evaluate.py --as_dialogue=True.
"""
import json
import math
import re
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import UserError, choose, in_range, run_script
from data import tokenizer as tokenizers
from data.dataset import dataset_folder, listed, write_dataset
from data.files import write_text
from data.jsonl import check_left_out, lines_of, read_items
from data.pairs import TURN, BadRow, is_list_of, is_number, parse_candidates, parse_pairs


@dataclass(frozen=True)
class PrepareConfig:
    name: str = ""              # the dataset's name: its folder under data/; empty: the source's
    source: str = ""            # a published collection, a row of SOURCES; empty: your own file
    input: str = ""             # a JSONL file (.gz is read too); empty: download the source
    tokenizer: str = "gpt2"     # gpt2; bpe:SIZE, trained on the data; a pretrained model's folder
    block_size: int = 1024      # most tokens of a prompt and its longer response
    val_share: float = 0.0      # share of prompts held out; 0: the source's own, 0.1 of a file
    every: int = 0              # keep every so many of the rows; 0: the source's own, 1 of a file
    as_dialogue: bool = False   # write plain prompts as one Human turn
    threshold: float = -math.inf    # labels from here on are correct; -inf: of two, the larger
    skip_bad: bool = False      # go on where much of a file is left out


EMPTY = "a response that is empty, or neither correct nor incorrect"


# A raw row of a published collection -> a row as data/pairs.py describes, or None ---------------

def from_hh(row):
    """Two whole dialogues; they must not part before the last reply."""
    prompts = {str(row.get(key)).rpartition(TURN)[0] for key in ("chosen", "rejected")}
    if len(prompts) > 1 or "" in prompts:
        raise BadRow("no two dialogues that part at the last reply")
    return row


def from_unified(row):
    """Two conversations: the better rated one is chosen, equal ones are not kept."""
    ratings = row.get("conv_A_rating"), row.get("conv_B_rating")
    if not all(map(is_number, ratings)):
        raise BadRow("conv_A_rating or conv_B_rating is no number")
    if ratings[0] == ratings[1]:
        return None
    better, worse = ("conv_A", "conv_B") if ratings[0] > ratings[1] else ("conv_B", "conv_A")
    return {"chosen": row.get(better), "rejected": row.get(worse)}


def from_gsm8k(row):
    """{'question', MODEL: {'solution', 'is_correct'}, ...}, or candidates; with final answers."""
    found = row.get("responses")
    if not is_list_of(dict, found):
        found = [{"text": value.get("solution"), "correct": value.get("is_correct")}
                 for value in row.values() if isinstance(value, dict)]
    for one in found:       # the answer stands behind the last 'A:'
        lines = re.findall(r"^A:\s*(\S.*)$", str(one.get("text")), flags=re.M) or ["none"]
        one["answer"] = lines[-1].strip().replace(",", "").replace("$", "")
    return {"prompt": row.get("question", row.get("prompt")), "responses": found}


class Source(NamedTuple):
    hub: str                    # its name on the hub, or what else its file is
    options: dict | None        # of load_dataset; None: it is not on the hub
    convert: Callable = dict    # one of the functions above; rows are well as they are
    val_share: float = 0.1
    every: int = 1              # every so many of the rows are kept
    benchmark: bool = False     # never trained on


SOURCES = {
    "hh_rlhf": Source("Anthropic/hh-rlhf", {"data_dir": "harmless-base"}, from_hh),
    # every 20th is the paper's 40K, --every=2 its 400K
    "unified_feedback": Source("llm-blender/Unified-Feedback", {"name": "all"}, from_unified,
                               0.02, 20),
    "skywork": Source("Skywork/Skywork-Reward-Preference-80K-v0.2", {}, val_share=0.02),
    "gsm8k": Source("example_model_solutions.jsonl of github.com/openai/grade-school-math", None,
                    from_gsm8k, 0.2),
    "rewardbench": Source("allenai/reward-bench", {"split": "filtered"}, benchmark=True),
    "rm_bench": Source("THU-KEG/RM-Bench", {}, benchmark=True),
}


def download(source, path):
    """Fetch a source from the hub, as a JSONL file."""
    if source.options is None:
        raise UserError(f"name a file of {source.hub} with --input=FILE, or a collection that is "
                        f"downloaded with --source=NAME ({', '.join(SOURCES)})")
    try:
        from datasets import load_dataset
        load_dataset(source.hub, **{"split": "train", **source.options}).to_json(path)
    except Exception as error:      # the package and the network fail in many ways
        raise UserError(f"{source.hub} could not be downloaded ({type(error).__name__}); connect "
                        "and `pip install datasets`, or name a copy with --input=FILE") from None


def items_of(config, source, path, left_out=None):
    """Yield the items of every config.every-th row of a file."""
    def parse(row, as_dialogue):
        labelled = "chosen" not in row and ("responses" in row or "completion" in row)
        return (parse_candidates if labelled else parse_pairs)(row, as_dialogue)

    return read_items(path, parse, config.as_dialogue, left_out, config.skip_bad, source.convert,
                      config.every)


def labels_of(config, source, path):
    """What stands for incorrect and for correct: {number: 0 or 1}; every other one is left out."""
    values = sorted({one for item in items_of(config, source, path) for one in item.correct})
    if config.threshold > -math.inf:
        return {value: int(value >= config.threshold) for value in values}
    if len(values) > 2 and {0.0, 1.0} < set(values) and source.convert is not dict:
        values = [0.0, 1.0]     # of a published collection the others are known to be neither
    if len(values) > 2:
        raise UserError(f"{path} has labels from {values[0]} to {values[-1]}; say from where on "
                        "they are correct with --threshold=X")
    found = dict(zip(values, (0, 1)))
    if len(values) == 2 and values != [0.0, 1.0]:
        print(f"labels: {values[0]} is read as incorrect, {values[1]} as correct")
    return found


class Splitter:
    """Items -> rows of (split, prompt, first, second), and what was noticed on the way."""

    def __init__(self, kind, share, labels):
        self.kind, self.share, self.labels = kind, share, labels
        self.held_out = []      # the candidates of held-out prompts, as lines
        self.left_out, self.noticed, self.sides = Counter(), Counter(), Counter()
        self.seen = set()       # hashes of rows

    def rows(self, items):
        """A labelled response stands alone on its label's side."""
        for item in items:
            number = zlib.crc32(item.prompt.encode("utf-8", "surrogatepass")) % 10000
            split = "val" if number < self.share * 10000 else "train"   # by the prompt alone
            if bool(item.correct) != (self.kind == "labels"):
                raise UserError("a file holds pairs, or responses that are labelled, not both")
            if self.kind == "pairs":
                yield self.look(split, item.prompt, *item.responses)
            elif split == "val" and len(item.responses) > 1:
                self.held_out.append(line_of(item))
            for text, correct in zip(item.responses, item.correct):
                side = self.labels.get(correct)
                if text.strip() and side is not None:
                    yield self.look(split, item.prompt, *((text, None) if side else (None, text)))
                else:
                    self.left_out[EMPTY] += 1

    def look(self, split, prompt, first, second):
        """Count a row that stands there once more, and one whose opposite does; -> the row"""
        this, opposite = hash((prompt, first, second)), hash((prompt, second, first))
        self.noticed["rows that stand there once more"] += this in self.seen
        self.noticed["rows whose opposite stands there too"] += opposite in self.seen
        self.seen.add(this)
        self.sides[split, first is None] += 1
        return split, prompt, first, second

    def finish(self, config, path, bad, folder):
        """A UserError where too much was left out, or all labels of a split are of one kind; else
        write the held-out candidates beside the tokens. bad: the rows that could not be read."""
        count = self.sides.total() + self.left_out[EMPTY]
        check_left_out(path, self.left_out, count, config.skip_bad)
        self.left_out += bad
        for split in ("train", "val"):
            if self.kind == "labels" and not all(self.sides[split, side] for side in (False, True)):
                raise UserError(f"{path}: in {split} all labels are of one kind; nothing can be "
                                "learned, or measured, of that")
        if +self.noticed:
            print(f"noticed in {path}: {listed(+self.noticed)}")
        if self.held_out:
            (folder / "candidates.jsonl").write_text("".join(self.held_out), encoding="utf-8")


def line_of(item):
    """The JSON line from which parse_candidates makes the same candidates."""
    columns = filter(None, (item.responses, item.correct, item.answers))
    responses = [dict(zip(("text", "correct", "answer"), values)) for values in zip(*columns)]
    return json.dumps({"prompt": item.prompt, "responses": responses}) + "\n"


def prepare(config, source, path):
    bad = Counter()
    items = items_of(config, source, path, bad)
    first = next(items)
    kind, share = "labels" if first.correct else "pairs", config.val_share
    if config.threshold > -math.inf and not first.correct:
        raise UserError("--threshold is for labelled responses, and this file holds pairs")
    labels = labels_of(config, source, path) if first.correct else {}
    every = config.every * (1 + Path(path).stat().st_size // 10 ** 8)   # words must fit in memory
    again = items_of(replace(config, every=every), source, path)
    texts = (text for split, *texts in Splitter(kind, share, labels).rows(again)
             if split == "train" for text in texts if text)
    tokenizer = tokenizers.make(config.tokenizer, texts)    # gpt2 reads none
    splitter = Splitter(kind, share, labels)
    write_dataset(dataset_folder(config.name), splitter.rows(chain([first], items)),
                  ("train", "val"), tokenizer, config.block_size, kind, splitter.left_out,
                  partial(splitter.finish, config, path, bad),
                  source=config.source or config.input, val_share=share, every=config.every,
                  noticed=splitter.noticed)


def local_copy(config, folder):
    """The file to read, twice: a pipe is copied first; no file of the dataset's own folder."""
    path = Path(config.input)
    if dataset_folder(config.name).resolve() in path.resolve().parents:
        raise UserError(f"{path} lies in the folder that is written; move it elsewhere first")
    if path.exists() and not path.is_file() and not path.is_dir():
        path = Path(folder) / "rows.jsonl"
        with open(config.input, "rb") as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target)
    return path


def main(config):
    if config.source:
        choose("source", config.source, SOURCES)
    source = SOURCES.get(config.source, Source("your own", None))
    config = replace(config, name=config.name or config.source, every=config.every or source.every,
                     val_share=config.val_share or source.val_share)
    in_range(config, 0, 1, "val_share")
    in_range(config, -math.inf, math.inf, "threshold")      # not a number is refused
    in_range(config, 1, 10**6, "every", "block_size")
    if config.name == "toy":
        raise UserError("'toy' is made by data/toy/prepare.py; choose another --name")
    with tempfile.TemporaryDirectory() as folder:
        path = local_copy(config, folder) if config.input else Path(folder) / "rows.jsonl"
        if not config.input:
            download(source, path)
        if not source.benchmark:
            return prepare(config, source, path)
        pairs = sum(1 for _ in read_items(path, parse_pairs, True, Counter(), True))
        target = dataset_folder(config.name) / "test.jsonl"
        write_text(target, "\n".join(lines_of(path)))
        print(f"wrote {target}: {pairs} pairs")


if __name__ == "__main__":
    run_script(PrepareConfig, main)
