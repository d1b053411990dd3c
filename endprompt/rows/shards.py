"""Shards on disk: the row schema, the manifest, checksums, atomic writes."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from endprompt import BadInput, storage

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
# What Arrow raises on a Parquet file that is not what it says.
UNREADABLE = (pa.ArrowException, OSError, ValueError, TypeError, LookupError, OverflowError, MemoryError)
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("position_ids", pa.list_(pa.int32())),
        ("loss_weights", pa.list_(pa.float32())),  # weight of predicting that token; 0: not a target
        ("text_length", pa.int32()),
        ("prompt_length", pa.int32()),
        ("prompt_name", pa.string()),
        ("document_ids", pa.list_(pa.string())),
    ]
)


def _lists(arrays: list[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays), type=kind))


def encode(rows: list[dict]) -> bytes:
    """Parquet bytes of ``rows`` (dictionaries with the columns of SCHEMA, the lists as numpy arrays); same
    rows, same bytes.
    """
    table = pa.table(
        [
            _lists([row["input_ids"] for row in rows], pa.int32()),
            _lists([row["position_ids"] for row in rows], pa.int32()),
            _lists([row["loss_weights"] for row in rows], pa.float32()),
            pa.array([row["text_length"] for row in rows], pa.int32()),
            pa.array([row["prompt_length"] for row in rows], pa.int32()),
            pa.array([row["prompt_name"] for row in rows], pa.string()),
            pa.array([row["document_ids"] for row in rows], pa.list_(pa.string())),
        ],
        schema=SCHEMA,
    )
    sink = pa.BufferOutputStream()
    # Consecutive positions differ by 1: delta packing makes the position column next to free.
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=["loss_weights.list.element", "prompt_name", "document_ids.list.element"],
        column_encoding={"position_ids.list.element": "DELTA_BINARY_PACKED"},
        row_group_size=1024,
    )
    return sink.getvalue().to_pybytes()


def whole(value: Any, least: int) -> bool:
    """Whether ``value`` is an integer, and no boolean, from ``least`` to what 64 bits hold."""
    return type(value) is int and least <= value < 2**63


def listed(entries: Any) -> bool:
    """Whether ``entries`` are a list of shards as a manifest has it: files inside the folder, each once, with
    their rows and checksums.
    """
    return (
        isinstance(entries, list)
        and all(
            isinstance(entry, dict)
            and isinstance(entry.get("file"), str)
            and re.fullmatch(r"shard-(\d{5}-of-\d{5}-)?\d{5,9}\.parquet", entry["file"], re.ASCII)
            and whole(entry.get("rows"), 1)
            and whole(entry.get("bytes", 0), 0)
            and isinstance(entry.get("sha256"), str)
            and re.fullmatch(r"[0-9a-f]{64}", entry["sha256"])
            for entry in entries
        )
        and len({entry["file"] for entry in entries}) == len(entries)
    )


def digest(manifest: dict) -> str:
    """Of what the shards hold, by their checksums."""
    return hashlib.sha256(json.dumps(manifest["shards"], sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict:
    """The manifest of a shard folder.  Raises BadInput if it is missing, not JSON, of another schema version,
    or at odds with itself.
    """
    path = folder / MANIFEST
    try:
        manifest = storage.read_json(path)
    except FileNotFoundError:
        raise BadInput(f"shards: {path} is missing; run `endprompt prepare` to its end first") from None
    except (OSError, ValueError) as error:
        raise BadInput(
            f"shards: {path} cannot be read: {error}; delete the folder and prepare again"
        ) from None
    if (
        not isinstance(manifest, dict)
        or type(version := manifest.get("schema_version")) is not int
        or version != SCHEMA_VERSION
    ):
        raise BadInput(
            f"shards: {path} is not of schema version {SCHEMA_VERSION}; prepare again with this version"
        )
    if (
        not {"rows", "tokens"} <= set(manifest)
        or not manifest.get("shards")
        or not listed(manifest["shards"])
    ):
        raise BadInput(
            f"shards: {path} does not list its shards, each once with a file name, rows and sha256; delete"
            " the folder and prepare again"
        )
    if wrong := [key for key in ("rows", "tokens", "target_length") if not whole(manifest.get(key), 1)]:
        raise BadInput(
            f"shards: {path}: {wrong[0]} is {manifest.get(wrong[0])!r:.60}, no positive whole number; delete"
            " the folder and prepare again"
        )
    if manifest["rows"] != (there := sum(shard["rows"] for shard in manifest["shards"])):
        raise BadInput(
            f"shards: {path}: rows is {manifest['rows']}, but its shards have {there}; delete the folder and"
            " prepare again"
        )
    return manifest


def _types(schema: pa.Schema) -> list[tuple[str, str]]:
    """(column, type) of each, sorted, without the names that writers give to the elements of lists."""
    return sorted(
        (field.name, f"list of {field.type.value_type}" if pa.types.is_list(field.type) else str(field.type))
        for field in schema
    )


def verify(folder: Path, manifest: dict) -> None:
    """Raises BadInput naming the first shard that is missing or a link, or whose SHA-256, columns or number
    of rows are not the manifest's.
    """
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        if path.is_symlink():
            raise BadInput(
                f"shards: {path} is a link, and shards are files; put the file itself there, or link the"
                " whole folder"
            )
        if not path.is_file():
            raise BadInput(f"shards: {path} is missing; delete the folder and prepare again")
        found = storage.sha256(path)
        if found != shard["sha256"]:
            raise BadInput(
                f"shards: {path} is damaged (sha256 {found[:12]}..., the manifest says"
                f" {shard['sha256'][:12]}...); delete the folder and prepare again"
            )
        try:
            file = pq.ParquetFile(path)
            columns, count = file.schema_arrow, file.metadata.num_rows
        except UNREADABLE as error:
            raise BadInput(
                f"shards: {path} is no Parquet file: {_line(error)}; delete the folder and prepare again"
            ) from None
        if _types(columns) != _types(SCHEMA):
            differing = sorted(
                (Counter(_types(columns)) - Counter(_types(SCHEMA)))
                + (Counter(_types(SCHEMA)) - Counter(_types(columns)))
            )
            raise BadInput(
                f"shards: {path} has other columns than schema version {SCHEMA_VERSION}"
                f" ({differing[0][0]!r}); delete the folder and prepare again"
            )
        if count != shard["rows"]:
            raise BadInput(
                f"shards: {path} holds {count} rows, the manifest says {shard['rows']}; delete the folder and"
                " prepare again"
            )


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _row_fault(batch: pa.RecordBatch, target: int, embeddings: int) -> tuple[int, str] | None:
    """(index, what is wrong) of a row of ``batch`` that cannot be trained on, or None: the checks of
    ``positions.check`` and more, on all rows at once.
    """
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    for name, column in columns.items():
        if column.null_count or (pa.types.is_list(column.type) and column.values.null_count):
            return 0, f"{name} has nulls"
    lists = {name: columns[name] for name in ("input_ids", "position_ids", "loss_weights")}
    text, prompt = (columns[name].to_numpy() for name in ("text_length", "prompt_length"))
    lengths = np.diff(lists["position_ids"].offsets.to_numpy())
    ids, at, weights = (
        column.values[column.offsets[0].as_py() : column.offsets[-1].as_py()].to_numpy()
        for column in lists.values()
    )  # flatten() would copy
    ends = np.cumsum(lengths)

    def first(wrong: np.ndarray, what: str) -> tuple[int, str] | None:
        return (int(np.argmax(wrong)), what) if wrong.any() else None

    def of_token(wrong: np.ndarray, what: str) -> tuple[int, str]:
        return int(np.searchsorted(ends, np.argmax(wrong), "right")), what

    fault = first(lengths == 0, "it has no tokens")
    for name, column in lists.items():
        fault = fault or first(
            np.diff(column.offsets.to_numpy()) != lengths, f"{name} and position_ids are not equally long"
        )
    fault = fault or first(
        (text < 0) | (prompt < 0) | (text.astype(np.int64) + prompt != lengths),
        "text_length and prompt_length do not add up to its tokens",
    )
    if fault:
        return fault
    rises = at[1:] > at[:-1]
    rises[ends[:-1] - 1] = True  # from the last token of a row to the first of the next
    if not rises.all():
        return of_token(np.append(False, ~rises), "its positions do not increase")
    if ids.min() < 0:
        return of_token(ids < 0, "it has a negative token id")
    if ids.max() >= embeddings:
        return of_token(
            ids >= embeddings,
            f"it has the token id {ids.max()}, and the model has embeddings for 0 to {embeddings - 1} alone",
        )
    if not (weights.min() >= 0 and weights.max() < np.inf):
        return of_token(
            ~(np.isfinite(weights) & (weights >= 0)), "it has a loss weight that is no number from 0 on"
        )
    return first((at[ends - lengths] < 0) | (at[ends - 1] >= target), f"its positions leave 0..{target - 1}")


def check_rows(folder: Path, manifest: dict, embeddings: int = 2**31) -> None:
    """Raises BadInput naming the first row that cannot be trained on: unequal lists, nulls, positions that
    fall or leave the target length, token ids from ``embeddings`` on.

    Files of this program's own making pass; a checksum says only that a file is the one that was listed.
    Reading all columns takes some fifteen times as long as the checksum, so training does it once for a set
    of shards.
    """
    number = tokens = 0
    for path in files(folder, manifest):
        try:
            for batch in pq.ParquetFile(path).iter_batches(
                batch_size=max(1, min(1024, 2**23 * manifest["rows"] // manifest["tokens"]))
            ):
                batch.validate(full=True)  # offsets inside their arrays, text in UTF-8
                if len(batch) and (fault := _row_fault(batch, manifest["target_length"], embeddings)):
                    raise BadInput(
                        f"shards: {path}: row {number + fault[0]}: {fault[1]}; delete the folder and prepare"
                        " again"
                    )
                number += len(batch)
                tokens += sum(
                    offsets[-1].as_py() - offsets[0].as_py()
                    for offsets in [batch.column("position_ids").offsets]
                )
        except UNREADABLE as error:
            raise BadInput(
                f"shards: {path} cannot be read: {_line(error)}; delete the folder and prepare again"
            ) from None
    if (number, tokens) != (manifest["rows"], manifest["tokens"]):
        raise BadInput(
            f"shards: {folder} holds {number} rows and {tokens} tokens, the manifest says {manifest['rows']}"
            f" and {manifest['tokens']}; delete the folder and prepare again"
        )


def disagreements(manifest: dict, expected: dict) -> list[str]:
    """What the manifest says otherwise than ``expected``, a subset of its keys; one entry a key."""
    return [
        f"{key} is {manifest.get(key)!r}, expected {value!r}"
        for key, value in expected.items()
        if manifest.get(key) != value
    ]


def files(folder: Path, manifest: dict) -> list[Path]:
    return [folder / shard["file"] for shard in manifest["shards"]]


def rows(folder: Path, manifest: dict) -> Iterator[dict]:
    """Every row in order, its lists as Python lists."""
    for path in files(folder, manifest):
        for batch in pq.ParquetFile(path).iter_batches(batch_size=64):
            yield from batch.to_pylist()


def position_ids(folder: Path, manifest: dict) -> Iterator[np.ndarray]:
    """The positions [T] of every row in order, int32; the other columns are not read."""
    for path in files(folder, manifest):
        for batch in pq.ParquetFile(path).iter_batches(batch_size=64, columns=["position_ids"]):
            for row in batch.column(0):
                yield row.values.to_numpy()
