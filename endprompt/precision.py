"""The types that weights are loaded, trained and saved in.  What is trained has float32 masters, whoever
keeps them.

An update smaller than half the spacing of bfloat16 (2^-9 to 2^-8 of a weight) is lost when it is added to a
bfloat16 weight. DeepSpeed keeps float32 masters of bfloat16 weights and steps those.  Without DeepSpeed the
weights themselves are float32, and autocast casts them for the matrix products; what is frozen may stay
bfloat16.
"""

import torch
from transformers import TrainerCallback

from endprompt import BadInput, Failure


def saved(arguments) -> torch.dtype:
    """The type of the model that training leaves where DeepSpeed does not decide it."""
    return torch.bfloat16 if arguments.bf16 else torch.float32


def loaded(arguments, adapters: bool) -> torch.dtype:
    """The type to load the base in.  DeepSpeed takes what its engine computes with and makes the masters;
    without it, the weights are the masters, unless they are frozen under ``adapters``.
    """
    if arguments.deepspeed:
        return torch.bfloat16 if arguments.hf_deepspeed_config.dtype() == torch.bfloat16 else torch.float32
    return saved(arguments) if adapters else torch.float32


def raise_trained(network) -> None:
    """Without DeepSpeed: turns every parameter that is trained into float32, in place."""
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def lower(network, dtype: torch.dtype) -> None:
    """Without DeepSpeed, once trained: turns every parameter into ``dtype``, in place, as the model is
    saved.
    """
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


def check(arguments) -> None:
    """Raises BadInput if DeepSpeed's options and the recipe name different types (or other settings), or half
    precision at stage 0.

    There DeepSpeed 0.19 (fp16/fused_optimizer.py) sums gradients in half precision, and takes a step of Adam
    with gradients of zero before the first, which makes the first true update 0.74 of its size.
    """
    if not arguments.deepspeed:
        return
    settings = arguments.hf_deepspeed_config
    if settings.mismatches:
        told = "; ".join(
            line.removeprefix("- ds ").replace(" vs hf ", " in the file, ") for line in settings.mismatches
        )
        raise BadInput(
            f'train.deepspeed: {told} by the recipe; write "auto" in the file, or the same in both'
        )
    if settings.dtype() != torch.float32 and (settings.get_value("zero_optimization.stage") or 0) == 0:
        raise BadInput(
            "train.deepspeed: ZeRO stage 0 sums half-precision gradients in half precision and miscounts"
            " Adam's steps; use stage 1 or above, or train.deepspeed=null"
        )


def _master(parameter, stepped: set[int]) -> torch.dtype | None:
    """The type of the weights that are stepped in place of ``parameter``; None if this rank steps none."""
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        from deepspeed.utils import safe_get_local_fp32_param

        try:
            return safe_get_local_fp32_param(parameter).dtype
        except KeyError:
            return None
    if hasattr(parameter, "_hp_mapping"):  # ZeRO-1, ZeRO-2
        return None if parameter._hp_mapping is None else parameter._hp_mapping.get_hp_fragment().dtype
    return parameter.dtype if id(parameter) in stepped else None


def verify(network, optimizer, whole: bool) -> None:
    """Raises Failure on all ranks unless ``optimizer`` steps float32 values of every trained parameter; all
    ranks call it together.

    network: as training uses it, under DeepSpeed too; whole: every parameter of ``network`` must be trained.
    """
    if whole and (
        frozen := [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    ):
        raise Failure(
            f"precision: {len(frozen)} parameters of the base are frozen, first {frozen[0]}, and the recipe"
            " trains all; set train.lora to train adapters alone"
        )
    trained = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    found = [_master(parameter, stepped) for _, parameter in trained]
    # A rank may hold no piece of a parameter, but some rank must hold one: 0 none, 1 float32, 2 another type.
    codes = torch.tensor(
        [0 if kind is None else 1 if kind == torch.float32 else 2 for kind in found],
        device=next(network.parameters()).device,
    )
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(codes, torch.distributed.ReduceOp.MAX)
    wrong = [
        (name, kind)
        for (name, _), kind, code in zip(trained, found, codes.tolist(), strict=True)
        if code != 1
    ]
    if wrong:
        name, kind = wrong[0]
        raise Failure(
            f"precision: {len(wrong)} of {len(trained)} trained parameters have no float32 master, first"
            f" {name} ({'not in the optimizer' if kind is None else kind}); small updates would be lost"
        )


class Masters(TrainerCallback):
    """``verify`` before the first step."""

    def __init__(self, whole: bool):
        self.whole = whole

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        verify(model, optimizer, self.whole)
