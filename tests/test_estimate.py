"""endprompt plan: what it counts against what is there."""

import math
import re

import pytest
import torch
from conftest import REPOSITORY, run_main
from transformers import LlamaConfig, LlamaForCausalLM

from endprompt import methods
from endprompt.planning import estimate, optimizers
from endprompt.recipe import schema, training_checks
from endprompt.recipe.experiment import Experiment
from endprompt.recipe.training_keys import Lora
from endprompt.reports import plan

SHAPES = {
    "tied": (2, 64, 176, 4, 2, 300, True),
    "untied, many heads": (3, 96, 256, 6, 6, 500, False),
    "wide": (2, 256, 512, 4, 1, 1000, True),
}


def shape_of(name, **more) -> LlamaConfig:
    layers, width, inner, heads, kv, vocabulary, tied = SHAPES[name]
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
        **more,
    )


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_the_model_s(name):
    about = shape_of(name)
    assert estimate.parameter_count(about) == sum(
        parameter.numel() for parameter in LlamaForCausalLM(about).parameters()
    )


def test_the_models_of_the_recipes_have_their_sizes():
    from types import SimpleNamespace

    sizes = {
        name: estimate.parameter_count(SimpleNamespace(**values)) for name, values in estimate.SHAPES.items()
    }
    assert {name.partition("/")[2]: round(size / 1e9, 2) for name, size in sizes.items()} == {
        "Meta-Llama-3-8B": 8.03,
        "Llama-3.1-8B": 8.03,
        "Llama-3.2-1B": 1.24,
        "Llama-2-7b-hf": 6.74,
        "Mistral-7B-v0.3": 7.25,
        "SmolLM2-135M": 0.13,
        "Qwen3-8B": 8.19,
        "Qwen3-0.6B": 0.6,
    }


@pytest.mark.parametrize("rows, length", [(1, 256), (4, 128)])
@pytest.mark.parametrize("name", SHAPES)
def test_activations_are_those_that_a_real_model_keeps(name, rows, length):
    """On the CPU with real tensors and torch's own attention; the estimate ran on none."""
    model = LlamaForCausalLM(shape_of(name)).train()
    inputs = {
        "input_ids": torch.zeros(rows, length, dtype=torch.int64),
        "position_ids": torch.arange(length).expand(rows, -1),
    }
    with estimate.Kept(model) as kept:
        out = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    layer, rest = estimate.activations(model.config, rows, length, torch.float32)
    assert layer > 0 and kept.bytes == pytest.approx(model.config.num_hidden_layers * layer + rest, rel=0.15)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with estimate.Kept(model) as kept:
        out = model.get_decoder()(**inputs, use_cache=False).last_hidden_state  # noqa: F841  the graph must live
    assert kept.bytes == pytest.approx(
        model.config.num_hidden_layers * 4 * rows * length * model.config.hidden_size + rest, rel=0.15
    )


def test_activations_grow_with_the_tokens_and_not_with_the_target():
    about = shape_of("wide")
    one, four = (sum(estimate.activations(about, 1, length, torch.bfloat16)) for length in (256, 1024))
    assert four == pytest.approx(4 * one, rel=0.02)


@pytest.mark.distributed
def test_states_are_those_that_zero_keeps(train_recipe, two_ranks):
    """The optimizer file of a rank holds its float32 copy and Adam's two moments: 12 bytes a parameter over
    two ranks.
    """
    about = LlamaConfig.from_pretrained(two_ranks / "model")
    expected = estimate.memory(
        about,
        estimate.zero_options(schema.load(train_recipe))[1],
        2,
        estimate.Training(2, 128, True, element=4),
    )
    for path in (two_ranks / "checkpoints/checkpoint-8/global_step8").glob("*optim_states.pt"):
        assert path.stat().st_size == pytest.approx(expected.optimizer, rel=0.02)
    assert expected.weights == pytest.approx(
        (two_ranks / "model/model.safetensors").stat().st_size / 2, rel=0.02
    )


def test_zero_and_lora_change_what_they_change():
    about = shape_of("untied, many heads")
    zero3, zero2, none = ({"stage": stage} for stage in (3, 2, 0))
    one, two, three = (
        estimate.memory(about, options, 4, estimate.Training(1, 128, False))
        for options in (none, zero2, zero3)
    )
    count = estimate.parameter_count(about)
    assert (one.weights, one.gradients, one.optimizer) == (
        4 * count,
        4 * count,
        8 * count,
    )  # float32 weights are their own masters
    assert (two.weights, two.gradients, two.optimizer) == (2 * count, count / 2, 3 * count)
    assert (three.weights, three.gradients, three.optimizer) == (count / 2, count / 2, 3 * count)
    assert (
        one.activations > two.activations == three.activations
        and one.gathered == 2 * count
        and not two.gathered
        and three.gathered
    )
    offloaded = estimate.memory(
        about,
        {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
        4,
        estimate.Training(1, 128, False),
    )
    assert offloaded.states == 0 and offloaded.host > three.states
    adapted = estimate.memory(about, zero3, 4, estimate.Training(1, 128, False, Lora(r=4)))
    assert adapted.weights == three.weights and adapted.optimizer == pytest.approx(
        three.optimizer * estimate.trained_share(about, Lora(r=4))
    )
    import peft

    count = estimate.parameter_count(about)
    wrapped = peft.get_peft_model(
        LlamaForCausalLM(about), peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    )
    assert estimate.trained_share(about, Lora(r=4)) * count == wrapped.get_nb_trainable_parameters()[0]


OPTIMIZERS = [
    {"optim": "adamw_torch"},
    {"optim": "adafactor"},
    {"optim": "sgd"},
    {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
    {"optim": "sgd", "optim_args": "momentum=0"},
    {"optim": "adagrad"},
    {"optim": "rmsprop"},
    {"optim": "rmsprop", "optim_args": "momentum=0.9,centered=true"},
    {"optim": "rmsprop", "optim_args": "centered=false,alpha=0.9"},
]


@pytest.mark.parametrize("adapters", [None, Lora(r=4), Lora(r=2, train_embed_norm=True)])
@pytest.mark.parametrize("train", OPTIMIZERS, ids=str)
def test_optimizers_keep_what_is_counted(train, adapters):
    """Of the real ones, after a step of the weights that are trained."""
    about = shape_of("untied, many heads")
    shapes = list(optimizers._trained(about, adapters))
    count = sum(map(math.prod, shapes))
    assert count == pytest.approx(estimate.trained_share(about, adapters) * estimate.parameter_count(about))
    assert len(training_checks.ALLOWED["optim"].type.__args__) == 6  # all of them are above, AdamW once
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    made = training_checks._optimizer(train.get("optim_args", ""), train["optim"])
    made.add_param_group({"params": weights})
    if train["optim"] == "adagrad":  # which makes its sums before the first step
        made.state.update({one: {"step": torch.tensor(0.0), "sum": torch.zeros_like(one)} for one in weights})
    for one in weights:
        one.grad = torch.ones_like(one)
    made.step()
    held = [value for one in weights for key, value in made.state[one].items() if key not in ("step", "RMS")]
    there = sum(value.numel() * value.element_size() for value in held if isinstance(value, torch.Tensor))
    assert optimizers.kept(train, about, adapters) * count == pytest.approx(there)


def test_the_page_of_another_optimizer(recipe_file, tmp_path, monkeypatch):
    def page(**train):
        path = recipe_file(train={"deepspeed": None, **train})
        code, out, error = run_main("plan", path, "short", "--out", tmp_path, "--gpus", 2)
        assert code == 0, error
        bytes_of = {line[:34].strip(): line[34:].split() for line in out.splitlines()}
        return out, bytes_of["GB a GPU"], float(bytes_of["optimizer states, fp32"][0])

    monkeypatch.setattr(estimate, "fits", lambda one, machine: False)
    out, names, adam = page()
    assert len(names) == 4 and "keeps" not in out and "take train.deepspeed" not in out
    out, names, sgd = page(optim="sgd")
    assert names == ["none"] and sgd == 0.0 < adam
    assert "sgd keeps 0 bytes a trained weight, AdamW 8; ZeRO files need train.optim=adamw_torch" in out
    monkeypatch.setattr(optimizers, "kept", lambda *_: None)
    out, _, unknown = page(optim="adagrad")
    assert unknown == adam and "adagrad: what it keeps is not known here, and counted as AdamW's" in out


@pytest.mark.parametrize(
    "train, gpus, tokens",
    [
        ({"max_steps": 5}, 2, 5 * 2 * 8 * 64),
        ({"max_steps": 5, "gradient_accumulation_steps": 3}, 1, 5 * 3 * 8 * 64),
        ({"max_steps": -1}, 2, 4096),
        ({"max_steps": -1, "num_train_epochs": 1.5}, 2, 6144),
    ],
)
def test_a_run_ends_where_max_steps_says(recipe_file, tmp_path, train, gpus, tokens):
    path = recipe_file(train=train)
    assert estimate.trained_tokens(Experiment.of(schema.load(path), "short"), gpus) == tokens
    _, out, _ = run_main("plan", path, "short", "--out", tmp_path, "--gpus", gpus)
    assert f"{tokens / 1e9:.3g} B tokens at" in out
    experiment = Experiment.of(schema.load(path), "short")
    about = estimate.shape(experiment.recipe)
    flops = tokens * estimate.token_flops(experiment, about)
    assert plan.training_flops(experiment, about, gpus) == pytest.approx(flops)  # of the paper's tables


def test_steps_of_long_rows_count_their_own_tokens(recipe_file):
    experiment = Experiment.of(schema.load(recipe_file(train={"max_steps": 5})), "full_length")
    assert experiment.row_length == 512 and estimate.trained_tokens(experiment, 2) == 5 * 2 * 512


def test_the_page(recipe_file, tmp_path):
    code, out, _ = run_main("plan", REPOSITORY / "recipes/llama3-8b-64k.yaml", "endprompt", "--out", tmp_path)
    assert (
        code == 0
        and "8.03 B parameters" in out
        and "64 rows, 524288 tokens a step" in out
        and "zero3 fits." in out
        and "14.3 h, 115 GPU-hours" in out
    )
    code, out, _ = run_main(
        "plan",
        REPOSITORY / "recipes/llama3-8b-64k.yaml",
        "full_length",
        "--gpu-memory",
        "60",
        "--out",
        tmp_path,
    )
    assert (
        code == 0
        and "rows of 65536" in out
        and "zero3 does not fit: take train.deepspeed=ds_configs/zero3_offload.json" in out
    )
    code, out, _ = run_main(
        "plan",
        REPOSITORY / "recipes/llama3-8b-64k.yaml",
        "full_length",
        "--gpu-memory",
        "24",
        "--out",
        tmp_path,
    )
    assert code == 0 and "no ZeRO file here makes it fit" in out
    assert run_main("plan", recipe_file(), "endprompt", "--gpus", "1", "--out", tmp_path)[0] == 0 and not [
        path for path in tmp_path.rglob("*") if path.name == "small"
    ]


@pytest.mark.parametrize(
    "name, machine, size, hours, memory",
    [
        ("llama3.1-8b-512k", [], "8.03 B", "14.3 h", 45.55),
        ("qwen3-8b-128k", [], "8.19 B", "14.7 h", 48.22),
        (
            "llama3.2-1b-512k-lora",
            ["--gpus", "1", "--gpu-memory", "24", "--gpu", "4090"],
            "1.24 B",
            "2.8 h",
            5.02,
        ),
        (
            "qwen3-0.6b-128k-lora",
            ["--gpus", "1", "--gpu-memory", "24", "--gpu", "4090"],
            "0.596 B",
            "2.2 h",
            3.05,
        ),
        (
            "qwen3-8b-128k-qlora",
            ["--gpus", "1", "--gpu-memory", "24", "--gpu", "4090"],
            "8.19 B",
            "15.8 h",
            17.04,
        ),
    ],
)
def test_recipes_fit_the_machine_of_their_heads(tmp_path, name, machine, size, hours, memory):
    """Without a hub; the heads of the recipes say these figures."""
    path = REPOSITORY / f"recipes/{name}.yaml"
    code, out, error = run_main("plan", path, "endprompt", "--out", tmp_path, *machine)
    assert code == 0, error
    assert f"{size} parameters" in out and f": {hours}," in out
    own = out[out.index("GB a GPU") :].split()[3]
    assert f"\n{'without a ZeRO file it' if own == 'none' else own} fits." in out
    total = next(line for line in out.splitlines() if line.startswith("sum"))
    assert float(total.split()[1]) == memory
    head = path.read_text().partition("model:")[0]
    assert hours in head
    assert any(abs(float(said) - memory) <= 0.051 for said in re.findall(r"([\d.]+) GB by", head))


@pytest.mark.parametrize(
    "options, telling",
    [
        (["--gpus", "0"], "--gpus 0"),
        (["--gpu-memory", "-1"], "--gpu-memory -1"),
        (["--mfu", "1.5"], "--mfu 1.5"),
        (["--gpu", "V9"], "--gpu V9"),
        (["--set", "model.name_or_path=nobody/nothing"], "is not known here"),
        (["--set", "train.sequence_parallel=2"], "is not counted"),
    ],
)
def test_what_cannot_be_planned(tmp_path, options, telling):
    code, _, error = run_main(
        "plan", REPOSITORY / "recipes/llama3-8b-64k.yaml", "full_length", "--out", tmp_path, *options
    )
    assert code == 2 and error.count("\n") == 1 and telling in error


def test_an_untrained_method_has_no_plan(tmp_path):
    assert not methods.get("base").trained
    code, _, error = run_main("plan", REPOSITORY / "recipes/tiny.yaml", "base", "--out", tmp_path)
    assert code == 2 and "trains nothing" in error
