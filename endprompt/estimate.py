"""What a run will take, before it is submitted: memory a GPU under each ZeRO file, FLOPs, hours.

Activations are counted, not guessed: one decoder layer is run on tensors without data at the real row length,
and the bytes that autograd keeps are added up.  The rest is arithmetic: ZeRO's partitions (arXiv 1910.02054),
what ZeRO-3 gathers at a time, the loss' buffers, buckets.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from endprompt import BadInput, model
from endprompt.config import SHIPPED, Recipe
from endprompt.methods import Method

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
        self.storages: dict[int, object] = {}  # held, so that no address serves twice

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


def memory(
    about,
    zero: dict,
    gpus: int,
    rows: int,
    length: int,
    checkpointing: bool,
    adapters=None,
    element: int = 2,
    summed: int | None = None,
) -> Memory:
    """Of one GPU in training.

    zero: a DeepSpeed file's ``zero_optimization``; rows: of ``length`` tokens a micro-batch; element: bytes
    of what matrix products take (2: bfloat16; 4: float32).  From stage 1 on weights are of that type, with
    float32 copies in the optimizer; at stage 0, or without DeepSpeed, what is trained is float32 itself, and
    autocast makes copies.  summed: bytes in which ZeRO sums gradients, ``element`` unless given.
    """
    import torch

    from endprompt import loss as losses

    count, share, stage = parameter_count(about), trained_share(about, adapters), zero.get("stage", 0)
    trained = count * share
    off_optimizer, off_weights = (
        (zero.get(f"offload_{what}") or {}).get("device") in ("cpu", "nvme")
        for what in ("optimizer", "param")
    )
    autocast = (
        stage == 0 and element == 2 and (adapters is None or adapters.train_embed_norm)
    )  # between layers; always in adapters
    if stage == 0:
        weights, gradients, optimizer = element * (count - trained) + 4 * trained, 4 * trained, 8 * trained
    else:
        weights = element * count / (gpus if stage == 3 else 1)
        gradients = (summed or element) * trained / (gpus if stage >= 2 else 1)
        optimizer = 12 * trained / gpus
    host = 0.0
    if off_optimizer:
        host += optimizer + 4 * trained / gpus
        optimizer = gradients = 0.0
    if off_weights and stage == 3:
        host += weights
        weights = 0.0

    def number(key: str, automatic: float, default: float) -> float:
        value = zero.get(key, default)
        return automatic if value == "auto" else float(value)

    width, head = about.hidden_size, about.vocab_size * about.hidden_size
    gathered = (
        element * trained if stage == 0 and element == 2 else 0.0
    )  # autocast's copies live as long as the step's graph
    if stage == 3:
        # Layers stay gathered as long as they are reused soon, up to this many; the output layer or embedding
        # comes on top, and its gradient is whole before it is reduced.
        live = min(count - head, number("stage3_max_live_parameters", 1e9, 1e9))
        gathered = element * (live + head + head * (share == 1.0))
    bucket = number("reduce_bucket_size", width * width, 5e8)
    buckets = element * (
        bucket * (2 if zero.get("overlap_comm") else 1)
        + (
            number("stage3_prefetch_bucket_size", 0.9 * width * width, 5e7)
            if stage == 3
            else number("allgather_bucket_size", 5e8, 5e8)
            if stage
            else 0
        )
    )
    if stage == 0:  # DistributedDataParallel sums gradients in a copy of them
        buckets = 4 * trained * (gpus > 1)
    layer, rest = activations(
        about, rows, length, torch.bfloat16 if element == 2 else torch.float32, autocast
    )
    tokens = rows * length
    working = (
        3 * element * tokens * about.intermediate_size
    )  # gradients of the feed-forward layer, the widest place of the backward pass
    stream = 4 if autocast else element  # of what layers hand on
    kept = (
        about.num_hidden_layers * stream * tokens * width + layer
        if checkpointing
        else about.num_hidden_layers * layer
    )
    head_trained = share == 1.0 or (
        adapters is not None and adapters.train_embed_norm and about.tie_word_embeddings
    )
    # A GPU's form: logits in place; the weight's gradient, in float32 too for many chunks, and scaled in the
    # backward pass.
    if element == 2:
        chunk = losses._chunk(about.vocab_size, True)
        held, scaled = element * min(chunk, tokens) * about.vocab_size, element * head * head_trained
        loss = (
            element * tokens * width
            + (element + 4 * (tokens > losses.ROUNDINGS * chunk)) * head * head_trained
            + max(held, scaled)
        )
    else:
        loss = (
            min(losses.CHUNK_ELEMENTS, tokens * about.vocab_size) * (4 + element)
            + element * tokens * width
            + 4 * head * head_trained
        )
    return Memory(weights, gradients, optimizer, gathered, kept + rest + working, loss, buckets, host)


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
    recipe: Recipe, method: Method, about, gpus: int, options: dict | None = None, rows: int | None = None
) -> Memory:
    """``memory`` of a recipe's run.  options: DeepSpeed's in place of the recipe's, {} for none; rows: in
    place of those of its micro-batch.

    Raises BadInput if its step cannot be split into micro-batches.
    """
    from endprompt import zero_file
    from endprompt.train import DEFAULTS, batch_shape

    shape, options = batch_shape(recipe, method), (recipe.deepspeed or {}) if options is None else options
    rows = rows or shape[0]
    sums = zero_file.filled(options, shape[0] * shape[1] // rows).get("data_types") if options else None
    half = recipe.train.get("bf16", True)  # as on a GPU
    return memory(
        about,
        options.get("zero_optimization") or {},
        gpus,
        rows,
        recipe.row_length(method),
        recipe.train.get("gradient_checkpointing", DEFAULTS["gradient_checkpointing"]),
        recipe.lora(method),
        2 if half else 4,
        {"fp32": 4, "bf16": 2}.get((sums or {}).get("grad_accum_dtype")),
    )


def token_flops(recipe: Recipe, method: Method, about) -> float:
    """Training FLOPs of a token of the method's rows; see ``trainer.flops_per_token``."""
    from endprompt.trainer import flops_per_token

    adapters, attended = recipe.lora(method), recipe.group_size(method) or recipe.row_length(method)
    # The output layer is trained under adapters only where it is the embedding, which some methods train.
    head_frozen = bool(adapters) and not (adapters.train_embed_norm and about.tie_word_embeddings)
    return flops_per_token(about, attended, bool(adapters), head_frozen)


def describe(recipe: Recipe, method: Method, gpus: int, gpu_memory: float, gpu: str, mfu: float) -> str:
    """The page that ``endprompt plan`` prints.  gpu_memory: GB (1e9 bytes) a GPU; gpu: a name of
    trainer.PEAK_FLOPS.  Raises BadInput.
    """
    from endprompt.train import DEFAULTS, batch_shape
    from endprompt.trainer import PEAK_FLOPS

    if not method.trained:
        raise BadInput(f"plan: {method.name} trains nothing; it takes no more than its evaluation")
    peak = next((value for name, value in PEAK_FLOPS.items() if name == gpu), None)
    if peak is None:
        raise BadInput(f"--gpu {gpu}: its peak is not known; use one of {', '.join(PEAK_FLOPS)}")
    if gpus < 1 or not gpu_memory > 0 or not 0 < mfu <= 1:
        raise BadInput(
            f"plan: --gpus {gpus}, --gpu-memory {gpu_memory:g} and --mfu {mfu:g} must be at least 1, above 0,"
            " and above 0 and at most 1"
        )
    about = shape(recipe)
    if about is None:
        raise BadInput(
            f"plan: the shape of {recipe.model.name_or_path} is not known here; name a local folder, or"
            " download its config.json"
        )
    if recipe.sequence_parallel > 1:
        raise BadInput("plan: train.sequence_parallel is not counted; remove it to see one row a GPU")
    (rows, accumulation), length = batch_shape(recipe, method), recipe.row_length(method)
    checkpointing = recipe.train.get("gradient_checkpointing", DEFAULTS["gradient_checkpointing"])
    adapters = recipe.lora(method)
    found = {
        name: training_memory(recipe, method, about, gpus, options)
        for name, options in candidates(recipe).items()
    }
    half = "bf16" if recipe.train.get("bf16", True) else None
    masters = half and not recipe.deepspeed
    weights = f"weights, {half or 'fp32'}" + (
        f" (none: {'trained ' if adapters else ''}fp32)" if masters else ""
    )
    gathered = f"gathered weights, {half} copies" if masters else "gathered weights and gradient"
    lines = [
        (
            f"{recipe.model.name_or_path}: {parameter_count(about) / 1e9:.3g} B parameters,"
            f" {trained_share(about, adapters):.2%} trained; {method.name}: rows of {length} tokens"
        ),
        (
            f"{gpus} GPUs x {rows} rows x {accumulation} = {gpus * rows * accumulation} rows,"
            f" {gpus * rows * accumulation * length} tokens a step; activation checkpointing"
            f" {'on' if checkpointing else 'off'}"
        ),
        "",
        f"{'GB a GPU':34}" + "".join(f"{name:>16}" for name in found),
    ]
    for label, of in (
        (weights, "weights"),
        ("gradients", "gradients"),
        ("optimizer states, fp32", "optimizer"),
        (gathered, "gathered"),
        ("activations", "activations"),
        ("loss", "loss"),
        ("communication buckets", "buckets"),
        ("sum", "total"),
    ):
        lines.append(f"{label:34}" + "".join(f"{getattr(one, of) / 1e9:16.2f}" for one in found.values()))
    lines.append(
        f"{'on the host, GB a rank':34}" + "".join(f"{one.host / 1e9:16.2f}" for one in found.values())
    )
    # Fragments of the allocator, the CUDA context and NCCL take their share of what the maker prints.
    fits = {name: one.total <= 0.92 * gpu_memory * 1e9 for name, one in found.items()}
    lines.append(
        f"{f'fits {gpu_memory:g} GB (at most 92 %)':34}"
        + "".join(f"{'yes' if fit else 'no':>16}" for fit in fits.values())
    )
    own, *_ = found
    if fits[own]:
        lines.append(f"\n{own} fits.")
    else:
        # Of those that fit, what offloads least.
        better = sorted((name for name, fit in fits.items() if fit), key=lambda name: found[name].host)
        mend = (
            "use more GPUs, fewer rows a GPU (train.per_device_train_batch_size), or activation"
            " checkpointing; no ZeRO file here makes it fit"
        )
        lines.append(
            f"\n{own} does not fit: {f'take train.deepspeed=ds_configs/{better[0]}.json' if better else mend}"
        )
    tokens = recipe.data.tokens * recipe.train.get("num_train_epochs", 1)
    flops = token_flops(recipe, method, about)
    hours = flops * tokens / (peak * gpus * mfu) / 3600
    step = gpus * rows * accumulation * length
    lines.append(
        f"{flops / 1e9:.1f} GFLOP a token, {flops * step / 1e15:.3g} PFLOP a step; {tokens / 1e9:.3g} B"
        f" tokens at {mfu:.0%} MFU of {gpus} x {gpu}: {hours:.1f} h, {hours * gpus:.0f} GPU-hours"
    )
    return "\n".join(lines)
