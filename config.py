"""Settings from the command line, files that are never half written, and the folder of a run.

A script declares one frozen dataclass; every field is set by `--key=value`, and a field's trailing
comment is its line in `--help`. Every mistake of the user is one line and exit status 2.
Left out on purpose: config files, nested settings, environment variables.
"""
import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
TINY = 1e-9     # as good as 0 for a setting that must not be 0
LAYOUT = 2      # of checkpoints and datasets; another number is made again
TAKES = {bool: "True or False", int: "a whole number", float: "a number"}


class UserError(Exception):
    """Something the user can put right: shown as one line, exit status 2, no traceback."""


def run_script(config_class, main):
    """Parse the command line into config_class and call main(config)."""
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main(parse(config_class, sys.argv[1:]))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted; a training run goes on with --resume=True")


def run_other(script, quiet=False, **settings):
    """Run another of our scripts as a command. quiet: show what it prints only where it fails."""
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    if not quiet:
        print("+ python", script, *arguments, flush=True)
    done = subprocess.run([sys.executable, HERE / script, *arguments], capture_output=quiet,
                          text=True)
    if done.returncode:
        why = done.stderr.strip() if quiet else "see above"
        raise UserError(f"python {script} {' '.join(arguments)} failed: {why}")


def parse(config_class, arguments):
    """['--key=value', ...] -> config_class. The value is all that follows the first '='."""
    kinds = {field.name: type(field.default) for field in dataclasses.fields(config_class)}
    values = {}
    for argument in arguments:
        if argument in ("--help", "-h"):
            print(inspect.getmodule(config_class).__doc__, *usage(config_class), sep="\n")
            sys.exit(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise UserError(f"cannot read {argument!r}; write --key=value (--help lists them)")
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.0)
            raise UserError(f"unknown setting --{key}; did you mean --{near[0]}? (or see --help)")
        kind = kinds[key]
        try:
            values[key] = {"True": True, "False": False}[text] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise UserError(f"--{key} takes {TAKES[kind]}, not {text!r}") from None
    return config_class(**values)


def usage(config_class):
    """One line per setting: its name, its default and its trailing comment in the source."""
    source = inspect.getsource(config_class)
    comments = re.findall(r"^ +(\w+): .*?# (.*)$", source, flags=re.MULTILINE)
    return [f"  --{name}={getattr(config_class, name)}  {comment}" for name, comment in comments]


def show(config):
    """Print the settings that are not their defaults."""
    changed = [f"--{name}={value}" for name, value in vars(config).items()
               if value != getattr(type(config), name)]
    print("settings:", "  ".join(changed) or "all defaults (--help lists them)")


def in_range(config, low, high, *names):
    """A UserError for the first of these settings that is not from low (TINY: above 0) to high."""
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:    # not a number fails too
            wanted = "above 0" if low == TINY else f"at least {low}"
            wanted += f" and at most {high}" if high < 10**9 or value > high else ""
            raise UserError(f"--{name} must be {wanted}, not {value}")


def choose(name, value, options):
    """A UserError that lists the options, where value is none of them."""
    if value not in options:
        raise UserError(f"unknown {name} {value!r}; choose one of: {', '.join(options)}")


# Devices ----------------------------------------------------------------------------------------

def pick_device(name):
    """'auto', 'cpu', 'cuda' or 'cuda:N' -> torch.device; sets the whole process's switches."""
    choose("device", name.partition(":")[0], ("auto", "cpu", "cuda"))
    best = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=best if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={name} cannot be used: {str(error).splitlines()[0]}") from None
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)     # it would plan anew for every length of rows
    return device


def autocast(device, dtype):
    """Mixed precision for a forward pass: 'auto' is bfloat16 on CUDA and float32 elsewhere."""
    choose("dtype", dtype, ("auto", "float32", "bfloat16"))
    low = dtype == "bfloat16" or dtype == "auto" and device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16, enabled=low)


# Files ------------------------------------------------------------------------------------------

def write_atomically(path, write):
    """Call write(temporary_path), flush it to disk and rename it to path: all of it or none."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path, value):
    try:
        text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    except ValueError:
        raise UserError(f"a result for {path} is not finite; nothing was written") from None
    write_text(path, text)


def read_json(path, made_by):
    """A JSON object that one of our scripts wrote."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; make it with {made_by}") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged; make it again with {made_by}")
    return value


def read_records(path):
    """The objects of a file of JSON lines that write_records wrote; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_records(path, records):
    write_text(path, "".join(json.dumps(one, allow_nan=False) + "\n" for one in records))


def fingerprint(*parts):
    """A sha256 over tensors, arrays, strings and dictionaries of them."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, dict):
            part = "".join(f"{key}:{fingerprint(value)}" for key, value in sorted(part.items()))
        if isinstance(part, torch.Tensor):
            part = part.numpy(force=True)
        digest.update(part.encode() if isinstance(part, str) else part.reshape(-1))
    return digest.hexdigest()


# Runs -------------------------------------------------------------------------------------------

def load_checkpoint(path, *kinds):
    """The dictionary saved by Run.save, of a file or the folder that holds it; kinds: 'generator',
    'reward model' or 'policy'."""
    path = Path(path) / "ckpt.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file of other bytes makes the unpickler raise
        raise UserError(f"{path} is no checkpoint, or cut short ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") not in kinds:
        raise UserError(f"{path} holds no {' or '.join(kinds)}")
    if checkpoint.get("layout") != LAYOUT:
        raise UserError(f"{path} was written by another edition of this project; train it again")
    return checkpoint


def save_tensors(checkpoint, path):
    try:
        torch.save(checkpoint, path)
    except RuntimeError as error:       # what it makes of a full disk
        raise OSError(str(error).splitlines()[0]) from None


def check_finite(step, *values):
    """Stop the run where a loss or a gradient is not a number; the checkpoint before it stays."""
    if not all(map(math.isfinite, values)):
        raise UserError(f"the loss or its gradient is not finite at step {step}; the last "
                        "checkpoint, if any, is kept. Try a smaller --learning_rate")


class Run:
    """An output folder: ckpt.pt and log.jsonl of one training run with one set of settings.

    Starting a run in a folder that holds one keeps the old one as FOLDER.previous. With resume the
    old one goes on instead, and is refused by name where a setting or an input (the data, p, the
    text of regularizer.py: fingerprints) is not what it began with.
    """
    FREE = ("out_dir", "resume", "device", "recompute", "compile")  # may differ in a continuation

    def __init__(self, kind, config, inputs, writes=True):
        self.folder, self.kind, self.writes = Path(config.out_dir), kind, writes
        self.settings = {key: value for key, value in vars(config).items() if key not in self.FREE}
        self.inputs, self.checkpoint = inputs, None
        if config.resume:
            self.checkpoint = load_checkpoint(self.folder, kind)
            self.refuse_others()
        elif writes and self.holds_run(self.folder):
            previous = Path(f"{self.folder}.previous")
            if self.holds_run(previous):
                shutil.rmtree(previous)
            self.folder.rename(previous)
            print(f"the run that was in {self.folder} is kept as {previous}")
        if writes:
            self.folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def holds_run(folder):
        return (folder / "log.jsonl").exists() or (folder / "ckpt.pt").exists()

    def refuse_others(self):
        """A UserError that names the first setting or input which is not the checkpoint's."""
        settings, inputs = self.checkpoint["settings"], self.checkpoint["inputs"]
        others = [f"--{key}={settings.get(key)}, not {value}"
                  for key, value in self.settings.items() if settings.get(key) != value]
        others += [f"another {key} than there is now" for key, value in self.inputs.items()
                   if inputs.get(key) != value]
        if others:
            raise UserError(f"{self.folder} holds a run with {others[0]}; it goes on only as it "
                            "began. Start anew without --resume=True")

    def restore(self, model, optimizer):
        """Load the checkpoint, if any, into model and optimizer; returns the next step's number."""
        if self.checkpoint is None:
            return 0
        model.load_state_dict(self.checkpoint["model"])
        optimizer.load_state_dict(self.checkpoint["optimizer"])
        step, log = self.checkpoint["step"], self.folder / "log.jsonl"
        if self.writes and log.exists():    # what was logged after the checkpoint is logged again
            lines = log.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("}\n")]
            write_text(log, "".join(line for line in whole if json.loads(line)["step"] <= step))
        return step

    def log(self, record):
        """Append one line to log.jsonl."""
        if self.writes:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    def save(self, step, model, optimizer, **more):
        """Write ckpt.pt: step updates are done."""
        checkpoint = dict(kind=self.kind, layout=LAYOUT, settings=self.settings, inputs=self.inputs,
                          step=step, model=model.state_dict(), optimizer=optimizer.state_dict(),
                          **more)
        if self.writes:
            write_atomically(self.folder / "ckpt.pt", partial(save_tensors, checkpoint))
