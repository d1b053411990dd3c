"""The keys of a recipe's ``train:``, which are those of transformers.TrainingArguments and a few of our own."""

import enum
import functools
import os
import reprlib
import typing
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from endprompt import BadInput

# The projections that llama, mistral and qwen2 layers have.  The output layer is not among them: the loss lives in it.
Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Settings of the HF Trainer that belong to the run's folder, the collator or the shards, not to a recipe.
RESERVED = {"output_dir": "--out", "resume_from_checkpoint": "resuming is automatic", "remove_unused_columns": "the collator needs them",
            "do_train": "the command", "do_eval": "the command", "eval_strategy": "endprompt evaluate scores", "do_predict": "the command", "label_names": "the shards",
            "logging_dir": "--out", "push_to_hub": "upload the folder model/ yourself"}


class Lora(BaseModel):
    """``train.lora`` of a recipe: W + alpha / r x B A in place of W, with A [r, in] and B [out, r] trained (arXiv 2106.09685).

    dropout: of the adapters' input.  train_embed_norm: every parameter whose name contains ``embed`` or ``norm`` is trained whole,
    as in LongLoRA (section 3.3); a tied output layer is then trained with the embedding.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    r: int = Field(8, gt=0)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[Target] = Field(["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1)
    train_embed_norm: bool = False

    @field_validator("alpha", "dropout", mode="before")
    @classmethod
    def real(cls, value):
        return float(value) if type(value) is int else value


@functools.cache
def _types() -> dict[str, Any]:
    from transformers import TrainingArguments

    return typing.get_type_hints(TrainingArguments)


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


def check(train: dict[str, Any]) -> dict[str, Any]:
    """``train`` with every value in the type that HF's TrainingArguments declares, and our own ``lora`` and ``sequence_parallel``; raises BadInput naming the key."""
    types, checked = _types(), {}
    for key, value in train.items():
        if key == "lora":
            checked[key] = _lora(value)
            continue
        if key == "sequence_parallel":
            if type(value) is not int or value < 1:
                raise BadInput(f"train.sequence_parallel: a whole number of ranks from 1 on is wanted (given: {reprlib.repr(value)})")
            checked[key] = value
            continue
        if key in RESERVED:
            raise BadInput(f"train.{key} is not for recipes ({RESERVED[key]}); remove it")
        if key not in types:
            import difflib

            near = difflib.get_close_matches(key, [*types, "lora", "sequence_parallel"], 1)
            raise BadInput(f"unknown key train.{key}; it takes the names of transformers.TrainingArguments"
                           + (f", for example {near[0]}" if near else ", lora and sequence_parallel"))
        try:
            checked[key] = TypeAdapter(types[key], config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)).validate_python(value)
        except ValidationError as error:
            raise BadInput(f"train.{key}: {error.errors()[0]['msg']} (given: {reprlib.repr(value)})") from None
        # HF declares these "an enumeration or any text", and finds out what the text is worth when training starts.
        names = [name.value for kind in typing.get_args(types[key]) if isinstance(kind, enum.EnumType) for name in kind]
        if names and isinstance(value, str) and value not in names:
            raise BadInput(f"train.{key}: choose one of {', '.join(names)} (given: {reprlib.repr(value)})")
        if isinstance(value, bool) and type(checked[key]) in (int, float):
            raise BadInput(f"train.{key}: a number is wanted (given: {value!r})")
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps", "num_train_epochs", "learning_rate"):
        if key in checked and not checked[key] > 0:
            raise BadInput(f"train.{key}: must be greater than 0 (given: {checked[key]!r})")
    return checked


def speed_options(train: dict) -> dict:
    """What a recipe's ``train`` needs beside its own keys for compiled layers and Liger's kernels (docs/speed.md).  Raises BadInput on options that would change
    the loss or the positions."""
    import transformers

    from endprompt import loss

    liger = train.get("liger_kernel_config") or {}
    if ours := [name for name in ("cross_entropy", "fused_linear_cross_entropy") if liger.get(name)]:
        raise BadInput(f"train.liger_kernel_config: {ours[0]} would put Liger's loss, which knows no weights, in the place of ours; leave it out")
    if train.get("tf32") and tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23):
        raise BadInput(f"train.tf32: transformers {transformers.__version__} makes the angles of positions by a matrix product, which TF32 rounds to 11 bits; "
                       "leave it out (the model computes in bfloat16 anyway), or install 5.23")
    if any(train.get(name) for name in ("torch_compile", "torch_compile_backend", "torch_compile_mode")):
        # Layer by layer: compiled as one, transformers cannot look whether the mask is all ones, and builds the square of it, which no flash kernel takes.
        os.environ.setdefault("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
        loss.leave_uncompiled()
    # Where nothing is said, Liger's loss is on.
    return {"liger_kernel_config": {**liger, "fused_linear_cross_entropy": False, "cross_entropy": False}} if train.get("use_liger_kernel") else {}
