"""What the tests that train share: a run is a process, or two, of its own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import ranks
import torch
from conftest import REPOSITORY, run_main
from safetensors.torch import load_file

# Scripts elsewhere would else import the package that is installed, which is another one in a second work
# tree.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run(command: list, expect: int = 0) -> str:
    """What ``command`` prints.  This Python, or a TORCHRUN of it, is forked from a process that has imported
    what training needs, as imports would take most of a test's time."""
    parts = [str(part) for part in command]
    with tempfile.TemporaryFile() as log:
        if parts[0] == sys.executable:
            code = ranks.run(parts, ENVIRONMENT, log.fileno(), 240)
        else:
            told = {"stdout": log, "stderr": subprocess.STDOUT, "env": ENVIRONMENT, "timeout": 240}
            code = subprocess.run(parts, cwd=REPOSITORY, **told).returncode
        log.seek(0)
        told = log.read().decode(errors="replace")
    assert code == expect, told[-4000:]
    return told


def train(recipe: Path, method: str, out: Path, *options, ranks: int = 1) -> list:
    launcher = [sys.executable] if ranks == 1 else TORCHRUN
    return [*launcher, "-m", "endprompt", "train", recipe, method, "--out", out, *options]


def prepared(recipe: Path, method: str, out: Path) -> Path:
    code, _, error = run_main("prepare", recipe, method, "--out", out, "--workers", 1)
    assert code == 0, error
    return out / recipe.stem / method


def losses(folder: Path) -> list[tuple]:
    history = json.loads((folder / "train.json").read_text())["history"]
    return [(entry["loss"], entry["text_loss"], entry["end_prompt_loss"]) for entry in history]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same(one: dict, two: dict, tolerance: float) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
