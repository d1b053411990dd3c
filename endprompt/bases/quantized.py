"""A base in 4 bits under adapters (QLoRA, arXiv 2305.14314), by bitsandbytes: NF4 in blocks of 64 weights,
whose constants are 8-bit numbers themselves.

The matrices of the layers are quantized one by one as they are read.  Embeddings, norms and the output layer
stay as they are.  The network that comes of it is an ordinary one with other linear layers: transformers'
marks of a quantized model are taken off, as what is saved at last is none.
"""

import copy
import functools
import importlib.util
from typing import Any

from endprompt import BadInput, Failure
from endprompt.bases import families

KEY = "train.lora.quantize"
BLOCK, CONSTANTS = 64, 256  # weights that share a constant, and constants that share one of float32
BYTES = 0.5 + 1 / BLOCK + 4 / (BLOCK * CONSTANTS)  # of a weight


def refuse(config) -> None:
    """Raises BadInput if a model of ``config`` has other matrices than linear layers'."""
    if families.experts(config) is not None:
        raise BadInput(
            f"{KEY}: experts of a {config.model_type} model are one tensor a layer and no linear layers, so"
            " that most of the base would stay as it is; remove it"
        )


def refuse_missing() -> None:
    """Raises BadInput if bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadInput(
            f"{KEY}: the package bitsandbytes is not installed; pip install 'endprompt[qlora]', or remove it"
        )


def loading(dtype, cuda: bool) -> dict[str, Any]:
    """Arguments of ``from_pretrained``.  dtype: a torch dtype, of what is not quantized and of products."""
    import torch
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        "device_map": {"": torch.cuda.current_device() if cuda else "cpu"},
    }


@functools.cache
def _linear():
    """The class of a frozen linear layer in 4 bits."""
    from bitsandbytes.nn import Linear4bit
    from torch.nn import functional

    class Frozen(Linear4bit):
        """Checkpoints leave its weight out: a run that goes on reads the base again, to the same bits."""

        def forward(self, x):
            if x.device.type != "cpu" or self.in_features % BLOCK == 0:
                return super().forward(x)
            dtype = self.compute_dtype or x.dtype
            bias = None if self.bias is None else self.bias.to(dtype)
            found = functional.linear(x.to(dtype), _values(self.weight).to(dtype), bias)
            return found.to(x.dtype)

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            for name in [name for name in destination if name.startswith(f"{prefix}weight")]:
                del destination[name]

        def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *more):
            lacking: list[str] = []
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, lacking, *more)
            missing += [name for name in lacking if name != f"{prefix}weight"]

    return Frozen


def _values(weight):
    """The matrix that a weight in 4 bits stands for.

    On a CPU with AVX-512, bitsandbytes 0.50.2 gives other values where rows are not whole blocks.  Blocks run
    over the rows' ends, so one row of all weights holds the same values, and that it reads rightly.
    """
    from bitsandbytes.functional import dequantize_4bit

    state = weight.quant_state
    shape = state.shape
    if weight.device.type == "cpu":
        state = copy.copy(state)
        state.shape = (1, shape.numel())
    return dequantize_4bit(weight.data, state).view(shape)


def _found(network) -> dict[str, Any]:
    return {name: module for name, module in network.named_modules() if isinstance(module, _linear())}


def settle(network) -> None:
    """Makes ``network``, which transformers has just quantized, an ordinary one, in place; PEFT still sees
    what it is by ``is_loaded_in_4bit``.

    Raises Failure unless all linear layers of its decoder's layers, and no others, are in 4 bits.
    """
    from bitsandbytes.nn import Linear4bit
    from torch import nn

    for module in network.modules():
        if type(module) is Linear4bit:
            module.__class__ = _linear()
            # Else a look in eval mode packs the weights anew, for a product in bfloat16.
            module.support_avx512bf16_for_cpu = False
    layers = network.get_decoder().layers
    wanted = {id(module) for module in layers.modules() if isinstance(module, nn.Linear)}
    there = {id(module) for module in _found(network).values()}
    if not there or wanted != there:
        raise Failure(
            f"quantize: {len(wanted)} linear layers of the base were to be in 4 bits, and {len(there)} are"
        )
    network.hf_quantizer.remove_quantization_config(network)
    network.__dict__.pop("hf_device_map", None)


def refuse_plain(network, where: str) -> None:
    """Raises BadInput beginning with ``where`` if config.json calls weights quantized that the files hold
    plain, or by a format that transformers does not know: it loads both without a word.
    """
    said = getattr(network.config, "quantization_config", None)
    plain = [
        name
        for name, module in network.named_modules()
        if type(module).__module__.startswith("bitsandbytes.")
        and module.weight.is_floating_point()
        and getattr(module.weight, "quant_state", None) is None
    ]
    if plain or (said is not None and getattr(network, "hf_quantizer", None) is None):
        raise BadInput(
            f"{where} cannot be loaded as quantization_config in config.json says:"
            f" {f'{plain[0]} is not quantized' if plain else 'its format is unknown'}; remove that key if the"
            " weights are plain, or name another model"
        )


def is_quantized(network) -> bool:
    return getattr(network, "is_loaded_in_4bit", False)


def restore(network) -> None:
    """Gives every 4-bit matrix of ``network`` the values that products were computed with, in the type that
    the base was loaded in, and moves all to the CPU, in place: a GPU that needs 4 bits may not hold them.
    """
    import torch

    with torch.no_grad():
        for module in _found(network).values():
            weight = _values(module.weight)
            module.__class__ = torch.nn.Linear
            module.weight = torch.nn.Parameter(weight.cpu(), requires_grad=False)
    network.is_loaded_in_4bit = False
    network.cpu()
