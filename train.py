"""Fine-tune a BERT, learn which blocks of its weights can go, and delete them.

One idea: pruning is fine-tuning with a schedule. A run is a story of stages, which `whole_run`
tells: dense fine-tuning; fine-pruning (fine-tuning while blocks are pruned) with the dense model as
teacher, after which the zeros are made permanent; deletion; and, on request, filling. The loop that
the stages share is `train_stage`, below it.

    python train.py --block 32x32                                    # offline, a minute or two
    python train.py --block 32x32 --model FOLDER --train train.json --dev dev.json
    python train.py --block 32x32 --speedup 2.5                      # 2.5 times as fast
    python train.py --eval out/compact --dev data/dev-v1.1.json      # scores of a saved model
    summary = train.main(["--block", "32x32"])                       # in a script or a notebook
    torchrun --standalone --nproc_per_node=2 train.py --block 32x32  # on two devices

After a stop of any kind, the same command goes on from the run's last checkpoint.

Sources: Lagunas et al., Block Pruning For Faster Transformers, 2021 (arXiv 2109.04838), section 4;
Hinton et al., Distilling the Knowledge in a Neural Network, 2015 (arXiv 1503.02531), section 2.

Shapes in comments: N targets of a batch, K positions or classes.
"""
import copy
import json
import zlib
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

import data
from compact import compact, largest_difference, seconds, sizes, speedup, survivors
from data import DEVICE, TASKS, options, pictures, run
from data.run import RANK, RunFolder, my_share, parallel, say
from data.speed import measure_layers, predicted_time
from data.text import batches, collate, run_model
from model import save_json
from prune import METHODS, BlockGroup, bake, cubic, parameter_groups

TEMPERATURE = 2.0                                                             # of distillation


def main(argv=None):
    """The command line. Returns the summary, or the scores of --eval.

    Raises ValueError, ArithmeticError or OSError for what is wrong outside of the code.
    """
    args = options.parse_train(argv, __doc__.splitlines()[0], METHODS)
    if args.eval:
        scores = data.evaluate(args)
        print(json.dumps(scores))
        return scores
    return whole_run(args)


def whole_run(args):
    """The story: fine-tune, prune, delete, fill. Returns the summary.

    `job` is what all stages share (see Job below). Its `folder` is a RunFolder of data/run.py,
    which knows what an earlier, interrupted run has done.
    """
    job, model, given_teacher = prepare(args)
    if job.folder.summary:
        run.stop_processes()
        say(f"{args.out}: this run is finished\n{pictures.report(job.folder.summary)}")
        return job.folder.summary
    dense = train_stage(job, "dense", model, args.dense_epochs)
    teacher = None
    if args.distill and args.epochs + args.fill_epochs:
        teacher = Teacher(given_teacher or dense, job)
    del given_teacher                  # frees its memory: the Teacher has its logits, or a copy
    # From here on `dense` is masked and trained further: it becomes `pruned`.
    pruner = SpeedPruner(job, dense) if args.speedup else DensityPruner(job, dense)
    pruned = train_stage(job, "pruned", dense, args.epochs, pruner, teacher)
    small = compact(pruned)
    difference = largest_difference(pruned, small, job.samples)
    save_and_score(job, "compact", small)
    if args.fill_epochs:
        small = train_stage(job, "filled", small, args.fill_epochs, teacher=teacher)
    return report(job, pruned, small, difference)


def train_stage(job, stage, model, epochs, pruner=None, teacher=None):
    """Train `model` in place, save and score it; if that was done before, open what was saved.

    How an interrupted run goes on: a finished stage is only opened. In the one that was stopped,
    `job.folder.steps` loads the last checkpoint (weights, scores and masks, AdamW's state, the
    pruner's numbers) and yields the steps that are left. Everything else a step needs is computed
    anew: the order of the windows from the seed and the epoch, random numbers from the seed and
    the step. So the result is the same.

    With 0 epochs there is nothing to train: then the model is only baked and scored. (A dense stage
    of 0 epochs saves nothing that could be opened later: its model is that of --model.)
    """
    if epochs and job.folder.is_finished(stage):
        return data.open_model(job.folder.path / stage, job.task)[0]
    args = job.args
    model.train()
    set_dropout(model, args.dropout)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr, args.score_lr), fused=True)
    schedule = []                                    # for every step, the indices of its windows
    for epoch in range(epochs):
        schedule += batches(job.windows, args.batch_size, epoch, args.seed)
    total = len(schedule)
    parallel_model = parallel(model)
    # If there is a checkpoint of this stage, this generator loads it into model and optimizer, and
    # begins at the step where it was written, else at 0. Between steps it writes new checkpoints.
    for step in job.folder.steps(stage, total, model, optimizer):
        torch.manual_seed(zlib.crc32(f"{args.seed} {stage} {step} {RANK}".encode()))  # for dropout
        lr = set_learning_rate(optimizer, args.lr, step, total)
        penalty = pruner.update(step, total) if pruner else 0.0      # and the masks of this step
        # A single process takes the whole batch, with factor 1. Several processes share it, and
        # their gradients are averaged; with these factors, that gives the whole batch's gradient.
        indices, loss_factor = my_share(job.windows, schedule[step])
        inputs, targets = collate([job.windows[i] for i in indices], DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.amp):
            logits = parallel_model(*inputs)
            width = logits.shape[-1]          # K; the teacher's rows are made as long
            teacher_logits = teacher.logits(indices, inputs, width) if teacher else None
        loss, cross_entropy, kl = task_loss(logits, targets, teacher_logits, args.distill)
        loss = loss_factor * loss + penalty             # a penalty is the same in every process
        loss.backward()
        clip_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses = {"loss": loss, "cross_entropy": loss_factor * cross_entropy,
                  "kl": loss_factor * kl, "penalty": penalty}
        densities = pruner.densities() if pruner else {}
        epoch = 1 + step * epochs // total
        job.folder.log_step(stage, step, losses, epoch=epoch, lr=lr, **densities)
    bake(model)                   # masks become zeros in the weights; without masks nothing happens
    save_and_score(job, stage, model)
    return model


def task_loss(logits, targets, teacher_logits, a):
    """(1 - a) * cross-entropy + a * T^2 * KL(teacher || student), means over the targets.

    logits          (..., K): a row for every target, window by window; (B, 2, K) in qa
    targets         (N,), window by window; N is 2 B in qa
    teacher_logits  (N, K): the teacher's rows for the same windows and targets, in the same order;
                    None: no teacher, and the loss is the cross-entropy alone
    Padding is -1e4, which is probability 0 (with -inf, KL would be NaN).
    Returns the loss, and its two parts: the cross-entropy and the KL divergence.
    """
    rows = logits.flatten(0, -2)                                                         # (N, K)
    cross_entropy = F.cross_entropy(rows, targets)
    if teacher_logits is None:
        return cross_entropy, cross_entropy, 0.0
    student = F.log_softmax(rows / TEMPERATURE, -1)
    teacher = F.log_softmax(teacher_logits / TEMPERATURE, -1)
    kl = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    loss = (1 - a) * cross_entropy + a * TEMPERATURE ** 2 * kl
    return loss, cross_entropy, kl


class Teacher:
    """A model that does not change: its logits on every window are computed once, for all epochs.

    Where they would not fit into memory (generation), a frozen copy runs beside the student.
    """

    def __init__(self, model, job):
        self.frozen_model = None
        if job.task.KEEPS_LOGITS:
            # Index of a window -> (K,) in classification, (2, K) in qa; for all epochs the same.
            self.kept_logits = dict(run_model(model, job.windows))
        else:
            self.frozen_model = copy.deepcopy(model).eval()     # the model itself goes on learning

    @torch.no_grad()
    def logits(self, indices, inputs, width):
        """The logits (N, K) of the windows of a batch; K becomes the student's `width`.

        The teacher read the windows in other batches, so a kept row may have more or less padding
        than the student's: padding is added, or cut off (F.pad cuts where a number is negative).
        """
        if self.frozen_model:
            return self.frozen_model(*inputs)
        rows = []
        for i in indices:
            kept = self.kept_logits[i]
            rows.append(F.pad(kept, (0, width - kept.shape[-1]), value=-1e4))
        return torch.cat(rows).view(-1, width).to(DEVICE)


def set_dropout(model, dropout):
    """Set the rate of all dropout layers; None leaves them as the checkpoint's config.json says."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) and dropout is not None:
            module.p = dropout


def set_learning_rate(optimizer, peak, step, total):
    """The weights' rate rises over a tenth of the steps, then falls to 0; the scores' rate stays.

    This tenth has nothing to do with the warm-up of pruning.
    """
    warm = max(1, total // 10)
    lr = peak * min((step + 1) / warm, (total - step) / max(1, total - warm))
    for group in optimizer.param_groups[:2]:
        group["lr"] = lr
    return lr


def clip_gradients(optimizer):
    """To a norm of 1: all weights together, and all scores together."""
    matrices, vectors, scores = (group["params"] for group in optimizer.param_groups)
    nn.utils.clip_grad_norm_(matrices + vectors, 1.0)
    nn.utils.clip_grad_norm_(scores, 1.0)


# ----------------------------------------------------------------------------------------- pruners


class DensityPruner:
    """Sets the masks so that the share of blocks kept falls to the density that is asked for.

    With soft movement, the threshold and the penalty rise instead.
    """

    def __init__(self, job, model):
        """Mask the attention matrices and the FFN matrices of the model: two groups."""
        self.args = job.args
        self.state = job.folder.state                # what checkpoints hold, changed in place
        self.model = model
        self.groups = add_masks(model, job.args)

    def update(self, step, total):
        """Set the masks of this step; returns what is to be added to the loss.

        Each of the two groups has its own lambda, the weight of soft movement's penalty.
        """
        start, end = pruning_steps(self.args, total)
        return sum(group.advance(step, start, end, self.args.density, lambda_)
                   for group, lambda_ in zip(self.groups, self.args.lambdas))

    def densities(self):
        """The fraction of blocks that each group keeps now."""
        attention, ffn = self.groups
        return {"attention_density": attention.density, "ffn_density": ffn.density}


class SpeedPruner(DensityPruner):
    """Sets the masks so that the time after deletion falls to 1 / X of the dense one: --speedup X.

    A controller: it predicts how long the model would take if what is empty now were deleted,
    t(now). Where that is too long, a smaller share v of the blocks may stay, in both groups; where
    it is short enough, a larger one:

        v <- min(1, v * (limit / t(now)) ** 0.5)

    Here `limit` falls from t(dense) to t(dense) / X on the cubic curve. In the cool-down the limit
    stays there, while v is still corrected. A run has 100 to 200 corrections. The exponent 0.5 lets
    each mend about half of the error (in logarithms), so that v does not oscillate. A checkpoint
    holds v ("share", 1 at first) and the times of layers that t is computed from (see
    data/speed.py). `begin_in_folder`, below, sets both.
    """

    def update(self, step, total):
        """Set the masks of this step; nothing is to be added to the loss."""
        if step % max(1, total // 100) == 0:
            start, end = pruning_steps(self.args, total)
            times = self.state["layer_times"]
            limit = times["dense"] * cubic(step, start, end, 1.0, 1 / self.args.speedup)
            now = predicted_time(times, *survivors(self.model))       # with the last step's masks
            self.state["share"] = min(1.0, self.state["share"] * (limit / now) ** 0.5)
        for group in self.groups:
            group.keep(max(self.state["share"], 1 / group.blocks))        # the best block stays
        return 0.0


def pruning_steps(args, total):
    """The steps t0, until which all blocks stay, and t1, from which on the density is final."""
    end = min(total - round(args.cooldown * total), total - 1)   # the last step has the final masks
    start = min(round(args.warmup * total), end)
    return start, end


def add_masks(model, args):
    return [
        BlockGroup(model, args.block, ["*.query", "*.key", "*.value"], ["*.attention.output"],
                   unit=model.config.head_size, method=args.method),
        BlockGroup(model, args.ffn_block, ["*.ffn.first"], ["*.ffn.second"], method=args.method)
    ]


# ------------------------------------------------------------------------ before, between and after


@dataclass
class Job:
    """What all stages share."""

    args: object                             # the flags
    task: object                             # a module of data/
    tokenizer: object
    dev: list                                # examples to evaluate on
    folder: RunFolder
    windows: list | None = None              # to train on
    samples: list | None = None              # some inputs, to compare models on


def prepare(args):
    """Open and check all that comes from outside, start the run's folder: job, model, teacher."""
    run.start_processes()
    if args.amp:
        run.note_slow_bfloat16()
    torch.manual_seed(args.seed)
    task = TASKS[args.task]
    train = data.read_examples(task, args.train, "train", args.columns)
    dev = data.read_examples(task, args.dev, "dev", args.columns)
    task.score({}, dev)        # tried before the work begins: raises if dev lacks answers or labels
    model, tokenizer, _ = data.open_model(args.model, task, args)
    task.prepare_model(model, train)
    model.to(DEVICE)
    teacher = open_teacher(args, task, model, tokenizer, train)
    if args.layers:
        take_layers(model, args.layers)
    # Do the blocks fit the matrices, and would at least one be kept? Tried before the work begins,
    # on a model of the same shapes that takes no memory.
    with torch.device("meta"):
        for group in add_masks(type(model)(model.config), args):
            group.blocks_to_keep(1.0 if args.speedup else args.density)
    # What tells this run from another one, when the same command is given again.
    flags = vars(args) | asdict(model.config.reading)
    settings = run.run_settings(flags, train, dev, model, teacher)
    job = Job(args, task, tokenizer, dev, RunFolder(args.out, settings, args.overwrite))
    if not job.folder.summary:
        begin_in_folder(job, model, train)
    return job, model, teacher


def begin_in_folder(job, model, train):
    """Cut the examples into windows, measure the layers for a speed, and start the folder."""
    args, task, folder = job.args, job.task, job.folder
    say(f"{args.train or 'generated corpus'}: cutting {len(train):,} examples into windows; "
        f"{len(job.dev):,} examples to evaluate on")
    job.windows = task.make_windows(train, job.tokenizer, model.config)
    dev_windows = task.make_windows(job.dev, job.tokenizer, model.config)
    job.samples = data.sample_inputs(dev_windows)
    layer_times = None
    if args.speedup and RANK == 0 and not folder.goes_on:
        say("measuring how long a layer takes with fewer heads and FFN dimensions")
        layer_times = measure_layers(model, job.samples[0], seconds)
        fastest = layer_times["dense"] / layer_times["rest"]
        if args.speedup >= fastest:
            raise ValueError(f"--speedup {args.speedup:g}: without any head or FFN dimension it "
                             f"would be {fastest:.2f}; ask for less")
    folder.begin(layer_times=layer_times, share=1.0)


def open_teacher(args, task, model, tokenizer, train):
    """The model that --teacher names, or None. Raises ValueError where there is none to learn from.

    Without --teacher, the dense model will be the teacher, once its stage is finished; so it must
    know the task already, or have epochs to learn it.
    """
    teacher = None
    name = args.teacher or args.model
    if args.teacher:
        teacher, other, _ = data.open_model(name, task, model.config.reading)
        faults = {
            "has not learnt the task": not teacher.has_head,
            "has other tokens": other.get_vocab() != tokenizer.get_vocab(),
            "has other labels, or in another order": not task.targets_agree(teacher, model, train),
        }
    else:
        # With --layers, what is left of the model must learn the task again.
        knows_the_task = model.has_head and not args.layers
        faults = {
            "has not learnt the task with these layers":
                not knows_the_task and args.dense_epochs == 0
        }
    for fault, applies in faults.items():
        if applies and args.distill:
            raise ValueError(f"{name}: cannot teach, as it {fault}; give --dense-epochs, another "
                             "--teacher or --distill 0")
    return teacher


def take_layers(model, layers):
    """Leave all other layers out. Raises ValueError."""
    if len({*layers} & {*range(len(model.layers))}) < len(layers):
        raise ValueError(f"--layers: 0 to {len(model.layers) - 1}, each once, not {layers}")
    model.layers = nn.ModuleList(model.layers[i] for i in layers)


def save_and_score(job, stage, model):
    """At a stage's end, once: save the model, evaluate it, record the scores."""
    if RANK > 0 or job.folder.is_finished(stage):
        return
    if stage != "dense" or job.args.dense_epochs:         # else it is in --model's folder already
        data.save_model(model, job.folder.path / stage, job.args.model)
    predictions = job.task.predict(model, job.tokenizer, job.dev)
    save_json(job.folder.path / "predictions.json", predictions)
    scores = job.task.score(predictions, job.dev)
    job.folder.finish_stage(stage, scores)
    say(f"{stage}: {', '.join(f'{name} {value:.2f}' for name, value in scores.items())}")


def report(job, pruned, small, difference):
    """Measure the speed, print and draw what is left, write summary.json: the run is finished."""
    run.stop_processes()
    if RANK > 0:
        return None
    folder = job.folder
    # The pruned model has the dense one's shapes, and so takes the dense one's time.
    speed, *quartiles = speedup(pruned, small, job.samples[0])
    summary = {
        "headline": job.task.HEADLINE,
        **folder.state["scores"],
        **sizes(pruned, small),
        "largest_logit_difference": difference,
        "speedup": speed,
        "speedup_quartiles": quartiles,
    }
    (folder.path / "layers.svg").write_text(pictures.layers_svg(pruned.config, small.config))
    save_json(folder.path / "summary.json", summary)
    say(f"\n{pictures.report(summary)}\nmodels, predictions, log and picture: {folder.path}")
    return summary


if __name__ == "__main__":
    with run.one_line_errors():
        main()
