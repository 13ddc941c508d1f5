"""Fine-tune a BERT, learn which blocks of its weights can go, and delete them.

One idea: pruning is fine-tuning with a schedule. A run is a story of stages, the lines of
`whole_run`: dense fine-tuning; fine-pruning with the dense model as teacher, after which the zeros
are made permanent; deletion; filling, on request.

    python train.py --block 32x32                                    # offline, about a minute
    python train.py --block 32x32 --model data/bert-base-uncased \\
        --train data/train-v1.1.json --dev data/dev-v1.1.json
    python train.py --block 32x32 --speedup 2.5                      # so many times as fast
    python train.py --block 32x32 --resume                           # after a stop of any kind
    python train.py --eval out/compact --dev data/dev-v1.1.json      # scores of a saved model
    train.main(["--block", "32x32"])                                 # in a script or a notebook
    torchrun --standalone --nproc_per_node=2 train.py --block 32x32  # on two devices

Sources: Lagunas et al., Block Pruning For Faster Transformers, 2021 (arXiv 2109.04838), section 4;
Hinton et al., Distilling the Knowledge in a Neural Network, 2015 (arXiv 1503.02531), section 2.

Shapes in comments: T tokens, N targets of a batch, n of a window, K positions or classes.
"""
import argparse
import copy
import json
import os
import shutil
import zlib
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from compact import (
    actual_config,
    compact,
    largest_difference,
    price,
    price_list,
    sizes,
    speedup,
    speedup_anew,
    survivors,
)
from data import DEVICE, RANK, TASKS, WORLD, glue, pictures, questions
from data.text import batches, collate, run_model
from model import read_torch, save_json, whole_file
from prune import METHODS, BlockGroup, bake, cubic, keep_most, parameter_groups, unmasked

TEMPERATURE = 2.0                                                             # of distillation
STAGES = ("dense", "pruned", "compact", "filled")
# Other defaults for the generated corpus, which is what runs without --model and --train.
OFFLINE = {
    "model": str(Path(__file__).parent / "data/tiny-bert"),
    "dense_epochs": 1,
    "epochs": 2,
    "batch_size": 32,
    "lr": 1e-3,
    "dropout": 0.0,
}


def main(argv=None):
    with data.one_line_errors():
        args = parse_args(argv)
        if args.eval:
            print(json.dumps(evaluate(args)))
        else:
            whole_run(args)


def whole_run(args):
    """The story: fine-tune, prune, delete, fill."""
    run, model, teacher = prepare(args)
    model = run.stage("dense", model, args.dense_epochs)
    taught = args.distill and args.epochs + args.fill_epochs
    teacher = Teacher(teacher or model, run) if taught else None
    groups = add_masks(model, args)
    model = run.stage("pruned", model, args.epochs, groups, teacher)
    small = compact(model)
    difference = largest_difference(model, small, run.samples)
    run.finish("compact", small)
    if args.fill_epochs:
        small = run.stage("filled", small, args.fill_epochs, teacher=teacher)
    report(run, model, small, difference)


class Teacher:
    """A model that does not change: its logits on every window, computed once, for all epochs.

    A generator's rows are as long as the vocabulary: there a frozen copy computes them anew.
    """

    def __init__(self, model, run):
        self.model = None
        if run.task is questions:
            self.model = copy.deepcopy(model).eval()       # the model itself goes on learning
            return
        self.logits = dict(run_model(model, run.windows, run.pad))      # by window, (K,) or (n, K)

    @torch.no_grad()
    def rows(self, indices, inputs, width):
        """The logits (N, K) of a batch, made as wide as the student's: padding is added, or cut."""
        if self.model:
            return self.model(*inputs)
        rows = [F.pad(z, (0, width - z.shape[-1]), value=-1e4)
                for z in map(self.logits.get, indices)]
        return torch.cat(rows).view(-1, width).to(DEVICE)


def task_loss(logits, targets, teacher_logits, a):
    """(1 - a) * cross-entropy + a * T^2 * KL(teacher || student), means over the targets.

    logits (..., K), a row for every target (N,), in their order; teacher_logits (N, K), or None:
    the cross-entropy alone. Padding is -1e4, which is probability 0 (with -inf, KL would be NaN).
    """
    z = logits.flatten(0, -2)                                                            # (N, K)
    loss = F.cross_entropy(z, targets)
    if teacher_logits is None:
        return loss
    student = F.log_softmax(z / TEMPERATURE, -1)
    teacher = F.log_softmax(teacher_logits / TEMPERATURE, -1)
    kl = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return (1 - a) * loss + a * TEMPERATURE ** 2 * kl


def fit(run, stage, model, epochs, groups, teacher):
    """Go on training; prune the blocks of `groups` on the way. Raises ArithmeticError for NaN."""
    args = run.args
    set_up(model, args.dropout)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr, args.score_lr), fused=True)
    matrices, vectors, scores = (group["params"] for group in optimizer.param_groups)
    schedule = []
    for epoch in range(epochs):
        schedule += batches(run.windows, args.batch_size, epoch, args.seed)
    first = run.restore(stage, model, optimizer)
    total = len(schedule)
    parallel = model if WORLD == 1 else DistributedDataParallel(model, forward_sync_buffers=False)
    bar = tqdm(range(first, total), stage, total, initial=first, disable=RANK or None)
    for step in bar:
        torch.manual_seed(zlib.crc32(f"{args.seed} {stage} {step} {RANK}".encode()))    # dropout's
        lr = set_learning_rate(optimizer, args.lr, step, total)
        penalty = update_masks(run, model, groups, step, total)
        if groups and (step + 1) * 20 % total < 20:                      # for layers.svg
            run.state["history"].append(survivors(model, unmasked))
        loss = batch_loss(run, parallel, schedule[step], teacher) + penalty
        loss.backward()
        nn.utils.clip_grad_norm_(matrices + vectors, 1.0)
        nn.utils.clip_grad_norm_(scores, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        line = {"epoch": 1 + step * epochs // total, "step": step, "lr": lr,
                "loss": mean_of_processes(loss)}
        for name, group in zip(("attention", "ffn"), groups):
            line[f"{name}_density"] = group.density
        if not abs(line["loss"]) < torch.inf:
            raise ArithmeticError(f"{stage}: {line}: the loss is no number; lower --lr")
        run.log.write(json.dumps({"stage": stage, **line}) + "\n")
        bar.set_postfix(line, refresh=False)
        ends_epoch = (step + 1) * epochs % total == 0
        if ends_epoch and bar.disable:
            say(f"{stage}: {bar.postfix}")
        if ends_epoch or (step + 1) % args.save_every == 0:
            run.save(stage, step + 1, model=model, optimizer=optimizer)


def set_up(model, dropout):
    """Ready a model for training."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout) and dropout is not None:
            module.p = dropout
    for parameter in model.parameters():
        if not parameter.numel():                          # of layers without heads: no gradient
            parameter.requires_grad_(False)


def set_learning_rate(optimizer, peak, step, total):
    """Up over a tenth of the steps, then down, to 0 after the last; the scores' rate stays."""
    warm = max(1, total // 10)
    lr = peak * min((step + 1) / warm, (total - step) / max(1, total - warm))
    for group in optimizer.param_groups[:2]:
        group["lr"] = lr
    return lr


def batch_loss(run, model, batch, teacher):
    """The loss of this process's windows, weighted by their share of the batch's targets."""
    counts = [len(run.windows[i].targets) for i in batch]
    share = sum(counts[RANK::WORLD]) / sum(counts)
    mine = batch[RANK::WORLD] or batch[:1]         # one whose share is 0: DDP waits for everybody
    inputs, targets = collate([run.windows[i] for i in mine], run.pad, DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=run.args.amp):
        logits = model(*inputs)
        rows = teacher.rows(mine, inputs, logits.shape[-1]) if teacher else None
    # DDP takes the mean of all processes' gradients: WORLD makes it the sum of their shares.
    return WORLD * share * task_loss(logits, targets, rows, run.args.distill)


def mean_of_processes(loss):
    if WORLD > 1:
        distributed.all_reduce(loss.detach())                # the sum, in place
    return loss.item() / WORLD


def say(text):
    if RANK == 0:
        print(text, flush=True)


def add_masks(model, args):
    """Mask the attention and the FFN matrices."""
    return [
        BlockGroup(model, args.block, ["*.query", "*.key", "*.value"], ["*.attention.output"],
                   unit=model.config.head_size, method=args.method),
        BlockGroup(model, args.ffn_block, ["*.ffn.first"], ["*.ffn.second"], method=args.method)
    ]


def update_masks(run, model, groups, step, total):
    """The masks of this step; what soft movement adds to the loss, or 0."""
    args = run.args
    end = min(total - round(args.cooldown * total), total - 1)   # the last step has the final masks
    start = min(round(args.warmup * total), end)
    if args.speedup and groups:
        prices = run.state["prices"]
        for group in groups:
            group.rank()
        layers = survivors(model, unmasked)                       # ranks, not yet True and False
        limit = price(prices, layers, 0) * cubic(step, start, end, 1.0, 1 / args.speedup)
        keep_most(groups, lambda least: price(prices, layers, least) <= limit)
        return 0.0
    return sum(group.advance(step, start, end, args.density, lambda_)
               for group, lambda_ in zip(groups, args.lambdas))


# ---------------------------------------------------------------------------- the data, the folder


def prepare(args):
    """Open and check all that comes from outside, then claim the folder; model and teacher."""
    check(args)
    if WORLD > 1:
        distributed.init_process_group(timeout=timedelta(days=1))             # the first evaluates
    torch.manual_seed(args.seed)
    task = TASKS[args.task or "qa"]
    train = data.read_examples(task, args.train, "train", args.columns)
    model, tokenizer, _ = data.open_model(args.model, task, args.max_length)
    if task is glue:
        glue.choose_labels(model, train)
        model.to(DEVICE)
    args.labels = model.config.labels
    knows = args.dense_epochs or model.has_head and not args.layers             # enough to teach
    teacher = None
    if args.teacher:
        teacher, other, _ = data.open_model(args.teacher, task, args.max_length)
        knows = teacher.has_head and other.get_vocab() == tokenizer.get_vocab()
        if task is glue:
            knows = knows and glue.places(train, teacher) == glue.places(train, model)
    if args.distill and not knows:
        raise ValueError(f"{args.teacher or args.model}: cannot teach, without output layer, with "
                         "part of its layers, with other tokens or labels; give --dense-epochs, "
                         "another --teacher or --distill 0")
    if args.layers:
        take_layers(model, args.layers)
    with torch.device("meta"):                                   # tried out, before all the work
        for group in add_masks(type(model)(model.config), args):
            group.blocks_to_keep(1.0 if args.speedup else args.density)
    run = Run(args, task, tokenizer, train)
    run.claim(model)
    return run, model, teacher


def take_layers(model, layers):
    """Leave all other layers out. Raises ValueError."""
    if len({*layers} & {*range(len(model.layers))}) < len(layers):
        raise ValueError(f"--layers: 0 to {len(model.layers) - 1}, each once, not {layers}")
    model.layers = nn.ModuleList(model.layers[i] for i in layers)
    model.config = actual_config(model)


class Run:
    """What the stages share: the data, and the output folder with its log and its checkpoint.

    Only checkpoint.pt knows which stages are finished, and where to go on in the one that is not.
    """

    def __init__(self, args, task, tokenizer, train):
        """Read the data and cut them into windows. Raises ValueError where they can't be learnt."""
        self.args = args                                             # a data.text.Settings, too
        self.task = task
        self.tokenizer = tokenizer
        self.pad = tokenizer.token_to_id("[PAD]")
        self.out = Path(args.out)
        self.dev = data.read_examples(task, args.dev, "dev", args.columns)
        self.windows = task.make_windows(train, tokenizer, args)
        self.samples = data.sample_inputs(task.make_windows(self.dev, tokenizer, args), tokenizer)
        settings = {**vars(args), "processes": WORLD, "task": task.__name__,
                    "train": fingerprint(train), "dev": fingerprint(self.dev)}
        for name in ("out", "overwrite", "resume", "save_every"):            # these may change
            del settings[name]
        self.state = {"settings": settings, "scores": {}, "history": []}
        say(f"{args.train or 'generated corpus'}: {len(train)} examples in {len(self.windows)} "
            f"windows to train on; {len(self.dev)} examples to evaluate on")

    def claim(self, model):
        """Take the folder: go on with its run, or start anew. Raises ValueError."""
        checkpoint, log = self.out / "checkpoint.pt", self.out / "log.jsonl"
        summary = self.out / "summary.json"
        resumes = self.args.resume and checkpoint.exists()
        if resumes:
            settings = self.state["settings"]
            self.state = read_torch(checkpoint)
            then = self.state.get("settings", {})
            for name, now in settings.items():
                if then.get(name) != now:
                    raise ValueError(f"{checkpoint}: is of a run with {name} {then.get(name)}, not "
                                     f"{now}; give the same, or another --out")
            os.truncate(log, self.state["log"])              # to where it was at the checkpoint
        elif checkpoint.exists() and not summary.exists() and not self.args.overwrite:
            raise ValueError(f"{self.out}: holds an unfinished run; give --resume to go on with "
                             "it, --overwrite or another --out")
        if self.args.speedup and not resumes:
            self.state["prices"] = self.ask_prices(model)
        if WORLD > 1:
            distributed.barrier()                            # all have looked: one may write
        if RANK == 0 and not resumes:
            if checkpoint.exists():
                checkpoint.unlink()
                for name in STAGES:
                    shutil.rmtree(self.out / name, ignore_errors=True)          # an older run's
            self.out.mkdir(parents=True, exist_ok=True)
            summary.unlink(missing_ok=True)
        self.log = open(os.devnull if RANK else log, "a" if resumes else "w", 1)      # line by line
        if not resumes:
            self.save()

    def ask_prices(self, model):
        """The first process's price list, for all. Raises ValueError for a speed beyond it."""
        say("measuring what heads and FFN dimensions of a layer take, in milliseconds:")
        prices = [None if RANK else price_list(model, self.samples[0])]
        if WORLD > 1:
            distributed.broadcast_object_list(prices, device=DEVICE)
        prices = prices[0]
        say(pictures.price_table(prices))
        fastest = price(prices, survivors(model), 0) / prices["rest"]
        if self.args.speedup >= fastest:
            raise ValueError(f"--speedup {self.args.speedup:g}: without any head or FFN dimension "
                             f"it would be {fastest:.2f}; ask for less")
        return prices

    def stage(self, name, model, epochs, groups=(), teacher=None):
        """Train, make the masks permanent, save and score; if that is done, open what was saved."""
        if name in self.state["scores"] and epochs:
            return data.open_model(self.out / name, self.task)[0]
        fit(self, name, model, epochs, groups, teacher)
        bake(model)
        self.finish(name, model)
        return model

    def finish(self, name, model):
        """Save and score a model, once, and not in every process."""
        if RANK or name in self.state["scores"]:
            return
        if name != "dense" or self.args.dense_epochs:
            data.save_model(model, self.out / name, self.args.model)
        predictions = self.task.predict(model, self.tokenizer, self.dev, self.args)
        save_json(self.out / "predictions.json", predictions)
        scores = self.task.score(predictions, self.dev)
        self.state["scores"][name] = scores
        self.save()
        say(f"{name}: {', '.join(f'{k} {v:.2f}' for k, v in scores.items())}")

    def save(self, stage=None, step=0, **parts):
        """Write the checkpoint to resume from; it appears whole or not at all."""
        if RANK:
            return
        os.fsync(self.log.fileno())
        self.state |= {"stage": stage, "step": step, "log": self.log.tell()}
        tensors = {name: part.state_dict() for name, part in parts.items()}
        with whole_file(self.out / "checkpoint.pt") as file:
            torch.save(self.state | tensors, file)

    def restore(self, stage, model, optimizer):
        """Go on from the checkpoint, if it is of this stage; the step to begin with."""
        if self.state.get("stage") != stage:
            return 0
        model.load_state_dict(self.state.pop("model"))
        optimizer.load_state_dict(self.state.pop("optimizer"))
        return self.state["step"]


def fingerprint(examples):
    return f"{len(examples)} examples (crc {zlib.crc32(repr(examples).encode()):08x})"


def report(run, model, small, difference):
    """Print and draw what is left; write summary.json: the run is finished."""
    if WORLD > 1:
        distributed.destroy_process_group()
    if RANK:
        return
    batch = run.samples[0]
    if DEVICE.type == "cpu":                       # a GPU's memory may not hold the models twice
        last = "filled" if run.args.fill_epochs else "compact"
        speed, *quartiles = speedup_anew(batch, run.out / "pruned", run.out / last)
    else:
        speed, *quartiles = speedup(model, small, batch)
    summary = {
        "headline": run.task.HEADLINE,
        **run.state["scores"],
        **sizes(model, small),
        "largest_logit_difference": difference,
        "speedup": speed,
        "speedup_quartiles": quartiles,
    }
    layers = survivors(model)
    if prices := run.state.get("prices"):
        summary |= {
            "prices": prices,
            "speedup_asked": run.args.speedup,
            "speedup_predicted": price(prices, layers, 0) / price(prices, layers)
        }
    (run.out / "layers.svg").write_text(pictures.layers_svg([*run.state["history"], layers]))
    save_json(run.out / "summary.json", summary)
    say(f"{pictures.report(layers, summary)}\nmodels, predictions, log and picture: {run.out}")


def evaluate(args):
    """Scores of a saved model's folder, or of a predictions.json."""
    task = TASKS[args.task or "qa"]
    saved = Path(args.eval).is_dir()
    if saved:
        model, tokenizer, task = data.open_model(args.eval, args.task and task, args.max_length)
        if not model.has_head:
            raise ValueError(f"{args.eval}: has not learnt this task; give another --task")
        args.labels = model.config.labels
        if args.bfloat16:
            model.bfloat16()
    examples = data.read_examples(task, args.dev, "dev", args.columns)
    if saved:
        return task.score(task.predict(model, tokenizer, examples, args), examples)
    return task.score(data.read_predictions(args.eval, examples), examples)


# --------------------------------------------------------------------------------- the command line


def between(low, high, kind=float):
    """A number in a range, for argparse."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not {low:g} to {high:g}")
        return value
    return number


def numbers(text):
    return [*map(int, text.split(","))]


SHARE = between(0, 1)
WHOLE = between(0, 1e9, int)
POSITIVE = between(1, 1e9, int)
SWITCHES = [
    ("--resume", "go on with an unfinished run"),
    ("--overwrite", "replace even an unfinished run"),
    ("--amp", "train in bfloat16 (autocast): CUDA, or a CPU with avx512_bf16"),
    ("--bfloat16", "with --eval: with weights in bfloat16"),
]
FLAGS = [                                                # flag, type, default, help
    ("--model", str, None, "checkpoint's folder (default: the tiny BERT's)"),
    ("--train", str, None, "file to train on (default: a generated corpus)"),
    ("--dev", str, None, "file to evaluate on (default: likewise)"),
    ("--columns", str, None, "of a table: TEXT,LABEL or TEXT,TEXT2,LABEL (default: GLUE's)"),
    ("--out", str, "out", "folder for the results"),
    ("--save-every", POSITIVE, 500, "steps between checkpoints"),
    ("--eval", str, None, "score a saved model's folder or a predictions.json"),
    ("--block", str, "32x32", "blocks of the attention matrices: 32x32, 64xall, ..."),
    ("--ffn-block", str, "1xall", "blocks of the FFN matrices: 1xall, 32x32, ..."),
    ("--density", SHARE, 0.25, "fraction of the encoder's weights to keep"),
    ("--speedup", between(1, 1000), None, "instead: how many times as fast, on this machine"),
    ("--warmup", SHARE, 0.05, "part of the steps before pruning begins"),
    ("--cooldown", SHARE, 0.4, "part of the steps at the final density"),
    ("--dense-epochs", WHOLE, 2, "epochs of fine-tuning before pruning"),
    ("--epochs", WHOLE, 20, "epochs of fine-pruning"),
    ("--fill-epochs", WHOLE, 0, "epochs on what is left, its zeros set free"),
    ("--layers", numbers, None, "take only these, as in 0,2,4"),
    ("--batch-size", POSITIVE, 16, "windows in a training step"),
    ("--lr", SHARE, 3e-5, "learning rate of the weights"),
    ("--score-lr", SHARE, 1e-2, "learning rate of the scores; soft-movement alone feels it"),
    ("--dropout", SHARE, None, "in training (default: the checkpoint's)"),
    ("--teacher", str, None, "folder of the model to distill from (default: the dense one)"),
    ("--distill", SHARE, 0.9, "weight of the teacher in the loss"),
    ("--seed", WHOLE, 0, "seed of all random numbers"),
    ("--max-length", between(8, 1e9, int), 384, "tokens in a window"),
    ("--stride", WHOLE, 128, "tokens by which two windows overlap"),
    ("--max-answer", POSITIVE, 30, "tokens in an answer"),
    ("--null-threshold", float, 0.0, "SQuAD v2.0: no answer where [CLS] wins by more"),
]


def parse_args(argv):
    parser = data.Parser(description=__doc__.splitlines()[0],
                         epilog="Without --model and --train, a tiny BERT learns a generated "
                         f"corpus, with other defaults: {OFFLINE}")
    add = parser.add_argument
    add("--task", choices=TASKS, help="what to learn (default: qa; --eval: what the model says)")
    add("--method", default="movement", choices=METHODS, help="what decides (default: movement)")
    add("--lambda", dest="lambdas", type=between(0, 1e9), nargs=2, default=[10.0, 10.0],
        metavar="L", help="soft movement's penalties, of attention and FFN (default: 10 10)")
    for flag, text in SWITCHES:
        add(flag, action="store_true", help=text)
    size = parser.add_mutually_exclusive_group()
    for flag, kind, default, text in FLAGS:
        place = size if flag in ("--density", "--speedup") else parser
        if default is not None:
            text += f" (default: {default})"
        place.add_argument(flag, type=kind, default=default, help=text)
    args = parser.parse_args(argv)
    if args.model or args.train or args.eval:
        return args
    parser.set_defaults(**OFFLINE)
    return parser.parse_args(argv)


def check(args):
    """Settings that make no sense together raise ValueError."""
    if bool(args.train) != bool(args.dev) or not args.model:
        raise ValueError("--train and --dev go together, with a --model; see data/download.py")
    for path in filter(None, (args.model, args.teacher, args.train, args.dev)):
        for name in STAGES:
            if Path(path).resolve().is_relative_to(Path(args.out, name).resolve()):
                raise ValueError(f"{path}: the run would write over it; give another --out")
    single = "1x1" in (args.block, args.ffn_block)
    if args.speedup and (single or args.method == "soft-movement" or not args.epochs):
        raise ValueError("--speedup needs --epochs, a --method that ranks (not soft-movement), and "
                         "blocks larger than 1x1: single weights buy no speed")
    if args.warmup + args.cooldown >= 1:
        raise ValueError("--warmup and --cooldown together leave no step to prune in")


if __name__ == "__main__":
    main()
