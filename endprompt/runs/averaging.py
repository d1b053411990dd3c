"""The saved model's weights averaged with the base's: against what training costs within the window.

What LongRecipe (arXiv 2409.00509) does half and half, and model soups (2203.05482) with several models.  The
saved RoPE stays that of training, so the base's part is read under frequencies it was not pretrained with.
"""

import json
from pathlib import Path
from typing import Any

from endprompt import Failure, storage
from endprompt.bases import loading, model, sharpen
from endprompt.recipe.experiment import Experiment


def average(folder: Path, experiment: Experiment, cuda: bool) -> None:
    """Makes every weight of the model in ``folder`` (1 - share) x itself + share x the base's, in float32, in
    place, and notes the share in config.json; ``experiment.base_share`` 0 changes nothing.

    The base is loaded whole on the CPU of this rank.  Raises Failure if a weight has no counterpart of its
    shape in the base.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    if not (share := experiment.base_share):
        return
    before = weights(experiment, cuda)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file(mixed(load_file(file), before, share), file, metadata)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["endprompt"] = {**config.get("endprompt", {}), "base_share": share}
    storage.write_json(path, config)


def mixed(
    trained: dict[str, Any], before: dict[str, Any], share: float, queries: sharpen.Queries | None = None
) -> dict[str, Any]:
    """The tensors of ``trained`` averaged with those of the same names in ``before``, each in its own type.

    queries: by what those of ``trained`` are sharpened, and those of ``before`` are not yet.
    """
    import torch

    found = {}
    for name, tensor in trained.items():
        own = before.get(name)
        if own is None or own.shape != tensor.shape:
            has = "lacks it" if own is None else f"has it as {tuple(own.shape)}"
            raise Failure(f"averaging: the saved {name} is {tuple(tensor.shape)}, and the base {has}")
        whole = own.float()
        if queries and queries.named(name):
            whole = queries.sharper(whole)
        found[name] = torch.lerp(tensor.float(), whole, share).to(tensor.dtype)
    return found


def weights(experiment: Experiment, cuda: bool) -> dict[str, Any]:
    """The base's, by the names that files have."""
    from transformers.core_model_loading import revert_weight_conversion

    recipe = experiment.recipe
    section = recipe.model.model_copy(update={"attn_implementation": None})  # which may need a GPU
    base = model.Base(recipe.model_copy(update={"model": section}))
    with loading.whole_loading():
        network = model.build(base, base.own_scheme, "auto", cuda)
    return revert_weight_conversion(network, dict(network.state_dict()))
