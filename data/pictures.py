"""Tables and pictures from numbers alone: what is left of every layer; score against speed of runs.

    python data/pictures.py half=out/half quarter=out/quarter > chart.svg      # names of runs
"""
import json
import sys
from itertools import groupby
from pathlib import Path

BLUE, ORANGE, GREY = "#2f81f7", "#e8740c", "#808080"           # seen on white and on black
# Speed and F1 on SQuAD v1.1 that the paper's authors publish for their networks made of BERT-base
# (model cards of huggingface.co/madlag), whose own F1 is 88.5. The second was taught by BERT-large.
PAPER = [
    (2.44, 87.71),
    (2.01, 89.19),
    (1.96, 88.33),
    (1.84, 88.72),
]


def layer_table(layers):
    """What is left of every layer: {"heads": [True, ...], "ffn": [False, ...]}."""
    lines = ["layer      heads                FFN dimensions"]
    for i, layer in enumerate(layers):
        line = f"{i:>5}"
        for kept in (layer["heads"], layer["ffn"]):
            filled = round(12 * sum(kept) / max(1, len(kept)))
            line += f"{sum(kept):>7} of {len(kept):<5}{'#' * filled:.<12}"
        lines.append(line)
    return "\n".join(lines)


def price_table(prices):
    """What a layer's heads, and its FFN dimensions, take on this machine, in milliseconds."""
    rows = [*prices["heads"], *prices["ffn"]]
    lines = []
    for name, row in zip(("heads", "ms", "ffn", "ms"), rows):
        lines.append(f"{name:>5}" + "".join(f"{number:>8.4g}" for number in row))
    return "\n".join(lines)


def closing_table(summary):
    """One row a stage of summary.json. Pruning leaves the dense shapes, and so the dense speed."""
    names = list(summary["dense"])[:2]                                  # of the scores
    titles = "".join(f"{name:>13}" for name in names)
    lines = [f"  model{titles}   density   parameters      heads    speed"]
    densities = {"dense": 1.0, "pruned": summary["density"]}
    for stage in ("dense", "pruned", "compact", "filled"):
        if stage not in summary:
            continue
        heads, parameters, speed = summary["heads_total"], summary["parameters_dense"], 1.0
        if stage not in densities:
            heads, parameters = summary["heads_kept"], summary["parameters_compact"]
            speed = summary["speedup"]
        scores = "".join(f"{summary[stage][name]:>13.2f}" for name in names)
        density = densities.get(stage, summary["compact_density"])
        lines.append(f"{stage:>7}{scores}{density:>10.3f}{parameters:>13,}"
                     f"{heads:>5} of {summary['heads_total']:<3}{speed:>6.2f}x")
    return "\n".join(lines)


def report(layers, summary):
    """What a run prints at its end."""
    asked = ""
    if "prices" in summary:
        asked = "asked: {speedup_asked:.2f}x; predicted: {speedup_predicted:.2f}x\n"
    return (f"\n{layer_table(layers)}\n\n{closing_table(summary)}\n\n{asked.format(**summary)}"
            f"{speed_line(summary['speedup'], *summary['speedup_quartiles'])}\nlargest difference "
            f"between pruned and compact logits: {summary['largest_logit_difference']:.1e}")


def size_list(numbers):
    """The size of a compact model, in words."""
    return ("density of the encoder: {compact_density:.3f}\n"
            "all parameters: {parameters_compact:,} of {parameters_dense:,}\n"
            "heads: {heads_kept} of {heads_total}\n"
            "FFN dimensions: {ffn_kept} of {ffn_total}".format(**numbers))


def speed_line(median, low, high):
    return f"speed: {median:.2f}x, half of the measurements {low:.2f}x to {high:.2f}x"


def svg(width, height, parts):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'fill="{GREY}" font-family="sans-serif" font-size="13">\n'
            + "\n".join([*parts, "</svg>\n"]))


def strip(kept, x, y, dashes=""):
    """A line with a part for each head or FFN dimension: blue where it is kept; and how many."""
    path = ""
    for on, run in groupby(kept):
        length = len(list(run))
        path += f"h{length}" if on else f"m{length} 0"
    scale = 220 / max(1, len(kept))
    return (f'<g transform="translate({x} {y}) scale({scale:.4f} 1)" stroke-width="14" {dashes}>'
            f'<path stroke="{GREY}" stroke-opacity=".3" d="M0 0h{len(kept)}"/>'
            f'<path stroke="{BLUE}" d="M0 0{path}"/></g>'
            f'<text x="{x + 228}" y="{y + 4}">{sum(kept)} of {len(kept)}</text>')


def layers_svg(layers):
    """layer_table as a picture: a square is a head, a line is an FFN dimension."""
    parts = ['<text x="60" y="14">heads (blue: kept)</text>',
             '<text x="370" y="14">FFN dimensions</text>']
    for i, layer in enumerate(layers):
        y = 32 + 22 * i
        parts.append(f'<text x="0" y="{y + 4}">layer {i}</text>')
        parts.append(strip(layer["heads"], 60, y, 'stroke-dasharray=".85 .15"'))
        parts.append(strip(layer["ffn"], 370, y))
    return svg(700, 24 + 22 * len(layers), parts)


def chart(runs):
    """An SVG of runs (name, speedup, share of the dense score) beside the paper's networks."""
    parts = ['<text x="8" y="16">score, in percent of the dense model\'s</text>',
             '<text x="690" y="395" text-anchor="end">times as fast as the dense model</text>',
             f'<circle cx="400" cy="12" r="5" fill="{BLUE}"/>'
             '<text x="410" y="16">these runs</text>',
             f'<circle cx="500" cy="12" r="5" fill="{ORANGE}"/>'
             '<text x="510" y="16">the paper\'s (BERT-base)</text>']
    for percent in range(50, 101, 10):
        y = 618 - 5.6 * percent
        parts.append(f'<path d="M60 {y:g}h630" stroke="{GREY}" stroke-opacity=".3"/>'
                     f'<text x="50" y="{y + 4:g}" text-anchor="end">{percent}</text>')
    for speed in range(1, 7):
        parts.append(f'<text x="{5 + 110 * speed}" y="375" text-anchor="middle">{speed}x</text>')
    marks = [(*run, BLUE) for run in runs]
    marks += [("", speed, f1 / 88.5, ORANGE) for speed, f1 in PAPER]
    for name, speed, share, colour in marks:
        x, y = 5 + 110 * speed, 618 - 560 * max(share, 0.5)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>'
                     f'<text x="{x + 9:g}" y="{y + 4:g}">{name}</text>')
    return svg(700, 400, parts)


def point(argument):
    """Name, speedup and share of the dense score of a run's last model, from NAME=FOLDER."""
    name, _, folder = argument.partition("=")
    summary = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
    last = summary.get("filled", summary["compact"])
    headline = summary["headline"]
    return name, summary["speedup"], last[headline] / (summary["dense"][headline] or 1)


if __name__ == "__main__":
    print(chart([point(argument) for argument in sys.argv[1:]]), end="")
