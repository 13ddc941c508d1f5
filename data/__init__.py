"""The tasks by name, and opening a saved model with all that belongs to it.

One idea: train.py and compact.py know no task. A task is a module of this folder that has

    MODEL, HEADLINE              its model's class, and the name of the score that counts
    KEEPS_LOGITS                 whether memory can hold a teacher's logits on all windows
    SUFFIX                       of the files it reads
    read(path, train, columns)                           -> examples, each with an `id`;
                                                            train: is it the file to learn from?
    example(text, path)                                  -> an example, with an id of its own
    prepare_model(model, examples)                       tells the model what it must know of its
                                                            data; if its output layers don't fit
                                                            it, they start anew (has_head False)
    targets_agree(teacher, model, examples)              -> do targets (a classifier's labels) mean
                                                            the same to both?
    make_windows(examples, tokenizer, config)            -> [Window], see text.py
    predict(model, tokenizer, examples)                  -> {id: text}
    score(predictions, examples)                         -> {"f1": 74.2, ...}, in percent; raises
                                                            ValueError if examples lack answers

The model gives a row of logits for every target, window by window.
"""
from pathlib import Path

from data import classification, generation, qa
from data.run import DEVICE, note
from data.text import collate, copy_tokenizer, load_tokenizer, split
from model import read_json, save_json

TASKS = {"qa": qa, "classification": classification, "generation": generation}


def open_model(folder, task=None, flags=None):
    """A saved model, its tokenizer and its task, checked against each other.

    task   the one that config.json names, unless given
    flags  may say how to read (max_length, stride, ...); what is missing there, or None, stays
           as it was when the model was trained
    Raises ValueError or OSError.
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
    for name in vars(config.reading):
        if getattr(flags, name, None) is not None:
            setattr(config.reading, name, getattr(flags, name))
    if config.reading.max_length > config.max_position_embeddings:
        raise ValueError(f"{folder}: the model reads {config.max_position_embeddings} tokens at "
                         f"most; lower --max-length {config.reading.max_length}")
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


def read_examples(task, path, name, columns):
    """The examples of a file, or of the generated corpus; name: "train" or "dev"."""
    if path is None:
        path = Path(__file__).parent / f"corpus/{name}.{task.SUFFIX}"
        note("no file is given: this is the generated corpus of data/corpus")
    return task.read(path, name == "train", columns)


def evaluate(args):
    """--eval: scores of a saved model's folder, or of a predictions.json.

    With --predict, write the model's predictions instead. Then a table may lack labels, and
    questions may have no answers ("answers": []).
    """
    task = TASKS.get(args.task)
    is_model = Path(args.eval).is_dir()
    if is_model:
        model, tokenizer, task = open_model(args.eval, task, args)
        if not model.has_head:
            raise ValueError(f"{args.eval}: has not learnt this task; give another --task")
    task = task or qa                                  # predictions.json doesn't say whose it is
    examples = read_examples(task, args.dev, "dev", args.columns)
    if is_model:
        predictions = task.predict(model, tokenizer, examples)
    else:
        predictions = {id_: str(text) for id_, text in read_json(args.eval).items()}
        if missing := sum(example.id not in predictions for example in examples):
            note(f"{args.eval}: has no prediction for {missing} of {len(examples)} examples; is it "
                 "of this --dev, and of this --task?")
    if args.predict:
        save_json(args.predict, predictions)
        return {"predictions": len(predictions)}
    return task.score(predictions, examples)


def sample_inputs(windows):
    """The model's inputs, of the first 256 windows: to compare models on, and to measure times.

    In batches of eight; of 64 on a GPU, which waits for the next command when a batch is small.
    """
    size = 8 if DEVICE.type == "cpu" else 64
    return [collate(part, DEVICE)[0] for part in split(windows[:256], size)]
