"""Training: the HF Trainer on DeepSpeed, with a weighted loss and the guards that run before the first
step.
"""

import contextlib
import datetime
import functools
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import torch
import transformers.trainer
from transformers import TrainerCallback, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from endprompt import BadInput, Failure, storage
from endprompt.bases import model, sharpen
from endprompt.recipe.batch import batch_shape
from endprompt.recipe.experiment import Experiment
from endprompt.rows import shards
from endprompt.rows.collate import Collator
from endprompt.runs import card, checkpoint_files, launch, provenance, runfolder
from endprompt.training import checkpoint, dealing, heads, lora, loss, precision, sequence, watch, windows
from endprompt.training.arguments import resumed_shape, set_up_environment, training_arguments
from endprompt.training.dataset import load_rows, sample
from endprompt.training.resume import Resume, same_base
from endprompt.training.trainer import Probe, WeightedTrainer, flops_per_token

CHECKPOINTS_KEPT = 2


def agree(run: Path, newest: Path | None) -> None:
    """Raises BadInput on every rank unless all of them see the same ``run`` folder and would resume from the
    same checkpoint.
    """
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
        raise BadInput(
            f"--out: {run} is not the same folder on all nodes (rank {', '.join(blind)} does not see what"
            " rank 0 wrote); put --out on storage that the nodes share"
        )
    if len({name for _, name in seen}) > 1:
        raise BadInput(
            "checkpoints: the ranks would resume from different ones"
            f" ({sorted({str(name) for _, name in seen})}); put --out on storage that the nodes share"
        )


def make_universal(newest: Path) -> None:
    """On the first rank, while the others wait: ``newest`` in the form that any number of ranks can load."""
    if int(os.environ["RANK"]) == 0 and not (newest / "latest_universal").is_file():
        result = subprocess.run(
            [sys.executable, "-m", "endprompt.training.universal", str(newest)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                key: value
                for key, value in os.environ.items()
                if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
            },
        )
        if result.returncode:
            last = (result.stdout.strip().splitlines() or ["no output"])[-1]
            raise Failure(
                f"train: {newest} could not be converted for another number of ranks: {last}; start as many"
                " ranks as before"
            )
    checkpoint.barrier()


def train(experiment: Experiment) -> None:
    """Trains on the run's shards and leaves a plain HF model in ``model/`` and a summary in ``train.json``,
    or, if it was asked to stop before the end (see watch.StopRequest), a checkpoint.

    Goes on from the newest whole checkpoint, on any number of ranks that divides its rows a step.  Raises
    BadInput on unusable input, Failure when a guard ends the run, another rank is lost, or a file cannot be
    written.
    """
    run = experiment.run
    request = watch.StopRequest(run)
    cuda = set_up_environment()
    rank = int(os.environ["RANK"])
    if rank == 0 and (run / runfolder.STATUS).exists():  # what an earlier start said is over
        runfolder.write_status(run, state="starting", reason=None)
    try:
        _train(experiment, cuda, request)
    except BadInput as error:
        if rank == 0 and (run / runfolder.STATUS).exists():
            with contextlib.suppress(OSError):
                runfolder.write_status(run, state="refused", reason=str(error)[:500])
        raise
    except Exception as error:
        _explain(error, experiment, rank)


def _explain(error: Exception, experiment: Experiment, rank: int) -> None:
    """Notes in the run's folder how it ended, and raises ``error``, or, where another rank is lost, a file
    cannot be written or the system says no, the one line that says so."""
    run = experiment.run
    # A file that cannot be written ends one rank; what the others see is that it is gone, and theirs is not
    # the reason to keep.
    unwritable = watch.unwritable(error, run)
    lost = watch.lost_rank(error, experiment.recipe.train.get("ddp_timeout", 1800))
    reason = unwritable or lost or watch.by_the_system(error)
    if unwritable or isinstance(error, Failure):
        launch.note_exit_code(3)
    with contextlib.suppress(OSError):
        if unwritable or isinstance(error, Failure) and rank == 0:
            runfolder.write_status(run, state="failed", reason=unwritable or str(error)[:500])
        elif rank == 0 and runfolder.read_status(run).get("state") != "failed":
            state = "lost a rank" if lost else "crashed"
            runfolder.write_status(run, state=state, reason=reason or str(error)[:500])
    if reason is None:
        raise error
    newest = checkpoint_files.newest(run / "checkpoints")
    failure = Failure(
        f"train: rank {rank}: {reason}; the last good checkpoint is {newest or 'none, the base model'};"
        " the same command goes on from it"
    )
    failure.everywhere = True
    raise failure from error


def start_processes(arguments: TrainingArguments, cuda: bool) -> None:
    """DeepSpeed's process group.  Loading that partitions asks it for the number of ranks; on CPU accelerate
    has not told it yet."""
    if not arguments.deepspeed:
        return
    import deepspeed

    if not cuda:
        # DeepSpeed would compile a C++ all-reduce over shared memory first; gloo does it, and the first run
        # starts a minute earlier.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "nccl" if cuda else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=datetime.timedelta(seconds=arguments.ddp_timeout),
    )


def build_network(experiment: Experiment, arguments: TrainingArguments, cuda: bool):
    """The scaled base with the weighted loss, and adapters where the method or the recipe trains them."""
    adapters, method = experiment.adapters, experiment.method
    dtype = precision.loaded(arguments, bool(adapters))
    quantize = bool(adapters and adapters.quantize)
    network = model.build(experiment.base, experiment.scaling, dtype, cuda, quantize)
    loss.attach(network, uniform=method.uniform)
    windows.attach(network)
    sharpened = experiment.recipe.rope.sharpen_heads
    if sharpened:
        heads.attach(network)
    if adapters:
        lora.inject(network, adapters, arguments.seed)
    if sharpened:
        heads.train(network)
    if not arguments.deepspeed:
        precision.raise_trained(network)
    method.before_training(network, experiment, cuda)
    network.config.endprompt = {
        "method": method.name,
        "original_length": experiment.base.original_length,
        "physical_length": experiment.row_length,
        "target_length": experiment.target_length,
        **sharpen.inherited(experiment.base.config),
        **({"lora": adapters.model_dump(exclude_none=True)} if adapters else {}),
        **method.note(experiment.options, experiment.row_length),
    }
    model.state_length(network, experiment.base.tokenizer, experiment.target_length)
    model.forget_code(network, experiment.base.tokenizer)
    return network


@contextlib.contextmanager
def shared_rows(network, collator: Collator, ranks: int):
    """Inside, ``ranks`` ranks share a row: DeepSpeed puts its own attention in the place of the network's."""
    if ranks == 1:
        yield
        return
    name = network.config._attn_implementation
    before = ALL_ATTENTION_FUNCTIONS[name]
    transformers.trainer.skip_first_batches = sequence.skip_first_batches
    yield
    ALL_ATTENTION_FUNCTIONS[name] = before
    collator.sharded = False


def wrap(
    experiment: Experiment,
    arguments: TrainingArguments,
    network,
    dataset,
    collator: Collator,
    callbacks: list[TrainerCallback],
) -> WeightedTrainer:
    """The HF Trainer around ``network``, with the method's loss term and the guards as ``callbacks``."""
    adapters = bool(experiment.adapters)
    head_frozen = not network.get_output_embeddings().weight.requires_grad
    trainer = WeightedTrainer(
        model=network,
        args=arguments,
        train_dataset=dealing.Rows(dataset),
        data_collator=collator,
        sequence_parallel=experiment.recipe.sequence_parallel,
        token_flops=experiment.method.work(experiment.options)
        * flops_per_token(network.config, experiment.attended, adapters, head_frozen),
        loss_term=functools.partial(experiment.method.loss_term, options=experiment.options),
        reads_hidden=experiment.method.reads_hidden,
        callbacks=[precision.Masters(whole=not adapters), *callbacks],
    )
    # The Trainer switches it off, for good.
    network.config.use_cache = experiment.base.config.use_cache
    return trainer


def fit(trainer: WeightedTrainer, newest: Path | None) -> float:
    """Trains, from the checkpoint ``newest`` on; returns the seconds it took."""
    started = time.perf_counter()
    with checkpoint.weights_only() if newest else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    return time.perf_counter() - started


def say_stopped(run: Path, trainer: WeightedTrainer, request: watch.StopRequest) -> None:
    """On all ranks, of a run that was asked to stop."""
    checkpoint.barrier()
    if int(os.environ["RANK"]) == 0:
        step, steps = trainer.state.global_step, trainer.state.max_steps
        request.file.unlink(missing_ok=True)
        runfolder.write_status(run, state="stopped on request", step=step)
        print(
            f"train: stopped on request after step {step} of {steps} with a checkpoint; the same command goes"
            " on",
            flush=True,
        )


def summary(experiment: Experiment, trainer: WeightedTrainer, manifest: dict, **more) -> dict:
    """What train.json says."""
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    # Nothing is logged after a checkpoint of the last step.
    last = trainer.last_metrics or (history[-1] if history else {})
    return {
        "recipe": experiment.recipe.name,
        "method": experiment.method.name,
        "steps": trainer.state.global_step,
        "rows": manifest["rows"],
        "tokens": manifest["tokens"],
        "world_size": trainer.args.world_size,
        **more,
        **{f"final_{key}": value for key, value in last.items() if key not in ("epoch", "step")},
        "history": history,
        **provenance.stamp(),
    }


def refuse_base(experiment: Experiment) -> None:
    """Raises BadInput if the base is not one that the recipe can train."""
    base = experiment.base
    base.check_vocabulary()
    if experiment.recipe.rope.sharpen_heads:
        heads.check(base.config)
    lora.check(experiment)


def _train(experiment: Experiment, cuda: bool, request: watch.StopRequest) -> None:
    recipe, run, method = experiment.recipe, experiment.run, experiment.method
    main, world_size = int(os.environ["RANK"]) == 0, int(os.environ["WORLD_SIZE"])
    shared = recipe.sequence_parallel

    dataset, manifest = load_rows(experiment, verify=int(os.environ["LOCAL_RANK"]) == 0)
    refuse_base(experiment)
    sequence.check(experiment, experiment.base.attention_implementation(cuda), world_size, manifest)

    made = shards.digest(manifest)
    resume = Resume.of(experiment, world_size, main, made)
    shape = resumed_shape(batch_shape(experiment), world_size, resume.before)
    universal = resume.resized and bool(recipe.train.get("deepspeed"))
    arguments = training_arguments(recipe, shape, run, cuda, universal)
    start_processes(arguments, cuda)
    agree(run, resume.newest)
    if main:
        checkpoint_files.set_aside(run / "checkpoints", resume.newest)
    if universal and resume.newest:
        make_universal(resume.newest)

    base = same_base(experiment, resume)
    network = build_network(experiment, arguments, cuda)
    pad = model.pad_token_id(experiment.base.tokenizer, experiment.base.config.vocab_size)
    collator = Collator(pad, experiment.target_length, sharded=shared > 1)
    rows_per_step = shape[0] * shape[1] * world_size
    marked = {"world_size": world_size, "rows_per_step": rows_per_step, "shards": made, **base}
    probe, watching = Probe(dataset, collator, shared), watch.Watch(request, run)
    callbacks = [
        probe,
        watching,
        checkpoint.MarkComplete(recipe.train.get("save_total_limit", CHECKPOINTS_KEPT), marked),
        watch.Report(run, rows_per_step * experiment.row_length // shared),
        *([sequence.NewEpoch()] if shared > 1 else []),
        *([checkpoint.SeparateSteps()] if universal else []),
    ]
    with (
        method.attention(network, experiment.options, experiment.row_length),
        shared_rows(network, collator, shared),
    ):
        trainer = wrap(experiment, arguments, network, dataset, collator, callbacks)
        watching.trainer = probe.trainer = trainer
        seconds = fit(trainer, resume.newest)
    if watching.stopped:
        say_stopped(run, trainer, request)
        return

    def finish(folder: Path, merge_difference: float | None) -> None:
        merged = {"merge_difference": merge_difference} if experiment.adapters else {}
        told = {"resumed_from": resume.name, "seconds": round(seconds, 1), "probe": probe.moved, **merged}
        told |= {"shards": made, "base": experiment.base.fingerprint}
        said = summary(experiment, trainer, manifest, **told)
        card.write(experiment, folder, said)
        storage.write_json(run / "train.json", said)
        runfolder.write_status(run, state="finished", step=trainer.state.global_step)
        shown = {key: value for key, value in said.items() if key not in ("history", "versions")}
        print(json.dumps(shown), flush=True)

    adapted = sample(dataset, collator) if experiment.adapters else None
    checkpoint.save_final(trainer, experiment, adapted, finish)
