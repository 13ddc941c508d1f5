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
| a head's Q or K alone                  | it is a mean of V, the same for every query: stays  |

    heads = compact_attention(query, key, value, output, head_size=64)     # of anybody's model
    dimensions = compact_ffn(first, second, activation)
    small = compact(pruned)                                                # of this project's
    python compact.py out/pruned out/small                                 # delete, prove, measure
    python compact.py out/pruned out/small --bfloat16                      # weights of 16 bits
    python compact.py out/filled --expand out/bert         # back in the dense shapes, with zeros
    python compact.py out/dense --compare out/filled       # size and speed of a smaller one
    python compact.py out/compact --ask "Who ...?" --context FILE

It is exact in eval mode only: attention dropout would break the sum to 1.
Source: Lagunas et al., Block Pruning For Faster Transformers, 2021 (arXiv 2109.04838), section 3.

Shapes in comments: C hidden size, H heads, D head size, F FFN dimensions.
"""
import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


@torch.no_grad()
def compact_attention(query: nn.Linear, key: nn.Linear, value: nn.Linear, output: nn.Linear,
                      head_size: int) -> int:
    """Delete the heads of one layer that only add a constant, in place; how many are left.

    query, key, value: (C -> H D), output: (H D -> C), all with or without bias; head_size: D.
    """
    check_plain(query, key, value, output)
    keep = alive(value, output, head_size).repeat_interleave(head_size)                   # (H D,)
    if value.bias is not None:
        fold(output, ~keep, value.bias[~keep])
    for linear in (query, key, value):
        keep_rows(linear, keep)
    keep_columns(output, keep)
    return output.in_features // head_size


@torch.no_grad()
def compact_ffn(first: nn.Linear, second: nn.Linear, activation) -> int:
    """Delete the FFN dimensions that only add a constant, in place; how many are left.

    first: (C -> F), second: (F -> C), both with or without bias; activation: tensor -> tensor.
    """
    check_plain(first, second)
    keep = alive(first, second)                                                           # (F,)
    bias = first.weight.new_zeros(len(keep)) if first.bias is None else first.bias
    fold(second, ~keep, activation(bias[~keep].double()))
    keep_rows(first, keep)
    keep_columns(second, keep)
    return first.out_features


def check_plain(*linears):
    if any(map(parametrize.is_parametrized, linears)):
        raise ValueError("a layer still has its mask; call bake(model) first")


def alive(first, second, size=1):
    """What does more than add a constant: dimensions (F,) between layers, or heads (H,) of `size`.

    A dimension needs its row in the layer that writes it and its column in the one that reads it.
    """
    written = (first.weight != 0).any(1)
    read = (second.weight != 0).any(0)
    return (written & read).view(-1, size).any(1)


def fold(linear, columns, constants):
    """Move what inputs that are `constants` add, W[:, columns] @ constants, into the bias."""
    constant = linear.weight[:, columns].double() @ constants.double()
    if not constant.any():
        return
    if linear.bias is not None:
        constant += linear.bias
    linear.bias = nn.Parameter(constant.to(linear.weight.dtype), linear.weight.requires_grad)


def keep_rows(linear, keep):
    linear.weight = nn.Parameter(linear.weight[keep], linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[keep], linear.bias.requires_grad)
    linear.out_features = len(linear.weight)


def keep_columns(linear, keep):
    linear.weight = nn.Parameter(linear.weight[:, keep], linear.weight.requires_grad)
    linear.in_features = linear.weight.shape[1]


def compact(model: nn.Module) -> nn.Module:
    """A smaller copy with the function of `model`, a baked Bert of this project, in eval mode."""
    small = copy.deepcopy(model)
    for layer in small.layers:
        a, f = layer.attention, layer.ffn
        a.heads = compact_attention(a.query, a.key, a.value, a.output, a.head_size)
        compact_ffn(f.first, f.second, f.activation)
    small.config = actual_config(small)
    return small


def actual_config(model):
    """The model's configuration, with the number and the sizes of the layers that it has now."""
    heads = [layer.attention.heads for layer in model.layers]
    dimensions = [layer.ffn.first.out_features for layer in model.layers]
    return replace(model.config, num_hidden_layers=len(heads), heads_per_layer=heads,
                   ffn_per_layer=dimensions)


@torch.no_grad()
def expand(small: nn.Module) -> nn.Module:
    """A copy in the dense shapes: what was deleted is zeros, behind what is left of each layer."""
    with torch.device("meta"):                                      # shapes only, no memory
        dense = type(small)(replace(small.config, heads_per_layer=None, ffn_per_layer=None))
    state = dense.state_dict()
    for name, part in small.state_dict().items():
        state[name] = part.new_zeros(state[name].shape)
        state[name][tuple(map(slice, part.shape))] = part
    dense.load_state_dict(state, assign=True)
    return dense.eval()


# ---------------------------------------------------------------------------------- proof and price


@torch.inference_mode()
def largest_difference(model: nn.Module, small: nn.Module, inputs: list) -> float:
    """Run both models on the same inputs; the largest difference in logits.

    Raises ArithmeticError above float32's rounding: 1e-4 * max(1, largest |logit|), where padding,
    whose logits are -1e4, does not count as large.
    """
    model.eval()
    small.eval()
    difference = largest = torch.zeros(())
    for batch in inputs:
        a, b = model(*batch), small(*batch)
        difference = torch.maximum(difference, (a - b).abs().max())         # NaN if any is
        largest = torch.maximum(largest, a.where(a > -1e4, 0).abs().max())
    if not difference <= 1e-4 * max(1.0, largest.item()) < torch.inf:
        raise ArithmeticError(f"pruned and compact model differ by {difference:.2g} in logits of "
                              f"up to {largest:.2g}: more than float32's rounding")
    return difference.item()


@torch.inference_mode()
def speedup(model: nn.Module, small: nn.Module, batch: tuple) -> list:
    """How many times faster `small` is: median, lower and upper quartile of 15 ratios.

    Both run in turn on the same batch, so that a busy machine slows both, and shows as spread.
    """
    ratios = [seconds(model, batch) / seconds(small, batch) for _ in range(15)]
    return np.percentile(ratios, (50, 25, 75)).tolist()


def speedup_anew(batch, *folders):
    """`speedup` of two saved models, in a new process: after a long training this one is slow."""
    folders = [str(folder.resolve()) for folder in folders]
    code = f"import compact; print(compact.speedup_of({torch.stack(batch).tolist()}, {folders!a}))"
    here = Path(__file__).parent
    return json.loads(subprocess.check_output([sys.executable], input=code, text=True, cwd=here))


def speedup_of(batch, folders):
    """What the new process runs; batch: token ids, mask and types, (3, B, T)."""
    import data
    return speedup(*(data.open_model(folder)[0] for folder in folders), torch.as_tensor(batch))


@torch.inference_mode()
def price_list(model, batch):
    """What deletion buys on this machine: milliseconds for this batch, medians of calls in turn.

    "heads": [[0, ..., H], of an attention with so many]; "ffn": [[0, ..., F], of an FFN with so
    many dimensions]; "rest": of a model without both. Noise is flattened: more never costs less.
    """
    config, kind = model.config, type(model.layers[0])
    ids, mask, types = batch
    heads = [*range(config.num_attention_heads + 1)]
    # Odd widths, as most are that pruning leaves: they take longer than multiples of 16.
    widths = [config.intermediate_size * i * i // 64 | bool(i % 8) for i in range(9)]
    none = [0] * len(model.layers)
    with torch.device(ids.device):
        layers = [kind(config, n, 0) for n in heads] + [kind(config, 0, n) for n in widths]
        empty = type(model)(replace(config, heads_per_layer=none, ffn_per_layer=none))
    inputs = model.embeddings(ids, types), model.mask(mask, types)
    calls = [(empty, batch)] + [(layer, inputs) for layer in layers]
    times = [[seconds(*call) for call in calls] for _ in range(15)]
    rest, *times = (1000 * np.median(times, 0)).tolist()
    attention, ffn = ((np.maximum.accumulate(part) - part[0]).tolist()
                      for part in np.split(times, [len(heads)]))
    return {"heads": [heads, attention], "ffn": [widths, ffn], "rest": rest}


def price(prices, layers, least=1):
    """rest + the sum over the layers of heads[h] + ffn[f], in milliseconds; linear in between.

    h, f count what is >= least. 1: what is True; a rank (`keep_most` in prune.py): what is ranked
    so or better; 0: everything.
    """
    total = prices["rest"]
    for layer in layers:
        for part, units in layer.items():
            total += np.interp((units >= least).sum(), *prices[part])
    return float(total)


def seconds(model, batch):
    model.eval()
    torch.empty(8_000_000)                     # 32 MB, freed at once: glibc then keeps freed memory
    for _ in range(2):                               # the first warms up
        begin = perf_counter()
        model(*batch).sum().item()                   # .item() waits for a GPU
    return perf_counter() - begin


def linear_weights(layers, count=Tensor.numel):
    """How many weights linear layers hold; with Tensor.count_nonzero, how many are not 0."""
    return int(sum(count(weight) for weight in layers.parameters() if weight.ndim == 2))


def survivors(model, left=alive):
    """Which heads (H,) and FFN dimensions (F,) of every layer deletion would leave.

    left: `alive` looks at the weights; prune.py's `unmasked` at the masks.
    """
    layers = []
    for layer in model.layers:
        a, f = layer.attention, layer.ffn
        layers.append({
            "heads": left(a.value, a.output, a.head_size).cpu(),
            "ffn": left(f.first, f.second).cpu()
        })
    return layers


def sizes(model, small):
    """What summary.json says about the size of a model and of its compact copy."""
    before, after = model.config, small.config
    total = max(1, linear_weights(model.layers))
    return {
        "density": linear_weights(model.layers, Tensor.count_nonzero) / total,
        "compact_density": linear_weights(small.layers) / total,
        "heads_kept": sum(after.heads_per_layer),
        "heads_total": sum(before.heads_per_layer),
        "ffn_kept": sum(after.ffn_per_layer),
        "ffn_total": sum(before.ffn_per_layer),
        "parameters_dense": sum(map(Tensor.numel, model.parameters())),
        "parameters_compact": sum(map(Tensor.numel, small.parameters())),
    }


# --------------------------------------------------------------------------------- the command line


def parse_args(parser, argv):
    add = parser.add_argument
    add("model", help="folder of a saved model")
    one = parser.add_mutually_exclusive_group(required=True).add_argument
    one("target", nargs="?", help="folder to write the compact model to")
    one("--expand", metavar="FOLDER", help="write it in the dense shapes, to there")
    one("--compare", metavar="FOLDER", help="size and speed of a smaller model")
    one("--ask", metavar="TEXT", help="a question; a classifier's text; an answer")
    add("--context", metavar="FILE", help="a text file")
    add("--dev", metavar="FILE", help="data to compare on (default: a corpus)")
    add("--columns", help="of a table, as train.py's")
    add("--bfloat16", action="store_true", help="of half the size; fast with avx512_bf16 or a GPU")
    return parser.parse_args(argv)


def main(argv=None):
    import data  # only here: this file works alone
    from data import pictures
    parser = data.Parser(description=__doc__.splitlines()[0])
    with data.one_line_errors():
        args = parse_args(parser, argv)
        model, tokenizer, task = data.open_model(args.model)
        length = min(384, model.config.max_position_embeddings)
        settings = data.text.Settings(length, length // 3)
        if args.bfloat16 and (args.ask or args.expand):
            model.bfloat16()
        if args.ask:
            example = task.example(args.ask, args.context)
            print(task.predict(model, tokenizer, [example], settings)["--ask"])
            return
        if args.expand:
            data.save_model(expand(model), args.expand, args.model)
            return
        examples = data.read_examples(task, args.dev, "dev", args.columns)
        inputs = data.sample_inputs(task.make_windows(examples, tokenizer, settings), tokenizer)
        if args.compare:
            small, other, _ = data.open_model(args.compare, task, length)
            if other.get_vocab() != tokenizer.get_vocab():
                raise ValueError(f"{args.compare}: has other tokens; compare models of one origin")
        else:
            small = compact(model)
            print(f"largest difference in logits: {largest_difference(model, small, inputs):.1e}")
            print(pictures.layer_table(survivors(model)))
        print(pictures.size_list(sizes(model, small)))
        print(pictures.speed_line(*speedup(model, small, inputs[0])))
        if args.bfloat16:
            settings.labels = model.config.labels
            for dtype in (torch.float32, torch.bfloat16):
                small.to(dtype)
                if args.dev:
                    predictions = task.predict(small, tokenizer, examples, settings)
                    print(f"{dtype}: {task.score(predictions, examples)}")
            print("in bfloat16,", pictures.speed_line(*speedup(model, small, inputs[0])))
        if args.target:
            data.save_model(small, args.target, args.model)


if __name__ == "__main__":
    main()
