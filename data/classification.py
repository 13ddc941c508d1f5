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

from data.run import note
from data.text import Window, run_model
from model import BertForSequenceClassification

MODEL = BertForSequenceClassification
HEADLINE = "accuracy"                        # the score that counts
SUFFIX = "tsv"                               # of the files it reads
KEEPS_LOGITS = True                          # memory holds a teacher's logits on all windows
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
    place: str = field(default="", repr=False)                    # file and line, for errors


def read(path, train=False, columns=None):
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


def example(text, path):
    """One text, or two, for `--ask`: the second is a file's. Raises OSError."""
    texts = [text]
    if path:
        texts.append(Path(path).read_text(encoding="utf-8-sig", errors="replace"))
    return Sentence("--ask", texts, None)


def prepare_model(model, sentences):
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


def targets_agree(teacher, model, sentences):
    """Do both models have the labels of these examples, in the same places?"""
    return places(sentences, teacher) == places(sentences, model)


def labels_of(sentences):
    """All labels, sorted: numerically, if all are numbers."""
    labels = {sentence.label for sentence in sentences}
    return sorted(labels, key=int if all(map(str.isdecimal, labels)) else str)


def places(sentences, model):
    """Where the model has the labels of the sentences."""
    return [index_of(label, model.config.labels) for label in labels_of(sentences)]


def index_of(label, labels):
    """The place of a label among the model's; None if it is none of them.

    Files often have 0, 1, ... where a model has names. Then the number is the place: with the
    model's labels ["negative", "positive"], the file's 0 is "negative".
    """
    if label in labels:
        return labels.index(label)
    named = not any(map(str.isdecimal, labels))
    if named and label.isdecimal() and int(label) < len(labels):
        return int(label)
    return None


def make_windows(sentences, tokenizer, config):
    """A window for every row; long texts are cut, the longer of two first.

    Raises ValueError for a label that is none of `config.labels`.
    """
    cls, sep = map(tokenizer.token_to_id, ("[CLS]", "[SEP]"))
    length = config.reading.max_length
    texts = [sentence.texts[0] if len(sentence.texts) == 1 else tuple(sentence.texts)
             for sentence in sentences]
    tokenizer.enable_truncation(length - len(sentences[0].texts) - 1)      # room for [CLS], [SEP]
    codes = tokenizer.encode_batch(texts, add_special_tokens=False)
    tokenizer.no_truncation()
    windows = []
    for sentence, code in zip(sentences, codes):
        target = 0
        if sentence.label and config.labels:
            target = index_of(sentence.label, config.labels)
        if target is None:
            raise ValueError(f"{sentence.place}: label {sentence.label} is none of the model's, "
                             f"such as {config.labels[:9]}; mend or remove the line")
        end = code.sequence_ids.count(0)                                    # of the first text
        ids = [cls, *code.ids[:end], sep]
        first = len(ids)                                # the end, if there is no second text
        if len(sentence.texts) == 2:
            ids += [*code.ids[end:], sep]
        windows.append(Window(sentence.id, torch.tensor(ids), first, torch.tensor([target])))
    cut = sum(bool(code.overflowing) for code in codes)
    if cut:
        note(f"{cut} of {len(sentences)} rows have more than --max-length {length} tokens; cut")
    return windows


def predict(model, tokenizer, sentences):
    """The likeliest label of every row, by id, as the rows spell it."""
    labels = model.config.labels
    windows = make_windows(sentences, tokenizer, model.config)
    names = [*labels]
    for sentence in sentences:
        if sentence.label:
            names[index_of(sentence.label, labels)] = sentence.label
    if names != labels:
        note(f"the file's labels {names} are taken as the model's {labels}")
    predictions = {}
    for i, logits in run_model(model, windows):
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
