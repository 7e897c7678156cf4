"""Pretrained models in Hugging Face's layout give transformers' logits and tokens.

The models in tests/pretrained/ were made with transformers 5.24 and torch 2.13:
save_pretrained of a LlamaForCausalLM in float32, a Qwen2ForCausalLM in bfloat16 and a
Qwen3ForCausalLM in float16. All weights are random with a standard deviation of 0.3
(norms: around 1). logits.json holds `tokens` and their `logits`. The tokenizers were
trained with tokenizers 0.23, with the steps of each model.
"""

import dataclasses
import fnmatch
import json
import os
import shutil
import sys
import types
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from conftest import small_generator, small_run

import generator
import train
from common import Stopped, UserError, load_checkpoint, read_json
from data import prepare
from data.batch import Example
from data.dataset import open_dataset
from data.tokenizer import from_dict, make_tokenizer
from evaluate import load_reward_model, score
from lab import real
from model import LanguageModel, ModelConfig
from pretrained import export, find_folder
from pretrained.export import ExportConfig, write_safetensors
from pretrained.tokenizer import read_tokenizer
from pretrained.weights import (
    check_config,
    load_pretrained,
    read_config,
    read_safetensors,
)

FOLDERS = Path(__file__).parent / "pretrained"
TOKENIZERS = FOLDERS / "tokenizers"


def edit_config(folder, **changes):
    """Change keys of a folder's config.json. A value of ... removes the key."""
    path = folder / "config.json"
    settings = {**json.loads(path.read_text()), **changes}
    settings = {key: value for key, value in settings.items() if value is not ...}
    path.write_text(json.dumps(settings))


def copy_model(name, tmp_path, **changes):
    """Copy one of the models and change its config.json."""
    folder = shutil.copytree(FOLDERS / name, tmp_path / name, dirs_exist_ok=True)
    edit_config(folder, **changes)
    return folder


def same_weights(weights, expected):
    return all(torch.equal(weights[name], expected[name]) for name in expected)


# Configurations and weights -----------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_logits_are_those_of_transformers(name):
    model = load_pretrained(FOLDERS / name)
    assert model.config.tied == (name != "qwen2")
    is_tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert is_tied == model.config.tied
    stored = json.loads((FOLDERS / name / "logits.json").read_text())
    tokens, positions = torch.tensor(stored["tokens"]), torch.arange(12)[None]
    logits = model.lm_head(model.model(tokens, positions))
    assert torch.allclose(logits, torch.tensor(stored["logits"]), rtol=0, atol=1e-5)


def test_config_keys_of_older_versions_mean_the_same(tmp_path):
    old = {
        "rope_parameters": ...,
        "rope_scaling": None,
        "torch_dtype": "float32",
        "layer_types": ...,
    }
    folder = copy_model(
        "llama", tmp_path, rope_theta=5e5, head_dim=None, sliding_window=4096, **old
    )
    config = ModelConfig(**read_config(folder / "config.json"))
    assert config == ModelConfig(**read_config(FOLDERS / "llama/config.json"))
    absent = ("tie_word_embeddings", "num_key_value_heads", "head_dim")
    folder = copy_model("llama", tmp_path, **dict.fromkeys(absent, ...), **old)
    edit_config(folder, rope_theta=...)
    config = ModelConfig(**read_config(folder / "config.json"))
    assert config.rope_theta == 1e4 and not config.tied
    assert config.n_kv_head == 4 and config.head_dim == 4


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", "mistral"),
        ("model_type", ...),
        ("hidden_act", "gelu"),
        ("mlp_bias", True),
        ("attention_bias", True),
        ("use_sliding_window", True),
        ("layer_types", ["sliding_attention"]),
        ("rope_parameters", [1]),
        ("rope_parameters", {"rope_type": "yarn"}),
        ("rope_scaling", {"rope_type": "llama3"}),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"bits": 4}),
        ("vocab_size", ...),
        ("tie_word_embeddings", "yes"),
        ("hidden_size", "16"),
        ("hidden_size", 16.0),
        ("num_hidden_layers", 10**12),
        ("rope_theta", None),
        ("head_dim", -4),
    ],
)
def test_a_key_that_is_not_implemented_is_an_error_that_names_it(tmp_path, key, value):
    changes = {key: value}
    if key == "rope_theta":
        changes["rope_parameters"] = ...
    folder = copy_model("llama", tmp_path, **changes)
    with pytest.raises(UserError, match=f"config.json: {key} ") as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value)
    (folder / "model.safetensors").unlink()  # the weights are not needed to see it
    with pytest.raises(UserError, match=f"config.json: {key} "):
        check_config(folder)


def test_check_config_accepts_what_is_implemented():
    for name in ("llama", "qwen2", "qwen3"):
        check_config(FOLDERS / name)


@pytest.mark.parametrize(
    "folder, name, weight, message",
    [
        ("qwen2", "lm_head.weight", None, "Missing key.*lm_head"),
        ("llama", "model.embed_tokens.weight", None, "Missing key.*embed_tokens"),
        (
            "qwen2",
            "model.layers.7.bias",
            torch.ones(2),
            "Unexpected key.*layers.7.bias",
        ),
        ("qwen2", "model.norm.weight", torch.ones(2), "size mismatch for model.norm"),
        ("qwen2", "lm_head.weight", torch.ones(()), "size mismatch for lm_head"),
        ("llama", "lm_head.weight", torch.ones(60, 16), "ties its LM head"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, folder, name, weight, message):
    folder = copy_model(folder, tmp_path)
    weights = read_safetensors(folder / "model.safetensors")
    weights.pop(name, None)
    if weight is not None:
        weights[name] = weight
    write_safetensors(folder / "model.safetensors", weights)
    with pytest.raises(UserError, match=message) as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value)


def test_weights_that_are_missing_cut_or_not_finite_are_an_error(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="is missing, damaged or in another format"):
        read_safetensors(path)
    for value in (torch.nan, torch.inf):
        write_safetensors(path, {"a": torch.ones(2), "b": torch.tensor([1.0, value])})
        with pytest.raises(UserError, match="b is not finite"):
            read_safetensors(path)
    write_safetensors(path, {"a": torch.ones(2)})
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="damaged"):
            read_safetensors(path)


# Whole folders ------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    """A pretrained model in the layout of SmolLM2.

    Its tokenizer has 380 tokens, config.json has room for 390.
    """
    folder = tmp_path / "base"
    shutil.copytree(FOLDERS / "llama", folder)
    shutil.copy(TOKENIZERS / "smollm2.json", folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"pad_token": "<|im_end|>"}')
    edit_config(folder, vocab_size=390, max_position_embeddings=256)
    torch.manual_seed(1)
    model = LanguageModel(ModelConfig(**read_config(folder / "config.json")))
    weights = {}
    for name, weight in model.model.named_parameters("model"):
        weights[name] = 3 * weight.detach()
    write_safetensors(folder / "model.safetensors", weights)
    return folder


def write_pairs(path):
    """24 pairs of a prompt, a chosen and a rejected response."""
    lines = []
    for i in range(24):
        pair = {
            "prompt": f"\n\nHuman: number {i}?\n\nAssistant:",
            "chosen": f" it is {i}, of course",
            "rejected": f" nobody{' ever' * (i % 5)} knows",
        }
        lines.append(json.dumps(pair))
    Path(path).write_text("\n".join(lines))


@pytest.fixture
def prepared(base, monkeypatch):
    """The base, data/mine in its tokens, and the generator that is the base itself."""
    monkeypatch.chdir(base.parent)
    write_pairs("pairs.jsonl")
    config = prepare.PrepareConfig(
        name="mine",
        input="pairs.jsonl",
        tokenizer=str(base),
        block_size=64,
        val_share=0.3,
    )
    prepare.main(config)
    config = generator.GeneratorConfig(
        dataset="mine", init_from=str(base), steps=0, device="cpu"
    )
    generator.main(config)
    return base


def run(out_dir, **changes):
    """Train a small reward model on data/mine. Returns its checkpoint."""
    train.main(small_run(out_dir, dataset="mine", **changes))
    return load_checkpoint(out_dir, "reward model")


def test_a_generator_that_is_not_trained_is_the_pretrained_model(prepared):
    """As in the paper's mathematics runs (--steps=0).

    Rows of the vocabulary that the tokenizer cannot produce are left out. The context
    is the dataset's.
    """
    weights = load_pretrained(prepared).state_dict()
    checkpoint = load_checkpoint("out/mine-generator", "generator")
    for name, weight in weights.items():
        assert torch.equal(checkpoint["model"][name], weight[:380])
    assert checkpoint["model_config"]["block_size"] == 64
    assert checkpoint["model_config"]["vocab_size"] == 380


def test_a_random_generator_in_a_pretrained_vocabulary_needs_sizes(prepared):
    config = generator.GeneratorConfig(dataset="mine", out_dir="out/g", steps=1)
    with pytest.raises(
        UserError, match="Start from that model with --init_from=.*base"
    ):
        generator.main(config)
    generator.main(dataclasses.replace(config, n_embd=32, device="cpu"))


def test_a_folder_and_a_dataset_that_do_not_fit_are_refused(prepared):
    own_tokenizer = open_dataset("mine").tokenizer
    with pytest.raises(UserError, match="tokenizer is bpe:300, not that of"):
        load_pretrained(prepared, make_tokenizer("bpe:300", ["some text"]))
    with pytest.raises(UserError, match="context of 256 tokens, and .* up to 257"):
        load_pretrained(prepared, own_tokenizer, 257)
    edit_config(prepared, vocab_size=379)
    with pytest.raises(UserError, match="379 tokens in config.json, but 380 in tok"):
        load_pretrained(prepared, own_tokenizer)
    edit_config(prepared, vocab_size=385)  # the weights have 390 rows
    with pytest.raises(UserError, match="size mismatch for model.embed_tokens"):
        load_pretrained(prepared, own_tokenizer)


def test_preparing_data_for_a_model_that_is_not_implemented_is_an_error(
    base, monkeypatch
):
    monkeypatch.chdir(base.parent)
    write_pairs("pairs.jsonl")
    edit_config(base, rope_scaling={"rope_type": "llama3"})
    config = prepare.PrepareConfig(
        name="mine", input="pairs.jsonl", tokenizer=str(base)
    )
    with pytest.raises(UserError, match="config.json: rope_scaling .*llama3"):
        prepare.main(config)


def test_several_files_are_read_as_one(base):
    single = read_safetensors(base / "model.safetensors")
    names = list(single)
    (base / "model.safetensors").unlink()
    for number, part in ((1, names[:5]), (2, names[5:])):
        path = base / f"model-0000{number}-of-00002.safetensors"
        write_safetensors(path, {name: single[name] for name in part})
    weights = load_pretrained(base).state_dict()
    assert weights.keys() == single.keys() | {"lm_head.weight"}
    assert same_weights(weights, single)
    stray_file = Path(shutil.copy(path, base / "model-00002-of-00003.safetensors"))
    with pytest.raises(UserError, match="holds the parts of more than one model"):
        load_pretrained(base)
    stray_file.unlink()
    path.unlink()
    with pytest.raises(UserError, match="weights in .* do not fit .*Missing key"):
        load_pretrained(base)


def test_train_last_layers_changes_only_the_last_layers(prepared):
    trained = run("out/a", train_last_layers=1)["model"]
    before = load_checkpoint("out/mine-generator", "generator")["model"]
    changed = set()
    for name, weight in before.items():
        if not torch.equal(trained[name], weight):
            changed.add(name)
    assert any("layers.1" in name for name in changed)
    for name in changed:
        assert "layers.1" in name or name in ("model.norm.weight", "lm_head.weight")
    with pytest.raises(UserError, match="--train_last_layers=3, but the model has 2"):
        run("out/b", train_last_layers=3)


# Export -------------------------------------------------------------------------------


def test_an_exported_model_is_the_trained_one_in_its_original_layout(prepared):
    checkpoint = run("out/a")
    export.main(ExportConfig("out/a", "exported"))
    weights = read_safetensors(Path("exported/model.safetensors"))
    assert weights.keys() == checkpoint["model"].keys() - {"lm_head.weight"}
    assert same_weights(checkpoint["model"], weights)
    config = json.loads(Path("exported/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["vocab_size"] == 380 and config["max_position_embeddings"] == 256
    tokenizer_config = json.loads(Path("exported/tokenizer_config.json").read_text())
    tokenizer = read_tokenizer("exported")
    pad = tokenizer.special[tokenizer_config["pad_token"]]
    assert pad == config["pad_token_id"] != tokenizer.end_of_text
    assert tokenizer.fingerprint == open_dataset("mine").tokenizer.fingerprint
    assert "trained from base.\n" in Path("exported/README.md").read_text()


def test_a_model_that_other_programs_cannot_run_is_not_exported(prepared):
    small_generator("mine", "out/own-generator", steps=2)
    run("out/own", generator="out/own-generator")
    run("out/sum", prefix_reward="sum")
    reasons = {
        "own": "did not start from a pretrained model",
        "sum": "only compute --prefix_reward=last",
    }
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=reason):
            export.main(ExportConfig(f"out/{name}", "exported"))
    assert not Path("exported").exists()


def test_an_export_never_replaces_the_pretrained_model_and_is_whole(prepared):
    run("out/a")
    before = load_pretrained(prepared).state_dict()
    with pytest.raises(UserError, match="base is the pretrained model itself"):
        export.main(ExportConfig("out/a", "base/../base"))
    assert same_weights(load_pretrained(prepared).state_dict(), before)
    with pytest.raises(UserError, match="--out=FOLDER"):
        export.main(ExportConfig("out/a"))
    (prepared / "tokenizer_config.json").rename("moved.json")
    with pytest.raises(UserError, match="tokenizer_config.json is missing"):
        export.main(ExportConfig("out/a", "half"))
    assert not Path("half").exists()
    shutil.copy(TOKENIZERS / "qwen.json", prepared / "tokenizer.json")
    with pytest.raises(UserError, match="base, .* started, has another tokenizer now"):
        export.main(ExportConfig("out/a", "exported"))


@pytest.mark.parametrize("name", ["smollm2", "qwen", "llama3"])
def test_the_exported_chat_template_writes_what_the_model_was_trained_on(
    tmp_path, name
):
    shutil.copy(TOKENIZERS / f"{name}.json", tmp_path / "tokenizer.json")
    tokenizer = read_tokenizer(tmp_path)
    template = jinja2.Template(export.chat_template(tokenizer.chat_format))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi\nthere"},
        {"role": "assistant", "content": "Yes?"},
    ]
    text = template.render(messages=messages)
    prompt = "\n\nSystem: Be brief.\n\nHuman: Hi\nthere\n\nAssistant:"
    tokens = tokenizer.encode_prompt(prompt) + tokenizer.encode_response(" Yes?")
    assert tokenizer.encoding.encode(text, allowed_special="all") == tokens


def test_transformers_gives_the_same_reward_as_the_exported_readme_says(
    base, monkeypatch
):
    """With a tokenizer that adds a beginning of text, which must not be doubled."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(base.parent)
    content = json.loads((TOKENIZERS / "llama3.json").read_text())
    start = {"id": "<|begin_of_text|>", "type_id": 0}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": start}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {
            "<|begin_of_text|>": {
                "id": "<|begin_of_text|>",
                "ids": [380],
                "tokens": ["<|begin_of_text|>"],
            }
        },
    }
    (base / "tokenizer.json").write_text(json.dumps(content))
    write_pairs("pairs.jsonl")
    prepare.main(
        prepare.PrepareConfig("mine", "", "pairs.jsonl", str(base), 64, val_share=0.3)
    )
    config = generator.GeneratorConfig("mine", init_from=str(base), steps=0)
    generator.main(config)
    run("out/a")
    export.main(ExportConfig("out/a", "exported"))
    readme = Path("exported/README.md").read_text()
    code = readme.partition("```python\n")[2].partition("```")[0]
    results = {"FOLDER": "exported"}
    exec(code, results)

    model, tokenizer, _ = load_reward_model("out/a", "cpu")
    prompt = tokenizer.encode_prompt("\n\nHuman: Hi!\n\nAssistant:")
    response = tokenizer.encode_response(" Hello.")
    assert results["tokens"]["input_ids"][0].tolist() == prompt + response
    example = Example(np.array(prompt), (np.array(response),))
    reward = score(model, [example])[0][0][-1]
    assert results["reward"].item() == pytest.approx(reward, abs=1e-4)


# The study on real pairs --------------------------------------------------------------


def write_lines(path, rows):
    Path(path).write_text("\n".join(json.dumps(row) for row in rows))


def write_benchmarks():
    """Three small benchmarks for lab/real.py, as files in the current folder."""
    texts = [f"answer {i}" for i in range(6)]
    candidates = [{"text": text, "correct": text[-1] == "3"} for text in texts]
    styles, sets, solutions = [], [], []
    for i in range(3):
        styles.append({"chosen": texts[:3], "rejected": texts[3:], "domain": "chat"})
        solutions.append({"steps": texts[:3], "first_error": i})
    for _ in range(4):
        sets.append({"responses": candidates})
    files = {"styles": styles, "candidates": sets, "steps": solutions}
    for name, rows in files.items():
        rows = [{"prompt": f"Q{i}?", **row} for i, row in enumerate(rows)]
        write_lines(f"{name}.jsonl", rows)


@pytest.mark.slow
def test_a_run_on_real_pairs_is_measured_on_every_benchmark(prepared, monkeypatch):
    jobs = [(real.ARMS[0], 0), (real.ARMS[-1], 0)]
    monkeypatch.setattr(real, "find_jobs", lambda config, records: jobs)
    training = {"steps": 2, "batch_size": 8, "train_last_layers": 1}
    monkeypatch.setattr(real, "TRAINING", training)
    write_benchmarks()
    config = real.RealConfig(
        results="real.jsonl",
        init_from=str(prepared),
        name="mine",
        rm_bench="styles.jsonl",
        candidates="candidates.jsonl",
        steps="steps.jsonl",
        dtype="float32",
        workers=1,
    )
    real.main(config)
    lines = Path("real.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    n_references = len(real.REFERENCES) * len(real.SEEDS)
    assert len(records) == n_references + 2
    regularizers = {record["regularizer"] for record in records[:n_references]}
    assert regularizers == {"length", "random"}

    longer_is_chosen = ""
    for example in open_dataset("mine").split("val"):
        chosen, rejected = example.responses
        longer_is_chosen += str(int(len(chosen) > len(rejected)))
    assert records[0]["held_out"] == longer_is_chosen
    n_cases = {
        "rm_bench": 3,
        "rm_bench_hard": 3,
        "best_of_4": 4,
        "halving": 4,
        "first_error": 3,
        "none_before_error": 2,
        "largest_drop": 3,
    }
    for (arm, _), record in zip(jobs, records[n_references:]):
        name = "-".join(str(part) for part in arm)
        path = Path("out/real/mine") / f"{name}-seed0" / "eval.json"
        metrics = read_json(path, "python train.py")["splits"]["val"]
        hits = [int(digit) for digit in record["held_out"]]
        assert len(hits) == metrics["n"]
        assert sum(hits) / len(hits) == metrics["accuracy"]
        for name, count in n_cases.items():
            assert len(record[name]) == count
        assert max(int(digit) for digit in record["rm_bench_hard"]) <= 3
        assert not (path.parent / "ckpt.pt").exists()


# The hub ------------------------------------------------------------------------------


@pytest.fixture
def hub(base, tmp_path, monkeypatch):
    """A stand-in for the package huggingface_hub. Its only model, owner/model, is base.

    hub.downloads lists the file patterns that were asked for. Other models raise
    hub.error.
    """
    module = types.ModuleType("huggingface_hub")
    module.downloads, module.error = [], OSError("no route\nto host")
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors"):
        (base / name).write_text("-")

    def snapshot_download(name, allow_patterns):
        module.downloads.append(allow_patterns)
        if name != "owner/model":
            raise module.error
        cache = tmp_path / "cache"
        cache.mkdir(exist_ok=True)
        for path in base.iterdir():
            for pattern in allow_patterns:
                if fnmatch.fnmatch(path.name, pattern):
                    shutil.copy(path, cache)
        return str(cache)

    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def file_names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_model_on_the_hub_is_downloaded(hub, base):
    small_files = {"config.json", "tokenizer.json", "tokenizer_config.json"}
    check_config("owner/model")
    assert file_names(find_folder("owner/model")) == small_files
    tokenizer = read_tokenizer("owner/model")
    assert tokenizer.fingerprint == read_tokenizer(base).fingerprint
    assert tokenizer.name == "owner/model"
    weights = load_pretrained("owner/model", tokenizer).state_dict()
    expected = load_pretrained(base, tokenizer).state_dict()
    assert weights.keys() == expected.keys() and same_weights(weights, expected)
    files = file_names(find_folder("owner/model"))
    assert files == small_files | {"model.safetensors"}


def test_weights_in_several_files_are_downloaded(hub, base):
    weights = base / "model.safetensors"
    weights.rename(base / "model-00001-of-00001.safetensors")
    load_pretrained("owner/model")


@pytest.mark.parametrize(
    "error", [OSError("a\nb"), ValueError("a b"), RuntimeError("a b"), Exception("a b")]
)
def test_a_download_that_fails_is_one_line(hub, error):
    hub.error = error
    message = f"owner/other could not be downloaded .{type(error).__name__}: a b"
    with pytest.raises(UserError, match=message) as caught:
        find_folder("owner/other")
    assert "\n" not in str(caught.value)


def test_a_signal_during_a_download_is_not_an_error_of_the_download(hub):
    hub.error = Stopped(15)
    with pytest.raises(Stopped):
        find_folder("owner/other")


def test_without_huggingface_hub_the_error_names_the_package(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # import raises
    with pytest.raises(UserError, match="owner/model .*pip install huggingface_hub"):
        load_pretrained("owner/model")
    assert load_pretrained(base)  # a folder does not need it


def test_a_name_that_cannot_be_on_the_hub_is_not_asked_for(hub):
    for name in ("neither", "../a/b", "owner/model/file", "a/..", "/nowhere/at/all"):
        with pytest.raises(UserError, match="neither a folder nor OWNER/MODEL"):
            find_folder(name)
    assert not hub.downloads


# Tokenizers ---------------------------------------------------------------------------


def copy_tokenizer(name, folder):
    """Read one of the tokenizers from a folder of its own."""
    shutil.copy(TOKENIZERS / f"{name}.json", folder / "tokenizer.json")
    return read_tokenizer(folder)


@pytest.mark.parametrize("name", ["smollm2", "qwen", "llama3"])
def test_tokens_are_those_of_the_library_that_wrote_the_file(tmp_path, name):
    saved = json.loads(json.dumps(copy_tokenizer(name, tmp_path).to_dict()))
    tokenizer = from_dict(saved)
    assert tokenizer.is_pretrained
    stored = json.loads((TOKENIZERS / "ids.json").read_text())
    for text, ids in zip(stored["texts"], stored["ids"][name]):
        assert tokenizer.encode(text) == ids


def test_bytes_that_the_vocabulary_lacks_are_dropped_before_merging(tmp_path):
    """As in the library that wrote the file. There is no token of `@` and \x04."""
    content = json.loads((TOKENIZERS / "smollm2.json").read_text())
    model = content["model"]
    for missing in ("@", "\u0104"):  # in the alphabet of the vocabulary
        del model["vocab"][missing]
    model["merges"] = [m for m in model["merges"] if "@" not in "".join(m)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = read_tokenizer(tmp_path)
    for text, expected in (
        ("!@!", ["!!"]),
        (" the@re", [" the", "re"]),
        ("@\x04", []),
        ("a \x04b", ["a", " ", "b"]),
    ):
        tokens = []
        for part in expected:
            tokens += tokenizer.encode(part)
        assert tokenizer.encode(text) == tokens, text


TURNS = {
    "smollm2": (
        "<|im_start|>system\nBe brief.<|im_end|>\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": (
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}


@pytest.mark.parametrize("name", TURNS)
def test_dialogues_are_written_in_the_chat_format_of_the_model(tmp_path, name):
    tokenizer = copy_tokenizer(name, tmp_path)
    start = "<|begin_of_text|>" if name == "llama3" else ""
    system, user = TURNS[name]
    prompts = {
        "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant:": system + user,
        "Human: Hi\n\nAssistant: ": user,
        "\n\nHuman: Hi\n\nAssistant:": user,
        "Hi": user,  # a plain prompt is one turn of the user
    }
    for prompt, turns in prompts.items():
        expected = tokenizer.encoding.encode(start + turns, allowed_special="all")
        assert tokenizer.encode_prompt(prompt) == expected
    response = tokenizer.encode("Yes") + [tokenizer.end_of_text]
    assert tokenizer.encode_response(" Yes") == response


def test_a_model_without_a_chat_format_reads_dialogues_as_they_are(tmp_path):
    content = json.loads((TOKENIZERS / "qwen.json").read_text())
    content["added_tokens"] = content["added_tokens"][:1]  # <|endoftext|>
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = from_dict(read_tokenizer(tmp_path).to_dict())
    prompt = "\n\nHuman: Hi\n\nAssistant:"
    assert tokenizer.is_pretrained
    assert tokenizer.encode_prompt(prompt) == tokenizer.encode(prompt)
    assert tokenizer.encode_response(" Yes") == tokenizer.encode(" Yes") + [380]
    assert tokenizer.truncate_prompt([1, 2, 3], 2) == [2, 3]


def test_a_truncated_prompt_keeps_what_every_prompt_starts_with(tmp_path):
    tokenizer = copy_tokenizer("llama3", tmp_path)
    prompt = tokenizer.encode_prompt("a question that is too long")
    for room in range(2, len(prompt)):
        truncated = prompt[:1] + prompt[1 - room :]
        assert tokenizer.truncate_prompt(prompt, room) == truncated
    assert tokenizer.truncate_prompt(prompt, 1) == prompt[-1:]
    for room in (len(prompt), 10**6):
        assert tokenizer.truncate_prompt(prompt, room) == prompt


@pytest.mark.parametrize("name", ["smollm2", "qwen", "llama3"])
def test_the_name_of_a_special_token_in_data_is_plain_text(tmp_path, name):
    tokenizer = copy_tokenizer(name, tmp_path)
    special = set(tokenizer.special.values())

    def count_special(text):
        return sum(token in special for token in tokenizer.encode_prompt(text))

    for text in tokenizer.special:
        assert not special & set(tokenizer.encode(text))
        assert not special & set(tokenizer.encode_response(text)[:-1])
        assert count_special(text) == count_special("a")


def add_tokens(folder, *added):
    """Write qwen's tokenizer with more added tokens. Returns it as read."""
    content = json.loads((TOKENIZERS / "qwen.json").read_text())
    for number, token in enumerate(added):
        content["added_tokens"].append({"id": 383 + number, "special": False, **token})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return read_tokenizer(folder)


def test_an_added_token_that_is_not_special_is_read_as_one_token(tmp_path):
    """As in transformers, for instance <think> of Qwen 3. The longest one is read."""
    tokenizer = add_tokens(
        tmp_path,
        {"content": "<think>"},
        {"content": "</think>"},
        {"content": "<think>>"},
        {"content": "<secret>", "special": True},
    )
    tokenizer = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    tokens = tokenizer.encode("a <think>\nb</think>c")
    expected = [*tokenizer.encode("a "), 383, *tokenizer.encode("\nb"), 384]
    assert tokens == expected + tokenizer.encode("c")
    assert tokenizer.encode("<think>><think>") == [385, 383]
    assert tokenizer.encode("<think>\u0338") == [383, *tokenizer.encode("\u0338")]
    assert tokenizer.encode_response("<think>")[:-1] == [383]
    assert 383 in tokenizer.encode_prompt("Human: <think>\n\nAssistant:")
    assert 386 not in tokenizer.encode("<secret>")
    assert tokenizer.decode(tokens) == "a <think>\nb</think>c"
    assert tokenizer.fingerprint != copy_tokenizer("qwen", tmp_path).fingerprint
    assert export.choose_padding(tokenizer) == "<|endoftext|>"


def test_the_tokens_of_a_chat_format_never_come_from_data(tmp_path):
    content = json.loads((TOKENIZERS / "qwen.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.encode("<|endoftext|>") == [380]
    for name in ("<|im_start|>", "<|im_end|>"):
        assert tokenizer.special[name] not in tokenizer.encode(name)


@pytest.mark.parametrize("key", ["lstrip", "rstrip", "single_word", "normalized"])
def test_an_added_token_that_is_matched_in_another_way_is_an_error(tmp_path, key):
    with pytest.raises(UserError, match=f"{key} of the added token '<a>' is not impl"):
        add_tokens(tmp_path, {"content": "<a>", key: True})
    add_tokens(tmp_path, {"content": "<a>", "special": True, key: True})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": {"type": "Unigram"}}, "type 'Unigram'"),
        ({"model": {"byte_fallback": True}}, "byte_fallback True"),
        ({"model": {"unk_token": "<unk>"}}, "unk_token '<unk>'"),
        (
            {
                "model": {
                    "merges": [["b", "c"], ["a", "b"]],
                    "vocab": {"ab": 500, "bc": 501},
                }
            },
            "not in the order",
        ),
        ({"model": {"merges": []}}, "no merge makes the tokens"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer {'type': 'Lowercase'}"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer .*Whitespace"),
        ({"pre_tokenizer": None}, "pre_tokenizer"),
        ({"added_tokens": []}, "no known end of a response .* added tokens"),
        (
            {"added_tokens": [{"content": "<|im_end|>", "id": 10**6}]},
            r"<\|im_start\|> is missing",
        ),
        ({"added_tokens": [{"content": "<|endoftext|>", "id": 5}]}, "two tokens have"),
        ({"model": {"vocab": {"a": 0, "b": 0}, "merges": []}}, "two tokens have"),
        ({"added_tokens": 3}, "damaged or of another kind"),
        ({"model": []}, "damaged or of another kind"),
    ],
)
def test_what_is_unknown_in_a_tokenizer_is_an_error_that_names_it(
    tmp_path, change, message
):
    content = json.loads((TOKENIZERS / "qwen.json").read_text())
    for key, value in change.items():
        if key == "model" and isinstance(value, dict):
            value = {**content["model"], **value}
        content[key] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"tokenizer.json.*{message}"):
        read_tokenizer(tmp_path)


# A real model -------------------------------------------------------------------------


@pytest.mark.skipif(
    "ICRM_SMOLLM2" not in os.environ,
    reason="it names a folder with SmolLM2-135M-Instruct",
)
def test_smollm2_answers_in_its_chat_format():
    folder = os.environ["ICRM_SMOLLM2"]
    tokenizer = read_tokenizer(folder)
    model = load_pretrained(folder, tokenizer, 64).eval()
    prompt = tokenizer.encode_prompt("What is the capital of France?")
    tokens = torch.tensor([prompt])
    while tokens[0, -1] != tokenizer.end_of_text and tokens.size(1) < 64:
        positions = torch.arange(tokens.size(1))[None]
        with torch.no_grad():
            hidden = model.model(tokens, positions)
        next_token = model.lm_head(hidden[:, -1:]).argmax(-1)
        tokens = torch.cat([tokens, next_token], 1)
    assert tokens[0, -1] == tokenizer.end_of_text
    assert "Paris" in tokenizer.decode(tokens[0, len(prompt) :])
