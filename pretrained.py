"""A reward model in Hugging Face's layout, written for other people's programs.

    python pretrained.py --checkpoint=out/mine-icrm-seed0 --out=FOLDER
"""
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from config import UserError, run_script
import numpy as np

from data.files import load_checkpoint, load_json, write_atomically, write_text
from data.hub import find_folder
from data.probs import described
from data.tokenizer import from_dict
from data.tokenizer_json import read_tokenizer


@dataclass(frozen=True)
class ExportConfig:
    checkpoint: str = ""        # a reward model whose generator came from a pretrained model
    out: str = ""               # the folder to write


def write_safetensors(path, weights):
    """{name: tensor} -> a .safetensors file, in fp32."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, weight in weights.items():
        start, end = end, end + 4 * weight.numel()
        header[name] = {"dtype": "F32", "shape": list(weight.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary):
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for weight in weights.values():
                file.write(np.ascontiguousarray(weight.float().numpy(), "<f4"))
    write_atomically(path, write)


def chat_template(turns):
    """A tokenizer's turns (data/tokenizer.py's Format) as transformers' template; nothing stands
    behind the end of the last turn, where the reward is read."""
    head = "".join(turns.head).replace("{role}", "{{ m['role'] }}")
    end, *rest = turns.end
    between = f"{{{{ {''.join(rest)!r} if not loop.last }}}}"
    return ("".join(turns.start) + "{% for m in messages %}" + head + "{{ m['content'] }}"
            + end + between + "{% endfor %}")


def export(checkpoint, folder):
    """A reward model's checkpoint -> a folder that AutoModelForSequenceClassification opens."""
    generator = load_checkpoint(checkpoint["settings"]["generator"], "generator", "policy")
    described(checkpoint["settings"]["generator"], checkpoint["inputs"]["p"])
    name = generator["settings"].get("init_from")
    if not name:
        raise UserError("its generator did not start from a pretrained model: no program elsewhere "
                        "would know its tokenizer")
    if checkpoint["settings"]["readout"] != "last":
        raise UserError("only --readout=last is a reward that other programs compute")
    base, tokenizer = find_folder(name), from_dict(checkpoint["tokenizer"])
    if read_tokenizer(base).fingerprint != tokenizer.fingerprint:
        raise UserError(f"{base}, which its generator started from, has another tokenizer now")
    if folder.resolve() == base.resolve():
        raise UserError(f"{folder} holds the pretrained model itself; name another --out")
    known, about = (load_json(base / file, "the save_pretrained of transformers")
                    for file in ("config.json", "tokenizer_config.json"))
    written = {} if tokenizer.turns is None else tokenizer.turns.start + tokenizer.turns.head
    free = [token for token, i in tokenizer.special.items()
            if i != tokenizer.end_of_text and token not in written]
    if not free:
        raise UserError(f"the tokenizer of {base} has no special token to spare for padding")
    kind = known["model_type"].capitalize()     # Llama, Qwen2 or Qwen3
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", {
        key: weight for key, weight in checkpoint["model"].items() if key != "lm_head.weight"})
    about["pad_token"] = free[0]
    if tokenizer.turns:
        about["chat_template"] = chat_template(tokenizer.turns)
    write_text(folder / "tokenizer_config.json", json.dumps(about, indent=1))
    shutil.copyfile(base / "tokenizer.json", folder / "tokenizer.json")
    write_text(folder / "config.json", json.dumps(indent=1, obj=known | {
        "architectures": [f"{kind}ForSequenceClassification"], "torch_dtype": "float32",
        "dtype": "float32", "vocab_size": tokenizer.vocab_size, "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0}, "pad_token_id": tokenizer.special[free[0]]}))
    write_text(folder / "README.md", EXPORTED.format(kind=kind, pad=free[0], base=Path(name).name))


EXPORTED = """A reward model, {kind}ForSequenceClassification with one label, trained from {base}.

The score of a text is read at its last token that is not padding (`{pad}`), which must be the end
of the reply: the tokenizer's chat template, if it has one, writes such texts, without a system
message of its own. Batches may be padded on either side.
"""


def main(config):
    checkpoint = load_checkpoint(config.checkpoint, "reward model")
    if not config.out:
        raise UserError("name the folder to write with --out=FOLDER")
    export(checkpoint, Path(config.out))
    print(f"wrote {config.out}")


if __name__ == "__main__":
    run_script(ExportConfig, main)
