"""Tables and pictures from numbers alone: what is left of every layer; score against speed of runs.

    python data/pictures.py half=out/half quarter=out/quarter > chart.svg      # names of runs
"""
from __future__ import annotations

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


def table(*rows: tuple[str, ...]) -> str:
    """Cells in columns, flush right; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        lines.append("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
    return "\n".join(lines)


def layer_table(layers: list[dict[str, list[bool]]]) -> str:
    """What is left of every layer: {"heads": [True, ...], "ffn": [False, ...]}."""
    rows = [("layer", "heads", "kept", "FFN dimensions", "kept")]
    for i, layer in enumerate(layers):
        cells = [str(i)]
        for kept in (layer["heads"], layer["ffn"]):
            filled = round(12 * sum(kept) / max(1, len(kept)))
            cells += [f"{sum(kept)} of {len(kept)}", "#" * filled + "." * (12 - filled)]
        rows.append(tuple(cells))
    return table(*rows)


def closing_table(summary: dict) -> str:
    """One row a stage of summary.json. Pruning leaves the dense shapes, and so the dense speed."""
    names = list(summary["dense"])[:2]                                  # of the scores
    rows = [("model", *names, "density", "parameters", "heads", "speed")]
    for stage in ("dense", "pruned", "compact", "filled"):
        if stage not in summary:
            continue
        kind, heads, speed = "dense", summary["heads_total"], 1.0
        if stage in ("compact", "filled"):
            kind, heads, speed = "compact", summary["heads_kept"], summary["speedup"]
        densities = {"dense": 1.0, "pruned": summary["density"]}
        density = densities.get(stage, summary["compact_density"])
        scores = [f"{summary[stage][name]:.2f}" for name in names]
        rows.append((stage, *scores, f"{density:.3f}", f"{summary[f'parameters_{kind}']:,}",
                     f"{heads} of {summary['heads_total']}", f"{speed:.2f}x"))
    return table(*rows)


def report(layers: list[dict[str, list[bool]]], summary: dict) -> str:
    """What a run prints at its end."""
    difference = summary["largest_logit_difference"]
    speed = speed_line(summary["speedup"], *summary["speedup_quartiles"])
    return (f"\n{layer_table(layers)}\n\n{closing_table(summary)}\n\n{speed}\n"
            f"largest difference between pruned and compact logits: {difference:.1e}")


def size_list(numbers: dict) -> str:
    """The size of a compact model, in words."""
    return ("density of the encoder: {compact_density:.3f}\n"
            "all parameters: {parameters_compact:,} of {parameters_dense:,}\n"
            "heads: {heads_kept} of {heads_total}\n"
            "FFN dimensions: {ffn_kept} of {ffn_total}".format(**numbers))


def speed_line(median: float, low: float, high: float) -> str:
    return f"speed: {median:.2f}x, half of the measurements {low:.2f}x to {high:.2f}x"


def svg(width: int, height: int, parts: list[str]) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'fill="{GREY}" font-family="sans-serif" font-size="13">\n'
            + "\n".join([*parts, "</svg>\n"]))


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'


def strip(kept: list[bool], x: int, y: int, dashes: str) -> str:
    """A line with a part for each head or FFN dimension: blue where it is kept, grey where not."""
    path = ""
    for on, run in groupby(kept):
        length = len(list(run))
        path += f"h{length}" if on else f"m{length} 0"
    scale = 220 / max(1, len(kept))
    return (f'<g transform="translate({x} {y}) scale({scale:.4f} 1)" stroke-width="14" {dashes}>'
            f'<path stroke="{GREY}" stroke-opacity=".3" d="M0 0h{len(kept)}"/>'
            f'<path stroke="{BLUE}" d="M0 0{path}"/></g>')


def layers_svg(layers: list[dict]) -> str:
    """layer_table as a picture: a square is a head, a line is an FFN dimension."""
    parts = [text(60, 14, "heads (blue: kept)"), text(370, 14, "FFN dimensions")]
    for i, layer in enumerate(layers):
        y = 32 + 22 * i
        heads, ffn = layer["heads"], layer["ffn"]
        parts += [text(0, y + 4, f"layer {i}"),
                  strip(heads, 60, y, 'stroke-dasharray=".85 .15"'),
                  text(288, y + 4, f"{sum(heads)} of {len(heads)}"),
                  strip(ffn, 370, y, ""),
                  text(598, y + 4, f"{sum(ffn)} of {len(ffn)}")]
    return svg(700, 24 + 22 * len(layers), parts)


def chart(runs: list[tuple[str, float, float]]) -> str:
    """An SVG of runs (name, speedup, share of the dense score) beside the paper's networks."""
    def x_of(speed: float) -> float:
        return 60 + 110 * (speed - 0.5)

    def y_of(share: float) -> float:
        return 30 + 560 * (1.05 - max(share, 0.5))

    parts = [text(8, 16, "score, in percent of the dense model's"),
             text(690, 395, "times as fast as the dense model", "end"),
             f'<circle cx="400" cy="12" r="5" fill="{BLUE}"/>', text(410, 16, "these runs"),
             f'<circle cx="500" cy="12" r="5" fill="{ORANGE}"/>',
             text(510, 16, "the paper's (BERT-base)")]
    for share in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        y = y_of(share)
        parts += [f'<path d="M60 {y:g}h630" stroke="{GREY}" stroke-opacity=".3"/>',
                  text(50, y + 4, f"{100 * share:g}", "end")]
    for speed in range(1, 7):
        parts.append(text(x_of(speed), 375, f"{speed}x", "middle"))
    marks = [(BLUE, *run) for run in runs]
    marks += [(ORANGE, "", speed, f1 / 88.5) for speed, f1 in PAPER]
    for colour, name, speed, share in marks:
        below = " (below)" if share < 0.5 else ""
        x, y = x_of(speed), y_of(share)
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>',
                  text(x + 9, y + 4, name + below)]
    return svg(700, 400, parts)


def points(argument: str) -> list[tuple[str, float, float]]:
    """Name, speedup and share of the dense score of a run's small models, from NAME=FOLDER."""
    name, _, folder = argument.partition("=")
    summary = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
    headline, speed = summary["headline"], summary["speedup"]
    dense = summary["dense"][headline]
    found = [(name, speed, summary["compact"][headline] / dense)]
    if "filled" in summary:
        found.append((f"{name}, filled", speed, summary["filled"][headline] / dense))
    return found


if __name__ == "__main__":
    print(chart([point for argument in sys.argv[1:] for point in points(argument)]), end="")
