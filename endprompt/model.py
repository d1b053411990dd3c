"""Loading: tokenizer and config, the scaled model, and what of them can be refused early."""

import importlib.util
import struct
import sys
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from endprompt import BadInput, Failure, rope
from endprompt.config import Recipe
from endprompt.methods import Method

SUPPORTED = ("llama", "mistral", "qwen2")
# What transformers raises on files that are missing, damaged, or not what they say: configs with wrong types, cut safetensors and GGUF files.
UNREADABLE = (OSError, ValueError, KeyError, ArithmeticError, StrictDataclassError, SafetensorError, struct.error)


def locate(recipe: Recipe) -> dict:
    """The arguments that find the model for ``from_pretrained``: a local folder, ``package:NAME`` (an installed Python package), or a hub id."""
    name = recipe.model.name_or_path
    if name.startswith("package:"):
        package = name.removeprefix("package:")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise BadInput(f"model.name_or_path: the Python package {package!r} is not installed; pip install {package.replace('_', '-')}, or name a folder or hub id")
        if recipe.model.gguf_file and Path(recipe.model.gguf_file).name != recipe.model.gguf_file:
            raise BadInput(f"model.gguf_file: {recipe.model.gguf_file!r} is a path; with package:{package} give the file's name alone")
        # A data file may sit anywhere in the package: take the folder that holds the one asked for.
        root = Path(next(iter(spec.submodule_search_locations)))
        found = next(iter(sorted(root.rglob(recipe.model.gguf_file or "config.json"))), None)
        if found is None:
            raise BadInput(f"model: the package {package!r} has no file {recipe.model.gguf_file or 'config.json'}; set model.gguf_file to one it has")
        path = str(found.parent)
    else:
        local = recipe.path(name)
        path = str(local) if local else name
        if local is None and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
            raise BadInput(f"model.name_or_path: there is no folder {name}; give a folder with config.json, package:NAME, or a hub id")
        if local is not None and recipe.model.gguf_file and not (local / recipe.model.gguf_file).is_file():
            raise BadInput(f"model.gguf_file: {local} has no file {recipe.model.gguf_file}")
    extra = {"revision": recipe.model.revision, "gguf_file": recipe.model.gguf_file}
    return {"pretrained_model_name_or_path": path, **{key: value for key, value in extra.items() if value}}


def _loading(what: str, recipe: Recipe, function):
    try:
        return function()
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"model.name_or_path: {what} of {recipe.model.name_or_path!r} cannot be loaded: {reason}") from None


def load_config(recipe: Recipe):
    """The base model's config.  Raises BadInput on a type we do not know, a scaled RoPE, an attention window, or a target that extends nothing.

    transformers fills a missing window or rope_theta with a default of its own: the window is then an error, the theta a warning.
    """
    from transformers import AutoConfig, PretrainedConfig

    config = _loading("config", recipe, lambda: AutoConfig.from_pretrained(**locate(recipe)))
    if config.model_type not in SUPPORTED:
        raise BadInput(f"model: type {config.model_type!r} is not supported; the RoPE of {', '.join(SUPPORTED)} models is")
    rope.refuse_scaled(config)
    if not recipe.model.gguf_file:
        written = _loading("config", recipe, lambda: PretrainedConfig.get_config_dict(**locate(recipe))[0])
        if "max_position_embeddings" not in written and recipe.model.original_length is None:
            raise BadInput("model: its config.json has no max_position_embeddings, the window to extend; set model.original_length")
        if "rope_theta" not in {**written, **(written.get("rope_parameters") or {})}:
            print(f"warning: config.json has no rope_theta; {config.rope_parameters.get('rope_theta')} is assumed, the default of {config.model_type}", file=sys.stderr)
    windowed = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if windowed and windowed < recipe.lengths.target:
        raise BadInput(f"model: attention is limited to a sliding window of {windowed} tokens, which would cut a row; use a base model without one")
    original = original_length(recipe, config)
    if recipe.lengths.target <= original:
        raise BadInput(f"lengths.target {recipe.lengths.target} does not exceed the model's own window of {original}; raise it "
                       "(or set model.original_length, if config.json overstates the window it was trained on)")
    return config


def original_length(recipe: Recipe, config) -> int:
    return recipe.model.original_length or config.max_position_embeddings


def load_tokenizer(recipe: Recipe):
    """The model's own fast tokenizer.  Raises BadInput if there is none, or if it has no end-of-sequence token."""
    from transformers import AutoTokenizer

    tokenizer = _loading("tokenizer", recipe, lambda: AutoTokenizer.from_pretrained(**locate(recipe)))
    if not tokenizer.is_fast:
        raise BadInput(f"model: {recipe.model.name_or_path!r} has no fast tokenizer (tokenizer.json); convert it once with transformers and save it")
    if tokenizer.eos_token_id is None:
        raise BadInput(f"model: the tokenizer of {recipe.model.name_or_path!r} has no end-of-sequence token, which joins documents; set eos_token")
    return tokenizer


def pad_token_id(tokenizer) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def attention_implementation(recipe: Recipe, cuda: bool) -> str:
    """flash_attention_2 where it is installed and there is a GPU, else sdpa; the recipe may name another."""
    from transformers.utils import is_flash_attn_2_available

    wanted = recipe.model.attn_implementation
    if wanted == "flash_attention_2" and not (cuda and is_flash_attn_2_available()):
        raise BadInput("model.attn_implementation: flash_attention_2 needs a GPU and the package flash-attn; use sdpa, or null to choose automatically")
    return wanted or ("flash_attention_2" if cuda and is_flash_attn_2_available() else "sdpa")


def scaling(recipe: Recipe, method: Method, config) -> rope.Scaling:
    rope_type = None if method.rope is None else recipe.rope.type or method.rope
    return rope.scaling_for(rope_type, original_length(recipe, config), recipe.lengths.target, method.rope_share.get(rope_type, 1.0), method.whole_factor)


def build(recipe: Recipe, method: Method, dtype, cuda: bool):
    """The base model with the method's RoPE in place before it is built and its inv_freq checked afterwards.

    dtype: a torch dtype of the weights.  Under ZeRO-3 (a live TrainingArguments with a stage 3 file) parameters load partitioned,
    except a GGUF file's, which every rank holds whole until DeepSpeed starts.
    Raises BadInput on unusable files; Failure if weights are missing from them or the frequencies are not the expected ones.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(recipe)
    theta = (config.rope_parameters or {}).get("rope_theta")
    chosen = scaling(recipe, method, config)
    rope.apply(config, chosen, recipe.lengths.target)
    attention = attention_implementation(recipe, cuda)
    arguments = locate(recipe)
    if recipe.model.gguf_file:
        from transformers import GgufConfig

        # Else the model stays marked as quantized, and transformers refuses to train and to save it.
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    model, information = _loading("weights", recipe, lambda: AutoModelForCausalLM.from_pretrained(
        **arguments, config=config, dtype=dtype, attn_implementation=attention, output_loading_info=True))
    if information["missing_keys"]:
        raise Failure(f"model: the files of {recipe.model.name_or_path!r} lack {sorted(information['missing_keys'])[:5]}; these would train from random values")
    rope.verify(model.get_decoder().rotary_emb, model.config, chosen, theta)
    return model
