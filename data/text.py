"""Text and tensors, the same for every task: a saved model's tokenizer; windows -> batches.

One idea: a task cuts its examples into windows, and from there on all tasks are alike. A window has
tokens of type 0, of which the first is [CLS], then tokens of type 1. `collate` makes the model's
inputs of some windows, padded to the longest of them.

Shapes in comments: B batch, T tokens, N targets of a batch, n of a window.
"""
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer, Tokenizer
from tokenizers.normalizers import BertNormalizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.run import progress_bar
from model import read_json

TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json")
SPECIAL = ("[CLS]", "[SEP]", "[PAD]", "[UNK]")
NORMALIZER = {                               # name in tokenizers: name in tokenizer_config.json
    "lowercase": "do_lower_case",
    "strip_accents": "strip_accents",
    "handle_chinese_chars": "tokenize_chinese_chars",
}
TOKENIZERS = ("BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass
class Window:
    """What the model reads, and what it should say."""

    id: str                                  # the example's
    ids: Tensor                              # (T,) tokens
    first: int                               # where type 1 begins; T, if it doesn't
    targets: Tensor                          # (n,) one class, token or position each


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """A checkpoint's WordPiece tokenizer: tokenizer.json, else vocab.txt. Raises ValueError."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.exists():
        path = folder / "vocab.txt"
    settings = read_if_there(folder / "tokenizer_config.json")
    kind = settings.get("tokenizer_class") or "BertTokenizer"
    if kind not in TOKENIZERS:
        raise ValueError(f"{folder}: its tokenizer is a {kind}; give one of {TOKENIZERS}")
    try:
        if path.name == "vocab.txt":
            tokenizer = Tokenizer.from_str(BertWordPieceTokenizer(str(path)).to_str())
        else:
            tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if kind.startswith("Bert"):
            apply_settings(tokenizer, settings, path)
        tokenizer.encode("\u2603")             # some tokenizers panic over an unknown character
    except KeyboardInterrupt:
        raise
    except BaseException as error:             # a panic of the library is a BaseException only
        raise ValueError(f"{path}: no readable tokenizer ({error}); is it all there?") from None
    for token in SPECIAL:
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"{path}: has no {token}; is it BERT's?")
    return tokenizer


def apply_settings(tokenizer, settings, path):
    """What tokenizer_config.json says wins over tokenizer.json, as in transformers."""
    if isinstance(tokenizer.normalizer, BertNormalizer):
        for name, theirs in NORMALIZER.items():
            if theirs in settings:
                setattr(tokenizer.normalizer, name, settings[theirs])
    if path.name != "vocab.txt":
        return
    added = [*read_if_there(path.with_name("added_tokens.json"))]
    added += settings.get("additional_special_tokens") or []
    added += [entry["content"] for entry in settings.get("added_tokens_decoder", {}).values()]
    added = {*added} - {*SPECIAL, "[MASK]"}
    if added:
        raise ValueError(f"tokens were added ({', '.join(added)}), which vocab.txt can't mark; "
                         "save a tokenizer.json with transformers")


def read_if_there(path):
    return read_json(path) if path.exists() else {}


def copy_tokenizer(source, folder):
    """Copy a checkpoint's tokenizer, in place of the one that the folder may hold."""
    for name in TOKENIZER_FILES:
        old, new = Path(source, name), Path(folder, name)
        new.unlink(missing_ok=True)
        if old.exists():
            shutil.copyfile(old, new)


def batches(windows, size, epoch, seed):
    """One epoch's batches of window indices, in random order.

    Windows of a batch have similar lengths, so that little is padded: chunks of 50 batches are
    sorted before they are cut.
    """
    rng = random.Random(f"{seed} {epoch}")
    order = list(range(len(windows)))
    rng.shuffle(order)
    result = []
    for chunk in split(order, 50 * size):
        result += split(sorted(chunk, key=lambda i: len(windows[i].ids)), size)
    rng.shuffle(result)
    return result


def split(items, size):
    """The items in lists of `size`; the last may be shorter."""
    return [items[low:low + size] for low in range(0, len(items), size)]


def collate(windows, device):
    """The model's inputs (input_ids, attention_mask, token_type_ids), (B, T) each; targets (N,)."""
    ids = pad_sequence([w.ids for w in windows], batch_first=True)    # (B, T); 0 is padding
    length = torch.tensor([[len(w.ids)] for w in windows])                             # (B, 1)
    first = torch.tensor([[w.first] for w in windows])                                 # (B, 1)
    position = torch.arange(ids.shape[1])                                              # (T,)
    mask = (position < length).long()                                                  # (B, T)
    segments = (position >= first).long() * mask                                       # (B, T)
    targets = torch.cat([w.targets for w in windows])
    inputs = tuple(tensor.to(device) for tensor in (ids, mask, segments))
    return inputs, targets.to(device)


@torch.inference_mode()
def run_model(model, windows, call=None):
    """Yields the index of each window, in no particular order, and what the model makes of it.

    call: a function of the model's inputs, to be called instead of the model (as generation.py
    does, to write its texts).
    Raises ArithmeticError for logits that are not finite.
    """
    model.eval()
    device = next(model.parameters()).device
    # Long windows come first, so that the others can reuse the memory that these took.
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))
    for indices in progress_bar(split(order, 32), "evaluate"):
        inputs, _ = collate([windows[i] for i in indices], device)
        results = (call or model)(*inputs).cpu()
        if not results.isfinite().all():
            raise ArithmeticError(f"example {windows[indices[0]].id} or one of its length: the "
                                  "logits are not finite")
        yield from zip(indices, results)
