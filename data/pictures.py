"""Tables and layers.svg.

One idea: what a run prints and draws comes from numbers alone; no model is needed.
"""
from data.run import STAGES

BLUE, GREY = "#2f81f7", "#57606a"                   # the picture has a white ground of its own


def table(rows):
    """Rows of cells as lines, every column aligned to the right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths))
                     for row in rows)


def closing_table(summary):
    """One row per stage. Pruning leaves the dense shapes, and so the dense speed: 1.00x."""
    rows = [("model", *summary["dense"], "density", "parameters", "heads", "speed")]
    dense = summary["parameters_dense"], summary["heads_total"], 1.0
    small = summary["parameters_compact"], summary["heads_kept"], summary["speedup"]
    densities = {"dense": 1.0, "pruned": summary["density"]}        # of the dense shapes
    for stage in STAGES:
        if stage not in summary:
            continue
        parameters, heads, speed = dense if stage in densities else small
        rows.append((
            stage,
            *(f"{score:.2f}" for score in summary[stage].values()),
            f"{densities.get(stage, summary['compact_density']):.3f}",
            f"{parameters:,}",
            f"{heads} of {summary['heads_total']}",
            f"{speed:.2f}x",
        ))
    return table(rows)


def report(summary):
    """What a run prints at its end."""
    lines = [closing_table(summary), ""]
    low, high = summary["speedup_quartiles"]
    lines.append(f"speed: {summary['speedup']:.2f}x, quartiles {low:.2f}x and {high:.2f}x")
    if high > 1.3 * low:
        lines.append("the quartiles lie far apart: the machine is busy, so do not trust this speed")
    lines.append("largest difference between pruned and compact logits: "
                 f"{summary['largest_logit_difference']:.1e}")
    last = summary.get("filled", summary["compact"])[summary["headline"]]
    if last <= 0.95 * summary["dense"][summary["headline"]]:
        lines.append("the score is not above 95% of the dense one: more --epochs, --fill-epochs "
                     "or --density, less --speedup, or (with little data) more --lr may help")
    return "\n".join(lines)


def bar(kept, total, x, y):
    """A bar as long as what is left of `total`; it shrinks to that when the picture opens."""
    length = 200 * kept / max(1, total)
    return (f'<rect x="{x}" y="{y}" width="200" height="14" fill="{GREY}" fill-opacity=".2"/>'
            f'<rect x="{x}" y="{y}" width="{length:.1f}" height="14" fill="{BLUE}">'
            f'<animate attributeName="width" from="200" to="{length:.1f}" dur="3s"/></rect>'
            f'<text x="{x + 208}" y="{y + 12}">{kept} of {total}</text>')


def layers_svg(before, after):
    """What is left of every layer: two bars, for its heads and for its FFN dimensions.

    before, after: the model's configurations before and after deletion.
    """
    height = 30 + 22 * len(before.heads_per_layer)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 {height}" fill="{GREY}" '
             'font-family="sans-serif" font-size="13">',
             f'<rect width="680" height="{height}" fill="#ffffff"/>',
             '<text x="70" y="16">heads that are left</text>',
             '<text x="370" y="16">FFN dimensions that are left</text>']
    numbers = zip(after.heads_per_layer, before.heads_per_layer,
                  after.ffn_per_layer, before.ffn_per_layer)
    for i, (heads, all_heads, dimensions, all_dimensions) in enumerate(numbers):
        y = 26 + 22 * i
        parts.append(f'<text x="0" y="{y + 12}">layer {i}</text>')
        parts.append(bar(heads, all_heads, 70, y))
        parts.append(bar(dimensions, all_dimensions, 370, y))
    return "\n".join([*parts, "</svg>\n"])
