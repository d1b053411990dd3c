"""A folder cut into parts that fit into a call each, and put together again on another machine.  Standard
library alone: nothing is installed there yet.

A part is a folder with part.json and pieces of files; part.json names every file of the whole with size and
SHA-256, and the pieces of its own part.  What lies on the machine goes by the whole's identity (``kit``), so
that parts of two packs never mix.
"""

import hashlib
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath

from endprompt import BadInput

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("endprompt", "eval", "recipes", "ds_configs")
PART = "part.json"
BLOCK = 2**20
MIB = 2**20


def default_home() -> Path:
    return Path(os.environ.get("ENDPROMPT_GPU") or "/tmp/endprompt-gpu")


def sha256(path: Path, offset: int = 0, size: int | None = None) -> str:
    """Of the ``size`` bytes from ``offset`` on; None: to the end."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        left = path.stat().st_size - offset if size is None else size
        while left > 0 and (block := file.read(min(BLOCK, left))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def tree_digest(root: Path = ROOT) -> str:
    """SHA-256 over what runs: code and settings, by name and content."""
    digest = hashlib.sha256()
    names = (
        path.relative_to(root)
        for folder in SOURCES
        for path in (root / folder).rglob("*")
        if path.suffix in (".py", ".sh", ".yaml", ".json") and path.is_file()
    )
    for name in sorted(
        name
        for name in names
        if name.parts[:2] != ("endprompt", "eval") and not {"runs", "__pycache__"} & set(name.parts)
    ):
        digest.update(f"{name}\0{sha256(root / name)}\n".encode())
    return digest.hexdigest()


def write_json(path: Path, value) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1))
    part.replace(path)


def pack(stage: Path, out: Path, limit: int, about: dict, first: tuple[str, ...] = ()) -> list[dict]:
    """Writes ``out``/1, /2, ... of at most ``limit`` bytes each from all files under ``stage`` (those under
    the folders ``first`` before the others), and returns what their part.json hold.  Raises BadInput if
    ``stage`` is empty or ``limit`` leaves no room for a part's own list.
    """
    paths = sorted(
        (path for path in stage.rglob("*") if path.is_file()),
        key=lambda path: (path.relative_to(stage).parts[0] not in first, path.as_posix()),
    )
    files = [
        {"path": path.relative_to(stage).as_posix(), "size": path.stat().st_size, "sha256": sha256(path)}
        for path in paths
    ]
    room = limit - len(json.dumps([files, about], indent=1)) - 64 * 1024  # part.json and its pieces
    if not files or room < MIB:
        raise BadInput(
            f"pack: {stage} is empty"
            if not files
            else (
                f"pack: {limit} bytes a part leave no room; raise the limit, or make the working tree smaller"
            )
        )
    cut: list[list[dict]] = [[]]
    left = room
    for number, file in enumerate(files):
        at = 0
        while at < file["size"] or not file["size"] and at == 0:
            if not left:
                cut.append([])
                left = room
            size = min(left, file["size"] - at)
            cut[-1].append({"file": number, "offset": at, "size": size})
            at, left = at + max(size, 1), left - size
    kit = hashlib.sha256(json.dumps([files, about], sort_keys=True).encode()).hexdigest()
    made = []
    for index, pieces in enumerate(cut, 1):
        folder = out / str(index)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, piece in enumerate(pieces):
            piece |= {
                "name": f"{name:04d}",
                "sha256": sha256(paths[piece["file"]], piece["offset"], piece["size"]),
            }
            with paths[piece["file"]].open("rb") as source, (folder / piece["name"]).open("wb") as target:
                source.seek(piece["offset"])
                for _ in range(-(-piece["size"] // BLOCK)):
                    target.write(source.read(min(BLOCK, piece["size"] - target.tell())))
        made.append(
            {"kit": kit, "part": index, "parts": len(cut), "about": about, "files": files, "pieces": pieces}
        )
        write_json(folder / PART, made[-1])
    for old in out.iterdir():
        if old.name.isdigit() and int(old.name) > len(cut):
            shutil.rmtree(old)
    return made


def read_part(folder: Path) -> dict:
    """A part's list, with every piece's checksum verified.  Raises BadInput naming what is missing or
    damaged.
    """
    try:
        found = json.loads((folder / PART).read_text())
        inside = all(
            not PurePosixPath(file["path"]).is_absolute() and ".." not in PurePosixPath(file["path"]).parts
            for file in found["files"]
        )
        numbers = all(
            piece["name"].isdigit()
            and piece["offset"] >= 0
            and piece["offset"] + piece["size"] <= found["files"][piece["file"]]["size"]
            for piece in found["pieces"]
        )
        if (
            not inside
            or not numbers
            or not 1 <= found["part"] <= found["parts"]
            or not isinstance(found["about"], dict)
        ):
            raise ValueError
    except FileNotFoundError:
        raise BadInput(
            f"unpack: {folder} is no part (it has no {PART}); name a folder that pack made, and carry it with"
            " the call"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise BadInput(f"unpack: {folder / PART} is damaged; pack again") from None
    for piece in found["pieces"]:
        path = folder / piece["name"]
        if not path.is_file() or path.stat().st_size != piece["size"] or sha256(path) != piece["sha256"]:
            raise BadInput(
                f"unpack: {path} is {'damaged' if path.is_file() else 'missing'}; carry part {found['part']}"
                " again, or pack again"
            )
    return found


def unpack(folder: Path, home: Path) -> list[int]:
    """Puts a part's pieces into ``home``; with the last part, checks, installs and marks the whole as ready.
    Returns the parts that are still missing.

    Raises BadInput for a damaged part, one of another pack, or a whole that does not have its checksums.
    """
    found = read_part(folder)
    there = _there(home)
    if there and there["kit"] != found["kit"]:
        raise BadInput(
            f"unpack: {home} holds parts of another pack; remove it, or name another folder by ENDPROMPT_GPU"
        )
    home.mkdir(parents=True, exist_ok=True)
    if not there:
        write_json(home / "kit.json", {key: found[key] for key in ("kit", "parts", "about", "files")})
    mark = home / f"part-{found['part']}"
    if not mark.exists():
        for piece in found["pieces"]:
            target = home / "joining" / found["files"][piece["file"]]["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            with (
                target.open("r+b" if target.exists() else "w+b") as into,
                (folder / piece["name"]).open("rb") as source,
            ):
                into.seek(piece["offset"])
                shutil.copyfileobj(source, into, BLOCK)
        mark.touch()
    missing = [number for number in range(1, found["parts"] + 1) if not (home / f"part-{number}").exists()]
    if not missing and not (home / "ready").exists():
        _complete(home, found["files"], found["about"].get("gguf_file"))
    return missing


def _there(home: Path) -> dict | None:
    try:
        return json.loads((home / "kit.json").read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise BadInput(f"unpack: {home / 'kit.json'} is damaged; remove {home}") from None


def _run(command: list[str], what: str, **options) -> None:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise BadInput(f"unpack: {what}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def _complete(home: Path, files: list[dict], gguf_file: str | None) -> None:
    for file in files:
        path = home / "joining" / file["path"]
        if not path.is_file() or path.stat().st_size != file["size"] or sha256(path) != file["sha256"]:
            raise BadInput(
                f"unpack: {file['path']} does not have its checksum after joining; remove {home} and unpack"
                " all parts again"
            )
    whole = home / "files"
    shutil.rmtree(whole, ignore_errors=True)
    shutil.copytree(home / "joining", whole)
    for packed in whole.rglob("*.tar.xz"):
        with lzma.open(packed) as plain, tarfile.open(fileobj=plain, mode="r|") as archive:
            archive.extractall(packed.parent, filter="data")
        packed.unlink()
    wheels = sorted(map(str, (whole / "wheels").glob("*.whl")))
    if wheels:
        command = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--no-cache-dir",
            "--upgrade",
            "--target",
            str(home / "site"),
            *wheels,
        ]
        _run(command, "pip cannot install the wheels")
    if gguf_file:
        path = os.pathsep.join([str(home / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
        shutil.rmtree(whole / "converted", ignore_errors=True)
        _run(
            [
                sys.executable,
                str(Path(__file__).with_name("convert.py")),
                str(whole / "model"),
                gguf_file,
                str(whole / "prepared"),
                str(whole / "converted"),
            ],
            f"{gguf_file} cannot be converted",
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        )
        shutil.rmtree(whole / "model")
        (whole / "converted").rename(whole / "model")
    shutil.rmtree(home / "joining")
    (home / "ready").touch()


def about(home: Path) -> dict:
    """What was packed.  Raises BadInput unless all parts are there and put together."""
    there = _there(home)
    if there is None:
        raise BadInput(f"run: nothing was unpacked into {home}; unpack all parts first")
    if not (home / "ready").exists():
        missing = [
            str(number) for number in range(1, there["parts"] + 1) if not (home / f"part-{number}").exists()
        ]
        raise BadInput(
            f"run: of {there['parts']} parts {', '.join(missing)} are missing in {home}; unpack them first"
            if missing
            else f"run: {home} was not put together; unpack any part again"
        )
    return {"kit": there["kit"], **there["about"]}
