"""kill -9 at random moments of prepare, train and evaluate, and a comparison of what comes out with an
undisturbed run, byte for byte.

    python tests/chaos.py --kills 100 --out docs/results/chaos.json     # make chaos N=100

A trial is a fresh copy of the stage's start, killed one to three times and then left alone.  Training runs on
two ranks with a checkpoint after every step, so that many kills fall into the writing of one; a third of them
waits for the last checkpoint and falls between it and model/, for every way in which a run's end can be
given.  A kill takes all processes at once (a node without power), one rank, or torchrun.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
STAGES = {"prepare": 0.3, "train": 0.5, "evaluate": 0.2}  # shares of the kills
# How the end of the training is given -> (settings, steps); 600 rows, of which the last step of the first has
# 24 of 32.
ENDS = {
    "the_recipe_s_own_end": (["train.per_device_train_batch_size=16"], 19),
    "max_steps": (["train.max_steps=18"], 18),
    "a_part_of_an_epoch": (["train.num_train_epochs=0.12"], 18),
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}


def recipe_file(folder: Path) -> Path:
    import yaml
    from conftest import tiny_documents, write_jsonl

    path = folder / "small.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"name_or_path": str(REPOSITORY / "recipes/tiny/base")},
                "lengths": {"physical": 128, "target": 1024},
                "data": {
                    "corpus": str(write_jsonl(folder / "corpus.jsonl", tiny_documents(400, 18))),
                    "tokens": 600 * 128,
                    "rows_per_shard": 20,
                },
                "train": {
                    "deepspeed": str(REPOSITORY / "ds_configs/zero3.json"),
                    "per_device_train_batch_size": 2,
                    "learning_rate": 1e-3,
                    "warmup_steps": 2,
                    "gradient_checkpointing": False,
                    "logging_steps": 1,
                    "save_steps": 1,
                },
                "eval": {"tasks": ["passkey"], "lengths": [128, 192, 256], "samples": 20, "depths": 4},
            }
        )
    )
    return path


def command(stage: str, recipe: Path, out: Path, end: str | None) -> list[str]:
    launcher = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        if stage == "train"
        else [sys.executable]
    )
    return [
        *launcher,
        "-m",
        "endprompt",
        stage,
        str(recipe),
        "endprompt",
        "--out",
        str(out),
        *(["--workers", "2"] if stage == "prepare" else []),
        *(part for setting in (ENDS[end][0] if end else []) for part in ("--set", setting)),
    ]


def outcome(stage: str, run: Path) -> dict:
    """What must be the same: hashes of shards and weights, losses, scores and answers."""

    def digest(paths) -> dict:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}

    if stage == "prepare":
        manifest = json.loads((run / "shards/manifest.json").read_text())
        return {"manifest": manifest, **digest((run / "shards").glob("*.parquet"))}
    if stage == "train":
        history = json.loads((run / "train.json").read_text())["history"]
        return {
            "losses": [
                [entry[key] for key in ("step", "loss", "text_loss", "end_prompt_loss")] for entry in history
            ],
            **digest((run / "model").iterdir()),
        }
    results = {
        path.name: json.loads(path.read_text())["scores"]
        for path in sorted((run / "eval/passkey").glob("*.json"))
    }
    return {"scores": results, **digest((run / "eval/passkey").glob("*.jsonl"))}


def half_written(run: Path) -> bool:
    return any(not (path / "complete.json").exists() for path in (run / "checkpoints").glob("checkpoint-*"))


def between(run: Path, end: str) -> bool:
    """Whether the last checkpoint is whole and model/ is not there."""
    last = run / f"checkpoints/checkpoint-{ENDS[end][1]}/complete.json"
    return last.exists() and not (run / "model").exists()


def tree(root: int) -> list[int]:
    """``root`` and its descendants: torchrun gives every rank a session of its own, so the process group does
    not hold them.
    """
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            children.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(
                int(path.parent.name)
            )
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Chaos:
    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng = folder, random.Random(seed)
        self.recipe = recipe_file(folder)
        self.seconds, self.expected, self.starts = {}, {}, {}
        self.window: dict[str, float] = {}  # seconds from the last checkpoint to model/
        self.counts = {stage: {"kills": 0, "trials": 0, "lost": 0, "differing": 0} for stage in STAGES}
        self.counts["train"] |= {
            "kills_while_a_checkpoint_was_written": 0,
            "kills_of_one_rank": 0,
            "kills_of_the_launcher": 0,
            "kills_between_the_last_checkpoint_and_the_model": dict.fromkeys(ENDS, 0),
        }
        self.faults: list[str] = []

    def undisturbed(self) -> None:
        out = self.folder / "undisturbed"
        run = out / "small/endprompt"
        for stage in STAGES:
            self.starts[stage] = self.folder / f"before-{stage}"
            if out.exists():
                shutil.copytree(out, self.starts[stage])
            else:
                self.starts[stage].mkdir()
            for end in (
                reversed(ENDS) if stage == "train" else [None]
            ):  # the recipe's own end is the one to evaluate
                if end:
                    shutil.rmtree(out)
                    shutil.copytree(self.starts[stage], out)
                started, reached = time.monotonic(), None
                process = subprocess.Popen(
                    command(stage, self.recipe, out, end),
                    env=ENVIRONMENT,
                    cwd=REPOSITORY,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                while process.poll() is None and time.monotonic() < started + 300:
                    time.sleep(0.01)
                    if end and between(run, end):
                        reached = reached or time.monotonic()
                    elif reached and end not in self.window:
                        self.window[end] = time.monotonic() - reached
                if process.poll() != 0:
                    process.kill()
                    raise SystemExit(f"chaos.py: {stage} fails undisturbed (exit code {process.poll()})")
                self.seconds[stage, end] = time.monotonic() - started
                self.expected[stage, end] = outcome(stage, run)
                if end and json.loads((run / "train.json").read_text())["steps"] != ENDS[end][1]:
                    raise SystemExit(f"chaos.py: {end} is not after {ENDS[end][1]} steps")

    def kill_once(self, stage: str, out: Path, end: str | None) -> bool:
        """Starts the stage and kills it; False if it had ended before."""
        run, counts = out / "small/endprompt", self.counts[stage]
        aim = self.rng.choice(["the end", "a checkpoint", "anything"]) if stage == "train" else "anything"
        window = self.rng.uniform(0, self.window[end]) if aim == "the end" else 0
        if end and between(run, end):  # killed there before: a start anew is in it from its first moment
            aim = "anything"
        process = subprocess.Popen(
            command(stage, self.recipe, out, end),
            env=ENVIRONMENT,
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        earliest = time.monotonic() + self.rng.uniform(0, self.seconds[stage, end])
        latest = (
            earliest + {"the end": 3 * self.seconds[stage, end] + 60, "a checkpoint": 60, "anything": 0}[aim]
        )
        while process.poll() is None and time.monotonic() < latest:
            if aim == "the end" and between(run, end):
                time.sleep(window)
                break
            if aim == "a checkpoint" and time.monotonic() > earliest and half_written(run):
                time.sleep(self.rng.uniform(0, 0.05))
                break
            time.sleep(0.002)
        if process.poll() is not None:
            return False
        writing, ending = stage == "train" and half_written(run), stage == "train" and between(run, end)
        everybody = tree(process.pid)
        kind = (
            self.rng.choice(["all", "all", "one_rank", "the_launcher"])
            if stage == "train" and len(everybody) == 3
            else "all"
        )
        for pid in (
            everybody
            if kind == "all"
            else [everybody[0] if kind == "the_launcher" else self.rng.choice(everybody[1:])]
        ):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(timeout=120)
        limit = time.monotonic() + 120
        while any(map(alive, everybody)):  # the others end by themselves
            if time.monotonic() > limit:
                self.faults.append(f"{stage}: {kind} was killed, and some of {everybody} went on for 120 s")
                counts["lost"] += 1
                break
            time.sleep(0.05)
        counts["kills"] += 1
        if stage == "train":
            counts["kills_while_a_checkpoint_was_written"] += writing
            # Ranks that outlive another or their launcher may have come to the end after all.
            counts["kills_between_the_last_checkpoint_and_the_model"][end] += ending and between(run, end)
            if kind != "all":
                counts[f"kills_of_{kind}"] += 1
        return True

    def trial(self, stage: str, number: int, most: int) -> None:
        out, counts = self.folder / f"trial-{stage}-{number}", self.counts[stage]
        end = list(ENDS)[number % len(ENDS)] if stage == "train" else None
        expected = self.expected[stage, end]
        shutil.copytree(self.starts[stage], out)
        for _ in range(min(most, self.rng.randint(1, 3))):
            if not self.kill_once(stage, out, end):
                break
        counts["trials"] += 1
        result = subprocess.run(
            command(stage, self.recipe, out, end),
            env=ENVIRONMENT,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        try:
            found = outcome(stage, out / "small/endprompt") if result.returncode == 0 else None
        except (OSError, ValueError, KeyError) as error:
            found, result.stdout = None, f"{result.stdout}\n{error!r}"
        if found is None:
            counts["lost"] += 1
            self.faults.append(f"{stage} trial {number}: exit {result.returncode}: {result.stdout[-1500:]}")
        elif found != expected:
            counts["differing"] += 1
            self.faults.append(
                f"{stage} trial {number} ({end}):"
                f" {[key for key in found if found[key] != expected.get(key)][:5]} differ"
            )
        if found == expected:
            shutil.rmtree(out)

    def run(self, kills: int) -> dict:
        started = time.monotonic()
        self.undisturbed()
        wanted = {stage: round(kills * share) for stage, share in STAGES.items()}
        wanted["train"] += kills - sum(wanted.values())
        for stage, count in wanted.items():
            number = 0
            while self.counts[stage]["kills"] < count:
                self.trial(stage, number, count - self.counts[stage]["kills"])
                number += 1
                print(f"[{time.monotonic() - started:5.0f} s] {stage}: {self.counts[stage]}", flush=True)
        return {
            "kills": sum(counts["kills"] for counts in self.counts.values()),
            "lost": sum(counts["lost"] for counts in self.counts.values()),
            "differing": sum(counts["differing"] for counts in self.counts.values()),
            "stages": self.counts,
            "undisturbed_seconds": {
                " ".join(filter(None, key)): round(value, 1) for key, value in self.seconds.items()
            },
            "seconds_from_the_last_checkpoint_to_the_model": {
                end: round(value, 2) for end, value in self.window.items()
            },
            "seconds": round(time.monotonic() - started),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="the result, as JSON")
    arguments = parser.parse_args()
    if arguments.kills < 1:
        parser.error(f"--kills {arguments.kills}: at least one")
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    chaos = Chaos(folder, arguments.seed)
    result = chaos.run(arguments.kills)
    from endprompt.runs import provenance

    result = {
        "command": f"python tests/chaos.py --kills {arguments.kills} --seed {arguments.seed}",
        **result,
        "faults": chaos.faults,
        **provenance.stamp(),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in ("kills", "lost", "differing", "seconds")}))
    if chaos.faults:
        print("\n".join(chaos.faults), f"\nthe folders of these trials are in {folder}", file=sys.stderr)
        raise SystemExit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
