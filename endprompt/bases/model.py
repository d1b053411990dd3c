"""Loading: tokenizer and config, the scaled model, and what of them can be refused early."""

import contextlib
import copy
import functools
import importlib.util
import json
import os
import re
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from endprompt import BadInput
from endprompt.bases import sharpen
from endprompt.positions import rope

SUPPORTED = ("llama", "mistral", "qwen2")
# Where a config.json may state the window besides max_position_embeddings.  vLLM takes the least of what it
# finds, SGLang the first.
WINDOW_KEYS = (
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "seq_length",
    "seq_len",
    "model_max_length",
    "max_sequence_length",
    "max_target_positions",
    "max_model_len",
)
GENERATION_KEYS = ("max_length", "max_cache_len")  # tokens of a prompt with its answer
TOKENIZER_KEYS = ("max_length", "max_len")  # besides model_max_length
MEND = "mend its files, or name another model"
CONVERT = (
    "convert them once, where you trust them: AutoModelForCausalLM.from_pretrained(OLD,"
    " use_safetensors=False).save_pretrained(NEW)"
)
# What transformers raises on files that are missing, damaged, or not what they say: configs with wrong types,
# cut safetensors and GGUF files.
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    AssertionError,
    ArithmeticError,
    StrictDataclassError,
    SafetensorError,
    struct.error,
)


class Named(Protocol):
    """What names a base: a recipe's ``model`` section, its ``lengths.target``, and where its paths lead."""

    model: Any
    lengths: Any

    def path(self, value: str) -> Path | None: ...


def locate(recipe: Named) -> dict:
    """The arguments that find the model for ``from_pretrained``: a local folder, ``package:NAME`` (an
    installed Python package), or a hub id.

    Raises BadInput if there is nothing of that name, or in a folder what ``check_folder`` refuses.
    """
    name = recipe.model.name_or_path
    if name.startswith("package:"):
        package = name.removeprefix("package:")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise BadInput(
                f"model.name_or_path: the Python package {package!r} is not installed; pip install"
                f" {package.replace('_', '-')}, or name a folder or hub id"
            )
        if recipe.model.gguf_file and Path(recipe.model.gguf_file).name != recipe.model.gguf_file:
            raise BadInput(
                f"model.gguf_file: {recipe.model.gguf_file!r} is a path; with package:{package} give the"
                " file's name alone"
            )
        # A data file may sit anywhere in the package: take the folder that holds the one asked for.
        root = Path(next(iter(spec.submodule_search_locations)))
        found = next(iter(sorted(root.rglob(recipe.model.gguf_file or "config.json"))), None)
        if found is None:
            raise BadInput(
                f"model: the package {package!r} has no file {recipe.model.gguf_file or 'config.json'}; set"
                " model.gguf_file to one it has"
            )
        path = str(found.parent)
    else:
        local = recipe.path(name)
        path = str(local) if local else name
        if local is None and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
            raise BadInput(
                f"model.name_or_path: there is no folder {name}; give a folder with config.json,"
                " package:NAME, or a hub id"
            )
        if local is not None and not local.is_dir():
            raise BadInput(
                f"model.name_or_path: {local} is no folder; name the folder with config.json that it is in"
            )
        if local is not None and recipe.model.gguf_file and not (local / recipe.model.gguf_file).is_file():
            raise BadInput(f"model.gguf_file: {local} has no file {recipe.model.gguf_file}")
    if os.path.isdir(path):
        check_folder(Path(path), "model.name_or_path", bool(recipe.model.gguf_file))
    extra = {"revision": recipe.model.revision, "gguf_file": recipe.model.gguf_file}
    return {
        "pretrained_model_name_or_path": path,
        "trust_remote_code": recipe.model.trust_remote_code,
        **{key: value for key, value in extra.items() if value},
    }


def check_folder(folder: Path, key: str, gguf: bool = False) -> None:
    """Raises BadInput beginning with ``key`` if the model in ``folder`` is an adapter, has its weights in
    pickles alone, or holds what is no file.

    A pickle is a program that runs when it is read; a pipe is waited for without end.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".safetensors", ".gguf") and not path.is_file():
            raise BadInput(
                f"{key}: {path} is no regular file (or a link to nothing); put the file there, or remove it"
            )
    if gguf:
        return
    if (folder / "adapter_config.json").exists():
        raise BadInput(
            f"{key}: {folder} is an adapter, not a whole model; merge it into its base once (peft:"
            " merge_and_unload), save that, and name its folder"
        )
    pickles = sorted(
        path.name for pattern in ("pytorch_model*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)
    )
    if pickles and not any(folder.glob("*.safetensors")):
        raise BadInput(
            f"{key}: {folder} has its weights in {pickles[0]} alone; weights must be safetensors, which"
            f" cannot run code: {CONVERT}"
        )


def reason(error: Exception) -> str:
    """Why transformers could not load something, in one line and in this program's own terms."""
    text = str(error).strip()
    if "trust_remote_code" in text or "custom code" in text:
        return (
            "it wants to run Python code of its own, which is not done unasked; read that code, and if you"
            " trust it set model.trust_remote_code=true"
        )
    if "use_safetensors" in text:
        return f"weights must be safetensors; {CONVERT}"
    return text.splitlines()[0] if text else type(error).__name__


@contextlib.contextmanager
def without_reports():
    """Inside, transformers logs errors alone, and draws no bars into what is no terminal."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _loading(what: str, recipe: Named, function):
    try:
        with without_reports():
            return function()
    except BadInput:
        raise
    except Exception as error:  # as tokenizers' own errors, which are plain Exceptions
        raise BadInput(
            f"model.name_or_path: {what} of {recipe.model.name_or_path!r} cannot be loaded: {reason(error)};"
            f" {MEND}"
        ) from None


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


def load_weights(where: str, **arguments):
    """AutoModelForCausalLM.from_pretrained(**arguments), of safetensors or a GGUF file, with all weights from
    the files.

    Raises BadInput beginning with ``where`` if files are unusable, if weights are missing from them or have
    another shape than config.json says, which transformers would fill with random values, or if what
    ``refuse_untied`` refuses.
    """
    from transformers import AutoModelForCausalLM

    if "gguf_file" not in arguments:
        arguments |= {
            "use_safetensors": True,
            "ignore_mismatched_sizes": True,
        }  # mismatches are looked at below, and told in one line
    try:
        with without_reports():
            network, found = AutoModelForCausalLM.from_pretrained(**arguments, output_loading_info=True)
    except UNREADABLE as error:
        raise BadInput(f"{where} cannot be loaded: {reason(error)}; {MEND}") from None
    except RuntimeError as error:
        if not (
            mismatch := next(
                (
                    line.strip()
                    for line in str(error).splitlines()
                    if "size mismatch" in line or "negative dimension" in line
                ),
                None,
            )
        ):
            raise
        raise BadInput(
            f"{where} do not fit config.json: {mismatch}; mend the folder"
        ) from None  # as partitioned loading tells it
    if found["mismatched_keys"]:
        name, there, wanted = sorted(found["mismatched_keys"])[0]
        raise BadInput(
            f"{where} do not fit config.json: {name} is {list(there)} in the files, and {list(wanted)} by"
            f" config.json ({len(found['mismatched_keys'])} such); mend the folder"
        )
    if found["missing_keys"]:
        raise BadInput(
            f"{where} lack {sorted(found['missing_keys'])[:5]}; random values would stand in their place;"
            f" {MEND}"
        )
    if found["unexpected_keys"] and os.environ.get("RANK", "0") == "0":
        print(
            f"warning: {where}: {len(found['unexpected_keys'])} tensors have no place in a"
            f" {network.config.model_type} model and are left out, first"
            f" {sorted(found['unexpected_keys'])[:3]}",
            file=sys.stderr,
        )
    if "gguf_file" not in arguments:
        refuse_untied(
            where, arguments["pretrained_model_name_or_path"], network.config, arguments.get("revision")
        )
    return network


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

    found = config.to_dict() | written
    parameters = found.get("rope_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    nested = {f"rope_parameters.{key}": value for key, value in parameters.items()}
    for key, value in {**found, **nested}.items():
        name = key.removeprefix("rope_parameters.")
        why = next((why for pattern, why in CHANGES_ATTENTION if value and re.fullmatch(pattern, name)), None)
        if value not in (None, 0, 1):  # True and False too
            why = why or next((why for pattern, why in FACTORS if re.fullmatch(pattern, name)), None)
            if why is None and key in nested and name not in ("rope_theta", "rope_type", "type"):
                why = "a part of a RoPE scaling that is not there"
        if why:
            refuse(key, value, why)
    plain: tuple[Any, ...]
    for key, plain in (("position_embedding_type", ("rope", "rotary")), ("is_causal", (True,))):
        if found.get(key) is not None and found[key] not in plain:
            refuse(key, found[key], "no causal attention with RoPE")
    kinds = ("full_attention", "sliding_attention") if windowed else ("full_attention",)
    for key, plain in (("no_rope_layers", (1,)), ("layer_types", kinds)):
        values = found.get(key) or ()
        if not isinstance(values, (list, tuple)) or any(value not in plain for value in values):
            refuse(key, values, "layers that attend in another way than the rest")


def refuse_contradictions(config, written: dict, original: int) -> None:
    """Raises BadInput if config.json as ``written`` says one thing in two ways, of which engines read one or
    the other."""

    def told(parameters: dict) -> dict:
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        rest = {
            key: value
            for key, value in parameters.items()
            if key not in ("type", "rope_theta") and value is not None
        }
        return {"rope_type": kind} | rest

    old, new = written.get("rope_scaling") or {}, written.get("rope_parameters") or {}
    if not isinstance(old, dict) or not isinstance(new, dict):
        raise BadInput("model: rope_scaling or rope_parameters in its config.json is no mapping; mend it")
    if old and new and told(old) != told(new):
        raise BadInput(
            "model: rope_scaling and rope_parameters in its config.json disagree, and engines read one or "
            "the other; keep the right one"
        )
    thetas = [place["rope_theta"] for place in (written, old, new) if place.get("rope_theta") is not None]
    if any(theta != thetas[0] for theta in thetas):
        raise BadInput(
            f"model: rope_theta in its config.json is {' and '.join(map(str, thetas)):.60}, and engines read "
            "one or the other; keep the right one"
        )
    before = getattr(config, "original_max_position_embeddings", None)
    if before and before != original:
        raise BadInput(
            f"model: original_max_position_embeddings in its config.json is {before!r:.60}, and its window "
            f"{original}; engines would scale from one or the other; take it out, or set "
            "model.original_length"
        )


def load_config(recipe: Named, where: dict | None = None):
    """The base model's config.  Raises BadInput on a type we do not know, a scaled RoPE, attention that is
    not plain, what contradicts itself, or a target that extends nothing.

    transformers fills a missing window or rope_theta with a default of its own: the window is then an error,
    the theta a warning.
    """
    from transformers import AutoConfig, PretrainedConfig

    where = where or locate(recipe)
    config = _loading("config", recipe, lambda: AutoConfig.from_pretrained(**where))
    refuse_kernels(config, "model")
    if config.model_type not in SUPPORTED:
        raise BadInput(
            f"model: type {config.model_type!r} is not supported; the RoPE of {', '.join(SUPPORTED)}"
            " models is"
        )
    rope.refuse_scaled(config)
    written: dict = {}
    if not recipe.model.gguf_file:
        written = _loading(
            "config",
            recipe,
            lambda: PretrainedConfig.get_config_dict(**{**where, "trust_remote_code": False})[0],
        )
        if "max_position_embeddings" not in written and recipe.model.original_length is None:
            raise BadInput(
                "model: its config.json has no max_position_embeddings, the window to extend; set"
                " model.original_length"
            )
        if "rope_theta" not in {**written, **(written.get("rope_parameters") or {})}:
            print(
                f"warning: config.json has no rope_theta; {config.rope_parameters.get('rope_theta')} is"
                f" assumed, the default of {config.model_type}",
                file=sys.stderr,
            )
    theta: Any = (config.rope_parameters or {}).get("rope_theta")
    if type(theta) not in (int, float) or not 0 < theta < float("inf"):
        raise BadInput(f"model: rope_theta in its config.json is {theta!r:.60}, no positive number; mend it")
    # use_sliding_window is a key of qwen2; a mistral model has its window whatever that says.
    unused = config.model_type != "mistral" and not getattr(config, "use_sliding_window", True)
    windowed = None if unused else getattr(config, "sliding_window", None)
    if windowed and type(windowed) is not int:
        raise BadInput(
            f"model: sliding_window in its config.json is {windowed!r:.60}, no number of tokens; mend it"
        )
    if windowed and windowed < recipe.lengths.target:
        raise BadInput(
            f"model: attention is limited to a sliding window of {windowed} tokens, which would cut a row;"
            " use a base model without one"
        )
    original = original_length(recipe, config)
    if type(original) is not int or original < 1:
        raise BadInput(
            f"model: max_position_embeddings in its config.json is {original!r:.60}, no positive number of"
            " tokens; mend it, or set model.original_length"
        )
    refuse_foreign_keys(config, written, windowed)
    refuse_contradictions(config, written, original)
    sharpen.inherited(config)
    if recipe.lengths.target <= original:
        raise BadInput(
            f"lengths.target {recipe.lengths.target} does not exceed the model's own window of {original};"
            " raise it (or set model.original_length, if config.json overstates the window it was"
            " trained on)"
        )
    return config


def original_length(recipe: Named, config) -> int:
    return recipe.model.original_length or config.max_position_embeddings


def load_tokenizer(recipe: Named, where: dict | None = None):
    """The model's own fast tokenizer.  Raises BadInput if there is none, or if it has no end-of-sequence
    token.
    """
    from transformers import AutoTokenizer

    where = where or locate(recipe)
    tokenizer = _loading("tokenizer", recipe, lambda: AutoTokenizer.from_pretrained(**where))
    if not tokenizer.is_fast:
        raise BadInput(
            f"model: {recipe.model.name_or_path!r} has no fast tokenizer (tokenizer.json); convert it once"
            " with transformers and save it"
        )
    if tokenizer.eos_token_id is None:
        raise BadInput(
            f"model: the tokenizer of {recipe.model.name_or_path!r} has no end-of-sequence token, which joins"
            " documents; set eos_token"
        )
    return tokenizer


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


def state_length(network, tokenizer, target_length: int) -> None:
    """Makes every length that is saved with ``network`` and ``tokenizer`` say ``target_length`` tokens, in
    place.

    max_position_embeddings is rope.apply's.  A tokenizer that had no limit (1e30) gets one: without it
    ``truncation=True`` cuts nothing, and a text longer than the window is read to its end, with positions
    that nobody trained.  What limits the answer alone (max_new_tokens) stays.
    """
    from transformers import GenerationConfig

    for key in WINDOW_KEYS:
        if getattr(network.config, key, None) is not None:
            setattr(network.config, key, target_length)
    stated = {
        key: target_length
        for key in GENERATION_KEYS
        if getattr(network.generation_config, key, None) is not None
    }
    if stated:
        # transformers saves again what it has loaded, but checks what was changed since: a temperature
        # without do_sample, which many bases have, would end the run when it saves.
        with tempfile.TemporaryDirectory() as folder, without_reports():
            network.generation_config.save_pretrained(folder)
            network.generation_config = GenerationConfig.from_pretrained(folder, **stated)
    tokenizer.model_max_length = target_length
    backend = tokenizer.backend_tokenizer
    if backend.truncation:
        backend.enable_truncation(**{**backend.truncation, "max_length": target_length})
    if backend.padding and backend.padding["length"]:  # to the window's length, whatever the text
        backend.no_padding()
    # What a tokenizer takes from tokenizer.json, or was once saved with, is saved among its settings again.
    for key in TOKENIZER_KEYS:
        if tokenizer.init_kwargs.get(key) is not None:
            tokenizer.init_kwargs[key] = target_length


def forget_code(network, tokenizer) -> None:
    """Takes the names of Python code that was not run out of what is saved with ``network`` and
    ``tokenizer``, in place.

    transformers keeps them but not the files, and ``trust_remote_code=True`` would then look for what is not
    there.
    """
    if type(network).__module__.startswith("transformers.") and hasattr(network.config, "auto_map"):
        del network.config.auto_map
    if type(tokenizer).__module__.startswith("transformers."):
        tokenizer.init_kwargs.pop("auto_map", None)


def stated_lengths(folder: Path) -> dict[str, int | None]:
    """{"file: key": tokens} of every window that the files of the model in ``folder`` state; None: a
    tokenizer's that states none."""

    def read(name: str) -> dict:
        path = folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    settings, definition = read("tokenizer_config.json"), read("tokenizer.json")
    found = {
        f"{name}: {key}": value
        for name, keys in (
            ("config.json", ("max_position_embeddings", *WINDOW_KEYS)),
            ("generation_config.json", GENERATION_KEYS),
            ("tokenizer_config.json", TOKENIZER_KEYS),
        )
        for key, value in read(name).items()
        if key in keys
    }
    found["tokenizer.json: truncation"] = (definition.get("truncation") or {}).get("max_length")
    strategy = (definition.get("padding") or {}).get("strategy")
    found["tokenizer.json: padding"] = strategy.get("Fixed") if isinstance(strategy, dict) else None
    found = {key: value for key, value in found.items() if value is not None}
    return found | {"tokenizer_config.json: model_max_length": settings.get("model_max_length")}


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


def pad_token_id(tokenizer, embeddings: int = 2**31) -> int:
    """What rows are filled up with: the tokenizer's own padding where the model has an embedding for it, else
    the end of a document.
    """
    padding = tokenizer.pad_token_id
    return tokenizer.eos_token_id if padding is None or padding >= embeddings else padding


def attention_implementation(recipe: Named, cuda: bool) -> str:
    """flash_attention_2 where it is installed and there is a GPU, else sdpa; the recipe may name another."""
    from transformers.utils import is_flash_attn_2_available

    wanted = recipe.model.attn_implementation
    if wanted == "flash_attention_2" and not (cuda and is_flash_attn_2_available()):
        raise BadInput(
            "model.attn_implementation: flash_attention_2 needs a GPU and the package flash-attn; use sdpa,"
            " or null to choose automatically"
        )
    return wanted or ("flash_attention_2" if cuda and is_flash_attn_2_available() else "sdpa")


def supported_attention(recipe: Named, cuda: bool, config) -> str | None:
    """``attention_implementation`` for a model of any type; None, transformers' choice, if its class lacks it
    and the recipe names none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    chosen, kind = attention_implementation(recipe, cuda), MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    supports = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}.get(chosen, "")
    return chosen if recipe.model.attn_implementation or getattr(kind, supports, False) else None


class Base:
    """The base model that a recipe names: found once, its config and tokenizer read once, when asked for.

    Whatever is read raises BadInput on unusable files (see ``locate``, ``load_config``, ``load_tokenizer``).
    """

    def __init__(self, recipe: Named):
        self.recipe = recipe
        self.name = recipe.model.name_or_path

    @functools.cached_property
    def arguments(self) -> dict:
        """Those that find the model for ``from_pretrained``."""
        return locate(self.recipe)

    @functools.cached_property
    def config(self):
        """The checked config, as it came: whoever changes it takes a copy."""
        return load_config(self.recipe, self.arguments)

    @functools.cached_property
    def tokenizer(self):
        return load_tokenizer(self.recipe, self.arguments)

    @property
    def folder(self) -> Path:
        return Path(self.arguments["pretrained_model_name_or_path"])

    @property
    def original_length(self) -> int:
        """The window that the base was trained with, C."""
        return original_length(self.recipe, self.config)

    def check_vocabulary(self) -> None:
        """Raises BadInput unless the tokenizer's separator is a token that the model has an embedding for."""
        check_vocabulary(self.tokenizer, self.config, f"model: the tokenizer of {self.name!r}")

    def attention_implementation(self, cuda: bool) -> str:
        return attention_implementation(self.recipe, cuda)


def build(base: Base, scaling: rope.Scaling, dtype, cuda: bool):
    """The base model with its RoPE in place before it is built and its inv_freq checked afterwards.

    dtype: a torch dtype of the weights.  Under ZeRO-3 (a live TrainingArguments with a stage 3 file)
    parameters load partitioned, except a GGUF file's, which every rank holds whole until DeepSpeed starts.
    Raises BadInput on unusable files and on weights that are missing from them; Failure if the frequencies
    are not the expected ones.
    """
    config = copy.deepcopy(base.config)
    theta: Any = (config.rope_parameters or {}).get("rope_theta")
    rope.apply(config, scaling, base.recipe.lengths.target)
    arguments = dict(base.arguments)
    if base.recipe.model.gguf_file:
        from transformers import GgufConfig

        # Else the model stays marked as quantized, and transformers refuses to train and to save it.
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    model = load_weights(
        f"model.name_or_path: the weights of {base.name!r}",
        **arguments,
        config=config,
        dtype=dtype,
        attn_implementation=base.attention_implementation(cuda),
    )
    # transformers takes config.json's pad_token_id for it, and torch gives that row no gradient; it may be
    # the separator of documents.
    model.get_input_embeddings().padding_idx = None
    rope.verify(model.get_decoder().rotary_emb, model.config, scaling, theta)
    return model
