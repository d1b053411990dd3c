"""Checkpoints as files: which of them are whole, and which of their files may be unpickled.  No torch here:
``endprompt status`` is quick.
"""

import json
import os
import re
import shutil
import stat
from pathlib import Path

from endprompt import BadInput

MARKER = "complete.json"
# The names that DeepSpeed 0.19 and the HF Trainer give to the pickles they write.
PICKLES = re.compile(
    r"(global_step\d+(_universal)?/((bf16_|fp16_)?zero_pp_rank_\d+_)?mp_rank_\d+(_\d+)?_(model|optim)_states\.pt"
    r"|global_step\d+_universal/zero/[\w.]+/(fp32|exp_avg|exp_avg_sq|step)\.pt|global_step\d+_universal/zero/optimizer_state\.pt"
    r"|rng_state(_\d+)?\.pth|scheduler\.pt|optimizer\.pt)"
)
PICKLED = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


def inventory(folder: Path) -> dict[str, int]:
    """{path inside ``folder``: bytes} of every file but the marker."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MARKER
    }


def marker(folder: Path) -> dict | None:
    """What was written once ``folder`` was whole; None if it never was."""
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("files", {}), dict) else None


def fault(folder: Path) -> str | None:
    """Why the checkpoint cannot be resumed from, None if it can: no marker, or a file that is gone or of
    another size than was written.
    """
    found = marker(folder)
    if found is None:
        return "is half-written"
    for name, size in found.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            return f"is damaged ({name} is missing)"
        if path.stat().st_size != size:
            return f"is damaged ({name} has {path.stat().st_size} bytes, {size} were written)"
    return None


def refuse_other_shards(trained: Path, before: str | None, now: str) -> None:
    """Raises BadInput if ``trained``, a checkpoint or a model, is of other shards than those that are there
    ``now``.  before: the digest of its own, None where that was not noted."""
    if before not in (None, now):
        raise BadInput(
            f"shards: {trained} was trained on others than are there now; prepare those again, choose another"
            " --out, or delete the run's checkpoints/ and model/ to start anew"
        )


def by_step(folder: Path) -> list[Path]:
    """The checkpoint folders, highest step first."""
    steps = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    return [steps[step] for step in sorted(steps, reverse=True)]


def marked(folder: Path) -> list[Path]:
    """Those that were whole once, highest step first: what was trained stands in them, damaged or not."""
    return [path for path in by_step(folder) if marker(path) is not None]


def newest(folder: Path, log=None) -> Path | None:
    """The whole checkpoint of the highest step; names on ``log`` the ones that are passed over and why."""
    for path in by_step(folder):
        why = fault(path)
        if why is None:
            return path
        if log:
            print(f"resume: {path} {why} and passed over", file=log)
    return None


def to_resume(folder: Path, log=None) -> Path | None:
    """``newest``, None before the first.

    Raises BadInput if checkpoints were whole once and none is now: starting anew would throw the training
    away unasked.
    """
    found = newest(folder, log)
    damaged = [f"{path.name} {fault(path)}" for path in marked(folder) if found is None]
    if damaged:
        raise BadInput(
            f"checkpoints: {folder} holds none that is whole ({'; '.join(damaged)}); restore one from a copy,"
            " or delete the folder to start anew"
        )
    return found


def set_aside(folder: Path, resumed: Path | None) -> None:
    """Removes half-written checkpoints above the one that is ``resumed`` and renames damaged ones to
    damaged-<step>, so that they are neither mixed with what is written now nor counted among the ones to
    keep.
    """
    for path in by_step(folder):
        if path == resumed:
            return
        if marker(path) is None:
            shutil.rmtree(path)
        else:
            target = path.with_name(path.name.replace("checkpoint", "damaged"))
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)


def keep_newest(folder: Path, count: int | None) -> None:
    """Removes all but the ``count`` newest whole checkpoints (None: all stay).  Only once the newest is
    marked, so that a kill leaves one.
    """
    if count is None:
        return
    for path in marked(folder)[max(1, count) :]:
        (path / MARKER).unlink()  # a kill in the middle of removing must not leave what looks whole
        shutil.rmtree(path)


def refuse_foreign(folder: Path) -> None:
    """Raises BadInput unless every pickle in the checkpoint is one that a run of this user wrote: by its
    name, by the marker that lists it, by its owner, as a plain file that not everybody may write.
    """
    listed = (marker(folder) or {}).get("files")
    for path in sorted(folder.rglob("*")):
        if path.suffix not in PICKLED and not path.is_symlink():
            continue
        name, about = str(path.relative_to(folder)), path.lstat()
        if not stat.S_ISREG(about.st_mode):
            why = "is no plain file"
        elif about.st_uid != os.geteuid():
            why = f"belongs to user {about.st_uid}, not to the one who runs this ({os.geteuid()})"
        elif about.st_mode & stat.S_IWOTH:
            why = "may be written by everybody"
        elif not PICKLES.fullmatch(name) or (
            listed is not None and name not in listed and "_universal/" not in name
        ):  # those were made after the marker
            why = "is no file that the run itself wrote"
        else:
            continue
        raise BadInput(
            f"checkpoints: {path} {why}; it would be unpickled, so resume only from checkpoints of your own"
            " run, or delete this one"
        )
