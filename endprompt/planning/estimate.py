"""What a run will take, before it is submitted: memory a GPU under each ZeRO file, FLOPs, hours.

Activations are counted, not guessed (activations.py): one decoder layer is run on tensors without data at the
real row length, and the bytes that autograd keeps are added up.  The rest is arithmetic (memory.py).
"""

from dataclasses import dataclass

from endprompt import BadInput
from endprompt.planning import optimizers
from endprompt.planning.activations import Kept, activations
from endprompt.planning.memory import (
    Memory,
    Training,
    candidates,
    memory,
    training_memory,
    zero_options,
)
from endprompt.planning.shapes import SHAPES, parameter_count, shape, trained_share
from endprompt.recipe.batch import batch_shape
from endprompt.recipe.experiment import Experiment
from endprompt.recipe.training_keys import ADAMW

__all__ = [
    "SHAPES",
    "Kept",
    "Machine",
    "Training",
    "activations",
    "candidates",
    "describe",
    "memory",
    "parameter_count",
    "shape",
    "token_flops",
    "trained_share",
    "training_memory",
    "zero_options",
]


@dataclass(frozen=True)
class Machine:
    """GPUs that train together.  gpu: a name of trainer.PEAK_FLOPS; gpu_memory: GB (1e9 bytes) of one; mfu:
    the share of its peak that is reached.
    """

    gpus: int
    gpu_memory: float
    gpu: str
    mfu: float

    @property
    def peak(self) -> float:
        """FLOP/s of one.  Raises BadInput if a value is none, or the GPU is not known."""
        from endprompt.training.trainer import PEAK_FLOPS

        if self.gpu not in PEAK_FLOPS:
            raise BadInput(f"--gpu {self.gpu}: its peak is not known; use one of {', '.join(PEAK_FLOPS)}")
        if self.gpus < 1 or not self.gpu_memory > 0 or not 0 < self.mfu <= 1:
            raise BadInput(
                f"--gpus {self.gpus}, --gpu-memory {self.gpu_memory:g} and --mfu {self.mfu:g} must be"
                " at least 1, above 0, and above 0 and at most 1"
            )
        return PEAK_FLOPS[self.gpu]


USABLE = 0.92  # of a GPU's memory
PARTS = (
    ("gradients", "gradients"),
    ("optimizer states, fp32", "optimizer"),
    ("gathered", "gathered"),
    ("activations", "activations"),
    ("loss", "loss"),
    ("communication buckets", "buckets"),
    ("sum", "total"),
)


def describe(experiment: Experiment, machine: Machine) -> str:
    """The page that ``endprompt plan`` prints.  Raises BadInput."""
    from endprompt.training.arguments import DEFAULTS

    recipe, method = experiment.recipe, experiment.method
    if not method.trained:
        raise BadInput(f"plan: {method.name} trains nothing; it takes no more than its evaluation")
    machine.peak  # noqa: B018 (refuses)
    about = shape(recipe)
    if about is None:
        raise BadInput(
            f"plan: the shape of {recipe.model.name_or_path} is not known here; name a local folder, or"
            " download its config.json"
        )
    if recipe.sequence_parallel > 1:
        raise BadInput("plan: train.sequence_parallel is not counted; remove it to see one row a GPU")
    (rows, accumulation), length, gpus = batch_shape(experiment), experiment.row_length, machine.gpus
    checkpointing = recipe.train.get("gradient_checkpointing", DEFAULTS["gradient_checkpointing"])
    found = {
        name: training_memory(experiment, about, gpus, options)
        for name, options in candidates(recipe).items()
    }
    step = gpus * rows * accumulation
    lines = [
        (
            f"{recipe.model.name_or_path}: {parameter_count(about) / 1e9:.3g} B parameters,"
            f" {trained_share(about, experiment.adapters):.2%} trained; {method.name}: rows of {length}"
            " tokens"
        ),
        (
            f"{gpus} GPUs x {rows} rows x {accumulation} = {step} rows, {step * length} tokens a step;"
            f" activation checkpointing {'on' if checkpointing else 'off'}"
        ),
        "",
        *_memory_table(experiment, found, machine),
        *_optimizer(experiment, about),
        _advice(found, machine),
        _hours(experiment, about, machine, step * length),
    ]
    return "\n".join(lines)


def _memory_table(experiment: Experiment, found: dict[str, Memory], machine: Machine) -> list[str]:
    recipe, adapters = experiment.recipe, experiment.adapters
    half = "bf16" if recipe.train.get("bf16", True) else None
    masters = half and not recipe.deepspeed
    trained = f" (none: {'trained ' if adapters else ''}fp32)" if masters else ""
    if adapters and adapters.quantize:
        trained = f", layers {adapters.quantize}"
    gathered = f"gathered weights, {half} copies" if masters else "gathered weights and gradient"
    lines = [f"{'GB a GPU':34}" + "".join(f"{name:>16}" for name in found)]
    for label, of in ((f"weights, {half or 'fp32'}{trained}", "weights"), *PARTS):
        label = gathered if label == "gathered" else label
        lines.append(f"{label:34}" + "".join(f"{getattr(one, of) / 1e9:16.2f}" for one in found.values()))
    host = "".join(f"{one.host / 1e9:16.2f}" for one in found.values())
    fitting = "".join(f"{'yes' if fits(one, machine) else 'no':>16}" for one in found.values())
    return [
        *lines,
        f"{'on the host, GB a rank':34}{host}",
        f"{f'fits {machine.gpu_memory:g} GB (at most {100 * USABLE:.0f} %)':34}{fitting}",
    ]


def _optimizer(experiment: Experiment, about) -> list[str]:
    """Of an optimizer other than AdamW."""
    train = experiment.recipe.train
    optim, zero = train.get("optim"), "ZeRO files need train.optim=adamw_torch"
    if optim in ADAMW:
        return []
    kept = optimizers.kept(train, about, experiment.adapters)
    if kept is None:
        return [f"\n{optim}: what it keeps is not known here, and counted as AdamW's; {zero}."]
    return [f"\n{optim} keeps {kept:.3g} bytes a trained weight, AdamW {optimizers.ADAM:g}; {zero}."]


def fits(memory: Memory, machine: Machine) -> bool:
    """Fragments of the allocator, the CUDA context and NCCL take their share of what the maker prints."""
    return memory.total <= USABLE * machine.gpu_memory * 1e9


def _advice(found: dict[str, Memory], machine: Machine) -> str:
    own, *_ = found
    named = "without a ZeRO file it" if own == "none" else own
    if fits(found[own], machine):
        return f"\n{named} fits."
    # Of those that fit, what offloads least.
    better = sorted(
        (name for name, one in found.items() if fits(one, machine)), key=lambda name: found[name].host
    )
    mend = (
        "use more GPUs, fewer rows a GPU (train.per_device_train_batch_size), or activation checkpointing; no"
        " ZeRO file here makes it fit"
    )
    if better:
        mend = f"take train.deepspeed=ds_configs/{better[0]}.json"
    return f"\n{named} does not fit: {mend}"


def _hours(experiment: Experiment, about, machine: Machine, step_tokens: int) -> str:
    flops, tokens, took = (
        token_flops(experiment, about),
        trained_tokens(experiment, machine.gpus),
        hours(experiment, about, machine),
    )
    return (
        f"{flops / 1e9:.1f} GFLOP a token, {flops * step_tokens / 1e15:.3g} PFLOP a step; {tokens / 1e9:.3g}"
        f" B tokens at {machine.mfu:.0%} MFU of {machine.gpus} x {machine.gpu}: {took:.1f} h,"
        f" {took * machine.gpus:.0f} GPU-hours"
    )


def trained_tokens(experiment: Experiment, gpus: int) -> float:
    """Tokens of all epochs, or of ``max_steps`` steps on so many GPUs where the recipe says when it ends."""

    train = experiment.recipe.train
    if train.get("max_steps", -1) > 0:
        rows, accumulation = batch_shape(experiment)
        return float(train["max_steps"] * gpus * rows * accumulation * experiment.row_length)
    return experiment.recipe.data.tokens * train.get("num_train_epochs", 1)


def hours(experiment: Experiment, about, machine: Machine) -> float:
    """How long the run takes at the machine's share of its peak."""
    flops = token_flops(experiment, about) * trained_tokens(experiment, machine.gpus)
    return flops / (machine.peak * machine.gpus * machine.mfu) / 3600


def token_flops(experiment: Experiment, about) -> float:
    """Training FLOPs of a token of the experiment's rows."""
    from endprompt.training.trainer import flops_per_token

    adapters = experiment.adapters
    head_frozen = adapters is not None and not (adapters.train_embed_norm and about.tie_word_embeddings)
    work = experiment.method.work(experiment.options)
    return work * flops_per_token(about, experiment.attended, bool(adapters), head_frozen)
