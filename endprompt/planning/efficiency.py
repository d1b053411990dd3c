r"""What a training step costs: time, memory and MFU by method and target length, on one device, from a
model's shape with random weights.

    python -m endprompt.planning.efficiency --shape small --methods endprompt full_length --targets 2048 \
        4096 \
        8192 --out FILE
    # on a GPU; benchmarks/gpu.sh does more
    python -m endprompt.planning.efficiency --shape llama-3.2-1b --rows 1 2 4 --checkpointing none full \
        --out \
        FILE
    python -m endprompt.planning.efficiency --picture FILE --out PICTURE

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
from pathlib import Path
from typing import Any

from endprompt import BadInput, storage
from endprompt.methods import table as methods
from endprompt.planning.step import (
    ATTENTION,
    COMPILE,
    KERNELS,
    SHAPES,
    attention_backend,
    config_of,
    measure,
    serve,
)

__all__ = ["SHAPES", "attention_backend", "config_of", "measure"]
SETTING = {
    "method": "endprompt",
    "target": None,
    "rows": 1,
    "checkpointing": "none",
    "kernels": "torch",
    "compiled": "no",
    "attention": "auto",
}
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


def key(entry: dict) -> tuple:
    return tuple(entry.get(name, default) for name, default in SETTING.items())


def best(entries: list[dict], method: str, target: int, checkpointing: str | None = None) -> dict | None:
    """The fastest of the settings of a method and target that fit, with one way of checkpointing or with
    any.
    """
    found = [
        entry
        for entry in entries
        if entry["fits"]
        and (entry["method"], entry["target"]) == (method, target)
        and checkpointing in (None, entry["checkpointing"])
    ]
    return max(found, key=lambda entry: entry["tokens_per_second"], default=None)


def ratios(entries: list[dict]) -> dict:
    """endprompt against full_length at each target: tokens/s each at its best, memory above the states under
    the same checkpointing and kernels; and how flat endprompt is from target to target, each at its best.
    """
    targets, found = sorted({entry["target"] for entry in entries}), {}
    for target in targets:
        one, other = best(entries, "endprompt", target), best(entries, "full_length", target)
        if one and other:
            found[str(target)] = {
                "speedup": one["tokens_per_second"] / other["tokens_per_second"],
                "arithmetic": other["flops_per_token"] / one["flops_per_token"],
            }
            for way in sorted({entry["checkpointing"] for entry in entries}):
                if other := best(entries, "full_length", target, way):
                    alike = [
                        entry
                        for entry in entries
                        if entry["fits"]
                        and key({**entry, "rows": 1}) == key({**other, "method": "endprompt", "rows": 1})
                    ]
                    if alike and other["memory_above_states_bytes"]:
                        least = min(alike, key=lambda entry: entry["rows"])
                        found[str(target)][f"memory_share_{way}"] = (
                            least["memory_above_states_bytes"] / other["memory_above_states_bytes"]
                        )
    flat = [entry for target in targets if (entry := best(entries, "endprompt", target))]
    if len(flat) > 1:
        found["endprompt_slowest_of_fastest_target"] = max(
            entry["seconds"] / entry["tokens"] for entry in flat
        ) / min(entry["seconds"] / entry["tokens"] for entry in flat)
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


def measure_all(
    shape: str,
    settings: list[dict],
    out: Path | None = None,
    steps: int = 5,
    warm_up: int = 2,
    seconds: float | None = None,
    deadline: float | None = None,
) -> dict:
    """All ``settings`` (``SETTING`` with changes) that ``out`` lacks, or that failed there for a reason, in
    order, each written to ``out`` when it is done. Returns what ``out`` then holds.

    seconds: a setting's steps end after so many.  deadline: on time.monotonic; what is predicted to end after
    it is named in "left" instead. Raises BadInput on a setting that no method has, or an ``out`` of another
    shape or device.
    """
    from endprompt.runs import provenance

    stamp = provenance.stamp()
    entries = earlier(out, shape, stamp["device"])
    left: list[dict] = []

    def result() -> dict:
        found = {
            "shape": shape,
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "entries": entries,
            "left": left,
            "ratios": ratios(entries),
            "command": " ".join(["python -m endprompt.planning.efficiency", *sys.argv[1:]]),
            **stamp,
        }
        if out:
            storage.write_json(out, found)
        return found

    with Worker() as worker:
        for setting in ({**SETTING, **setting} for setting in settings):
            method, window = methods.get(setting["method"]), SHAPES[shape][6]
            if not method.trained:
                raise BadInput(f"--methods: {method.name} trains nothing")
            if setting["target"] <= window:
                raise BadInput(f"--targets: {setting['target']} does not exceed the window of {window}")
            if before := next((entry for entry in entries if key(entry) == key(setting)), None):
                if "reason" not in before:
                    continue
                entries.remove(before)
            # What did not fit at a shorter row will not at a longer one.
            if method.fills == "target" and any(
                not entry["fits"]
                and "reason" not in entry
                and entry["target"] < setting["target"]
                and key({**entry, "target": 0}) == key({**setting, "target": 0})
                for entry in entries
            ):
                found = {"fits": False}
            elif deadline and time.monotonic() + (needed := predicted_seconds(shape, setting, 2)) > deadline:
                left.append({**setting, "predicted_seconds": round(needed)})
                result()
                continue
            else:
                asked = {
                    "shape": shape,
                    "method_name": method.name,
                    "steps": steps,
                    "warm_up": warm_up,
                    "seconds": seconds,
                    **{name: value for name, value in setting.items() if name != "method"},
                }
                found = worker.run(asked, deadline and max(10.0, deadline - time.monotonic()))
            entries.append({**setting, **found, "commit": stamp["commit"], "date": stamp["date"]})
            result()
            print(tell(entries[-1]), file=sys.stderr, flush=True)
    return result()


def tell(entry: dict) -> str:
    """An entry in one line."""
    name = (
        f"{entry['method']:12} target {entry['target']:8} rows {entry['rows']} checkpointing"
        f" {entry['checkpointing']:4}"
    )
    options = "".join(
        f" {entry[option]}"
        for option in ("kernels", "compiled", "attention")
        if entry[option] != SETTING[option]
    )
    if not entry["fits"]:
        return f"{name}{options}: {entry.get('reason', 'does not fit')}"
    mfu = f", MFU {entry['mfu']:.1%}" if entry["mfu"] else ""
    memory = (
        f", {entry['memory_above_states_bytes'] / 2**20:.0f} MiB above the states"
        if entry["memory_above_states_bytes"]
        else ""
    )
    return f"{name}{options}: {entry['tokens_per_second']:.0f} tokens/s{mfu}{memory}"


def draw(results: dict, path: Path) -> None:
    """The paper's two bars (Figure 4), time and memory, ours beside them, at the longest target that both
    endprompt and full_length were measured at.
    """
    from endprompt.evaluation import figures
    from endprompt.reports import paper

    entries = results["entries"]
    names = [
        name
        for name in methods.METHODS
        if any(entry["method"] == name and entry["fits"] for entry in entries)
    ]
    shared = [
        target
        for target in sorted({entry["target"] for entry in entries})
        if all(best(entries, name, target) for name in names)
    ]
    if not shared:
        raise BadInput("--picture: no target length was measured for all methods that the file holds")
    target, printed = shared[-1], paper.tables()["figure_4_64k"].printed
    chosen = {name: entry for name in names if (entry := best(entries, name, target))}
    hours = [1e9 / chosen[name]["tokens_per_second"] / 3600 for name in names]
    memory = [chosen[name]["memory_above_states_bytes"] / 2**30 for name in names]

    def of_paper(column: str) -> list[float | None]:
        return [float(printed[name][column]) if name in printed else None for name in names]

    paper_s = "paper (8B)"
    panels = [
        (f"time, target {target}", "hours for 1e9 tokens", names, {"ours": hours}),
        ("time, target 64K", "hours, 8 x A800", names, {paper_s: of_paper("hours")}),
        (f"memory above the states, target {target}", "GiB", names, {"ours": memory}),
        ("peak memory, target 64K", "GB a GPU", names, {paper_s: of_paper("memory_gb")}),
    ]
    figures.costs(
        panels,
        path,
        f"What training costs: shape {results['shape']} on {results['device'][:40]}, and the paper's"
        " Figure 4",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m endprompt.planning.efficiency", description=__doc__.partition("\n")[0]
    )
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
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument(
        "--budget",
        type=float,
        default=None,
        metavar="SECONDS",
        help="end by then, leaving what would take longer; the same command goes on",
    )
    parser.add_argument(
        "--picture", type=Path, default=None, help="draw this result file instead of measuring"
    )
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    try:
        if arguments.picture:
            draw(
                json.loads(arguments.picture.read_text()),
                arguments.out or arguments.picture.with_suffix(".png"),
            )
            return
        for number in [*(arguments.targets or []), *arguments.rows, arguments.steps]:
            if number < 1:
                raise BadInput(
                    f"efficiency: {number} is no number of positions, rows or steps; use 1 or more"
                )
        deadline = None if arguments.budget is None else time.monotonic() + arguments.budget
        found = measure_all(
            arguments.shape,
            _settings(arguments),
            arguments.out,
            arguments.steps,
            arguments.warm_up,
            deadline=deadline,
        )
        print(json.dumps(found["ratios"], indent=2))
        if failed := next((entry for entry in found["entries"] if "reason" in entry), None):
            raise BadInput(f"efficiency: {tell(failed)}")
    except BadInput as error:
        print(f"endprompt: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (OSError, ValueError, KeyError) as error:
        which, path = ("--picture", arguments.picture) if arguments.picture else ("--out", arguments.out)
        print(f"endprompt: {which} {path}: cannot be read: {error!r}", file=sys.stderr)
        raise SystemExit(2) from None


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
