"""Tables and pictures from numbers alone: what is left of every layer; score against speed of runs.

    python data/pictures.py SQuAD=out/half,out/quarter,1.98:0.95 MRPC=c > chart.svg

The latter draws the runs of these folders, by task; 1.98:0.95 is a distilled model's speed and
share of the dense score (compact.py --compare, train.py --eval).
"""
import json
import sys

BLUE, GREY = "#2f81f7", "#808080"                              # seen on white and on black
COLOURS = "#e8740c", BLUE, "#2da44e", "#a371f7", "#d63384"
FADE = ('<animate attributeName="opacity" values="1;1;0;0" keyTimes="0;{:.3f};{:.3f};1" dur="12s" '
        'repeatCount="indefinite"/>')
# For those who want no motion: what goes is not there, as where nothing moves.
STILL = '<style>@media (prefers-reduced-motion) {path[opacity="0"] {display: none}}</style>'
# Speed and F1 on SQuAD v1.1 that the paper's authors publish for their networks made of BERT-base
# (model cards of huggingface.co/madlag), whose own F1 is 88.5. The second was taught by BERT-large.
PAPER = [(2.44, 87.71), (2.01, 89.19), (1.96, 88.33), (1.84, 88.72)]


def layer_table(layers):
    """What is left of every layer: {"heads": (H,), "ffn": (F,)}, tensors of True and False."""
    lines = ["layer      heads                FFN dimensions"]
    for i, layer in enumerate(layers):
        line = f"{i:>5}"
        for kept in layer.values():
            filled = 12 * int(sum(kept)) // max(1, len(kept))
            line += f"{sum(kept):>7} of {len(kept):<5}{'#' * filled:.<12}"
        lines.append(line)
    return "\n".join(lines)


def price_table(prices):
    """What a layer's heads, and its FFN dimensions, take on this machine, in milliseconds."""
    lines = []
    for name, row in zip(("heads", "ms", "ffn", "ms"), [*prices["heads"], *prices["ffn"]]):
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
    return f"speed: {median:.2f}x, quartiles {low:.2f}x and {high:.2f}x"


def svg(width, height, parts):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'fill="{GREY}" font-family="sans-serif" font-size="13">\n'
            + "\n".join([*parts, "</svg>\n"]))


def strip(moments, x, y, dashes=""):
    """A line with a part for each head or FFN dimension; it fades at the moment it goes for good.

    moments: what is kept, [True, False, ...], in the order of time; what the last one keeps stays.
    """
    kept, end = moments[-1], len(moments)
    groups = {}                                      # parts, by the last moment that kept them
    for i, history in enumerate(zip(*moments)):
        last = max(moment * on for moment, on in enumerate(history, 1))
        groups[last] = groups.get(last, "") + f"M{i} 0h1"
    paths = f'<path stroke="{GREY}" stroke-opacity=".3" d="M0 0h{len(kept)}"/>'
    for last, line in groups.items():
        time = 0.8 * last / end                                          # of the twelve seconds
        fade = FADE.format(time, time + 0.05) if last < end else ""
        paths += f'<path stroke="{BLUE}" opacity="{int(last == end)}" d="{line}">{fade}</path>'
    return (f'<g transform="translate({x} {y}) scale({220 / max(1, len(kept)):.4f} 1)" '
            f'stroke-width="14" {dashes}>{paths}</g>'
            f'<text x="{x + 228}" y="{y + 4}">{sum(kept)} of {len(kept)}</text>')


def layers_svg(moments):
    """layer_table as a picture that moves: a square is a head, a line is an FFN dimension.

    moments: layers as there, at some moments of the run.
    """
    parts = [STILL, '<text x="60" y="14">heads (blue: kept)</text>',
             '<text x="370" y="14">FFN dimensions</text>']
    for i, layer in enumerate(zip(*moments)):
        y = 32 + 22 * i
        parts.append(f'<text x="0" y="{y + 4}">layer {i}</text>')
        parts.append(strip([moment["heads"].tolist() for moment in layer], 60, y,
                           'stroke-dasharray=".85 .15"'))
        parts.append(strip([moment["ffn"].tolist() for moment in layer], 370, y))
    return svg(700, 24 + 22 * len(moments[0]), parts)


def chart(tasks):
    """An SVG of models (speed, share of the dense score, made smaller by pruning), by task."""
    parts = ['<text x="8" y="16">score, in percent of the dense model\'s; hollow: distilled</text>',
             '<text x="690" y="395" text-anchor="end">times as fast as the dense model</text>']
    for percent in range(90, 101, 2):
        y = 2860 - 28 * percent
        parts.append(f'<path d="M60 {y:g}h630" stroke="{GREY}" stroke-opacity=".3"/>'
                     f'<text x="50" y="{y + 4:g}" text-anchor="end">{percent}</text>')
    for speed in range(1, 5):
        parts.append(f'<text x="{170 * speed - 110}" y="375" text-anchor="middle">{speed}x</text>')
    for colour, (task, models) in zip(COLOURS, tasks.items()):
        line = ""
        for speed, share, pruned in sorted(models):
            x, y = 170 * speed - 110, 2860 - 2800 * share
            if pruned:
                line += f"L{x:.1f} {y:.1f}"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" stroke="{colour}" '
                         f'fill="{colour if pruned else "none"}" stroke-width="2"/>')
        parts.append(f'<path d="{line.replace("L", "M", 1)}" stroke="{colour}" fill="none"/>'
                     f'<text x="70" y="{298 + 13 * COLOURS.index(colour)}" fill="{colour}">'
                     f'{task}</text>')
    return svg(700, 400, parts)


def model(argument):
    """Speed and share of the dense score of a run's last model; or as given, SPEED:SHARE."""
    if ":" in argument:
        return (*map(float, argument.split(":")), False)
    with open(f"{argument}/summary.json", encoding="utf-8") as file:
        summary = json.load(file)
    headline = summary["headline"]
    last = summary.get("filled", summary["compact"])[headline]
    return summary["speedup"], last / summary["dense"][headline], True


if __name__ == "__main__":
    tasks = {"the paper": [(speed, f1 / 88.5, True) for speed, f1 in PAPER]}
    for argument in sys.argv[1:]:
        name, _, models = argument.partition("=")
        tasks[name] = [model(text) for text in models.split(",")]
    print(chart(tasks), end="")
