"""Text -> token ids, as fast as an exact tokenizer can be had.

The ids are those of the Rust library tokenizers.  Where the package fastokens is installed and knows a tokenizer's parts, it writes the same ids some
twenty times as fast; a piece of every batch is written by both, and a difference ends the run.
"""

import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context, parent_process

import numpy as np

from endprompt import Failure

BATCH_CHARACTERS = 400_000
COMPARED_CHARACTERS = 1000  # of every batch: some 5 % of its time


def tokenizer_fingerprint(tokenizer) -> str:
    """SHA-256 over the fast tokenizer's whole definition and its end token; truncation and padding settings left out."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition["truncation"] = definition["padding"] = None
    definition["eos"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


class Encoder:
    """Ids of texts by the tokenizer of ``definition`` (the text of a tokenizer.json), never cut and never padded.

    special_tokens: whether the tokenizer's own (BOS, as a rule) are put around each text.  split_special_tokens: whether the names of special tokens in a
    text are ordinary text.  ``fast``: whether fastokens is used.
    """

    def __init__(self, definition: str, special_tokens: bool = True, split_special_tokens: bool = False):
        from tokenizers import Tokenizer

        self._special, self._split, self._calls = special_tokens, split_special_tokens, 0
        self._exact = Tokenizer.from_str(definition)
        self._exact.no_truncation()
        self._exact.no_padding()
        self._exact.encode_special_tokens = split_special_tokens
        self._fast = self._load_fast()

    @property
    def fast(self) -> bool:
        return self._fast is not None

    def _load_fast(self):
        try:
            from fastokens import Tokenizer
        except ImportError:
            return None
        try:
            return Tokenizer.from_json_str(self._exact.to_str())
        except ValueError:  # it says so where it does not know a normalizer, a pre-tokenizer or a model
            return None

    def _exactly(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(encoding.ids, np.int32) for encoding in self._exact.encode_batch_fast(texts, add_special_tokens=self._special)]

    def _quickly(self, texts: list[str]) -> list[np.ndarray]:
        try:
            ids, ends = self._fast.encode_batch_flat(texts, add_special_tokens=self._special, split_special_tokens=self._split)
        except ValueError:
            # It refuses a byte that the vocabulary has no token for, which tokenizers leaves out.
            return self._exactly(texts) if len(texts) == 1 else [self._quickly([text])[0] for text in texts]
        return [part.astype(np.int32) for part in np.split(np.frombuffer(ids, np.uint32), np.frombuffer(ends, np.uint64)[1:-1].astype(np.int64))]

    def _compare(self, texts: list[str]) -> None:
        text = texts[self._calls % len(texts)]
        start = self._calls * 7919 % max(1, len(text) - COMPARED_CHARACTERS)
        piece = [text[start:start + COMPARED_CHARACTERS]]
        if not np.array_equal(self._quickly(piece)[0], self._exactly(piece)[0]):
            raise Failure(f"fastokens writes other ids than tokenizers for the text {piece[0][:40]!r}...; uninstall fastokens, delete what was prepared with it, "
                          "and start again")
        self._calls += 1

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """Int32 ids of each of ``texts``.  Raises Failure if fastokens and tokenizers differ on a piece of them."""
        if self._fast is None or not texts:
            return self._exactly(texts)
        self._compare(texts)
        return self._quickly(texts)


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


def _ended(encoder: Encoder, eos: int, texts: list[str]) -> list[np.ndarray]:
    return [ids if len(ids) and ids[-1] == eos else np.append(ids, np.int32(eos)) for ids in encoder(texts)]


_worker: tuple[Encoder, int] | None = None  # of a worker process


def _end_with(parent) -> None:
    parent.join()
    os._exit(1)


def _start_worker(definition: str, eos: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if parent := parent_process():
        # A killed parent cannot end its pool, whose workers would wait for ever.
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    global _worker
    # The Rust tokenizer alone: the same ids as the Python one around it, without importing transformers in each worker.
    _worker = Encoder(definition), eos


def _work(texts: list[str]) -> list[np.ndarray]:
    return _ended(*_worker, texts)


def tokenized(documents: Iterable[tuple[str, str]], tokenizer, workers: int) -> Iterator[tuple[str, np.ndarray]]:
    """(document id, int32 ids ending in EOS) in order: fastokens on ``workers`` threads, else that many processes with a bounded number of batches in flight."""
    definition, eos = tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id
    os.environ.setdefault("RAYON_NUM_THREADS", str(workers))
    encoder = Encoder(definition)
    if workers <= 1 or encoder.fast:
        for batch in _batches(documents):
            yield from zip((name for name, _ in batch), _ended(encoder, eos, [text for _, text in batch]), strict=True)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (definition, eos))
    try:
        waiting: deque = deque()
        batches = _batches(documents)
        for batch in islice(batches, 2 * workers):
            waiting.append((batch, pool.submit(_work, [text for _, text in batch])))
        while waiting:
            batch, future = waiting.popleft()
            ids = future.result()
            for following in islice(batches, 1):
                waiting.append((following, pool.submit(_work, [text for _, text in following])))
            yield from zip((name for name, _ in batch), ids, strict=True)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
