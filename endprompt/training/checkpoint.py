"""Checkpoints that are known to be whole, and the final model that plain transformers reads."""

import contextlib
import copy
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import TrainerCallback

from endprompt import Failure, storage
from endprompt.bases import loading, model, older_readers, quantized
from endprompt.positions import rope
from endprompt.recipe.experiment import Experiment
from endprompt.runs import averaging, checkpoint_files
from endprompt.runs.checkpoint_files import MARKER
from endprompt.training import heads, lora, precision


def barrier() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def flush(folder: Path) -> None:
    """Asks the disk to have every file below ``folder``: a marker must not outlive what it vouches for when a
    node loses power.
    """
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def load_renamed(network, folder: Path) -> None:
    """Loads the trained weights that the checkpoint ``folder`` holds under other names than ``network`` has,
    as transformers writes each expert apart and reads all into one tensor; the Trainer looks for a network's
    own names alone, and leaves the others as the base has them.

    Raises Failure if a trained weight is not in the checkpoint.
    """
    from safetensors import safe_open

    held: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            held |= set(file.keys())
    lacking = {
        name: weight
        for name, weight in network.named_parameters()
        if weight.requires_grad and name not in held
    }
    if not lacking:
        return
    config = copy.deepcopy(network.config)
    read = {"config": config, "dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    try:
        with loading.whole_loading():
            whole, told = type(network).from_pretrained(folder, **read)
        found = dict(whole.named_parameters())
        absent = [name for name in lacking if name not in found or name in told["missing_keys"]]
    except (RuntimeError, OSError, ValueError):  # experts that are not all there
        absent = list(lacking)
    if absent:
        raise Failure(
            f"checkpoints: {folder} does not hold all that is trained ({absent[0]} is not whole); start with"
            " another --out"
        )
    with torch.no_grad():
        for name, weight in lacking.items():
            weight.copy_(found[name])


class MarkComplete(TrainerCallback):
    """Writes a marker with the size of every file into a checkpoint once all ranks have written their parts
    (what has none was cut short), then removes the oldest beyond ``keep``: the Trainer's own rotation would
    do so before the marker is there.
    """

    def __init__(self, keep: int | None, about: dict):
        self.keep, self.about = keep, about

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        barrier()
        if state.is_local_process_zero:
            flush(folder)
        barrier()
        if state.is_world_process_zero:
            (folder / "training_args.bin").unlink(
                missing_ok=True
            )  # a pickle that nothing reads; recipe.yaml says the same
            storage.write_json(
                folder / MARKER,
                {"global_step": state.global_step, **self.about, "files": checkpoint_files.inventory(folder)},
            )
            checkpoint_files.keep_newest(folder.parent, self.keep)


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Inside, torch.load runs no code of a file: it builds tensors, plain containers, and the two classes
    that DeepSpeed's ZeRO files hold.

    DeepSpeed asks torch for the opposite (``weights_only=False``); torch's own environment variable has the
    last word.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum]):
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def save_final(
    trainer,
    experiment: Experiment,
    adapted: dict[str, torch.Tensor] | None,
    finish: Callable[[Path, float | None], None],
) -> None:
    """Gathers the weights of all ranks into the run's ``model/`` (safetensors, config, tokenizer), checks it,
    averages it with the base if that is asked for, lets the method change it, and only then gives it its
    name.

    adapted: for a model with LoRA adapters, a batch of the collator, the same on all ranks; the adapters are
    merged, and the saved model must give the adapter model's logits on that batch.  finish: called on the
    first rank with the folder and how far they differ (see lora.verify_merged; None without adapters) before
    the folder gets its name, which says that nothing is left to do.
    """
    folder = experiment.run / "model"
    difference = None
    if adapted is not None:
        expected = lora.logits(trainer.model, adapted, trainer.args.device)
    traces = _made_plain(trainer, experiment)
    partial = folder.with_name(folder.name + ".part")
    if trainer.args.should_save and partial.exists():
        shutil.rmtree(partial)
    barrier()
    trainer.save_model(str(partial))
    barrier()
    if trainer.args.should_save:
        experiment.base.tokenizer.save_pretrained(partial)
        older_readers.complete(partial, experiment.base.tokenizer)
        # A pickle; recipe.yaml beside the folder says the same.
        (partial / "training_args.bin").unlink(missing_ok=True)
        theta = rope.parameters(experiment.base.config)["rope_theta"]
        dims = rope.rotary_dimensions(experiment.base.config)
        verify_saved(partial, experiment.scaling, theta, experiment.target_length, dims)
        if adapted is not None:
            difference = lora.verify_merged(partial, adapted, expected, traces, trainer.args.device)
        averaging.average(partial, experiment, trainer.args.device.type == "cuda")
        experiment.method.after_training(partial, experiment)
        verify_saved(partial, experiment.scaling, theta, experiment.target_length, dims)
        flush(partial)
        finish(partial, difference)
        os.replace(partial, folder)
    barrier()


def _made_plain(trainer, experiment: Experiment) -> dict[str, lora.Trace]:
    """Makes the network the model that is saved, in place: whole weights, with the factors of heads and the
    adapters in them.  All ranks call it.

    Adapters on a base in 4 bits are merged into the values that these stand for, with which they were
    trained, and not into the base's own, with which they never were.  Returns what ``lora.merge`` does.
    """
    network = trainer.model
    if quantized.is_quantized(network):
        if not trainer.args.should_save:  # every rank holds all, and the host need not hold it for each
            return {}
        quantized.restore(network)
    if experiment.recipe.rope.sharpen_heads:
        network.config.endprompt["sharpened_heads"] = heads.fold(network)
    traces = lora.merge(network) if experiment.adapters else {}
    if not trainer.is_deepspeed_enabled:
        precision.lower(network, precision.saved(trainer.args))
    return traces


def verify_saved(
    folder: Path, scaling: rope.Scaling, rope_theta: float, target_length: int, dims: int
) -> None:
    """Raises Failure unless ``folder`` holds every parameter in its full shape and a config that builds the
    expected inv_freq, for transformers 5 and by the keys of older readers, and states ``target_length``
    wherever it states the window.  dims: dimensions of a head that RoPE turns."""
    from safetensors import safe_open
    from transformers import AutoConfig
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        # Not from_config: under a live ZeRO-3 that partitions over all ranks, and only one of them is here.
        network = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    if (found := rope.rotary_dimensions(config)) != dims:
        raise Failure(f"saved model: {folder} turns {found} dimensions of a head, and {dims} were trained")
    rope.verify(type(network.get_decoder().rotary_emb)(config), config, scaling, rope_theta)
    trained = scaling.inv_freq(rope_theta, dims)
    older_readers.verify_rope(folder, trained, scaling.attention_factor)
    # A scaling without a window of its own leaves the base's.
    own = scaling.window(target_length) or config.max_position_embeddings
    window = {"config.json: max_position_embeddings": own}
    stated = model.stated_lengths(folder)
    other = {key: value for key, value in stated.items() if value != window.get(key, target_length)}
    if other:
        raise Failure(f"saved model: {folder} states other lengths than {target_length} tokens: {other}")
    saved: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = file.keys()
            saved |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    tied = set(network.all_tied_weights_keys) if config.tie_word_embeddings else set()
    # Experts that are one tensor in memory are single ones in the files.
    expected = revert_weight_conversion(network, dict(network.named_parameters()))
    wrong = [
        name
        for name, parameter in expected.items()
        if saved.get(name, None) != tuple(parameter.shape) and name not in tied
    ]
    if wrong:
        raise Failure(
            f"saved model: {folder} lacks {len(wrong)} parameters or has them in another shape, first"
            f" {wrong[:3]}"
        )


class SeparateSteps(TrainerCallback):
    """Gives every group of parameters a step count of its own after a universal checkpoint was loaded.

    DeepSpeed 0.19 (zero/stage3.py, load_hp_checkpoint_state_from_checkpoint_dir_stage3) hands one tensor to
    all of them, which torch's Adam then increments once a group: with two groups, bias correction runs at
    twice the pace and the run drifts from the undisturbed one.
    """

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        inner = optimizer
        while hasattr(inner, "optimizer"):  # accelerate's and DeepSpeed's wrappers
            inner = inner.optimizer
        for values in inner.state.values():
            if isinstance(values.get("step"), torch.Tensor):
                values["step"] = values["step"].clone()
