"""Weights in Hugging Face's layout of GPT-2: read them to start from, write a reward model for other tools.

    python generator.py --init_from=gpt2 --dataset=mine ...         published weights, downloaded once
    python train.py --init_from=gpt2 --dataset=mine ...             after it: the reward model starts from the generator
    python evaluate.py --checkpoint=CKPT --export=FOLDER            a one-label GPT2ForSequenceClassification

The layout is GPT-2's own names (model.py has them too) with the matrices of every block transposed. Files are
pytorch_model.bin, read with weights_only=True, or model.safetensors: the length of a JSON header, the header,
and the raw bytes that it points into. Left out: weights in several files, and other architectures.
"""
import dataclasses
import hashlib
import http.client
import json
import struct
import urllib.error
import urllib.request
from pathlib import Path

import torch
from tqdm import tqdm

from config import UserError, write_atomically, write_json
from data.tokenizer import END_OF_TEXT
from model import ModelConfig

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
URL = "https://huggingface.co/openai-community/{name}/resolve/main/{file}"
SHA256 = {"gpt2/model.safetensors": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "U8": torch.uint8, "BOOL": torch.bool}
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")   # Conv1D: (in, out)
PAD = "<|pad|>"


# Files ----------------------------------------------------------------------------------------------

def read_safetensors(path):
    """A .safetensors file -> {name: tensor}."""
    content = Path(path).read_bytes()
    try:
        size, = struct.unpack("<Q", content[:8])
        header = json.loads(content[8:8 + size])
        body, tensors = memoryview(content)[8 + size:], {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                if end > len(body):
                    raise UserError(f"{path} is cut short: {name} would end {end - len(body)} bytes behind its end")
                tensors[name] = torch.frombuffer(bytearray(body[start:end]), dtype=DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return tensors
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({type(error).__name__})") from None


def write_safetensors(path, tensors):
    """{name: fp32 tensor} -> a .safetensors file."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + 4 * tensor.numel()]}
        offset += 4 * tensor.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary):
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor in tensors.values():
                file.write(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    write_atomically(path, write)


def obtain_folder(name):
    """The folder that holds config.json and the weights: a folder of the user's, or one to which they are downloaded."""
    if name not in NAMES:
        if not Path(name).is_dir():
            raise UserError(f"--init_from={name} is no folder; name one with config.json and model.safetensors or "
                            f"pytorch_model.bin in it, or one of: {', '.join(NAMES)}")
        return Path(name)
    folder = Path(torch.hub.get_dir()) / "icrm" / name
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).exists():
            try:
                download(URL.format(name=name, file=file), folder / file, SHA256.get(f"{name}/{file}"))
            except NetworkError as error:
                raise UserError(f"{name} could not be downloaded ({error}); put its config.json and model.safetensors "
                                f"(huggingface.co/openai-community/{name}) into {folder}, or pass a folder that has them") from None
    return folder


class NetworkError(Exception):
    """What went wrong on the way, in a word or two."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None     # so that the redirect itself is the answer


def sha256_of(url):
    """What the hub says that a large file's sha256 is, in the redirect to its storage; None for small files."""
    try:
        with urllib.request.build_opener(NoRedirect).open(urllib.request.Request(url, method="HEAD"), timeout=30) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as error:
        if error.code >= 400:
            raise
        headers = error.headers
    tag = (headers.get("X-Linked-ETag") or "").strip('"')
    return tag if len(tag) == 64 else None


def download(url, path, sha256=None):
    """Fetch a file; kept only if it is whole and its sha256 is the one given, or the one that the hub names."""
    def write(temporary):
        digest, received = hashlib.sha256(), 0
        try:
            expected = sha256 or sha256_of(url)
            with urllib.request.urlopen(url, timeout=30) as source, open(temporary, "wb") as file:
                total = int(source.headers.get("Content-Length") or 0)
                with tqdm(total=total, desc=Path(path).name, unit="B", unit_scale=True, disable=None, leave=False) as progress:
                    while part := source.read(1 << 20):
                        file.write(part), digest.update(part), progress.update(len(part))
                        received += len(part)
        except (OSError, http.client.HTTPException) as error:
            raise NetworkError(getattr(error, "code", None) or type(error).__name__) from None
        if received < total:
            raise NetworkError(f"{received} of {total} bytes came")
        if expected and digest.hexdigest() != expected:
            raise NetworkError(f"its sha256 is {digest.hexdigest()[:12]}..., not {expected[:12]}...")
    write_atomically(path, write)


# Names and shapes -----------------------------------------------------------------------------------

def read_sizes(folder):
    """A folder's config.json -> ModelConfig."""
    try:
        sizes = json.loads((folder / "config.json").read_text())
        return ModelConfig(*(int(sizes[key]) for key in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/config.json is missing, or not that of a GPT-2 ({type(error).__name__})") from None


def read_pretrained(name):
    """A name in NAMES or a folder -> (ModelConfig, {name: tensor} under model.py's names and shapes)."""
    folder = obtain_folder(name)
    config = read_sizes(folder)
    if (folder / "model.safetensors").exists():
        state = read_safetensors(folder / "model.safetensors")
    elif (folder / "pytorch_model.bin").exists():
        try:
            state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a file of other bytes makes the unpickler raise
            raise UserError(f"{folder}/pytorch_model.bin is not a file of weights, or is cut short ({type(error).__name__})") from None
    else:
        raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
    return config, from_hugging_face(state)


def from_hugging_face(state):
    """Names with or without `transformer.`, blocks' matrices (in, out), causal masks kept as buffers -> our names and shapes."""
    found = {}
    for name, tensor in state.items():
        name = name if name.startswith(("lm_head.", "score.")) else "transformer." + name.removeprefix("transformer.")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            found[name] = tensor.float().t().contiguous() if name.endswith(TRANSPOSED) else tensor.float()
    return found


def load_weights(model, state, source):
    """Copy weights into a model; the first tensor that is missing, left over or of another shape is a UserError.

    A longer table of positions is cut to the model's context; a missing LM head is the embedding it is tied to."""
    state = dict(state)
    if "lm_head.weight" not in state and "transformer.wte.weight" in state:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    expected = model.state_dict()
    if len(state.get("transformer.wpe.weight", ())) > model.transformer.config.block_size:
        state["transformer.wpe.weight"] = state["transformer.wpe.weight"][:model.transformer.config.block_size]
    for name, tensor in expected.items():
        if name not in state:
            raise UserError(f"{source}: the weights have no {name}")
        if state[name].shape != tensor.shape:
            raise UserError(f"{source}: {name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}")
    for name in state:
        if name not in expected:
            raise UserError(f"{source}: the model has no {name}")
    model.load_state_dict(state)


# Export ---------------------------------------------------------------------------------------------

def export_reward_model(model, tokenizer, checkpoint, folder):
    """Write a folder that transformers loads as a one-label GPT2ForSequenceClassification with its tokenizer, and
    icrm.json, with which evaluate.py loads it again. The LM head of the training stays behind.

    It reads the score at the last token that is not padding, so padding is a token of its own, behind the vocabulary;
    end a text with <|endoftext|>, where this reward model reads its reward."""
    config, folder = model.transformer.config, Path(folder)
    tensors = {name: tensor.t() if name.endswith(TRANSPOSED) else tensor for name, tensor in model.state_dict().items()
               if not name.startswith("lm_head.")}
    embedding = tensors["transformer.wte.weight"]
    tensors["transformer.wte.weight"] = torch.cat([embedding, torch.zeros_like(embedding[:1])])     # one row for padding
    write_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", {
        "architectures": ["GPT2ForSequenceClassification"], "model_type": "gpt2", "vocab_size": config.vocab_size + 1,
        "n_positions": config.block_size, "n_ctx": config.block_size, "n_embd": config.n_embd, "n_layer": config.n_layer,
        "n_head": config.n_head, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "num_labels": 1,
        "id2label": {"0": "reward"}, "label2id": {"reward": 0}, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text, "pad_token_id": config.vocab_size,
        "torch_dtype": "float32"})
    special = [{"id": tokenizer.end_of_text + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True} for i, text in enumerate((END_OF_TEXT, PAD))]
    letters = byte_letters()
    spell = lambda token: "".join(letters[byte] for byte in token)
    ranks = tokenizer.ranks()
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": tokenizer.split}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "vocab": {spell(token): rank for token, rank in ranks.items()},
                  "merges": [[spell(left), spell(right)] for left, right in merges_of(ranks)]}})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": PAD,
        "model_max_length": config.block_size, "clean_up_tokenization_spaces": False})
    write_json(folder / "icrm.json", {"tokenizer": tokenizer.to_dict()} |
               {key: checkpoint[key] for key in ("settings", "dataset_kind")})


def byte_letters():
    """GPT-2's spelling of bytes: printable ones stand for themselves, the others for letters from U+0100 on.  -> {byte: letter}"""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def merges_of(ranks):
    """{bytes: rank} -> every pair of tokens that makes a longer one, in order of its rank: merged as tiktoken merges."""
    return [(token[:i], token[i:]) for token, _ in sorted(ranks.items(), key=lambda item: item[1])
            for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]


def import_reward_model(folder):
    """A folder that export_reward_model wrote -> what a checkpoint holds."""
    try:
        stored = json.loads((Path(folder) / "icrm.json").read_text())
        checkpoint = {key: stored[key] for key in ("tokenizer", "settings", "dataset_kind")}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder}/icrm.json is damaged; export the model again") from None
    config, state = read_pretrained(str(folder))
    if "transformer.wte.weight" in state:
        state["transformer.wte.weight"] = state["transformer.wte.weight"][:-1]      # without padding's row
    return checkpoint | {"model": state, "model_config": dataclasses.asdict(config) | {"vocab_size": config.vocab_size - 1}}
