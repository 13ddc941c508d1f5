"""Delete the heads, rows and columns that pruning emptied, and prove that the function is the same.

One idea: what does not depend on the input is a constant, and a constant can move into a bias.
An FFN dimension is computed by a row of the first matrix and read by a column of the second. Where
either is zero, what it adds to the output is a constant, and not always 0, because biases are never
masked. A dimension of a head is computed by a row of W_V and read by a column of W_O; queries and
keys only choose the weights with which the values are averaged over the tokens. These weights sum
to 1, so the average of a constant is this constant. A head can be deleted if each of its dimensions
adds only a constant, or nothing.

| what is zero                        | what follows                                               |
|-------------------------------------|------------------------------------------------------------|
| row d of the first FFN matrix       | Dimension d is activation(b_1[d]). That, times its column  |
|                                     | of the second matrix, moves to b_2.                        |
| column d of the second FFN matrix   | Dimension d adds nothing.                                  |
| row d of W_V, or column d of W_O,   | The head adds W_O[:, head] @ b_V[head], which moves to     |
| for each dimension d of a head      | b_O. (A column that is zero adds nothing to this.)         |
| a head's W_Q or W_K, but not W_V    | The head stays: it still averages its values.              |

    heads = compact_attention(query, key, value, output, head_size=64)     # of anybody's model
    dimensions = compact_ffn(first, second, activation)
    dimensions = compact_unread([gate, up], down)                          # of a gated FFN
    small = compact(pruned)                                                # of this project's

    python compact.py out/pruned out/small                 # delete, prove, measure
    python compact.py out/filled --expand out/bert         # back to the dense shapes, with zeros
    python compact.py out/dense --compare out/filled       # scores, size and speed of both
    python compact.py out/compact --ask "Who ...?" --context FILE

It is exact in eval mode only: attention dropout would break the sum to 1. The weights that are left
become new parameters, so training on needs a new optimizer.
Source: Lagunas et al., Block Pruning For Faster Transformers, 2021 (arXiv 2109.04838), section 3.

Shapes in comments: C hidden size, H heads, D head size, F FFN dimensions.
"""
import copy
from dataclasses import replace
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# ---------------------------------------------------------------------------------------- deletion


@torch.no_grad()
def compact_attention(query: nn.Linear, key: nn.Linear, value: nn.Linear, output: nn.Linear,
                      head_size: int) -> int:
    """Delete the heads of one layer that only add a constant, in place; returns how many are left.

    query, key, value: (C -> H D), output: (H D -> C), all with or without bias; head_size: D.
    Raises ValueError for a layer that still has its mask.
    """
    # Where the row of a dimension is zero, its value is its bias for every token, and so is the
    # average of these values. Where the column is zero, this constant is multiplied by the column,
    # and so adds nothing.
    keep = alive(value, output, head_size).repeat_interleave(head_size)                   # (H D,)
    delete(keep, [query, key, value], output, constants=value.bias)
    return output.in_features // head_size


@torch.no_grad()
def compact_ffn(first: nn.Linear, second: nn.Linear, activation) -> int:
    """Delete the FFN dimensions that only add a constant, in place; returns how many are left.

    first: (C -> F), second: (F -> C), both with or without bias; activation: tensor -> tensor.
    Raises ValueError for a layer that still has its mask.
    """
    # A dimension whose row is zero is activation(its bias), or activation(0) without a bias. Where
    # the column is zero, this constant is multiplied by the column, and so adds nothing.
    bias = first.weight.new_zeros(first.out_features) if first.bias is None else first.bias
    delete(alive(first, second), [first], second, constants=activation(bias.double()))
    return first.out_features


@torch.no_grad()
def compact_unread(writers: list, reader: nn.Linear) -> int:
    """Delete the units that nobody reads, in place, whatever computes them; returns what is left.

    writers: all layers that compute these units, each (C -> F); reader: (F -> C); with or without
    bias. In a gated FFN (Llama, Qwen, Mistral, Gemma) gate_proj and up_proj write and down_proj
    reads. down_proj has zero columns only if it was masked itself: name it in a BlockGroup's
    `columns`.
    Raises ValueError for a layer that still has its mask.
    """
    delete((reader.weight != 0).any(0), writers, reader)
    return reader.in_features


def alive(first, second, size=1):
    """Which units do more than add a constant: dimensions (F,), or heads (H,) of `size`.

    A dimension needs its row in the layer that writes it and its column in the one that reads it.
    """
    written = (first.weight != 0).any(1)
    read = (second.weight != 0).any(0)
    return (written & read).view(-1, size).any(1)


def delete(keep, writers, reader, constants=None):
    """Leave out the rows of `writers` and the columns of `reader` where `keep` (n,) is False.

    constants (n,): for each unit, what the reader gets from it if it is deleted; None: always 0.
    """
    if any(map(parametrize.is_parametrized, [*writers, reader])):
        raise ValueError("a layer still has a mask, or another parametrization; call bake(model), "
                         "or remove the other, first")
    if constants is not None:
        fold_into_bias(reader, ~keep, constants[~keep])
    for linear in writers:
        linear.weight = parameter_like(linear.weight, linear.weight[keep])
        if linear.bias is not None:
            linear.bias = parameter_like(linear.bias, linear.bias[keep])
        linear.out_features = len(linear.weight)
    reader.weight = parameter_like(reader.weight, reader.weight[:, keep])
    reader.in_features = reader.weight.shape[1]


def fold_into_bias(linear, columns, constants):
    """Add to the bias what these columns add when they read `constants`."""
    added = linear.weight[:, columns].double() @ constants.double()
    if not added.any():
        return
    if linear.bias is not None:
        added += linear.bias
    linear.bias = parameter_like(linear.weight, added.to(linear.weight.dtype))


def parameter_like(old, values):
    return nn.Parameter(values, requires_grad=old.requires_grad)


def compact(model: nn.Module) -> nn.Module:
    """A smaller copy with the function of `model`, a baked Bert of this project, in eval mode."""
    small = copy.deepcopy(model)
    for layer in small.layers:
        a, f = layer.attention, layer.ffn
        compact_attention(a.query, a.key, a.value, a.output, a.head_size)
        compact_ffn(f.first, f.second, f.activation)
    return small


@torch.no_grad()
def expand(small: nn.Module) -> nn.Module:
    """A copy in the dense shapes: in each layer, what is left comes first, then zeros."""
    with torch.device("meta"):                                      # only shapes: no memory
        dense = type(small)(replace(small.config, heads_per_layer=None, ffn_per_layer=None))
    state = dense.state_dict()
    for name, part in small.state_dict().items():
        state[name] = part.new_zeros(state[name].shape)
        corner = tuple(slice(size) for size in part.shape)
        state[name][corner] = part
    dense.load_state_dict(state, assign=True)
    return dense.eval()


# --------------------------------------------------------------------------- proof, size and speed


@torch.inference_mode()
def largest_difference(model: nn.Module, small: nn.Module, inputs: list) -> float:
    """Run both models on the same inputs; the largest difference in logits.

    Raises ArithmeticError if it is more than float32's rounding explains, for which we take 1e-4 *
    max(1, largest |logit|), or if logits are NaN or infinite. (Padding, with logits of -1e4, does
    not count as large.)
    """
    model.eval()
    small.eval()
    differences = []
    for batch in inputs:
        a = model(*batch)
        b = small(*batch)
        difference = (a - b).abs().max().item()                      # NaN if any logit is
        largest = a.where(a > -1e4, 0).abs().max().item()
        # Written with "not", because a comparison with NaN is False.
        if not difference <= 1e-4 * max(1.0, largest) < torch.inf:
            raise ArithmeticError(f"pruned and compact model differ by {difference:.2g} in logits "
                                  f"of up to {largest:.2g}: more than float32's rounding")
        differences.append(difference)
    return max(differences)


def speedup(model: nn.Module, small: nn.Module, batch: tuple) -> list:
    """How many times faster `small` is: median, lower and upper quartile of 15 ratios.

    Both run in turn on the same batch, so that a busy machine slows both, and shows as spread.
    """
    ratios = [seconds(model, batch) / seconds(small, batch) for _ in range(15)]
    return np.percentile(ratios, (50, 25, 75)).tolist()


@torch.inference_mode()
def seconds(model, batch):
    """How long one call takes of any module that gives a tensor."""
    model.eval()
    # When a large block of memory is freed, the C library gives it back to the system, and it takes
    # time to get a new one in the next call. But once a block of 32 MB (eight million floats) was
    # freed, it keeps all blocks that are no larger.
    torch.empty(8_000_000)
    for _ in range(2):                               # the first call warms up
        begin = perf_counter()
        model(*batch).sum().item()                   # .item() waits for a GPU
    return perf_counter() - begin


def survivors(model):
    """How many heads, and how many FFN dimensions, deletion would leave of every layer: two lists.

    It works on a masked model, as --speedup needs it, because the weights of its layers are
    W' = W * expand(M).
    """
    heads, dimensions = [], []
    for layer in model.layers:
        a, f = layer.attention, layer.ffn
        heads.append(int(alive(a.value, a.output, a.head_size).sum()))
        dimensions.append(int(alive(f.first, f.second).sum()))
    return heads, dimensions


def linear_weights(layers, count=Tensor.numel):
    """How many weights linear layers hold; with Tensor.count_nonzero, how many are not 0."""
    return int(sum(count(weight) for weight in layers.parameters() if weight.ndim == 2))


def sizes(model, small):
    """The size of a pruned model and of its compact copy, as a run's summary.json has it."""
    before, after = model.config, small.config
    total = linear_weights(model.layers)
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


# -------------------------------------------------------------------------------- the command line


def main(argv=None):
    """The command line. Raises ValueError, ArithmeticError or OSError."""
    import data  # here, because all of the above works without it
    from data import options
    args = options.parse_compact(argv, __doc__.splitlines()[0])
    if args.expand:
        task = data.task_of(args.model)
        dense = expand(task.MODEL.from_pretrained(args.model))
        data.save_model(dense, args.expand, args.model)
        print(f"{args.expand}: a {dense.ARCHITECTURE} in dense shapes, for transformers to open")
    elif args.ask:
        model, tokenizer, task = data.open_model(args.model)
        example = task.example(args.ask, args.context)
        print(task.predict(model, tokenizer, [example])[example.id])
    else:
        delete_or_compare(args)


def delete_or_compare(args):
    """Print the scores, size and speed of two models; the second is made, or given by --compare."""
    import data
    from data import pictures
    model, tokenizer, task = data.open_model(args.model)
    examples = data.read_examples(task, args.dev, "dev", args.columns)
    # Without --dev the generated corpus serves to measure times only. A classifier that has learnt
    # other labels would refuse those of the corpus; with labels=None it takes any.
    config = model.config if args.dev else replace(model.config, labels=None)
    inputs = data.sample_inputs(task.make_windows(examples, tokenizer, config))
    if args.compare:
        small = open_comparable(args.compare, model, tokenizer)
    else:
        small = compact(model)
        print(f"largest difference in logits: {largest_difference(model, small, inputs):.1e}\n")
        data.save_model(small, args.target, args.model)
    rows = [("model", task.HEADLINE, "parameters", "heads", "FFN dim.", "ms", "speed", "quartiles")]
    for name, other in ((args.model, model), (args.compare or args.target, small)):
        score = "-"
        if args.dev:
            scores = task.score(task.predict(other, tokenizer, examples), examples)
            score = f"{scores[task.HEADLINE]:.2f}"
        rows.append((name, score, *measurements(model, other, inputs[0])))
    print(pictures.table(rows))


def open_comparable(folder, model, tokenizer):
    """Another model, which will read the same windows. Raises ValueError."""
    import data
    other, other_tokenizer, _ = data.open_model(folder, flags=model.config.reading)
    if type(other) is not type(model) or other_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{folder}: is a {other.ARCHITECTURE}, the other a {model.ARCHITECTURE}, "
                         "or their tokens differ; compare models of one task and one origin")
    return other


def measurements(model, other, batch):
    """A row of the table: size and time of `other`, and its speed over `model`."""
    config = other.config
    milliseconds = 1000 * seconds(other, batch)
    median, low, high = [1.0] * 3 if other is model else speedup(model, other, batch)
    return (f"{sum(map(Tensor.numel, other.parameters())):,}", sum(config.heads_per_layer),
            sum(config.ffn_per_layer), f"{milliseconds:.1f}", f"{median:.2f}x",
            f"{low:.2f} to {high:.2f}")


if __name__ == "__main__":
    from data.run import one_line_errors
    with one_line_errors():
        main()
