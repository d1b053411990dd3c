"""On the machine: one method within a budget of seconds; the same command goes on.  prepare -> train ->
evaluate, each endprompt's own command.

    bash recipes/gpu/gpu.sh run METHOD --out DIR --budget 540

After every step, and while results come, DIR/METHOD.tar.gz holds what is small of the run: recipe.yaml,
train.json with the losses, result files with the answers, logs, and calls.json (when, how long, which step).
Exit codes: 0 all is done, 75 the budget is used up, 2 bad input, 1 a step failed.
"""

import argparse
import ctypes
import datetime
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import uuid
from pathlib import Path

import parts

from endprompt import BadInput
from endprompt.methods import table as methods
from endprompt.recipe import schema as config
from endprompt.rows import shards
from endprompt.runs import runfolder

STOPPED = 75
SAVING = 40  # seconds that training gets to end a step and write a checkpoint
LEAST = 20  # seconds in which no step gets anywhere: Python, torch and the model are loaded first
DELIVERED = 60 * 2**20  # bytes of logs and results, before packing; 16 MiB packed may go back
POLL = 2.0


def settings(about: dict, home: Path, arguments) -> list[str]:
    """The --set options of every step: where things lie on this machine, and what was asked for."""
    files = home / "files"
    found = [
        f"model.name_or_path={files / 'model'}",
        "model.gguf_file=null",
        f"data.corpus={files / 'text' / about['train']}",
        f"eval.perplexity_corpus={files / 'text' / about['heldout']}",
        f"data.seed={arguments.seed}",
    ]
    if (files / "ruler").is_dir():
        found.append(f"eval.ruler_samples={files / 'ruler'}")
    if _gpu():
        found.append("train.use_liger_kernel=true")
    if arguments.tokens is not None:
        found.append(f"data.tokens={arguments.tokens}")
    return [*about["set"], *found, *arguments.set]


def _gpu() -> bool:
    """As recipes/run.sh does; torch need not be imported here."""
    try:
        return subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60
        ).stdout.startswith("GPU")
    except (OSError, subprocess.SubprocessError):
        return False


def _die_with_this() -> None:
    """In the child: the kernel ends it where this process is killed, for what runs on would hold the device
    and the run's locks.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


class Delivery:
    """DIR/METHOD.tar.gz, written again whenever a small file of the run has changed."""

    def __init__(self, run: Path, out: Path, calls: list[dict]):
        self.run, self.target, self.calls, self._seen = run, out / f"{run.name}.tar.gz", calls, None

    def _files(self) -> list[Path]:
        found = [
            self.run / "recipe.yaml",
            self.run / "train.json",
            self.run / "status.json",
            *sorted(self.run.glob("*.log")),
            *sorted(self.run.glob("eval/*/*.json*")),
        ]
        return [path for path in found if path.is_file() and not path.name.endswith(".part")]

    def write(self, always: bool = False) -> None:
        """Each file is read once, before the archive is begun: results may be replaced meanwhile."""
        files = self._files()
        seen = [(str(path), path.stat().st_mtime_ns) for path in files if path.suffix != ".log"]
        if seen == self._seen and not always:
            return
        contents = [
            (
                path.relative_to(self.run).as_posix(),
                path.read_bytes()[-DELIVERED // 60 :] if path.suffix == ".log" else path.read_bytes(),
            )
            for path in files
        ]
        contents.append(("calls.json", json.dumps(self.calls, indent=1).encode()))
        if sum(len(content) for _, content in contents) > DELIVERED:
            contents = [(name, content) for name, content in contents if not name.endswith(".jsonl")]
        part = self.target.with_name(self.target.name + ".part")
        with tarfile.open(part, "w:gz") as archive:
            for name, content in contents:
                entry = tarfile.TarInfo(name)
                entry.size, entry.mtime = len(content), int(time.time())
                archive.addfile(entry, io.BytesIO(content))
        part.replace(self.target)
        self._seen = seen


class Steps:
    """Runs endprompt's commands one after another until ``deadline`` (of time.monotonic)."""

    def __init__(
        self, recipe: str, method: str, runs: Path, options: list[str], deadline: float, delivery: Delivery
    ):
        self.common = [
            recipe,
            method,
            "--out",
            str(runs),
            *(word for option in options for word in ("--set", option)),
        ]
        self.run, self.deadline, self.delivery = delivery.run, deadline, delivery

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def step(self, verb: str, *options: str) -> str:
        """What the command printed; its log is <verb>.log in the run's folder.  Raises SystemExit(1) where it
        fails, SystemExit(75) where it is ended.
        """
        if self.left() < LEAST:
            raise SystemExit(STOPPED)
        log, began = self.run / f"{verb}.log", time.monotonic()
        record = {
            "step": verb,
            "options": list(options),
            "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        self.delivery.calls[-1]["steps"].append(record)
        with log.open("ab") as into:
            start = into.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", "endprompt", verb, *self.common, *options],
                stdin=subprocess.DEVNULL,
                stdout=into,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_this,
                cwd=parts.ROOT,
            )
            asked = ended = False
            try:
                while process.poll() is None:
                    time.sleep(min(POLL, max(0.05, self.left())))
                    self.delivery.write()
                    if verb == "train" and not asked and self.left() < SAVING:
                        (self.run / runfolder.STOP).touch()  # it saves after the step under way
                        asked = True
                    if self.left() <= 0 and not ended:
                        ended = True
                        process.kill()
            finally:
                if process.poll() is None:  # this process was told to end
                    process.kill()
                    process.wait()
        record["seconds"], record["code"] = round(time.monotonic() - began, 1), process.returncode
        self.delivery.write(always=True)
        said = log.read_bytes()[start:].decode(errors="replace")
        print(
            f"{verb}: {record['seconds']} s"
            + ("" if not process.returncode else f", exit code {process.returncode}"),
            flush=True,
        )
        if ended:
            raise SystemExit(STOPPED)
        if process.returncode:
            print("\n".join(said.strip().splitlines()[-15:]), file=sys.stderr)
            raise SystemExit(2 if process.returncode == 2 else 1)
        return said


def whole(steps: Steps, method: methods.Method, rounds: list[int]) -> None:
    """All steps of a method, each round of evaluation with more samples than the one before.  Raises
    SystemExit(75) where the budget ends it.
    """
    run = steps.run
    if method.trained:
        if not (run / "shards" / shards.MANIFEST).exists():
            steps.step("prepare")
        if not (run / "model").exists():
            (run / runfolder.STOP).unlink(missing_ok=True)  # of a call before, which was killed meanwhile
            if steps.left() < LEAST + SAVING:
                raise SystemExit(STOPPED)
            steps.step("train")
            if not (run / "model").exists():
                raise SystemExit(STOPPED)
    for samples in rounds:
        mark = run / f"evaluated-{samples}"
        if mark.exists():
            continue
        said = steps.step(
            "evaluate", "--set", f"eval.samples={samples}", "--budget", f"{max(1.0, steps.left() - 5):.0f}"
        )
        print(
            "\n".join(line for line in said.splitlines() if line.startswith((method.name, "evaluate:"))),
            flush=True,
        )
        if "the same command goes on" in said:
            raise SystemExit(STOPPED)
        mark.touch()


def main(argv: list[str] | None = None) -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="gpu.sh run", description=__doc__.partition("\n")[0])
    parser.add_argument("method", metavar="METHOD")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets METHOD.tar.gz")
    parser.add_argument(
        "--budget", type=float, default=540, metavar="SECONDS", help="of this call, starting included"
    )
    parser.add_argument("--tokens", type=int, default=None, help="to train on; default: the recipe's 10 M")
    parser.add_argument(
        "--samples",
        type=int,
        nargs="+",
        default=None,
        metavar="N",
        help="of passkey and RULER, a round each; default: 10, then all that were packed",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", default=None, help="default: the one that was packed")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args(argv)
    code, home = 0, parts.default_home()
    try:
        method, about = methods.get(arguments.method), parts.about(home)
        rounds = arguments.samples or sorted({min(10, about["samples"]), about["samples"]})
        if not arguments.budget >= LEAST:
            raise BadInput(
                f"run: --budget {arguments.budget:g}: nothing gets anywhere in less than {LEAST} s"
            )
        if min(rounds) < 1 or max(rounds) > about["samples"]:
            raise BadInput(
                f"run: --samples: {about['samples']} were packed; name numbers from 1 to that (given:"
                f" {' '.join(map(str, rounds))})"
            )
        recipe_file, options = (
            arguments.recipe or str(home / "files" / "recipe" / about["recipe"]),
            settings(about, home, arguments),
        )
        recipe = config.load(recipe_file, options)
        run = home / "runs" / recipe.name / method.name
        run.mkdir(parents=True, exist_ok=True)
        arguments.out.mkdir(parents=True, exist_ok=True)
        calls_file = run / "calls.json"
        calls = json.loads(calls_file.read_text()) if calls_file.exists() else []
        same = parts.tree_digest() == about["tree"]
        os.environ["ENDPROMPT_COMMIT"] = str(about["commit"]) + (
            "" if same or str(about["commit"]).endswith("+changes") else "+changes"
        )
        calls.append(
            {
                "run": calls[0]["run"] if calls else uuid.uuid4().hex,
                "data": about["data"],
                "command": ["run", *(argv or sys.argv[1:])],
                "steps": [],
            }
        )
        parts.write_json(calls_file, calls)
        delivery = Delivery(run, arguments.out, calls)
        with runfolder.hold(run / ".gpu.lock"):
            try:
                whole(
                    Steps(
                        recipe_file, method.name, home / "runs", options, began + arguments.budget, delivery
                    ),
                    method,
                    rounds,
                )
            finally:
                parts.write_json(calls_file, calls)
                delivery.write(always=True)
    except BadInput as error:
        print(f"endprompt: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except SystemExit as error:
        code = error.code
    if code == STOPPED:
        print(
            f"run: the {arguments.budget:g} s are used up; the same command goes on with {arguments.method}"
            " while the machine is held",
            flush=True,
        )
    elif not code:
        print(
            f"run: {arguments.method} is done; {arguments.out / (arguments.method + '.tar.gz')}", flush=True
        )
    raise SystemExit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    main()
