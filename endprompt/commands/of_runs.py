"""The commands of a recipe and a method: prepare, train, evaluate, plan, inspect."""

import contextlib
import os
import sys

from endprompt import BadInput, Failure, storage
from endprompt.commands.claiming import check_out, claim
from endprompt.commands.saying import say_or_wait

MOST_WORKERS = 1024


def _part(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if (
        not slash
        or not (number.isascii() and number.isdigit() and count.isascii() and count.isdigit())
        or not 1 <= int(number) <= int(count) <= 99999
    ):
        raise BadInput(f"--part {text}: write it as I/N with 1 <= I <= N, for example 3/8")
    return int(number), int(count)


def prepare(arguments, experiment) -> None:
    from endprompt.bases import model
    from endprompt.recipe.batch import batch_shape
    from endprompt.rows import prepare
    from endprompt.runs import provenance, runfolder

    name, run, base = experiment.method.name, experiment.run, experiment.base
    if not experiment.method.trained:
        print(f"{name} trains nothing, so it needs no shards")
        return
    if arguments.workers is not None and not 1 <= arguments.workers <= MOST_WORKERS:
        raise BadInput(
            f"--workers {arguments.workers}: at least one process is needed, and at most {MOST_WORKERS} are"
            " started; one a core is enough"
        )
    part = _part(arguments.part) if arguments.part is not None else None
    batch_shape(experiment)  # rows of which no step can be made would be made in vain
    config = base.config
    base.check_vocabulary()
    recipe = experiment.recipe
    if not recipe.model.gguf_file:
        weights, source = f"model.name_or_path: the weights of {base.name!r}", str(base.folder)
        model.refuse_untied(weights, source, config, recipe.model.revision)
    workers = arguments.workers or min(16, os.cpu_count() or 1)
    versions = provenance.versions(("endprompt", "tokenizers", "fastokens", "pyarrow", "numpy"))
    with runfolder.hold(run / runfolder.prepare_lock(part)), claim(experiment):
        manifest = prepare.prepare(experiment, run / "shards", workers, versions, part)
    if part:
        rows = sum(shard["rows"] for shard in manifest["shards"])
        print(
            f"{run / 'shards'}: part {part[0]} of {part[1]}: {rows} rows; prepare without --part joins the"
            " parts"
        )
        return
    for found in manifest.get("filtered", []):
        print(
            f"{run / 'shards'}: kept {found['kept']} of {found['documents']} documents,"
            f" {found['kept_tokens']} of {found['tokens']} tokens ({found['scores']})"
        )
    print(
        f"{run / 'shards'}: {manifest['rows']} rows, {manifest['tokens']} tokens"
        f" ({manifest['prompt_tokens']} of end prompts) in {len(manifest['shards'])} shards"
    )


def train(arguments, experiment) -> None:
    run = experiment.run
    if not experiment.method.trained:
        print(f"{experiment.method.name} trains nothing")
        return
    from endprompt.runs import runfolder

    main_rank = os.environ.get("RANK", "0") == "0"
    with contextlib.ExitStack() as held:
        if main_rank:
            held.enter_context(runfolder.hold(run / runfolder.TRAIN_LOCK))
            held.enter_context(claim(experiment))
        if (run / "model").exists():
            if main_rank:
                _refuse_other_shards(run)
            print(f"{run / 'model'} is there already; nothing to train")
            return
        from endprompt.training.run import train

        try:
            train(experiment)
        except Failure as error:
            say_or_wait(error, main_rank or error.everywhere)
            held.close()
            _leave(1)
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    _leave(0)


def _refuse_other_shards(run) -> None:
    """Raises BadInput if the model in ``run`` was trained on other shards than are there; without shards, or
    where what they were was not noted, nothing is known."""
    from endprompt.evaluation import results
    from endprompt.rows import shards
    from endprompt.runs import checkpoint_files

    if (run / "shards" / shards.MANIFEST).is_file():
        before = (results.training(run) or {}).get("shards")
        now = shards.digest(shards.read_manifest(run / "shards"))
        checkpoint_files.refuse_other_shards(run / "model", before, now)


def _leave(code: int) -> None:
    """Ends the process at once.  Communication threads of gloo and DeepSpeed that are still running when the
    interpreter tears down its statics abort it ("terminate called without an active exception") after
    everything was saved.  All files are closed by now.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def evaluate(arguments, experiment) -> None:
    from endprompt.commands.scoring import narrowed
    from endprompt.evaluation import run as scoring

    among = narrowed(arguments, experiment.recipe)
    if arguments.list:
        found = scoring.pairs(experiment.recipe, among)
        print("\n".join(f"{task}:{length or '-'}" for task, length in found))
        return
    if arguments.budget is not None and not arguments.budget > 0:
        raise BadInput(f"--budget {arguments.budget:g}: name a positive number of seconds, or leave it out")
    scoring.evaluate(experiment, arguments.model, arguments.only, arguments.budget, among)


def plan(arguments, experiment) -> None:
    from endprompt.planning import estimate

    machine = estimate.Machine(arguments.gpus, arguments.gpu_memory, arguments.gpu, arguments.mfu)
    print(estimate.describe(experiment, machine))


def inspect(arguments, experiment) -> None:
    from endprompt.rows import inspection

    run = experiment.run
    if arguments.coverage:
        print(inspection.describe_coverage(experiment, arguments.row))
        image = inspection.draw_coverage(experiment)
        run.mkdir(parents=True, exist_ok=True)
        storage.write_atomically(run / "coverage.png", image)
        print(f"\nall methods that train: {run / 'coverage.png'}")
        return
    folder, manifest = run / "shards", inspection.checked(experiment)
    print(
        f"{folder}: {len(manifest['shards'])} shards, {manifest['rows']} rows, {manifest['tokens']} tokens;"
        " all checksums hold"
    )
    print(inspection.describe(folder, manifest, experiment.base.tokenizer, arguments.row))


OF_EXPERIMENTS = {
    "prepare": prepare,
    "train": train,
    "evaluate": evaluate,
    "inspect": inspect,
    "plan": plan,
}


def run(arguments) -> None:
    """One command of a recipe and a method."""
    experiment = _experiment(arguments)
    if arguments.dry_run:
        if arguments.command in ("prepare", "train") and experiment.method.trained:
            from endprompt.recipe.batch import batch_shape

            batch_shape(experiment)
        print(experiment.dump(), end="")
        return
    reads = arguments.command == "plan" or arguments.command == "inspect" and not arguments.coverage
    check_out(arguments.out, experiment.run, writes=not reads)
    OF_EXPERIMENTS[arguments.command](arguments, experiment)


def _experiment(arguments):
    """What the command is asked to work on."""
    from endprompt.recipe.experiment import resolve

    overrides = arguments.overrides
    if arguments.command == "evaluate":
        from endprompt.commands import scoring

        if arguments.recipe is None:
            return scoring.without_recipe(arguments)
        if arguments.method is None:
            raise BadInput(
                "METHOD is missing beside RECIPE; name a row of the method table, or leave both out and name"
                " a model with --model"
            )
        return scoring.with_recipe(arguments)
    if arguments.command == "prepare" and arguments.filter is not None:
        overrides = [*overrides, f"data.filter_share={arguments.filter}"]
    return resolve(arguments.recipe, overrides, arguments.method, arguments.out)
