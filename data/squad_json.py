"""SQuAD's JSON -> questions, for the two tasks that learn from it.

One idea: a file is checked where it is read, so that nobody checks a question again.

    {"version": "v2.0", "data": [{"paragraphs": [{"context": "Anna lives in Rome.", "qas": [
        {"id": "1", "question": "Where does Anna live?", "is_impossible": false,
         "answers": [{"text": "Rome", "answer_start": 14}]}]}]}]}

Sources: Rajpurkar et al., SQuAD, 2016 (arXiv 1606.05250); 2018 (arXiv 1806.03822, version 2.0).
"""
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from model import read_json

FORMAT = "\u00ad\u061c\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"  # invisible characters


@dataclass
class Question:
    id: str
    text: str
    context: str
    answers: list[str]                       # every text that counts as right
    offset: int | None = None                # where the first answer begins, as the file says
    span: tuple[int, int] | None = None      # where it was found to begin and end, for training
    # May "" (no answer) be right, as in SQuAD v2.0? None: not known; the model remembers.
    may_be_empty: bool | None = False
    file: str | Path = field(default="", repr=False)                   # where it stands, for errors


def read(path, train=False, columns=None):
    """Read a file in SQuAD's format, v1.1 or v2.0. Raises ValueError, naming the place, or OSError.

    train: the span of every question's first answer is needed, too.
    """
    if columns:
        raise ValueError("--columns names the columns of a table; it goes with --task "
                         "classification")
    file = read_json(path)
    questions = []
    v2 = re.match(r"v?2\b", str(file.get("version"))) is not None
    place = "top level"
    try:
        for a, article in enumerate(file["data"]):
            place = f"data[{a}]"
            for p, paragraph in enumerate(article["paragraphs"]):
                place = f"data[{a}].paragraphs[{p}]"
                context = text_of(paragraph, "context")
                for q, entry in enumerate(paragraph["qas"]):
                    place = f"data[{a}].paragraphs[{p}].qas[{q}]"
                    question = read_question(entry, context, path)
                    v2 |= question.may_be_empty
                    questions.append(question)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path}: {place}: not SQuAD's format ({type(error).__name__}: {error}); "
                         "see the example at the top of data/squad_json.py, and write "
                         "\"answers\": [] where there are none") from None
    if not questions:
        raise ValueError(f"{path}: holds no question; is it the right file?")
    ((id_, count),) = Counter(question.id for question in questions).most_common(1)
    if count > 1:
        raise ValueError(f"{path}: {count} questions have the id {id_}; predictions go by id, so "
                         "give each its own")
    # One question without an answer makes the file version 2.0. Where none has an answer, and none
    # is marked impossible, they are there to be predicted; whether "" may be right isn't known.
    answers = [question.answers for question in questions]
    v2 = v2 or (not all(answers) if any(answers) else None)
    for question in questions:
        question.may_be_empty = v2
    if train:
        find_spans(questions, path)
    return questions


def read_question(entry, context, path):
    """A question of the file `path`. Raises ValueError and whatever plain indexing raises."""
    question = Question(text_of(entry, "id"), text_of(entry, "question").strip(), context, [],
                        file=path)
    if not isinstance(entry["answers"], list):
        raise TypeError("'answers' must be a list, as in the example at the top of squad_json.py")
    for answer in entry["answers"]:
        if answer["text"] == "":                                           # a way to say "none"
            continue
        question.answers.append(text_of(answer, "text").strip(FORMAT))
        if len(question.answers) == 1:
            begin = answer.get("answer_start")
            question.offset = -1 if begin is None else int(begin)
    question.may_be_empty = str(entry.get("is_impossible")).lower() in ("true", "1")
    if question.may_be_empty and question.answers:
        raise ValueError(f"question {question.id} is_impossible, but has an answer")
    return question


def text_of(entry, key):
    """entry[key], if it is a text (an id may be an integer) and not empty. Raises ValueError."""
    value = entry[key]
    if type(value) is int and key == "id":
        return str(value)
    if not value.strip().encode():                # half a surrogate pair raises a ValueError here
        raise ValueError(f"{key!r} is empty")
    return value


def example(text, path, answers=()):
    """The question `text` about the text of a file, for `--ask`. Raises ValueError or OSError.

    For generation, which writes a question, `text` is the answer to ask about: it is also in
    `answers`, and its place in the file is looked up.
    Whether "" may be right isn't known here (None): the model decides.
    """
    if not path:
        raise ValueError("--ask needs the text that the answer stands in; give --context FILE")
    context = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    begin = context.find(text) if answers else None
    found = Question(f"{path}: {text}", text, context, answers, begin, may_be_empty=None, file=path)
    find_spans([found], path)
    return found


def targets_agree(teacher, model, questions):
    """Do the targets of these examples mean the same to both models? Always."""
    return True


# -------------------------------------------------------------------------- where the answers stand


def find_spans(questions, path):
    """Set the span of every first answer: at its offset, or where its text stands exactly once.

    Raises ValueError, once for all those that are nowhere or in several places.
    """
    lost = []
    for question in questions:
        if not question.answers:
            continue
        text, context, begin = question.answers[0], question.context, question.offset
        end = end_of(context, text, begin)
        if end is None and context.count(text) == 1:
            begin = context.index(text)
            end = begin + len(text)
        if end is None:
            lost.append(question.id)
        else:
            question.span = (begin, end)
    if lost:
        raise ValueError(f"{path}: {len(lost)} answers are neither at their offset nor in the "
                         f"context exactly once, as those of question {str(lost[:5])[:99]}; fix "
                         "or remove them")


def end_of(context, text, begin):
    """Where `text` ends in the context if it begins at `begin`; None if it doesn't stand there.

    It may be spelled differently in the context, and up to 20 characters longer or shorter.
    """
    if begin < 0:
        return None
    plain = simplified(text)
    for difference in range(21):
        for end in (begin + len(text) + difference, begin + len(text) - difference):
            if end > begin and simplified(context[begin:end]) == plain:
                return end
    return None


def simplified(text):
    """One spelling for texts that differ in white space, case or Unicode form only."""
    text = text.translate(dict.fromkeys(map(ord, FORMAT)))
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
