"""Corpus -> tokenized stream -> rows with explicit positions.

Everything random about a row comes from (seed, row number), so the rows do not depend on the number of
workers.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from endprompt import BadInput, matching, positions
from endprompt.config import END_PROMPTS, Recipe
from endprompt.methods import Method


@dataclass(frozen=True)
class EndPrompt:
    name: str
    text: str
    ids: np.ndarray


def end_prompts(recipe: Recipe, tokenizer) -> list[EndPrompt]:
    """The recipe's prompts, tokenized.  Raises BadInput if one is a special token that the tokenizer lacks,
    or unreadable to it.
    """
    result = []
    for name in recipe.data.end_prompts:
        text = END_PROMPTS.get(name, name)
        if re.fullmatch(r"EP_\w+", text):
            raise BadInput(
                f"data.end_prompts: there is no prompt {name}; use {', '.join(END_PROMPTS)}, or write the"
                " text itself"
            )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if re.fullmatch(r"<\S+>", text) and len(ids) != 1:
            raise BadInput(
                f"data.end_prompts: this tokenizer has no special token {text} (it would become {len(ids)}"
                " pieces); choose another prompt"
            )
        if not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
            raise BadInput(f"data.end_prompts: this tokenizer cannot write {text!r}; choose another prompt")
        result.append(EndPrompt(name if name in END_PROMPTS else "custom", text, np.array(ids, np.int32)))
    return result


class Cursor:
    """The corpus as one stream of tokens that remembers where it stands: (documents finished, tokens taken of
    the next).
    """

    def __init__(self, stream: Iterator[tuple[str, np.ndarray]], document: int, offset: int):
        self._stream, self.document, self.offset = stream, document, offset
        self._current: tuple[str, np.ndarray] | None = None

    def _load(self) -> tuple[str, np.ndarray] | None:
        if self._current is None:
            self._current = next(self._stream, None)
        return self._current

    def _advance(self, count: int, length: int) -> None:
        """length: tokens of the document that it stands in."""
        self.offset += count
        if self.offset >= length:
            self._current, self.document, self.offset = None, self.document + 1, 0

    def take(self, count: int) -> tuple[np.ndarray, list[str]] | None:
        """The next ``count`` tokens and the ids of the documents they come from; None if the corpus ends
        before.
        """
        parts, names, missing = [], [], count
        while missing:
            if (current := self._load()) is None:
                return None
            name, ids = current
            part = ids[self.offset : self.offset + missing]
            parts.append(part)
            names.append(name)
            missing -= len(part)
            self._advance(len(part), len(ids))
        return np.concatenate(parts), names

    def take_document(self, count: int) -> tuple[np.ndarray, list[str]] | None:
        """The first ``count`` tokens, or fewer, of the next document; the rest of it is passed over."""
        if (current := self._load()) is None:
            return None
        name, ids = current
        self._advance(len(ids), len(ids))
        return ids[:count], [name]


def recall_spans(recipe: Recipe, length: int) -> np.ndarray:
    """Int64 lengths [m] of the spans that end a row of ``length`` tokens: as many as ``data.recall_share``
    has room for, at least one.

    Raises BadInput if they leave less text than one of them repeats.
    """
    span = recipe.data.recall_cue + recipe.data.recall_tokens
    count = max(1, int(recipe.data.recall_share * length) // span)
    if (count + 1) * span > length:
        raise BadInput(
            f"lengths.physical: rows of {length} tokens leave too little text beside {count} repeated spans"
            f" of {span} tokens (data.recall_cue + data.recall_tokens); raise it, or make the spans shorter"
        )
    return np.full(count, span, np.int64)


def recall(
    text: np.ndarray, spans: np.ndarray, cue: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(ids [sum of spans] that repeat ``text`` [a], one span from each of places drawn uniformly; their
    float32 loss weights, 0 for the first ``cue`` tokens of a span, which nothing predicts, and 1 for the
    rest, which follow from them and the text).
    """
    starts = [int(rng.integers(0, len(text) - span, endpoint=True)) for span in spans]
    weights = [np.arange(span) >= cue for span in spans]
    return np.concatenate(
        [text[start : start + span] for start, span in zip(starts, spans, strict=True)]
    ), np.concatenate(weights).astype(np.float32)


def rows_at_once(recipe: Recipe, method: Method) -> int:
    """How many rows are made of one stretch of the corpus; between them the cursor stands behind all of
    it.
    """
    return max(1, recipe.lengths.target // recipe.row_length(method)) if method.matched else 1


def _matched_rows(
    recipe: Recipe, length: int, count: int, cursor: Cursor, rng: np.random.Generator
) -> list[tuple[np.ndarray, list[str]]]:
    """(ids [length], ids of the documents) of the ``count`` rows that the next tokens make; none at the end
    of the corpus.
    """
    together = recipe.data.match_pieces
    taken = []
    for _ in range(count * together):
        if (piece := cursor.take(length // together)) is None:
            return []
        taken.append(piece)
    found = matching.groups(np.stack([ids for ids, _ in taken]), together, recipe.data.match_tokens, rng)
    return [
        (
            np.concatenate([taken[number][0] for number in group]),
            list(dict.fromkeys(name for number in group for name in taken[number][1])),
        )
        for group in found
    ]


def row_maker(
    recipe: Recipe, method: Method, prompts: list[EndPrompt]
) -> Callable[[int, Cursor], dict | None]:
    """A function (row number, cursor) -> row of the shard schema, None at the end of the corpus.

    With ``data.pose_text: later_span`` the chunks of a chunked row are spread over the first target_length
    tokens of its document, as github.com/dwzhu-pku/PoSE does; the positions are those of contiguous text.
    """
    length, target = recipe.row_length(method), recipe.lengths.target
    later = method.chunked and not method.matched and recipe.data.pose_text == "later_span"
    spans = recall_spans(recipe, length) if method.recall else np.zeros(0, np.int64)
    longest = max((len(prompt.ids) for prompt in prompts), default=0)
    if longest >= length:
        raise BadInput(
            f"lengths.physical: rows of {length} tokens leave no room for text beside an end prompt of"
            f" {longest}; raise it"
        )

    at_once = rows_at_once(recipe, method)
    waiting: list[tuple[np.ndarray, list[str]]] = []
    if method.matched and recipe.data.packing != "cut":
        raise BadInput(
            f"data.packing: {method.name} takes stretches of {at_once * length} tokens apart, whatever"
            " documents they are of; set data.packing=cut"
        )
    if method.matched and length % recipe.data.match_pieces:
        raise BadInput(
            f"data.match_pieces: rows of {length} tokens (lengths.physical) cannot be cut into"
            f" {recipe.data.match_pieces} equal pieces; change one of them"
        )

    def make(number: int, cursor: Cursor) -> dict | None:
        rng = np.random.default_rng([recipe.data.seed, number])
        prompt = prompts[int(rng.integers(len(prompts)))] if prompts else None
        b = len(prompt.ids) if prompt else int(spans.sum())
        if method.matched:
            waiting[:] = waiting or _matched_rows(recipe, length, at_once, cursor, rng)
            taken = waiting.pop(0) if waiting else None
        else:
            taken = (
                cursor.take(length - b)
                if recipe.data.packing == "cut"
                else cursor.take_document(target if later else length - b)
            )
        if taken is None:
            return None
        text, names = taken
        a = min(len(text), length - b)
        repeated = spans if spans.max(initial=0) <= a else spans[:0]  # a document may be shorter than a span
        parts: Any = a  # or the lengths of chunks, as the plan takes them
        if method.matched:
            parts = np.full(recipe.data.match_pieces, length // recipe.data.match_pieces, np.int64)
        elif method.chunked:
            parts = positions.chunk_lengths(a, recipe.data.pose_chunks, rng)
        assert method.plan is not None, f"{method.name} trains nothing and has no rows"
        position_ids = method.plan(parts, repeated if method.recall else b, target, rng)
        positions.check(position_ids, target)
        if later:
            text = text[positions.spread(parts, len(text), rng)]
        ending, ending_weights = text[:0], np.zeros(0, np.float32)
        if prompt:
            ending, ending_weights = prompt.ids, np.full(b, recipe.data.prompt_loss_weight, np.float32)
        elif len(repeated):
            ending, ending_weights = recall(text, repeated, recipe.data.recall_cue, rng)
        weights = np.concatenate([np.ones(a, np.float32), ending_weights])
        weights[0] = 0  # nothing predicts the first token
        return {
            "input_ids": np.concatenate([text, ending]),
            "position_ids": position_ids.astype(np.int32),
            "loss_weights": weights,
            "text_length": a,
            "prompt_length": len(ending),
            "prompt_name": prompt.name if prompt else "recall" if len(ending) else "",
            "document_ids": names,
        }

    return make
