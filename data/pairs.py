"""Files of JSON lines -> items (pairs, candidates, steps), all checked; and items -> Rows.

Pairs come in any of TRL's four forms: `prompt`, `chosen`, `rejected` as strings; the same without
`prompt` (what the two texts share, cut at a turn, is the prompt); and both with lists of
{"role", "content"} messages. `chosen` and `rejected` may also be lists of strings from the
plainest style to the richest, as in RM-Bench: every chosen text then meets every rejected one.
Candidates: `prompt`, `responses: [{"text", "correct"}, ...]`, with each one's final `answer` where
votes are counted; `prompt`, `completion`, `label` (true or false) is one candidate alone. Steps:
`prompt`, `steps`, `first_error` (from 0; -1: none). Optional: `id`, `subset`.

A bad row is left out and counted; the first few are printed with their number and the reason.
"""
import gzip
import json
import os
import zlib
from collections import Counter
from functools import partial
from itertools import accumulate, compress, product
from typing import NamedTuple

import numpy as np

from config import UserError
from data.dataset import listed, tokenise
from data.rows import Row
from data.tokenizer import SPEAKER

ROLES = {"system": "\n\nSystem: ", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
TURN = "\n\nAssistant:"     # a dialogue's prompt ends here, without a space
SHOWN = 5                   # bad rows printed before they are only counted


class BadRow(Exception):
    """Why one row cannot be used; bad rows are counted by what stands before ' ('."""


class Item(NamedTuple):
    prompt: str
    responses: tuple        # texts: chosen and rejected, candidates, or one solution
    correct: tuple = ()     # of candidates: a number each, True or False counting as 1 or 0
    answers: tuple = ()     # of candidates: their final answers, where every one has one
    ends: tuple = ()        # of a solution: where its steps end in the text
    first_error: int = -1   # of a solution: the first wrong step, from 0; -1: none
    id: str = ""
    subset: str = ""
    cell: tuple = ()        # RM-Bench: the styles of chosen and rejected, (0, 0) to (2, 2)


def read_items(path, parse, as_dialogue=False, left_out=None):
    """Yield what parse, one of the functions below, makes of each line; plain prompts become one
    Human turn with as_dialogue. left_out: a Counter of bad rows by reason; without it they pass in
    silence (where a file is read again)."""
    found = bad = 0
    for number, line in enumerate(lines_of(path), start=1):
        try:
            items = parse(decode_row(line), as_dialogue) if line.strip() else []
        except BadRow as reason:
            items, bad = [], bad + 1
            if left_out is not None:
                left_out[str(reason).partition(" (")[0]] += 1
                if bad <= SHOWN:
                    print(f"left out: {path}, row {number}: {reason}")
        found += len(items)
        yield from items
    if not found:
        raise UserError(f"{path} has no usable row ({bad} bad); one JSON object a line is expected")


def lines_of(path):
    """The lines of a file. Only \\n, \\r\\n and \\r end one: texts may hold U+2028 and its like."""
    try:
        opener = gzip.open if str(path).endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for line in file:
                yield line.rstrip("\r\n")
    except (UnicodeDecodeError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None


def decode_row(line):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:   # integers too long, lists too deep
        raise BadRow(f"broken JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadRow(f"a {type(row).__name__} where an object is expected")
    return row


# One object -> a list of items -------------------------------------------------------------------

def parse_pairs(row, as_dialogue=False):
    """-> one pair, or nine from RM-Bench's lists of three"""
    prompt, chosen, rejected = (row.get(key) for key in ("prompt", "chosen", "rejected"))
    subset, pairs = name_of(row, "subset"), []
    if is_list_of(str, chosen) and is_list_of(str, rejected):
        subset = name_of(row, "domain") or name_of(row.get("meta"), "domain") or subset
        if len(chosen) != len(rejected):
            raise BadRow(f"unequal numbers of chosen and rejected ({len(chosen)}, {len(rejected)})")
    else:
        if "prompt" not in row:
            prompt, chosen, rejected = split_prompt(chosen, rejected)
        chosen, rejected = [chosen], [rejected]
    for (i, a), (j, b) in product(enumerate(chosen), enumerate(rejected)):
        text, *responses = dialogue(as_dialogue, prompt, a, b)
        for name, one in zip(("prompt", "chosen", "rejected"), (text, *responses)):
            check_text(name, one)
        if responses[0] == responses[1]:
            raise BadRow("chosen and rejected are the same")
        pairs.append(Item(text, tuple(responses), id=name_of(row, "id"), subset=subset,
                          cell=(i, j) if len(chosen) > 1 else ()))
    return pairs


def parse_candidates(row, as_dialogue=False):
    """-> one item; an empty text is a response too"""
    responses = row.get("responses")
    if "completion" in row:
        responses = [{"text": row["completion"], "correct": row.get("label")}]
    if not is_list_of(dict, responses):
        raise BadRow("no 'responses', or not a list of objects")
    texts, correct = ([one.get(key) for one in responses] for key in ("text", "correct"))
    prompt, *texts = dialogue(as_dialogue, row.get("prompt"), *texts)
    check_text("prompt", prompt)
    if not is_list_of(str, texts):
        raise BadRow("a response without text")
    if not all(map(is_number, correct)):
        raise BadRow("a response without 'correct' or 'label' (true, false or a finite number)")
    answers = [name_of(one, "answer").strip() for one in responses]
    return [Item(prompt, tuple(texts), tuple(map(float, correct)),
                 tuple(answers) if all(answers) else ())]


def parse_steps(row, as_dialogue=False):
    """-> one item; its response is the steps, joined by newlines"""
    steps, error = row.get("steps"), row.get("first_error")
    if not is_list_of(str, steps) or not all(step.strip() for step in steps):
        raise BadRow("no 'steps', or not a list of texts")
    if type(error) is not int or error not in range(-1, len(steps)):
        raise BadRow(f"'first_error' is not a whole number (from -1 to {len(steps) - 1})")
    text = "\n".join(steps)
    prompt, spaced = dialogue(as_dialogue, row.get("prompt"), text)
    check_text("prompt", prompt)
    ends = accumulate((len(step) + 1 for step in steps), initial=len(spaced) - len(text))
    return [Item(prompt, (spaced,), ends=tuple(ends)[1:], first_error=error,
                 subset=name_of(row, "subset"))]


def dialogue(as_dialogue, prompt, *responses):
    """Messages (or, as_dialogue, a plain prompt) as '\\n\\nHuman: ...\\n\\nAssistant: ...' text."""
    if as_dialogue and isinstance(prompt, str) and prompt.strip() and TURN not in prompt:
        prompt = [{"role": "user", "content": prompt}]
    if not is_list_of(dict, prompt):
        return prompt, *responses
    for message in prompt:
        if message.get("role") not in tuple(ROLES):     # a role may be a list
            raise BadRow(f"a message without a known 'role' ({', '.join(ROLES)})")
        check_text("a message's content", message.get("content"))
        if SPEAKER.search(message["content"]):
            raise BadRow("a message in which another turn of a dialogue begins")
    text = "".join(ROLES[message["role"]] + message["content"] for message in prompt)
    return text + TURN, *map(reply_of, responses)


def reply_of(response):
    """The text of a dialogue's response, plain or one assistant message, behind its space."""
    if is_list_of(dict, response):
        if len(response) > 1 or response[0].get("role") != "assistant":
            raise BadRow("a response that is not one assistant message")
        response = response[0].get("content")
    return f" {response}" if isinstance(response, str) and response.strip() else response


def split_prompt(chosen, rejected):
    """Whole texts or conversations -> what both share, cut at a turn, and what is left of each."""
    if is_list_of(dict, chosen) and is_list_of(dict, rejected):
        cut, most = 0, min(len(chosen), len(rejected)) - 1
        while cut < most and chosen[cut] == rejected[cut]:
            cut += 1
    else:
        check_text("chosen", chosen)
        check_text("rejected", rejected)
        same = len(os.path.commonprefix([chosen, rejected]))
        cut = chosen.rfind(TURN, 0, same) + len(TURN)
        if cut < len(TURN):     # no dialogue: cut before the last space that both share
            cut = max(chosen.rfind(" ", 0, same), 0)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def name_of(row, key):
    """An optional label as text, '' where it is absent."""
    value = row.get(key) if isinstance(row, dict) else None
    return "" if value is None else str(value)


def check_text(name, text):
    if not isinstance(text, str):
        what = "missing" if text is None else f"not text but {type(text).__name__}"
        raise BadRow(f"{name} is {what}")
    if not text.strip():
        raise BadRow(f"{name} is empty")


def is_number(value):
    """True and False are numbers too; no infinite one is, nor one too large for a float32."""
    return isinstance(value, (int, float)) and abs(value) < 1e30


def is_list_of(kind, value):
    return isinstance(value, list) and value != [] and all(isinstance(item, kind) for item in value)


# Files for a model that exists already -----------------------------------------------------------

def read_rows(parse, path, tokenizer, block_size, as_dialogue=False):
    """-> (items, a Row of each, how many were left out: bad rows, and those with a response that
    is longer than the context)"""
    left_out = Counter()
    items = list(read_items(path, parse, as_dialogue, left_out))
    count = len(items) + left_out.total()
    if parse is parse_candidates:
        items = [without_long(item, tokenizer, block_size, left_out) for item in items]
    texts = [(item, item.prompt, *item.responses) for item in items]
    found = tokenise(texts, tokenizer, block_size, left_out)
    if not found:
        raise UserError(f"nothing is left of {path}; left out: {listed(left_out)}")
    print(f"{path}: {len(found)} rows; left out: {listed(left_out)}")
    rows = [Row(np.array(prompt), tuple(map(np.array, responses)))
            for _, (prompt, *responses) in found]
    return [item for item, _ in found], rows, count - len(found)


def without_long(item, tokenizer, block_size, left_out):
    """Candidates without those that leave the prompt no room; all of them where none would stay."""
    fits = [len(tokenizer.encode_reply(text)) < block_size for text in item.responses]
    if all(fits) or not any(fits):
        return item
    left_out["a candidate as long as the context"] += fits.count(False)
    responses, correct, answers = (
        tuple(compress(column, fits)) for column in (item.responses, item.correct, item.answers))
    return item._replace(responses=responses, correct=correct, answers=answers)


read_pair_rows = partial(read_rows, parse_pairs)
read_candidate_rows = partial(read_rows, parse_candidates)


def read_step_rows(path, tokenizer, block_size, as_dialogue=False):
    """-> (items, a Row of each, the places of the steps' last tokens in its response)"""
    items, rows, _ = read_rows(parse_steps, path, tokenizer, block_size, as_dialogue)
    ends = [[len(tokenizer.encode_reply(item.responses[0][:end])) - 2 for end in item.ends]
            for item in items]
    return items, rows, ends
