"""A run's folder while something works in it: who holds it, how far it has come, and the wish that it
stop.
"""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from endprompt import BadInput, storage
from endprompt.rows import shards
from endprompt.runs import checkpoint_files

STATUS, STOP = "status.json", "stop"
TRAIN_LOCK = ".train.lock"


def prepare_lock(part: tuple[int, int] | None = None) -> str:
    return f".prepare-{part[0]:05d}-of-{part[1]:05d}.lock" if part else ".prepare.lock"


def _holder() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return (
        f"{socket.gethostname()} pid {os.getpid()}{f' Slurm job {job}' if job else ''} since"
        f" {datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')}"
    )


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Keeps every other process out of what the lock file ``path`` stands for; the kernel lets go when this
    process ends, however it ends.

    A POSIX record lock: NFS knows it, and processes forked from this one do not inherit it.
    Raises BadInput naming the holder if another process has it.
    """
    made = [folder for folder in path.parents if not folder.exists()]  # innermost first
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # its holder before took the empty folder away with it
            continue
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise BadInput(
                f"{path.parent} is in use by {holder} ({path.name}); wait until it has ended, or choose"
                " another --out"
            ) from None
        except OSError as error:
            print(
                f"warning: {path}: this file system has no locks ({error.strerror}); nothing keeps two runs"
                " out of one folder",
                file=sys.stderr,
            )
        # Whoever held it before may have removed the file between our opening and our locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                break
        file.close()
    try:
        file.truncate(0)
        file.write(_holder() + "\n")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        with contextlib.suppress(OSError):  # not empty: something was done here
            for folder in made:
                folder.rmdir()


def holder(path: Path) -> str | None:
    """Who holds the lock file ``path``, without disturbing it; None if nobody does."""
    try:
        with path.open(encoding="utf-8") as file:
            # struct flock of 64-bit Linux: type, whence, start, length, pid
            found = fcntl.fcntl(
                file, fcntl.F_GETLK, struct.pack("hhqqixxxx", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            )
            return (
                None
                if struct.unpack("hhqqixxxx", found)[0] == fcntl.F_UNLCK
                else file.read().strip() or "another process"
            )
    except OSError:
        return None


def write_status(run: Path, **values) -> None:
    """Puts ``values`` over what ``run``/status.json says, and the time."""
    storage.write_json(run / STATUS, {**read_status(run), **values, "updated": time.time()})


def read_status(run: Path) -> dict:
    """What the last command said of ``run``; empty if nothing, or nothing legible."""
    try:
        found = json.loads((run / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _ago(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


COPIED = (  # of what status.json says
    "reason",
    "step",
    "max_steps",
    "loss",
    "text_loss",
    "end_prompt_loss",
    "tokens_per_second",
    "peak_memory_gib",
    "world_size",
)


def summary(run: Path) -> dict:
    """What ``endprompt status`` prints of a run's folder, as a dictionary.  Raises BadInput if ``run`` is no
    run's folder.
    """
    if not (run / "recipe.yaml").is_file() and not any(
        (run / name).exists() for name in ("shards", "checkpoints", "model", STATUS)
    ):
        raise BadInput(
            f"status: {run} is no run's folder; name one that `endprompt prepare` or `train` wrote,"
            " OUT/<recipe>/<method>"
        )
    found: dict = {"run": str(run), **_prepared(run)}
    whole = checkpoint_files.newest(run / "checkpoints")
    found["checkpoint"] = whole.name if whole else None
    status = read_status(run)
    working = {
        path.name.strip(".").removesuffix(".lock"): who
        for path in sorted(run.glob(".*.lock"))
        if (who := holder(path))
    }
    if working:
        found["held"] = [f"{name} on {who}" for name, who in working.items()]
    found["state"] = _state(run, status.get("state"), working, "shards" in found)
    found |= {key: status[key] for key in COPIED if status.get(key) is not None}
    if "updated" in status:
        found["updated"] = f"{_ago(max(0.0, time.time() - status['updated']))} ago"
    if found["state"] == "training" and (seconds := _seconds_left(status)) is not None:
        found["eta"] = _ago(seconds)
    return found


def _prepared(run: Path) -> dict:
    """{"shards": ...} of rows that are whole, {"preparing": [...]} of those that are being made."""
    with contextlib.suppress(BadInput):
        manifest = shards.read_manifest(run / "shards")
        return {"shards": f"{manifest['rows']} rows, {manifest['tokens']} tokens"}
    found: dict = {}
    for path in sorted([*(run / "shards").glob("part-*.json"), *(run / "shards").glob("progress*.json")]):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(path.read_text(encoding="utf-8"))
            found.setdefault("preparing", []).append(
                f"{path.stem}: {sum(shard['rows'] for shard in state['shards'])} rows"
            )
    return found


def _state(run: Path, said: str | None, working: dict[str, str], prepared: bool) -> str | None:
    """said: the state in status.json; working: who holds which lock."""
    if (run / "model").is_dir():
        return "finished"
    if said in ("starting", "training") and "train" not in working:
        return "ended without a word (killed, or its node lost); the same command goes on from the checkpoint"
    if said is None:
        return "preparing" if working else "prepared, not trained" if prepared else "not prepared"
    return said


def _seconds_left(status: dict) -> float | None:
    left = status.get("max_steps", 0) - status.get("step", 0)
    speed, each = status.get("tokens_per_second"), status.get("tokens_per_step")
    return left * each / speed if speed and each else None


def describe(found: dict) -> str:
    width = max(map(len, found))
    return "\n".join(
        f"{key:{width}}  {'; '.join(value) if isinstance(value, list) else '-' if value is None else value}"
        for key, value in found.items()
    )
