"""The model card: what a run's model is, how each engine loads it, and what it scores.

Written by huggingface_hub, whose metadata block hubs read.  Three parts of it stand between marks and are
made again where they change: the form of the model and how it is loaded, which an export changes, and the
scores.  Whatever people write outside of them stays; a card without a mark is theirs, and is left alone.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endprompt import storage
from endprompt.recipe.experiment import Experiment

NAME = "README.md"
UNITS = {"perplexity": ("", 3), "far_gain": (" nats", 4)}  # and digits; all others are percent
# task, length in tokens (None: the task has none), score, its interval's ends, samples
Score = tuple[str, int | None, float, float, float, int]


@dataclass(frozen=True)
class Licence:
    """As the base states it."""

    name: str | None = None
    more: tuple[tuple[str, str], ...] = ()


def licence(base) -> Licence:
    """That of the base's own card, or of its config.json; none where neither can be read."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    path = base.folder / NAME
    stated: dict[str, Any] = {}
    try:
        if not base.folder.is_dir():
            cached = try_to_load_from_cache(base.name, NAME, revision=base.recipe.model.revision)
            path = Path(cached) if isinstance(cached, str) else path
        if path.is_file():
            stated = ModelCard(storage.read_text(path, 2**22), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # whatever people write into YAML
        stated = {}
    name = stated.get("license") or getattr(base.config, "license", None)
    keys = ("license_name", "license_link")
    more = tuple((key, stated[key]) for key in keys if isinstance(stated.get(key), str))
    return Licence(name, more) if isinstance(name, str) else Licence()


def write(experiment: Experiment, folder: Path, trained: dict) -> None:
    """Writes the card of the run's model in ``folder``, without scores.  trained: what train.json says."""
    from huggingface_hub import ModelCard, ModelCardData

    recipe, base = experiment.recipe, experiment.base
    local = base.folder.is_dir()
    stated = licence(base)
    more: dict[str, Any] = dict(stated.more)
    data = ModelCardData(
        base_model=None if local else base.name,
        license=stated.name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["long-context", "endprompt", experiment.method.name],
        **more,
    )
    base_name = base.folder.name if local else base.name
    title = f"{base_name}, {experiment.target_length} tokens"
    rows = [
        ("Base", f"`{base_name}`" + (f" at `{recipe.model.revision}`" if recipe.model.revision else "")),
        ("Method", f"`{experiment.method.name}`: {experiment.method.summary}"),
        ("Window", f"{base.original_length} tokens of the base, {experiment.target_length} now"),
        ("Training rows", f"{trained['rows']} of {experiment.row_length} tokens, {trained['tokens']} in all"),
        ("Steps", str(trained["steps"])),
        ("Adapters", "LoRA, merged" if experiment.adapters else "none, all weights were trained"),
        ("Recipe", f"`{recipe.name}`"),
        ("Code", f"endprompt, commit `{trained['commit']}`" if trained.get("commit") else "endprompt"),
    ]
    table = "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        "A language model whose context window was extended by further training.",
        table,
        "## RoPE and attention",
        _marked("form"),
        "## How to load it",
        _marked("loading"),
        "## Scores",
        _marked("scores"),
    ]
    text = "\n\n".join(parts) + "\n"
    storage.write_atomically(folder / NAME, str(ModelCard(text)).encode())
    renew(folder, [])


def _marked(part: str) -> str:
    return f"<!-- {part} -->\n<!-- /{part} -->"


def renew(folder: Path, scores: Sequence[Score] | None = None) -> bool:
    """Makes the parts of the card in ``folder`` again that its config.json tells, and its table of ``scores``
    if they are given; says whether there is a card with all three parts, and else touches nothing."""
    path = folder / NAME
    try:
        text = before = storage.read_text(path, 2**22)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    made = {"form": form(config), "loading": loading(config)}
    made |= {} if scores is None else {"scores": table(scores)}
    for part, block in made.items():
        place = rf"(?<=<!-- {part} -->\n)(?:.*?\n)??(?=<!-- /{part} -->)"
        if len(re.findall(place, text, re.DOTALL)) != 1:
            return False
        text = re.sub(place, f"{block}\n".replace("\\", r"\\"), text, flags=re.DOTALL)
    if text != before:
        storage.write_atomically(path, text.encode())
    return True


def _ropes(config: dict) -> tuple[dict, dict]:
    """The RoPE parameters of the layers that attend to everything, and of those with a window where they have
    their own."""
    found = config.get("rope_parameters") or {}
    return found.get("full_attention", found), found.get("sliding_attention") or {}


def _rope(parameters: dict) -> str:
    numbers = ((key, value) for key, value in parameters.items() if isinstance(value, int | float))
    kind = f"type `{parameters.get('rope_type', 'default')}`"
    return ", ".join([kind, *(f"{key} {value:g}" for key, value in numbers)])


def form(config: dict) -> str:
    """What config.json says of RoPE and attention."""
    note = config.get("endprompt") or {}
    parameters, local = _ropes(config)
    lines = [f"- RoPE: {_rope(parameters)}."]
    if local:
        lines.append(f"- RoPE of the layers with a sliding window, the base's: {_rope(local)}.")
    if share := note.get("base_share"):
        lines.append(f"- Weights: {1 - share:.1%} of what was trained, {share:.1%} of the base's, averaged.")
    if learnt := note.get("sharpened_heads"):
        lines.append(
            f"- Queries of each head are multiplied by a factor that was trained, {learnt['least']:.4f} to"
            f" {learnt['most']:.4f}; it is in their weights."
        )
    if (by := note.get("sharpened")) is not None:
        lines.append(f"- Attention scores are multiplied by {by:.4f}, which is in the queries' weights.")
    elif (start := note.get("sharpened_beyond")) is not None:
        lines.append(
            f"- Attention scores are multiplied by 1 + {note['beta']:.4f} ln(1 + floor(p / {start})) at"
            f" position p, as Ministral 3 does: by 1 within {start} tokens."
        )
    else:
        lines.append("- Attention is the base's.")
    return "\n".join(lines)


def loading(config: dict) -> str:
    """How each engine loads a model of ``config``, and the window that it takes (docs/engines.md)."""
    window, parameters = config["max_position_embeddings"], _ropes(config)[0]
    kind = parameters.get("rope_type")
    # vLLM leaves Gemma-3 out of those whose window it multiplies.
    multiplied = kind == "linear" and not config["model_type"].startswith("gemma3")
    derived = (
        f"it derives {int(window * parameters['factor'])}, which nobody trained"
        if multiplied
        else f"it derives {window}"
    )
    by_position = config["model_type"] == "ministral3"
    older = "does not know this type" if by_position else "reads the same from 4.51 on"
    lines = [
        f"- transformers 5: `AutoModelForCausalLM.from_pretrained(FOLDER)`; version 4 {older}.",
        f"- vLLM: `vllm serve FOLDER --max-model-len {window}`; where that is left out, {derived}.",
        f"- SGLang: `python -m sglang.launch_server --model-path FOLDER --context-length {window}`.",
        "- mlx-lm: `mlx_lm.generate --model FOLDER`; it has no window of its own.",
    ]
    if by_position and kind != "yarn":
        lines.append("- llama.cpp: its converter reads this type under YaRN alone.")
    elif kind == "longrope" and config["model_type"] != "phi3":
        lines.append("- llama.cpp: its converter drops longrope's factors, and the model is another one.")
    else:
        lines.append(f"- llama.cpp: `convert_hf_to_gguf.py FOLDER`, then `-c {window}` (or `-c 0`).")
    return "\n".join(lines)


def table(scores: Sequence[Score]) -> str:
    """The scores with their 95 % intervals."""
    if not scores:
        return "None yet."
    lines = ["| task | tokens | score | 95 % interval | samples |", "|---|---|---|---|---|"]
    for task, length, score, low, high, samples in scores:
        unit, digits = UNITS.get(task, (" %", 2))
        found = f"{score:.{digits}f}{unit} | {low:.{digits}f} to {high:.{digits}f}"
        lines.append(f"| {task} | {length or '-'} | {found} | {samples} |")
    return "\n".join(lines)
