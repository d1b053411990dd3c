"""A preparation in parts: what each of them reads and is named, and how they are joined into one manifest."""

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from endprompt import BadInput, storage
from endprompt.recipe.schema import Recipe
from endprompt.rows import corpus, shards
from endprompt.rows.ledger import Ledger, are_records, changed

PROGRESS = "progress.json"
COUNTS = ("rows", "tokens", "text_tokens", "prompt_tokens", "documents")


def names(part: tuple[int, int] | None) -> tuple[str, str, str]:
    """(file of the state, of the finished part, pattern of a shard's name) of a part, or of the whole."""
    if part is None:
        return PROGRESS, shards.MANIFEST, "shard-{:05d}.parquet"
    tag = f"{part[0]:05d}-of-{part[1]:05d}"
    return f"progress-{tag}.json", f"part-{tag}.json", f"shard-{tag}-{{:05d}}.parquet"


def finished(path: Path) -> dict:
    """What a finished part says of itself.  Raises BadInput if it cannot be read, or is not what this module
    writes.
    """
    try:
        found = storage.read_json(path)
        if not (
            isinstance(found, dict)
            and shards.listed(found["shards"])
            and all(shards.whole(found[key], 0) for key in COUNTS)
            and are_records(found["corpus_files"])
        ):
            raise ValueError("it is not what this version of prepare writes")
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(
            f"shards: {path} cannot be read: {error}; delete the folder and prepare again"
        ) from None
    return found


def refuse_other_corpus(
    files: list[corpus.File] | None, records: list | None, where: str, *others: list
) -> None:
    """Raises BadInput beginning with ``where`` if the corpus is not what ``records``, and ``others`` of the
    same files, say was read.
    """
    if files is not None and records is not None:
        what = changed(files, records, *others)
    else:
        what = "" if files is None and records is None else "it was on the hub, or is now"
    if what:
        raise BadInput(
            f"shards: the corpus changed since {where} ({what}); restore it, or delete the folder and prepare"
            " again"
        )


def _here(recipe: Recipe) -> list[corpus.File] | None:
    """The corpus' files; none if it is not on this machine, as shards serve without it."""
    with contextlib.suppress(BadInput):
        return corpus.local_files(recipe)
    return None


def refuse_finished_of_other_corpus(recipe: Recipe, folder: Path, manifest: dict) -> None:
    files, records = _here(recipe), manifest.get("corpus_files")
    if files is None:
        return
    if are_records(records):
        refuse_other_corpus(files, records, f"{folder} was made")
    elif records != [
        [file.path.name, file.path.stat().st_size] for file in files
    ]:  # as earlier versions noted it
        raise BadInput(
            f"shards: the corpus changed since {folder} was made (names or sizes of its files); restore it,"
            " or delete the folder and prepare again"
        )


def share(wanted: int, part: tuple[int, int] | None) -> tuple[int, int]:
    """(first row's number, rows) of a part."""
    if part is None:
        return 0, wanted
    number, count = part
    if count > wanted:
        raise BadInput(
            f"--part {number}/{count}: data.tokens asks for {wanted} rows, which are not enough for {count}"
            " parts; make fewer"
        )
    whole, more = divmod(wanted, count)
    return whole * (number - 1) + min(number - 1, more), whole + (number <= more)


def documents(
    recipe: Recipe,
    files: list[corpus.File] | None,
    ledger: Ledger,
    part: tuple[int, int] | None,
    commit: str | None,
) -> Iterator[tuple[str, str]]:
    """A part reads every N-th file, or, where there are fewer files than parts, every N-th document.
    commit: as in ``corpus.documents``."""
    number, count = part or (1, 1)
    if files is not None and len(files) >= count:
        return ledger.follow(corpus.documents(recipe, files[number - 1 :: count], ledger))
    return ledger.follow(islice(corpus.documents(recipe, files, ledger, commit), number - 1, None, count))


def refuse_other_model(folder: Path, found: dict, model: str | None) -> None:
    """Raises BadInput if the text of what ``found`` says was chosen by another base than ``model``, a
    fingerprint; None where no base chooses.  What earlier versions made does not say."""
    models = {record["model"] for record in found.get("filtered", [])} | {found.get("chosen_by") or model}
    if model and models != {model}:
        raise BadInput(
            f"shards: another base than model.name_or_path chose the text of those in {folder}; delete the"
            " folder or choose another --out"
        )


def _refuse_several(folder: Path, parts: list[dict]) -> None:
    """Raises BadInput if the parts were read of several versions of a dataset of the hub, or several bases
    chose their text."""
    filters = [record["model"] for state in parts for record in state.get("filtered", [])]
    for values, what in (
        ([state.get("corpus_commit") for state in parts], "of several versions of the dataset on the hub"),
        ([state.get("chosen_by") for state in parts], "of text that several bases chose"),
        (filters, "of text that several bases chose"),
    ):
        if len(set(values)) > 1:
            raise BadInput(f"shards: the parts in {folder} are {what}; delete the folder and prepare again")


def _joined(recipe: Recipe, folder: Path, parts: list[list | None]) -> list | None:
    """What the parts read of the corpus, together.  Raises BadInput if they did not all read the same."""
    if parts[0] is None and not any(parts):
        return None
    told = f"shards: the corpus changed while the parts in {folder} were made"
    there = [records for records in parts if records is not None]
    if (
        len(there) < len(parts)
        or len({json.dumps([record[:2] for record in records]) for records in there}) > 1
    ):
        raise BadInput(f"{told} (names or sizes of its files); delete the folder and prepare again")
    for found in zip(*there, strict=True):
        if len({digest for _, _, _, digest in found}) > len({count for _, _, count, _ in found}):
            raise BadInput(
                f"{told} ({found[0][0]} held other text of the same length); delete the folder and prepare"
                " again"
            )
    if (files := _here(recipe)) is not None:
        refuse_other_corpus(files, there[0], f"the parts in {folder} were made", *there[1:])
    elif any(len({count for _, _, count, _ in found if count}) > 1 for found in zip(*there, strict=True)):
        print(
            "warning: the corpus is not here; that all parts read the same text was compared by names and"
            " sizes",
            file=sys.stderr,
        )
    return [max(found, key=lambda record: record[2]) for found in zip(*parts, strict=True)]


def join(recipe: Recipe, folder: Path, expected: dict) -> dict:
    """Writes the manifest of finished parts.  Raises BadInput if they are not all of one set, one is not
    finished, or a shard is damaged.
    """
    found = sorted(
        path.name
        for path in folder.iterdir()
        if re.fullmatch(r"(part|progress)-\d{5}-of-\d{5}\.json", path.name)
    )
    counts = sorted({int(name[-10:-5]) for name in found})
    if len(counts) > 1:
        raise BadInput(
            f"shards: {folder} holds parts of {' and of '.join(map(str, counts))}; delete the folder and"
            " prepare again with one number of parts"
        )
    done = [
        path
        for number in range(1, counts[0] + 1)
        if (path := folder / names((number, counts[0]))[1]).is_file()
    ]
    missing = [
        str(number)
        for number in range(1, counts[0] + 1)
        if not (folder / names((number, counts[0]))[1]).is_file()
    ]
    if missing:
        raise BadInput(
            f"shards: {folder} holds {len(done)} of {counts[0]} finished parts; run `endprompt prepare ..."
            f" --part I/{counts[0]}` for {', '.join(missing[:20])}, or delete the folder to prepare without"
            " parts"
        )
    parts = [finished(path) for path in done]
    for path, state in zip(done, parts, strict=True):
        if differing := shards.disagreements(state, expected):
            raise BadInput(
                f"shards: {path} is of another setting ({'; '.join(differing)}); delete the folder or choose"
                " another --out"
            )
    records = _joined(recipe, folder, [state["corpus_files"] for state in parts])
    _refuse_several(folder, parts)
    summed = {key: sum(state[key] for state in parts) for key in COUNTS}
    manifest = {
        **parts[0],
        **summed,
        "corpus_files": records,
        "parts": counts[0],
        "corpus_ended": any(state.get("corpus_ended") for state in parts),
        **filtered([one for state in parts for one in state.get("filtered", [])]),
        "shards": [shard for state in parts for shard in state["shards"]],
    }
    if not manifest["rows"]:
        raise BadInput(
            "data.corpus: no part holds as many tokens as one row; give more text or lower the length"
        )
    shards.verify(folder, manifest)
    storage.write_json(folder / shards.MANIFEST, manifest)
    for path in done:
        path.unlink()
    return manifest


def filtered(records: list[dict]) -> dict:
    """What a manifest says of the choice of documents, one record a part."""
    return {"filtered": records} if records else {}
