"""Here: unpacks what the machine returned into OUT/<device>/<method>, where the comparison and a page with
the heatmaps are made of it.

    # without a file: makes table and pictures again
    bash recipes/gpu/gpu.sh collect FILE.tar.gz ... [--out docs/results/smollm2-gpu]

Refuses results of another device, commit, data or setting than those beside them, and what is no such
archive.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import parts
import yaml

from endprompt import BadInput
from endprompt.methods import table as methods
from endprompt.reports import compare, recipe_page

NAMES = re.compile(
    r"recipe\.yaml|train\.json|status\.json|calls\.json|[a-z]+\.log|eval/\w+/(\d+|any)\.jsonl?"
)
LARGEST = 64 * parts.MIB
CALLS = "calls.json"


def unpack(file: Path, into: Path) -> Path:
    """``into``/<method> with the files of an archive.  Raises BadInput if it is none, or holds what no run
    delivers.
    """
    name = file.name.removesuffix(".tar.gz")
    if name not in methods.METHODS or name == file.name:
        raise BadInput(
            f"collect: {file} is not named METHOD.tar.gz after a row of the method table; name files that"
            " `gpu.sh run` returned"
        )
    folder, size = into / name, 0
    try:
        with tarfile.open(file, "r:gz") as archive:
            for entry in archive:
                size += entry.size
                if not entry.isfile() or not NAMES.fullmatch(entry.name) or size > LARGEST:
                    raise BadInput(
                        f"collect: {file} holds {entry.name!r}, which no run delivers"
                        if size <= LARGEST
                        else f"collect: {file} holds over {LARGEST} bytes"
                    )
                path = folder / entry.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.extractfile(entry).read())
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        raise BadInput(f"collect: {file} cannot be unpacked: {str(error).splitlines()[0]}") from None
    return folder


def _json(path: Path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"collect: {path} cannot be read: {str(error).splitlines()[0]}") from None


def identity(folder: Path) -> dict[str, str]:
    """{"device", "commit", "torch", "transformers", "data", "setting"}: what results that stand in one table
    agree in.  Raises BadInput if one run's own differ.
    """
    stamps = [_json(path) for path in [*sorted(folder.glob("eval/*/*.json")), *folder.glob("train.json")]]
    if not stamps:
        raise BadInput(f"collect: {folder.name}: holds no result; run it longer, or leave it out")
    calls = _json(folder / CALLS)
    try:
        found = {
            "device": {str(stamp["device"]) for stamp in stamps},
            "commit": {str(stamp["commit"]) for stamp in stamps},
            "data": {call["data"] for call in calls},
            **{
                name: {str(stamp["versions"][name]) for stamp in stamps} for name in ("torch", "transformers")
            },
        }
        recipe = (
            yaml.safe_load((folder / "recipe.yaml").read_text())
            if (folder / "recipe.yaml").exists()
            else None
        )
        if recipe is not None:
            recipe["train"] = {key: value for key, value in recipe["train"].items() if key != "deepspeed"}
            recipe["eval"] = {
                key: value for key, value in recipe["eval"].items() if key != "samples"
            }  # a round's
    except (KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError):
        raise BadInput(
            f"collect: {folder.name}: results, recipe.yaml or {CALLS} lack what a run writes; collect the"
            " file again"
        ) from None
    if mixed := [name for name, values in found.items() if len(values) != 1]:
        raise BadInput(
            f"collect: {folder.name}: its own results differ in {mixed[0]}"
            f" ({', '.join(sorted(found[mixed[0]]))}); they do not belong together"
        )
    setting = (
        {}
        if recipe is None
        else {
            "setting": json.dumps(
                {
                    key: recipe.get(key)
                    for key in ("recipe", "model", "lengths", "data", "rope", "train", "eval")
                },
                sort_keys=True,
            )
        }
    )
    return {name: next(iter(values)) for name, values in found.items()} | setting


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")[:60]


def collect(files: list[Path], out: Path) -> list[Path]:
    """Returns the folders of devices that got something.  Raises BadInput, before anything is written, for
    what does not belong together.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folders = []
        for number, file in enumerate(files):
            folders.append(unpack(file, Path(temporary) / str(number)))
        if len({folder.name for folder in folders}) < len(folders):
            raise BadInput("collect: a method is named twice; name its last file")
        new = {folder.name: (folder, identity(folder)) for folder in folders}
        if len({about["device"] for _, about in new.values()}) > 1:
            raise BadInput(
                "collect: the files are of several devices"
                f" ({', '.join(sorted({about['device'] for _, about in new.values()}))}); collect each apart"
            )
        if not new:
            return sorted({path.parents[1] for path in out.glob(f"*/*/{CALLS}")})
        place = out / slug(next(iter(new.values()))[1]["device"])
        there = {
            path.parent.name: (path.parent, identity(path.parent))
            for path in sorted(place.glob(f"*/{CALLS}"))
        }
        for name in new.keys() & there.keys():
            if _json(new[name][0] / CALLS)[0]["run"] != _json(there[name][0] / CALLS)[0]["run"]:
                raise BadInput(
                    f"collect: {there[name][0]} holds another run of {name}, with other weights; remove it"
                    " first, or leave this one out"
                )
        every = {**there, **new}
        first, about = next(iter(every.items()))
        for name, (_, other) in every.items():
            if differing := [key for key in about[1].keys() & other.keys() if about[1][key] != other[key]]:
                raise BadInput(
                    f"collect: {first} and {name} differ in {', '.join(sorted(differing))}; one table needs"
                    " one device, commit and setting"
                )
        for name, (folder, _) in new.items():
            shutil.rmtree(place / name, ignore_errors=True)
            shutil.copytree(folder, place / name)
        return [place]


def page(place: Path) -> None:
    """The comparison, the heatmaps and the page of all tasks, beside the results.  Raises BadInput while
    nothing was evaluated.
    """
    compare.compare([place], title=place.name)
    found = recipe_page.Page(place.name, place.parent, {})
    found.draw(place)
    (place / "README.md").write_text(found.markdown())
    (place / "results.csv").write_text(found.as_csv())
    print(place / "README.md")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gpu.sh collect", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "files",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="METHOD.tar.gz, as `gpu.sh run` left them in its --out",
    )
    parser.add_argument("--out", type=Path, default=parts.ROOT / "docs/results/smollm2-gpu", metavar="DIR")
    arguments = parser.parse_args(argv)
    try:
        places = collect(arguments.files, arguments.out)
        if not places:
            raise BadInput(
                f"collect: {arguments.out} holds nothing yet; name files that `gpu.sh run` returned"
            )
        for place in places:
            page(
                Path(os.path.relpath(place))
            )  # pages name their folders, and a machine's own paths are nobody else's
    except BadInput as error:
        print(f"endprompt: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
