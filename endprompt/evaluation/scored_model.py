"""The model that is scored: a run's own, one that ``--model`` names, or the base under a method's RoPE."""

import sys
from pathlib import Path

import torch

from endprompt import BadInput
from endprompt.bases import locating, model
from endprompt.evaluation import engine
from endprompt.evaluation.question import fingerprint
from endprompt.recipe.experiment import Experiment
from endprompt.recipe.schema import Recipe


def load(experiment: Experiment, other: str | None):
    """(model, tokenizer, what identifies the model); the model is its folder's name, unloaded, for vLLM.

    A method that trains nothing is built here.  Raises BadInput if there is no model to score.
    """
    cuda, vllm = torch.cuda.is_available(), experiment.recipe.eval.backend == "vllm"
    if other is None and not experiment.method.trained:
        network, tokenizer, identity = _untrained(experiment, cuda)
    else:
        network, tokenizer, identity = _saved(experiment, other, cuda)
    # Prompts are longer than what some tokenizers were told to expect; the window is what is being tested.
    tokenizer.model_max_length = sys.maxsize
    if vllm:
        ends = engine.saved_ends(network, tokenizer, experiment.recipe.model.trust_remote_code)
        return network, tokenizer, identity | {"ends": ends, "dtype": "bfloat16", "attention": "vllm"}
    identity |= {"ends": engine.ends(network.generation_config, tokenizer)}
    identity |= {"dtype": str(network.dtype), "attention": network.config._attn_implementation}
    return network.eval().to("cuda" if cuda else "cpu"), tokenizer, identity


def _dtype(cuda: bool) -> torch.dtype:
    return torch.bfloat16 if cuda else torch.float32


def _untrained(experiment: Experiment, cuda: bool):
    """The base under the method's RoPE, as the method wants it scored."""
    recipe, base = experiment.recipe, experiment.base
    if recipe.eval.backend == "vllm":
        raise BadInput(
            f"eval.backend: vllm reads a saved model, and {experiment.method.name} has none; use hf, or name"
            " a model with --model"
        )
    network = model.build(base, experiment.scaling, _dtype(cuda), cuda)
    experiment.method.before_scoring(network, experiment)
    base.check_vocabulary()
    identity = {
        "name_or_path": recipe.model.name_or_path,
        "revision": recipe.model.revision,
        "gguf_file": recipe.model.gguf_file,
        "rope_parameters": network.config.rope_parameters,
        "sharpened": experiment.sharpness,
        **_content(base.folder, recipe.model.revision, recipe.model.gguf_file),
    }
    return network, base.tokenizer, identity


def _saved(experiment: Experiment, other: str | None, cuda: bool):
    """The run's own model, or ``other``: a folder or an id of the hub."""
    from transformers import AutoConfig, AutoTokenizer

    recipe = experiment.recipe
    folder = experiment.run / "model" if other is None else named(other)
    if not folder.is_dir() and (other is None or other.startswith((".", "/", "~"))):
        raise BadInput(
            f"--model: there is no folder {folder}"
            if other
            else f"{folder} is missing; train {experiment.method.name} first, or name a model with --model"
        )
    source = str(folder) if other is None or folder.is_dir() else other
    revision = _revision(recipe, other)
    which = {"trust_remote_code": recipe.model.trust_remote_code, **revision}
    if folder.is_dir():
        model.check_folder(folder, "--model")
    try:
        with model.without_reports():
            tokenizer = AutoTokenizer.from_pretrained(source, **which)
            config = AutoConfig.from_pretrained(source, **which)
    except Exception as error:  # as tokenizers' own errors, which are plain Exceptions
        raise BadInput(f"--model: {source} cannot be loaded: {model.reason(error)}; {model.MEND}") from None
    model.refuse_kernels(config, "--model")
    model.refuse_other_kinds(config, f"--model: {source}")
    if not tokenizer.is_fast:
        raise BadInput(
            f"--model: {source} has no fast tokenizer (tokenizer.json); convert it once with transformers and"
            " save it"
        )
    model.check_vocabulary(tokenizer, config.get_text_config(), f"--model: the tokenizer of {source}")
    identity = {"name_or_path": str(folder), **revision, **_content(folder, revision.get("revision"))}
    weights = f"--model: the weights of {source}"
    if recipe.eval.backend == "vllm":
        model.refuse_untied(weights, source, config)
        return source, tokenizer, identity
    network = model.load_weights(
        weights,
        pretrained_model_name_or_path=source,
        **which,
        dtype=_dtype(cuda),
        attn_implementation=model.supported_attention(recipe, cuda, config),
    )
    return network, tokenizer, identity


def _revision(recipe: Recipe, other: str | None) -> dict[str, str]:
    """The revision of the model that is scored, where the recipe names one of this very id, as without a
    recipe file it does.  Raises BadInput if the engine cannot take it."""
    wanted = recipe.model.revision if other == recipe.model.name_or_path else None
    if wanted and recipe.eval.backend == "vllm":
        raise BadInput(
            f"model.revision: {wanted!r} does not reach vLLM here; download it into a folder and name that"
            " with --model"
        )
    return {"revision": wanted} if wanted else {}


def _content(folder: Path, revision: str | None, gguf_file: str | None = None) -> dict:
    """What the model's files are: a fingerprint of ``folder``, or the hub's commit where it is none."""
    if folder.is_dir():
        return {"fingerprint": fingerprint(folder, gguf_file)}
    return {"fingerprint": None, "commit": locating.commit(str(folder), revision)}


def named(other: str) -> Path:
    """The path that --model names, whether or not it is there.  Raises BadInput if it can be no path, or is a
    file.
    """
    try:
        folder = Path(other).expanduser()
        if not other or folder.is_file():
            raise OSError("it is a file" if other else "it is empty")
        folder.resolve()
        return folder
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # too long a name, the home of a user who is not there
        raise BadInput(
            f"--model: {other[:200]!r} is no folder ({getattr(error, 'strerror', None) or error}); name a"
            " folder with config.json, or a hub id"
        ) from None
