"""Training: the HF Trainer on DeepSpeed, with a weighted loss and the guards that run before the first step."""

import contextlib
import datetime
import json
import math
import os
import subprocess
import sys
import time
import uuid
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import transformers.trainer
from transformers import TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from endprompt import (
    BadInput,
    Failure,
    checkpoint,
    checkpoint_files,
    dealing,
    launch,
    lora,
    loss,
    model,
    precision,
    prepare,
    provenance,
    runfolder,
    s2,
    sequence,
    shards,
    sharpen,
    training_keys,
    watch,
    zero_file,
)
from endprompt.collate import Collator
from endprompt.config import Recipe
from endprompt.methods import Method
from endprompt.trainer import Probe, WeightedTrainer, flops_per_token
from endprompt.training_keys import DEFAULTS

CHECKED = "checked-rows"  # the checksums of shards whose rows were looked at once, and the number of embeddings

CHECKPOINTS_KEPT = 2


def batch_shape(recipe: Recipe, method: Method) -> tuple[int, int]:
    """(per_device_train_batch_size, gradient_accumulation_steps) that keep the recipe's tokens a step when rows are longer or shared.

    The recipe counts rows of ``physical_length`` a device; a method with rows of ``target_length`` takes fewer of them, and N devices
    that share rows (sequence parallelism) take N times as many together.
    Raises BadInput if the recipe's step holds less than one such row for each of those that share it.
    """
    rows, accumulation = recipe.train.get("per_device_train_batch_size", 1), recipe.train.get("gradient_accumulation_steps", 1)
    ratio = Fraction(recipe.row_length(method), recipe.lengths.physical * recipe.sequence_parallel)
    if ratio == 1:
        return rows, accumulation
    total = rows * accumulation / ratio
    if total.denominator != 1:
        raise BadInput(f"train: {rows} x {accumulation} rows of {recipe.lengths.physical} tokens are {float(total):g} rows of {recipe.row_length(method)}, which "
                       f"{method.name} trains on; make per_device_train_batch_size x gradient_accumulation_steps a multiple of {ratio.numerator}")
    wide = math.gcd(int(total), max(1, int(rows / ratio)))
    return wide, int(total) // wide


def resumed_shape(shape: tuple[int, int], world_size: int, before: dict) -> tuple[int, int]:
    """``batch_shape`` on another number of ranks than the checkpoint's: as many rows a step as ``before`` (its marker), so that the steps
    hold the same rows.  Raises BadInput if the ranks do not divide them."""
    wanted = before.get("rows_per_step")
    if wanted is None or before["world_size"] == world_size:
        return shape
    if wanted % world_size:
        raise BadInput(f"train: the run's steps hold {wanted} rows, which {world_size} ranks do not divide; start a number of ranks that does, such as {before['world_size']}")
    wide = math.gcd(wanted // world_size, shape[0])
    return wide, wanted // world_size // wide


def set_up_environment() -> bool:
    """Decides GPU or CPU and tells DeepSpeed, which reads its environment on import; returns whether there is a GPU."""
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
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


def training_arguments(recipe: Recipe, shape: tuple[int, int], run: Path, cuda: bool, universal: bool) -> TrainingArguments:
    """shape: (rows, accumulation) of ``batch_shape``; universal: what is resumed from is a universal checkpoint."""
    rows, accumulation = shape
    given = {key: value for key, value in recipe.train.items() if key not in ("lora", "sequence_parallel", "save_total_limit")}
    if recipe.deepspeed is not None:
        options = zero_file.filled(recipe.deepspeed, accumulation)
        given["deepspeed"] = loading_universal(options) if universal else options
    platform = {"bf16": True, "optim": "adamw_torch_fused"} if cuda else {"bf16": False, "use_cpu": True, "ddp_backend": "gloo", "optim": "adamw_torch"}
    # transformers 5.23 renamed gradient_checkpointing; the old name serves all of 5.x.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
    # The Trainer reads the TensorBoard folder from the environment.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run / "logs")
    try:
        arguments = TrainingArguments(**{
            "seed": recipe.data.seed, **DEFAULTS, **platform, **given, "output_dir": str(run / "checkpoints"), "remove_unused_columns": False,
            "per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation, "logging_nan_inf_filter": False, "do_train": True,
            **training_keys.speed_options(recipe.train),
            **({"parallelism_config": sequence.parallelism(recipe.sequence_parallel, model.attention_implementation(recipe, cuda), int(os.environ["WORLD_SIZE"]))}
               if recipe.sequence_parallel > 1 else {}),
            "label_names": ["shift_labels"], "disable_tqdm": recipe.train.get("disable_tqdm", not sys.stderr.isatty())})
    except (ValueError, TypeError, ImportError, KeyError) as error:
        raise BadInput(f"train: transformers refuses these arguments: {str(error).strip().splitlines()[0]}") from None
    precision.check(arguments)
    return arguments


def load_rows(recipe: Recipe, method: Method, tokenizer, folder: Path, verify: bool, embeddings: int = 2**31):
    """The shards as a memory-mapped dataset.

    Raises BadInput where they are missing, damaged, of another recipe or tokenizer, or hold token ids from ``embeddings`` on.
    """
    manifest = shards.read_manifest(folder)
    if differing := shards.disagreements(manifest, prepare.settings(recipe, method, tokenizer)):
        raise BadInput(f"shards: {folder} do not belong to this recipe and method ({'; '.join(differing)}); prepare them again, or mend the recipe")
    if verify:
        shards.verify(folder, manifest)
        checked, sums = folder / ".cache" / CHECKED, "".join(shard["sha256"] + "\n" for shard in manifest["shards"]) + f"{embeddings}\n"
        if not checked.is_file() or checked.read_text(errors="replace") != sums:
            shards.check_rows(folder, manifest, embeddings)
            checked.parent.mkdir(exist_ok=True)
            shards.write_atomically(checked, sums.encode())
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("parquet", data_files=[str(path) for path in shards.files(folder, manifest)], split="train",
                                 cache_dir=str(folder / ".cache"), keep_in_memory=False)
    return rows.add_column("row_number", np.arange(len(rows))), manifest


def sample(dataset, collator: Collator, ends: int = 64) -> dict[str, torch.Tensor]:
    """The first row's first and last ``ends`` tokens at their positions, as a batch; the same on every rank."""
    row = dict(dataset[0])
    kept = sorted({*range(len(row["input_ids"]))[:ends], *range(len(row["input_ids"]))[-ends:]})
    return collator([{**row, **{name: [row[name][index] for index in kept] for name in ("input_ids", "position_ids", "loss_weights")}}])


def agree(run: Path, newest: Path | None) -> None:
    """Raises BadInput on every rank unless all of them see the same ``run`` folder and would resume from the same checkpoint."""
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return
    main, name = torch.distributed.get_rank() == 0, [f".shared-{uuid.uuid4().hex}"]
    torch.distributed.broadcast_object_list(name)
    token = run / name[0]
    if main:
        token.touch()
    checkpoint.barrier()
    seen: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(seen, (token.exists(), newest and newest.name))
    if main:
        token.unlink()
    if blind := [str(rank) for rank, (there, _) in enumerate(seen) if not there]:
        raise BadInput(f"--out: {run} is not the same folder on all nodes (rank {', '.join(blind)} does not see what rank 0 wrote); put --out on storage that the nodes share")
    if len({name for _, name in seen}) > 1:
        raise BadInput(f"checkpoints: the ranks would resume from different ones ({sorted({str(name) for _, name in seen})}); put --out on storage that the nodes share")


def make_universal(newest: Path) -> None:
    """On the first rank, while the others wait: ``newest`` in the form that any number of ranks can load."""
    if int(os.environ["RANK"]) == 0 and not (newest / "latest_universal").is_file():
        result = subprocess.run([sys.executable, "-m", "endprompt.universal", str(newest)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                env={key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")})
        if result.returncode:
            last = (result.stdout.strip().splitlines() or ["no output"])[-1]
            raise Failure(f"train: {newest} could not be converted for another number of ranks: {last}; start as many ranks as before")
    checkpoint.barrier()


def train(recipe: Recipe, method: Method, run: Path) -> None:
    """Trains ``method`` on the shards in ``run`` and leaves a plain HF model in ``run/model`` and a summary in ``run/train.json``, or, if it
    was asked to stop before the end (see watch.StopRequest), a checkpoint.

    Goes on from the newest whole checkpoint, on any number of ranks that divides its rows a step.  Raises BadInput on unusable input,
    Failure when a guard ends the run, another rank is lost, or a file cannot be written.
    """
    request = watch.StopRequest(run)
    cuda = set_up_environment()
    rank = int(os.environ["RANK"])
    if rank == 0 and (run / runfolder.STATUS).exists():  # what an earlier start said is over
        runfolder.write_status(run, state="starting", reason=None)
    try:
        _train(recipe, method, run, cuda, request)
    except BadInput as error:
        if rank == 0 and (run / runfolder.STATUS).exists():
            with contextlib.suppress(OSError):
                runfolder.write_status(run, state="refused", reason=str(error)[:500])
        raise
    except Exception as error:
        timeout = recipe.train.get("ddp_timeout", 1800)
        # A file that cannot be written ends one rank; what the others see is that it is gone, and theirs is not the reason to keep.
        unwritable = watch.unwritable(error)
        reason = unwritable or watch.lost_rank(error, timeout)
        if unwritable or isinstance(error, Failure):
            launch.note_exit_code(3)
        with contextlib.suppress(OSError):
            if unwritable or isinstance(error, Failure) and rank == 0:
                runfolder.write_status(run, state="failed", reason=unwritable or str(error)[:500])
            elif rank == 0 and runfolder.read_status(run).get("state") != "failed":
                runfolder.write_status(run, state="lost a rank" if reason else "crashed", reason=reason or str(error)[:500])
        if reason is None:
            raise
        newest = checkpoint_files.newest(run / "checkpoints")
        failure = Failure(f"train: rank {rank}: {reason}; the last good checkpoint is {newest or 'none, the base model'}; the same command goes on from it")
        failure.everywhere = True
        raise failure from error


def _train(recipe: Recipe, method: Method, run: Path, cuda: bool, request: watch.StopRequest) -> None:
    main, world_size = int(os.environ["RANK"]) == 0, int(os.environ["WORLD_SIZE"])
    tokenizer = model.load_tokenizer(recipe)
    config, shared = model.load_config(recipe), recipe.sequence_parallel
    dataset, manifest = load_rows(recipe, method, tokenizer, run / "shards", int(os.environ["LOCAL_RANK"]) == 0, config.vocab_size)
    model.check_vocabulary(tokenizer, config, f"model: the tokenizer of {recipe.model.name_or_path!r}")
    sequence.check(recipe, method, config, model.attention_implementation(recipe, cuda), world_size, manifest)
    newest = checkpoint_files.to_resume(run / "checkpoints", sys.stderr if main else None)
    before = checkpoint_files.marker(newest) if newest else {"world_size": world_size}
    resized = before["world_size"] != world_size
    if newest:
        checkpoint_files.refuse_foreign(newest)
    if resized and shared > 1:
        raise BadInput(f"train.sequence_parallel: {newest} is of {before['world_size']} ranks, and a run that shares rows cannot go on with {world_size}; start as many as before")
    shape = resumed_shape(batch_shape(recipe, method), world_size, before)
    universal = resized and bool(recipe.train.get("deepspeed"))
    arguments = training_arguments(recipe, shape, run, cuda, universal)
    if arguments.deepspeed:
        import deepspeed

        if not cuda:
            # DeepSpeed would compile a C++ all-reduce over shared memory first; gloo does it, and the first run starts a minute earlier.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Partitioned loading below asks DeepSpeed for the number of ranks; on CPU accelerate has not told it yet.
        deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False, timeout=datetime.timedelta(seconds=arguments.ddp_timeout))
    agree(run, newest)
    if main:
        checkpoint_files.set_aside(run / "checkpoints", newest)
    if universal:
        make_universal(newest)
    scaling, theta = model.scaling(recipe, method, config), config.rope_parameters["rope_theta"]
    adapters, group = recipe.lora(method), recipe.group_size(method)
    network = model.build(recipe, method, precision.loaded(arguments, bool(adapters)), cuda)
    loss.attach(network, uniform=not method.weighted)
    if adapters:
        lora.inject(network, adapters, arguments.seed)
    if not arguments.deepspeed:
        precision.raise_trained(network)
    own_attention = s2.install(network, group) if group else None
    if shared > 1:
        plain_attention = ALL_ATTENTION_FUNCTIONS[network.config._attn_implementation]  # DeepSpeed puts its own in this place
        transformers.trainer.skip_first_batches = sequence.skip_first_batches
    network.config.endprompt = {"method": method.name, "original_length": model.original_length(recipe, config),
                                "physical_length": recipe.row_length(method), "target_length": recipe.lengths.target,
                                **sharpen.inherited(config),
                                **({"lora": adapters.model_dump()} if adapters else {}), **({"s2_group_size": group} if group else {})}
    model.state_length(network, tokenizer, recipe.lengths.target)
    model.forget_code(network, tokenizer)
    collator = Collator(model.pad_token_id(tokenizer, config.vocab_size), recipe.lengths.target, sharded=shared > 1)
    probe, watching = Probe(dataset, collator, shared), watch.Watch(request, run)
    rows_per_step = shape[0] * shape[1] * world_size
    keep = recipe.train.get("save_total_limit", CHECKPOINTS_KEPT)
    trainer = WeightedTrainer(model=network, args=arguments, train_dataset=dealing.Rows(dataset), data_collator=collator, sequence_parallel=shared,
                              token_flops=flops_per_token(network.config, group or recipe.row_length(method), bool(adapters),
                                                          not network.get_output_embeddings().weight.requires_grad),
                              callbacks=[precision.Masters(whole=not adapters), probe, watching,
                                         checkpoint.MarkComplete(keep, {"world_size": world_size, "rows_per_step": rows_per_step}),
                                         watch.Report(run, rows_per_step * recipe.row_length(method) // shared),
                                         *([sequence.NewEpoch()] if shared > 1 else []), *([checkpoint.SeparateSteps()] if universal else [])])
    network.config.use_cache = config.use_cache  # the Trainer switches it off, for good
    watching.trainer = probe.trainer = trainer
    started = time.perf_counter()
    with checkpoint.weights_only() if newest else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    seconds = time.perf_counter() - started
    if watching.stopped:
        checkpoint.barrier()
        if main:
            request.file.unlink(missing_ok=True)
            runfolder.write_status(run, state="stopped on request", step=trainer.state.global_step)
            print(f"train: stopped on request after step {trainer.state.global_step} of {trainer.state.max_steps} with a checkpoint; the same command goes on", flush=True)
        return
    if shared > 1:
        ALL_ATTENTION_FUNCTIONS[network.config._attn_implementation] = plain_attention
        collator.sharded = False
    if own_attention:
        s2.uninstall(network, own_attention)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    # Nothing is logged after a checkpoint of the last step.
    last = trainer.last_metrics or (history[-1] if history else {})

    def finish(merge_difference: float | None) -> None:
        summary = {"recipe": recipe.name, "method": method.name, "steps": trainer.state.global_step, "resumed_from": newest.name if newest else None,
                   "rows": manifest["rows"], "tokens": manifest["tokens"], "world_size": arguments.world_size, "seconds": round(seconds, 1), "probe": probe.moved,
                   **({"merge_difference": merge_difference} if adapters else {}),
                   **{f"final_{key}": value for key, value in last.items() if key not in ("epoch", "step")}, "history": history, **provenance.stamp()}
        shards.write_json(run / "train.json", summary)
        runfolder.write_status(run, state="finished", step=trainer.state.global_step)
        print(json.dumps({key: value for key, value in summary.items() if key not in ("history", "versions")}), flush=True)

    checkpoint.save_final(trainer, tokenizer, run / "model", scaling, theta, recipe.lengths.target,
                          sample(dataset, collator) if adapters else None,
                          model.sharpness(recipe, method, config), finish)
