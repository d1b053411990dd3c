"""The command line: ``endprompt prepare|train|evaluate|inspect|plan RECIPE METHOD``, ``endprompt status RUN``, and what scripts ask:
``endprompt path RECIPE [METHOD]`` and ``endprompt gpus``.

Exit codes: 0 done (for ``train`` also: stopped on request, with a checkpoint), 2 bad input (one line says what, where and how to mend
it), 1 failure while running.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path

from endprompt import BadInput, Failure, __version__, launch

MOST_WORKERS = 1024


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="endprompt", description="Extend the context window of LLaMA-family models by training on short rows.",
                                   epilog="exit codes: 0 done, 2 bad input, 1 failure while running")
    root.add_argument("--version", action="version", version=f"endprompt {__version__}")
    root.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # the deepspeed launcher puts it first
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in {
        "prepare": "tokenize the corpus and write shards of rows with explicit positions",
        "train": "train on the shards (start it with torchrun or deepspeed for several ranks)",
        "evaluate": "score the method's model, or any other with --model",
        "plan": "say what training will take: memory a GPU under each ZeRO file, FLOPs, hours",
        "inspect": "print a row of the shards with its positions, and verify their checksums; or see which distances are supervised",
    }.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument("recipe", metavar="RECIPE", help="a recipe file, for example recipes/tiny.yaml")
        command.add_argument("method", metavar="METHOD", help="a row of the method table, for example endprompt")
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key by its dotted name; may be repeated")
        command.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="results go to DIR/<recipe>/<method>")
        command.add_argument("--dry-run", action="store_true", help="check the recipe, print it resolved, and stop")
        if name == "prepare":
            command.add_argument("--part", default=None, metavar="I/N", help="make only the I-th of N parts of the shards; they may be made at the same time, and "
                                 "prepare without --part then joins them")
            command.add_argument("--workers", type=int, default=None, metavar="N", help="tokenizer processes; default: one a core, at most 16")
        if name == "plan":
            command.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs that train together")
            command.add_argument("--gpu-memory", type=float, default=80.0, metavar="GB", help="memory of one")
            command.add_argument("--gpu", default="A800", metavar="NAME", help="its name, for its peak FLOP/s")
            command.add_argument("--mfu", type=float, default=0.4, metavar="SHARE", help="share of that peak that is reached")
        if name == "evaluate":
            command.add_argument("--model", default=None, metavar="DIR", help="score this Hugging Face model instead of the run's own")
            command.add_argument("--only", action="append", default=[], metavar="TASK:LENGTH", help="score this pair of the recipe's alone; may be repeated")
            command.add_argument("--budget", type=float, default=None, metavar="SECONDS", help="begin no other pair when these are over, or less is left than the longest "
                                 "took; the same command goes on")
            command.add_argument("--list", action="store_true", help="print the recipe's pairs TASK:LENGTH, one a line, and stop")
        if name == "inspect":
            command.add_argument("--row", type=int, default=0, metavar="N", help="row to print")
            command.add_argument("--coverage", action="store_true", help="print instead which query-key distances are supervised and how often, of the shards or, "
                                 "without any, of sampled rows, and draw all methods that train into coverage.png in the run's folder")
    status = commands.add_parser("status", help="print how far a run has come", description="Print a run's state, step, losses, speed, last checkpoint and time left.")
    status.add_argument("run", type=Path, metavar="RUN", help="a run's folder, for example runs/tiny/endprompt")
    status.add_argument("--json", action="store_true", help="as JSON")
    path = commands.add_parser("path", help="print where a run's folder is", description="Print the folder of a recipe's runs, or of a method's run, "
                               "whether it is there or not.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    path.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the recipe.yaml of a run")
    path.add_argument("method", metavar="METHOD", nargs="?", help="a row of the method table")
    path.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="as of the other commands; no key moves the folder")
    path.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="as of the other commands")
    text = "print how many GPUs this process may use (CUDA_VISIBLE_DEVICES, Slurm)"
    commands.add_parser("gpus", help=text, description=text[0].upper() + text[1:] + ".")
    return root


@contextlib.contextmanager
def _claim(recipe, method, run: Path):
    """Keeps the resolved recipe in the run's folder, unless what is done in this context is refused; refuses a folder whose
    training belongs to another recipe."""
    import yaml

    from endprompt import config, settings_file, shards

    # How often to report or save does not change what is trained.
    harmless = {"logging_steps", "save_steps", "save_total_limit", "report_to", "disable_tqdm", "dataloader_num_workers"}
    path, text = run / "recipe.yaml", recipe.dump(method.name)
    if os.path.lexists(path) and not path.is_file():
        raise BadInput(f"{path} is no recipe; restore it, or delete the folder")
    before = path.read_bytes() if path.exists() else None
    if before is not None and ((run / "checkpoints").exists() or (run / "model").exists()):
        old, new = settings_file.parse(before.decode(errors="replace"), str(path)), yaml.safe_load(text)
        sections = ("model", "lengths", "data", "rope", "train")
        if not isinstance(old, dict) or not all(isinstance(old.get(section) or {}, dict) for section in sections):
            raise BadInput(f"{path} is no recipe; restore it, or delete the folder")

        def flatten(tree: dict) -> dict:
            # A key that came after the run was made had its default.
            return config.defaults() | {f"{section}.{key}": value for section in sections for key, value in (tree.get(section) or {}).items() if key not in harmless}

        flat = [flatten(old), flatten(new)]
        for settings in flat:  # the same file has another path in another clone
            if isinstance(settings.get("train.deepspeed"), str):
                settings["train.deepspeed"] = Path(settings["train.deepspeed"]).name
        differing = sorted(key for key in flat[0].keys() | flat[1].keys() if flat[0].get(key) != flat[1].get(key))
        if differing:
            raise BadInput(f"{run} was trained under another setting ({', '.join(differing)}); choose another --out, or delete the folder")
    run.mkdir(parents=True, exist_ok=True)
    shards.write_atomically(path, text.encode())
    try:
        yield
    except BadInput:
        # The results that are there still belong to the recipe before.
        if before is None:
            path.unlink(missing_ok=True)
        else:
            shards.write_atomically(path, before)
        raise


def _part(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not slash or not (number.isascii() and number.isdigit() and count.isascii() and count.isdigit()) or not 1 <= int(number) <= int(count) <= 99999:
        raise BadInput(f"--part {text}: write it as I/N with 1 <= I <= N, for example 3/8")
    return int(number), int(count)


def _prepare(arguments, recipe, method, run: Path) -> None:
    from endprompt import model, prepare, provenance, runfolder

    if not method.trained:
        print(f"{method.name} trains nothing, so it needs no shards")
        return
    if arguments.workers is not None and not 1 <= arguments.workers <= MOST_WORKERS:
        raise BadInput(f"--workers {arguments.workers}: at least one process is needed, and at most {MOST_WORKERS} are started; one a core is enough")
    part = _part(arguments.part) if arguments.part is not None else None
    base = model.load_config(recipe)
    tokenizer = model.load_tokenizer(recipe)
    model.check_vocabulary(tokenizer, base, f"model: the tokenizer of {recipe.model.name_or_path!r}")
    if not recipe.model.gguf_file:
        source = model.locate(recipe)["pretrained_model_name_or_path"]
        model.refuse_untied(f"model.name_or_path: the weights of {recipe.model.name_or_path!r}", source, base, recipe.model.revision)
    workers = arguments.workers or min(16, os.cpu_count() or 1)
    with runfolder.hold(run / runfolder.prepare_lock(part)), _claim(recipe, method, run):
        manifest = prepare.prepare(recipe, method, tokenizer, run / "shards", workers, provenance.versions(("endprompt", "tokenizers", "fastokens", "pyarrow", "numpy")), part,
                                   base.vocab_size)
    if part:
        print(f"{run / 'shards'}: part {part[0]} of {part[1]}: {sum(shard['rows'] for shard in manifest['shards'])} rows; prepare without --part joins the parts")
        return
    print(f"{run / 'shards'}: {manifest['rows']} rows, {manifest['tokens']} tokens ({manifest['prompt_tokens']} of end prompts) in {len(manifest['shards'])} shards")


def _train(arguments, recipe, method, run: Path) -> None:
    if not method.trained:
        print(f"{method.name} trains nothing")
        return
    from endprompt import runfolder

    main_rank = os.environ.get("RANK", "0") == "0"
    with contextlib.ExitStack() as held:
        if main_rank:
            held.enter_context(runfolder.hold(run / runfolder.TRAIN_LOCK))
            held.enter_context(_claim(recipe, method, run))
        if (run / "model").exists():
            print(f"{run / 'model'} is there already; nothing to train")
            return
        from endprompt.train import train

        try:
            train(recipe, method, run)
        except Failure as error:
            if main_rank or getattr(error, "everywhere", False):
                _say(error)
            held.close()
            _leave(1)
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    _leave(0)


def _leave(code: int) -> None:
    """Ends the process at once.  Communication threads of gloo and DeepSpeed that are still running when the interpreter tears down its
    statics abort it ("terminate called without an active exception") after everything was saved.  All files are closed by now."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _check_names(arguments) -> None:
    """Raises BadInput naming an argument that is no UTF-8: results, and what is said of them, could not be written down."""
    for key, value in vars(arguments).items():
        for given in value if isinstance(value, list) else [value]:
            try:
                str(given).encode()
            except UnicodeEncodeError:
                raise BadInput(f"{key}: {given} is no UTF-8 text; give the file or folder a name that is (mv renames it)") from None


def _say(error: Exception) -> None:
    line = " ".join(str(error).split())  # names of files and columns may hold what a terminal would obey
    print("endprompt:", "".join(character if character.isprintable() else repr(character)[1:-1] for character in line), file=sys.stderr)


def _status(arguments) -> None:
    import json

    from endprompt import runfolder

    found = runfolder.summary(arguments.run)
    print(json.dumps(found) if arguments.json else runfolder.describe(found))


def _evaluate(arguments, recipe, method, run: Path) -> None:
    from endprompt.eval import run as scoring

    if arguments.list:
        print("\n".join(f"{task}:{length or '-'}" for task, length in scoring.pairs(recipe)))
        return
    if arguments.budget is not None and not arguments.budget > 0:
        raise BadInput(f"--budget {arguments.budget:g}: name a positive number of seconds, or leave it out")
    scoring.evaluate(recipe, method, run, arguments.model, arguments.only, arguments.budget)


def _plan(arguments, recipe, method, run: Path) -> None:
    from endprompt import estimate

    print(estimate.describe(recipe, method, arguments.gpus, arguments.gpu_memory, arguments.gpu, arguments.mfu))


def _inspect(arguments, recipe, method, run: Path) -> None:
    from endprompt import inspection, model, prepare, shards

    folder = run / "shards"
    if arguments.coverage:
        tokenizer = model.load_tokenizer(recipe)
        print(inspection.describe_coverage(recipe, method, tokenizer, arguments.out, arguments.row))
        image = inspection.draw_coverage(recipe, tokenizer, arguments.out)
        run.mkdir(parents=True, exist_ok=True)
        shards.write_atomically(run / "coverage.png", image)
        print(f"\nall methods that train: {run / 'coverage.png'}")
        return
    manifest = shards.read_manifest(folder)
    tokenizer = model.load_tokenizer(recipe)
    if differing := shards.disagreements(manifest, prepare.settings(recipe, method, tokenizer)):
        raise BadInput(f"shards: {folder} do not belong to this recipe and method ({'; '.join(differing)}); inspect them under their own")
    shards.verify(folder, manifest)
    shards.check_rows(folder, manifest)
    print(f"{folder}: {len(manifest['shards'])} shards, {manifest['rows']} rows, {manifest['tokens']} tokens; all checksums hold")
    print(inspection.describe(folder, manifest, tokenizer, arguments.row))


def _check_out(out: Path, run: Path, writes: bool) -> None:
    """Raises BadInput unless ``run`` is a folder or can become one and, if the command ``writes``, takes files; leaves nothing."""
    for above in [run, *run.parents]:
        try:
            if os.path.lexists(above) and not above.is_dir():
                raise BadInput(f"--out: {above} is a file, not a folder; choose another")
            if above.is_dir():
                if writes:
                    tempfile.TemporaryFile(dir=above).close()
                return
        except (OSError, ValueError) as error:
            raise BadInput(f"--out: nothing can be written to {str(out)[:200]} ({getattr(error, 'strerror', None) or error}); choose another folder") from None


def _path(arguments) -> None:
    from endprompt import settings_file

    folder = arguments.out / settings_file.recipe(arguments.recipe)[0]
    if arguments.method:
        from endprompt import methods

        folder /= methods.get(arguments.method).name
    print(folder)


# Commands that know no method, or need not look into the recipe.
ALONE = {"status": _status, "path": _path, "gpus": lambda _: print(launch.gpus(os.environ))}


def main(argv: list[str] | None = None) -> None:
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as error:
        if error.code:
            launch.note_exit_code(error.code)
        raise
    if arguments.command == "evaluate" and not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # before tqdm is imported: its bars only fill a log
    # Ranks other than the first fail alike; one message is enough.
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        _check_names(arguments)
        if alone := ALONE.get(arguments.command):
            alone(arguments)
            return
        if arguments.command == "train":
            launch.end_with_launcher()
            try:
                launch.check(os.environ)
            except BadInput:
                speaks = True  # there may be no rank 0
                raise
        from endprompt import config, methods

        method = methods.get(arguments.method)
        recipe = config.load(arguments.recipe, arguments.overrides)
        if arguments.dry_run:
            print(recipe.dump(method.name), end="")
            return
        run = arguments.out / recipe.name / method.name
        _check_out(arguments.out, run, arguments.command not in ("inspect", "plan") or (arguments.command == "inspect" and arguments.coverage))
        {"prepare": _prepare, "train": _train, "evaluate": _evaluate, "inspect": _inspect, "plan": _plan}[arguments.command](arguments, recipe, method, run)
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
            print(f"endprompt: {error.filename or arguments.out}: {error.strerror}; nothing half-written was kept", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("endprompt: interrupted; the same command goes on from the last saved state", file=sys.stderr)
        raise SystemExit(130) from None
