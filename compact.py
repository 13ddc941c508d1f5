"""Delete the heads, rows and columns that pruning emptied, and prove that the model's answers stay the same.

One idea: what is zero can be left out, and what is left out may not change the function. A head or an FFN
dimension whose weights are zero still adds a constant, because biases are never masked; the constant moves
into the next bias.

| what is zero                                           | what follows                                      |
|--------------------------------------------------------|---------------------------------------------------|
| for every dimension d of a head: row d of V or         | attention weights sum to 1, so the head adds      |
| column d of its part of the output matrix              | W_O[:, head] @ b_V[head]: fold it, delete the head|
| row d of the first FFN matrix                          | the unit is activation(b1[d]): fold it, delete it |
| column d of the second FFN matrix                      | delete the unit                                   |
| a head's Q or K alone                                  | the head is a mean over the tokens: it stays      |

    small = compact(masked)                          # a model of this project
    q, k, v, o = compact_attention(q, k, v, o, head_size=64)           # or any layer's (weight, bias) pairs
    python compact.py out/masked out/compact         # delete, prove, measure
    python compact.py out/compact --ask "Who ...?" --context FILE

Exact in eval mode only: attention dropout would break the sum to 1.
Source: Lagunas et al., Block Pruning For Faster Transformers, 2021 (arXiv 2109.04838), section 3.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]                         # one linear layer's weight (out, in) and bias (out,)


def compact_attention(query: Pair, key: Pair, value: Pair, output: Pair, head_size: int) -> tuple[Pair, ...]:
    """Delete the heads of one layer that can only add a constant. Returns the four smaller pairs.

    query, key, value: (H D, C) and (H D,); output: (C, H D) and (C,); head_size D.
    """
    (W_V, b_V), (W_O, b_O) = value, output
    alive = (W_V != 0).any(1) & (W_O != 0).any(0)                             # (H D,) dimension carries a signal
    heads = alive.view(-1, head_size).any(1)                                  # (H,)
    keep = heads.repeat_interleave(head_size)                                 # (H D,)
    b_O = b_O.double() + W_O[:, ~keep].double() @ b_V[~keep].double()         # the constants of the deleted heads
    q, k, v = ((weight[keep], bias[keep]) for weight, bias in (query, key, value))
    return q, k, v, (W_O[:, keep], b_O.to(W_O.dtype))


def compact_ffn(first: Pair, second: Pair, activation: Callable[[Tensor], Tensor]) -> tuple[Pair, Pair]:
    """Delete the FFN dimensions of one layer that can only add a constant. Returns the two smaller pairs.

    first: (F, C) and (F,); second: (C, F) and (C,).
    """
    (W_1, b_1), (W_2, b_2) = first, second
    keep = (W_1 != 0).any(1) & (W_2 != 0).any(0)                              # (F,)
    b_2 = b_2.double() + W_2[:, ~keep].double() @ activation(b_1[~keep].double())
    return (W_1[keep], b_1[keep]), (W_2[:, keep], b_2.to(W_2.dtype))


@torch.no_grad()
def compact(model: nn.Module) -> nn.Module:
    """A new, smaller model.BertForQuestionAnswering with the same function as the baked `model` in eval mode."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    heads_per_layer, ffn_per_layer = [], []
    for i, layer in enumerate(model.layers):
        attention = [f"layers.{i}.attention.{name}" for name in ("query", "key", "value", "output")]
        ffn = [f"layers.{i}.ffn.{name}" for name in ("first", "second")]
        pairs = [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in attention + ffn]
        pairs = (*compact_attention(*pairs[:4], layer.attention.head_size),
                 *compact_ffn(*pairs[4:], layer.ffn.activation))
        for name, (weight, bias) in zip(attention + ffn, pairs):
            state[f"{name}.weight"], state[f"{name}.bias"] = weight, bias
        heads_per_layer.append(len(pairs[2][1]) // layer.attention.head_size)
        ffn_per_layer.append(len(pairs[4][1]))
    with torch.device("meta"):
        small = type(model)(replace(model.config, heads_per_layer=heads_per_layer, ffn_per_layer=ffn_per_layer))
    small.load_state_dict(state, assign=True)
    return small.train(model.training)


@torch.inference_mode()
def largest_difference(masked: nn.Module, small: nn.Module, inputs: Iterable[tuple[Tensor, ...]]) -> float:
    """Run both models on the same inputs; the largest difference in logits.

    Raises ArithmeticError if it is more than float32's rounding: 1e-4 * max(1, largest |logit|).
    """
    masked.eval(), small.eval()
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    difference = largest = 0.0
    for batch in inputs:
        for a, b in zip(masked(*batch), small(*batch)):
            difference = max(difference, (a - b).abs().max().item())
            largest = max(largest, a.abs().max().item())
    torch.backends.cuda.matmul.allow_tf32 = tf32
    if not difference <= 1e-4 * max(1.0, largest):
        raise ArithmeticError(f"the compact model's logits differ by {difference:.2g} where the largest is "
                              f"{largest:.2g}: more than float32's rounding; is the model baked?")
    return difference


@torch.inference_mode()
def speedup(dense: nn.Module, small: nn.Module, batch: tuple[Tensor, ...], rounds: int = 15) -> float:
    """How many times faster `small` is: both in turn on the same batch, ratio of the median times."""
    def seconds(model):
        begin = perf_counter()
        model(*batch)[0].sum().item()                                         # .item() waits for the GPU
        return perf_counter() - begin
    dense.eval(), small.eval()
    times = [(seconds(dense), seconds(small)) for _ in range(rounds + 2)][2:]
    return median(a for a, _ in times) / median(b for _, b in times)


def linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def layer_table(dense: nn.Module, small: nn.Module) -> str:
    """What remains of every layer: heads, FFN dimensions, weights of the linear layers."""
    lines = ["layer    heads      FFN dimensions   linear weights     left"]
    for i, (a, b) in enumerate(zip(dense.layers, small.layers)):
        before, after = linear_weights(a), linear_weights(b)
        lines.append(f"{i:5}  {b.attention.heads:3} of {a.attention.heads:3}"
                     f"  {b.ffn.first.out_features:8} of {a.ffn.first.out_features:4}"
                     f"  {after:15,}  {after / before:6.1%}")
    return "\n".join(lines)
