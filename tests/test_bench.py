"""The benchmark measures what it says: the same losses from every variant."""
import json

import pytest
import torch

import bench
from config import UserError, parse
from generator import response_probs

SMALL = dict(n_layer=2, n_head=2, n_embd=32, block_size=1024, vocab_size=300, pairs=4, repeats=1, memory_pairs=1, new_tokens=5, samples=3,
             device="cpu", lengths="hh,gsm8k")


def config(**more):
    return parse(bench.BenchConfig, [f"--{key}={value}" for key, value in (SMALL | more).items()])


def test_every_trick_gives_the_terms_and_the_gradient_of_the_plain_step(monkeypatch):
    """Where the plain step's generator gives p, the stored p is what it gives."""
    rows, _ = bench.random_pairs([[20, 9, 30], [3, 14, 5], [40, 12, 12], [7, 1, 2]], config(), 0, 4)
    norms = []
    monkeypatch.setattr(bench, "update", lambda model, optimizer, rate, clip: norms.append(
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()) or optimizer.zero_grad())
    found = []
    for trick in bench.TRICKS:
        run = bench.Bench(config(), torch.device("cpu"))
        terms = run.step(trick, rows, response_probs(run.generator, rows))
        found.append({key: terms[key].item() for key in ("outcome", "reg", "lm")} | {"S": run.S.item(), "grad_norm": norms[-1]})
    for trick, terms in zip(bench.TRICKS, found):
        assert terms == pytest.approx(found[0], rel=1e-4), trick


def test_the_work_that_nothing_can_do_without_counts_every_token_once():
    settings = config(n_layer=1, n_embd=2)
    rows, _ = bench.random_pairs([[3, 2, 1]], settings, 0, 1)
    attended = (1 + 2 + 3) + (4 + 5) + 4
    assert bench.useful_work(rows, settings, 10) == 3 * (24 * 4 * 6 + 4 * 2 * attended + 2 * 2 * 10 * 2)


def test_the_bench_prints_its_table_and_writes_its_figures(tmp_path, capsys):
    bench.main(config(json=tmp_path / "bench.json"))
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "bench.json").read_text())
    assert all(trick in printed for trick in bench.TRICKS)
    assert [row["trick"] for row in found["hh"]["steps"]] == list(bench.TRICKS) and found["hh"]["steps"][0]["speedup"] == 1
    for name in ("hh", "gsm8k"):
        assert found[name]["speedup"] == found[name]["steps"][-1]["speedup"] > 0
    assert found["memory_ratio"] > 0 and 0 < found["peak_fraction"] < 1 and 0 < found["regularizer_share"] < 1
    assert found["sampling"]["same_tokens"] and found["scoring"]["pairs_per_s"] > 0


def test_unknown_lengths_are_refused():
    with pytest.raises(UserError, match="choose one of: hh, gsm8k"):
        bench.main(config(lengths="hh,mine"))
    with pytest.raises(UserError, match="--block_size must be at least"):
        bench.main(config(block_size=256))
    with pytest.raises(UserError, match="--pairs must be at least 1 and at most 512"):
        bench.main(config(pairs=600))
    with pytest.raises(UserError, match="--new_tokens must be at least 1 and at most 960"):
        bench.main(config(new_tokens=1000))
