"""Rows that end in spans of their own text, repeated at far positions."""

import numpy as np
from pydantic import Field

from endprompt import BadInput
from endprompt.methods.base import register
from endprompt.methods.pose import Chunked, ChunkOptions, PoseRows
from endprompt.positions import plans


class RecallOptions(ChunkOptions):
    recall_share: float = Field(0.25, gt=0, le=0.5, description="of a row's tokens that repeat")
    recall_cue: int = Field(
        4, gt=0, description="tokens of a repeated span that name the place, without loss"
    )
    recall_tokens: int = Field(16, gt=0, description="tokens of a repeated span after its cue")


def repeated(
    text: np.ndarray, spans: np.ndarray, cue: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(ids [sum of spans] that repeat ``text`` [a], one span from each of places drawn uniformly; their
    float32 loss weights, 0 for the first ``cue`` tokens of a span, which nothing predicts, and 1 for the
    rest, which follow from them and the text).
    """
    starts = [int(rng.integers(0, len(text) - span, endpoint=True)) for span in spans]
    weights = [np.arange(span) >= cue for span in spans]
    ids = [text[start : start + span] for start, span in zip(starts, spans, strict=True)]
    return np.concatenate(ids), np.concatenate(weights).astype(np.float32)


class RecallRows(PoseRows):
    uniform = False

    def __init__(self, setting):
        super().__init__(setting)
        options = self.options
        span = options.recall_cue + options.recall_tokens
        count = max(1, int(options.recall_share * self.length) // span)
        if (count + 1) * span > self.length:
            raise BadInput(
                f"lengths.physical: rows of {self.length} tokens leave too little text beside {count}"
                f" repeated spans of {span} tokens (method_options.recall_cue +"
                " method_options.recall_tokens); raise it, or make the spans shorter"
            )
        self.spans = np.full(count, span, np.int64)

    def build(self, cursor, rng):
        room = self.length - int(self.spans.sum())
        if (taken := self.take_chunks(cursor, room)) is None:
            return None
        text, documents = taken
        chunks = self.chunks(text, room, rng)
        a = int(chunks.sum())
        spans = self.spans if self.spans[0] <= a else self.spans[:0]  # a document may be shorter than a span
        position_ids = plans.skipwise_then_recall(chunks, spans, self.target_length, rng)
        text = self.chosen(text, chunks, rng)
        if not len(spans):
            return self.row(text, position_ids, documents)
        ending, weights = repeated(text, spans, self.options.recall_cue, rng)
        return self.row(text, position_ids, documents, ending, weights, "recall")


@register
class PoseRecall(Chunked):
    name = "pose_recall"
    summary = "pose_sharp, whose rows end in spans of their own text repeated at far positions"
    Options = RecallOptions
    Rows = RecallRows
    rope = "yarn"
    sharpening = 1.0
