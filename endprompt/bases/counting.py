"""How many weights a model has, and which of them a token meets: counted on the model itself, on tensors
without data."""

import functools
import json
from collections.abc import Sequence
from typing import Any

from endprompt.bases import families
from endprompt.positions import rope


def configured(about) -> Any:
    """``about`` as a config: itself, or that of a Llama of its shape."""
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(about, PretrainedConfig):
        return about
    return AutoConfig.for_model(**{"model_type": "llama", **vars(about)})


def skeleton(about):
    """A causal language model of a config, or of a Llama's shape, on the meta device."""
    config = configured(about)
    kind: Any = type(config)
    return _built(kind, config.to_json_string(use_diff=False))


@functools.lru_cache(maxsize=4)
def _built(kind, written: str):
    import torch
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    with torch.device("meta"):
        return MODEL_FOR_CAUSAL_LM_MAPPING[kind](kind.from_dict(json.loads(written)))


def parameters(about) -> int:
    """All weights, tied ones once."""
    return sum(parameter.numel() for parameter in skeleton(about).parameters())


def products(about) -> int:
    """Weights of the layers' matrix products that a token goes through: of experts, those that it is sent
    to."""
    network, found = skeleton(about), 0
    share = families.experts(network.config)
    for parameter in network.get_decoder().layers.parameters():
        if parameter.dim() == 2:
            found += parameter.numel()
        elif parameter.dim() == 3 and share is not None:
            found += parameter.numel() // share[0] * share[1]
    return found


def largest(about) -> int:
    """Weights of the largest matrix of a layer."""
    parameters = skeleton(about).get_decoder().layers.parameters()
    return max(parameter.numel() for parameter in parameters if parameter.dim() == 2)


def width(about) -> int:
    """Of the feed-forward layer that a token goes through."""
    share = families.experts(configured(about))
    return share[1] * share[2] if share is not None else about.intermediate_size


def attended(about, length: int) -> float:
    """Keys by heads' width that a token attends to in all layers, counted in rows of ``length`` as twice the
    mean: half of the square, less what lies beyond a layer's window."""
    config = configured(about)
    heads = config.num_attention_heads * rope.head_dimension(config)
    if config.model_type not in families.BY_TYPE:
        return heads * config.num_hidden_layers * length
    local, total = families.local_layers(config), 0.0
    if not any(local):
        return heads * config.num_hidden_layers * length
    near = min(config.sliding_window, length)
    for is_local in local:
        total += 2 * near - near * near / max(1, length) if is_local else length
    return heads * total


def adapted(about, targets: Sequence[str], r: int) -> int:
    """Weights of the adapters of rank ``r`` beside the projections ``targets``."""
    import torch

    network = skeleton(about)
    names = families.adapted(network.config, targets)
    return sum(
        r * (module.in_features + module.out_features)
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in names
    )


def embeddings_and_norms(about) -> int:
    """Weights of the parameters whose names say that they are either."""
    return sum(
        parameter.numel()
        for name, parameter in skeleton(about).named_parameters()
        if "embed" in name or "norm" in name
    )
