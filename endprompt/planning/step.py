"""One training step of a model's shape with random weights, timed by part: what
endprompt/planning/efficiency.py measures, setting by setting.

Rows of the method's own plan go through the repository's collator, RoPE, loss and attention; AdamW runs in
float32 over the weights (on a GPU a bfloat16 copy of them computes, as under DeepSpeed: 16 bytes a parameter
in all).  The options are those that a recipe can set, see docs/speed.md.
"""

import contextlib
import gc
import itertools
import json
import statistics
import sys
import time

from endprompt import BadInput
from endprompt.methods import table as methods

# (layers, width, feed-forward width, heads, heads of keys and values, vocabulary, window, tied)
SHAPES = {
    "small": (4, 256, 688, 8, 4, 4096, 512, True),
    "smollm2-135m": (30, 576, 1536, 9, 3, 49152, 8192, True),
    "llama-3.2-1b": (16, 2048, 8192, 32, 8, 128256, 8192, True),
    "llama-3-8b": (32, 4096, 14336, 32, 8, 128256, 8192, False),
    # The 8B's own layers, as many as one GPU of 80 GB holds with their optimizer states.
    "llama-3-8b-8-layers": (8, 4096, 14336, 32, 8, 128256, 8192, False),
}


class FixedPrompt:
    """In the place of a tokenizer: every end prompt is 12 tokens."""

    unk_token_id = None

    def __call__(self, text: str, add_special_tokens: bool) -> dict:
        return {"input_ids": list(range(1, 13))}


KERNELS, COMPILE, ATTENTION = ("torch", "liger"), ("no", "layers"), ("auto", "flash", "cudnn", "efficient")


def config_of(shape: str):
    from transformers import LlamaConfig

    layers, width, inner, heads, kv, vocabulary, window, tied = SHAPES[shape]
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        max_position_embeddings=window,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )


def use_kernels(model, kernels: str) -> None:
    """liger: Liger-Kernel's fused RMSNorm, SwiGLU and RoPE in ``model`` and in every Llama that this process
    builds later; the loss stays ours.
    """
    if kernels == "torch":
        return
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError:
        raise BadInput(
            "--kernels liger: the package liger-kernel is not installed; pip install liger-kernel, or leave"
            " it out"
        ) from None
    apply_liger_kernel_to_llama(
        rope=True,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
        rms_norm=True,
        swiglu=True,
        model=model,
    )


def use_compiler(model, how: str) -> None:
    """layers: torch.compile for each decoder layer.  What decides about the mask stays outside: compiled, it
    would always build the square of it.
    """
    if how == "layers":
        for layer in model.get_decoder().layers:
            layer.compile(dynamic=False)


def attention_backend(name: str):
    """A context in which scaled_dot_product_attention may take that kernel alone; auto: torch's own
    choice.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    return contextlib.nullcontext() if name == "auto" else sdpa_kernel(backends[name])


class _Clock:
    """Points in time on the device (or, on a CPU, here), read at the end of a step, so that none of them
    holds the step up.
    """

    def __init__(self, cuda: bool):
        self.cuda = cuda
        self.points: list = []

    def mark(self) -> None:
        if self.cuda:
            import torch

            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.points.append(event)
        else:
            self.points.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between one mark and the next, once the device is done."""
        if self.cuda:
            self.points[-1].synchronize()
            return [
                start.elapsed_time(end) / 1000
                for start, end in zip(self.points, self.points[1:], strict=False)
            ]
        return [end - start for start, end in zip(self.points, self.points[1:], strict=False)]


def measure(
    shape: str,
    method_name: str,
    target: int,
    rows: int,
    checkpointing: str,
    steps: int,
    warm_up: int,
    kernels: str = "torch",
    compiled: str = "no",
    attention: str = "auto",
    seconds: float | None = None,
) -> dict:
    """One setting, in this process.  Returns seconds a step by part, tokens/s, MFU where the device's peak is
    known, and memory.

    seconds: once so many are spent on steps, what is measured ends, after at least one step (and one of
    warm-up, if there is any). Raises torch.OutOfMemoryError where it does not fit, and RuntimeError where an
    attention kernel cannot run.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from endprompt.methods.base import Setting
    from endprompt.planning import estimate
    from endprompt.positions import rope
    from endprompt.rows.collate import Collator
    from endprompt.rows.stream import Cursor
    from endprompt.training import lora, loss
    from endprompt.training.trainer import PEAK_FLOPS, flops_per_token

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    method, config = methods.get(method_name), config_of(shape)
    window = config.max_position_embeddings
    length, options = method.row_length(window, target), method.Options()
    scaling = method.scaling(None, window, target)
    theta = config.rope_parameters["rope_theta"]
    rope.apply(config, scaling, target)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    rope.verify(model.get_decoder().rotary_emb, model.config, scaling, theta)
    method.attention(model, options, length).__enter__()
    loss.attach(model)
    use_kernels(model, kernels)
    if method.adapters:
        from endprompt.recipe.training_keys import Lora

        lora.inject(model, Lora.model_validate(method.adapters), 0)
    model.train()
    if checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    use_compiler(model, compiled)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masters = (
        [parameter.detach().float().requires_grad_() for parameter in parameters] if cuda else parameters
    )
    optimizer = torch.optim.AdamW(masters, lr=1e-5, fused=cuda)
    collate = Collator(0, target)
    rng = np.random.default_rng(0)

    rows_of = method.rows(Setting(method.name, options, length, target, "cut", 0, FixedPrompt()))
    cursor = Cursor(((("", rng.integers(config.vocab_size, size=length)) for _ in itertools.count())), 0, 0)

    def batch():
        made = [row for number in range(rows) if (row := rows_of(number, cursor)) is not None]
        found = {
            name: tensor
            for name, tensor in collate(made).items()
            if name not in ("shift_prompt", "row_numbers")
        }
        divisor = float(
            found["shift_weights"].sum()
        )  # before it lies on the device, which would have to be waited for
        return {name: tensor.to(device, non_blocking=True) for name, tensor in found.items()}, divisor

    parts: dict[str, list[float]] = {name: [] for name in ("data", "forward", "backward", "optimizer")}
    states = kept = peak = 0
    started, first, step = time.perf_counter(), None, 0
    with attention_backend(attention):
        while step < warm_up + steps:
            if step == warm_up and cuda:
                states = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            clock = _Clock(cuda)
            clock.mark()
            inputs, divisor = batch()
            clock.mark()
            with (
                estimate.Kept(model)
                if not cuda and step == 0 and compiled == "no"
                else contextlib.nullcontext()
            ) as counting:
                total = model(**inputs)["loss_sum"] / divisor
            kept = counting.bytes if counting else kept
            clock.mark()
            total.backward()
            clock.mark()
            if cuda:
                for master, parameter in zip(masters, parameters, strict=True):
                    master.grad = parameter.grad.float()
                    parameter.grad = None
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if cuda:
                with torch.no_grad():
                    torch._foreach_copy_(parameters, masters)
            clock.mark()
            spent = clock.seconds()
            first = first or time.perf_counter() - started
            if step >= warm_up:
                for name, value in zip(parts, spent, strict=True):
                    parts[name].append(value)
            step += 1
            if seconds and time.perf_counter() - started > seconds:
                if step > warm_up:
                    break
                step = warm_up
    if cuda:
        peak = torch.cuda.max_memory_allocated()
    found = statistics.median(map(sum, zip(*parts.values(), strict=True)))
    speed = rows * length / found
    flops = flops_per_token(
        config,
        method.attended(options, length),
        bool(method.adapters),
        not model.get_output_embeddings().weight.requires_grad,
    )
    gpu = torch.cuda.get_device_name() if cuda else None
    limit = next((value for key, value in PEAK_FLOPS.items() if gpu and key in gpu), None)
    return {
        "row_length": length,
        "tokens": rows * length,
        "seconds": found,
        "parts": {part: statistics.median(values) for part, values in parts.items()},
        "steps": len(parts["data"]),
        "first_step_seconds": first,
        "loss": float(total.detach()),
        "tokens_per_second": speed,
        "flops_per_token": flops,
        "flops_per_second": speed * flops,
        "mfu": speed * flops / limit if limit else None,
        "trained_parameters": sum(parameter.numel() for parameter in parameters),
        "states_bytes": states if cuda else None,
        "peak_bytes": peak if cuda else None,
        "memory_above_states_bytes": peak - states if cuda else kept or None,
    }


def serve() -> None:
    """Settings, one JSON object a line on standard input, to results likewise on standard output, until the
    input ends.

    A setting that does not fit is {"fits": false}; one that cannot run has a "reason" beside it.  Both end
    this process: what they left behind is not looked for.
    """
    import torch

    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    before = None
    for line in sys.stdin:
        settings = json.loads(line)
        shapes = {
            name: value
            for name, value in settings.items()
            if name != "target" or methods.get(settings["method_name"]).fills == "target"
        }
        if before and shapes != before and "torch._dynamo" in sys.modules:
            # what was compiled for other rows or attention would count against the number of versions that it
            # keeps
            torch.compiler.reset()
        before = shapes
        try:
            found = {"fits": True, **measure(**settings)}
        except (torch.OutOfMemoryError, MemoryError):
            found = {"fits": False}
        except (RuntimeError, BadInput, ImportError) as error:
            text = str(error).strip() or type(error).__name__
            found = (
                {"fits": False}
                if "can't allocate memory" in text or "out of memory" in text
                else {"fits": False, "reason": text.splitlines()[0][:300]}
            )
        print(json.dumps(found), file=answers, flush=True)
        if not found["fits"]:
            return
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
