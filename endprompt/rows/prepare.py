"""Rows -> Parquet shards and a manifest.

Every shard remembers where in the corpus the next one begins, so a killed run goes on from its last whole
shard to the same bytes. Parts of the corpus can be prepared at the same time, each by a process of its own,
and are joined into one manifest.
"""

import contextlib
import hashlib
import sys
from collections.abc import Generator, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from endprompt import BadInput, storage
from endprompt.bases import model
from endprompt.methods.base import Rows
from endprompt.recipe.experiment import Experiment
from endprompt.rows import corpus, filtering, parts, shards
from endprompt.rows.ledger import Ledger, are_records
from endprompt.rows.stream import Cursor
from endprompt.rows.tokenizing import tokenized, tokenizer_fingerprint

SHARD_TOKENS = 2**22  # held in memory while they are made: some 200 MB


def settings(experiment: Experiment, tokenizer=None, rows: Rows | None = None) -> dict:
    """What shards depend on; ``train`` expects the manifest to say the same."""
    data, lengths = experiment.recipe.data, experiment.recipe.lengths
    tokenizer = experiment.base.tokenizer if tokenizer is None else tokenizer
    rows = experiment.rows(tokenizer) if rows is None else rows
    return {
        "schema_version": shards.SCHEMA_VERSION,
        "method": experiment.method.name,
        "physical_length": lengths.physical,
        "target_length": lengths.target,
        "row_length": experiment.row_length,
        "packing": data.packing,
        "corpus": data.corpus,
        "text_column": data.text_column,
        "split": data.split,
        "tokens_requested": data.tokens,
        "seed": data.seed,
        "rows_per_shard": data.rows_per_shard,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        # Manifests of every method have these two.
        "end_prompts": [],
        "prompt_loss_weight": None,
        "filter": filtering.settings(experiment),
        **rows.recorded(),
    }


def _chooser(experiment: Experiment, rows: Rows, expected: dict) -> str | None:
    """The fingerprint of the base, where text is chosen by it; training may be another's."""
    return experiment.base.fingerprint if rows.asks_base or expected["filter"] else None


def _noted(expected: dict) -> dict:
    """``expected`` as a manifest has it: what came later than the first manifests is there if it is used."""
    later = ("filter", "match_by", "match_candidates")
    return {key: value for key, value in expected.items() if value is not None or key not in later}


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
    progress, finished, shard = parts.names(part)
    path, mine = folder / progress, shard.replace("{:05d}", "?????")
    try:
        state = storage.read_json(path)
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
        if not are_records(state["corpus_files"]):
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
        if (
            not (folder / shard["file"]).is_file()
            or storage.sha256(folder / shard["file"]) != shard["sha256"]
        ):
            raise BadInput(
                f"shards: {folder / shard['file']} of a started preparation is damaged or missing; delete the"
                " folder and prepare again"
            )
    return state


def _embedded(
    stream: Generator[tuple[str, np.ndarray], None, None], tokenizer, embeddings: int
) -> Generator[tuple[str, np.ndarray], None, None]:
    """``stream``.  Raises BadInput where a document holds a token that the model has no embedding for."""
    with contextlib.closing(stream):
        for name, ids in stream:
            model.check_ids(ids, tokenizer, embeddings, f"data.corpus: the document {name}")
            yield name, ids


def prepare(
    experiment: Experiment,
    folder: Path,
    workers: int,
    versions: dict,
    part: tuple[int, int] | None = None,
    tokenizer=None,
) -> dict:
    """Writes the shards of ``experiment`` into ``folder`` and returns their manifest; goes on where a killed
    run stopped.

    part: (i, n), from 1 on: only the i-th of n parts, which may be made at the same time; without it,
        finished parts are joined.
    tokenizer: in place of the base's own.

    A row's randomness comes from its number among all; which text it holds depends on n, as rows do not cross
    from part to part.  Raises BadInput if the corpus cannot be read, holds not one row, or holds a token
    without an embedding, or if ``folder`` holds shards of another setting or another corpus.
    """
    recipe = experiment.recipe
    tokenizer = experiment.base.tokenizer if tokenizer is None else tokenizer
    rows = experiment.rows(tokenizer, for_text=True)
    _ = experiment.scaling  # rows of a RoPE that cannot be built would be made in vain
    expected = settings(experiment, tokenizer, rows)
    for where, ids in rows.written().items():
        model.check_ids(ids, tokenizer, experiment.base.config.vocab_size, where)
    if (folder / shards.MANIFEST).exists():
        manifest = shards.read_manifest(folder)
        if differing := shards.disagreements(manifest, expected):
            raise BadInput(
                f"shards: {folder} holds those of another setting ({'; '.join(differing)}); delete the folder"
                " or choose another --out"
            )
        parts.refuse_finished_of_other_corpus(recipe, folder, manifest)
        parts.refuse_other_model(folder, manifest, _chooser(experiment, rows, expected))
        shards.verify(folder, manifest)
        return manifest
    if part is None and (any(folder.glob("part-*-of-*.json")) or any(folder.glob("progress-*-of-*.json"))):
        return parts.join(recipe, folder, expected)
    if part is not None:
        if (folder / parts.PROGRESS).exists():
            raise BadInput(
                f"shards: {folder} holds a started preparation without parts; go on without --part, or delete"
                " the folder"
            )
        if (folder / parts.names(part)[1]).exists():
            state = parts.finished(folder / parts.names(part)[1])
            if differing := shards.disagreements(state, expected):
                raise BadInput(
                    f"shards: part {part[0]} in {folder} is of another setting ({'; '.join(differing)});"
                    " delete the folder or choose another --out"
                )
            parts.refuse_finished_of_other_corpus(recipe, folder, state)
            parts.refuse_other_model(folder, state, _chooser(experiment, rows, expected))
            return state
    return Preparation(experiment, folder, rows, tokenizer, expected, part).run(workers, versions)


class Preparation:
    """The rows of one part, or of all, on their way into shards; a killed one goes on where it stopped."""

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        rows: Rows,
        tokenizer,
        expected: dict,
        part: tuple[int, int] | None,
    ):
        self.experiment, self.folder, self.rows, self.tokenizer = experiment, folder, rows, tokenizer
        self.expected, self.part, self.recipe = expected, part, experiment.recipe
        self.length = experiment.row_length
        asked = self.recipe.data.tokens // self.length
        if asked == 0:
            raise BadInput(
                f"data.tokens: {self.recipe.data.tokens} tokens are less than one row of {self.length}; raise"
                " it"
            )
        self.first, self.wanted = parts.share(asked, part)
        self.progress, self.finished, self.shard = parts.names(part)
        # Longer rows, fewer of them: a shard is held in memory while it is made.
        most = min(self.recipe.data.rows_per_shard, SHARD_TOKENS // self.length)
        # A shard ends where the cursor tells it all.
        self.rows_per_shard = max(1, most // rows.together) * rows.together
        self.ranked: filtering.Ranked | None = None

    def run(self, workers: int, versions: dict) -> dict:
        """The manifest, or what a finished part says of itself."""
        files = corpus.local_files(self.recipe)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.state = _resume(self.folder, self.expected, self.part)
        self.number = sum(shard["rows"] for shard in self.state["shards"])
        self.ledger = Ledger(files, self.state["corpus_files"])
        if self.state["shards"]:
            begun = f"the preparation in {self.folder} was begun"
            parts.refuse_other_corpus(files, self.state["corpus_files"], begun)
        elif files is None:
            self.state["corpus_commit"] = corpus.revision(self.recipe)
        if self.rows.asks_base:
            chooser = self.experiment.base.fingerprint
            parts.refuse_other_model(self.folder, self.state, chooser)
            self.state["chosen_by"] = self.state.get("chosen_by", chooser)
        try:
            if self.expected["filter"]:
                self.rank(files, workers)
            documents = self.documents_of(files, self.ledger)
            if self.ranked:
                documents = self.ranked.select(documents)
            stream = self.ids_of(islice(documents, self.state["document"], None), workers)
            with contextlib.closing(stream):
                self.cursor = Cursor(stream, self.state["document"], self.state["offset"])
                self.write_shards()
        except BaseException:
            if self.part is None:  # another part may be about to write
                with contextlib.suppress(OSError):  # not empty: shards are there
                    self.folder.rmdir()
            raise
        return self.finish(versions)

    def documents_of(self, files: list[corpus.File] | None, ledger: Ledger) -> Iterator[tuple[str, str]]:
        return parts.documents(self.recipe, files, ledger, self.part, self.state.get("corpus_commit"))

    def ids_of(self, documents: Iterator[tuple[str, str]], workers: int):
        """(id, token ids) of ``documents``, each token with an embedding."""
        embeddings = self.experiment.base.config.vocab_size
        return _embedded(tokenized(documents, self.tokenizer, workers), self.tokenizer, embeddings)

    def rank(self, files: list[corpus.File] | None, workers: int) -> None:
        """Chooses the documents that rows are made of.  Raises BadInput if shards of another choice are
        there."""
        ledger = Ledger(files)
        by_document = self.recipe.data.packing == "document"
        rows = self.wanted + self.rows.together
        enough = (0, rows) if by_document else (rows * self.length, 0)
        ranking = filtering.Ranking(self.experiment, self.tokenizer, self.expected["filter"], enough)
        question = {
            "tokenizer": self.expected["tokenizer_fingerprint"],
            "corpus": self.expected["corpus"],
            "files": [[file.inside, file.path.stat().st_size] for file in files or []],
        }
        path = self.folder / filtering.scores_file(self.part)
        with contextlib.closing(self.ids_of(self.documents_of(files, ledger), workers)) as stream:
            self.ranked = ranking.rank(stream, path, question)
        ledger.settle(self.ranked.record["documents"])
        if self.state["shards"] and self.state.get("filtered") != self.ranked.record:
            raise BadInput(
                f"shards: the preparation in {self.folder} was begun with other scores of the documents (of"
                " another model, or its file was lost); delete the folder and prepare again"
            )
        self.state["filtered"] = self.ranked.record
        # What was chosen from counts as read.
        self.ledger = Ledger(files, ledger.records)

    def write_shards(self) -> None:
        from tqdm import tqdm

        with tqdm(
            total=self.wanted * self.length,
            initial=self.number * self.length,
            unit="tok",
            unit_scale=True,
            desc=f"prepare {self.experiment.method.name}",
            mininterval=0.5 if sys.stderr.isatty() else 10,
            delay=1,
            file=sys.stderr,
        ) as bar:
            while self.number < self.wanted:
                rows: list[dict] = []
                most = min(self.rows_per_shard, self.wanted - self.number)
                while len(rows) < most:
                    row = self.rows(self.first + self.number + len(rows), self.cursor)
                    if row is None:
                        break
                    rows.append(row)
                    bar.update(len(row["input_ids"]))
                if not rows:
                    break
                self.keep(rows)

    def keep(self, rows: list[dict]) -> None:
        """Writes a shard, and then that it is there."""
        name, data = self.shard.format(len(self.state["shards"])), shards.encode(rows)
        storage.write_atomically(self.folder / name, data)
        self.number += len(rows)
        digest = hashlib.sha256(data).hexdigest()
        self.state["shards"].append({"file": name, "rows": len(rows), "bytes": len(data), "sha256": digest})
        self.state["text_tokens"] += sum(row["text_length"] for row in rows)
        self.state["prompt_tokens"] += sum(row["prompt_length"] for row in rows)
        self.ledger.settle(self.documents())
        self.state |= {
            "document": self.cursor.document,
            "offset": self.cursor.offset,
            "corpus_files": self.ledger.records,
        }
        storage.write_json(self.folder / self.progress, self.state)

    def documents(self) -> int:
        """Documents that rows were made of."""
        return self.cursor.document + (self.cursor.offset > 0)

    def finish(self, versions: dict) -> dict:
        if self.number == 0 and self.part is None:
            (self.folder / filtering.scores_file(self.part)).unlink(missing_ok=True)
            self.folder.rmdir()
            together = self.rows.together
            rows = f"the {together} rows that {self.experiment.method.name} makes of one stretch,"
            raise BadInput(
                f"data.corpus: it holds fewer tokens than {'one row' if together == 1 else rows} of"
                f" {self.length}; give more text or lower the length"
            )
        if self.number < self.wanted:
            self.ledger.settle(None)
            print(
                f"warning: the corpus{' of this part' if self.part else ''} ended after {self.number} of"
                f" {self.wanted} rows; data.tokens asks for more text than there is",
                file=sys.stderr,
            )
        if self.ledger.records is None and self.state.get("corpus_commit") is None:
            print(
                "warning: data.corpus: the hub did not say which version of the dataset was read, so that"
                " another would not be noticed in going on",
                file=sys.stderr,
            )
        tokens = self.state["text_tokens"] + self.state["prompt_tokens"]
        if self.recipe.data.packing == "document" and tokens < self.number * self.length:
            print(
                f"warning: rows end with their documents (data.packing=document): {self.number} of them hold"
                f" {tokens} tokens, {tokens / (self.number * self.length):.0%} of what data.tokens counts;"
                " raise it, or set data.packing=cut",
                file=sys.stderr,
            )
        manifest = {
            **_noted(self.expected),
            "rows": self.number,
            "tokens": tokens,
            "text_tokens": self.state["text_tokens"],
            "prompt_tokens": self.state["prompt_tokens"],
            "documents": self.documents(),
            "corpus_ended": self.number < self.wanted,
            "corpus_files": self.ledger.records,
            **{key: self.state[key] for key in ("corpus_commit", "chosen_by") if self.state.get(key)},
            **parts.filtered([self.ranked.record] if self.ranked else []),
            "shards": self.state["shards"],
            "versions": versions,
        }
        storage.write_json(self.folder / self.finished, manifest)
        (self.folder / self.progress).unlink(missing_ok=True)
        return manifest
