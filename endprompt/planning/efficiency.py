r"""What a training step costs: time, memory and MFU by method and target length, on one device, from a
model's shape with random weights.

    python -m endprompt.planning.efficiency --shape small --methods endprompt full_length --targets 2048 \
        4096 \
        8192 --out FILE
    # on a GPU; benchmarks/gpu.sh does more
    python -m endprompt.planning.efficiency --shape llama-3.2-1b --rows 1 2 4 --checkpointing none full \
        --out \
        FILE

endprompt/reports/costs.py draws FILE.

Each setting is a step of ``endprompt/planning/step.py`` in a process without a past (one process serves until
a setting fails or wants other kernels).  A step is data (rows to tensors on the device), forward with the
loss, backward, optimizer, each timed on the device; the figures are medians over the steps after warm-up.
FILE is written after each setting, and a second call goes on with what it lacks; --budget SECONDS ends before
what would take longer.

MFU = tokens/s x ``flops_per_token`` / peak: 6 FLOPs a weight of every matrix product, attention counted
causally (half of the square), nothing for recomputation. Memory above the states: on a GPU, the allocator's
peak less what lies there between two steps.  On a CPU, the bytes of what autograd keeps for the backward
pass, without parameters; no peak of anything else is known there.
"""

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endprompt import BadInput, methods, storage
from endprompt.planning.entries import SETTING, best, key, ratios, tell
from endprompt.planning.step import (
    ATTENTION,
    COMPILE,
    KERNELS,
    SHAPES,
    Asked,
    attention_backend,
    config_of,
    measure,
    serve,
)

__all__ = ["SHAPES", "Asked", "attention_backend", "best", "config_of", "measure"]
START_SECONDS = 15  # of a process, its model and its first kernels


class Worker:
    """A process that serves settings; started when needed, and anew after a failure."""

    command = (sys.executable, "-m", "endprompt.planning.efficiency", "--serve")

    def __init__(self):
        self.process: Any = None  # a Popen with pipes
        self.kernels: str | None = None

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.end()

    def end(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.errors.close()
            self.process = None

    def run(self, settings: dict, timeout: float | None = None) -> dict:
        """What ``step.measure`` found, with "fits"; {"fits": False} where memory ran out, and a "reason"
        where anything else went wrong.
        """
        if self.process and self.kernels != settings.get("kernels"):  # Liger's patches outlive a model
            self.end()
        if not self.process:
            self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in end)
            self.kernels = settings.get("kernels")
            environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
                env=environment,
            )
        try:
            self.process.stdin.write(json.dumps(settings) + "\n")
            self.process.stdin.flush()
            ready = select.select([self.process.stdout], [], [], timeout)[0]
            line = self.process.stdout.readline() if ready else None
        except BrokenPipeError:
            line = ""
        if line:
            found = json.loads(line)
        elif line is None:
            found = {"fits": False, "reason": f"not done after {timeout:.0f} s"}
        else:
            self.errors.seek(0)
            told = self.errors.read().decode(errors="replace").strip().splitlines()
            killed = self.process.wait() == -signal.SIGKILL  # as the kernel does where memory runs out
            found = (
                {"fits": False} if killed else {"fits": False, "reason": (told or ["no message"])[-1][:300]}
            )
        if not found["fits"]:
            self.end()
        return found


def earlier(out: Path | None, shape: str, device: str) -> list[dict]:
    """The entries of ``out``, if it is there.  Raises BadInput if they are of another shape or device."""
    if not (out and out.exists()):
        return []
    there = json.loads(out.read_text())
    if (there.get("shape"), there.get("device")) != (shape, device):
        raise BadInput(
            f"--out: {out} holds {there.get('shape')} on {there.get('device')}, not {shape} on {device}; name"
            " another file"
        )
    return there["entries"]


def predicted_seconds(shape: str, setting: dict, steps: int) -> float:
    """At 30 % MFU on a known GPU, with starting; elsewhere just the starting."""
    import torch

    from endprompt.training.trainer import PEAK_FLOPS, flops_per_token

    if not torch.cuda.is_available():
        return START_SECONDS
    name, window = torch.cuda.get_device_name(), SHAPES[shape][6]
    length = methods.get(setting["method"]).row_length(window, setting["target"])
    work = setting["rows"] * length * flops_per_token(config_of(shape), length) * steps
    return START_SECONDS + work / (
        0.3 * next((value for known, value in PEAK_FLOPS.items() if known in name), 1e15)
    )


@dataclass(frozen=True)
class Limits:
    """Of a measurement: steps after those of warm-up; seconds: a setting's steps end after so many; deadline:
    on time.monotonic, what is predicted to end after it is named in "left" instead.
    """

    steps: int = 5
    warm_up: int = 2
    seconds: float | None = None
    deadline: float | None = None

    def exceeded_by(self, seconds: float) -> bool:
        return self.deadline is not None and time.monotonic() + seconds > self.deadline

    def seconds_left(self) -> float | None:
        """For a process that is asked now; 10 at the least."""
        return self.deadline and max(10.0, self.deadline - time.monotonic())


USUAL = Limits()


class Results:
    """The entries of a shape on this device, those of ``out`` first, and what was left; written to ``out``
    when asked for.

    Raises BadInput if ``out`` is of another shape or device.
    """

    def __init__(self, shape: str, out: Path | None):
        from endprompt.runs import provenance

        self.shape, self.out, self.stamp = shape, out, provenance.stamp()
        self.entries = earlier(out, shape, self.stamp["device"])
        self.left: list[dict] = []

    def written(self) -> dict:
        found = {
            "shape": self.shape,
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "entries": self.entries,
            "left": self.left,
            "ratios": ratios(self.entries),
            "command": " ".join(["python -m endprompt.planning.efficiency", *sys.argv[1:]]),
            **self.stamp,
        }
        if self.out:
            storage.write_json(self.out, found)
        return found

    def add(self, setting: dict, found: dict) -> None:
        stamp = {"commit": self.stamp["commit"], "date": self.stamp["date"]}
        self.entries.append({**setting, **found, **stamp})
        self.written()
        print(tell(self.entries[-1]), file=sys.stderr, flush=True)

    def leave(self, setting: dict, seconds: float) -> None:
        self.left.append({**setting, "predicted_seconds": round(seconds)})
        self.written()

    def has(self, setting: dict) -> bool:
        """Whether ``setting`` was measured; what failed for a reason is taken out, to be made anew."""
        before = next((entry for entry in self.entries if key(entry) == key(setting)), None)
        if before is None:
            return False
        if "reason" in before:
            self.entries.remove(before)
            return False
        return True

    def too_long(self, setting: dict) -> bool:
        """What did not fit at a shorter row will not at a longer one."""
        return methods.get(setting["method"]).fills == "target" and any(
            not entry["fits"]
            and "reason" not in entry
            and entry["target"] < setting["target"]
            and key({**entry, "target": 0}) == key({**setting, "target": 0})
            for entry in self.entries
        )


def measure_all(shape: str, settings: list[dict], out: Path | None = None, limits: Limits = USUAL) -> dict:
    """All ``settings`` (``SETTING`` with changes) that ``out`` lacks, or that failed there for a reason, in
    order, each written to ``out`` when it is done. Returns what ``out`` then holds.

    Raises BadInput on a setting that no method has, or an ``out`` of another shape or device.
    """
    results = Results(shape, out)
    with Worker() as worker:
        for setting in ({**SETTING, **setting} for setting in settings):
            _refuse(shape, setting)
            if results.has(setting):
                continue
            if results.too_long(setting):
                results.add(setting, {"fits": False})
            elif limits.deadline and limits.exceeded_by(needed := predicted_seconds(shape, setting, 2)):
                results.leave(setting, needed)
            else:
                results.add(setting, worker.run(_asked(shape, setting, limits), limits.seconds_left()))
    return results.written()


def _refuse(shape: str, setting: dict) -> None:
    """Raises BadInput on a setting that no method has."""
    method, window = methods.get(setting["method"]), SHAPES[shape][6]
    if not method.trained:
        raise BadInput(f"--methods: {method.name} trains nothing")
    if setting["target"] <= window:
        raise BadInput(f"--targets: {setting['target']} does not exceed the window of {window}")


def _asked(shape: str, setting: dict, limits: Limits) -> dict:
    """The fields of ``step.Asked``."""
    return {
        "shape": shape,
        "method_name": methods.get(setting["method"]).name,
        "steps": limits.steps,
        "warm_up": limits.warm_up,
        "seconds": limits.seconds,
        **{name: value for name, value in setting.items() if name != "method"},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m endprompt.planning.efficiency", description=__doc__.partition("\n")[0]
    )
    _add_settings(parser)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument(
        "--budget",
        type=float,
        default=None,
        metavar="SECONDS",
        help="end by then, leaving what would take longer; the same command goes on",
    )
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--methods", nargs="+", default=["endprompt", "full_length"])
    parser.add_argument(
        "--targets",
        nargs="+",
        type=int,
        default=None,
        help="positions spanned; default: 2, 8 and 32 windows on a CPU, 16K, 64K, 256K and 1M on a GPU",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        type=int,
        default=[1],
        help="rows of the window's length a step; longer rows are taken one at a time",
    )
    parser.add_argument("--checkpointing", nargs="+", choices=("none", "full"), default=["none"])
    parser.add_argument(
        "--kernels",
        nargs="+",
        choices=KERNELS,
        default=["torch"],
        help="liger: its fused RMSNorm, SwiGLU and RoPE (a GPU, and the package)",
    )
    parser.add_argument(
        "--compile",
        nargs="+",
        choices=COMPILE,
        default=["no"],
        help="layers: torch.compile of each decoder layer",
    )
    parser.add_argument(
        "--attention",
        nargs="+",
        choices=ATTENTION,
        default=["auto"],
        help="the kernel that scaled_dot_product_attention must take",
    )


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.serve:
        serve()
        return
    try:
        _measure(arguments)
    except BadInput as error:
        print(f"endprompt: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (OSError, ValueError, KeyError) as error:
        print(f"endprompt: --out {arguments.out}: cannot be read: {error!r}", file=sys.stderr)
        raise SystemExit(2) from None


def _measure(arguments: argparse.Namespace) -> None:
    """What the command asks for, with the ratios on standard output.  Raises BadInput if a setting failed."""
    for number in [*(arguments.targets or []), *arguments.rows, arguments.steps]:
        if number < 1:
            raise BadInput(f"efficiency: {number} is no number of positions, rows or steps; use 1 or more")
    deadline = None if arguments.budget is None else time.monotonic() + arguments.budget
    limits = Limits(arguments.steps, arguments.warm_up, deadline=deadline)
    found = measure_all(arguments.shape, _settings(arguments), arguments.out, limits)
    print(json.dumps(found["ratios"], indent=2))
    if failed := next((entry for entry in found["entries"] if "reason" in entry), None):
        raise BadInput(f"efficiency: {tell(failed)}")


def _settings(arguments) -> list[dict]:
    import torch

    window = SHAPES[arguments.shape][6]
    targets = arguments.targets or (
        [2**14, 2**16, 2**18, 2**20] if torch.cuda.is_available() else [2 * window, 8 * window, 32 * window]
    )
    return [
        {
            "method": name,
            "target": target,
            "rows": rows,
            "checkpointing": way,
            "kernels": kernels,
            "compiled": compiled,
            "attention": attention,
        }
        for name in arguments.methods
        for target in targets
        for kernels in arguments.kernels
        for compiled in arguments.compile
        for attention in arguments.attention
        for way in arguments.checkpointing
        for rows in (arguments.rows if methods.get(name).fills == "physical" else [1])
    ]


if __name__ == "__main__":
    main()
