"""What torchrun or deepspeed put into a rank's environment, and how a rank ends with its launcher."""

import os
import re

from endprompt import BadInput


def check(environment) -> None:
    """Raises BadInput unless what torchrun or deepspeed put into ``environment`` (or what was left there by hand) can start ranks.

    Left to torch, most of these end in a wait of minutes for ranks that never come.
    """
    numbers = {}
    for name, low, high in (("WORLD_SIZE", 1, 2**20), ("RANK", 0, 2**20), ("LOCAL_WORLD_SIZE", 1, 2**20), ("LOCAL_RANK", 0, 2**20), ("MASTER_PORT", 1, 65535)):
        if name in environment:
            if not re.fullmatch(r"[0-9]{1,9}", environment[name]) or not low <= int(environment[name]) <= high:
                raise BadInput(f"environment: {name}={environment[name][:40]!r} is no whole number from {low} to {high}; unset it, or start with torchrun or deepspeed")
            numbers[name] = int(environment[name])
    ranks = numbers.get("WORLD_SIZE", 1)
    for name, most in (("RANK", ranks), ("LOCAL_RANK", numbers.get("LOCAL_WORLD_SIZE", ranks))):
        if numbers.get(name, 0) >= most:
            raise BadInput(f"environment: {name} is {numbers[name]}, but of {most} ranks the last is {most - 1}; unset it, or start with torchrun or deepspeed")
    if ranks > 1 and (absent := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]):
        raise BadInput(f"environment: WORLD_SIZE is {ranks}, but {', '.join(absent)} is missing; unset it, or start with torchrun or deepspeed")
    threads = environment.get("OMP_NUM_THREADS", "1")
    if not re.fullmatch(r"\s*[1-9][0-9]{0,5}\s*(,\s*[1-9][0-9]{0,5}\s*)*", threads):
        raise BadInput(f"environment: OMP_NUM_THREADS={threads[:40]!r} is no number of threads; set it to 1 or more, or unset it")


def end_with_launcher() -> None:
    """A killed torchrun cannot end its ranks, which would wait for each other for ever, or go on and keep their GPUs: the kernel sends them
    SIGTERM instead (Linux's prctl), which ends them, or, while they train, has them save first."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() == 1:
            raise SystemExit(143)
