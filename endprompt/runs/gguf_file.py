"""Whether a GGUF file says the RoPE of the model that it was made of.

llama.cpp's converter writes what it knows of a family and drops the rest with no word: longrope's factors of
a Llama, for one, or that YaRN was trained without its factor of cos and sin.  So the frequencies and the
factor that llama.cpp will compute from the file are compared with those of config.json.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from endprompt import BadInput
from endprompt.bases import older_readers
from endprompt.bases.unreadable import reason


def verify(path: Path, config: dict[str, Any]) -> None:
    """config: config.json of the model.  Raises BadInput, which names what was lost, unless the file ``path``
    gives the same frequencies and the same factor of cos and sin."""
    parameters = config["rope_parameters"]
    parameters = parameters.get("full_attention", parameters)
    wanted, factor = older_readers.read_rope({**config, **_older(parameters)})
    instead = "leave out --gguf, or take another llama.cpp"
    try:
        found, multiplied = frequencies(path)
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise BadInput(
            f"--gguf: what llama.cpp's converter wrote cannot be read back: {reason(error)}; {instead}"
        ) from None
    kind = f"rope_type {parameters.get('rope_type', 'default')!r} of a {config['model_type']} model"
    if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-4, atol=0):
        raise BadInput(
            f"--gguf: llama.cpp's converter does not write {kind}: its slowest pair turns by {found[-1]:.3g}"
            f" radians a position in the file, by {wanted[-1]:.3g} in the model; {instead}"
        )
    if not np.isclose(multiplied, factor, rtol=1e-4):
        raise BadInput(
            f"--gguf: llama.cpp's converter does not write {kind}: by the file cos and sin are multiplied by"
            f" {multiplied:.4g}, in the model by {factor:.4g}; {instead}"
        )


def _older(parameters: dict[str, Any]) -> dict[str, Any]:
    told = {key: parameters[key] for key in older_readers.TOP_LEVEL if parameters.get(key) is not None}
    return {**told, "rope_scaling": parameters}


def frequencies(path: Path) -> tuple[np.ndarray, float]:
    """(inv_freq [rotated dimensions / 2] float64, radians a position; the factor of cos and sin) that
    llama.cpp computes beyond the original window from the GGUF file ``path``.

    Raises BadInput where the package gguf is missing.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise BadInput(
            "--gguf: the package gguf, which reads the file back, is missing; pip install gguf"
        ) from None
    reader = GGUFReader(path)
    kind = reader.fields["general.architecture"].contents()

    def said(key: str, default=None):
        field = reader.fields.get(f"{kind}.rope.{key}")
        return default if field is None else field.contents()

    # Without a type llama.cpp takes a factor for linear; without either nothing is scaled.
    scheme = said("scaling.type", "linear" if said("scaling.factor") else "none")
    scaling = {
        "rope_type": scheme.replace("none", "default"),
        "factor": said("scaling.factor", 1.0),
        "original_max_position_embeddings": said("scaling.original_context_length"),
        "beta_fast": said("scaling.yarn_beta_fast"),
        "beta_slow": said("scaling.yarn_beta_slow"),
    }
    factors = {
        tensor.name: np.array(tensor.data, np.float64).reshape(-1)
        for tensor in reader.tensors
        if tensor.name in ("rope_freqs.weight", "rope_factors_long.weight")
    }
    if factors or scaling["rope_type"] == "longrope":
        scaling["rope_type"] = "default"
    told = {"rope_theta": said("freq_base", 10000.0), "head_dim": said("dimension_count")}
    if not told["head_dim"]:
        raise ValueError(f"it has no {kind}.rope.dimension_count")
    found, _ = older_readers.read_rope({**told, "rope_scaling": scaling})
    for one in factors.values():
        found = found / one
    multiplied = said("scaling.attn_factor", 1.0)
    if scheme == "yarn":
        multiplied *= _yarns_own(scaling["factor"], said("scaling.yarn_log_multiplier", 0.0))
    return found, multiplied


def _yarns_own(factor: float, weight: float) -> float:
    """By which llama.cpp multiplies cos and sin under YaRN, whatever ``yarn_attn_factor`` says: it computes
    that key anew.  weight: DeepSeek's ``mscale_all_dim``, which divides; 0: none."""
    if factor <= 1:
        return 1.0
    return (1 + 0.1 * math.log(factor)) / (1 + 0.1 * weight * math.log(factor))
