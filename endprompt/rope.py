"""RoPE scalings: their frequencies, and how they are written into a Hugging Face config without losing rope_theta.

On transformers 5, assigning ``config.rope_scaling`` after loading wipes rope_theta, and setting it on a built model does
nothing at all.  So the scaling is merged into ``config.rope_parameters`` before the model is built, and the built model's
``inv_freq`` is compared with the frequencies computed here, independently, in float64.
"""

from dataclasses import dataclass

import numpy as np

from endprompt import BadInput


@dataclass(frozen=True)
class Default:
    """The model's own frequencies, theta^(-2i/d) (RoFormer, Eq. 15)."""

    name = "default"

    def inv_freq(self, rope_theta: float, head_dim: int) -> np.ndarray:
        """Inverse frequencies [head_dim / 2], float64, radians per position."""
        return rope_theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)

    def hf_parameters(self) -> dict:
        return {"rope_type": "default"}


@dataclass(frozen=True)
class Linear:
    """Position interpolation: every angle is p / s, so every inverse frequency is divided by s (paper Eq. 2)."""

    factor: float
    name = "linear"

    def inv_freq(self, rope_theta: float, head_dim: int) -> np.ndarray:
        return Default().inv_freq(rope_theta, head_dim) / self.factor

    def hf_parameters(self) -> dict:
        return {"rope_type": "linear", "factor": self.factor}


Scaling = Default | Linear
TYPES = ("linear",)


def scaling_for(rope_type: str | None, original_length: int, target_length: int) -> Scaling:
    """The scaling from ``original_length`` C to ``target_length`` L; the factor is s = L / C.  Raises BadInput on an unknown type."""
    if rope_type is None:
        return Default()
    if rope_type not in TYPES:
        raise BadInput(f"rope.type: {rope_type!r} is not known; choose one of {', '.join(TYPES)}, or null for the method's own")
    return Linear(target_length / original_length)


def head_dimension(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def refuse_scaled(config) -> None:
    """Raises BadInput if the config's RoPE is scaled already: a second scaling on top would be silently wrong."""
    current = getattr(config, "rope_parameters", None) or {}
    if current.get("rope_type", "default") != "default":
        raise BadInput(f"model: its RoPE is scaled already (rope_type {current['rope_type']!r}); start from the unscaled base model")


def apply(config, scaling: Scaling, target_length: int) -> None:
    """Merges ``scaling`` into ``config.rope_parameters`` in place, keeping rope_theta, and sets max_position_embeddings.

    Raises BadInput if the config has no rope_theta or is scaled already.
    """
    current = dict(getattr(config, "rope_parameters", None) or {})
    if not isinstance(current.get("rope_theta"), (int, float)):
        raise BadInput(f"model: its config has no rope_theta (rope_parameters: {current}); add it to config.json")
    refuse_scaled(config)
    config.rope_parameters = {**current, **scaling.hf_parameters()}
    if not isinstance(scaling, Default):
        config.max_position_embeddings = target_length


def verify(inv_freq, config, scaling: Scaling, rope_theta: float) -> float:
    """Compares a built model's ``inv_freq`` tensor with ``scaling``'s own; returns the largest relative error (about 1e-7).

    Raises RuntimeError if they differ by more than 1e-5: wrong factor, wrong or lost theta, or frequencies cast to bf16.
    """
    built = inv_freq.detach().double().cpu().numpy()
    expected = scaling.inv_freq(rope_theta, head_dimension(config))
    if built.shape != expected.shape:
        raise RuntimeError(f"RoPE check: the model has {built.shape[0]} frequencies, {expected.shape[0]} were expected")
    error = float(np.max(np.abs(built - expected) / expected))
    if not error < 1e-5:
        raise RuntimeError(f"RoPE check: the model's inv_freq differs from {scaling} with rope_theta {rope_theta:g} by {error:.2g} "
                           f"(relative); built {built[:2]}..., expected {expected[:2]}...")
    return error
