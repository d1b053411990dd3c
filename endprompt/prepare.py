"""Corpus -> tokenized rows with explicit positions -> Parquet shards and a manifest.

Everything random about a row comes from (seed, row number), and every shard remembers where in the corpus the next one
begins.  So the bytes do not depend on the number of workers, and a killed run goes on from its last whole shard.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np

from endprompt import BadInput, corpus, positions, shards
from endprompt.config import END_PROMPTS, Recipe
from endprompt.methods import Method

PROGRESS = "progress.json"
BATCH_CHARACTERS = 400_000
SHARD_TOKENS = 2**25


@dataclass(frozen=True)
class EndPrompt:
    name: str
    text: str
    ids: np.ndarray


def tokenizer_fingerprint(tokenizer) -> str:
    """SHA-256 over the fast tokenizer's whole definition and its end token; truncation and padding settings left out."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition["truncation"] = definition["padding"] = None
    definition["eos"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def end_prompts(recipe: Recipe, tokenizer) -> list[EndPrompt]:
    """The recipe's prompts, tokenized.  Raises BadInput if one is a special token that the tokenizer lacks, or unreadable to it."""
    result = []
    for name in recipe.data.end_prompts:
        text = END_PROMPTS.get(name, name)
        if re.fullmatch(r"EP_\w+", text):
            raise BadInput(f"data.end_prompts: there is no prompt {name}; use {', '.join(END_PROMPTS)}, or write the text itself")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if re.fullmatch(r"<\S+>", text) and len(ids) != 1:
            raise BadInput(f"data.end_prompts: this tokenizer has no special token {text} (it would become {len(ids)} pieces); choose another prompt")
        if not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
            raise BadInput(f"data.end_prompts: this tokenizer cannot write {text!r}; choose another prompt")
        result.append(EndPrompt(name if name in END_PROMPTS else "custom", text, np.array(ids, np.int32)))
    return result


_tokenizer = None  # of a worker process


def _end_with(parent) -> None:
    parent.join()
    os._exit(1)


def _start_worker(definition: str, eos: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if parent := parent_process():
        # A killed parent cannot end its pool, whose workers would wait for ever.
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    from tokenizers import Tokenizer

    global _tokenizer
    # The Rust tokenizer alone: the same ids as the Python one around it, without importing transformers in each worker.
    _tokenizer = Tokenizer.from_str(definition), eos
    _tokenizer[0].no_truncation()
    _tokenizer[0].no_padding()


def _tokenize(texts: list[str]) -> list[np.ndarray]:
    tokenizer, eos = _tokenizer
    result = []
    for encoding in tokenizer.encode_batch_fast(texts):
        ids = encoding.ids
        if not ids or ids[-1] != eos:
            ids.append(eos)
        result.append(np.array(ids, np.int32))
    return result


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenized(documents: Iterable[tuple[str, str]], tokenizer, workers: int) -> Iterator[tuple[str, np.ndarray]]:
    """(document id, int32 ids ending in EOS) in order, tokenized by ``workers`` processes with a bounded number of batches in flight."""
    start = (tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)
    if workers <= 1:
        _start_worker(*start)
        for batch in _batches(documents):
            yield from zip((name for name, _ in batch), _tokenize([text for _, text in batch]), strict=True)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, start)
    try:
        waiting: deque = deque()
        batches = _batches(documents)
        for batch in islice(batches, 2 * workers):
            waiting.append((batch, pool.submit(_tokenize, [text for _, text in batch])))
        while waiting:
            batch, future = waiting.popleft()
            ids = future.result()
            for following in islice(batches, 1):
                waiting.append((following, pool.submit(_tokenize, [text for _, text in following])))
            yield from zip((name for name, _ in batch), ids, strict=True)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Cursor:
    """The corpus as one stream of tokens that remembers where it stands: (documents finished, tokens taken of the next)."""

    def __init__(self, stream: Iterator[tuple[str, np.ndarray]], document: int, offset: int):
        self._stream, self.document, self.offset = stream, document, offset
        self._current: tuple[str, np.ndarray] | None = None

    def _load(self) -> bool:
        if self._current is None:
            self._current = next(self._stream, None)
        return self._current is not None

    def _advance(self, count: int) -> None:
        self.offset += count
        if self.offset >= len(self._current[1]):
            self._current, self.document, self.offset = None, self.document + 1, 0

    def take(self, count: int) -> tuple[np.ndarray, list[str]] | None:
        """The next ``count`` tokens and the ids of the documents they come from; None if the corpus ends before."""
        parts, names, missing = [], [], count
        while missing:
            if not self._load():
                return None
            name, ids = self._current
            part = ids[self.offset:self.offset + missing]
            parts.append(part)
            names.append(name)
            missing -= len(part)
            self._advance(len(part))
        return np.concatenate(parts), names

    def take_document(self, count: int) -> tuple[np.ndarray, list[str]] | None:
        """The first ``count`` tokens, or fewer, of the next document; the rest of it is passed over."""
        if not self._load():
            return None
        name, ids = self._current
        self._advance(len(ids))
        return ids[:count], [name]


def row_maker(recipe: Recipe, method: Method, prompts: list[EndPrompt]) -> Callable[[int, Cursor], dict | None]:
    """A function (row number, cursor) -> row of the shard schema, None at the end of the corpus.

    With ``data.pose_text: later_span`` the chunks of a chunked row are spread over the first target_length tokens of its document, as
    github.com/dwzhu-pku/PoSE does; the positions are those of contiguous text.
    """
    length, target = recipe.row_length(method), recipe.lengths.target
    later = method.chunked and recipe.data.pose_text == "later_span"
    longest = max((len(prompt.ids) for prompt in prompts), default=0)
    if longest >= length:
        raise BadInput(f"lengths.physical: rows of {length} tokens leave no room for text beside an end prompt of {longest}; raise it")

    def make(number: int, cursor: Cursor) -> dict | None:
        rng = np.random.default_rng([recipe.data.seed, number])
        prompt = prompts[int(rng.integers(len(prompts)))] if prompts else None
        b = len(prompt.ids) if prompt else 0
        taken = cursor.take(length - b) if recipe.data.packing == "cut" else cursor.take_document(target if later else length - b)
        if taken is None:
            return None
        text, names = taken
        a = min(len(text), length - b)
        parts = positions.chunk_lengths(a, recipe.data.pose_chunks, rng) if method.chunked else a
        position_ids = method.plan(parts, b, target, rng)
        positions.check(position_ids, target)
        if later:
            text = text[positions.spread(parts, len(text), rng)]
        weights = np.ones(a + b, np.float32)
        weights[0] = 0  # nothing predicts the first token
        weights[a:] = recipe.data.prompt_loss_weight
        return {"input_ids": np.concatenate([text, prompt.ids]) if prompt else text, "position_ids": position_ids.astype(np.int32),
                "loss_weights": weights, "text_length": a, "prompt_length": b,
                "prompt_name": prompt.name if prompt else "", "document_ids": names}

    return make


def settings(recipe: Recipe, method: Method, tokenizer) -> dict:
    """What shards depend on; ``train`` expects the manifest to say the same."""
    prompts = end_prompts(recipe, tokenizer) if method.end_prompt else []
    return {
        "schema_version": shards.SCHEMA_VERSION, "method": method.name, "physical_length": recipe.lengths.physical,
        "target_length": recipe.lengths.target, "row_length": recipe.row_length(method), "packing": recipe.data.packing,
        "corpus": recipe.data.corpus, "text_column": recipe.data.text_column, "split": recipe.data.split, "tokens_requested": recipe.data.tokens,
        "seed": recipe.data.seed, "rows_per_shard": recipe.data.rows_per_shard, "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "end_prompts": [{"name": prompt.name, "text": prompt.text, "ids": prompt.ids.tolist()} for prompt in prompts],
        "prompt_loss_weight": recipe.data.prompt_loss_weight if prompts else None,
        **({"pose_chunks": recipe.data.pose_chunks, "pose_text": recipe.data.pose_text} if method.chunked else {}),
    }


def _resume(folder: Path, expected: dict) -> dict:
    """The state after the last whole shard; what a killed run left half-written is removed."""
    fresh = {"settings": expected, "shards": [], "document": 0, "offset": 0, "text_tokens": 0, "prompt_tokens": 0}
    path = folder / PROGRESS
    try:
        state = shards.read_json(path)
        differing = shards.disagreements(state["settings"], expected)
        if not shards.listed(state["shards"]) or not all(shards.whole(state[key], 0) for key in ("document", "offset", "text_tokens", "prompt_tokens")):
            raise ValueError
    except FileNotFoundError:
        state, differing = fresh, []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"shards: {path} cannot be read; delete the folder and prepare again") from None
    if differing:
        raise BadInput(f"shards: {folder} holds a started preparation of another setting ({'; '.join(differing)}); delete the folder or choose another --out")
    kept = {shard["file"] for shard in state["shards"]}
    for file in folder.glob("*.part"):
        file.unlink()
    for file in folder.glob("shard-*.parquet"):
        if file.name not in kept:
            file.unlink()
    for shard in state["shards"]:
        if not (folder / shard["file"]).is_file() or shards.sha256(folder / shard["file"]) != shard["sha256"]:
            raise BadInput(f"shards: {folder / shard['file']} of a started preparation is damaged or missing; delete the folder and prepare again")
    return state


def _sizes(files: list[Path]) -> list:
    return [[path.name, path.stat().st_size] for path in files]


def prepare(recipe: Recipe, method: Method, tokenizer, folder: Path, workers: int, versions: dict) -> dict:
    """Writes the shards of ``method`` into ``folder`` and returns their manifest; goes on where a killed run stopped.

    Raises BadInput if the corpus cannot be read or holds not one row, or if ``folder`` holds shards of another setting.
    """
    from tqdm import tqdm

    expected = settings(recipe, method, tokenizer)
    if (folder / shards.MANIFEST).exists():
        manifest, files = shards.read_manifest(folder), None
        if differing := shards.disagreements(manifest, expected):
            raise BadInput(f"shards: {folder} holds those of another setting ({'; '.join(differing)}); delete the folder or choose another --out")
        with contextlib.suppress(BadInput):  # shards serve where their corpus is not
            files = corpus.local_files(recipe)
        if files is not None and manifest.get("corpus_files") != _sizes(files):
            raise BadInput(f"shards: the corpus files are not those that {folder} was made of (names or sizes differ); delete the folder and prepare again")
        shards.verify(folder, manifest)
        return manifest
    wanted = recipe.data.tokens // recipe.row_length(method)
    if wanted == 0:
        raise BadInput(f"data.tokens: {recipe.data.tokens} tokens are less than one row of {recipe.row_length(method)}; raise it")
    prompts = end_prompts(recipe, tokenizer) if method.end_prompt else []
    make = row_maker(recipe, method, prompts)
    # Longer rows, fewer of them: a shard is held in memory while it is made.
    rows_per_shard = max(1, min(recipe.data.rows_per_shard, SHARD_TOKENS // recipe.row_length(method)))
    files = corpus.local_files(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    state = _resume(folder, expected)
    number = sum(shard["rows"] for shard in state["shards"])
    documents = islice(corpus.documents(recipe, files), state["document"], None)
    stream = tokenized(documents, tokenizer, workers)
    cursor = Cursor(stream, state["document"], state["offset"])
    bar = tqdm(total=wanted * recipe.row_length(method), initial=number * recipe.row_length(method), unit="tok", unit_scale=True,
               desc=f"prepare {method.name}", mininterval=0.5 if sys.stderr.isatty() else 10, delay=1, file=sys.stderr)
    try:
        with bar:
            while number < wanted:
                rows = []
                while len(rows) < min(rows_per_shard, wanted - number) and (row := make(number + len(rows), cursor)) is not None:
                    rows.append(row)
                    bar.update(len(row["input_ids"]))
                if not rows:
                    break
                name = f"shard-{len(state['shards']):05d}.parquet"
                data = shards.encode(rows)
                shards.write_atomically(folder / name, data)
                number += len(rows)
                state["shards"].append({"file": name, "rows": len(rows), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
                state["text_tokens"] += sum(row["text_length"] for row in rows)
                state["prompt_tokens"] += sum(row["prompt_length"] for row in rows)
                state |= {"document": cursor.document, "offset": cursor.offset}
                shards.write_json(folder / PROGRESS, state)
    finally:
        stream.close()
    if number == 0:
        (folder / PROGRESS).unlink(missing_ok=True)
        folder.rmdir()
        raise BadInput(f"data.corpus: it holds fewer tokens than one row of {recipe.row_length(method)}; give more text or lower the length")
    if number < wanted:
        print(f"warning: the corpus ended after {number} of {wanted} rows; data.tokens asks for more text than there is", file=sys.stderr)
    manifest = {**expected, "rows": number, "tokens": state["text_tokens"] + state["prompt_tokens"], "text_tokens": state["text_tokens"],
                "prompt_tokens": state["prompt_tokens"], "documents": cursor.document + (cursor.offset > 0), "corpus_ended": number < wanted,
                "corpus_files": _sizes(files) if files is not None else None, "shards": state["shards"], "versions": versions}
    shards.write_json(folder / shards.MANIFEST, manifest)
    (folder / PROGRESS).unlink()
    return manifest
