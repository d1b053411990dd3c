"""What is looked at between two steps: a wish that the run stop, and a loss that is no number any more."""

import datetime
import errno
import math
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from endprompt import Failure
from endprompt.runs import checkpoint_files
from endprompt.runs.runfolder import STOP, write_status

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """Set by SIGUSR1, by SIGTERM, or by a file ``stop`` in the run's folder.

    Slurm's ``--signal``, a preemption, torchrun (which passes SIGTERM on and waits 30 s) and its death all
    end here: the step under way is finished, a checkpoint written, and the command ends.  Before the first
    step nothing is there to save, and the signals end the process.
    """

    def __init__(self, run: Path):
        self.file, self.signalled = run / STOP, False

    def listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        self.signalled = True

    def wished(self) -> bool:
        return self.signalled or self.file.exists()


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class Watch(TrainerCallback):
    """After every step, all ranks together: stops the run where any rank was asked to, and ends it where a
    loss or gradient is not finite.

    trainer is set once it is built; it keeps ``micro_batches``, [(row numbers [batch, 1 or more], summed
    loss)] of the step on this rank. Raises Failure on all ranks, naming step, rank, rows and the newest whole
    checkpoint, before anything of that step is saved.
    """

    def __init__(self, request: StopRequest, run: Path):
        self.request, self.run, self.stopped = request, run, False
        self.trainer: Any = None
        self._gradients_finite: torch.Tensor | None = None  # bool, of no dimensions

    def on_train_begin(self, args, state, control, **kwargs):
        # Not before: a process that waits inside gloo or NCCL for ranks that never come would not hear of a
        # signal that Python handles.
        self.request.listen()
        state.compute_steps(
            args, state.max_steps
        )  # the checkpoint's state says how often it was logged and saved before
        if _distributed():
            # Groups that DeepSpeed makes have torch's default of half an hour, whatever the first one was
            # given.
            for group in list(torch.distributed.distributed_c10d._world.pg_map):
                torch.distributed.distributed_c10d._set_pg_timeout(
                    datetime.timedelta(seconds=args.ddp_timeout), group
                )

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        # Without DeepSpeed, gradients are where everybody expects them; with it, it knows their norm
        # afterwards.
        sums = [parameter.grad.sum() for parameter in model.parameters() if parameter.grad is not None]
        self._gradients_finite = torch.stack(sums).isfinite().all() if sums else None

    def on_step_end(self, args, state, control, **kwargs):
        finite = torch.stack([loss for _, loss in self.trainer.micro_batches]).isfinite().all()
        if self._gradients_finite is not None:
            finite = finite & self._gradients_finite
        norm = getattr(self.trainer.model_wrapped, "get_global_grad_norm", lambda: None)()
        if isinstance(norm, torch.Tensor):
            finite = finite & norm.isfinite().all()
        elif norm is not None:
            finite = finite & math.isfinite(norm)
        wished = self.request.wished() if state.is_world_process_zero else self.request.signalled
        # One reduction says both, and is the one value that the host waits for; only the first rank looks at
        # the file.
        said = torch.stack([~finite, torch.full_like(finite, wished)]).float()
        if _distributed():
            torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX)
        bad, stop = (value > 0 for value in said.tolist())
        if bad:
            raise Failure(self._not_finite(args, state, norm))
        self.trainer.micro_batches.clear()
        if stop and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
        return control

    def _not_finite(self, args, state, norm) -> str:
        mine = [
            f"rank {args.process_index} micro-batch {number}, loss {float(loss):g}, rows"
            f" {', '.join(map(str, rows[:, 0].tolist()))}"
            for number, (rows, loss) in enumerate(self.trainer.micro_batches)
            if not math.isfinite(float(loss))
        ]
        everybody: list[Any] = [mine]
        if _distributed():
            everybody = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everybody, mine)
        where = (
            "; ".join(line for lines in everybody for line in lines)
            or f"the gradient's norm is {norm}, the losses are finite"
        )
        newest = checkpoint_files.newest(self.run / "checkpoints")
        # What has a checkpoint belongs to its setting, and is not gone on with under another.
        lower = (
            "choose a lower train.learning_rate and another --out (or delete"
            f" {newest.parent}; the shards stay)"
            if newest
            else "lower train.learning_rate"
        )
        return (
            f"train: step {state.global_step} is not finite ({where}); nothing of it was saved.  The last"
            f" good checkpoint is {newest or 'none, the base model'}; look at those rows with `endprompt"
            f" inspect --row N`, or {lower}, then start again"
        )


class Report(TrainerCallback):
    """Keeps ``run``/status.json, which ``endprompt status`` reads, on the first rank."""

    def __init__(self, run: Path, tokens_per_step: int):
        self.run, self.tokens_per_step = run, tokens_per_step

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_status(
                self.run,
                command="train",
                state="training",
                reason=None,
                step=state.global_step,
                max_steps=state.max_steps,
                world_size=args.world_size,
                tokens_per_step=self.tokens_per_step,
                started=time.time(),
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs and "loss" in logs:
            kept = {
                key: value
                for key, value in logs.items()
                if key
                in (
                    "loss",
                    "text_loss",
                    "end_prompt_loss",
                    "tokens_per_second",
                    "peak_memory_gib",
                    "mfu",
                )
            }
            write_status(self.run, step=state.global_step, max_steps=state.max_steps, **kept)

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_status(self.run, step=state.global_step)


def lost_rank(error: BaseException, timeout: float) -> str | None:
    """One line for what gloo and NCCL raise when another rank has ended or does not answer; None for any
    other error.
    """
    text = str(error).lower()
    if not isinstance(error, RuntimeError) or isinstance(error, Failure):
        return None
    if "timed out" in text or "timeout" in text:
        return (
            f"another rank did not answer for {timeout:g} s (train.ddp_timeout): it hangs, or its node is"
            " gone"
        )
    if any(
        words in text
        for words in (
            "connection closed by peer",
            "connection reset",
            "broken pipe",
            "remote process exited",
            "connection refused",
            "socket",
        )
    ):
        return "the connection to another rank broke: it has ended, or its node is gone"
    return None


# Of a disk that is full, a quota, the largest file, a disk that is read-only or damaged.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
DENIED = {errno.EACCES, errno.EPERM}


def _being_written(name: Any, run: Path) -> bool:
    """Whether training writes the file ``name`` in ``run``'s folder, where it also reads: shards, and what it
    may not read.
    """
    if not isinstance(name, str | os.PathLike):
        return False
    path, run = Path(os.path.abspath(name)), Path(os.path.abspath(run))
    inside = path.is_relative_to(run) and path.parent != run / "shards"
    return inside and (not path.exists() or os.access(path, os.R_OK))


def unwritable(error: BaseException, run: Path) -> str | None:
    """One line for what torch.save, safetensors and the system raise when a file cannot be written to its
    end; None for any other error, of reading and of too many open files too: starting again may mend them.
    """
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        denied = error.errno in DENIED and _being_written(error.filename, run)
        if error.errno in FULL or denied:
            return f"{error.filename or 'a file'} could not be written: {error.strerror}"
        return None
    serializing = "rror while serializing" in text  # safetensors, which has a name for reading too
    codes = FULL | (DENIED if serializing else set())
    told = any(int(code) in codes for code in re.findall(r"os error (\d+)", text))
    words = ("PytorchStreamWriter", "inline_container", "unexpected pos", "No space left", "File too large")
    if told or any(word in text for word in words) and "PytorchStreamReader" not in text:
        return (
            "a checkpoint or model file could not be written to its end"
            f" ({text.strip().splitlines()[0][:120]}); the disk may be full, or a quota reached"
        )
    return None


def by_the_system(error: BaseException) -> str | None:
    """One line for another error of the system's, such as a file that is gone; None for what is none, and
    for connections: a traceback tells more of them.
    """
    if not isinstance(error, OSError) or error.errno is None or isinstance(error, ConnectionError):
        return None
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
