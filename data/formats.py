"""Read files of pairs, candidates and solutions in steps. data/README.md lists formats.

A file holds one JSON object per line. Rows that cannot be understood are skipped,
counted by reason, and the first few are printed. If more than a few percent are skipped
for one reason, that is an error (--max_bad_fraction), unless the reason is a tie.

Inside the project a conversation is text in the format of HH-RLHF:

    \\n\\nHuman: question\\n\\nAssistant: answer\\n\\nHuman: question\\n\\nAssistant:
"""

import gzip
import json
import os
import re
import zlib
from collections import Counter
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError, locate
from data.batch import Example
from data.dataset import (
    KEPT_ROW_NOTES,
    NOT_BAD,
    LONG_CANDIDATE,
    PARTIAL_ANSWERS,
    REPEATED_PROMPT,
    TIED,
    TURN,
    format_counts,
    tokenize_rows,
)

SPEAKER = re.compile(r"\n\n(System|Human|Assistant):")
ROLE_OF = {"System": "system", "Human": "user", "Assistant": "assistant"}
PREFIXES = {  # of a turn, by role
    "system": "\n\nSystem: ",
    "user": "\n\nHuman: ",
    "assistant": "\n\nAssistant: ",
}
PROMPT_KEYS = ("prompt", "instruction", "question", "messages")
PAIR_KEYS = {"chosen", "rejected", "input", "system", "history", "id", "subset"}
PAIR_KEYS |= {"domain", "meta", *PROMPT_KEYS}
LABEL_KEYS = {"responses", "completion", "label", "steps", "first_error"}
RESPONSE_KEYS = {"text", "correct", "answer"}  # of an entry of 'responses'
# Scores of both responses, and strengths of the preference. A tie is no preference.
SCORE_KEYS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
)
STRENGTH_KEYS = ("preference_strength", "strength", "margin")
PAIR_KEYS |= {*STRENGTH_KEYS, *chain(*SCORE_KEYS)}
# Keys that usually hold a part of the conversation, and are not read.
CONVERSATION_KEYS = (
    "context",
    "conversation",
    "conversations",
    "dialog",
    "dialogue",
    "tools",
    "turns",
)
# If a row has no prompt, the two texts are cut after the last marker that both share.
MARKERS = (
    TURN,
    "<|im_start|>assistant\n",
    "<|end_header_id|>\n\n",
    "<|assistant|>\n",
    "[/INST]",
    "### Response:\n",
)
# Chat templates: how a turn begins, with its role in group 1, and how it ends.
TEMPLATES = {
    "ChatML": (re.compile(r"<\|im_start\|>(\w+)\n"), "<|im_end|>"),
    "Llama 3": (
        re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n"),
        "<|eot_id|>",
    ),
    "Zephyr": (re.compile(r"<\|(system|user|assistant)\|>\n"), "</s>"),
}
PRINTED_MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:")
DIFFERENT_TURNS = "two conversations that differ before the last response"
MAX_PRINTED = 5  # skipped rows that are printed
MIN_REPEATED = 20  # characters. A longer prompt is not repeated by chance
MAX_LINE = 10**8  # characters. A small .gz may hold a huge line
MAX_SPACES = 100_000  # in a row. tiktoken crashes on more
CONVERT = "Convert it with pandas.{}(A).to_json(B, orient='records', lines=True)"
REMEDIES = {  # what to do with files that are not JSON lines
    ".zst": "Unpack it with `zstd -d`",
    ".zip": "Unpack it",
    ".xz": "Unpack it",
    ".parquet": CONVERT.format("read_parquet"),
    ".csv": "Convert it with pandas.read_csv(A, dtype=str, keep_default_na=False)"
    ".to_json(B, orient='records', lines=True)",
}


class BadRow(Exception):
    """Why a row cannot be used. Rows are counted by the text before ' ('."""


class Item(NamedTuple):
    """One prompt with its responses, as text."""

    prompt: str
    responses: tuple  # chosen and rejected, candidates, or one solution
    labels: tuple = ()  # of candidates: for each, 0 or 1, or a gold score
    answers: tuple = ()  # of candidates: final answers, if every one has one
    ends: tuple = ()  # of a solution: where its steps end in the text
    first_error: int = -1  # of a solution: the first wrong step, from 0. -1: none
    id: str = ""
    subset: str = ""
    cell: tuple = ()  # RM-Bench: the styles of chosen and rejected, (0, 0) to (2, 2)
    note: str = ""  # what was changed


# Rows ---------------------------------------------------------------------------------


def parse_pairs(row, wrap_as_chat=False):
    """A row -> a list of one pair, or of nine pairs for RM-Bench's lists of three."""
    check_not_tied(row)
    prompt, chosen, rejected = read_prompt(row), row.get("chosen"), row.get("rejected")
    subset, note = read_text(row, "subset"), ""
    if is_list_of(str, chosen) and is_list_of(str, rejected):
        domain = read_text(row, "domain") or read_text(row.get("meta"), "domain")
        if not domain or len(chosen) != len(rejected):
            raise BadRow(
                "lists of texts that are not RM-Bench's (equally many chosen and "
                f"rejected texts and a 'domain', not {len(chosen)} and "
                f"{len(rejected)}, {domain!r})"
            )
        subset = domain
    else:
        prompt, chosen, rejected, note = split_shared_prompt(prompt, chosen, rejected)
        chosen, rejected = [chosen], [rejected]
    pairs = []
    for i, first in enumerate(chosen):
        for j, second in enumerate(rejected):
            texts = format_chat(wrap_as_chat, prompt, first, second)
            check_text("prompt", texts[0])
            check_response("chosen", texts[1])
            check_response("rejected", texts[2])
            if texts[1] == texts[2]:
                raise BadRow("chosen and rejected are the same")
            item = Item(texts[0], texts[1:], id=read_text(row, "id"), subset=subset)
            cell = (i, j) if len(chosen) > 1 else ()
            pairs.append(item._replace(cell=cell, note=note))
    return pairs


def check_not_tied(row):
    """Raise BadRow if the row says that neither response is preferred."""
    for chosen_key, rejected_key in SCORE_KEYS:
        scores = read_number(row.get(chosen_key)), read_number(row.get(rejected_key))
        if None not in scores and scores[0] == scores[1]:
            raise BadRow(TIED)
    for key in STRENGTH_KEYS:
        if read_number(row.get(key)) == 0:
            raise BadRow(TIED)


def parse_candidates(row, wrap_as_chat=False):
    """A row -> a list of one item with labelled responses."""
    responses = row.get("responses")
    if "completion" in row:
        responses = [{"text": row["completion"], "correct": row.get("label")}]
    if not is_list_of(dict, responses):
        raise BadRow("no 'responses', or not a list of objects")
    texts = [response.get("text") for response in responses]
    labels = [read_number(response.get("correct")) for response in responses]
    prompt, *texts = format_chat(wrap_as_chat, read_prompt(row), *texts)
    check_text("prompt", prompt)
    for text in texts:
        check_response("a response", text)
    if None in labels:
        raise BadRow(
            "a response without 'correct' or 'label' (true, false or a finite number)"
        )
    answers, note = (
        [read_text(response, "answer").strip() for response in responses],
        "",
    )
    if not all(answers):
        note = PARTIAL_ANSWERS if any(answers) else ""
        answers = []
    return [Item(prompt, tuple(texts), tuple(labels), tuple(answers), note=note)]


def parse_steps(row, wrap_as_chat=False):
    """A row -> a list of one item. Its response is the steps, joined by newlines."""
    steps, first_error = row.get("steps"), row.get("first_error")
    if not is_list_of(str, steps):
        raise BadRow("no 'steps', or not a list of texts")
    if type(first_error) is not int or first_error not in range(-1, len(steps)):
        raise BadRow(
            f"'first_error' is not a whole number (from -1 to {len(steps) - 1})"
        )
    steps, first_error = merge_blank_steps(steps, first_error)
    solution = "\n".join(steps)
    check_spaces("a solution", solution)
    prompt, response = format_chat(wrap_as_chat, read_prompt(row), solution)
    check_text("prompt", prompt)
    ends, end = [], len(response) - len(solution)  # a chat response begins with a space
    for step in steps:
        end += len(step) + 1
        ends.append(end)
    subset = read_text(row, "subset")
    item = Item(prompt, (response,), ends=tuple(ends), first_error=first_error)
    return [item._replace(subset=subset)]


def merge_blank_steps(steps, first_error):
    """Append blank steps to the step before, or to the step after at the start.

    Returns the steps, and first_error as an index of these.
    """
    if not "".join(steps).strip():
        raise BadRow("all 'steps' are blank")
    merged, new_first_error = [], -1
    for i, step in enumerate(steps):
        if merged and (not step.strip() or not merged[-1].strip()):
            merged[-1] += "\n" + step
        else:
            merged.append(step)
        if i == first_error:
            new_first_error = len(merged) - 1
    return merged, new_first_error


# Prompts ------------------------------------------------------------------------------


def read_prompt(row):
    """The prompt of a row, as text or messages, with what comes before it.

    None if there is none.
    """
    for key, value in row.items():
        is_messages = is_list_of(dict, value) and any(
            "role" in message or "from" in message for message in value
        )
        is_named = key in CONVERSATION_KEYS and value and read_number(value) is None
        if key not in PAIR_KEYS | LABEL_KEYS and (is_messages or is_named):
            raise BadRow(
                f"{key!r} looks like part of the conversation, and is not supported"
            )
    names = []
    for name in PROMPT_KEYS:
        # UltraFeedback repeats the chosen conversation as `messages`.
        repeats_chosen = name == "messages" and row.get(name) == row.get("chosen")
        if row.get(name) and not repeats_chosen:
            names.append(name)
    if len(names) > 1:
        raise BadRow(f"more than one prompt ({', '.join(names)})")
    prompt = row.get(names[0] if names else "prompt")
    if row.get("input"):
        if names != ["instruction"] or not is_list_of(str, [prompt, row["input"]]):
            raise BadRow("an 'input' that is not the text after an 'instruction'")
        prompt = f"{prompt}\n{row['input']}"
    system, history = row.get("system"), row.get("history") or []
    if not system and not history:
        return prompt
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not is_list_of(dict, prompt):
        raise BadRow("a 'system' or 'history' without a prompt")
    return earlier_messages(system, history) + prompt


def earlier_messages(system, history):
    """A system message and earlier turns (messages, or pairs of texts) -> messages."""
    messages = []
    if system:
        messages.append({"role": "system", "content": system})
    if not history or is_list_of(dict, history):
        return messages + history
    if not is_list_of(list, history) or any(len(turn) != 2 for turn in history):
        raise BadRow("a 'history' that is neither messages nor pairs of texts")
    for question, answer in history:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def split_shared_prompt(prompt, chosen, rejected):
    """Take the prompt off two responses that begin with it.

    Returns prompt, chosen, rejected, and a note if a prompt was repeated.
    """
    if is_list_of(dict, chosen) and is_list_of(dict, rejected):
        return *split_shared_messages(prompt, chosen, rejected), ""
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return prompt, chosen, rejected, ""
    if prompt is None:
        cut = find_cut(chosen, rejected)
        for mark in MARKERS:
            if mark in chosen[cut:] or mark in rejected[cut:]:
                raise BadRow(DIFFERENT_TURNS)
        return chosen[:cut], chosen[cut:], rejected[cut:], ""
    if isinstance(prompt, str) and len(prompt) > MIN_REPEATED:
        texts = chosen, rejected
        if all(text.startswith(prompt) and text != prompt for text in texts):
            cut = len(prompt)
            return prompt, chosen[cut:], rejected[cut:], REPEATED_PROMPT
    return prompt, chosen, rejected, ""


def split_shared_messages(prompt, chosen, rejected):
    """split_shared_prompt for messages. The last one is never part of the prompt."""
    cut, most = 0, min(len(chosen), len(rejected)) - 1
    while cut < most and chosen[cut] == rejected[cut]:
        cut += 1
    has_messages = prompt is not None and not isinstance(prompt, str)
    if has_messages or (prompt is None and cut == 0):
        return prompt, chosen, rejected
    shared = chosen[:cut]
    contents = [message.get("content") for message in shared]
    if shared and prompt is not None and prompt not in contents:
        raise BadRow("a prompt that is not the conversation's")
    if not shared:
        shared = [{"role": "user", "content": prompt}]
    return shared, chosen[cut:], rejected[cut:]


def find_cut(chosen, rejected):
    """Where the responses begin in two texts that start with the same prompt.

    That is after the last turn marker that both share, or else after the last newline.
    """
    shared = os.path.commonprefix([chosen, rejected])
    cuts = [shared.rfind(mark) + len(mark) for mark in MARKERS if mark in shared]
    if not cuts and (SPEAKER.search(chosen) or SPEAKER.search(rejected)):
        raise BadRow(DIFFERENT_TURNS)
    cut = max(cuts) if cuts else shared.rfind("\n") + 1
    if not shared[:cut].strip():
        raise BadRow("no prompt, and the texts share no turn or line to cut at")
    return cut


# Conversations ------------------------------------------------------------------------


def split_turns(text):
    """Text in the format of HH-RLHF, up to "Assistant:" -> [(role, text of turn), ...].

    Any other text is one turn of the user.
    """
    start, *parts = SPEAKER.split("\n\n" + text.strip())  # parts: speaker, text, ...
    if start or parts[-2:] != ["Assistant", ""]:
        return [("user", text)]
    turns = []
    for speaker, content in zip(parts[:-2:2], parts[1:-2:2]):
        turns.append((ROLE_OF[speaker], content.removeprefix(" ")))
    return turns


def format_chat(wrap_as_chat, prompt, *responses):
    """Messages -> text in the format of HH-RLHF. Returns (prompt, *responses).

    A prompt that a chat template has formatted is turned into messages first.
    wrap_as_chat: turn a plain prompt into one Human turn
    """
    prompt, *responses = parse_template(prompt, *responses)
    is_plain = isinstance(prompt, str) and prompt.strip() and TURN not in prompt
    if wrap_as_chat and is_plain:
        prompt = [{"role": "user", "content": prompt}]
    if not is_list_of(dict, prompt):
        return prompt, *responses
    if prompt[-1].get("role") == "assistant":
        raise BadRow("a prompt that ends with a message of the assistant")
    text = ""
    for message in prompt:
        role = message.get("role")
        if not isinstance(role, str) or role not in PREFIXES:
            raise BadRow(f"a message without a known 'role' ({', '.join(PREFIXES)})")
        content = read_content(message)
        if role == "system" and not content:
            continue
        check_text("a message's content", content)
        if SPEAKER.search(content) or find_template(content):
            raise BadRow("a message that contains another turn of a conversation")
        text += PREFIXES[role] + content
    return text + TURN, *map(read_response, responses)


def find_template(text):
    """The name of the chat template that has formatted a text, or ''."""
    for name, (turn_start, _) in TEMPLATES.items():
        if turn_start.match(text):
            return name
    return ""


def parse_template(prompt, *responses):
    """A prompt that a chat template has formatted, and its responses.

    Returns the prompt's messages and the responses without the template's markup.
    Anything else is returned as it is.
    """
    if not isinstance(prompt, str):
        return prompt, *responses
    text = prompt.lstrip().removeprefix("<|begin_of_text|>")
    name = find_template(text)
    if not name:
        return prompt, *responses
    turn_start, turn_end = TEMPLATES[name]
    _, *parts = turn_start.split(text)  # role, content, role, content, ...
    roles, contents = parts[0::2], parts[1::2]
    if roles[-1] == "assistant" and not contents[-1].strip():
        roles.pop()  # where the response begins
        contents.pop()
    messages = []
    for role, content in zip(roles, contents):
        content, end, rest = content.partition(turn_end)
        if not end or rest.strip():
            raise BadRow(f"a prompt in {name}'s template with a turn that has no end")
        messages.append({"role": role, "content": content})
    if not messages:
        raise BadRow(f"a prompt in {name}'s template without a turn of the user")
    texts = []
    for response in responses:
        if isinstance(response, str):
            start = turn_start.match(response)
            if start and start[1] == "assistant":
                response = response[start.end() :]
            response, _, rest = response.partition(turn_end)
            if rest.strip() or turn_start.search(response):
                raise BadRow("a response that contains another turn of a conversation")
        texts.append(response)
    return messages, *texts


def read_content(message):
    """The text of a message. OpenAI's lists of text parts are joined."""
    for key, value in message.items():
        if value and key not in ("role", "content", "name"):
            raise BadRow(f"a message with {key!r}, which is not read")
    content = message.get("content")
    if not is_list_of(dict, content):
        return content
    texts = []
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRow("a message with a part that is not text")
        texts.append(part["text"])
    return "".join(texts)


def read_response(response):
    """A response in a conversation: text or one message -> text after a space."""
    if is_list_of(dict, response):
        if len(response) > 1 or response[0].get("role") != "assistant":
            raise BadRow("a response that is not one assistant message")
        response = read_content(response[0])
    is_text = isinstance(response, str) and response.strip()
    return f" {response}" if is_text else response


# Checks -------------------------------------------------------------------------------


def read_text(row, key):
    """An optional entry as text, '' if it is missing."""
    value = row.get(key) if isinstance(row, dict) else None
    return "" if value is None else str(value)


def check_text(name, text):
    check_response(name, text)
    if not text.strip():
        raise BadRow(f"{name} is empty")


def check_response(name, text):
    """Raise BadRow unless this is a usable text. It may be empty."""
    if text is None:
        raise BadRow(f"{name} is missing")
    if not isinstance(text, str):
        raise BadRow(f"{name} is not text but {type(text).__name__}")
    if PRINTED_MESSAGES.match(text):
        raise BadRow(f"{name} is a list of messages that was printed as text")
    check_spaces(name, text)


def check_spaces(name, text):
    if len(text) < MAX_SPACES:
        return
    longest = max((len(spaces) for spaces in re.findall(r"\s+", text)), default=0)
    if longest >= MAX_SPACES:
        raise BadRow(f"{name} has {MAX_SPACES} white spaces in a row")


def read_number(value):
    """True, False, a number or its text as a float. None if it is anything else."""
    if isinstance(value, str):
        value = {"true": 1, "false": 0}.get(value.strip().lower(), value)
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError):
        return None
    return number if abs(number) < 1e30 else None  # fits float32, and is not NaN


def is_list_of(kind, value):
    """Whether value is a list of this kind, with at least one entry."""
    is_filled = isinstance(value, list) and len(value) > 0
    return is_filled and all(isinstance(entry, kind) for entry in value)


# Files --------------------------------------------------------------------------------


def read_items(
    path,
    parse,
    wrap_as_chat=False,
    skipped=None,
    max_bad_fraction=0.05,
    convert=dict,
    subsample=1,
):
    """Yield the items of a file of JSON lines.

    parse: parse_pairs, parse_candidates or parse_steps
    skipped: a Counter of skipped rows by reason, and of changes to kept rows. None:
        rows are skipped silently, when a file is read a second time
    convert: applied to every row first
    subsample: keep every N-th row
    """
    n_items = n_rows = 0
    keys, bad = Counter(), Counter()
    for number, line in islice(numbered_lines(path), 0, None, subsample):
        try:
            row = convert(decode_row(line))
            items = parse(row, wrap_as_chat)
            n_rows += 1
            keys.update(row_keys(row))
        except BadRow as error:
            bad[str(error).partition(" (")[0]] += 1
            if skipped is not None and bad.total() <= MAX_PRINTED:
                print(f"skipped: {path}, row {number}: {error}")
            continue
        n_items += len(items)
        for item in items:
            if skipped is not None and item.note:
                skipped[item.note] += 1
            yield item
    if n_items == 0:
        raise UserError(
            f"{path} has no usable row ({bad.total()} bad). It must have one JSON "
            "object per line"
        )
    if skipped is not None:
        skipped.update(bad)
        check_skipped(path, bad, n_rows + bad.total(), max_bad_fraction)
        print_keys(path, keys)


def row_keys(row):
    """The keys of a row, and those inside `responses` that are not read."""
    keys = list(row)
    responses = row.get("responses")
    if is_list_of(dict, responses):
        response_keys = {}  # a dictionary keeps their order
        for response in responses:
            response_keys.update(response)
        for key in response_keys:
            if key not in RESPONSE_KEYS:
                keys.append(f"responses.{key}")
    return keys


def print_keys(path, keys):
    """Print which keys of a file were read."""
    read_keys = PAIR_KEYS if "chosen" in keys else PAIR_KEYS | LABEL_KEYS
    read = [key for key in keys if key in read_keys]
    ignored = [key for key in keys if key not in read_keys] or ["none"]
    print(f"{path}: read {', '.join(read)}. Ignored: {', '.join(ignored)}")


def numbered_lines(path):
    """Yield (number, line) of a file's lines that are not blank."""
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            yield number, line


def read_lines(path):
    """The lines of a file. Only newlines end them, not U+2028 and its like."""
    remedy = REMEDIES.get(Path(str(path).removesuffix(".gz")).suffix)
    if remedy:
        raise UserError(f"{path} is not a file of JSON lines. {remedy}")
    open_file = gzip.open if str(path).endswith(".gz") else open
    try:
        with open_file(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), "")):
                if len(line) == MAX_LINE:
                    raise UserError(
                        f"{path}, line {number + 1} is longer than {MAX_LINE:,} "
                        "characters"
                    )
                if number == 0 and line.lstrip().startswith("["):
                    raise UserError(
                        f"{path} is one JSON array. Convert it with `jq -c '.[]' A > B`"
                    )
                yield line.rstrip("\r\n")
    except (UnicodeDecodeError, EOFError, zlib.error, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{locate(path)} cannot be read ({reason})") from None


def decode_row(line):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"broken JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadRow(f"a {type(row).__name__} instead of an object")
    return row


def check_skipped(path, skipped, count, max_bad_fraction, unit="rows"):
    """Raise a UserError if too many of `count` rows were skipped for one reason."""
    for reason, n_bad in skipped.items():
        if n_bad > max_bad_fraction * count and reason not in NOT_BAD:
            raise UserError(
                f"{path}: {n_bad} of {count} {unit} are skipped ({reason}). Correct "
                "them, or allow it with --max_bad_fraction=1"
            )


# Reading a file for a trained model ---------------------------------------------------


def read_examples(
    parse, path, tokenizer, block_size, wrap_as_chat=False, max_bad_fraction=0.05
):
    """Read a file and tokenize it.

    Returns the items, an Example for each, and the number of skipped rows.
    """
    skipped, unusable = Counter(), Counter()
    items = list(read_items(path, parse, wrap_as_chat, skipped, max_bad_fraction))
    if parse is parse_candidates:
        n_candidates, dropped = sum(len(item.responses) for item in items), Counter()
        for i, item in enumerate(items):
            items[i] = drop_long_candidates(item, tokenizer, block_size, dropped)
        check_skipped(path, dropped, n_candidates, max_bad_fraction, "candidates")
        skipped.update(dropped)
    rows = [(item, item.prompt, *item.responses) for item in items]
    are_pairs = parse is parse_pairs
    tokenized = tokenize_rows(rows, tokenizer, block_size, unusable, are_pairs)
    skipped.update(unusable)
    if not tokenized:
        raise UserError(f"no row of {path} is left. Skipped: {format_counts(skipped)}")
    check_skipped(path, unusable, len(items), max_bad_fraction)
    print(
        f"{path}: {len(tokenized)} rows. Skipped or changed: {format_counts(skipped)}"
    )
    n_skipped = 0
    for reason, count in skipped.items():
        if reason not in KEPT_ROW_NOTES:
            n_skipped += count
    kept, examples = [], []
    for item, (prompt, *responses) in tokenized:
        kept.append(item)
        responses = tuple(np.array(response) for response in responses)
        examples.append(Example(np.array(prompt), responses))
    return kept, examples, n_skipped


def drop_long_candidates(item, tokenizer, block_size, skipped):
    """Drop candidates that leave no room for the prompt, unless none would be left."""
    kept = []
    for i, text in enumerate(item.responses):
        if len(tokenizer.encode_response(text)) < block_size:
            kept.append(i)
    if len(kept) in (0, len(item.responses)):
        return item
    skipped[LONG_CANDIDATE] += len(item.responses) - len(kept)
    return item._replace(
        responses=tuple(item.responses[i] for i in kept),
        labels=tuple(item.labels[i] for i in kept),
        answers=tuple(item.answers[i] for i in kept if item.answers),
    )


def print_prompt_hint(path, items, tokenizer, trained_on_chat):
    """Print a hint if a file's prompts are of another kind than the training prompts.

    trained_on_chat: whether those end with "Assistant:"
    """
    if getattr(tokenizer, "chat_format", None):
        return  # it writes all prompts in the model's chat format
    n_chat = 0
    for item in items:
        if item.prompt.endswith(TURN):
            n_chat += 1
    if trained_on_chat and n_chat < len(items) / 2:
        print(
            f"hint: the training prompts end with 'Assistant:', those of {path} do "
            "not. --wrap_as_chat=True adds it"
        )
    if not trained_on_chat and n_chat > len(items) / 2:
        print(
            f"hint: the prompts of {path} end with 'Assistant:', the training prompts "
            "do not"
        )


read_pairs = partial(read_examples, parse_pairs)
read_candidates = partial(read_examples, parse_candidates)


def read_steps(path, tokenizer, block_size, wrap_as_chat=False, max_bad_fraction=0.05):
    """Read a file of solutions in steps.

    Returns the items, an Example for each, the positions of the steps' last tokens in
    each response, and the number of skipped rows.
    """
    items, examples, n_skipped = read_examples(
        parse_steps, path, tokenizer, block_size, wrap_as_chat, max_bad_fraction
    )
    positions = []
    for item in items:
        text, ends = item.responses[0], []
        for end in item.ends:
            n_tokens = len(tokenizer.encode_response(text[:end])) - 1  # without the end
            ends.append(n_tokens - 1)
        positions.append(ends)
    return items, examples, positions, n_skipped
