"""What is trained has float32 masters, with DeepSpeed and without; gradients and the loss' scale keep their
digits.
"""

import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, run_main
from networks import configuration, network
from safetensors.torch import load_file, save_file
from test_lora import adapted, batch_of
from training import ENVIRONMENT, prepared, run, train, weights

from endprompt import BadInput, Failure
from endprompt.bases import model
from endprompt.planning import estimate
from endprompt.recipe import schema, zero_file
from endprompt.recipe.experiment import Experiment
from endprompt.recipe.training_keys import Lora
from endprompt.training import loss, precision
from endprompt.training.arguments import training_arguments

HALF = [
    "--set",
    "train.bf16=true",
    "--set",
    "train.learning_rate=2e-5",
    "--set",
    "train.warmup_steps=1",
    "--set",
    "train.gradient_accumulation_steps=4",
]
ALONE = [*HALF, "--set", "train.deepspeed=null"]

# Writes, at the first step, how many of the summed gradients' values bfloat16 can hold.
LOOK = """
import deepspeed, torch
from deepspeed.utils import safe_get_full_grad
step = deepspeed.DeepSpeedEngine.step
def look(self, *args, **kwargs):
    if self.is_gradient_accumulation_boundary() and self.global_steps == 0:
        found = [safe_get_full_grad(one).float().flatten() for one in self.module.parameters()]
        found = torch.cat(found)
        found = found[found != 0]
        print("held by bf16:", float((found == found.bfloat16().float()).float().mean()), flush=True)
    return step(self, *args, **kwargs)
deepspeed.DeepSpeedEngine.step = look
"""
BARE = """
import torch
from endprompt.training import precision
precision.loaded = lambda arguments, adapters: torch.bfloat16
precision.raise_trained = lambda network: None
"""
UNGUARDED = "precision.verify = lambda *args: None\n"


def patched(patch: str, out: Path, recipe: Path, *options, expect: int = 0) -> tuple[Path, str]:
    """(folder, output) of a run of one rank on prepared shards, with ``patch`` before it."""
    folder = prepared(recipe, "endprompt", out)
    script = out / "patched.py"
    script.write_text(f"{patch}\nfrom endprompt.cli import main\nmain()\n")
    return folder, run(
        [sys.executable, script, "train", recipe, "endprompt", "--out", out, *options], expect=expect
    )


def history(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "train.json").read_text())["history"]]


def moved(folder: Path, base: Path) -> float:
    """The share of values, in bfloat16, that training changed."""
    before, after = load_file(base / "model.safetensors"), weights(folder)
    assert before.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    changed = sum(int((after[name] != before[name].bfloat16()).sum()) for name in after)
    return changed / sum(tensor.numel() for tensor in after.values())


def held(output: str) -> float:
    return float(output.split("held by bf16: ")[1].split()[0])


@pytest.fixture(scope="module")
def alone(train_recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    folder = prepared(train_recipe, "endprompt", out)
    run(train(train_recipe, "endprompt", out, *ALONE))
    return folder


@pytest.fixture(scope="module")
def zero3(train_recipe, tmp_path_factory) -> tuple[Path, str]:
    return patched(LOOK, tmp_path_factory.mktemp("zero3"), train_recipe, *HALF)


# -- masters -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.distributed
def test_without_deepspeed_bf16_trains_what_zero3_trains(alone, zero3, base):
    """Both start alike, and as many weights move.  Later losses differ: autocast computes with the masters of
    norms and embeddings, and ZeRO with their bf16 copies, which a small step seldom changes."""
    one, other = history(alone), history(zero3[0])
    assert len(one) == len(other) == 8 and one[:2] == pytest.approx(other[:2], rel=2e-3)
    assert moved(alone, base) == pytest.approx(moved(zero3[0], base), rel=0.2) and moved(alone, base) > 0.3
    for name, tensor in weights(alone).items():
        step = (tensor.float() - weights(zero3[0])[name].float()).abs().max()
        assert step <= 2**-7 * tensor.float().abs().max(), (
            name
        )  # Adam's sign may differ where a gradient is near zero


@pytest.mark.slow
def test_bare_bf16_weights_are_refused_and_would_lose_most_updates(alone, train_recipe, base, tmp_path):
    folder, output = patched(BARE, tmp_path, train_recipe, *ALONE, expect=1)
    assert (
        "trained parameters have no float32 master, first model.embed_tokens.weight (torch.bfloat16)"
        in output
    )
    assert not (folder / "model").exists()
    folder, _ = patched(BARE + UNGUARDED, tmp_path / "unguarded", train_recipe, *ALONE)
    assert moved(folder, base) < 0.5 * moved(alone, base)


def test_the_states_are_those_that_the_plan_counts(alone, train_recipe):
    recipe = schema.load(train_recipe, ["train.bf16=true", "train.deepspeed=null"])
    about, experiment = estimate.shape(recipe), Experiment.of(recipe, "endprompt")
    expected = estimate.training_memory(experiment, about, 1)
    count = estimate.parameter_count(about)
    checkpoint = alone / "checkpoints/checkpoint-8"
    assert (
        expected.weights == pytest.approx((checkpoint / "model.safetensors").stat().st_size, rel=0.02)
        and expected.weights == 4 * count
    )
    assert (
        expected.optimizer == pytest.approx((checkpoint / "optimizer.pt").stat().st_size, rel=0.02)
        and expected.optimizer == 8 * count
    )
    assert expected.gradients == 4 * count and expected.gathered == 2 * count and expected.buckets == 0
    assert estimate.training_memory(experiment, about, 2).buckets == 4 * count


def test_activations_under_autocast_are_those_that_a_real_model_keeps():
    shape = configuration(
        hidden_size=96, intermediate_size=256, num_hidden_layers=3, attn_implementation="sdpa"
    )
    real = network(shape).train()
    inputs = {
        "input_ids": torch.zeros(2, 256, dtype=torch.int64),
        "position_ids": torch.arange(256).expand(2, -1),
    }
    with estimate.Kept(real) as kept, torch.autocast("cpu", torch.bfloat16):
        out = real.get_decoder()(**inputs, use_cache=False).last_hidden_state
    copies = 2 * sum(one.numel() for one in real.get_decoder().layers.parameters() if one.dim() == 2)
    layer, rest = estimate.activations(shape, 2, 256, torch.bfloat16, autocast=True)
    assert kept.bytes - copies == pytest.approx(3 * layer + rest, rel=0.15)
    bare, _ = estimate.activations(shape, 2, 256, torch.bfloat16)
    assert layer > 1.2 * bare and out is not None


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("options", [ALONE, HALF], ids=["alone", "zero3"])
def test_adapters_have_masters(options, train_recipe, tmp_path):
    folder = prepared(train_recipe, "endprompt", tmp_path)
    run(
        train(
            train_recipe,
            "endprompt",
            tmp_path,
            *options,
            "--set",
            "train.lora.r=4",
            "--set",
            "train.lora.train_embed_norm=true",
        )
    )
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.bfloat16}
    if options is ALONE:
        recipe = schema.load(
            train_recipe,
            ["train.bf16=true", "train.deepspeed=null", "train.lora.r=4", "train.lora.train_embed_norm=true"],
        )
        about, experiment = estimate.shape(recipe), Experiment.of(recipe, "endprompt")
        expected = estimate.training_memory(experiment, about, 1)
        states = (folder / "checkpoints/checkpoint-8/optimizer.pt").stat().st_size
        assert expected.optimizer == pytest.approx(states, rel=0.1)


def optimizer_of(model):
    return torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_what_adapters_leave_frozen_stays_bf16_and_tied_matrices_stay_one(tied):
    model = adapted(Lora(train_embed_norm=True), tie_word_embeddings=tied).to(torch.bfloat16).train()
    with pytest.raises(
        Failure, match=r"no float32 master, first model.embed_tokens.weight \(torch.bfloat16\)"
    ):
        precision.verify(model, optimizer_of(model), whole=False)
    precision.raise_trained(model)
    assert all(
        (parameter.dtype == torch.float32) == parameter.requires_grad for parameter in model.parameters()
    )
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    precision.verify(model, optimizer_of(model), whole=False)
    batch = batch_of(30, 20)
    del batch["shift_prompt"]
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch)["loss_sum"].backward()
    assert {one.grad.dtype for one in model.parameters() if one.requires_grad} == {torch.float32}
    precision.lower(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_what_is_frozen_or_unknown_to_the_optimizer_is_refused():
    model = network(configuration())
    precision.verify(model, optimizer_of(model), whole=True)
    missing = torch.optim.AdamW(list(model.parameters())[1:], lr=1e-3)
    with pytest.raises(
        Failure,
        match=r"1 of \d+ trained parameters have no float32 master, first model.embed_tokens.weight \(not in",
    ):
        precision.verify(model, missing, whole=True)
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(Failure, match="1 parameters of the base are frozen, first model.norm.weight"):
        precision.verify(model, optimizer_of(model), whole=True)
    precision.verify(model, optimizer_of(model), whole=False)


def built(recipe):
    experiment = Experiment.of(recipe, "endprompt")
    return model.build(experiment.base, experiment.scaling, torch.float32, False)


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_the_config_s_dtype_is_not_what_is_trained(stored, recipe_file, base, tmp_path):
    copy = copied(base, tmp_path / "base", dtype=stored)
    tensors = {
        name: tensor.to(getattr(torch, stored))
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    recipe = schema.load(recipe_file(model={"name_or_path": str(copy)}))
    found = built(recipe)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}


# -- DeepSpeed's options -------------------------------------------------------------------------------------


@pytest.fixture
def one_rank(monkeypatch):
    with socket.socket() as free:  # other tests may start ranks at the same time
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        **ENVIRONMENT,
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }.items():
        monkeypatch.setenv(name, value)
    yield
    from transformers.integrations import deepspeed

    deepspeed.unset_hf_deepspeed_config()


def arguments_of(recipe_file, tmp_path, options: dict, accumulation: int = 1, **more):
    recipe = schema.load(recipe_file(train={"deepspeed": options, "bf16": True, "report_to": [], **more}))
    return training_arguments(recipe, (8, accumulation), tmp_path / "run", cuda=False, universal=False)


def zero(stage: int, **more) -> dict:
    return {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        **more,
    }


@pytest.mark.parametrize("section", [{}, {"bf16": {"enabled": "auto"}}, {"bf16": {}}])
def test_a_file_that_says_nothing_computes_as_the_recipe_says(
    section, one_rank, recipe_file, tmp_path, monkeypatch
):
    found = arguments_of(recipe_file, tmp_path, zero(3, **section))
    assert found.hf_deepspeed_config.dtype() == precision.loaded(found, False) == torch.bfloat16
    monkeypatch.setattr(zero_file, "filled", lambda options, accumulation: options)
    if not section:  # the trap itself
        assert arguments_of(recipe_file, tmp_path, zero(3)).hf_deepspeed_config.dtype() == torch.float32


@pytest.mark.parametrize(
    "options, words",
    [
        (zero(3, bf16={"enabled": False}), "bf16"),
        (zero(0, bf16={"enabled": "auto"}), "stage 0"),
        (zero(0), "stage 0"),
        (
            zero(2, bf16={"enabled": "auto", "bf16_master_weights_and_grads": True}),
            "bf16_master_weights_and_grads",
        ),
        (zero(2, bf16={"enabled": "auto", "bf16_optimizer_states": True}), "bf16_optimizer_states"),
        (
            zero(2, fp16={"enabled": True, "fp16_master_weights_and_grads": True}),
            "fp16 is enabled",
        ),
    ],
)
def test_files_without_masters_are_refused(options, words, one_rank, recipe_file, tmp_path):
    with pytest.raises(BadInput, match=f"train.deepspeed: .*{words}"):
        arguments_of(recipe_file, tmp_path, options)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_several_micro_batches_are_summed_in_float32(stage):
    said = {"data_types": {"grad_accum_dtype": "bf16"}}
    assert zero_file.filled(zero(stage), 16)["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in zero_file.filled(zero(stage), 1)
    assert zero_file.filled(zero(stage, **said), 16)["data_types"] == said["data_types"]
    assert zero(stage) == zero(stage)


@pytest.mark.slow
@pytest.mark.distributed
def test_deepspeed_sums_them_so(zero3, train_recipe, tmp_path):
    """In bf16, every sum is one of bf16's numbers; in float32 few are."""
    assert held(zero3[1]) < 0.3
    file = tmp_path / "bf16.json"
    for name in ("zero2", "zero3"):
        options = json.loads((REPOSITORY / f"ds_configs/{name}.json").read_text())
        file.write_text(json.dumps({**options, "data_types": {"grad_accum_dtype": "bf16"}}))
        _, output = patched(
            LOOK,
            tmp_path,
            train_recipe,
            *HALF,
            "--set",
            "train.max_steps=1",
            "--set",
            f"train.deepspeed={file}",
        )
        assert held(output) == 1.0, name
        shutil.rmtree(tmp_path / "small")
    _, output = patched(
        LOOK,
        tmp_path,
        train_recipe,
        *HALF,
        "--set",
        "train.max_steps=1",
        "--set",
        f"train.deepspeed={REPOSITORY}/ds_configs/zero2.json",
    )
    assert held(output) < 0.3


def test_the_plan_counts_the_sums(train_recipe):
    about = estimate.shape(schema.load(train_recipe))
    count = estimate.parameter_count(about)

    def gradients(*overrides, **options):
        experiment = Experiment.of(schema.load(train_recipe, list(overrides)), "endprompt")
        options = {**experiment.recipe.deepspeed, **options}
        return estimate.training_memory(experiment, about, 2, options).gradients * 2 / count

    assert gradients() == 4 and gradients("train.gradient_accumulation_steps=1") == 2
    assert gradients(data_types={"grad_accum_dtype": "bf16"}) == 2


# -- the page of the plan ------------------------------------------------------------------------------------


def test_the_page_says_what_is_float32(train_recipe, tmp_path):
    _, with_zero, _ = run_main("plan", train_recipe, "endprompt", "--out", tmp_path)
    assert (
        "weights, bf16  " in with_zero
        and "gathered weights and gradient" in with_zero
        and "(none" not in with_zero
    )
    _, alone, _ = run_main(
        "plan", train_recipe, "endprompt", "--out", tmp_path, "--set", "train.deepspeed=null"
    )
    assert "weights, bf16 (none: fp32)" in alone and "gathered weights, bf16 copies" in alone
    _, single, _ = run_main("plan", train_recipe, "endprompt", "--out", tmp_path, "--set", "train.bf16=false")
    assert "weights, fp32" in single


# -- the separator -------------------------------------------------------------------------------------------


def copied(base: Path, folder: Path, **changes) -> Path:
    shutil.copytree(base, folder)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**found, **changes}))
    return folder


def separated(base: Path, folder: Path) -> Path:
    """The base, untied, with ``pad_token_id`` that of the separator: only the input side trains its
    embedding.
    """
    eos = json.loads((base / "config.json").read_text())["eos_token_id"]
    copied(base, folder, pad_token_id=eos, tie_word_embeddings=False)
    tensors = load_file(base / "model.safetensors")
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_separator_s_row_has_a_gradient_though_it_is_the_pad(recipe_file, base, tmp_path):
    folder = separated(base, tmp_path / "base")
    recipe = schema.load(recipe_file(model={"name_or_path": str(folder)}))
    found = built(recipe)
    eos = found.config.eos_token_id
    assert found.config.pad_token_id == eos
    ids = torch.tensor([[5, 6, eos, 7, 8, 9]])

    def gradient():
        found.zero_grad()
        found(input_ids=ids).logits.logsumexp(-1).sum().backward()
        return float(found.get_input_embeddings().weight.grad[eos].abs().max())

    assert gradient() > 0
    found.get_input_embeddings().padding_idx = eos  # as transformers builds it: the trap itself
    assert gradient() == 0


KEEP_PAD = """
import torch
init = torch.nn.Module.__setattr__
def keep(self, name, value):
    if name == "padding_idx" and value is None and hasattr(self, "padding_idx"):
        return
    init(self, name, value)
torch.nn.Module.__setattr__ = keep
"""


@pytest.mark.distributed
@pytest.mark.parametrize(
    "patch",
    [pytest.param("", id="trains"), pytest.param(KEEP_PAD, id="frozen", marks=pytest.mark.slow)],
)
def test_the_separator_trains_under_zero3(patch, train_recipe, base, tmp_path):
    folder = separated(base, tmp_path / "base")
    out = tmp_path / "out"
    out.mkdir()
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        train_recipe.read_text().replace(str(base), str(folder)).replace("packing: document", "packing: cut")
    )
    found, _ = patched(patch, out, recipe, "--set", "train.max_steps=2")
    saved = json.loads((found / "model/config.json").read_text())
    eos, name = saved["eos_token_id"], "model.embed_tokens.weight"
    assert saved["pad_token_id"] == eos
    assert torch.equal(weights(found)[name][eos], load_file(folder / "model.safetensors")[name][eos]) == bool(
        patch
    )


# -- the loss' scale -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1 / 3, 1 / 700, 1 / 1000, 1 / 12345])
def test_the_scale_of_the_loss_is_not_rounded(scale):
    hidden = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    weight = torch.randn(50, 16, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    labels, ones = torch.arange(64) % 50, torch.ones(64)

    def gradients(factor: float):
        hidden.grad = weight.grad = None
        (loss.chunked_linear_cross_entropy(hidden, weight, labels, ones)[0] * factor).backward()
        return torch.cat([hidden.grad.double().flatten(), weight.grad.double().flatten()])

    whole, found = gradients(1.0), gradients(scale)

    def mean_error(values):  # roundings of single values cancel, a wrong factor stays
        return float((values @ whole) / (whole @ whole)) / scale - 1

    assert abs(mean_error(found)) < 1e-4
    rounded = (whole.bfloat16() * torch.tensor(scale).bfloat16()).double()
    assert abs(mean_error(rounded)) > 4e-4


def test_a_scale_for_which_bf16_has_a_number_is_as_before():
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        scale = torch.tensor(0.125)
        assert torch.equal(loss.scaled(gradient.to(dtype), scale), gradient.to(dtype) * scale.to(dtype))
        assert loss.scaled(gradient.to(dtype), scale).dtype == dtype
