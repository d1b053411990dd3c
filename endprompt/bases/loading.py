"""Reading a base model: its config, its tokenizer and its weights."""

import contextlib
import os
import sys

from endprompt import BadInput
from endprompt.bases import families, lengths, quantized, sharpen
from endprompt.bases.locating import Named, locate
from endprompt.bases.refusals import (
    refuse_contradictions,
    refuse_foreign_keys,
    refuse_kernels,
    refuse_quantized,
    refuse_theta,
    refuse_untied,
    refuse_wrong_numbers,
    refuse_wrong_windows,
)
from endprompt.bases.unreadable import MEND, UNREADABLE, reason
from endprompt.positions import rope

SUPPORTED = tuple(families.BY_TYPE)


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


def load_config(recipe: Named, where: dict | None = None):
    """The base model's config.  Raises BadInput on a type we do not know, a scaled RoPE, attention that is
    not plain, what contradicts itself, or a target that extends nothing.

    transformers fills a missing window or rope_theta with a default of its own: the window is then an error,
    the theta a warning.
    """
    from transformers import AutoConfig

    where = where or locate(recipe)
    config = _loading("config", recipe, lambda: AutoConfig.from_pretrained(**where))
    refuse_kernels(config, "model")
    families.of(config)
    if not recipe.model.gguf_file:
        refuse_quantized(config)
    written = {} if recipe.model.gguf_file else _written(recipe, where, config)
    refuse_theta(config)
    windowed = _windowed(config, recipe.lengths.target)
    stated = recipe.model.original_length or config.max_position_embeddings
    if type(stated) is not int or stated < 1:
        raise BadInput(
            f"model: max_position_embeddings in its config.json is {stated!r:.60}, no positive number of"
            " tokens; mend it, or set model.original_length"
        )
    refuse_foreign_keys(config, written, windowed)
    refuse_wrong_numbers(config)
    own = rope.own_scheme(config)
    refuse_contradictions(written, _originals(config, own, stated))
    if recipe.model.gguf_file and isinstance(own, rope.Default):
        refuse_lost_scaling(recipe, where)
    sharpen.inherited(config)
    length = lengths.window(recipe, config, own)
    tokenizer_says = _tokenizer_says(recipe, where) if isinstance(own, rope.Linear) else None
    lengths.refuse_doubtful(recipe, config, own, tokenizer_says)
    refuse_wrong_windows(config, written, length)
    lengths.first_length(config, length)
    if recipe.lengths.target <= length:
        raise BadInput(
            f"lengths.target {recipe.lengths.target} does not exceed the model's own window of {length};"
            " raise it (or set model.original_length, if config.json overstates the window it was"
            " trained on)"
        )
    return config


def _written(recipe: Named, where: dict, config) -> dict:
    """config.json as it is written.  Raises BadInput if it names no window, and warns of an assumed theta."""
    from transformers import PretrainedConfig

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
    told = written.get("rope_parameters") or {}
    told = told[rope.LAYERS] if isinstance(told.get(rope.LAYERS), dict) else told
    if "rope_theta" not in {**written, **told}:
        print(
            f"warning: config.json has no rope_theta; {rope.parameters(config).get('rope_theta')} is"
            f" assumed, the default of {config.model_type}",
            file=sys.stderr,
        )
    return written


def _tokenizer_says(recipe: Named, where: dict):
    """The model_max_length of its tokenizer_config.json; None if there is none."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    def read():
        return get_tokenizer_config(where["pretrained_model_name_or_path"], revision=where.get("revision"))

    return None if recipe.model.gguf_file else _loading("tokenizer", recipe, read).get("model_max_length")


def _originals(config, own: rope.Scheme, stated: int) -> tuple[int, ...]:
    """What original_max_position_embeddings may say beside a RoPE that does not read it, or does.

    own: the base's RoPE; stated: its window.  A base that this program extended by a greater theta has an
    unscaled RoPE, and keeps the key as it came.
    """
    if not isinstance(own, rope.Default):
        return (getattr(own, "original_length", stated),)
    return stated, lengths.first_length(config, stated)


def _windowed(config, target: int) -> int | None:
    """Tokens of the attention window in use, None without, or with one in some layers alone, as the family
    has it.  Raises BadInput if it would cut a row."""
    family = families.BY_TYPE[config.model_type]
    if family.local:
        return None
    # What is no key of the family decides about nothing: the window is there whatever it says.
    unused = family.switch and not getattr(config, "use_sliding_window", True)
    windowed = None if unused else getattr(config, "sliding_window", None)
    if windowed and type(windowed) is not int:
        raise BadInput(
            f"model: sliding_window in its config.json is {windowed!r:.60}, no number of tokens; mend it"
        )
    if windowed and windowed < target:
        raise BadInput(
            f"model: attention is limited to a sliding window of {windowed} tokens, which would cut a row;"
            " use a base model without one"
        )
    return windowed


# Of a GGUF file: what frequencies are divided by.  transformers leaves it out, and the config says nothing.
LOST = ("rope_freqs.weight", "rope_factors_long.weight")
# The same of its metadata, ARCHITECTURE.rope.KEY: {key: values that scale nothing}.  llama.cpp takes a factor
# without a type for linear; ``scale_linear`` is its former name.
LOST_KEYS: dict[str, tuple] = {
    "scaling.type": ("none", ""),
    "scaling.factor": (0, 1),
    "scale_linear": (0, 1),
}


def _lost(path: str) -> str | None:
    """What of the GGUF file ``path`` scales its RoPE and is lost on the way to a config; None: nothing."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    if found := {tensor.name for tensor in reader.tensors} & set(LOST):
        return f"holds {sorted(found)[0]}, the scaling of a Llama-3.1, 3.2 or Phi-3,"
    kind = reader.fields["general.architecture"].contents()
    said = {key: field.contents() for key in LOST_KEYS if (field := reader.fields.get(f"{kind}.rope.{key}"))}
    if said.get("scaling.type") == "none":
        return None
    scaled = (f"{kind}.rope.{key} {value}" for key, value in said.items() if value not in LOST_KEYS[key])
    return next((f"says {one}, a scaling" for one in scaled), None)


def refuse_lost_scaling(recipe: Named, where: dict) -> None:
    """Raises BadInput if a GGUF file, of a config that names no scaling, scales its RoPE all the same."""
    from transformers.utils import cached_file

    def lost() -> str | None:
        name, file = where["pretrained_model_name_or_path"], recipe.model.gguf_file
        return _lost(cached_file(name, file, revision=where.get("revision")))

    if told := _loading("config", recipe, lost):
        raise BadInput(
            f"model.gguf_file: {recipe.model.gguf_file} {told} which transformers drops from its config, so"
            " that its RoPE would be another; name the model's safetensors, its folder before it was made a"
            " GGUF file"
        )


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


@contextlib.contextmanager
def whole_loading():
    """Inside, from_pretrained loads whole weights on this rank alone, even while a ZeRO-3 run lives."""
    from transformers.integrations import deepspeed

    before = deepspeed._hf_deepspeed_config_weak_ref() if deepspeed._hf_deepspeed_config_weak_ref else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if before is not None:
            deepspeed.set_hf_deepspeed_config(before)


def load_weights(where: str, **arguments):
    """AutoModelForCausalLM.from_pretrained(**arguments), of safetensors or a GGUF file, with all weights from
    the files.

    Raises BadInput beginning with ``where`` if files are unusable, if weights are missing from them or have
    another shape than config.json says, which transformers would fill with random values, or if what
    ``refuse_untied`` refuses.
    """
    from transformers import AutoModelForCausalLM

    if "gguf_file" not in arguments:
        # Mismatches are looked at below, and told in one line.
        arguments |= {"use_safetensors": True, "ignore_mismatched_sizes": True}
    try:
        with without_reports():
            network, found = AutoModelForCausalLM.from_pretrained(**arguments, output_loading_info=True)
    except UNREADABLE as error:
        raise BadInput(f"{where} cannot be loaded: {reason(error)}; {MEND}") from None
    except RuntimeError as error:
        if "quantiz" in str(error).lower():  # a format that needs a GPU which is not there
            raise BadInput(f"{where} cannot be loaded: {reason(error)}; {MEND}") from None
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
    quantized.refuse_plain(network, where)
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
