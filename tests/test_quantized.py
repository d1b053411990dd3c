"""Adapters on a base in 4 bits (QLoRA): what is quantized, what is saved, and what is refused."""

import importlib.util
import json
import logging
import sys

import family_models
import pytest
import torch
from conftest import run_main
from networks import configuration, network
from safetensors.torch import load_file
from test_lora import batch_of, fill
from training import TORCHRUN, assert_same, losses, prepared, run, weights

from endprompt import BadInput, Failure
from endprompt.bases import counting, loading, model, quantized
from endprompt.commands import checkup
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment
from endprompt.recipe.training_keys import Lora
from endprompt.training import heads, lora, loss, precision

needed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (pip install -e '.[qlora]')",
)
DENSE = [
    name for name, one in family_models.MODELS.items() if "moe" not in one.type and one.type != "mixtral"
]
FOUR = ("train.deepspeed=null", "train.lora={r: 4, quantize: nf4}")


def read(folder, dtype=torch.float32):
    """The model in ``folder`` in 4 bits."""
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **quantized.loading(dtype, False))
    quantized.settle(found)
    return found


def experiment(path, method="pose", *overrides):
    return Experiment.of(schema.load(path, overrides), method)


# -- the network ---------------------------------------------------------------------------------------------


@needed
@pytest.mark.parametrize("columns", [32, 50, 64, 96, 176])
def test_rows_that_are_no_whole_blocks(columns):
    """bitsandbytes' kernel for AVX-512 is wrong there; products and restored values are not."""
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    whole = torch.randn(48, columns, device="cpu")
    four = Linear4bit(columns, 48, bias=False, compute_dtype=torch.float32, quant_type="nf4", device="cpu")
    four.load_state_dict({"weight": whole})
    four.to("cpu")
    four.__class__ = quantized._linear()
    four.support_avx512bf16_for_cpu = False
    values = quantized._values(four.weight)
    assert (values - whole).norm() / whole.norm() < 0.12
    x = torch.randn(5, columns, device="cpu", requires_grad=True)
    found = four(x)
    assert torch.allclose(found, x @ values.T, atol=1e-4)
    found.sum().backward()
    assert torch.allclose(x.grad, values.sum(0).expand(5, -1), atol=1e-4)


def test_a_kernel_of_the_hub_is_not_missed_aloud(caplog):
    """bitsandbytes warns of it on import, on CPUs with AVX-512 for bfloat16, and a message is one line."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.setLevel(logging.NOTSET)
    logger.warning("missed")
    assert "missed" in caplog.text
    caplog.clear()
    run_main("doctor", "--help")
    logger.warning("missed")
    assert not caplog.text


@needed
@pytest.mark.parametrize("name", DENSE)
def test_linear_layers_of_every_family_and_nothing_else(name, recipe_file, tmp_path, base):
    folder = family_models.saved(tmp_path / "model", family_models.written(name), base)
    lengths = {"physical": 64, "target": family_models.MODELS[name].target}
    rope = {"rope": {"type": kind}} if (kind := family_models.MODELS[name].rope) else {}
    found = experiment(recipe_file(model={"name_or_path": str(folder)}, lengths=lengths, **rope))
    built = [model.build(found.base, found.scaling, torch.float32, False, four) for four in (True, False)]
    four, whole = (dict(one.named_parameters()) for one in built)
    assert four.keys() == whole.keys()
    for key, parameter in four.items():
        is_matrix = ".layers." in key and whole[key].dim() == 2
        assert (parameter.dtype == torch.uint8) == is_matrix, key
        assert is_matrix or torch.equal(parameter, whole[key])
    assert (
        not hasattr(built[0].config, "quantization_config")
        and "quantization" not in built[0].config.to_json_string()
    )
    quantized.restore(built[0])
    for key, parameter in built[0].named_parameters():
        assert parameter.shape == whole[key].shape and parameter.dtype == torch.float32
        error = (parameter - whole[key]).norm() / whole[key].norm()
        assert error < 0.12 and (error > 0.03) == (".layers." in key and parameter.dim() == 2), key


@needed
def test_bytes_are_those_that_are_planned(tmp_path):
    config = configuration(hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    network(config).save_pretrained(tmp_path)
    found = 0
    for module in read(tmp_path).modules():
        if state := getattr(getattr(module, "weight", None), "quant_state", None):
            found += module.weight.numel() + state.absmax.numel() + 4 * state.state2.absmax.numel()
    assert found == pytest.approx(quantized.BYTES * counting.products(config), rel=1e-3)


@needed
def test_a_layer_that_stays_whole_is_noticed(tmp_path):
    from transformers import AutoModelForCausalLM

    network(configuration()).save_pretrained(tmp_path)
    given = quantized.loading(torch.float32, False)
    given["quantization_config"].llm_int8_skip_modules = ["lm_head", "v_proj"]
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **given)
    with pytest.raises(Failure, match="14 linear layers of the base were to be in 4 bits, and 12 are"):
        quantized.settle(found)


@needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type, sharpened", [("llama", False), ("llama", True), ("qwen2", False)])
def test_merged_is_unmerged(model_type, sharpened, dtype, tmp_path):
    """With factors of heads too; qwen2 has biases.  Merged into the base's own weights it is another one."""
    network(configuration(model_type, hidden_size=64)).save_pretrained(tmp_path / "base")
    for spoiled in (False, True):
        four = read(tmp_path / "base", dtype)
        loss.attach(four)
        if sharpened:
            heads.attach(four)
        lora.inject(four, Lora(r=4, targets=["q_proj", "v_proj", "down_proj"], quantize="nf4"), 0)
        precision.raise_trained(four)
        fill(four)
        for name, parameter in four.named_parameters():
            if name.endswith(heads.NAME):
                parameter.data.copy_((torch.rand(parameter.shape) - 0.5) / heads.GAIN)
        batch = batch_of(40, 25)
        expected = lora.logits(four, batch, "cpu")
        quantized.restore(four)
        if spoiled:
            own = load_file(tmp_path / "base/model.safetensors")
            for name, parameter in four.named_parameters():
                if (plain := name.replace(".base_layer", "")) in own and "proj" in name:
                    parameter.data.copy_(own[plain])
        if sharpened:
            heads.fold(four)
        traces = lora.merge(four)
        precision.lower(four, dtype)
        four.save_pretrained(tmp_path / "merged")
        if spoiled:
            with pytest.raises(Failure, match="other logits than the adapters"):
                lora.verify_merged(tmp_path / "merged", batch, expected, traces, "cpu")
        else:
            distance = lora.verify_merged(tmp_path / "merged", batch, expected, traces, "cpu")
            assert distance < (1e-5 if dtype == torch.float32 else 5e-2)
    assert load_file(tmp_path / "merged/model.safetensors").keys() == own.keys()


@needed
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_the_values_of_the_4_bits_are_what_was_trained_on(dtype, near, base, tokenizer, tiny_text):
    """docs/methods.md has these figures: after 8 steps on the tiny base, 0.009 standard deviations of the
    logits in bfloat16, and 0.13 if the same adapters are merged into the base's own weights."""
    from transformers import AutoModelForCausalLM

    ids = torch.tensor(tokenizer(tiny_text[0])["input_ids"][:128])[None]
    batch = {
        "input_ids": ids,
        "position_ids": torch.arange(128)[None],
        "attention_mask": torch.ones_like(ids),
    }
    settings, mixed = Lora(r=16, alpha=32.0), torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    four, own = read(base, dtype), AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    for one in (four, own):
        lora.inject(one, settings, 0)
        precision.raise_trained(one)
    trained_ones = [parameter for parameter in four.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained_ones, lr=1e-3)
    for _ in range(8):
        with mixed:
            four(**batch, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with mixed:
        expected = lora.logits(four, batch, "cpu")
    adapters = {name: value for name, value in four.state_dict().items() if "lora_" in name}
    own.load_state_dict(adapters, strict=False)
    quantized.restore(four)
    found = []
    for one in (four, own):
        lora.merge(one)
        precision.lower(one, dtype)
        far = (lora.logits(one, batch, "cpu") - expected).pow(2).mean().sqrt() / expected.std()
        found.append(float(far))
    assert found[0] < near and 0.1 < found[1] < 0.4, found


# -- runs ----------------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys
from pathlib import Path
from endprompt.recipe import experiment
from endprompt.training import checkpoint, run
out, *given = sys.argv[1:]
def die(self, args, state, control, **kwargs):
    if state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
if out.endswith("killed"):
    checkpoint.MarkComplete.on_step_end = die
recipe, method, *settings = given
run.train(experiment.resolve(recipe, settings, method, Path(out)))
"""
GIVEN = (
    *FOUR,
    "train.logging_steps=1",
    "train.max_steps=4",
    "train.save_steps=2",
    "train.learning_rate=0.01",
    "train.warmup_steps=1",
)


def trained(path, method, out, *more, expect: int = 0, before: str = ""):
    """The folder of a run of four steps."""
    if not (out / "small" / method).exists():
        prepared(path, method, out)
    output = run([sys.executable, "-c", before + SCRIPT, out, path, method, *GIVEN, *more], expect)
    return out / "small" / method, output


@needed
@pytest.mark.slow
def test_a_run_saves_a_plain_model_and_goes_on_after_a_kill_as_it_was(recipe_file, tmp_path, base):
    path, method = recipe_file(data={"tokens": 64 * 32}), "endprompt"
    folder, _ = trained(path, method, tmp_path / "whole")
    said = json.loads((folder / "train.json").read_text())
    assert said["merge_difference"] < 1e-5 and said["history"][-1]["loss"] < said["history"][0]["loss"]
    config = json.loads((folder / "model/config.json").read_text())
    assert config["endprompt"]["lora"]["quantize"] == "nf4" and "quantization_config" not in config
    before, after = load_file(base / "model.safetensors"), weights(folder)
    assert before.keys() == after.keys() and {one.dtype for one in after.values()} == {torch.float32}
    four = read(base)
    quantized.restore(four)
    values = four.state_dict()
    # What has no adapter is what 4 bits stand for; what was not quantized is the base's.
    changed = {name for name, value in after.items() if not torch.equal(value, values[name])}
    assert changed == {name for name in after if any(f"{one}_proj" in name for one in "qkvo")}
    for name in changed:
        ranks = torch.linalg.svdvals(after[name] - values[name])
        assert ranks[4:].max() < 1e-4 * ranks[0] < ranks[0], name
    # A checkpoint holds what is trained, and no second copy of the base.
    kept = load_file(folder / "checkpoints/checkpoint-4/model.safetensors")
    assert kept and not any("proj.base_layer" in name or "mlp" in name for name in kept)

    broken, _ = trained(path, method, tmp_path / "killed", expect=-9)
    assert not (broken / "model").exists()
    (tmp_path / "killed").rename(tmp_path / "again")
    marker = (
        tmp_path / "again" / folder.relative_to(tmp_path / "whole") / "checkpoints/checkpoint-2/complete.json"
    )
    kept = json.loads(marker.read_text())
    marker.write_text(json.dumps(kept | {"base": "another"}))
    _, output = trained(path, method, tmp_path / "again", expect=1)
    assert "checkpoint-2 is of adapters on other weights than" in " ".join(output.split())
    marker.write_text(json.dumps(kept))
    resumed, _ = trained(path, method, tmp_path / "again")
    assert json.loads((resumed / "train.json").read_text())["resumed_from"] == "checkpoint-2"
    assert_same(weights(resumed), after, tolerance=0)
    assert losses(resumed)[-1] == losses(folder)[-1]

    code, _, error = run_main(
        "evaluate", path, method, "--out", tmp_path / "again", "--set", "eval.lengths=[128]"
    )
    assert code == 0, error


@needed
def test_a_careless_merge_is_refused(recipe_file, tmp_path):
    """As if what the adapters were trained on were lost: each matrix is half a step of its blocks off."""
    spoil = """
from endprompt.bases import quantized
restore = quantized.restore
def careless(network):
    restore(network)
    for name, parameter in network.named_parameters():
        if "mlp" in name:
            parameter.data *= 1.05
quantized.restore = careless
"""
    path = recipe_file(data={"tokens": 64 * 16})
    folder, output = trained(path, "pose", tmp_path, "train.max_steps=2", expect=1, before=spoil)
    assert "gives other logits than the adapters it was merged from" in output
    assert not (folder / "model").exists() and (folder / "checkpoints/checkpoint-2").is_dir()


@needed
@pytest.mark.parametrize(
    "method, more",
    [
        ("longlora", ["train.per_device_train_batch_size=8"]),
        pytest.param("self_distil", [], marks=pytest.mark.slow),
        pytest.param("pose_sharp", ["rope.sharpen_heads=true"], marks=pytest.mark.slow),
        pytest.param("pose", ["train.base_share=0.3"], marks=pytest.mark.slow),
    ],
)
def test_what_else_is_trained_beside(method, more, recipe_file, tmp_path, base):
    """Embeddings and norms; against the base in 4 bits as teacher; factors of heads; averaged at last."""
    path = recipe_file(data={"tokens": 512 * 16 if method == "longlora" else 64 * 16})
    folder, _ = trained(path, method, tmp_path / "1", "train.max_steps=2", *more)
    assert json.loads((folder / "train.json").read_text())["merge_difference"] < 1e-4
    before, after = load_file(base / "model.safetensors"), weights(folder)
    assert before.keys() == after.keys()
    whole = {name for name in after if "embed" in name or "norm" in name}
    assert all(torch.equal(before[name], after[name]) != (method == "longlora") for name in whole)
    if method == "pose":  # a share of the base's own weights, not of what 4 bits make of them
        alone, _ = trained(path, method, tmp_path / "2", "train.max_steps=2")
        for name, tensor in weights(alone).items():
            expected = 0.7 * tensor + 0.3 * before[name].float()
            torch.testing.assert_close(after[name], expected, rtol=0, atol=2e-6)


@needed
@pytest.mark.distributed
def test_two_ranks_are_one(recipe_file, tmp_path):
    """Without DeepSpeed: each holds the base in 4 bits."""
    path, given = recipe_file(data={"tokens": 64 * 16}), [part for one in GIVEN for part in ("--set", one)]
    one, _ = trained(path, "pose", tmp_path / "1")
    two = prepared(path, "pose", tmp_path / "2")
    given += ["--set", "train.per_device_train_batch_size=4"]
    run([*TORCHRUN, "-m", "endprompt", "train", path, "pose", "--out", tmp_path / "2", *given])
    assert_same(weights(one), weights(two), tolerance=1e-5)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, words",
    [
        ("lora.quantize=int8", "train.lora.quantize: Input should be 'nf4'"),
        *(
            (f"deepspeed=ds_configs/{name}.json", "train.lora.quantize: ZeRO-3 would cut 4-bit weights")
            for name in ("zero3", "zero3_offload", "zero2")
        ),
        ("deepspeed={zero_optimization: {stage: 1}}", "set train.deepspeed: null"),
        ("torch_compile=true", "train.lora.quantize: 4-bit layers were not tried under torch_compile"),
    ],
)
def test_what_does_not_go_together(override, words, recipe_file, tmp_path):
    given = [part for one in (*FOUR, f"train.{override}") for part in ("--set", one)]
    code, said, error = run_main("prepare", recipe_file(), "pose", "--out", tmp_path / "o", *given)
    assert (code, said) == (2, "") and words in error and error.count("\n") == 1
    assert not (tmp_path / "o").exists()


@needed
@pytest.mark.parametrize(
    "named, said",
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "q_proj is not quantized"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "q_proj is not quantized"),
        ({"quant_method": "nonsense"}, "its format is unknown"),
    ],
    ids=["4-bit", "8-bit", "unknown"],
)
def test_plain_weights_that_are_called_quantized_are_refused(tmp_path, named, said):
    """transformers loads them without a word, and the first product of a 4-bit one is an AssertionError."""
    network(configuration()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": named}))
    with pytest.raises(BadInput, match=f"^x cannot be loaded as quantization_config .*{said}"):
        loading.load_weights("x", pretrained_model_name_or_path=str(tmp_path))


@needed
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_are_quantized_are_read(tmp_path, bits):
    """The twin: a model that bitsandbytes wrote."""
    from transformers import BitsAndBytesConfig

    network(configuration()).save_pretrained(tmp_path / "plain")
    asked = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    loading.load_weights(
        "x", pretrained_model_name_or_path=str(tmp_path / "plain"), quantization_config=asked
    ).save_pretrained(tmp_path / "written")
    found = loading.load_weights("x", pretrained_model_name_or_path=str(tmp_path / "written"))
    assert not found.model.layers[0].self_attn.q_proj.weight.is_floating_point()


def test_a_gguf_file_is_quantized_already(recipe_file):
    with pytest.raises(BadInput, match="model.gguf_file is read whole"):
        schema.load(recipe_file(), [*FOUR, "model.gguf_file=x.gguf"])


def test_experts_are_no_linear_layers(recipe_file, tmp_path, base):
    folder = family_models.saved(tmp_path / "model", family_models.written("Mixtral"), base)
    lengths = {"physical": 64, "target": family_models.MODELS["Mixtral"].target}
    path = recipe_file(model={"name_or_path": str(folder)}, lengths=lengths)
    with pytest.raises(BadInput, match="experts of a mixtral model are one tensor a layer"):
        lora.check(experiment(path, "pose", *FOUR))


def test_a_base_beside_the_base_is_refused(recipe_file):
    embedding = "train.lora={quantize: nf4, train_embed_norm: true}"
    with pytest.raises(BadInput, match="self_distil holds the base a second time, whole"):
        lora.check(experiment(recipe_file(), "self_distil", "train.deepspeed=null", embedding))


def test_without_bitsandbytes_training_is_refused_and_the_doctor_says_so(recipe_file, tmp_path, monkeypatch):
    path = recipe_file()
    prepared(path, "pose", tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more)
    )
    given = [part for one in FOUR for part in ("--set", one)]
    code, _, error = run_main("train", path, "pose", "--out", tmp_path, *given)
    assert code == 2 and "pip install 'endprompt[qlora]'" in error and error.count("\n") == 1
    found = {
        line.about: line for line in checkup.recipe(experiment(path, "pose", *FOUR), checkup.look(tmp_path))
    }
    assert found["adapters"].state == "mend" and "endprompt[qlora]" in found["adapters"].said


def test_other_runs_say_what_they_said(recipe_file):
    """config.json of a run whose base is whole is that of before."""
    assert "quantize" not in experiment(recipe_file(), "longlora").adapters.model_dump(exclude_none=True)
