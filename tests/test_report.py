"""The page and the picture: self-contained, escaped, complete, and coloured by what tokens did."""
import re
from xml.etree import ElementTree

import numpy as np
import pytest

import report
import train
from bon import BonConfig
from config import UserError, parse
from conftest import quick_generator, save_edited, small_run
from data.files import load_checkpoint
from data import tokenizer as tokenizers
from data.dataset import dataset_folder, open_dataset, write_dataset


def make(*arguments):
    report.main(parse(report.ReportConfig, ["--device=cpu", *arguments]))


def read(path):
    """The elements of a page or picture, [(tag, element)]; what is not closed or escaped fails."""
    return [(part.tag.rpartition("}")[2], part) for part in ElementTree.parse(path).iter()]


def text_of(elements, **wanted):
    return "".join(part.text or "" for _, part in elements if wanted.items() <= part.attrib.items())


def test_the_page_of_a_toy_model_has_every_part_and_needs_nothing_else(inside, tmp_path,
                                                                       monkeypatch):
    few = {"prompts": 4, "samples": 4}
    monkeypatch.setattr(report, "BonConfig", lambda **settings: BonConfig(**settings | few))
    page, again = tmp_path / "page.html", tmp_path / "again.html"
    taken_at, real = [], report.response_logprobs
    monkeypatch.setattr(report, "described", lambda *_: {"temperature": 0.5, "top_p": 0.9})
    monkeypatch.setattr(report, "response_logprobs",
                        lambda model, rows, *how: taken_at.append(how) or real(model, rows, *how))
    make("--checkpoint=out/run", f"--out={page}", "--count=2")
    assert set(taken_at) == {(0.5, 0.9)}        # as p was taken for training
    elements, source = read(page), page.read_text(encoding="utf-8")
    for part in ("decoupled", "corr(z,V)", "Is it as sure", "worth what it seems", "Best of n",
                 "Search"):
        assert part in text_of(elements)
    assert not {tag for tag, _ in elements} & {"script", "img", "link", "iframe", "object"}
    assert not re.search(r"@import|url\(", source) and "prefers-color-scheme: dark" in source
    assert set(re.findall(r"https?://[^\"]*", source)) == {"http://www.w3.org/2000/svg"}    # a name
    pairs = sum(tag == "details" for tag, _ in elements)
    labels = [part.get("aria-label") for tag, part in elements if tag == "svg"]
    assert pairs in (3, 4) and len(labels) == 4 + 4 * pairs and all(labels)
    make("--checkpoint=out/run", f"--out={again}", "--count=2")
    assert again.read_text(encoding="utf-8") == source


def test_a_picture_shows_the_words_and_what_each_did_under_every_model(inside, tmp_path):
    other = load_checkpoint("out/run", "reward model")
    other["settings"] |= {"probs": "shuffled", "readout": "sum"}
    save_edited(other, tmp_path / "other.pt")
    make(f"--checkpoint=out/run,{tmp_path / 'other.pt'}", f"--svg={tmp_path / 'p.svg'}",
         "--response=5")
    elements, dataset = read(tmp_path / "p.svg"), open_dataset("toy")
    assert {"icrm", "icrm shuffled sum", "exact value"} <= {part.text for _, part in elements}
    split = dataset.split("val")
    response = split[2].responses[1]
    words = text_of(elements, **{"class": "word"})
    assert words == dataset.tokenizer.decode(response).replace(" ", "\xa0") + "\xa0⏎"
    cells = [(part.get("class"), part.get("fill-opacity"))
             for tag, part in elements if tag == "rect"]
    first, second, exact = cells[0::3], cells[1::3], cells[2::3]
    assert first != second != exact and len(exact) == len(response)
    assert int(elements[0][1].get("width")) <= 900
    V = split.of_responses(dataset.array("val", "exact-value"), 2)[1].tolist()
    steps = [V[t] - V[t - 1] if t else 0.0 for t in range(len(V))]
    for step, (sign, strength) in zip(steps, exact):
        assert sign == ("up" if step > 0 else "down")
        assert float(strength) == pytest.approx(abs(step) / max(map(abs, steps)), abs=0.006)


def test_a_response_without_any_step_and_letters_of_double_width_are_drawn(tmp_path):
    drawn = report.strips(["a", "", " 漢字", ""], [("r", np.zeros(4))], width=90)
    (tmp_path / "p.svg").write_text(drawn, encoding="utf-8")
    cells = [part.attrib for tag, part in read(tmp_path / "p.svg") if tag == "rect"]
    assert [float(cell["width"]) / report.CELL for cell in cells] == [1, 0, 5, 2]
    assert {cell["fill-opacity"] for cell in cells} == {"0.00"}


def test_characters_that_xml_has_no_room_for_are_replaced(tmp_path):
    pieces = [*map(chr, range(32)), "\x7f", "\ufffe", "\uffff", "\n\n", ""]
    drawn = report.strips(pieces, [("r", np.zeros(len(pieces)))], width=900)
    (tmp_path / "p.svg").write_text(drawn, encoding="utf-8")
    words = text_of(read(tmp_path / "p.svg"), **{"class": "word"})
    assert words == 9 * "\ufffd" + "\xa0↵" + 21 * "\ufffd" + "\x7f\ufffd\ufffd↵↵\xa0⏎"


def test_a_probability_is_left_out_where_it_would_cover_the_one_before(tmp_path):
    pieces = [" word", ".", ".", " words", "", " word", ""]
    below = [".11", ".12", ".13", ".14", ".15", "", ".17"]
    drawn = report.strips(pieces, [("r", np.ones(7))], width=200, below=below)
    (tmp_path / "page.svg").write_text(drawn, encoding="utf-8")
    shown = [part for _, part in read(tmp_path / "page.svg") if part.get("class") == "p"]
    assert [part.text for part in shown] == [".11", ".12", ".15", ".17"]


def test_markup_in_the_data_is_text_on_the_page(inside, tmp_path):
    prompt, *sides = "<em>Q</em> & \"q\"", " <script>alert(1)</script>", " a</svg><img src=x>"
    rows = [(split, prompt, *sides) for split in ("train", "val") for _ in range(8)]
    write_dataset(dataset_folder("markup"), rows, ("train", "val"),
                  tokenizers.make("bpe:257", []), block_size=80)
    quick_generator("markup", "out/markup-generator", steps=2)
    train.main(small_run("out/markup", dataset="markup", steps=2))
    make("--checkpoint=out/markup", f"--out={tmp_path / 'r.html'}")
    elements = read(tmp_path / "r.html")
    assert not {tag for tag, _ in elements} & {"script", "img", "em"}
    assert prompt in text_of(elements)
    words = text_of(elements, **{"class": "word"})
    assert "<script>alert(1)</script>" in words and "a</svg><img\xa0src=x>" in words


def test_errors_are_one_line(inside, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="name a reward model"):
        make()
    with pytest.raises(UserError, match="--response must be at least 0 and at most 39"):
        make("--checkpoint=out/run", f"--svg={tmp_path / 'p.svg'}", "--response=40")
