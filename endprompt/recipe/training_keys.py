"""The keys of a recipe's ``train:``: names of transformers.TrainingArguments, and three of our own.

Every name was looked at.  A key that does nothing with this repository's loss, checkpoints or data is refused
with the reason, and so is one that harms.  A key that a later transformers brings is refused until somebody
has looked at it.
docs/training-keys.md lists them all.
"""

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

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
