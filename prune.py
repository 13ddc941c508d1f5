"""Block movement pruning for any nn.Linear: learn, block by block, which weights can go.

One idea: a layer uses W' = W * expand(M) instead of its weight W. The mask M has one entry for each
block of r x c weights: 1 keeps the block, 0 drops it. Every block also has a score S, a learned
number, and M is 1 for the blocks with the best scores.

M is a step function of S, and the slope of a step is 0, so S could learn nothing from it. The
straight-through estimator (STE) therefore pretends that this slope is 1:

    forward      W' = W * expand(M)
    backward     dL/dW    = dL/dW' * expand(M)
                 dL/dS_ij = sum over block ij of dL/dW' * W

Why does this measure usefulness? Call g the gradient dL/dW'. To first order, the sum of g W over a
block is what having the block adds to the loss. This sum is also dL/dS, and gradient descent moves
S against it. So S rises for a block that lowers the loss, whether it is kept or dropped. Seen from
the weights of a kept block, which training moves along -g: S rises where g and W have opposite
signs, so where weights are pushed away from zero, and falls where they are pushed towards zero.
Hence the name "movement". A dropped block whose score is among the best again is back, with weights
that hardly changed meanwhile (their gradient was 0; only momentum and weight decay moved them).
Where several matrices share a score, it learns much less while its blocks are dropped; BlockGroup
says why.

    group = BlockGroup(model, "32x32", rows=["*.query", "*.key", "*.value"],
                       columns=["*.attention.output.dense"])   # names as in transformers' BERT
    group.advance(step, start=100, end=600, density=0.25)      # before every training step
    bake(model)                                   # plain nn.Linear layers again, with exact zeros

| method        | which blocks are kept              | what decides how many                   |
|---------------|------------------------------------|-----------------------------------------|
| movement      | those with the best scores         | you do: a fraction v of all blocks      |
| magnitude     | those with the greatest mean |W|   | you do: a fraction v of all blocks      |
| soft-movement | those with sigmoid(S) > tau        | a penalty in the loss that lowers all S |

Sources: Lagunas et al., Block Pruning For Faster Transformers, 2021 (arXiv 2109.04838), section 3;
Sanh et al., Movement Pruning, 2020 (arXiv 2005.07683), sections 3 and 4 (all three methods).

Shapes in comments: a matrix is (out, in), its blocks are r x c, and its scores are (R, C), where
R = ceil(out / r) and C = ceil(in / c), so blocks at the edges may be smaller.
"""
import re
import warnings
from fnmatch import fnmatch
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrize, vector_to_parameters

METHODS = ("movement", "soft-movement", "magnitude")
TAU = 0.1                                       # soft movement pruning's final threshold


class BlockMask(nn.Module):
    """W' = W * expand(M): a parametrization of a weight (out, in) by scores (R, C).

    The scores are a parameter, which the optimizer changes. M is the buffer `kept`, which
    `BlockGroup.advance` (or `keep`) sets anew before every training step.
    """

    def __init__(self, weight, block, transposed=False, owner=None):
        """Scores for the blocks of `weight`, all 0; every block is kept. Raises ValueError.

        transposed  True for a matrix that reads what others write (W_O, or the second FFN matrix).
                    It is transposed, (in, out), before it is cut into blocks, so that its scores
                    have the same shape as theirs and both can share them. A head of BERT-base, say,
                    is 64 rows of W_Q, but 64 columns of W_O, so 64 rows of its transpose. With
                    64xall, both have 12 blocks, and scores and M are (12, 1). `forward` transposes
                    M back.
        owner       the mask whose scores and M this one uses, so that both keep the same blocks
        """
        super().__init__()
        out, in_ = weight.T.shape if transposed else weight.shape
        r, c = parse_block(block)
        r = r or out
        c = c or in_
        if r > out or c > in_:
            raise ValueError(f"block {block} is larger than a matrix of {out} x {in_}; "
                             "give a smaller one, or `all` for a whole dimension")
        shape = (ceil(out / r), ceil(in_ / c))                                             # (R, C)
        self.block = (r, c)
        self.transposed = transposed
        self.schedule_ended = True    # `advance` sets it False until its `end`; `bake` then warns
        # In a tuple: a module that is an attribute would be registered, and its scores would be
        # saved once more with every mask that shares them.
        self.owner = (owner or self,)
        if owner is None:
            ones = torch.ones(shape, dtype=torch.float32, device=weight.device)
            self.scores = nn.Parameter(torch.zeros_like(ones))                             # S
            self.register_buffer("kept", ones)                                     # M, 0 or 1
        elif owner.scores.shape != shape:
            raise ValueError(f"{block} ties matrices whose sizes differ (grouped queries?)")

    def forward(self, weight):
        kept = self.owner[0].kept
        scores = self.owner[0].scores
        mask = kept + (scores - scores.detach())             # value of kept, gradient of scores
        r, c = self.block
        if self.transposed:
            mask = mask.T                    # M was made for the transpose: turn it to this matrix
            r, c = c, r
        R, C = mask.shape
        rows, columns = weight.shape
        if (rows, columns) != (R * r, C * c):                     # blocks at the edges are smaller
            weight = F.pad(weight, (0, C * c - columns, 0, R * r - rows))       # (R r, C c)
        mask = mask.to(weight.dtype)
        masked = weight.view(R, r, C, c) * mask.reshape(R, 1, C, 1)                # W * expand(M)
        return masked.view(R * r, C * c)[:rows, :columns]

    def magnitude(self, weight):
        """Mean |W| of every block (R, C)."""
        if self.transposed:
            weight = weight.T
        return F.avg_pool2d(weight.float().abs()[None], self.block, ceil_mode=True)[0]

    def _apply(self, fn, recurse=True):
        """Move, but stay in float32: in bfloat16, 4 + 0.01 is 4, and scores would stop."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


class BlockGroup:
    """Linear layers whose blocks compete with each other. Making the group masks them in `model`.

    The blocks of all these layers are ranked together, so that some layers keep more than others.
    Blocks of two groups do not compete. A model usually has two groups: attention and FFN. All
    layers of a group are on one device.
    """

    def __init__(self, model: nn.Module, block: str, rows: list, columns: list = (),
                 unit: int = 1, method: str = "movement"):
        """Mask the nn.Linear layers whose names match. Raises ValueError, and then masks none.

        block    "32x32", "1xall", ...: r outputs by c inputs, `all` for a whole dimension
        rows     name patterns of the matrices that write (a layer's query, key and value): they are
                 cut into r x c blocks
        columns  name patterns of the matrices that read what those write (its output): they are cut
                 into c x r blocks
        unit     how many rows make a part that is deleted whole: a head's size, or 1 in an FFN.
                 It only decides whether scores are shared: if each block is made of whole units,
                 they are (see the comment below)
        method   one of METHODS; with magnitude, scores are not learned
        """
        if method not in METHODS:
            raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
        self.method = method
        writers = [find_linears(model, pattern) for pattern in rows]
        readers = [find_linears(model, pattern) for pattern in columns]
        every = sum(writers + readers, [])
        check_free(model, every)

        # Scores are shared where a block is made of whole units: heads (64xall with heads of 64) or
        # FFN dimensions (1xall). A unit is worth nothing if only some of the matrices that write
        # it, or only the one that reads it, are left. So matrices that belong together (a layer's
        # query, key, value and output) share their scores: the first match of every pattern, then
        # the second, and so on, in the model's order. Gradients are summed over these matrices.
        # While a unit is dropped, its weights are 0 on both sides. So no gradient comes through the
        # reader's zeros to the writers. The reader's weights still get one, but what they read is
        # only the constant that the unit's bias gives. So the score of a dropped unit learns
        # little; the unit mostly comes back because the scores of others fall below its own.
        # Other blocks (32x32, or a part of a head) are of use without an exact partner: no sharing.
        # (Where almost nothing is left of a head, their scores learn little, too.)
        r, c = parse_block(block)
        shares_scores = r is not None and c is None and r % unit == 0
        if shares_scores:
            counts = [len(linears) for linears in writers + readers]
            if len(set(counts)) > 1:
                raise ValueError(f"{block} ties layers together, but the patterns match {counts}")
            self.sharing = list(zip(*writers, *readers))
        else:
            self.sharing = [(linear,) for linear in every]
        if not self.sharing:
            raise ValueError("there is no weight to mask")

        transposed = sum(readers, [])
        self.masks = []                                      # those that own scores
        attach = []
        for linears in self.sharing:
            owner = None
            for linear in linears:
                mask = BlockMask(linear.weight, block, linear in transposed, owner)
                owner = owner or mask
                attach.append((linear, mask))
            owner.scores.requires_grad_(method != "magnitude")
            self.masks.append(owner)
        self.blocks = len(parameters_to_vector(self.scores))
        for linear, mask in attach:
            # "unsafe" only leaves out a check, which would compute every masked weight once.
            parametrize.register_parametrization(linear, "weight", mask, unsafe=True)

    @property
    def scores(self) -> list:
        """The scores (R, C) of every matrix, or of all the matrices that share them."""
        return [mask.scores for mask in self.masks]

    @property
    def density(self) -> float:
        """The fraction of this group's blocks that are kept now."""
        return int(sum(mask.kept.count_nonzero() for mask in self.masks)) / self.blocks

    def advance(self, step: int, start: float, end: float, density: float | None = None,
                lambda_: float | None = None) -> Tensor | float:
        """Set M for this step, on the way from all blocks at `start` to the final share at `end`.

        start, end  steps; let `end` come before the last one, so that training goes on after it
        density     the fraction of blocks that movement and magnitude pruning end with
        lambda_     the final weight of soft movement's penalty
        Returns what is to be added to the loss: lambda(t) * penalty, or 0.
        """
        soft = self.method == "soft-movement"
        if (lambda_ if soft else density) is None:
            raise ValueError("soft-movement takes a lambda_, other methods a density")
        # After a tenth of the way from start to end, some score should have moved. If all are still
        # 0, the optimizer doesn't have them: it was made before the masks.
        begun = self.method != "magnitude" and step > start + (end - start) / 10
        if begun and not any(map(Tensor.any, self.scores)):
            warnings.warn("pruning has begun and no score has moved; make the optimizer after the "
                          "masks, from parameter_groups(model, lr, score_lr)", stacklevel=2)
        for mask in self.masks:
            mask.schedule_ended = step >= end
        if soft:
            tau = cubic(step, start, end, 0.0, TAU)
            self.set_masks(self.measure_scores().sigmoid() > tau)
            # mean(sigmoid(S)) over the blocks of every matrix, then over the matrices
            penalty = sum(scores.sigmoid().mean() for scores in self.scores) / len(self.scores)
            return cubic(step, start, end, 0.0, lambda_) * penalty
        self.blocks_to_keep(density)           # a bad final density is refused at the first step
        self.keep(cubic(step, start, end, 1.0, density))
        return 0.0

    def keep(self, density: float):
        """Keep the best `density` of all blocks: exactly round(density * blocks), ties by index.

        Raises ValueError for a density that makes no sense, ArithmeticError for scores of NaN.
        """
        self.set_masks(best(self.measure_scores(), self.blocks_to_keep(density)))

    def blocks_to_keep(self, density):
        """round(density * blocks). Raises ValueError if that is none, or more than all."""
        count = round(density * self.blocks) if 0 <= density <= 1 else 0
        if not count:
            raise ValueError(f"density {density}: give one that keeps some of {self.blocks} "
                             "blocks, and 1 at most")
        return count

    @torch.no_grad()
    def measure_scores(self):
        """The scores of all blocks, (blocks,); with magnitude, first set to their mean |W|."""
        if self.method == "magnitude":
            for mask, linears in zip(self.masks, self.sharing):
                weights = [linear.parametrizations.weight for linear in linears]
                sizes = [masked[0].magnitude(masked.original) for masked in weights]
                mask.scores.copy_(sum(sizes) / len(sizes))
        scores = parameters_to_vector(self.scores)
        if scores.isnan().any():
            raise ArithmeticError("scores are NaN; lower the learning rates, or clip gradients")
        return scores

    def set_masks(self, kept):
        """Write M into the buffers: of all blocks, (blocks,), True where a block is kept."""
        vector_to_parameters(kept.float(), [mask.kept for mask in self.masks])


def best(scores, k):
    """True for the k greatest scores (n,), the first ones where they tie; 1 <= k <= n.

    Of [5, 3, 3, 3] the two greatest are 5 and the first 3: the k-th greatest score (3) is the
    threshold, one score is above it, and so only the first 2 - 1 of those that equal it are kept.
    """
    threshold = scores.topk(k, sorted=False).values.min()
    above = scores > threshold
    ties = scores == threshold
    return above | ties & (ties.cumsum(0) <= k - above.sum())


def cubic(step, start, end, first, last):
    """v(t) = v_end + (v_0 - v_end) * (1 - (t - t0) / (t1 - t0))^3, with t0 = start and t1 = end.

    In this way the fraction of blocks kept falls from 1 to its target; tau and lambda rise from 0.
    """
    if step < start:
        return first
    if step >= end:
        return last
    return last + (first - last) * (1 - (step - start) / (end - start)) ** 3


def parameter_groups(model: nn.Module, lr: float, score_lr: float) -> list:
    """For AdamW: matrices; biases and norms, without weight decay; scores, at their own rate.

    AdamW's steps have the size of the rate, however large the gradients are. So a score says how
    steadily its block helps, more than how much. With twice the rate all scores become twice as
    large, and their order stays: the scores' rate matters only for soft movement, which compares
    them with a threshold.
    """
    matrices, vectors, scores = [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith(".scores"):
            scores.append(parameter)
        elif parameter.ndim > 1:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    return [
        {"params": matrices, "lr": lr, "weight_decay": 0.01},
        {"params": vectors, "lr": lr, "weight_decay": 0.0},
        {"params": scores, "lr": score_lr, "weight_decay": 0.0}
    ]


@torch.no_grad()
def bake(model: nn.Module) -> float:
    """Make the masks permanent: plain nn.Linear layers with zeros in place, scores gone.

    Do it before saving. To train on, delete the empty heads and dimensions first. The zeros are
    plain weights now: training would change them, and nothing would be empty any more.
    Returns the density reached: the fraction of the masked weights that is not zero; 1 without any.
    """
    kept = total = 0
    for linear in filter(is_masked, model.modules()):
        masked = linear.parametrizations.weight
        if not masked[0].owner[0].schedule_ended:
            warnings.warn("the masks are baked before the `end` of their schedule, so more blocks "
                          "may stay than you asked for; let `end` come before the last step",
                          stacklevel=3)            # the caller, behind torch.no_grad's wrapper
        weight = masked.original
        weight.copy_(linear.weight)
        kept += int(weight.count_nonzero())
        total += weight.numel()
        # By hand: remove_parametrizations would delete the property `weight` of the layer's class,
        # and a deep copy of the layer has the same class.
        linear.__class__ = parametrize.type_before_parametrizations(linear)
        del linear.parametrizations
        linear.weight = weight
    return kept / total if total else 1.0


def is_masked(module):
    return (parametrize.is_parametrized(module, "weight")
            and isinstance(module.parametrizations.weight[0], BlockMask))


def find_linears(model, pattern):
    """The layers whose names match, empty ones left out. Raises ValueError if none is linear."""
    matches = [module for name, module in model.named_modules() if fnmatch(name, pattern)]
    linears = [module for module in matches if isinstance(module, nn.Linear)]
    if not linears:
        kinds = {type(module).__name__ for module in matches}
        raise ValueError(f"{pattern!r} matches no nn.Linear, but {kinds or 'nothing'}")
    return [linear for linear in linears if linear.in_features * linear.out_features]


def check_free(model, linears):
    """Raises ValueError for a layer that can take no mask, before any other has got one."""
    for linear in linears:
        if is_masked(linear) or linears.count(linear) > 1:
            raise ValueError("a layer is masked twice; let one pattern match it")
        if parametrize.is_parametrized(linear) or not isinstance(linear.weight, nn.Parameter):
            raise ValueError("a layer's weight or bias is computed from others (by weight_norm, "
                             "LoRA or torch.nn.utils.prune?); make that permanent first")
        names = [name for name, weight in model.named_parameters(remove_duplicate=False)
                 if weight is linear.weight]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} share one weight: a mask on one would change "
                             "the other; leave both out, or give each its own")


def parse_block(text):
    """"32x16" -> (32, 16); "1xall" -> (1, None). Raises ValueError."""
    match = re.fullmatch("(all|[1-9][0-9]*)x(all|[1-9][0-9]*)", str(text))
    if not match:
        raise ValueError(f"block {text!r} makes no sense; give ROWSxCOLUMNS, as in \"32x32\"")
    return tuple(None if size == "all" else int(size) for size in match.groups())
