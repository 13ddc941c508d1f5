"""Task classification: read GLUE's tab-separated files, cut sentences into windows, score labels.

    sentence<TAB>label
    a fine film<TAB>1                  -> [CLS] a fine film [SEP]
    sentence1<TAB>sentence2<TAB>label  -> [CLS] the first [SEP] the second [SEP]

One idea: a label is an index into the model's list of labels, however a file spells it.

A header names the columns. There is no quoting: a " is a character. Labels are whatever stands
there; a model that learns them keeps them, sorted, so that what it saves explains itself.

Source: Wang et al., GLUE, 2018 (arXiv 1804.07461), section 3 and its files.
"""
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.run import note
from data.text import Window, run_model
from model import BertForSequenceClassification

MODEL = BertForSequenceClassification
HEADLINE = "accuracy"                        # the score that counts
SUFFIX = "tsv"                               # of the files it reads
KEEPS_LOGITS = True                          # memory can hold a teacher's logits on all windows
COLUMNS = [                                  # one or two texts, and the label
    "question,sentence,label",                          # QNLI
    "sentence,label",                                   # SST-2
    "#1 String,#2 String,Quality",                      # MRPC
    "question1,question2,is_duplicate",                 # QQP
    "sentence1,sentence2,label",                        # RTE
    "sentence1,sentence2,gold_label",                   # MNLI; rows with the label "-" are left out
    "text,label"                                        # many others
]


@dataclass
class Sentence:
    id: str                                  # its row, counted from 0
    texts: list[str]                         # one, or two
    label: str | None                        # "" or None: it has none
    place: str = field(default="", repr=False)                    # file and line, for errors


def read(path, train=False, columns=None):
    """Read a table; columns: "TEXT,LABEL" or "TEXT,TEXT2,LABEL", if its header isn't one of GLUE's.

    Nothing, "-" and "-1" are no labels (""), as in GLUE's tables. Rows without one are left out.
    But where no row has one, or there is no such column, all rows are read, to be predicted only.
    Raises ValueError, naming file and line, or OSError.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); convert it") from None
    quotes = text.count('""')
    if quotes:
        note(f"{path}: {quotes} doubled quotes, as spreadsheets write them; no quote is removed")
    header, *rows = (line.rstrip("\r").split("\t") for line in text.rstrip("\r\n").split("\n"))
    names = find_columns(header, columns, train, path)
    sentences, broken = [], []
    for i, row in enumerate(rows):
        cells = dict(zip(header, map(str.strip, row)))
        *texts, label = map(cells.get, names)                   # None where there is no column
        if len(row) != len(header) or not all(texts):
            broken.append(f"line {i + 2}, {str(row)[:60]}")
        label = "" if label in ("-", "-1") else label           # "": it has none
        sentences.append(Sentence(str(i), texts, label, f"{path}: line {i + 2}"))
    if broken or not sentences:
        raise ValueError(f"{path}: of {len(rows)} rows, {len(broken)} have an empty text, or not "
                         f"{len(header)} cells: {'; '.join(broken[:5])}; correct or remove them")
    return with_labels(sentences, path)


def find_columns(header, columns, train, path):
    """The columns to read: one or two texts, then the label (None if there is none)."""
    known = [columns] if columns else COLUMNS
    choices = [names.split(",") for names in known]
    if not train:                 # to predict, the label's column may be missing: None
        choices += [[*texts, None] for *texts, _ in choices]
    for names in choices:
        if {*names} <= {*header, None} and len(names) in (2, 3):
            return names
    raise ValueError(f"{path}: line 1 must name the columns, with tabs between, not commas: "
                     f"{' or '.join(known)}, but it is {str(header)[:100]}; rename them, or give "
                     "--columns TEXT,LABEL or TEXT,TEXT2,LABEL as line 1 has them; if it names "
                     "none, put such a line on top")


def with_labels(sentences, path):
    """The rows that have a label; all rows, if none has one. Says which labels there are.

    Raises ValueError for scores: numbers with decimals.
    """
    labelled = [sentence for sentence in sentences if sentence.label] or sentences
    counts = Counter(sentence.label for sentence in labelled)
    note(f"{path}: {len(labels_of(labelled))} labels: {str(dict(counts.most_common(9)))[:300]}; "
         f"rows left out, as they have none (empty, - or -1): {len(sentences) - len(labelled)}")
    if any(re.fullmatch(r"[-+]?\d*\.\d*[1-9]\d*", str(label)) for label in counts):
        raise ValueError(f"{path}: labels with decimals are scores, but only classes are learnt; "
                         "write a class as a word or a whole number")
    return labelled


def example(text, path=None):
    """One text, or two, for `--ask`: the second is the text of a file. Raises OSError."""
    texts = [text]
    if path:
        texts.append(Path(path).read_text(encoding="utf-8-sig", errors="replace"))
    return Sentence(text, texts, None, "--ask")


def prepare_model(model, sentences):
    """Let the model learn these labels; if it has others, its classifier starts random.

    Raises ValueError if there are not two labels at least.
    """
    model.config.reading.texts = len(sentences[0].texts)
    labels = labels_of(sentences)
    if len(labels) < 2:
        raise ValueError(f"{sentences[0].place}: all labels are {labels}: nothing to learn; - and "
                         "-1 count as no label")
    if model.has_head:
        known = model.config.labels                # do both have the same labels?
        if len(labels) == len(known) == len(index_of(sentences, known)):
            return
        note(f"the labels are {labels}, not {known}: the classifier starts random")
    model.set_labels(labels)
    model.has_head = False


def targets_agree(teacher, model, sentences):
    """Do both models have the labels of these examples, and with the same indices?"""
    return index_of(sentences, teacher.config.labels) == index_of(sentences, model.config.labels)


def labels_of(sentences):
    """All labels, sorted: numerically, if all are numbers."""
    labels = {sentence.label for sentence in sentences if sentence.label}
    # Sorted twice, since a set has no order, and 1 and 01 are the same number.
    return sorted(sorted(labels), key=int if all(map(str.isdecimal, labels)) else str)


def index_of(sentences, labels):
    """Those labels of the file that the model has, too, each with its index in the model's labels.

    Files often have 0, 1, ... where a model has names. Then the number is the index: with the
    model's labels ["negative", "positive"], the file's 0 is "negative". Raises ValueError where two
    labels of the file are the same one of the model.
    """
    has_names = not any(map(str.isdecimal, labels))
    found = {}
    for label in labels_of(sentences):
        if label in labels:
            found[label] = labels.index(label)
        elif has_names and label.isdecimal() and int(label) < len(labels):
            found[label] = int(label)
    if len({*found.values()}) < len(found):
        raise ValueError(f"{sentences[0].place}: one label has two names in {[*found]}; rename one")
    return found


def make_windows(sentences, tokenizer, config):
    """A window for every row; long texts are cut, the longer of two first.

    Raises ValueError for a label that is none of `config.labels`, and for one text where the model
    has learnt from pairs, or the other way round.
    """
    cls, sep = map(tokenizer.token_to_id, ("[CLS]", "[SEP]"))
    length = config.reading.max_length
    texts = len(sentences[0].texts)
    learnt = config.reading.texts
    if config.labels and learnt not in (0, texts):
        raise ValueError(f"{sentences[0].place}: the model has learnt from {learnt} "
                         f"texts in a row, but here are {texts}; see --columns (--ask: --context)")
    pairs = [(*sentence.texts, "")[:2] for sentence in sentences]         # the second may be ""
    tokenizer.enable_truncation(length - texts - 1)                        # room for [CLS], [SEP]
    codes = tokenizer.encode_batch(pairs, add_special_tokens=False)
    tokenizer.no_truncation()
    targets = index_of(sentences, config.labels or labels_of(sentences))
    windows = []
    for sentence, code in zip(sentences, codes):
        if sentence.label and sentence.label not in targets:
            raise ValueError(f"{sentence.place}: label {sentence.label:.40} is not of the model's "
                             f"labels, such as {config.labels[:9]}; fix it, or give another --dev")
        end = code.sequence_ids.count(0)                                    # of the first text
        ids = [cls, *code.ids[:end], sep]
        first = len(ids)                                # the end, if there is no second text
        if texts == 2:
            ids += [*code.ids[end:], sep]
        target = torch.tensor([targets.get(sentence.label, 0)])
        windows.append(Window(sentence.id, torch.tensor(ids), first, target))
    cut = sum(bool(code.overflowing) for code in codes)
    if cut:
        note(f"{cut} of {len(sentences)} rows have more than --max-length {length} tokens; cut")
    return windows


def predict(model, tokenizer, sentences):
    """The likeliest label of every row, by id, as the rows spell it."""
    labels = model.config.labels
    windows = make_windows(sentences, tokenizer, model.config)
    names = [*labels]                                       # spelled as in the file, if it has them
    for label, i in index_of(sentences, labels).items():
        names[i] = label
    if names != labels:
        note(f"the file's labels {names} are taken as the model's {labels}")
    predictions = dict.fromkeys(sentence.id for sentence in sentences)           # in their order
    for i, logits in run_model(model, windows):
        predictions[windows[i].id] = names[int(logits.argmax())]
    return predictions


def score(predictions, sentences):
    """Accuracy in percent, and F1 of the second label where there are two. Raises ValueError."""
    labels = labels_of(sentences)
    if not labels:
        raise ValueError(f"{sentences[0].place}: no label to score by; see --columns, or --predict")
    pairs = [(predictions.get(sentence.id), sentence.label) for sentence in sentences]
    result = {"accuracy": 100 * sum(said == true for said, true in pairs) / len(pairs)}
    if len(labels) == 2:
        second = labels[1]
        found = pairs.count((second, second))
        result["f1"] = 200 * found / sum(pair.count(second) for pair in pairs)
    return result
