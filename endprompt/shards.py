"""Shards on disk: the row schema, the manifest, checksums, atomic writes."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from endprompt import BadInput

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SCHEMA = pa.schema([
    ("input_ids", pa.list_(pa.int32())),
    ("position_ids", pa.list_(pa.int32())),
    ("loss_weights", pa.list_(pa.float32())),   # weight of predicting that token; 0: not a target
    ("text_length", pa.int32()),
    ("prompt_length", pa.int32()),
    ("prompt_name", pa.string()),
    ("document_ids", pa.list_(pa.string())),
])


def write_atomically(path: Path, data: bytes) -> None:
    """A reader, or a run after a kill, sees either the whole file or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _lists(arrays: list[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays), type=kind))


def encode(rows: list[dict]) -> bytes:
    """Parquet bytes of ``rows`` (dictionaries with the columns of SCHEMA, the lists as numpy arrays); same rows, same bytes."""
    table = pa.table([
        _lists([row["input_ids"] for row in rows], pa.int32()),
        _lists([row["position_ids"] for row in rows], pa.int32()),
        _lists([row["loss_weights"] for row in rows], pa.float32()),
        pa.array([row["text_length"] for row in rows], pa.int32()),
        pa.array([row["prompt_length"] for row in rows], pa.int32()),
        pa.array([row["prompt_name"] for row in rows], pa.string()),
        pa.array([row["document_ids"] for row in rows], pa.list_(pa.string())),
    ], schema=SCHEMA)
    sink = pa.BufferOutputStream()
    # Consecutive positions differ by 1: delta packing makes the position column next to free.
    pq.write_table(table, sink, compression="zstd", use_dictionary=["loss_weights.list.element", "prompt_name", "document_ids.list.element"],
                   column_encoding={"position_ids.list.element": "DELTA_BINARY_PACKED"}, row_group_size=1024)
    return sink.getvalue().to_pybytes()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, keys: tuple[str, ...] = ()) -> dict:
    """A mapping that ``write_json`` wrote.  Raises BadInput if it cannot be read as one or lacks one of ``keys``."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"shards: {path} cannot be read: {error}; delete the folder and prepare again") from None
    if not isinstance(found, dict) or not found.keys() >= set(keys):
        raise BadInput(f"shards: {path} is no mapping with {', '.join(keys) or 'keys'}; delete the folder and prepare again")
    return found


def read_manifest(folder: Path) -> dict:
    """The manifest of a shard folder.  Raises BadInput if it is missing, not JSON, or of another schema version."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"shards: {path} is missing; run `endprompt prepare` to its end first") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"shards: {path} cannot be read: {error}; delete the folder and prepare again") from None
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        raise BadInput(f"shards: {path} is not of schema version {SCHEMA_VERSION}; prepare again with this version")
    shards = manifest.get("shards")
    if not {"rows", "tokens"} <= set(manifest) or not isinstance(shards, list) or not shards or not all(
            isinstance(shard, dict) and {"file", "rows", "sha256"} <= set(shard) and Path(str(shard["file"])).name == shard["file"] for shard in shards):
        raise BadInput(f"shards: {path} does not list its shards; delete the folder and prepare again")
    return manifest


def verify(folder: Path, manifest: dict) -> None:
    """Raises BadInput naming the first shard that is missing or whose SHA-256 is not the manifest's."""
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            raise BadInput(f"shards: {path} is missing; delete the folder and prepare again")
        found = sha256(path)
        if found != shard["sha256"]:
            raise BadInput(f"shards: {path} is damaged (sha256 {found[:12]}..., the manifest says {shard['sha256'][:12]}...); delete the folder and prepare again")


def disagreements(manifest: dict, expected: dict) -> list[str]:
    """What the manifest says otherwise than ``expected``, a subset of its keys; one entry a key."""
    return [f"{key} is {manifest.get(key)!r}, expected {value!r}" for key, value in expected.items() if manifest.get(key) != value]


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
