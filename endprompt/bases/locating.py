"""Where a base model is: a folder, an installed package or a hub id."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from endprompt import BadInput, storage
from endprompt.bases.unreadable import CONVERT

WEIGHTS = (".safetensors", ".gguf", ".bin")


class Named(Protocol):
    """What names a base: a recipe's ``model`` section, its ``lengths.target``, and where its paths lead."""

    model: Any
    lengths: Any

    def path(self, value: str) -> Path | None: ...


def _which(files: Iterable[Path]) -> str:
    """What to set instead of a file that is not there; files: the GGUF files that are."""
    found = sorted({path.name for path in files})
    if not found:
        return "name a folder or hub id with config.json"
    return f"set model.gguf_file (init: --gguf) to one it has: {', '.join(found)}"


def locate(recipe: Named) -> dict:
    """The arguments that find the model for ``from_pretrained``: a local folder, ``package:NAME`` (an
    installed Python package), or a hub id.

    Raises BadInput if there is nothing of that name, or in a folder what ``check_folder`` refuses.
    """
    name = recipe.model.name_or_path
    if name.startswith("package:"):
        package = name.removeprefix("package:")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise BadInput(
                f"model.name_or_path: the Python package {package!r} is not installed; pip install"
                f" {package.replace('_', '-')}, or name a folder or hub id"
            )
        if recipe.model.gguf_file and Path(recipe.model.gguf_file).name != recipe.model.gguf_file:
            raise BadInput(
                f"model.gguf_file: {recipe.model.gguf_file!r} is a path; with package:{package} give the"
                " file's name alone"
            )
        # A data file may sit anywhere in the package: take the folder that holds the one asked for.
        root = Path(next(iter(spec.submodule_search_locations)))
        found = next(iter(sorted(root.rglob(recipe.model.gguf_file or "config.json"))), None)
        if found is None:
            raise BadInput(
                f"model: the package {package!r} has no file {recipe.model.gguf_file or 'config.json'};"
                f" {_which(root.rglob('*.gguf'))}"
            )
        path = str(found.parent)
    else:
        local = recipe.path(name)
        path = str(local) if local else name
        if local is None and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
            raise BadInput(
                f"model.name_or_path: there is no folder {name}; give a folder with config.json,"
                " package:NAME, or a hub id"
            )
        if local is not None and not local.is_dir():
            raise BadInput(
                f"model.name_or_path: {local} is no folder; name the folder with config.json that it is in"
            )
        if local is not None and recipe.model.gguf_file and not (local / recipe.model.gguf_file).is_file():
            raise BadInput(
                f"model.gguf_file: {local} has no file {recipe.model.gguf_file};"
                f" {_which(local.glob('*.gguf'))}"
            )
    if os.path.isdir(path):
        check_folder(Path(path), "model.name_or_path", bool(recipe.model.gguf_file))
    extra = {"revision": recipe.model.revision, "gguf_file": recipe.model.gguf_file}
    return {
        "pretrained_model_name_or_path": path,
        "trust_remote_code": recipe.model.trust_remote_code,
        **{key: value for key, value in extra.items() if value},
    }


def check_folder(folder: Path, key: str, gguf: bool = False) -> None:
    """Raises BadInput beginning with ``key`` if the model in ``folder`` is an adapter, has its weights in
    pickles alone, or holds what is no file.

    A pickle is a program that runs when it is read; a pipe is waited for without end.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".safetensors", ".gguf") and not path.is_file():
            raise BadInput(
                f"{key}: {path} is no regular file (or a link to nothing); put the file there, or remove it"
            )
    if gguf:
        return
    if (folder / "adapter_config.json").exists():
        raise BadInput(
            f"{key}: {folder} is an adapter, not a whole model; merge it into its base once (peft:"
            " merge_and_unload), save that, and name its folder"
        )
    pickles = sorted(
        path.name for pattern in ("pytorch_model*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)
    )
    if pickles and not any(folder.glob("*.safetensors")):
        raise BadInput(
            f"{key}: {folder} has its weights in {pickles[0]} alone; weights must be safetensors, which"
            f" cannot run code: {CONVERT}"
        )


def fingerprint(folder: Path, gguf_file: str | None = None) -> str:
    """Identity of a saved model: SHA-256 over the names and the whole content of its config, its code, its
    weights and their index.

    gguf_file: the one file of weights that is used, where a folder holds several quantizations.
    """

    def counts(path: Path) -> bool:
        if path.suffix in WEIGHTS:
            return gguf_file in (None, path.name)
        return path.name == "config.json" or path.suffix == ".py" or path.name.endswith(".index.json")

    paths = sorted(path for path in folder.iterdir() if path.is_file() and counts(path))
    with ThreadPoolExecutor(8) as pool:  # hashing lets go of Python's lock
        hashes = pool.map(storage.sha256, paths)
        found = [(path.name, digest) for path, digest in zip(paths, hashes, strict=True)]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def commit(name: str, revision: str | None = None) -> str | None:
    """The hub's commit of the id ``name`` that was fetched last, by the folder that the hub's client keeps it
    in; None if nothing was.  transformers 5.23 no longer notes it in the config.
    """
    from transformers.utils import cached_file

    try:
        found = cached_file(name, "config.json", revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    folder = Path(found).parent if found else Path()
    return folder.name if folder.parent.name == "snapshots" else None
