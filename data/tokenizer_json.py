"""The tokenizer.json of a pretrained model -> our Tokenizer, which tiktoken runs.

Byte-level BPE as SmolLM2, Qwen 2.5 and 3 and Llama 3 have it. Whatever else a file asks for is an
error by name, never other tokens. Unlike there, a special token's name in data is plain text.
"""
from config import UserError
from data.files import load_json
from data.hub import find_folder
from data.tokenizer import FORMATS, Tokenizer

# How text is cut before merging, as tokenizer.json says it -> the same as one pattern of tiktoken.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
SMOLLM2 = (r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+"
           r"|\s+(?=\p{N})|\s+(?!\S)|\s+")


def split_by(pattern):
    """The two steps of tokenizer.json that cut text by a pattern."""
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]


PATTERNS = (
    ([{"type": "Digits", "individual_digits": True},
      {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}], SMOLLM2),
    (split_by(QWEN), QWEN), (split_by(LLAMA3), LLAMA3))
NORMAL_FORMS = ((None, ""), ({"type": "NFC"}, "NFC"))
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}     # a model that has it has these turns
PLAIN_ENDS = ("<|endoftext|>", "<|end_of_text|>")
# What these keys of the model may say, if anything; ignore_merges asks for what tiktoken does in
# any case: a piece that is a token is that token.
ALLOWED = {"type": ("BPE",), "ignore_merges": (True,)}


def read_tokenizer(name):
    """A folder with a tokenizer.json, or owner/model on the hub -> Tokenizer."""
    path = find_folder(name) / "tokenizer.json"
    found = load_json(path, "the save_pretrained of transformers")
    try:
        return convert(name, found)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is damaged or of another kind ({error!r:.99})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def convert(name, found):
    """The dictionary in a tokenizer.json -> Tokenizer."""
    model = found["model"]
    for key, value in model.items():
        if value and key not in ("vocab", "merges") and value not in ALLOWED.get(key, ()):
            raise UserError(f"the model's {key} {value!r:.60} is unknown here")
    normal_form = looked_up("normalizer", found.get("normalizer"), NORMAL_FORMS)
    cutting = found.get("pre_tokenizer") or {}
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"}
             for step in cutting.get("pretokenizers", [cutting])]
    pattern = looked_up("pre_tokenizer", steps, PATTERNS)
    special = {token["content"]: token["id"] for token in found["added_tokens"]}
    turns = next((turns for turns, end in ENDS.items() if end in special), "plain")
    end = ENDS.get(turns) or next((end for end in PLAIN_ENDS if end in special), None)
    marks = {part for parts in FORMATS[turns] or () for part in parts if part.startswith("<|")}
    if not marks <= special.keys():
        raise UserError(f"no {min(marks - special.keys())} among the added tokens")
    if len({*special.values(), *model["vocab"].values()}) < len(special.keys() | model["vocab"]):
        raise UserError("two tokens have one id")
    if end is None:
        raise UserError(f"no known end of a response among the added tokens {list(special)!s:.99}")
    bytes_of = byte_alphabet()
    ranks = {bytes(map(bytes_of.__getitem__, text)): i for text, i in model["vocab"].items()
             if text not in special}
    check_merges(model["merges"], model["vocab"], ranks)
    return Tokenizer(str(name), ranks, pattern, special, end, turns, normal_form)


def looked_up(key, value, table):
    """What a table of (value, what it is here) says of a value."""
    for said, ours in table:
        if value == said:
            return ours
    raise UserError(f"{key} {value!r:.200} is unknown here")


def byte_alphabet():
    """The character that stands for each byte in vocabularies (GPT-2's) -> the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)}


def check_merges(merges, vocabulary, ranks):
    """tiktoken merges what makes the smallest token id: the merges must be in that order, and make
    every token but the single bytes."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in merges)
    made = [vocabulary[first + second] for first, second in pairs]
    if sorted(made) != made:
        raise UserError("merges are not in the order of their tokens' ids")
    lost = {i for token, i in ranks.items() if len(token) > 1} - set(made)
    if lost:
        raise UserError(f"no merge makes the tokens {sorted(lost)[:5]}")
