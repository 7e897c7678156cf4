"""Settings from the command line, and runs that survive being killed.

A script declares one frozen dataclass; every field is set by `--key=value`, and a field's
trailing comment is its line in `--help`. A Run is an output folder: its settings, its log
and its checkpoint, each written so that a reader never sees half a file.

Left out on purpose: config files, nested settings, environment variables.
"""
import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import os
import sys
import textwrap
from pathlib import Path

import torch


TINY = 1e-9     # as good as 0 for a setting that must not be 0


class UserError(Exception):
    """Something the user can put right: shown as one line, exit status 2, no traceback."""


def run_script(config_class, main):
    """Parse the command line into config_class and call main(config)."""
    sys.stdout.reconfigure(errors="backslashreplace")  # data may hold what the terminal cannot show
    try:
        main(parse(config_class, sys.argv[1:]))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted; a training run is continued by the same command")


def parse(config_class, arguments):
    """['--key=value', ...] -> config_class. The value is all that follows the first '='."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    values = {}
    for argument in arguments:
        if argument in ("--help", "-h"):
            print(inspect.getmodule(config_class).__doc__.strip(), *usage(config_class), sep="\n")
            sys.exit(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise UserError(f"cannot read {argument!r}; settings are written --key=value (--help lists them)")
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
            raise UserError(f"unknown setting --{key}; did you mean --{near[0]}? (--help lists them all)")
        values[key] = convert(key, text, type(fields[key].default))
    return config_class(**values)


def convert(key, text, kind):
    """The text of one setting as a value of its default's type."""
    if kind is bool:
        if text not in ("True", "False"):
            raise UserError(f"--{key} takes True or False, not {text!r}")
        return text == "True"
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"--{key} takes {'a whole number' if kind is int else 'a number'}, not {text!r}") from None


def in_range(config, low, high, *names):
    """A UserError for the first of these settings that is not a number from low (TINY: above 0) to high."""
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:    # not a number fails too
            wanted = "above 0" if low == TINY else f"at least {low}"
            wanted += f" and at most {high}" if high < 10**9 or value > high else ""
            raise UserError(f"--{name} must be {wanted}, not {value}")


def usage(config_class):
    """One line per setting: its name, its default and its trailing comment in the source."""
    comments = {}
    for line in inspect.getsource(config_class).splitlines():
        name, _, comment = line.partition("#")
        comments[name.partition(":")[0].strip()] = comment.strip()
    return ["", "settings:"] + [f"  --{field.name}={field.default}  {comments[field.name]}"
                                for field in dataclasses.fields(config_class)]


def show(config):
    """Print the settings, a star before each one that is not its default."""
    changed = {field.name for field in dataclasses.fields(config)
               if getattr(config, field.name) != field.default}
    words = [f"{'*' if name in changed else ''}{name}={value}"
             for name, value in dataclasses.asdict(config).items() if value != ""]
    print(textwrap.fill("settings (* changed): " + "  ".join(words), 80, break_long_words=False, break_on_hyphens=False))


def choose(name, value, options):
    """A UserError that lists the options, where value is none of them."""
    if value not in options:
        raise UserError(f"unknown {name} {value!r}; choose one of: {', '.join(options)}")


def write_atomically(path, write):
    """Call write(temporary_path), flush it to disk and rename it to path: all of it or none."""
    path = Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error})") from None
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def write_json(path, value):
    try:
        text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    except ValueError:
        raise UserError(f"a result for {path} is not a finite number; nothing was written") from None
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def load_checkpoint(path, kind):
    """The dictionary saved by Run.save; kind is 'reward model', 'generator', 'policy', 'probs' or
    'dpo pairs', or several of them in a tuple."""
    path = Path(path) / "ckpt.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file of other bytes makes the unpickler raise
        raise UserError(f"{path} is not a checkpoint, or is cut short ({type(error).__name__})") from None
    kinds = (kind,) if isinstance(kind, str) else kind
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") not in kinds:
        raise UserError(f"{path} holds no {' or '.join(kinds)}")
    return checkpoint


def check_finite(step, *values):
    """Stop the run where a loss or a gradient is not a number; the checkpoint before it stays."""
    if not all(map(math.isfinite, values)):
        raise UserError(f"the loss or its gradient is not finite at step {step}; the last checkpoint, if any, is kept. "
                        "Try a smaller --learning_rate, or --dtype=float32")


def fingerprint(*parts):
    """A sha256 over tensors, arrays, strings and dictionaries of them."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, dict):
            part = "".join(f"{key}:{fingerprint(value)}" for key, value in sorted(part.items()))
        elif isinstance(part, torch.Tensor):
            part = part.detach().cpu().contiguous().numpy()
        digest.update(part.encode() if isinstance(part, str) else part.tobytes())
    return digest.hexdigest()


class Run:
    """An output folder: ckpt.pt and log.jsonl of one training run with one set of settings.

    Opening a folder that holds a run continues it when every setting agrees, refuses it by
    the name of the first one that does not, and with overwrite=True starts over. `match` does
    the same for what the settings only name: the data, the vocabulary, the generator.
    """
    # Settings that may differ between a run and its continuation.
    FREE = ("out_dir", "overwrite", "device", "json", "judge", "answers", "accumulate", "recompute", "compile")

    def __init__(self, folder, kind, config, overwrite=False, writes=True):
        self.folder, self.kind, self.writes = Path(folder), kind, writes     # of several processes one writes
        self.settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in self.FREE}
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file, not a folder for a run")
        self.checkpoint, self.inputs, defaults = None, {}, {field.name: field.default for field in dataclasses.fields(config)}
        if (self.folder / "ckpt.pt").exists() and not overwrite:
            self.checkpoint = load_checkpoint(self.folder, kind)
            for key, value in self.settings.items():
                found = self.checkpoint["settings"].get(key, defaults[key])     # a setting of a later version
                if found != value:
                    raise UserError(f"{self.folder} holds a run with --{key}={found}, not {value}; "
                                    "choose another folder, or start over with --overwrite=True")

    def match(self, **inputs):
        """Refuse to continue with another `data`, `vocabulary`, `generator`, ... (fingerprints) than the run began with."""
        self.inputs = inputs
        for name, value in inputs.items():
            if self.checkpoint and self.checkpoint.get("inputs", {}).get(name) != value:
                script = {"generator": "generator.py", "reward model": "train.py", "policy": "dpo.py"}[self.kind]
                raise UserError(f"the {self.kind} in {self.folder} was trained with another {name} than there is now; "
                                f"start it over with python {script} and --overwrite=True, or choose another folder")

    def restore(self, model, optimizer):
        """Load the checkpoint, if any, into model and optimizer (or clear the folder); returns the next step's number."""
        step = 0
        if self.checkpoint is not None:
            model.load_state_dict(self.checkpoint["model"])
            optimizer.load_state_dict(self.checkpoint["optimizer"])
            step = self.checkpoint["step"]
        if not self.writes:
            return step
        for name in ("ckpt.pt", "eval.json", "results.json"):
            if step == 0:
                (self.folder / name).unlink(missing_ok=True)
        log = self.folder / "log.jsonl"
        if log.exists():  # what was logged after the checkpoint will be logged again
            kept = []
            for line in log.read_text().splitlines(keepends=True):
                if not line.endswith("}\n") or json.loads(line)["step"] > step:
                    break
                kept.append(line)
            write_atomically(log, lambda temporary: temporary.write_text("".join(kept)))
        return step

    def log(self, record):
        """Append one line to log.jsonl."""
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    def save(self, step, model, optimizer, **more):
        """Write ckpt.pt: step updates are done."""
        checkpoint = dict(kind=self.kind, settings=self.settings, inputs=self.inputs, step=step,
                          model=model.state_dict(), optimizer=optimizer.state_dict(), **more)
        if self.writes:
            write_atomically(self.folder / "ckpt.pt", lambda temporary: torch.save(checkpoint, temporary))
