"""Gathers model, text, RULER samples, scorers and wheels, cuts them into parts, and prints the calls that
bring them to the machine and use them.

    bash recipes/gpu/gpu.sh pack TRAIN HELDOUT [--samples 50] ...

TRAIN and HELDOUT: files or folders of documents, as data.corpus takes them.  What is downloaded or made is
kept in the folder and used again.
"""

import argparse
import hashlib
import importlib.metadata
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import parts
from parts import ROOT

from endprompt import BadInput
from endprompt.bases import model
from endprompt.evaluation import ruler, ruler_package
from endprompt.methods import table as methods
from endprompt.recipe import schema as config
from endprompt.rows import corpus
from endprompt.runs import provenance

# What lm-eval 0.4.13 and a GGUF file need beyond benchmarks/gpu_wheels.sh and what such a machine has
# (importing and running it with these alone was tried).
WHEELS = ("lm-eval", "more-itertools", "gguf")
CALL_MIB = 60  # of the 64 that may travel in a call
METHODS = ("short", "endprompt", "pose_sharp", "full_length", "endprompt_pose")


def tree_files() -> list[Path]:
    """The tracked files of the checkout, and those that git does not ignore: what travels with every call."""
    listed = (
        subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        .stdout.decode()
        .split("\0")
    )
    return [path for name in listed if name and (path := ROOT / name).is_file() and not path.is_symlink()]


def copy_text(source: Path, target: Path) -> str:
    """Copies a corpus file or a folder of them; returns its name under ``target``.  Raises BadInput if there
    is none.
    """
    if not source.exists() or (source.is_file() and corpus.kind(source) is None):
        raise BadInput(
            f"pack: {source} is no file or folder of {', '.join(corpus.KINDS)} (plain, .gz or .zst)"
        )
    target.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target / source.name, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)
    return source.name


def copy_model(recipe, stage: Path) -> str | None:
    """Copies the recipe's model into ``stage``/model: its folder, or its GGUF file, with config and tokenizer
    as this machine reads them in ``stage``/prepared. Returns the GGUF file's name.  Raises BadInput if it is
    not on this machine.
    """
    where = model.locate(recipe)
    folder, gguf = Path(where["pretrained_model_name_or_path"]), where.get("gguf_file")
    if not folder.is_dir():
        raise BadInput(
            f"pack: the model {folder} is not on this machine; name a folder, or package:NAME of an installed"
            " package"
        )
    (stage / "model").mkdir(parents=True)
    for path in [folder / gguf] if gguf else sorted(path for path in folder.iterdir() if path.is_file()):
        shutil.copy(path, stage / "model")
    if gguf:
        from transformers import GenerationConfig

        config_there = model.load_config(recipe)
        for part in (
            config_there,
            GenerationConfig.from_model_config(config_there),
            model.load_tokenizer(recipe),
        ):
            part.save_pretrained(stage / "prepared")
    return gguf


def copy_scorers(target: Path) -> None:
    """Of NVIDIA's package what scoring needs: three files of its own, and what names its version."""
    found = ruler_package.package()
    for name in ruler_package.SCORING:
        (target / "long_context_eval" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(found / name, target / "long_context_eval" / name)
    (about,) = (
        file.locate() for file in importlib.metadata.files(ruler_package.PACKAGE) if file.name == "METADATA"
    )
    (target / Path(about).parent.name).mkdir(parents=True, exist_ok=True)
    shutil.copy(about, target / Path(about).parent.name)


def pack_samples(paths: list[Path], target: Path) -> None:
    """One archive, the samples of a task beside each other: they share most of their text, and 161 MiB become
    2.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 128 * parts.MIB}]
    with (
        lzma.open(target, "wb", filters=filters) as packed,
        tarfile.open(fileobj=packed, mode="w|") as archive,
    ):
        for path in sorted(paths):
            entry = archive.gettarinfo(path, path.name)
            entry.mtime = entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            with path.open("rb") as file:
                archive.addfile(entry, file)


def gather(arguments, stage: Path) -> dict:
    """Fills ``stage`` and returns what the machine is to know of it.  Raises BadInput where something is
    missing.
    """
    recipe = config.load(arguments.recipe, arguments.set)
    tasks = [task.removeprefix("ruler_") for task in recipe.eval.tasks if task.startswith("ruler_")]
    (stage / "recipe").mkdir()
    shutil.copy(arguments.recipe, stage / "recipe")
    about = {
        "recipe": Path(arguments.recipe).name,
        "set": arguments.set,
        "samples": arguments.samples,
        "commit": provenance.commit(),
        "tree": parts.tree_digest(),
        "train": copy_text(arguments.train, stage / "text"),
        "heldout": copy_text(arguments.heldout, stage / "text"),
        "gguf_file": copy_model(recipe, stage),
    }
    if about["train"] == about["heldout"]:
        raise BadInput(f"pack: both texts are named {about['train']}; rename one")
    if tasks:
        tokenizer = stage.parent / "tokenizer"
        model.load_tokenizer(recipe).save_pretrained(tokenizer)
        made = ruler.ensure(
            tasks,
            recipe.eval.lengths,
            tokenizer,
            arguments.samples,
            recipe.eval.seed,
            arguments.cache,
            chat=recipe.eval.chat_template,
        )
        pack_samples(list(made.values()), stage / "ruler" / "samples.tar.xz")
        copy_scorers(stage / "scorers")
    # Wheels are no part of it: some are built here, never twice to the same bytes, and results name their
    # versions.
    about["data"] = hashlib.sha256(
        "".join(
            f"{path.relative_to(stage)} {parts.sha256(path)}\n"
            for path in sorted(stage.rglob("*"))
            if path.is_file()
        ).encode()
    ).hexdigest()
    if not arguments.no_wheels:
        wheels = stage.parent / "wheels"
        if not any(wheels.glob("lm_eval-*.whl")):
            subprocess.run(
                ["bash", str(ROOT / "benchmarks/gpu_wheels.sh"), str(wheels), *WHEELS],
                check=True,
                stdout=sys.stderr,
                env={**os.environ, "PYTHON": sys.executable},
            )
        shutil.copytree(wheels, stage / "wheels")
    return about


def calls(folder: Path, count: int, chosen: tuple[str, ...] = METHODS) -> str:
    """The calls of the device machine, as text: the parts first, then a command a method."""
    shown = os.path.relpath(folder, ROOT)
    unpack = [
        f'carry ["{shown}/{number}"]  timeout 600  command: bash recipes/gpu/gpu.sh unpack {shown}/{number}'
        for number in range(1, count + 1)
    ]
    # Rows of the target length train four times as long (docs/gpu.md).
    run = [
        f"bash recipes/gpu/gpu.sh run {name} --out $OUT --budget"
        f" {540 if methods.METHODS[name].fills == 'target' else 400}"
        for name in chosen
    ]
    return "\n".join(
        [
            *unpack[:-1],
            f"{unpack[-1]} && {run[0]}",
            *(f"carry []  timeout 600  command: {command}" for command in run[1:]),
        ]
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gpu.sh pack", description=__doc__.partition("\n")[0])
    parser.add_argument("train", type=Path, metavar="TRAIN", help="text to train on")
    parser.add_argument("heldout", type=Path, metavar="HELDOUT", help="text for perplexity")
    parser.add_argument(
        "--recipe", default=str(ROOT / "recipes/smollm2-64k-gpu.yaml"), help="names model, tasks and lengths"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the recipe; the machine takes them too",
    )
    parser.add_argument(
        "--samples", type=int, default=50, help="RULER samples a task and length; a run may take fewer"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".gpu", help="where parts go (ignored by git)")
    parser.add_argument(
        "--part-mib",
        type=float,
        default=None,
        help=f"largest part; default: {CALL_MIB} less the working tree",
    )
    parser.add_argument("--cache", type=Path, default=None, help="of RULER samples; default: endprompt's own")
    parser.add_argument(
        "--no-wheels", action="store_true", help="the other machine has all packages, as in a rehearsal here"
    )
    arguments = parser.parse_args(argv)
    try:
        if arguments.samples < 1:
            raise BadInput(f"pack: --samples {arguments.samples}: at least one is needed")
        tree = sum(path.stat().st_size for path in tree_files())
        limit = int(
            (arguments.part_mib if arguments.part_mib is not None else CALL_MIB - tree / parts.MIB)
            * parts.MIB
        )
        stage = arguments.folder / "stage"
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        about = gather(arguments, stage)
        made = parts.pack(
            stage,
            arguments.folder,
            limit,
            about,
            first=("recipe", "prepared", "wheels", "scorers", "ruler", "text"),
        )
        shutil.rmtree(stage)
    except BadInput as error:
        print(f"endprompt: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for part in made:
        for piece in part["pieces"]:
            print(
                f"part {part['part']}  {piece['size']:>10}  {piece['sha256'][:16]} "
                f" {part['files'][piece['file']]['path']}"
            )
    for part in made:
        size = sum(piece["size"] for piece in part["pieces"])
        print(
            f"part {part['part']} of {part['parts']}: {size / parts.MIB:.1f} MiB, with the working tree"
            f" {(size + tree) / parts.MIB:.1f} MiB"
        )
    print(f"commit {about['commit']}\n\n{calls(arguments.folder, len(made))}")


if __name__ == "__main__":
    main()
