"""The command lines of train.py and compact.py: flags, defaults, ranges.

One idea: every flag is declared once, and what makes no sense is refused before any work is done.
"""
import argparse
from pathlib import Path

from data import TASKS
from data.run import STAGES

# Without --model and --train, a tiny BERT learns a generated corpus, and some defaults differ.
TINY_BERT = str(Path(__file__).parent / "tiny-bert")
USUAL = {"dense_epochs": 2, "epochs": 20, "batch_size": 16, "lr": 3e-5}
OFFLINE = {"dense_epochs": 1, "epochs": 2, "batch_size": 32, "lr": 1e-3}


def fraction(text):
    """A number from 0 to 1, for argparse."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not 0 to 1")
    return value


def count(text):
    """A whole number, 0 or more, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return value


def numbers(text):
    return list(map(int, text.split(",")))


def add_data_flags(parser):
    add = parser.add_argument_group("data and models").add_argument
    add("--task", choices=TASKS, help="what to learn (default: qa, or what --eval's model has)")
    add("--model", help="checkpoint's folder (default: the tiny BERT's)")
    add("--train", help="file to train on (default: a generated corpus)")
    add("--dev", help="file to evaluate on (default: likewise)")
    add("--columns", help="names: TEXT,LABEL or TEXT,TEXT2,LABEL (default: GLUE's)")
    add("--out", default="out", help="folder for the results (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace another or a finished run there")
    add("--eval", help="only score a saved model's folder or a predictions.json")
    add("--predict", help="with --eval: file to write predictions to; there are no scores then")
    title = "reading (default: as the model was trained, else 384, 128, 30, 0)"
    add = parser.add_argument_group(title).add_argument
    add("--max-length", type=count, help="tokens in a window")
    add("--stride", type=count, help="tokens by which two windows overlap")
    add("--max-answer", type=count, help="tokens in an answer")
    add("--null-threshold", type=float, help='SQuAD v2.0: "" where [CLS] wins by more than this; '
        "a negative one with a =, as in --null-threshold=-1e-3")


def add_pruning_flags(parser, methods):
    group = parser.add_argument_group("pruning")
    add = group.add_argument
    add("--block", default="32x32", help="blocks of the attention (default: %(default)s)")
    add("--ffn-block", default="1xall", help="blocks of the FFN (default: %(default)s)")
    add("--method", default="movement", choices=methods, help="(default: %(default)s)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--density", type=fraction, default=0.25,
        help="fraction of the blocks, and so of the weights, to keep (default: %(default)s)")
    add("--speedup", type=float, metavar="X",
        help="instead: X times as fast as the dense model, on this machine")
    add("--lambda", dest="lambdas", type=float, nargs=2, default=[10.0, 10.0], metavar="L",
        help="for soft-movement: its penalties, of attention and FFN (default: 10 10)")
    add = group.add_argument
    add("--warmup", type=fraction, default=0.05,
        help="part of the steps before pruning begins (default: %(default)s)")
    add("--cooldown", type=fraction, default=0.4,
        help="part of the steps at the final density (default: %(default)s)")
    add("--layers", type=numbers, help="keep only these layers of the model, as in 0,2,4")


def add_training_flags(parser):
    add = parser.add_argument_group("training (a second default is the offline run's)").add_argument
    add("--dense-epochs", type=count, help="of fine-tuning before pruning (default: 2, 1)")
    add("--epochs", type=count, help="of fine-pruning (default: 20, 2)")
    add("--fill-epochs", type=count, default=0,
        help="on what deletion leaves; its zeros may change again (default: %(default)s)")
    add("--batch-size", type=count, help="windows in a training step (default: 16, 32)")
    add("--lr", type=fraction, help="learning rate of the weights (default: 3e-5, 1e-3)")
    add("--score-lr", type=fraction, default=1e-2,
        help="of the scores; it matters for soft-movement alone (default: %(default)s)")
    add("--dropout", type=fraction, help="in training (default: the checkpoint's)")
    add("--teacher", help="folder of the model to distill from (default: the dense model)")
    add("--distill", type=fraction, default=0.9,
        help="weight of the teacher in the loss (default: %(default)s)")
    add("--amp", action="store_true",
        help="compute in bfloat16 (autocast): for an A100 or newer, or a CPU with avx512_bf16")
    add("--seed", type=count, default=0, help="of all random numbers (default: %(default)s)")


def parse(parser, argv):
    """parse_args, but errors, and empty arguments, raise ValueError."""
    def refuse(message):
        raise ValueError(f"{message}; see --help")

    parser.error = refuse
    args = parser.parse_args(argv)
    if "" in vars(args).values():
        refuse("an argument is empty; fill it or leave it out")
    return args


def parse_train(argv, description, methods):
    """The flags of train.py, complete and checked. Raises ValueError."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add_data_flags(parser)
    add_pruning_flags(parser, methods)
    add_training_flags(parser)
    args = parse(parser, argv)
    if args.max_length in range(8) or 0 in (args.max_answer, args.batch_size):
        raise ValueError("--max-length must be at least 8, --max-answer and --batch-size at least "
                         "1")
    offline = not (args.model or args.train or args.eval)
    if offline:
        args.model = TINY_BERT
    for name, default in (OFFLINE if offline else USUAL).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if not args.eval:
        args.task = args.task or "qa"
        check(args)
    return args


def parse_compact(argv, description):
    """The flags of compact.py. Raises ValueError."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("model", help="folder of a saved model")
    one = parser.add_mutually_exclusive_group(required=True).add_argument
    one("target", nargs="?", help="folder to write the compact model to")
    one("--expand", metavar="FOLDER", help="write the model in the dense shapes, to there")
    one("--compare", metavar="FOLDER", help="scores, size and speed of this model and another")
    one("--ask", metavar="TEXT", help="a question, a classifier's text, or an answer")
    add("--context", help="a text file with the answer, or the second text")
    add("--dev", help="file to measure on (default: the generated corpus)")
    add("--columns", help="names, as train.py's")
    return parse(parser, argv)


def check(args):
    """Raises ValueError for settings of a run that make no sense, alone or together."""
    if bool(args.train) != bool(args.dev) or not args.model or args.predict:
        raise ValueError("--train and --dev need each other and --model: give all three; and "
                         "--predict needs --eval")
    for path in filter(None, (args.model, args.teacher, args.train, args.dev)):
        for name in STAGES:
            if Path(path).resolve().is_relative_to(Path(args.out, name).resolve()):
                raise ValueError(f"{path}: the run would write over it; give another --out")
    if args.speedup is not None and (
            not args.speedup >= 1 or "1x1" in (args.block, args.ffn_block)
            or args.method == "soft-movement" or not args.epochs):
        raise ValueError("--speedup must be at least 1, and needs --epochs, a --method that ranks "
                         "(not soft-movement), and blocks larger than 1x1: single weights buy no "
                         "speed")
    if args.warmup + args.cooldown >= 1:
        raise ValueError("--warmup and --cooldown together leave no step to prune in")
