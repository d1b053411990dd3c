"""What is refused of a base model: other kinds of models, keys that change attention or positions, what
contradicts itself, ids without an embedding.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from endprompt import BadInput
from endprompt.bases import families
from endprompt.bases.unreadable import UNREADABLE
from endprompt.positions import rope


def refuse_kernels(config, key: str) -> None:
    """Raises BadInput beginning with ``key`` if config.json names attention on the hub, which transformers
    would fetch and run whatever it is told to use.
    """
    found = getattr(config, "_attn_implementation", None)
    if found is not None and (not isinstance(found, str) or "/" in found):
        raise BadInput(
            f"{key}: config.json asks for attention by {found!r:.60}, code that is not part of transformers;"
            " take attn_implementation out of it"
        )


def refuse_quantized(config) -> None:
    """Raises BadInput if config.json says that the files hold quantized weights: their steps are too coarse
    to be trained, and transformers reads them only with packages, and on hardware, of each format's own.
    """
    for key in ("quantization_config", "compression_config"):
        if not (found := getattr(config, key, None)):
            continue
        said = found if isinstance(found, dict) else getattr(found, "__dict__", {})
        method = said.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in said else f"{found!r:.60}")
        raise BadInput(
            f"model: {key} in its config.json says that its weights are quantized ({method!s:.60}); name the"
            " unquantized model (train.lora.quantize: nf4 trains adapters on it in 4 bits)"
        )


def refuse_other_kinds(config, where: str) -> None:
    """Raises BadInput beginning with ``where`` unless a model of ``config`` continues text, reading it from
    left to right."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    named = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    known = named in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    )
    two_way = (
        config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and getattr(config, "is_decoder", True) is False
    )
    if getattr(config, "is_encoder_decoder", False) or two_way or ("For" in named and not known):
        raise BadInput(
            f"{where} is a {named} of type {config.model_type!r}, and no decoder that continues text; "
            "name a causal language model"
        )


# What a config.json may hold that changes attention, positions or logits in transformers or in an engine that
# serves the model, and that is neither trained nor checked here: (its keys, what it does).  Null, false, 0
# and empty values switch it off.
CHANGES_ATTENTION = (
    (
        r"(use_)?dual_chunk(_attention|_attn)?(_config)?",
        "dual chunk attention (Qwen2.5-1M), by which vLLM moves positions",
    ),
    (r"(use_)?(block_)?sparse_att(entio)?n(_\w+)?", "sparse attention, by which an engine leaves keys out"),
    (r"use_logn_attn", "log-n attention (Qwen-1), which multiplies scores a second time"),
    (r"use_dynamic_ntk", "dynamic NTK (Qwen-1), by which RoPE changes with the row's length"),
    (r"(use_)?alibi(_\w+)?", "ALiBi, which adds distances to scores in place of RoPE"),
    (r"(attn|attention|final)_logits?_soft_?cap(ping)?", "soft-capping of logits (Gemma-2)"),
    (r"(attention_chunk|chunk_attention)_size", "chunked attention (Llama-4), by which rows are cut"),
    (r"interleaved_sliding_window|sliding_window_pattern", "sliding windows in some layers"),
    (r"no_rope_layer_interval|nope_layer_interval", "layers without RoPE (SmolLM3, Llama-4)"),
    (r"attn_temperature_tuning|llama_4_scaling(_\w+)?", "scores that grow with the position (Llama-4)"),
    (r"use_qk_norm|qk_layernorm|qk_norm", "normalized queries and keys, unknown to this type"),
    (r"rope_(scaling_type|local_base_freq)", "a scaled RoPE under another name"),
    (r"use_bidirectional_attention|bidirectional(_attention)?", "attention to later tokens"),
)
# The same for factors, which 1 switches off.
FACTORS = (
    (r"partial_rotary_factor|rotary_pct|rotary_percent(age)?", "RoPE on a part of each head (GLM-4, Phi)"),
    (r"rope_(scaling_factor|freq_scale)", "a scaled RoPE under another name"),
    (r"rope_ratio", "a RoPE base multiplied by it (ChatGLM)"),
    (r"logits?_scal(e|ing)", "scaled logits (Granite, Cohere), which the loss would not see"),
    (r"(attention|residual|embedding)_multiplier", "scaled attention, residuals or embeddings (Granite)"),
)


def refuse_foreign_keys(config, written: dict, windowed: int | None) -> None:
    """Raises BadInput if ``config`` or config.json as ``written`` has a key set by which attention, positions
    or logits differ from a plain model's.  transformers ignores some that engines heed: what is trained and
    scored here would be served otherwise.

    windowed: tokens of the attention window in use; None without.
    """

    def refuse(key: str, value, why: str) -> None:
        raise BadInput(
            f"model: {key} in its config.json is {value!r:.60}: {why}, which is neither trained nor checked "
            "here; take another base, or take the key out if the weights were trained without it"
        )

    found, family = config.to_dict() | written, families.BY_TYPE[config.model_type]
    for key, value in _flat(found):
        name = key.rpartition(".")[2]
        if name in family.own:
            continue
        why = next((why for pattern, why in CHANGES_ATTENTION if value and re.fullmatch(pattern, name)), None)
        if value not in (None, 0, 1):  # True and False too
            why = why or next((why for pattern, why in FACTORS if re.fullmatch(pattern, name)), None)
        if why:
            refuse(key, value, why)
    plain: tuple[Any, ...]
    for key, plain in (("position_embedding_type", ("rope", "rotary")), ("is_causal", (True,))):
        if found.get(key) is not None and found[key] not in plain:
            refuse(key, found[key], "no causal attention with RoPE")
    kinds = ("full_attention", families.LOCAL) if windowed or family.local else ("full_attention",)
    switches = (0, 1) if "no_rope_layers" in family.own else (1,)
    for key, plain in (("no_rope_layers", switches), ("layer_types", kinds)):
        values = found.get(key) or ()
        if not isinstance(values, (list, tuple)) or any(value not in plain for value in values):
            refuse(key, values, "layers that attend in another way than the rest")


def _flat(found: dict) -> Iterator[tuple[str, Any]]:
    """The keys of a config with those of its rope_parameters, which some families nest by kind of layer."""
    yield from found.items()
    parameters = found.get("rope_parameters")
    for key, value in (parameters if isinstance(parameters, dict) else {}).items():
        yield f"rope_parameters.{key}", value
        for inner, one in (value if isinstance(value, dict) else {}).items():
            yield f"rope_parameters.{key}.{inner}", one


def _number(value: Any, most: float = float("inf")) -> bool:
    return type(value) in (int, float) and 0 < value <= most and value < float("inf")


def _wrong(config) -> Iterator[tuple[str, str]]:
    """(key, what it must be) of the numbers of a family that cannot be right."""
    family, layers = families.BY_TYPE[config.model_type], config.num_hidden_layers
    for key in family.own:
        if key.endswith(("_scaling", "_multiplier")) and not _number(getattr(config, key, 1)):
            yield key, "a positive number"
    heads, kv = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    if not (_number(heads) and _number(kv)) or heads % kv:
        yield "num_key_value_heads", f"a divisor of num_attention_heads {heads}"
    if (counts := families.experts(config)) is not None and not 1 <= counts[1] <= counts[0]:
        yield "num_experts_per_tok", f"at least 1 and at most the layer's {counts[0]} experts"
    share = rope.parameters(config).get("partial_rotary_factor")
    if share is not None and (not _number(share, 1) or rope.rotary_dimensions(config) < 4):
        yield "partial_rotary_factor", "the share of a head's dimensions, at most 1 and at least 4 of them"
    if share is None and rope.rotary_dimensions(config) % 2:
        yield "head_dim", "an even number, for RoPE turns pairs"
    for key in ("layer_types", "no_rope_layers"):
        if (values := getattr(config, key, None)) is not None and len(values) != layers:
            yield key, f"{layers} values, one a layer"


def refuse_wrong_numbers(config) -> None:
    """Raises BadInput if a number or a list of the family's cannot be right, or leaves nothing to scale."""
    for key, wanted in _wrong(config):
        value = getattr(config, key, rope.parameters(config).get(key))
        raise BadInput(f"model: {key} in its config.json is {value!r:.60}, and must be {wanted}; mend it")
    if not any(getattr(config, "no_rope_layers", None) or [1]):
        raise BadInput("model: no_rope_layers in its config.json leaves no RoPE to scale; mend it")


def refuse_wrong_windows(config, written: dict, window: int) -> None:
    """Raises BadInput if the layers with a window of their own cannot keep it, and their RoPE, while the rest
    are extended.

    written: config.json; window: tokens that the base reads.
    """
    if not families.BY_TYPE[config.model_type].local:
        return
    own, local = config.rope_parameters.get(families.LOCAL), config.sliding_window
    if all(families.local_layers(config)):
        raise BadInput(
            "model: layer_types in its config.json has sliding windows in all layers, and none that could see"
            " a longer row; take another base"
        )
    if type(local) is not int or not 0 < local <= window:
        raise BadInput(
            f"model: sliding_window in its config.json is {local!r:.60}, no number of tokens within the"
            f" window of {window}; the RoPE of those layers is not scaled, so mend it"
        )
    if not isinstance(own, dict) or own.get("rope_type", "default") != "default":
        raise BadInput(
            f"model: rope_parameters.{families.LOCAL} in its config.json is {own!r:.60}, and the layers with"
            " a sliding window must keep a plain RoPE; mend it"
        )
    nested = (written.get("rope_parameters") or {}).get(families.LOCAL)
    places = (nested if isinstance(nested, dict) else {}, own)
    thetas = [written.get("rope_local_base_freq"), *(place.get("rope_theta") for place in places)]
    _refuse_two("rope_theta of the layers with a sliding window (rope_local_base_freq)", thetas)


def _refuse_two(key: str, values: list) -> None:
    """Raises BadInput if ``values`` of a key, as several places of config.json have them, differ."""
    values = [value for value in values if value is not None]
    other = next((value for value in values if value != values[0]), None)
    if other is not None:
        raise BadInput(
            f"model: {key} in its config.json is {values[0]!s:.40} and {other!s:.40}, and engines read one or"
            " the other; keep the right one"
        )


def _longrope(told: dict, written: dict) -> dict:
    """What the parameters ``told`` of a longrope leave out, as transformers derives it: Phi-3's older form
    has the factors of the pairs alone."""
    key = "original_max_position_embeddings"
    first: Any = told.get(key, written.get(key))
    window: Any = written.get("max_position_embeddings")
    if not (_number(first) and first > 1 and _number(window)):
        return {}
    factor = told.get("factor", window / first)
    by = math.sqrt(1 + math.log(factor) / math.log(first)) if _number(factor) and factor > 1 else 1.0
    return {key: first, "factor": factor, "attention_factor": by}


def _told(parameters: dict, written: dict) -> dict:
    """The scaling that ``parameters`` say, whatever its form; what stands beside it is left out.

    written: config.json.
    """
    beside = ("type", "rope_theta", "partial_rotary_factor")
    told = {key: value for key, value in parameters.items() if key not in beside and value is not None}
    told["rope_type"] = parameters.get("rope_type", parameters.get("type", "default"))
    return {**_longrope(told, written), **told} if told["rope_type"] == "longrope" else told


def _same(one: dict, other: dict) -> bool:
    def alike(a: Any, b: Any) -> bool:
        return a == b or _number(a) and _number(b) and math.isclose(a, b, rel_tol=1e-6)

    return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)


def refuse_contradictions(written: dict, originals: tuple[int, ...]) -> None:
    """Raises BadInput if config.json as ``written`` says one thing in two ways, of which engines read one or
    the other.

    originals: what original_max_position_embeddings may be; the first is told.
    """
    old, new = written.get("rope_scaling") or {}, written.get("rope_parameters") or {}
    if not isinstance(old, dict) or not isinstance(new, dict):
        raise BadInput("model: rope_scaling or rope_parameters in its config.json is no mapping; mend it")
    new = new[rope.LAYERS] if isinstance(new.get(rope.LAYERS), dict) else new
    if old and new and not _same(_told(old, written), _told(new, written)):
        raise BadInput(
            "model: rope_scaling and rope_parameters in its config.json disagree, and engines read one or "
            "the other; keep the right one"
        )
    for key in ("rope_theta", "partial_rotary_factor"):
        _refuse_two(key, [place.get(key) for place in (written, old, new)])
    before = written.get("original_max_position_embeddings")
    if before and before not in originals:
        raise BadInput(
            f"model: original_max_position_embeddings in its config.json is {before!r:.60}, and its window "
            f"{originals[0]}; engines would scale from one or the other; take it out, or set "
            "model.original_length"
        )


def refuse_theta(config) -> None:
    """Raises BadInput unless the base of the RoPE is a positive number."""
    theta: Any = rope.parameters(config).get("rope_theta")
    if type(theta) not in (int, float) or not 0 < theta < float("inf"):
        raise BadInput(f"model: rope_theta in its config.json is {theta!r:.60}, no positive number; mend it")


def _tensor(folder: Path, name: str) -> tuple[Path, str] | None:
    """(file, its full name there) of the tensor ``name`` in the safetensors that transformers would read of
    ``folder``; None: no such.

    Some files leave out what ``name`` begins with: its last two parts count.  Raises what JSON and
    safetensors raise on damaged files.
    """
    from safetensors import safe_open

    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if file.is_file():
        with safe_open(file, "pt") as opened:
            places = dict.fromkeys(opened.keys(), file.name)
    elif index.is_file():
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    else:
        return None
    return next(
        (
            (folder / there, key)
            for key, there in places.items()
            if key.split(".")[-2:] == name.split(".")[-2:]
        ),
        None,
    )


def refuse_untied(where: str, source: str, config, revision: str | None = None) -> None:
    """Raises BadInput beginning with ``where`` if ``config`` says that input and output embeddings are one
    matrix, and the safetensors of ``source`` (a folder, or a hub id as far as it was fetched) hold two that
    differ.

    transformers trains both, with a warning; the harness, and engines that go by config.json, use the input's
    for both.  Two equal copies are one matrix.  A GGUF file says nothing of its own about it: its config is
    read off the tensors that are there.
    """
    import torch
    from safetensors import safe_open
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    text = config.get_text_config()
    if not getattr(text, "tie_word_embeddings", False) or (folder := _snapshot(source, revision)) is None:
        return
    known = getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None), "_tied_weights_keys", None)
    known = known if isinstance(known, dict) else {"lm_head.weight": "model.embed_tokens.weight"}
    for one, other in known.items():
        try:
            places = [place for name in (other, one) if (place := _tensor(folder, name))]
            if len(places) < 2:
                continue
            with contextlib.ExitStack() as stack:
                first, second = (
                    stack.enter_context(safe_open(file, "pt")).get_slice(key) for file, key in places
                )
                same, rows = first.get_shape() == second.get_shape(), first.get_shape()[0]
                same = same and all(
                    torch.equal(first[row : row + 4096].float(), second[row : row + 4096].float())
                    for row in range(0, rows, 4096)
                )
        except (*UNREADABLE, RuntimeError):  # whoever loads the files says what is wrong with them
            return
        if not same:
            raise BadInput(
                f"{where}: config.json says tie_word_embeddings, one matrix for input and output, but"
                f" {places[1][1]} in {places[1][0].name} is another than {places[0][1]}; set"
                f" tie_word_embeddings to false in config.json, or take {places[1][1]} out of the files"
            )


def _snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of ``name``: itself, or where the hub's client keeps what it fetched of it; None if nothing
    is there.
    """
    from transformers.utils import cached_file

    if os.path.isdir(name):
        return Path(name)
    try:
        return Path(cached_file(name, "config.json", revision=revision, local_files_only=True)).parent
    except (OSError, ValueError):
        return None


def check_vocabulary(tokenizer, config, where: str) -> None:
    """Raises BadInput beginning with ``where`` if ``tokenizer`` writes ids that a model of ``config`` has no
    embedding for.

    Tokens added to it later may have none: ``check_ids`` refuses texts that hold them.
    """
    greatest = max(tokenizer.vocab_size - 1, tokenizer.eos_token_id or 0)
    if greatest >= config.vocab_size:
        raise BadInput(
            f"{where} writes ids up to {greatest}, but the model has embeddings for 0 to"
            f" {config.vocab_size - 1} alone; give it its own tokenizer"
        )


def check_ids(ids, tokenizer, embeddings: int, where: str) -> None:
    """Raises BadInput naming the first of ``ids`` (numbers, or an array of them) that a model with
    ``embeddings`` rows has no embedding for.

    Tokens that were added to a tokenizer and not to its model do no harm until a text holds them.
    """
    if len(ids) and (max(ids) if isinstance(ids, list) else ids.max()) >= embeddings:
        token = next(int(token) for token in ids if token >= embeddings)
        raise BadInput(
            f"{where} holds the token {tokenizer.convert_ids_to_tokens(token)!r} ({token}), and the model has"
            f" embeddings for 0 to {embeddings - 1} alone; take it out of the text, or use a model whose"
            " embeddings were resized for its tokenizer"
        )
