"""Make a dataset of any JSONL file of pairs: a folder data/NAME with train.jsonl, val.jsonl and its tokenizer.

    python data/prepare.py --name=mine --input=pairs.jsonl --tokenizer=bpe:4096
    python train.py --dataset=mine

The file may also hold labelled responses (correct or not), or candidates, whose held-out part is then written as
candidates.jsonl as well, for bon.py. The held-out part is taken by prompt: no prompt stands in both. The formats
that are read: data/pairs.py.
"""
import json
import shutil
import sys
import tempfile
import zlib
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import UserError, fingerprint, in_range, run_script, show, write_atomically, write_json
from data import tokenizer as tokenizers
from data.pairs import BadRow, Labelled, decode_row, lines_of, read_candidates, read_labelled, read_pairs

DATA = Path(__file__).resolve().parent


@dataclass(frozen=True)
class PrepareConfig:
    name: str = ""              # the dataset's name: its folder under data/
    input: str = ""             # a JSONL file of pairs, labelled responses or candidates (.gz is read too)
    tokenizer: str = "gpt2"     # gpt2, or bpe:SIZE for a vocabulary trained on the pairs
    val_share: float = 0.1      # share of prompts held out as val.jsonl
    strict: bool = False        # stop at the first bad row
    as_dialogue: bool = False   # write plain prompts as one Human turn


def dataset_folder(name):
    """data/NAME, refusing names that are not one plain folder."""
    if not name or Path(name).name != name or name.startswith("."):
        raise UserError(f"a dataset's name is one folder's name under data/, not {name!r}")
    return DATA / name


def write_dataset(folder, splits, tokenizer, kind="pairs", world=None):
    """Write {split: rows} and a Tokenizer, or the one of that name (a bpe is trained on `train`), into folder.

    dataset.json is written last: its presence says that the folder is whole. kind 'labels' says that the rows
    are labelled responses, kind 'toy' that the World with the settings `world` wrote them: exact values are known."""
    if isinstance(tokenizer, str):
        texts = (row[key] for row in splits["train"] for key in ("prompt", "chosen", "rejected", "completion") if key in row)
        tokenizer = tokenizers.make(tokenizer, texts)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".prepare-", dir=folder))
    try:
        for split, rows in splits.items():
            (temporary / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name in ("dataset.json", "candidates.jsonl"):
            (folder / name).unlink(missing_ok=True)
        for path in temporary.iterdir():
            path.replace(folder / path.name)
        write_json(folder / "dataset.json", {"kind": kind, "world": world or {}, "tokenizer": tokenizer.to_dict()})
    finally:
        shutil.rmtree(temporary)
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in splits.items())
    print(f"wrote {folder}: {counts}; a vocabulary of {tokenizer.vocab_size} tokens")


@dataclass(frozen=True)
class Dataset:
    folder: Path
    kind: str                           # pairs, labels or toy
    tokenizer: tokenizers.Tokenizer
    world: dict                         # settings of the toy world's World; empty elsewhere

    @property
    def fingerprint(self):
        """Of the training pairs as they are on disk."""
        return fingerprint(self.path("train").read_text(encoding="utf-8"))

    def path(self, split):
        return self.folder / f"{split}.jsonl"

    def prompts(self, split):
        """The distinct prompts of a split, in its order."""
        read = read_labelled if self.kind == "labels" else read_pairs
        return list(dict.fromkeys(item.prompt for item in read(self.path(split))[0]))


def open_dataset(name):
    """A prepared dataset's name -> Dataset."""
    folder = dataset_folder(name)
    if not (folder / "dataset.json").is_file():
        known = sorted(path.parent.name for path in DATA.glob("*/prepare.py"))
        make = (f"python data/{name}/prepare.py" if name in known else
                f"python data/prepare.py --name={name} --input=FILE.jsonl (or use one of: {', '.join(known)})")
        raise UserError(f"no dataset {name!r} yet; make it with {make}")
    try:
        described = json.loads((folder / "dataset.json").read_text())
        return Dataset(folder, described["kind"], tokenizers.from_dict(described["tokenizer"]), described["world"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / 'dataset.json'} is damaged; prepare the dataset again") from None


def held_out(prompt, share):
    """Whether a prompt belongs to the held-out part: decided by the prompt alone."""
    return zlib.crc32(prompt.encode("utf-8", "surrogatepass")) % 10000 < share * 10000


def prepare_rows(name, path, items, config, kind="pairs", candidates=()):
    """Split Pairs (or Labelled responses, kind 'labels') by prompt and write them as the dataset data/NAME."""
    splits = {"train": [], "val": []}
    for item in items:
        splits["val" if held_out(item.prompt, config.val_share) else "train"].append(
            {key: value for key, value in asdict(item).items() if value not in ("", ())})
    for split, rows in splits.items():
        if not rows:
            raise UserError(f"{path}: nothing left for {split} with --val_share={config.val_share}")
    if candidates:
        splits["candidates"] = [
            {"prompt": item.prompt, "responses": [{"text": text, "correct": correct} | ({"answer": answer} if answer else {})
                                                  for text, correct, answer in zip_longest(item.responses, item.correct, item.answers)]}
            for item in candidates if held_out(item.prompt, config.val_share)]
    write_dataset(dataset_folder(name), splits, config.tokenizer, kind)


def prepare_candidates(name, path, candidates, config):
    """Candidates -> a dataset of labelled responses, and the held-out candidates for bon.py."""
    labelled = [Labelled(item.prompt, text, bool(correct), item.id) for item in candidates
                for text, correct in zip(item.responses, item.correct)]
    if any(correct not in (0, 1) for item in candidates for correct in item.correct):
        raise UserError(f"{path}: candidates to train on are correct or not (true or false)")
    prepare_rows(name, path, labelled, config, "labels", candidates)


def from_hub(name, folder, /, **options):
    """Fetch a dataset of the hub with the `datasets` package, as a JSONL file in folder; returns its path."""
    try:
        from datasets import load_dataset
        load_dataset(name, **options).to_json(path := f"{folder}/rows.jsonl", force_ascii=False)
        return path
    except Exception as error:  # the package and the network fail in many ways
        raise UserError(f"{name} could not be downloaded ({type(error).__name__}); `pip install datasets` and connect, or "
                        "pass a local copy of it as JSONL with --input=FILE") from None


@dataclass(frozen=True)
class BenchmarkConfig:
    input: str = ""             # a local copy as JSONL (.gz is read too); empty: download
    strict: bool = False        # stop at the first bad row


def write_benchmark(config, name, hub, **options):
    """Check a benchmark's rows, local or the hub's, and copy them to data/NAME/test.jsonl for evaluate.py; none is trained on."""
    show(config)
    with tempfile.TemporaryDirectory() as folder:
        path = config.input or from_hub(hub, folder, **options)
        pairs, _ = read_pairs(path, config.strict, as_dialogue=True)
        text = "\n".join(lines_of(path))
    target = dataset_folder(name) / "test.jsonl"
    write_atomically(target, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"wrote {target}: {len(pairs)} pairs")


def first_row(path):
    """The first row of a JSONL file that is an object; {} where there is none."""
    for line in lines_of(path):
        try:
            return decode_row(line)
        except BadRow:
            pass
    return {}


def main(config):
    show(config)
    in_range(config, 0, 1, "val_share")
    if (dataset_folder(config.name) / "prepare.py").exists():
        raise UserError(f"{config.name!r} is made by its own data/{config.name}/prepare.py; choose another --name")
    if not config.input:
        raise UserError("name a JSONL file of pairs with --input=FILE")
    options, form = (config.input, config.strict, config.as_dialogue), first_row(config.input)
    if "chosen" in form:
        prepare_rows(config.name, config.input, read_pairs(*options)[0], config)
    elif "responses" in form:
        prepare_candidates(config.name, config.input, read_candidates(*options)[0], config)
    elif "completion" in form:
        prepare_rows(config.name, config.input, read_labelled(*options)[0], config, "labels")
    else:
        prepare_rows(config.name, config.input, read_pairs(*options)[0], config)


if __name__ == "__main__":
    run_script(PrepareConfig, main)
