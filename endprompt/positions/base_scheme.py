"""The scheme that a base's config.json names, read strictly: what is missing, misplaced or no number would
give other frequencies than the weights were trained with.
"""

import dataclasses
import math
from typing import Any

from endprompt import BadInput
from endprompt.positions.schemes import Default, Linear, Llama3, LongRope, Scheme, Yarn

# The keys of rope_parameters by type, beside rope_type, type, rope_theta and partial_rotary_factor; those of
# ``needed`` must be there.
_ORIGINAL = "original_max_position_embeddings"
KEYS: dict[str, tuple[set[str], set[str]]] = {  # type: (needed, allowed)
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "yarn": (
        {"factor", _ORIGINAL},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL}, set()),
    "longrope": ({"short_factor", "long_factor", _ORIGINAL}, {"factor", "attention_factor"}),
}
COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def _factor(parameters: dict) -> float:
    if (factor := _said(parameters, "factor")) < 1:
        raise BadInput(
            f"model: factor of rope_parameters or rope_scaling in its config.json is {factor}, and no RoPE is"
            " scaled by less than 1; mend it"
        )
    return float(factor)


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _said(parameters: dict, key: str, *, whole: bool = False) -> Any:
    value = parameters[key]
    if not _positive(value) or whole and type(value) is not int:
        kind = "positive number of tokens" if whole else "positive number"
        raise BadInput(
            f"model: {key} of rope_parameters or rope_scaling in its config.json is {value!r:.60}, no {kind};"
            " mend it"
        )
    return value


def written(parameters: dict, dims: int, window: int) -> Scheme:
    """The scheme that a base's ``rope_parameters`` name.

    dims: rotary dimensions of a head; window: max_position_embeddings.  Raises BadInput on a type that is not
    known here, keys that are missing or have no place there, and values that are no numbers.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "dynamic":
        raise BadInput(
            "model: its RoPE is dynamic NTK, which reads short rows with other frequencies than long ones;"
            " take the scaling out of config.json, and set rope.type=ntk, which holds the target's"
        )
    if not isinstance(kind, str) or kind not in KEYS:
        raise BadInput(
            f"model: the RoPE type {kind!r:.40} in its config.json is not supported; {', '.join(KEYS)} are"
        )
    needed, allowed = KEYS[kind]
    neutral = (None, 1) if kind == "default" else (None,)  # what is set to them changes nothing
    there = {key for key, value in parameters.items() if value not in neutral} - COMMON
    if missing := sorted(needed - there):
        raise BadInput(
            f"model: rope_parameters or rope_scaling of type {kind} in its config.json lacks {missing[0]};"
            " add it, or take the scaling out if the weights were trained without it"
        )
    if strange := sorted(there - needed - allowed):
        raise BadInput(
            f"model: {strange[0]} of rope_parameters or rope_scaling in its config.json is no part of the"
            f" RoPE type {kind}; take it out, or name the type that the weights were trained with"
        )
    return _read(kind, parameters, dims, window)


def _read(kind: str, parameters: dict, dims: int, window: int) -> Scheme:
    if kind == "default":
        return Default()
    if kind == "linear":
        return Linear(_factor(parameters))
    original = _said(parameters, _ORIGINAL, whole=True)
    if kind == "llama3":
        low, high = _said(parameters, "low_freq_factor"), _said(parameters, "high_freq_factor")
        if not low < high:
            raise BadInput(
                f"model: low_freq_factor {low} of rope_parameters or rope_scaling in its config.json is not"
                f" below high_freq_factor {high}; mend it"
            )
        return Llama3(_factor(parameters), original, low, high)
    if kind == "yarn":
        return _yarn(parameters, original)
    long, short = (_factors(parameters, key, dims) for key in ("long_factor", "short_factor"))
    factor = parameters.get("factor")
    factor = window / original if factor is None else _factor(parameters)
    given = parameters.get("attention_factor")
    given = None if given is None else float(_said(parameters, "attention_factor"))
    return LongRope(long, original, float(factor), short, given)


def _yarn(parameters: dict, original: int) -> Yarn:
    keys = {"fast": "beta_fast", "slow": "beta_slow", "mscale": "mscale", "mscale_all_dim": "mscale_all_dim"}
    more = {name: _said(parameters, key) for name, key in keys.items() if parameters.get(key) is not None}
    truncate = parameters.get("truncate")
    if truncate not in (None, True, False):
        raise BadInput(
            f"model: truncate of rope_parameters or rope_scaling in its config.json is {truncate!r:.40}, not"
            " true or false; mend it"
        )
    found = Yarn(_factor(parameters), original, truncate=truncate is not False, **more)
    if found.slow >= found.fast:
        raise BadInput(
            f"model: beta_slow {found.slow} of rope_parameters or rope_scaling in its config.json is not"
            f" below beta_fast {found.fast}; mend it"
        )
    if parameters.get("attention_factor") is not None:
        given = _said(parameters, "attention_factor")
        if given == 1 and found.attention_factor != 1:  # no factor, which grows to none
            return dataclasses.replace(found, given=1.0)
        if not math.isclose(given, found.attention_factor, rel_tol=1e-4):
            raise BadInput(
                f"model: attention_factor of rope_parameters or rope_scaling in its config.json is {given},"
                f" and YaRN's own is {found.attention_factor:.6g}; how another would grow with the factor is"
                " not known, so take it out if the weights were trained without it, or name another base"
            )
    return found


def _factors(parameters: dict, key: str, dims: int) -> tuple[float, ...]:
    values = parameters[key]
    if not isinstance(values, list | tuple) or len(values) != dims // 2 or not all(map(_positive, values)):
        raise BadInput(
            f"model: {key} of rope_parameters or rope_scaling in its config.json must be {dims // 2} positive"
            f" numbers, one for each pair of a head's rotary dimensions (given: {values!r:.60}); mend it"
        )
    return tuple(map(float, values))
