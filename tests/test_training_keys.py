"""The keys of ``train:``: an allowed one has its effect, a refused one would have none, or harm."""

import dataclasses
import functools
import itertools
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import networks
import pytest
import torch
import transformers
from conftest import REPOSITORY, run_main
from training import assert_same, prepared, run, train
from transformers import TrainerCallback, TrainingArguments

from endprompt import BadInput
from endprompt.recipe import schema, training_checks, training_keys, zero_file, zero_section
from endprompt.recipe.batch import batch_shape
from endprompt.recipe.experiment import Experiment
from endprompt.reports.markdown import grid, replaced
from endprompt.rows.collate import Collator
from endprompt.training import checkpoint, loss, watch
from endprompt.training.arguments import set_up_environment, training_arguments
from endprompt.training.run import CHECKPOINTS_KEPT
from endprompt.training.trainer import WeightedTrainer

PAGE = REPOSITORY / "docs/training-keys.md"
ROWS = 12
BASE = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "max_steps": 4,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "report_to": "none",
    "deepspeed": None,
}


class Steps(TrainerCallback):
    """The rows of every step, [micro-batch [row]], and, from outside, what else is to happen at its end."""

    def __init__(self, at_end):
        self.rows, self.trainer, self.at_end = [], None, at_end

    def on_step_end(self, args, state, control, **kwargs):
        self.rows.append([rows.flatten().tolist() for rows, _ in self.trainer.micro_batches])
        self.trainer.micro_batches.clear()
        self.at_end(state, control)


@pytest.fixture(scope="module")
def dataset():
    """Rows of 15 to 26 tokens, with an end prompt."""
    import datasets

    rows = [networks.row(12 + n, 3, 64, 96, seed=n) for n in range(ROWS)]
    return datasets.Dataset.from_list(rows).add_column("row_number", list(range(ROWS)))


@pytest.fixture(scope="module")
def start():
    """The weights that every training begins with."""
    return {
        name: tensor.clone()
        for name, tensor in networks.network(networks.configuration()).state_dict().items()
    }


class Made:
    """Trainers as ``endprompt train`` makes them, on two layers, in this process, which is the only rank."""

    def __init__(self, dataset, start, recipe, folder):
        self.dataset, self.start, self.recipe, self.folder, self.counted = (
            dataset,
            start,
            recipe,
            folder,
            itertools.count(),
        )

    def build(self, unchecked=None, folder=None, at_end=lambda state, control: None, rows=None, **keys):
        """keys: of ``train:``, over BASE; unchecked: others that no check sees; folder: of the run; at_end:
        (state, control) -> None, after each step; rows: of the data set, all unless given."""
        kept = {key: value for key, value in {**BASE, **keys}.items() if value is not ...}
        checked = {**training_checks.check(kept), **(unchecked or {})}
        recipe = self.recipe.model_copy(update={"train": checked})
        folder = folder or self.folder / str(next(self.counted))
        shape = batch_shape(Experiment.of(recipe, "endprompt"))
        arguments = training_arguments(recipe, shape, folder, cuda=False, universal=False)
        network = networks.network(networks.configuration())
        network.load_state_dict(self.start)
        loss.attach(network)
        steps = Steps(at_end)
        marking = checkpoint.MarkComplete(
            checked.get("save_total_limit", CHECKPOINTS_KEPT), {"world_size": 1}
        )
        trainer = WeightedTrainer(
            model=network,
            args=arguments,
            data_collator=Collator(0, 64),
            token_flops=1.0,
            train_dataset=self.dataset.select(range(rows or ROWS)),
            callbacks=[steps, marking],
        )
        steps.trainer = trainer
        return SimpleNamespace(
            trainer=trainer, arguments=arguments, steps=steps, folder=folder, network=network
        )

    def train(self, resume=None, **keys):
        """``build``, and what the training gave: logs, weights, rows of the steps, learning rates."""
        made = self.build(**keys)
        made.trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        made.history = [entry for entry in made.trainer.state.log_history if "loss" in entry]
        made.losses = [entry["loss"] for entry in made.history]
        made.rates = [entry["learning_rate"] for entry in made.history]
        made.logged = [entry["step"] for entry in made.history]
        made.weights = {name: tensor.detach().clone() for name, tensor in made.network.state_dict().items()}
        made.rows = made.steps.rows
        made.checkpoints = sorted(path.name for path in (made.folder / "checkpoints").glob("checkpoint-*"))
        made.optimizer = made.trainer.optimizer.optimizer
        return made

    def moved(self, made) -> float:
        return sum(float((made.weights[name] - tensor).abs().sum()) for name, tensor in self.start.items())


@pytest.fixture(scope="module")
def alone():
    """What accelerate leaves in a process is taken away at the end."""
    from accelerate.state import AcceleratorState

    before = torch.distributed.is_initialized()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    if torch.distributed.is_initialized() and not before:
        torch.distributed.destroy_process_group()


@pytest.fixture
def made(dataset, start, tmp_path, monkeypatch, base, alone):
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "DS_ACCELERATOR",
        "TOKENIZERS_PARALLELISM",
        "TENSORBOARD_LOGGING_DIR",
    ):
        monkeypatch.setenv(name, "")  # so that what is written there is put back afterwards
        monkeypatch.delenv(name)
    set_up_environment()
    path = tmp_path / "r.yaml"
    tree = {
        "model": {"name_or_path": str(base)},
        "lengths": {"physical": 32, "target": 64},
        "data": {"corpus": "x", "tokens": 64},
    }
    path.write_text(json.dumps(tree))
    return Made(dataset, start, schema.load(path), tmp_path)


def same(one, two) -> bool:
    return one.losses == two.losses and all(
        torch.equal(one.weights[name], two.weights[name]) for name in one.weights
    )


# -- allowed ---------------------------------------------------------------------------------------

EFFECTS = {}


def effect(*keys):
    """Of those keys, this is the test."""

    def register(test):
        EFFECTS.update(dict.fromkeys(keys, test))
        return test

    return register


@effect("per_device_train_batch_size")
def _(made, monkeypatch):
    assert [len(rows) for (rows,) in made.train(per_device_train_batch_size=3).rows] == [3] * 4


@effect("gradient_accumulation_steps")
def _(made, monkeypatch):
    assert [len(micro) for micro in made.train(gradient_accumulation_steps=3, max_steps=2).rows] == [3, 3]


@effect("num_train_epochs")
def _(made, monkeypatch):
    assert [len(made.train(max_steps=-1, num_train_epochs=epochs).rows) for epochs in (0.5, 1.5)] == [3, 9]
    assert len(made.train(max_steps=...).rows) == 6, "an epoch, unless said otherwise"


@effect("max_steps")
def _(made, monkeypatch):
    assert [len(made.train(max_steps=steps).rows) for steps in (1, 7)] == [1, 7]


@effect("learning_rate")
def _(made, monkeypatch):
    slow, fast = made.train(learning_rate=1e-4), made.train(learning_rate=1e-2)
    assert slow.rates == [1e-4] * 4 and fast.rates == [1e-2] * 4 and made.moved(fast) > 20 * made.moved(slow)


NEEDED = {
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.3},
    "warmup_stable_decay": {"num_decay_steps": 2},
}


def values(key: str) -> tuple:
    return training_keys.ALLOWED[key].type.__args__


@effect("lr_scheduler_type", "lr_scheduler_kwargs")
def _(made, monkeypatch):
    def rates(name):
        given = {"lr_scheduler_kwargs": NEEDED[name]} if name in NEEDED else {}
        return made.train(
            lr_scheduler_type=name, max_steps=6, warmup_steps=... if name == "constant" else 2, **given
        ).rates

    found = {name: rates(name) for name in values("lr_scheduler_type")}
    assert all(one != other for one, other in itertools.combinations(found.values(), 2)), found
    assert found["constant_with_warmup"] == [0, 5e-3, 1e-2, 1e-2, 1e-2, 1e-2]
    lower, higher = (
        made.train(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": least}).rates
        for least in (1e-3, 5e-3)
    )
    assert lower != higher and min(higher) >= 5e-3 > min(lower)


@effect("warmup_steps")
def _(made, monkeypatch):
    assert made.train(warmup_steps=2).rates == made.train(warmup_steps=0.5).rates == [0, 5e-3, 1e-2, 1e-2]
    assert made.train(warmup_steps=..., max_steps=2).rates == [0, 1e-2 / 20]


@effect("optim")
def _(made, monkeypatch):
    found = {name: made.train(optim=name, max_steps=2) for name in values("optim")}
    kinds = {
        name: (type(one.optimizer).__name__, bool(one.optimizer.defaults.get("fused")))
        for name, one in found.items()
    }
    assert kinds == {
        "adamw_torch": ("AdamW", False),
        "adamw_torch_fused": ("AdamW", True),
        "adafactor": ("Adafactor", False),
        "sgd": ("SGD", False),
        "adagrad": ("Adagrad", False),
        "rmsprop": ("RMSprop", False),
    }
    assert not any(same(one, other) for one, other in itertools.combinations(found.values(), 2))


@effect("optim_args")
def _(made, monkeypatch):
    for name, takes in training_keys.OPTIM_ARGS.items():
        given = {
            key: True if key in ("nesterov", "centered") else 0.25 for key in takes if key != "dampening"
        }
        text = ", ".join(f"{key}={str(value).lower()}" for key, value in given.items())
        one = made.train(optim=name, optim_args=text, max_steps=2)
        assert {key: one.optimizer.defaults[key] for key in given} == given
        assert not same(one, made.train(optim=name, max_steps=2))
    assert (
        made.train(optim="sgd", optim_args="momentum=0.5,dampening=0.5", max_steps=1).optimizer.defaults[
            "dampening"
        ]
        == 0.5
    )


@effect("weight_decay")
def _(made, monkeypatch):
    decayed = made.train(weight_decay=0.5)
    assert [group["weight_decay"] for group in decayed.optimizer.param_groups] == [0.5, 0.0]
    assert not same(decayed, made.train())


@effect("adam_beta1", "adam_beta2", "adam_epsilon")
def _(made, monkeypatch):
    plain = made.train()
    assert plain.optimizer.defaults["betas"] == (0.9, 0.999) and plain.optimizer.defaults["eps"] == 1e-8
    for key, value in (("adam_beta1", 0.5), ("adam_beta2", 0.5), ("adam_epsilon", 1e-2)):
        other = made.train(**{key: value})
        assert value in (*other.optimizer.defaults["betas"], other.optimizer.defaults["eps"]) and not same(
            plain, other
        )


@effect("max_grad_norm")
def _(made, monkeypatch):
    clipped, unclipped = (made.train(optim="sgd", max_grad_norm=most, max_steps=1) for most in (1e-3, 0))
    norm = clipped.history[0]["grad_norm"]
    assert norm > 0.01 and made.moved(clipped) == pytest.approx(made.moved(unclipped) * 1e-3 / norm, rel=0.1)


@effect("bf16")
def _(made, monkeypatch):
    plain, half = made.train(), made.train(bf16=True)
    assert plain.losses != half.losses and all(
        one == pytest.approx(other, rel=3e-2) for one, other in zip(plain.losses, half.losses, strict=True)
    )


@effect("tf32")
def _(made, monkeypatch):
    switched = []
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.enable_tf32", switched.append)
    monkeypatch.setattr("transformers.__version__", "5.23.0")
    made.build(tf32=True), made.build(tf32=False), made.build()
    assert switched == [True, False]


@effect("gradient_checkpointing", "gradient_checkpointing_kwargs")
def _(made, monkeypatch):
    def layers(one):
        return [
            (
                layer.gradient_checkpointing,
                getattr(layer, "_gradient_checkpointing_func", functools.partial(print)).keywords,
            )
            for layer in one.network.model.layers
        ]

    plain, kept, reentrant, unsaid = (
        made.train(**keys)
        for keys in (
            {},
            {"gradient_checkpointing": True},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            {"gradient_checkpointing": ...},
        )
    )
    assert [on for on, _ in layers(plain)] == [False, False]
    assert layers(kept) == layers(unsaid) == [(True, {"use_reentrant": False})] * 2
    assert layers(reentrant) == [(True, {"use_reentrant": True})] * 2
    assert same(plain, kept) and same(plain, reentrant)


@effect("torch_compile", "torch_compile_backend", "torch_compile_mode")
def _(made, monkeypatch):
    monkeypatch.setattr(loss.LossHead, "forward", loss.LossHead.forward)
    monkeypatch.setenv(
        "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", ""
    )  # so that what is written there is taken away afterwards
    monkeypatch.delenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION")

    def plugin(**keys):
        found = made.build(**keys).trainer.accelerator.state.dynamo_plugin
        return found.backend.value.lower(), found.mode, found.use_regional_compilation

    assert plugin()[0] == "no"
    assert plugin(torch_compile=True) == ("inductor", "default", True)
    for backend in values("torch_compile_backend"):
        assert plugin(torch_compile_backend=backend) == (backend, "default", True)
    for mode in values("torch_compile_mode"):
        assert plugin(torch_compile_mode=mode) == ("inductor", mode, True)


@effect("use_liger_kernel", "liger_kernel_config")
def _(made, monkeypatch):
    applied = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: name == "liger_kernel")
    monkeypatch.setattr(
        "transformers.trainer.apply_liger_kernel", lambda model, options: applied.append(options)
    )
    ours = {"fused_linear_cross_entropy": False, "cross_entropy": False}
    for keys in (
        {},
        {"use_liger_kernel": True},
        {"use_liger_kernel": True, "liger_kernel_config": {"swiglu": False}},
    ):
        made.train(max_steps=1, **keys)
    assert applied == [ours, {**ours, "swiglu": False}]


@effect("torch_empty_cache_steps")
def _(made, monkeypatch):
    emptied = []
    monkeypatch.setattr("transformers.trainer.clear_device_cache", lambda: emptied.append(1))
    made.train(torch_empty_cache_steps=2), made.train()
    assert len(emptied) == 2


@effect("logging_strategy")
def _(made, monkeypatch):
    assert made.train(logging_strategy="epoch", logging_steps=..., max_steps=9).logged == [6, 9]
    assert made.train(logging_strategy="steps").logged == [1, 2, 3, 4]


@effect("logging_steps", "logging_first_step")
def _(made, monkeypatch):
    assert made.train(logging_steps=2).logged == made.train(logging_steps=0.5).logged == [2, 4]
    assert made.train(logging_steps=2, logging_first_step=True).logged == [1, 2, 4]


@effect("log_level", "log_level_replica", "log_on_each_node")
def _(made, monkeypatch):
    before = transformers.logging.get_verbosity()
    levels = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}

    def verbosity(**keys):
        made.build(**keys)
        return transformers.logging.get_verbosity()

    try:
        assert {name: verbosity(log_level=name) for name in levels} == levels
        transformers.logging.set_verbosity(30)
        assert verbosity(log_level="passive") == 30
        one = {"log_level": "info", "log_level_replica": "error"}
        # The first rank of the second node, then the second one there.
        monkeypatch.setattr(TrainingArguments, "process_index", 2)
        monkeypatch.setattr(TrainingArguments, "local_process_index", 0)
        assert verbosity(**one) == 20 and verbosity(**one, log_on_each_node=False) == 40
        monkeypatch.setattr(TrainingArguments, "local_process_index", 1)
        assert verbosity(**one) == 40 and verbosity(**{**one, "log_level_replica": "critical"}) == 50
    finally:
        transformers.logging.set_verbosity(before)


@effect("include_num_input_tokens_seen")
def _(made, monkeypatch):
    def seen(which):
        found = made.train(
            include_num_input_tokens_seen=which, max_steps=1, train_sampling_strategy="sequential"
        )
        return found.history[0].get("num_input_tokens_seen")

    assert [seen(which) for which in ("no", False)] == [None, None]
    assert [seen(which) for which in ("all", True)] == [32, 32], "two rows, the shorter one padded to 16"
    assert seen("non_padding") == 31


@effect("disable_tqdm")
def _(made, monkeypatch):
    def names(**keys):
        return {type(callback).__name__ for callback in made.build(**keys).trainer.callback_handler.callbacks}

    assert "PrinterCallback" in names(disable_tqdm=True) and "ProgressCallback" in names(disable_tqdm=False)
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: False, write=len, flush=str))
    assert "PrinterCallback" in names()


@effect("report_to")
def _(made, monkeypatch):
    def written(**keys):
        return len(list((made.train(max_steps=1, **keys).folder / "logs").rglob("events*")))

    assert [written(report_to=to) for to in ("tensorboard", ["tensorboard"], "none", ["none"], [])] == [
        1,
        1,
        0,
        0,
        0,
    ]
    assert written(report_to=...) == 1


@effect("save_strategy", "save_steps", "save_total_limit")
def _(made, monkeypatch):
    assert made.train(save_steps=1, save_total_limit=None).checkpoints == [
        f"checkpoint-{step}" for step in (1, 2, 3, 4)
    ]
    assert made.train(save_steps=0.5, save_total_limit=None, save_strategy="steps").checkpoints == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    assert made.train(save_steps=3, save_total_limit=1).checkpoints == ["checkpoint-4"]
    assert made.train(save_steps=1).checkpoints == ["checkpoint-3", "checkpoint-4"]


@effect("full_determinism")
def _(made, monkeypatch):
    # The environment that it writes, put back afterwards.
    for name in (
        "CUDA_LAUNCH_BLOCKING",
        "CUBLAS_WORKSPACE_CONFIG",
        "ASCEND_LAUNCH_BLOCKING",
        "HCCL_DETERMINISTIC",
        "FLASH_ATTENTION_DETERMINISTIC",
    ):
        monkeypatch.setenv(name, "")
    try:
        made.build()
        assert not torch.are_deterministic_algorithms_enabled()
        made.build(full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


@effect("seed", "data_seed")
def _(made, monkeypatch):
    def order(**keys):
        return made.train(**keys).rows

    assert order(seed=1) == order(seed=1) != order(seed=2)
    assert order(seed=1, data_seed=2) == order(seed=2) and torch.initial_seed() == 2
    made.build(seed=1, data_seed=2)
    assert torch.initial_seed() == 1, "dropout and adapters follow seed alone"
    assert made.build().arguments.seed == made.recipe.data.seed == 0


@effect("dataloader_num_workers")
def _(made, monkeypatch):
    assert made.build(dataloader_num_workers=2).trainer.get_train_dataloader().num_workers == 2
    assert same(made.train(max_steps=2), made.train(max_steps=2, dataloader_num_workers=1)), (
        "the same rows in the same order"
    )


@effect("dataloader_pin_memory")
def _(made, monkeypatch):
    # As on a GPU; on a CPU transformers switches it off.
    recipe = made.recipe.model_copy(
        update={"train": training_checks.check({"bf16": False, "dataloader_pin_memory": False})}
    )
    assert training_arguments(recipe, (1, 1), made.folder, True, False).dataloader_pin_memory is False
    recipe.train.pop("dataloader_pin_memory")
    assert training_arguments(recipe, (1, 1), made.folder, True, False).dataloader_pin_memory is True


@effect("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context")
def _(made, monkeypatch):
    def loader(**keys):
        return made.build(dataloader_num_workers=1, **keys).trainer.get_train_dataloader()

    assert not loader().persistent_workers and loader(dataloader_persistent_workers=True).persistent_workers
    assert loader(dataloader_prefetch_factor=5).prefetch_factor == 5
    for name in values("dataloader_multiprocessing_context"):
        assert (
            loader(dataloader_multiprocessing_context=name).multiprocessing_context.get_start_method() == name
        )


@effect("train_sampling_strategy")
def _(made, monkeypatch):
    assert made.train(train_sampling_strategy="sequential").rows == [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]]
    assert (
        made.train(train_sampling_strategy="random").rows
        == made.train().rows
        != [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]]
    )


@effect("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers")
def _(made, monkeypatch):
    def handler(**keys):
        return made.build(**keys).trainer.accelerator.ddp_handler

    for value in (True, False):
        assert handler(ddp_find_unused_parameters=value).find_unused_parameters is value
        assert handler(ddp_broadcast_buffers=value).broadcast_buffers is value
    assert handler(ddp_bucket_cap_mb=7).bucket_cap_mb == 7


@effect("ddp_timeout")
def _(made, monkeypatch):
    set_to = []
    monkeypatch.setattr(
        "torch.distributed.distributed_c10d._set_pg_timeout",
        lambda span, group: set_to.append(span.total_seconds()),
    )
    one = made.build(ddp_timeout=7)
    watching = watch.Watch(SimpleNamespace(listen=lambda: None), made.folder)
    watching.on_train_begin(one.arguments, SimpleNamespace(compute_steps=lambda *_: None, max_steps=1), None)
    assert set(set_to) == {7} and one.arguments.ddp_timeout_delta.total_seconds() == 7


def filled(made, options, **keys):
    """DeepSpeed's options as they are once transformers has put the recipe's values in."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    schema.load(recipe_with(made, options, **keys))
    arguments = made.build(**{**keys, "deepspeed": None}).arguments
    found = HfTrainerDeepSpeedConfig(
        zero_file.filled(options, 1)
    )  # as long as it is there, models are made under ZeRO-3
    found.trainer_config_process(arguments)
    return found


def recipe_with(made, options, **keys) -> Path:
    path = made.folder / "zero.yaml"
    tree = {
        "model": {"name_or_path": "x"},
        "lengths": {"physical": 32, "target": 64},
        "data": {"corpus": "x", "tokens": 64},
        "train": {**keys, "deepspeed": options},
    }
    path.write_text(json.dumps(tree))
    return path


@effect("deepspeed")
def _(made, monkeypatch):
    found = filled(
        made,
        {"zero_optimization": {"stage": 3}},
        max_grad_norm=0.5,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
    ).config
    assert (
        found["gradient_clipping"] == 0.5
        and found["train_micro_batch_size_per_gpu"] == 3
        and found["gradient_accumulation_steps"] == 2
    )
    assert found["zero_optimization"][zero_file.GATHER] is True and found["bf16"] == {"enabled": False}
    assert (
        zero_file.GATHER not in filled(made, {"zero_optimization": {"stage": 2}}).config["zero_optimization"]
    )
    own = filled(
        made,
        {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}},
        learning_rate=0.5,
        adam_beta1=0.25,
    ).config["optimizer"]
    assert own == {
        "type": "AdamW",
        "params": {"lr": 0.5, "betas": [0.25, 0.999], "eps": 1e-8, "weight_decay": 0.0},
    }


SHOWN = {test: "-".join(key for key in EFFECTS if EFFECTS[key] is test) for test in EFFECTS.values()}


@pytest.mark.parametrize("shown", SHOWN, ids=SHOWN.values())
def test_an_allowed_key_has_its_effect(shown, made, monkeypatch):
    shown(made, monkeypatch)


def test_every_key_of_transformers_was_looked_at():
    """transformers before 5.23 has fewer."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert known == training_keys.known()
    assert (
        known <= set(training_keys.ALLOWED) | set(training_keys.REFUSED)
        and set(EFFECTS) == set(training_keys.ALLOWED) <= known
    )
    assert not set(training_keys.ALLOWED) & (set(training_keys.REFUSED) | set(training_keys.OURS))


def test_a_key_that_nobody_looked_at_is_refused(monkeypatch):
    monkeypatch.setattr(training_keys, "known", lambda: frozenset({"brand_new"}))
    with pytest.raises(BadInput, match="train.brand_new: transformers knows it, but .* not looked at"):
        training_checks.check({"brand_new": 1})
    with pytest.raises(BadInput, match="train.seed: the installed transformers does not know it"):
        training_checks.check({"seed": 1})
    with pytest.raises(BadInput, match="unknown key train.brand_newer"):
        training_checks.check({"brand_newer": 1})


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", training_keys.REFUSED)
def test_a_refused_key_is_named_with_the_reason(key):
    for value in (True, 0, None, "x", [1]):
        with pytest.raises(BadInput) as caught:
            training_checks.check({key: value})
        assert (
            str(caught.value) == f"train.{key} is not for recipes ({training_keys.REFUSED[key]}); remove it"
        )


REFUSED_VALUES = [
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "nothing is evaluated"),
    ({"lr_scheduler_type": "greedy"}, "nothing is evaluated"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
    ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, "cycles"),
    ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "two"}}, "transformers refuses"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}, "lr_end"),
    (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": -1e-5}},
        "would be -1e-05 at some step",
    ),
    ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "constant_with_warmup reads none of it"),
    ({"lr_scheduler_kwargs": "{}"}, "dictionary"),
    ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "has no warm-up"),
    ({"warmup_steps": -1}, "greater than or equal to 0"),
    ({"warmup_steps": 2.5}, "whole number of steps"),
    ({"save_steps": 2.5}, "whole number of steps"),
    ({"logging_steps": 1.5}, "whole number of steps"),
    ({"save_steps": -1}, "greater than 0"),
    ({"max_steps": 0}, "0 steps"),
    ({"max_steps": -2}, "greater than or equal to -1"),
    ({"max_steps": 5, "num_train_epochs": 1}, "keep one"),
    ({"num_train_epochs": 0}, "greater than 0"),
    ({"optim": "lomo"}, "not tried"),
    ({"optim": "paged_adamw_8bit"}, "not tried"),
    ({"optim": "galore_adamw"}, "not tried"),
    ({"optim": "sgd", "deepspeed": "x.json"}, "train.optim: DeepSpeed hands sgd"),
    ({"optim": "sgd", "adam_beta1": 0.5}, "sgd does not read it"),
    ({"optim_args": "momentum=0.5"}, "adamw_torch does not read 'momentum'; it takes none"),
    ({"optim": "sgd", "optim_args": "weight_decay=0.5"}, "does not read 'weight_decay'; it takes momentum"),
    ({"optim": "sgd", "optim_args": "momentum"}, "a number from 0 on"),
    ({"optim": "sgd", "optim_args": "momentum=-1"}, "a number from 0 on"),
    ({"optim": "sgd", "optim_args": "nesterov=maybe"}, "true, false"),
    ({"optim": "sgd", "optim_args": "nesterov=true"}, "transformers refuses it: Nesterov"),
    ({"optim": "sgd", "optim_args": ""}, "does not read ''"),
    ({"adam_beta1": 1.0}, "less than 1"),
    ({"adam_epsilon": 0}, "greater than 0"),
    ({"weight_decay": -0.1}, "greater than or equal to 0"),
    ({"max_grad_norm": -1}, "greater than or equal to 0"),
    ({"save_strategy": "no"}, "what a run goes on from"),
    ({"save_strategy": "epoch"}, "what a run goes on from"),
    ({"save_strategy": "best"}, "what a run goes on from"),
    ({"save_total_limit": 0}, "greater than 0"),
    ({"logging_strategy": "no"}, "no loss"),
    ({"logging_strategy": "epoch", "logging_steps": 5}, "keep one"),
    ({"report_to": "wandb"}, "not tried"),
    ({"report_to": ["tensorboard", "wandb"]}, "train.report_to"),
    ({"report_to": "all"}, "not tried"),
    ({"report_to": None}, "train.report_to"),
    ({"train_sampling_strategy": "group_by_length"}, "go on with other rows"),
    ({"dataloader_persistent_workers": True}, "set dataloader_num_workers"),
    ({"dataloader_prefetch_factor": 2}, "set dataloader_num_workers"),
    ({"dataloader_multiprocessing_context": "spawn"}, "set dataloader_num_workers"),
    ({"dataloader_num_workers": -1}, "greater than or equal to 0"),
    ({"seed": -1}, "greater than or equal to 0"),
    ({"seed": 2**32}, "less than 4294967296"),
    ({"data_seed": -1}, "greater than or equal to 0"),
    ({"ddp_bucket_cap_mb": 25, "deepspeed": "x.json"}, "DeepSpeed replaces"),
    ({"ddp_timeout": 0}, "greater than 0"),
    ({"torch_compile": False, "torch_compile_backend": "eager"}, "keep one"),
    ({"torch_compile_backend": "magic"}, "not tried"),
    ({"torch_compile_mode": "reduce-overhead"}, "CUDA graphs"),
    ({"gradient_checkpointing_kwargs": {"offload": True}}, "use_reentrant alone"),
    ({"liger_kernel_config": {"swiglu": True}}, "set use_liger_kernel"),
    ({"use_liger_kernel": True, "liger_kernel_config": {"cross_entropy": True}}, "Liger's loss"),
    ({"log_level": "loud"}, "train.log_level"),
    ({"include_num_input_tokens_seen": "some"}, "train.include_num_input_tokens_seen"),
]


@pytest.mark.parametrize(
    "keys, telling", REFUSED_VALUES, ids=[json.dumps(keys) for keys, _ in REFUSED_VALUES]
)
def test_a_value_without_its_effect_is_refused(keys, telling):
    with pytest.raises(BadInput, match="^train.") as caught:
        training_checks.check(keys)
    assert telling in str(caught.value) and "\n" not in str(caught.value)


def test_found_when_the_recipe_is_read(recipe_file, tmp_path):
    """By a command that trains nothing, and before it writes anything."""
    for key in (
        "label_smoothing_factor=0.1",
        "save_only_model=true",
        "lr_scheduler_type=greedy",
        "deepspeed.gradient_clipping=2",
    ):
        path = recipe_file(train={"deepspeed": {"zero_optimization": {"stage": 2}}})
        code, out, error = run_main(
            "prepare", path, "endprompt", "--out", tmp_path / "out", "--set", f"train.{key}"
        )
        assert (
            code == 2
            and not out
            and error.count("\n") == 1
            and key.partition("=")[0].rpartition(".")[2] in error
        )
        assert not (tmp_path / "out").exists()


USELESS = [
    {"label_smoothing_factor": 0.5},
    {"average_tokens_across_devices": False},
    {"run_name": "a"},
    {"project": "a"},
    {"eval_steps": 1},
    {"length_column_name": "text_length"},
    {"include_for_metrics": ["loss"]},
    {"prediction_loss_only": True},
    {"eval_accumulation_steps": 1},
    {"per_device_eval_batch_size": 1},
    {"eval_delay": 1},
    {"metric_for_best_model": "loss"},
    {"greater_is_better": True},
    {"restore_callback_states_from_checkpoint": True},
    {"optim_target_modules": ["q_proj"]},
    {"optim_args": "momentum=0.5"},
    {"lr_scheduler_kwargs": {"num_cycles": 7}},
    {"logging_nan_inf_filter": True},
    {"use_cpu": False},
    {"batch_eval_metrics": True},
]


@pytest.mark.slow  # facts about transformers, which change with its version
@pytest.mark.parametrize("keys", USELESS, ids=lambda keys: next(iter(keys)))
def test_what_is_refused_as_useless_is(keys, made):
    with pytest.raises(BadInput):
        training_checks.check(keys)
    assert same(made.train(unchecked=keys), made.train())


def test_useless_beside_another():
    assert {key for keys, telling in REFUSED_VALUES for key in keys if "does not read" in telling} >= {
        "adam_beta1",
        "optim_args",
    }


@pytest.mark.slow  # as above
@pytest.mark.parametrize(
    "beside, keys",
    [
        ({"optim": "sgd"}, {"adam_beta1": 0.1}),
        ({"optim": "sgd"}, {"optim_args": "weight_decay=0.9"}),
        ({"optim": "adagrad"}, {"adam_epsilon": 0.1}),
        ({"lr_scheduler_type": "constant", "warmup_steps": ...}, {"warmup_steps": 3}),
        ({}, {"num_train_epochs": 9}),
        ({"lr_scheduler_type": "constant", "warmup_steps": ...}, {"lr_scheduler_kwargs": {"num_cycles": 3}}),
        ({}, {"liger_kernel_config": {"swiglu": True}}),
        ({"logging_strategy": "epoch", "logging_steps": ...}, {"logging_steps": 3}),
    ],
)
def test_what_is_refused_beside_another_does_nothing_there(beside, keys, made):
    assert same(made.train(**beside), made.train(**beside, unchecked=keys))
    with pytest.raises(BadInput):
        training_checks.check(
            {**{key: value for key, value in {**BASE, **beside}.items() if value is not ...}, **keys}
        )


# -- what would go wrong ---------------------------------------------------------------------------


def resumed(made, ended=3, **options):
    """An undisturbed run of twice ``ended`` steps, and one that was ended half-way and went on from there."""
    options |= {"max_steps": 2 * ended, "warmup_steps": ended + 1, "save_steps": ended}
    whole = made.train(**options)

    def end(state, control):
        control.should_training_stop = state.global_step == ended

    folder = made.folder / "ended"
    made.train(folder=folder, at_end=end, **options)
    return whole, made.train(folder=folder, resume=folder / f"checkpoints/checkpoint-{ended}", **options)


@pytest.mark.parametrize(
    "optim",
    [
        optim if optim.startswith("adamw") else pytest.param(optim, marks=pytest.mark.slow)
        for optim in values("optim")
    ],
)
def test_going_on_gives_the_weights_of_an_undisturbed_run(made, optim):
    whole, other = resumed(made, optim=optim)
    assert whole.rows[3:] == other.rows and whole.rates[3:] == other.rates[-3:]
    assert_same(whole.weights, other.weights, tolerance=0)


def test_save_only_model_would_begin_adam_and_the_warm_up_anew(made):
    whole, other = resumed(made, unchecked={"save_only_model": True})
    assert (
        other.rates[-3:] == whole.rates[:3] != whole.rates[3:]
        and other.optimizer.state_dict()["state"][0]["step"] == 3
    )
    assert not same(whole, other)


def test_ignore_data_skip_would_train_on_the_same_rows_again(made):
    whole, other = resumed(made, unchecked={"ignore_data_skip": True})
    assert other.rows == whole.rows[:3] != whole.rows[3:]


@pytest.mark.parametrize("strategy", ["group_by_length", "random", "sequential"])
def test_grouping_by_length_would_go_on_with_other_rows(made, strategy):
    """In the second epoch, of 6 steps."""
    whole, other = resumed(made, ended=8, unchecked={"train_sampling_strategy": strategy})
    assert (other.rows == whole.rows[8:]) is (strategy in values("train_sampling_strategy"))


def test_dropping_the_last_batch_would_leave_rows_out(made):
    assert made.train(max_steps=..., rows=5).rows[-1] != []
    seen = [
        set(itertools.chain(*itertools.chain(*made.train(max_steps=..., rows=5, unchecked=keys).rows)))
        for keys in ({}, {"dataloader_drop_last": True})
    ]
    assert len(seen[0]) == 5 and len(seen[1]) == 4


def test_saving_by_epoch_would_write_over_a_checkpoint_that_is_marked(made, monkeypatch):
    """After a stop in the middle of an epoch: a kill then leaves a marked folder with half a file."""
    saved = []
    monkeypatch.setattr(
        checkpoint.MarkComplete,
        "on_save",
        lambda self, args, state, control, **kwargs: saved.append(state.global_step),
    )

    def stop(state, control):
        if state.global_step == 2:
            control.should_save = control.should_training_stop = True

    made.train(at_end=stop)
    assert saved == [2]
    made.train(at_end=stop, unchecked={"save_strategy": "epoch"})
    assert saved == [2, 2, 2]
    assert made.train(unchecked={"save_strategy": "no"}).checkpoints == []


def test_float16_would_lose_gradients_before_the_loss_scale(made):
    """The scale is to lift them, but they are formed before it is known."""
    generator = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(8, 4, generator=generator), torch.randn(3, 4, generator=generator)
    labels, weights = torch.tensor([1, 2, 3]), torch.full((3,), 1e-8)

    def gradient(dtype, scale):
        leaf = hidden.to(dtype).detach().requires_grad_()
        total, _ = loss.chunked_linear_cross_entropy(leaf, weight.to(dtype), labels, weights)
        (total * scale).backward()
        return leaf.grad.float()

    assert gradient(torch.float32, 2**15).abs().max() > 1e-5
    for scale in (2**15, 2**16):  # with the second torch begins
        assert gradient(torch.float16, scale).abs().max() == 0
    torch.testing.assert_close(
        gradient(torch.bfloat16, 2**16), gradient(torch.float32, 2**16), rtol=0.1, atol=1e-5
    )


def test_neftune_s_noise_would_depend_on_padding(made):
    """The same row alone, and beside a longer one."""
    from transformers.integrations.neftune import activate_neftune

    embed = networks.network(networks.configuration()).train()
    activate_neftune(embed, 5.0)
    ids = torch.ones(1, 16, dtype=torch.int64)
    table = embed.model.embed_tokens
    largest = [
        float((table(torch.nn.functional.pad(ids, (0, more))) - table.weight[ids[0, 0]])[0, :16].abs().max())
        for more in (0, 48)
    ]
    assert largest[0] == pytest.approx(2 * largest[1], rel=0.1)


# -- DeepSpeed's file ------------------------------------------------------------------------------

STAGE = {"zero_optimization": {"stage": 3}}
ADAMW = {"type": "AdamW", "params": {"lr": "auto"}}
ZERO = [
    ({}, {}, "zero_optimization is missing"),
    ({**STAGE, "gradient_cliping": 1.0}, {}, "'gradient_cliping' is unknown", "or write gradient_clipping"),
    ({**STAGE, "scheduler": {"type": "WarmupLR"}}, {}, "scheduler would go before train.lr_scheduler_type"),
    ({**STAGE, "curriculum_learning": {"enabled": True}}, {}, "'curriculum_learning' is unknown"),
    *(
        ({**STAGE, name: 8}, {"per_device_train_batch_size": 8}, f'{name} is 8; write "auto"')
        for name in zero_file.BATCH
    ),
    ({**STAGE, "gradient_clipping": 0.5}, {}, "gradient_clipping is 0.5, and train.max_grad_norm 1"),
    ({**STAGE, "data_types": "bf16"}, {}, "data_types may hold grad_accum_dtype alone"),
    (
        {**STAGE, "data_types": {"grad_accum_dtype": ["fp32"]}},
        {},
        "data_types may hold grad_accum_dtype alone",
    ),
    ({**STAGE, "data_types": {"grad_accum": "fp32"}}, {}, "data_types may hold grad_accum_dtype alone"),
    (
        {**STAGE, "bf16": {"bf16_master_weights_and_grads": True}},
        {},
        "bf16.bf16_master_weights_and_grads keeps no",
    ),
    (
        {**STAGE, "gradient_clipping": 1.0},
        {"max_grad_norm": 0.5},
        "gradient_clipping is 1.0, and train.max_grad_norm 0.5",
    ),
    ({**STAGE, "bf16": {"enabled": True}}, {"bf16": False}, "bf16.enabled is True, and train.bf16 False"),
    ({**STAGE, "bf16": {"enabled": False}}, {"bf16": True}, "bf16.enabled is False, and train.bf16 True"),
    ({**STAGE, "bf16": {"enabled": 1}}, {}, 'bf16.enabled is 1; write "auto"'),
    ({**STAGE, "bf16": True}, {}, "bf16 is no mapping"),
    ({**STAGE, "fp16": {"enabled": True}}, {}, "fp16 is enabled"),
    ({"zero_optimization": {"stage": 3, zero_file.GATHER: False}}, {}, "no model to save"),
    (
        {**STAGE, "checkpoint": {"use_node_local_storage": True}},
        {},
        "checkpoints must lie where all nodes see them",
    ),
    ({**STAGE, "optimizer": {"type": "OneBitAdam"}}, {}, "must hold type AdamW"),
    ({**STAGE, "optimizer": "AdamW"}, {}, "must hold type AdamW"),
    (
        {**STAGE, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
        {},
        "optimizer.params.lr is 0.001, and train.learning_rate 2e-05",
    ),
    (
        {**STAGE, "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}},
        {},
        "optimizer.params.betas is [0.9, 0.95], and train.adam_beta1 0.9",
    ),
    (
        {**STAGE, "optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}},
        {},
        "optimizer.params.adam_w_mode was not tried",
    ),
    ({**STAGE, "optimizer": ADAMW}, {"weight_decay": 0.1}, "shrink norms and biases"),
]


def zero(stage=3, **more):
    return {"zero_optimization": {"stage": stage, **more}}


def offloaded(stage=3, **more):
    return zero(stage, offload_optimizer=more)


INSIDE = "zero_optimization."
SIZE = 'must be a whole number above 0 or "auto"'
NESTED = [
    (zero(ofload_optimizer={"device": "cpu"}), INSIDE + "ofload_optimizer is unknown", "write offload_opt"),
    (zero(2, algather_bucket_size=1), "algather_bucket_size is unknown", "or write allgather_bucket_size"),
    (zero(nonsense=None), INSIDE + "nonsense is unknown to DeepSpeed; remove it"),
    *(
        (zero(**{name: value}), f'{INSIDE}{name} must be a mapping, such as {{"device": "cpu"}}')
        for name in zero_section.OFFLOADS
        for value in ("cpu", True, ["cpu"], "auto")
    ),
    (offloaded(device="CPU"), INSIDE + "offload_optimizer.device must be one of none, cpu, nvme", "'CPU'"),
    (offloaded(device=["cpu"]), INSIDE + "offload_optimizer.device must be one of none, cpu, nvme"),
    (offloaded(pin_memory=True), INSIDE + "offload_optimizer.device must be one of", "and is missing"),
    (offloaded(device="nvme"), INSIDE + "offload_optimizer.nvme_path is missing"),
    (offloaded(device="nvme", nvme_path=3), INSIDE + "offload_optimizer.nvme_path must be text"),
    (
        offloaded(device="cpu", pinmemory=True),
        INSIDE + "offload_optimizer.pinmemory is unknown",
        "pin_memory",
    ),
    (offloaded(device="cpu", ratio=1.5), "offload_optimizer.ratio must be a number from 0 on up to 1"),
    (offloaded(2, device="cpu", ratio=0.5), "offload_optimizer.ratio is of stage 3, and this is stage 2"),
    (offloaded(0, device="cpu"), INSIDE + "offload_optimizer does nothing at stage 0; take stage 1"),
    (
        zero(2, offload_param={"device": "cpu"}),
        INSIDE + "offload_param does nothing at stage 2; take stage 3",
    ),
    *((zero(reduce_bucket_size=value), SIZE) for value in ("large", None, 0, True, 1.5, math.inf, {}, "1e9")),
    (zero(stage3_max_live_parameters=-1), "stage3_max_live_parameters must be a whole number from 0 on"),
    (zero(2, allgather_bucket_size=None), "allgather_bucket_size must be a whole number from 0 on (given: N"),
    (zero(overlap_comm="yes"), INSIDE + "overlap_comm must be true or false"),
    (zero(contiguous_gradients=None), INSIDE + "contiguous_gradients must be true or false"),
    (zero(sub_group_size="auto"), 'sub_group_size is "auto", and nothing fills it in'),
    (zero(leaf_module={"classes": [3]}), "leaf_module.classes must be a list of names"),
    (zero(leaf_module="auto"), 'leaf_module is "auto"'),
    (zero(cpu_offload=True), INSIDE + "cpu_offload is another name of offload_optimizer"),
    (zero(max_live_parameters=1), "max_live_parameters is another name of stage3_max_live_parameters"),
    (zero(gather_16bit_weights_on_model_save=False), f"is another name of {zero_file.GATHER}; write that"),
    (zero(stage3_gather_fp16_weights_on_model_save=True), f"is another name of {zero_file.GATHER}"),
    (zero(2, compute_grad_norm=False), INSIDE + "compute_grad_norm is false, and the guard"),
    (zero(2, zenflow={"topk_ratio": 0.1}), INSIDE + "zenflow makes steps of earlier gradients"),
    *((zero() | {"wall_clock_breakdown": value}, "wall_clock_breakdown") for value in ("auto", 1, "no")),
    (zero() | {"communication_data_type": "fp8"}, "communication_data_type must be one of fp16, bf16, fp32"),
    (zero() | {"steps_per_print": 0}, "steps_per_print must be a whole number above 0"),
    (zero() | {"comms_logger": {"enable": True}}, "comms_logger.enable is unknown", "or write enabled"),
    (zero() | {"comms_logger": None}, "comms_logger must be a mapping of enabled"),
    (zero() | {"flops_profiler": True}, "flops_profiler must be a mapping of enabled"),
    (zero() | {"flops_profiler": {"enabled": "auto"}}, 'flops_profiler.enabled is "auto"'),
    (zero() | {"aio": {"blocksize": 1}}, "aio.blocksize is unknown", "or write block_size"),
    (
        zero() | {"checkpoint": {"tag_validation": "never"}},
        "tag_validation must be one of Ignore, Warn, Fail",
    ),
    (zero() | {"checkpoint": {"parallel_write": True}}, "parallel_write must be a mapping of pipeline_stage"),
    (zero() | {"checkpoint": {"load_universal": True}}, "checkpoint.load_universal is found out"),
    (zero() | {"bf16": {"enable": True}}, "bf16.enable is unknown to DeepSpeed", "or write enabled"),
    (zero() | {"fp16": {"loss_scale_window": "long"}}, "fp16.loss_scale_window must be a whole number"),
    (zero() | {"optimizer": {"type": "AdamW", "params": {"torch_adam": "auto"}}}, "torch_adam must be"),
]
ZERO += [(options, {}, *telling) for options, *telling in NESTED]


@pytest.mark.parametrize("options, keys, telling", [(case[0], case[1], case[2:]) for case in ZERO])
def test_a_zero_file_that_contradicts_the_recipe(made, options, keys, telling):
    for given in (options, made.folder / "zero.json"):
        (made.folder / "zero.json").write_text(json.dumps(options))
        with pytest.raises(BadInput) as caught:
            schema.load(recipe_with(made, given if given is options else str(given), **keys))
        assert all(word in str(caught.value) for word in ("train.deepspeed: ", *telling)) and "\n" not in str(
            caught.value
        )


@pytest.mark.parametrize(
    "options, keys",
    [
        ({**STAGE, "gradient_clipping": 0.5}, {"max_grad_norm": 0.5}),
        ({**STAGE, "bf16": {"enabled": True}}, {"bf16": True}),
        ({**STAGE, "bf16": {"enabled": True}}, {}),
        ({**STAGE, "fp16": {"enabled": False}}, {}),
        ({**STAGE, "steps_per_print": 10, "zero_allow_untested_optimizer": True}, {}),
        (zero(stage3_max_live_parameters=1e9, reduce_bucket_size="auto", overlap_comm=None), {}),
        (zero(offload_optimizer={"device": "nvme", "nvme_path": "/nvme", "ratio": 0.5}), {}),
        (zero(2, offload_optimizer={"device": "cpu", "pin_memory": False}), {}),
        (zero(2, offload_param={"device": "none"}, leaf_module={"names": "mlp"}), {}),
        (STAGE | {"wall_clock_breakdown": None, "aio": {"block_size": 1048576, "use_gds": False}}, {}),
        (STAGE | {"flops_profiler": {"enabled": False, "module_depth": -1, "output_file": None}}, {}),
        (STAGE | {"comms_logger": {"enabled": False, "prof_ops": ["all_reduce"]}}, {}),
        (
            STAGE | {"checkpoint": {"tag_validation": "ignore", "parallel_write": {"pipeline_stage": True}}},
            {},
        ),
        (STAGE | {"communication_data_type": "fp32", "bf16": {"check_grad_overflow": True}}, {}),
        (
            {**STAGE, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.5]}}},
            {"learning_rate": 1e-3, "adam_beta2": 0.5},
        ),
    ],
)
def test_a_zero_file_that_agrees(made, options, keys):
    assert schema.load(recipe_with(made, options, **keys)).deepspeed == options
    assert filled(made, options, **keys).mismatches == (
        []
        if options.get("bf16") != {"enabled": True} or keys
        else ["- ds bf16.enabled=True vs hf bf16|bf16_full_eval=False"]
    )


def test_the_names_are_those_of_the_deepspeed_that_is_installed(monkeypatch):
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    for kind in (DeepSpeedZeroConfig, DeepSpeedBF16Config, DeepSpeedZeroOffloadOptimizerConfig):
        known = zero_section.sections()[kind.__name__]
        plain = {name for name, option in known.items() if option.instead is None}
        assert set(known) == {*kind.model_fields, *plain}
        old = {name for name, field in kind.model_fields.items() if field.json_schema_extra}
        assert plain == {field.alias or name for name, field in kind.model_fields.items() if name not in old}
    # Without it nothing trains, and other commands say of it what they can.
    monkeypatch.setattr(zero_section.importlib.util, "find_spec", lambda name: None)
    zero_section.sections.cache_clear()
    try:
        zero_section.check_zero({"stage": 3, "anything": 1}, None)
    finally:
        zero_section.sections.cache_clear()


@pytest.mark.parametrize(
    "section",
    [
        {"ofload_optimizer": {"device": "cpu"}},
        {"reduce_bucket_size": "large"},
        {"reduce_bucket_size": None},
        {"reduce_bucket_size": 0},
        {"offload_optimizer": "cpu"},
        {"offload_optimizer": {"device": "CPU"}},
        {"stage3_max_live_parameters": "1e9"},
    ],
)
def test_deepspeed_would_end_with_what_is_refused(section):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert DeepSpeedZeroConfig(stage=3).stage == 3
    with pytest.raises(ValueError):
        DeepSpeedZeroConfig(stage=3, **section)


@pytest.mark.parametrize("command", ["plan", "doctor", "train"])
def test_every_command_says_so_before_it_begins(recipe_file, tmp_path, command):
    path = recipe_file(train={"deepspeed": zero(offload_optimizer="cpu")})
    code, _, error = run_main(command, path, "endprompt", "--out", tmp_path / "out")
    assert code == 2 and "zero_optimization.offload_optimizer must be a mapping" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_null_that_offloads_nothing_is_left_out():
    """accelerate asks it for its device."""
    given = zero(offload_optimizer=None, offload_param=None)
    assert not {*zero_section.OFFLOADS} & {*zero_file.filled(given, 1)["zero_optimization"]}


def test_what_a_zero_file_leaves_out_would_be_deepspeed_s_own(made):
    """Without ``filled``: no clipping, and a learning rate of its own."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    arguments = made.build(learning_rate=0.5).arguments
    bare = HfTrainerDeepSpeedConfig({**STAGE, "optimizer": {"type": "AdamW"}})
    bare.trainer_config_process(arguments)
    assert (
        not bare.mismatches
        and "gradient_clipping" not in bare.config
        and "lr" not in bare.config["optimizer"].get("params", {})
    )


def test_a_file_for_a_gpu_is_refused_on_a_cpu_before_the_model_is_loaded(train_recipe, tmp_path):
    """The recipe leaves bf16 open, so reading it cannot tell."""
    options = {**STAGE, "bf16": {"enabled": True}}
    prepared(train_recipe, "endprompt", tmp_path)
    out = run(
        train(train_recipe, "endprompt", tmp_path, "--set", f"train.deepspeed={json.dumps(options)}"),
        expect=2,
    )
    assert "train.deepspeed: bf16.enabled=True" in out and "Traceback" not in out


UNFILLED = """
from endprompt.recipe import zero_file
whole = zero_file.filled
def careless(options, accumulation):
    found = whole(options, accumulation)
    del found["zero_optimization"][zero_file.GATHER]
    return found
zero_file.filled = careless
from endprompt.cli import main
main()
"""


@pytest.mark.parametrize("filled", [True, False])
def test_a_zero_file_of_nothing_but_a_stage_trains_and_saves(train_recipe, tmp_path, filled):
    """Where it is not filled, there is nothing to save once all steps are done."""
    folder = prepared(train_recipe, "endprompt", tmp_path)
    (tmp_path / "unfilled.py").write_text(UNFILLED)
    command = train(
        train_recipe,
        "endprompt",
        tmp_path,
        "--set",
        f"train.deepspeed={json.dumps(STAGE)}",
        "--set",
        "train.max_steps=2",
    )
    out = run(
        command if filled else [sys.executable, tmp_path / "unfilled.py", *command[3:]],
        expect=0 if filled else 1,
    )
    assert (folder / "model/model.safetensors").is_file() is filled and (
        "lacks 30 parameters" in out
    ) is not filled


# -- going on, and the page ------------------------------------------------------------------------


@pytest.mark.parametrize("watched", [True, False])
def test_a_run_that_goes_on_logs_and_saves_as_often_as_the_recipe_says_now(made, watched):
    """Without the watch, as often as the checkpoint's run did."""
    first = made.train(
        max_steps=8,
        save_steps=2,
        save_total_limit=None,
        at_end=lambda state, control: setattr(control, "should_training_stop", state.global_step == 2),
    )
    again = made.build(max_steps=8, save_steps=3, logging_steps=4, save_total_limit=None, folder=first.folder)
    if watched:
        watching = watch.Watch(SimpleNamespace(listen=lambda: None, wished=lambda: False), first.folder)
        watching.on_step_end = lambda *args, **kwargs: None
        again.trainer.add_callback(watching)
    again.trainer.train(resume_from_checkpoint=str(first.folder / "checkpoints/checkpoint-2"))
    logged = [
        entry["step"] for entry in again.trainer.state.log_history if "loss" in entry and entry["step"] > 2
    ]
    saved = sorted(int(path.name.partition("-")[2]) for path in (first.folder / "checkpoints").iterdir())
    assert (logged, saved) == (([4, 8], [2, 3, 6, 8]) if watched else ([3, 4, 5, 6, 7, 8], [2, 4, 6, 8]))


def page() -> str:
    """docs/training-keys.md as the code has it."""
    allowed = {**{key: about.does for key, about in training_keys.ALLOWED.items()}, **training_keys.OURS}
    reasons: dict[str, list[str]] = {}
    for key, reason in training_keys.REFUSED.items():
        reasons.setdefault(reason, []).append(f"`{key}`")
    text = replaced(
        PAGE.read_text(),
        "allowed",
        grid("key", ["what it does here"], [(f"`{key}`", [does]) for key, does in allowed.items()]),
    )
    return replaced(
        text,
        "refused",
        grid("refused because", ["keys"], [(reason, [", ".join(keys)]) for reason, keys in reasons.items()]),
    )


def test_the_page_says_what_the_code_says():
    """python tests/test_training_keys.py writes it."""
    assert PAGE.read_text() == page()
    shown = {
        key
        for path in (REPOSITORY / "recipes").glob("*.yaml")
        if path.name != "sft.yaml"
        for key in schema.load(path).train
    }
    assert shown <= set(re.findall(r"^\| `(\w+)`", page(), re.MULTILINE))


if __name__ == "__main__":
    PAGE.write_text(page())
