"""Sliding-window perplexity: the same words scored with more and more context before them.

The text is scored piece by piece, each piece about ``stride`` tokens; at a length of n tokens a piece is read with the n - stride tokens before
it.  The pieces are the same at every length (they start where the longest window first fits), so a model that uses far context must score
lower at greater lengths.  Windows are cut between words, for the harness passes text: a word must fall into the same tokens with and without what
stands before it.
"""

import bisect
import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

from endprompt import BadInput, corpus
from endprompt.eval import intervals


class Text:
    """A document with its tokens' ends and its cuts: the places between two words where windows may begin and end."""

    def __init__(self, text: str, tokenizer):
        self.text = text
        # (characters before, tokens before) each place where one space parts two words; the space belongs to the word after it.
        ends = [end for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]
        self.tokens = len(ends)
        places = [at for at in range(1, len(text) - 1) if text[at] == " " and not text[at - 1].isspace() and not text[at + 1].isspace()]
        self.cuts = [(at, bisect.bisect_right(ends, at)) for at in places]
        self.counts = [count for _, count in self.cuts]

    def before(self, tokens: int) -> int:
        """The last cut with at most ``tokens`` tokens before it, as an index into ``cuts``; -1 if there is none."""
        return bisect.bisect_right(self.counts, tokens) - 1


def held_out(source: str, tokenizer, longest: int, stride: int, budget: int) -> list[Text]:
    """As many documents of ``source`` (a path, or a dataset of the hub) as ``budget`` scored tokens in windows up to ``longest`` need, in order.

    Raises BadInput if it cannot be read.
    """
    found, scored = [], 0
    data = SimpleNamespace(corpus=source, text_column="text", split="train")
    reader = SimpleNamespace(data=data, path=lambda value: Path(value) if Path(value).exists() else None)
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
        raise BadInput(str(error).replace("data.corpus", "eval.perplexity_corpus")) from None


def windows(texts: Iterable[Text], length: int, longest: int, stride: int, budget: int, special: int = 0) -> list[dict]:
    """{"context", "continuation", "tokens" of the continuation, "length"} over ``texts``, in order, up to ``budget`` scored tokens.

    ``special``: tokens that the tokenizer puts before a text, which count into ``length``.  Raises ValueError if no document holds ``longest``
    tokens or the stride leaves a window without context.
    """
    if stride >= length - special - 1:
        raise ValueError(f"a stride of {stride} leaves no context in windows of {length}")
    found, scored = [], 0
    for text in texts:
        for end in range(longest, text.tokens + 1, stride):
            if scored >= budget:
                return found
            first, last = text.before(end - stride), text.before(end)
            # One token less than fits: some tokenizers write the first word of a text with one more.
            start = bisect.bisect_left(text.counts, text.cuts[last][1] - (length - special - 1)) if last >= 0 else -1
            if not 0 <= start < first < last:
                continue  # no words to cut between, as in a stretch of symbols
            (begin, _), (split, before), (stop, after) = text.cuts[start], text.cuts[first], text.cuts[last]
            found.append({"context": text.text[begin:split], "continuation": text.text[split:stop], "tokens": after - before, "length": length})
            scored += after - before
    if not found:
        raise ValueError(f"no document holds {longest} tokens; give longer held-out documents or smaller lengths")
    return found


def summary(pieces: list[dict], nats: list[float]) -> dict:
    """{"metric", "score": perplexity, "low", "high", "samples": windows, "nats" a token, "tokens"} of pieces that have ``nats`` of negative
    log-likelihood each; the interval is a bootstrap over windows."""
    tokens = [piece["tokens"] for piece in pieces]
    mean = sum(nats) / sum(tokens)
    low, high = intervals.bootstrap([loss / count for loss, count in zip(nats, tokens, strict=True)], tokens)
    return {"metric": "perplexity", "score": math.exp(mean), "low": math.exp(low), "high": math.exp(high), "samples": len(pieces), "nats": mean, "tokens": sum(tokens)}
