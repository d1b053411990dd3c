"""The command line: ``endprompt prepare|train|evaluate|inspect|plan RECIPE METHOD``, ``endprompt status
RUN``, ``endprompt export RUN --to FOLDER``, and what scripts ask: ``endprompt path RECIPE [METHOD]`` and
``endprompt gpus``.

Exit codes: 0 done (for ``train`` also: stopped on request, with a checkpoint), 2 bad input (one line says
what, where and how to mend it), 1 failure while running.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path

from endprompt import BadInput, Failure, __version__, storage
from endprompt.runs import launch

MOST_WORKERS = 1024


COMMANDS = {
    "prepare": "tokenize the corpus and write shards of rows with explicit positions",
    "train": "train on the shards (start it with torchrun or deepspeed for several ranks)",
    "evaluate": "score the method's model, or any other with --model",
    "plan": "say what training will take: memory a GPU under each ZeRO file, FLOPs, hours",
    "inspect": (
        "print a row of the shards with its positions, and verify their checksums; or see which distances"
        " are supervised"
    ),
}


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="endprompt",
        description="Extend the context window of LLaMA-family models by training on short rows.",
        epilog="exit codes: 0 done, 2 bad input, 1 failure while running",
    )
    root.add_argument("--version", action="version", version=f"endprompt {__version__}")
    # The deepspeed launcher puts it first.
    root.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {}
    for name, text in COMMANDS.items():
        made[name] = command = commands.add_parser(
            name,
            help=text,
            description=_sentence(text),
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        _experiment_options(command)
    _prepare_options(made["prepare"])
    _plan_options(made["plan"])
    _evaluate_options(made["evaluate"])
    _inspect_options(made["inspect"])
    _other_commands(commands)
    return root


def _experiment_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE", help="a recipe file, for example recipes/tiny.yaml")
    command.add_argument("method", metavar="METHOD", help="a row of the method table, for example endprompt")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a key by its dotted name; may be repeated",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="results go to DIR/<recipe>/<method>",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="check the recipe, print it resolved, and stop"
    )


def _prepare_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--part",
        default=None,
        metavar="I/N",
        help=(
            "make only the I-th of N parts of the shards; they may be made at the same time, and "
            "prepare without --part then joins them"
        ),
    )
    command.add_argument(
        "--workers",
        type=int,
        default=None,
        metavar="N",
        help="tokenizer processes; default: one a core, at most 16",
    )


def _plan_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs that train together")
    command.add_argument("--gpu-memory", type=float, default=80.0, metavar="GB", help="memory of one")
    command.add_argument("--gpu", default="A800", metavar="NAME", help="its name, for its peak FLOP/s")
    command.add_argument(
        "--mfu", type=float, default=0.4, metavar="SHARE", help="share of that peak that is reached"
    )


def _evaluate_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        default=None,
        metavar="DIR",
        help="score this Hugging Face model instead of the run's own",
    )
    command.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TASK:LENGTH",
        help="score this pair of the recipe's alone; may be repeated",
    )
    command.add_argument(
        "--budget",
        type=float,
        default=None,
        metavar="SECONDS",
        help=(
            "begin no other pair when these are over, or less is left than the longest "
            "took; the same command goes on"
        ),
    )
    command.add_argument(
        "--list",
        action="store_true",
        help="print the recipe's pairs TASK:LENGTH, one a line, and stop",
    )


def _inspect_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--row", type=int, default=0, metavar="N", help="row to print")
    command.add_argument(
        "--coverage",
        action="store_true",
        help=(
            "print instead which query-key distances are supervised and how often, of the shards or,"
            " without any, of sampled rows, and draw all methods that train into coverage.png in the"
            " run's folder"
        ),
    )


def _other_commands(commands) -> None:
    status = commands.add_parser(
        "status",
        help="print how far a run has come",
        description="Print a run's state, step, losses, speed, last checkpoint and time left.",
    )
    status.add_argument(
        "run", type=Path, metavar="RUN", help="a run's folder, for example runs/tiny/endprompt"
    )
    status.add_argument("--json", action="store_true", help="as JSON")
    path = commands.add_parser(
        "path",
        help="print where a run's folder is",
        description="Print the folder of a recipe's runs, or of a method's run, whether it is there or not.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    path.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the recipe.yaml of a run")
    path.add_argument("method", metavar="METHOD", nargs="?", help="a row of the method table")
    path.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="as of the other commands; no key moves the folder",
    )
    path.add_argument(
        "--out", type=Path, default=Path("runs"), metavar="DIR", help="as of the other commands"
    )
    _export_options(commands)
    text = "print how many GPUs this process may use (CUDA_VISIBLE_DEVICES, Slurm)"
    commands.add_parser("gpus", help=text, description=text[0].upper() + text[1:] + ".")


def _export_options(commands) -> None:
    export = commands.add_parser(
        "export",
        help="copy a run's model for serving",
        description="Copy the model of a run that is trained, in the form that a server wants.",
    )
    export.add_argument(
        "run", type=Path, metavar="RUN", help="a run's folder, for example runs/tiny/endprompt"
    )
    export.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder")
    export.add_argument(
        "--position-dependent",
        action="store_true",
        help=(
            "sharpen attention by position, as Ministral 3 does, in place of the constant in the queries: "
            "inside the window the model is then the unsharpened one"
        ),
    )
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default=None,
        help="of the weights; default: as they are",
    )
    export.add_argument(
        "--gguf", action="store_true", help="write model.gguf too, by llama.cpp's converter (see LLAMA_CPP)"
    )


# How often to report or save does not change what is trained.
HARMLESS = {
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
    "disable_tqdm",
    "dataloader_num_workers",
}
SECTIONS = ("model", "lengths", "data", "method_options", "rope", "train")


def _flat(tree: dict, method) -> dict:
    """What a resolved recipe says of training, by dotted keys; a key that came after it had its default."""
    from endprompt.recipe import experiment, former_keys, schema

    former = former_keys.taken(tree)
    options = experiment.options(method, tree.get("method_options") or {}, former).model_dump(mode="json")
    tree = {**tree, "method_options": options}
    found = schema.defaults() | {
        f"{section}.{key}": value
        for section in SECTIONS
        for key, value in (tree.get(section) or {}).items()
        if key not in HARMLESS
    }
    if isinstance(found.get("train.deepspeed"), str):  # the same file has another path in another clone
        found["train.deepspeed"] = Path(found["train.deepspeed"]).name
    return found


def _refuse_other_setting(path: Path, before: bytes, text: str, method) -> None:
    """Raises BadInput if the run whose recipe was ``before`` was trained under another setting than
    ``text``.
    """
    import yaml

    from endprompt.recipe import settings_file

    old, new = settings_file.parse(before.decode(errors="replace"), str(path)), yaml.safe_load(text)
    if not isinstance(old, dict) or not all(isinstance(old.get(key) or {}, dict) for key in SECTIONS):
        raise BadInput(f"{path} is no recipe; restore it, or delete the folder")
    flat = [_flat(old, method), _flat(new, method)]
    keys = flat[0].keys() | flat[1].keys()
    if differing := sorted(key for key in keys if flat[0].get(key) != flat[1].get(key)):
        raise BadInput(
            f"{path.parent} was trained under another setting ({', '.join(differing)}); choose another --out,"
            " or delete the folder"
        )


@contextlib.contextmanager
def _claim(experiment):
    """Keeps the resolved recipe in the run's folder, unless what is done in this context is refused; refuses
    a folder whose training belongs to another recipe.
    """
    run = experiment.run
    path, text = run / "recipe.yaml", experiment.dump()
    if os.path.lexists(path) and not path.is_file():
        raise BadInput(f"{path} is no recipe; restore it, or delete the folder")
    before = path.read_bytes() if path.exists() else None
    if before is not None and ((run / "checkpoints").exists() or (run / "model").exists()):
        _refuse_other_setting(path, before, text, experiment.method)
    run.mkdir(parents=True, exist_ok=True)
    storage.write_atomically(path, text.encode())
    try:
        yield
    except BadInput:
        # The results that are there still belong to the recipe before.
        if before is None:
            path.unlink(missing_ok=True)
        else:
            storage.write_atomically(path, before)
        raise


def _part(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if (
        not slash
        or not (number.isascii() and number.isdigit() and count.isascii() and count.isdigit())
        or not 1 <= int(number) <= int(count) <= 99999
    ):
        raise BadInput(f"--part {text}: write it as I/N with 1 <= I <= N, for example 3/8")
    return int(number), int(count)


def _prepare(arguments, experiment) -> None:
    from endprompt.bases import model
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
    config = base.config
    base.check_vocabulary()
    recipe = experiment.recipe
    if not recipe.model.gguf_file:
        weights, source = f"model.name_or_path: the weights of {base.name!r}", str(base.folder)
        model.refuse_untied(weights, source, config, recipe.model.revision)
    workers = arguments.workers or min(16, os.cpu_count() or 1)
    versions = provenance.versions(("endprompt", "tokenizers", "fastokens", "pyarrow", "numpy"))
    with runfolder.hold(run / runfolder.prepare_lock(part)), _claim(experiment):
        manifest = prepare.prepare(experiment, run / "shards", workers, versions, part)
    if part:
        rows = sum(shard["rows"] for shard in manifest["shards"])
        print(
            f"{run / 'shards'}: part {part[0]} of {part[1]}: {rows} rows; prepare without --part joins the"
            " parts"
        )
        return
    print(
        f"{run / 'shards'}: {manifest['rows']} rows, {manifest['tokens']} tokens"
        f" ({manifest['prompt_tokens']} of end prompts) in {len(manifest['shards'])} shards"
    )


def _train(arguments, experiment) -> None:
    run = experiment.run
    if not experiment.method.trained:
        print(f"{experiment.method.name} trains nothing")
        return
    from endprompt.runs import runfolder

    main_rank = os.environ.get("RANK", "0") == "0"
    with contextlib.ExitStack() as held:
        if main_rank:
            held.enter_context(runfolder.hold(run / runfolder.TRAIN_LOCK))
            held.enter_context(_claim(experiment))
        if (run / "model").exists():
            print(f"{run / 'model'} is there already; nothing to train")
            return
        from endprompt.training.run import train

        try:
            train(experiment)
        except Failure as error:
            if main_rank or error.everywhere:
                _say(error)
            held.close()
            _leave(1)
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    _leave(0)


def _leave(code: int) -> None:
    """Ends the process at once.  Communication threads of gloo and DeepSpeed that are still running when the
    interpreter tears down its statics abort it ("terminate called without an active exception") after
    everything was saved.  All files are closed by now.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _check_names(arguments) -> None:
    """Raises BadInput naming an argument that is no UTF-8: results, and what is said of them, could not be
    written down.
    """
    for key, value in vars(arguments).items():
        for given in value if isinstance(value, list) else [value]:
            try:
                str(given).encode()
            except UnicodeEncodeError:
                raise BadInput(
                    f"{key}: {given} is no UTF-8 text; give the file or folder a name that is (mv renames it)"
                ) from None


def _say(error: Exception | str) -> None:
    line = " ".join(str(error).split())  # names of files and columns may hold what a terminal would obey
    print(
        "endprompt:",
        "".join(character if character.isprintable() else repr(character)[1:-1] for character in line),
        file=sys.stderr,
    )


def _status(arguments) -> None:
    import json

    from endprompt.runs import runfolder

    found = runfolder.summary(arguments.run)
    print(json.dumps(found) if arguments.json else runfolder.describe(found))


def _evaluate(arguments, experiment) -> None:
    from endprompt.evaluation import run as scoring

    if arguments.list:
        print("\n".join(f"{task}:{length or '-'}" for task, length in scoring.pairs(experiment.recipe)))
        return
    if arguments.budget is not None and not arguments.budget > 0:
        raise BadInput(f"--budget {arguments.budget:g}: name a positive number of seconds, or leave it out")
    scoring.evaluate(experiment, arguments.model, arguments.only, arguments.budget)


def _plan(arguments, experiment) -> None:
    from endprompt.planning import estimate

    machine = estimate.Machine(arguments.gpus, arguments.gpu_memory, arguments.gpu, arguments.mfu)
    print(estimate.describe(experiment, machine))


def _inspect(arguments, experiment) -> None:
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


def _check_out(out: Path, run: Path, writes: bool) -> None:
    """Raises BadInput unless ``run`` is a folder or can become one and, if the command ``writes``, takes
    files; leaves nothing.
    """
    for above in [run, *run.parents]:
        try:
            if os.path.lexists(above) and not above.is_dir():
                raise BadInput(f"--out: {above} is a file, not a folder; choose another")
            if above.is_dir():
                if writes:
                    tempfile.TemporaryFile(dir=above).close()
                return
        except (OSError, ValueError) as error:
            raise BadInput(
                f"--out: nothing can be written to {str(out)[:200]}"
                f" ({getattr(error, 'strerror', None) or error}); choose another folder"
            ) from None


def _path(arguments) -> None:
    from endprompt.recipe import settings_file

    folder = arguments.out / settings_file.recipe(arguments.recipe)[0]
    if arguments.method:
        from endprompt import methods

        folder /= methods.get(arguments.method).name
    print(folder)


def _run(arguments) -> None:
    """One command."""
    if arguments.command in ALONE:
        ALONE[arguments.command](arguments)
        return
    from endprompt.recipe.experiment import resolve

    experiment = resolve(arguments.recipe, arguments.overrides, arguments.method, arguments.out)
    if arguments.dry_run:
        print(experiment.dump(), end="")
        return
    reads = arguments.command == "plan" or arguments.command == "inspect" and not arguments.coverage
    _check_out(arguments.out, experiment.run, writes=not reads)
    OF_EXPERIMENTS[arguments.command](arguments, experiment)


def _export(arguments) -> None:
    from endprompt.runs import export

    form = arguments.position_dependent, arguments.dtype, arguments.gguf
    print(f"{export.export(arguments.run, arguments.to, *form)}: written")


ALONE = {
    "status": _status,
    "path": _path,
    "export": _export,
    "gpus": lambda _: print(launch.gpus(os.environ)),
}
OF_EXPERIMENTS = {
    "prepare": _prepare,
    "train": _train,
    "evaluate": _evaluate,
    "inspect": _inspect,
    "plan": _plan,
}


def main(argv: list[str] | None = None) -> None:
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as error:
        if isinstance(error.code, int) and error.code:
            launch.note_exit_code(error.code)
        raise
    if arguments.command == "evaluate" and not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # before tqdm is imported: its bars only fill a log
    # Ranks other than the first fail alike; one message is enough.
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        _check_names(arguments)
        if arguments.command == "train":
            launch.end_with_launcher()
            try:
                launch.check(os.environ)
            except BadInput:
                speaks = True  # there may be no rank 0
                raise
        _run(arguments)
    except BadInput as error:
        if speaks:
            _say(error)
        launch.note_exit_code(2)
        raise SystemExit(2) from None
    except Failure as error:
        if speaks:
            _say(error)
        raise SystemExit(1) from None
    except BrokenPipeError:  # the reader of our output, `head` say, had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError):
            raise
        # Full disk, missing permission: the file and the reason say it all.
        if speaks:
            _say(f"{error.filename or arguments.out}: {error.strerror}; nothing half-written was kept")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("endprompt: interrupted; the same command goes on from the last saved state", file=sys.stderr)
        raise SystemExit(130) from None
