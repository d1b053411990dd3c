"""What a run hands to the HF Trainer: its shape of batches, its environment, and its arguments."""

import math
import os
import sys
import warnings
from pathlib import Path

import torch
from transformers import TrainingArguments

from endprompt import BadInput
from endprompt.bases import model
from endprompt.recipe import training_checks, training_keys, zero_file
from endprompt.recipe.schema import Recipe
from endprompt.recipe.training_keys import DEFAULTS
from endprompt.training import loss, precision, sequence


def resumed_shape(shape: tuple[int, int], world_size: int, before: dict) -> tuple[int, int]:
    """``batch_shape`` on another number of ranks than the checkpoint's: as many rows a step as ``before``
    (its marker), so that the steps hold the same rows.  Raises BadInput if the ranks do not divide them.
    """
    wanted = before.get("rows_per_step")
    if wanted is None or before["world_size"] == world_size:
        return shape
    if wanted % world_size:
        raise BadInput(
            f"train: the run's steps hold {wanted} rows, which {world_size} ranks do not divide; start a"
            f" number of ranks that does, such as {before['world_size']}"
        )
    wide = math.gcd(wanted // world_size, shape[0])
    return wide, wanted // world_size // wide


def set_up_environment() -> bool:
    """Decides GPU or CPU and tells DeepSpeed, which reads its environment on import; returns whether there is
    a GPU.
    """
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        import socket

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # DeepSpeed calls collectives by names that newer torch renamed; at every step and layer, that is a flood.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    return cuda


def loading_universal(options: dict) -> dict:
    """DeepSpeed's ``options``, and that a universal checkpoint is what is loaded."""
    return {**options, "checkpoint": {**options.get("checkpoint", {}), "load_universal": True}}


def speed_options(train: dict) -> dict:
    """Those of ``training_checks.speed_options``; the loss is kept out of what they compile."""
    options = training_checks.speed_options(train)
    if training_checks.compiles(train):
        loss.leave_uncompiled()
    return options


def training_arguments(
    recipe: Recipe, shape: tuple[int, int], run: Path, cuda: bool, universal: bool
) -> TrainingArguments:
    """shape: (rows, accumulation) of ``batch_shape``; universal: what is resumed from is a universal
    checkpoint.
    """
    rows, accumulation = shape
    given = {
        key: value
        for key, value in recipe.train.items()
        if key not in (*training_keys.OURS, "save_total_limit")
    }
    if recipe.deepspeed is not None:
        options = zero_file.filled(recipe.deepspeed, accumulation)
        given["deepspeed"] = loading_universal(options) if universal else options
    platform = (
        {"bf16": True, "optim": "adamw_torch_fused"}
        if cuda
        else {"bf16": False, "use_cpu": True, "ddp_backend": "gloo", "optim": "adamw_torch"}
    )
    # transformers 5.23 renamed gradient_checkpointing; the old name serves all of 5.x.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
    # The Trainer reads the TensorBoard folder from the environment.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run / "logs")
    try:
        arguments = TrainingArguments(
            **{
                "seed": recipe.data.seed,
                **DEFAULTS,
                **platform,
                **given,
                "output_dir": str(run / "checkpoints"),
                "remove_unused_columns": False,
                "per_device_train_batch_size": rows,
                "gradient_accumulation_steps": accumulation,
                "logging_nan_inf_filter": False,
                "do_train": True,
                **speed_options(recipe.train),
                **(
                    {
                        "parallelism_config": sequence.parallelism(
                            recipe.sequence_parallel,
                            model.attention_implementation(recipe, cuda),
                            int(os.environ["WORLD_SIZE"]),
                        )
                    }
                    if recipe.sequence_parallel > 1
                    else {}
                ),
                "label_names": ["shift_labels"],
                "disable_tqdm": recipe.train.get("disable_tqdm", not sys.stderr.isatty()),
            }
        )
    except (ValueError, TypeError, ImportError, KeyError) as error:
        raise BadInput(
            f"train: transformers refuses these arguments: {str(error).strip().splitlines()[0]}"
        ) from None
    precision.check(arguments)
    return arguments
