"""What every result carries: commit, versions, device, time."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = (
    "endprompt",
    "torch",
    "transformers",
    "deepspeed",
    "accelerate",
    "tokenizers",
    "datasets",
    "pyarrow",
    "numpy",
    "lm_eval",
)


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _installed_commit() -> str | None:
    try:
        noted = json.loads(
            importlib.metadata.distribution("endprompt").read_text("direct_url.json") or "{}"
        )  # PEP 610
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    return noted.get("vcs_info", {}).get("commit_id")


def commit() -> str | None:
    """The repository's commit, with "+changes" if tracked files differ from it; outside a checkout what
    ENDPROMPT_COMMIT says, else what pip noted when it installed from a repository, else None.

    A package that was installed into a folder below another repository, as a virtual environment is, does not
    get that one's commit.
    """
    folder = Path(__file__).resolve().parent
    try:
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", Path(__file__).name],
            cwd=folder,
            capture_output=True,
            timeout=10,
            check=True,
        )
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("ENDPROMPT_COMMIT") or _installed_commit()
    return head + ("+changes" if changed.strip() else "")


def device() -> str:
    """The accelerator's name, or the processor's with the number of threads torch uses."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        name = next(
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    return f"CPU: {name}, {torch.get_num_threads()} thread(s)"


def stamp() -> dict:
    return {
        "commit": commit(),
        "versions": versions(),
        "device": device(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
