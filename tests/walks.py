"""A walk over each line that asks for a GPU, for tests/test_devices.py: a process of its own, since torch is
told that GPUs are there, and libraries keep what they were told.

    python tests/walks.py FOLDER        # prints a line of JSON for each walk
"""

import contextlib
import json
import os
import sys
import traceback
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import walking
from networks import configuration, network

from endprompt.bases import gain, model, quantized
from endprompt.commands import checkup
from endprompt.evaluation import engine, scored_model
from endprompt.planning import efficiency, step
from endprompt.runs import averaging, provenance
from endprompt.training import arguments, checkpoint, lora, loss, probe, run, trainer

H100 = "NVIDIA H100 80GB HBM3"
WALKS: dict[str, tuple] = {}
# Walked on the pretended device, in its own process.
FAR = {
    f"planning/step.py:{name}"
    for name in (
        "measure _Training.device _Training._network _Optimizer.__init__ _Optimizer.step _timed _memory"
    ).split()
}
NAMED = {
    "training/divergence.py:": "a table by kind of device; tests/test_divergence.py takes chunks of any size",
    "bases/gain.py:": "a table by kind of device; a row's loss is the same however many are read at a time",
}


def walk(*places: str):
    def named(function):
        WALKS[function.__name__] = (function, places)
        return function

    return named


class Event:
    """In the place of torch.cuda.Event: the n-th one is recorded at n seconds."""

    count = 0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        Event.count += 1
        self.at = Event.count

    def synchronize(self) -> None:
        assert self.at == Event.count

    def elapsed_time(self, other) -> float:
        return 1000.0 * (other.at - self.at)


def two_gpus(patch: pytest.MonkeyPatch, folder: Path) -> SimpleNamespace:
    """Two H100 that torch says are there; ``called`` has what was asked of them."""
    called: list = []

    def noted(name, value=None):
        return lambda *args: called.append((name, *args)) or value

    stands = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_name": lambda *_: H100,
        "get_device_properties": lambda _: SimpleNamespace(name=H100, total_memory=80 * 10**9),
        "memory_allocated": lambda *_: 2**30,
        "max_memory_allocated": lambda *_: 3 * 2**30,
        "mem_get_info": noted("mem_get_info", (60 * 10**9, 80 * 10**9)),
        "reset_peak_memory_stats": noted("reset_peak_memory_stats"),
        "empty_cache": noted("empty_cache"),
        "manual_seed": noted("manual_seed"),
        "device": lambda device: called.append(("device", device)) or contextlib.nullcontext(),
        "Event": Event,
    }
    for name, value in stands.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    patch.setattr(os, "environ", os.environ.copy())
    return SimpleNamespace(called=called, patch=patch, folder=folder)


@walk("runs/provenance.py:device")
def the_stamp(gpus):
    assert provenance.device() == f"{H100} x 2"


@walk("commands/checkup.py:look", "commands/checkup.py:_torch")
def the_doctor(gpus):
    gpus.patch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    found = checkup.look(gpus.folder)
    assert found.gpus == ((H100, 80 * 10**9),) * 2 and found.nccl == "2.27.3"
    assert checkup._torch(found).state == "ok"
    blind = SimpleNamespace(versions={"torch": "2"}, listed=2, gpus=(), cuda=None)
    assert "built without CUDA" in checkup._torch(blind).said


@walk("training/arguments.py:set_up_environment")
def the_environment(gpus):
    os.environ.pop("DS_ACCELERATOR", None)
    assert arguments.set_up_environment() and "DS_ACCELERATOR" not in os.environ


@walk("training/arguments.py:training_arguments")
def the_arguments(gpus):
    gpus.patch.setattr(arguments, "TrainingArguments", lambda **given: SimpleNamespace(**given))
    recipe = SimpleNamespace(
        train={"deepspeed": None}, deepspeed=None, data=SimpleNamespace(seed=0), sequence_parallel=1
    )
    found = arguments.training_arguments(recipe, (2, 3), gpus.folder, True, False)
    assert found.bf16 and found.optim == "adamw_torch_fused" and not hasattr(found, "use_cpu")


@walk("training/run.py:start_processes")
def the_process_group(gpus):
    import deepspeed

    gpus.patch.setattr(deepspeed, "init_distributed", lambda *args, **_: gpus.called.append(args))
    run.start_processes(SimpleNamespace(deepspeed=True, ddp_timeout=5), True)
    assert gpus.called == [("nccl",)]


@walk("training/probe.py:same_draws")
def the_probe_s_draws(gpus):
    device, state = torch.device("cuda", 1), torch.get_rng_state()
    gpus.patch.setattr(
        torch.random, "fork_rng", lambda of: gpus.called.append(("fork_rng", of)) or contextlib.nullcontext()
    )
    with probe.same_draws(device):
        assert gpus.called == [("fork_rng", [device]), ("device", device), ("manual_seed", 0)]
    torch.set_rng_state(state)


@walk("training/loss.py:row_kernel", "training/loss.py:liger_kernel")
def the_kernels_of_the_loss(gpus):
    hidden = SimpleNamespace(is_cuda=True, device="cuda", dtype=torch.bfloat16)
    kernel, liger = "endprompt.training.loss_kernel", "liger_kernel.ops.fused_linear_cross_entropy"
    for name in (kernel, liger):
        gpus.patch.setitem(sys.modules, name, None)  # not installed
    gpus.patch.delattr("endprompt.training.loss_kernel", raising=False)
    assert loss.row_kernel(hidden) is None and loss.liger_kernel(hidden) is None
    there = types.ModuleType(kernel)
    there.rows = object()
    fused = types.ModuleType(liger)
    fused.LigerFusedLinearCrossEntropyFunction = SimpleNamespace(apply=object())
    for name in ("liger_kernel", "liger_kernel.ops"):
        gpus.patch.setitem(sys.modules, name, types.ModuleType(name))
    gpus.patch.setitem(sys.modules, liger, fused)
    gpus.patch.setitem(sys.modules, kernel, there)
    for agreed in (True, False):
        gpus.patch.setattr(loss, "agrees", lambda *_, agreed=agreed: agreed)
        assert loss.row_kernel(hidden) is (there.rows if agreed else None)
    assert loss.liger_kernel(hidden) is fused.LigerFusedLinearCrossEntropyFunction.apply


@walk("training/trainer.py:WeightedTrainer.log")
def the_log(gpus):
    made = object.__new__(trainer.WeightedTrainer)
    made.accelerator = SimpleNamespace(reduce=lambda sums, how: sums)
    made.args, made.token_flops = SimpleNamespace(world_size=2), 989e12 / 1000
    made._sums = torch.tensor([8.0, 4, 6, 2, 3, 1, 1000], dtype=torch.float64)
    told = []
    gpus.patch.setattr(trainer.Trainer, "log", lambda self, logs, start: told.append(logs))
    for name in (H100, "NVIDIA H200 NVL", "Some GPU"):
        gpus.patch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        made._sums[:] = torch.tensor([8.0, 4, 6, 2, 3, 1, 1000])
        made._since = trainer.time.perf_counter() - 1.0
        made.log({"loss": 1.0})
    assert told[0]["peak_memory_gib"] == 3 and told[0]["text_loss"] == 2 and told[0]["end_prompt_loss"] == 3
    # 1000 tokens a second, of which a GPU at its peak would do as many; there are two.
    assert told[0]["mfu"] == pytest.approx(0.5, rel=0.05) and "mfu" not in told[2]
    assert told[1]["mfu"] == pytest.approx(0.5 * 989 / 835, rel=0.05)


@walk("training/lora.py:verify_merged")
def the_merged_model(gpus):
    model = network(configuration())
    model.save_pretrained(gpus.folder)
    ids = torch.arange(3, 23)[None]
    batch = {"input_ids": ids, "position_ids": torch.arange(20)[None], "attention_mask": torch.ones_like(ids)}
    expected, devices = lora.logits(model, batch, "cpu"), []
    gpus.patch.setattr(torch.nn.Module, "to", lambda self, device: self)
    gpus.patch.setattr(lora, "logits", lambda model, batch, device: devices.append(device) or expected)
    for free in (10**9, 10**3):
        gpus.patch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2 * free))
        assert lora.verify_merged(gpus.folder, batch, expected, {}, torch.device("cuda", 0)) == 0
    assert devices == [torch.device("cuda", 0), "cpu"]


@walk("training/checkpoint.py:save_final")
def the_end_of_a_run(gpus):
    config = configuration()
    base = SimpleNamespace(config=config, tokenizer=SimpleNamespace(save_pretrained=lambda folder: None))
    experiment = SimpleNamespace(
        run=gpus.folder,
        recipe=SimpleNamespace(rope=SimpleNamespace(sharpen_heads=False)),
        base=base,
        scaling=None,
        adapters=None,
        target_length=128,
        method=SimpleNamespace(after_training=lambda *_: None),
    )
    made = SimpleNamespace(
        model=SimpleNamespace(),
        is_deepspeed_enabled=True,
        args=SimpleNamespace(should_save=True, device=torch.device("cuda", 0)),
        save_model=lambda folder: os.mkdir(folder),
    )
    gpus.patch.setattr(checkpoint, "verify_saved", lambda *_: None)
    gpus.patch.setattr(checkpoint.older_readers, "complete", lambda *_: None)
    gpus.patch.setattr(averaging, "average", lambda folder, of, cuda: gpus.called.append(cuda))
    checkpoint.save_final(made, experiment, None, lambda *_: None)
    assert gpus.called == [True] and (gpus.folder / "model").is_dir()


@walk("evaluation/engine.py:LongLM.__init__")
def the_cache_of_prompts(gpus):
    model = network(configuration())
    gpus.patch.setattr(
        engine.HFLM, "__init__", lambda self, **_: setattr(self, "_device", torch.device("cuda", 0))
    )
    found = engine.LongLM(model, SimpleNamespace(eos_token_id=2))
    # 2 layers of keys and values, 2 heads of 8, in float32.
    assert found.cached_tokens == int(engine.CACHE_SHARE * 60e9 / (2 * 2 * 2 * 8 * 4))


@walk("evaluation/scored_model.py:load", "evaluation/scored_model.py:_dtype")
def the_model_that_is_scored(gpus):
    class Network:
        generation_config = None
        dtype = torch.bfloat16
        config = SimpleNamespace(_attn_implementation="sdpa")

        def eval(self):
            return self

        def to(self, device):
            gpus.called.append(device)
            return self

    def untrained(experiment, cuda):
        return Network(), SimpleNamespace(eos_token_id=2), {"dtype of": scored_model._dtype(cuda)}

    gpus.patch.setattr(scored_model, "_untrained", untrained)
    experiment = SimpleNamespace(
        recipe=SimpleNamespace(eval=SimpleNamespace(backend="hf")), method=SimpleNamespace(trained=False)
    )
    _, _, identity = scored_model.load(experiment, None)
    assert gpus.called == ["cuda"] and identity["dtype of"] == torch.bfloat16


@walk("bases/model.py:attention_implementation")
def the_attention(gpus):
    from endprompt.bases import model

    recipe = SimpleNamespace(model=SimpleNamespace(attn_implementation=None))
    for there, chosen in ((True, "flash_attention_2"), (False, "sdpa")):
        gpus.patch.setattr("transformers.utils.is_flash_attn_2_available", lambda there=there: there)
        assert model.attention_implementation(recipe, True) == chosen


@walk("planning/efficiency.py:predicted_seconds", "planning/efficiency.py:_settings")
def the_harness(gpus):
    asked = efficiency._parser().parse_args(["--shape", "llama-3.2-1b"])
    settings = efficiency._settings(asked)
    assert {setting["target"] for setting in settings} == {2**14, 2**16, 2**18, 2**20}
    known = efficiency.predicted_seconds("llama-3.2-1b", settings[0], 2) - efficiency.START_SECONDS
    gpus.patch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    older = efficiency.predicted_seconds("llama-3.2-1b", settings[0], 2) - efficiency.START_SECONDS
    assert 0 < known < 1 and older / known == pytest.approx(989 / 312)


@walk("planning/step.py:Clock.mark", "planning/step.py:Clock.seconds", "planning/step.py:_peak_flops")
def the_clock(gpus):
    clock = step.Clock(True)
    for _ in range(3):
        clock.mark()
    assert clock.seconds() == [1.0, 1.0] and step._peak_flops() == 989e12


@walk("planning/step.py:serve")
def the_server_of_settings(gpus):
    gpus.patch.setattr(step, "measure", lambda asked: {"loss": 1.0})
    gpus.patch.setattr(step, "Asked", lambda **settings: settings)
    gpus.patch.setattr(sys, "stdin", iter(['{"method_name": "endprompt"}\n']))
    out = SimpleNamespace(write=gpus.called.append, flush=lambda: None)
    gpus.patch.setattr(sys, "stdout", out)
    step.serve()
    assert json.loads(gpus.called[0]) == {"fits": True, "loss": 1.0} and ("empty_cache",) in gpus.called


@walk("bases/quantized.py:loading")
def the_place_of_4_bits(gpus):
    gpus.patch.setattr(torch.cuda, "current_device", lambda: 1, raising=False)
    found = quantized.loading(torch.bfloat16, True)
    assert found["device_map"] == {"": 1} and found["quantization_config"].bnb_4bit_quant_type == "nf4"


@walk("bases/gain.py:Reader.network")
def the_base_that_ranks(gpus):
    made = SimpleNamespace(requires_grad_=lambda _: made, eval=lambda: made, to=lambda device: device)
    gpus.patch.setattr(model, "build", lambda base, scheme, *given: gpus.called.append(given) or made)
    reader = gain.Reader(SimpleNamespace(own_scheme=None))
    assert reader.network == "cuda" and gpus.called == [(torch.bfloat16, True)]


def main() -> None:
    for name, (function, places) in WALKS.items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True)
        with pytest.MonkeyPatch.context() as patch:
            gpus = two_gpus(patch, folder)
            try:
                seen = walking.lines_of(lambda function=function, gpus=gpus: function(gpus))
                found = {"missed": {place: walking.missed(place, seen) for place in places}}
            except Exception:
                found = {"error": traceback.format_exc()[-3000:]}
        print(f"walk {json.dumps({'walk': name, **found})}", flush=True)


if __name__ == "__main__":
    main()
