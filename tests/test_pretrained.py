"""Folders in Hugging Face's layout are read to the logits of the library that wrote them.

tests/pretrained/ was made once with transformers 5.24 and torch 2.13: save_pretrained of a
LlamaForCausalLM in float32, a Qwen2ForCausalLM in bfloat16 and a Qwen3ForCausalLM in float16, every
weight drawn anew with std 0.3, norms' around 1; logits.json holds `tokens` and their `logits`.
"""
import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch

import generator
import pretrained
from config import UserError, load_checkpoint
from data.dataset import open_dataset
from model import LanguageModel, load_weights
from pretrained import read_config, read_folder

FOLDERS = Path(__file__).parent / "pretrained"


@pytest.fixture
def copy_of(tmp_path):
    """A function of a folder's name and changes to its config.json (...: no key) -> its copy."""
    def copy(name="llama", **changes):
        folder = shutil.copytree(FOLDERS / name, tmp_path / name, dirs_exist_ok=True)
        settings = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(
            {key: value for key, value in settings.items() if value is not ...}))
        return folder
    return copy


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_the_logits_are_those_of_transformers(name):
    config, weights = read_folder(FOLDERS / name)
    model = LanguageModel(config)
    load_weights(model, weights, name)
    stored = json.loads((FOLDERS / name / "logits.json").read_text())
    found = model.lm_head(model.model(torch.tensor(stored["tokens"]), torch.arange(12)[None]))
    assert torch.allclose(found, torch.tensor(stored["logits"]), rtol=0, atol=1e-4)


def test_keys_of_older_files_say_the_same(copy_of):
    old = dict(rope_parameters=..., rope_scaling=None, torch_dtype="float32", layer_types=...)
    folder = copy_of("llama", rope_theta=5e5, head_dim=None, sliding_window=4096, **old)
    assert read_config(folder / "config.json") == read_config(FOLDERS / "llama/config.json")
    folder = copy_of("llama", tie_word_embeddings=..., num_key_value_heads=..., head_dim=..., **old)
    absent = read_config(folder / "config.json")
    assert (absent.rope_theta, absent.tied, absent.n_kv_head, absent.head_dim) == (1e4, False, 4, 4)


@pytest.mark.parametrize("key, value", [
    ("model_type", "mistral"), ("hidden_act", "gelu"), ("mlp_bias", True), ("attention_bias", True),
    ("use_sliding_window", True), ("layer_types", ["sliding_attention"]), ("rope_parameters", [1]),
    ("rope_scaling", {"rope_type": "llama3"}), ("rope_parameters", {"rope_type": "yarn"}),
    ("partial_rotary_factor", 0.5), ("quantization_config", {"bits": 4}), ("vocab_size", ...),
    ("tie_word_embeddings", "yes"), ("hidden_size", "16"), ("head_dim", -4)])
def test_what_the_model_lacks_is_an_error_by_name(copy_of, key, value):
    with pytest.raises(UserError, match=f"config.json: .*{key}"):
        read_folder(copy_of(**{key: value}))


@pytest.mark.parametrize("folder, name, weights, message", [
    ("qwen2", "lm_head.weight", None, "Missing key.*lm_head"),
    ("qwen2", "model.layers.7.bias", torch.ones(2), "Unexpected key.*model.layers.7.bias"),
    ("qwen2", "model.norm.weight", torch.ones(2), "size mismatch for model.norm.weight"),
    ("llama", "lm_head.weight", torch.ones(60, 16), "its LM head is its embedding, and holds two")])
def test_weights_that_do_not_fit_are_named(folder, name, weights, message):
    config, found = read_folder(FOLDERS / folder)
    found[name] = weights
    found = {key: value for key, value in found.items() if value is not None}
    with pytest.raises(UserError, match=message):
        load_weights(LanguageModel(config), found, "w")


def test_bad_files_are_one_line_errors(copy_of):
    folder = copy_of()
    whole = (folder / "model.safetensors").read_bytes()
    bad = [b"\xff" * 8 + whole[8:], *(whole[:size] for size in (0, 5, 8, 50, len(whole) - 1))]
    for key, value in (("data_offsets", [0, 9]), ("data_offsets", [-8, 8]), ("shape", [3]),
                       ("data_offsets", 3), ("shape", [2 ** 70]), ("dtype", "I4")):
        entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | {key: value}
        header = json.dumps({"a": entry}).encode()
        bad.append(len(header).to_bytes(8, "little") + header + bytes(8))
    for content in bad:
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="model.safetensors is missing, damaged") as caught:
            read_folder(folder)
        assert "\n" not in str(caught.value)


def test_a_generator_that_is_not_trained_is_its_folders_model(inside, copy_of):
    """With --steps=0, as in the paper's mathematics runs; its context becomes the dataset's."""
    vocab = open_dataset("toy").tokenizer.vocab_size
    folder = copy_of("qwen2", vocab_size=vocab, max_position_embeddings=200)
    weights = LanguageModel(read_config(folder / "config.json")).state_dict()
    with mock.patch.object(pretrained, "read_safetensors", return_value=weights):
        generator.main(generator.GeneratorConfig(init_from=str(folder), steps=0, device="cpu",
                                                 out_dir="out/from-folder"))
    kept = load_checkpoint("out/from-folder", "generator")
    assert all(torch.equal(kept["model"][name], weight) for name, weight in weights.items())
    assert kept["model_config"]["block_size"] == 160
    for sizes, message in (((61, 160), "knows 60 tokens, the dataset"),
                           ((60, 161), "reads 160 tokens, the dataset's rows have up to 161")):
        with pytest.raises(UserError, match=message):
            read_folder(FOLDERS / "qwen2", *sizes)
