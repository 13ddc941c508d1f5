"""A run's folder and how an interrupted run goes on; several processes; errors of one line.

One idea: whatever is hard about a long run is one call here, so that train.py stays a plain story.
The folder that `--out` names holds

    settings.json     which run this is: its flags, versions, device and fingerprints of its data
    dense/, pruned/, compact/, filled/      the model at the end of each stage
    log.jsonl         a line for every step, and the scores at every stage's end
    checkpoint.pt     where to go on: which stages are finished, and the step of the one that is not
    predictions.json, layers.svg            of the last model
    summary.json      written last: if it exists, the run is finished

A run that goes on ends with the same bits on a CPU (with the same versions and number of threads),
because every step begins from what a checkpoint holds (weights, scores, masks, AdamW's state, the
number of the step and, for a speed, the measured times and the share of blocks), and because the
order of the windows is computed again from the seed, and random numbers are seeded anew at every
step.
"""
import json
import os
import platform
import shutil
import sys
import zlib
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from time import monotonic

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import read_json, read_torch, save_json, whole_file

STAGES = ("dense", "pruned", "compact", "filled")
FILES = ("checkpoint.pt", "summary.json", "log.jsonl")
SECONDS_BETWEEN_CHECKPOINTS = 600
# What may differ where a run goes on. The first four are paths: what the files hold is compared.
# With other threads or versions, the last bits of the result may differ.
MAY_DIFFER = ("model", "teacher", "train", "dev", "threads", "python", "torch")
BAR = "{desc} {percentage:3.0f}%|{bar:6}|{n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"

RANK, WORLD, LOCAL = 0, 1, 0                    # this process, of how many; its number here
if distributed.is_torchelastic_launched():      # by torchrun
    RANK = int(os.environ["RANK"])
    WORLD = int(os.environ["WORLD_SIZE"])
    LOCAL = int(os.environ["LOCAL_RANK"])
DEVICE = torch.device(f"cuda:{LOCAL}" if torch.cuda.is_available() else "cpu")
# Float32 is float32 on a GPU, too, whatever the environment says. In TF32, which is less precise,
# pruned and compact logits could differ by more than the proof of deletion allows.
torch.set_float32_matmul_precision("highest")


# -------------------------------------------------------------------------------------- the folder


class RunFolder:
    """The folder of one run: settings.json says which run it is, checkpoint.pt how far it is."""

    def __init__(self, path: str, settings: dict, overwrite: bool):
        """Look at the folder, and write nothing. Raises ValueError if another run lies there."""
        self.path = Path(path)
        self.settings = settings
        self.checkpoint = self.path / "checkpoint.pt"
        self.summary = None                                          # of this run, if finished
        self.goes_on = False
        if not (self.path / "settings.json").exists():
            foreign = [name for name in FILES + STAGES if (self.path / name).exists()]
            if foreign and not overwrite:
                raise ValueError(f"{self.path}: holds {foreign}, but no settings.json of a run; "
                                 "give another --out, or --overwrite to replace them")
            return
        theirs = read_json(self.path / "settings.json")
        different = [f"{name} {theirs.get(name)}, not {value}"
                     for name, value in self.settings.items()
                     if theirs.get(name) != value and name not in MAY_DIFFER]
        finished = (self.path / "summary.json").exists()
        if overwrite and (different or finished):    # an unfinished run of these settings goes on
            return
        if different:
            raise ValueError(f"{self.path}: holds a run with {'; '.join(different)[:300]}: give "
                             "the same flags to go on with it, another --out for another run, or "
                             "--overwrite to replace it")
        self.goes_on = self.checkpoint.exists()
        if finished:
            self.summary = read_json(self.path / "summary.json")

    def begin(self, **state):
        """Claim the folder: go on from its checkpoint, or start anew with `state`."""
        wait_for_all()                                   # all have looked, so the first may write
        if RANK == 0 and not self.goes_on:
            self.clear()
            save_json(self.path / "settings.json", self.settings)
            self.state = {"scores": {}, "log_bytes": 0, **state}
            self.write_checkpoint()
        wait_for_all()
        self.state = read_torch(self.checkpoint)         # in every process: what the first wrote
        if self.goes_on:
            say(f"{self.path}: going on with this run; finished: {[*self.state['scores']]}")
        if RANK == 0:
            self.log_file = open(self.path / "log.jsonl", "a", buffering=1)    # line by line
            self.log_file.truncate(self.state["log_bytes"])      # later steps are done again

    def clear(self):
        """Remove an older run. The checkpoint goes first, so that nobody goes on with a part."""
        holds_a_run = (self.path / "settings.json").exists()
        for name in FILES:
            (self.path / name).unlink(missing_ok=True)
        if holds_a_run:                                  # else the folders may be the user's
            for name in STAGES:
                shutil.rmtree(self.path / name, ignore_errors=True)

    def steps(self, stage, total, model, optimizer):
        """The steps of a stage that are to be done, from its checkpoint on, if there is one.

        The training loop runs over it, and calls `log_step` in each step. Between two steps a bar
        shows how far the stage is, with the numbers that `log_step` got, and every ten minutes a
        checkpoint is written.
        """
        first = 0
        if self.state.get("stage") == stage:
            first = self.state["step"]
            model.load_state_dict(self.state.pop("model"))
            optimizer.load_state_dict(self.state.pop("optimizer"))
        bar = progress_bar(range(first, total), stage, first, total)
        self.stage_began = last_checkpoint = monotonic()
        for step in bar:
            yield step
            bar.set_postfix_str(self.words, refresh=False)
            if RANK == 0 and monotonic() - last_checkpoint > SECONDS_BETWEEN_CHECKPOINTS:
                self.state |= {"stage": stage, "step": step + 1}
                self.write_checkpoint(model=model.state_dict(), optimizer=optimizer.state_dict())
                last_checkpoint = monotonic()

    def log_step(self, stage, step, losses, **numbers):
        """Log a step: its losses and other numbers. Raises ArithmeticError for NaN."""
        losses = mean_over_processes(losses)
        if not np.isfinite([*losses.values()]).all():
            raise ArithmeticError(f"{stage}, step {step}: the loss is not finite: {losses}; "
                                  "lower --lr")
        seconds = round(monotonic() - self.stage_began, 3)
        line = {"stage": stage, "step": step, "seconds": seconds, **numbers, **losses}
        self.log(line)
        words = [f"{name.removesuffix('_density')} {line[name]:.3g}"
                 for name in ("loss", "attention_density", "ffn_density") if name in line]
        self.words = ", ".join(words)                    # for the bar, which `steps` shows

    def is_finished(self, stage):
        return stage in self.state["scores"]

    def finish_stage(self, stage, scores):
        """Record that a stage is finished, its model saved."""
        self.state["scores"][stage] = scores
        self.state["stage"] = None
        self.log({"stage": stage, "scores": scores})
        self.write_checkpoint()

    def log(self, line):
        if RANK == 0:
            self.log_file.write(json.dumps(line) + "\n")

    def write_checkpoint(self, **tensors):
        """Write all that is needed to go on; the file appears whole or not at all."""
        if hasattr(self, "log_file"):
            os.fsync(self.log_file.fileno())
            self.state["log_bytes"] = os.fstat(self.log_file.fileno()).st_size
        with whole_file(self.checkpoint) as file:
            torch.save(self.state | tensors, file)


def run_settings(args: dict, train, dev, *models) -> dict:
    """What settings.json says. A run goes on where all but MAY_DIFFER is the same."""
    settings = {name: args[name] for name in args if name not in ("out", "overwrite", "eval")}
    return settings | {
        "train_data": fingerprint(train),
        "dev_data": fingerprint(dev),
        "weights": [weights_fingerprint(model) for model in models if model],
        "device": DEVICE.type if DEVICE.type == "cpu" else torch.cuda.get_device_name(),
        "processes": WORLD,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def fingerprint(examples):
    return f"{len(examples)} examples, crc {zlib.crc32(repr(examples).encode()):08x}"


def weights_fingerprint(model):
    crc = 0
    for tensor in model.state_dict().values():
        crc = zlib.crc32(tensor.cpu().numpy().tobytes(), crc)
    return f"crc {crc:08x}"


# -------------------------------------------------------------------------------- several processes


def start_processes():
    if WORLD > 1:
        distributed.init_process_group(timeout=timedelta(days=1))    # rank 0 evaluates alone


def stop_processes():
    if WORLD > 1:
        distributed.destroy_process_group()


def wait_for_all():
    if WORLD > 1:
        distributed.barrier()


def parallel(model):
    """The model to call in training: its gradients become the mean over all processes."""
    if WORLD == 1:
        return model
    empty = any(not parameter.numel() for parameter in model.parameters())   # and so never used
    return DistributedDataParallel(model, forward_sync_buffers=False, find_unused_parameters=empty)


def my_share(windows, batch):
    """This process's part of a batch of window indices, and the factor of its loss.

    The loss of a process is a mean over its own targets. What is wanted is the mean over all, which
    is the sum of these means, each times the process's share of the targets. DDP averages the
    gradients instead of summing them, so the factor is the share times the number of processes.
    """
    counts = [len(windows[i].targets) for i in batch]
    share = sum(counts[RANK::WORLD]) / sum(counts)
    # A process without a window takes the first, with factor 0: the others wait for its gradients.
    return batch[RANK::WORLD] or batch[:1], WORLD * share


def mean_over_processes(losses):
    """The mean of each of these scalars, as plain numbers."""
    values = torch.stack([torch.as_tensor(loss, device=DEVICE) for loss in losses.values()])
    values = values.detach().float()
    if WORLD > 1:
        distributed.all_reduce(values)
    return dict(zip(losses, (values / WORLD).tolist()))


# ------------------------------------------------------------------------- what is said, and errors

said = set()                                   # notes; each is said once


def say(text):
    if RANK == 0:
        print(text, flush=True)


def note(text):
    """Say something on standard error, once."""
    if RANK == 0 and text not in said:
        said.add(text)
        print(text, file=sys.stderr, flush=True)


def progress_bar(items, title, first=0, total=None):
    """The items, with a bar on standard error; if that is no terminal, a line every minute."""
    terminal = sys.stderr.isatty()
    pause = 0.1 if terminal else 60                # seconds
    return tqdm(items, title, total, initial=first, leave=False, disable=RANK > 0,
                bar_format=BAR if terminal else BAR + "\n", miniters=1, mininterval=pause,
                delay=pause)


def note_slow_bfloat16():
    """Say that bfloat16 will be slow, if this CPU does not compute it itself."""
    if DEVICE.type == "cpu" and not torch.cpu.get_capabilities().get("avx512_bf16"):
        note("this CPU has no avx512_bf16, so it computes bfloat16 slower than float32")


@contextmanager
def one_line_errors():
    """Bad input ends the program with one line of error and status 2; a bug shows its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        fail("stopped; if this was a run, the same command resumes it from its last checkpoint "
             "(one is written at every stage's end, and every ten minutes)", status=130)
    except OSError as error:
        if error.strerror is None:
            fail(str(error))
        fail(f"{error.filename or 'output'}: {error.strerror}; check the path, and the disk")
    except (ValueError, ArithmeticError) as error:
        fail(str(error))


def fail(message, status=2):
    """One line on standard error, and the end."""
    if RANK == 0:
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
