"""Fine-tune a BERT on SQuAD, learn which blocks of its weights can go, delete them, and say what is left.

One idea: pruning is fine-tuning with a schedule. The run has four stages, each a few lines of `main`:
dense fine-tuning, fine-pruning with the dense model as teacher, baking the masks, and deletion.

    python train.py --block 32x32                                        # offline, a few minutes
    python train.py --block 32x32 --model data/bert-base-uncased \\
        --train data/train-v1.1.json --dev data/dev-v1.1.json            # the paper's experiment
    python train.py --eval out/compact --dev data/dev-v1.1.json          # EM and F1 of any saved model

Sources: Lagunas et al., Block Pruning For Faster Transformers, 2021 (arXiv 2109.04838), section 4 and
appendix; Hinton et al., Distilling the Knowledge in a Neural Network, 2015 (arXiv 1503.02531), section 2.

Shapes in comments: B batch, T tokens.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import compact
import prune
from data import generate, squad
from data.squad import Question, Window
from model import BertForQuestionAnswering

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TEMPERATURE = 2.0
# The defaults without --model and --train: the generated corpus needs other settings than SQuAD.
OFFLINE = dict(model=str(Path(__file__).parent / "data/tiny-bert"), dense_epochs=3, epochs=6,
               batch_size=32, lr=1e-3, dropout=0.0)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog=f"Without --model and --train the defaults are: {OFFLINE}")
    parser.error = fail
    add = parser.add_argument
    add("--block", default="32x32", help="blocks of the attention matrices: rows x columns, or `all`")
    add("--ffn-block", default="1xall", help="blocks of the FFN matrices")
    add("--density", type=float, default=0.25, help="fraction of the encoder's weights to keep")
    add("--model", help="folder with config.json, weights and vocabulary (default: a tiny BERT)")
    add("--train", help="training questions in SQuAD's format (default: the generated corpus)")
    add("--dev", help="questions to evaluate on")
    add("--out", default="out", help="folder for the results")
    add("--overwrite", action="store_true", help="write into the folder of an unfinished run")
    add("--eval", metavar="PATH", help="only evaluate a saved model's folder, or a predictions.json")
    add("--dense-epochs", type=int, default=2, help="epochs of fine-tuning before pruning")
    add("--epochs", type=int, default=20, help="epochs of fine-pruning")
    add("--batch-size", type=int, default=16, help="windows in a training step")
    add("--lr", type=float, default=3e-5, help="learning rate of the weights")
    add("--score-lr", type=float, default=1e-2, help="learning rate of the scores")
    add("--max-length", type=int, default=384, help="tokens in a window")
    add("--stride", type=int, default=128, help="tokens by which two windows overlap")
    add("--dropout", type=float, help="dropout while training (default: the checkpoint's)")
    add("--teacher", metavar="FOLDER", help="model to distill from (default: the dense model)")
    add("--distill", type=float, default=0.9, help="weight of the teacher in the loss; 0 for none")
    add("--seed", type=int, default=0, help="seed of all random numbers")
    args = parser.parse_args(argv)
    args.offline = not (args.model or args.train or args.eval)
    if args.offline:
        parser.set_defaults(**OFFLINE)
        args = parser.parse_args(argv, Namespace(offline=True))
    return args


def fail(message: str):
    """One line on standard error, and exit status 2."""
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(2)


def check(args: Namespace):
    """Settings that make no sense raise ValueError."""
    prune.parse_block(args.block), prune.parse_block(args.ffn_block)
    for flag, fits, mend in (
            ("density", 0 < args.density <= 1, "above 0 and at most 1"),
            ("distill", 0 <= args.distill <= 1, "from 0 to 1"),
            ("dropout", 0 <= (args.dropout or 0) < 1, "from 0 to below 1"),
            ("lr", 0 < args.lr < math.inf, "above 0"), ("score_lr", 0 < args.score_lr < math.inf, "above 0"),
            ("batch_size", args.batch_size > 0, "above 0"), ("stride", args.stride >= 0, "0 or more"),
            ("dense_epochs", args.dense_epochs >= 0, "0 or more"), ("epochs", args.epochs >= 0, "0 or more")):
        if not fits:
            raise ValueError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; it must be {mend}")
    if not args.eval and bool(args.train) != bool(args.dev):
        raise ValueError("--train and --dev go together; give both, or none for the generated corpus")
    if not args.eval and not args.model:
        raise ValueError("--train needs --model, a folder with a checkpoint; python data/download.py gets one")


# -------------------------------------------------------------------------------------- from text to loss


def batches(windows: list[Window], size: int, epoch: int, seed: int) -> list[list[int]]:
    """Shuffled batches of window indices of similar length: sorted within shuffled chunks of 50 batches."""
    order = list(range(len(windows)))
    rng = random.Random(f"{seed} {epoch}")
    rng.shuffle(order)
    chunks = (order[i:i + 50 * size] for i in range(0, len(order), 50 * size))
    order = [i for chunk in chunks for i in sorted(chunk, key=lambda i: len(windows[i].ids))]
    result = [order[i:i + size] for i in range(0, len(order), size)]
    rng.shuffle(result)
    return result


def span_loss(logits: tuple[Tensor, Tensor], batch: dict[str, Tensor], distill: float = 0.0) -> Tensor:
    """(1 - distill) * cross-entropy + distill * T^2 * KL(teacher || student), each the mean of start and end.

    logits: start and end (B, T). Padded positions get probability 0 (-1e4 rather than -inf, whose KL is NaN).
    """
    loss = 0.0
    for which, z in zip(("start", "end"), logits):
        z = z.masked_fill(~batch["attention_mask"], -1e4)                                    # (B, T)
        loss = loss + (1 - distill) * F.cross_entropy(z, batch[which]) / 2
        if distill:
            student = F.log_softmax(z / TEMPERATURE, -1)
            teacher = F.log_softmax(batch[f"teacher_{which}"] / TEMPERATURE, -1)
            kl = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
            loss = loss + distill * TEMPERATURE ** 2 * kl / 2
    return loss


@torch.inference_mode()
def teacher_logits(model: nn.Module, windows: list[Window], pad: int, size: int) -> list[Tensor]:
    """Start and end logits (T, 2) of every window, computed once and kept in memory."""
    model.eval()
    logits: list[Tensor] = [torch.empty(0)] * len(windows)
    order = sorted(range(len(windows)), key=lambda i: len(windows[i].ids))
    for i in tqdm(range(0, len(order), size), desc="teacher", leave=False, disable=None):
        batch = to_device(squad.collate([windows[j] for j in order[i:i + size]], pad))
        pair = torch.stack(model(*inputs_of(batch)), -1).cpu()                                      # (B, T, 2)
        for j, row in zip(order[i:i + size], pair):
            logits[j] = row[:len(windows[j].ids)].clone()
    return logits


def to_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def inputs_of(batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]


# ------------------------------------------------------------------------------------------ the training loop


def fit(model: nn.Module, windows: list[Window], pad: int, args: Namespace, epochs: int, stage: str,
        log, groups: list[prune.BlockGroup] = (), teacher: list[Tensor] | None = None):
    """Train for `epochs` epochs; with `groups`, prune their blocks to args.density on the way."""
    scores = [score for group in groups for score in group.scores]
    scored = {id(score) for score in scores}
    weights = [p for p in model.parameters() if id(p) not in scored]
    optimizer = torch.optim.AdamW([
        {"params": [p for p in weights if p.ndim > 1], "lr": args.lr, "weight_decay": 0.01},
        {"params": [p for p in weights if p.ndim == 1], "lr": args.lr, "weight_decay": 0.0},
        {"params": scores, "lr": args.score_lr, "weight_decay": 0.0}], fused=True)
    total = epochs * math.ceil(len(windows) / args.batch_size)

    def linear(step: int) -> float:                           # warm-up over a tenth, then decay to 0
        return min((step + 1) / max(1, total // 10), (total - step) / (total - total // 10))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [linear, linear, lambda step: 1.0])
    model.train()
    step, density = 0, 1.0
    bar = tqdm(total=total, desc=stage, unit="step", disable=None)
    for epoch in range(epochs):
        for indices in batches(windows, args.batch_size, epoch, args.seed):
            for group in groups:
                density = prune.cubic_density(step, total // 20, total - 2 * total // 5, args.density)
                group.keep(density)
            batch = squad.collate([windows[i] for i in indices], pad)
            if teacher:
                both = pad_sequence([teacher[i] for i in indices], batch_first=True, padding_value=-1e4)
                batch["teacher_start"], batch["teacher_end"] = both.unbind(-1)               # (B, T)
            batch = to_device(batch)
            loss = span_loss(model(*inputs_of(batch)), batch, args.distill if teacher else 0.0)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            nn.utils.clip_grad_norm_(scores, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            line = {"stage": stage, "epoch": epoch, "step": step, "loss": round(loss.item(), 6),
                    "lr": scheduler.get_last_lr()[0], "density": round(density, 6)}
            log.write(json.dumps(line) + "\n")
            bar.set_postfix({"loss": f"{line['loss']:.3f}", "density": f"{density:.3f}",
                             "lr": f"{line['lr']:.1e}"}, refresh=False)
            bar.update()
            scheduler.step()
            step += 1
    bar.close()


# ------------------------------------------------------------------------------------------------ evaluation


@torch.inference_mode()
def predict(model: nn.Module, tokenizer: Tokenizer, questions: list[Question], max_length: int, stride: int,
            batch_size: int = 32) -> dict[str, str]:
    """The best answer to every question, by id. Questions are taken 256 at a time, to bound memory."""
    model.eval()
    pad = tokenizer.token_to_id("[PAD]")
    answers = {}
    bar = tqdm(total=len(questions), desc="evaluate", unit="question", leave=False, disable=None)
    for low in range(0, len(questions), 256):
        chunk = questions[low:low + 256]
        windows = squad.make_windows(chunk, tokenizer, max_length, stride)
        windows.sort(key=lambda window: len(window.ids))
        best: list[tuple[float, str]] = [(-math.inf, "")] * len(chunk)
        for i in range(0, len(windows), batch_size):
            part = windows[i:i + batch_size]
            batch = to_device(squad.collate(part, pad))
            spans = (x.tolist() for x in squad.best_spans(*model(*inputs_of(batch)), batch["context"]))
            for window, score, first, last in zip(part, *spans):
                if score > best[window.question][0]:
                    begin, end = window.offsets[first - window.first, 0], window.offsets[last - window.first, 1]
                    best[window.question] = score, chunk[window.question].context[begin:end]
        answers.update((question.id, text) for question, (_, text) in zip(chunk, best))
        bar.update(len(chunk))
    bar.close()
    return answers


def evaluate(path: str, questions: list[Question], args: Namespace) -> dict[str, float]:
    """EM and F1 of a saved model's folder or of a predictions.json."""
    if Path(path).is_dir():
        model, tokenizer = open_model(path, args)
        return squad.score(predict(model, tokenizer, questions, args.max_length, args.stride), questions)
    try:
        predictions = json.loads(Path(path).read_text(encoding="utf-8"))
        assert isinstance(predictions, dict) and all(isinstance(p, str) for p in predictions.values())
    except (ValueError, AssertionError):
        raise ValueError(f"{path}: not a JSON object of question ids and answer texts") from None
    return squad.score(predictions, questions)


# ------------------------------------------------------------------------------------------- input and output


def questions_in(path: str | None, split: str) -> list[Question]:
    """The questions of a file in SQuAD's format, or of the generated corpus."""
    return squad.read_squad(path) if path else squad.questions_of(generate.corpus(split), "generated corpus")


def open_model(folder: str, args: Namespace) -> tuple[BertForQuestionAnswering, Tokenizer]:
    """A saved model and its tokenizer, checked against each other and against the window."""
    model, tokenizer = BertForQuestionAnswering.from_pretrained(folder), squad.load_tokenizer(folder)
    size, positions = model.config.vocab_size, model.config.max_position_embeddings
    if tokenizer.get_vocab_size() > size:
        raise ValueError(f"{folder}: the tokenizer knows {tokenizer.get_vocab_size()} tokens, the model {size}; "
                         f"they belong to different checkpoints")
    if args.max_length > positions:
        raise ValueError(f"{folder}: the model reads at most {positions} tokens; lower --max-length {args.max_length}")
    return model.to(DEVICE), tokenizer


def save_model(model: BertForQuestionAnswering, tokenizer_folder: str, folder: Path):
    """The model, and the files of its tokenizer, so that the folder stands alone."""
    model.save_pretrained(folder)
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        source = Path(tokenizer_folder) / name
        if source.exists() and source.resolve() != (folder / name).resolve():
            shutil.copyfile(source, folder / name)


def save_json(path: Path, value):
    """Write JSON; the file appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def claim(folder: Path, overwrite: bool):
    """Make the output folder this run's. Raises ValueError if an unfinished run lies there."""
    if (folder / "log.jsonl").exists() and not (folder / "summary.json").exists() and not overwrite:
        raise ValueError(f"{folder}: holds an unfinished run; give --overwrite to replace it, or another --out")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)


def closing_table(s: dict) -> str:
    """One row a model. The pruned model has the dense one's shapes, so it is what the compact one is timed against."""
    heads, total = s["heads_kept"], s["heads_total"]
    lines = ["model        EM     F1   density   parameters      heads    speed"]
    for name, density, size, kept, speed in (
            ("dense", 1.0, s["parameters_dense"], total, 1.0),
            ("pruned", s["density"], s["parameters_dense"], total, 1.0),
            ("compact", s["compact_density"], s["parameters_compact"], heads, s["speedup"])):
        lines.append(f"{name:8} {s[name]['exact_match']:6.2f} {s[name]['f1']:6.2f}  {density:8.3f}  "
                     f"{size:11,}  {kept:3} of {total:3}  {speed:6.2f}x")
    return "\n".join(lines)


def encoder_density(model: nn.Module, of: nn.Module | None = None) -> float:
    """Weights of the encoder's linear layers that are not zero, as a fraction of those `of` has."""
    kept = sum(kept for kept, _ in prune.densities(model, "layers.*").values())
    return kept / compact.linear_weights((of or model).layers)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------------------------------------- the run


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    try:                                    # all that comes from outside is opened and checked here
        check(args)
        dev = questions_in(args.dev, "dev")
        if args.eval:
            print(json.dumps(evaluate(args.eval, dev, args)))
            return
        train = questions_in(args.train, "train")
        model, tokenizer = open_model(args.model, args)
        teacher = open_model(args.teacher, args)[0] if args.teacher else None
        pad = tokenizer.token_to_id("[PAD]")
        windows = squad.make_windows(train, tokenizer, args.max_length, args.stride)
        dev_windows = squad.make_windows(dev[:200], tokenizer, args.max_length, args.stride)
        out = Path(args.out)
        claim(out, args.overwrite)
    except (ValueError, OSError) as error:
        fail(str(error))
    if args.offline:
        print("Training on a small generated corpus. For the real one: python data/download.py, then\n"
              "python train.py --block 32x32 --model data/bert-base-uncased --train data/train-v1.1.json "
              "--dev data/dev-v1.1.json")
    print(f"{len(train)} questions in {len(windows)} windows to train on, {len(dev)} questions to evaluate on")

    def measure(model: nn.Module) -> dict[str, float]:
        return squad.score(predict(model, tokenizer, dev, args.max_length, args.stride), dev)

    for module in model.modules():
        if isinstance(module, nn.Dropout) and args.dropout is not None:
            module.p = args.dropout
    rows = {}
    with open(out / "log.jsonl", "w", encoding="utf-8", buffering=1) as log:
        # 1. Dense fine-tuning.
        if args.dense_epochs:
            fit(model, windows, pad, args, args.dense_epochs, "dense", log)
            save_model(model, args.model, out / "dense")
        rows["dense"] = measure(model)
        # 2. Fine-pruning: the same loop, with masks; the dense model is the teacher.
        logits = teacher_logits(teacher or model, windows, pad, args.batch_size) if args.distill else None
        del teacher
        groups = [prune.BlockGroup(model, args.block, unit=model.config.head_size,
                                   rows=["*.attention.query", "*.attention.key", "*.attention.value"],
                                   columns=["*.attention.output"]),
                  prune.BlockGroup(model, args.ffn_block, rows=["*.ffn.first"], columns=["*.ffn.second"])]
        fit(model, windows, pad, args, args.epochs, "prune", log, groups, logits)
    # 3. Bake: zeros in place, scores gone.
    prune.bake(model)
    save_model(model, args.model, out / "masked")
    rows["pruned"] = measure(model)
    # 4. Delete what is zero, and prove that nothing else changed.
    small = compact.compact(model)
    inputs = [inputs_of(to_device(squad.collate(dev_windows[i:i + 8], pad)))
              for i in range(0, len(dev_windows), 8)]
    difference = compact.largest_difference(model, small, inputs)
    save_model(small, args.model, out / "compact")
    predictions = predict(small, tokenizer, dev, args.max_length, args.stride)
    save_json(out / "predictions.json", predictions)
    rows["compact"] = squad.score(predictions, dev)
    speed = compact.speedup(model, small, max(inputs, key=lambda batch: batch[0].numel()))

    config = small.config
    summary = {
        **rows, "density": encoder_density(model), "compact_density": encoder_density(small, model),
        "heads_kept": sum(config.heads_per_layer), "heads_total": sum(model.config.heads_per_layer),
        "ffn_kept": sum(config.ffn_per_layer), "ffn_total": sum(model.config.ffn_per_layer),
        "parameters_dense": parameters(model), "parameters_compact": parameters(small),
        "largest_logit_difference": difference, "speedup": speed}
    print(compact.layer_table(model, small), "\n")
    print(closing_table(summary))
    print(f"largest difference between pruned and compact logits: {difference:.1e}")
    save_json(out / "summary.json", summary)                         # the run is finished


if __name__ == "__main__":
    main()
