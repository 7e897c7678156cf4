"""A pretrained model's folder in Hugging Face's layout, read: its sizes and its weights.

Llama, Qwen 2.5 and Qwen 3 are read; what a config.json asks for and the model does not have is an
error by name, never wrong logits. Left out: other formats, quantised weights.
"""
import json

import numpy as np
import torch

from config import UserError
from data.files import load_json
from data.hub import find_folder
from data.tokenizer_json import read_tokenizer

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What these keys may say (None: absent or null); anything else asks for what the model lacks.
ALLOWED = {
    "model_type": ("llama", "qwen2", "qwen3"), "hidden_act": ("silu",), "rope_scaling": (None,),
    "partial_rotary_factor": (None, 1), "use_sliding_window": (None, False),
    "attention_bias": (None, False), "mlp_bias": (None, False), "quantization_config": (None,),
    "rope_interleaved": (None, False), "tie_word_embeddings": (None, False, True)}


def read_config(path):
    """config.json -> {field of ModelConfig: value}"""
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
    return dict(
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


def read_folder(name, tokenizer=None, block_size=0):
    """A folder, or owner/model on the hub -> {field of ModelConfig: value}, {name: tensor}.

    tokenizer, block_size: a dataset's, if any. The tokenizer must be the folder's own; rows of the
    vocabulary that it cannot make are left out."""
    folder = find_folder(name)
    sizes = read_config(folder / "config.json")
    if block_size > sizes["block_size"]:
        raise UserError(f"{folder} reads {sizes['block_size']} tokens, the dataset's rows have up "
                        f"to {block_size}; prepare it with --block_size={sizes['block_size']}")
    sizes["block_size"] = block_size or sizes["block_size"]
    if tokenizer and read_tokenizer(name).fingerprint != tokenizer.fingerprint:
        raise UserError(f"the dataset's tokenizer is {tokenizer.name}, not that of {name}; prepare "
                        f"it with --tokenizer={name}")
    whole, weights = folder / "model.safetensors", {}
    parts = [] if whole.exists() else sorted(folder.glob("model-*-of-*.safetensors"))
    if len({file.name[-17:] for file in parts}) > 1:
        raise UserError(f"{folder} holds the parts of more than one model")
    for file in parts or [whole]:
        weights |= read_safetensors(file)
    if tokenizer:
        if tokenizer.vocab_size > sizes["vocab_size"]:
            raise UserError(f"{folder} knows {sizes['vocab_size']} tokens, its tokenizer.json "
                            f"{tokenizer.vocab_size}")
        sizes["vocab_size"] = tokenizer.vocab_size
        for key in {"model.embed_tokens.weight", "lm_head.weight"} & weights.keys():
            weights[key] = weights[key][:tokenizer.vocab_size].clone()
    return sizes, weights
