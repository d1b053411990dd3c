"""What is saved with a model: the length in every file that states one, and no names of code that was not
run.
"""

import json
import tempfile
from pathlib import Path

from endprompt.bases.lengths import GENERATION_KEYS, TOKENIZER_KEYS, WINDOW_KEYS
from endprompt.bases.loading import without_reports


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
