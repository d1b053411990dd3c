"""RoPE scalings: their frequencies, and how they are written into a Hugging Face config without losing
rope_theta.

On transformers 5, assigning ``config.rope_scaling`` after loading wipes rope_theta, and setting it on a built
model does nothing at all.  So the scaling is merged into ``config.rope_parameters`` before the model is
built, and the built model's frequencies are compared with those computed here, independently, in float64.

Every scheme has one set of frequencies for rows of every length, so that a model is scored as it was trained.
It gives: ``inv_freq`` [head_dim / 2] float64, radians a position; ``attention_factor``, by which cos and sin
are multiplied; ``hf_parameters``, its part of ``config.rope_parameters``, of type ``hf_type``; and
``window``, what ``config.max_position_embeddings`` must say (None: leave it alone).
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from endprompt import BadInput, Failure


@dataclass(frozen=True)
class Default:
    """The model's own frequencies, theta^(-2i/d) (RoFormer, Eq. 15)."""

    name = hf_type = "default"
    attention_factor = 1.0

    def inv_freq(self, rope_theta: float, head_dim: int) -> np.ndarray:
        return rope_theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)

    def hf_parameters(self, rope_theta: float, head_dim: int) -> dict:
        return {"rope_type": "default"}

    def window(self, target_length: int) -> int | None:
        return None


@dataclass(frozen=True)
class Linear:
    """Position interpolation: every angle is p / s, so every inverse frequency is divided by s (paper Eq.
    2).
    """

    factor: float
    name = hf_type = "linear"
    attention_factor = 1.0

    def inv_freq(self, rope_theta: float, head_dim: int) -> np.ndarray:
        return Default().inv_freq(rope_theta, head_dim) / self.factor

    def hf_parameters(self, rope_theta: float, head_dim: int) -> dict:
        return {"rope_type": "linear", "factor": self.factor}

    def window(self, target_length: int) -> int | None:
        return target_length


@dataclass(frozen=True)
class Ntk:
    """NTK scaling held for every length: theta' = theta x stretch^(d / (d - 2)), with stretch = factor x L /
    C - (factor - 1).

    Dynamic NTK has these frequencies in a row that ends at the target length L, and others in every shorter
    row.  Rows of L tokens train L's frequencies alone, so a model that was trained on them must keep them for
    every length.  What is saved is an unscaled RoPE with theta', which every engine reads.  Source: bloc97
    and emozilla for the formula; github.com/Leooyii/LCEG for holding it (its models/llama_ntk_32k and
    llama_ntk_64k) and for the factor, L / C / 2 rounded up.
    """

    factor: float
    original_length: int
    target_length: int
    name = "ntk"
    hf_type = "default"
    attention_factor = 1.0

    def stretched(self, rope_theta: float, head_dim: int) -> float:
        """theta', the base frequency that is saved."""
        stretch = self.factor * self.target_length / self.original_length - (self.factor - 1)
        return rope_theta * stretch ** (head_dim / (head_dim - 2))

    def inv_freq(self, rope_theta: float, head_dim: int) -> np.ndarray:
        return Default().inv_freq(self.stretched(rope_theta, head_dim), head_dim)

    def hf_parameters(self, rope_theta: float, head_dim: int) -> dict:
        return {"rope_type": "default", "rope_theta": self.stretched(rope_theta, head_dim)}

    def window(self, target_length: int) -> int | None:
        return target_length


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071, section 3): frequencies that turn more than 32 times within C stay, those that
    turn less than once are divided by s, a linear ramp over the dimensions joins them; attention is sharpened
    by 0.1 ln(s) + 1 on both query and key.
    """

    factor: float
    original_length: int
    name = hf_type = "yarn"
    fast, slow = 32, 1  # turns within C; the paper's alpha and beta for LLaMA

    @property
    def attention_factor(self) -> float:
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    def inv_freq(self, rope_theta: float, head_dim: int) -> np.ndarray:
        def dimension(turns: float) -> float:  # the (real-valued) index whose wave turns that often within C
            return (
                head_dim * math.log(self.original_length / (2 * math.pi * turns)) / (2 * math.log(rope_theta))
            )

        first, last = (
            max(math.floor(dimension(self.fast)), 0),
            min(math.ceil(dimension(self.slow)), head_dim - 1),
        )
        ramp = np.clip((np.arange(head_dim // 2, dtype=np.float64) - first) / (last - first or 1e-3), 0, 1)
        return Default().inv_freq(rope_theta, head_dim) * (1 - ramp + ramp / self.factor)

    def hf_parameters(self, rope_theta: float, head_dim: int) -> dict:
        # Without the original length, transformers would take the new window for it.
        return {
            "rope_type": "yarn",
            "factor": self.factor,
            "original_max_position_embeddings": self.original_length,
        }

    def window(self, target_length: int) -> int | None:
        return target_length


Scaling = Default | Linear | Ntk | Yarn
Type = Literal["linear", "ntk", "yarn"]
TYPES = get_args(Type)


def scaling_for(
    rope_type: str | None, original_length: int, target_length: int, whole: bool = False
) -> Scaling:
    """The scaling from ``original_length`` C to ``target_length`` L.

    The factor is L / C, or ceil(L / C) if ``whole``; that of ``ntk`` is ceil(L / C / 2), as in LCEG's code.
    Raises BadInput on an unknown type.
    """
    ratio = target_length / original_length
    factor = math.ceil(ratio) if whole else ratio
    match rope_type:
        case None:
            return Default()
        case "linear":
            return Linear(factor)
        case "ntk":
            return Ntk(math.ceil(ratio / 2), original_length, target_length)
        case "yarn":
            return Yarn(factor, original_length)
    raise BadInput(
        f"rope.type: {rope_type!r} is not known; choose one of {', '.join(TYPES)}, or null for the"
        " method's own"
    )


def forget(model) -> None:
    """Takes the dynamic RoPE of a ``model`` that was made elsewhere back to where it was before it met a long
    row.

    transformers keeps the frequencies of the longest row so far, so that what a shorter row gets depends on
    what came before it.
    """
    import torch

    rotary = getattr(model.get_decoder(), "rotary_emb", None)  # not every model has RoPE
    if rotary is not None and getattr(rotary, "rope_type", None) == "dynamic":
        device = rotary.inv_freq.device
        rotary(torch.zeros(1, 1, 1, device=device), torch.zeros(1, 1, dtype=torch.long, device=device))


def head_dimension(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def refuse_scaled(config) -> None:
    """Raises BadInput if the config's RoPE is scaled already: a second scaling on top would be silently
    wrong.
    """
    current = getattr(config, "rope_parameters", None) or {}
    if current.get("rope_type", "default") != "default":
        raise BadInput(
            f"model: its RoPE is scaled already (rope_type {current['rope_type']!r}); start from the unscaled"
            " base model"
        )


def apply(config, scaling: Scaling, target_length: int) -> None:
    """Merges ``scaling`` into ``config.rope_parameters`` in place and sets max_position_embeddings to its
    window.

    rope_theta stays, except under ``ntk``, which is a greater one.

    Raises BadInput if the config has no rope_theta or is scaled already.
    """
    current = dict(getattr(config, "rope_parameters", None) or {})
    if not isinstance(current.get("rope_theta"), (int, float)):
        raise BadInput(
            f"model: its config has no rope_theta (rope_parameters: {current}); add it to config.json"
        )
    refuse_scaled(config)
    config.rope_parameters = {
        **current,
        **scaling.hf_parameters(current["rope_theta"], head_dimension(config)),
    }
    if (window := scaling.window(target_length)) is not None:
        config.max_position_embeddings = window


def verify(rotary, config, scaling: Scaling, rope_theta: float) -> float:
    """Compares a built rotary module with ``scaling``; returns the largest relative error of its frequencies
    (about 1e-7).

    rotary: the decoder's ``rotary_emb``, whose buffer ``inv_freq`` is compared.  rope_theta: the base model's
    own. Raises Failure if the model computes another scheme, if they differ by more than 1e-5 (wrong factor,
    wrong or lost theta, frequencies cast to bf16), or if cos and sin are not multiplied by the scheme's
    attention factor.
    """
    expected = scaling.inv_freq(rope_theta, head_dimension(config))
    if rotary.rope_type != scaling.hf_type:
        raise Failure(
            f"RoPE check: the model's inv_freq differs from {scaling}: it computes {rotary.rope_type!r}"
        )
    if not math.isclose(rotary.attention_scaling, scaling.attention_factor, rel_tol=1e-6):
        raise Failure(
            f"RoPE check: the model multiplies cos and sin by {rotary.attention_scaling:g}, "
            f"{scaling} by {scaling.attention_factor:g}"
        )
    built = rotary.inv_freq.detach().double().cpu().numpy()
    if built.shape != expected.shape:
        raise Failure(
            f"RoPE check: the model has {built.shape[0]} frequencies, {expected.shape[0]} were expected"
        )
    error = float(np.max(np.abs(built - expected) / expected))
    if not error < 1e-5:
        raise Failure(
            f"RoPE check: the model's inv_freq differs from {scaling} with rope_theta {rope_theta:g} by"
            f" {error:.2g} (relative); built {built[:2]}..., expected {expected[:2]}..."
        )
    return error
