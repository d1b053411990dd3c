"""The chunked loss against full logits: time, peak memory, and how far the gradients are apart.

    python benchmarks/loss.py [--tokens 8192 --vocabulary 128256 --width 256] [--out FILE]

Each version runs in a process of its own.  Memory is what lies above the inputs, the loss and the gradients:
on a GPU max_memory_allocated, on a CPU the peak of resident memory.  Full logits: a linear layer,
cross_entropy(reduction="none") in float32, the weights, backward.  Gradients are compared with those of full
logits; on a GPU, where inputs are bfloat16, both with those in float32 ("exact").  There Liger's fused loss
is a third version, if the package is there.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import measure


def inputs(version: str, tokens: int, vocabulary: int, width: int):
    """Hidden states, head, labels and weights: bfloat16 on a GPU, float32 on a CPU and for ``exact``."""
    import torch

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(device, dtype)
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    weights = torch.ones(tokens, device=device)
    if not cuda:  # Liger's loss knows no weights
        weights[-12:] = 0.1
    if version == "exact":
        hidden, weight = hidden.float(), weight.float()
    return hidden.requires_grad_(), weight.requires_grad_(), labels, weights


def loss_of(version: str, hidden, weight, labels, weights):
    import torch
    from torch.nn import functional

    from endprompt.training.loss import chunked_linear_cross_entropy, liger_kernel

    if version in ("full", "exact"):
        losses = functional.cross_entropy(functional.linear(hidden, weight).float(), labels, reduction="none")
        return (losses * weights).sum()
    if version == "liger":
        return liger_kernel(hidden)(
            hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32
        )[0]
    return chunked_linear_cross_entropy(hidden, weight, labels, weights)[0]


def worker(version: str, shape: tuple[int, int, int], repeats: int, reference: Path) -> dict:
    import torch

    cuda = torch.cuda.is_available()
    hidden, weight, labels, weights = inputs(version, *shape)

    def step():
        hidden.grad = weight.grad = None
        loss = loss_of(version, hidden, weight, labels, weights)
        loss.backward()
        if cuda:
            torch.cuda.synchronize()
        return float(loss.detach())

    # Gradients are part of any version: they are there before what is measured is.
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    before = torch.cuda.memory_allocated() if cuda else measure.resident_bytes()
    hidden.grad = weight.grad = None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        measure.reset_peak()
    value = step()
    peak = torch.cuda.max_memory_allocated() if cuda else measure.peak_bytes()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    found = {
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "memory_bytes": peak - before,
        "loss": value,
    }
    if version == ("exact" if cuda else "full"):
        torch.save([hidden.grad, weight.grad], reference)
    else:
        others = torch.load(reference, weights_only=True)
        found["relative_gradient_difference"] = [
            float((mine.float() - other).norm() / other.norm())
            for mine, other in zip((hidden.grad, weight.grad), others, strict=True)
        ]
    return found


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--reference", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = (arguments.tokens, arguments.vocabulary, arguments.width)
    if arguments.worker:
        print(json.dumps(worker(arguments.worker, shape, arguments.repeats, arguments.reference)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        import torch

        versions = (
            ["exact", "full", "chunked", *(["liger"] if importlib.util.find_spec("liger_kernel") else [])]
            if torch.cuda.is_available()
            else ["full", "chunked"]
        )
        for version in versions:
            named = ("tokens", "vocabulary", "width", "repeats")
            options = [part for name in named for part in (f"--{name}", str(getattr(arguments, name)))]
            result = subprocess.run(
                [
                    sys.executable,
                    __file__,
                    *options,
                    "--worker",
                    version,
                    "--reference",
                    f"{folder}/gradients",
                ],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            found[version] = json.loads(result.stdout.splitlines()[-1])
    measure.write(
        arguments.out,
        "loss",
        {
            "tokens": arguments.tokens,
            "vocabulary": arguments.vocabulary,
            "width": arguments.width,
            **found,
            "memory_share": found["chunked"]["memory_bytes"] / found["full"]["memory_bytes"],
            "time_ratio": found["chunked"]["seconds"] / found["full"]["seconds"],
        },
    )


if __name__ == "__main__":
    main()
