"""Fine-tune a BERT on SQuAD, learn which blocks of its weights can go, and delete them.

One idea: pruning is fine-tuning with a schedule. The run has five stages, each a few lines of
`main`: dense fine-tuning, fine-pruning with the dense model as teacher, making the zeros permanent,
filling (on request), deletion.

    python train.py --block 32x32                                    # offline, a few minutes
    python train.py --block 32x32 --model data/bert-base-uncased \\
        --train data/train-v1.1.json --dev data/dev-v1.1.json
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
import random
import sys
from argparse import Namespace
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import compact
import prune
from data import generate, squad
from data.squad import Question, Window
from model import BertForQuestionAnswering, save_json

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
        + ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in OFFLINE.items()
                    if name not in ("model", "offline")))
    parser.error = fail
    add = parser.add_argument
    def number(flag: str, kind: type, default, low: float, high: float, help: str):
        def value(text: str):
            if not low <= kind(text) <= high:
                raise argparse.ArgumentTypeError(f"{text} is outside {low:g} to {high:g}")
            return kind(text)
        value.__name__ = kind.__name__                                  # for argparse's messages
        add(flag, type=value, default=default, help=help)
    add("--block", default="32x32", help="blocks of the attention matrices, ROWSxCOLUMNS or all")
    add("--ffn-block", default="1xall", help="blocks of the FFN matrices")
    add("--method", default="movement", choices=("movement", "soft-movement", "magnitude"),
        help="keep the best blocks by score, those above a threshold, or the largest")
    number("--density", float, 0.25, 1e-9, 1,
           "fraction of the encoder's weights to keep (soft movement: see --lambda)")
    add("--lambda", dest="lambdas", type=float, nargs="+", default=[10.0], metavar="L",
        help="soft movement's penalty, which rules its density: one for all, or attention and FFN")
    add("--model", help="checkpoint's folder (default: the tiny BERT's)")
    add("--train", help="SQuAD's JSON to train on (default: the generated corpus)")
    add("--dev", help="SQuAD's JSON to evaluate on (default: likewise)")
    add("--out", default="out", help="folder for the results")
    add("--overwrite", action="store_true", help="replace even an unfinished run")
    add("--eval", metavar="PATH", help="evaluate a saved model's folder or a predictions.json")
    number("--dense-epochs", int, 2, 0, 1e6, "epochs of fine-tuning before pruning")
    number("--epochs", int, 20, 0, 1e6, "epochs of fine-pruning")
    number("--fill-epochs", int, 0, 0, 1e6, "epochs on what is left, its zeros set free")
    number("--warmup", int, NONE, 0, 1e9, "steps before pruning begins (default: 5%% of them)")
    number("--cooldown", int, NONE, 1, 1e9, "steps at the final density (default: 40%% of them)")
    add("--layers", type=layer_numbers, metavar="I,J,...",
        help="take only these layers of the checkpoint, as in 0,2,4")
    number("--batch-size", int, 16, 1, 1e6, "windows in a training step")
    number("--lr", float, 3e-5, 0, 1, "learning rate of the weights")
    number("--score-lr", float, 1e-2, 0, 1e9, "learning rate of the scores")
    number("--max-length", int, 384, 1, 1e6, "tokens in a window")
    number("--stride", int, 128, 0, 1e6, "tokens by which two windows overlap")
    number("--dropout", float, NONE, 0, 0.999, "dropout in training (default: the checkpoint's)")
    add("--teacher", metavar="FOLDER", help="model to distill from (default: the dense one)")
    number("--distill", float, 0.9, 0, 1, "weight of the teacher in the loss, 0 for none")
    number("--null-threshold", float, 0.0, -1e9, 1e9,
           "SQuAD v2.0: no answer where [CLS] beats the best span by more")
    add("--amp", action="store_true", help="train in bfloat16 (autocast); for CUDA")
    number("--seed", int, 0, 0, 2**62, "seed of all random numbers")
    unset = dict.fromkeys("model train dev eval dropout teacher warmup cooldown layers "
                          "overwrite amp".split())
    args = parser.parse_args(argv, Namespace(**unset))
    args.offline = not (args.model or args.train or args.eval)
    return parser.parse_args(argv, Namespace(**unset | OFFLINE)) if args.offline else args


def layer_numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def check(args: Namespace):
    """Settings that make no sense raise ValueError."""
    prune.parse_block(args.block), prune.parse_block(args.ffn_block)
    if not args.eval and bool(args.train) != bool(args.dev):
        raise ValueError("--train and --dev go together; without both, the generated corpus serves")
    if not args.eval and not args.model:
        raise ValueError("--train needs --model; python data/download.py gets bert-base-uncased")
    if len(args.lambdas) > 2 or not all(0 <= value < math.inf for value in args.lambdas):
        raise ValueError(f"--lambda {args.lambdas}: give one number, or two: attention's and FFN's")
    if args.layers and args.distill and not args.teacher and not args.dense_epochs:
        raise ValueError("--layers needs a --teacher, the whole model, --dense-epochs or "
                         "--distill 0: a part of a model cannot teach")


def fail(message: str):
    """One line on standard error, and exit status 2."""
    if RANK == 0:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def batches(windows: list[Window], size: int, epoch: int, seed: int) -> list[list[int]]:
    """One epoch's batches of window indices, of similar length: sorted in chunks of 50 batches."""
    rng, order = random.Random(f"{seed} {epoch}"), list(range(len(windows)))
    rng.shuffle(order)
    chunks = (order[i:i + 50 * size] for i in range(0, len(order), 50 * size))
    order = [i for chunk in chunks for i in sorted(chunk, key=lambda i: len(windows[i].ids))]
    result = [order[i:i + size] for i in range(0, len(order), size)]
    rng.shuffle(result)
    return result


def collate(windows: list[Window], pad: int) -> dict[str, Tensor]:
    """Pad windows to the longest: the model's inputs, its targets, and where the context lies."""
    ids = pad_sequence([w.ids for w in windows], batch_first=True, padding_value=pad)  # (B, T)
    length = torch.tensor([len(w.ids) for w in windows])[:, None]                      # (B, 1)
    first = torch.tensor([w.first for w in windows])[:, None]
    position = torch.arange(ids.shape[1])                                              # (T,)
    second = (position >= first) & (position < length)
    batch = {"start": torch.tensor([w.start for w in windows]),                        # (B,)
             "end": torch.tensor([w.end for w in windows]),
             "mask": position < length, "context": second & (position < length - 1)}
    batch = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
    return {**batch, "inputs": (ids.to(DEVICE), batch["mask"], second.long().to(DEVICE))}


def sample_inputs(windows: list[Window], pad: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The model's inputs in batches of 8, for comparing models."""
    return [collate(windows[low:low + 8], pad)["inputs"] for low in range(0, len(windows), 8)]


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


@torch.inference_mode()
def logits_of(model: nn.Module, windows: list[Window], pad: int,
              size: int = 32) -> Iterator[tuple[list[int], dict[str, Tensor], Tensor, Tensor]]:
    """All windows in batches of similar length: indices, batch, start and end logits (B, T)."""
    model.eval()
    order = sorted(range(len(windows)), key=lambda i: len(windows[i].ids))
    for low in range(0, len(order), size):
        indices = order[low:low + size]
        batch = collate([windows[i] for i in indices], pad)
        yield indices, batch, *model(*batch["inputs"])


def teacher_logits(model: nn.Module, windows: list[Window], pad: int) -> list[Tensor]:
    """Start and end logits (T, 2) of every window: computed once, for all epochs."""
    logits: list[Tensor] = [torch.empty(0)] * len(windows)
    bar = tqdm(total=len(windows), desc="teacher", unit="window", leave=False, disable=QUIET)
    for indices, _, start, end in logits_of(model, windows, pad):
        for i, row in zip(indices, torch.stack((start, end), -1).cpu()):               # (T, 2)
            logits[i] = row[:len(windows[i].ids)].clone()
        bar.update(len(indices))
    bar.close()
    return logits


def fit(model: nn.Module, windows: list[Window], pad: int, args: Namespace, epochs: int, stage: str,
        log: TextIO, groups: list[prune.BlockGroup] = (), teacher: list[Tensor] | None = None):
    """Train; prune the blocks of `groups` on the way; distill from `teacher`, its logits (T, 2)."""
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

    def linear(step: int) -> float:                          # warm-up over a tenth, then decay to 0
        return min((step + 1) / max(1, total // 10), (total - step) / max(1, total - total // 10))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [linear, linear, lambda step: 1.0])
    schedule = ((epoch, indices) for epoch in range(epochs)
                for indices in batches(windows, args.batch_size, epoch, args.seed))
    model.train()
    bar = tqdm(schedule, total=total, desc=stage, unit="step", disable=QUIET)
    for step, (epoch, indices) in enumerate(bar):
        penalty = sum(group.advance(step, args.warmup, total - args.cooldown, args.density, lambda_)
                      for group, lambda_ in zip(groups, args.lambdas * 2))
        part = indices[RANK::WORLD]                                    # this process's share
        share = len(part) * WORLD / len(indices)
        part = part or indices[:1]
        batch = collate([windows[i] for i in part], pad)
        if teacher:
            both = pad_sequence([teacher[i] for i in part], True, -1e4).to(DEVICE)     # (B, T, 2)
            batch["teacher_start"], batch["teacher_end"] = both.unbind(-1)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bool(args.amp)):
            logits = parallel(*batch["inputs"])
        loss = share * span_loss(logits, batch, args.distill if teacher else 0.0) + penalty
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        nn.utils.clip_grad_norm_(scores, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if WORLD > 1:
            distributed.all_reduce(loss)
        line = {"stage": stage, "epoch": epoch, "step": step, "loss": loss.item() / WORLD,
                "density": prune.overall_density(groups), "lr": scheduler.get_last_lr()[0]}
        log.write(json.dumps(line) + "\n")
        bar.set_postfix({name: f"{line[name]:.3g}" for name in ("loss", "density", "lr")},
                        refresh=False)
        scheduler.step()


def chunks(questions: list[Question], tokenizer: Tokenizer, max_length: int,
           stride: int) -> Iterator[tuple[list[Question], list[Window]]]:
    """256 questions at a time and their windows, so that memory stays bounded."""
    for low in range(0, len(questions), 256):
        chunk = questions[low:low + 256]
        yield chunk, squad.make_windows(chunk, tokenizer, max_length, stride)


def predict(model: nn.Module, tokenizer: Tokenizer, questions: list[Question], max_length: int,
            stride: int, null_threshold: float = 0.0) -> dict[str, str]:
    """The best answer to every question, by id; for SQuAD v2.0, "" where [CLS] scores higher."""
    answers = {}
    bar = tqdm(total=len(questions), desc="evaluate", unit="question", leave=False, disable=QUIET)
    for chunk, windows in chunks(questions, tokenizer, max_length, stride):
        best, null = [(-math.inf, "")] * len(chunk), [math.inf] * len(chunk)
        for indices, batch, start, end in logits_of(model, windows, tokenizer.token_to_id("[PAD]")):
            found = start[:, 0] + end[:, 0], *squad.best_spans(start, end, batch["context"])
            for i, none, score, first, last in zip(indices, *(x.tolist() for x in found)):
                window = windows[i]
                null[window.question] = min(null[window.question], none)
                if score > best[window.question][0]:
                    text = chunk[window.question].context[window.text(first, last)]
                    best[window.question] = score, text
        for question, none, (score, text) in zip(chunk, null, best):
            empty = question.v2 and none - score > null_threshold
            answers[question.id] = "" if empty else text
        bar.update(len(chunk))
    bar.close()
    return answers


def evaluate(path: str, questions: list[Question], args: Namespace) -> dict[str, float]:
    """EM and F1 of a saved model's folder, or of a predictions.json."""
    if Path(path).is_dir():
        model, tokenizer = open_model(path, args.max_length)
        predictions = predict(model, tokenizer, questions, args.max_length, args.stride,
                              null_threshold=args.null_threshold)
    else:
        predictions = squad.read_predictions(path)
    missing = sum(question.id not in predictions for question in questions)
    if missing:
        print(f"{path}: no prediction for {missing} of {len(questions)} questions", file=sys.stderr)
    return squad.score(predictions, questions)


def questions_in(path: str | None, split: str) -> list[Question]:
    """The questions of a file, or those of the generated corpus."""
    if path:
        return squad.read_squad(path)
    return squad.questions_of(generate.corpus(split), "generated corpus")


def open_model(folder: str, max_length: int = 0, layers: list[int] | None = None
               ) -> tuple[BertForQuestionAnswering, Tokenizer]:
    """A saved model and its tokenizer, checked against each other and against the window."""
    model = BertForQuestionAnswering.from_pretrained(folder, layers)
    tokenizer = squad.load_tokenizer(folder)
    known, size = tokenizer.get_vocab_size(), model.config.vocab_size
    if known > size:
        raise ValueError(f"{folder}: the tokenizer has {known} tokens, the model {size}; "
                         "take both from the same checkpoint")
    if max_length > model.config.max_position_embeddings:
        raise ValueError(f"{folder}: the model reads {model.config.max_position_embeddings} tokens "
                         f"at most; lower --max-length {max_length}")
    return model.to(DEVICE), tokenizer


def claim(folder: Path, overwrite: bool) -> TextIO:
    """Open the log in the output folder. Raises ValueError if an unfinished run lies there."""
    if RANK:
        return open(os.devnull, "w")
    if (folder / "log.jsonl").exists() and not (folder / "summary.json").exists() and not overwrite:
        raise ValueError(f"{folder}: holds an unfinished run; give --overwrite or another --out")
    folder.mkdir(parents=True, exist_ok=True)
    log = open(folder / "log.jsonl", "w", encoding="utf-8", buffering=1)
    (folder / "summary.json").unlink(missing_ok=True)
    return log


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    sys.stdout = open(os.devnull, "w") if RANK else sys.stdout
    try:                                    # all that comes from outside is opened and checked here
        check(args)
        if WORLD > 1:
            distributed.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo",
                                           timeout=timedelta(days=1))   # the first one evaluates
        torch.manual_seed(args.seed)
        dev = questions_in(args.dev, "dev")
        if args.eval:
            if not args.dev:
                print("no --dev: evaluating on the generated corpus", file=sys.stderr)
            print(json.dumps(evaluate(args.eval, dev, args)))
            return
        train = questions_in(args.train, "train")
        model, tokenizer = open_model(args.model, args.max_length, args.layers)
        teacher = model
        if args.teacher:
            teacher, vocabulary = open_model(args.teacher, args.max_length)
            if vocabulary.get_vocab() != tokenizer.get_vocab():
                raise ValueError(f"{args.teacher}: its vocabulary is not that of {args.model}")
        if args.distill and not (teacher.has_span_head or teacher is model and args.dense_epochs):
            raise ValueError(f"{args.teacher or args.model}: has no span head and cannot teach; "
                             "fine-tune it first, with --dense-epochs, or give --distill 0")
        torch.manual_seed(args.seed + RANK)                # dropout differs between processes
        windows = squad.make_windows(train, tokenizer, args.max_length, args.stride)
        samples = []
        for _, part in chunks(dev, tokenizer, args.max_length, args.stride):
            samples = samples or part                          # the first; all are checked
        steps = args.epochs * math.ceil(len(windows) / args.batch_size)
        args.warmup = steps * 5 // 100 if args.warmup is None else args.warmup
        args.cooldown = steps - steps * 60 // 100 if args.cooldown is None else args.cooldown
        if args.warmup + args.cooldown > steps > 0:
            raise ValueError(f"--warmup {args.warmup} and --cooldown {args.cooldown} are more than "
                             f"the {steps} steps of pruning")
        out = Path(args.out)
        log = claim(out, args.overwrite)
    except (ValueError, OSError) as error:
        fail(str(error))
    if args.offline:
        print("Training on a small generated corpus. On SQuAD: python data/download.py, then\n"
              "python train.py --block 32x32 --model data/bert-base-uncased "
              "--train data/train-v1.1.json --dev data/dev-v1.1.json")
    print(f"{len(train)} questions to train on, {len(windows)} windows; {len(dev)} to evaluate on")

    def finish(stage: str, model: BertForQuestionAnswering, folder: str | None = None):
        """Save the model and measure it: once, not in every process."""
        if RANK:
            return
        if folder:
            model.save_pretrained(out / folder, args.model)
        predictions = predict(model, tokenizer, dev, args.max_length, args.stride,
                              null_threshold=args.null_threshold)
        rows[stage] = squad.score(predictions, dev)
        em, f1 = rows[stage]["exact_match"], rows[stage]["f1"]
        print(f"{stage}: EM {em:.2f}, F1 {f1:.2f}", flush=True)
        save_json(out / "predictions.json", predictions)

    rows: dict[str, dict[str, float]] = {}
    pad, logits = tokenizer.token_to_id("[PAD]"), None
    with log:
        # 1. Dense fine-tuning.
        if args.dense_epochs:
            fit(model, windows, pad, args, args.dense_epochs, "dense", log)
        finish("dense", model, "dense" if args.dense_epochs else None)
        # 2. Fine-pruning: the same loop with masks on, and the dense model as teacher.
        if args.distill and args.epochs + args.fill_epochs:
            logits = teacher_logits(teacher, windows, pad)
        del teacher
        attention = ["*.attention.query", "*.attention.key", "*.attention.value"]
        groups = [prune.BlockGroup(model, args.block, attention, ["*.attention.output"],
                                   model.config.head_size, args.method),
                  prune.BlockGroup(model, args.ffn_block, ["*.ffn.first"], ["*.ffn.second"],
                                   method=args.method)]
        fit(model, windows, pad, args, args.epochs, "prune", log, groups, logits)
        # 3. Make the zeros permanent.
        prune.bake(model)
        # 4. Fill: train on what deletion would leave, from its zeros, and write it back.
        if args.fill_epochs:
            finish("unfilled", model, "masked")
            small = compact.compact(model)
            fit(small, windows, pad, args, args.fill_epochs, "fill", log, teacher=logits)
            compact.expand(small, model)
        finish("pruned", model, "masked")
        # 5. Delete the zeros, and prove that nothing else changed.
        small = compact.compact(model)
        inputs = sample_inputs(samples, pad)
        try:
            difference = compact.largest_difference(model, small, inputs)
        except ArithmeticError as error:
            sys.exit(f"train.py: {error}; the masked model is in {out / 'masked'}")
        finish("compact", small, "compact")
    if WORLD > 1:
        distributed.destroy_process_group()
    if RANK:
        return
    speed = compact.speedup(model, small, inputs[0])
    summary = compact.summarise(rows, model, small, difference, speed)
    print(f"\n{compact.layer_table(model, small)}\n\n{compact.closing_table(summary)}\n\n"
          f"heads that only average: {summary['heads_mean']}\n"
          f"largest difference between pruned and compact logits: {difference:.1e}")
    save_json(out / "summary.json", summary)                         # the run is finished


if __name__ == "__main__":
    main()
