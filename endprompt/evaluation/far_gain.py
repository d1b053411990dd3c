"""What far context is worth: the loss of the same words of natural documents, once with all of the context
and once with the last C tokens of it, C being the base's window.

A positive gain says that the model uses what lies beyond C, without any instruction.  A document is parted
into stretches of the greatest length; the last words of a stretch are scored, with the n or the C tokens that
end in them, so that at every length the same words are scored.  Texts are cut as perplexity's windows are,
between words.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lm_eval.api.instance import Instance

from endprompt import BadInput
from endprompt.evaluation import intervals, perplexity
from endprompt.evaluation.perplexity import Text
from endprompt.rows import corpus


@dataclass(frozen=True)
class Limits:
    """original: C; longest: the greatest length, which a document must hold; tokens: that are scored of a
    text; texts: at most; lengths: all at which the same words are scored."""

    original: int
    longest: int
    tokens: int
    texts: int
    lengths: tuple[int, ...] = ()

    def check(self, special: int) -> None:
        """Raises BadInput if C is too short for what is scored; special: as in ``pieces``."""
        if self.tokens >= self.original - special - 1:
            raise BadInput(
                f"eval.far_gain_tokens {self.tokens} leave no context in the base's window of"
                f" {self.original}; lower it"
            )


def documents(source: str, tokenizer, longest: int, texts: int, column: str = "text") -> list[Text]:
    """The first documents of ``source`` (a path, or a dataset of the hub) that hold ``longest`` tokens, at
    most ``texts``.

    column: the field of a row that holds the text.  Raises BadInput if it cannot be read.
    """
    found: list[Text] = []
    data = SimpleNamespace(corpus=source, text_column=column, split="train")
    # What the corpus' functions take of a recipe.
    reader: Any = SimpleNamespace(data=data, path=lambda value: Path(value) if Path(value).exists() else None)
    try:
        for _, text in corpus.documents(reader, corpus.local_files(reader, corpus.HELD_OUT)):
            document = Text(text, tokenizer)
            if document.tokens >= longest:
                found.append(document)
            if len(found) == texts:
                break
        return found
    except BadInput as error:
        message = (
            str(error)
            .replace("data.corpus", "eval.perplexity_corpus")
            .replace("data.text_column", "eval.perplexity_column")
        )
        raise BadInput(message) from None


def _ends(found: list[Text], longest: int) -> Iterator[tuple[int, int]]:
    """(number of the document, tokens at which a text ends): the first text of every document, then the
    second, so that many documents come before many texts of one; texts do not overlap."""
    for part in range(1, 1 + max((text.tokens // longest for text in found), default=0)):
        for number, text in enumerate(found):
            if text.tokens >= part * longest:
                yield number, part * longest


def pieces(found: list[Text], length: int, limits: Limits, special: int = 0) -> list[dict]:
    """{"far", "near": contexts, "continuation": what is scored, "tokens" of it, "document", "length"} of the
    texts of ``found``.

    special: tokens that the tokenizer puts before a text, which count into ``length`` and C.  Raises
    ValueError if there is no such text, BadInput if C is too short for what is scored.
    """
    limits.check(special)
    made: list[dict] = []
    shared = (length, limits.original, *limits.lengths)
    for number, end in _ends(found, limits.longest):
        if len(made) == limits.texts:
            break
        asked = perplexity.Scored(end, limits.tokens, 1, shared)
        try:
            far, near = (
                perplexity.windows([found[number]], window, asked, special)[0]
                for window in (length, limits.original)
            )
        except ValueError:
            continue  # there is nowhere to cut it, as in a stretch of symbols
        if far["continuation"] == near["continuation"]:
            about = {"continuation": far["continuation"], "tokens": far["tokens"], "document": number}
            made.append({"far": far["context"], "near": near["context"], **about, "length": length})
    if not made:
        raise ValueError(
            f"no held-out document holds {limits.longest} tokens and can be cut into a text with"
            f" {limits.tokens} tokens to score; give longer documents or smaller lengths"
        )
    return made


class FarGain:
    """The task at one length, a text a piece (``progress.Pieces``).

    lm: the harness' model, which is asked for log-likelihoods.  made: what ``pieces`` returned.
    """

    noun = "texts"

    def __init__(self, lm, made: list[dict]):
        self.lm, self.made, self.total = lm, made, len(made)

    def rows(self, number: int) -> list[dict]:
        piece, losses = self.made[number], {}
        for context in ("far", "near"):  # by themselves: together, the shorter would be padded
            asked = Instance("loglikelihood", piece, (piece[context], piece["continuation"]), 0)
            ((log_likelihood, _),) = self.lm.loglikelihood([asked], disable_tqdm=True)
            losses[context] = -log_likelihood
        return [{**losses, "tokens": piece["tokens"], "document": piece["document"]}]

    def summary(self, rows: list[dict]) -> dict:
        return summary(rows)

    def predictions(self, rows: list[dict]) -> list[dict]:
        return rows


def summary(rows: list[dict]) -> dict:
    """{"metric", "score": mean gain in nats a token, "low", "high", "samples": texts, "documents", "far",
    "near": losses in nats a token, "tokens"} of rows with "far" and "near", the nats of "tokens" tokens.

    The interval is a bootstrap over documents, for texts of one document are alike; over texts where there is
    but one document.
    """
    tokens = sum(row["tokens"] for row in rows)
    near, far = (math.fsum(row[context] for row in rows) / tokens for context in ("near", "far"))
    several = len({row["document"] for row in rows}) > 1
    groups: dict[int, list[dict]] = defaultdict(list)
    for number, row in enumerate(rows):
        groups[row["document"] if several else number].append(row)
    weights = [sum(row["tokens"] for row in group) for group in groups.values()]
    gains = [
        math.fsum(row["near"] - row["far"] for row in group) / weight
        for group, weight in zip(groups.values(), weights, strict=True)
    ]
    low, high = intervals.bootstrap(gains, [float(weight) for weight in weights])
    return {
        "metric": "gain in nats a token",
        "score": near - far,
        "low": low,
        "high": high,
        "samples": len(rows),
        "documents": len({row["document"] for row in rows}),
        "far": far,
        "near": near,
        "tokens": tokens,
    }
