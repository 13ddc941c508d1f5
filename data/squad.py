"""SQuAD: read its JSON, cut it into windows that a model can read, choose answers, score them.

A context longer than the window is read in several that overlap, each behind the whole question:

    [CLS] question [SEP] a part of the context [SEP]

In training the target is the answer's first and last token, or [CLS] where a window lacks the whole
answer. The prediction is the best span over all windows of a question.

Sources: Rajpurkar et al., SQuAD, 2016 (arXiv 1606.05250), section 6.1 for the metric; Devlin et
al., BERT, 2018 (arXiv 1810.04805), section 4.2.

Shapes in comments: B batch, T tokens.
"""
import math
import random
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import BertWordPieceTokenizer, Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from model import read_json


@dataclass
class Question:
    id: str
    text: str
    context: str
    answers: list[str]                       # every text that counts as right
    span: tuple[int, int] | None             # characters of the first answer
    v2: bool = False                         # SQuAD v2.0: "no answer", "", may be right
    file: str | Path = field(default="", repr=False)                   # it came from, for errors


def read_squad(path: str | Path) -> list[Question]:
    """Read a file in SQuAD's format, v1.1 or v2.0. Raises ValueError, naming the place, or OSError.
    """
    file = read_json(path)
    return questions_of(file.get("data"), path, bool(re.match(r"v?2\b", f"{file.get('version')}")))


def read_predictions(path: str | Path) -> dict[str, str]:
    """Read a predictions file: question id -> text. Raises ValueError or OSError."""
    value = read_json(path)
    if not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"{path}: not predictions; they map every question's id to a text")
    return value


def questions_of(articles: list, path: str | Path, v2: bool = False) -> list[Question]:
    """The questions in SQuAD's list of articles; `path` names them in errors."""
    def get(entry, key, kind, place):
        if not isinstance(entry, dict) or type(entry.get(key)) is not kind:
            raise ValueError(f"{path}: {place}: no {kind.__name__} {key!r}; is it SQuAD's format?")
        if kind is str and (not entry[key].strip() or re.search("[\ud800-\udfff]", entry[key])):
            raise ValueError(f"{path}: {place}: {key!r} is empty or not UTF-8; mend or remove it")
        return entry[key]

    questions = []
    for a, article in enumerate(get({"data": articles}, "data", list, "top level")):
        for p, paragraph in enumerate(get(article, "paragraphs", list, f"data[{a}]")):
            place = f"data[{a}].paragraphs[{p}]"
            context = get(paragraph, "context", str, place)
            for q, entry in enumerate(get(paragraph, "qas", list, place)):
                id_ = get(entry, "id", str, f"{place}.qas[{q}]")
                here = f"question {id_}"
                text = get(entry, "question", str, here).strip()
                answers, span = [], None
                for answer in get(entry, "answers", list, here):
                    answers.append(get(answer, "text", str, here))
                    begin = get(answer, "answer_start", int, here)
                    ends = [begin + len(answers[-1]) + n for n in sorted(range(-20, 21), key=abs)]
                    end = next((end for end in ends if end > begin >= 0 and    # in another form,
                                simplified(context[begin:end]) == simplified(answers[-1])), None)
                    if end is None:                                    # it may be longer or shorter
                        raise ValueError(f"{path}: {here}: {answers[-1][:80]!r} is not at its "
                                         f"offset {begin}; mend or remove it")
                    span = span or (begin, end)
                questions.append(Question(id_, text, context, answers, span, v2, path))
    if not questions:
        raise ValueError(f"{path}: holds no question; is it the right file?")
    if again := [id_ for id_, n in Counter(q.id for q in questions).items() if n > 1]:
        print(f"{path}: {len(again)} ids occur more than once, as {again[0]} does", file=sys.stderr)
    return questions


def simplified(text: str) -> str:
    """One spelling for texts that differ in white space, case or Unicode form only."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# ------------------------------------------------------------------------ text -> windows of tokens


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """A checkpoint's WordPiece tokenizer: tokenizer.json, else vocab.txt. Raises ValueError."""
    path, settings = Path(folder) / "tokenizer.json", Path(folder) / "tokenizer_config.json"
    try:
        if path.exists():
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_truncation(), tokenizer.no_padding(), tokenizer.encode("\u2603")
        else:
            path = Path(folder) / "vocab.txt"
            lower = (read_json(settings) if settings.exists() else {}).get("do_lower_case", True)
            tokenizer = BertWordPieceTokenizer(str(path), lowercase=lower)
    except BaseException as error:                   # the library's are no Exception, some of them
        raise ValueError(f"{path}: no readable tokenizer ({error}); is it all there?") from None
    for token in ("[CLS]", "[SEP]", "[PAD]", "[UNK]"):
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
    id: str                                  # the question's
    start: int = 0                           # target positions; 0, [CLS], where there is none
    end: int = 0

    def text(self, first: int, last: int) -> slice:
        """The characters of the context that the tokens from first to last stand for."""
        return slice(self.offsets[first - self.first, 0], self.offsets[last - self.first, 1])


def make_windows(questions: list[Question], tokenizer: Tokenizer, max_length: int,
                 stride: int) -> list[Window]:
    """Cut the contexts into windows of at most `max_length` tokens that overlap by `stride`.

    Questions are never cut. Raises ValueError where a question leaves too little room.
    """
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    contexts = list(dict.fromkeys(question.context for question in questions))
    codes = tokenizer.encode_batch(contexts, add_special_tokens=False)
    encoded = {context: (code.ids, np.array(code.offsets, dtype=np.int32).reshape(-1, 2))
               for context, code in zip(contexts, codes)}
    codes = tokenizer.encode_batch([q.text for q in questions], add_special_tokens=False)
    windows = []
    for index, (question, code) in enumerate(zip(questions, codes)):
        ids, offsets = encoded[question.context]
        prefix = [cls, *code.ids, sep]
        room = max_length - len(prefix) - 1
        if room <= stride:
            raise ValueError(f"{question.file}: question {question.id} leaves {room} of "
                             f"{max_length} tokens, but windows overlap by {stride}; shorten it, "
                             "lower --stride or raise --max-length")
        begin, end = question.span or (0, 0)
        answer = np.flatnonzero((offsets[:, 1] > begin) & (offsets[:, 0] < end))       # its tokens
        for low in range(0, max(len(ids) - stride, 1), room - stride):
            part = slice(low, low + room)
            tokens = torch.tensor([*prefix, *ids[part], sep])
            window = Window(index, tokens, len(prefix), offsets[part], question.id)
            if len(answer) and low <= answer[0] and answer[-1] < low + room:
                window.start, window.end = (len(prefix) + int(answer[i]) - low for i in (0, -1))
            windows.append(window)
    return windows


def batches(windows: list[Window], size: int, epoch: int, seed: int) -> list[list[int]]:
    """One epoch's batches of window indices, of similar length: sorted in chunks of 50 batches."""
    rng, order = random.Random(f"{seed} {epoch}"), list(range(len(windows)))
    rng.shuffle(order)
    chunks = (order[i:i + 50 * size] for i in range(0, len(order), 50 * size))
    order = [i for chunk in chunks for i in sorted(chunk, key=lambda i: len(windows[i].ids))]
    result = [order[i:i + size] for i in range(0, len(order), size)]
    rng.shuffle(result)
    return result


def collate(windows: list[Window], pad: int, device: torch.device) -> dict:
    """Pad windows to the longest: the model's inputs, its targets, and where the context lies."""
    ids = nn.utils.rnn.pad_sequence([w.ids for w in windows], True, pad)               # (B, T)
    numbers = [(len(w.ids), w.first, w.start, w.end) for w in windows]
    length, first, start, end = torch.tensor(numbers, device=device).unbind(1)         # (B,) each
    position = torch.arange(ids.shape[1], device=device)                               # (T,)
    mask, second = position < length[:, None], position >= first[:, None]              # (B, T)
    return {"inputs": (ids.to(device), mask, (second & mask).long()), "mask": mask, "start": start,
            "end": end, "context": second & (position < length[:, None] - 1)}


def best_spans(start: Tensor, end: Tensor, context: Tensor,
               longest: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    """The best span of every window: score, first token, last token, each (B,).

    start, end, context: (B, T). Score: start[s] + end[e], s <= e < s + longest, in the context.
    """
    start, end = (logits.masked_fill(~context, -torch.inf) for logits in (start, end))
    reach = nn.functional.pad(end, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)
    best_end, length = reach.max(-1)                                          # of (B, T, longest)
    score, first = (start + best_end).max(-1)
    return score, first, first + length.gather(1, first[:, None])[:, 0]


@torch.inference_mode()
def logits_of(model: nn.Module, windows: list[Window], pad: int,
              size: int = 32) -> Iterator[tuple[list[int], dict, Tensor, Tensor]]:
    """All windows in batches of similar length: indices, batch, start and end logits (B, T)."""
    model.eval()
    order = sorted(range(len(windows)), key=lambda i: len(windows[i].ids))
    for low in reversed(range(0, len(order), size)):           # long ones first: memory is reused
        indices = order[low:low + size]
        batch = collate([windows[i] for i in indices], pad, next(model.parameters()).device)
        yield indices, batch, *model(*batch["inputs"])


def chunks(questions: list[Question], tokenizer: Tokenizer, max_length: int,
           stride: int) -> Iterator[tuple[list[Question], list[Window]]]:
    """256 questions at a time and their windows, so that memory stays bounded."""
    for low in range(0, len(questions), 256):
        chunk = questions[low:low + 256]
        yield chunk, make_windows(chunk, tokenizer, max_length, stride)


def predict(model: nn.Module, tokenizer: Tokenizer, questions: list[Question], max_length: int,
            stride: int, null_threshold: float = 0.0) -> dict[str, str]:
    """The best answer to every question, by id; for SQuAD v2.0, "" where [CLS] scores higher.

    Raises ArithmeticError where the logits are no numbers.
    """
    answers, pad = {}, tokenizer.token_to_id("[PAD]")
    for chunk, windows in tqdm(chunks(questions, tokenizer, max_length, stride), "evaluate",
                               math.ceil(len(questions) / 256), leave=False, disable=None):
        best, null = [(-math.inf, "")] * len(chunk), [math.inf] * len(chunk)
        for indices, batch, start, end in logits_of(model, windows, pad):
            found = start[:, 0] + end[:, 0], *best_spans(start, end, batch["context"])
            for i, none, score, first, last in zip(indices, *(x.tolist() for x in found)):
                q = windows[i].question
                null[q] = min(null[q], none)
                if score > best[q][0]:
                    best[q] = score, chunk[q].context[windows[i].text(first, last)]
        for question, none, (score, text) in zip(chunk, null, best):
            if not math.isfinite(none):
                raise ArithmeticError(f"{question.file}: question {question.id}: the logits are no "
                                      "numbers; is the model whole?")
            answers[question.id] = "" if question.v2 and none - score > null_threshold else text
    return answers


# ----------------------------------------------------------------------------------- SQuAD's metric


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
    """Exact match and F1 in percent: a question's best answer counts, a missing prediction is 0.

    For v2.0 also under its own names: exact, f1, total; HasAns_... and NoAns_... for the questions
    that have an answer and those that have none, where "" is right.
    """
    rows = []                                                        # (has an answer, exact, F1)
    for question in questions:
        text, answers = predictions.get(question.id), question.answers
        if question.v2:
            answers = [answer for answer in answers if normalise(answer)] or [""]
        exact = overlap = 0.0
        if text is not None and answers:
            exact = float(max(normalise(text) == normalise(answer) for answer in answers))
            overlap = max(f1(text, answer) for answer in answers)
        rows.append((bool(question.answers), exact, max(overlap, exact * question.v2)))

    result = {}
    for prefix, kinds in (("", (True, False)), ("HasAns_", (True,)), ("NoAns_", (False,))):
        if part := [row for row in rows if row[0] in kinds]:
            exact, overlap = (100 * sum(column) / len(part) for column in list(zip(*part))[1:])
            result |= {f"{prefix}exact": exact, f"{prefix}f1": overlap, f"{prefix}total": len(part)}
    return {"exact_match": result["exact"], **(result if questions[0].v2 else {"f1": result["f1"]})}
