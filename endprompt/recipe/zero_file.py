"""DeepSpeed's options, from a ZeRO file or the recipe itself: what they may hold, and what the recipe says.

DeepSpeed ignores names that it does not know beside its sections, and has values of its own for the rest.
"""

import difflib
import reprlib
from typing import Any, NoReturn

from endprompt import BadInput
from endprompt.recipe import zero_section
from endprompt.recipe.training_keys import DEFAULTS, REFUSED
from endprompt.recipe.zero_section import Wrong

BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
HALVES = ("bf16", "fp16")
# Of a section bf16: what keeps bf16 in place of float32 masters, so that small updates are lost.
MASTERS = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
SUMS = ("bf16", "fp32")  # what gradients of micro-batches may be summed in
KNOWN = (
    *BATCH,
    *HALVES,
    "zero_optimization",
    "optimizer",
    "gradient_clipping",
    "data_types",
    "communication_data_type",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "aio",
    "checkpoint",
    "wall_clock_breakdown",
    "memory_breakdown",
    "steps_per_print",
    "dump_state",
    "comms_logger",
    "flops_profiler",
)
# The optimizer's parameters, and the recipe's keys that say them.
PARAMS = {
    "lr": ("learning_rate",),
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
    "weight_decay": ("weight_decay",),
}
GATHER = "stage3_gather_16bit_weights_on_model_save"


def check(train: dict[str, Any], options: Any, where: str) -> None:
    """Raises BadInput beginning with ``where`` unless DeepSpeed's ``options`` agree with the recipe.

    Refused are names that DeepSpeed would ignore, that train something else, or that leave no model to save,
    and values that it would end with once the weights are loaded.
    """

    def wrong(name: str, why: str) -> NoReturn:
        raise BadInput(f"{where}: {name} {why}")

    if not isinstance(options, dict):
        raise BadInput(
            f"{where} is no mapping of DeepSpeed's options, but {type(options).__name__}; "
            "ds_configs/ holds examples"
        )
    zero = options.get("zero_optimization", {})
    if (
        not isinstance(zero, dict)
        or type(zero.get("stage", 0)) is not int
        or not 0 <= zero.get("stage", 0) <= 3
    ):
        wrong(
            "zero_optimization",
            f"is no mapping with a stage from 0 to 3 (given: {reprlib.repr(zero)}); "
            "ds_configs/ holds examples",
        )
    if "zero_optimization" not in options:
        wrong("zero_optimization", "is missing; add it with a stage, or set train.deepspeed to null")
    if "scheduler" in options:
        wrong("scheduler", "would go before train.lr_scheduler_type; take it out of the file")
    if unknown := [name for name in options if name not in KNOWN]:
        near = difflib.get_close_matches(unknown[0], KNOWN, 1)
        mend = f"; remove it, or write {near[0]}" if near else "; remove it"
        wrong(reprlib.repr(unknown[0]), f"is unknown to DeepSpeed, or was not tried here{mend}")
    for name in BATCH:
        if options.get(name, "auto") != "auto":
            why = "it follows from the recipe, the method's rows and the number of ranks"
            wrong(name, f'is {reprlib.repr(options[name])}; write "auto", for {why}')
    zero_section.check_zero(zero, wrong)
    _check_sections({**DEFAULTS, **train}, train.get("bf16"), options, wrong)


def _check_sections(merged: dict[str, Any], bf16: bool | None, options: dict[str, Any], wrong: Wrong) -> None:
    """``check`` beside ``zero_optimization``; merged: the recipe's ``train`` over the defaults; bf16: as the
    recipe says, None if it is open.
    """
    if options.get("gradient_clipping", "auto") not in ("auto", merged["max_grad_norm"]):
        said = f"train.max_grad_norm {merged['max_grad_norm']:g}"
        wrong(
            "gradient_clipping", f'is {reprlib.repr(options["gradient_clipping"])}, and {said}; write "auto"'
        )
    for name in HALVES:
        _check_half(name, options.get(name, {}), bf16 if name == "bf16" else False, wrong)
    _check_sums(options.get("data_types", {}), wrong)
    if options["zero_optimization"].get(GATHER, True) is not True:
        wrong(
            f"zero_optimization.{GATHER}", "is not true, and without it there is no model to save at the end"
        )
    checkpoint = options.get("checkpoint", {})
    if not isinstance(checkpoint, dict) or checkpoint.get("use_node_local_storage"):
        wrong(
            "checkpoint", f"must be a mapping without use_node_local_storage: {REFUSED['save_on_each_node']}"
        )
    rest = {name: value for name, value in options.items() if name in zero_section.SECTIONS["a file"]}
    zero_section.check("a file", rest, "", wrong)
    if checkpoint.get("load_universal"):
        wrong("checkpoint.load_universal", "is found out when a run goes on; remove it")
    if "optimizer" in options:
        _check_optimizer(merged, options["optimizer"], wrong)


def _check_sums(section: Any, wrong: Wrong) -> None:
    known = isinstance(section, dict) and not set(section) - {"grad_accum_dtype"}
    if not known or any(kind not in SUMS for kind in section.values()):
        kinds = ", ".join(SUMS)
        wrong("data_types", f"may hold grad_accum_dtype alone, one of {kinds}; leave it out for fp32")


def _check_half(name: str, section: Any, trained: bool | None, wrong: Wrong) -> None:
    """``check`` for a section bf16 or fp16; trained: whether the recipe trains in it, None if it is open."""
    if not isinstance(section, dict):
        wrong(name, f'is no mapping such as {{"enabled": "auto"}} (given: {reprlib.repr(section)})')
    enabled = section.get("enabled", "auto")
    if enabled != "auto" and type(enabled) is not bool:
        wrong(f"{name}.enabled", f'is {reprlib.repr(enabled)}; write "auto"')
    if asked := [key for key in MASTERS if section.get(key)]:
        wrong(f"{name}.{asked[0]}", "keeps no float32 masters, and small updates are lost; take it out")
    if enabled is True and name == "fp16":
        wrong("fp16", f"is enabled: {REFUSED['fp16']}")
    if trained is not None and enabled != "auto" and enabled != trained:
        wrong(f"{name}.enabled", f'is {enabled}, and train.{name} {trained}; write "auto"')
    kind = zero_section.BF16 if name == "bf16" else zero_section.FP16
    zero_section.check(kind, section, f"{name}.", wrong)


def _check_optimizer(merged: dict[str, Any], section: Any, wrong: Wrong) -> None:
    """``check`` for the section ``optimizer``; merged: the recipe's ``train`` over the defaults."""
    params = section.get("params", {}) if isinstance(section, dict) else None
    if (
        not isinstance(section, dict)
        or not isinstance(params, dict)
        or section.get("type") not in ("Adam", "AdamW")
        or set(section) - {"type", "params"}
    ):
        wrong("optimizer", "must hold type AdamW and params alone")
    if unknown := set(params) - {*PARAMS, "torch_adam"}:
        wrong(f"optimizer.params.{min(unknown)}", "was not tried here; remove it")
    if not isinstance(params.get("torch_adam", False), bool):
        wrong("optimizer.params.torch_adam", "must be true or false")
    for name, keys in PARAMS.items():
        said = [merged[key] for key in keys]
        if params.get(name, "auto") not in ("auto", said if len(said) > 1 else said[0]):
            why = f"and train.{keys[0]} {said[0]:g}"
            wrong(f"optimizer.params.{name}", f'is {reprlib.repr(params[name])}, {why}; write "auto"')
    if merged["weight_decay"]:
        wrong(
            "optimizer",
            "would let train.weight_decay shrink norms and biases too; take the section out of the file",
        )


def filled(options: dict[str, Any], accumulation: int) -> dict[str, Any]:
    """``options`` with what the recipe says in the places that they leave out.

    Else gradients would not be clipped, the learning rate would be the optimizer's own, DeepSpeed would
    compute in float32, gradients of ``accumulation`` micro-batches would be summed in the weights' type,
    and under ZeRO-3 there would be no model to save at the end.
    """
    zero = options["zero_optimization"]
    # accelerate takes a null for a mapping
    nothing = [name for name in zero_section.OFFLOADS if name in zero and zero[name] is None]
    zero = {key: value for key, value in zero.items() if key not in nothing}
    if zero.get("stage") == 3:
        zero = {GATHER: True, **zero}
    auto = dict.fromkeys((*BATCH, "gradient_clipping"), "auto")
    bf16 = {"enabled": "auto", **options.get("bf16", {})}
    found = {**auto, **options, "bf16": bf16, "zero_optimization": zero}
    if accumulation > 1 and zero.get("stage", 0) > 0:
        found["data_types"] = {"grad_accum_dtype": "fp32", **options.get("data_types", {})}
    if "optimizer" in options:
        params = {**dict.fromkeys(PARAMS, "auto"), **options["optimizer"].get("params", {})}
        found["optimizer"] = {**options["optimizer"], "params": params}
    return found
