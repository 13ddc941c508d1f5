"""BERT, written by hand, that opens and saves Hugging Face checkpoints.

One idea: a model is its tensors. All layers have the same tensors, by the same names, so a short
table of names is enough to read any checkpoint of BERT. A layer has two sublayers, self-attention
and a feed-forward network (FFN). Every layer may have its own number of heads and of dimensions in
the FFN, because that is what block pruning leaves.

    model = BertForQuestionAnswering.from_pretrained("data/bert-base-uncased")
    start, end = model(input_ids, attention_mask, token_type_ids).unbind(1)   # logits, (B, T) each
    model.save_pretrained("out/mine")                    # transformers opens it, if no layer shrank

Sources: Devlin et al., BERT, 2018 (arXiv 1810.04805), sections 3 and 4.2; Vaswani et al., Attention
Is All You Need, 2017 (arXiv 1706.03762), section 3.2; Dong et al., UniLM, 2019 (arXiv 1905.03197),
section 2.3, for generation.

Shapes: B batch, T tokens, C hidden size, H heads, D head size, F FFN dimensions, V vocabulary.
"""
import json
import os
import re
import sys
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A layer that lost all its heads has matrices without any element; PyTorch warns about those.
warnings.filterwarnings("ignore", message="Initializing zero-element")

ACTIVATIONS = {"gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh"), "relu": F.relu}


@dataclass
class Reading:
    """How a model reads texts and chooses answers; it is saved with the model, in config.json."""

    max_length: int = 384                        # tokens in a window
    stride: int = 128                            # tokens by which two windows overlap
    max_answer: int = 30                         # tokens in an answer
    null_threshold: float = 0.0                  # no answer if [CLS] wins by more than this
    no_answer: bool = False                      # may "no answer" be right, as in SQuAD v2.0?
    texts: int = 0                               # how many a classifier reads, 1 or 2; 0: not known


@dataclass
class BertConfig:
    """The fields of Hugging Face's config.json that shape the computation, with BERT-base's values.

    This project adds heads_per_layer and ffn_per_layer (what is left in each layer of a compact
    model), labels (a classifier's; id2label in config.json) and reading.
    """

    vocab_size: int = 30522                      # V
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
    labels: list[str] | None = None
    reading: Reading = field(default_factory=Reading)

    def __post_init__(self):
        if not 0 < self.num_hidden_layers <= 1000:
            raise ValueError(f"num_hidden_layers is {self.num_hidden_layers}; BERT-base has 12")
        self.head_size = self.hidden_size // self.num_attention_heads                   # D
        layers = self.num_hidden_layers
        self.heads_per_layer = self.heads_per_layer or [self.num_attention_heads] * layers
        self.ffn_per_layer = self.ffn_per_layer or [self.intermediate_size] * layers


class Embeddings(nn.Module):
    """Token + position + segment, normalised."""

    def __init__(self, config):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.segment = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, token_type_ids, position=None):                         # (B, T)
        if position is None:
            position = torch.arange(input_ids.shape[1], device=input_ids.device)          # (T,)
        x = self.word(input_ids) + self.position(position) + self.segment(token_type_ids)
        return self.dropout(self.norm(x))                                                # (B, T, C)


class Attention(nn.Module):
    """Self-attention: softmax(Q K^T / sqrt(D)) V in each head, then the output matrix."""

    def __init__(self, config, heads):
        super().__init__()
        self.head_size = config.head_size
        width = heads * config.head_size
        self.query = nn.Linear(config.hidden_size, width)
        self.key = nn.Linear(config.hidden_size, width)
        self.value = nn.Linear(config.hidden_size, width)
        self.output = nn.Linear(width, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    @property
    def heads(self):
        """How many heads there are now; deletion makes the matrices smaller."""
        return self.query.out_features // self.head_size

    def forward(self, x, visible, kv_cache=None):
        """x (B, T, C); visible (B, 1, 1, T) or (B, 1, T, T): which tokens a token sees.

        kv_cache: in generation, a list of (keys, values), one pair for every call; it grows.
        """
        if not self.heads:
            return self.output.bias.expand_as(x)                # without heads it is a constant
        q, k, v = (
            linear(x).unflatten(2, (self.heads, self.head_size)).transpose(1, 2)    # (B, H, T, D)
            for linear in (self.query, self.key, self.value)
        )
        if kv_cache is not None:
            kv_cache.append((k, v))
            k, v = (torch.cat(parts, 2) for parts in zip(*kv_cache))
        dropout = self.dropout.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)
        return self.output(x.transpose(1, 2).flatten(2))                                 # (B, T, C)


class FFN(nn.Module):
    """activation(x W1^T + b1) W2^T + b2: every FFN dimension is a row of W1 and a column of W2."""

    def __init__(self, config, dimensions):
        super().__init__()
        self.first = nn.Linear(config.hidden_size, dimensions)
        self.second = nn.Linear(dimensions, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x):                                                                # (B, T, C)
        if not self.first.out_features:
            return self.second.bias.expand_as(x)           # without dimensions it is a constant
        return self.second(self.activation(self.first(x)))


class Layer(nn.Module):
    """Attention, then FFN; each is added to its input, and the sum normalised."""

    def __init__(self, config, heads, dimensions):
        super().__init__()
        self.attention = Attention(config, heads)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = FFN(config, dimensions)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x, visible, kv_cache=None):
        x = self.attention_norm(x + self.dropout(self.attention(x, visible, kv_cache)))  # (B, T, C)
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class Bert(nn.Module):
    """Embeddings and layers, which the three models below share; each adds `head_logits`."""

    has_head = True                # False: the checkpoint lacks the output layers, "the head"

    def __init__(self, config):
        super().__init__()
        # Copied, so that no two models share one. A classifier sets its labels in set_labels.
        self.base_config = replace(config, labels=None, reading=replace(config.reading))
        self.embeddings = Embeddings(config)
        sizes = zip(config.heads_per_layer, config.ffn_per_layer, strict=True)
        self.layers = nn.ModuleList(Layer(config, *size) for size in sizes)

    @property
    def config(self) -> BertConfig:
        """A fresh copy of the configuration, with the layers and the sizes that there are now.

        Only `config.reading` is the model's own object, so that changes to it stay.
        """
        return replace(
            self.base_config,
            num_hidden_layers=len(self.layers),
            heads_per_layer=[layer.attention.heads for layer in self.layers],
            ffn_per_layer=[layer.ffn.first.out_features for layer in self.layers],
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                token_type_ids: Tensor | None = None) -> Tensor:
        """The logits that `head_logits` describes, in float32. The inputs are (B, T).

        attention_mask: 1 for tokens, 0 for padding; token_type_ids: 1 for the second segment.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        visible = self.visible_tokens(attention_mask, token_type_ids)
        x = self.encode(input_ids, visible, token_type_ids)                              # (B, T, C)
        return self.head_logits(x, attention_mask, token_type_ids).float()

    def visible_tokens(self, attention_mask, token_type_ids):
        """Which tokens a token sees: all but padding. (B, 1, 1, T)"""
        return attention_mask[:, None, None].bool()

    def encode(self, input_ids, visible, token_type_ids, position=None, kv_caches=None):
        """What the last layer makes of the tokens (B, T): (B, T, C)."""
        x = self.embeddings(input_ids, token_type_ids, position)                         # (B, T, C)
        for i, layer in enumerate(self.layers):
            x = layer(x, visible, kv_caches and kv_caches[i])
        return x

    def initialise(self, module):
        """Matrices: normal with standard deviation `initializer_range`; biases 0, norms 1."""
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=self.base_config.initializer_range)
            else:
                nn.init.constant_(parameter, name.endswith("norm.weight"))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Bert":
        """Open a dense, pruned or compact model, in float32 and eval mode.

        Output layers that the file lacks start random; a message says so, and `has_head` is False.
        Raises ValueError or OSError, naming file and weight, if one is missing or not finite.
        """
        return load_checkpoint(cls, Path(folder)).eval()

    def save_pretrained(self, folder: str | Path):
        """Write config.json and model.safetensors in Hugging Face's layout and names."""
        tensors = {hugging_face_name(ours): tensor for ours, tensor in self.state_dict().items()}
        write_safetensors(Path(folder) / "model.safetensors", tensors)
        values = {"architectures": [self.ARCHITECTURE], "model_type": "bert", **asdict(self.config)}
        if labels := values.pop("labels"):
            values["id2label"] = dict(enumerate(labels))
            values["label2id"] = {label: i for i, label in enumerate(labels)}
        save_json(Path(folder) / "config.json", values)


class BertForQuestionAnswering(Bert):
    """BERT and two numbers for every token: how likely the answer starts there, and ends there."""

    ARCHITECTURE = "BertForQuestionAnswering"                  # in config.json

    def __init__(self, config):
        super().__init__(config)
        self.span = nn.Linear(config.hidden_size, 2)
        self.initialise(self)

    def head_logits(self, x, attention_mask, token_type_ids):
        """Start and end logits, (B, 2, T), start first; padding gets -1e4 (-inf makes KL NaN)."""
        logits = self.span(x).transpose(1, 2).float()                                    # (B, 2, T)
        return logits.masked_fill(attention_mask[:, None] == 0, -1e4)


class BertForSequenceClassification(Bert):
    """BERT and a number for every label, from what the layers make of [CLS]."""

    ARCHITECTURE = "BertForSequenceClassification"

    def __init__(self, config):
        super().__init__(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.set_labels(config.labels or ["LABEL_0", "LABEL_1"])
        self.initialise(self)

    def set_labels(self, labels):
        """Learn these classes, given by name, with a random classifier."""
        self.base_config.labels = labels
        self.classifier = nn.Linear(self.base_config.hidden_size, len(labels))
        self.initialise(self.classifier)

    def head_logits(self, x, attention_mask, token_type_ids):
        """Logits (B, labels)."""
        pooled = self.pooler(x[:, 0]).tanh()                                             # (B, C)
        return self.classifier(self.dropout(pooled))


class BertForGeneration(Bert):
    """BERT that reads a source (type 0) and writes a target (type 1); saved as a BertForMaskedLM.

    All tokens see the source; a token of the target also sees itself and those before it.
    """

    ARCHITECTURE = "BertForMaskedLM"

    def __init__(self, config):
        super().__init__(config)
        self.vocabulary = VocabularyHead(config)
        self.initialise(self)

    def visible_tokens(self, attention_mask, token_type_ids):
        """(B, 1, T, T): row i sees column j if j is of the source, or j <= i; never padding."""
        T = attention_mask.shape[1]
        not_later = attention_mask.new_ones(T, T).tril().bool()                          # j <= i
        source = token_type_ids[:, None, None] == 0                                # (B, 1, 1, T)
        return super().visible_tokens(attention_mask, token_type_ids) & (source | not_later)

    def head_logits(self, x, attention_mask, token_type_ids):
        """Logits (N, V) of the next token, for each of the N tokens of type 1, in their order."""
        return self.vocabulary(x[token_type_ids == 1], self.embeddings.word.weight)


class VocabularyHead(nn.Module):
    """A number for every word of the vocabulary: how well its embedding fits."""

    def __init__(self, config):
        super().__init__()
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))

    def forward(self, x, words):                                                # (..., C), (V, C)
        x = self.norm(self.activation(self.transform(x)))
        return F.linear(x, words, self.bias)                                             # (..., V)


# ------------------------------------------------------------------------------------- Checkpoints

# Names of modules: ours -> Hugging Face's; # stands for the number of a layer.
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
    "pooler": "bert.pooler.dense",
    "classifier": "classifier",
    "vocabulary": "cls.predictions",
    "vocabulary.transform": "cls.predictions.transform.dense",
    "vocabulary.norm": "cls.predictions.transform.LayerNorm",
}
# Where config.json has one of these, it must say this: BERT's variants are not supported.
SUPPORTED = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "is_decoder": False,
    "tie_word_embeddings": True,
    "pruned_heads": {},
    "problem_type": "single_label_classification",
}
OF_NO_USE = r"cls\.|bert\.pooler\.|.*position_ids$"        # pre-training's heads; positions


def hugging_face_name(ours):
    """layers.7.ffn.first.weight -> bert.encoder.layer.7.intermediate.dense.weight"""
    module, _, kind = ours.rpartition(".")
    layer = "".join(re.findall(r"\d+", module))
    return NAMES[re.sub(r"\d+", "#", module)].replace("#", layer) + "." + kind


def canonical_name(theirs):
    """Old and short spellings of a Hugging Face name -> the one in the table above."""
    name = theirs.replace(".gamma", ".weight").replace(".beta", ".bias")
    name = re.sub(r"^((module|model|base_model|_orig_mod)\.)+", "", name)     # what wrappers add
    return re.sub(r"^(embeddings|encoder|pooler)\.", r"bert.\g<0>", name)


def load_checkpoint(kind, folder):
    """A model of class `kind` with the weights of a folder; see `Bert.from_pretrained`."""
    path = folder / "config.json"
    values = read_json(path)
    file, tensors = read_weights(folder)
    try:
        tensors = {canonical_name(name): tensor for name, tensor in tensors.items()}
        rows = len(tensors.get("classifier.weight", ()))                    # one for each label
        with torch.device("meta"):                 # only shapes: no memory is taken until checked
            model = kind(config_from_json(values, rows))
    except Exception as error:                     # nonsense raises anything
        raise ValueError(f"{path}: no model can be made of this: {error!r}") from None
    missing = []               # output layers that the file lacks: they begin random
    for name, module in model.named_children():
        theirs = NAMES.get(name)
        if theirs and not any(other.startswith(theirs) for other in tensors):
            missing.append(theirs)
            model.initialise(module.to_empty(device="cpu"))
    state = model.state_dict()
    check_unread(file, tensors.keys() - {*map(hugging_face_name, state)})
    for ours, tensor in state.items():
        if tensor.is_meta:                         # all but what was just initialised
            theirs = hugging_face_name(ours)
            state[ours] = checked_weight(file, theirs, tensors.get(theirs), tensor.shape)
    model.load_state_dict(state, assign=True)
    model.has_head = not missing
    if missing:
        print(f"{file}: no weights for {', '.join(missing)}: random at the start", file=sys.stderr)
    return model


def config_from_json(values, rows):
    """The BertConfig that config.json describes. Raises whatever error bad values cause."""
    for name, only in SUPPORTED.items():
        if values.get(name) not in (None, only):
            raise ValueError(f"{name} {values[name]} is not supported, only {only}")
    known = {entry.name: values[entry.name] for entry in fields(BertConfig) if entry.name in values}
    id2label = values.get("id2label") or {str(i): f"LABEL_{i}" for i in range(rows)}
    known["labels"] = [str(id2label[str(i)]) for i in range(len(id2label))]
    known["reading"] = reading = Reading(**values.get("reading", {}))
    config = BertConfig(**known)
    reading.max_length = min(reading.max_length, config.max_position_embeddings)
    return config


def read_json(path):
    """Read a JSON object. Raises ValueError or OSError."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); is it the file for this --task?") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object, {{...}}; is it the right file?")
    return value


@contextmanager
def whole_file(path):
    """A file to write that appears whole, or not at all, even if the machine stops."""
    partial_path = Path(f"{path}.partial")
    partial_path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial_path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial_path.replace(path)
    except (OSError, RuntimeError) as error:            # torch.save raises the latter on full disks
        raise OSError(f"{path}: not written ({error}); disk full?") from None
    finally:
        partial_path.unlink(missing_ok=True)


def save_json(path, value):
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_weights(folder):
    """model.safetensors, else pytorch_model.bin: the path, and tensors by name."""
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_torch)):
        if (folder / name).exists():
            return folder / name, read(folder / name)
    raise ValueError(f"{folder}: no model.safetensors or pytorch_model.bin; weights in several "
                     "files are not read: save them as one")


def check_unread(file, names):
    """Name the weights that have no place in the model. Raises ValueError for parts of layers."""
    unread = [name for name in sorted(names) if not re.match(OF_NO_USE, name)]
    parts = [name for name in unread if name.startswith("bert.")]
    if parts:
        raise ValueError(f"{file}: {parts[-1]} has no place in the layers that config.json says; "
                         "fix num_hidden_layers, or merge adapters, or bake masks, before saving")
    if unread:
        print(f"{file}: not read: {', '.join(unread[:5])}", file=sys.stderr)


def checked_weight(file, name, tensor, shape):
    """A weight of the file as the model needs it, in float32. Raises ValueError."""
    if not isinstance(tensor, Tensor):            # None, or a type's name: see read_safetensors
        raise ValueError(f"{file}: {name!r} is {tensor or 'missing'}; is it a BERT, of floats?")
    if tensor.shape != shape or not tensor.is_floating_point():
        raise ValueError(f"{file}: {name!r} is {tensor.dtype} {list(tensor.shape)}, not "
                         f"float {list(shape)} as in config.json; get both again")
    weight = tensor.to(torch.float32, copy=True)
    if not weight.isfinite().all():
        raise ValueError(f"{file}: {name!r} holds NaN or infinity; get the file again")
    return weight


def read_torch(path):
    """Read what torch.save wrote: data, never code. Raises ValueError."""
    try:
        return {**torch.load(path, map_location="cpu", weights_only=True)}
    except Exception as error:                               # a damaged file raises anything
        raise ValueError(f"{path}: no plain tensors ({type(error).__name__}); damaged?") from None


# The safetensors format: 8 bytes with the header's length (little-endian), the header (JSON:
# name -> dtype, shape and where its bytes begin and end), then the bytes themselves, without gaps.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(path):
    """Read a safetensors file: name -> tensor, or the type's name if no weight can have that type.

    Raises ValueError, naming the file, unless all is as the format says.
    """
    tensors = {}
    position = 0                                                   # in the bytes of all tensors
    try:
        file = torch.from_file(str(path), size=os.path.getsize(path), dtype=torch.uint8)
        length = int.from_bytes(file[:8].numpy(), "little")
        header = json.loads(file[8:8 + length].numpy().tobytes())
        content = file[8 + length:]
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            if begin != position:
                raise ValueError(f"{name!r} overlaps, or leaves a gap")
            position = end
            if entry["dtype"] not in DTYPES:
                tensors[name] = entry["dtype"]
                continue
            raw = content[begin:end].clone()
            tensors[name] = raw.view(DTYPES[entry["dtype"]]).view(entry["shape"])
        if position != len(content):
            raise ValueError(f"{len(content) - position} bytes too many")
    except Exception as error:
        raise ValueError(f"{path}: can't be read as safetensors ({type(error).__name__}: "
                         f"{str(error)[:200]}); if it is cut, get it again") from None
    return tensors


def write_safetensors(path, tensors):
    """Write tensors in the safetensors format."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin = end
        end += tensor.nbytes
        header[name] = {"dtype": codes[tensor.dtype], "shape": tensor.shape,
                        "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                               # tensors start at a multiple of 8
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            plain = tensor.detach().cpu().contiguous().flatten()
            file.write(plain.view(torch.uint8).numpy())
