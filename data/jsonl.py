"""Files of JSON lines -> items, all checked (data/pairs.py); and items -> Rows.

A bad row is left out and counted; the first few are printed with their number and the reason. More
than a twentieth of a file left out for one reason is an error, unless it is asked for.
"""
import gzip
import json
import zlib
from collections import Counter
from functools import partial
from itertools import compress, islice
from pathlib import Path

import numpy as np

from config import UserError
from data.dataset import LONG_CANDIDATE, NOTED, listed, tokenise
from data.pairs import KEYS, OF_LABELS, BadRow, parse_candidates, parse_pairs, parse_steps
from data.rows import Row

SHOWN = 5           # bad rows printed before they are only counted
FEW = 0.05          # of a file's rows may be left out for one reason without being asked for
ELSEWHERE = {       # what is no file of JSON lines, and what makes one of it
    ".zst": "unpack it with `zstd -d`", ".zip": "unpack it", ".xz": "unpack it",
    ".parquet": "convert it: pandas.read_parquet(A).to_json(B, orient='records', lines=True)",
    ".csv": "convert it: pandas.read_csv(A).to_json(B, orient='records', lines=True)"}


def read_items(path, parse, as_dialogue=False, left_out=None, skip_bad=False, convert=dict,
               every=1):
    """Yield what parse, one of the functions of data/pairs.py, makes of every so many rows as
    convert gives them (None: it is not wanted); plain prompts become one Human turn with
    as_dialogue. left_out: a Counter of bad rows by reason, and of what was changed of rows; without
    it they pass in silence (where a file is read again)."""
    found = rows = 0
    keys, bad = Counter(), Counter()
    lines = ((number, line) for number, line in enumerate(lines_of(path), start=1) if line.strip())
    for number, line in islice(lines, 0, None, every):
        try:
            row = convert(decode_row(line))
            items = [] if row is None else parse(row, as_dialogue)
            keys.update(list(row or ()))
        except BadRow as reason:
            items, row = [], {}
            bad[str(reason).partition(" (")[0]] += 1
            if left_out is not None and bad.total() <= SHOWN:
                print(f"left out: {path}, row {number}: {reason}")
        found, rows = found + len(items), rows + (row is not None)
        if left_out is not None:
            left_out.update(item.note for item in items if item.note)
        yield from items
    if not found:
        raise UserError(f"{path} has no usable row ({bad.total()} bad); one JSON object a line is "
                        "expected")
    if left_out is not None:
        left_out.update(bad)
        check_left_out(path, bad, rows, skip_bad)
        known = KEYS - OF_LABELS if "chosen" in keys else KEYS
        read, others = ([key for key in keys if (key in known) == yes] for yes in (True, False))
        print(f"{path}: read {', '.join(read)}; not read: {', '.join(others) or 'nothing'}")


def lines_of(path):
    """The lines of a file. Only \\n, \\r\\n and \\r end one: texts may hold U+2028 and its like."""
    remedy = ELSEWHERE.get(Path(str(path).removesuffix(".gz")).suffix)
    if remedy:
        raise UserError(f"{path} is no file of JSON lines; {remedy}")
    try:
        opener = gzip.open if str(path).endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file):
                if number == 0 and line.lstrip().startswith("["):
                    raise UserError(f"{path} is one JSON array; convert it: `jq -c '.[]' A > B`")
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


def check_left_out(path, left_out, count, skip_bad):
    """A UserError where more than FEW of so many rows or responses were left out for one reason."""
    for reason, bad in left_out.items():
        if bad > FEW * count and reason not in NOTED and not skip_bad:
            raise UserError(f"{path}: {bad} of {count} are left out ({reason}); mend them, or "
                            "go on without them with --skip_bad=True")


# Files for a model that exists already -----------------------------------------------------------

def read_rows(parse, path, tokenizer, block_size, as_dialogue=False, skip_bad=False):
    """-> (items, a Row of each, how many were left out: bad rows, and those with a response that
    is longer than the context)"""
    left_out, cut = Counter(), Counter()    # in reading, and in making tokens
    items = list(read_items(path, parse, as_dialogue, left_out, skip_bad))
    if parse is parse_candidates:
        items = [without_long(item, tokenizer, block_size, cut) for item in items]
    texts = [(item, item.prompt, *item.responses) for item in items]
    found = tokenise(texts, tokenizer, block_size, cut)
    left_out.update(cut)
    if not found:
        raise UserError(f"nothing is left of {path}; left out: {listed(left_out)}")
    check_left_out(path, cut, len(items), skip_bad)
    lost = sum(bad for reason, bad in left_out.items() if reason not in NOTED)
    print(f"{path}: {len(found)} rows; left out: {listed(left_out)}")
    rows = [Row(np.array(prompt), tuple(map(np.array, responses)))
            for _, (prompt, *responses) in found]
    return [item for item, _ in found], rows, lost


def without_long(item, tokenizer, block_size, left_out):
    """Candidates without those that leave the prompt no room; all of them where none would stay."""
    fits = [len(tokenizer.encode_reply(text)) < block_size for text in item.responses]
    if all(fits) or not any(fits):
        return item
    left_out[LONG_CANDIDATE] += fits.count(False)
    responses, correct, answers = (
        tuple(compress(column, fits)) for column in (item.responses, item.correct, item.answers))
    return item._replace(responses=responses, correct=correct, answers=answers)


read_pair_rows = partial(read_rows, parse_pairs)
read_candidate_rows = partial(read_rows, parse_candidates)


def read_step_rows(path, tokenizer, block_size, as_dialogue=False, skip_bad=False):
    """-> (items, a Row of each, the places of the steps' last tokens in its response)"""
    items, rows, _ = read_rows(parse_steps, path, tokenizer, block_size, as_dialogue, skip_bad)
    ends = [[len(tokenizer.encode_reply(item.responses[0][:end])) - 2 for end in item.ends]
            for item in items]
    return items, rows, ends
