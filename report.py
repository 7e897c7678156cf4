"""Show a reward model on one HTML page, or compare prefix values in one picture.

    python report.py --checkpoint=out/toy-icrm-seed0
    python report.py --checkpoint=out/toy-none-seed0,out/toy-icrm-seed0 --svg=X.svg

The page (report.html beside the checkpoint) has the accuracies, the calibration of the
ranking, and the most confident right and wrong pairs of val. Each token is coloured by
the change in reward. On the toy world, it also has the calibration of z, and curves of
best-of-n and halving.

The picture shows one response of the toy world along its tokens: the exact value V, and
the values z that a baseline and a second model predict. The gain of a response is the
mean |z - V| over its prefixes by the baseline minus that by the second model. Of the
chosen responses of val, the one with the median gain is drawn.
"""

import html
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, UserError, check_range, find_near, open_output, run_script
import numpy as np

from bon import (
    BonConfig,
    best_of_n_curve,
    candidate_rewards,
    compare_strategies,
    exact_values,
    open_generator,
    sample_candidates,
)
from data.dataset import open_dataset
from data.toy import KINDS, QUALITY_OF
from evaluate import evaluate_run, load_reward_model, score, sigmoid, table_lines
from generator import load_generator, read_p_metadata, response_logprobs

# Where halving drops candidates, as shares of their mean length: three schedules.
HALVING_SHARES = ((0.12, 0.22, 0.32), (0.24, 0.4, 0.56), (0.38, 0.6, 0.82))
CONTROL = {}  # characters that XML does not allow, and visible line ends
for code in (*range(9), *range(11, 32), 0xFFFE, 0xFFFF):
    CONTROL[code] = "\ufffd"
CONTROL[ord("\n")] = "\u21b5\n"
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{title}</title><style>{css}</style></head><body>
<h1>{title}</h1><p>{settings}</p>
{table}
<p>{explanation}</p>
<div>{figures}</div>
<h2>Most confident right pairs</h2>{right}
<h2>Most confident wrong pairs</h2>{wrong}
</body></html>
"""
EXPLANATION = """z = sigma(r - mean reward of all prefixes) is the predicted value of a
prefix. The charts of the pairs show z along a response (dashed: the exact value, on the
toy world). Below them, each token is coloured by the change of the reward. Orange
tokens raised it, blue ones lowered it. The strength of the colour is the change
relative to the largest one of the response."""


@dataclass(frozen=True)
class ReportConfig:
    checkpoint: str = ""  # a reward model: its folder. for a picture two: A,B
    out: str = ""  # the page. empty: report.html beside the checkpoint
    count: int = 3  # right and wrong pairs to show
    svg: str = ""  # draw the picture instead, in this file
    device: str = "auto"  # auto, cpu, cuda, cuda:N


def escape(text):
    return html.escape(text.translate(CONTROL))


# Charts -------------------------------------------------------------------------------


class Axes:
    """Maps data to pixels.

    x_range, y_range: (low, high) in data units. width, height, margins: in pixels. The
    margins are left, right, top and bottom
    """

    def __init__(self, x_range, y_range, width, height, margins):
        self.x_range, self.y_range = x_range, y_range
        self.width, self.height = width, height
        self.left, self.right, self.top, self.bottom = margins

    def x(self, value):
        low, high = self.x_range
        share = (value - low) / ((high - low) or 1)
        return self.left + share * (self.width - self.left - self.right)

    def y(self, value):
        low, high = self.y_range
        share = (value - low) / ((high - low) or 1)
        return (
            self.height - self.bottom - share * (self.height - self.top - self.bottom)
        )

    def line(self, css_class, xs, ys):
        points = []
        for x, y in zip(xs, ys):
            points.append(f"{self.x(x):.1f},{self.y(y):.1f}")
        return f'<polyline class="{css_class}" points="{" ".join(points)}"/>'

    def text(self, x, y, text, anchor="middle", css_class=""):
        return (
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" '
            f'class="{css_class}">{escape(text)}</text>'
        )

    def grid(self, y_ticks):
        """A horizontal line and a label for every tick."""
        parts = []
        for value, label in y_ticks:
            y, end = self.y(value), self.width - self.right
            parts.append(f'<path class="axis" d="M{self.left} {y:.1f}H{end}"/>')
            parts.append(self.text(self.left - 6, y + 4, label, "end"))
        return "".join(parts)


def svg(width, height, label, content, style=""):
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{escape(label)}">{style}{content}</svg>'
    )


def ticks(low, high, count, format_spec):
    return [(v, format(v, format_spec)) for v in np.linspace(low, high, count)]


def chart(lines, x_ticks, y_ticks, x_name, y_name, height=230):
    """lines: [(css class, xs, ys), ...]. Ticks: [(value, label), ...]"""
    x_range = x_ticks[0][0], x_ticks[-1][0]
    y_range = y_ticks[0][0], y_ticks[-1][0]
    axes = Axes(x_range, y_range, 380, height, (46, 14, 24, 40))
    parts = [axes.grid(y_ticks), axes.text(4, 12, y_name, "start")]
    parts.append(axes.text(366, height - 6, x_name, "end"))
    for value, label in x_ticks:
        parts.append(axes.text(axes.x(value), height - 24, label))
    for css_class, xs, ys in lines:
        parts.append(axes.line(css_class, xs, ys))
    return svg(380, height, f"{y_name} against {x_name}", "".join(parts))


def figure(drawing, caption):
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"


def calibration_figure(bins, low, x_name, y_name, caption):
    """Bins of evaluate.calibration, and the diagonal of perfect calibration."""
    xs, ys = [row["predicted"] for row in bins], [row["actual"] for row in bins]
    lines = [("dashed", (low, 1), (low, 1)), ("model", xs, ys)]
    x_ticks, y_ticks = ticks(low, 1, 6, ".1f"), ticks(0, 1, 6, ".1f")
    return figure(chart(lines, x_ticks, y_ticks, x_name, y_name), caption)


def best_of_n_figure(rows):
    """rows: of bon.best_of_n_curve"""
    xs, lines, qualities = [np.log2(row["n"]) for row in rows], [], []
    for css_class, key in (
        ("thin", "low"),
        ("thin", "high"),
        ("dashed", "oracle"),
        ("dashed", "random"),
        ("model", "reward_model"),
    ):
        ys = [row[key] for row in rows]
        lines.append((css_class, xs, ys))
        qualities += ys
    x_ticks = [(x, str(row["n"])) for x, row in zip(xs, rows)]
    y_ticks = ticks(min(qualities), max(qualities), 5, ".2f")
    return figure(
        chart(lines, x_ticks, y_ticks, "n", "true quality"),
        "Best-of-n: true quality of the selected response, with a 95% interval. "
        "Dashed: the best and a random response.",
    )


def halving_figure(rewards, gold_scores, exact):
    """Halving at three token budgets. rewards, exact: of every prefix."""
    lengths = [len(prefixes) for candidates in rewards for prefixes in candidates]
    points = {}  # (selector, strategy) -> [(tokens, true quality), ...]
    for shares in HALVING_SHARES:
        stops = sorted({max(1, round(share * np.mean(lengths))) for share in shares})
        numbers = range(len(gold_scores))
        for row in compare_strategies(rewards, gold_scores, numbers, stops, exact):
            curve = points.setdefault((row["selector"], row["strategy"]), [])
            curve.append((row["tokens"], row["gold"]))
    lines, qualities = [], []
    everything = points["reward model", "best of all"][:1]
    for css_class, selector, strategy in (
        ("dashed", "reward model", "best-of-n, same tokens"),
        ("thin", "exact value", "halving"),
        ("model", "reward model", "halving"),
    ):
        curve = points[selector, strategy]
        if selector == "reward model":
            curve = curve + everything
        xs, ys = zip(*curve)
        lines.append((css_class, xs, ys))
        qualities += ys
    x_ticks = ticks(0, everything[0][0], 5, ".0f")
    y_ticks = ticks(min(qualities), max(qualities), 5, ".2f")
    return figure(
        chart(lines, x_ticks, y_ticks, "tokens per prompt", "true quality"),
        "Successive halving: true quality of the selected response against the tokens "
        "generated. Dashed: best-of-n with the same tokens. Thin: halving by the exact "
        "value.",
    )


# The page -----------------------------------------------------------------------------


def open_model(path, device):
    """RewardModel, its checkpoint, and its Dataset."""
    model, _, checkpoint = load_reward_model(path, device)
    dataset = open_dataset(checkpoint["settings"]["dataset"], checkpoint)
    if dataset.kind == "labels":
        raise UserError("a report needs pairs. This dataset has labelled responses")
    return model, checkpoint, dataset


def split_figures(metrics, device, model, checkpoint, dataset):
    """The figures of val."""
    reliability = metrics["reliability"]
    figures = [
        calibration_figure(
            reliability["bins"],
            0.5,
            "confidence",
            "accuracy",
            "Calibration of the ranking. Confidence is sigma of the absolute "
            "difference of two rewards. "
            f"Mean gap to the dashed line: {reliability['ece']:.3f}.",
        )
    ]
    error = metrics.get("calibration_error")
    if error is not None:
        figures.append(
            calibration_figure(
                metrics["value_bins"],
                0.0,
                "z",
                "C",
                "Calibration of z. C is the value that the training labels imply. Mean "
                f"gap to the dashed line: {error:.3f}.",
            )
        )
    if dataset.kind == "toy":
        config = BonConfig(prompts=50, device=device)
        generator, _, score_gold = open_generator(dataset.tokenizer, checkpoint, config)
        examples = sample_candidates(generator, dataset, config)
        rewards, gold_scores = candidate_rewards(model, examples), score_gold(examples)
        final = []
        for candidates in rewards:
            final.append([prefixes[-1] for prefixes in candidates])
        curve = best_of_n_curve(final, gold_scores, range(len(examples)))
        figures.append(best_of_n_figure(curve))
        exact = exact_values(dataset, examples)
        figures.append(halving_figure(rewards, gold_scores, exact))
    return "".join(figures)


def response_figure(name, texts, rewards, mean_reward, values, p):
    """The chart of z along a response, and its tokens, coloured by reward change.

    values: exact values, or None. p: the generator's probability of every token
    """
    z, tokens = sigmoid(rewards - mean_reward), np.arange(1, len(rewards) + 1)
    lines = [("model", tokens, z)]
    if values is not None:
        lines.append(("dashed", tokens, values))
    x_ticks = [(1, "1"), (len(rewards), str(len(rewards)))]
    drawing = chart(lines, x_ticks, ticks(0, 1, 3, ".1f"), "token", "z", 140)
    changes, spans = np.diff(rewards, prepend=rewards[0]), []
    largest = np.abs(changes).max() or 1.0
    texts = [*texts[:-1], texts[-1] or "\u23ce"]  # end-of-text
    for text, change, p_of_token in zip(texts, changes, p):
        direction = "up" if change > 0 else "down"
        strength = round(100 * abs(change) / largest)
        spans.append(
            f'<span class="{direction}" style="--strength: {strength}%" '
            f'title="change {change:+.2f}, p {p_of_token:.2f}">{escape(text)}</span>'
        )
    return (
        f"<figure><b>{name}: reward {rewards[-1]:+.2f}</b>{drawing}"
        f'<p class="tokens">{"".join(spans)}</p></figure>'
    )


def table(lines):
    """Rows of cells as an HTML table, the header first."""
    rows = []
    for number, line in enumerate(lines):
        tag = "th" if number == 0 else "td"
        cells = [f"<{tag}>{escape(cell)}</{tag}>" for cell in line]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(rows)}</table>"


def write_page(config):
    model, checkpoint, dataset = open_model(config.checkpoint, config.device)
    settings, split = checkpoint["settings"], dataset.split("val")
    generator_folder = find_near(checkpoint, settings["generator"])
    generator, _ = load_generator(generator_folder, config.device)
    metadata = read_p_metadata(generator_folder, checkpoint["inputs"]["p"])
    results = evaluate_run(model, dataset, settings)["splits"]
    examples = list(split)
    rewards = score(model, examples)
    all_rewards = np.concatenate([r for responses in rewards for r in responses])
    margins = np.array([chosen[-1] - rejected[-1] for chosen, rejected in rewards])

    def pair_figure(i):
        logprobs = response_logprobs(
            generator, [examples[i]], metadata["temperature"], metadata["top_p"]
        )[0]
        values = None, None
        if dataset.kind == "toy":
            values = split.response_values(dataset.array("val", "exact-value"), i)
        parts = []
        for side, name in enumerate(("chosen", "rejected")):
            texts = dataset.tokenizer.token_texts(examples[i].responses[side])
            parts.append(
                response_figure(
                    name,
                    texts,
                    rewards[i][side],
                    all_rewards.mean(),
                    values[side],
                    np.exp(logprobs[side]),
                )
            )
        prompt = escape(dataset.tokenizer.decode(examples[i].prompt)[-600:].strip())
        return (
            f'<details open=""><summary>pair {i}: reward difference {margins[i]:+.2f}'
            f'</summary><p class="prompt">{prompt}</p><div>{"".join(parts)}</div>'
            "</details>"
        )

    order = np.argsort(-margins, kind="stable").tolist()
    right = [i for i in order[: config.count] if margins[i] > 0]
    wrong = [i for i in order[::-1][: config.count] if margins[i] <= 0]
    folder = Path(config.checkpoint)
    if not folder.is_dir():
        folder = folder.parent
    path = config.out or folder / "report.html"
    described = (
        "{regularizer}, p: {p_source}, prefix reward: {prefix_reward}, seed {seed}"
    )
    page = PAGE.format(
        title=escape(f"Reward model {config.checkpoint}"),
        css=(ROOT / "lab" / "report.css").read_text(encoding="utf-8"),
        settings=escape(f"{described}. Dataset: {{dataset}}".format(**settings)),
        table=table(table_lines(results)),
        explanation=EXPLANATION,
        figures=split_figures(
            results["val"], config.device, model, checkpoint, dataset
        ),
        right="".join(map(pair_figure, right)) or "<p>There are none.</p>",
        wrong="".join(map(pair_figure, wrong)) or "<p>There are none.</p>",
    )
    inputs = config.checkpoint, generator_folder, dataset.folder
    with open_output(path, *inputs) as file:
        file.write(page)
    print(f"wrote {path}: {len(right)} right and {len(wrong)} wrong pairs")


# The picture --------------------------------------------------------------------------

STYLE = """<style>
svg { --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --band: #eef1f4;
  --model: #0969da; --baseline: #8c959f }
@media (prefers-color-scheme: dark) { svg { --ink: #f0f6fc; --soft: #9198a1;
  --line: #3d444d; --band: #1c2128; --model: #58a6ff; --baseline: #768390 } }
text { font: 12px system-ui, sans-serif; fill: var(--soft) }
.word { font-size: 11px }
.evidence { font-weight: bold; fill: var(--ink) }
.sign { font-size: 17px; font-weight: bold; fill: var(--ink) }
polyline { fill: none; stroke-width: 2.2; stroke-linejoin: round }
polyline.exact { stroke: var(--ink); stroke-dasharray: 6 4; stroke-width: 1.8 }
polyline.model { stroke: var(--model); stroke-width: 2.8 }
polyline.baseline { stroke: var(--baseline) }
text.exact, text.model, text.baseline { font-size: 14px; font-weight: 600 }
text.exact { fill: var(--ink) }
text.model { fill: var(--model) }
text.baseline { fill: var(--baseline) }
.axis { stroke: var(--line) }
.band { fill: var(--band) }
</style>"""


def predicted_values(model, examples):
    """z of every prefix: for each Example a list of arrays, one per response."""
    rewards = score(model, examples)
    mean = np.concatenate([r for responses in rewards for r in responses]).mean()
    values = []
    for responses in rewards:
        values.append([sigmoid(response - mean) for response in responses])
    return values


def find_evidence(texts, kinds):
    """The evidence in a response: [(first token, last token, quality), ...]."""
    evidence = []
    for start in np.flatnonzero(kinds == KINDS["evidence"]):
        end = start
        while "," not in texts[end]:
            end += 1
        phrase = "".join(texts[start : end + 1]).strip(" ,")
        evidence.append((start, end, QUALITY_OF[phrase]))
    return evidence


def draw_prefixes(texts, lines, evidence):
    """The picture. lines: [(css class, label, values), ...], one value per token"""
    n_tokens = len(texts)
    axes = Axes((0, n_tokens - 1), (0, 1), 900, 360, (40, 118, 30, 76))
    parts = []
    for start, end, quality in evidence:
        left, right = axes.x(start - 0.5), axes.x(end + 0.5)
        top, height = axes.y(1), axes.y(0) - axes.y(1)
        parts.append(
            f'<rect class="band" x="{left:.1f}" y="{top:.1f}" '
            f'width="{right - left:.1f}" height="{height:.1f}"/>'
        )
        sign = "+" if quality > 0 else "\u2212"
        parts.append(axes.text((left + right) / 2, top + 16, sign, css_class="sign"))
    parts.append(axes.grid(ticks(0, 1, 5, ".2f")))
    parts.append(axes.text(4, 16, "value of the prefix", "start"))
    label_heights = spread([axes.y(values[-1]) for _, _, values in lines], 18)
    for (css_class, label, values), y in zip(lines, label_heights):
        parts.append(axes.line(css_class, range(n_tokens), values))
        x = axes.x(n_tokens - 1) + 8
        parts.append(axes.text(x, y + 5, label, "start", css_class))
    is_evidence = set()
    for start, end, _ in evidence:
        is_evidence.update(range(start, end + 1))
    for t, text in enumerate(texts):
        css_class = "word evidence" if t in is_evidence else "word"
        x, y = axes.x(t) + 4, axes.y(0) + 10
        parts.append(
            f'<text class="{css_class}" text-anchor="end" '
            f'transform="translate({x:.1f} {y:.1f}) rotate(-90)">'
            f"{escape(text.strip())}</text>"
        )
    label = "Exact and predicted value of every prefix of one response"
    return svg(900, 360, label, "".join(parts), STYLE)


def spread(heights, gap):
    """Move labels apart so that none overlap, keeping their order."""
    order = np.argsort(heights)
    moved = np.array(heights, dtype=float)
    for above, below in zip(order, order[1:]):
        moved[below] = max(moved[below], moved[above] + gap)
    return moved


def write_picture(config):
    paths = [path for path in config.checkpoint.split(",") if path]
    if len(paths) != 2:
        raise UserError("the picture needs --checkpoint=BASELINE,MODEL")
    opened = [open_model(path, config.device) for path in paths]
    dataset = opened[0][2]
    if dataset.kind != "toy" or opened[1][2].folder != dataset.folder:
        raise UserError("the picture needs two models of one toy dataset")
    split = dataset.split("val")
    examples, gains, z = list(split), [], []
    for model, _, _ in opened:
        z.append(predicted_values(model, examples))
    exact, kinds = dataset.array("val", "exact-value"), dataset.array("val", "kind")
    for i in range(len(split)):
        V, _ = split.response_values(exact, i)
        errors = [np.abs(values[i][0] - V).mean() for values in z]
        gains.append(errors[0] - errors[1])
    i = int(np.argsort(gains, kind="stable")[len(gains) // 2])
    print(
        f"chosen response of pair {i}, with the median gain {gains[i]:+.3f} of "
        f"{len(gains)}. Gain: mean |z - V| of {paths[0]} minus that of {paths[1]}"
    )
    texts = dataset.tokenizer.token_texts(examples[i].responses[0])[:-1]
    names = {"none": "baseline", "icrm": "ICRM"}
    lines = []
    for css_class, (_, checkpoint, _), values in zip(("baseline", "model"), opened, z):
        name = checkpoint["settings"]["regularizer"]
        lines.append((css_class, names.get(name, name), values[i][0][:-1]))
    V, _ = split.response_values(exact, i)
    lines.append(("exact", "exact value", V[:-1]))
    evidence = find_evidence(texts, split.response_values(kinds, i)[0][:-1])
    with open_output(config.svg, *paths) as file:
        file.write(draw_prefixes(texts, lines, evidence))
    print(f"wrote {config.svg}")


def main(config):
    check_range(config, 1, 10**6, "count")
    if config.svg:
        write_picture(config)
    else:
        write_page(config)


if __name__ == "__main__":
    run_script(ReportConfig, main)
