"""Models in Hugging Face's layout: read to start from, and written for other people's programs.

    python pretrained.py --checkpoint=out/mine-icrm-seed0 --out=FOLDER

Llama, Qwen 2.5 and Qwen 3 are read; what a config.json asks for and the model does not have is an
error by name, never wrong logits. Left out: other formats, quantised weights.
"""
import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from config import UserError, run_script, show
import numpy as np
import torch

from data.files import load_checkpoint, load_json, write_atomically, write_text
from data.hub import find_folder
from data.tokenizer import from_dict
from data.tokenizer_json import read_tokenizer
from model import LanguageModel, ModelConfig, load_weights

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What these keys may say (None: absent or null); anything else asks for what the model lacks.
ALLOWED = {
    "model_type": ("llama", "qwen2", "qwen3"), "hidden_act": ("silu",), "rope_scaling": (None,),
    "partial_rotary_factor": (None, 1), "use_sliding_window": (None, False),
    "attention_bias": (None, False), "mlp_bias": (None, False), "quantization_config": (None,),
    "rope_interleaved": (None, False), "tie_word_embeddings": (None, False, True)}


def read_config(path):
    """config.json -> ModelConfig."""
    found = load_json(path, "the save_pretrained of transformers")
    rope = found.get("rope_parameters")
    numbers = {"rope_theta": 10000.0} | found | (rope if isinstance(rope, dict) else {})

    def number(key, default=None, kinds=(int,), most=10 ** 9):
        value = default if numbers.get(key) is None else numbers[key]
        if type(value) not in kinds or not 0 < value < most:
            raise UserError(f"{path}: {key} must be a number above 0, not {value!r:.99}")
        return value

    plain = {"rope_type": "default", "rope_theta": numbers["rope_theta"]}
    layers = ["full_attention"] * number("num_hidden_layers", most=1000)
    asked = ALLOWED | {"rope_parameters": (None, plain), "layer_types": (None, layers)}
    for key, allowed in asked.items():
        if found.get(key) not in allowed:
            raise UserError(f"{path}: {key} {found.get(key)!r:.99} asks for what this model lacks")
    heads, width, kind = number("num_attention_heads"), number("hidden_size"), found["model_type"]
    return ModelConfig(
        vocab_size=number("vocab_size"), block_size=number("max_position_embeddings"),
        n_layer=len(layers), n_head=heads, n_embd=width,
        n_kv_head=number("num_key_value_heads", heads), head_dim=number("head_dim", width // heads),
        n_hidden=number("intermediate_size"), rope_theta=number("rope_theta", kinds=(int, float)),
        norm_eps=number("rms_norm_eps", kinds=(int, float)), qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3", tied=found.get("tie_word_embeddings") or False)


def read_safetensors(path):
    """A .safetensors file -> {name: tensor in fp32}, all inside the file, nothing executed."""
    try:
        data = np.memmap(path, np.uint8, "r")
        length = int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:8 + length].tobytes())
        header.pop("__metadata__", None)
        body, found, left = data[8 + length:], {}, len(data) - 8 - length
        for name, about in header.items():
            start, end = about["data_offsets"]
            left -= end - start
            if not 0 <= start <= end <= len(body) or left < 0:
                raise ValueError(f"{name} lies outside the file, or inside another tensor")
            part = torch.frombuffer(bytearray(body[start:end]), dtype=DTYPES[about["dtype"]])
            found[name] = part.reshape(about["shape"]).float()
            if not found[name].isfinite().all():
                raise ValueError(f"{name} is not finite")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError,
            RecursionError) as error:
        raise UserError(f"{path} is missing, damaged or of another kind ({error!r:.99})") from None


def read_weights(folder):
    """All of a folder's weights, in one file or several -> {name: tensor in fp32}"""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return read_safetensors(folder / "model.safetensors")
    files = load_json(index, "the save_pretrained of transformers").get("weight_map")
    if not isinstance(files, dict) or any(Path(str(file)).name != file for file in files.values()):
        raise UserError(f"{index} is damaged: weight_map does not name files of its folder")
    found = {}
    for file in sorted(set(files.values())):
        found |= read_safetensors(folder / file)
    for name in files.keys() ^ found.keys():
        raise UserError(f"{index} and the files that it names do not both have {name}")
    return found


def read_folder(name, tokenizer=None, block_size=0):
    """A folder, or owner/model on the hub -> (ModelConfig, {name: tensor}).

    tokenizer, block_size: a dataset's, if any. The tokenizer must be the folder's own; rows of the
    vocabulary that it cannot make are left out."""
    folder = find_folder(name)
    config = read_config(folder / "config.json")
    if block_size > config.block_size:
        raise UserError(f"{folder} reads {config.block_size} tokens, the dataset's rows have up to "
                        f"{block_size}; prepare it with --block_size={config.block_size}")
    config = dataclasses.replace(config, block_size=block_size or config.block_size)
    if tokenizer and read_tokenizer(name).fingerprint != tokenizer.fingerprint:
        raise UserError(f"the dataset's tokenizer is {tokenizer.name}, not that of {name}; prepare "
                        f"it with --tokenizer={name}")
    weights = read_weights(folder)
    if tokenizer:
        if tokenizer.vocab_size > config.vocab_size:
            raise UserError(f"{folder} knows {config.vocab_size} tokens, its tokenizer.json "
                            f"{tokenizer.vocab_size}")
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
        for key in {"model.embed_tokens.weight", "lm_head.weight"} & weights.keys():
            weights[key] = weights[key][:tokenizer.vocab_size]
    try:
        with torch.device("meta"):      # without memory: config.json may ask for any
            load_weights(LanguageModel(config), weights, folder, assign=True)
    except RuntimeError as error:
        raise UserError(f"{folder}: no model has the sizes of its config.json ({error!s:.99})")
    return config, weights


# Export ------------------------------------------------------------------------------------------

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
    base = generator["settings"].get("init_from")
    if not base:
        raise UserError("its generator did not start from a pretrained model: no program elsewhere "
                        "would know its tokenizer")
    if checkpoint["settings"]["readout"] != "last":
        raise UserError("only --readout=last is a reward that other programs compute")
    base, tokenizer = find_folder(base), from_dict(checkpoint["tokenizer"])
    known = load_json(base / "config.json", "the save_pretrained of transformers")
    written = {} if tokenizer.turns is None else tokenizer.turns.start + tokenizer.turns.head
    free = [name for name, i in tokenizer.special.items()
            if i != tokenizer.end_of_text and name not in written]
    if not free:
        raise UserError(f"the tokenizer of {base} has no special token to spare for padding")
    kind = known["model_type"].capitalize()     # Llama, Qwen2 or Qwen3
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", {
        name: weight for name, weight in checkpoint["model"].items() if name != "lm_head.weight"})
    about = load_json(base / "tokenizer_config.json", "the save_pretrained of transformers")
    about["pad_token"] = free[0]
    if tokenizer.turns:
        about["chat_template"] = chat_template(tokenizer.turns)
    write_text(folder / "tokenizer_config.json", json.dumps(about, indent=1))
    shutil.copyfile(base / "tokenizer.json", folder / "tokenizer.json")
    write_text(folder / "config.json", json.dumps(indent=1, obj=known | {
        "architectures": [f"{kind}ForSequenceClassification"], "torch_dtype": "float32",
        "dtype": "float32", "vocab_size": tokenizer.vocab_size, "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0}, "pad_token_id": tokenizer.special[free[0]]}))
    write_text(folder / "README.md", EXPORTED.format(kind=kind, pad=free[0], base=base.name))


EXPORTED = """A reward model, {kind}ForSequenceClassification with one label, trained from {base}.

The score of a text is read at its last token that is not padding (`{pad}`), which must be the end
of the reply: tokenizer.apply_chat_template writes such texts, without a system message of its own.
Batches may be padded on either side.
"""


def main(config):
    show(config)
    checkpoint = load_checkpoint(config.checkpoint, "reward model")
    if not config.out:
        raise UserError("name the folder to write with --out=FOLDER")
    export(checkpoint, Path(config.out))
    print(f"wrote {config.out}")


if __name__ == "__main__":
    run_script(ExportConfig, main)
