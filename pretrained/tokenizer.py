"""The tokenizer.json of a pretrained model -> a Tokenizer, run by tiktoken.

Byte-level BPE as in SmolLM2, Qwen 2.5, Qwen 3 and Llama 3. Another model, normalizer,
pre_tokenizer or kind of added token is an error that names it. The folder's own chat
template and post_processor are not used (ChatFormat). If data contains the name of a
special token, such as <|im_end|>, it is plain text, unlike in transformers. An added
token that is not special, such as <think>, is read as that token.
"""

import re
import unicodedata
from typing import NamedTuple

import regex  # a dependency of tiktoken

from common import UserError, load_json, sha256_of

from data.formats import split_turns
from data.tokenizer import Tokenizer
from pretrained import MADE_BY, find_folder


class ChatFormat(NamedTuple):
    """How a model writes conversations: special tokens, and text between them."""

    start: tuple  # before the first turn
    header: tuple  # before the text of a turn. The text is appended to the last part
    end: tuple  # after the text of a turn. The first part ends a response


# No system message is added, and the text of a turn is not stripped.
CHAT_FORMATS = {
    "chatml": ChatFormat(
        start=(),
        header=("<|im_start|>", "{role}\n"),
        end=("<|im_end|>", "\n"),
    ),
    "llama3": ChatFormat(
        start=("<|begin_of_text|>",),
        header=("<|start_header_id|>", "{role}", "<|end_header_id|>", "\n\n"),
        end=("<|eot_id|>",),
    ),
}
PLAIN_ENDS = ("<|endoftext|>", "<|end_of_text|>")  # of models without a chat format


class PretrainedTokenizer(Tokenizer):
    """A pretrained model's tokenizer. It writes prompts in the model's chat format.

    Arguments as for Tokenizer, and:
    chat_format: a key of CHAT_FORMATS. Empty: prompts stay as they are in the data
    special: {name: token id} of all added tokens, special or not
    text_tokens: the added tokens that are not special, such as <think>
    """

    is_pretrained = True

    def __init__(self, *arguments, chat_format="", text_tokens=(), **settings):
        super().__init__(*arguments, **settings)
        self.chat_format = CHAT_FORMATS.get(chat_format)
        self.text_tokens = sorted(text_tokens, key=len, reverse=True)
        names = "|".join(re.escape(token) for token in self.text_tokens)
        self.text_token_pattern = re.compile(f"({names})")
        self.missing_bytes = {i for i in range(256) if bytes([i]) not in self.ranks}
        self.saved.update(chat_format=chat_format, text_tokens=self.text_tokens)
        # A folder may be renamed, so its name is no part of the fingerprint.
        self.fingerprint = sha256_of(repr({**self.saved, "name": ""}))

    def encode(self, text):
        """Text -> token ids."""
        if not self.text_tokens:
            return self.encode_plain(text)
        tokens = []
        for part in self.text_token_pattern.split(text):
            if part in self.text_tokens:
                tokens.append(self.special[part])
            else:
                tokens += self.encode_plain(part)
        return tokens

    def encode_plain(self, text):
        """Text without added tokens -> token ids.

        Bytes that the vocabulary lacks are dropped before merging, as in the library
        that wrote the file.
        """
        if self.missing_bytes.isdisjoint(text.encode("utf-8", "replace")):
            return super().encode(text)
        if self.normalization:
            text = unicodedata.normalize(self.normalization, text)
        tokens = []
        for word in regex.findall(self.pattern, text):
            parts = []
            for byte in word.encode("utf-8", "replace"):
                if byte not in self.missing_bytes:
                    parts.append(bytes([byte]))
            tokens += [self.ranks[part] for part in self.merge(parts)]
        return tokens

    def merge(self, parts):
        """Merge neighbours, first the pair whose merged token has the smallest id."""
        while True:
            merged = [a + b for a, b in zip(parts, parts[1:])]
            tokens = [part for part in merged if part in self.ranks]
            if not tokens:
                return parts
            i = merged.index(min(tokens, key=self.ranks.get))
            parts = [*parts[:i], merged[i], *parts[i + 2 :]]

    def encode_prompt(self, text):
        """A prompt -> token ids, in the chat format, up to the start of the response.

        A text that is not a dialogue is one turn of the user.
        """
        if self.chat_format is None:
            return self.encode(text)
        parts = list(self.chat_format.start)
        for role, content in split_turns(text):
            parts += self.format_header(role)
            parts[-1] += content
            parts += self.chat_format.end
        parts += self.format_header("assistant")
        tokens = []
        for part in parts:
            if part in self.special:
                tokens.append(self.special[part])
            else:
                tokens += self.encode(part)
        return tokens

    def format_header(self, role):
        return [part.format(role=role) for part in self.chat_format.header]

    def encode_response(self, text):
        """A response -> token ids, the end token last."""
        if self.chat_format:
            text = text.removeprefix(" ")  # the space after "Assistant:"
        return super().encode_response(text)

    def truncate_prompt(self, tokens, room):
        """Truncate on the left, but keep the tokens that start every prompt."""
        if len(tokens) <= room:
            return tokens
        start = self.chat_format.start if self.chat_format else ()
        n_start = min(len(start), room - 1)
        return tokens[:n_start] + tokens[n_start - room :]


# Reading tokenizer.json ---------------------------------------------------------------

# How text is split before merging: steps of tokenizer.json, and one pattern of tiktoken
# that does the same.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = rf"{CONTRACTIONS}|{WORD}|\p{{N}}|{REST}"
LLAMA3 = rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1,3}}|{REST}"
SMOLLM2 = (
    r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?=\p{N})|\s+(?!\S)|\s+"
)
SMOLLM2_STEPS = [
    {"type": "Digits", "individual_digits": True},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
]


def split_steps(pattern):
    """The steps of tokenizer.json that split text by a pattern."""
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return [split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]


# Options of the entry `model` of tokenizer.json, and their values that are implemented
# besides absent, null and False.
# ignore_merges: a piece in the vocabulary is one token. tiktoken always does so.
MODEL_OPTIONS = {"type": ("BPE",), "ignore_merges": (True,)}


def read_tokenizer(name):
    """A folder with a tokenizer.json, or OWNER/MODEL on the hub -> its tokenizer."""
    path = find_folder(name) / "tokenizer.json"
    content = load_json(path, MADE_BY)
    try:
        return convert(str(name), content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a damaged file can make any line of convert fail
        raise UserError(
            f"{path} is damaged or of another kind ({error!r:.99})"
        ) from None


def convert(tokenizer_name, content):
    """The dictionary in a tokenizer.json -> PretrainedTokenizer."""
    model = content["model"]
    for key, value in model.items():
        if key in ("vocab", "merges") or not value:
            continue
        if value not in MODEL_OPTIONS.get(key, ()):
            raise UserError(f"model.{key} {value!r:.60} is not implemented")
    normalizer = content.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        raise UserError(f"normalizer {normalizer!r:.200} is not implemented")
    normalization = "NFC" if normalizer else ""
    pattern = read_pattern(content.get("pre_tokenizer") or {})

    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    if len({*added.values(), *model["vocab"].values()}) < len(added | model["vocab"]):
        raise UserError("two tokens have one id")
    chat_format, end, reserved = detect_chat_format(added)
    flags = ["lstrip", "rstrip", "single_word"]
    if normalization:
        flags.append("normalized")
    text_tokens = []
    for token in content["added_tokens"]:
        name = token["content"]
        if token.get("special", True) and name not in reserved:
            continue  # in data its name is plain text, and no chat format uses it
        for key in flags:
            if token.get(key):
                raise UserError(f"{key} of the added token {name!r} is not implemented")
        if name and name not in reserved:
            text_tokens.append(name)

    byte_of, ranks = byte_alphabet(), {}
    for text, number in model["vocab"].items():
        if text not in added:
            ranks[bytes(byte_of[character] for character in text)] = number
    check_merges(model["merges"], model["vocab"], ranks)
    return PretrainedTokenizer(
        tokenizer_name,
        ranks,
        pattern,
        added,
        end,
        normalization,
        chat_format=chat_format,
        text_tokens=text_tokens,
    )


def read_pattern(pre_tokenizer):
    """The pre_tokenizer of tokenizer.json -> a pattern of tiktoken."""
    steps = []
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        # trim_offsets does not change the tokens.
        step = {key: value for key, value in step.items() if key != "trim_offsets"}
        steps.append(step)
    if steps == SMOLLM2_STEPS:
        return SMOLLM2
    for pattern in (QWEN, LLAMA3):
        if steps == split_steps(pattern):
            return pattern
    raise UserError(f"pre_tokenizer {steps!r:.200} is not implemented")


def detect_chat_format(added):
    """Recognize the chat format by its end token.

    added: {name: id} of the added tokens
    Returns the name of the chat format or '', the token that ends a response, and all
    special tokens that the format uses.
    """
    for name, chat_format in CHAT_FORMATS.items():
        end = chat_format.end[0]
        if end in added:
            parts = chat_format.start + chat_format.header + chat_format.end
            reserved = [part for part in parts if part.startswith("<|")]
            for token in reserved:
                if token not in added:
                    raise UserError(f"{token} is missing among the added tokens")
            return name, end, reserved
    for end in PLAIN_ENDS:
        if end in added:
            return "", end, [end]
    ends = [chat_format.end[0] for chat_format in CHAT_FORMATS.values()]
    ends += PLAIN_ENDS
    raise UserError(
        f"no known end of a response ({', '.join(ends)}) is among the added tokens "
        f"{list(added)!s:.99}"
    )


def byte_alphabet():
    """{character: byte}, the inverse of GPT-2's bytes_to_unicode."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in printable}
    unprintable = [byte for byte in range(256) if byte not in printable]
    for number, byte in enumerate(unprintable):
        byte_of[chr(256 + number)] = byte
    return byte_of


def check_merges(merges, vocabulary, ranks):
    """Check that tiktoken merges in the order of the file.

    tiktoken merges the pair of neighbours whose merged token has the smallest id. That
    is the order of the file only if its merges are sorted by id.
    """
    merged = []
    for pair in merges:
        first, second = pair.split(" ") if isinstance(pair, str) else pair
        merged.append(vocabulary[first + second])
    if merged != sorted(merged):
        raise UserError("merges are not in the order of their tokens' ids")
    longer = {number for token, number in ranks.items() if len(token) > 1}
    unreachable = longer - set(merged)
    if unreachable:
        raise UserError(f"no merge makes the tokens {sorted(unreachable)[:5]}")
