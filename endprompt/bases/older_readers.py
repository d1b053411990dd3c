"""What is said of a saved model to readers that are older than transformers 5, or go their own way.

transformers 5 reads the RoPE from ``rope_parameters`` in config.json.  transformers 4 and mlx-lm read
``rope_theta`` and ``rope_scaling`` beside it; without them they take theta 10000, unscaled, and say nothing.
So both are written, and must agree: where they do not, transformers 5 prefers the older keys.

A tokenizer lies in tokenizer.json.  What stands beside it in tokenizer_config.json must not keep older
readers from reading it, nor have them put its marks of begin and end elsewhere.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from endprompt import Failure, storage

# Parts of rope_parameters that older readers look for in config.json itself.
TOP_LEVEL = ("rope_theta", "partial_rotary_factor")


# Its class cuts up prompts for infilling, which no file does; the others do what tokenizer.json says.
OWN_CODE = ("CodeLlamaTokenizer",)


def complete(folder: Path, tokenizer) -> None:
    """Makes the model that transformers 5 has saved in ``folder`` with its ``tokenizer`` one that older
    readers read as it does, in place.  Raises Failure, see ``state_tokenizer``."""
    state_rope(folder)
    state_tokenizer(folder, tokenizer)


def state_rope(folder: Path) -> None:
    """Writes the RoPE of config.json in ``folder`` in its older keys too, in place; an unscaled one has no
    ``rope_scaling``.

    A RoPE that differs between layers is told by that of full attention, and the theta of the others.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    parameters = config.get("rope_parameters") or {}
    sliding, parameters = parameters.get("sliding_attention"), parameters.get("full_attention", parameters)
    config.pop("rope_scaling", None)
    config |= {key: parameters[key] for key in TOP_LEVEL if parameters.get(key) is not None}
    if sliding:
        config["rope_local_base_freq"] = sliding["rope_theta"]
    if parameters.get("rope_type", "default") != "default":
        config["rope_scaling"] = {key: value for key, value in parameters.items() if key not in TOP_LEVEL}
    if parameters.get("rope_type") == "longrope":  # transformers 4 takes max_position_embeddings for it
        config["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
        if config["model_type"] == "phi3":
            config["rope_scaling"] = _three_keys(config)
    storage.write_json(path, config)


def _three_keys(config: dict[str, Any]) -> dict[str, Any]:
    """``rope_scaling`` as transformers 4 takes it for Phi-3: exactly these keys, and its own factor of cos
    and sin.  Where another factor was trained all keys stay, and transformers 4 refuses them."""
    scaling = config["rope_scaling"]
    derived = {key: value for key, value in scaling.items() if key != "attention_factor"}
    _, trained = read_rope(config)
    _, told = read_rope({**config, "rope_scaling": derived})
    if not math.isclose(trained, told, rel_tol=1e-9):
        return scaling
    return {"type": "longrope", **{key: scaling[key] for key in ("short_factor", "long_factor")}}


def read_rope(config: dict[str, Any]) -> tuple[np.ndarray, float]:
    """(inv_freq [rotated dimensions / 2] float64, radians a position; factor of cos and sin) as transformers
    4.57 computes them beyond the original window, from the older keys of a config.json alone.

    Raises ValueError on a type that it does not know, KeyError where it would miss a key.
    """
    theta, scaling = config.get("rope_theta", 10000.0), config.get("rope_scaling") or {}
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    size = int(head * config.get("partial_rotary_factor", 1.0))
    own = theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return own, 1.0
    if kind == "linear":
        return own / scaling["factor"], 1.0
    original = scaling.get("original_max_position_embeddings") or config["max_position_embeddings"]
    if kind == "llama3":
        return _llama3(own, scaling, original), 1.0
    if kind == "yarn":
        return _yarn(own, theta, scaling, original)
    if kind == "longrope":
        first = config.get("original_max_position_embeddings")
        factor = config["max_position_embeddings"] / first if first else scaling["factor"]
        told = math.sqrt(1 + math.log(factor) / math.log(first or original)) if factor > 1 else 1.0
        return own / np.array(scaling["long_factor"], np.float64), scaling.get("attention_factor") or told
    raise ValueError(f"rope_type {kind!r} is not known")


def _llama3(own: np.ndarray, scaling: dict, original: int) -> np.ndarray:
    """Frequencies that turn less than ``low_freq_factor`` times within ``original`` are divided by the
    factor, those that turn more than ``high_freq_factor`` times stay; between them both are mixed."""
    turns = original * own / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return own * (kept + (1 - kept) / scaling["factor"])


def _yarn(own: np.ndarray, theta: float, scaling: dict, original: int) -> tuple[np.ndarray, float]:
    factor, size = scaling["factor"], 2 * len(own)

    def index(turns: float) -> float:
        return size * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    def sharper(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    first, last = index(scaling.get("beta_fast") or 32), index(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    last += 1e-3 if first == last else 0
    divided = np.clip((np.arange(len(own)) - first) / (last - first), 0, 1)
    one, all_dimensions = scaling.get("mscale"), scaling.get("mscale_all_dim")
    told = sharper(one) / sharper(all_dimensions) if one and all_dimensions else sharper(1.0)
    return own * (1 - divided + divided / factor), scaling.get("attention_factor") or told


def verify_rope(folder: Path, inv_freq: np.ndarray, attention_factor: float) -> None:
    """Raises Failure unless the older keys of config.json in ``folder`` give ``inv_freq`` [dimensions / 2]
    and ``attention_factor``, what the model was trained with."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    where = f"saved model: {folder}: by rope_theta and rope_scaling in config.json, transformers 4 and mlx-lm"
    try:
        found, factor = read_rope(config)
    except (KeyError, ValueError) as error:
        raise Failure(f"{where} cannot read the RoPE: {error}") from None
    if found.shape != inv_freq.shape or not np.allclose(found, inv_freq, rtol=1e-9, atol=0):
        raise Failure(
            f"{where} would compute the frequencies {found[:2]}..., and {inv_freq[:2]}... were trained"
        )
    if not math.isclose(factor, attention_factor, rel_tol=1e-6):
        raise Failure(f"{where} would multiply cos and sin by {factor:g}, not by {attention_factor:g}")


def state_tokenizer(folder: Path, tokenizer) -> None:
    """Makes tokenizer_config.json in ``folder``, where transformers 5 has saved ``tokenizer``, one that
    transformers 4 reads too, in place.

    4.57 fails on a list of extra tokens and on classes that are new; the Llama class of its own writes begin
    and end where ``add_bos_token`` and ``add_eos_token`` say, whatever tokenizer.json says, and so does
    llama.cpp.  Raises Failure if transformers 5 then reads another tokenizer.
    """
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(extra := settings.get("extra_special_tokens"), list):
        del settings["extra_special_tokens"]
        settings["additional_special_tokens"] = extra
    if type(tokenizer).__module__.startswith("transformers.") and type(tokenizer).__name__ not in OWN_CODE:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    written = tokenizer("a")["input_ids"]
    settings |= {
        "add_bos_token": tokenizer.bos_token_id is not None and written[0] == tokenizer.bos_token_id,
        "add_eos_token": tokenizer.eos_token_id is not None and written[-1] == tokenizer.eos_token_id,
        # Defaults of the class that was named before.
        "model_input_names": list(tokenizer.model_input_names),
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "clean_up_tokenization_spaces": bool(tokenizer.clean_up_tokenization_spaces),
    }
    storage.write_json(path, settings)
    verify_tokenizer(folder, tokenizer)


def verify_tokenizer(folder: Path, tokenizer) -> None:
    """Raises Failure unless transformers reads ``tokenizer``, a fast one, from ``folder``."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def told(one) -> list:
        definition = json.loads(one.backend_tokenizer.to_str())
        definition["truncation"] = definition["padding"] = None  # the last call's
        return [definition, one.special_tokens_map, one.all_special_ids, one.chat_template]

    if told(found) != told(tokenizer):
        raise Failure(f"saved model: {folder} holds another tokenizer than the run's")
