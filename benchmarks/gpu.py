"""The whole cost evidence of one GPU, most important first, inside a time budget; the same command goes on
with what is missing.

    python benchmarks/gpu.py --out FOLDER --budget 540

FOLDER gets a file a stage, each written after every setting: machine.json (what the device does at best,
which kernel attention takes), loss.json (8192 x 128,256 x 2048), llama-3.2-1b.json (targets 16K to 1M),
train.json (DeepSpeed ZeRO-3, SmolLM2-135M's shape with random weights), llama-3-8b-8-layers.json (a whole 8B
with its optimizer states, 16 bytes a parameter, is 128 GB and fits no GPU here), and summary.json.  A stage
that fails, or for which no time is left, says so there, and the next goes on.  The fastest options are looked
for with endprompt at 64K and then used for everything else.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import measure

from endprompt import BadInput
from endprompt.planning import efficiency

K = 1024
STAGES = ("machine", "loss", "1b", "train", "8b")  # by what they are worth
OPTIONS = ("kernels", "compiled", "attention")
RESERVED = {"train": 110, "8b": 60}  # seconds, of 540
STEP_SECONDS = 60  # the longest that one setting's steps may take


@dataclass(frozen=True)
class Sizes:
    """Of what ``machine`` measures.  product: rows and columns of a matrix; copy: bytes."""

    product: int = 8192
    copy: int = 2**32
    shapes: tuple[str, ...] = ("smollm2-135m", "llama-3.2-1b", "llama-3-8b")
    repeats: int = 20


REHEARSED = Sizes(256, 2**20, ("small",), 1)


def machine(sizes: Sizes) -> dict:
    """Measured ceilings of the device (bfloat16 product on random data, FLOP/s; copy on the device, bytes
    read and written a second), and what scaled_dot_product_attention chooses for rows of each shape.
    """
    import torch

    from endprompt.planning.step import Clock

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"

    def seconds(function) -> float:
        for _ in range(3):
            function()
        clock = Clock(cuda)
        clock.mark()
        for _ in range(sizes.repeats):
            function()
        clock.mark()
        return clock.seconds()[0] / sizes.repeats

    n = sizes.product
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(sizes.copy, device=device, dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "memory_bytes": torch.cuda.mem_get_info()[1] if cuda else host,
        "matrix_product_flops": 2 * n**3 / seconds(lambda: a @ b),
        "copy_bytes_per_second": 2 * len(source) / seconds(lambda: target.copy_(source)),
        "attention": {shape: attention(shape, device, seconds) for shape in sizes.shapes},
    }


def attention(shape: str, device: str, seconds: Callable[[Callable], float]) -> dict:
    """Which kernel torch chooses for a row of ``shape``, and FLOP/s of each that can be asked for."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    names = {int(value): name for name, value in torch.nn.attention.SDPBackend.__members__.items()}
    _, width, _, heads, kv, _, window, _ = efficiency.SHAPES[shape]
    q, k = (
        torch.randn(1, n, window, width // heads, device=device, dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, kv)
    )
    causal = {"is_causal": True, "enable_gqa": True}
    chosen = torch._fused_sdp_choice(q, k, k, **causal)
    found, flops = {"chosen": names.get(chosen, str(chosen))}, 2 * width * window**2
    for name in ("flash", "cudnn"):
        with efficiency.attention_backend(name):
            try:
                out = scaled_dot_product_attention(q, k, k, **causal)
                forward = seconds(lambda: scaled_dot_product_attention(q, k, k, **causal))
                backward = seconds(lambda out=out: torch.autograd.grad(out, (q, k), out, retain_graph=True))
                found[name] = {"forward_flops": flops / forward, "backward_flops": 2.5 * flops / backward}
            except RuntimeError as error:
                found[name] = {"reason": str(error).splitlines()[0][:200]}
    return found


def options_of(entry: dict) -> dict:
    return {name: entry[name] for name in OPTIONS}


def fastest(entries: list[dict], among: list[dict]) -> dict:
    """The options of the fastest entry that is one of ``among`` and fits; ``among``'s first if none is."""
    keys = [efficiency.key({**efficiency.SETTING, **setting}) for setting in among]
    fitting = [entry for entry in entries if entry["fits"] and efficiency.key(entry) in keys]
    return (
        options_of(max(fitting, key=lambda entry: entry["tokens_per_second"]))
        if fitting
        else options_of({**efficiency.SETTING, **among[0]})
    )


def steps_of(
    shape: str,
    out: Path,
    deadline: float,
    targets: tuple[int, ...],
    middle: int,
    rows: tuple[int, ...],
    **limits,
) -> dict:
    """The settings of one shape, in the order of what they are worth; the options are those found fastest at
    the target ``middle``.
    """

    within = efficiency.Limits(deadline=deadline, seconds=STEP_SECONDS, **limits)

    left: list[dict] = []

    def go(settings: list[dict]) -> list[dict]:
        found = efficiency.measure_all(shape, settings, out, within)
        left.extend(found["left"])
        return found["entries"]

    first = {"target": middle}
    plain = [first, {**first, "attention": "cudnn"}, {**first, "attention": "flash"}]
    attention = fastest(go(plain), plain)
    fused = [
        {**first, **attention},
        {**first, **attention, "kernels": "liger"},
        {**first, **attention, "compiled": "layers"},
    ]
    options = fastest(go(fused), fused)
    whole = {"method": "full_length", **options}
    go([{**whole, "target": middle, "checkpointing": "full"}])
    tried = [{**first, **options, "rows": n} for n in rows]
    entries = go(tried)
    fitting = [
        entry
        for entry in entries
        if entry["fits"]
        and efficiency.key(entry) in [efficiency.key({**efficiency.SETTING, **setting}) for setting in tried]
    ]
    most = max(fitting, key=lambda entry: entry["tokens_per_second"])["rows"] if fitting else 1
    go(
        [
            {**first, **options, "checkpointing": "full"},
            *({**first, **options, "rows": most, "target": target} for target in targets if target != middle),
            {**whole, "target": targets[0]},
            {**whole, "target": targets[0], "checkpointing": "full"},
            {**whole, "target": middle},
            *({**whole, "target": target, "checkpointing": "full"} for target in targets if target > middle),
        ]
    )
    last = {**first, **options, "checkpointing": "full", "rows": max(rows)}
    found = efficiency.measure_all(shape, [last], out, within)
    return {**found, "left": [*left, *found["left"]]}


def loss(out: Path, deadline: float, shape: tuple[int, int, int]) -> dict:
    tokens, vocabulary, width = map(str, shape)
    command = [
        sys.executable,
        str(Path(__file__).parent / "loss.py"),
        "--tokens",
        tokens,
        "--vocabulary",
        vocabulary,
        "--width",
        width,
        "--repeats",
        "20",
        "--out",
        str(out),
    ]
    return _run(command, deadline, out, "loss")


def train(out: Path, deadline: float, shape: str, steps: int) -> dict:
    """A few steps of ``endprompt train`` under DeepSpeed ZeRO-3, from random weights and random words
    (``benchmarks/train.py``).
    """
    return _run(
        [
            sys.executable,
            str(Path(__file__).parent / "train.py"),
            "--shape",
            shape,
            "--steps",
            str(steps),
            "--out",
            str(out),
        ],
        deadline,
        out,
        "train",
    )


def _run(command: list[str], deadline: float, out: Path, name: str) -> dict:
    """What ``command`` put under ``name`` into ``out``; it is ended at the deadline."""
    left = deadline - time.monotonic()
    if left < 1:
        return {"reason": "no time is left"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, told = process.communicate(timeout=left)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)  # and what it started
        process.communicate()
        return {"reason": f"not done after {error.timeout:.0f} s"}
    if process.returncode:
        return {"reason": (told.strip().splitlines() or ["no message"])[-1][:500]}
    return json.loads(out.read_text())[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder; what it holds is gone on with")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=STAGES,
    )
    parser.add_argument(
        "--small", action="store_true", help="the small shape at short targets: a rehearsal, on a CPU too"
    )
    parser.add_argument("--only-machine", action="store_true", help=argparse.SUPPRESS)
    # Of the budget, before this process was there.
    parser.add_argument("--spent", type=float, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    began = time.monotonic() - arguments.spent
    import torch

    if not (arguments.small or torch.cuda.is_available()):
        print(
            "endprompt: benchmarks/gpu.py: there is no GPU that torch can use; --small rehearses on a CPU",
            file=sys.stderr,
        )
        raise SystemExit(2)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.only_machine:
        found = machine(REHEARSED if arguments.small else Sizes())
        measure.write(arguments.out / "machine.json", "machine", found, quiet=True)
        return
    deadline = began + arguments.budget
    summary_file = arguments.out / "summary.json"
    summary = json.loads(summary_file.read_text()) if summary_file.exists() else {}
    for stage in arguments.stages:
        if stage in ("machine", "loss", "train") and stage in summary and "reason" not in summary[stage]:
            continue
        started = time.monotonic()
        # The stages behind this one keep their share, so that many settings do not take all.
        kept = sum(
            RESERVED.get(later, 0) for later in arguments.stages[arguments.stages.index(stage) + 1 :]
        ) * min(1, arguments.budget / 540)
        try:
            summary[stage] = _stage(stage, arguments, deadline - kept)
        except (BadInput, RuntimeError, OSError) as error:
            summary[stage] = {"reason": str(error).splitlines()[0][:500]}
        print(f"{stage}: {time.monotonic() - started:.0f} s; {json.dumps(_told(summary[stage]))}", flush=True)
        measure.write(summary_file, stage, summary[stage], quiet=True)
    print(f"benchmarks/gpu.py: {time.monotonic() - began:.0f} s of {arguments.budget:.0f}; {summary_file}")


def _told(value):
    """``value`` without what makes a line long."""
    return (
        {
            name: _told(inner)
            for name, inner in value.items()
            if name not in ("all_seconds", "versions", "command")
        }
        if isinstance(value, dict)
        else value
    )


def _stage(stage: str, arguments, deadline: float) -> dict:
    out, small = arguments.out, arguments.small
    if stage == "machine":
        # In a process of its own, so that this one holds nothing on the device.
        options = ["--out", str(out), "--only-machine", *(["--small"] if small else [])]
        return _run(
            [sys.executable, __file__, *options],
            min(deadline, time.monotonic() + 120),
            out / "machine.json",
            "machine",
        )
    if stage == "loss":
        return loss(
            out / "loss.json",
            min(deadline, time.monotonic() + 150),
            (1024, 20000, 64) if small else (8192, 128256, 2048),
        )
    if stage == "train":
        return train(out / "train.json", deadline, "small" if small else "smollm2-135m", 2 if small else 12)
    if stage == "1b":
        shape, targets, middle, rows = (
            ("small", (1024, 2048), 2048, (1, 2))
            if small
            else ("llama-3.2-1b", (16 * K, 64 * K, 256 * K, 1024 * K), 64 * K, (1, 2, 4, 8))
        )
    else:
        shape, targets, middle, rows = (
            ("small", (1024,), 1024, (1, 2))
            if small
            else ("llama-3-8b-8-layers", (16 * K, 64 * K), 64 * K, (1, 2))
        )
    found = steps_of(
        shape,
        out / f"{shape}-{stage}.json" if small else out / f"{shape}.json",
        deadline,
        targets,
        middle,
        rows,
        **({"steps": 1, "warm_up": 1} if small else {}),
    )
    return _fastest(shape, found)


def _fastest(shape: str, found: dict) -> dict:
    """What summary.json says of the steps of ``shape``."""
    fitting = [entry for entry in found["entries"] if entry["fits"]]
    fastest_of = {
        method: max(
            (entry for entry in fitting if entry["method"] == method),
            key=lambda entry: entry["flops_per_second"],
            default=None,
        )
        for method in ("endprompt", "full_length")
    }
    return {
        "shape": shape,
        "ratios": found["ratios"],
        "left": len(found["left"]),
        "measured": len(fitting),
        "best": {
            method: (
                entry
                and {
                    **{name: entry[name] for name in efficiency.SETTING},
                    **{
                        name: entry[name]
                        for name in ("mfu", "tokens_per_second", "peak_bytes", "memory_above_states_bytes")
                    },
                }
            )
            for method, entry in fastest_of.items()
        },
    }


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
