"""Rows -> Parquet shards and a manifest.

Every shard remembers where in the corpus the next one begins, so a killed run goes on from its last whole
shard to the same bytes. Parts of the corpus can be prepared at the same time, each by a process of its own,
and are joined into one manifest.
"""

import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from endprompt import BadInput, corpus, model, shards
from endprompt.config import Recipe
from endprompt.methods import Method
from endprompt.row_stream import Cursor, end_prompts, row_maker, rows_at_once
from endprompt.tokenizing import tokenized, tokenizer_fingerprint

PROGRESS = "progress.json"
SHARD_TOKENS = 2**22  # held in memory while they are made: some 200 MB
COUNTS = ("rows", "tokens", "text_tokens", "prompt_tokens", "documents")


def settings(recipe: Recipe, method: Method, tokenizer) -> dict:
    """What shards depend on; ``train`` expects the manifest to say the same."""
    prompts = end_prompts(recipe, tokenizer) if method.end_prompt else []
    return {
        "schema_version": shards.SCHEMA_VERSION,
        "method": method.name,
        "physical_length": recipe.lengths.physical,
        "target_length": recipe.lengths.target,
        "row_length": recipe.row_length(method),
        "packing": recipe.data.packing,
        "corpus": recipe.data.corpus,
        "text_column": recipe.data.text_column,
        "split": recipe.data.split,
        "tokens_requested": recipe.data.tokens,
        "seed": recipe.data.seed,
        "rows_per_shard": recipe.data.rows_per_shard,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "end_prompts": [
            {"name": prompt.name, "text": prompt.text, "ids": prompt.ids.tolist()} for prompt in prompts
        ],
        "prompt_loss_weight": recipe.data.prompt_loss_weight if prompts else None,
        **(
            {"pose_chunks": recipe.data.pose_chunks, "pose_text": recipe.data.pose_text}
            if method.chunked and not method.matched
            else {}
        ),
        **(
            {key: getattr(recipe.data, key) for key in ("match_pieces", "match_tokens")}
            if method.matched
            else {}
        ),
        **(
            {key: getattr(recipe.data, key) for key in ("recall_share", "recall_cue", "recall_tokens")}
            if method.recall
            else {}
        ),
    }


def _names(part: tuple[int, int] | None) -> tuple[str, str, str]:
    """(file of the state, of the finished part, pattern of a shard's name) of a part, or of the whole."""
    if part is None:
        return PROGRESS, shards.MANIFEST, "shard-{:05d}.parquet"
    tag = f"{part[0]:05d}-of-{part[1]:05d}"
    return f"progress-{tag}.json", f"part-{tag}.json", f"shard-{tag}-{{:05d}}.parquet"


def _resume(folder: Path, expected: dict, part: tuple[int, int] | None) -> dict:
    """The state after the last whole shard; what a killed run left half-written is removed."""
    fresh = {
        "settings": expected,
        "shards": [],
        "document": 0,
        "offset": 0,
        "text_tokens": 0,
        "prompt_tokens": 0,
        "corpus_files": None,
    }
    progress, finished, shard = _names(part)
    path, mine = folder / progress, shard.replace("{:05d}", "?????")
    try:
        state = shards.read_json(path)
        differing = shards.disagreements(state["settings"], expected)
        if not shards.listed(state["shards"]) or not all(
            shards.whole(state[key], 0) for key in ("document", "offset", "text_tokens", "prompt_tokens")
        ):
            raise ValueError
        if "corpus_files" not in state:
            raise BadInput(
                f"shards: {path} is of an earlier version, which did not note what the corpus was; delete the"
                " folder and prepare again"
            )
        if not corpus.are_records(state["corpus_files"]):
            raise ValueError
    except FileNotFoundError:
        state, differing = fresh, []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"shards: {path} cannot be read; delete the folder and prepare again") from None
    if differing:
        raise BadInput(
            f"shards: {folder} holds a started preparation of another setting ({'; '.join(differing)});"
            " delete the folder or choose another --out"
        )
    kept = {shard["file"] for shard in state["shards"]}
    # Only its own: other parts may be at work beside it.
    for pattern in (mine, progress, finished):
        for file in folder.glob(f".{pattern}.*.part"):
            file.unlink()
    for file in folder.glob(mine):
        if file.name not in kept:
            file.unlink()
    for shard in state["shards"]:
        if not (folder / shard["file"]).is_file() or shards.sha256(folder / shard["file"]) != shard["sha256"]:
            raise BadInput(
                f"shards: {folder / shard['file']} of a started preparation is damaged or missing; delete the"
                " folder and prepare again"
            )
    return state


def _finished(path: Path) -> dict:
    """What a finished part says of itself.  Raises BadInput if it cannot be read, or is not what this module
    writes.
    """
    try:
        found = shards.read_json(path)
        if not (
            isinstance(found, dict)
            and shards.listed(found["shards"])
            and all(shards.whole(found[key], 0) for key in COUNTS)
            and corpus.are_records(found["corpus_files"])
        ):
            raise ValueError("it is not what this version of prepare writes")
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(
            f"shards: {path} cannot be read: {error}; delete the folder and prepare again"
        ) from None
    return found


def _refuse_other_corpus(
    files: list[corpus.File] | None, records: list | None, where: str, *others: list
) -> None:
    """Raises BadInput beginning with ``where`` if the corpus is not what ``records``, and ``others`` of the
    same files, say was read.
    """
    if (files is None) != (records is None) or (
        records is not None and (fault := corpus.changed(files, records, *others))
    ):
        what = fault if files is not None and records is not None else "it was on the hub, or is now"
        raise BadInput(
            f"shards: the corpus changed since {where} ({what}); restore it, or delete the folder and prepare"
            " again"
        )


def _here(recipe: Recipe) -> list[corpus.File] | None:
    """The corpus' files; none if it is not on this machine, as shards serve without it."""
    with contextlib.suppress(BadInput):
        return corpus.local_files(recipe)
    return None


def _refuse_finished_of_other_corpus(recipe: Recipe, folder: Path, manifest: dict) -> None:
    files, records = _here(recipe), manifest.get("corpus_files")
    if files is None:
        return
    if corpus.are_records(records):
        _refuse_other_corpus(files, records, f"{folder} was made")
    elif records != [
        [file.path.name, file.path.stat().st_size] for file in files
    ]:  # as earlier versions noted it
        raise BadInput(
            f"shards: the corpus changed since {folder} was made (names or sizes of its files); restore it,"
            " or delete the folder and prepare again"
        )


def _share(wanted: int, part: tuple[int, int] | None) -> tuple[int, int]:
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


def _documents(
    recipe: Recipe, files: list[corpus.File] | None, ledger: corpus.Ledger, part: tuple[int, int] | None
) -> Iterator[tuple[str, str]]:
    """A part reads every N-th file, or, where there are fewer files than parts, every N-th document."""
    number, count = part or (1, 1)
    if files is not None and len(files) >= count:
        return ledger.follow(corpus.documents(recipe, files[number - 1 :: count], ledger))
    return ledger.follow(islice(corpus.documents(recipe, files, ledger), number - 1, None, count))


def _embedded(
    stream: Iterator[tuple[str, np.ndarray]], tokenizer, embeddings: int
) -> Iterator[tuple[str, np.ndarray]]:
    """``stream``.  Raises BadInput where a document holds a token that the model has no embedding for."""
    with contextlib.closing(stream):
        for name, ids in stream:
            model.check_ids(ids, tokenizer, embeddings, f"data.corpus: the document {name}")
            yield name, ids


def _joined(recipe: Recipe, folder: Path, parts: list[list | None]) -> list | None:
    """What the parts read of the corpus, together.  Raises BadInput if they did not all read the same."""
    if parts[0] is None and not any(parts):
        return None
    told = f"shards: the corpus changed while the parts in {folder} were made"
    if None in parts or len({json.dumps([record[:2] for record in records]) for records in parts}) > 1:
        raise BadInput(f"{told} (names or sizes of its files); delete the folder and prepare again")
    for found in zip(*parts, strict=True):
        if len({digest for _, _, _, digest in found}) > len({count for _, _, count, _ in found}):
            raise BadInput(
                f"{told} ({found[0][0]} held other text of the same length); delete the folder and prepare"
                " again"
            )
    if (files := _here(recipe)) is not None:
        _refuse_other_corpus(files, parts[0], f"the parts in {folder} were made", *parts[1:])
    elif any(len({count for _, _, count, _ in found if count}) > 1 for found in zip(*parts, strict=True)):
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
        if (path := folder / _names((number, counts[0]))[1]).is_file()
    ]
    missing = [
        str(number)
        for number in range(1, counts[0] + 1)
        if not (folder / _names((number, counts[0]))[1]).is_file()
    ]
    if missing:
        raise BadInput(
            f"shards: {folder} holds {len(done)} of {counts[0]} finished parts; run `endprompt prepare ..."
            f" --part I/{counts[0]}` for {', '.join(missing[:20])}, or delete the folder to prepare without"
            " parts"
        )
    parts = [_finished(path) for path in done]
    for path, state in zip(done, parts, strict=True):
        if differing := shards.disagreements(state, expected):
            raise BadInput(
                f"shards: {path} is of another setting ({'; '.join(differing)}); delete the folder or choose"
                " another --out"
            )
    records = _joined(recipe, folder, [state["corpus_files"] for state in parts])
    summed = {key: sum(state[key] for state in parts) for key in COUNTS}
    manifest = {
        **parts[0],
        **summed,
        "corpus_files": records,
        "parts": counts[0],
        "corpus_ended": any(state.get("corpus_ended") for state in parts),
        "shards": [shard for state in parts for shard in state["shards"]],
    }
    if not manifest["rows"]:
        raise BadInput(
            "data.corpus: no part holds as many tokens as one row; give more text or lower the length"
        )
    shards.verify(folder, manifest)
    shards.write_json(folder / shards.MANIFEST, manifest)
    for path in done:
        path.unlink()
    return manifest


def prepare(
    recipe: Recipe,
    method: Method,
    tokenizer,
    folder: Path,
    workers: int,
    versions: dict,
    part: tuple[int, int] | None = None,
    embeddings: int = 2**31,
) -> dict:
    """Writes the shards of ``method`` into ``folder`` and returns their manifest; goes on where a killed run
    stopped.

    part: (i, n), from 1 on: only the i-th of n parts, which may be made at the same time; without it,
        finished parts are joined.
    embeddings: those of the model.  A row's randomness comes from its number among all; which text it holds
        depends on n, as rows do not cross from part to part. Raises BadInput if the corpus cannot be read,
        holds not one row, or holds a token without an embedding, or if ``folder`` holds shards of another
        setting or another corpus.
    """
    expected = settings(recipe, method, tokenizer)
    for prompt in expected["end_prompts"]:
        model.check_ids(prompt["ids"], tokenizer, embeddings, f"data.end_prompts: {prompt['text']!r}")
    if (folder / shards.MANIFEST).exists():
        manifest = shards.read_manifest(folder)
        if differing := shards.disagreements(manifest, expected):
            raise BadInput(
                f"shards: {folder} holds those of another setting ({'; '.join(differing)}); delete the folder"
                " or choose another --out"
            )
        _refuse_finished_of_other_corpus(recipe, folder, manifest)
        shards.verify(folder, manifest)
        return manifest
    if part is None and (any(folder.glob("part-*-of-*.json")) or any(folder.glob("progress-*-of-*.json"))):
        return join(recipe, folder, expected)
    if part is not None:
        if (folder / PROGRESS).exists():
            raise BadInput(
                f"shards: {folder} holds a started preparation without parts; go on without --part, or delete"
                " the folder"
            )
        if (folder / _names(part)[1]).exists():
            state = _finished(folder / _names(part)[1])
            if differing := shards.disagreements(state, expected):
                raise BadInput(
                    f"shards: part {part[0]} in {folder} is of another setting ({'; '.join(differing)});"
                    " delete the folder or choose another --out"
                )
            _refuse_finished_of_other_corpus(recipe, folder, state)
            return state
    return _make(recipe, method, tokenizer, folder, workers, versions, expected, part, embeddings)


def _make(
    recipe: Recipe,
    method: Method,
    tokenizer,
    folder: Path,
    workers: int,
    versions: dict,
    expected: dict,
    part: tuple[int, int] | None,
    embeddings: int,
) -> dict:
    from tqdm import tqdm

    asked = recipe.data.tokens // recipe.row_length(method)
    if asked == 0:
        raise BadInput(
            f"data.tokens: {recipe.data.tokens} tokens are less than one row of {recipe.row_length(method)};"
            " raise it"
        )
    first, wanted = _share(asked, part)
    progress, finished, shard = _names(part)
    prompts = end_prompts(recipe, tokenizer) if method.end_prompt else []
    make = row_maker(recipe, method, prompts)
    # Longer rows, fewer of them: a shard is held in memory while it is made.
    at_once = rows_at_once(recipe, method)
    # A shard ends where the cursor tells it all.
    rows_per_shard = (
        max(1, min(recipe.data.rows_per_shard, SHARD_TOKENS // recipe.row_length(method)) // at_once)
        * at_once
    )
    files = corpus.local_files(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    state = _resume(folder, expected, part)
    number, ledger = (
        sum(shard["rows"] for shard in state["shards"]),
        corpus.Ledger(files, state["corpus_files"]),
    )
    if state["shards"]:
        _refuse_other_corpus(files, state["corpus_files"], f"the preparation in {folder} was begun")
    documents = islice(_documents(recipe, files, ledger, part), state["document"], None)
    stream = _embedded(tokenized(documents, tokenizer, workers), tokenizer, embeddings)
    cursor = Cursor(stream, state["document"], state["offset"])
    bar = tqdm(
        total=wanted * recipe.row_length(method),
        initial=number * recipe.row_length(method),
        unit="tok",
        unit_scale=True,
        desc=f"prepare {method.name}",
        mininterval=0.5 if sys.stderr.isatty() else 10,
        delay=1,
        file=sys.stderr,
    )
    try:
        with bar:
            while number < wanted:
                rows = []
                while (
                    len(rows) < min(rows_per_shard, wanted - number)
                    and (row := make(first + number + len(rows), cursor)) is not None
                ):
                    rows.append(row)
                    bar.update(len(row["input_ids"]))
                if not rows:
                    break
                name = shard.format(len(state["shards"]))
                data = shards.encode(rows)
                shards.write_atomically(folder / name, data)
                number += len(rows)
                state["shards"].append(
                    {
                        "file": name,
                        "rows": len(rows),
                        "bytes": len(data),
                        "sha256": hashlib.sha256(data).hexdigest(),
                    }
                )
                state["text_tokens"] += sum(row["text_length"] for row in rows)
                state["prompt_tokens"] += sum(row["prompt_length"] for row in rows)
                ledger.settle(cursor.document + (cursor.offset > 0))
                state |= {
                    "document": cursor.document,
                    "offset": cursor.offset,
                    "corpus_files": ledger.records,
                }
                shards.write_json(folder / progress, state)
    except BaseException:
        if part is None:  # another part may be about to write
            with contextlib.suppress(OSError):  # not empty: shards are there
                folder.rmdir()
        raise
    finally:
        stream.close()
    if number == 0 and part is None:
        folder.rmdir()
        rows = "one row" if at_once == 1 else f"the {at_once} rows that {method.name} makes of one stretch,"
        raise BadInput(
            f"data.corpus: it holds fewer tokens than {rows} of {recipe.row_length(method)}; give more text"
            " or lower the length"
        )
    if number < wanted:
        ledger.settle(None)
        print(
            f"warning: the corpus{' of this part' if part else ''} ended after {number} of {wanted} rows;"
            " data.tokens asks for more text than there is",
            file=sys.stderr,
        )
    manifest = {
        **expected,
        "rows": number,
        "tokens": state["text_tokens"] + state["prompt_tokens"],
        "text_tokens": state["text_tokens"],
        "prompt_tokens": state["prompt_tokens"],
        "documents": cursor.document + (cursor.offset > 0),
        "corpus_ended": number < wanted,
        "corpus_files": ledger.records,
        "shards": state["shards"],
        "versions": versions,
    }
    shards.write_json(folder / finished, manifest)
    (folder / progress).unlink(missing_ok=True)
    return manifest
