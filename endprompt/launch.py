"""What a launcher asks and puts into a rank's environment: how many GPUs there are, which rank this is, and
how a rank ends.
"""

import contextlib
import os
import re
import subprocess

from endprompt import BadInput

# Names the file that a rank leaves its exit code in, for recipes/run.sh.
EXIT_CODE_FILE = "ENDPROMPT_EXIT_CODE_FILE"


def _listed_gpus() -> list[list[str]] | None:
    """What nvidia-smi lists: a GPU's UUID and those of its MIG instances, in CUDA's order.  None without
    nvidia-smi.
    """
    try:
        said = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found: list[list[str]] = []
    for line in said.stdout.splitlines() if said.returncode == 0 else ():
        name = re.search(r"\(UUID: ([^)]+)\)", line)
        if re.match(r"GPU \d+:", line):
            found.append([name[1] if name else ""])
        elif re.match(r"\s+MIG ", line) and found and name:
            found[-1].append(name[1])
    return found


def _visible(gpus: list[list[str]] | None, variable: str) -> list[list[str]]:
    """The ``gpus`` (None: not known) that a variable like CUDA_VISIBLE_DEVICES leaves, read as the CUDA
    runtime does: what follows the first name that is nobody's is not visible, and nothing is if a name is
    given twice.  A GPU named by a MIG instance has only that.
    """
    kept: list[list[str]] = []
    for name in (part.strip() for part in variable.split(",")):
        number, found = re.match(r"\+?([0-9]+)", name), []
        if not number and not name.startswith(("GPU-", "MIG-")):
            break
        if gpus is None:
            found = [[str(int(number[1])) if number else name]]
        elif number:
            found = gpus[int(number[1]) :][:1]
        else:
            found = [
                gpu if uuid == gpu[0] else [gpu[0], uuid]
                for gpu in gpus
                for uuid in gpu
                if uuid.startswith(name)
            ]
        if len(found) != 1:
            break
        if found[0] in kept:
            return []
        kept += found
    return kept


def gpus(environment) -> int:
    """How many GPUs a process with ``environment`` may use: those of nvidia-smi that CUDA_VISIBLE_DEVICES
    leaves, and no more than Slurm gave the job on this node.  Without nvidia-smi (AMD, some containers)
    Slurm's number counts, and AMD's variables too.

    No torch is imported.  Sources: CUDA C++ Programming Guide (environment variables); NVIDIA MIG user guide
    (one instance a process).
    """
    given = environment.get("SLURM_GPUS_ON_NODE", "")
    most = int(given) if re.fullmatch(r"[0-9]{1,6}", given) else None
    listed = _listed_gpus()
    counts = [] if most is None else [most]
    if listed is None:
        names = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
        return (
            min(counts + [len(_visible(None, environment[name])) for name in names if name in environment])
            if most
            else 0
        )
    found = (
        _visible(listed, environment["CUDA_VISIBLE_DEVICES"])
        if "CUDA_VISIBLE_DEVICES" in environment
        else listed
    )
    return min(counts + [1 if any(len(gpu) > 1 for gpu in found) else len(found)])


def note_exit_code(code: int) -> None:
    """Leaves ``code`` where recipes/run.sh looks for it, since torchrun ends with 1 whatever its ranks end
    with.  The first rank's
    stays: what the others say after it may only be that it is gone.
    """
    if path := os.environ.get(EXIT_CODE_FILE):
        with contextlib.suppress(OSError), open(path, "x", encoding="utf-8") as file:
            file.write(f"{code}\n")


def check(environment) -> None:
    """Raises BadInput unless what torchrun or deepspeed put into ``environment`` (or what was left there by
    hand) can start ranks.

    Left to torch, most of these end in a wait of minutes for ranks that never come.
    """
    numbers = {}
    for name, low, high in (
        ("WORLD_SIZE", 1, 2**20),
        ("RANK", 0, 2**20),
        ("LOCAL_WORLD_SIZE", 1, 2**20),
        ("LOCAL_RANK", 0, 2**20),
        ("MASTER_PORT", 1, 65535),
    ):
        if name in environment:
            if (
                not re.fullmatch(r"[0-9]{1,9}", environment[name])
                or not low <= int(environment[name]) <= high
            ):
                raise BadInput(
                    f"environment: {name}={environment[name][:40]!r} is no whole number from {low} to {high};"
                    " unset it, or start with torchrun or deepspeed"
                )
            numbers[name] = int(environment[name])
    ranks = numbers.get("WORLD_SIZE", 1)
    for name, most in (("RANK", ranks), ("LOCAL_RANK", numbers.get("LOCAL_WORLD_SIZE", ranks))):
        if numbers.get(name, 0) >= most:
            raise BadInput(
                f"environment: {name} is {numbers[name]}, but of {most} ranks the last is {most - 1}; unset"
                " it, or start with torchrun or deepspeed"
            )
    if ranks > 1 and (
        absent := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    ):
        raise BadInput(
            f"environment: WORLD_SIZE is {ranks}, but {', '.join(absent)} is missing; unset it, or start with"
            " torchrun or deepspeed"
        )
    threads = environment.get("OMP_NUM_THREADS", "1")
    if not re.fullmatch(r"\s*[1-9][0-9]{0,5}\s*(,\s*[1-9][0-9]{0,5}\s*)*", threads):
        raise BadInput(
            f"environment: OMP_NUM_THREADS={threads[:40]!r} is no number of threads; set it to 1 or more, or"
            " unset it"
        )


def end_with_launcher() -> None:
    """A killed torchrun cannot end its ranks, which would wait for each other for ever, or go on and keep
    their GPUs: the kernel sends them SIGTERM instead (Linux's prctl), which ends them, or, while they train,
    has them save first.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() == 1:
            raise SystemExit(143)
