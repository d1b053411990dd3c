"""Half the rows short under the base's frequencies, half with jumps under the rescaled ones (LongRoPE2).

What arXiv 2502.20082 calls mixed context window training.  The model is saved as ``longrope`` with both sets:
an engine reads a prompt of at most C tokens as the base does, and a longer one with the rescaled frequencies.
In training each row has the set of its own positions: the base's where they stay below C.

``rope.long_factor`` are the factors of the pairs.  The source finds them by a search over needles in long
rows, which is not here; without them they are YaRN's.  There long rows are long text; here they are
``pose``'s.  cos and sin have no factor, as engines would apply it to short prompts too.  Known from the
abstract alone; whether the half is one of rows or of tokens is open.
"""

import contextlib
from dataclasses import dataclass

from pydantic import Field

from endprompt import BadInput
from endprompt.methods.base import register
from endprompt.methods.pose import Chunked, ChunkOptions, PoseRows
from endprompt.positions import plans
from endprompt.positions.rope import Asked, Default, LongRope, Scheme, Yarn, as_longrope, parameters
from endprompt.positions.schemes import plain


@dataclass(frozen=True)
class Beyond(Scheme):
    """The base's own frequencies within ``original_length`` tokens, those of ``long`` beyond."""

    long: Scheme
    original_length: int
    factor: float
    name = hf_type = "longrope"
    attention_factor = 1.0

    def inv_freq(self, rope_theta, dims):
        return self.long.inv_freq(rope_theta, dims)

    def built_inv_freq(self, rope_theta, dims):
        return plain(rope_theta, dims)

    def hf_parameters(self, rope_theta, dims):
        whole = as_longrope(self.long, self.original_length, rope_theta, dims).hf_parameters(rope_theta, dims)
        return {**whole, "short_factor": [1.0] * (dims // 2), "factor": self.factor, "attention_factor": 1.0}


class MixedOptions(ChunkOptions):
    short_share: float = Field(0.5, gt=0, lt=1, description="of the rows, those without a jump")


class MixedRows(PoseRows):
    def build(self, cursor, rng):
        if rng.random() >= self.options.short_share:
            return super().build(cursor, rng)
        if (taken := self.take(cursor, self.length)) is None:
            return None
        text, documents = taken
        return self.row(text, plans.contiguous(len(text), 0, self.target_length, rng), documents)


@register
class LongRope2(Chunked):
    name = "longrope2"
    summary = "short rows under the base's frequencies, rows with jumps under the rescaled ones"
    Options = MixedOptions
    Rows = MixedRows
    rope = "longrope"

    def scaling(self, asked, own, window, target_length):
        if asked not in (Asked(None, None, asked.long_factor), Asked("longrope", None, asked.long_factor)):
            raise BadInput(f"rope: {self.name} is read as longrope; remove type, theta and yarn_factor")
        if not isinstance(own, Default):
            raise BadInput(
                f"rope: the model's RoPE is scaled by {own.name} already, and {self.name} keeps an unscaled"
                " one for short rows; start from the unscaled base model"
            )
        factor = target_length / window
        long: Scheme = Yarn(factor, window)
        if asked.long_factor is not None:
            long = LongRope(asked.long_factor, window, factor)
        return Beyond(long, window, factor)

    @contextlib.contextmanager
    def attention(self, network, options, length):
        rotary = network.get_decoder().rotary_emb
        forward = rotary.forward
        rotary.forward = _by_row(forward, parameters(network.config)["original_max_position_embeddings"])
        try:
            yield
        finally:
            rotary.forward = forward


def _by_row(forward, window: int):
    """The forward of a longrope module, which has one set of frequencies for a batch, with one for each row:
    the short set where no position of a row reaches ``window``."""
    import torch

    def of_each(x, position_ids, *more):
        short = (position_ids < window).all(-1, keepdim=True)
        # Both sets for every batch: to ask which it needs would be to wait for a GPU in every pass.
        near, far = (forward(x, position_ids * rows, *more) for rows in (short, ~short))
        return tuple(torch.where(short[..., None], one, other) for one, other in zip(near, far, strict=True))

    return of_each
