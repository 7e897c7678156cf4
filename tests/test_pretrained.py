"""Folders in Hugging Face's layout are read to the logits of the library that wrote them.

tests/pretrained/ was made once with transformers 5.24 and torch 2.13: save_pretrained of a
LlamaForCausalLM in float32, a Qwen2ForCausalLM in bfloat16 and a Qwen3ForCausalLM in float16, every
weight drawn anew with std 0.3, norms' around 1; logits.json holds `tokens` and their `logits`.
"""
import hashlib
import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import quick_generator, read_model, small_run

import generator
import pretrained
import train
from config import UserError
from data import hub, prepare
from data import tokenizer as tokenizers
from data.dataset import open_dataset
from data.files import file_digest, load_checkpoint, read_json, write_json
from data.tokenizer_json import read_tokenizer
from data.weights import read_config, read_safetensors
from evaluate import load_reward_model, score
from lab import real
from model import LanguageModel, ModelConfig
from pretrained import write_safetensors

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
    model = read_model(FOLDERS / name)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.model.config.tied
    stored = json.loads((FOLDERS / name / "logits.json").read_text())
    found = model.lm_head(model.model(torch.tensor(stored["tokens"]), torch.arange(12)[None]))
    assert torch.allclose(found, torch.tensor(stored["logits"]), rtol=0, atol=1e-4)


def test_keys_of_older_files_say_the_same(copy_of):
    old = dict(rope_parameters=..., rope_scaling=None, torch_dtype="float32", layer_types=...)
    folder = copy_of("llama", rope_theta=5e5, head_dim=None, sliding_window=4096, **old)
    assert read_config(folder / "config.json") == read_config(FOLDERS / "llama/config.json")
    folder = copy_of("llama", tie_word_embeddings=..., num_key_value_heads=..., head_dim=..., **old)
    found = read_config(folder / "config.json")
    absent = {"rope_theta": 1e4, "tied": False, "n_kv_head": 4, "head_dim": 4}
    assert found == found | absent


@pytest.mark.parametrize("key, value", [
    ("model_type", "mistral"), ("hidden_act", "gelu"), ("mlp_bias", True), ("attention_bias", True),
    ("use_sliding_window", True), ("layer_types", ["sliding_attention"]), ("rope_parameters", [1]),
    ("rope_scaling", {"rope_type": "llama3"}), ("rope_parameters", {"rope_type": "yarn"}),
    ("partial_rotary_factor", 0.5), ("quantization_config", {"bits": 4}), ("vocab_size", ...),
    ("tie_word_embeddings", "yes"), ("hidden_size", "16"), ("head_dim", -4)])
def test_what_the_model_lacks_is_an_error_by_name(copy_of, key, value):
    with pytest.raises(UserError, match=f"config.json: .*{key}"):
        read_model(copy_of(**{key: value}))


@pytest.mark.parametrize("folder, name, weights, message", [
    ("qwen2", "lm_head.weight", None, "Missing key.*lm_head"),
    ("qwen2", "model.layers.7.bias", torch.ones(2), "Unexpected key.*model.layers.7.bias"),
    ("qwen2", "model.norm.weight", torch.ones(2), "size mismatch for model.norm.weight"),
    ("llama", "lm_head.weight", torch.ones(60, 16), "its LM head is its embedding, and holds two")])
def test_weights_that_do_not_fit_are_named(copy_of, folder, name, weights, message):
    folder = copy_of(folder)
    found = read_safetensors(folder / "model.safetensors") | {name: weights}
    write_safetensors(folder / "model.safetensors", {
        key: value for key, value in found.items() if value is not None})
    with pytest.raises(UserError, match=message):
        read_model(folder)


# Whole folders -----------------------------------------------------------------------------------

@pytest.fixture
def base(tmp_path):
    """A pretrained model of 383 tokens with room for 390, as SmolLM2's are laid out."""
    folder = tmp_path / "base"
    shutil.copytree(FOLDERS / "llama", folder)
    shutil.copy(FOLDERS / "tokenizers" / "smollm2.json", folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"pad_token": "<|im_end|>"}')
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {
        "vocab_size": 390, "max_position_embeddings": 256}))
    torch.manual_seed(1)
    model = LanguageModel(ModelConfig(**read_config(folder / "config.json")))
    weights = {name: 3 * w.detach() for name, w in model.model.named_parameters("model")}
    write_safetensors(folder / "model.safetensors", weights)
    return folder


@pytest.fixture
def prepared(base, monkeypatch):
    """data/mine, 24 pairs in the base's tokens, and the base as its generator; -> the base"""
    monkeypatch.chdir(base.parent)
    rows = [{"prompt": f"\n\nHuman: number {i}?\n\nAssistant:", "chosen": f" it is {i}, of course",
             "rejected": f" nobody{' ever' * (i % 5)} knows"} for i in range(24)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare.main(prepare.PrepareConfig(name="mine", input="pairs.jsonl", tokenizer=str(base),
                                       block_size=64, val_share=0.3))
    generator.main(generator.GeneratorConfig(dataset="mine", init_from=str(base), steps=0,
                                             device="cpu"))
    return base


def run(out_dir, **more):
    train.main(small_run(out_dir, dataset="mine", **more))
    return load_checkpoint(out_dir, "reward model")


def test_a_generator_that_is_not_trained_is_its_folders_model(prepared):
    """With --steps=0, as in the paper's mathematics runs; rows of its vocabulary that its tokenizer
    cannot make are gone, and its context is the dataset's."""
    weights = read_model(prepared).state_dict()
    kept = load_checkpoint("out/mine-generator", "generator")
    for name, weight in weights.items():
        assert torch.equal(kept["model"][name], weight[:380])
    assert kept["model_config"]["block_size"] == 64 and kept["model_config"]["vocab_size"] == 380


def test_a_folder_and_a_dataset_that_do_not_fit_are_refused(prepared):
    own = open_dataset("mine").tokenizer
    with pytest.raises(UserError, match="tokenizer is bpe:300, not that of"):
        read_model(prepared, tokenizers.make("bpe:300", ["some text"]))
    with pytest.raises(UserError, match="reads 256 tokens, the dataset's rows have up to 257"):
        read_model(prepared, own, 257)
    settings = json.loads((prepared / "config.json").read_text())
    (prepared / "config.json").write_text(json.dumps(settings | {"vocab_size": 379}))
    with pytest.raises(UserError, match="knows 379 tokens, its tokenizer.json 380"):
        read_model(prepared, own)


def test_several_files_are_read_as_one(base):
    whole = read_safetensors(base / "model.safetensors")
    names = list(whole)
    (base / "model.safetensors").unlink()
    for number, some in ((1, names[:5]), (2, names[5:])):
        file = base / f"model-0000{number}-of-00002.safetensors"
        write_safetensors(file, {name: whole[name] for name in some})
    found = read_model(base).state_dict()
    assert found.keys() == whole.keys() | {"lm_head.weight"}
    assert all(torch.equal(found[name], weight) for name, weight in whole.items())
    other = shutil.copy(file, base / "model-00002-of-00003.safetensors")
    with pytest.raises(UserError, match="holds the parts of more than one model"):
        read_model(base)
    other.unlink()
    file.unlink()
    with pytest.raises(UserError, match="the weights of .* do not fit: .*Missing key"):
        read_model(base)


def test_stored_states_of_frozen_blocks_give_the_rewards_of_all_blocks(prepared):
    kept = run("out/a", unfrozen=1)
    before = load_checkpoint("out/mine-generator", "generator")["model"]
    changed = {name for name in before if not torch.equal(kept["model"][name], before[name])}
    assert changed and all("layers.1" in name or name in ("model.norm.weight", "lm_head.weight")
                           for name in changed)
    model, _, _ = load_reward_model("out/a", "cpu")
    split = open_dataset("mine").split("val")
    rows = [split[i] for i in range(len(split))]
    split.below = np.load("out/mine-generator/val-below-1.npy")
    states = [split[i] for i in range(len(split))]
    model.model.frozen = 1
    for all_blocks, above in zip(score(model, rows), score(model, states)):
        for a, b in zip(all_blocks, above):
            assert np.abs(a - b).max() < 1e-3 and not np.array_equal(a, b)
    file, said = (Path(f"out/mine-generator/train-below-1.{kind}") for kind in ("npy", "json"))
    right, about = np.load(file), read_json(said, "train.py")
    np.save(file, 0 * right)        # what is stored for these weights is read
    write_json(said, about | {"digest": file_digest(file)})
    other = run("out/b", unfrozen=1)["model"]
    assert not torch.equal(other["score.weight"], kept["model"]["score.weight"])
    for key in about:               # and for other ones made again, and where it is damaged
        write_json(said, about | {key: "other"})
        np.save(file, 0 * right)
        again = run("out/b", unfrozen=1)["model"]
        assert all(torch.equal(again[name], weight) for name, weight in kept["model"].items())
    with pytest.raises(UserError, match="--unfrozen=3, and there are 2 blocks"):
        run("out/c", unfrozen=3)


def test_an_exported_model_is_the_trained_one_in_the_layout_it_came_in(prepared):
    kept = run("out/a")
    pretrained.main(pretrained.ExportConfig("out/a", "exported"))
    found = read_safetensors(Path("exported/model.safetensors"))
    assert found.keys() == kept["model"].keys() - {"lm_head.weight"}
    assert all(torch.equal(weight, kept["model"][name]) for name, weight in found.items())
    settings = json.loads(Path("exported/config.json").read_text())
    assert settings["architectures"] == ["LlamaForSequenceClassification"]
    assert settings["vocab_size"] == 380 and settings["max_position_embeddings"] == 256
    about = json.loads(Path("exported/tokenizer_config.json").read_text())
    tokenizer = read_tokenizer("exported")
    assert tokenizer.special[about["pad_token"]] == settings["pad_token_id"]
    assert settings["pad_token_id"] != tokenizer.end_of_text
    assert tokenizer.fingerprint == open_dataset("mine").tokenizer.fingerprint
    quick_generator("mine", "out/own-generator", steps=2)
    run("out/own", generator="out/own-generator", unfrozen=0)
    run("out/sum", readout="sum")
    for name, why in (("own", "did not start from a pretrained model"),
                      ("sum", "only --readout=last")):
        with pytest.raises(UserError, match=why):
            pretrained.main(pretrained.ExportConfig(f"out/{name}", "exported"))
    before = read_model(prepared).state_dict()
    with pytest.raises(UserError, match="base holds the pretrained model itself"):
        pretrained.main(pretrained.ExportConfig("out/a", "base/../base"))
    assert all(torch.equal(weight, before[name])
               for name, weight in read_model(prepared).state_dict().items())
    assert "trained from base.\n" in Path("exported/README.md").read_text()
    (prepared / "tokenizer_config.json").rename("kept.json")
    with pytest.raises(UserError, match="tokenizer_config.json is missing"):
        pretrained.main(pretrained.ExportConfig("out/a", "half"))
    assert not Path("half").exists()
    shutil.copy(FOLDERS / "tokenizers" / "qwen.json", prepared / "tokenizer.json")
    with pytest.raises(UserError, match="base, .* started from, has another tokenizer now"):
        pretrained.main(pretrained.ExportConfig("out/a", "exported"))


@pytest.mark.slow
def test_a_run_of_the_study_on_real_labels_is_measured_on_all_that_it_names(prepared, monkeypatch):
    monkeypatch.setattr(real, "RESULTS", Path("real.jsonl").resolve())
    monkeypatch.setattr(real, "UNFROZEN", 1)
    monkeypatch.setattr(real, "TRAINING", dict(steps=2, batch_size=8))
    monkeypatch.setattr(real, "to_do", lambda *_: [(real.Arm("last"), 0), (real.ARMS[-1], 0)])
    monkeypatch.setattr(real, "SCRATCH", dict(n_layer=1, n_head=2, n_embd=16))
    texts = [f"answer {i}" for i in range(6)]
    rows = {"styles": [{"prompt": f"Q{i}?", "chosen": texts[:3], "rejected": texts[3:],
                        "domain": "chat"} for i in range(3)],
            "candidates": [{"prompt": f"Q{i}?", "responses": [
                {"text": text, "correct": text[-1] == "3"} for text in texts]} for i in range(4)],
            "steps": [{"prompt": f"Q{i}?", "steps": texts[:3], "first_error": i} for i in range(3)]}
    for name, some in rows.items():
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    real.main(real.RealConfig(str(prepared), "mine", rm_bench="styles.jsonl", dtype="float32",
                              candidates="candidates.jsonl", steps="steps.jsonl"))
    runs = list(map(json.loads, Path("real.jsonl").read_text().splitlines()))
    assert {one["arm"] for one in runs[:6]} == {*real.JUDGES} and len(runs) == 8
    assert runs[0]["held out"] == "".join(str(int(len(a) > len(b))) for a, b in (
        open_dataset("mine").split("val")[i].responses for i in range(len(runs[0]["held out"]))))
    for one in runs[6:]:
        measured = read_json(f"out/real/mine/{one['arm']}-seed0/eval.json", "x")["splits"]["val"]
        hits = list(map(int, one["held out"]))
        assert len(hits) == measured["n"] and np.mean(hits) == measured["accuracy"]
        assert [len(one[name]) for name in list(real.MEASURES)[1:]] == [3, 3, 4, 4, 3, 2, 3]
        assert max(map(int, one["RM-Bench hard"])) <= 3 and 0 < one["spent"] <= 1
    shutil.copytree(prepared, "else/base")
    with pytest.raises(UserError, match="out/real/mine/base is of .*base; move it away"):
        real.main(real.RealConfig("else/base", "mine"))


# The hub -----------------------------------------------------------------------------------------

@pytest.fixture
def served(base, tmp_path, monkeypatch):
    """A hub with owner/model, whose files are those of the base and more. -> what it serves,
    {file's name: content}; what it says of them stays; None: not there."""
    true = {path.name: path.read_bytes() for path in base.iterdir()}
    true |= {"README.md": b"-", "original/model.safetensors": b"-", "pytorch_model.bin": b"-"}
    found, about = dict(true), []
    for name, body in true.items():
        blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        about.append({"rfilename": name, "blobId": blob})
        if name.endswith("model.safetensors"):
            about[-1]["lfs"] = {"sha256": hashlib.sha256(body).hexdigest()}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            body = found.get(self.path.removeprefix("/owner/model/resolve/c0ffee/"))
            if self.path == "/api/models/owner/model?blobs=true":
                body = json.dumps({"sha": "c0ffee", "siblings": about}).encode()
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"") + found.get("cut", 0)))
            self.end_headers()
            self.wfile.write(body or b"")
            self.wfile.flush()
            time.sleep(found.get("stalls", 0))

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(hub, "HUB", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
        yield found
        server.shutdown()


def test_a_model_on_the_hub_is_fetched_once_and_checked(served, base, tmp_path, monkeypatch):
    """And a file that is not what the hub says of it is not kept."""
    for name in ("model.safetensors", "config.json"):
        right = served[name]
        for body in (right[:-1] + b"?", right[:9], None):
            served[name] = body
            with pytest.raises(UserError, match="owner/model .* could not be fetched from http"):
                hub.find_folder("owner/model")
            assert not list((tmp_path / "cache").rglob(name + "*"))
        served[name] = right
    served["cut"] = 9           # the connection ends before the file does
    with pytest.raises(UserError, match="owner/model is no folder here and could not be fetched"):
        hub.find_folder("owner/model")
    served["stalls"] = 2        # or the hub falls silent before that
    with monkeypatch.context() as patch, pytest.raises(UserError, match="fetched.*timed out"):
        patch.setattr(hub, "TIMEOUT", 0.5)
        hub.find_folder("owner/model")
    del served["cut"], served["stalls"]
    found, expected = (read_model(one).state_dict() for one in ("owner/model", base))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    monkeypatch.setattr(hub, "HUB", "http://127.0.0.1:9")       # nobody is asked again
    assert {path.name for path in hub.find_folder("owner/model").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    with pytest.raises(UserError, match="owner/other .* could not be fetched.*connect, or"):
        hub.find_folder("owner/other")
    for name in ("neither", "../a/b", "owner/model/file", "a/..", "/nowhere/at/all"):
        with pytest.raises(UserError, match="neither a folder nor a hub's"):
            hub.find_folder(name)


# tokenizer.json ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["smollm2", "qwen", "llama3"])
def test_tokens_are_those_of_the_library_that_wrote_the_file(tmp_path, name):
    """tokenizers/ was made with tokenizers 0.23: a BpeTrainer each, with that model's steps."""
    shutil.copy(FOLDERS / "tokenizers" / f"{name}.json", tmp_path / "tokenizer.json")
    stored = json.loads((FOLDERS / "tokenizers" / "ids.json").read_text())
    tokenizer = tokenizers.from_dict(json.loads(json.dumps(read_tokenizer(tmp_path).to_dict())))
    assert [tokenizer.encode(text) for text in stored["texts"]] == stored["ids"][name]


TURNS = {"smollm2": ("<|im_start|>system\nBe brief.<|im_end|>\n",
                     "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
         "llama3": ("<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>",
                    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
                    "<|start_header_id|>assistant<|end_header_id|>\n\n")}


@pytest.mark.parametrize("name", TURNS)
def test_dialogues_are_written_in_the_models_own_turns(tmp_path, name):
    shutil.copy(FOLDERS / "tokenizers" / f"{name}.json", tmp_path / "tokenizer.json")
    tokenizer = read_tokenizer(tmp_path)
    start = "<|begin_of_text|>" if name == "llama3" else ""
    system, user = TURNS[name]
    for text, turns in (("\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant:", system + user),
                        ("Human: Hi\n\nAssistant: ", user), ("\n\nHuman: Hi\n\nAssistant:", user),
                        ("Hi", user)):      # a plain prompt is the user's turn
        expected = tokenizer.encoding.encode(start + turns, allowed_special="all")
        assert tokenizer.encode_prompt(text) == expected
    assert tokenizer.encode_reply(" Yes") == tokenizer.encode("Yes") + [tokenizer.end_of_text]


def test_a_prompt_that_is_cut_keeps_what_every_dialogue_starts_with(tmp_path):
    shutil.copy(FOLDERS / "tokenizers" / "llama3.json", tmp_path / "tokenizer.json")
    tokenizer = read_tokenizer(tmp_path)
    prompt = tokenizer.encode_prompt("a question that is too long")
    for room in range(2, len(prompt)):
        assert tokenizer.cut(prompt, room) == prompt[:1] + prompt[1 - room:]
    assert tokenizer.cut(prompt, 1) == prompt[-1:]
    assert tokenizer.cut(prompt, len(prompt)) == tokenizer.cut(prompt, 10**6) == prompt


@pytest.mark.parametrize("name", ["smollm2", "qwen", "llama3"])
def test_a_special_tokens_name_in_data_is_plain_text(tmp_path, name):
    shutil.copy(FOLDERS / "tokenizers" / f"{name}.json", tmp_path / "tokenizer.json")
    tokenizer = read_tokenizer(tmp_path)
    numbers = set(tokenizer.special.values())
    for said in tokenizer.special:
        assert not numbers & {*tokenizer.encode(said), *tokenizer.encode_reply(said)[:-1]}
        counts = [sum(i in numbers for i in tokenizer.encode_prompt(text)) for text in (said, "a")]
        assert counts[0] == counts[1]


@pytest.mark.parametrize("change, message", [
    ({"model": {"type": "Unigram"}}, "type 'Unigram'"),
    ({"model": {"byte_fallback": True}}, "byte_fallback True"),
    ({"model": {"unk_token": "<unk>"}}, "unk_token '<unk>'"),
    ({"model": {"merges": [["b", "c"], ["a", "b"]], "vocab": {"ab": 500, "bc": 501}}},
     "not in the order"),
    ({"model": {"merges": []}}, "no merge makes the tokens"),
    ({"normalizer": {"type": "Lowercase"}}, "normalizer {'type': 'Lowercase'}"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer .*Whitespace"),
    ({"pre_tokenizer": None}, "pre_tokenizer"),
    ({"added_tokens": []}, "no known end of a response"),
    ({"added_tokens": [{"content": "<|im_end|>", "id": 10**6}]}, r"no <\|im_start\|> among"),
    ({"added_tokens": [{"content": "<|endoftext|>", "id": 5}]}, "two tokens have one id"),
    ({"model": {"vocab": {"a": 0, "b": 0}, "merges": []}}, "two tokens have one id"),
    ({"added_tokens": 3}, "damaged or of another kind"), ({"model": []}, "damaged or of another")])
def test_what_is_unknown_in_a_tokenizer_is_an_error_by_name(tmp_path, change, message):
    found = json.loads((FOLDERS / "tokenizers" / "qwen.json").read_text())
    for key, value in change.items():
        found[key] = found[key] | value if isinstance(value, dict) and key == "model" else value
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=f"tokenizer.json.*{message}"):
        read_tokenizer(tmp_path)
