"""Ranks that start at once: forked from a server that has imported what training needs.

They are what torchrun starts, without torchrun: the same variables, the first rank keeps the store, and where
one ends with an error the others are ended.  Starts by torchrun itself are tested where they are the subject
(tests/test_launch.py, tests/test_faults.py, the demo).
"""

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
import time
from multiprocessing import connection, forkserver, reduction

from conftest import REPOSITORY

# What a training imports before its first step, and nothing that starts a thread.
PRELOADED = "endprompt.cli endprompt.training.run deepspeed peft torch.utils.tensorboard".split()
_context = multiprocessing.get_context("forkserver")


def _serve() -> None:
    _context.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # read once, at import
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _start(arguments: list[str]) -> None:
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = [kind, *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        runpy.run_path(kind, run_name="__main__")


def _rank(arguments: list[str], environment: dict[str, str], output) -> None:
    log = output.detach()
    for standard in (1, 2):
        os.dup2(log, standard)
    os.close(log)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    try:
        _start(arguments)
    finally:
        atexit._run_exitfuncs()  # which a process of multiprocessing does not call
        sys.stdout.flush()


def _of(command: list[str]) -> tuple[int | None, list[str]]:
    """Ranks of a command, None where it is no torchrun, and what each runs."""
    if command[1:3] != ["-m", "torch.distributed.run"]:
        return None, command[1:]
    count = next(part for part in command if part.startswith("--nproc_per_node="))
    after = max(command.index(part) for part in ("--standalone", count)) + 1
    return int(count.partition("=")[2]), command[after:]


def run(command: list[str], environment: dict[str, str], log: int, seconds: float) -> int:
    """The exit code of a command that starts with this Python, whose output goes to the file ``log``."""
    assert command[0] == sys.executable, command
    _serve()
    count, arguments = _of(command)
    port = _free_port()
    running = []
    for rank in range(count or 1):
        told = dict(environment)
        if count:
            names = ("RANK", "LOCAL_RANK", "ROLE_RANK")
            sizes = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE")
            told |= dict.fromkeys(names, str(rank)) | dict.fromkeys(sizes, str(count))
            told |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        process = _context.Process(target=_rank, args=(arguments, told, reduction.DupFd(log)))
        process.start()
        running.append(process)
    end = time.monotonic() + seconds
    while alive := [process for process in running if process.is_alive()]:
        connection.wait([process.sentinel for process in alive], max(0, end - time.monotonic()))
        failed = any(process.exitcode for process in running)
        if failed or time.monotonic() > end:
            for process in alive:
                process.terminate()
            for process in alive:
                process.join(10)
                process.kill()
                process.join()
        assert failed or time.monotonic() <= end, f"{command} took more than {seconds} s"
    codes = [process.exitcode for process in running]
    return codes[0] if count is None else int(any(codes))
