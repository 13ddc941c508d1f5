"""Block movement pruning for any nn.Linear: learn, block by block, which weights can go.

One idea: the weight a layer uses is computed from the weight it stores, W' = W * expand(M), where
the mask M has one entry per block. M is 0 or 1, so it has no slope; the straight-through estimator
takes its slope with respect to the block's score S as 1. A score then rises when gradient descent
moves its block away from zero and falls when it moves it towards zero. The best scores stay.

    group = BlockGroup(model, "32x32", rows=["*.query", "*.key", "*.value"], columns=["*.output"])
    group.advance(step, start=100, end=600, density=0.25)      # at every training step
    bake(model)                       # plain nn.Linear layers again, with exact zeros

| method        | kept                                  | what decides about the size          |
|---------------|---------------------------------------|--------------------------------------|
| movement      | the best fraction v by score          | v, to the block: `keep(v)`           |
| magnitude     | the best fraction v by mean |W|       | v, to the block: `keep(v)`           |
| soft-movement | every block with sigmoid(S) > tau     | lambda * mean(sigmoid(S)) in the     |
|               |                                       | loss: `keep_above(tau)`, `penalty()` |

Sources: Lagunas et al., Block Pruning For Faster Transformers, 2021 (arXiv 2109.04838), section 3;
Sanh et al., Movement Pruning, 2020 (arXiv 2005.07683), sections 3 and 4 (all three methods).

Shapes in comments: a matrix is (out, in); its blocks are r x c; its scores are (R, C), where
R = ceil(out / r) and C = ceil(in / c), so blocks at the edges may be smaller.
"""
from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

METHODS = ("movement", "soft-movement", "magnitude")
TAU = 0.1                                       # soft movement pruning's final threshold


class BlockMask(nn.Module):
    """W' = W * expand(M): a parametrization of a weight (out, in) by scores (R, C).

    dL/dW    = dL/dW' * expand(M)
    dL/dS_ij = sum over block ij of dL/dW' * W
    """

    def __init__(self, scores: nn.Parameter, block: tuple[int, int], transposed: bool = False):
        """`transposed`: the weight is (in, out) and its blocks c x r, scored by the same (R, C)."""
        super().__init__()
        self.scores, self.block, self.transposed = scores, block, transposed
        self.register_buffer("kept", torch.ones_like(scores))                   # (R, C), 0 or 1

    def forward(self, weight: Tensor) -> Tensor:
        mask = self.kept + (self.scores - self.scores.detach())  # value of kept, gradient of scores
        r, c = self.block
        if self.transposed:
            mask, r, c = mask.T, c, r
        (R, C), (rows, columns) = mask.shape, weight.shape
        if (rows, columns) != (R * r, C * c):                     # blocks at the edges are smaller
            weight = F.pad(weight, (0, C * c - columns, 0, R * r - rows))       # (R r, C c)
        product = weight.view(R, r, C, c) * mask.reshape(R, 1, C, 1)          # expand(M), as a view
        return product.view(R * r, C * c)[:rows, :columns]

    def magnitude(self, weight: Tensor) -> Tensor:
        """Mean |W| of every block (R, C)."""
        size = self.block[::-1] if self.transposed else self.block
        means = F.avg_pool2d(weight.abs()[None], size, ceil_mode=True)[0]
        return means.T if self.transposed else means


class BlockGroup:
    """Linear layers whose blocks are ranked together; masks are attached to `model` at once."""

    def __init__(self, model: nn.Module, block: str, rows: list[str], columns: list[str] = (),
                 unit: int = 1, method: str = "movement"):
        """Mask the nn.Linear layers whose names match. Raises ValueError.

        block    "32x32", "1xall", ...: r outputs by c inputs, `all` for a whole dimension
        rows     name patterns of matrices with r x c blocks (a layer's query, key, value)
        columns  name patterns of matrices that read what those write: c x r blocks (its output)
        unit     rows that belong together (a head's size). Where the block is r x all and r a
                 multiple of `unit`, the n-th match of every pattern shares its scores, so that
                 the same rows and columns go; its gradient is the sum over all of them.
        method   one of METHODS; magnitude's scores are not learned
        """
        if method not in METHODS or isinstance(rows, str) or isinstance(columns, str):
            raise ValueError(f"give a list of names and one of {METHODS}, not {rows!r}, {method!r}")
        self.method = method
        linears = {name: module for name, module in model.named_modules()
                   if isinstance(module, nn.Linear) and module.weight.numel()}
        found = [[linears[name] for name in linears if fnmatch(name, pattern)]
                 for pattern in (*rows, *columns)]
        if not all(found):
            raise ValueError(f"no nn.Linear is named like {[*rows, *columns][found.index([])]!r}")
        r, c = parse_block(block)
        tie = c is None and r is not None and r % unit == 0
        if tie and len({len(matches) for matches in found}) > 1:
            raise ValueError(f"{block} ties matrices together, but the patterns match "
                             f"{', '.join(str(len(matches)) for matches in found)} layers")
        members = [[(linear, position >= len(rows)) for linear in matches]
                   for position, matches in enumerate(found)]
        self.masks: list[list[BlockMask]] = []          # one inner list for every scores parameter
        self.linears: list[list[nn.Linear]] = []                            # whose weights they are
        for tied in zip(*members) if tie else ([member] for part in members for member in part):
            masks: list[BlockMask] = []
            for linear, transposed in tied:
                out, in_ = linear.weight.shape if not transposed else linear.weight.T.shape
                size = (min(r or out, out), min(c or in_, in_))
                shape = (-(-out // size[0]), -(-in_ // size[1]))
                if parametrize.is_parametrized(linear, "weight"):
                    raise ValueError(f"{block}: a layer is masked twice; let one pattern match it")
                if not masks:
                    scores = nn.Parameter(linear.weight.new_zeros(shape), method != "magnitude")
                elif scores.shape != shape:
                    raise ValueError(f"{block} ties matrices together whose sizes differ")
                masks.append(BlockMask(scores, size, transposed))
                # unsafe: without a check that would compute, and hold, every weight once
                parametrize.register_parametrization(linear, "weight", masks[-1], unsafe=True)
            self.masks.append(masks)
            self.linears.append([linear for linear, _ in tied])

    @property
    def scores(self) -> list[nn.Parameter]:
        return [tied[0].scores for tied in self.masks]

    @torch.no_grad()
    def keep(self, density: float):
        """Keep the best `density` of all blocks: exactly round(density * blocks), ties by index."""
        if self.method == "magnitude":
            for tied, linears in zip(self.masks, self.linears):
                sizes = [mask.magnitude(linear.parametrizations.weight.original)
                         for mask, linear in zip(tied, linears)]
                tied[0].scores.copy_(sum(sizes) / len(sizes))
        scores = torch.cat([scores.flatten() for scores in self.scores])
        kept = best(scores, round(density * scores.numel())).split([s.numel() for s in self.scores])
        for tied, part in zip(self.masks, kept):
            for mask in tied:
                mask.kept.copy_(part.view_as(mask.scores))

    @torch.no_grad()
    def keep_above(self, tau: float):
        """Keep the blocks with sigmoid(S) > tau."""
        for tied in self.masks:
            for mask in tied:
                mask.kept.copy_(mask.scores.sigmoid() > tau)

    def penalty(self) -> Tensor:
        """mean(sigmoid(S)) over the blocks of every matrix, then over the matrices."""
        return torch.stack([scores.sigmoid().mean() for scores in self.scores]).mean()

    def advance(self, step: int, start: int, end: int, density: float = 1.0,
                lambda_: float = 0.0) -> Tensor | float:
        """Set the masks of this step, on the way from all blocks at `start` to the last at `end`.

        density  what movement and magnitude pruning end with
        lambda_  the final weight of soft movement's penalty
        Returns what is to be added to the loss: lambda(t) * penalty, or 0.
        """
        if self.method != "soft-movement":
            self.keep(cubic(step, start, end, 1.0, density))
            return 0.0
        self.keep_above(cubic(step, start, end, 0.0, TAU))
        return cubic(step, start, end, 0.0, lambda_) * self.penalty()

    @property
    def density(self) -> float:
        """The fraction of blocks kept."""
        kept = [tied[0].kept for tied in self.masks]
        return int(sum(k.count_nonzero() for k in kept)) / sum(k.numel() for k in kept)


def best(scores: Tensor, k: int) -> Tensor:
    """True for the k greatest scores (n,), the first ones where they tie."""
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(scores.numel() - k + 1).values
    kept = scores > threshold
    kept[(scores == threshold).nonzero().flatten()[:k - int(kept.sum())]] = True
    return kept


def cubic(step: int, start: int, end: int, first: float, last: float) -> float:
    """v(t) = v_end + (v_0 - v_end) * (1 - (t - t0) / (t1 - t0))^3, t0 = start, t1 = end.

    The density falls so from 1 to its target; tau and lambda rise so from 0.
    """
    if step < start:
        return first
    if step >= end:
        return last
    return last + (first - last) * (1 - (step - start) / (end - start)) ** 3


def parameter_groups(model: nn.Module, lr: float, score_lr: float) -> list[dict]:
    """For AdamW: matrices; biases and norms, without weight decay; scores, at their own rate."""
    named = dict(model.named_parameters())
    scores = [named.pop(name) for name in [*named] if name.endswith(".scores")]
    return [{"params": [p for p in named.values() if p.ndim > 1], "lr": lr, "weight_decay": 0.01},
            {"params": [p for p in named.values() if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
            {"params": scores, "lr": score_lr, "weight_decay": 0.0}]


def overall_density(groups: Collection[BlockGroup]) -> float:
    """The fraction of weights kept (of blocks, where those at the edges are smaller)."""
    weights = [sum(linear.in_features * linear.out_features
                   for tied in group.linears for linear in tied) for group in groups]
    kept = sum(group.density * count for group, count in zip(groups, weights))
    return kept / sum(weights) if weights else 1.0


def bake(model: nn.Module):
    """Make the masks permanent: plain nn.Linear layers with zeros in place, scores gone."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight") and \
                isinstance(module.parametrizations.weight[0], BlockMask):
            parametrize.remove_parametrizations(module, "weight")


def densities(model: nn.Module, pattern: str = "*") -> dict[str, tuple[int, int]]:
    """Weights that are not zero, and all weights, of every nn.Linear whose name matches."""
    return {name: (int(module.weight.count_nonzero()), module.weight.numel())
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and fnmatch(name, pattern)}


def parse_block(text: str) -> tuple[int | None, int | None]:
    """"32x16" -> (32, 16); "1xall" -> (1, None). Raises ValueError."""
    parts = text.split("x")
    if len(parts) != 2 or not all(p == "all" or p.isdecimal() and int(p) > 0 for p in parts):
        raise ValueError(f"block {text!r} makes no sense; give ROWSxCOLUMNS, as in 32x32 or 1xall")
    return tuple(None if part == "all" else int(part) for part in parts)
