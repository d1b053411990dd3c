"""RoPE schemes: the frequencies of each, and the keys that say them in a Hugging Face config.

Every scheme has one set of frequencies for rows of every length, so that a model is scored as it was trained.
It gives: ``inv_freq`` [rotary dimensions / 2] float64, radians a position; ``attention_factor``, by which cos
and sin are multiplied; ``hf_parameters``, its part of ``config.rope_parameters``, of type ``hf_type``; and
``window``, what ``config.max_position_embeddings`` must say (None: leave it alone).

``times`` is the scheme that extends a model of this one by a further factor.  Two extensions by s and t have
the frequencies of one by s x t.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from endprompt import BadInput


class Scheme:
    """What all schemes share.  dims: rotary dimensions of a head, of which pairs turn together."""

    name: str
    hf_type: str
    attention_factor: float

    def inv_freq(self, rope_theta: float, dims: int) -> np.ndarray:
        raise NotImplementedError

    def built_inv_freq(self, rope_theta: float, dims: int) -> np.ndarray:
        """What transformers holds in ``inv_freq`` of a module that has read nothing yet."""
        return self.inv_freq(rope_theta, dims)

    def hf_parameters(self, rope_theta: float, dims: int) -> dict[str, Any]:
        raise NotImplementedError

    def window(self, target_length: int) -> int | None:
        return target_length

    def times(self, factor: float) -> "Scheme":
        raise NotImplementedError


def plain(rope_theta: float, dims: int) -> np.ndarray:
    """theta^(-2i/d) (RoFormer, Eq. 15)."""
    return rope_theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)


@dataclass(frozen=True)
class Default(Scheme):
    """The frequencies of ``rope_theta`` alone."""

    name = hf_type = "default"
    attention_factor = 1.0

    def inv_freq(self, rope_theta: float, dims: int) -> np.ndarray:
        return plain(rope_theta, dims)

    def hf_parameters(self, rope_theta: float, dims: int) -> dict:
        return {"rope_type": "default"}

    def window(self, target_length: int) -> int | None:
        return None


@dataclass(frozen=True)
class Linear(Scheme):
    """Position interpolation: every angle is p / s, so every inverse frequency is divided by s (paper Eq.
    2).
    """

    factor: float
    name = hf_type = "linear"
    attention_factor = 1.0

    def inv_freq(self, rope_theta: float, dims: int) -> np.ndarray:
        return plain(rope_theta, dims) / self.factor

    def hf_parameters(self, rope_theta: float, dims: int) -> dict:
        return {"rope_type": "linear", "factor": self.factor}

    def times(self, factor: float) -> "Linear":
        return Linear(self.factor * factor)


class Raised(Scheme):
    """A greater base frequency, saved as an unscaled RoPE, which every engine reads."""

    hf_type = "default"
    attention_factor = 1.0

    def stretched(self, rope_theta: float, dims: int) -> float:
        """theta', the base frequency that is saved."""
        raise NotImplementedError

    def inv_freq(self, rope_theta: float, dims: int) -> np.ndarray:
        return plain(self.stretched(rope_theta, dims), dims)

    def hf_parameters(self, rope_theta: float, dims: int) -> dict:
        return {"rope_type": "default", "rope_theta": self.stretched(rope_theta, dims)}


@dataclass(frozen=True)
class Theta(Raised):
    """Adjusted base frequency: theta' = theta x s^(d / (d - 2)), by which the slowest pair turns s times
    slower, or ``rope_theta`` where it is given.

    Source of the rule: bloc97's NTK-aware scaling.  Code Llama (arXiv 2308.12950), "Effective Long-Context
    Scaling" (2309.16039, which names it ABF) and ProLong (2410.02660) train with a raised base frequency.
    """

    factor: float
    rope_theta: float | None = None
    name = "theta"

    def stretched(self, rope_theta: float, dims: int) -> float:
        if self.rope_theta is not None:
            return self.rope_theta
        return rope_theta * self.factor ** (dims / (dims - 2))


@dataclass(frozen=True)
class Ntk(Raised):
    """NTK scaling held for every length: theta' = theta x stretch^(d / (d - 2)), with stretch = factor x L /
    C - (factor - 1).

    Dynamic NTK has these frequencies in a row that ends at the target length L, and others in every shorter
    row.  Rows of L tokens train L's frequencies alone, so a model that was trained on them must keep them for
    every length.  Source: bloc97 and emozilla for the formula; github.com/Leooyii/LCEG for holding it (its
    models/llama_ntk_32k and llama_ntk_64k) and for the factor, L / C / 2 rounded up.
    """

    factor: float
    original_length: int
    target_length: int
    name = "ntk"

    def stretched(self, rope_theta: float, dims: int) -> float:
        stretch = self.factor * self.target_length / self.original_length - (self.factor - 1)
        return rope_theta * stretch ** (dims / (dims - 2))


@dataclass(frozen=True)
class Yarn(Scheme):
    """YaRN (arXiv 2309.00071, section 3): frequencies that turn more than 32 times within C stay, those that
    turn less than once are divided by s, a linear ramp over the dimensions joins them; attention is sharpened
    by 0.1 ln(s) + 1 on both query and key.

    fast, slow: the paper's alpha and beta, turns within C.  truncate: whether the ramp's ends are whole
    dimensions.  mscale, mscale_all_dim: DeepSeek's, which change the sharpening; both or none.  given: in the
    place of 0.1 ln(s) + 1, for every s.
    """

    factor: float
    original_length: int
    fast: float = 32
    slow: float = 1
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    given: float | None = None
    name = hf_type = "yarn"

    def _sharpening(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    @property
    def attention_factor(self) -> float:  # type: ignore[override]  # computed
        if self.given is not None:
            return self.given
        if self.mscale and self.mscale_all_dim:
            return self._sharpening(self.mscale) / self._sharpening(self.mscale_all_dim)
        return self._sharpening(1)

    def inv_freq(self, rope_theta: float, dims: int) -> np.ndarray:
        def dimension(turns: float) -> float:  # the (real-valued) index whose wave turns that often within C
            return dims * math.log(self.original_length / (2 * math.pi * turns)) / (2 * math.log(rope_theta))

        first, last = dimension(self.fast), dimension(self.slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dims - 1)
        ramp = np.clip((np.arange(dims // 2, dtype=np.float64) - first) / (last - first or 1e-3), 0, 1)
        return plain(rope_theta, dims) * (1 - ramp + ramp / self.factor)

    def hf_parameters(self, rope_theta: float, dims: int) -> dict:
        names = {"fast": "beta_fast", "slow": "beta_slow", "given": "attention_factor"}
        changed = {
            names.get(field.name, field.name): getattr(self, field.name)
            for field in dataclasses.fields(self)[2:]
            if getattr(self, field.name) != field.default
        }
        # Without the original length, transformers would take the new window for it.
        return {
            "rope_type": "yarn",
            "factor": self.factor,
            "original_max_position_embeddings": self.original_length,
            **changed,
        }

    def times(self, factor: float) -> "Yarn":
        return dataclasses.replace(self, factor=self.factor * factor)


@dataclass(frozen=True)
class Llama3(Scheme):
    """Llama 3.1's scheme (github.com/meta-llama/llama-models, models/llama3/model.py): pairs that turn more
    than ``high`` times within the original length stay, those that turn less than ``low`` times are divided
    by s, and between them the share that is divided falls evenly with the number of turns.
    """

    factor: float
    original_length: int
    low: float = 1
    high: float = 4
    name = hf_type = "llama3"
    attention_factor = 1.0

    def inv_freq(self, rope_theta: float, dims: int) -> np.ndarray:
        own = plain(rope_theta, dims)
        turns = self.original_length * own / (2 * math.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return own * (kept + (1 - kept) / self.factor)

    def hf_parameters(self, rope_theta: float, dims: int) -> dict:
        return {
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": self.low,
            "high_freq_factor": self.high,
            "original_max_position_embeddings": self.original_length,
        }

    def times(self, factor: float) -> "Llama3":
        return dataclasses.replace(self, factor=self.factor * factor)


@dataclass(frozen=True)
class LongRope(Scheme):
    """LongRoPE (arXiv 2402.13753): every pair has a factor of its own.

    long: by which the frequencies are divided, one factor a pair.  short: those of a base for rows of at most
    ``original_length`` tokens; what is written here has the same for every row.  factor: how far the window
    was extended in all.  given: cos and sin are multiplied by it in place of
    sqrt(1 + ln factor / ln original_length).
    """

    long: tuple[float, ...]
    original_length: int
    factor: float
    short: tuple[float, ...] | None = None
    given: float | None = None
    name = hf_type = "longrope"

    @property
    def _formula(self) -> float:
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))

    @property
    def attention_factor(self) -> float:  # type: ignore[override]  # computed
        return self._formula if self.given is None else self.given

    def inv_freq(self, rope_theta: float, dims: int) -> np.ndarray:
        return plain(rope_theta, dims) / np.asarray(self.long, np.float64)

    def built_inv_freq(self, rope_theta: float, dims: int) -> np.ndarray:
        return plain(rope_theta, dims) / np.asarray(self.short or self.long, np.float64)

    def hf_parameters(self, rope_theta: float, dims: int) -> dict:
        return {
            "rope_type": "longrope",
            "short_factor": list(self.short or self.long),
            "long_factor": list(self.long),
            "factor": self.factor,
            "original_max_position_embeddings": self.original_length,
            "attention_factor": self.attention_factor,
        }

    def times(self, factor: float) -> "LongRope":
        """Raises BadInput if cos and sin are multiplied by what would grow in a way that is not known."""
        given = self.given
        if given is not None and math.isclose(given, self._formula, rel_tol=1e-4):
            given = None
        if given not in (None, 1.0):
            raise BadInput(
                f"model: rope_parameters.attention_factor in its config.json is {given}, and longrope's own"
                f" is {self._formula:.6g}; how another would grow with the factor is not known, so name"
                " another base"
            )
        long = tuple(one * factor for one in self.long)
        return LongRope(long, self.original_length, self.factor * factor, None, given)


def as_longrope(scheme: Scheme, original_length: int, rope_theta: float, dims: int) -> LongRope:
    """The same frequencies as factors of single pairs, for families that know no other scheme."""
    long = tuple(map(float, plain(rope_theta, dims) / scheme.inv_freq(rope_theta, dims)))
    return LongRope(
        long, original_length, getattr(scheme, "factor", 1.0), None, float(scheme.attention_factor)
    )
