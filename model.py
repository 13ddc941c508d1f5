"""BERT with a span head, written by hand, that opens and saves Hugging Face checkpoints.

One idea: a model is its tensors. BERT is 12 identical layers of two sublayers (self-attention and a
feed-forward network), so a table of a dozen names is all it takes to read anybody's checkpoint.
Every layer may have its own number of heads and FFN dimensions: that is what block pruning leaves.

    model = BertForQuestionAnswering.from_pretrained("data/bert-base-uncased")
    start, end = model(input_ids, attention_mask, token_type_ids)      # logits, each (B, T)
    model.save_pretrained("out/mine")                                  # `transformers` opens it

Sources: Devlin et al., BERT, 2018 (arXiv 1810.04805), sections 3 and 4.2; Vaswani et al., Attention
Is All You Need, 2017 (arXiv 1706.03762), section 3.2.

Shapes in comments: B batch, T tokens, C hidden size, H heads, D head size, F FFN dimensions.
"""
from __future__ import annotations

import json
import mmap
import os
import re
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A layer whose heads are all deleted has matrices of size 0: there is nothing to initialise.
warnings.filterwarnings("ignore", message="Initializing zero-element tensors")

ACTIVATIONS = {"gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh"), "relu": F.relu}


@dataclass
class BertConfig:
    """The fields of Hugging Face's config.json that shape the computation, with BERT-base's values.

    The last two are for compact models: the heads and FFN dimensions left in each layer.
    """

    vocab_size: int = 30522
    hidden_size: int = 768                       # C
    num_hidden_layers: int = 12
    num_attention_heads: int = 12                # H before pruning: D = C / H
    intermediate_size: int = 3072                # F before pruning
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    heads_per_layer: list[int] | None = None
    ffn_per_layer: list[int] | None = None

    def __post_init__(self):
        for field in fields(self)[:-2]:
            name, value, kind = field.name, getattr(self, field.name), type(field.default)
            low, top = 1 + (name == "type_vocab_size"), 1000 if "layers" in name else 10**6
            if type(value) not in ((int, float) if kind is float else (kind,)) or \
                    kind is float and not 0 <= value < 1 or kind is int and not low <= value <= top:
                raise ValueError(f"{name} is {value!r}; a typical value is {field.default!r}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; expected one of {[*ACTIVATIONS]}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of "
                             f"num_attention_heads {self.num_attention_heads}")
        self.head_size = self.hidden_size // self.num_attention_heads                   # D
        for name, most in (("heads_per_layer", self.num_attention_heads),
                           ("ffn_per_layer", self.intermediate_size)):
            sizes = getattr(self, name)
            if sizes is None:
                setattr(self, name, [most] * self.num_hidden_layers)
            elif not isinstance(sizes, list) or len(sizes) != self.num_hidden_layers or \
                    not all(type(size) is int and 0 <= size <= most for size in sizes):
                raise ValueError(f"{name} must be {self.num_hidden_layers} numbers, 0 to {most}")

    @classmethod
    def read(cls, path: Path) -> BertConfig:
        """Read config.json, ignoring fields that do not concern this model. Raises ValueError."""
        values = read_json(path)
        if values.get("model_type", "bert") != "bert" or \
                values.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError(f"{path}: not of a BERT with absolute positions; give one that is")
        try:
            return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def values(self) -> dict:
        """What config.json says."""
        values = asdict(self)
        if self == BertConfig(**{**values, "heads_per_layer": None, "ffn_per_layer": None}):
            del values["heads_per_layer"], values["ffn_per_layer"]     # nothing deleted: plain BERT
        return {"architectures": ["BertForQuestionAnswering"], "model_type": "bert", **values}


# ---------------------------------------------------------------------------------------- the model


class Embeddings(nn.Module):
    """Token + position + segment, normalised."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.segment = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        position = torch.arange(input_ids.shape[1], device=input_ids.device)              # (T,)
        x = self.word(input_ids) + self.position(position) + self.segment(token_type_ids)
        return self.dropout(self.norm(x))                                                # (B, T, C)


class Attention(nn.Module):
    """Self-attention: softmax(Q K^T / sqrt(D)) V in each head, then the output matrix."""

    def __init__(self, config: BertConfig, heads: int):
        super().__init__()
        self.heads, self.head_size = heads, config.head_size
        width = heads * config.head_size
        self.query = nn.Linear(config.hidden_size, width)
        self.key = nn.Linear(config.hidden_size, width)
        self.value = nn.Linear(config.hidden_size, width)
        self.output = nn.Linear(width, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:                         # (B, T, C)
        if self.heads == 0:
            return self.output.bias                                               # (C,), a constant
        B, T, _ = x.shape
        q, k, v = (project(x).view(B, T, self.heads, self.head_size).transpose(1, 2)  # (B, H, T, D)
                   for project in (self.query, self.key, self.value))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask,
                                           dropout_p=self.dropout.p if self.training else 0.0)
        return self.output(x.transpose(1, 2).flatten(2))                                 # (B, T, C)


class FFN(nn.Module):
    """activation(x W1^T + b1) W2^T + b2: every FFN dimension is a row of W1 and a column of W2."""

    def __init__(self, config: BertConfig, dimensions: int):
        super().__init__()
        self.first = nn.Linear(config.hidden_size, dimensions)
        self.second = nn.Linear(dimensions, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:                                              # (B, T, C)
        if self.first.out_features == 0:
            return self.second.bias                                               # (C,), a constant
        return self.second(self.activation(self.first(x)))


class Layer(nn.Module):
    """Attention, then FFN; each is added to its input, and the sum normalised."""

    def __init__(self, config: BertConfig, heads: int, dimensions: int):
        super().__init__()
        self.attention = Attention(config, heads)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = FFN(config, dimensions)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:                         # (B, T, C)
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class BertForQuestionAnswering(nn.Module):
    """BERT and two numbers for every token: how likely the answer starts there, and ends there."""

    def __init__(self, config: BertConfig):
        """Random weights: normal with standard deviation `initializer_range`; biases 0."""
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, heads, dimensions) for heads, dimensions
                                    in zip(config.heads_per_layer, config.ffn_per_layer))
        self.span = nn.Linear(config.hidden_size, 2)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                token_type_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Start and end logits, each (B, T).

        input_ids, attention_mask (1 for tokens, 0 for padding) and token_type_ids (0 for the
        question, 1 for the context) are (B, T).
        """
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        x = self.embeddings(input_ids, token_type_ids)                                   # (B, T, C)
        for layer in self.layers:
            x = layer(x, mask)
        return self.span(x).unbind(-1)

    @classmethod
    def from_pretrained(cls, folder: str | Path,
                        layers: list[int] | None = None) -> BertForQuestionAnswering:
        """Open a dense, masked or compact model; the span head is random where there is none.

        layers: which of the checkpoint's layers to take, all unless given.
        Raises ValueError or OSError, naming the file and the weight that is missing, misshapen or
        no number.
        """
        config = BertConfig.read(Path(folder) / "config.json")
        layers = list(range(config.num_hidden_layers)) if layers is None else layers
        if not layers or not all(0 <= i < config.num_hidden_layers for i in layers):
            raise ValueError(f"{folder}: layers 0 to {config.num_hidden_layers - 1}, not {layers}")
        file, tensors = read_weights(Path(folder))
        tensors = {canonical_name(name): tensor for name, tensor in tensors.items()}
        config = replace(config, num_hidden_layers=len(layers),
                         heads_per_layer=[config.heads_per_layer[i] for i in layers],
                         ffn_per_layer=[config.ffn_per_layer[i] for i in layers])
        has_span_head = not {"qa_outputs.weight", "qa_outputs.bias"}.isdisjoint(tensors)
        if not has_span_head:
            print(f"{file}: no span head; it starts random", file=sys.stderr)
            head = torch.randn(2, config.hidden_size) * config.initializer_range
            tensors |= {"qa_outputs.weight": head, "qa_outputs.bias": torch.zeros(2)}
        with torch.device("meta"):                           # shapes only: no memory until checked
            model = cls(config)
        state = {}
        for name, parameter in model.state_dict().items():
            theirs = hugging_face_name(re.sub(r"\d+", lambda m: str(layers[int(m[0])]), name))
            tensor = tensors.get(theirs)
            if tensor is None:
                raise ValueError(f"{file}: no weight {theirs!r}; is this BERT's, and whole?")
            if tensor.shape != parameter.shape or not tensor.is_floating_point():
                raise ValueError(f"{file}: {theirs!r} is {tensor.dtype} {list(tensor.shape)}, not "
                                 f"float {list(parameter.shape)} as in config.json; get both again")
            state[name] = tensor.to(torch.float32, copy=True)
            if not state[name].isfinite().all():
                raise ValueError(f"{file}: {theirs!r} holds NaN or infinity; get the file again")
        model.load_state_dict(state, assign=True)
        model.has_span_head = has_span_head
        return model.eval()

    def save_pretrained(self, folder: str | Path, source: str | Path | None = None):
        """Write config.json and model.safetensors in Hugging Face's layout and names.

        source: a folder whose tokenizer is copied, too, so that the new one stands alone.
        """
        folder = Path(folder)
        tensors = {hugging_face_name(name): tensor for name, tensor in self.state_dict().items()}
        write_safetensors(folder / "model.safetensors", dict(sorted(tensors.items())))
        save_json(folder / "config.json", self.config.values())
        for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json") if source else ():
            if (path := Path(source) / name).exists():
                with whole_file(folder / name) as file:
                    file.write(path.read_bytes())
            else:
                (folder / name).unlink(missing_ok=True)                     # an older model's


# -------------------------------------------------------------------- names: ours -> Hugging Face's

NAMES = {
    "embeddings.word": "bert.embeddings.word_embeddings",
    "embeddings.position": "bert.embeddings.position_embeddings",
    "embeddings.segment": "bert.embeddings.token_type_embeddings",
    "embeddings.norm": "bert.embeddings.LayerNorm",
    "layers.#.attention.query": "bert.encoder.layer.#.attention.self.query",
    "layers.#.attention.key": "bert.encoder.layer.#.attention.self.key",
    "layers.#.attention.value": "bert.encoder.layer.#.attention.self.value",
    "layers.#.attention.output": "bert.encoder.layer.#.attention.output.dense",
    "layers.#.attention_norm": "bert.encoder.layer.#.attention.output.LayerNorm",
    "layers.#.ffn.first": "bert.encoder.layer.#.intermediate.dense",
    "layers.#.ffn.second": "bert.encoder.layer.#.output.dense",
    "layers.#.ffn_norm": "bert.encoder.layer.#.output.LayerNorm",
    "span": "qa_outputs",
}


def hugging_face_name(ours: str) -> str:
    """layers.7.ffn.first.weight -> bert.encoder.layer.7.intermediate.dense.weight"""
    module, _, kind = ours.rpartition(".")
    layer = "".join(re.findall(r"\d+", module))
    return NAMES[re.sub(r"\d+", "#", module)].replace("#", layer) + "." + kind


def canonical_name(theirs: str) -> str:
    """Old and short spellings of a Hugging Face name -> the one in the table above."""
    name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", theirs))
    return "bert." + name if name.startswith(("embeddings.", "encoder.")) else name


# -------------------------------------------------------------------------------------------- files


def read_json(path: str | Path) -> dict:
    """Read a JSON object. Raises ValueError or OSError."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); mend it or get it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object, {{...}}; is it the right file?")
    return value


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that appears whole, or not at all, even if the machine stops."""
    partial_path = Path(f"{path}.partial")
    partial_path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial_path, "wb") as file:
            yield file
            file.flush(), os.fsync(file.fileno())
        os.replace(partial_path, path)
    except (OSError, RuntimeError) as error:                   # torch.save's word for a full disk
        raise OSError(f"{path}: not written ({error.__context__ or error}); disk full?") from None
    finally:
        partial_path.unlink(missing_ok=True)


def save_json(path: Path, value):
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """model.safetensors, else pytorch_model.bin: the file, and its tensors by name."""
    if (path := folder / "model.safetensors").exists():
        return path, read_safetensors(path)
    if not (path := folder / "pytorch_model.bin").exists():
        raise ValueError(f"{folder}: no model.safetensors or pytorch_model.bin; is it all there?")
    return path, {str(name): t for name, t in read_torch(path).items() if isinstance(t, Tensor)
                  and t.layout == torch.strided and t.device.type == "cpu"
                  and t.untyped_storage().nbytes() >= t.nbytes}


def read_torch(path: Path) -> dict:
    """Read what torch.save wrote: data, never code. Raises ValueError."""
    try:
        return {**torch.load(path, map_location="cpu", weights_only=True)}
    except Exception as error:                               # a damaged file raises anything
        raise ValueError(f"{path}: no plain tensors ({type(error).__name__}); remove it") from None


# The safetensors format: 8 bytes with the header's length (little-endian), the header (JSON:
# name -> dtype, shape and where its bytes begin and end), then the bytes themselves, without gaps.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file. The tensors are views of the file: copy what you keep.

    Raises ValueError, naming the file and the tensor, unless all is as the format says.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
        if length > size - 8 or length > 1_000_000:                      # 10,000 tensors
            raise ValueError(f"{path}: a header of {length} bytes in a file of {size}; replace it")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            spans = [(*entry["data_offsets"], DTYPES[entry["dtype"]], [*entry["shape"]], name)
                     for name, entry in header.items()]
            if not all(type(n) is int and n >= 0 for begin, end, _, shape, _ in spans
                       for n in (begin, end, *shape)):
                raise ValueError("an offset or a shape is not made of whole numbers")
            spans.sort(key=lambda span: span[:2])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: not a safetensors header ({type(error).__name__}: "
                             f"{str(error)[:200]}); get the file again") from None
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors, position, start = {}, 0, 8 + length
    for begin, end, dtype, shape, name in spans:
        count = prod(shape[:9])
        if end > size - start:
            raise ValueError(f"{path}: cut off in {name!r}, after {size} bytes; get the file again")
        if begin != position or end - begin != count * dtype.itemsize or len(shape) > 8 or \
                prod(n or 1 for n in shape) > 2**60:
            raise ValueError(f"{path}: the bytes of {name!r} do not fit its shape, overlap others "
                             "or leave a gap; get the file again")
        tensors[name] = torch.empty(shape, dtype=dtype) if not count else torch.frombuffer(
            data, dtype=dtype, count=count, offset=start + begin).view(shape)
        position = end
    if position != size - start:
        raise ValueError(f"{path}: {size - start - position} bytes too many; get the file again")
    return tensors


def write_safetensors(path: str | Path, tensors: dict[str, Tensor]):
    """Write tensors in the safetensors format."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                               # tensors start at a multiple of 8
    with whole_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
