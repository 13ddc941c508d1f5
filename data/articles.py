"""SQuAD's JSON -> questions, for the tasks that learn from it.

    {"version": "v2.0", "data": [{"paragraphs": [{"context": "Anna lives in Rome.", "qas": [
        {"id": "1", "question": "Where does Anna live?", "is_impossible": false,
         "answers": [{"text": "Rome", "answer_start": 14}]}]}]}]}

Sources: Rajpurkar et al., SQuAD, 2016 (arXiv 1606.05250); 2018 (arXiv 1806.03822, version 2.0).
"""
from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data import corpus
from model import read_json

FORMAT = "\u00ad\u061c\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"  # characters that nobody sees


@dataclass
class Question:
    id: str
    text: str
    context: str
    answers: list[str]                       # every text that counts as right
    offset: int | None = None                # where the first answer should begin
    span: tuple[int, int] | None = None      # where it does begin and end, if training needs it
    v2: bool = False                         # of SQuAD v2.0: "no answer", "", may be right
    file: str | Path = field(default="", repr=False)                   # it came from, for errors


def read(path: str | Path, train: bool = False) -> list[Question]:
    """Read a file in SQuAD's format, v1.1 or v2.0. Raises ValueError, naming the place, or OSError.

    train: the span of every question's first answer is needed, too.
    """
    questions = questions_of(read_json(path), path, train)
    without = sum(not question.answers and not question.v2 for question in questions)
    if without:
        print(f"{path}: {without} questions have no answer, but are not said to be impossible: "
              "what is predicted for them counts as wrong", file=sys.stderr)
    return questions


def generated(split: str) -> list[Question]:
    """The questions of the generated corpus: "train", "dev" or "pretrain"."""
    return questions_of(corpus.squad(split), "the generated corpus", train=split != "dev")


def questions_of(file: dict, path: str | Path, train: bool = False) -> list[Question]:
    """The questions in SQuAD's JSON; `path` names them in errors."""
    questions = []
    v2 = re.match(r"v?2\b", str(file.get("version"))) is not None
    for place, context, entry in entries(path, file):
        question = read_question(path, place, context, entry)
        if str(entry.get("is_impossible")).lower() in ("true", "1"):
            v2 = True
            if question.answers:
                raise ValueError(f"{path}: question {question.id}: is_impossible, but has an "
                                 "answer; remove one of them")
        questions.append(question)
    if not questions:
        raise ValueError(f"{path}: holds no question; is it the right file?")
    counts = Counter(question.id for question in questions)
    again = [id_ for id_, count in counts.items() if count > 1]
    if again:
        raise ValueError(f"{path}: {len(again)} ids occur more than once, as {again[0]} does; "
                         "predictions go by id, so give each its own")
    for question in questions:
        question.v2 = v2
    if train:
        find_spans(questions, path)
    return questions


def entries(path: str | Path, file: dict) -> Iterator[tuple[str, str, dict]]:
    """Place in the file, context and JSON of every question. Raises ValueError."""
    for a, article in enumerate(member(file, "data", list, path, "top level")):
        paragraphs = member(article, "paragraphs", list, path, f"data[{a}]")
        for p, paragraph in enumerate(paragraphs):
            place = f"data[{a}].paragraphs[{p}]"
            context = member(paragraph, "context", str, path, place)
            qas = member(paragraph, "qas", list, path, place)
            for q, entry in enumerate(qas):
                yield f"{place}.qas[{q}]", context, entry


def read_question(path: str | Path, place: str, context: str, entry: dict) -> Question:
    """Raises ValueError, naming the question."""
    if isinstance(entry, dict) and type(entry.get("id")) is int:
        entry = {**entry, "id": str(entry["id"])}
    id_ = member(entry, "id", str, path, place)
    place = f"question {id_}"
    text = member(entry, "question", str, path, place).strip()
    question = Question(id_, text, context, answers=[], file=path)
    for answer in member(entry, "answers", list, path, place):
        if isinstance(answer, dict) and answer.get("text") == "":          # a way to say "none"
            continue
        text = member(answer, "text", str, path, place)
        question.answers.append(text.strip(FORMAT))
        if len(question.answers) == 1:
            question.offset = number(answer.get("answer_start"))
    return question


def member(entry: dict, key: str, kind: type, path: str | Path, place: str):
    """entry[key], if it is there, of that type, and no empty text. Raises ValueError."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if type(value) is not kind:
        raise ValueError(f"{path}: {place}: no {kind.__name__} {key!r}; is it SQuAD's format?")
    if kind is str and (not value.strip() or re.search("[\ud800-\udfff]", value)):
        raise ValueError(f"{path}: {place}: {key!r} is empty or not UTF-8; mend or remove it")
    return value


def number(value) -> int:
    """14, 14.0 and "14" are 14; what is no number is no offset, -1."""
    try:
        return int(value)
    except (ValueError, TypeError, OverflowError):
        return -1


# -------------------------------------------------------------------------- where the answers stand


def find_spans(questions: list[Question], path: str | Path):
    """Set the span of every first answer: at its offset, or where its text stands exactly once.

    Raises ValueError, once for all those that are nowhere or in several places.
    """
    lost, mended = [], 0
    for question in questions:
        if not question.answers:
            continue
        text = question.answers[0]
        begin = question.offset
        end = end_of(question.context, text, begin)
        if end is None and question.context.count(text) == 1:
            begin = question.context.index(text)
            end = begin + len(text)
            mended += 1
        if end is None:
            lost.append(question.id)
        else:
            question.span = (begin, end)
    if lost:
        raise ValueError(f"{path}: {len(lost)} answers are neither at their offset nor in the "
                         f"context exactly once, as of question {', '.join(lost[:5])}; mend or "
                         "remove them")
    if mended:
        print(f"{path}: {mended} answers are not at their offset, but stand in the context once; "
              "taken from there", file=sys.stderr)


def end_of(context: str, text: str, begin: int) -> int | None:
    """Where a text that begins there ends; it may be spelled longer or shorter in the context."""
    if begin < 0:
        return None
    plain = simplified(text)
    for difference in range(21):
        for end in (begin + len(text) + difference, begin + len(text) - difference):
            if end > begin and simplified(context[begin:end]) == plain:
                return end
    return None


def simplified(text: str) -> str:
    """One spelling for texts that differ in white space, case or Unicode form only."""
    text = text.translate(dict.fromkeys(map(ord, FORMAT)))
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
