"""The options of every command.  Nothing is imported here that takes time."""

import argparse
import os
import re
from pathlib import Path
from typing import Any

from endprompt import RECOMMENDED
from endprompt.commands import counts

CODES = (
    "exit codes: 0 done, 1 failure while running, 2 bad input (one line says what, where and how to mend it)"
)
OWN_CODES = {
    "train": (
        "exit codes: 0 done, or stopped on request with a checkpoint; 1 failure while running, the same"
        " command goes on from the last checkpoint; 2 bad input"
    ),
    "doctor": "exit codes: 0 all is well, 1 at least one line says 'mend', 2 bad input",
    "init": "exit codes: 0 written, 2 bad input, or nothing that fits (one line says what would)",
}

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


class Command(argparse.ArgumentParser):
    """A command's parser: what it takes by place may stand anywhere between its options, and may be missing;
    its help ends in its exit codes."""

    inside = False

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        # Else -1e8 is an option that is not known, where -100000000 is a number.
        self._negative_number_matcher = re.compile(r"-(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?$")
        self.epilog = self.epilog or OWN_CODES.get(self.prog.split()[-1], CODES)

    def parse_known_args(self, args=None, namespace=None):
        # argparse's other way calls this one twice; completion asks for the plain one.
        if self.inside or "_ARGCOMPLETE" in os.environ:
            return super().parse_known_args(args, namespace)
        self.inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.inside = False


class Versions(argparse.Action):
    """``--version``: ours, and those of what the figures depend on."""

    def __init__(self, option_strings, dest, **more):
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, **more)

    def __call__(self, parser, namespace, values, option_string=None):
        from endprompt import __version__
        from endprompt.runs import provenance

        found = provenance.versions(
            ("torch", "transformers", "deepspeed", "flash-attn", "peft", "lm_eval", "vllm")
        )
        lines = [f"{name} {version or 'not installed'}" for name, version in found.items()]
        print("\n".join([f"endprompt {__version__}", *lines]))
        parser.exit()


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="endprompt",
        description="Extend the context window of LLaMA-family models by training on short rows.",
        epilog=f'{CODES}. Completion in bash: eval "$(register-python-argcomplete endprompt)"',
    )
    root.add_argument(
        "--version", action=Versions, help="show the versions of this program and what it stands on, and exit"
    )
    # The deepspeed launcher puts it first.
    root.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Command)
    _init_options(commands)
    made = {}
    for name, text in COMMANDS.items():
        made[name] = command = commands.add_parser(
            name,
            help=text,
            description=_sentence(text),
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        _experiment_options(command, optional=name == "evaluate")
        command.add_argument(
            "--dry-run", action="store_true", help="check the recipe, print it resolved, and stop"
        )
    _prepare_options(made["prepare"])
    _plan_options(made["plan"])
    _evaluate_options(made["evaluate"])
    _inspect_options(made["inspect"])
    _run_options(commands)
    _script_options(commands)
    return root


def _experiment_options(command: argparse.ArgumentParser, optional: bool = False) -> None:
    """optional: whether the recipe and the method may be left out."""
    count: dict[str, Any] = {"nargs": "?"} if optional else {}
    command.add_argument(
        "recipe", metavar="RECIPE", help="a recipe file, for example recipes/tiny.yaml", **count
    )
    command.add_argument(
        "method", metavar="METHOD", help="a row of the method table, for example endprompt", **count
    )
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
    command.add_argument(
        "--filter",
        default=None,
        metavar="SHARE",
        help=(
            "rank documents by what the base gains from far context in them, and keep this share of the text;"
            " as --set data.filter_share=SHARE, which train must be given too"
        ),
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
        help=(
            "score this Hugging Face model, a folder or an id of the hub, instead of the run's own; without a"
            " recipe, results go to DIR/<model>/base of --out"
        ),
    )
    command.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="tasks and groups of them in place of the recipe's eval.tasks (docs/evaluation.md)",
    )
    command.add_argument(
        "--lengths",
        nargs="+",
        default=[],
        metavar="TOKENS",
        help="in place of the recipe's eval.lengths",
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


def _run_options(commands) -> None:
    """Of the commands that take a run's folder."""
    status = commands.add_parser(
        "status",
        help="print how far a run has come",
        description="Print a run's state, step, losses, speed, last checkpoint and time left.",
    )
    status.add_argument(
        "run", type=Path, metavar="RUN", help="a run's folder, for example runs/tiny/endprompt"
    )
    status.add_argument("--json", action="store_true", help="as JSON")
    _report_options(commands)
    _export_options(commands)


def _script_options(commands) -> None:
    """Of what a machine and scripts are asked."""
    doctor = commands.add_parser(
        "doctor",
        help="say whether this machine can do what a recipe asks, and what to mend",
        description=(
            "Look at torch, CUDA, flash-attn, DeepSpeed's compiler, NCCL, and the disk; with a recipe and a"
            " method, at memory and disk against what they need. One line each."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _experiment_options(doctor, optional=True)
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
    text = "print how many GPUs this process may use (CUDA_VISIBLE_DEVICES, Slurm)"
    commands.add_parser("gpus", help=text, description=_sentence(text))


def _report_options(commands) -> None:
    report = commands.add_parser(
        "report",
        help="write one HTML page about runs: losses, speed, memory, coverage, scores, settings",
        description="Write one HTML page about one or more runs, whole in itself.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    report.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a run's folder, for example runs/tiny/endprompt",
    )
    report.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page")


def _init_options(commands) -> None:
    init = commands.add_parser(
        "init",
        help="write a recipe for a model, a window and a machine",
        description=(
            "Write a recipe that extends MODEL to --target positions on --corpus and fits the GPUs: lengths,"
            " rows a step, LoRA or all weights, checkpointing and ZeRO file are chosen by what endprompt plan"
            " computes."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    init.add_argument("model", metavar="MODEL", help="a folder, package:NAME, or an id of the hub")
    init.add_argument(
        "--target", type=counts.of("--target"), required=True, metavar="TOKENS", help="the window to reach"
    )
    init.add_argument(
        "--corpus", nargs="+", required=True, metavar="TEXT", help="files, a folder, or an id of the hub"
    )
    init.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs that train together")
    init.add_argument("--gpu-memory", type=float, default=24.0, metavar="GB", help="memory of one")
    init.add_argument(
        "--gpu", default=None, metavar="NAME", help="its name, for its peak FLOP/s; None: by its memory"
    )
    init.add_argument(
        "--mfu", type=float, default=0.4, metavar="SHARE", help="share of that peak that is reached"
    )
    init.add_argument("--method", default=RECOMMENDED, metavar="METHOD", help="a row of the method table")
    init.add_argument(
        "--tokens",
        type=counts.of("--tokens"),
        default=None,
        metavar="N",
        help="tokens to train on; None: 1e8, or what local files hold if that is less",
    )
    init.add_argument(
        "--train", choices=("auto", "all", "lora"), default="auto", help="all weights, or LoRA adapters"
    )
    init.add_argument("--gguf", default=None, metavar="FILE", help="the GGUF file of MODEL to read")
    init.add_argument("--out", type=Path, required=True, metavar="FILE", help="the recipe to write")


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
        "--share",
        type=float,
        default=None,
        metavar="SHARE",
        help="average the trained weights with this share of the base's, as train.base_share does",
    )
    export.add_argument(
        "--gguf", action="store_true", help="write model.gguf too, by llama.cpp's converter (see LLAMA_CPP)"
    )
