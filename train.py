"""Fine-tune a BERT on SQuAD, learn which blocks of its weights can go, and delete them.

One idea: pruning is fine-tuning with a schedule. The run has five stages, each a few lines of
`run`: dense fine-tuning, fine-pruning with the dense model as teacher, making the zeros permanent,
filling (on request), deletion.

    python train.py --block 32x32                                    # offline, a few minutes
    python train.py --block 32x32 --model data/bert-base-uncased \\
        --train data/train-v1.1.json --dev data/dev-v1.1.json
    python train.py --block 32x32 --resume                           # after a stop of any kind
    python train.py --eval out/compact --dev data/dev-v1.1.json      # EM and F1 of a saved model
    torchrun --standalone --nproc_per_node=2 train.py --block 32x32  # on two devices

Sources: Lagunas et al., Block Pruning For Faster Transformers, 2021 (arXiv 2109.04838), section 4;
Hinton et al., Distilling the Knowledge in a Neural Network, 2015 (arXiv 1503.02531), section 2.

Shapes in comments: B batch, T tokens.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import zlib
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TextIO

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import compact
import prune
from data import generate, squad
from data.squad import Question, Window
from model import BertForQuestionAnswering, read_torch, save_json, whole_file

RANK, LOCAL, WORLD = (
    int(os.environ[name]) if distributed.is_torchelastic_launched() else alone      # by torchrun
    for name, alone in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
DEVICE = torch.device(f"cuda:{LOCAL}" if torch.cuda.is_available() else "cpu")
TEMPERATURE = 2.0                                                             # of distillation, T
QUIET = True if RANK else None                                      # bars on a terminal, from one
NONE = argparse.SUPPRESS                                            # no default that --help shows
# Other defaults for the generated corpus, which is what runs without --model and --train.
OFFLINE = dict(model=str(Path(__file__).parent / "data/tiny-bert"), dense_epochs=2, epochs=5,
               batch_size=32, lr=1e-3, dropout=0.0, offline=True)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], argument_default=NONE,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Without --model and --train, a tiny BERT learns a generated corpus, with defaults "
        + ", ".join("--{} {}".format(*o) for o in [*OFFLINE.items()][1:-1]).replace("_", "-"))
    parser.error = fail
    add = parser.add_argument
    def number(flag: str, kind: type, default, low: float, high: float, help: str):
        def value(text: str):
            if not low <= kind(text) <= high:
                raise argparse.ArgumentTypeError(f"{text} is not {low:g} to {high:g}: {help % ()}")
            return kind(text)
        value.__name__ = kind.__name__                                  # for argparse's messages
        add(flag, type=value, default=default, help=help)
    add("--block", default="32x32", help="blocks of the attention matrices: 32x32, 64xall, ...")
    add("--ffn-block", default="1xall", help="blocks of the FFN matrices: 1xall, 32x32, ...")
    add("--method", default="movement", choices=prune.METHODS, help="what decides about a block")
    number("--density", float, 0.25, 1e-9, 1, "fraction of the encoder's weights to keep")
    add("--lambda", dest="lambdas", type=float, nargs="+", default=[10.0], metavar="L",
        help="soft movement's penalty, which rules its density: one for all, or attention and FFN")
    add("--model", help="checkpoint's folder (default: the tiny BERT's)")
    add("--train", help="SQuAD's JSON to train on (default: the generated corpus)")
    add("--dev", help="SQuAD's JSON to evaluate on (default: likewise)")
    add("--out", default="out", help="folder for the results")
    add("--overwrite", action="store_true", default=False, help="replace even an unfinished run")
    add("--resume", action="store_true", default=False, help="go on with an unfinished run")
    number("--save-every", int, 500, 1, 1e9, "steps between checkpoints to resume from")
    add("--eval", metavar="PATH", help="evaluate a saved model's folder or a predictions.json")
    number("--dense-epochs", int, 2, 0, 1e6, "epochs of fine-tuning before pruning")
    number("--epochs", int, 20, 0, 1e6, "epochs of fine-pruning")
    number("--fill-epochs", int, 0, 0, 1e6, "epochs on what is left, its zeros set free")
    number("--warmup", int, NONE, 0, 1e9, "steps before pruning begins (default: 5%% of them)")
    number("--cooldown", int, NONE, 1, 1e9, "steps at the final density (default: 40%% of them)")
    add("--layers", type=layer_numbers, metavar="I,J", help="take only these layers, as in 0,2,4")
    number("--batch-size", int, 16, 1, 1e6, "windows in a training step")
    number("--lr", float, 3e-5, 0, 1, "learning rate of the weights")
    number("--score-lr", float, 1e-2, 0, 1e9, "learning rate of the scores")
    number("--max-length", int, 384, 1, 1e6, "tokens in a window")
    number("--stride", int, 128, 0, 1e6, "tokens by which two windows overlap")
    number("--dropout", float, NONE, 0, 0.999, "dropout in training (default: the checkpoint's)")
    add("--teacher", metavar="FOLDER", help="model to distill from (default: the dense one)")
    number("--distill", float, 0.9, 0, 1, "weight of the teacher in the loss, 0 for none")
    number("--null-threshold", float, 0.0, -1e9, 1e9, "v2.0: no answer where [CLS] wins by more")
    add("--amp", action="store_true", default=False, help="train in bfloat16 (autocast); for CUDA")
    number("--seed", int, 0, 0, 2**62, "seed of all random numbers")
    unset = dict.fromkeys("model train dev eval dropout teacher warmup cooldown layers".split())
    args = parser.parse_args(argv, Namespace(**unset))
    args.offline = not (args.model or args.train or args.eval)
    return parser.parse_args(argv, Namespace(**unset | OFFLINE)) if args.offline else args


def layer_numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def check(args: Namespace):
    """Settings that make no sense raise ValueError."""
    if "" in vars(args).values():
        raise ValueError("a flag is empty; give a path or leave the flag out")
    if not args.eval and (bool(args.train) != bool(args.dev) or not args.model):
        raise ValueError("--train, --dev and --model go together; see python data/download.py")
    written = ["masked", "compact", *["dense"] * bool(args.dense_epochs)]
    for path in filter(None, (args.model, args.teacher)):
        if Path(path).resolve() in [(Path(args.out) / name).resolve() for name in written]:
            raise ValueError(f"{path}: the run would write over it; give another --out")
    if len(args.lambdas) > 2 or not all(0 <= value < math.inf for value in args.lambdas):
        raise ValueError(f"--lambda {args.lambdas}: give one number >= 0, or two: attention, FFN")
    if args.layers and args.distill and not args.teacher and not args.dense_epochs:
        raise ValueError("--layers: part of a model cannot teach; give --teacher or --dense-epochs")


def fail(error: Exception | str, status: int = 2):
    """One line on standard error, and the end."""
    if isinstance(error, OSError) and error.strerror:                # the system's own words
        mend = "make room" if "space" in error.strerror else "check the path"
        error = f"{error.filename or 'output'}: {error.strerror}; {mend}"
    if RANK == 0:
        print(Path(sys.argv[0]).name, " ".join(str(error).split()), sep=": ", file=sys.stderr)
    sys.exit(status)


def sample_inputs(windows: list[Window], pad: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The model's inputs in batches of 8, for comparing models."""
    parts = [windows[low:low + 8] for low in range(0, len(windows), 8)]
    return [squad.collate(part, pad, DEVICE)["inputs"] for part in parts]


def span_loss(logits: tuple[Tensor, Tensor], batch: dict[str, Tensor], distill: float) -> Tensor:
    """(1 - a) * cross-entropy + a * T^2 * KL(teacher || student), each the mean of start and end.

    logits: start and end (B, T); a = distill. Padding gets -1e4, which is probability 0 (with -inf,
    KL would be NaN).
    """
    loss = 0.0
    for which, z in zip(("start", "end"), logits):
        z = z.float().masked_fill(~batch["mask"], -1e4)                      # (B, T)
        loss = loss + (1 - distill) * F.cross_entropy(z, batch[which]) / 2
        if distill:
            student = F.log_softmax(z / TEMPERATURE, -1)
            teacher = F.log_softmax(batch[f"teacher_{which}"] / TEMPERATURE, -1)
            kl = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
            loss = loss + distill * TEMPERATURE ** 2 * kl / 2
    return loss


def teacher_logits(model: nn.Module, windows: list[Window], pad: int) -> list[Tensor]:
    """Start and end logits (T, 2) of every window: computed once, for all epochs."""
    logits: list[Tensor] = [torch.empty(0)] * len(windows)
    for indices, _, start, end in tqdm(squad.logits_of(model, windows, pad), "teacher", leave=False,
                                       total=math.ceil(len(windows) / 32), disable=QUIET):
        for i, row in zip(indices, torch.stack((start, end), -1).cpu()):               # (T, 2)
            logits[i] = row[:len(windows[i].ids)].clone()
    return logits


def fit(model: nn.Module, windows: list[Window], pad: int, args: Namespace, epochs: int, stage: str,
        log: TextIO, groups: list[prune.BlockGroup] = (), teacher: list[Tensor] | None = None,
        state: dict | None = None, save: Callable = lambda *_: None):
    """Train; prune the blocks of `groups` on the way; distill from `teacher`, its logits (T, 2).

    state: a checkpoint to go on from, if it is of this stage; save(stage, step, model, optimizer)
    writes one. Raises ArithmeticError if the loss is no number, KeyboardInterrupt once saved.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.numel() > 0)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and args.dropout is not None:
            module.p = args.dropout
    parameters = prune.parameter_groups(model, args.lr, args.score_lr)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    scores = parameters[2]["params"]
    weights = [p for p in model.parameters() if not any(p is score for score in scores)]
    parallel = DistributedDataParallel(model, forward_sync_buffers=False) if WORLD > 1 else model
    total = epochs * math.ceil(len(windows) / args.batch_size)
    schedule = ((epoch, indices) for epoch in range(epochs)
                for indices in squad.batches(windows, args.batch_size, epoch, args.seed))
    done = 0
    if state and state["stage"] == stage:
        done = state["step"]
        model.load_state_dict(state.pop("model")), optimizer.load_state_dict(state.pop("optimizer"))
    else:
        save(stage, 0, model, optimizer)
    stop: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda *_: stop.append(1))    # Ctrl-C: after this step
    model.train()
    bar = tqdm(islice(enumerate(schedule), done, None), stage, total, initial=done, unit="step",
               disable=QUIET)
    for step, (epoch, indices) in bar:
        torch.manual_seed(zlib.crc32(f"{args.seed} {stage} {step} {RANK}".encode()))    # dropout's
        lr = args.lr * min((step + 1) / max(1, total // 10),      # up over a tenth, then down to 0
                           (total - step) / max(1, total - total // 10))
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr
        penalty = sum(group.advance(step, args.warmup, total - args.cooldown, args.density, lambda_)
                      for group, lambda_ in zip(groups, args.lambdas * 2))
        part = indices[RANK::WORLD]                                    # this process's share
        share = len(part) * WORLD / len(indices)
        part = part or indices[:1]
        batch = squad.collate([windows[i] for i in part], pad, DEVICE)
        if teacher:
            both = nn.utils.rnn.pad_sequence([teacher[i] for i in part], True, -1e4).to(DEVICE)
            batch["teacher_start"], batch["teacher_end"] = both.unbind(-1)              # (B, T)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bool(args.amp)):
            logits = parallel(*batch["inputs"])
        loss = share * span_loss(logits, batch, args.distill if teacher else 0.0) + penalty
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        nn.utils.clip_grad_norm_(scores, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sums = torch.stack([loss.detach(), loss.new_tensor(len(stop))])   # all processes agree on
        if WORLD > 1:
            distributed.all_reduce(sums)
        line = {"stage": stage, "epoch": epoch, "step": step, "loss": sums[0].item() / WORLD,
                "density": prune.overall_density(groups), "lr": lr}
        if not math.isfinite(line["loss"] + norm.item()):
            ids = ", ".join(windows[i].id for i in indices)
            raise ArithmeticError(f"{stage}: loss {line['loss']}, gradient {norm:.3g} at step "
                                  f"{step}, learning rate {lr:.3g}, questions {ids}; lower --lr")
        log.write(json.dumps(line) + "\n")
        bar.set_postfix({name: f"{line[name]:.3g}" for name in ("loss", "density", "lr")},
                        refresh=False)
        if args.method == "soft-movement" and step in (max(1, total - args.cooldown), total - 1):
            for name, group in zip(("attention", "FFN"), groups):
                if group.density in (0, 1) and RANK == 0:
                    keeps = "every block; raise" if group.density else "no block; lower"
                    bar.write(f"{name}: the threshold keeps {keeps} --lambda", sys.stderr)
        if sums[1] or (step + 1) % args.save_every == 0 or (step + 1) % (total // epochs) == 0:
            save(stage, step + 1, model, optimizer)
        if sums[1]:
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, handler)
    if stop:                                              # as the last step was being saved
        raise KeyboardInterrupt


def evaluate(path: str, questions: list[Question], args: Namespace) -> dict[str, float]:
    """EM and F1 of a saved model's folder, or of a predictions.json."""
    predictions = squad.read_predictions(path) if not Path(path).is_dir() else squad.predict(
        *open_model(path, args.max_length), questions, args.max_length, args.stride,
        args.null_threshold)
    if missing := sum(question.id not in predictions for question in questions):
        print(f"{path}: no prediction for {missing} of {len(questions)} questions", file=sys.stderr)
    return squad.score(predictions, questions)


def questions_in(path: str | None, split: str) -> list[Question]:
    """The questions of a file, or those of the generated corpus."""
    return squad.read_squad(path) if path else squad.questions_of(generate.corpus(split), "corpus")


def open_model(folder: str, max_length: int = 0, layers: list[int] | None = None
               ) -> tuple[BertForQuestionAnswering, Tokenizer]:
    """A saved model and its tokenizer, checked against each other and against the window."""
    model = BertForQuestionAnswering.from_pretrained(folder, layers)
    tokenizer = squad.load_tokenizer(folder)
    known, size = max(tokenizer.get_vocab().values()) + 1, model.config.vocab_size
    if known > size:
        raise ValueError(f"{folder}: the tokenizer has {known} tokens, the model {size}; "
                         "take both from the same checkpoint")
    if max_length > model.config.max_position_embeddings:
        raise ValueError(f"{folder}: the model reads {model.config.max_position_embeddings} tokens "
                         f"at most; lower --max-length {max_length}")
    return model.to(DEVICE), tokenizer


def claim(folder: Path, args: Namespace, settings: dict) -> tuple[TextIO, dict | None]:
    """The log in the output folder, and the checkpoint to go on from. Raises ValueError.

    settings: what must be as it was in the run to resume.
    """
    path, checkpoint, state = folder / "log.jsonl", folder / "checkpoint.pt", None
    if args.resume and checkpoint.exists():
        state = read_torch(checkpoint)
        if not path.exists() or path.stat().st_size < state.get("log", 0):
            raise ValueError(f"{path}: not all that it was at {checkpoint}; give --overwrite")
        for name, now in settings.items():
            if now != (then := state.get("settings", {}).get(name)):
                raise ValueError(f"{checkpoint}: is of a run with {name} {then}, not {now}; resume "
                                 "it with the same, or give another --out")
    elif RANK == 0 and path.exists() and not (
            (folder / "summary.json").exists() or args.overwrite or args.resume):
        raise ValueError(f"{folder}: holds an unfinished run; give --resume to go on with it, "
                         "--overwrite or another --out")
    if RANK:
        return open(os.devnull, "w"), state
    folder.mkdir(parents=True, exist_ok=True)
    if not state:
        checkpoint.unlink(missing_ok=True)
    log = open(path, "r+" if state else "w", encoding="utf-8", buffering=1)
    log.seek(state["log"] if state else 0), log.truncate()
    (folder / "summary.json").unlink(missing_ok=True)
    return log, state


def plan(model: nn.Module, args: Namespace) -> list[prune.BlockGroup]:
    """Mask the attention and the FFN matrices. Raises ValueError if no block would be left."""
    groups = [prune.BlockGroup(model, args.block, ["*.query", "*.key", "*.value"],
                               ["*.attention.output"], model.config.head_size, args.method),
              prune.BlockGroup(model, args.ffn_block, ["*.ffn.first"], ["*.ffn.second"],
                               method=args.method)]
    for name, block, group in zip(("attention", "FFN"), (args.block, args.ffn_block), groups):
        count = sum(scores.numel() for scores in group.scores)
        if args.epochs and args.method != "soft-movement" and not round(args.density * count):
            raise ValueError(f"--density {args.density} keeps none of the {name}'s {count} blocks "
                             f"of {block}, so every layer's would be empty; raise it")
    return groups


def main(argv: list[str] | None = None):
    try:
        run(parse_args(argv))
    except KeyboardInterrupt:
        fail("stopped; the same command with --resume goes on with a run", 130)
    except (ValueError, OSError, ArithmeticError) as error:
        fail(error)


def run(args: Namespace):
    sys.stdout = open(os.devnull, "w") if RANK else sys.stdout
    # All that comes from outside is opened and checked here, before anything is written.
    check(args)
    if WORLD > 1:
        distributed.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo",
                                       timeout=timedelta(days=1))   # the first one evaluates
    torch.manual_seed(args.seed)
    dev = questions_in(args.dev, "dev")
    if args.eval:
        print(json.dumps(evaluate(args.eval, dev, args)))
        return
    train = questions_in(args.train, "train")
    model, tokenizer = open_model(args.model, args.max_length, args.layers)
    teacher, vocabulary = open_model(args.teacher, args.max_length) if args.teacher else \
        (model, tokenizer)
    if vocabulary.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{args.teacher}: has not {args.model}'s vocabulary; give another")
    if args.distill and not (teacher.has_span_head or teacher is model and args.dense_epochs):
        raise ValueError(f"{args.teacher or args.model}: has no span head and cannot teach; "
                         "fine-tune it first, with --dense-epochs, or give --distill 0")
    with torch.device("meta"):
        plan(BertForQuestionAnswering(model.config), args)       # tried out, before all the work
    windows = squad.make_windows(train, tokenizer, args.max_length, args.stride)
    # The first windows are samples to compare models on; the others are only checked.
    samples = [part for _, part in squad.chunks(dev, tokenizer, args.max_length, args.stride)][0]
    steps = args.epochs * math.ceil(len(windows) / args.batch_size)
    args.warmup = steps * 5 // 100 if args.warmup is None else args.warmup
    args.cooldown = steps - steps * 60 // 100 if args.cooldown is None else args.cooldown
    if args.warmup + args.cooldown > steps > 0:
        raise ValueError(f"--warmup {args.warmup} and --cooldown {args.cooldown} are more than "
                         f"the {steps} steps of pruning; lower them")
    out, settings = Path(args.out), {**vars(args), "processes": WORLD}
    for name in ("out", "overwrite", "resume", "save_every"):            # these may change
        del settings[name]
    for name, part in (("train", train), ("dev", dev)):
        crcs = [zlib.crc32(repr(question).encode()) for question in part]
        settings[name] = f"{len(part)} questions (crc {zlib.crc32(repr(crcs).encode()):08x})"
    log, state = claim(out, args, settings)
    print(f"{len(train)} questions to train on, {len(windows)} windows; {len(dev)} to evaluate on"
          + " (a generated corpus; README.md says how to train on SQuAD)" * (not args.train)
          + f"; nothing to resume in {out}, so it starts" * (args.resume and not state))

    def save(stage: str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer):
        """Write the checkpoint to resume from; it appears whole or not at all."""
        if RANK == 0:
            with whole_file(out / "checkpoint.pt") as file:
                os.fsync(log.fileno())
                torch.save({"settings": settings, "stage": stage, "step": step, "rows": rows,
                            "log": log.tell(), "model": model.state_dict(),
                            "optimizer": optimizer.state_dict()}, file)

    def finish(stage: str, model: BertForQuestionAnswering, folder: str | None = None):
        """Save the model and measure it: once, not in every process."""
        if RANK:
            return
        if folder:
            model.save_pretrained(out / folder, args.model)
        predictions = squad.predict(model, tokenizer, dev, args.max_length, args.stride,
                                    args.null_threshold)
        rows[stage] = squad.score(predictions, dev)
        print("{}: EM {exact_match:.2f}, F1 {f1:.2f}".format(stage, **rows[stage]), flush=True)
        save_json(out / "predictions.json", predictions)

    rows: dict[str, dict[str, float]] = state["rows"] if state else {}
    pad, logits, at = tokenizer.token_to_id("[PAD]"), None, state["stage"] if state else "dense"
    # 1. Dense fine-tuning.
    if at == "dense":
        fit(model, windows, pad, args, args.dense_epochs, "dense", log, (), None, state, save)
        finish("dense", model, "dense" if args.dense_epochs else None)
    elif args.dense_epochs:
        model.load_state_dict(open_model(str(out / "dense"))[0].state_dict())
    # 2. Fine-pruning: the same loop with masks on, and the dense model as teacher.
    if args.distill and args.epochs + args.fill_epochs:
        logits = teacher_logits(teacher, windows, pad)
    del teacher
    if at != "fill":
        groups = plan(model, args)
        fit(model, windows, pad, args, args.epochs, "prune", log, groups, logits, state, save)
        # 3. Make the zeros permanent.
        prune.bake(model)
        if args.fill_epochs:
            finish("unfilled", model, "masked")
    else:
        model.load_state_dict(open_model(str(out / "masked"))[0].state_dict())
    # 4. Fill: train on what deletion would leave, from its zeros, and write it back.
    if args.fill_epochs:
        small = compact.compact(model)
        fit(small, windows, pad, args, args.fill_epochs, "fill", log, (), logits, state, save)
        compact.expand(small, model)
    finish("pruned", model, "masked")
    # 5. Delete the zeros, and prove that nothing else changed.
    small = compact.compact(model)
    inputs = sample_inputs(samples, pad)
    difference = compact.largest_difference(model, small, inputs)
    finish("compact", small, "compact")
    if WORLD > 1:
        distributed.destroy_process_group()
    if RANK:
        return
    speed = compact.speedup(model, small, inputs[0])
    summary = compact.summarise(rows, model, small, difference, speed)
    print(f"\n{compact.layer_table(model, small)}\n\n{compact.closing_table(summary)}\n\n"
          f"heads that only average: {summary['heads_mean']}\n"
          f"largest difference between pruned and compact logits: {difference:.1e}\n"
          f"models, predictions, log and picture: {out}")
    (out / "layers.svg").write_text(compact.drawing(model))
    save_json(out / "summary.json", summary)                         # the run is finished


if __name__ == "__main__":
    main()
