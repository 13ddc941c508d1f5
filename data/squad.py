"""SQuAD: reading its JSON, cutting it into windows a model can read, choosing answers, scoring them.

A context longer than the model's window is read in overlapping windows, each behind the whole question:

    [CLS] question [SEP] a part of the context [SEP]

In training the target is the answer's first and last token, or [CLS] where a window lacks the whole
answer. The prediction is the best span over all windows of a question.

Sources: Rajpurkar et al., SQuAD, 2016 (arXiv 1606.05250), section 6.1 for the metric; Devlin et al.,
BERT, 2018 (arXiv 1810.04805), section 4.2.
"""
from __future__ import annotations

import json
import re
import string
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass
class Question:
    id: str
    text: str
    context: str
    answers: list[str]                       # every text that counts as right
    span: tuple[int, int] | None             # characters of the first answer


def read_squad(path: str | Path) -> list[Question]:
    """Read a file in SQuAD's format. Raises ValueError, naming the place, or OSError."""
    try:
        articles = json.loads(Path(path).read_text(encoding="utf-8-sig"))["data"]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    except (KeyError, TypeError):
        raise ValueError(f"{path}: no list \"data\"; is this SQuAD's format?") from None
    return questions_of(articles, path)


def questions_of(articles: list, path: str | Path) -> list[Question]:
    """The questions in SQuAD's list of articles; `path` names them in errors."""
    def get(entry, key, kind, place):
        if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
            name = {str: "text", list: "list", int: "number"}[kind]
            raise ValueError(f"{path}: {place}: no {name} \"{key}\"; is this SQuAD's format?")
        if kind is str and not entry[key].strip():
            raise ValueError(f"{path}: {place}: \"{key}\" is empty; fill it in or remove the entry")
        return entry[key]

    questions, seen = [], set()
    for a, article in enumerate(get({"data": articles}, "data", list, "top level")):
        for p, paragraph in enumerate(get(article, "paragraphs", list, f"data[{a}]")):
            place = f"data[{a}].paragraphs[{p}]"
            context = get(paragraph, "context", str, place)
            for q, entry in enumerate(get(paragraph, "qas", list, place)):
                id_ = get(entry, "id", str, f"{place}.qas[{q}]")
                text = get(entry, "question", str, f"question {id_}").strip()
                spans = []
                for answer in get(entry, "answers", list, f"question {id_}"):
                    begin = get(answer, "answer_start", int, f"question {id_}")
                    end = begin + len(get(answer, "text", str, f"question {id_}"))
                    if begin < 0 or simplified(context[begin:end]) != simplified(answer["text"]):
                        raise ValueError(f"{path}: question {id_}: answer {answer['text']!r} is not at its offset "
                                         f"{begin}, where the context has {context[max(begin, 0):end]!r}; mend answer_start")
                    spans.append((begin, end))
                if id_ in seen:
                    print(f"{path}: question id {id_} occurs more than once", file=sys.stderr)
                seen.add(id_)
                questions.append(Question(id_, text, context, [answer["text"] for answer in entry["answers"]],
                                          spans[0] if spans else None))
    if not questions:
        raise ValueError(f"{path}: holds no question")
    return questions


def simplified(text: str) -> str:
    """One spelling for texts that differ in white space, case or Unicode form only."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# ------------------------------------------------------------------------------- text -> windows of tokens


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The WordPiece tokenizer of a checkpoint: tokenizer.json, else vocab.txt. Raises ValueError."""
    folder = Path(folder)
    try:
        if (path := folder / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_truncation()
            tokenizer.no_padding()
        elif (path := folder / "vocab.txt").exists():
            settings = folder / "tokenizer_config.json"
            settings = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
            tokenizer = Tokenizer(models.WordPiece.from_file(str(path), unk_token="[UNK]"))
            tokenizer.normalizer = normalizers.BertNormalizer(lowercase=settings.get("do_lower_case", True))
            tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        else:
            raise ValueError("neither tokenizer.json nor vocab.txt; is the download complete?")
    except Exception as error:         # the library raises bare Exceptions
        raise ValueError(f"{path}: cannot be read as a tokenizer ({error})") from None
    for token in ("[CLS]", "[SEP]", "[PAD]"):
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"{path}: has no {token}; is it BERT's?")
    return tokenizer


@dataclass
class Window:
    """One window of one question: what the model reads, and the way back to the text."""

    question: int                            # index into the questions
    ids: Tensor                              # (T,) [CLS] question [SEP] context part [SEP]
    first: int                               # the position of the context part's first token
    offsets: np.ndarray                      # (tokens of the context part, 2): characters
    start: int = 0                           # target positions; 0, which is [CLS], where there is none
    end: int = 0


def make_windows(questions: list[Question], tokenizer: Tokenizer, max_length: int, stride: int) -> list[Window]:
    """Cut every question's context into windows of `max_length` tokens that overlap by `stride`.

    The question is never cut. Raises ValueError where it, or the stride, leaves no room for the context.
    """
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    contexts = list(dict.fromkeys(question.context for question in questions))
    encode = {"add_special_tokens": False}
    encoded = {text: (np.array(code.ids, dtype=np.int64), np.array(code.offsets).reshape(-1, 2))
               for text, code in zip(contexts, tokenizer.encode_batch(contexts, **encode))}
    heads = tokenizer.encode_batch([question.text for question in questions], **encode)
    windows = []
    for index, (question, head) in enumerate(zip(questions, heads)):
        ids, offsets = encoded[question.context]
        prefix = [cls, *head.ids, sep]
        room = max_length - len(prefix) - 1
        if room <= stride:
            raise ValueError(f"question {question.id}: its {len(head.ids)} tokens leave room for {max(room, 0)} of the "
                             f"context in a window of {max_length}, which is not more than the overlap of {stride}; "
                             f"raise --max-length or lower --stride")
        begin, end = question.span or (0, 0)
        inside = np.flatnonzero((offsets[:, 1] > begin) & (offsets[:, 0] < end))       # the answer's tokens
        for low in range(0, max(len(ids) - stride, 1), room - stride):
            part = slice(low, low + room)
            window = Window(index, torch.tensor([*prefix, *ids[part], sep]), len(prefix), offsets[part])
            if len(inside) and low <= inside[0] and inside[-1] < low + room:
                window.start, window.end = (len(prefix) + int(inside[i]) - low for i in (0, -1))
            windows.append(window)
    return windows


def collate(windows: list[Window], pad: int) -> dict[str, Tensor]:
    """Pad windows to the longest: what the model takes, its targets, and where the context lies."""
    ids = pad_sequence([window.ids for window in windows], batch_first=True, padding_value=pad)    # (B, T)
    length = torch.tensor([len(window.ids) for window in windows])[:, None]                        # (B, 1)
    first = torch.tensor([window.first for window in windows])[:, None]
    position = torch.arange(ids.shape[1])                                                          # (T,)
    return {"input_ids": ids, "attention_mask": position < length,
            "token_type_ids": ((position >= first) & (position < length)).long(),
            "context": (position >= first) & (position < length - 1),
            "start": torch.tensor([window.start for window in windows]),                           # (B,)
            "end": torch.tensor([window.end for window in windows])}


def best_spans(start: Tensor, end: Tensor, context: Tensor, longest: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    """The best span of every window: score, first and last token, each (B,).

    start, end, context (B, T). The score is start[s] + end[e], s <= e < s + longest, both in the context.
    """
    start, end = (logits.masked_fill(~context, -torch.inf) for logits in (start, end))
    reach = torch.nn.functional.pad(end, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)   # (B, T, longest)
    best_end, length = reach.max(-1)
    score, first = (start + best_end).max(-1)
    return score, first, first + length.gather(1, first[:, None])[:, 0]


# -------------------------------------------------------------------------------------- SQuAD v1.1's metric


def normalise(text: str) -> str:
    """Lower case; punctuation, articles and repeated white space dropped."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(prediction: str, truth: str) -> float:
    """Harmonic mean of precision and recall over words."""
    predicted, true = normalise(prediction).split(), normalise(truth).split()
    common = (Counter(predicted) & Counter(true)).total()
    return 2 * common / (len(predicted) + len(true)) if common else 0.0


def score(predictions: dict[str, str], questions: list[Question]) -> dict[str, float]:
    """Exact match and F1 in percent; each question counts its best answer, a missing prediction 0."""
    exact = overlap = 0.0
    for question in questions:
        text = predictions.get(question.id)
        if text is not None and question.answers:
            exact += max(normalise(text) == normalise(answer) for answer in question.answers)
            overlap += max(f1(text, answer) for answer in question.answers)
    return {"exact_match": 100 * exact / len(questions), "f1": 100 * overlap / len(questions)}
