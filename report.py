"""One reward model on one self-contained HTML page, or a response under several as one picture.

    python report.py --checkpoint=out/toy-icrm-seed0    val of its dataset; report.html beside it
    python report.py --checkpoint=out/toy-none-seed0,out/toy-icrm-seed0 --svg=PICTURE.svg

The page: accuracies, calibration, best-of-n, search, and the most confident hits and misses token
by token. A token's colour is what it did to the reward, r_t - r_t-1: orange up, blue down, nothing
at the first one, before which there is no prefix to compare with. On the toy world the same of the
exact value V stands below it. Left out: scripts, labelled responses, files that are no dataset.
"""
import html
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from unicodedata import east_asian_width

from config import HERE, UserError, in_range, run_script
import numpy as np

from benchmarks import sigmoid
from bon import BonConfig, compare_ways, curve, exact_values, obtain_candidates, open_generator
from data.dataset import open_dataset
from data.files import write_text
from data.probs import described
from evaluate import evaluate_run, load_reward_model, prefix_rewards, score, table_lines
from generator import load_generator, response_logprobs

HALVE_AT = ((0.12, 0.22, 0.32), (0.24, 0.4, 0.56), (0.38, 0.6, 0.82))  # of the mean length
CELL, STRIP = 7.5, 17       # pixels: the width of a character, the height of a strip of colour
CSS = f"<style>{(HERE / 'lab' / 'report.css').read_text(encoding='utf-8')}</style>"
# Spaces stay (SVG drops a leading one), a line's end is drawn; U+FFFD for what XML forbids.
DRAWN = dict.fromkeys([*range(32), 0xfffe, 0xffff], "\ufffd") | dict(zip((9, 10, 32), "\xa0↵\xa0"))
NONE = "<p>There are none.</p>"
PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/><title>{title}</title>{css}
</head><body><h1>{title}</h1><p>{about}</p>{table}<div>{figures}</div>
<p>z along a response{dashed}; below, what each token did to the reward r{exact}: orange raised it,
blue lowered it, by its share of the response's largest step; at the bottom the generator's p of the
token, if below 0.95 and where there is room.</p>
<h2>Most confident hits</h2>{hits}<h2>Most confident misses</h2>{misses}</body></html>
"""


@dataclass(frozen=True)
class ReportConfig:
    checkpoint: str = ""        # a reward model: its folder; for a picture also several: A,B
    out: str = ""               # the page; empty: report.html beside the checkpoint
    count: int = 3              # hits and misses to show of each
    svg: str = ""               # in place of the page, a picture of one response of val
    response: int = 0           # which: 2i the chosen one of pair i, 2i + 1 the rejected one
    device: str = "auto"        # auto, cpu, cuda, cuda:N


# Drawings ----------------------------------------------------------------------------------------

def steps_of(values):
    """What each token did to a value: v_t - v_t-1, 0 for the first one.  (n,) -> (n,)"""
    return np.diff(values, prepend=values[:1])


def ticks(low, high, count=6, form="{:.2g}"):
    return [(value, form.format(value)) for value in np.linspace(low, high, count)]


def chart(lines, xs, ys, names, height=250, labels=(), style=""):
    """Lines as SVG. lines: [(css class, [(x, y), ...])]; xs, ys: [(value, text)], the ticks, the
    first and the last at the ends; names: of x and y; labels: [(x, y, text)], ending left of x."""
    width, left, right, top, bottom = 380, 40, 14, 22, 38
    (x0, _), (y0, _) = xs[0], ys[0]
    across = (width - left - right) / (xs[-1][0] - x0 or 1)
    upward = (height - top - bottom) / (ys[-1][0] - y0 or 1)

    def at(x, y):
        return f"{left + (x - x0) * across:.1f} {height - bottom - (y - y0) * upward:.1f}"

    texts = [("0 0", 12, "start", names[1]), (f"{width - right} {height}", -4, "end", names[0])]
    texts += [(at(x0, y), 4, "end", f"{text}&#8198;&#160;") for y, text in ys]
    texts += [(at(x, y0), 16, "middle", text) for x, text in xs]
    texts += [(at(x, y), 4, "end", f"{text}&#160;&#160;") for x, y, text in labels]
    parts = [f'<text transform="translate({where})" y="{down}" text-anchor="{anchor}">{text}</text>'
             for where, down, anchor, text in texts]
    parts += [f'<path class="axis" d="M{at(x0, y)}H{width - right}"/>' for y, _ in ys]
    for name, points in lines:
        path = ("h0M" if name == "dots" else "L").join(at(*point) for point in points)
        parts.append(f'<path class="{name}" d="M{path}h0"/>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{names[1]} against {names[0]}">{style}{"".join(parts)}</svg>')


def strips(pieces, rows, width, below=None, style=""):
    """A response in lines of text, and under each one a strip of colours per row, as SVG.

    rows: [(label, steps)], what each token did to something; a row's largest step has full colour.
    below: a short text for under each token. The last piece is end-of-text's."""
    left = 8 + CELL * max(len(label) for label, _ in rows)
    tall = 30 + len(rows) * STRIP + (12 if below else 0)
    x, y, parts, room = width, -tall, [], 0     # room: from where on a line has room for a p
    for t, piece in enumerate([*pieces[:-1], " ⏎"]):
        wide = CELL * sum(1 + (east_asian_width(letter) in "WF") for letter in piece)
        if x + wide > width - 2 * CELL * piece[:1].isspace():   # a stop stays with its word
            x, y, room = left, y + tall, left
            parts += [f'<text x="{left - 6}" y="{y + 34 + i * STRIP}" text-anchor="end">'
                      f"{html.escape(label)}</text>" for i, (label, _) in enumerate(rows)]
        text = html.escape(piece.translate(DRAWN))
        parts.append(f'<text class="word" x="{x:g}" y="{y + 17}" textLength="{wide:g}">'
                     f"{text}</text>")
        for i, (_, steps) in enumerate(rows):
            share = abs(steps[t]) / (np.abs(steps).max() or 1)
            sign = "up" if steps[t] > 0 else "down"
            parts.append(f'<rect class="{sign}" fill-opacity="{share:.2f}" x="{x:g}" '
                         f'y="{y + 22 + i * STRIP}" width="{wide:g}" height="{STRIP - 2}"/>')
        if below and below[t] and x >= room:
            parts.append(f'<text class="p" x="{x + 1:g}" y="{y + tall - 6}">{below[t]}</text>')
            room = x + 2.5 * CELL
        x += wide
    size = f'viewBox="0 0 {width} {y + tall}" width="{width}" height="{y + tall}"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" '
            f'aria-label="What each token did to the reward">{style}{"".join(parts)}</svg>')


# Parts of the page -------------------------------------------------------------------------------

def figure(drawn, caption):
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def diagonal(bins, names, low, caption):
    """Bins of benchmarks.calibration against the diagonal, where all is well; names: of x and y."""
    points = [(row["predicted"], row["actual"]) for row in bins]
    lines = [("other", [(low, low), (1, 1)]), ("own", points), ("dots", points)]
    return figure(chart(lines, ticks(low, 1), ticks(0, 1), names), caption)


def best_of_n(found):
    """found: bon.curve's rows."""
    lines = [(style, [(np.log2(row["n"]), row[key]) for row in found]) for style, key in (
        ("thin", "low"), ("thin", "high"), ("other", "oracle"), ("other", "random"),
        ("own", "reward_model"), ("dots", "reward_model"))]
    golds = [y for _, points in lines for _, y in points]
    drawn = chart(lines, [(np.log2(row["n"]), row["n"]) for row in found],
                  ticks(min(golds), max(golds), 5, "{:.2f}"), ("n", "gold"))
    return figure(drawn, "Best of n: gold of the response that it picks, with a 95% interval; "
                  "dashed, the best one and a random one.")


def search(rewards, worth, exact):
    """What halving picks and how many tokens it writes, at places that are shares of the mean
    length; rewards and exact: of every prefix, sets of candidates."""
    length = np.mean([len(r) for some in rewards for r in some])
    found = defaultdict(list)       # (judge, way) -> its points
    for shares in HALVE_AT:
        places = sorted({max(1, round(share * length)) for share in shares})
        for row in compare_ways(rewards, worth, range(len(worth)), places, exact):
            point = row["tokens"], row["worth"]
            if point not in found[row["judge"], row["way"]]:
                found[row["judge"], row["way"]].append(point)
    whole, model = found["reward model", "best of all"], "reward model"
    lines = [("own", found[model, "halving"] + whole), ("dots", found[model, "halving"] + whole),
             ("other", found["random", "one"] + found[model, "best of as many tokens"] + whole),
             ("thin", found["exact value", "halving"] + found["oracle", "best of all"])]
    points = [point for _, line in lines for point in line]
    xs, ys = ([0, *axis] for axis in zip(*points))
    drawn = chart(lines, ticks(0, max(xs), 5, "{:.0f}"), ticks(min(ys), max(ys), 5, "{:.2f}"),
                  ("tokens written", "gold"))
    return figure(drawn, "Search: gold of the pick when half of the candidates are dropped at each "
                  "of three places; dashed, when as many tokens are spent on fewer candidates; "
                  "thin, when the exact value drops them.")


def figures_of(results, device, model, checkpoint, dataset):
    """The figures of the whole split; results: its metrics."""
    found = results["reliability"]
    yield diagonal(found["bins"], ("confidence", "accuracy"), 0.5, "Is it as sure as it is right? "
                   "Confidence is σ of the difference of two rewards; mean distance from the "
                   f"dashed line {found['ece']:.3f}.")
    if dataset.kind == "toy":
        yield diagonal(results["value_bins"], ("z", "value"), 0, "Is a prefix worth what it seems? "
                       "z is σ of its reward less the mean one; mean distance from the "
                       f"dashed line {results['calibration_error']:.3f}.")
        config = BonConfig(prompts=50, device=device)
        generator, _, gold_of = open_generator(dataset.tokenizer, checkpoint, config)
        rows = obtain_candidates(generator, dataset, config)
        rewards, worth = prefix_rewards(model, rows), gold_of(rows)
        final = [[r[-1] for r in some] for some in rewards]
        yield best_of_n(curve(final, worth, range(len(rows))))
        yield search(rewards, worth, exact_values(dataset, rows))


def response(name, pieces, r, V, p, mean):
    """One response; V may be None; mean: the reward whose z is 1/2."""
    lines, rows = [("own", list(enumerate(sigmoid(r - mean))))], [("r", steps_of(r))]
    if V is not None:
        lines.append(("other", list(enumerate(V))))
        rows.append(("V", steps_of(V)))
    last = len(r) - 1
    along = chart(lines, [(0, "1"), (last or 1, last + 1)], ticks(0, 1, 3), ("token", "z"), 130)
    below = ["" if x >= 0.95 else f"{x:.2f}".lstrip("0") for x in p]
    return (f"<figure><b>{name}: reward {r[-1]:+.2f}</b>{along}"
            f"{strips(pieces, rows, 480, below)}</figure>")


def table(lines):
    """Lines of cells, the first one the head."""
    rows = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
            for tag, line in zip(["th"] + ["td"] * len(lines), lines)]
    return f"<table><tr>{'</tr><tr>'.join(rows)}</tr></table>"


# Commands ----------------------------------------------------------------------------------------

def open_model(path, device):
    """-> RewardModel, its checkpoint, its Dataset, the Split val, exact values beside it or None"""
    model, _, checkpoint = load_reward_model(path, device)
    dataset = open_dataset(checkpoint["settings"]["dataset"], checkpoint["inputs"]["data"])
    if dataset.kind == "labels":
        raise UserError("responses with labels are no pairs; nothing is drawn of them")
    exact = dataset.array("val", "exact-value") if dataset.kind == "toy" else None
    return model, checkpoint, dataset, dataset.split("val"), exact


def write_page(config):
    model, checkpoint, dataset, split, exact = open_model(config.checkpoint, config.device)
    settings = checkpoint["settings"]
    results = evaluate_run(model, dataset, settings)["splits"]
    generator, _ = load_generator(settings["generator"], config.device)
    about = described(settings["generator"], checkpoint["inputs"]["p"])
    taken_at, rows = (about["temperature"], about["top_p"]), list(split)
    rewards = score(model, rows)
    mean = np.concatenate([r for parts in rewards for r in parts]).mean()
    margins = np.array([a[-1] - b[-1] for a, b in rewards])

    def pair(i):
        p = map(np.exp, response_logprobs(generator, [rows[i]], *taken_at)[0])
        V = (None, None) if exact is None else split.of_responses(exact, i)
        pieces = [dataset.tokenizer.pieces(tokens) for tokens in rows[i].responses]
        parts = [response(*known, mean) for known in
                 zip(("chosen", "rejected"), pieces, rewards[i], V, p)]
        prompt = html.escape(dataset.tokenizer.decode(rows[i].prompt)[-600:].strip())
        return (f'<details open=""><summary>pair {i}: reward difference {margins[i]:+.2f}'
                f"</summary><p>{prompt}</p><div>{''.join(parts)}</div></details>")

    order = np.argsort(-margins, kind="stable").tolist()
    hits = [pair(i) for i in order[:config.count] if margins[i] > 0]
    misses = [pair(i) for i in order[::-1][:config.count] if margins[i] <= 0]
    folder = Path(config.checkpoint)
    out = config.out or (folder if folder.is_dir() else folder.parent) / "report.html"
    write_text(out, PAGE.format(
        title=html.escape(f"Reward model {config.checkpoint}"), css=CSS,
        about=html.escape("{regularizer}, read-out {readout}, seed {seed}, trained on {dataset}; "
                          "below the table all is of its split val.".format(**settings)),
        table=table(table_lines(results)),
        dashed=" (dashed: the exact value)" * (exact is not None),
        exact=" and to the exact value V" * (exact is not None),
        figures="".join(figures_of(results["val"], config.device, model, checkpoint, dataset)),
        hits="".join(hits) or NONE, misses="".join(misses) or NONE))
    print(f"wrote {out}: {len(hits)} hits, {len(misses)} misses")


def write_picture(config):
    i, side = divmod(config.response, 2)
    rows, opened = [], [open_model(path, config.device) for path in config.checkpoint.split(",")]
    *_, dataset, split, exact = opened[0]
    in_range(config, 0, 2 * len(split) - 1, "response")
    for model, checkpoint, its_dataset, *_ in opened:
        if its_dataset.folder != dataset.folder:
            raise UserError("the models of a picture are of one dataset")
        words = [checkpoint["settings"][key] for key in ("regularizer", "probs", "readout")]
        label = " ".join(word for word in words if word not in ("generator", "last"))
        rows.append((label, steps_of(score(model, [split[i]])[0][side])))
    if exact is not None:
        rows.append(("exact value", steps_of(split.of_responses(exact, i)[side])))
    pieces = dataset.tokenizer.pieces(split[i].responses[side])
    write_text(config.svg, strips(pieces, rows, 880, style=CSS))
    print(f"wrote {config.svg}")


def main(config):
    in_range(config, 1, 10**6, "count")
    (write_picture if config.svg else write_page)(config)


if __name__ == "__main__":
    run_script(ReportConfig, main)
