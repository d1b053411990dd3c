"""Memory of a GPU in training: ZeRO's partitions (arXiv 1910.02054), what ZeRO-3 gathers at a time, the loss'
buffers, buckets, and the activations that were counted.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endprompt.bases import counting, families, quantized
from endprompt.planning import optimizers
from endprompt.planning.activations import activations
from endprompt.planning.shapes import parameter_count, trained_share
from endprompt.recipe.batch import batch_shape
from endprompt.recipe.experiment import Experiment
from endprompt.recipe.schema import SHIPPED, Recipe
from endprompt.recipe.training_keys import ADAMW


@dataclass(frozen=True)
class Memory:
    """Bytes a GPU, and on the host for each of its ranks."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    loss: float
    buckets: float
    host: float

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.states + self.gathered + self.activations + self.loss + self.buckets


@dataclass(frozen=True)
class Training:
    """What one GPU computes in a micro-batch.

    rows: of ``length`` tokens; element: bytes of what matrix products take (2: bfloat16; 4: float32);
    summed: bytes in which ZeRO sums gradients, ``element`` unless given.  base_beside: whether every rank
    holds the base a second time, whole.  states: bytes that the optimizer keeps of a trained weight, beside
    its float32 copy.
    """

    rows: int
    length: int
    checkpointing: bool
    adapters: Any = None
    element: int = 2
    summed: int | None = None
    base_beside: bool = False
    states: float = optimizers.ADAM

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class _Case:
    """A model, a DeepSpeed file's ``zero_optimization``, a number of GPUs, and what each of them computes."""

    about: Any
    zero: dict
    gpus: int
    training: Training

    @property
    def stage(self) -> int:
        return self.zero.get("stage", 0)

    @property
    def share(self) -> float:
        return trained_share(self.about, self.training.adapters)

    @property
    def trained(self) -> float:
        return parameter_count(self.about) * self.share

    @property
    def head(self) -> int:
        """Weights of the output layer."""
        return self.about.vocab_size * self.about.hidden_size

    @property
    def head_trained(self) -> bool:
        adapters = self.training.adapters
        return self.share == 1.0 or (
            adapters is not None and adapters.train_embed_norm and self.about.tie_word_embeddings
        )

    @property
    def quantized(self) -> bool:
        """Whether the layers' matrices are in 4 bits."""
        adapters = self.training.adapters
        return adapters is not None and adapters.quantize is not None

    @property
    def autocast(self) -> bool:
        """Between layers; it always is in adapters."""
        adapters = self.training.adapters
        return (
            self.stage == 0 and self.training.element == 2 and (adapters is None or adapters.train_embed_norm)
        )

    def offloads(self, what: str) -> bool:
        return (self.zero.get(f"offload_{what}") or {}).get("device") in ("cpu", "nvme")

    def number(self, key: str, automatic: float, default: float) -> float:
        value = self.zero.get(key, default)
        return automatic if value == "auto" else float(value)


def memory(about, zero: dict, gpus: int, training: Training) -> Memory:
    """Of one GPU in training.

    zero: a DeepSpeed file's ``zero_optimization``.  From stage 1 on weights are of ``training.element``, with
    float32 copies in the optimizer; at stage 0, or without DeepSpeed, what is trained is float32 itself, and
    autocast makes copies.
    """
    case = _Case(about, zero, gpus, training)
    weights, gradients, optimizer, host = _states(case)
    return Memory(
        weights,
        gradients,
        optimizer,
        _gathered(case),
        _kept_activations(case),
        _loss(case),
        _buckets(case),
        host,
    )


def _states(case: _Case) -> tuple[float, float, float, float]:
    """Bytes of (weights, gradients, optimizer) on a GPU, and of what is offloaded on the host."""
    count, trained, element, gpus = (
        parameter_count(case.about),
        case.trained,
        case.training.element,
        case.gpus,
    )
    if case.stage == 0:
        weights, gradients = element * (count - trained) + 4 * trained, 4 * trained
        optimizer = case.training.states * trained
        if case.quantized:
            weights -= (element - quantized.BYTES) * counting.products(case.about)
    else:
        weights = element * count / (gpus if case.stage == 3 else 1)
        gradients = (case.training.summed or element) * trained / (gpus if case.stage >= 2 else 1)
        optimizer = (4 + case.training.states) * trained / gpus
    host = 0.0
    if case.offloads("optimizer"):
        host += optimizer + 4 * trained / gpus
        optimizer = gradients = 0.0
    if case.offloads("param") and case.stage == 3:
        host += weights
        weights = 0.0
    weights += element * count * case.training.base_beside
    return weights, gradients, optimizer, host


def _gathered(case: _Case) -> float:
    element = case.training.element
    if case.stage == 3:
        # Layers stay gathered as long as they are reused soon, up to this many; the output layer or embedding
        # comes on top, and its gradient is whole before it is reduced.
        live = min(
            parameter_count(case.about) - case.head, case.number("stage3_max_live_parameters", 1e9, 1e9)
        )
        return element * (live + case.head + case.head * (case.share == 1.0))
    # autocast's copies live as long as the step's graph; of what is in 4 bits, one matrix at a time is whole
    copies = element * case.trained if case.stage == 0 and element == 2 else 0.0
    return copies + case.quantized * element * counting.largest(case.about)


def _buckets(case: _Case) -> float:
    if case.stage == 0:  # DistributedDataParallel sums gradients in a copy of them
        return 4 * case.trained * (case.gpus > 1)
    width = case.about.hidden_size
    bucket = case.number("reduce_bucket_size", width * width, 5e8)
    gathering = (
        case.number("stage3_prefetch_bucket_size", 0.9 * width * width, 5e7)
        if case.stage == 3
        else case.number("allgather_bucket_size", 5e8, 5e8)
    )
    return case.training.element * (bucket * (2 if case.zero.get("overlap_comm") else 1) + gathering)


def _kept_activations(case: _Case) -> float:
    import torch

    about, training, element = case.about, case.training, case.training.element
    dtype = torch.bfloat16 if element == 2 else torch.float32
    layer, rest = activations(about, training.rows, training.length, dtype, case.autocast)
    # Gradients of the feed-forward layer, the widest place of the backward pass.
    working = 3 * element * training.tokens * counting.width(about)
    stream = 4 if case.autocast else element  # of what layers hand on
    kept = (
        about.num_hidden_layers * stream * training.tokens * about.hidden_size + layer
        if training.checkpointing
        else about.num_hidden_layers * layer
    )
    return kept + rest + working + _mask(case)


def _mask(case: _Case) -> float:
    """Of layers with a window of their own: a square a row, which they share, and what it is made of."""
    about, training = case.about, case.training
    config = counting.configured(about)
    if config.model_type not in families.BY_TYPE or not any(families.local_layers(config)):
        return 0.0
    return (training.element + 1) * training.tokens * training.length


def _loss(case: _Case) -> float:
    """A GPU's form: logits in place; the weight's gradient, in float32 too for many chunks, and scaled in the
    backward pass.
    """
    from endprompt.training import loss as losses

    about, tokens, element = case.about, case.training.tokens, case.training.element
    head, width = case.head, case.about.hidden_size
    if element == 2:
        chunk = losses._chunk(about.vocab_size, True)
        held, scaled = element * min(chunk, tokens) * about.vocab_size, element * head * case.head_trained
        return (
            element * tokens * width
            + (element + 4 * (tokens > losses.ROUNDINGS * chunk)) * head * case.head_trained
            + max(held, scaled)
        )
    return (
        min(losses.CHUNK_ELEMENTS, tokens * about.vocab_size) * (4 + element)
        + element * tokens * width
        + 4 * head * case.head_trained
    )


def zero_options(recipe: Recipe) -> tuple[str, dict]:
    """(name, ``zero_optimization``) of the recipe's ZeRO file; without one, every GPU holds all."""
    given, options = recipe.train.get("deepspeed"), recipe.deepspeed
    if not options:
        return "none", {"stage": 0}
    return (Path(given).stem if isinstance(given, str) else "recipe"), options.get("zero_optimization", {})


def candidates(recipe: Recipe) -> dict[str, dict]:
    """DeepSpeed's options by name: the recipe's own file first ({} without one), then those that come with
    this program; none beside a base in 4 bits, and beside an optimizer that is not AdamW.
    """
    name, _ = zero_options(recipe)
    found = {name: recipe.deepspeed or {}}
    quantized = (recipe.train.get("lora") or {}).get("quantize")
    if quantized or recipe.train.get("optim") not in ADAMW:  # which recipes with a ZeRO file refuse
        return found
    for path in sorted((SHIPPED / "ds_configs").glob("*.json")):
        found.setdefault(path.stem, json.loads(path.read_text(encoding="utf-8")))
    return found


def training_memory(
    experiment: Experiment, about, gpus: int, options: dict | None = None, rows: int | None = None
) -> Memory:
    """``memory`` of an experiment's run.  options: DeepSpeed's in place of the recipe's, {} for none; rows:
    in place of those of its micro-batch.

    Raises BadInput if its step cannot be split into micro-batches.
    """
    from endprompt.recipe import zero_file
    from endprompt.training.arguments import DEFAULTS

    recipe, shape = experiment.recipe, batch_shape(experiment)
    options = (recipe.deepspeed or {}) if options is None else options
    rows = rows or shape[0]
    sums = zero_file.filled(options, shape[0] * shape[1] // rows).get("data_types") if options else None
    half = recipe.train.get("bf16", True)  # as on a GPU
    kept = optimizers.kept(recipe.train, about, experiment.adapters)
    return memory(
        about,
        options.get("zero_optimization") or {},
        gpus,
        Training(
            rows,
            experiment.row_length,
            recipe.train.get("gradient_checkpointing", DEFAULTS["gradient_checkpointing"]),
            experiment.adapters,
            2 if half else 4,
            {"fp32": 4, "bf16": 2}.get((sums or {}).get("grad_accum_dtype", "")),
            experiment.method.base_beside(experiment.adapters),
            optimizers.ADAM if kept is None else kept,
        ),
    )
