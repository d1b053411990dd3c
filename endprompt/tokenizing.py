"""Text -> token ids, as fast as an exact tokenizer can be had.

The ids are those of the Rust library tokenizers.  Where the package fastokens is installed and is certain to
write the same ids (``fast_texts``), it writes them some twenty times as fast.  Whole documents, and a piece
of every batch, are written by both, and a difference ends the run.
"""

import hashlib
import json
import os
import re
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
COMPARED_SHARE = 1 / 400  # of all characters, in whole documents: as much
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MOST_APART = 5000  # strings that are looked for in every text


def tokenizer_fingerprint(tokenizer) -> str:
    """SHA-256 over the fast tokenizer's whole definition and its end token; truncation and padding settings
    left out.
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition["truncation"] = definition["padding"] = None
    definition["eos"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def _parts(part: dict | None) -> list[dict]:
    """A normalizer or pre-tokenizer of a definition, taken apart where it is a sequence."""
    if part is None or part["type"] != "Sequence":
        return [part] if part else []
    return [inner for one in part.get("normalizers", part.get("pretokenizers", [])) for inner in _parts(one)]


def fast_texts(definition: str) -> re.Pattern | bool:
    """Which texts fastokens writes as tokenizers does: True for all, False for none, else those that the
    pattern is not found in.

    All for byte-level tokenizers.  With bytes as a last resort, as Llama-2 has them, it takes a written
    ``<0x41>``, or another entry of the vocabulary that no merges lead to, for that entry, if a letter beside
    it is not in the vocabulary.  Where bytes are missing, it joins unknown letters otherwise.
    """
    from tokenizers import Tokenizer

    tree = json.loads(definition)
    bpe = tree["model"]
    if (
        bpe.get("type") != "BPE"
        or bpe.get("dropout")
        or bpe.get("continuing_subword_prefix")
        or bpe.get("end_of_word_suffix")
    ):
        return False
    if any(part["type"] == "ByteLevel" for part in _parts(tree["pre_tokenizer"])):
        return True
    spaces = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    if (
        not bpe.get("byte_fallback")
        or not bpe["vocab"].keys() >= {*BYTES}
        or not all(part in spaces for part in _parts(tree["normalizer"]))
    ):
        return False
    write = Tokenizer.from_str(definition).model.tokenize
    apart = [
        token
        for token, number in bpe["vocab"].items()
        if len(token) > 1 and [piece.id for piece in write(token)] != [number]
    ]
    if not apart or len(apart) > MOST_APART:
        return not apart
    # A text's spaces become the letter U+2581, and one is put before it.
    return re.compile(
        "|".join(re.escape(token.removeprefix("\u2581")).replace("\u2581", "[ \u2581]") for token in apart)
    )


class Encoder:
    """Ids of texts by the tokenizer of ``definition`` (the text of a tokenizer.json), never cut and never
    padded.

    special_tokens: whether the tokenizer's own (BOS, as a rule) are put around each text.
    split_special_tokens: whether the names of special tokens in a text are ordinary text.  ``fast``: whether
    fastokens is used.
    """

    def __init__(self, definition: str, special_tokens: bool = True, split_special_tokens: bool = False):
        from tokenizers import Tokenizer

        self._special, self._split, self._calls, self._seen, self._compared = (
            special_tokens,
            split_special_tokens,
            0,
            0,
            0,
        )
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
        written = self._exact.to_str()
        self._same = fast_texts(written)
        if self._same is False:
            return None
        try:
            return Tokenizer.from_json_str(written)
        except ValueError:  # it says so where it does not know a normalizer, a pre-tokenizer or a model
            return None

    def _exactly(self, texts: list[str]) -> list[np.ndarray]:
        return [
            np.array(encoding.ids, np.int32)
            for encoding in self._exact.encode_batch_fast(texts, add_special_tokens=self._special)
        ]

    def _quickly(self, texts: list[str]) -> list[np.ndarray]:
        try:
            ids, ends = self._fast.encode_batch_flat(
                texts, add_special_tokens=self._special, split_special_tokens=self._split
            )
        except ValueError:
            # It refuses a byte that the vocabulary has no token for, which tokenizers leaves out.
            return self._exactly(texts) if len(texts) == 1 else [self._quickly([text])[0] for text in texts]
        return [
            part.astype(np.int32)
            for part in np.split(
                np.frombuffer(ids, np.uint32), np.frombuffer(ends, np.uint64)[1:-1].astype(np.int64)
            )
        ]

    def _certain(self, text: str) -> bool:
        return self._same is True or not self._same.search(text)

    def _refuse_difference(self, text: str, ids: np.ndarray) -> None:
        if not np.array_equal(ids, found := self._exactly([text])[0]):
            count = min(len(ids), len(found))
            at = next(iter(np.flatnonzero(ids[:count] != found[:count])), count)
            raise Failure(
                f"fastokens writes other ids than tokenizers from token {at} of the text {text[:40]!r}... on;"
                " uninstall fastokens, delete what was prepared with it, and start again"
            )

    def _compare(self, texts: list[str], ids: list[np.ndarray]) -> None:
        """Of ``texts``, of which fastokens wrote ``ids``: a piece of one, and whole ones until they are a
        share of all that there was.
        """
        text = texts[self._calls % len(texts)]
        start = self._calls * 7919 % max(1, len(text) - COMPARED_CHARACTERS)
        piece = text[start : start + COMPARED_CHARACTERS]
        self._refuse_difference(piece, self._quickly([piece])[0])
        self._calls += 1
        for text, written in zip(texts, ids, strict=True):
            if self._compared <= COMPARED_SHARE * self._seen:
                self._refuse_difference(text, written)
                self._compared += len(text)
            self._seen += len(text)

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """Int32 ids of each of ``texts``.  Raises Failure if fastokens and tokenizers differ on some of
        them.
        """
        certain = [self._fast is not None and self._certain(text) for text in texts]
        quick = [text for text, fast in zip(texts, certain, strict=True) if fast]
        exact = iter(self._exactly([text for text, fast in zip(texts, certain, strict=True) if not fast]))
        if not quick:
            return list(exact)
        ids = self._quickly(quick)
        self._compare(quick, ids)
        written = iter(ids)
        return [next(written if fast else exact) for fast in certain]


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
    # The Rust tokenizer alone: the same ids as the Python one around it, without importing transformers in
    # each worker.
    _worker = Encoder(definition), eos


def _work(texts: list[str]) -> list[np.ndarray]:
    return _ended(*_worker, texts)


def tokenized(
    documents: Iterable[tuple[str, str]], tokenizer, workers: int
) -> Iterator[tuple[str, np.ndarray]]:
    """(document id, int32 ids ending in EOS) in order: fastokens on ``workers`` threads, else that many
    processes with a bounded number of batches in flight.
    """
    definition, eos = tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id
    os.environ.setdefault("RAYON_NUM_THREADS", str(workers))
    encoder = Encoder(definition)
    if workers <= 1 or encoder.fast:
        for batch in _batches(documents):
            yield from zip(
                (name for name, _ in batch), _ended(encoder, eos, [text for _, text in batch]), strict=True
            )
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
