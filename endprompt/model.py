"""Loading: tokenizer and config, the scaled model, and what of them can be refused early."""

import contextlib
import importlib.util
import os
import struct
import sys
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from endprompt import BadInput, rope, sharpen
from endprompt.config import Recipe
from endprompt.methods import Method

SUPPORTED = ("llama", "mistral", "qwen2")
MEND = "mend its files, or name another model"
CONVERT = "convert them once, where you trust them: AutoModelForCausalLM.from_pretrained(OLD, use_safetensors=False).save_pretrained(NEW)"
# What transformers raises on files that are missing, damaged, or not what they say: configs with wrong types, cut safetensors and GGUF files.
UNREADABLE = (OSError, ValueError, TypeError, AttributeError, KeyError, AssertionError, ArithmeticError, StrictDataclassError, SafetensorError, struct.error)


def locate(recipe: Recipe) -> dict:
    """The arguments that find the model for ``from_pretrained``: a local folder, ``package:NAME`` (an installed Python package), or a hub id.

    Raises BadInput if there is nothing of that name, or in a folder what ``check_folder`` refuses.
    """
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
        if local is not None and not local.is_dir():
            raise BadInput(f"model.name_or_path: {local} is no folder; name the folder with config.json that it is in")
        if local is not None and recipe.model.gguf_file and not (local / recipe.model.gguf_file).is_file():
            raise BadInput(f"model.gguf_file: {local} has no file {recipe.model.gguf_file}")
    if os.path.isdir(path):
        check_folder(Path(path), "model.name_or_path", bool(recipe.model.gguf_file))
    extra = {"revision": recipe.model.revision, "gguf_file": recipe.model.gguf_file}
    return {"pretrained_model_name_or_path": path, "trust_remote_code": recipe.model.trust_remote_code, **{key: value for key, value in extra.items() if value}}


def check_folder(folder: Path, key: str, gguf: bool = False) -> None:
    """Raises BadInput beginning with ``key`` if the model in ``folder`` is an adapter, has its weights in pickles alone, or holds what is no file.

    A pickle is a program that runs when it is read; a pipe is waited for without end.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".safetensors", ".gguf") and not path.is_file():
            raise BadInput(f"{key}: {path} is no regular file (or a link to nothing); put the file there, or remove it")
    if gguf:
        return
    if (folder / "adapter_config.json").exists():
        raise BadInput(f"{key}: {folder} is an adapter, not a whole model; merge it into its base once (peft: merge_and_unload), save that, and name its folder")
    pickles = sorted(path.name for pattern in ("pytorch_model*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles and not any(folder.glob("*.safetensors")):
        raise BadInput(f"{key}: {folder} has its weights in {pickles[0]} alone; weights must be safetensors, which cannot run code: {CONVERT}")


def reason(error: Exception) -> str:
    """Why transformers could not load something, in one line and in this program's own terms."""
    text = str(error).strip()
    if "trust_remote_code" in text or "custom code" in text:
        return "it wants to run Python code of its own, which is not done unasked; read that code, and if you trust it set model.trust_remote_code=true"
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


def _loading(what: str, recipe: Recipe, function):
    try:
        with without_reports():
            return function()
    except BadInput:
        raise
    except Exception as error:  # as tokenizers' own errors, which are plain Exceptions
        raise BadInput(f"model.name_or_path: {what} of {recipe.model.name_or_path!r} cannot be loaded: {reason(error)}; {MEND}") from None


def load_weights(where: str, **arguments):
    """AutoModelForCausalLM.from_pretrained(**arguments), of safetensors or a GGUF file, with all weights from the files.

    Raises BadInput beginning with ``where`` if files are unusable, or if weights are missing from them or have another shape than config.json says,
    which transformers would fill with random values.
    """
    from transformers import AutoModelForCausalLM

    if "gguf_file" not in arguments:
        arguments |= {"use_safetensors": True, "ignore_mismatched_sizes": True}  # mismatches are looked at below, and told in one line
    try:
        with without_reports():
            network, found = AutoModelForCausalLM.from_pretrained(**arguments, output_loading_info=True)
    except UNREADABLE as error:
        raise BadInput(f"{where} cannot be loaded: {reason(error)}; {MEND}") from None
    except RuntimeError as error:
        if not (mismatch := next((line.strip() for line in str(error).splitlines() if "size mismatch" in line or "negative dimension" in line), None)):
            raise
        raise BadInput(f"{where} do not fit config.json: {mismatch}; mend the folder") from None  # as partitioned loading tells it
    if found["mismatched_keys"]:
        name, there, wanted = sorted(found["mismatched_keys"])[0]
        raise BadInput(f"{where} do not fit config.json: {name} is {list(there)} in the files, and {list(wanted)} by config.json "
                       f"({len(found['mismatched_keys'])} such); mend the folder")
    if found["missing_keys"]:
        raise BadInput(f"{where} lack {sorted(found['missing_keys'])[:5]}; random values would stand in their place; {MEND}")
    if found["unexpected_keys"] and os.environ.get("RANK", "0") == "0":
        print(f"warning: {where}: {len(found['unexpected_keys'])} tensors have no place in a {network.config.model_type} model and are left out, "
              f"first {sorted(found['unexpected_keys'])[:3]}", file=sys.stderr)
    return network


def refuse_kernels(config, key: str) -> None:
    """Raises BadInput beginning with ``key`` if config.json names attention on the hub, which transformers would fetch and run whatever it is told to use."""
    found = getattr(config, "_attn_implementation", None)
    if found is not None and (not isinstance(found, str) or "/" in found):
        raise BadInput(f"{key}: config.json asks for attention by {found!r:.60}, code that is not part of transformers; take attn_implementation out of it")


def load_config(recipe: Recipe):
    """The base model's config.  Raises BadInput on a type we do not know, a scaled RoPE, an attention window, or a target that extends nothing.

    transformers fills a missing window or rope_theta with a default of its own: the window is then an error, the theta a warning.
    """
    from transformers import AutoConfig, PretrainedConfig

    where = locate(recipe)
    config = _loading("config", recipe, lambda: AutoConfig.from_pretrained(**where))
    refuse_kernels(config, "model")
    if config.model_type not in SUPPORTED:
        raise BadInput(f"model: type {config.model_type!r} is not supported; the RoPE of {', '.join(SUPPORTED)} models is")
    rope.refuse_scaled(config)
    if not recipe.model.gguf_file:
        written = _loading("config", recipe, lambda: PretrainedConfig.get_config_dict(**{**where, "trust_remote_code": False})[0])
        if "max_position_embeddings" not in written and recipe.model.original_length is None:
            raise BadInput("model: its config.json has no max_position_embeddings, the window to extend; set model.original_length")
        if "rope_theta" not in {**written, **(written.get("rope_parameters") or {})}:
            print(f"warning: config.json has no rope_theta; {config.rope_parameters.get('rope_theta')} is assumed, the default of {config.model_type}", file=sys.stderr)
    theta = (config.rope_parameters or {}).get("rope_theta")
    if type(theta) not in (int, float) or not 0 < theta < float("inf"):
        raise BadInput(f"model: rope_theta in its config.json is {theta!r:.60}, no positive number; mend it")
    windowed = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if windowed and type(windowed) is not int:
        raise BadInput(f"model: sliding_window in its config.json is {windowed!r:.60}, no number of tokens; mend it")
    if windowed and windowed < recipe.lengths.target:
        raise BadInput(f"model: attention is limited to a sliding window of {windowed} tokens, which would cut a row; use a base model without one")
    original = original_length(recipe, config)
    if type(original) is not int or original < 1:
        raise BadInput(f"model: max_position_embeddings in its config.json is {original!r:.60}, no positive number of tokens; mend it, or set model.original_length")
    if recipe.lengths.target <= original:
        raise BadInput(f"lengths.target {recipe.lengths.target} does not exceed the model's own window of {original}; raise it "
                       "(or set model.original_length, if config.json overstates the window it was trained on)")
    return config


def original_length(recipe: Recipe, config) -> int:
    return recipe.model.original_length or config.max_position_embeddings


def load_tokenizer(recipe: Recipe):
    """The model's own fast tokenizer.  Raises BadInput if there is none, or if it has no end-of-sequence token."""
    from transformers import AutoTokenizer

    where = locate(recipe)
    tokenizer = _loading("tokenizer", recipe, lambda: AutoTokenizer.from_pretrained(**where))
    if not tokenizer.is_fast:
        raise BadInput(f"model: {recipe.model.name_or_path!r} has no fast tokenizer (tokenizer.json); convert it once with transformers and save it")
    if tokenizer.eos_token_id is None:
        raise BadInput(f"model: the tokenizer of {recipe.model.name_or_path!r} has no end-of-sequence token, which joins documents; set eos_token")
    return tokenizer


def check_vocabulary(tokenizer, config, where: str) -> None:
    """Raises BadInput beginning with ``where`` if ``tokenizer`` writes ids that a model of ``config`` has no embedding for.  Tokens added to it later may: nothing uses them."""
    greatest = max(tokenizer.vocab_size - 1, tokenizer.eos_token_id or 0)
    if greatest >= config.vocab_size:
        raise BadInput(f"{where} writes ids up to {greatest}, but the model has embeddings for 0 to {config.vocab_size - 1} alone; "
                       "give it its own tokenizer")


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


def sharpness(recipe: Recipe, method: Method, config) -> float:
    """What attention scores are multiplied by after training; 1 leaves them."""
    return sharpen.factor(recipe.sharpen(method), original_length(recipe, config), recipe.lengths.target)


def build(recipe: Recipe, method: Method, dtype, cuda: bool):
    """The base model with the method's RoPE in place before it is built and its inv_freq checked afterwards.

    dtype: a torch dtype of the weights.  Under ZeRO-3 (a live TrainingArguments with a stage 3 file) parameters load partitioned,
    except a GGUF file's, which every rank holds whole until DeepSpeed starts.
    Raises BadInput on unusable files and on weights that are missing from them; Failure if the frequencies are not the expected ones.
    """
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
    model = load_weights(f"model.name_or_path: the weights of {recipe.model.name_or_path!r}", **arguments, config=config,
                         dtype=dtype, attn_implementation=attention)
    # transformers takes config.json's pad_token_id for it, and torch gives that row no gradient; it may be the separator of documents.
    model.get_input_embeddings().padding_idx = None
    rope.verify(model.get_decoder().rotary_emb, model.config, chosen, theta)
    return model
