"""Text and tensors, the same for every task: a saved model's tokenizer; windows -> batches.

A task cuts its examples into windows, [CLS] first segment [SEP] second segment [SEP]; from there on
nothing in the project needs to know which task it is.

Shapes in comments: B batch, T tokens, N targets of a batch, n of a window.
"""
from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer, Tokenizer
from tokenizers.normalizers import BertNormalizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from model import read_json, whole_file

TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "added_tokens.json")
TOKENIZERS = ("BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass
class Settings:
    """How a task cuts texts and chooses answers: the command line's flags of these names."""

    max_length: int = 384                    # tokens in a window
    stride: int = 128                        # tokens by which two windows overlap
    max_answer: int = 30                     # tokens in an answer
    null_threshold: float = 0.0              # no answer where [CLS] scores higher by more


@dataclass
class Window:
    """What the model reads, and what it should say."""

    id: str                                  # the example's
    ids: Tensor                              # (T,) tokens
    first: int                               # the position of the second segment's first token
    targets: Tensor                          # (n,) one class, token or position each


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """A checkpoint's WordPiece tokenizer: tokenizer.json, else vocab.txt. Raises ValueError."""
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        path = Path(folder) / "vocab.txt"
    settings = read_if_there(Path(folder) / "tokenizer_config.json")
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
        tokenizer.encode("\u2603")
    except BaseException as error:                   # the library's are no Exception, some of them
        raise ValueError(f"{path}: no readable tokenizer ({error}); is it all there?") from None
    for token in ("[CLS]", "[SEP]", "[PAD]", "[UNK]"):
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"{path}: has no {token}; is it BERT's?")
    return tokenizer


def apply_settings(tokenizer: Tokenizer, settings: dict, path: Path):
    """What tokenizer_config.json says counts, also against tokenizer.json, as in transformers."""
    normal = json.loads(tokenizer.to_str())["normalizer"] or {}
    if normal.get("type") == "BertNormalizer":
        tokenizer.normalizer = BertNormalizer(
            lowercase=settings.get("do_lower_case", normal["lowercase"]),
            strip_accents=settings.get("strip_accents", normal["strip_accents"]),
            handle_chinese_chars=settings.get("tokenize_chinese_chars",
                                              normal["handle_chinese_chars"]),
        )
    if path.name != "vocab.txt":
        return
    words = [token for token in tokenizer.get_vocab() if token[:1] != "["]
    if "do_lower_case" not in settings and any(word != word.lower() for word in words):
        print(f"{path}: has words with capitals, but all text is lower-cased; if that is wrong, "
              'say "do_lower_case": false in tokenizer_config.json', file=sys.stderr)
    added = read_if_there(path.with_name("added_tokens.json"))
    tokenizer.add_tokens(sorted(added, key=added.get))
    for token, number in added.items():
        if tokenizer.token_to_id(token) != number:
            raise ValueError(f"{path.with_name('added_tokens.json')}: {token!r} can't be {number}")


def read_if_there(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


def copy_tokenizer(source: str | Path, folder: str | Path):
    """Copy a checkpoint's tokenizer, in place of the one that the folder may hold."""
    for name in TOKENIZER_FILES:
        (Path(folder) / name).unlink(missing_ok=True)
        if (Path(source) / name).exists():
            with whole_file(Path(folder) / name) as file:
                file.write((Path(source) / name).read_bytes())


def batches(windows: list[Window], size: int, epoch: int, seed: int) -> list[list[int]]:
    """One epoch's batches of window indices, of similar length: sorted in chunks of 50 batches."""
    rng = random.Random(f"{seed} {epoch}")
    order = list(range(len(windows)))
    rng.shuffle(order)
    result = []
    for low in range(0, len(order), 50 * size):
        chunk = by_length(windows, order[low:low + 50 * size])
        result += split(chunk, size)
    rng.shuffle(result)
    return result


def by_length(windows: list[Window], indices: list[int]) -> list[int]:
    return sorted(indices, key=lambda i: len(windows[i].ids))


def split(items: list, size: int) -> list[list]:
    """The items in lists of `size`; the last may be shorter."""
    return [items[low:low + size] for low in range(0, len(items), size)]


def collate(windows: list[Window], pad: int, device: torch.device
            ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """The model's inputs (input_ids, attention_mask, token_type_ids), (B, T) each; targets (N,)."""
    ids = pad_sequence([w.ids for w in windows], batch_first=True, padding_value=pad)
    length = torch.tensor([len(w.ids) for w in windows])                               # (B,)
    first = torch.tensor([w.first for w in windows])                                   # (B,)
    position = torch.arange(ids.shape[1])                                              # (T,)
    mask = (position < length[:, None]).long()                                         # (B, T)
    segments = (position >= first[:, None]).long() * mask                              # (B, T)
    targets = torch.cat([w.targets for w in windows])
    inputs = tuple(tensor.to(device) for tensor in (ids, mask, segments))
    return inputs, targets.to(device)


@torch.inference_mode()
def run_model(model: nn.Module, windows: list[Window], pad: int, size: int = 32
              ) -> Iterator[tuple[list[int], tuple[Tensor, Tensor, Tensor], Tensor]]:
    """All windows in batches of similar length: their indices, the model's inputs, its logits."""
    model.eval()
    device = next(model.parameters()).device
    order = by_length(windows, range(len(windows)))
    for indices in split(order[::-1], size):                   # long ones first: memory is reused
        inputs, _ = collate([windows[i] for i in indices], pad, device)
        yield indices, inputs, model(*inputs)
