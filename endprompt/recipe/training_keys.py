"""The keys of a recipe's ``train:``: names of transformers.TrainingArguments, and three of our own.

Every name was looked at.  A key that does nothing with this repository's loss, checkpoints or data is refused
with the reason, and so is one that harms.  A key that a later transformers brings is refused until somebody
has looked at it.
docs/training-keys.md lists them all.
"""

import ast
import difflib
import functools
import importlib.util
import math
import os
import reprlib
import types
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from endprompt import BadInput

# The projections that llama, mistral and qwen2 layers have.  The output layer, which holds the loss, is none.
Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _whole_or_share(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("must be a whole number of steps, or a share of all steps below 1")
    return value


Count = Annotated[int, Field(ge=0)]
Some = Annotated[int, Field(gt=0)]
Above = Annotated[float, Field(gt=0)]
NotBelow = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy takes no other
Interval = Annotated[float, Field(gt=0), AfterValidator(_whole_or_share)]
Warmup = Annotated[float, Field(ge=0), AfterValidator(_whole_or_share)]
Level = Literal["debug", "info", "warning", "error", "critical", "passive"]
Tracker = Literal["tensorboard", "none"]


class Key(NamedTuple):
    """type: of the value; does: its effect, for docs/training-keys.md; others: why others are refused."""

    type: Any
    does: str
    others: str = ""


ALLOWED = {
    "per_device_train_batch_size": Key(
        Some,
        "rows of `lengths.physical` tokens a rank and micro-batch, 1 unless given; longer rows are fewer",
    ),
    "gradient_accumulation_steps": Key(Some, "micro-batches a step; 1 unless given"),
    "num_train_epochs": Key(Above, "passes over the rows, fractions too; 1 unless given"),
    "max_steps": Key(
        Annotated[int, Field(ge=-1)], "ends after so many steps, whatever the epochs; -1: not used"
    ),
    "learning_rate": Key(Above, "2e-5 unless given"),
    "lr_scheduler_type": Key(
        Literal[
            "linear",
            "cosine",
            "cosine_with_restarts",
            "polynomial",
            "constant",
            "constant_with_warmup",
            "inverse_sqrt",
            "cosine_with_min_lr",
            "cosine_warmup_with_min_lr",
            "warmup_stable_decay",
        ],
        "`constant_with_warmup` unless given",
        "reduce_lr_on_plateau and greedy follow an evaluation, and nothing is evaluated",
    ),
    "lr_scheduler_kwargs": Key(
        dict[str, Any], "what the schedule takes beside; tried out when the recipe is read"
    ),
    "warmup_steps": Key(Warmup, "steps, or below 1 a share of all steps; 20 unless given"),
    "optim": Key(
        Literal["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"],
        "the fused AdamW on a GPU unless given; others than AdamW without `deepspeed` alone",
        "others were not tried here",
    ),
    "optim_args": Key(
        str,
        "`name=value,...`; for sgd (momentum, dampening, nesterov), adagrad (lr_decay, eps) and rmsprop "
        "(momentum, alpha, eps, centered)",
    ),
    "weight_decay": Key(NotBelow, "of all weights but norms and biases; 0 unless given"),
    "adam_beta1": Key(Beta, "0.9 unless given"),
    "adam_beta2": Key(Beta, "0.999 unless given"),
    "adam_epsilon": Key(Above, "1e-8 unless given"),
    "max_grad_norm": Key(NotBelow, "1.0 unless given; 0: gradients are not clipped"),
    "bf16": Key(bool, "on a GPU true unless given"),
    "tf32": Key(bool, "of matrix products in float32; true needs transformers 5.23"),
    "gradient_checkpointing": Key(bool, "true unless given"),
    "gradient_checkpointing_kwargs": Key(
        dict[Literal["use_reentrant"], bool],
        "`use_reentrant`, false unless given",
        "use_reentrant alone was tried here",
    ),
    "torch_compile": Key(bool, "layer by layer (docs/speed.md)"),
    "torch_compile_backend": Key(
        Literal["inductor", "aot_eager", "eager"], "switches `torch_compile` on", "others were not tried here"
    ),
    "torch_compile_mode": Key(
        Literal["default", "max-autotune-no-cudagraphs"],
        "switches `torch_compile` on",
        "modes with CUDA graphs were not tried with recomputed layers",
    ),
    "use_liger_kernel": Key(bool, "Liger's layers; the loss stays ours (docs/speed.md)"),
    "liger_kernel_config": Key(dict[str, bool], "which of Liger's layers"),
    "torch_empty_cache_steps": Key(Some, "empties the allocator's cache every so many steps"),
    "logging_strategy": Key(
        Literal["steps", "epoch"],
        "when losses are logged; steps unless given",
        "train.json would hold no loss",
    ),
    "logging_steps": Key(Interval, "steps, or below 1 a share of all steps; 10 unless given"),
    "logging_first_step": Key(bool, "logs the first step too"),
    "log_on_each_node": Key(
        bool, "whether `log_level` holds for the first rank of each node or of the first alone"
    ),
    "include_num_input_tokens_seen": Key(
        Literal["no", "all", "non_padding"] | bool, "logs the tokens seen so far, of all ranks"
    ),
    "log_level": Key(Level, "of transformers' messages, on the first rank"),
    "log_level_replica": Key(Level, "the same on other ranks"),
    "disable_tqdm": Key(bool, "true unless given where standard error is no terminal"),
    "report_to": Key(
        Tracker | Annotated[list[Tracker], Field(max_length=1)],
        "tensorboard (the run's `logs/`) unless given, or none",
        "other trackers were not tried here; several of them read TensorBoard's files",
    ),
    "save_strategy": Key(
        Literal["steps"],
        "steps; `save_steps` says how often",
        "what a run goes on from is saved every save_steps and at its end",
    ),
    "save_steps": Key(Interval, "steps, or below 1 a share of all steps; 200 unless given, and at the end"),
    "save_total_limit": Key(Some | None, "whole checkpoints kept, the newest; 2 unless given, null: all"),
    "full_determinism": Key(bool, "torch's deterministic algorithms, slower"),
    "seed": Key(Seed, "order of rows, dropout, first adapters; `data.seed` unless given"),
    "data_seed": Key(Seed, "order of rows alone; `seed` unless given"),
    "dataloader_num_workers": Key(Count, "processes that read rows ahead; 0 unless given"),
    "dataloader_pin_memory": Key(bool, "on a GPU true unless given"),
    "dataloader_persistent_workers": Key(bool, "keeps those processes from one epoch to the next"),
    "dataloader_prefetch_factor": Key(Some, "micro-batches that each of them reads ahead"),
    "dataloader_multiprocessing_context": Key(Literal["fork", "spawn", "forkserver"], "how they are started"),
    "train_sampling_strategy": Key(
        Literal["random", "sequential"],
        "random unless given; sequential: in the shards' order",
        "group_by_length would go on with other rows, batch_rebalance was not tried",
    ),
    "ddp_find_unused_parameters": Key(bool, "torch's DistributedDataParallel, so without `deepspeed` alone"),
    "ddp_bucket_cap_mb": Key(Some, "the same"),
    "ddp_broadcast_buffers": Key(bool, "the same"),
    "ddp_timeout": Key(
        Some, "seconds after which a rank that does not answer is given up; 1800 unless given"
    ),
    "deepspeed": Key(dict[str, Any] | str | None, "a ZeRO file, or its content; null: none"),
}
OURS = {
    "lora": (
        "adapters in place of whole weights: `r`, `alpha`, `dropout`, `targets`, `train_embed_norm`,"
        " `quantize`"
    ),
    "sequence_parallel": "ranks that share a row (DeepSpeed's Ulysses); 1 unless given",
    "base_share": (
        "of the base's weights in the saved model, the rest being what was trained; 0 unless given, or as the"
        " method says"
    ),
}

_REFUSED = {
    # What the run's folder, the command line, the collator or the shards say.
    "--out": "output_dir logging_dir overwrite_output_dir",
    "resuming is automatic": "resume_from_checkpoint",
    "the collator needs them": "remove_unused_columns",
    "the command": "do_train do_eval do_predict",
    "the shards": "label_names",
    "the launcher says it": "local_rank",
    "endprompt evaluate scores": "eval_strategy evaluation_strategy",
    "upload the folder model/ yourself": (
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision"
    ),
    "write train.sequence_parallel": "parallelism_config",
    "write gradient_checkpointing, which all 5.x know": (
        "activation_checkpointing activation_checkpointing_kwargs"
    ),
    "write the share as warmup_steps, below 1": "warmup_ratio",
    # What does nothing here.
    "the weighted loss knows no smoothing": "label_smoothing_factor",
    "the loss is always divided by the weights of all ranks' rows": "average_tokens_across_devices",
    "nothing is evaluated during training; endprompt evaluate scores": (
        "eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start "
        "eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics "
        "batch_eval_metrics load_best_model_at_end metric_for_best_model greater_is_better "
        "bf16_full_eval fp16_full_eval"
    ),
    "only trackers other than TensorBoard read it": (
        "run_name project trackio_space_id trackio_bucket_id trackio_static_space_id"
    ),
    "a run's loss that is not finite ends it, with the step and its rows": "logging_nan_inf_filter debug",
    "it belongs to optimizers that were not tried here": "optim_target_modules",
    "no callback here keeps a state of its own": "restore_callback_states_from_checkpoint",
    "rows are not grouped by length: a run would go on with other rows": "length_column_name group_by_length",
    "a GPU is used where there is one; CUDA_VISIBLE_DEVICES= hides it": "use_cpu no_cuda",
    "NCCL on GPUs and gloo on CPUs": "ddp_backend",
    # What harms.
    "a run that goes on would begin Adam and the warm-up anew": "save_only_model",
    "a run that goes on would train on the same rows again": "ignore_data_skip",
    "rows at the end of an epoch would never be trained on": "dataloader_drop_last",
    "steps would hold other rows each time": "dataloader_in_order",
    "a step must hold the rows that the recipe says": "auto_find_batch_size accelerator_config",
    "checkpoints must lie where all nodes see them": "save_on_each_node",
    "SIGTERM and SIGUSR1 end in a checkpoint without it": "enable_jit_checkpoint",
    "the loss forms its gradient before a loss scale could keep small ones from vanishing; write bf16": (
        "fp16 half_precision_backend"
    ),
    "training attends without a cache": "use_cache",
    "the size of its noise would depend on padding, so on how rows are split": "neftune_noise_alpha",
    "it starts the count of the largest memory anew, which the log reports": "skip_memory_metrics",
    "checkpoints and the saved model were not tried with FSDP; take train.deepspeed": "fsdp fsdp_config",
    "it was not tried with gradient_accumulation_steps": "ddp_static_graph",
}
REFUSED = {key: reason for reason, keys in _REFUSED.items() for key in keys.split()}

# The paper's (appendix A.1), where a recipe does not say otherwise, and transformers' of 5.23.
DEFAULTS = {
    "learning_rate": 2e-5,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 20,
    "weight_decay": 0.0,
    "num_train_epochs": 1,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "logging_steps": 10,
    "save_steps": 200,
    "report_to": ["tensorboard"],
    "max_grad_norm": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
}

OPTIM_ARGS = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
}
ADAMW = (None, "adamw_torch", "adamw_torch_fused")


class Lora(BaseModel):
    """``train.lora`` of a recipe: W + alpha / r x B A in place of W, with A [r, in] and B [out, r] trained.

    Source: arXiv 2106.09685.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    r: int = Field(8, gt=0, description="rank of an adapter")
    alpha: float = Field(16.0, gt=0, description="the adapter's product is multiplied by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the adapters' input")
    targets: list[Target] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1, description="the matrices that get one"
    )
    train_embed_norm: bool = Field(
        False,
        description="every parameter whose name contains `embed` or `norm` is trained whole, as in LongLoRA"
        " (section 3.3); a tied output layer is then trained with the embedding",
    )

    quantize: Literal["nf4"] | None = Field(
        None,
        description="nf4: the base's layers in 4 bits while adapters are trained, which are merged into the"
        " values that these stand for (QLoRA); needs `pip install 'endprompt[qlora]'` and no `deepspeed`"
        " (docs/methods.md)",
    )

    @field_validator("alpha", "dropout", mode="before")
    @classmethod
    def real(cls, value):
        return float(value) if type(value) is int else value


@functools.cache
def known() -> frozenset[str]:
    """The names of TrainingArguments in the transformers that is installed.

    Its file is read, not imported: an import takes four seconds, of every command.
    """
    package = importlib.util.find_spec("transformers")
    if package is None or package.origin is None:
        raise BadInput("transformers is not installed; pip install 'transformers>=5.17,<6'")
    tree = ast.parse((Path(package.origin).parent / "training_args.py").read_text(encoding="utf-8"))
    (found,) = (
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
    )
    return frozenset(
        node.target.id
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    )


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
    if key not in known():
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
