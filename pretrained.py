"""Weights in Hugging Face's layout: a folder with config.json and model.safetensors.

Llama, Qwen 2.5 and Qwen 3 are read; what a config.json asks for and the model does not have is an
error by name, never wrong logits. Left out: other formats, several files, quantised weights.
"""
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from config import UserError, read_json
from model import ModelConfig

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What these keys may say (None: absent or null); anything else asks for what the model lacks.
ALLOWED = {
    "model_type": ("llama", "qwen2", "qwen3"), "hidden_act": ("silu",), "rope_scaling": (None,),
    "partial_rotary_factor": (None, 1), "use_sliding_window": (None, False),
    "attention_bias": (None, False), "mlp_bias": (None, False), "quantization_config": (None,),
    "tie_word_embeddings": (None, False, True)}


def read_config(path):
    """config.json -> ModelConfig."""
    found = read_json(path, "the save_pretrained of transformers")
    rope = found.get("rope_parameters")
    numbers = {"rope_theta": 10000.0} | found | (rope if isinstance(rope, dict) else {})

    def number(key, default=None, kinds=(int,)):
        value = default if numbers.get(key) is None else numbers[key]
        if type(value) not in kinds or not value > 0:
            raise UserError(f"{path}: {key} must be a number above 0, not {value!r}")
        return value

    plain = {"rope_type": "default", "rope_theta": numbers["rope_theta"]}
    layers = ["full_attention"] * number("num_hidden_layers")
    asked = ALLOWED | {"rope_parameters": (None, plain), "layer_types": (None, layers)}
    for key, allowed in asked.items():
        if found.get(key) not in allowed:
            raise UserError(f"{path}: {key} {found.get(key)!r} asks for what this model lacks")
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
        body, found = data[8 + length:], {}
        for name, about in header.items():
            start, end = about["data_offsets"]
            if not 0 <= start <= end <= len(body):
                raise ValueError(f"{name} lies outside the file")
            part = torch.frombuffer(bytearray(body[start:end]), dtype=DTYPES[about["dtype"]])
            found[name] = part.reshape(about["shape"]).float()
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is missing, damaged or of another kind ({error!r:.99})") from None


def read_folder(folder, vocab_size=None, block_size=0):
    """A folder -> (ModelConfig, {name: tensor}); vocab_size, block_size: a dataset's, if any."""
    config = read_config(Path(folder) / "config.json")
    if vocab_size not in (None, config.vocab_size):
        raise UserError(f"{folder} knows {config.vocab_size} tokens, the dataset {vocab_size}")
    if block_size > config.block_size:
        raise UserError(f"{folder} reads {config.block_size} tokens, the dataset's rows have up to "
                        f"{block_size}; prepare it with --block_size={config.block_size}")
    config = dataclasses.replace(config, block_size=block_size or config.block_size)
    return config, read_safetensors(Path(folder) / "model.safetensors")
