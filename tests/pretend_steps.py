"""Training on the pretended device, case by case, for tests/test_devices.py: a process of its own.

python tests/pretend_steps.py FOLDER CASE [CASE ...]       # prints a line of JSON for each
"""

import contextlib
import itertools
import json
import sys
import traceback
import types
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pretend
import pytest
import torch
import walking
import walks
import yaml
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import REPOSITORY
from networks import saved
from transformers import TrainerCallback, TrainingArguments

from endprompt.planning import step
from endprompt.recipe import schema
from endprompt.recipe.batch import batch_shape
from endprompt.recipe.experiment import Experiment
from endprompt.rows.collate import Collator
from endprompt.rows.stream import Cursor
from endprompt.training import arguments as training_settings
from endprompt.training import loss, precision, run, trainer, watch

PHYSICAL, TARGET, STEPS = 64, 128, 3


@dataclass(frozen=True)
class Case:
    """A training of STEPS steps.  method and sections: of its recipe; model: type of the base; autocast:
    float32 masters under autocast, else the weights are bf16, as DeepSpeed holds them; fault: what is broken
    in it on purpose; slow: of the slow tests."""

    method: str
    sections: dict = field(default_factory=dict)
    model: str = "llama"
    changes: dict = field(default_factory=dict)
    autocast: bool = False
    fault: str = ""
    slow: bool = False


LORA = {"train": {"lora": {"r": 4}}}
CASES = {
    "short": Case("short"),
    "endprompt": Case("endprompt"),
    "endprompt, autocast": Case("endprompt", autocast=True),
    "endprompt, heads": Case("endprompt", {"rope": {"sharpen_heads": True}}, slow=True),
    "longrope2": Case("longrope2"),
    "longlora": Case("longlora", slow=True),
    "perturbed": Case("perturbed"),
    "self_distil, lora": Case("self_distil", LORA),
    "full_length": Case("full_length", slow=True),
    "short, autocast": Case("short", autocast=True, slow=True),
    "endprompt, lora": Case("endprompt", LORA, slow=True),
    "endprompt, lora, autocast": Case("endprompt", LORA, autocast=True, slow=True),
    "longlora, autocast": Case("longlora", autocast=True, slow=True),
    "cream": Case("cream", slow=True),
    "perturbed, both": Case("perturbed", {"method_options": {"kl_target": "perturbed"}}, slow=True),
    "perturbed, autocast": Case("perturbed", autocast=True, slow=True),
    "self_distil": Case("self_distil", slow=True),
    "self_distil, autocast": Case("self_distil", autocast=True, slow=True),
}
FAULTS = ("host shift_labels", "host input_ids", "float32 product", "item", "bool", "mask", "new tensor")
CASES |= {f"fault: {fault}": Case("endprompt", fault=fault) for fault in FAULTS}


def recipe_of(case: Case, folder: Path) -> Path:
    base = saved(folder / "base", REPOSITORY / "recipes/tiny/base", case.model, **case.changes)
    (folder / "corpus.jsonl").write_text('{"text": "nothing is read of it"}\n')
    tree = {
        "model": {"name_or_path": str(base)},
        "lengths": {"physical": PHYSICAL, "target": TARGET},
        "data": {
            "corpus": str(folder / "corpus.jsonl"),
            "tokens": 10**6,
            "packing": "document",
            "prompt_loss_weight": 0.5,
        },
        "train": {
            "deepspeed": None,
            "bf16": case.autocast,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": STEPS,
            "logging_steps": 2,
            "learning_rate": 1e-3,
            "gradient_checkpointing": False,
        },
    }
    for section, values in case.sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    path = folder / "case.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def rows_of(experiment: Experiment, count: int) -> list[dict]:
    """Rows of random tokens, of different lengths where the method allows that."""
    rng = np.random.default_rng(0)
    longest = experiment.row_length
    documents = (
        (f"d{n}", rng.integers(3, 896, int(rng.integers(longest // 2, 2 * longest))))
        for n in itertools.count()
    )
    cursor, build = Cursor(documents, 0, 0), experiment.rows()
    return [{**build(number, cursor), "row_number": number} for number in range(count)]


class Steps(TrainerCallback):
    """Tells apart what was waited for in each step, from the end of the one before it."""

    def __init__(self, device):
        self.device, self.starts = device, []

    def on_step_end(self, args, state, control, **kwargs):
        if self.device:
            self.starts.append(len(self.device.waits))

    def told(self) -> dict[str, list]:
        """[who asked, kind, times] of the second step, and of the third, which begins with a log."""
        first, second, third = self.starts
        steps = {"step": self.device.waits[first:second], "logged": self.device.waits[second:third]}
        return {
            name: sorted([one.by, one.kind, times] for one, times in Counter(waits).items())
            for name, waits in steps.items()
        }


def trained(network) -> list:
    return [one for one in network.parameters() if one.requires_grad]


def train(case: Case, folder: Path, device) -> dict:
    """device: a pretend.Device that is there, or None, for the host."""
    experiment = Experiment.of(schema.load(recipe_of(case, folder)), case.method, folder)
    experiment.run.mkdir(parents=True)
    shape = batch_shape(experiment)
    arguments = training_settings.training_arguments(experiment.recipe, shape, experiment.run, False, False)
    network = run.build_network(experiment, arguments, False)
    steps = Steps(device)
    collator = Collator(0, experiment.target_length)
    dataset = rows_of(experiment, shape[0] * shape[1] * STEPS)
    probe = trainer.Probe(dataset, collator, 1)
    watching = watch.Watch(watch.StopRequest(experiment.run), experiment.run)
    callbacks = [probe, watching, watch.Report(experiment.run, 1), steps]
    before = [one.detach().float().clone() for one in trained(network)]
    if device:
        network.to(pretend.NAME)
    with experiment.method.attention(network, experiment.options, experiment.row_length):
        made = run.wrap(experiment, arguments, network, dataset, collator, callbacks)
        watching.trainer = probe.trainer = made
        made._save_checkpoint = lambda *_: None
        run.fit(made, None)
    after = [one.detach().float().cpu() for one in trained(network)]
    changes = [float((one - other).norm()) for one, other in zip(after, before, strict=True)]
    found = {"history": made.state.log_history, "probe": probe.moved, "moved": sum(changes)}
    return {**found, **(steps.told() if device else {})}


# -- what stands in for what only GPUs have ------------------------------------------------------------------


def rows_kernel(logits, labels, token_weights, needs_gradient):
    """What ``loss_kernel.rows`` promises, in plain operations."""
    nll, gradient = loss._rows(logits, labels, token_weights, needs_gradient)
    if needs_gradient:
        logits.copy_(gradient)
    return nll


class Liger(torch.autograd.Function):
    """What Liger's fused linear cross-entropy promises to ``LossHead``."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, _, ignored, *others):
        assert (ignored, others) == (-100, (0.0, 0.0, "sum", None, False, torch.float32)) and bias is None
        logits = torch.nn.functional.linear(hidden, weight)
        weights = torch.ones(len(labels), dtype=torch.float32, device=labels.device)
        nll, gradient = loss._rows(logits, labels, weights, True)
        gradient = gradient.to(hidden.dtype)
        ctx.save_for_backward(gradient @ weight, gradient.t() @ hidden)
        return nll.sum(), None

    @staticmethod
    def backward(ctx, grad, _):
        of_hidden, of_weight = ctx.saved_tensors
        return loss.scaled(of_hidden, grad), loss.scaled(of_weight, grad), *[None] * 10


def stand_in() -> Counter:
    """Puts them where the package looks for them; returns how often each was called."""
    calls: Counter = Counter()

    def counted(name, function):
        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    kernel = types.ModuleType("endprompt.training.loss_kernel")
    kernel.rows = counted("triton", rows_kernel)
    liger = types.ModuleType("liger_kernel.ops.fused_linear_cross_entropy")
    liger.LigerFusedLinearCrossEntropyFunction = types.SimpleNamespace(apply=counted("liger", Liger.apply))
    for module in (kernel, liger, types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.ops")):
        sys.modules[module.__name__] = module
    sys.modules["endprompt.training"].loss_kernel = kernel
    loss.agrees = lambda *_: True  # tests/test_loss.py compares the kernel
    loss.GPU_CHUNK_ELEMENTS = 1  # 128 tokens a chunk
    return calls


def measured() -> dict:
    """A step of ``endprompt.planning.step`` as on a GPU, and which lines of walks.FAR it leaves out."""
    own = step._Training.device.fget
    step._Training.device = property(lambda self: {"cuda": pretend.NAME}[own(self)])
    step.SHAPES["tiny"] = (2, 32, 48, 4, 2, 896, 64, True)
    stands = {
        "is_available": lambda: True,
        "get_device_name": lambda: walks.H100,
        "memory_allocated": lambda: 2**30,
        "max_memory_allocated": lambda: 3 * 2**30,
        "reset_peak_memory_stats": lambda: None,
        "Event": walks.Event,
    }
    asked = step.Asked("tiny", "endprompt", 256, 2, "full", 2, 1)
    with pytest.MonkeyPatch.context() as patch, pretend.Device():
        for name, value in stands.items():
            patch.setattr(torch.cuda, name, value)
        found: dict = {}
        seen = walking.lines_of(lambda: found.update(step.measure(asked)))
    missed = {place: walking.missed(place, seen) for place in walks.FAR}
    return {"found": found, "missed": {place: lines for place, lines in missed.items() if lines}}


# -- faults --------------------------------------------------------------------------------------------------


def broken(fault: str):
    """compute_loss of the trainer with a fault in it."""
    before = trainer.WeightedTrainer.compute_loss

    def compute(self, model, inputs, *args, **kwargs):
        if fault.startswith("host "):
            name = fault.removeprefix("host ")
            inputs[name] = inputs[name].cpu()
        if fault == "float32 product":
            head = self.accelerator.unwrap_model(model).get_output_embeddings()
            head.register_forward_pre_hook(lambda module, given: (given[0].float(), *given[1:]))
        found = before(self, model, inputs, *args, **kwargs)
        if fault == "item":
            found.item()
        if fault == "bool" and found > 1e9:
            raise AssertionError
        if fault == "mask":
            found = found + 0 * inputs["shift_weights"][inputs["shift_labels"] >= 0].sum()
        if fault == "new tensor":
            found = found * torch.tensor(1.0, device=found.device)
        return found

    return compute


@contextlib.contextmanager
def on_the_device(case: Case):
    """Inside, the Trainer trains on the device."""
    was = trainer.WeightedTrainer.compute_loss
    trainer.WeightedTrainer.compute_loss = broken(case.fault) if case.fault else was
    own = TrainingArguments.device
    # Its own is asked all the same, as it sets the rest up.
    TrainingArguments.device = property(lambda self: own.fget(self) and torch.device(pretend.NAME, 0))
    # Of all ranks' state; without torch's DDP, which is C++.
    stands = {"device": torch.device(pretend.NAME, 0), "distributed_type": DistributedType.NO}
    for kind in (PartialState, AcceleratorState):
        for name, value in stands.items():
            setattr(kind, name, property(lambda self, value=value: value, lambda *_: None))
    try:
        with pretend.Device() as device:
            yield device
    finally:
        for kind in (PartialState, AcceleratorState):
            for name in stands:
                delattr(kind, name)
        trainer.WeightedTrainer.compute_loss, TrainingArguments.device = was, own


def as_deepspeed_holds_them() -> None:
    """Weights are bf16, and no masters are looked for."""
    precision.loaded = lambda arguments, adapters: torch.bfloat16
    precision.raise_trained = lambda network: None
    precision.verify = lambda *args: None


def main() -> None:
    folder, *names = sys.argv[1:]
    training_settings.set_up_environment()
    pretend.set_up()
    torch.distributed.init_process_group("gloo")
    kept = precision.loaded, precision.raise_trained, precision.verify
    calls = stand_in()
    for number, name in enumerate(names):
        if name == "measure":
            print(f"case {json.dumps({'case': name, **measured()})}", flush=True)
            continue
        case, place = CASES[name], Path(folder) / str(number)
        if case.autocast:
            precision.loaded, precision.raise_trained, precision.verify = kept
        else:
            as_deepspeed_holds_them()
        calls.clear()
        try:
            with on_the_device(case) as device:
                (place / "there").mkdir(parents=True)
                found = {**train(case, place / "there", device), "calls": dict(calls)}
            if not case.fault:
                (place / "here").mkdir()
                found["here"] = train(case, place / "here", None)
        except Exception as error:
            told = "".join(line for line in traceback.format_tb(error.__traceback__) if "/torch/" not in line)
            found = {"error": f"{type(error).__name__}: {error}"[:1000], "trace": told}
        print(f"case {json.dumps({'case': name, **found})}", flush=True)


if __name__ == "__main__":
    main()
