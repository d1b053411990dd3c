"""RoPE scalings: which scheme a recipe asks for on top of a base's own, and how it enters a config and is
checked in a built model.

On transformers 5, assigning ``config.rope_scaling`` after loading wipes rope_theta, and setting it on a built
model does nothing at all.  So the scaling is merged into ``config.rope_parameters`` before the model is
built, and the built model's frequencies are compared with those computed here, independently, in float64.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from endprompt import BadInput, Failure
from endprompt.positions.base_scheme import written
from endprompt.positions.schemes import (
    Default,
    Linear,
    Llama3,
    LongRope,
    Ntk,
    Scheme,
    Theta,
    Yarn,
    as_longrope,
    plain,
)

__all__ = ["Default", "Linear", "Llama3", "LongRope", "Ntk", "Scheme", "Theta", "Yarn", "as_longrope"]

Scaling = Scheme
Type = Literal["linear", "ntk", "theta", "yarn", "llama3", "longrope"]
TYPES = get_args(Type)
# The layers that a scaling is for, in configs that hold parameters for each kind of layer.
LAYERS = "full_attention"


@dataclass(frozen=True)
class Asked:
    """What a recipe asks for.  type: one of TYPES, or None, which keeps the base's own RoPE; theta: the base
    frequency of type theta, None for the NTK rule's; long_factor: of type longrope, a factor a pair;
    yarn_factor: of type yarn, whether cos and sin have its factor."""

    type: str | None
    theta: float | None = None
    long_factor: tuple[float, ...] | None = None
    yarn_factor: bool = True


def extended(asked: Asked, own: Scheme, window: int, target_length: int, whole: bool = False) -> Scheme:
    """The scheme from a base of scheme ``own`` and window ``window`` C to ``target_length`` L.

    The factor is L / C, or ceil(L / C) if ``whole``, on top of the base's own; that of ``ntk`` is
    ceil(L / C / 2), as in LCEG's code.  A scaled base is extended in its own scheme, where the product of the
    factors is known to be right.  Raises BadInput on an unknown type, on values of another type, and on a
    scheme that does not compose with the base's, naming the one that does.
    """
    ratio = target_length / window
    factor = math.ceil(ratio) if whole else ratio
    if asked.type is None:
        return own
    if asked.type not in TYPES:
        raise BadInput(
            f"rope.type: {asked.type!r} is not known; choose one of {', '.join(TYPES)}, or null for the"
            " method's own"
        )
    if asked.theta is not None and asked.type != "theta":
        raise BadInput(f"rope.theta: {asked.type} has no such value; set rope.type=theta, or remove it")
    if asked.long_factor is not None and asked.type != "longrope":
        raise BadInput(f"rope.long_factor: {asked.type} has none; set rope.type=longrope, or remove it")
    trained_with = isinstance(own, Yarn) and own.attention_factor != 1
    if not asked.yarn_factor and (asked.type != "yarn" or trained_with):
        why = "the base was trained with it" if trained_with else f"{asked.type} has none"
        raise BadInput(
            f"rope.yarn_factor: {why}; set rope.type=yarn on a base without it, or remove rope.yarn_factor"
        )
    if not isinstance(own, Default) and asked.type != own.name:
        raise BadInput(
            f"rope.type: the model's RoPE is scaled by {own.name} already, and {asked.type} on top of it"
            f" would be neither; set rope.type={own.name}, which multiplies its factor by {factor:g}, or"
            " start from the unscaled base model"
        )
    if asked.type == "longrope":
        return _longrope(asked.long_factor, own, window, factor)
    if not isinstance(own, Default):
        return own.times(factor)
    match asked.type:
        case "linear":
            return Linear(factor)
        case "ntk":
            return Ntk(math.ceil(ratio / 2), window, target_length)
        case "theta":
            return Theta(factor, asked.theta)
        case "yarn":
            return Yarn(factor, window, given=None if asked.yarn_factor else 1.0)
    return Llama3(factor, window)


def _longrope(given: tuple[float, ...] | None, own: Scheme, window: int, factor: float) -> LongRope:
    if given is not None:
        start = (own if isinstance(own, LongRope) else LongRope((), window, 1.0)).times(factor)
        return replace(start, long=given)
    if not isinstance(own, LongRope):
        raise BadInput(
            "rope.long_factor is missing: longrope has a factor for every pair of rotary dimensions, found by"
            " a search; give them, or set rope.type=yarn, which needs none"
        )
    return own.times(factor)


def scaling_for(
    rope_type: str | None, original_length: int, target_length: int, whole: bool = False
) -> Scheme:
    """``extended`` of an unscaled base, by a type alone."""
    return extended(Asked(rope_type), Default(), original_length, target_length, whole)


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


def parameters(config) -> dict[str, Any]:
    """The RoPE parameters of ``config`` that a scaling changes: all, or those of the layers that attend to
    everything."""
    found = getattr(config, "rope_parameters", None) or {}
    nested = found.get(LAYERS)
    return nested if isinstance(nested, dict) else found


def rotary_dimensions(config) -> int:
    """Dimensions of a head that RoPE turns: all of them, or ``partial_rotary_factor``'s share."""
    share = parameters(config).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    return int(head_dimension(config) * (1.0 if share is None else share))


def own_scheme(config) -> Scheme:
    """The scheme that a base's ``config`` names.  Raises BadInput, see ``schemes.written``."""
    return written(parameters(config), rotary_dimensions(config), config.max_position_embeddings)


def apply(config, scaling: Scheme, target_length: int) -> None:
    """Merges ``scaling`` into ``config.rope_parameters`` in place and sets max_position_embeddings to its
    window.

    scaling: of ``extended``; the base's own scheme changes nothing.  rope_theta stays, except under ``ntk``
    and ``theta``, which raise it.

    Raises BadInput if the config has no rope_theta, or is scaled by another scheme already.
    """
    current = dict(parameters(config))
    theta = current.get("rope_theta")
    if not isinstance(theta, (int, float)):
        raise BadInput(
            f"model: its config has no rope_theta (rope_parameters: {current}); add it to config.json"
        )
    own = own_scheme(config)
    if scaling == own:
        return
    further = own.name == scaling.name and scaling.factor > own.factor  # type: ignore[attr-defined]  # both have it
    if not isinstance(own, Default) and not further:
        raise BadInput(
            f"model: its RoPE is scaled already (rope_type {own.name!r}); start from the unscaled base model"
        )
    kept: dict[str, Any] = {
        key: current[key] for key in ("rope_theta", "partial_rotary_factor") if key in current
    }
    changed: dict[str, Any] = {**kept, **scaling.hf_parameters(theta, rotary_dimensions(config))}
    nested = parameters(config) is not config.rope_parameters
    config.rope_parameters = {**config.rope_parameters, LAYERS: changed} if nested else changed
    # Some configs say it beside the parameters too, and transformers believes that one.
    if getattr(config, "original_max_position_embeddings", None) is not None:
        config.original_max_position_embeddings = getattr(
            scaling, "original_length", config.original_max_position_embeddings
        )
    if (window := scaling.window(target_length)) is not None:
        config.max_position_embeddings = window


def _verify_local(rotary, config) -> None:
    """Raises Failure if the layers with a window of their own have other frequencies than the config's."""
    for layers in rotary.rope_type.keys() - {LAYERS}:
        expected = plain(config.rope_parameters[layers]["rope_theta"], rotary_dimensions(config))
        built = getattr(rotary, f"{layers}_inv_freq").detach().double().cpu().numpy()
        if built.shape != expected.shape or not np.allclose(built, expected, rtol=1e-5, atol=0):
            raise Failure(f"RoPE check: the frequencies of {layers} layers changed, and must stay")


def verify(rotary, config, scaling: Scheme, rope_theta: float) -> float:
    """Compares a built rotary module with ``scaling``; returns the largest relative error of its frequencies
    (about 1e-7).

    rotary: the decoder's ``rotary_emb``, whose buffer ``inv_freq`` is compared, or that of the layers that
    attend to everything.  rope_theta: the base model's own. Raises Failure if the model computes another
    scheme, if they differ by more than 1e-5 (wrong factor, wrong or lost theta, frequencies cast to bf16), or
    if cos and sin are not multiplied by the scheme's attention factor.
    """
    kind, prefix = rotary.rope_type, ""
    if isinstance(kind, dict):
        _verify_local(rotary, config)
        kind, prefix = kind[LAYERS], f"{LAYERS}_"
    multiplied, built = (getattr(rotary, prefix + name) for name in ("attention_scaling", "inv_freq"))
    expected = scaling.built_inv_freq(rope_theta, rotary_dimensions(config))
    if kind != scaling.hf_type:
        raise Failure(f"RoPE check: the model's inv_freq differs from {scaling}: it computes {kind!r}")
    if not math.isclose(multiplied, scaling.attention_factor, rel_tol=1e-6):
        raise Failure(
            f"RoPE check: the model multiplies cos and sin by {multiplied:g}, "
            f"{scaling} by {scaling.attention_factor:g}"
        )
    built = built.detach().double().cpu().numpy()
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
