"""Which files of a folder belong to a split, as ``datasets.load_dataset(folder)`` decides it."""

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from endprompt import BadInput

# Suffixes of files that hold data.  What is named otherwise (a script train.py, say) does not decide what
# splits there are.
DATA = {".jsonl", ".json", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".txt", ".xml", ".zip", ".tar"}


def _looks_like_data(name: str) -> bool:
    return any(f".{suffix.lower()}" in DATA for suffix in name.rpartition("/")[2].split(".")[1:])


def _asked_for(name: str, pattern: str) -> bool:
    from datasets import data_files

    return not (
        data_files._is_inside_unrequested_special_dir(name, pattern)
        or data_files._is_unrequested_hidden_file_or_is_inside_unrequested_hidden_dir(name, pattern)
    )


def _matching(names: list[str]) -> Callable[[str], list[str]]:
    """``datasets.data_files.resolve_pattern`` over ``names``, without walking through the folder for every
    pattern.
    """
    from datasets import data_files
    from fsspec.utils import glob_translate

    def resolve(pattern: str) -> list[str]:
        wanted, ignored = (
            re.compile(glob_translate(pattern)),
            set(data_files.FILES_TO_IGNORE) - {pattern.rpartition("/")[2]},
        )
        found = [
            name
            for name in names
            if wanted.match(name) and name.rpartition("/")[2] not in ignored and _asked_for(name, pattern)
        ]
        if not found:
            raise FileNotFoundError(pattern)
        return found

    return resolve


def _described(folder: Path) -> dict:
    """What the header of ``folder``/README.md says of the set that is loaded by default; empty if it says
    nothing.
    """
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    path = folder / "README.md"
    if not path.is_file():
        return {}
    try:
        configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(path).data)
        default = configs.get_default_config_name() if configs else None
    except Exception as error:  # YAML's errors and huggingface_hub's
        print(
            f"warning: the header of {path} cannot be read ({type(error).__name__}) and is passed over",
            file=sys.stderr,
        )
        return {}
    if configs and default is None and len(configs) > 1:
        raise BadInput(
            f"data.corpus: {path} describes several sets ({', '.join(map(str, configs))}); name the files or"
            " the folder of one"
        )
    return configs[default if default in configs else next(iter(configs))] if configs else {}


def splits(folder: Path, names: list[str]) -> dict[str, set[str]]:
    """{split: its files} of ``names``, paths of files below ``folder`` with slashes; a file may be of none,
    or of several.

    Raises BadInput where the folder's README.md names files that are not there, or several sets.
    """
    from datasets import data_files

    config = _described(folder)
    below = f"{str(config['data_dir']).removeprefix('./').strip('/')}/" if config.get("data_dir") else ""
    resolve = _matching(
        [name[len(below) :] for name in names if name.startswith(below) and _looks_like_data(name)]
    )
    given = config.get("data_files")
    try:
        patterns = (
            data_files.sanitize_patterns(given) if given else data_files._get_data_files_patterns(resolve)
        )
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise BadInput(
            f"data.corpus: {folder}: {str(error).splitlines()[0]}; name the files themselves in data.corpus"
        ) from None
    found: dict[str, set[str]] = {}
    for split, listed in patterns.items():
        split = str(split)  # of a class of datasets
        found[split] = set()
        for pattern in listed:
            try:
                found[split] |= {below + name for name in resolve(pattern.removeprefix("./"))}
            except FileNotFoundError:
                if not data_files.contains_wildcards(pattern):
                    raise BadInput(
                        f"data.corpus: {folder / 'README.md'} names {below + pattern}, which is not there; "
                        "put it there, or name files in data.corpus"
                    ) from None
    return found


def choose(
    folder: Path, names: list[str], readable: Callable[[str], bool], wanted: tuple[str, ...], key: str
) -> tuple[list[str], str]:
    """(files of the first split of ``wanted`` that there is, what else could have been read and why it was
    not; "" if nothing).

    A split is named as in ``datasets``: also "all", and several joined by "+".
    Raises BadInput beginning with ``key`` if no split of ``wanted`` is there.
    """
    from datasets import data_files

    there = splits(folder, names)
    parts = next(
        (
            parts
            for split in wanted
            if (parts := set(there if split == "all" else split.split("+"))) <= there.keys() and parts
        ),
        None,
    )
    if parts is None and there:
        held = ", ".join(f"{split} ({len(files)} files)" for split, files in there.items())
        raise BadInput(
            f"{key}: the folder {folder} has no files of the split {wanted[0]!r}; as datasets.load_dataset"
            f" reads names, its files are of {held}; set data.split to one that is there, or name the files"
            " themselves"
        )
    of_split = set().union(*(there[split] for split in parts or ()))
    chosen = [name for name in names if name in of_split and readable(name)]
    reasons: dict[str, list[str]] = {}
    taken = set(chosen)
    for name in names:
        if name in taken or not (readable(name) or name in of_split or _looks_like_data(name)):
            continue
        others = [split for split, files in there.items() if name in files]
        if not _asked_for(name, "**"):
            reason = "hidden, or in a folder named .* or __*"
        elif not readable(name):
            reason = "of no known kind"
        elif name.rpartition("/")[2] in data_files.FILES_TO_IGNORE:
            reason = "about the data"
        else:
            reason = f"of the split {' and '.join(others)}" if others else "of no split"
        reasons.setdefault(reason, []).append(name)
    counted = Counter({reason: len(left) for reason, left in reasons.items()})
    told = "; ".join(
        f"{count} {reason} ({reasons[reason][0]}{', ...' if count > 1 else ''})"
        for reason, count in counted.most_common()
    )
    if not chosen and of_split:
        raise BadInput(
            f"{key}: the folder {folder} has of the split {'+'.join(sorted(parts or ()))} only files of no"
            f" known kind ({min(of_split)}); use .jsonl, .json, .parquet or"
            f" .txt{f'; besides, there are {told}' if told else ''}"
        )
    return chosen, told
