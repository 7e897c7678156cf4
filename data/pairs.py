"""Reading JSONL files of pairs, of labelled responses, of candidates and of steps, and checking every row.

Pairs come in any of TRL's four forms: `prompt`, `chosen`, `rejected` as strings; the same without
`prompt` (what the two texts share, cut at a turn, is the prompt); and both with lists of
{"role", "content"} messages. `chosen` and `rejected` may also be lists of equally many strings from
the plainest style to the richest, as in RM-Bench: every chosen text then meets every rejected one.
Optional: `id`, `subset`. Labelled responses: `prompt`, `completion`, `label` (true or false).
Candidates: `prompt`, `responses: [{"text", "correct"}, ...]`, with each one's final `answer` where votes are
counted. Steps: `prompt`, `steps`, `first_error` (from 0; -1 where every step is right).

Whole-file errors are a UserError. A bad row is reported with file, row and reason, counted and left
out; with strict=True the first one is an error.
"""
import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from config import UserError

ROLES = {"system": "\n\nSystem: ", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
TURN = "\n\nAssistant:"  # a dialogue's prompt ends here, without a space
SHOWN = 5                # bad rows printed before they are only counted


class BadRow(Exception):
    """Why one row cannot be used."""


@dataclass(frozen=True)
class Pair:
    prompt: str
    chosen: str
    rejected: str
    id: str = ""
    subset: str = ""
    cell: tuple = ()    # RM-Bench: the styles of chosen and rejected, (0, 0) to (2, 2)


@dataclass(frozen=True)
class Labelled:
    prompt: str
    completion: str
    label: bool         # whether the response is correct
    id: str = ""


@dataclass(frozen=True)
class Candidates:
    prompt: str
    responses: tuple    # texts
    correct: tuple      # a number each, True or False counting as 1 or 0
    id: str = ""
    answers: tuple = () # final answers, where every response has one


@dataclass(frozen=True)
class Steps:
    prompt: str
    steps: tuple        # texts
    first_error: int    # the first wrong step, from 0; -1: none
    id: str = ""
    subset: str = ""


def read_pairs(path, strict=False, as_dialogue=False):
    """JSONL file -> (list of Pair, number of bad rows). as_dialogue: plain prompts become one Human turn."""
    return read_rows(path, lambda row: parse_pairs(row, as_dialogue), strict)


def read_labelled(path, strict=False, as_dialogue=False):
    """JSONL file -> (list of Labelled, number of bad rows)."""
    return read_rows(path, lambda row: parse_labelled(row, as_dialogue), strict)


def read_candidates(path, strict=False, as_dialogue=False):
    """JSONL file -> (list of Candidates, number of bad rows)."""
    return read_rows(path, lambda row: parse_candidates(row, as_dialogue), strict)


def read_steps(path, strict=False, as_dialogue=False):
    """JSONL file -> (list of Steps, number of bad rows)."""
    return read_rows(path, lambda row: parse_steps(row, as_dialogue), strict)


def read_rows(path, parse, strict):
    """Apply parse (object -> list) to every line; returns (all results, number of bad rows)."""
    found, bad, readable = [], 0, 0
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            continue
        try:
            row = decode_row(line)
            readable += 1
            found += parse(row)
        except BadRow as reason:
            if strict:
                raise UserError(f"{path}, row {number}: {reason}") from None
            bad += 1
            if bad <= SHOWN:
                print(f"left out: {path}, row {number}: {reason}")
    if bad > SHOWN:
        print(f"left out: {path}: {bad - SHOWN} more bad rows")
    if not readable:
        raise UserError(f"{path} holds no JSON lines; one object per line is expected")
    if not found:
        raise UserError(f"{path} has no usable row ({bad} bad)")
    return found, bad


def lines_of(path):
    """The file's lines one by one, split at \\n alone (texts may hold other line separators), \\r\\n read as \\n."""
    path, start = Path(path), 0
    if not path.is_file():
        raise UserError(f"{path} is {'a folder, not a file' if path.is_dir() else 'missing: no such file'}")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for line in file:
                yield line.decode("utf-8" if start else "utf-8-sig").removesuffix("\n").removesuffix("\r")
                start += len(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {start + error.start})") from None
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None


def decode_row(line):
    try:
        row = json.loads(line)
    except ValueError as error:  # JSONDecodeError, and integers too long to convert
        raise BadRow(f"broken JSON ({error})") from None
    except RecursionError:
        raise BadRow("JSON nested too deeply") from None
    if not isinstance(row, dict):
        raise BadRow(f"a {type(row).__name__} where an object is expected")
    return row


def parse_pairs(row, as_dialogue):
    """One object -> its pairs (nine for RM-Bench's lists of three, else one)."""
    for key in ("chosen", "rejected"):
        if key not in row:
            raise BadRow(f"no {key!r}")
    label = {"id": name_of(row, "id"), "subset": name_of(row, "subset")}
    chosen, rejected = row["chosen"], row["rejected"]
    if is_list_of(str, chosen) and is_list_of(str, rejected):
        if len(chosen) != len(rejected):
            raise BadRow(f"{len(chosen)} chosen and {len(rejected)} rejected texts")
        meta = row.get("meta") if isinstance(row.get("meta"), dict) else {}
        label["subset"] = name_of(row, "domain") or name_of(meta, "domain") or label["subset"]      # scored by domain
        return [checked(*dialogue(row.get("prompt"), a, b, as_dialogue=as_dialogue), **label, cell=(i, j) if len(chosen) > 1 else ())
                for i, a in enumerate(chosen) for j, b in enumerate(rejected)]
    if "prompt" not in row:
        prompt, chosen, rejected = split_prompt(chosen, rejected)
    else:
        prompt = row["prompt"]
    return [checked(*dialogue(prompt, chosen, rejected, as_dialogue=as_dialogue), **label)]


def parse_labelled(row, as_dialogue):
    """One object -> one Labelled."""
    prompt, completion = dialogue(row.get("prompt"), row.get("completion"), as_dialogue=as_dialogue)
    check_text("prompt", prompt)
    check_text("completion", completion)
    if not isinstance(row.get("label"), (bool, int)) or row["label"] not in (0, 1):
        raise BadRow("no 'label', or one that is not true or false")
    return [Labelled(prompt, completion, bool(row["label"]), name_of(row, "id"))]


def parse_candidates(row, as_dialogue):
    """One object -> one Candidates."""
    responses = row.get("responses")
    if not is_list_of(dict, responses):
        raise BadRow("no 'responses', or not a list of objects")
    texts = [response.get("text") for response in responses]
    prompt, *texts = dialogue(row.get("prompt"), *texts, as_dialogue=as_dialogue)
    check_text("prompt", prompt)
    if not all(isinstance(text, str) for text in texts):    # an empty one is a response too
        raise BadRow("a response without 'text'")
    correct = [response.get("correct") for response in responses]
    if not all(isinstance(value, (bool, int, float)) and abs(value) < 1e30 for value in correct):
        raise BadRow("a response without 'correct' (true, false or a finite number)")
    answers = [name_of(response, "answer").strip() for response in responses]
    return [Candidates(prompt, tuple(texts), tuple(map(float, correct)), name_of(row, "id"),
                       tuple(answers) if all(answers) else ())]


def parse_steps(row, as_dialogue):
    """One object -> one Steps."""
    steps, error = row.get("steps"), row.get("first_error")
    if not is_list_of(str, steps) or not all(step.strip() for step in steps):
        raise BadRow("no 'steps', or not a list of texts")
    if not isinstance(error, int) or isinstance(error, bool) or not -1 <= error < len(steps):
        raise BadRow(f"'first_error' is not a whole number from -1 to {len(steps) - 1}")
    prompt, first = dialogue(row.get("prompt"), steps[0], as_dialogue=as_dialogue)
    check_text("prompt", prompt)
    return [Steps(prompt, (first, *steps[1:]), error, name_of(row, "id"), name_of(row, "subset"))]


def name_of(row, key):
    """An optional label as text, '' where it is absent."""
    return "" if row.get(key) is None else str(row[key])


def dialogue(prompt, *responses, as_dialogue):
    """Prompt and responses, with messages (or, as_dialogue, a plain prompt) written as dialogue text."""
    if is_list_of(dict, prompt):
        return render(prompt) + TURN, *(" " + render_reply(reply) for reply in responses)
    if as_dialogue and isinstance(prompt, str) and prompt.strip() and TURN not in prompt:
        spaced = (" " + text if isinstance(text, str) and text.strip() else text for text in responses)
        return ROLES["user"] + prompt + TURN, *spaced
    return prompt, *responses


def render(messages):
    """Messages -> '\\n\\nHuman: ...\\n\\nAssistant: ...' text."""
    for message in messages:
        if not isinstance(message.get("role"), str) or message["role"] not in ROLES:
            raise BadRow(f"a message without a known 'role' ({', '.join(ROLES)})")
        check_text("a message's content", message.get("content"))
    return "".join(ROLES[message["role"]] + message["content"] for message in messages)


def render_reply(reply):
    """The response of a conversational pair: one assistant message in a list, or a plain string."""
    if isinstance(reply, str):
        return reply
    if not is_list_of(dict, reply) or len(reply) != 1 or reply[0].get("role") != "assistant":
        raise BadRow("a response that is not one assistant message")
    check_text("response", reply[0].get("content"))
    return reply[0]["content"]


def contrasts(labelled):
    """Every correct response of a prompt against every incorrect one of it: a list of Pair."""
    sides = {}
    for item in labelled:
        sides.setdefault(item.prompt, ([], []))[not item.label].append(item.completion)
    return [Pair(prompt, chosen, rejected) for prompt, (correct, incorrect) in sides.items()
            for chosen in correct for rejected in incorrect if chosen != rejected]


def split_prompt(chosen, rejected):
    """Whole texts or conversations -> (prompt, chosen, rejected): what both share, cut at a turn."""
    if is_list_of(dict, chosen) and is_list_of(dict, rejected):
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        return chosen[:shared], chosen[shared:], rejected[shared:]
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        check_text(name, text)
    length = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    cut = chosen.rfind(TURN, 0, length) + len(TURN)
    if cut < len(TURN):  # no dialogue: cut before the last space that both share
        cut = max(chosen.rfind(" ", 0, length), 0)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def checked(prompt, chosen, rejected, id="", subset="", cell=()):
    for name, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        check_text(name, text)
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    return Pair(prompt, chosen, rejected, id, subset, cell)


def check_text(name, text):
    if not isinstance(text, str):
        raise BadRow(f"{name} is missing" if text is None else f"{name} is not text but {type(text).__name__}")
    if not text.strip():
        raise BadRow(f"{name} is empty")


def is_list_of(kind, value):
    return isinstance(value, list) and len(value) > 0 and all(isinstance(item, kind) for item in value)
