"""Write a reward model as a folder that transformers opens.

    python pretrained/export.py --checkpoint=out/mine-icrm-seed0 --out=FOLDER

The folder is a sequence-classification model with one label. The generator of the
reward model must have started from a pretrained model.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import (
    UserError,
    find_near,
    load_checkpoint,
    load_json,
    run_script,
    write_atomically,
)
import numpy as np

from data.tokenizer import from_dict
from generator import read_p_metadata
from pretrained import MADE_BY, find_folder
from pretrained.tokenizer import read_tokenizer

README = """A reward model, {architecture} with one label, trained from {base}.

The reward of a text is the score of its last token that is not padding (`{pad}`).
That token must be the end of the response. {usage}
"""
CHAT_USAGE = """The chat template writes such texts. It adds no system
message:

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForSequenceClassification.from_pretrained(FOLDER)
messages = [
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Hello."},
]
tokens = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
reward = model(**tokens).logits[0, 0]
```

If you tokenize the template's text yourself, pass `add_special_tokens=False`. It has
all special tokens already. Batches may be padded on either side."""
PLAIN_USAGE = """Write prompts as in training, and tokenize
with `add_special_tokens=False`. Batches may be padded on either side."""


@dataclass(frozen=True)
class ExportConfig:
    checkpoint: str = ""  # a reward model: its folder or ckpt.pt
    out: str = ""  # the folder to write


def write_safetensors(path, weights):
    """Write {name: tensor} to a .safetensors file, in float32."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, weight in weights.items():
        start, end = end, end + 4 * weight.numel()
        header[name] = {
            "dtype": "F32",
            "shape": list(weight.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns tensors to 8 bytes

    def write(temporary):
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for weight in weights.values():
                file.write(np.ascontiguousarray(weight.float().numpy(), "<f4"))

    write_atomically(path, write)


def write_text(path, text):
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def chat_template(chat_format):
    """A ChatFormat as a template of transformers.

    Nothing follows the end token of the last turn, where the reward is read.
    """
    header = "".join(chat_format.header).replace("{role}", "{{ m['role'] }}")
    end, *separator = chat_format.end
    turn = header + "{{ m['content'] }}" + end
    turn += f"{{{{ {''.join(separator)!r} if not loop.last }}}}"
    start = "".join(chat_format.start)
    return start + "{% for m in messages %}" + turn + "{% endfor %}"


def choose_padding(tokenizer):
    """The name of a special token that no text and no prompt of this model contains."""
    used = list(tokenizer.text_tokens)
    if tokenizer.chat_format:
        used += tokenizer.chat_format.start + tokenizer.chat_format.header
    for name, number in tokenizer.special.items():
        if number != tokenizer.end_of_text and name not in used:
            return name
    raise UserError(
        f"the tokenizer of {tokenizer.name} has no special token to pad with"
    )


def export(checkpoint, folder):
    """Write a reward model's checkpoint to a folder in Hugging Face's layout."""
    settings = checkpoint["settings"]
    generator_folder = find_near(checkpoint, settings["generator"])
    generator = load_checkpoint(generator_folder, "generator", "policy")
    read_p_metadata(generator_folder, checkpoint["inputs"]["p"])  # raises if it changed
    name = generator["settings"].get("init_from")
    if not name:
        raise UserError(
            "the generator did not start from a pretrained model, so other programs "
            "cannot read its tokenizer. Train a generator with --init_from=MODEL, and "
            "a reward model from it"
        )
    if settings["prefix_reward"] != "last":
        raise UserError("other programs can only compute --prefix_reward=last")
    base, tokenizer = find_folder(name), from_dict(checkpoint["tokenizer"])
    if read_tokenizer(base).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{base}, from which the generator started, has another tokenizer now"
        )
    if folder.resolve() == base.resolve():
        raise UserError(f"{folder} is the pretrained model itself. Name another --out")
    config = load_json(base / "config.json", MADE_BY)
    tokenizer_config = load_json(base / "tokenizer_config.json", MADE_BY)
    pad = choose_padding(tokenizer)
    architecture = f"{config['model_type'].capitalize()}ForSequenceClassification"
    config.update(
        architectures=[architecture],
        torch_dtype="float32",
        dtype="float32",
        vocab_size=tokenizer.vocab_size,
        id2label={"0": "LABEL_0"},
        label2id={"LABEL_0": 0},
        pad_token_id=tokenizer.special[pad],
    )
    tokenizer_config["pad_token"] = pad
    tokenizer_config.pop("chat_template", None)
    if tokenizer.chat_format:
        tokenizer_config["chat_template"] = chat_template(tokenizer.chat_format)
    usage = CHAT_USAGE if tokenizer.chat_format else PLAIN_USAGE
    readme = README.format(
        architecture=architecture, pad=pad, base=Path(name).name, usage=usage
    )
    weights = dict(checkpoint["model"])
    del weights["lm_head.weight"]
    write_safetensors(folder / "model.safetensors", weights)
    write_text(folder / "tokenizer_config.json", json.dumps(tokenizer_config, indent=1))
    shutil.copyfile(base / "tokenizer.json", folder / "tokenizer.json")
    write_text(folder / "config.json", json.dumps(config, indent=1))
    write_text(folder / "README.md", readme)


def main(config):
    checkpoint = load_checkpoint(config.checkpoint, "reward model")
    if not config.out:
        raise UserError("name the folder to write with --out=FOLDER")
    export(checkpoint, Path(config.out))
    print(f"wrote {config.out}")


if __name__ == "__main__":
    run_script(ExportConfig, main)
