"""Task classification: read GLUE's tab-separated files, cut sentences into windows, score labels.

    sentence<TAB>label
    a fine film<TAB>1                  -> [CLS] a fine film [SEP]
    sentence1<TAB>sentence2<TAB>label  -> [CLS] the first [SEP] the second [SEP]

A header names the columns. There is no quoting: a " is a character. Labels are whatever stands
there; a model that learns them keeps them, sorted, so that what it saves explains itself.

Source: Wang et al., GLUE, 2018 (arXiv 1804.07461), section 3 and its files.
"""
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data import articles
from data.text import Window, note, run_model
from model import BertForSequenceClassification

MODEL = BertForSequenceClassification
HEADLINE = "accuracy"                        # the score that counts
COLUMNS = [                                  # one or two texts, and the label
    "question,sentence,label",                          # QNLI
    "sentence,label",                                   # SST-2
    "#1 String,#2 String,Quality",                      # MRPC
    "question1,question2,is_duplicate",                 # QQP
    "sentence1,sentence2,label",                        # RTE
    "sentence1,sentence2,gold_label"                    # MNLI, without rows of the label "-"
]


@dataclass
class Sentence:
    id: str                                  # its row, counted from 0
    texts: list[str]                         # one, or two
    label: str | None
    place: str = field(default="the generated corpus", repr=False)    # file and line


def read(path, columns=None):
    """Read a table; columns: "TEXT,LABEL" or "TEXT,TEXT2,LABEL" where it is none of GLUE's.

    Raises ValueError, naming file and line, or OSError.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig").replace("\r", "")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); convert it") from None
    header, *lines = (line.split("\t") for line in text.rstrip("\n").split("\n"))
    known = [columns] if columns else COLUMNS
    found = [names.split(",") for names in known if set(names.split(",")) <= set(header)]
    if not found or len(found[0]) not in (2, 3):
        raise ValueError(f"{path}: line 1: the columns are {header}, not {' or '.join(known)}; "
                         "give --columns TEXT,LABEL or TEXT,TEXT2,LABEL as the header has them, "
                         "with tabs between")
    sentences = []
    for row, line in enumerate(lines):
        place = f"{path}: line {row + 2}"
        cells = dict(zip(header, line))
        *texts, label = (cells.get(name, "").strip() for name in found[0])
        if len(line) != len(header) or not label or not all(texts):
            raise ValueError(f"{place}: {len(line)} cells of {len(header)}, or a text or label is "
                             "empty; mend or remove the line")
        sentences.append(Sentence(str(row), texts, label, place))
    if not sentences:
        raise ValueError(f"{path}: holds no row; is it the right file?")
    return sentences


def generated(split):
    """Made of the generated corpus as GLUE's QNLI of SQuAD: does a sentence answer a question?"""
    sentences = []
    for row, question in enumerate(articles.generated(split)):
        parts = question.context.split(". ")
        answers = [question.answers[0] in part for part in parts]
        label = ("no", "yes")[row % 2]
        texts = [question.text, parts[answers.index(label == "yes")]]
        sentences.append(Sentence(str(row), texts, label))
    return sentences


def example(text, path):
    """One text, or two: the second is a file's."""
    texts = [text]
    if path:
        texts.append(Path(path).read_text(encoding="utf-8-sig", errors="replace"))
    return Sentence("--ask", texts, None)


def choose_labels(model, sentences):
    """Ready a model to learn these labels; if it has others, its classifier starts random.

    Raises ValueError if there is one label only.
    """
    labels = labels_of(sentences)
    if len(labels) == 1:
        raise ValueError(f"{sentences[0].place}: all labels are {labels[0]}: nothing to learn")
    known = model.config.labels
    if model.has_head and len(labels) == len(known) and None not in places(sentences, model):
        return
    if model.has_head:
        note(f"the labels are {labels}, not {known}: the classifier starts random")
    model.set_labels(labels)
    model.has_head = False


def labels_of(sentences):
    """All labels, sorted: as numbers, if all are some."""
    labels = {sentence.label for sentence in sentences}
    return sorted(labels, key=int if all(map(str.isdecimal, labels)) else str)


def places(sentences, model):
    """Where the model has the labels of the sentences."""
    return [index_of(label, model.config.labels) for label in labels_of(sentences)]


def index_of(label, labels):
    """The place of a label; 0, 1, ... are places where the labels themselves have other names."""
    if label in labels:
        return labels.index(label)
    named = not any(map(str.isdecimal, labels))
    if named and label.isdecimal() and int(label) < len(labels):
        return int(label)
    return None


def make_windows(sentences, tokenizer, settings):
    """A window for every row; long texts are cut, the longer of two first.

    Raises ValueError for a label that is none of `settings.labels`.
    """
    cls, sep = map(tokenizer.token_to_id, ("[CLS]", "[SEP]"))
    windows = []
    cut = 0
    for sentence in sentences:
        target = index_of(sentence.label, settings.labels) if settings.labels else 0
        if target is None:
            raise ValueError(f"{sentence.place}: label {sentence.label} is none of the model's, "
                             f"such as {settings.labels[:9]}; mend or remove the line")
        codes = tokenizer.encode_batch(sentence.texts, add_special_tokens=False)
        parts = [code.ids for code in codes]
        too_many = sum(map(len, parts)) + len(parts) + 1 - settings.max_length
        cut += too_many > 0
        for _ in range(too_many):
            max(parts, key=len).pop()
        ids = [cls, *parts[0], sep]
        first = len(ids)                                # behind it all where there is no second
        for part in parts[1:]:
            ids += [*part, sep]
        windows.append(Window(sentence.id, torch.tensor(ids), first, torch.tensor([target])))
    if cut:
        note(f"{cut} of {len(sentences)} rows have more than --max-length {settings.max_length} "
             "tokens; cut")
    return windows


def predict(model, tokenizer, sentences, settings):
    """The likeliest label of every row, by id, as the rows spell it."""
    labels = model.config.labels
    windows = make_windows(sentences, tokenizer, settings)
    names = [*labels]
    for sentence in sentences:
        if sentence.label:
            names[index_of(sentence.label, labels)] = sentence.label
    if names != labels:
        note(f"the file's labels {names} are taken as the model's {labels}")
    predictions = {}
    for i, logits in run_model(model, windows, tokenizer.token_to_id("[PAD]")):
        predictions[windows[i].id] = names[int(logits.argmax())]
    return predictions


def score(predictions, sentences):
    """Accuracy in percent, and F1 of the second label where there are two."""
    pairs = [(predictions.get(sentence.id), sentence.label) for sentence in sentences]
    right = sum(said == true for said, true in pairs)
    result = {"accuracy": 100 * right / len(pairs)}
    labels = labels_of(sentences)
    if len(labels) == 2:
        found = pairs.count((labels[1], labels[1]))
        result["f1"] = 200 * found / sum(pair.count(labels[1]) for pair in pairs)
    return result
