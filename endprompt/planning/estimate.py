"""What a run will take, before it is submitted: memory a GPU under each ZeRO file, FLOPs, hours.

Activations are counted, not guessed: one decoder layer is run on tensors without data at the real row length,
and the bytes that autograd keeps are added up.  The rest is arithmetic: ZeRO's partitions (arXiv 1910.02054),
what ZeRO-3 gathers at a time, the loss' buffers, buckets.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from endprompt import BadInput
from endprompt.bases import model
from endprompt.recipe.experiment import Experiment
from endprompt.recipe.schema import SHIPPED, Recipe

# From the config.json of each, where the files are not at hand.
SHAPES = {
    name: dict(
        zip(
            (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "vocab_size",
                "tie_word_embeddings",
            ),
            values,
            strict=True,
        )
    )
    for name, values in {
        "meta-llama/Meta-Llama-3-8B": (4096, 14336, 32, 32, 8, 128256, False),
        "meta-llama/Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256, True),
        "meta-llama/Llama-2-7b-hf": (4096, 11008, 32, 32, 32, 32000, False),
        "mistralai/Mistral-7B-v0.3": (4096, 14336, 32, 32, 8, 32768, False),
        "HuggingFaceTB/SmolLM2-135M": (576, 1536, 30, 9, 3, 49152, True),
    }.items()
}


def shape(recipe: Recipe):
    """What of the model's config the costs depend on: from its files where they are local, from ``SHAPES`` or
    the hub's cache, else None.
    """
    name = recipe.model.name_or_path
    if name.startswith("package:") or recipe.path(name):
        return model.load_config(recipe)
    if name in SHAPES:
        return SimpleNamespace(**SHAPES[name])
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=recipe.model.revision)
    return model.load_config(recipe) if isinstance(cached, str) else None


class Kept:
    """Counts, inside, the bytes that autograd keeps for the backward pass: each storage once, those of
    ``network``'s parameters not at all.
    """

    def __init__(self, network):
        self.parameters = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
        self.storages: dict[int, Any] = {}  # held, so that no address serves twice

    def __enter__(self):
        import torch

        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def _note(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.parameters:
            self.storages[storage._cdata] = storage
        return tensor

    def __exit__(self, *exception):
        self.hooks.__exit__(*exception)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def _attention():
    """A name under which transformers finds attention that keeps what FlashAttention keeps (queries, keys,
    values, output, one float32 a query), on any device.
    """
    import torch
    from transformers import AttentionInterface

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value):
            out = torch.empty_like(query)
            ctx.save_for_backward(
                query, key, value, out, torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
            )
            return out

        @staticmethod
        def backward(ctx, gradient):
            query, key, value, *_ = ctx.saved_tensors
            return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)

    def attend(module, query, key, value, attention_mask, **kwargs):
        return Attend.apply(query, key, value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("endprompt_counted", attend)
    return "endprompt_counted"


def activations(about, rows: int, length: int, dtype, autocast: bool = False) -> tuple[int, int]:
    """(bytes that one decoder layer keeps for its backward pass, bytes that the rest of the decoder does),
    for ``rows`` of ``length`` tokens.

    dtype: of the weights; autocast: from float32 weights to bfloat16.  The copies of weights that it makes
    are left out.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import LlamaConfig, LlamaForCausalLM

    def counted(layers: int) -> int:
        config = LlamaConfig(
            hidden_size=about.hidden_size,
            intermediate_size=about.intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=about.num_attention_heads,
            num_key_value_heads=about.num_key_value_heads,
            vocab_size=256,
            head_dim=getattr(about, "head_dim", None),
        )
        config._attn_implementation = _attention()
        # autocast does not see meta tensors, but fake ones of a CPU, which have no data either.
        with FakeTensorMode() if autocast else torch.device("meta"):
            network = LlamaForCausalLM(config).train()
            if not autocast:
                network.to(dtype)
            inputs = {
                "input_ids": torch.zeros(rows, length, dtype=torch.int64),
                "position_ids": torch.zeros(rows, length, dtype=torch.int64),
            }
            with Kept(network) as kept, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = network.get_decoder()(**inputs, use_cache=False).last_hidden_state
        del out
        matrices = layers * sum(
            parameter.numel()
            for parameter in network.get_decoder().layers[0].parameters()
            if parameter.dim() == 2
        )
        return kept.bytes - (2 * matrices if autocast else 0)

    one, two = counted(1), counted(2)
    return two - one, 2 * one - two


def _projected(about) -> tuple[int, int]:
    """(width of all query heads, width of all key heads)"""
    head_dim = getattr(about, "head_dim", None) or about.hidden_size // about.num_attention_heads
    return (
        about.num_attention_heads * head_dim,
        (about.num_key_value_heads or about.num_attention_heads) * head_dim,
    )


def parameter_count(about) -> int:
    heads, kv = _projected(about)
    layer = (
        about.hidden_size * (2 * heads + 2 * kv)
        + 3 * about.hidden_size * about.intermediate_size
        + 2 * about.hidden_size
    )
    return (
        about.num_hidden_layers * layer
        + about.vocab_size * about.hidden_size * (1 if about.tie_word_embeddings else 2)
        + about.hidden_size
    )


def trained_share(about, adapters) -> float:
    """The share of weights that have gradients and optimizer states; all of them without LoRA."""
    if adapters is None:
        return 1.0
    heads, kv = _projected(about)
    sides = {
        "q_proj": about.hidden_size + heads,
        "k_proj": about.hidden_size + kv,
        "v_proj": about.hidden_size + kv,
        "o_proj": heads + about.hidden_size,
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), about.hidden_size + about.intermediate_size),
    }
    trained = about.num_hidden_layers * adapters.r * sum(sides[target] for target in adapters.targets)
    if adapters.train_embed_norm:
        trained += (
            about.vocab_size * about.hidden_size + (2 * about.num_hidden_layers + 1) * about.hidden_size
        )
    return trained / parameter_count(about)


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
    summed: bytes in which ZeRO sums gradients, ``element`` unless given.
    """

    rows: int
    length: int
    checkpointing: bool
    adapters: Any = None
    element: int = 2
    summed: int | None = None

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
        weights, gradients, optimizer = element * (count - trained) + 4 * trained, 4 * trained, 8 * trained
    else:
        weights = element * count / (gpus if case.stage == 3 else 1)
        gradients = (case.training.summed or element) * trained / (gpus if case.stage >= 2 else 1)
        optimizer = 12 * trained / gpus
    host = 0.0
    if case.offloads("optimizer"):
        host += optimizer + 4 * trained / gpus
        optimizer = gradients = 0.0
    if case.offloads("param") and case.stage == 3:
        host += weights
        weights = 0.0
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
    # autocast's copies live as long as the step's graph
    return element * case.trained if case.stage == 0 and element == 2 else 0.0


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
    working = 3 * element * training.tokens * about.intermediate_size
    stream = 4 if case.autocast else element  # of what layers hand on
    kept = (
        about.num_hidden_layers * stream * training.tokens * about.hidden_size + layer
        if training.checkpointing
        else about.num_hidden_layers * layer
    )
    return kept + rest + working


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
    this program.
    """
    name, _ = zero_options(recipe)
    found = {name: recipe.deepspeed or {}}
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
    from endprompt.training import precision
    from endprompt.training.arguments import DEFAULTS, batch_shape

    recipe, shape = experiment.recipe, batch_shape(experiment)
    options = (recipe.deepspeed or {}) if options is None else options
    rows = rows or shape[0]
    kind = (precision.deepspeed_options(options, shape[0] * shape[1] // rows).get("data_types") or {}).get(
        "grad_accum_dtype"
    )
    half = recipe.train.get("bf16", True) or recipe.train.get("fp16", False)  # as on a GPU
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
            {"fp32": 4, "bf16": 2, "fp16": 2}.get(kind or ""),
        ),
    )


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
                f"plan: --gpus {self.gpus}, --gpu-memory {self.gpu_memory:g} and --mfu {self.mfu:g} must be"
                " at least 1, above 0, and above 0 and at most 1"
            )
        return PEAK_FLOPS[self.gpu]


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
    from endprompt.training.arguments import DEFAULTS, batch_shape

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
        _advice(found, machine),
        _hours(experiment, about, machine, step * length),
    ]
    return "\n".join(lines)


def _memory_table(experiment: Experiment, found: dict[str, Memory], machine: Machine) -> list[str]:
    recipe, adapters = experiment.recipe, experiment.adapters
    half = "fp16" if recipe.train.get("fp16") else "bf16" if recipe.train.get("bf16", True) else None
    masters = half and not recipe.deepspeed
    trained = f" (none: {'trained ' if adapters else ''}fp32)" if masters else ""
    gathered = f"gathered weights, {half} copies" if masters else "gathered weights and gradient"
    lines = [f"{'GB a GPU':34}" + "".join(f"{name:>16}" for name in found)]
    for label, of in ((f"weights, {half or 'fp32'}{trained}", "weights"), *PARTS):
        label = gathered if label == "gathered" else label
        lines.append(f"{label:34}" + "".join(f"{getattr(one, of) / 1e9:16.2f}" for one in found.values()))
    host = "".join(f"{one.host / 1e9:16.2f}" for one in found.values())
    fits = "".join(f"{'yes' if _fits(one, machine) else 'no':>16}" for one in found.values())
    return [
        *lines,
        f"{'on the host, GB a rank':34}{host}",
        f"{f'fits {machine.gpu_memory:g} GB (at most 92 %)':34}{fits}",
    ]


def _fits(memory: Memory, machine: Machine) -> bool:
    """Fragments of the allocator, the CUDA context and NCCL take their share of what the maker prints."""
    return memory.total <= 0.92 * machine.gpu_memory * 1e9


def _advice(found: dict[str, Memory], machine: Machine) -> str:
    own, *_ = found
    if _fits(found[own], machine):
        return f"\n{own} fits."
    # Of those that fit, what offloads least.
    better = sorted(
        (name for name, one in found.items() if _fits(one, machine)), key=lambda name: found[name].host
    )
    mend = (
        "use more GPUs, fewer rows a GPU (train.per_device_train_batch_size), or activation checkpointing; no"
        " ZeRO file here makes it fit"
    )
    return f"\n{own} does not fit: {f'take train.deepspeed=ds_configs/{better[0]}.json' if better else mend}"


def _hours(experiment: Experiment, about, machine: Machine, step_tokens: int) -> str:
    recipe = experiment.recipe
    tokens = recipe.data.tokens * recipe.train.get("num_train_epochs", 1)
    flops = token_flops(experiment, about)
    hours = flops * tokens / (machine.peak * machine.gpus * machine.mfu) / 3600
    return (
        f"{flops / 1e9:.1f} GFLOP a token, {flops * step_tokens / 1e15:.3g} PFLOP a step; {tokens / 1e9:.3g}"
        f" B tokens at {machine.mfu:.0%} MFU of {machine.gpus} x {machine.gpu}: {hours:.1f} h,"
        f" {hours * machine.gpus:.0f} GPU-hours"
    )


def token_flops(experiment: Experiment, about) -> float:
    """Training FLOPs of a token of the experiment's rows."""
    from endprompt.training.trainer import flops_per_token

    adapters = experiment.adapters
    head_frozen = adapters is not None and not (adapters.train_embed_norm and about.tie_word_embeddings)
    return flops_per_token(about, experiment.attended, bool(adapters), head_frozen)
