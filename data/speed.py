"""How long a model's layers take on this machine, with fewer heads and FFN dimensions.

One idea: a density is no speed, since deletion removes only whole heads and dimensions, and how
much time that saves depends on the machine. So a run that is asked for a speed first measures one
layer's attention with 0, 1, ..., H heads, its FFN with nine widths, and the rest of the model
(embeddings, norms, sums, output layer). The time of any smaller model is then predicted as

    t = rest + sum over the layers of (heads[h] + ffn[f])

for layers with h heads and f dimensions. `SpeedPruner` in train.py prunes until t is small enough.

Shapes in comments: H heads, F FFN dimensions, both of a layer before pruning.
"""
from dataclasses import replace

import numpy as np
import torch

from data.run import note


@torch.inference_mode()
def measure_layers(model, batch, seconds):
    """Seconds for this batch of inputs: lower quartiles of 15 rounds, in which all take turns.

    (Other work on the machine only makes times longer, so medians would be further from the truth.)
    "rest" is the time of the model when its layers have no heads and no dimensions. Such layers
    still take time (norms, sums), which "rest" holds. So what counts for h heads is the time of a
    layer with h heads and no dimension, minus the time of a layer with neither; likewise for
    dimensions.

    seconds: compact.py's stopwatch, handed over so that data/ does not import compact.py.
    The result can be written as JSON:
    "heads": [[0, ..., H], [how much longer an attention with that many takes than one without]];
    "ffn": [[0, ..., F], [how much longer an FFN with that many takes than one without]];
    "rest": see above;
    "dense": of the whole model. It is predicted from the others, not measured: smaller models will
    be predicted in the same way, and errors of the prediction partly cancel in the ratio.
    Noise is flattened: more heads or dimensions never take less time.
    """
    config = model.config
    make_layer = type(model.layers[0])
    ids, attention_mask, types = batch
    heads = [*range(config.num_attention_heads + 1)]
    # Nine widths from 0 to F, closer where they are small, since pruning leaves small ones. All
    # but 0 and F are made odd: multiples of 16 are faster than other widths, and pruning rarely
    # leaves one.
    widths = [config.intermediate_size * i * i // 64 for i in range(9)]
    widths[1:8] = [width + 1 - width % 2 for width in widths[1:8]]
    none = [0] * len(model.layers)
    with torch.device(ids.device):
        layers = [make_layer(config, n, 0) for n in heads]
        layers += [make_layer(config, 0, n) for n in widths]
        rest = type(model)(replace(config, heads_per_layer=none, ffn_per_layer=none))
    inputs = model.embeddings(ids, types), model.visible_tokens(attention_mask, types)
    calls = [(rest, batch)] + [(layer, inputs) for layer in layers]
    rounds = [[seconds(*call) for call in calls] for _ in range(15)]
    low, high = np.percentile(rounds, (25, 75), 0)                          # of every call
    if high.sum() > 1.3 * low.sum():
        note("the measured times scatter: the machine is busy, so the speed may be missed; better "
             "stop, and begin anew in another --out when it is idle")
    of_heads, of_ffn = low[1:len(heads) + 1], low[len(heads) + 1:]
    times = {
        "heads": [heads, (np.maximum.accumulate(of_heads) - of_heads[0]).tolist()],
        "ffn": [widths, (np.maximum.accumulate(of_ffn) - of_ffn[0]).tolist()],
        "rest": float(low[0]),
    }
    times["dense"] = predicted_time(times, config.heads_per_layer, config.ffn_per_layer)
    return times


def predicted_time(layer_times, heads, dimensions):
    """t above, in seconds; heads, dimensions: a list each, with a number for every layer.

    Between two measured widths the time is taken as linear.
    """
    of_heads = np.interp(heads, *layer_times["heads"])
    of_ffn = np.interp(dimensions, *layer_times["ffn"])
    return float(layer_times["rest"] + of_heads.sum() + of_ffn.sum())
