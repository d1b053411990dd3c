"""LoRA by PEFT: what is trained, and a merged model that is known to compute what the adapters computed.

Under ZeRO-3 every parameter is in pieces, so merging reads and writes gathered ones; an adapter read without
gathering is empty, and a merge with it would silently save the base model.  Hence two comparisons with the
saved model: of its logits, and, since rounding to bf16 moves logits about as far as a lightly trained adapter
does, of every merged matrix on one vector.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from endprompt import BadInput, Failure
from endprompt.bases import families, loading, quantized
from endprompt.recipe.experiment import Experiment
from endprompt.recipe.training_keys import Lora
from endprompt.training import windows


def check(experiment: Experiment) -> None:
    """Raises BadInput if the base or the method takes no such adapters, or a package for them is missing."""
    adapters, config = experiment.adapters, experiment.base.config
    if adapters is None:
        return
    families.adapted(config, adapters.targets)
    if adapters.quantize is None:
        return
    quantized.refuse(config)
    if experiment.method.base_beside(adapters):
        raise BadInput(
            f"{quantized.KEY}: {experiment.method.name} holds the base a second time, whole, where"
            " train_embed_norm trains its embedding; set train.lora.train_embed_norm: false, or remove it"
        )
    quantized.refuse_missing()


def inject(model, lora: Lora, seed: int) -> None:
    """Puts adapters into ``model`` in place, freezes what ``lora`` does not train, and starts A from
    ``seed``.

    The model keeps its class and methods, so that the loss head, the probe and the Trainer see what they see
    without LoRA.
    """
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    inject_adapter_in_model(
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=families.adapted(model.config, lora.targets),
            bias="none",
        ),
        model,
    )
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad_(lora.train_embed_norm and ("embed" in name or "norm" in name))


def _layers(model) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@contextlib.contextmanager
def gathered(parameters: list, write: bool):
    """The whole parameters inside, whether ZeRO-3 holds them in pieces or not; with ``write``, rank 0's
    values are kept.
    """
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None):
            yield
    else:
        yield


@dataclass(frozen=True)
class Trace:
    """What a merged matrix must do to ``_direction(in)``: weight [out] is W x, adapter [out] is alpha / r x B
    A x, both float64 on the CPU.
    """

    weight: torch.Tensor
    adapter: torch.Tensor

    def fraction(self, merged: torch.Tensor) -> tuple[float, float]:
        """(how much of the adapter is in ``merged`` [out, in], least squares: 1 all, 0 none; its standard
        error from rounding ``merged``).
        """
        x, square = _direction(merged.shape[1]), float(self.adapter.square().sum())
        half_ulp = torch.finfo(merged.dtype).eps / 2
        merged = merged.double()
        found = float((merged @ x - self.weight) @ self.adapter) / square
        return (
            found,
            float((merged.square() @ x.square()) @ self.adapter.square() / 3) ** 0.5 * half_ulp / square,
        )


def _direction(size: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")


@torch.no_grad()
def merge(model) -> dict[str, Trace]:
    """Adds every adapter's alpha / r x B A to its weight, in float32, and takes the adapters out, in place.
    All ranks call it together.

    Returns, by the name of the module, what ``verify_merged`` will look for.
    Raises Failure if a gathered adapter has another shape than its weight asks for.
    """
    traces = {}
    for name, layer in _layers(model).items():
        base, (a, b), scaling = (
            layer.get_base_layer(),
            (layer.lora_A["default"].weight, layer.lora_B["default"].weight),
            layer.scaling["default"],
        )
        with gathered([a, b], write=False), gathered([base.weight], write=True):
            if a.dim() != 2 or b.dim() != 2 or base.weight.shape != (b.shape[0], a.shape[1]):
                raise Failure(
                    f"merge: {name} has a weight of {tuple(base.weight.shape)} and adapters of"
                    f" {tuple(b.shape)} x {tuple(a.shape)}"
                )
            x = _direction(a.shape[1]).to(a.device)
            traces[name] = Trace(
                (base.weight.double() @ x).cpu(), (scaling * (b.double() @ (a.double() @ x))).cpu()
            )
            base.weight.copy_(base.weight.float() + scaling * (b.float() @ a.float()))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
    return traces


@torch.no_grad()
def logits(model, batch: dict[str, torch.Tensor], device) -> torch.Tensor:
    """float32 [batch, length, vocabulary] on the CPU, in eval mode.  Under ZeRO-3 all ranks call it together,
    with the same batch.
    """
    training = model.training
    inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids", "attention_mask")}
    found = model.eval()(**inputs, use_cache=False).logits.float().cpu()
    model.train(training)
    return found


def _rounding(model) -> float:
    """How far rounding alone may move logits, in their standard deviations.  In half precision it also moves
    a token to another expert, wherever two are about as good.
    """
    if model.dtype == torch.float32:
        return 1e-3
    return 0.5 if families.experts(model.config) else 0.1


@torch.no_grad()
def verify_merged(
    folder, batch: dict[str, torch.Tensor], expected: torch.Tensor, traces: dict[str, Trace], device
) -> float:
    """Reloads the merged model in ``folder`` and compares it with the adapter model: ``expected`` are that
    one's logits on ``batch``.

    Returns the root mean square difference of the logits in units of their standard deviation.  Raises
    Failure if it is above 1e-3 in float32 or 0.1 in half precision (0.5 of a mixture of experts), where
    every merged weight is rounded once more (SmolLM2-135M in bf16: 0.03); or if the part of an adapter that
    is in its matrix is not 1 within 0.1 and six standard errors of that rounding. The logits are computed
    where the adapter model ran if twice the model's size is free there, else on the CPU.
    """
    from transformers import AutoModelForCausalLM

    with loading.whole_loading():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
    windows.attach(model)  # the adapters' model reads rows with jumps so
    for name, trace in traces.items():
        if trace.adapter.any():
            fraction, error = trace.fraction(model.get_submodule(name).weight)
            if not abs(fraction - 1) <= 0.1 + 6 * error:
                raise Failure(
                    f"merged model: {fraction:.0%} of the adapter of {name} is in {folder}; was it gathered? "
                    " The checkpoints are kept"
                )
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if torch.device(device).type != "cuda" or torch.cuda.mem_get_info(device)[0] < 2 * size:
        device = "cpu"
    found, used = logits(model.to(device), batch, device), batch["attention_mask"].bool()
    difference = float((found - expected)[used].pow(2).mean().sqrt() / expected[used].std())
    if not difference <= _rounding(model):
        raise Failure(
            f"merged model: {folder} gives other logits than the adapters it was merged from, by"
            f" {difference:.2g} standard deviations; is what was trained beside the adapters in it?  The"
            " checkpoints are kept"
        )
    return difference
