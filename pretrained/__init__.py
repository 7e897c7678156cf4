"""Pretrained models in Hugging Face's layout, read and written.

    weights.py    config.json and *.safetensors -> LanguageModel, the generator
    tokenizer.py  tokenizer.json -> a tokenizer with the model's chat format
    export.py     a trained reward model -> a folder that transformers opens

The models are Llama, Qwen 2.5 and Qwen 3. A key of config.json or tokenizer.json that
changes the model, and is not implemented, is an error that names it. No file is
executed.
"""

import re
from pathlib import Path

from common import UserError

MADE_BY = "save_pretrained of transformers"  # for error messages about missing files
TOKENIZER_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors")


def find_folder(name, weights=False):
    """The folder of a model: a local one, or that of a download from the hub.

    name: a folder, or OWNER/MODEL on the hub. huggingface_hub downloads it once
    weights: whether the weights are needed too
    """
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        raise UserError(f"{name} is neither a folder nor OWNER/MODEL on the hub")
    patterns = TOKENIZER_FILES
    if weights:
        patterns += WEIGHT_FILES
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except ImportError:
        raise UserError(
            f"{name} is not a local folder. To download it, "
            "`pip install huggingface_hub`"
        ) from None
    except Exception as error:  # networks and access rules fail in many ways
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name} could not be downloaded ({type(error).__name__}: {reason:.200}). "
            "Download it in another way and name its folder"
        ) from None
