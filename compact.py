"""Delete the heads, rows and columns that pruning emptied, and prove that the function is the same.

One idea: what is zero can be left out, and what is left out may not change the function. A head or
an FFN dimension whose weights are zero still adds a constant, because biases are never masked: the
constant moves into the next bias.

| what is zero                           | what follows                                        |
|----------------------------------------|-----------------------------------------------------|
| for every dimension d of a head: row d | attention weights sum to 1, so the head adds the    |
| of V, or column d of its part of W_O   | constant W_O[:, head] @ b_V[head]: fold it into b_O |
| row d of the first FFN matrix          | the unit is activation(b_1[d]): fold it into b_2    |
| column d of the second FFN matrix      | the unit adds nothing                               |
| a head's Q or K alone                  | the head is a mean of V over the tokens: it stays   |

    small = compact(masked)                                     # a whole model of this project
    query, key, value, output = compact_attention(query, key, value, output, head_size=64)
    python compact.py out/masked out/compact                    # delete, prove, measure
    python compact.py out/dense --compare out/compact           # size and speed of a smaller one
    python compact.py out/compact --ask "Who ...?" --context FILE

It is exact in eval mode only: attention dropout would break the sum to 1.
Source: Lagunas et al., Block Pruning For Faster Transformers, 2021 (arXiv 2109.04838), section 3.

Shapes in comments: C hidden size, H heads, D head size, F FFN dimensions.
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]                        # a linear layer's weight (out, in), bias (out,)


def alive(first: Tensor, second: Tensor, size: int = 1) -> Tensor:
    """Which heads (of `size`) or FFN dimensions do more than add a constant: (H,) or (F,).

    first (F, C) writes what second (C, F) reads: a dimension needs its row and its column.
    """
    return ((first != 0).any(1) & (second != 0).any(0)).view(-1, size).any(1)


def compact_attention(query: Pair, key: Pair, value: Pair, output: Pair,
                      head_size: int) -> tuple[Pair, Pair, Pair, Pair]:
    """Delete the heads of one layer that only add a constant; the four smaller pairs.

    query, key, value: (H D, C) and (H D,); output: (C, H D) and (C,); head_size: D.
    """
    (W_V, b_V), (W_O, b_O) = value, output
    keep = alive(W_V, W_O, head_size).repeat_interleave(head_size)  # (H D,)
    b_O = b_O.double() + W_O[:, ~keep].double() @ b_V[~keep].double()
    query, key, value = ((weight[keep], bias[keep]) for weight, bias in (query, key, value))
    return query, key, value, (W_O[:, keep], b_O.to(W_O.dtype))


def compact_ffn(first: Pair, second: Pair,
                activation: Callable[[Tensor], Tensor]) -> tuple[Pair, Pair]:
    """Delete the FFN dimensions of one layer that only add a constant; the two smaller pairs.

    first: (F, C) and (F,); second: (C, F) and (C,).
    """
    (W_1, b_1), (W_2, b_2) = first, second
    keep = alive(W_1, W_2)                                          # (F,)
    b_2 = b_2.double() + W_2[:, ~keep].double() @ activation(b_1[~keep].double())
    return (W_1[keep], b_1[keep]), (W_2[:, keep], b_2.to(W_2.dtype))


@torch.no_grad()
def compact(model: nn.Module) -> nn.Module:
    """A new model with the function of `model`, a baked BertForQuestionAnswering, in eval mode."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    heads_per_layer, ffn_per_layer = [], []
    for i, layer in enumerate(model.layers):
        names = [f"layers.{i}.attention.{name}" for name in ("query", "key", "value", "output")]
        names += [f"layers.{i}.ffn.{name}" for name in ("first", "second")]
        pairs = [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in names]
        pairs = (*compact_attention(*pairs[:4], layer.attention.head_size),
                 *compact_ffn(*pairs[4:], layer.ffn.activation))
        for name, (weight, bias) in zip(names, pairs):
            state[f"{name}.weight"], state[f"{name}.bias"] = weight, bias
        heads_per_layer.append(len(pairs[0][0]) // layer.attention.head_size)
        ffn_per_layer.append(len(pairs[4][0]))
    with torch.device("meta"):                                      # shapes only, no memory
        small = type(model)(replace(model.config, heads_per_layer=heads_per_layer,
                                    ffn_per_layer=ffn_per_layer))
    small.load_state_dict(state, assign=True)
    return small.train(model.training)


@torch.no_grad()
def expand(small: nn.Module, model: nn.Module):
    """Write a compact model's weights back into `model`, which it came from: compact's inverse."""
    state, kept = small.state_dict(), {}
    for i, layer in enumerate(model.layers):
        a, f = layer.attention, layer.ffn
        heads = alive(a.value.weight, a.output.weight, a.head_size).repeat_interleave(a.head_size)
        kept[f"layers.{i}.attention"] = heads.nonzero().flatten()
        kept[f"layers.{i}.ffn"] = alive(f.first.weight, f.second.weight).nonzero().flatten()
    for name, whole in model.state_dict().items():
        part = state[name]
        if whole.shape == part.shape:
            whole.copy_(part)
        else:                                            # rows, or columns of output and second
            dim = 0 if len(whole) != len(part) else 1
            whole.zero_().index_copy_(dim, kept[name.rsplit(".", 2)[0]], part)


# ---------------------------------------------------------------------------------- proof and price


@torch.inference_mode()
def largest_difference(masked: nn.Module, small: nn.Module,
                       inputs: Iterable[tuple[Tensor, ...]]) -> float:
    """Run both models on the same inputs; the largest difference in logits.

    Raises ArithmeticError above float32's rounding: 1e-4 * max(1, largest |logit|).
    """
    masked.eval(), small.eval()
    torch.backends.cuda.matmul.allow_tf32 = False
    pairs = [(torch.stack(masked(*batch)), torch.stack(small(*batch))) for batch in inputs]
    difference = torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()   # NaN if any is
    largest = torch.stack([a.abs().max() for a, _ in pairs]).max().item()
    if not difference <= 1e-4 * max(1.0, largest) < math.inf:
        raise ArithmeticError(f"masked and compact model differ by {difference:.2g} in logits of "
                              f"up to {largest:.2g}: more than float32's rounding")
    return difference


@torch.inference_mode()
def speedup(dense: nn.Module, small: nn.Module, batch: tuple[Tensor, ...],
            rounds: int = 15) -> float:
    """How many times faster `small` is: both in turn on one batch, the ratio of median times."""
    def seconds(model):
        begin = perf_counter()
        model(*batch)[0].sum().item()                               # .item() waits for a GPU
        return perf_counter() - begin
    dense.eval(), small.eval()
    times = [(seconds(dense), seconds(small)) for _ in range(rounds + 2)][2:]
    return median(a for a, _ in times) / median(b for _, b in times)


def linear_weights(module: nn.Module) -> int:
    """How many weights its linear layers hold."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def nonzero_weights(module: nn.Module) -> int:
    """How many weights of its linear layers are not zero."""
    return sum(int(m.weight.count_nonzero()) for m in module.modules() if isinstance(m, nn.Linear))


def mean_heads(model: nn.Module) -> int:
    """Heads that lack row d of Q or of K for every d: a mean over tokens, whatever the query."""
    return sum(int((~alive(a.query.weight, a.key.weight.T, a.head_size)).sum())
               for a in (layer.attention for layer in model.layers))


def drawing(model: nn.Module) -> str:
    """An SVG of a baked model's layers: heads and FFN dimensions, kept (blue) and gone (grey)."""
    def strip(kept: list[bool], x: int, y: int, dashes: str) -> str:
        runs = [(on, len([*run])) for on, run in groupby(kept)]
        path = "".join(f"h{length}" if on else f"m{length} 0" for on, length in runs)
        return (f'<g transform="translate({x} {y}) scale({220 / max(1, len(kept)):.4f} 1)" '
                f'stroke-width="14" {dashes}><path stroke="#999" stroke-opacity=".35" '
                f'd="M0 0h{len(kept)}"/><path stroke="#2f81f7" d="M0 0{path}"/></g>'
                f'<text x="{x + 228}" y="{y + 4}">{sum(kept)} of {len(kept)}</text>')

    rows = ['<text x="60" y="14">heads (blue: kept)</text><text x="370" y="14">FFN dimensions'
            '</text><text x="700" y="14">weights left</text>']
    for i, layer in enumerate(model.layers):
        a, f, y = layer.attention, layer.ffn, 32 + 22 * i
        heads = alive(a.value.weight, a.output.weight, a.head_size).tolist()
        dimensions = alive(f.first.weight, f.second.weight).tolist()
        left = (sum(heads) * a.head_size * 4 + sum(dimensions) * 2) * a.query.in_features
        rows += [f'<text x="0" y="{y + 4}">layer {i}</text>',
                 strip(heads, 60, y, 'stroke-dasharray=".85 .15"'), strip(dimensions, 370, y, ""),
                 f'<text x="700" y="{y + 4}">{left / max(1, linear_weights(layer)):.1%}</text>']
    return ('<svg xmlns="http://www.w3.org/2000/svg" fill="#808080" font-family="sans-serif" '
            f'font-size="13" viewBox="0 0 790 {24 + 22 * len(model.layers)}">\n'
            + "\n".join([*rows, "</svg>\n"]))


def table(*rows: tuple[str, ...]) -> str:
    """Cells in columns, flush right; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths))
                     for row in rows)


def layer_table(dense: nn.Module, small: nn.Module) -> str:
    """What remains of every layer: heads, FFN dimensions, weights of the linear layers."""
    def bar(part: int, whole: int) -> str:
        return ("#" * round(12 * part / max(1, whole))).ljust(12, ".")
    rows = [("layer", "heads", "", "FFN dimensions", "", "linear weights", "left")]
    for i, (a, b) in enumerate(zip(dense.layers, small.layers)):
        heads = b.attention.heads, a.attention.heads
        dimensions = b.ffn.first.out_features, a.ffn.first.out_features
        left = linear_weights(b), linear_weights(b) / max(1, linear_weights(a))
        rows.append((str(i), "{} of {}".format(*heads), bar(*heads), "{} of {}".format(*dimensions),
                     bar(*dimensions), f"{left[0]:,}", f"{left[1]:.1%}"))
    return table(*rows)


def summarise(rows: dict, model: nn.Module, small: nn.Module,
              difference: float, speed: float) -> dict:
    """What summary.json says: `rows` are the models' EM and F1, `model` is the pruned one."""
    total = max(1, linear_weights(model.layers))
    return {**rows, "density": nonzero_weights(model.layers) / total,
            "compact_density": linear_weights(small.layers) / total,
            "heads_kept": sum(small.config.heads_per_layer),
            "heads_total": sum(model.config.heads_per_layer), "heads_mean": mean_heads(small),
            "ffn_kept": sum(small.config.ffn_per_layer),
            "ffn_total": sum(model.config.ffn_per_layer),
            "parameters_dense": sum(p.numel() for p in model.parameters()),
            "parameters_compact": sum(p.numel() for p in small.parameters()),
            "largest_logit_difference": difference, "speedup": speed}


def closing_table(s: dict) -> str:
    """One row a model. The pruned model has the dense one's shapes, and therefore its speed."""
    before = s["parameters_dense"], s["heads_total"], 1.0
    after = s["parameters_compact"], s["heads_kept"], s["speedup"]
    return table(("model", "EM", "F1", "density", "parameters", "heads", "speed"), *(
        (name, f"{s[name]['exact_match']:.2f}", f"{s[name]['f1']:.2f}", f"{density:.3f}",
         f"{size:,}", f"{heads} of {s['heads_total']}", f"{speed:.2f}x")
        for name, density, (size, heads, speed) in (
            ("dense", 1.0, before), ("pruned", s["density"], before),
            ("compact", s["compact_density"], after))))


def main(argv: list[str] | None = None):
    import train  # here, since only the command line needs the rest of the project
    from data import squad
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = train.fail
    add = parser.add_argument
    add("model", help="folder of a saved model")
    add("target", nargs="?", help="folder for the compact model")
    add("--dev", metavar="FILE", help="SQuAD's JSON to compare on (default: the generated corpus)")
    add("--compare", metavar="FOLDER", help="compare with a smaller saved model: size and speed")
    add("--ask", metavar="QUESTION", help="answer a question from the text in --context")
    add("--context", metavar="FILE", help="a text file")
    args = parser.parse_args(argv)
    try:
        if sum(map(bool, (args.target, args.compare, args.ask))) != 1 or \
                bool(args.ask) != bool(args.context):
            raise ValueError("give one of: a folder for the compact model, --compare FOLDER, "
                             "--ask QUESTION with --context FILE")
        if args.target and Path(args.target).resolve() == Path(args.model).resolve():
            raise ValueError(f"{args.target}: is the model itself; name another folder")
        model, tokenizer = train.open_model(args.model)
        length = min(384, model.config.max_position_embeddings)
        if args.ask:
            text = Path(args.context).read_text(encoding="utf-8-sig", errors="surrogateescape")
            qas = [{"id": "--ask", "question": args.ask, "answers": []}]
            questions = squad.questions_of([{"paragraphs": [{"context": text, "qas": qas}]}],
                                           args.context)
            print(squad.predict(model, tokenizer, questions, length, length // 3)["--ask"])
            return
        questions = train.questions_in(args.dev, "dev")[:256]
        windows = squad.make_windows(questions, tokenizer, length, length // 3)
        inputs = train.sample_inputs(windows, tokenizer.token_to_id("[PAD]"))
        if args.compare:
            small, _ = train.open_model(args.compare, length)
            shapes = [[p.shape for p in m.embeddings.parameters()] for m in (model, small)]
            if shapes[0] != shapes[1] or linear_weights(small) > linear_weights(model):
                raise ValueError(f"{args.compare}: no smaller version of {args.model}; swap them, "
                                 "or give two with the same embeddings")
        else:
            small = compact(model)
            print(f"largest difference in logits, {len(questions)} questions: "
                  f"{largest_difference(model, small, inputs):.1e}")
            small.save_pretrained(args.target, args.model)
            (Path(args.target) / "layers.svg").write_text(drawing(model))
    except KeyboardInterrupt:
        train.fail("stopped", 130)
    except (ValueError, OSError, ArithmeticError) as error:
        train.fail(error)
    if len(model.layers) == len(small.layers):
        print(f"\n{layer_table(model, small)}\n")
    s = summarise({}, model, small, math.nan, speedup(model, small, inputs[0]))
    print(f"linear weights of the encoder: {s['compact_density']:.1%} left\n"
          f"all parameters: {s['parameters_compact']:,} of {s['parameters_dense']:,}\n"
          f"heads: {s['heads_kept']} of {s['heads_total']}, {s['heads_mean']} only average\n"
          f"speed: {s['speedup']:.2f}x")


if __name__ == "__main__":
    main()
