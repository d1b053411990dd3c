"""Sliding-window perplexity: the same words scored with more and more context before them.

The text is scored piece by piece, each piece about ``stride`` tokens; at a length of n tokens a piece is read
with the n - stride tokens before it.  The pieces are the same at every length (they start where the longest
window first fits, and one that cannot be cut at some length is left out at all), so a model that uses far
context must score lower at greater lengths.  Windows are cut between words, for the harness passes text: a
word must fall into the same tokens with and without what stands before it.  A text without words to cut
between, as Chinese is, is cut between tokens, where that leaves the tokens around as they are.
"""

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from endprompt import BadInput
from endprompt.evaluation import intervals
from endprompt.rows import corpus

FEW_WORDS = 16  # tokens a place between two words, of a text that is cut between tokens
AROUND = 32  # tokens on each side that must not change where a text is cut between two
TRIES = 64  # places that are tried, one after the other


class Text:
    """A document with its tokens' ends and its cuts: the places between two words where windows may begin and
    end.

    Where the document has a word for fewer than one in FEW_WORDS of its tokens, the places are those between
    two tokens; ``between_tokens`` says so.
    """

    def __init__(self, text: str, tokenizer):
        self.text, self.tokenizer = text, tokenizer
        # (characters before, tokens before) each place where one space parts two words; the space belongs to
        # the word after it.
        self.spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        ends = [end for _, end in self.spans]
        self.tokens = len(ends)
        places = [
            at
            for at in range(1, len(text) - 1)
            if text[at] == " " and not text[at - 1].isspace() and not text[at + 1].isspace()
        ]
        self.cuts = [(at, bisect.bisect_right(ends, at)) for at in places]
        self.between_tokens = FEW_WORDS * len(self.cuts) < self.tokens
        if self.between_tokens:
            self.cuts = [
                (end, number)
                for number, (end, (start, _)) in enumerate(zip(ends, self.spans[1:], strict=False), 1)
                if 0 < end <= start and not text[end - 1].isspace()
            ]
        self.counts = [count for _, count in self.cuts]
        self._stable: dict[int, bool] = {}

    def ids(self, start: int, end: int) -> list[int]:
        """The tokens of characters ``start`` to ``end`` by themselves."""
        return self.tokenizer(self.text[start:end], add_special_tokens=False, verbose=False)["input_ids"]

    def _leaves_tokens(self, index: int) -> bool:
        """Whether the tokens before cut ``index`` stay what they are once the text goes on behind it."""
        if index not in self._stable:
            at, before = self.cuts[index]
            start, end = (
                self.spans[max(0, before - AROUND)][0],
                self.spans[min(self.tokens, before + AROUND) - 1][1],
            )
            alone = self.ids(start, at)
            self._stable[index] = self.ids(start, end)[: len(alone)] == alone
        return self._stable[index]

    def before(self, tokens: int) -> int:
        """The last cut with at most ``tokens`` tokens before it, as an index into ``cuts``; -1 if there is
        none.
        """
        last = bisect.bisect_right(self.counts, tokens) - 1
        if not self.between_tokens:
            return last
        return next(
            (index for index in range(last, max(-1, last - TRIES), -1) if self._leaves_tokens(index)), -1
        )

    def fits(self, start: int, first: int, last: int, room: int) -> bool:
        """Whether the harness, which is given the two texts between the cuts ``start``, ``first`` and
        ``last``, splits them into these cuts' tokens, ``room`` at most.
        """
        (begin, _), (split, before), (stop, after) = (self.cuts[index] for index in (start, first, last))
        context, whole = self.ids(begin, split), self.ids(begin, stop)
        return (
            whole[: len(context)] == context
            and len(whole) - len(context) == after - before
            and len(whole) <= room
        )

    def start(self, first: int, last: int, room: int) -> int:
        """The cut at which a window of ``room`` tokens begins whose last words are those between the cuts
        ``first`` and ``last``; -1 if there is none before them."""
        # One token less than fits: some tokenizers write the first word of a text with one more.
        start = bisect.bisect_left(self.counts, self.cuts[last][1] - (room - 1))
        if not self.between_tokens:
            return start if start < first else -1
        tried = range(start, min(first, start + TRIES))
        return next((begin for begin in tried if self.fits(begin, first, last, room)), -1)


def held_out(
    source: str, tokenizer, longest: int, stride: int, budget: int, column: str = "text"
) -> list[Text]:
    """As many documents of ``source`` (a path, or a dataset of the hub) as ``budget`` scored tokens in
    windows up to ``longest`` need, in order.

    column: the field of a row that holds the text.  Raises BadInput if it cannot be read.
    """
    found, scored = [], 0
    data = SimpleNamespace(corpus=source, text_column=column, split="train")
    # What the corpus' functions take of a recipe.
    reader: Any = SimpleNamespace(data=data, path=lambda value: Path(value) if Path(value).exists() else None)
    try:
        for _, text in corpus.documents(reader, corpus.local_files(reader, corpus.HELD_OUT)):
            document = Text(text, tokenizer)
            if document.tokens >= longest:
                found.append(document)
                scored += (document.tokens - longest) // stride * stride
            if scored >= budget:
                break
        return found
    except BadInput as error:
        message = (
            str(error)
            .replace("data.corpus", "eval.perplexity_corpus")
            .replace("data.text_column", "eval.perplexity_column")
        )
        raise BadInput(message) from None


@dataclass(frozen=True)
class Scored:
    """What is scored of texts.  longest: tokens of a text before which nothing is; stride: tokens of a piece;
    budget: tokens in all; lengths: those at which the same words are scored, so that what cannot be cut at
    one of them is left out."""

    longest: int
    stride: int
    budget: int
    lengths: tuple[int, ...] = ()


def windows(texts: Iterable[Text], length: int, asked: Scored, special: int = 0) -> list[dict]:
    """{"context", "continuation", "tokens" of the continuation, "length"} over ``texts``, in order, up to
    the budget.

    ``special``: tokens that the tokenizer puts before a text, which count into ``length``.  Raises
    ValueError if no document holds ``asked.longest`` tokens, none that does can be cut, or the stride leaves
    a window without context.
    """
    longest, stride = asked.longest, asked.stride
    if stride >= length - special - 1:
        raise ValueError(f"a stride of {stride} leaves no context in windows of {length}")
    rooms = {each - special for each in asked.lengths if stride < each - special - 1} | {length - special}
    found: list[dict] = []
    scored, held = 0, False
    for text in texts:
        for end in range(longest, text.tokens + 1, stride):
            held = True
            if scored >= asked.budget:
                return found
            first, last = text.before(end - stride), text.before(end)
            if not 0 <= first < last:
                continue  # no words to cut between, as in a stretch of symbols
            starts = {room: text.start(first, last, room) for room in rooms}
            if min(starts.values()) < 0:
                continue
            (begin, _), (split, before), (stop, after) = (
                text.cuts[index] for index in (starts[length - special], first, last)
            )
            found.append(
                {
                    "context": text.text[begin:split],
                    "continuation": text.text[split:stop],
                    "tokens": after - before,
                    "length": length,
                }
            )
            scored += after - before
    if not found and held:
        raise ValueError(
            f"no document that holds {longest} tokens has places where it can be cut without changing its"
            " tokens, neither between words nor between tokens; give other held-out documents"
        )
    if not found:
        raise ValueError(
            f"no document holds {longest} tokens; give longer held-out documents or smaller lengths"
        )
    return found


def summary(pieces: list[dict], nats: list[float]) -> dict:
    """{"metric", "score": perplexity, "low", "high", "samples": windows, "nats" a token, "tokens"} of pieces
    that have ``nats`` of negative log-likelihood each; the interval is a bootstrap over windows.
    """
    tokens = [piece["tokens"] for piece in pieces]
    mean = sum(nats) / sum(tokens)
    low, high = intervals.bootstrap([loss / count for loss, count in zip(nats, tokens, strict=True)], tokens)
    return {
        "metric": "perplexity",
        "score": math.exp(mean),
        "low": math.exp(low),
        "high": math.exp(high),
        "samples": len(pieces),
        "nats": mean,
        "tokens": sum(tokens),
    }
