"""PoSE (arXiv 2309.10400): text in chunks, each later one shifted by a random skip; and with an end
prompt.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from endprompt import BadInput
from endprompt.methods.base import Method, Options, Rows, register
from endprompt.methods.end_prompt import EndPromptOptions, EndPromptRows
from endprompt.positions import plans


class ChunkOptions(Options):
    pose_chunks: int = Field(2, ge=2, description="parts that a row's text is cut into at random")
    pose_text: Literal["contiguous", "later_span"] = Field(
        "contiguous",
        description="later_span: as in github.com/dwzhu-pku/PoSE the chunks are spread over the first"
        " lengths.target tokens of their document; the positions are those of contiguous text",
    )


class Chunked(Method):
    """A method whose options are ``ChunkOptions``."""

    Options = ChunkOptions

    def check(self, options, packing):
        if options.pose_text == "later_span" and packing == "cut":
            raise BadInput(
                "method_options.pose_text: later_span takes chunks from later in the same document, but with"
                " data.packing: cut a row has no document of its own and the text between would be lost; set"
                " data.packing=document, or method_options.pose_text=contiguous"
            )


class Chunks(Rows):
    """How a row's text is taken and cut, for rows whose options are ``ChunkOptions``."""

    def take_chunks(self, cursor, count: int):
        """Text for ``count`` tokens: as many, or under later_span all that they may be spread over."""
        later = self.options.pose_text == "later_span"
        return self.take(cursor, count, self.target_length if later else count)

    def chunks(self, text: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """Int64 lengths [k] of the chunks of at most ``count`` tokens of ``text``."""
        return plans.chunk_lengths(min(len(text), count), self.options.pose_chunks, rng)

    def chosen(self, text: np.ndarray, chunks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The tokens of ``text`` that the chunks hold, drawn after their positions."""
        if self.options.pose_text != "later_span":
            return text
        return text[plans.spread(chunks, len(text), rng)]


class PoseRows(Chunks):
    def build(self, cursor, rng):
        if (taken := self.take_chunks(cursor, self.length)) is None:
            return None
        text, documents = taken
        chunks = self.chunks(text, self.length, rng)
        position_ids = plans.skipwise(chunks, 0, self.target_length, rng)
        return self.row(self.chosen(text, chunks, rng), position_ids, documents)


@register
class Pose(Chunked):
    name = "pose"
    summary = "text in two chunks, the second shifted by a random skip"
    Rows = PoseRows


class EndPromptPoseOptions(EndPromptOptions, ChunkOptions):
    """Those of both."""


class EndPromptPoseRows(Chunks, EndPromptRows):
    def take_text(self, cursor, count):
        return self.take_chunks(cursor, count)

    def placed(self, text, b, rng):
        chunks = self.chunks(text, self.length - b, rng)
        position_ids = plans.skipwise_then_end_prompt(chunks, b, self.target_length, rng)
        return self.chosen(text, chunks, rng), position_ids


@register
class EndPromptPose(Chunked):
    name = "endprompt_pose"
    summary = "text in chunks as in pose, end prompt at L-b..L-1"
    Options = EndPromptPoseOptions
    Rows = EndPromptPoseRows


@register
class PoseSharp(Chunked):
    """Scores times log n are Su Jianlin's (kexue.fm 8823, 2021) and Chiang and Cholak's (2202.12172); Qwen's
    logn attention, YaRN's temperature and SSMax (2501.19399) are kin, see sharpen.py.  Ours is the constant,
    folded into the queries after short rows with jumps.  Why rows of the target length teach far distances
    seldom is counted by STRING (2410.18745)."""

    name = "pose_sharp"
    summary = "pose on YaRN, attention sharpened by ln L / ln C when training is over"
    Rows = PoseRows
    rope = "yarn"
    sharpening = 1.0
