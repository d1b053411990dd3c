"""The command line: parses, and calls what ``commands`` has for the command; what that raises becomes a line
and an exit code.

Exit codes: 0 done (for ``train`` also: stopped on request, with a checkpoint), 2 bad input (one line says
what, where and how to mend it), 1 failure while running.  ``doctor``: 1 if something is to be mended.
"""

import logging
import os
import sys

from endprompt import BadInput, Failure
from endprompt.commands import alone, options
from endprompt.commands.saying import say_or_wait
from endprompt.runs import launch


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


def _run(arguments) -> None:
    """One command."""
    if arguments.command in alone.COMMANDS:
        alone.COMMANDS[arguments.command](arguments)
        return
    from endprompt.commands import of_runs

    of_runs.run(arguments)


def _written(arguments) -> str:
    """What the command writes, for an error that names no file; the command where that has no option."""
    return str(getattr(arguments, "out", None) or getattr(arguments, "to", None) or arguments.command)


def _complete(parser) -> None:
    """Answers the shell if it asks for completion, and ends the process then."""
    if "_ARGCOMPLETE" in os.environ:
        from endprompt.commands import completion

        completion.answer(parser)


def main(argv: list[str] | None = None) -> None:
    # Where a CPU has AVX-512 for bfloat16, its import warns of a kernel on the hub that it can do without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        parser = options.parser()
        _complete(parser)
        arguments = parser.parse_args(argv)
    except SystemExit as error:
        if isinstance(error.code, int) and error.code:
            launch.note_exit_code(error.code)
        raise
    except BadInput as error:  # of an option's value
        say_or_wait(error, os.environ.get("RANK", "0") == "0")
        launch.note_exit_code(2)
        raise SystemExit(2) from None
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
        say_or_wait(error, speaks)
        launch.note_exit_code(2)
        raise SystemExit(2) from None
    except Failure as error:
        say_or_wait(error, speaks)
        raise SystemExit(1) from None
    except BrokenPipeError:  # the reader of our output, `head` say, had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError):
            raise
        # Full disk, missing permission: the file and the reason say it all.
        say_or_wait(
            f"{error.filename or _written(arguments)}: {error.strerror}; nothing half-written was kept",
            speaks,
        )
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("endprompt: interrupted; the same command goes on from the last saved state", file=sys.stderr)
        raise SystemExit(130) from None
