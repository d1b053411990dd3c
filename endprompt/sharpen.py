"""Sharper attention in a saved model, for rows of the target length.

Training rows of ``lengths.physical`` tokens teach each query to outweigh that many keys.  At the target length several times as many
compete, and attention that was sharp enough is spread thin.  Multiplying the queries once training is over restores it, at no cost: RoPE
is linear, so queries times t are attention scores times t, in any engine that loads the model.
"""

import json
import math
from pathlib import Path

from endprompt import Failure, shards

QUERIES = ("self_attn.q_proj.weight", "self_attn.q_proj.bias")


def factor(power: float, original_length: int, target_length: int) -> float:
    """(ln L / ln C) ** power.  A score that outweighs n equal ones must exceed them by ln n, so that 1 keeps at L the weight that it has at C."""
    return (math.log(target_length) / math.log(max(2, original_length))) ** power  # a window of 1 is no window, but no reason to divide by 0


def sharpen_network(network, t: float) -> None:
    """As ``sharpen`` does it on disk, in the query projections of ``network``, a built model with whole weights: what a method that trains nothing
    is scored with.

    Raises Failure if it has not one query projection a layer.
    """
    import torch

    found = 0
    with torch.no_grad():
        for name, weights in network.named_parameters():
            if name.endswith(QUERIES):
                weights.copy_((weights.float() * t).to(weights.dtype))
                found += name.endswith("weight")
    if found != network.config.num_hidden_layers:
        raise Failure(f"sharpen: the model has {found} query projections in {network.config.num_hidden_layers} layers; which scores would be sharpened is not known")


def sharpen(folder: Path, t: float) -> None:
    """Multiplies the query projections of the model in ``folder`` by ``t``, in float32, in place, and notes ``t`` in config.json.

    Raises Failure if it has not one query projection a layer.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = folder / "config.json"
    config, found = json.loads(path.read_text()), 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            metadata, names = opened.metadata(), [name for name in opened.keys() if name.endswith(QUERIES)]  # noqa: SIM118 (no mapping)
        if names:
            tensors = load_file(file)
            tensors |= {name: (tensors[name].float() * t).to(tensors[name].dtype) for name in names}
            save_file(tensors, file, metadata)
            found += sum(name.endswith("weight") for name in names)
    if found != config["num_hidden_layers"]:
        raise Failure(f"sharpen: {folder} has {found} query projections in {config['num_hidden_layers']} layers; which scores would be sharpened is not known")
    config["endprompt"] = {**config.get("endprompt", {}), "sharpened": t}
    shards.write_json(path, config)
