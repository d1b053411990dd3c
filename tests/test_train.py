"""Training end to end on the tiny base: ranks, accumulation, kills, launchers, guards.  Every run is a
process of its own.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_main
from training import TORCHRUN, assert_same, losses, prepared, run, train, weights


@pytest.mark.distributed
def test_two_ranks_equal_one_however_rows_are_split(train_recipe, two_ranks, tmp_path):
    folder = prepared(train_recipe, "endprompt", tmp_path)
    run(
        train(
            train_recipe,
            "endprompt",
            tmp_path,
            "--set",
            "train.per_device_train_batch_size=8",
            "--set",
            "train.gradient_accumulation_steps=1",
        )
    )
    one, two = losses(folder), losses(two_ranks)
    assert len(one) == len(two) == 8
    assert all(a == pytest.approx(b, rel=2e-4) for a, b in zip(one, two, strict=True)), (one, two)
    assert one[-1][0] < one[0][0] - 0.1, "nothing was learned, so equality would say nothing"
    # Adam divides by the gradient's own size: where that is near zero, rounding alone moves a weight by a
    # share of the step.
    assert_same(weights(folder), weights(two_ranks), tolerance=2e-3)


def test_the_model_reloads_in_plain_transformers_with_its_scaling(two_ranks):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(two_ranks / "model")
    tokenizer = AutoTokenizer.from_pretrained(two_ranks / "model")
    assert model.config.rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    assert model.config.max_position_embeddings == 1024
    dim = model.config.hidden_size // model.config.num_attention_heads
    expected = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim) / 4
    torch.testing.assert_close(model.model.rotary_emb.inv_freq.double(), expected, rtol=1e-6, atol=0)
    ids = tokenizer("The pass key is", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 4
    assert not list((two_ranks / "model").glob("*.bin"))
    assert model.config.endprompt == {
        "method": "endprompt",
        "original_length": 256,
        "physical_length": 128,
        "target_length": 1024,
    }


def test_losses_speed_and_memory_are_logged_apart(two_ranks):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(two_ranks / "logs"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "train/loss",
        "train/text_loss",
        "train/end_prompt_loss",
        "train/end_prompt_later_loss",
        "train/tokens_per_second",
        "train/peak_memory_gib",
    } <= tags
    summary = json.loads((two_ranks / "train.json").read_text())
    assert summary["probe"] > 1e-3 and summary["world_size"] == 2 and summary["commit"]
    loss, text, prompt = losses(two_ranks)[0]
    assert min(text, prompt) < loss < max(text, prompt)


# Says, of the first step, what computes, what is stepped, and what gradients there are.
LOOK = """
import json
import deepspeed
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
step = deepspeed.DeepSpeedEngine.step
def look(self, *args, **kwargs):
    if self.is_gradient_accumulation_boundary() and self.global_steps == 0:
        of = dict(self.module.named_parameters())
        print("look " + json.dumps({
            "computes": sorted({str(one.dtype) for one in of.values()}),
            "masters": sorted({str(safe_get_full_fp32_param(one).dtype) for one in of.values()}),
            "gradients": {name: float(safe_get_full_grad(one).float().norm()) for name, one in of.items()},
        }), flush=True)
    return step(self, *args, **kwargs)
deepspeed.DeepSpeedEngine.step = look
from endprompt.cli import main
main()
"""


@pytest.mark.distributed
def test_half_precision_keeps_the_weights_of_the_loss(train_recipe, two_ranks, tmp_path):
    """Under DeepSpeed the Trainer would cast them to bf16 too, which the loss refuses."""
    folder, script = prepared(train_recipe, "endprompt", tmp_path), tmp_path / "look.py"
    script.write_text(LOOK)
    changes = ("train.bf16=true", "train.max_steps=2", "train.gradient_accumulation_steps=4")
    options = [part for change in changes for part in ("--set", change)]
    said = run([sys.executable, script, "train", train_recipe, "endprompt", "--out", tmp_path, *options])
    assert all(
        a == pytest.approx(b, rel=2e-2) for a, b in zip(losses(folder), losses(two_ranks)[:2], strict=True)
    )
    seen = json.loads(next(line for line in said.splitlines() if "look {" in line).partition("look ")[2])
    assert seen["computes"] == ["torch.bfloat16"] and seen["masters"] == ["torch.float32"]
    gradients = seen["gradients"]
    assert len(gradients) > 20 and all(0 < norm < 1e4 for norm in gradients.values()), gradients


KILL = """
import os, signal
from endprompt.training import checkpoint
def die(self, args, state, control, **kwargs):
    if state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.MarkComplete.on_step_end = die
from endprompt.cli import main
main()
"""


@pytest.mark.distributed
def test_a_killed_run_resumes_to_the_same_weights(train_recipe, two_ranks, tmp_path):
    folder = prepared(train_recipe, "endprompt", tmp_path)
    script = tmp_path / "killed.py"
    script.write_text(KILL)
    run([*TORCHRUN, script, "train", train_recipe, "endprompt", "--out", tmp_path], expect=1)
    assert (folder / "checkpoints/checkpoint-4/complete.json").exists() and not (folder / "model").exists()
    # What a kill in the middle of writing leaves: a newer folder without its marker.
    (folder / "checkpoints/checkpoint-6").mkdir()
    output = run(train(train_recipe, "endprompt", tmp_path, ranks=2))
    assert "checkpoint-6 is half-written and passed over" in output
    assert json.loads((folder / "train.json").read_text())["resumed_from"] == "checkpoint-4"
    assert losses(folder) == losses(two_ranks)
    assert_same(weights(folder), weights(two_ranks), tolerance=0)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_deepspeed_launcher_starts_it_too(train_recipe, two_ranks, tmp_path):
    folder = prepared(train_recipe, "endprompt", tmp_path)
    run(
        [
            Path(sys.executable).parent / "deepspeed",
            "--num_gpus",
            "2",
            "--module",
            "endprompt",
            "train",
            train_recipe,
            "endprompt",
            "--out",
            tmp_path,
        ]
    )
    assert losses(folder) == losses(two_ranks)


PATCHES = {
    "no mask": (
        """
from endprompt.rows import collate
whole = collate.Collator.__call__
def without_mask(self, rows):
    return {name: value for name, value in whole(self, rows).items() if name != "attention_mask"}
collate.Collator.__call__ = without_mask
""",
        "liveness probe: changing all",
    ),
    "other theta": (
        """
from endprompt.positions import rope
merge = rope.apply
def careless(config, scaling, target_length):
    merge(config, scaling, target_length)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 500000.0}
rope.apply = careless
""",
        "RoPE check: the model's inv_freq differs",
    ),
    "scaled too late": (
        """
from endprompt.positions import rope
merge = rope.apply
rope.apply = lambda config, scaling, target_length: None
""",
        "RoPE check: the model's inv_freq differs",
    ),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_broken_run_is_refused_before_the_first_step(name, train_recipe, tmp_path):
    folder = prepared(train_recipe, "endprompt", tmp_path)
    patch, message = PATCHES[name]
    script = tmp_path / "patched.py"
    script.write_text(f"{patch}\nfrom endprompt.cli import main\nmain()\n")
    output = run([sys.executable, script, "train", train_recipe, "endprompt", "--out", tmp_path], expect=1)
    assert message in output
    assert not (folder / "model").exists() and not list((folder / "checkpoints").glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.distributed
def test_run_sh_goes_through_all_stages_and_skips_what_is_done(train_recipe, tmp_path):
    options = [
        "--set",
        "data.packing=cut",
        "--set",
        "data.tokens=4096",
        "--set",
        "lengths.target=512",
        "--set",
        "train.gradient_accumulation_steps=4",
    ]

    def go(method: str) -> str:
        return run(
            [
                "env",
                f"OUT={tmp_path}",
                f"PYTHON={sys.executable}",
                "NPROC=2",
                "bash",
                "recipes/run.sh",
                train_recipe,
                method,
                *options,
            ]
        )

    first = go("full_length")
    folder = tmp_path / "small/full_length"
    assert "passkey" in first and (folder / "eval/passkey.png").stat().st_size > 5000
    written = {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.suffix in (".parquet", ".safetensors", ".json")
    }
    row = json.loads((folder / "shards/manifest.json").read_text())
    assert row["row_length"] == 512 and row["rows"] == 8
    second = go("full_length")
    assert "nothing to train" in second
    assert written == {path: path.stat().st_mtime_ns for path in written}
    assert "scoring again" not in second


def test_a_folder_trained_under_another_recipe_is_refused(train_recipe, two_ranks):
    out = two_ranks.parents[1]
    code, _, error = run_main(
        "train", train_recipe, "endprompt", "--out", out, "--set", "train.learning_rate=0.5"
    )
    assert code == 2 and "train.learning_rate" in error and error.count("\n") == 1


def test_longer_rows_keep_the_tokens_of_a_step(train_recipe):
    from endprompt import BadInput
    from endprompt.recipe import schema
    from endprompt.recipe.batch import batch_shape
    from endprompt.recipe.experiment import Experiment

    def shape(method: str, rows: int, accumulation: int) -> tuple[int, int]:
        loaded = schema.load(
            train_recipe,
            [
                f"train.per_device_train_batch_size={rows}",
                f"train.gradient_accumulation_steps={accumulation}",
            ],
        )
        return batch_shape(Experiment.of(loaded, method))

    assert shape("short", 4, 2) == (4, 2)
    assert shape("full_length", 8, 1) == (1, 1)
    assert shape("full_length", 16, 2) == (2, 2)
    assert shape("full_length", 4, 8) == (1, 4)
    with pytest.raises(BadInput, match="multiple of 8"):
        shape("full_length", 2, 2)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"liger_kernel_config": {"fused_linear_cross_entropy": True}},
            "train.liger_kernel_config: fused_linear_cross_entropy would put Liger's loss",
        ),
        (
            {"liger_kernel_config": {"cross_entropy": True}},
            "train.liger_kernel_config: cross_entropy would put Liger's loss",
        ),
        ({"tf32": True}, "train.tf32: transformers 5.17.0 makes the angles of positions by a matrix product"),
    ],
)
def test_options_that_would_change_the_loss_or_the_positions_are_refused(monkeypatch, options, message):
    import transformers

    from endprompt import BadInput
    from endprompt.recipe.training_checks import speed_options

    monkeypatch.setattr(transformers, "__version__", "5.17.0")
    with pytest.raises(BadInput, match=message):
        speed_options(options)
    monkeypatch.setattr(transformers, "__version__", "5.23.0")
    assert speed_options({"tf32": True}) == {}


def test_torch_compile_goes_layer_by_layer_and_leaves_the_loss_alone(monkeypatch):
    from accelerate.utils import TorchDynamoPlugin

    from endprompt.training import loss
    from endprompt.training.arguments import speed_options

    monkeypatch.setattr(loss.LossHead, "forward", loss.LossHead.forward)
    monkeypatch.setenv(
        "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", ""
    )  # so that what is written there is taken away afterwards
    monkeypatch.delenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION")
    assert speed_options({}) == {} and not TorchDynamoPlugin().use_regional_compilation
    assert speed_options({"torch_compile": True}) == {} and TorchDynamoPlugin().use_regional_compilation
    assert hasattr(loss.LossHead.forward, "_torchdynamo_disable")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_compiled_run_has_the_losses_of_one_that_is_not(train_recipe, two_ranks, tmp_path):
    folder = prepared(train_recipe, "endprompt", tmp_path)
    run(
        train(
            train_recipe,
            "endprompt",
            tmp_path,
            "--set",
            "train.torch_compile_backend=aot_eager",
            "--set",
            "train.gradient_accumulation_steps=4",
        )
    )
    for one, other in zip(losses(folder), losses(two_ranks), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.skipif(
    not importlib.util.find_spec("liger_kernel"), reason="liger-kernel (the gpu extra) is not installed"
)
def test_liger_s_kernels_leave_the_loss_ours():
    """As the Trainer applies them to a model that has its loss; in a process of its own, for its patches
    outlive a model.
    """
    script = """
from networks import configuration, network
from transformers.integrations.liger import apply_liger_kernel
from endprompt.training import loss
from endprompt.recipe.training_checks import speed_options
model = network(configuration())
loss.attach(model)
apply_liger_kernel(model, speed_options({"use_liger_kernel": True})["liger_kernel_config"])
layer = model.get_decoder().layers[0]
assert model.forward.__func__ is loss._forward_with_loss
assert type(model.get_output_embeddings()) is loss.LossHead
assert "liger" in layer.mlp.forward.__func__.__module__
assert "liger" in layer.input_layernorm.forward.__func__.__module__
"""
    run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{script}"])


def test_flops_count_the_matrix_products():
    from transformers import LlamaConfig, LlamaForCausalLM

    from endprompt.training.trainer import flops_per_token

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    matrices = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and "embed" not in name
    )
    assert flops_per_token(config, 0) == 6 * matrices
    assert flops_per_token(config, 1000) - flops_per_token(config, 0) == 6 * 3 * 64 * 1000
