"""The documents of a corpus in which the base gains most from far context (``data.filter_share``).

After LongFilter (arXiv 2510.25804), known from its abstract alone: cross entropy with short context minus
that with long context, a mean a document, of which the top is kept.  Open there are the two lengths, and how
much of a document is read.  Here the long context is the base's window C, and a document is read in some
windows of C tokens, evenly from its start to its end, of which the last ``short // 2`` tokens are scored.

As many documents are ranked as the rows need: the first ones that hold ``data.tokens / filter_share`` tokens.
A document's score depends on the document and the base alone.  Scores are written as they are made, beside
the shards, so that a killed run goes on.
"""

import hashlib
import math
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from endprompt import BadInput, Failure, storage
from endprompt.bases import gain
from endprompt.recipe.experiment import Experiment

DIGITS = 6  # of a score


def scores_file(part: tuple[int, int] | None) -> str:
    """The name of the file of the scores of part (i, n) of the shards, or of the whole."""
    return "scores.jsonl" if part is None else f"scores-{part[0]:05d}-of-{part[1]:05d}.jsonl"


def settings(experiment: Experiment) -> dict[str, Any] | None:
    """What the manifest says of the filter that is asked for; None without one.  Raises BadInput if the short
    context does not fit the base's window."""
    data = experiment.recipe.data
    if data.filter_share is None:
        return None
    window = experiment.base.window
    short = window // 4 if data.filter_short is None else data.filter_short
    if not 4 <= short <= window // 2:
        raise BadInput(
            f"data.filter_short {short} is not from 4 to {window // 2}, half the base's window of {window},"
            " against which it is told; change it, or leave the filter out"
        )
    return {"share": data.filter_share, "short": short, "long": window, "windows": data.filter_windows}


def windows(
    ids: np.ndarray, asked: dict[str, Any], start: int | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """(far int32 [n, long], near [n, short]): the windows in which a document is read; None if it holds no
    more than the short context.

    ids: of the document, with the token ``start`` that is put before every text, or None, and the end token.
    A document shorter than the window is read whole, once.
    """
    first = [] if start is None else [start]
    body = ids[len(first) : -1]
    short, long = asked["short"] - len(first), min(asked["long"] - len(first), len(body))
    if long <= short:
        return None
    count = min(asked["windows"], len(body) // long)
    ends = np.linspace(long, len(body), count).astype(int) if count > 1 else [len(body)]
    far, near = (
        np.stack([np.concatenate([first, body[end - length : end]]) for end in ends]).astype(np.int32)
        for length in (long, short)
    )
    return far, near


@dataclass(frozen=True)
class Ranked:
    """kept: the numbers of the documents that are kept, ascending, among those that were read; record: what
    the manifest says of it."""

    kept: list[int]
    record: dict[str, Any]

    def select(self, documents: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """Those of ``documents`` that are kept."""
        wanted = set(self.kept)
        for number, document in zip(range(self.kept[-1] + 1), documents, strict=False):
            if number in wanted:
                yield document


def _is_score(row: list) -> bool:
    """Whether ``row`` is a document's id, tokens, digest and score."""
    return [*map(type, row[:3])] == [str, int, str] and [*map(type, row[3:])] in ([float], [type(None)])


def top(weights: list[int], scores: list[float | None], share: float) -> tuple[list[int], float | None]:
    """(numbers of the documents, ascending; the least score among them, or None if one without a score is
    there): the highest scores first, until they hold ``share`` of all ``weights``.  Of equal ones the earlier
    comes first, and those without a score come last."""
    order = sorted(
        range(len(scores)), key=lambda number: (scores[number] is None, -(scores[number] or 0.0), number)
    )
    kept, left = [], share * sum(weights)
    for number in order:
        if left <= 0:
            break
        kept.append(number)
        left -= weights[number]
    return sorted(kept), scores[kept[-1]]


class Ranking:
    """Scores the first documents of a corpus, and says which to keep."""

    def __init__(self, experiment: Experiment, tokenizer, asked: dict[str, Any], enough: tuple[int, int]):
        """asked: ``settings``.  enough: (tokens, documents) that must be kept, as far as the corpus goes."""
        self.experiment, self.tokenizer, self.asked, self.enough = experiment, tokenizer, asked, enough
        self.reader = gain.Reader(experiment.base)

    def score(self, ids: np.ndarray) -> float | None:
        """Nats a token that the base gains; None if the document is too short.  Raises Failure if that is no
        number."""
        start = self.tokenizer.bos_token_id
        start = start if start is not None and ids[0] == start else None
        read = windows(ids, self.asked, start)
        if read is None:
            return None
        far, near = (self.reader.losses(rows, self.asked["short"] // 2) for rows in read)
        found = float(np.mean(near - far))
        if not math.isfinite(found):
            raise Failure(
                f"data.filter_share: the base's loss is no number ({found}), so that nothing can be ranked"
            )
        return round(found, DIGITS)

    def rank(
        self, stream: Generator[tuple[str, np.ndarray], None, None], path: Path, question: dict
    ) -> Ranked:
        """``stream``: (id, token ids) of the documents in order.  path: of the scores; question: what they
        are of beside the text, the model and the settings.

        Raises BadInput if no document can be scored, or one has another text than when it was scored.
        """
        model = self.experiment.base.fingerprint
        kept = storage.Kept(path, {**question, **self.asked, "enough": self.enough, "model": model})
        if not all(map(_is_score, kept.rows)):
            raise BadInput(f"shards: {path} is not what prepare writes; delete it, and all are scored again")
        for number, (name, ids) in enumerate(self.pool(stream)):
            digest = hashlib.sha256(ids.tobytes()).hexdigest()[:16]
            if number == len(kept.rows):
                kept.add([name, len(ids), digest, self.score(ids)])
            elif kept.rows[number][:3] != [name, len(ids), digest]:
                raise BadInput(
                    f"shards: the corpus changed since {path} was begun ({name} is another text); restore it,"
                    " or delete the folder and prepare again"
                )
        tokens, scores = ([row[place] for row in kept.rows] for place in (1, 3))
        if all(score is None for score in scores):
            kept.remove()
            raise BadInput(
                f"data.filter_share: none of {len(tokens)} documents holds more than data.filter_short ="
                f" {self.asked['short']} tokens (the longest has {max(tokens, default=0)}), so nothing is far"
                " in them; lower data.filter_short, give longer documents, or leave the filter out"
            )
        return self.chosen(
            tokens, scores, {"model": model, "scores": path.name, "sha256": storage.sha256(path)}
        )

    def pool(self, stream) -> Iterator[tuple[str, np.ndarray]]:
        """The first documents of ``stream`` that hold enough, with a bar that says the time left."""
        from tqdm import tqdm

        need = [math.ceil(count / self.asked["share"]) for count in self.enough]
        which = 0 if need[0] else 1
        with tqdm(
            total=need[which],
            unit=("tok", "doc")[which],
            unit_scale=True,
            desc="rank documents",
            mininterval=0.5 if sys.stderr.isatty() else 10,
            delay=1,
            file=sys.stderr,
        ) as bar:
            there = [0, 0]
            while any(count < wanted for count, wanted in zip(there, need, strict=True)):
                if (document := next(stream, None)) is None:
                    return
                yield document
                more = len(document[1]), 1
                there = [count + one for count, one in zip(there, more, strict=True)]
                bar.update(more[which])

    def chosen(self, tokens: list[int], scores: list[float | None], about: dict[str, Any]) -> Ranked:
        weights = tokens if self.enough[0] else [1] * len(tokens)  # a row takes a document, or its tokens
        kept, threshold = top(weights, scores, self.asked["share"])
        short = sum(score is None for score in scores)
        if short:
            print(
                f"note: {short} of {len(scores)} documents hold no more than {self.asked['short']} tokens"
                " (data.filter_short); they have no score and come last",
                file=sys.stderr,
            )
        return Ranked(
            kept,
            {
                "documents": len(scores),
                "without_score": short,
                "kept": len(kept),
                "tokens": sum(tokens),
                "kept_tokens": sum(tokens[number] for number in kept),
                "threshold": threshold,
                **about,
            },
        )
