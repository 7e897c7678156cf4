"""Weights in Hugging Face's layout: read to the same logits, written to be read by others."""
import http.client
import json
import urllib.error
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import evaluate
import generator
import pretrained
import train
from config import UserError, load_checkpoint, parse
from conftest import small_run
from data.batches import Row
from evaluate import load_reward_model, score
from model import Block, LanguageModel, ModelConfig, RewardModel

GPT2 = Path(__file__).parent / "gpt2"     # random weights and logits, both written by transformers 5.23


def test_the_logits_are_those_of_hugging_faces_gpt2():
    config, state = pretrained.read_pretrained(str(GPT2))
    assert config == ModelConfig(vocab_size=60, block_size=24, n_layer=2, n_head=4, n_embd=16)
    model = LanguageModel(config).eval()
    pretrained.load_weights(model, state, "gpt2")
    stored = json.loads((GPT2 / "logits.json").read_text())
    with torch.no_grad():
        logits = model.lm_head(model.transformer(torch.tensor(stored["tokens"])))
    assert torch.allclose(logits[..., :8], torch.tensor(stored["logits"]), atol=1e-4)


def hugging_face_layout(model, prefix="transformer."):
    """A model's weights as Hugging Face's library stores them, with the masks that old files hold."""
    state = {name.replace("transformer.", prefix): tensor.t().contiguous() if name.endswith(pretrained.TRANSPOSED) else tensor
             for name, tensor in model.state_dict().items()}
    for layer in range(model.transformer.config.n_layer):
        state[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 4, 4).tril().bool()
        state[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


def folder_of(path, model, suffix=".safetensors", prefix="transformer.", drop=()):
    sizes = model.transformer.config
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(dict(vocab_size=sizes.vocab_size, n_positions=sizes.block_size, n_layer=sizes.n_layer,
                                                      n_head=sizes.n_head, n_embd=sizes.n_embd)))
    state = {name: tensor for name, tensor in hugging_face_layout(model, prefix).items() if name not in drop}
    if suffix == ".bin":
        torch.save(state, path / "pytorch_model.bin")
    else:
        pretrained.write_safetensors(path / "model.safetensors", state)
    return path


@pytest.mark.parametrize("suffix, prefix, drop", [(".safetensors", "transformer.", ()), (".bin", "", ("lm_head.weight",))])
def test_every_tensor_finds_its_place_by_name(tmp_path, suffix, prefix, drop):
    model = LanguageModel(ModelConfig(50, 24, 3, 2, 8))
    sizes, state = pretrained.read_pretrained(str(folder_of(tmp_path / "w", model, suffix, prefix, drop)))
    assert sizes == model.transformer.config
    other = LanguageModel(sizes)
    pretrained.load_weights(other, state, "w")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    assert other.lm_head.weight is other.transformer.wte.weight
    shorter = LanguageModel(ModelConfig(50, 10, 3, 2, 8))
    pretrained.load_weights(shorter, state, "w")
    assert torch.equal(shorter.transformer.wpe.weight, model.transformer.wpe.weight[:10])


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("transformer.h.1.mlp.c_fc.weight"), "the weights have no transformer.h.1.mlp.c_fc.weight"),
    (lambda state: state.update({"transformer.h.9.ln_1.weight": torch.ones(3)}), "the model has no transformer.h.9.ln_1.weight"),
    (lambda state: state.update({"transformer.ln_f.bias": torch.ones(3)}), r"transformer.ln_f.bias is \(3,\), not \(8,\)"),
])
def test_the_first_tensor_that_does_not_fit_is_named(change, message):
    model = LanguageModel(ModelConfig(50, 24, 2, 2, 8))
    state = pretrained.from_hugging_face(hugging_face_layout(model))
    change(state)
    with pytest.raises(UserError, match=message):
        pretrained.load_weights(model, state, "w")


def test_damaged_and_missing_files_are_one_line_errors(tmp_path):
    model = LanguageModel(ModelConfig(50, 24, 2, 2, 8))
    folder = folder_of(tmp_path / "w", model)
    whole = (folder / "model.safetensors").read_bytes()
    for content, message in ((whole[:-100], "is cut short: transformer.h.0.attn.bias would end"), (whole[:50], "not a whole safetensors file"),
                             (b"", "not a whole safetensors file"), (b"\x05\0\0\0\0\0\0\0[1,2]", "not a whole safetensors file")):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=message):
            pretrained.read_pretrained(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="neither"):
        pretrained.read_pretrained(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"junk")
    with pytest.raises(UserError, match="pytorch_model.bin is not a file of weights"):
        pretrained.read_pretrained(str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json is missing, or not"):
        pretrained.read_pretrained(str(folder))
    with pytest.raises(UserError, match="is no folder; .* gpt2-xl"):
        pretrained.read_pretrained("gpt3")


class Answer:
    """What urlopen returns: a body that may break off, and headers."""

    def __init__(self, body=b"", headers=()):
        self.parts, self.headers = [body, b""], dict(headers)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self, _):
        return self.parts.pop(0)


HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"      # sha256 of b"hello"


@pytest.mark.parametrize("named, pinned, body, length, message", [
    (HELLO, None, b"hello", 5, None), ("", HELLO, b"hello", 5, None), ("", None, b"hello", 5, None),
    ("", None, b"hell", 5, "4 of 5 bytes came"), (HELLO, None, b"jello", 5, "its sha256 is"), ("", HELLO, b"jello", 5, "its sha256 is"),
])
def test_a_download_is_kept_only_if_it_is_whole_and_what_was_published(tmp_path, monkeypatch, named, pinned, body, length, message):
    """The hub names the sha256 in the redirect to its storage, not in the storage's own answer."""
    redirect = urllib.error.HTTPError("https://x/file", 302, "Found", {"X-Linked-ETag": f'"{named}"'}, None)
    opener = mock.Mock(open=mock.Mock(side_effect=redirect))
    monkeypatch.setattr(pretrained.urllib.request, "build_opener", lambda *_: opener)
    monkeypatch.setattr(pretrained.urllib.request, "urlopen", lambda *_, **__: Answer(body, {"Content-Length": length}))
    if message is None:
        pretrained.download("https://x/file", tmp_path / "file", pinned)
        assert (tmp_path / "file").read_bytes() == b"hello"
    else:
        with pytest.raises(pretrained.NetworkError, match=message):
            pretrained.download("https://x/file", tmp_path / "file", pinned)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [urllib.error.URLError("no network"), TimeoutError(), http.client.IncompleteRead(b""),
                                   urllib.error.HTTPError("u", 404, "Not Found", {}, None)])
def test_without_a_network_the_error_says_what_to_put_where(tmp_path, monkeypatch, error):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(pretrained, "sha256_of", lambda url: None)
    monkeypatch.setattr(pretrained.urllib.request, "urlopen", mock.Mock(side_effect=error))
    with pytest.raises(UserError, match=f"gpt2 could not be downloaded .*config.json and model.safetensors .* into {tmp_path}/icrm/gpt2"):
        pretrained.read_pretrained("gpt2")


def test_generator_and_reward_model_start_from_the_weights_with_their_sizes(inside, tmp_path):
    vocab_size = load_checkpoint("out/run", "reward model")["model_config"]["vocab_size"]
    weights = folder_of(tmp_path / "weights", LanguageModel(ModelConfig(vocab_size, 160, 1, 2, 24)))
    settings = dict(init_from=weights, generator=tmp_path / "generator", n_embd=32)
    with pytest.raises(UserError, match="--block_size=200 is more than the 160 positions"):
        train.main(parse(train.TrainConfig, small_run(tmp_path / "run", block_size=200, **settings)))
    with pytest.raises(UserError, match=f"train it first: python generator.py --dataset=toy --init_from={weights}"):
        train.main(parse(train.TrainConfig, small_run(tmp_path / "run", **settings)))
    generator.main(parse(generator.GeneratorConfig, [f"--init_from={weights}", f"--out_dir={tmp_path / 'generator'}", "--steps=1",
                                                     "--learning_rate=0", "--device=cpu"]))
    still = load_checkpoint(tmp_path / "generator", "generator")["model"]
    assert torch.equal(still["transformer.h.0.mlp.c_fc.weight"],
                       pretrained.read_pretrained(str(weights))[1]["transformer.h.0.mlp.c_fc.weight"])
    train.main(parse(train.TrainConfig, small_run(tmp_path / "run", **settings)))
    assert load_checkpoint(tmp_path / "run", "reward model")["model_config"]["n_embd"] == 24
    other = folder_of(tmp_path / "other", LanguageModel(ModelConfig(50, 160, 1, 2, 24)))
    with pytest.raises(UserError, match="knows 50 tokens, the dataset toy has"):
        train.main(parse(train.TrainConfig, small_run(tmp_path / "run2", **dict(settings, init_from=other))))


def test_an_exported_model_is_imported_with_the_same_rewards(inside, tmp_path):
    evaluate.main(parse(evaluate.EvalConfig, ["--checkpoint=out/run", f"--export={tmp_path / 'e'}"]))
    model, tokenizer, _ = load_reward_model("out/run", "cpu")
    again, tokenizer_again, _ = load_reward_model(tmp_path / "e", "cpu")
    assert tokenizer_again.fingerprint == tokenizer.fingerprint
    row = Row(np.array(tokenizer.encode("How is the bar?"), np.int32), np.array(tokenizer.encode(" good food") + [tokenizer.end_of_text], np.int32), False)
    assert np.array_equal(score(model, [row], "cpu")[0], score(again, [row], "cpu")[0])
    evaluate.main(parse(evaluate.EvalConfig, [f"--checkpoint={tmp_path / 'e'}"]))
    for damage in ("{", "{}"):
        (tmp_path / "e/icrm.json").write_text(damage)
        with pytest.raises(UserError, match="export the model again"):
            load_reward_model(tmp_path / "e", "cpu")
    evaluate.main(parse(evaluate.EvalConfig, ["--checkpoint=out/run", f"--export={tmp_path / 'e'}"]))
    state = pretrained.read_safetensors(tmp_path / "e/model.safetensors")
    state.pop("transformer.wte.weight")
    pretrained.write_safetensors(tmp_path / "e/model.safetensors", state)
    with pytest.raises(UserError, match="the weights have no transformer.wte.weight"):
        load_reward_model(tmp_path / "e", "cpu")


def test_only_the_last_blocks_and_the_heads_learn_where_that_is_asked_for(inside):
    model = RewardModel(ModelConfig(50, 24, 3, 2, 16))
    model.transformer.freeze(1)
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[2] for name in learns if ".h." in name} == {"2"} and "transformer.ln_f.weight" in learns
    assert {"score.weight", "lm_head.weight"} <= learns and "transformer.wte.weight" not in learns
    start = load_checkpoint("out/toy-generator", "generator")["model"]
    train.main(parse(train.TrainConfig, small_run("out/frozen", unfrozen=0, lm_weight=0)))
    model = load_checkpoint("out/frozen", "reward model")["model"]
    changed = {name for name, tensor in model.items() if name in start and not torch.equal(tensor, start[name])}
    assert changed == {"transformer.ln_f.weight", "transformer.ln_f.bias"}


def test_recomputing_reads_every_block_twice_and_changes_no_loss(inside, monkeypatch):
    calls = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda *arguments: calls.append(1) or forward(*arguments))
    counts = []
    for recompute in (False, True):
        calls.clear()
        train.main(parse(train.TrainConfig, small_run(f"out/recomputed-{recompute}", recompute=recompute, eval_interval=99)))
        counts.append(len(calls))
    assert counts[1] == counts[0] + 12      # once more at each step, in the one block
    ours, plain = ([json.loads(line) for line in (inside / f"out/recomputed-{recompute}/log.jsonl").read_text().splitlines()]
                   for recompute in (True, False))
    for a, b in zip(ours, plain, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
