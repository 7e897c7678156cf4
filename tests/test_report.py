"""The report page and the picture: complete, well-formed, with correct numbers."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

import report
import train
from bon import BonConfig
from common import UserError, parse_settings
from conftest import small_generator, small_run
from data.dataset import dataset_folder, open_dataset, write_dataset
from data.tokenizer import make_tokenizer
from evaluate import evaluate_run, load_reward_model, score, sigmoid, table_lines


def run_report(*options):
    report.main(parse_settings(report.ReportConfig, ["--device=cpu", *options]))


def read_elements(path):
    """All elements of a page or picture. Markup that is not well-formed is an error."""
    source = path.read_text(encoding="utf-8").removeprefix("<!DOCTYPE html>\n")
    elements = []
    for element in ElementTree.fromstring(source).iter():
        elements.append((element.tag.rpartition("}")[2], element))
    return elements


def all_text(elements):
    return "".join(element.text or "" for _, element in elements)


@pytest.fixture
def fast_sampling(monkeypatch):
    def small_config(**settings):
        return BonConfig(**{**settings, "prompts": 4, "samples": 4})

    monkeypatch.setattr(report, "BonConfig", small_config)


def test_the_page_has_every_part_and_needs_no_other_file(
    inside, tmp_path, fast_sampling
):
    page = tmp_path / "page.html"
    run_report("--checkpoint=out/run", f"--out={page}", "--count=2")
    elements, source = read_elements(page), page.read_text(encoding="utf-8")
    text = all_text(elements)
    for part in ("decoupled", "calibration", "Best-of-n", "Successive halving"):
        assert part in text
    tags = {tag for tag, _ in elements}
    assert not tags & {"script", "img", "link", "iframe", "object"}
    assert not re.search(r"@import|url\(", source)
    assert "prefers-color-scheme: dark" in source
    links = set(re.findall(r"https?://[^\"]*", source))
    assert links == {"http://www.w3.org/2000/svg"}  # a namespace
    n_pairs = sum(tag == "details" for tag, _ in elements)
    charts = [element for tag, element in elements if tag == "svg"]
    assert n_pairs in (3, 4) and len(charts) == 4 + 2 * n_pairs
    assert all(chart.get("aria-label") for chart in charts)


def test_the_numbers_of_the_page_are_those_of_evaluate(inside, tmp_path, fast_sampling):
    page, dataset = tmp_path / "page.html", open_dataset("toy")
    run_report("--checkpoint=out/run", f"--out={page}", "--count=1")
    model, tokenizer, checkpoint = load_reward_model("out/run", "cpu")
    results = evaluate_run(model, dataset, checkpoint["settings"])
    cells = [e.text or "" for tag, e in read_elements(page) if tag in ("td", "th")]
    expected = table_lines(results["splits"])
    assert cells == [cell for line in expected for cell in line]
    examples = list(dataset.split("val"))
    rewards = score(model, examples)
    margins = [chosen[-1] - rejected[-1] for chosen, rejected in rewards]
    best = int(np.argmax(margins))
    text = all_text(read_elements(page))
    assert f"pair {best}: reward difference {margins[best]:+.2f}" in text
    spans = [e for tag, e in read_elements(page) if tag == "span"]
    (chosen, _), responses = rewards[best], examples[best].responses
    assert len(spans) >= len(responses[0]) + len(responses[1])
    changes = np.diff(chosen, prepend=chosen[0])
    for span, change in zip(spans, changes):
        assert span.get("title").startswith(f"change {change:+.2f}, p ")
        assert (span.get("class") == "up") == (change > 0)
    words = "".join(span.text for span in spans[: len(chosen)])
    assert words == tokenizer.decode(responses[0]) + "\u23ce"


def test_the_picture_shows_the_response_with_the_median_gain(inside, tmp_path, capsys):
    train.main(small_run("out/none-run", regularizer="none"))
    picture, dataset = tmp_path / "p.svg", open_dataset("toy")
    run_report("--checkpoint=out/none-run,out/run", f"--svg={picture}")
    split, exact = dataset.split("val"), dataset.array("val", "exact-value")
    errors = []
    for folder in ("out/none-run", "out/run"):
        model, tokenizer, _ = load_reward_model(folder, "cpu")
        rewards, all_rewards = score(model, list(split)), []
        for responses in rewards:
            all_rewards += [*responses[0], *responses[1]]
        own = []
        for i in range(len(split)):
            V, _ = split.response_values(exact, i)
            z = sigmoid(rewards[i][0] - np.mean(all_rewards))
            own.append(np.abs(z - V).mean())
        errors.append(own)
    gains = np.array(errors[0]) - np.array(errors[1])
    printed = re.search(
        r"pair (\d+), with the median gain (\S+)", capsys.readouterr().out
    )
    i = int(printed[1])
    assert (gains < gains[i]).sum() == len(gains) // 2
    assert float(printed[2]) == pytest.approx(gains[i], abs=6e-4)
    elements = read_elements(picture)
    lines = [e for tag, e in elements if tag == "polyline"]
    assert [line.get("class") for line in lines] == ["baseline", "model", "exact"]
    n_tokens = len(split[i].responses[0]) - 1  # without end-of-text
    assert all(len(line.get("points").split()) == n_tokens for line in lines)
    words = [e for _, e in elements if (e.get("class") or "").startswith("word")]
    decoded = tokenizer.decode(split[i].responses[0]).split()
    assert "".join(e.text or "" for e in words) == "".join(decoded)
    marked = [e for e in words if "evidence" in e.get("class")]
    kinds = split.response_values(dataset.array("val", "kind"), i)[0]
    assert len(marked) >= (kinds == 2).sum()


def test_markup_in_data_is_text_on_the_page(inside, tmp_path):
    prompt = '<em>Q</em> & "q"'
    responses = " <script>alert(1)</script>\x00", " a</p><img src=x>\n"
    rows = []
    for split in ("train", "val"):
        rows += [(split, prompt, *responses)] * 8
    tokenizer = make_tokenizer("bpe:257", [])
    folder = dataset_folder("markup")
    write_dataset(folder, rows, ("train", "val"), tokenizer, block_size=80)
    small_generator("markup", "out/markup-generator", steps=2)
    train.main(small_run("out/markup", dataset="markup", steps=2))
    run_report("--checkpoint=out/markup", f"--out={tmp_path / 'page.html'}")
    elements = read_elements(tmp_path / "page.html")
    assert not {tag for tag, _ in elements} & {"script", "img", "em"}
    text = all_text(elements)
    assert prompt in text and "<script>alert(1)</script>\ufffd" in text
    assert "a</p><img src=x>\u21b5" in text


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "name a reward model"),
        (["--checkpoint=out/run", "--svg=x.svg"], "needs --checkpoint=BASELINE,MODEL"),
        (["--checkpoint=out/run", "--out=out/run/ckpt.pt"], "is an input of this"),
        (["--checkpoint=out/run", "--out=out/toy-generator/p.npy"], "is an input of"),
    ],
)
def test_mistakes_are_one_line(inside, fast_sampling, options, message):
    with pytest.raises(UserError, match=message):
        run_report(*options)
