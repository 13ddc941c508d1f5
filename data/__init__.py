"""What both command lines share: the tasks by name, saved models with all that belongs to them,
and errors of one line.

A task is a module of data/ that has

    MODEL, HEADLINE                                          its class, and the score that counts
    read(path, train), generated(split)       -> examples    each with an `id`; glue takes columns
    example(text, path)                       -> an example  with the id "--ask"
    make_windows(examples, tokenizer, settings) -> [Window]
    predict(model, tokenizer, examples, settings) -> {id: text}
    score(predictions, examples)              -> {"f1": 74.2, ...}, in percent

The model gives a row of logits for every target. What else a task needs is named where it acts:
`glue` below and in train.py, for columns and labels; `questions` in train.py, for the teacher.
"""
import argparse
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import distributed

from data import glue, pictures, questions, squad, text  # noqa: F401
from data.text import collate, copy_tokenizer, load_tokenizer, split
from model import read_json

TASKS = {"qa": squad, "classification": glue, "generation": questions}

RANK, WORLD, LOCAL = 0, 1, 0                               # this process, of how many; its device
if distributed.is_torchelastic_launched():                 # by torchrun
    RANK = int(os.environ["RANK"])
    WORLD = int(os.environ["WORLD_SIZE"])
    LOCAL = int(os.environ["LOCAL_RANK"])
DEVICE = torch.device(f"cuda:{LOCAL}" if torch.cuda.is_available() else "cpu")


def open_model(folder, task=None, max_length=0):
    """A saved model, its tokenizer and its task, checked against each other and the window.

    task: read from config.json unless given. Raises ValueError or OSError.
    """
    if task is None:
        task = task_of(folder)
    model = task.MODEL.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    known = max(tokenizer.get_vocab().values()) + 1
    config = model.config
    if known > config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {known} tokens, the model "
                         f"{config.vocab_size}; take both from the same checkpoint")
    if max_length > config.max_position_embeddings:
        raise ValueError(f"{folder}: the model reads {config.max_position_embeddings} tokens at "
                         f"most; lower --max-length {max_length}")
    if config.type_vocab_size < 2:
        raise ValueError(f"{folder}: type_vocab_size is 1, so it can't tell two segments apart")
    return model.to(DEVICE), tokenizer, task


def task_of(folder):
    """The task of a saved model: the one whose model `architectures` names. Raises ValueError."""
    path = Path(folder) / "config.json"
    names = read_json(path).get("architectures") or []
    tasks = {task.MODEL.ARCHITECTURE: task for task in TASKS.values()}
    for name in names:
        if name in tasks:
            return tasks[name]
    raise ValueError(f"{path}: architectures {names}, none of {[*tasks]}; fine-tune it first")


def save_model(model, folder, source):
    """Save a model, and the tokenizer of the checkpoint it came from, so that it stands alone.

    Raises ValueError if that checkpoint would be lost.
    """
    if Path(folder).resolve() == Path(source).resolve():
        raise ValueError(f"{folder}: is the model itself; name another folder")
    model.save_pretrained(folder)
    copy_tokenizer(source, folder)


def read_examples(task, path, split, columns):
    """The examples of a file, or of the generated corpus; split: "train" or "dev"."""
    if path is None:
        text.note("no file is given: this is the generated corpus")
        return task.generated(split)
    if task is glue:
        return glue.read(path, columns)
    return task.read(path, train=split == "train")


def read_predictions(path, examples):
    """Read a predictions file: an example's id -> text. Raises ValueError or OSError."""
    value = read_json(path)
    if not all(isinstance(said, str) for said in value.values()):
        raise ValueError(f"{path}: not predictions; they map every example's id to a text")
    missing = sum(example.id not in value for example in examples)
    if missing:
        text.note(f"{path}: no prediction for {missing} of {len(examples)} "
                  "examples; if it is another task's, give --task")
    return value


def sample_inputs(windows, tokenizer):
    """The model's inputs, of the first 256 windows, in batches of eight: to compare models on."""
    pad = tokenizer.token_to_id("[PAD]")
    return [collate(part, pad, DEVICE)[0] for part in split(windows[:256], 8)]


# ------------------------------------------------------------------------------- errors of one line


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, and an empty argument is one."""

    def parse_args(self, *arguments):
        args = super().parse_args(*arguments)
        if "" in vars(args).values():
            fail("an argument is empty; give a path or leave it out")
        return args

    def error(self, message):
        fail(f"{message}; see --help")


@contextmanager
def one_line_errors():
    """What comes from outside and is refused ends the program with one line and status 2."""
    try:
        yield
    except KeyboardInterrupt:
        fail("stopped; train.py goes on with a run if given --resume", status=130)
    except OSError as error:
        if error.strerror is None:
            fail(str(error))
        fail(f"{error.filename or 'output'}: {error.strerror}; "
             f"{'make room' if 'space' in error.strerror else 'check the path'}")
    except (ValueError, ArithmeticError) as error:
        fail(str(error))


def fail(message, status=2):
    """One line on standard error, and the end."""
    if RANK == 0:
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
