"""A proposal as a recipe that says why, in YAML, and as what a person is told of it."""

import json
import math
from typing import Any

from endprompt import __version__
from endprompt.planning.proposal import ADAPTERS, QUANTIZED, WHAT, Asked, Proposal

MOST_LENGTHS = 6  # at which the trained model is scored
SHORTEST = 256  # tokens of a passkey prompt that has some text around its key
WIDTH = 110
ZERO = {
    "none": "nothing has to be shared or moved to the host",
    "zero2": "gradients and optimizer states are shared by the GPUs",
    "zero3": "weights, gradients and optimizer states are shared by the GPUs",
    "zero3_offload": "weights and optimizer states lie in the host's memory: {host:.0f} GB a GPU",
}


def _value(value: Any) -> str:
    """As YAML reads it: JSON is YAML, but for 2e-5, which it would read as text."""
    return f"{value:.1e}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _line(key: str, value: Any, why: str = "", indent: str = "  ") -> str:
    line = f"{indent}{key}: {value if isinstance(value, str) else _value(value)}"
    return f"{line}    # {why}" if why else line


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def eval_lengths(proposal: Proposal) -> list[int]:
    """The target and its halves, down to a row's length."""
    recipe = proposal.experiment.recipe
    found, shortest = [recipe.lengths.target], max(SHORTEST, recipe.lengths.physical)
    while len(found) < MOST_LENGTHS and found[-1] // 2 >= shortest:
        found.append(found[-1] // 2)
    return found[::-1]


def _head(asked: Asked, proposal: Proposal) -> list[str]:
    experiment, machine = proposal.experiment, proposal.machine
    base = experiment.base
    window, name = base.window, " ".join(asked.model.split())
    return [
        f"# {name} from {window} to {asked.target} positions (factor {asked.target / window:g}), method"
        f" {asked.method}.",
        f"# Written by endprompt init {__version__} for {machine.gpus} x {machine.gpu_memory:g} GB. Computed,"
        f" not measured: {proposal.memory.total / 1e9:.3g} GB a GPU,",
        f"# {time(proposal.hours)} at {machine.mfu:.0%} of the peak of {machine.gpus} x {machine.gpu}. What"
        " each key means: docs/recipe.md.",
        *(f"#   {command}" for command in commands(asked, proposal)),
    ]


def commands(asked: Asked, proposal: Proposal) -> list[str]:
    """What is run next, in order."""
    import shlex

    named = f"{shlex.quote(str(asked.out))} {asked.method}"
    gpus = proposal.machine.gpus
    launch = "endprompt" if gpus == 1 else f"torchrun --nproc_per_node {gpus} -m endprompt"
    return [f"endprompt prepare {named}", f"{launch} train {named}", f"endprompt evaluate {named}"]


def time(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{max(1, math.ceil(60 * hours))} min"


def _train(proposal: Proposal) -> list[str]:
    train, way, machine = proposal.experiment.recipe.train, proposal.way, proposal.machine
    recipe = proposal.experiment.recipe
    rows = train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] * machine.gpus
    why = ZERO[way.zero].format(host=proposal.memory.host / 1e9)
    lines = [_line("deepspeed", None if way.zero == "none" else f"ds_configs/{way.zero}.json", why)]
    if "lora" in train:
        inner = ", ".join(f"{key}: {value}" for key, value in train["lora"].items())
        why = "adapters; all weights would not fit, or were not asked for"
        if way.what == QUANTIZED:
            why = "adapters on a base in 4 bits, which does not fit whole: pip install 'endprompt[qlora]'"
        lines.append(_line("lora", f"{{{inner}}}", why))
    elif way.what == ADAPTERS:
        lines.append("  # lora: as the method says")
    kept = "to save memory, activations are computed again" if way.recomputed else "activations fit"
    return [
        *lines,
        _line("gradient_checkpointing", way.recomputed, kept),
        _line("per_device_train_batch_size", train["per_device_train_batch_size"]),
        _line(
            "gradient_accumulation_steps",
            train["gradient_accumulation_steps"],
            f"x {machine.gpus} GPU{'s' * (machine.gpus > 1)} = {rows} rows,"
            f" {rows * recipe.lengths.physical} tokens a step",
        ),
        _line("learning_rate", train["learning_rate"]),
        _line("warmup_steps", train["warmup_steps"]),
        "  logging_steps: 1" if train["warmup_steps"] < 20 else "  logging_steps: 10",
    ]


def recipe(asked: Asked, proposal: Proposal) -> str:
    """The recipe's file."""
    about = proposal.experiment.recipe
    own = proposal.experiment.base.own_scheme.name
    counted = "what the corpus holds, or was asked for" if proposal.measured else "the corpus may hold more"
    lines = [
        *_head(asked, proposal),
        "model:",
        _line("name_or_path", _text(about.model.name_or_path)),
        *([_line("gguf_file", _text(about.model.gguf_file))] if about.model.gguf_file else []),
        "lengths:",
        _line("physical", about.lengths.physical, "tokens in a row of a short-row method"),
        _line("target", about.lengths.target, "positions that a row spans: the window of the trained model"),
        "data:",
        _line("corpus", _text(about.data.corpus)),
        _line("tokens", about.data.tokens, counted),
        *(
            ["rope:", _line("type", about.rope.type, f"the base is scaled by {own} already, and goes on so")]
            if about.rope.type
            else []
        ),
        "train:",
        *_train(proposal),
        "eval:",
        _line("tasks", "[passkey]", "more: docs/evaluation.md"),
        _line("lengths", _value(eval_lengths(proposal))),
        _line("samples", 100),
    ]
    return "\n".join(lines) + "\n"


def told(asked: Asked, proposal: Proposal) -> str:
    """What is printed: the choice, memory, hours, and the next commands."""
    experiment, memory, machine = proposal.experiment, proposal.memory, proposal.machine
    train, way = experiment.recipe.train, proposal.way
    parts = (
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("gathered", memory.gathered),
        ("activations", memory.activations),
        ("loss", memory.loss),
        ("buckets", memory.buckets),
    )
    split = ", ".join(f"{name} {size / 1e9:.2g}" for name, size in parts if size >= 5e6)
    rows = train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] * machine.gpus
    host = f", and {memory.host / 1e9:.0f} GB on the host for each" if memory.host else ""
    return "\n".join(
        [
            f"{asked.out}: written",
            f"base     {asked.model}: window {experiment.base.window}, RoPE"
            f" {experiment.base.own_scheme.name} -> {experiment.scaling.name},"
            f" {asked.target} positions",
            f"rows     {experiment.row_length} tokens, {rows * experiment.recipe.lengths.physical} tokens a"
            f" step, {experiment.recipe.data.tokens} in all",
            f"train    {WHAT[way.what]}, {'no ZeRO file' if way.zero == 'none' else way.zero}, activations"
            f" {'computed again' if way.recomputed else 'kept'}",
            f"memory   {memory.total / 1e9:.3g} of {machine.gpu_memory:g} GB a GPU ({split}){host}",
            f"time     {time(proposal.hours)} on {machine.gpus} x {machine.gpu} at {machine.mfu:.0%} MFU"
            " (computed)",
            "next     " + "\n         ".join(commands(asked, proposal)),
        ]
    )
