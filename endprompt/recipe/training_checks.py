"""Whether the keys of a recipe's ``train:`` can be used: each by itself, and beside the others."""

import difflib
import functools
import importlib.util
import math
import os
import reprlib
import types
from typing import Any, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError

from endprompt import BadInput
from endprompt.recipe import training_keys
from endprompt.recipe.training_keys import ADAMW, ALLOWED, DEFAULTS, OPTIM_ARGS, OURS, REFUSED, Lora


@functools.cache
def _adapter(key: str) -> TypeAdapter:
    return TypeAdapter(ALLOWED[key].type, config=ConfigDict(allow_inf_nan=False))


def _lora(value: Any) -> dict[str, Any] | None:
    """The keys of ``train.lora`` that are given, checked; raises BadInput naming the first wrong one."""
    if value is None:
        return None
    try:
        return Lora.model_validate(value).model_dump(exclude_unset=True)
    except ValidationError as error:
        item = error.errors()[0]
        key = ".".join(str(part) for part in ("train.lora", *item["loc"]))
        if item["type"] == "extra_forbidden":
            raise BadInput(f"unknown key {key}; known here: {', '.join(Lora.model_fields)}") from None
        raise BadInput(f"{key}: {item['msg']} (given: {reprlib.repr(item['input'])})") from None


def _value(key: str, value: Any) -> Any:
    """``value`` in the type of ``train.<key>``.  Raises BadInput."""
    if key == "lora":
        return _lora(value)
    if key == "sequence_parallel":
        if type(value) is not int or value < 1:
            raise BadInput(
                "train.sequence_parallel: a whole number of ranks from 1 on is wanted "
                f"(given: {reprlib.repr(value)})"
            )
        return value
    if key == "base_share":
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise BadInput(
                f"train.base_share: a number from 0 to below 1 is wanted (given: {reprlib.repr(value)})"
            )
        return float(value)
    if key in REFUSED:
        raise BadInput(f"train.{key} is not for recipes ({REFUSED[key]}); remove it")
    if key not in training_keys.known():
        if key in ALLOWED:
            raise BadInput(
                f"train.{key}: the installed transformers does not know it; install 5.23, or remove it"
            )
        near = difflib.get_close_matches(key, [*ALLOWED, *OURS], 1)
        raise BadInput(
            f"unknown key train.{key}; it takes names of transformers.TrainingArguments"
            + (f", for example {near[0]}" if near else ", lora, sequence_parallel and base_share")
            + " (docs/training-keys.md)"
        )
    if key not in ALLOWED:
        raise BadInput(
            f"train.{key}: transformers knows it, but its effect here was not looked at yet; remove it"
        )
    try:
        checked = _adapter(key).validate_python(value)
    except ValidationError as error:
        item = error.errors()[0]
        why = f"; {ALLOWED[key].others}" if ALLOWED[key].others else ""
        raise BadInput(
            f"train.{key}: {item['msg'].removeprefix('Value error, ')} (given: {reprlib.repr(value)}){why}"
        ) from None
    if isinstance(value, bool) and type(checked) in (int, float):
        raise BadInput(f"train.{key}: a number is wanted (given: {value!r})")
    return checked


def check(train: dict[str, Any]) -> dict[str, Any]:
    """``train`` with every value in its type.

    Raises BadInput naming the key that is unknown, refused, wrong by itself, or without effect beside others.
    """
    checked = {key: _value(key, value) for key, value in train.items()}
    _together(checked)
    _refuse_quantized(checked)
    _refuse_speed(checked)
    return checked


class Rule(NamedTuple):
    """A key that is refused where ``wrong`` holds, and why."""

    key: str
    wrong: Any
    why: str


def _together(train: dict[str, Any]) -> None:
    """Raises BadInput where a key would be without effect, or harm, beside another."""
    optim = train.get("optim")
    schedule = train.get("lr_scheduler_type", DEFAULTS["lr_scheduler_type"])
    for rule in (
        *_rules_of_steps(train, schedule),
        *_rules_of_optimizer(train, optim),
        *_rules_of_processes(train),
        *_rules_of_layers(train),
    ):
        if rule.key in train and rule.wrong:
            raise BadInput(f"train.{rule.key}: {rule.why}")
    if "optim_args" in train:
        _optim_args(train["optim_args"], optim or "adamw_torch")
    if "lr_scheduler_type" in train or "lr_scheduler_kwargs" in train:
        _schedule(train, schedule)


def _rules_of_steps(train: dict[str, Any], schedule: str) -> list[Rule]:
    return [
        Rule(
            "max_steps",
            train.get("max_steps") == 0,
            "0 steps train nothing; give a number above, or -1 for num_train_epochs",
        ),
        Rule(
            "num_train_epochs",
            train.get("max_steps", -1) > 0,
            "max_steps says already when training ends; keep one of the two",
        ),
        Rule(
            "warmup_steps",
            schedule == "constant" and train.get("warmup_steps"),
            "lr_scheduler_type constant has no warm-up; write constant_with_warmup, or remove it",
        ),
        Rule(
            "lr_scheduler_kwargs",
            schedule in ("constant", "constant_with_warmup") and train.get("lr_scheduler_kwargs"),
            f"lr_scheduler_type {schedule} reads none of it; remove it",
        ),
    ]


def _rules_of_optimizer(train: dict[str, Any], optim: str | None) -> list[Rule]:
    plain, deepspeed = optim in ADAMW, train.get("deepspeed") is not None
    return [
        Rule(
            "optim",
            deepspeed and not plain,
            f"DeepSpeed hands {optim} flat pieces of weights, and converts AdamW's states alone for other"
            " numbers of ranks; take adamw_torch, or train.deepspeed=null",
        ),
        *(
            Rule(key, not plain, f"{optim} does not read it; remove it")
            for key in ("adam_beta1", "adam_beta2", "adam_epsilon")
        ),
    ]


def _rules_of_processes(train: dict[str, Any]) -> list[Rule]:
    return [
        *(
            Rule(
                key,
                train.get("deepspeed") is not None,
                "it is of DistributedDataParallel, which DeepSpeed replaces; remove it",
            )
            for key in ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers")
        ),
        *(
            Rule(
                key,
                train.get(key) and not train.get("dataloader_num_workers"),
                "there are no such processes; set dataloader_num_workers",
            )
            for key in (
                "dataloader_persistent_workers",
                "dataloader_prefetch_factor",
                "dataloader_multiprocessing_context",
            )
        ),
        Rule(
            "logging_steps",
            train.get("logging_strategy") == "epoch",
            "logging_strategy epoch does not read it; keep one of the two",
        ),
    ]


def _rules_of_layers(train: dict[str, Any]) -> list[Rule]:
    return [
        Rule(
            "liger_kernel_config",
            not train.get("use_liger_kernel"),
            "it chooses among Liger's layers; set use_liger_kernel: true, or remove it",
        ),
        *(
            Rule(
                key,
                train.get("torch_compile") is False,
                "it switches torch_compile on, which is false; keep one of the two",
            )
            for key in ("torch_compile_backend", "torch_compile_mode")
        ),
    ]


def _optim_args(text: str, optim: str) -> None:
    """Raises BadInput unless ``text`` is name=value pairs that reach ``optim``; transformers drops others."""
    takes, flags = OPTIM_ARGS.get(optim, ()), ("nesterov", "centered")
    for pair in text.replace(" ", "").split(","):
        name, equals, value = pair.partition("=")
        if name not in takes:
            known_here = f"it takes {', '.join(takes)}" if takes else "it takes none"
            raise BadInput(f"train.optim_args: {optim} does not read {reprlib.repr(name)}; {known_here}")
        try:
            wrong = value not in ("true", "false") if name in flags else not 0 <= float(value) < math.inf
        except ValueError:
            wrong = True
        if not equals or wrong:
            raise BadInput(
                f"train.optim_args: {name} takes {'true, false' if name in flags else 'a number from 0 on'} "
                f"(given: {reprlib.repr(pair)})"
            )
    _try("train.optim_args", lambda: _optimizer(text, optim))


def _optimizer(text: str, optim: str):
    """An optimizer of one weight, as the Trainer makes it."""
    import torch
    from transformers import Trainer
    from transformers.training_args import OptimizerNames

    # Not TrainingArguments, which would join the other ranks.
    rest = {
        key: DEFAULTS[key]
        for key in ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    }
    arguments = types.SimpleNamespace(optim=OptimizerNames(optim), optim_args=text, **rest)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind([torch.nn.Parameter(torch.zeros(1, device="cpu"))], **options)


def _schedule(train: dict[str, Any], name: str) -> None:
    """Raises BadInput unless the schedule can be made and gives learning rates from 0 on over a whole run."""
    import torch
    from transformers import get_scheduler

    steps = train["max_steps"] if train.get("max_steps", -1) > 0 else 1000
    rate, where = train.get("learning_rate", DEFAULTS["learning_rate"]), "train.lr_scheduler_kwargs"

    def rates() -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1, device="cpu"))], lr=rate)
        made = get_scheduler(name, optimizer, min(2, steps - 1), steps, train.get("lr_scheduler_kwargs"))
        return [
            float(rate * made.lr_lambdas[0](step))
            for step in {0, 1, steps // 3, steps // 2, steps - 1, steps}
        ]

    found = _try(where, rates)
    if not all(0 <= value < math.inf for value in found):
        raise BadInput(
            f"{where}: with {name} the learning rate would be {min(found):g} at some step; "
            "give values that keep it from 0 on"
        )


def _try(where: str, make):
    """What ``make`` returns.  Raises BadInput, beginning with ``where``, for whatever it raises."""
    try:
        return make()
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"{where}: transformers refuses it: {said[:200]}") from None


def _refuse_quantized(train: dict[str, Any]) -> None:
    """Raises BadInput on what adapters on a base in 4 bits do not go with."""
    if not (train.get("lora") or {}).get("quantize"):
        return
    if train.get("deepspeed") is not None:
        raise BadInput(
            "train.lora.quantize: ZeRO-3 would cut 4-bit weights into pieces without their constants, and"
            " ZeRO-1 and 2 share what adapters have little of; set train.deepspeed: null, or remove quantize"
        )
    if compiles(train):
        raise BadInput(
            "train.lora.quantize: 4-bit layers were not tried under torch_compile; remove one of the two"
        )


def _refuse_speed(train: dict[str, Any]) -> None:
    """Raises BadInput on options that would change the loss or the positions."""
    import transformers

    liger = train.get("liger_kernel_config") or {}
    if ours := [name for name in ("cross_entropy", "fused_linear_cross_entropy") if liger.get(name)]:
        raise BadInput(
            f"train.liger_kernel_config: {ours[0]} would put Liger's loss, which knows no weights, "
            "in the place of ours; leave it out"
        )
    if train.get("tf32") and tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23):
        raise BadInput(
            f"train.tf32: transformers {transformers.__version__} makes the angles of positions by a matrix "
            "product, which TF32 rounds to 11 bits; leave it out (the model computes in bfloat16 anyway), "
            "or install 5.23"
        )


def compiles(train: dict) -> bool:
    """Whether a recipe's ``train`` asks for torch.compile, of which the loss is to be kept out."""
    return any(train.get(name) for name in ("torch_compile", "torch_compile_backend", "torch_compile_mode"))


def speed_options(train: dict) -> dict:
    """What a recipe's ``train`` needs beside its own keys for compiled layers and Liger (docs/speed.md).

    Raises BadInput on options that would change the loss or the positions, and where Liger is not installed.
    """
    _refuse_speed(train)
    if train.get("use_liger_kernel") and not importlib.util.find_spec("liger_kernel"):
        raise BadInput(
            "train.use_liger_kernel: the package is not installed; pip install liger-kernel, or remove it"
        )
    if compiles(train):
        # Layer by layer: compiled as one, transformers cannot look whether the mask is all ones, and builds
        # the square of it, which no flash kernel takes.
        os.environ.setdefault("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    # Where nothing is said, Liger's loss is on.
    liger = train.get("liger_kernel_config") or {}
    return (
        {"liger_kernel_config": {**liger, "fused_linear_cross_entropy": False, "cross_entropy": False}}
        if train.get("use_liger_kernel")
        else {}
    )
