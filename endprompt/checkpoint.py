"""Checkpoints that are known to be whole, and the final model that plain transformers reads."""

import os
import re
import shutil
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from endprompt import lora, rope, shards

MARKER = "complete.json"


def barrier() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


class MarkComplete(TrainerCallback):
    """Writes a marker into a checkpoint once every rank has written its part: what has none was cut short."""

    def on_save(self, args, state, control, **kwargs):
        barrier()
        if state.is_world_process_zero:
            shards.write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / MARKER, {"global_step": state.global_step, "world_size": args.world_size})


def newest_complete(folder: Path, log=sys.stderr) -> Path | None:
    """The whole checkpoint of the highest step; names on ``log`` the ones that are passed over as half-written."""
    steps = {int(match[1]): path for path in folder.glob("checkpoint-*") if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    for step in sorted(steps, reverse=True):
        if (steps[step] / MARKER).is_file():
            return steps[step]
        if log:
            print(f"resume: {steps[step]} is half-written and passed over", file=log)
    return None


def save_final(trainer, tokenizer, folder: Path, scaling: rope.Scaling, rope_theta: float, adapted: dict[str, torch.Tensor] | None = None) -> float | None:
    """Gathers the weights of all ranks into ``folder`` (safetensors, config, tokenizer), checks it, and only then gives it its name.

    adapted: for a model with LoRA adapters, a batch of the collator, the same on all ranks; the adapters are merged, and the saved
    model must give the adapter model's logits on that batch.  Returns how far they differ (see lora.verify_merged) on rank 0, else None.
    """
    difference = None
    if adapted is not None:
        expected = lora.logits(trainer.model, adapted, trainer.args.device)
        traces = lora.merge(trainer.model)
    partial = folder.with_name(folder.name + ".part")
    if trainer.args.should_save and partial.exists():
        shutil.rmtree(partial)
    barrier()
    trainer.save_model(str(partial))
    barrier()
    if trainer.args.should_save:
        tokenizer.save_pretrained(partial)
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml beside the folder says the same
        verify_saved(partial, scaling, rope_theta)
        if adapted is not None:
            difference = lora.verify_merged(partial, adapted, expected, traces, trainer.args.device)
        os.replace(partial, folder)
    barrier()
    return difference


def verify_saved(folder: Path, scaling: rope.Scaling, rope_theta: float) -> None:
    """Raises RuntimeError unless ``folder`` holds every parameter in its full shape and a config that builds the expected inv_freq."""
    from safetensors import safe_open
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        # Not from_config: under a live ZeRO-3 that partitions over all ranks, and only one of them is here.
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    rope.verify(type(model.get_decoder().rotary_emb)(config), config, scaling, rope_theta)
    saved = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = file.keys()
            saved |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    wrong = [name for name, parameter in model.named_parameters() if saved.get(name, None) != tuple(parameter.shape) and name not in tied]
    if wrong:
        raise RuntimeError(f"saved model: {folder} lacks {len(wrong)} parameters or has them in another shape, first {wrong[:3]}")
