"""Files that are never half written nor read damaged, and the folder of a run.

What one stage hands to another carries a checksum, so that a file which was cut, damaged or edited
since it was written is refused in one line. Nothing that is read is ever executed.
"""
import glob
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from config import HERE, Stopped, Stopping, UserError, check_finite

try:
    import fcntl
except ImportError:     # Windows: a folder that is in use is not noticed
    fcntl = None

EDITION = "3"   # of what is written; part of every checksum
OURS = re.compile(r"(?!out/).*\.(py|md|css|sh)|LICENSE|requirements\.txt|pyproject\.toml|tests/.*"
                  r"|data/lengths\.json|lab/(study|real)\.jsonl|exercises/experiment\.json")


# Writing -----------------------------------------------------------------------------------------

def write_atomically(path, write, ours=False):
    """Call write(temporary_path), flush it to disk and rename it to path: all of it or none. A link
    stays one, and what it points to is written; a pipe or a device is written through."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            return write(path)
        path = path.resolve()
        inside = not ours and path.exists() and path.is_relative_to(HERE)
        if inside and OURS.fullmatch(path.relative_to(HERE).as_posix()) or ".git" in path.parts:
            raise UserError(f"{path} belongs to the project; name another file to write")
        with temporary_beside(path) as temporary:
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error})") from None


@contextmanager
def temporary_beside(path):
    """A name for what will take path's place. What is still there at the end goes, and so does what
    processes that were killed have left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if old.suffix[1:].isdecimal() and not is_running(int(old.suffix[1:])):
            remove(old)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
    finally:
        remove(temporary)


def is_running(process):
    if os.name == "nt":     # there 0 is a Ctrl-C
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:     # somebody else's
        pass
    return True


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path, text, ours=False):
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), ours)


def write_json(path, value):
    """Write a dictionary with its checksum."""
    try:
        value = json.loads(json.dumps(value, allow_nan=False))
    except ValueError:
        raise UserError(f"a result for {path} is not finite; nothing was written") from None
    write_text(path, json.dumps({"checksum": checksum(value), **value}, indent=1) + "\n")


def write_records(path, records):
    write_text(path, "".join(json.dumps(one, allow_nan=False) + "\n" for one in records), True)


# Reading -----------------------------------------------------------------------------------------

def load_json(path, made_by):
    """A JSON object that may be anybody's."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; make it with {made_by}") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged; make it again with {made_by}")
    return value


def read_json(path, made_by):
    """A JSON object that write_json wrote."""
    value = load_json(path, made_by)
    if value.pop("checksum", None) != checksum(value):
        raise UserError(f"{path} was damaged, edited or written by another edition; make it again "
                        f"with {made_by}")
    return value


def read_records(path):
    """The objects of a file of JSON lines that write_records wrote; none where there is no file."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except ValueError:
        raise UserError(f"{path} is damaged; take out the lines that are no JSON objects") from None


def checksum(value):
    return fingerprint(EDITION, json.dumps(value, sort_keys=True))


def file_digest(path):
    """The sha256 of a file; a UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it again") from None


def fingerprint(*parts):
    """A sha256 over tensors, arrays, strings, and dictionaries and lists of them and of numbers."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, dict):
            part = "".join(f"{key}:{fingerprint(part[key])}" for key in sorted(part, key=str))
        if isinstance(part, (list, tuple)):
            part = "".join(map(fingerprint, part))
        if isinstance(part, torch.Tensor):
            if part.nbytes > part.untyped_storage().nbytes():
                raise ValueError("a tensor of more values than are stored")
            part = part.numpy(force=True)
        if not isinstance(part, str) and not hasattr(part, "reshape"):
            part = repr(part)
        digest.update(part.encode() if isinstance(part, str) else part.reshape(-1))
    return digest.hexdigest()


def load_checkpoint(path, *kinds):
    """The dictionary saved by Run.save, of a file or the folder that holds it; kinds: 'generator',
    'reward model' or 'policy'."""
    path = Path(path) / "ckpt.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; name the --out_dir of a finished run")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        whole = checkpoint.pop("checksum", None) == fingerprint(EDITION, checkpoint)
        kind = checkpoint.get("kind")
    except Exception as error:  # whatever a file of other bytes makes the unpickler raise
        raise UserError(f"{path} is no checkpoint, or cut short ({type(error).__name__})") from None
    if kind not in kinds:
        raise UserError(f"{path} holds no {' or '.join(kinds)}")
    if not whole:
        raise UserError(f"{path} was damaged, edited or written by another edition; train it again")
    return checkpoint


# Runs --------------------------------------------------------------------------------------------

LOCKED = {}     # (device, inode) of a folder: the descriptor that locks it while this process lives


def lock(folder):
    """Keep other processes from running in a folder; a UserError where one does."""
    descriptor = os.open(folder, os.O_RDONLY) if fcntl else None
    key = fcntl and os.fstat(descriptor)[1:3]
    if key in LOCKED:
        os.close(descriptor)
    elif fcntl:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"{folder} is in use by a running process; wait, or name another "
                            "--out_dir") from None
        except OSError:     # a file system that has no locks
            pass
        LOCKED[key] = descriptor


def save_tensors(checkpoint, path):
    try:
        torch.save(checkpoint, path)
    except RuntimeError as error:       # what it makes of a full disk
        raise OSError(str(error).splitlines()[0]) from None


class Run:
    """An output folder: ckpt.pt and log.jsonl of one training run with one set of settings.

    Starting a run in a folder that holds one keeps the old one as FOLDER.previous. With resume the
    old one goes on instead, and is refused by name where a setting or an input (the data, p, the
    text of regularizer.py: fingerprints) is not what it began with. From restore to the last save a
    signal that asks to stop waits for the next save; a loop saves where it is Stopping.asked.
    """
    FREE = ("out_dir", "resume", "device", "recompute", "compile")  # may differ in a continuation

    def __init__(self, kind, config, inputs, writes=True):
        self.folder, self.kind, self.writes = Path(config.out_dir), kind, writes
        self.settings = {key: value for key, value in vars(config).items() if key not in self.FREE}
        self.inputs, self.checkpoint = inputs, None
        if writes and self.folder.is_dir():
            lock(self.folder)
        if config.resume:
            self.checkpoint = load_checkpoint(self.folder, kind)
            self.refuse_others()
        elif writes and self.holds_run(self.folder):
            previous = Path(f"{self.folder}.previous")
            if self.holds_run(previous):
                shutil.rmtree(previous)
            self.folder.rename(previous)
            print(f"the run in {self.folder} is kept as {previous}, in place of any before")
        if writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock(self.folder)

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
        step = self.checkpoint["step"] if self.checkpoint else 0
        alone = int(os.environ.get("WORLD_SIZE", 1)) == 1       # others would wait for us
        Stopping.patient = alone and step < self.settings["steps"]
        Stopping.saved = self.checkpoint is not None
        if not Stopping.saved:
            return 0
        model.load_state_dict(self.checkpoint["model"])
        optimizer.load_state_dict(self.checkpoint["optimizer"])
        if self.writes and self.log_size:   # what was logged after the checkpoint is logged again
            os.truncate(self.folder / "log.jsonl", min(self.checkpoint["logged"], self.log_size))
        return step

    @property
    def log_size(self):
        log = self.folder / "log.jsonl"
        return log.stat().st_size if log.exists() else 0

    def log(self, record):
        """Append one line to log.jsonl."""
        if self.writes:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    def save(self, step, model, optimizer, tokenizer, **more):
        """Write ckpt.pt: step updates are done. Then stop, if asked to."""
        checkpoint = dict(kind=self.kind, settings=self.settings, inputs=self.inputs, step=step,
                          model=model.state_dict(), optimizer=optimizer.state_dict(),
                          model_config=vars(model.model.config), tokenizer=tokenizer.to_dict(),
                          logged=self.log_size, **more)
        check_finite(step, *(weight.sum().item() for weight in checkpoint["model"].values()))
        if self.writes:
            checkpoint["checksum"] = fingerprint(EDITION, checkpoint)
            write_atomically(self.folder / "ckpt.pt", partial(save_tensors, checkpoint))
        Stopping.patient = Stopping.patient and step < self.settings["steps"]
        Stopping.saved = True
        if Stopping.asked:
            raise Stopped(Stopping.asked)
