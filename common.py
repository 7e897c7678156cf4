"""What all scripts share: settings, devices, files, and runs that can be resumed.

A script declares its settings as one frozen dataclass. Each field is an option
`--name=value`, and the comment behind it is its line in `--help`.
"""

import argparse
import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path


def print_uncaught(kind, error, traceback):
    """Print an uncaught exception. Ctrl-C before run_script is one line."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped by SIGINT", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def exit_at_once(number, frame):
    os.write(2, b"stopped by SIGINT\n")
    os._exit(128 + number)


sys.excepthook = print_uncaught
# While torch is imported, its C++ code may swallow a KeyboardInterrupt.
in_main_thread = threading.current_thread() is threading.main_thread()
replaces_handler = (
    in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
)
if replaces_handler:
    signal.signal(signal.SIGINT, exit_at_once)
# Idle OpenMP threads wait by spinning. Long spins slow down a busy machine a lot.
# GNU OpenMP reads GOMP_SPINCOUNT when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
import torch

if replaces_handler:
    signal.signal(signal.SIGINT, signal.default_int_handler)

try:
    import fcntl
except ImportError:  # Windows has no file locks of this kind
    fcntl = None

ROOT = Path(__file__).resolve().parent
FORMAT_VERSION = 5  # of datasets, checkpoints and results; raised when they change
POSITIVE = 1e-9  # lower bound of settings that must be above 0
RUN_RESULTS = ("eval.json", "results.json", "p.json", "p.npy")
RUN_FILES = ("ckpt.pt", "log.jsonl", *RUN_RESULTS)
# Settings that may differ when a run is resumed.
RESUMABLE_CHANGES = ("out_dir", "resume", "device", "gradient_checkpointing", "compile")
# Old name -> new name, for the error message about an unknown setting.
RENAMED_SETTINGS = {
    "unfrozen": "train_last_layers",
    "recompute": "gradient_checkpointing",
    "probs": "p_source",
    "readout": "prefix_reward",
    "halve": "halving_lengths",
    "every": "subsample",
    "skip_bad": "max_bad_fraction",
    "as_dialogue": "wrap_as_chat",
    "gold": "reward_rule",
    "late": "filler_clauses_first",
    "noise": "label_noise",
    "pairs_from": "pairs_split",
}


class UserError(Exception):
    """A mistake that the user can correct: printed as one line, with exit status 2."""


class Stopped(BaseException):
    """Raised when a signal asks the process to stop. args[0] is its number."""


# Settings -----------------------------------------------------------------------------


def run_script(config_class, main):
    """Parse the command line into config_class, print the settings, run main(config).

    Errors of the user and signals end the process with one line on standard error.
    """
    for name in ("stdout", "stderr"):  # None if the shell has closed it (`>&-`)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, raise_stopped)
    try:
        config = parse_settings(config_class, sys.argv[1:])
        check_launcher()
        if is_main_process():
            print_settings(config)
        main(config)
    except BrokenPipeError:  # whoever read the output has ended, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError, MemoryError) as error:
        exit_with(2, f"error: {error}")
    except RuntimeError as error:
        if "allocate" not in str(error):  # torch's word when memory runs out
            raise
        exit_with(2, f"error: out of memory: {error}")
    except Stopped as stopped:
        message = f"stopped by {signal.Signals(stopped.args[0]).name}"
        if hasattr(config_class, "resume"):
            message += ". --resume=True continues from the last checkpoint, if any"
        exit_with(128 + stopped.args[0], message)


def raise_stopped(number, frame):
    raise Stopped(number)


def exit_with(status, message):
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(status)


def check_launcher():
    """Raise a UserError if only a part of torchrun's variables is set."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    for name in ("RANK", "WORLD_SIZE"):
        if missing and name in os.environ:
            raise UserError(
                f"{name} is set without {', '.join(missing)}. Start several processes "
                f"with torchrun, or one after `unset {name}`"
            )


def is_main_process():
    """Whether this process prints and writes files. torchrun starts several."""
    return os.environ.get("RANK", "0") == "0"


class SettingsParser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the settings)")


def parse_settings(config_class, arguments):
    """['--name=value', ...] -> config_class."""
    parser = SettingsParser(
        description=inspect.getmodule(config_class).__doc__,
        usage="%(prog)s [--setting=value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = inspect.getsource(config_class)
    comments = dict(re.findall(r"^ +(\w+): .*?# (.*)$", source, flags=re.MULTILINE))
    for field in dataclasses.fields(config_class):
        help_text = f"{comments.get(field.name, '')} [{field.default}]"
        parser.add_argument(
            f"--{field.name}",
            type=PARSERS[type(field.default)],
            default=field.default,
            metavar="",
            help=help_text.replace("%", "%%"),
        )
    settings, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UserError(explain_unknown(unknown[0], list(vars(settings))))
    return config_class(**vars(settings))


def parse_bool(text):
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"takes True or False, not {text!r}")
    return text == "True"


PARSERS = {
    bool: parse_bool,
    int: int,
    float: float,
    str: os.path.expanduser,
}


def explain_unknown(argument, names):
    """The error message for an argument that is not a setting."""
    name = argument.removeprefix("--").partition("=")[0]
    if not argument.startswith("--"):
        return f"cannot read {argument!r}. Write --setting=value"
    new_name = RENAMED_SETTINGS.get(name)
    if new_name in names:
        return f"--{name} is now called --{new_name}"
    meant = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    return f"unknown setting --{name}. Did you mean --{meant}? (--help lists them)"


def print_settings(config):
    """Print the settings that differ from their defaults."""
    changed = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            changed.append(f"--{field.name}={value}")
    print("settings:", "  ".join(changed) or "all defaults (--help lists them)")


def check_range(config, low, high, *names):
    """Raise a UserError for the first of these settings outside [low, high]."""
    for name in names:
        value = getattr(config, name)
        if low <= value <= high:
            continue  # NaN fails every comparison
        bounds = "above 0" if low == POSITIVE else f"at least {low}"
        if high < 10**9:
            bounds += f" and at most {high}"
        raise UserError(f"--{name} must be {bounds}, not {value}")


def check_choice(name, value, options):
    if value not in options:
        choices = ", ".join(options)
        raise UserError(f"unknown {name} {value!r}. Choose one of: {choices}")


def check_all_finite(last_step, history):
    """check_finite for all steps up to last_step. history: a tensor for each step."""
    for i, values in enumerate(torch.stack(history).tolist()):
        check_finite(last_step - len(history) + 1 + i, *values)


def check_finite(step, *values):
    """End a run whose loss, gradient or weights are not finite."""
    if not all(math.isfinite(value) for value in values):
        raise UserError(
            f"loss, gradient or weights are not finite at step {step}. The last "
            "checkpoint, if any, is kept. Try a smaller --learning_rate"
        )


# Devices ------------------------------------------------------------------------------


def pick_device(name, deterministic=False):
    """'auto', 'cpu', 'cuda' or 'cuda:N' -> torch.device."""
    check_choice("device", name.partition(":")[0], ("auto", "cpu", "cuda"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device={name} cannot be used: {reason}") from None
    torch.backends.cuda.matmul.allow_tf32 = True
    # cuDNN's attention compiles a plan for every new sequence length.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def autocast(device, dtype):
    """Mixed precision for a forward pass. 'auto': bfloat16 on CUDA, else float32."""
    check_choice("dtype", dtype, ("auto", "float32", "bfloat16"))
    low = dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=low)


# Files --------------------------------------------------------------------------------


def write_temporary(path, write):
    """Call write(PATH.tmp) and flush that file to disk. Return its path."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error.strerror or error})") from None
    return temporary


def write_atomically(path, write):
    """Call write(PATH.tmp), flush that file to disk and rename it to path.

    A kill leaves either the old file or the new one. If path is a link, the file that
    it points to is replaced.
    """
    path = Path(path).resolve()
    os.replace(write_temporary(path, write), path)


def format_json(value):
    """A dictionary as JSON text with a checksum, which read_json verifies."""
    try:
        value = json.loads(json.dumps(value, allow_nan=False))
    except ValueError:
        raise UserError("a result is not finite, so nothing was written") from None
    return json.dumps({"checksum": checksum(value), **value}, indent=1) + "\n"


def write_json(path, value):
    text = format_json(value)
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def locate(path):
    """A path for error messages, with the folder that a relative one starts from."""
    return str(path) if Path(path).is_absolute() else f"{path} (in {Path.cwd()})"


def load_json(path, made_by):
    """Read any JSON object. made_by: the command that makes the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{locate(path)} is missing. Make it with {made_by}") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged. Make it again with {made_by}")
    return value


def read_json(path, made_by):
    """Read a dictionary that write_json wrote, and verify its checksum."""
    value = load_json(path, made_by)
    if value.pop("checksum", None) != checksum(value):
        raise UserError(
            f"{path} is damaged, was edited, or comes from another version of this "
            f"project. Make it again with {made_by}"
        )
    return value


def checksum(value):
    return sha256_of(str(FORMAT_VERSION), json.dumps(value, sort_keys=True))


def sha256_of(*parts):
    """The sha256 of texts or bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def file_sha256(path):
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None


def open_output(path, *inputs):
    """Open an output file that the user named.

    Refuses to overwrite an input, or a file of a run or dataset in an input folder.
    """
    target = Path(path).resolve()
    for source in map(Path, filter(None, inputs)):
        is_run_file = target.name in RUN_FILES or target.suffix in (".npy", ".json")
        inside = target.parent == source.resolve() and target.exists() and is_run_file
        if inside or target == source.resolve():
            raise UserError(f"{path} is an input of this command. Name another file")
    return open(path, "w", encoding="utf-8")


# Runs ---------------------------------------------------------------------------------


@contextmanager
def lock(folder):
    """Create a folder and keep other processes from running in it."""
    if fcntl is None or not is_main_process():
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another process is running in {folder}. Wait, or name another folder"
        ) from None
    except OSError:
        pass  # this file system has no locks
    try:
        yield
    finally:
        os.close(descriptor)


def load_checkpoint(path, *kinds):
    """Read a checkpoint that Run.save wrote.

    path: ckpt.pt or the folder that holds it. It is added to the checkpoint as "path"
    kinds: the kinds of model that are accepted ("generator", "reward model", "policy")
    """
    path = Path(path)
    if path.is_dir():
        path = path / "ckpt.pt"
    if not path.is_file():
        raise UserError(
            f"there is no checkpoint at {locate(path)}. Name the folder of a run"
        )
    try:
        checkpoint = read_archive(path)
        kind, version = checkpoint.get("kind"), checkpoint.get("format")
    except Exception as error:  # damaged bytes can make the unpickler raise anything
        reason = type(error).__name__
        raise UserError(f"{path} is not a checkpoint, or damaged ({reason})") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} comes from another version of this project. Train again"
        )
    if kind not in kinds:
        raise UserError(f"{path} holds a {kind}, not a {' or '.join(kinds)}")
    checkpoint["path"] = str(path)
    return checkpoint


def find_near(checkpoint, path):
    """Locate a relative path that a checkpoint's settings name.

    Tries every parent folder of the checkpoint. If none has it, returns the path, which
    is then relative to the current folder.
    """
    for folder in Path(checkpoint["path"]).absolute().parents:
        if (folder / path).exists():
            return folder / path
    return Path(path)


def read_archive(path):
    """Load a file of torch.save. Executes nothing in it, and checks its CRCs.

    Tensors that are never used, such as the optimizer's, take no memory.
    """
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
        if size > os.path.getsize(path) or archive.testzip() is not None:
            raise ValueError("wrong size or CRC")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def save_tensors(checkpoint, path):
    try:
        torch.save(checkpoint, path)
    except RuntimeError as error:  # raised by torch.save when the disk is full
        raise OSError(str(error).splitlines()[0]) from None


def is_finished(checkpoint):
    return checkpoint["step"] >= checkpoint["settings"]["steps"]


class Run:
    """The checkpoint and the log of one training run: OUT_DIR/ckpt.pt and log.jsonl.

    Until its first checkpoint, a new run writes only log.jsonl.new. At that checkpoint,
    an older finished run in the folder is copied to OUT_DIR/previous and then removed.
    So the older run is complete in OUT_DIR or in OUT_DIR/previous, whenever the new one
    fails or is killed.

    inputs: fingerprints of what the run depends on (data, p, regularizer.py). A run is
    only resumed with the same inputs and settings, except for RESUMABLE_CHANGES.
    """

    def __init__(self, kind, config, inputs, writes=True):
        self.kind, self.inputs, self.writes = kind, inputs, writes
        self.folder, self.is_new = Path(config.out_dir), not config.resume
        self.settings = {}
        for name, value in dataclasses.asdict(config).items():
            if name not in RESUMABLE_CHANGES:
                self.settings[name] = value
        self.log_path = self.folder / "log.jsonl"
        if self.is_new:
            self.log_path = self.folder / "log.jsonl.new"
            if writes:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.log_path.write_text("")
        else:
            self.checkpoint = load_checkpoint(self.folder, kind)
            self.check_unchanged(self.checkpoint)

    def check_unchanged(self, checkpoint):
        """Raise a UserError if settings or inputs differ from the checkpoint's."""
        for name, value in self.settings.items():
            saved = checkpoint["settings"].get(name)
            if saved != value:
                raise UserError(
                    f"{self.folder} was trained with --{name}={saved}, not {value}. "
                    "Use that setting, or start again without --resume"
                )
        for name, value in self.inputs.items():
            if checkpoint["inputs"].get(name) != value:
                raise UserError(
                    f"{self.folder} was trained with another {name}. "
                    "Start again without --resume"
                )

    def resume(self, model, optimizer):
        """Load the checkpoint, if resuming. Return the number of the next step."""
        if self.is_new:
            return 0
        model.load_state_dict(self.checkpoint["model"])
        optimizer.load_state_dict(self.checkpoint["optimizer"])
        if self.writes and self.log_path.exists():
            # Steps after the checkpoint are run, and logged, again.
            size = min(self.checkpoint["log_size"], self.log_path.stat().st_size)
            os.truncate(self.log_path, size)
        return self.checkpoint["step"]

    def log(self, record):
        """Append one line to the log."""
        if self.writes:
            with open(self.log_path, "a") as file:
                file.write(json.dumps(record) + "\n")

    def save(self, step, model, optimizer, tokenizer, **extras):
        """Write ckpt.pt after `step` updates."""
        weights = model.state_dict()
        check_finite(step, *(weight.sum().item() for weight in weights.values()))
        if not self.writes:
            return
        checkpoint = {
            "kind": self.kind,
            "format": FORMAT_VERSION,
            "settings": self.settings,
            "inputs": self.inputs,
            "step": step,
            "model": weights,
            "optimizer": optimizer.state_dict(),
            "model_config": dataclasses.asdict(model.config),
            "tokenizer": tokenizer.to_dict(),
            "log_size": self.log_path.stat().st_size if self.log_path.exists() else 0,
            **extras,
        }
        path = (self.folder / "ckpt.pt").resolve()
        temporary = write_temporary(path, lambda file: save_tensors(checkpoint, file))
        if self.is_new:
            self.replace_earlier_run(path)
        os.replace(temporary, path)

    def replace_earlier_run(self, checkpoint_path):
        """Copy a finished run to previous/, then remove the earlier run's files."""
        try:
            finished = is_finished(read_archive(checkpoint_path))
        except Exception:  # missing, or no checkpoint
            finished = False
        if finished:
            for name in RUN_FILES:
                source, copy = self.folder / name, self.folder / "previous" / name
                copy.unlink(missing_ok=True)
                if source.exists():
                    write_atomically(copy, partial(shutil.copyfile, source))
            print(f"the finished run in {self.folder} is kept in {copy.parent}")
        # The checkpoint first. Without it, the next start leaves previous/ alone.
        checkpoint_path.unlink(missing_ok=True)
        for name in RUN_RESULTS:
            (self.folder / name).unlink(missing_ok=True)
        os.replace(self.log_path, self.folder / "log.jsonl")
        self.log_path, self.is_new = self.folder / "log.jsonl", False
