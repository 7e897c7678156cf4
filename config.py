"""Settings from the command line, errors in one line, signals and devices.

A script declares one frozen dataclass; every field is set by `--key=value`, and a field's trailing
comment is its line in `--help`. Every mistake of the user is one line and exit status 2.
Left out on purpose: config files, nested settings, environment variables.
"""
import dataclasses
import difflib
import inspect
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:     # threads that spin for long while they wait make a busy
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")     # machine ten times slower; torch reads this
import torch

HERE = Path(__file__).resolve().parent
TINY = 1e-9     # as good as 0 for a setting that must not be 0
TAKES = {bool: "True or False", int: "a whole number", float: "a number"}


class UserError(Exception):
    """Something the user can put right: shown as one line, exit status 2, no traceback."""


class Stopped(BaseException):
    """The process was asked to stop by a signal, args[0]."""


class Stopping:
    """What a signal that asks to stop does: it ends the process with one line or, where a loop is
    patient, waits until its step is done and saved. A second one does not wait."""
    patient = False
    asked = None    # the signal that waits
    saved = False   # whether there is a checkpoint to go on from
    children = []   # commands that were started, in any thread

    @classmethod
    def receive(cls, number, frame):
        if not cls.patient or cls.asked:
            if number == signal.SIGTERM:    # a terminal sends the others to all processes
                for child in cls.children:
                    child.terminate()
            raise Stopped(number)
        cls.asked = number
        print("\nstopping when this step is done and saved", file=sys.stderr)


def run_script(config_class, main):
    """Parse the command line into config_class, print the settings and call main(config)."""
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    names = ("SIGINT", "SIGTERM", "SIGHUP")     # Windows lacks the last
    for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
        if signal.getsignal(number) != signal.SIG_IGN:      # nohup's choice stays
            signal.signal(number, Stopping.receive)
    try:
        config = parse(config_class, sys.argv[1:])
        if os.environ.get("RANK", "0") == "0":      # torchrun's first process speaks for all
            show(config)
        main(config)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):    # too little memory
            raise
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        resume = f"; {Path(sys.argv[0]).name} goes on with --resume=True" * Stopping.saved
        print(f"stopped by {signal.Signals(stopped.args[0]).name}{resume}", file=sys.stderr)
        sys.exit(128 + stopped.args[0])


def run_other(script, quiet=False, **settings):
    """Run another of our scripts as a command. quiet: show what it prints only where it fails. One
    that is running when this process is stopped is asked to stop too."""
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    if not quiet:
        print("+ python", script, *arguments, flush=True)
    pipe = subprocess.PIPE if quiet else None
    command = [sys.executable, HERE / script, *arguments]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as child:
        Stopping.children.append(child)     # to end one that has ended does nothing
        _, said = child.communicate()
    if child.returncode:
        why = said.strip() if quiet else "see above"
        raise UserError(f"python {script} {' '.join(arguments)} failed: {why}")


def parse(config_class, arguments):
    """['--key=value', ...] -> config_class. The value is all that follows the first '='; one that
    begins with ~ is a path in the user's home."""
    kinds = {field.name: type(field.default) for field in dataclasses.fields(config_class)}
    values = {}
    for argument in arguments:
        if argument in ("--help", "-h"):
            print(inspect.getmodule(config_class).__doc__, *usage(config_class), sep="\n")
            sys.exit(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            wanted = f"{argument}=VALUE" if argument.startswith("--") else "--key=value"
            raise UserError(f"cannot read {argument!r}; write {wanted} (--help lists them)")
        if key not in kinds:
            raise UserError(f"unknown setting --{key}; did you mean --{nearest(key, kinds)}? "
                            "(or see --help)")
        kind = kinds[key]
        try:
            values[key] = {"True": True, "False": False}[text] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise UserError(f"--{key} takes {TAKES[kind]}, not {text!r}") from None
        if kind is str:
            values[key] = ",".join(map(os.path.expanduser, text.split(",")))
    paths = [os.path.realpath(text) for text in values.values() if isinstance(text, str)]
    if values.get("json") and paths.count(os.path.realpath(values["json"])) > 1:
        raise UserError(f"--json={values['json']} is a file to read; name another to write")
    return config_class(**values)


def nearest(key, names):
    """The setting that was meant: the one of these initials (lr), or the one spelled most alike."""
    initials = {"".join(word[0] for word in name.split("_")): name for name in names if "_" in name}
    return initials.get(key) or difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]


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


def check_finite(step, *values):
    """Stop the run where a loss or a gradient is not a number; the checkpoint before it stays."""
    if not all(map(math.isfinite, values)):
        raise UserError(f"the loss or its gradient is not finite at step {step}; the last "
                        "checkpoint, if any, is kept. Try a smaller --learning_rate")


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
