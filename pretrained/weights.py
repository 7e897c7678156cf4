"""A pretrained model's folder -> a LanguageModel.

    config.json        the sizes and the variant of the architecture
    model.safetensors  the weights, or several files model-*-of-*.safetensors

Not implemented: other architectures, scaled rotary positions, quantized weights.
"""

import json

from common import UserError, load_json
import numpy as np
import torch

from model import LanguageModel, ModelConfig
from pretrained import MADE_BY, find_folder
from pretrained.tokenizer import read_tokenizer

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# The values of config.json's keys that the model implements. None: absent or null.
IMPLEMENTED = {
    "model_type": ("llama", "qwen2", "qwen3"),
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "partial_rotary_factor": (None, 1),
    "use_sliding_window": (None, False),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "quantization_config": (None,),
    "rope_interleaved": (None, False),
    "tie_word_embeddings": (None, False, True),
}

SIZES = {  # field of ModelConfig: key of config.json
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "n_hidden": "intermediate_size",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
}
OPTIONAL_SIZES = ("n_kv_head", "head_dim")  # by default n_head, and n_embd / n_head


def check_config(name):
    """Raise a UserError for a key of config.json that the model does not implement.

    name: a folder, or OWNER/MODEL on the hub. The weights are not read
    """
    read_config(find_folder(name) / "config.json")


def read_config(path):
    """config.json -> {field of ModelConfig: value}"""
    config = load_json(path, MADE_BY)

    def check_value(key, *implemented):
        value = config.get(key)
        if value not in implemented:
            values = " or ".join(repr(value) for value in implemented)
            raise UserError(
                f"{path}: {key} {value!r:.99} is not implemented, only {values:.99}. "
                "Choose another model"
            )

    for key, implemented in IMPLEMENTED.items():
        check_value(key, *implemented)
    numbers = {"rope_theta": 10000.0, **config}
    if isinstance(config.get("rope_parameters"), dict):  # since transformers 5
        numbers.update(config["rope_parameters"])
    sizes = {}
    for field, key in SIZES.items():
        value = numbers.get(key)
        if value is None and field in OPTIONAL_SIZES:
            continue
        types = (int, float) if field in ("rope_theta", "norm_eps") else (int,)
        limit = 1000 if field == "n_layer" else 10**9
        if type(value) not in types or not 0 < value < limit:
            raise UserError(
                f"{path}: {key} must be a number above 0, not {value!r:.99}"
            )
        sizes[field] = value
    default_rope = {"rope_type": "default", "rope_theta": sizes["rope_theta"]}
    check_value("rope_parameters", None, default_rope)
    check_value("layer_types", None, ["full_attention"] * sizes["n_layer"])
    sizes["qkv_bias"] = config["model_type"] == "qwen2"
    sizes["qk_norm"] = config["model_type"] == "qwen3"
    sizes["tied"] = bool(config.get("tie_word_embeddings"))
    return sizes


def read_safetensors(path):
    """A .safetensors file -> {name: float32 tensor}.

    The file is 8 bytes with the header's size, the header in JSON, and the tensors.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
        header_size = int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8 : 8 + header_size].tobytes())
        header.pop("__metadata__", None)
        body = data[8 + header_size :]
        weights, unread_bytes = {}, len(body)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            unread_bytes -= end - start
            if not 0 <= start <= end <= len(body) or unread_bytes < 0:
                raise ValueError(f"{name} is outside the file or inside another tensor")
            values = bytearray(body[start:end])
            weight = torch.frombuffer(values, dtype=DTYPES[entry["dtype"]])
            weights[name] = weight.reshape(entry["shape"]).float()
            if not weights[name].isfinite().all():
                raise ValueError(f"{name} is not finite")
    except Exception as error:  # damaged bytes can make any line above fail
        raise UserError(
            f"{path} is missing, damaged or in another format ({error!r:.99})"
        ) from None
    return weights


def read_folder(name, tokenizer=None, block_size=0):
    """Read a folder's sizes and weights.

    tokenizer, block_size: a dataset's, if any. The tokenizer must be the folder's own.
        Rows of the embedding and the LM head beyond its largest id are left out
    Returns {field of ModelConfig: value}, {name: float32 tensor}.
    """
    folder = find_folder(name, weights=True)
    sizes = read_config(folder / "config.json")
    context, vocab_size = sizes["block_size"], sizes["vocab_size"]
    if block_size > context:
        raise UserError(
            f"{folder} has a context of {context} tokens, and the dataset's rows have "
            f"up to {block_size}. Prepare the dataset with --block_size={context}"
        )
    sizes["block_size"] = block_size or context
    if tokenizer is not None:
        if read_tokenizer(folder).fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"the dataset's tokenizer is {tokenizer.name}, not that of {name}. "
                f"Prepare the dataset with --tokenizer={name}"
            )
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"{folder} has {vocab_size} tokens in config.json, but "
                f"{tokenizer.vocab_size} in tokenizer.json"
            )
        sizes["vocab_size"] = tokenizer.vocab_size
    weights = {}
    for path in weight_files(folder):
        weights.update(read_safetensors(path))
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        if key in weights and weights[key].shape[:1] == (vocab_size,):
            weights[key] = weights[key][: sizes["vocab_size"]].clone()
    return sizes, weights


def weight_files(folder):
    """The paths of a folder's safetensors files."""
    single_file = folder / "model.safetensors"
    if single_file.exists():
        return [single_file]
    paths = sorted(folder.glob("model-*-of-*.safetensors"))
    if len({path.name.rpartition("-of-")[2] for path in paths}) > 1:
        raise UserError(f"{folder} holds the parts of more than one model")
    return paths or [single_file]


def load_pretrained(name, tokenizer=None, block_size=0):
    """A folder, or OWNER/MODEL on the hub -> LanguageModel.

    Weights that are missing, unknown or of another shape raise a UserError.
    """
    sizes, weights = read_folder(name, tokenizer, block_size)
    config = ModelConfig(**sizes)
    embedding = weights.get("model.embed_tokens.weight")
    if config.tied and embedding is not None:
        lm_head = weights.setdefault("lm_head.weight", embedding)
        if not torch.equal(lm_head, embedding):
            raise UserError(
                f"{name} ties its LM head to its embedding in config.json, but has two "
                "different ones. Set tie_word_embeddings to false"
            )
    try:
        with torch.device("meta"):  # no memory yet: config.json may ask for any size
            model = LanguageModel(config)
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the weights in {name} do not fit its config.json: {reason:.200}"
        ) from None
    model.tie_weights()
    return model
