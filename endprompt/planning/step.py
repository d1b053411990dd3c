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
from dataclasses import dataclass
from typing import Any

from endprompt import BadInput, methods

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
    """In the place of a tokenizer: every end prompt is 12 tokens, and each of the first 12 ends a
    sentence."""

    unk_token_id = None
    eos_token_id = 0

    def __len__(self) -> int:
        return 12

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return ["."] * len(rows)

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


class Clock:
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


@dataclass(frozen=True)
class Asked:
    """One setting of a step, and how long it is measured; what a line of ``serve``'s input holds.

    seconds: once so many are spent on steps, what is measured ends, after at least one step (and one of
    warm-up, if there is any).
    """

    shape: str
    method_name: str
    target: int
    rows: int
    checkpointing: str
    steps: int
    warm_up: int
    kernels: str = "torch"
    compiled: str = "no"
    attention: str = "auto"
    seconds: float | None = None


def measure(asked: Asked) -> dict:
    """One setting, in this process.  Returns seconds a step by part, tokens/s, MFU where the device's peak is
    known, and memory.

    Raises torch.OutOfMemoryError where it does not fit, and RuntimeError where an attention kernel cannot
    run.
    """
    import torch

    training = _Training(asked, torch.cuda.is_available())
    timed = _timed(training, asked)
    found = statistics.median(map(sum, zip(*timed.parts.values(), strict=True)))
    speed = asked.rows * training.length / found
    flops = training.flops_per_token()
    limit = _peak_flops()
    return {
        "row_length": training.length,
        "tokens": asked.rows * training.length,
        "seconds": found,
        "parts": {part: statistics.median(values) for part, values in timed.parts.items()},
        "steps": len(timed.parts["data"]),
        "first_step_seconds": timed.first,
        "loss": float(training.loss.detach()),
        "tokens_per_second": speed,
        "flops_per_token": flops,
        "flops_per_second": speed * flops,
        "mfu": speed * flops / limit if limit else None,
        "trained_parameters": sum(parameter.numel() for parameter in training.optimizer.parameters),
        **_memory(training, timed),
    }


def _peak_flops() -> float | None:
    """Of this process's GPU; None without one, or where it is not known."""
    import torch

    from endprompt.training.trainer import PEAK_FLOPS

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return next((value for key, value in PEAK_FLOPS.items() if gpu and key in gpu), None)


class _Training:
    """A model with its rows and optimizer, trained step by step.  inputs and loss are the last step's; kept:
    the bytes that autograd kept in the first step on a CPU.
    """

    inputs: dict
    loss: Any

    def __init__(self, asked: Asked, cuda: bool):
        self.cuda, self.kept = cuda, 0
        self.compiled = asked.compiled != "no"
        self.method, self.config = methods.get(asked.method_name), config_of(asked.shape)
        self.length = self.method.row_length(self.config.max_position_embeddings, asked.target)
        self.options = self.method.Options()
        self.network = self._network(asked)
        self.optimizer = _Optimizer(
            [parameter for parameter in self.network.parameters() if parameter.requires_grad], cuda
        )
        self.rows = _Rows(self, asked)

    @property
    def device(self) -> str:
        return "cuda" if self.cuda else "cpu"

    def _network(self, asked: Asked):
        """The model with random weights, as a run would train it."""
        import torch
        from transformers import AutoModelForCausalLM

        from endprompt.positions import rope
        from endprompt.training import loss

        window = self.config.max_position_embeddings
        scaling = self.method.scaling(rope.Asked(None), rope.Default(), window, asked.target)
        theta = rope.parameters(self.config)["rope_theta"]
        rope.apply(self.config, scaling, asked.target)
        torch.manual_seed(0)
        dtype = torch.bfloat16 if self.cuda else torch.float32
        with torch.device(self.device):
            network = AutoModelForCausalLM.from_config(self.config, dtype=dtype, attn_implementation="sdpa")
        rope.verify(network.get_decoder().rotary_emb, network.config, scaling, theta)
        self.method.attention(network, self.options, self.length).__enter__()
        loss.attach(network)
        use_kernels(network, asked.kernels)
        if self.method.adapters:
            from endprompt.recipe.training_keys import Lora
            from endprompt.training import lora

            lora.inject(network, Lora.model_validate(self.method.adapters), 0)
        network.train()
        if asked.checkpointing == "full":
            network.gradient_checkpointing_enable({"use_reentrant": False})
        use_compiler(network, asked.compiled)
        return network

    def step(self, first: bool) -> list[float]:
        """One step; returns the seconds of its data, forward, backward and optimizer."""
        clock = Clock(self.cuda)
        clock.mark()
        self.inputs, divisor = self.rows.batch()
        clock.mark()
        with self._counting(first) as counting:
            self.loss = self.network(**self.inputs)["loss_sum"] / divisor
        self.kept = counting.bytes if counting else self.kept
        clock.mark()
        self.loss.backward()
        clock.mark()
        self.optimizer.step()
        clock.mark()
        return clock.seconds()

    def _counting(self, first: bool):
        """Counts what autograd keeps, in the first step where no GPU knows it, and nothing compiled is in the
        way."""
        from endprompt.planning.activations import Kept

        wanted = not self.cuda and first and not self.compiled
        return Kept(self.network) if wanted else contextlib.nullcontext()

    def flops_per_token(self) -> float:
        from endprompt.training.trainer import flops_per_token

        return flops_per_token(
            self.config,
            self.method.attended(self.options, self.length),
            bool(self.method.adapters),
            not self.network.get_output_embeddings().weight.requires_grad,
        )


class _Optimizer:
    """AdamW in float32 over ``parameters``; on a GPU over copies of them, as under DeepSpeed."""

    def __init__(self, parameters: list, cuda: bool):
        import torch

        self.parameters, self.cuda = parameters, cuda
        self.masters = (
            [parameter.detach().float().requires_grad_() for parameter in parameters] if cuda else parameters
        )
        self.adamw = torch.optim.AdamW(self.masters, lr=1e-5, fused=cuda)

    def step(self) -> None:
        import torch

        if self.cuda:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                master.grad = parameter.grad.float()
                parameter.grad = None
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        if self.cuda:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)


class _Rows:
    """Batches of random tokens in rows of the method's own plan."""

    def __init__(self, training: _Training, asked: Asked):
        import numpy as np

        from endprompt.methods.base import Setting
        from endprompt.rows.collate import Collator
        from endprompt.rows.stream import Cursor

        self.count, self.device = asked.rows, training.device
        self.collate = Collator(0, asked.target)
        rng, method, length = np.random.default_rng(0), training.method, training.length
        self.rows_of = method.rows(
            Setting(method.name, training.options, length, asked.target, "cut", 0, FixedPrompt())
        )
        vocabulary = training.config.vocab_size
        self.cursor = Cursor(((("", rng.integers(vocabulary, size=length)) for _ in itertools.count())), 0, 0)

    def batch(self) -> tuple[dict, float]:
        """(the model's inputs on the device, the sum of their weights)"""
        made = [row for number in range(self.count) if (row := self.rows_of(number, self.cursor)) is not None]
        found = {
            name: tensor
            for name, tensor in self.collate(made).items()
            if name not in ("shift_prompt", "row_numbers")
        }
        # Before it lies on the device, which would have to be waited for.
        divisor = float(found["shift_weights"].sum())
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in found.items()}, divisor


@dataclass
class _Timed:
    """Seconds of every measured step by part; first: of the very first step; states and peak: bytes on the
    GPU between two steps, and at most.
    """

    parts: dict[str, list[float]]
    first: float | None = None
    states: int = 0
    peak: int = 0


def _timed(training: _Training, asked: Asked) -> _Timed:
    import torch

    found = _Timed({name: [] for name in ("data", "forward", "backward", "optimizer")})
    started, step = time.perf_counter(), 0
    with attention_backend(asked.attention):
        while step < asked.warm_up + asked.steps:
            if step == asked.warm_up and training.cuda:
                found.states = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            spent = training.step(step == 0)
            found.first = found.first or time.perf_counter() - started
            if step >= asked.warm_up:
                for name, value in zip(found.parts, spent, strict=True):
                    found.parts[name].append(value)
            step += 1
            if asked.seconds and time.perf_counter() - started > asked.seconds:
                if step > asked.warm_up:
                    break
                step = asked.warm_up
    if training.cuda:
        found.peak = torch.cuda.max_memory_allocated()
    return found


def _memory(training: _Training, timed: _Timed) -> dict[str, int | None]:
    if training.cuda:
        return {
            "states_bytes": timed.states,
            "peak_bytes": timed.peak,
            "memory_above_states_bytes": timed.peak - timed.states,
        }
    return {
        "states_bytes": None,
        "peak_bytes": None,
        "memory_above_states_bytes": training.kept or None,
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
            found = {"fits": True, **measure(Asked(**settings))}
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
