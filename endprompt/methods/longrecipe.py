"""LongRecipe (arXiv 2409.00509): a gap of positions at the end of every sentence.

After github.com/zhiyuanhubj/LongRecipe, preprocess_token_PI/FSProcessor.py and utils/preprocess_data.py.  The
L - n positions that a row of n tokens leaves out stand between its sentences, every way to spread them
equally likely; the first tokens, as many as PoSE's first chunk, have no gap.  The base frequency is raised,
and the trained weights are averaged half and half with the base's.

What is not here: the selection of tokens by how much a long context moves their logits, and the second
training on short text at a tenth of the learning rate; the source does not fix the data of either.  There the
ends of sentences are five tokens of Llama-3; here they are all tokens whose text ends in a mark.
"""

import functools

import numpy as np
from pydantic import Field, field_validator

from endprompt import BadInput
from endprompt.methods.base import Method, Options, Rows, register

CLOSING = " \t\"'\u201d\u2019)]\u300d\u300f"  # what may follow a mark in a token


class SentenceOptions(Options):
    sentence_marks: str = Field(
        ".!?\n\u3002\uff01\uff1f", min_length=1, description="the characters that end a sentence"
    )

    @field_validator("sentence_marks")
    @classmethod
    def kept(cls, value):
        if found := set(value) & set(CLOSING):
            raise ValueError(f"{min(found)!r} may follow a mark and is none; remove it")
        return value


def endings(tokenizer, marks: str) -> np.ndarray:
    """The ids whose text ends in one of ``marks``, quotes and spaces behind it left out; and the end of a
    document."""
    texts = tokenizer.batch_decode([[number] for number in range(len(tokenizer))])
    found = [number for number, text in enumerate(texts) if text.rstrip(CLOSING).endswith(tuple(marks))]
    return np.array(sorted({*found, tokenizer.eos_token_id}), np.int64)


def spaced(ends: np.ndarray, L: int, rng: np.random.Generator) -> np.ndarray:
    """Int64 [n] positions of a row, from ``ends`` [n] (bool: whether a sentence ends with the token).  Raises
    ValueError if n tokens do not fit into L."""
    n = len(ends)
    if not 0 < n <= L:
        raise ValueError(f"{n} tokens do not fit into {L} positions")
    together = int(rng.integers(1, (n + 1) // 2, endpoint=True))
    sentence = np.concatenate([[0], np.cumsum(ends[:-1])])
    count = int(sentence[-1]) + 1
    skips = np.sort(rng.choice(L - n + count, count, replace=False)) - np.arange(count)
    skips[0] = 0
    return np.arange(n) + np.where(np.arange(n) < together, 0, skips[sentence])


class SentenceRows(Rows):
    of_text = True

    @functools.cached_property
    def endings(self) -> np.ndarray:
        """Raises BadInput if no token ends a sentence."""
        found = endings(self.setting.tokenizer, self.options.sentence_marks)
        if len(found) == 1:  # the end of a document
            raise BadInput(
                f"method_options.sentence_marks: no token of this tokenizer ends in any of"
                f" {self.options.sentence_marks!r}; name marks that its text has"
            )
        return found

    def build(self, cursor, rng):
        if (taken := self.take(cursor, self.length)) is None:
            return None
        text, documents = taken
        return self.row(text, spaced(np.isin(text, self.endings), self.target_length, rng), documents)


@register
class LongRecipe(Method):
    name = "longrecipe"
    summary = "a gap of positions at the end of every sentence; weights averaged with the base's"
    Options = SentenceOptions
    Rows = SentenceRows
    rope = "theta"
    base_share = 0.5
