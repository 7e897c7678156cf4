"""One reward model on one self-contained HTML page: accuracy, calibration, best-of-n, and the tokens of single responses.

    python report.py --checkpoint=out/toy-icrm-seed0                        the dataset's val split
    python report.py --checkpoint=CKPT --data=pairs.jsonl --candidates=candidates.jsonl --out=report.html

The responses shown are the most confident hits and misses: every token on a colour for z (Eq. 4, with the other
response of the pair as the opponent), under it the generator's probability p of it, above the text z along the response
and, on the toy world, the exact value. No script, nothing from the network, all text escaped.
"""
import html
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bon import BonConfig, evaluate_candidates, obtain_candidates
from config import UserError, in_range, run_script, show, write_atomically
from data.batches import load_pairs, pair_rows
from data.pairs import read_candidates
from data.prepare import open_dataset
from data.toy.truth import compare_with_truth, exact_traces
from data.toy.world import World
from evaluate import evaluate_pairs, example_name, load_reward_model, model_name, values_against
from generator import load_generator, response_probs
from model import pick_device


@dataclass(frozen=True)
class ReportConfig:
    checkpoint: str = ""        # a reward model: its ckpt.pt, or the folder that holds it
    data: str = ""              # a JSONL file of pairs; empty: val of the checkpoint's dataset
    candidates: str = ""        # JSONL of scored candidates; empty: sampled on the toy world, else no curve
    out: str = ""               # the page; empty: report.html beside the checkpoint
    count: int = 3              # hits and misses to show of each kind
    batch_size: int = 64        # rows at a time; changes no result
    device: str = "auto"        # auto, cpu, cuda, cuda:N
    strict: bool = False        # stop at the first bad row
    as_dialogue: bool = False   # write plain prompts as one Human turn


STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #5c5c5c; --page: #fdfdfb; --line: #d8d8d2; --a: #08519c; --b: #b35806 }
@media (prefers-color-scheme: dark) { :root { --ink: #ececec; --soft: #a8a8a8; --page: #16181b; --line: #3a3d42; --a: #7fb8ea; --b: #f4a65b } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 Georgia, "Times New Roman", serif }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
p, figcaption { max-width: 44rem; color: var(--soft); margin: .3rem 0 } p.note { font-size: .9rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0 }
td, th { padding: .15rem .8rem .15rem 0; text-align: right; font-weight: normal; border-bottom: 1px solid var(--line) }
th { color: var(--soft) } td:first-child, th:first-child { text-align: left }
.scroll { overflow-x: auto } .pair { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: .5rem 0; flex: 1 1 22rem; min-width: 0 }
svg { width: 100%; height: auto; display: block } svg text { font: 11px sans-serif; fill: var(--soft) }
.axis { stroke: var(--line); stroke-width: 1 } .thin { stroke: var(--a); fill: none; stroke-width: 1; opacity: .5 } .own { stroke: var(--a); fill: none; stroke-width: 2 }
.other { stroke: var(--b); fill: none; stroke-width: 2; stroke-dasharray: 5 3 } .dot { fill: var(--a) }
details { border-top: 1px solid var(--line); padding: .5rem 0 } summary { cursor: pointer; padding: .2rem 0 }
summary:focus-visible { outline: 3px solid var(--a) } h3 { font-size: 1rem; margin: 1rem 0 .2rem }
.text { line-height: 2.4; white-space: pre-wrap; overflow-wrap: anywhere }
.text span { display: inline-block; position: relative; color: #111; border-radius: 2px; line-height: 1.35; margin-bottom: .75em }
.text span::after { content: attr(data-p); position: absolute; left: 0; top: 100%; font: 9px/1.2 sans-serif; white-space: nowrap; color: var(--soft) }
.scale { display: inline-flex; align-items: center; gap: .5rem; font-size: .85rem; color: var(--soft) }
.scale b { font-weight: normal; white-space: nowrap } .scale i { flex: none; width: 9rem; height: .9rem; border-radius: 2px; background: linear-gradient(90deg, rgb(107,174,214), rgb(247,247,247), rgb(253,174,97)) }
"""


def colour(z):
    """Blue at 0, near white at 1/2, orange at 1: told apart without red and green, dark text readable on all of it."""
    low, middle, high = np.array([107, 174, 214]), np.array([247, 247, 247]), np.array([253, 174, 97])
    rgb = low + (middle - low) * 2 * z if z < 0.5 else middle + (high - middle) * (2 * z - 1)
    return "#" + "".join(f"{int(round(float(c))):02x}" for c in rgb)


def table(lines):
    """Rows of text as an HTML table, the first row its head."""
    head, *body = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
                   for tag, line in zip(["th"] + ["td"] * len(lines), lines)]
    return f'<div class="scroll"><table><tr>{head}</tr>' + "".join(f"<tr>{row}</tr>" for row in body) + "</table></div>"


def plot(series, xs, ys, x_name, y_name, label, dots=False, height=240):
    """Lines as inline SVG. series: [(css class, [(x, y), ...])]; xs, ys: [(value, its text)], the ticks, first and last the ends."""
    width, left, right, top, bottom = 480, 44, 12, 12, 36
    (x0, x1), (y0, y1) = ((ticks[0][0], ticks[-1][0]) for ticks in (xs, ys))
    at_x = lambda x: left + (x - x0) / ((x1 - x0) or 1) * (width - left - right)
    at_y = lambda y: height - bottom - (y - y0) / ((y1 - y0) or 1) * (height - top - bottom)
    parts = [f'<line class="axis" x1="{left}" x2="{width - right}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>'
             f'<text x="{left - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{html.escape(text)}</text>' for y, text in ys]
    parts += [f'<text x="{at_x(x):.1f}" y="{height - bottom + 16}" text-anchor="middle">{html.escape(text)}</text>' for x, text in xs]
    parts.append(f'<text x="{(left + width - right) / 2:.0f}" y="{height - 4}" text-anchor="middle">{html.escape(x_name)}</text>')
    parts.append(f'<text x="{left}" y="{top - 2}">{html.escape(y_name)}</text>')
    for name, points in series:
        where = [(f"{at_x(x):.1f}", f"{at_y(y):.1f}") for x, y in points]
        parts.append(f'<polyline class="{name}" points="{" ".join(",".join(point) for point in where)}"/>')
        if dots and name == "own":
            parts += [f'<circle class="dot" r="3.5" cx="{x}" cy="{y}"/>' for x, y in where]
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label, quote=True)}">{"".join(parts)}</svg>'


UNIT = [(0.0, "0"), (0.25, ""), (0.5, "0.5"), (0.75, ""), (1.0, "1")]


def calibration_section(results):
    found = results["reliability"]
    points = [(row["confidence"], row["accuracy"]) for row in found["bins"]]
    ticks = [(0.5, "0.5"), (0.6, "0.6"), (0.7, "0.7"), (0.8, "0.8"), (0.9, "0.9"), (1.0, "1")]
    figure = plot([("other", [(0.5, 0.5), (1.0, 1.0)]), ("own", points)], ticks, UNIT,
                  "confidence, sigma of the reward difference", "share right", "Calibration: share right against confidence", dots=True)
    rows = [["confidence", "share right", "pairs"]] + [[f"{row['confidence']:.3f}", f"{row['accuracy']:.3f}", str(row["n"])]
                                                       for row in found["bins"]]
    return (f"<h2>Is it as sure as it is right?</h2><p>Calibration error {found['ece']:.3f}: the mean distance of the points "
            f'(each weighted by its pairs) from the dashed line, where confidence equals the share right.</p><div class="pair"><figure>{figure}</figure>'
            f"<figure>{table(rows)}</figure></div>")


def exact_value_section(truth):
    """z of the prefixes against their exact value; truth: what compare_with_truth gave."""
    points = [(row["z"], row["value"]) for row in truth["value_bins"]]
    figure = plot([("other", [(0.0, 0.0), (1.0, 1.0)]), ("own", points)], UNIT, UNIT, "z of a prefix", "mean exact value",
                  "Mean exact value of the prefixes against z", dots=True)
    rows = [["z", "exact value", "share of prefixes"]] + [[f"{row['z']:.3f}", f"{row['value']:.3f}", f"{row['share']:.3f}"]
                                                          for row in truth["value_bins"]]
    return (f"<h2>Is a prefix worth what it seems?</h2><p>Every prefix of every response: correlation of z with the exact value "
            f"{truth['correlation']:.3f}, calibration error {truth['calibration_error']:.3f}, credit leak {truth['credit_leak']:.3f}. "
            f'Here z is against the mean reward of all prefixes.</p><div class="pair"><figure>{figure}</figure><figure>{table(rows)}</figure></div>')


def best_of_n_section(results, noun):
    curve = results["curve"]
    worth = [row[key] for row in curve for key in ("low", "high", "random", "oracle")]
    low, high = min(worth), max(worth)
    ys = [(low + (high - low) * i / 4, f"{low + (high - low) * i / 4:.2f}") for i in range(5)]
    xs = [(float(np.log2(row["n"])), str(row["n"])) for row in curve]
    line = lambda key: [(float(np.log2(row["n"])), row[key]) for row in curve]
    figure = plot([("thin", line("low")), ("thin", line("high")), ("other", line("oracle")), ("other", line("random")),
                   ("own", line("reward_model"))], xs, ys, "n", noun, f"Best of n: {noun} against n", dots=True)
    rows = [["n", "prompts", "reward model", "95% interval", "random", "oracle"]] + [
        [str(row["n"]), str(row["prompts"]), f"{row['reward_model']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}",
         f"{row['random']:.3f}", f"{row['oracle']:.3f}"] for row in curve]
    return (f"<h2>Best of n</h2><p>{html.escape(noun.capitalize())} of the response that the reward model picks out of n (solid, its 95% interval thin); "
            f'dashed, a random one below and the best one above.</p><div class="pair"><figure>{figure}</figure><figure>{table(rows)}</figure></div>')


def response_figure(name, reward, z, probs, pieces, values):
    """One response: z along it (and the exact value where it is known), then its text token by token."""
    n = len(z)
    series = [("own", list(enumerate(map(float, z))))] + ([("other", list(enumerate(values)))] if values else [])
    chart = plot(series, [(0, "1"), (n - 1, str(n))], UNIT, "token", "z", f"z along the {name} response", height=150)
    spans = "".join(f'<span style="background:{colour(float(z[t]))}" data-p="{"" if probs is None or probs[t] >= 0.995 else f"{probs[t]:.2f}".lstrip("0")}">'
                    f"{html.escape(piece) if piece else '&#8203;'}</span>" for t, piece in enumerate(pieces))
    return f'<figure><h3>{name}: reward {reward:+.3f}</h3>{chart}<div class="text">{spans}</div></figure>'


def pair_section(number, data, rewards, probs, values, tokenizer, is_open):
    """One pair as a folding part of the page."""
    n, pair = len(data.rows), data.pairs[number]
    figures = ""
    for name, mine, other in (("chosen", number, n + number), ("rejected", n + number, number)):
        z = values_against(rewards[mine], rewards[other])
        row = data.rows[number][mine >= n]
        pieces = tokenizer.pieces(row.response)
        pieces[-1] += "⏎"      # the end-of-text token, where the reward is read
        figures += response_figure(name, rewards[mine][-1], z, None if probs is None else probs[mine], pieces,
                                   None if values is None else values[mine])
    difference = rewards[number][-1] - rewards[n + number][-1]
    return (f'<details{" open" if is_open else ""}><summary>pair {html.escape(example_name(pair))}: reward difference {difference:+.3f}'
            f'</summary><p class="text">{html.escape(pair.prompt[-600:].strip())}</p><div class="pair">{figures}</div></details>')


def page(title, about, results, truth, curve, noun, shown):
    """The whole page. truth: compare_with_truth's, or None; shown: [(heading, [pair sections])]."""
    rows = [["", "accuracy", "95% interval", "ties", "pairs"]] + [
        [name, f"{part['accuracy']:.3f}", f"{part['low']:.3f} to {part['high']:.3f}", str(part["ties"]), str(part["n"])]
        for name, part in {"all": results, **results.get("subsets", {})}.items()]
    legend = ('<p class="scale"><b>z = 0</b> <i></i> <b>z = 1</b></p><p class="note">Blue: the prefix looks worse than the opponent; orange: '
              "better. Under a token: the generator's probability p of it, where it is below 0.995.</p>")
    pairs = "".join(f"<h2>{heading}</h2>{legend if sections else '<p>There are none.</p>'}{''.join(sections)}" for heading, sections in shown)
    return (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>'
            f"<p>{html.escape(about)}</p><h2>Accuracy</h2>{table(rows)}<p class=\"note\">A tie is wrong. Choosing the longer response: "
            f"{results['longer_accuracy']:.3f}.</p>{calibration_section(results)}"
            f"{exact_value_section(truth) if truth else ''}"
            f"{best_of_n_section(curve, noun) if curve else ''}{pairs}</body></html>\n")


def main(config):
    show(config)
    in_range(config, 1, 10**6, "count", "batch_size")
    device = pick_device(config.device)
    model, tokenizer, checkpoint = load_reward_model(config.checkpoint, device)
    settings, block_size = checkpoint["settings"], model.transformer.config.block_size
    dataset = None if config.data else open_dataset(settings["dataset"])
    if dataset and dataset.kind == "labels":
        raise UserError("the page is for pairs; name a file of them with --data=FILE")
    data = load_pairs(config.data or dataset.path("val"), tokenizer, block_size, config.strict, config.as_dialogue)
    results, rewards = evaluate_pairs(model, data, device, config.batch_size)
    generator = None
    if (Path(settings["generator"]) / "ckpt.pt").exists():
        generator, found = load_generator(settings["generator"], device)
        fits = found.fingerprint == tokenizer.fingerprint and generator.transformer.config.block_size >= block_size
        generator = generator if fits else None
    curve = None
    if config.candidates:
        candidates, _ = read_candidates(config.candidates, config.strict, config.as_dialogue)
        curve = evaluate_candidates(model, tokenizer, candidates, device)
    elif checkpoint["dataset_kind"] == "toy" and generator:
        curve = evaluate_candidates(model, tokenizer, obtain_candidates(tokenizer, checkpoint, BonConfig(prompts=50), device), device)

    n = len(data.rows)
    margins = np.array([rewards[i][-1] - rewards[n + i][-1] for i in range(n)])
    order = np.argsort(-margins, kind="stable").tolist()
    hits, misses = [i for i in order[:config.count] if margins[i] > 0], [i for i in order[::-1][:config.count] if margins[i] <= 0]
    rows = {i: data.rows[i % n][i >= n] for number in hits + misses for i in (number, n + number)}
    probs = dict(zip(rows, response_probs(generator, list(rows.values())))) if generator else None
    values = truth = None
    if dataset and dataset.kind == "toy":
        truth = compare_with_truth(World(**dataset.world), pair_rows(data.rows), rewards, tokenizer)
        traces = exact_traces(World(**dataset.world), list(rows.values()), tokenizer)
        values = {i: [value for _, value, _, _ in trace] for i, trace in zip(rows, traces)}
    sections = lambda numbers: [pair_section(i, data, rewards, probs, values, tokenizer, i == numbers[0]) for i in numbers]
    about = (f"Trained with {settings['regularizer']}, lambda {settings['reg_weight']}, seed {settings['seed']}, on {settings['dataset']}; "
             f"judged on {n} pairs of {Path(config.data).name if config.data else 'its val split'}."
             + (" Dashed in the trajectories: the exact value of the prefix." if values else ""))
    text = page(f"Reward model {model_name(config.checkpoint)}", about, results, truth, curve,
                "gold" if checkpoint["dataset_kind"] == "toy" and not config.candidates else "worth",
                [("Most confident hits", sections(hits)), ("Most confident misses", sections(misses))])
    out = config.out or str((Path(config.checkpoint) if Path(config.checkpoint).is_dir() else Path(config.checkpoint).parent) / "report.html")
    write_atomically(out, lambda temporary: temporary.write_bytes(text.encode("utf-8", "replace")))
    print(f"wrote {out}: accuracy {results['accuracy']:.3f} over {n} pairs, {len(hits)} hits and {len(misses)} misses shown")


if __name__ == "__main__":
    run_script(ReportConfig, main)
