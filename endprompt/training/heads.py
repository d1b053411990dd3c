"""Sharpening that is learnt: one factor a head, trained beside the weights and folded into the queries at
last.

SSMax (arXiv 2501.19399) learns a scale a head, which it multiplies by the logarithm of the number of keys;
here the scale is all there is, so that it fits into weights and any engine reads it.  A head's queries are
multiplied by 1 + GAIN x u, with u trained from 0: Adam moves u by a learning rate a step at most, and
weights' learning rates would leave a factor where it is.  GAIN is our choice."""

from typing import Any

import torch
from torch import nn

from endprompt import BadInput, Failure
from endprompt.bases import families, sharpen
from endprompt.positions import rope
from endprompt.training import lora

GAIN = 10.0
NAME = sharpen.HEADS


def check(config) -> None:
    """Raises BadInput unless a factor for each head fits into the query weights of a model of ``config``."""
    if families.of(config).queries != "q_proj":
        raise BadInput(
            f"rope.sharpen_heads: queries of a {config.model_type} model have no projection of their own"
            " without a norm behind it, into which one factor a head could be folded; remove it, and"
            " set rope.sharpen"
        )


def _projections(network) -> list[Any]:
    """The query projections of layers without a window of their own."""
    local = families.local_layers(network.config)
    layers = network.get_decoder().layers
    return [layer.self_attn.q_proj for layer, own in zip(layers, local, strict=True) if not own]


def _multiply(module, inputs, output):
    if hasattr(module, "heads_off"):
        return output
    factors = 1 + GAIN * module.sharpness
    return (output.unflatten(-1, (len(factors), -1)) * factors[:, None].to(output.dtype)).flatten(-2)


def attach(network) -> None:
    """Puts a factor for every head into ``network``, in place; call it before adapters."""
    check(network.config)
    heads = network.config.num_attention_heads
    for module in _projections(network):
        weight = module.weight
        dtype = weight.dtype if weight.is_floating_point() else torch.float32  # in 4 bits it is none
        module.sharpness = nn.Parameter(torch.zeros(heads, dtype=dtype, device=weight.device))
        module.sharpened = module.register_forward_hook(_multiply)


def train(network) -> None:
    """Has the factors trained, where adapters froze all that is not theirs."""
    for name, parameter in network.named_parameters():
        if name.endswith(f".{NAME}"):
            parameter.requires_grad_()


@torch.no_grad()
def fold(network) -> dict[str, float]:
    """Multiplies the factors into the query weights, in float32, and takes them out, in place.  All ranks
    call it together, before adapters are merged.

    Returns the least, mean and greatest of them.  Raises Failure if there are none.
    """
    found = []
    for module in [module for module in network.modules() if NAME in getattr(module, "_parameters", {})]:
        tensors = [module.weight] + ([] if module.bias is None else [module.bias])
        with lora.gathered([module.sharpness], write=False), lora.gathered(tensors, write=True):
            factors = 1 + GAIN * module.sharpness.float()
            rows = factors.repeat_interleave(rope.head_dimension(network.config))
            for tensor in tensors:
                tensor.copy_(tensor.float() * (rows[:, None] if tensor.dim() == 2 else rows))
            found.append(factors.cpu())
        module.sharpened.remove()
        del module.sharpness, module.sharpened
    if not found:
        raise Failure("sharpen: the model has no factors of heads; was it built with rope.sharpen_heads?")
    every = torch.cat(found)
    told = {"least": every.min(), "mean": every.mean(), "most": every.max()}
    return {key: round(float(value), 6) for key, value in told.items()}
