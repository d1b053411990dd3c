r"""Tokens/s and MFU of ``endprompt train`` itself, under DeepSpeed ZeRO-3 on one device: a shape with random
weights, rows of random words.

    python benchmarks/train.py --shape smollm2-135m --steps 12 --out FILE [--set train.use_liger_kernel=true \
        ...]

Prepares shards, starts ``torchrun --nproc_per_node=1 -m endprompt train`` and reads its train.json; figures
are medians over the steps after the third (the first where there are no more), each between two logs.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import measure

from endprompt.planning import efficiency

BASE = measure.REPOSITORY / "recipes" / "tiny" / "base"  # whose tokenizer it borrows


def model_folder(shape: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    config = efficiency.config_of(shape)
    config.bos_token_id, config.eos_token_id = 1, 2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in BASE.glob("tokenizer*"):
        shutil.copy(file, folder)


def corpus(path: Path, tokens: int) -> None:
    """Random words, at least ``tokens`` of them."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(4000)]
    with path.open("w") as file:
        for _ in range(tokens // 1000 + 1):
            file.write(json.dumps({"text": " ".join(rng.choices(words, k=1000))}) + "\n")


def written(folder: Path, window: int, rows: int, tokens: int) -> Path:
    recipe = {
        "model": {"name_or_path": str(folder / "base")},
        "lengths": {"physical": window, "target": 8 * window},
        "data": {"corpus": str(folder / "corpus.jsonl"), "tokens": tokens},
        "train": {
            "deepspeed": str(measure.REPOSITORY / "ds_configs" / "zero3.json"),
            "per_device_train_batch_size": rows,
            "logging_steps": 1,
            "warmup_steps": 2,
            "gradient_checkpointing": False,
            "report_to": [],
            "save_steps": 10**6,  # none before the end
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # which is YAML too
    return path


def ran(command: str, start: list[str], recipe: Path, changes: list[str]) -> None:
    """Runs one command of endprompt; raises SystemExit with its own message where it fails."""
    result = subprocess.run(
        [
            *start,
            "endprompt",
            command,
            str(recipe),
            "endprompt",
            "--out",
            str(recipe.parent / "runs"),
            *changes,
        ],
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode:
        lines = result.stdout.strip().splitlines()
        told = [line for line in lines if "Error" in line or line.startswith("endprompt:")] or lines[-1:]
        print(f"benchmarks/train.py: {command} failed: {told[0] if told else 'no message'}", file=sys.stderr)
        raise SystemExit(1)


def measured(arguments: argparse.Namespace, window: int) -> dict:
    """What train.json holds after ``steps`` steps."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokens = arguments.steps * arguments.rows * window
        model_folder(arguments.shape, folder / "base")
        corpus(folder / "corpus.jsonl", tokens)
        recipe = written(folder, window, arguments.rows, tokens)
        changes = [part for value in arguments.set for part in ("--set", value)]
        ran("prepare", [sys.executable, "-m"], recipe, changes)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m"]
        ran("train", torchrun, recipe, changes)
        return json.loads((folder / "runs" / "recipe" / "endprompt" / "train.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=efficiency.SHAPES, default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    window = efficiency.SHAPES[arguments.shape][6]
    found = measured(arguments, window)
    steady = found["history"][3:] or found["history"][-1:]
    values = {
        name: statistics.median(entry[name] for entry in steady)
        for name in ("tokens_per_second", "mfu", "peak_memory_gib")
        if name in steady[0]
    }
    measure.write(
        arguments.out,
        "train",
        {
            "shape": arguments.shape,
            "rows": arguments.rows,
            "row_length": window,
            "steps": found["steps"],
            "seconds": found["seconds"],
            "probe": found["probe"],
            "losses": [entry["loss"] for entry in found["history"]],
            "set": arguments.set,
            **values,
        },
    )


if __name__ == "__main__":
    main()
