"""From the command to the first step on the tiny recipe, and `endprompt --help`.

    python benchmarks/startup.py [--repeats 5] [--out FILE]

The first step's end is when the first loss is logged (logging_steps=1), on one process; the model and shards
are the embedded default's.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(measure.REPOSITORY),
    "PYTHONUNBUFFERED": "1",
}


def help_seconds() -> float:
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "endprompt", "--help"],
        cwd=measure.REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - started


def first_step_seconds(command: list[str]) -> float:
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=measure.REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        for line in process.stdout:
            if "'text_loss'" in line:
                return time.perf_counter() - started
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    raise SystemExit(f"no step was made by {' '.join(command)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    helps = [help_seconds() for _ in range(arguments.repeats)]
    with tempfile.TemporaryDirectory() as folder:
        options = [
            "recipes/tiny.yaml",
            "endprompt",
            "--out",
            folder,
            "--set",
            "data.tokens=65536",
            "--set",
            "train.logging_steps=1",
        ]
        subprocess.run(
            [sys.executable, "-m", "endprompt", "prepare", *options],
            cwd=measure.REPOSITORY,
            env=ENVIRONMENT,
            capture_output=True,
            check=True,
        )
        steps = [
            first_step_seconds([sys.executable, "-m", "endprompt", "train", *options])
            for _ in range(arguments.repeats)
        ]
    measure.write(
        arguments.out,
        "startup",
        {
            "help_seconds": statistics.median(helps),
            "all_help_seconds": helps,
            "first_step_seconds": statistics.median(steps),
            "all_first_step_seconds": steps,
        },
    )


if __name__ == "__main__":
    main()
