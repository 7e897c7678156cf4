"""One row of a file, a JSON object -> items: pairs, candidates, solutions in steps.

Pairs come in any of TRL's four forms: `prompt`, `chosen`, `rejected` as strings; the same without
`prompt` (what the two texts share, cut at a turn, is the prompt); and both with lists of
{"role", "content"} messages. `chosen` and `rejected` may also be RM-Bench's lists of strings, from
the plainest style to the richest: every chosen text then meets every rejected one. Candidates:
`prompt`, `responses: [{"text", "correct"}, ...]`, with each one's final `answer` where votes are
counted; `prompt`, `completion`, `label` is one candidate alone. Steps: `prompt`, `steps`,
`first_error` (from 0; -1: none). Optional: `id`, `subset`. Other names of the prompt, and what else
is read, mapped or refused: data/README.md.
"""
import os
import re
from itertools import accumulate, product
from typing import NamedTuple

from data.dataset import REPEATED, SOME_ANSWERS
from data.tokenizer import SPEAKER

ROLES = {"system": "\n\nSystem: ", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
TURN = "\n\nAssistant:"     # a dialogue's prompt ends here, without a space
PROMPTS = ("prompt", "instruction", "question", "messages")     # names of the prompt
KEYS = {*PROMPTS, "input", "system", "history", "chosen", "rejected", "responses", "completion",
        "label", "steps", "first_error", "id", "subset", "domain", "meta"}      # all that is read
OF_LABELS = {"responses", "completion", "label", "steps", "first_error"}    # not of a pair
# Where the texts of a row that has no prompt may be cut, behind what both share.
MARKERS = (TURN, "<|im_start|>assistant\n", "<|end_header_id|>\n\n", "<|assistant|>\n", "[/INST]",
           "### Response:\n")
CONVERSATION = ("context", "conversation", "conversations", "dialog", "dialogue", "tools", "turns")
GREETING = 20               # letters of a prompt that a response may begin with by chance
BLANK = 100_000             # white spaces in a row: more than tiktoken survives


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
    note: str = ""          # what was changed


# One object -> a list of items -------------------------------------------------------------------

def parse_pairs(row, as_dialogue=False):
    """-> one pair, or nine from RM-Bench's lists of three"""
    prompt, (chosen, rejected) = prompt_of(row), (row.get(key) for key in ("chosen", "rejected"))
    subset, note, pairs = name_of(row, "subset"), "", []
    if is_list_of(str, chosen) and is_list_of(str, rejected):
        domain = name_of(row, "domain") or name_of(row.get("meta"), "domain")
        if not domain or len(chosen) != len(rejected):
            raise BadRow("lists of texts that are not RM-Bench's (as many chosen as rejected ones, "
                         f"and a 'domain'; here {len(chosen)} and {len(rejected)}, {domain!r})")
        subset = domain
    else:
        prompt, chosen, rejected, note = split_prompt(prompt, chosen, rejected)
        chosen, rejected = [chosen], [rejected]
    for (i, a), (j, b) in product(enumerate(chosen), enumerate(rejected)):
        text, *responses = dialogue(as_dialogue, prompt, a, b)
        for name, one in zip(("prompt", "chosen", "rejected"), (text, *responses)):
            check_text(name, one)
        if responses[0] == responses[1]:
            raise BadRow("chosen and rejected are the same")
        pairs.append(Item(text, tuple(responses), id=name_of(row, "id"), subset=subset,
                          cell=(i, j) if len(chosen) > 1 else (), note=note))
    return pairs


def parse_candidates(row, as_dialogue=False):
    """-> one item; an empty text is a response too"""
    responses = row.get("responses")
    if "completion" in row:
        responses = [{"text": row["completion"], "correct": row.get("label")}]
    if not is_list_of(dict, responses):
        raise BadRow("no 'responses', or not a list of objects")
    texts, correct = ([one.get(key) for one in responses] for key in ("text", "correct"))
    prompt, *texts = dialogue(as_dialogue, prompt_of(row), *texts)
    check_text("prompt", prompt)
    if not is_list_of(str, texts):
        raise BadRow("a response without text")
    for text in texts:
        check_blanks("a response", text)
    if not all(map(is_number, correct)):
        raise BadRow("a response without 'correct' or 'label' (true, false or a finite number)")
    answers = [name_of(one, "answer").strip() for one in responses]
    return [Item(prompt, tuple(texts), tuple(map(float, correct)),
                 tuple(answers) if all(answers) else (),
                 note=SOME_ANSWERS if any(answers) and not all(answers) else "")]


def parse_steps(row, as_dialogue=False):
    """-> one item; its response is the steps, joined by newlines"""
    steps, error = row.get("steps"), row.get("first_error")
    if not is_list_of(str, steps) or not all(step.strip() for step in steps):
        raise BadRow("no 'steps', or not a list of texts")
    if type(error) is not int or error not in range(-1, len(steps)):
        raise BadRow(f"'first_error' is not a whole number (from -1 to {len(steps) - 1})")
    text = "\n".join(steps)
    check_blanks("a solution", text)
    prompt, spaced = dialogue(as_dialogue, prompt_of(row), text)
    check_text("prompt", prompt)
    ends = accumulate((len(step) + 1 for step in steps), initial=len(spaced) - len(text))
    return [Item(prompt, (spaced,), ends=tuple(ends)[1:], first_error=error,
                 subset=name_of(row, "subset"))]


# Prompts -----------------------------------------------------------------------------------------

def prompt_of(row):
    """The prompt of a row, text or messages, whatever it is called, with the system message and the
    turns before it; None where there is none."""
    for key, value in row.items():
        turns = is_list_of(dict, value) and any("role" in one or "from" in one for one in value)
        named = key in CONVERSATION and value and not is_number(value)
        if key not in KEYS and (turns or named):
            raise BadRow(f"{key!r} looks like a part of the conversation, and is not read")
    names = [name for name in PROMPTS if row.get(name)      # ultrafeedback's messages are chosen
             and (name != "messages" or row[name] != row.get("chosen"))]
    if len(names) > 1:
        raise BadRow(f"more than one prompt ({', '.join(names)})")
    prompt = row.get(names[0]) if names else row.get("prompt")
    if row.get("input"):
        if names != ["instruction"] or not is_list_of(str, [prompt, row["input"]]):
            raise BadRow("an 'input' that is not the text behind an 'instruction'")
        prompt = f"{prompt}\n{row['input']}"
    system, history = row.get("system"), row.get("history") or []
    if not system and not history:
        return prompt
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not is_list_of(dict, prompt):
        raise BadRow("a 'system' or 'history' without a prompt")
    return turns_before(system, history) + prompt


def turns_before(system, history):
    """A system message and earlier turns, messages or pairs of texts -> messages."""
    before = [{"role": "system", "content": system}] if system else []
    if history and not is_list_of(dict, history):
        if not is_list_of(list, history) or any(len(turn) != 2 for turn in history):
            raise BadRow("a 'history' that is no list of messages, nor of pairs of texts")
        history = [{"role": role, "content": text} for turn in history
                   for role, text in zip(("user", "assistant"), turn)]
    return before + history


def split_prompt(prompt, chosen, rejected):
    """The prompt that chosen and rejected share, where they have it in front, and what is left of
    each.  -> prompt, chosen, rejected, a note"""
    if is_list_of(dict, chosen) and is_list_of(dict, rejected):
        cut, most = 0, min(len(chosen), len(rejected)) - 1
        while cut < most and chosen[cut] == rejected[cut]:
            cut += 1
        if not isinstance(prompt, str) and (prompt is not None or not cut):
            return prompt, chosen, rejected, ""
        said = [one.get("content") for one in chosen[:cut]]
        if cut and prompt is not None and prompt not in said:
            raise BadRow("a prompt that is not the conversation's")
        before = chosen[:cut] or [{"role": "user", "content": prompt}]
        return before, chosen[cut:], rejected[cut:], ""
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return prompt, chosen, rejected, ""
    if prompt is None:
        cut = shared(chosen, rejected)
        return chosen[:cut], chosen[cut:], rejected[cut:], ""
    if isinstance(prompt, str) and len(prompt) > GREETING and all(
            text.startswith(prompt) and text != prompt for text in (chosen, rejected)):
        return prompt, chosen[len(prompt):], rejected[len(prompt):], REPEATED
    return prompt, chosen, rejected, ""


def shared(chosen, rejected):
    """Where to cut two whole texts: behind the last turn's mark in what both share, or else behind
    its last line."""
    both = os.path.commonprefix([chosen, rejected])
    found = [both.rfind(mark) + len(mark) for mark in MARKERS if mark in both]
    cut = max(found, default=both.rfind("\n") + 1)
    if not both[:cut].strip():
        raise BadRow("no prompt, and no turn or line at which to cut one off the texts")
    return cut


# Dialogues ---------------------------------------------------------------------------------------

def dialogue(as_dialogue, prompt, *responses):
    """Messages (or, as_dialogue, a plain prompt) as '\\n\\nHuman: ...\\n\\nAssistant: ...' text."""
    if as_dialogue and isinstance(prompt, str) and prompt.strip() and TURN not in prompt:
        prompt = [{"role": "user", "content": prompt}]
    if not is_list_of(dict, prompt):
        return prompt, *responses
    if prompt[-1].get("role") == "assistant":
        raise BadRow("a prompt that ends with the assistant's own turn")
    text = ""
    for message in prompt:
        if message.get("role") not in tuple(ROLES):     # a role may be a list
            raise BadRow(f"a message without a known 'role' ({', '.join(ROLES)})")
        content = content_of(message)
        if message["role"] == "system" and not content:
            continue
        check_text("a message's content", content)
        if SPEAKER.search(content):
            raise BadRow("a message in which another turn of a dialogue begins")
        text += ROLES[message["role"]] + content
    return text + TURN, *map(reply_of, responses)


def content_of(message):
    """The text of a message, also of OpenAI's parts of text."""
    others = [key for key, value in message.items() if value and key not in ("role", "content",
                                                                             "name")]
    if others:
        raise BadRow(f"a message with {others[0]!r}, which is not read")
    content = message.get("content")
    if not is_list_of(dict, content):
        return content
    if not all(part.get("type") == "text" and isinstance(part.get("text"), str)
               for part in content):
        raise BadRow("a message with a part that is no text")
    return "".join(part["text"] for part in content)


def reply_of(response):
    """The text of a dialogue's response, plain or one assistant message, behind its space."""
    if is_list_of(dict, response):
        if len(response) > 1 or response[0].get("role") != "assistant":
            raise BadRow("a response that is not one assistant message")
        response = content_of(response[0])
    return f" {response}" if isinstance(response, str) and response.strip() else response


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
    check_blanks(name, text)


def check_blanks(name, text):
    if len(text) > BLANK and max(map(len, re.findall(r"\s+", text)), default=0) >= BLANK:
        raise BadRow(f"{name} has {BLANK} white spaces in a row")


def is_number(value):
    """True and False are numbers too; no infinite one is, nor one too large for a float32."""
    return isinstance(value, (int, float)) and abs(value) < 1e30


def is_list_of(kind, value):
    return isinstance(value, list) and value != [] and all(isinstance(item, kind) for item in value)
