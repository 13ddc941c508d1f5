"""Task qa: cut SQuAD's questions into windows, choose answers, score them.

A context longer than the window is read in several that overlap, each behind the whole question:

    [CLS] question [SEP] a part of the context [SEP]

In training the targets are the answer's first and last token, or [CLS] twice where a window lacks
the whole answer. The prediction is the best span over all windows of a question.

Sources: Rajpurkar et al., SQuAD, 2016 (arXiv 1606.05250), section 6.1 for the metric; Devlin et
al., BERT, 2018 (arXiv 1810.04805), section 4.2.

Shapes in comments: B batch, T tokens.
"""
from __future__ import annotations

import math
import re
import string
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from data.articles import Question, generated, questions_of, read  # noqa: F401 (task.read, ...)
from data.text import Settings, Window, run_model, split
from model import BertForQuestionAnswering

MODEL = BertForQuestionAnswering
HEADLINE = "f1"                              # the score that counts


# ------------------------------------------------------------------------ text -> windows of tokens


@dataclass
class SpanWindow(Window):
    """A window, and the way back to the text."""

    question: int                            # index into the questions
    offsets: np.ndarray                      # (tokens of the context part, 2): characters

    def text(self, first: int, last: int, context: str) -> str:
        """The text that the tokens from first to last stand for, with marks on its last letter."""
        begin = self.offsets[first - self.first, 0]
        end = self.offsets[last - self.first, 1]
        for mark in context[end:]:
            if not unicodedata.category(mark).startswith("M"):
                break
            end += 1
        return context[begin:end]


def make_windows(questions: list[Question], tokenizer: Tokenizer,
                 settings: Settings) -> list[SpanWindow]:
    """Cut the contexts into windows of `max_length` tokens at most that overlap by `stride`.

    Questions are never cut. Raises ValueError where a question leaves too little room.
    """
    cls = tokenizer.token_to_id("[CLS]")
    sep = tokenizer.token_to_id("[SEP]")
    contexts = encode_contexts(questions, tokenizer)
    codes = tokenizer.encode_batch([q.text for q in questions], add_special_tokens=False)
    windows = []
    long = 0                                                       # answers beyond --max-answer
    for index, (question, code) in enumerate(zip(questions, codes)):
        ids, offsets = contexts[question.context]
        start, end = answer_tokens(question, offsets)              # -1, in no window: no answer
        long += end - start >= settings.max_answer
        prefix = [cls, *code.ids, sep]
        room = settings.max_length - len(prefix) - 1
        step = room - settings.stride
        if step <= 0:
            raise ValueError(f"{question.file}: question {question.id} leaves {room} of "
                             f"{settings.max_length} tokens, but windows overlap by "
                             f"{settings.stride}; shorten it, lower --stride or raise --max-length")
        for low in range(0, max(len(ids) - settings.stride, 1), step):
            part = slice(low, low + room)
            shift = len(prefix) - low                              # of a token's place
            targets = torch.tensor([0, 0])                         # [CLS]
            if low <= start and end < low + room:
                targets = torch.tensor([start + shift, end + shift])
            tokens = torch.tensor([*prefix, *ids[part], sep])
            window = SpanWindow(id=question.id, ids=tokens, first=len(prefix), targets=targets,
                                question=index, offsets=offsets[part])
            windows.append(window)
    if long:
        print(f"{long} answers have more than --max-answer {settings.max_answer} tokens: too long "
              "to be predicted", file=sys.stderr)
    return windows


def encode_contexts(questions: list[Question], tokenizer: Tokenizer
                    ) -> dict[str, tuple[list[int], np.ndarray]]:
    """The tokens of every context, once, and the characters they stand for, (tokens, 2)."""
    contexts = list(dict.fromkeys(question.context for question in questions))
    encoded = {}
    codes = tokenizer.encode_batch(contexts, add_special_tokens=False)
    for context, code in zip(contexts, codes):
        offsets = np.array(code.offsets, dtype=np.int32)
        encoded[context] = code.ids, offsets.reshape(-1, 2)
    return encoded


def answer_tokens(question: Question, offsets: np.ndarray) -> tuple[int, int]:
    """The context's first and last token of the first answer; -1, -1 where there is none."""
    if question.span is None:
        return -1, -1
    begin, end = question.span
    reaches = offsets[:, 1] > begin
    starts = offsets[:, 0] < end
    inside = np.flatnonzero(reaches & starts).tolist()
    if not inside:
        return -1, -1
    return inside[0], inside[-1]


def best_spans(logits: Tensor, segments: Tensor, longest: int = 30
               ) -> tuple[Tensor, Tensor, Tensor]:
    """The best span of every window: score, first token, last token, each (B,).

    logits: (B, 2, T); segments: (B, T), 1 for the context and the [SEP] behind it.
    Score: start[s] + end[e], where s <= e < s + longest and both lie in the context.
    """
    longest = min(longest, logits.shape[-1])
    before_last = F.pad(segments[:, 1:], (0, 1))
    context = (segments * before_last).bool()                                            # (B, T)
    logits = logits.masked_fill(~context[:, None], -torch.inf)
    start, end = logits.unbind(1)                                                        # (B, T)
    reach = F.pad(end, (0, longest - 1), value=-torch.inf)
    best_end, length = reach.unfold(1, longest, 1).max(-1)                    # of (B, T, longest)
    score, first = (start + best_end).max(-1)
    last = first + length.gather(1, first[:, None])[:, 0]
    return score, first, last


def predict(model: nn.Module, tokenizer: Tokenizer, questions: list[Question],
            settings: Settings) -> dict[str, str]:
    """The best answer to every question, by id; for SQuAD v2.0, "" where [CLS] scores higher.

    Works on 256 questions at a time, so that memory stays bounded. Raises ArithmeticError where the
    logits are no numbers.
    """
    answers = {}
    for chunk in tqdm(split(questions, 256), "evaluate", leave=False, disable=None):
        windows = make_windows(chunk, tokenizer, settings)
        best = [(-math.inf, None, 0, 0)] * len(chunk)             # score, window, first, last token
        null = [math.inf] * len(chunk)                            # score of no answer
        for indices, inputs, logits in run_model(model, windows, tokenizer.token_to_id("[PAD]")):
            spans = best_spans(logits, inputs[2], settings.max_answer)
            none = logits[:, :, 0].sum(1)                         # start and end at [CLS], (B,)
            found = torch.stack([none, *spans], 1).tolist()       # B rows of four numbers
            for i, (none, score, first, last) in zip(indices, found):
                q = windows[i].question
                null[q] = min(null[q], none)
                if score > best[q][0]:
                    best[q] = (score, windows[i], int(first), int(last))
        for question, none, answer in zip(chunk, null, best):
            score, window, first, last = answer
            if not math.isfinite(none) or window is None:
                raise ArithmeticError(f"{question.file}: question {question.id}: the logits are no "
                                      "numbers, or the context holds no token")
            answers[question.id] = window.text(first, last, question.context)
            if question.v2 and none - score > settings.null_threshold:
                answers[question.id] = ""
    return answers


def ask(model: nn.Module, tokenizer: Tokenizer, text: str, path: str | None) -> str:
    """The answer to one question from a text file. Raises ValueError or OSError."""
    if not path:
        raise ValueError("--ask needs a text to find the answer in; give --context FILE")
    context = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    entry = {"id": "--ask", "question": text, "answers": []}
    article = {"paragraphs": [{"context": context, "qas": [entry]}]}
    questions = questions_of({"data": [article]}, path)
    length = min(384, model.config.max_position_embeddings)
    return predict(model, tokenizer, questions, Settings(length, length // 3))["--ask"]


# ----------------------------------------------------------------------------------- SQuAD's metric


def normalise(text: str) -> str:
    """Lower case; punctuation, articles and repeated white space dropped."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())


def f1(prediction: str, truth: str) -> float:
    """Harmonic mean of precision and recall over words."""
    predicted = normalise(prediction).split()
    true = normalise(truth).split()
    common = (Counter(predicted) & Counter(true)).total()
    if common == 0:
        return 0.0
    return 2 * common / (len(predicted) + len(true))


def score(predictions: dict[str, str], questions: list[Question]) -> dict[str, float]:
    """Exact match and F1 in percent: a question's best answer counts, a missing prediction is 0.

    For v2.0 also under its own names: exact, f1, total; HasAns_... and NoAns_... for the questions
    that have an answer and those that have none, where "" is right.
    """
    rows = [score_one(predictions.get(question.id), question) for question in questions]
    result = means(rows)
    short = {"exact_match": result["exact"], "f1": result["f1"]}
    if not questions[0].v2:
        return short
    for prefix, wanted in (("HasAns", True), ("NoAns", False)):
        part = [row for row, q in zip(rows, questions) if bool(q.answers) == wanted]
        if part:
            result |= {f"{prefix}_{name}": value for name, value in means(part).items()}
    return {**short, **result}


def means(rows: list[tuple[float, float]]) -> dict[str, float]:
    exact, overlap = (100 * sum(column) / len(rows) for column in zip(*rows))
    return {"exact": exact, "f1": overlap, "total": len(rows)}


def score_one(text: str | None, question: Question) -> tuple[float, float]:
    """Exact match and F1 of one prediction, 0 to 1."""
    answers = question.answers
    if question.v2:
        answers = [answer for answer in answers if normalise(answer)] or [""]
    if text is None or not answers:
        return 0.0, 0.0
    exact = float(normalise(text) in map(normalise, answers))
    overlap = max(f1(text, answer) for answer in answers)
    if question.v2:
        overlap = max(overlap, exact)                                       # "" for "" is right
    return exact, overlap
