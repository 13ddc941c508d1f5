"""Task qa: cut SQuAD's questions into windows, choose answers, score them.

One idea: an answer is a span of tokens in a window. A context longer than the window is read in
several windows that overlap, each behind the whole question:

    [CLS] question [SEP] a part of the context [SEP]

In training the targets are the answer's first and last token, or [CLS] twice where a window lacks
the whole answer. The prediction is the best span over all windows of a question.

Sources: Rajpurkar et al., SQuAD, 2016 (arXiv 1606.05250), section 6.1 for the metric; Devlin et
al., BERT, 2018 (arXiv 1810.04805), section 4.2.

Shapes in comments: T tokens of a window, n of its part of the context.
"""
import re
import string
import unicodedata
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from data.squad_json import example, read, targets_agree  # noqa: F401 (task.read, ...)
from data.text import Window, run_model
from model import BertForQuestionAnswering

MODEL = BertForQuestionAnswering
HEADLINE = "f1"                              # the score that counts
SUFFIX = "json"                              # of the files it reads
KEEPS_LOGITS = True                          # memory can hold a teacher's logits on all windows


# ------------------------------------------------------------------------ text -> windows of tokens


@dataclass
class SpanWindow(Window):
    """A window, and the way back to the text."""

    context: str
    offsets: np.ndarray                      # (tokens of this part of it, 2): characters

    def text(self, first, last):
        """The context from token first to last, with the accents that follow its last letter.

        An accent may be a character of its own. The tokenizer drops it, so tokens end before it.
        """
        begin = self.offsets[first, 0]
        end = self.offsets[last, 1]
        for mark in self.context[end:]:
            if not unicodedata.category(mark).startswith("M"):
                break
            end += 1
        return self.context[begin:end]


def prepare_model(model, questions):
    """Note in the model's configuration whether "no answer" may be right."""
    model.config.reading.no_answer = bool(questions[0].may_be_empty)


def make_windows(questions, tokenizer, config):
    """Cut the contexts into windows of `max_length` tokens at most that overlap by `stride`.

    Questions are never cut. Raises ValueError where a question leaves too little room.
    """
    reading = config.reading
    cls, sep = map(tokenizer.token_to_id, ("[CLS]", "[SEP]"))
    codes = tokenizer.encode_batch([q.text for q in questions], add_special_tokens=False)
    context = None
    windows = []
    for question, code in zip(questions, codes):
        if question.context is not context:                        # once for all its questions
            context = question.context
            encoded = tokenizer.encode(context, add_special_tokens=False)
            offsets = np.array(encoded.offsets, dtype=np.int32).reshape(-1, 2)
        ids = encoded.ids
        if not ids:
            raise ValueError(f"{question.file}: question {question.id}: its context has no token; "
                             "remove it")
        start, end = answer_tokens(question, offsets)   # no answer: (-1, -1), which no window holds
        prefix = [cls, *code.ids, sep]
        room = reading.max_length - len(prefix) - 1
        if room <= reading.stride:
            raise ValueError(f"{question.file}: question {question.id:.40} leaves {room} of "
                             f"{reading.max_length} tokens, but windows overlap by "
                             f"{reading.stride}; lower train.py's --stride, or shorten it")
        for low in range(0, max(len(ids) - reading.stride, 1), room - reading.stride):
            part = slice(low, low + room)
            tokens = torch.tensor([*prefix, *ids[part], sep])
            targets = torch.tensor([0, 0])                         # [CLS]
            if low <= start and end < low + room:
                targets = torch.tensor([start, end]) - low + len(prefix)
            windows.append(SpanWindow(question.id, tokens, len(prefix), targets, context,
                                      offsets[part]))
    return windows


def answer_tokens(question, offsets):
    """The context's first and last token of the first answer; -1, -1 where there is none."""
    begin, end = question.span or (-1, -1)
    inside = np.flatnonzero((offsets[:, 1] > begin) & (offsets[:, 0] < end)).tolist() or [-1]
    return inside[0], inside[-1]


def best_span(logits, window, longest):
    """The best span inside the context: its score, first and last token (0: the context's first).

    logits: (2, T); score: start[s] + end[e], where s <= e < s + longest.
    """
    start, end = logits[:, window.first:len(window.ids) - 1]                         # (n,) each
    score = start[:, None] + end                                                     # (n, n)
    allowed = torch.ones_like(score).triu().tril(longest - 1)
    score = score.where(allowed == 1, -torch.inf)
    return score.max().item(), *divmod(score.argmax().item(), len(score))


def predict(model, tokenizer, questions):
    """The best answer to every question, by id; "" where it may be right and [CLS] scores higher.

    "No answer" has the score of [CLS] as first and last token. That is high in every window without
    the answer, and low in a window that holds it. So if any window holds an answer, the lowest of
    these scores tells, and it counts (as in BERT's script for SQuAD v2.0).
    """
    reading = model.config.reading
    windows = make_windows(questions, tokenizer, model.config)
    found = {}                                   # for each question: one entry per window
    for i, logits in run_model(model, windows):
        score, first, last = best_span(logits, windows[i], reading.max_answer)
        null_score = logits[:, 0].sum().item()
        answer = windows[i].text(first, last)
        found.setdefault(windows[i].id, []).append((score, answer, null_score))
    answers = {}
    for question in questions:
        score, answer, _ = max(found[question.id])
        null_score = min(null_score for _, _, null_score in found[question.id])
        may_be_empty = reading.no_answer if question.may_be_empty is None else question.may_be_empty
        if may_be_empty and null_score - score > reading.null_threshold:
            answer = ""
        answers[question.id] = answer
    return answers


# ----------------------------------------------------------------------------------- SQuAD's metric


def normalise(text):
    """Lower case; punctuation, articles and repeated white space dropped."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())


def f1(prediction, truth):
    """Harmonic mean of precision and recall over the words of normalised texts."""
    predicted, true = prediction.split(), truth.split()
    common = (Counter(predicted) & Counter(true)).total()
    return 2 * common / max(1, len(predicted) + len(true))


def score(predictions, questions):
    """Exact match and F1 in percent: the answer that fits best counts; a missing prediction is 0.

    Raises ValueError where no question has an answer, and none is marked as impossible.
    """
    if questions[0].may_be_empty is None:
        raise ValueError('no question has an answer to score by; see --predict, or, where "" is '
                         "right, say is_impossible")
    rows = [score_one(predictions.get(question.id), question) for question in questions]
    exact, overlap = (100 * sum(column) / len(rows) for column in zip(*rows))
    return {"exact_match": exact, "f1": overlap}


def score_one(text, question):
    """Exact match and F1 of one prediction, 0 to 1."""
    truths = [normalise(answer) for answer in question.answers]
    if question.may_be_empty:
        truths = [truth for truth in truths if truth] or [""]
    if text is None:
        return 0.0, 0.0
    said = normalise(text)
    exact = float(said in truths)
    overlap = max(f1(said, truth) for truth in truths)
    if question.may_be_empty:
        overlap = max(overlap, exact)                                       # "" for "" is right
    return exact, overlap
