"""LoRA and LongLoRA: what is trained, and that what is saved under ZeRO-3 computes what was trained."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY, tiny_documents, write_jsonl
from networks import configuration, network, row
from pydantic import ValidationError
from safetensors.torch import load_file
from test_train import TORCHRUN, assert_same, prepared, run, train, weights

from endprompt import BadInput, methods
from endprompt.methods.longlora import s2
from endprompt.positions import rope
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment
from endprompt.recipe.training_keys import Lora
from endprompt.rows.collate import Collator
from endprompt.training import lora, loss


def adapted(settings: Lora | None = None, seed: int = 0, **changes):
    model = network(configuration(**changes))
    loss.attach(model)
    lora.inject(model, settings or Lora(), seed)
    return model


def fill(model) -> None:
    """B starts at zero: give it something to add."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


def batch_of(*lengths):
    return Collator(0, 512)([row(n, 0, 512, 96, seed=n) for n in lengths])


@pytest.mark.parametrize(
    "settings, extra",
    [
        (Lora(), []),
        (Lora(targets=["q_proj", "up_proj"]), []),
        (
            Lora(train_embed_norm=True),
            ["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"],
        ),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_trained(settings, extra, tied):
    model = adapted(settings, tie_word_embeddings=tied)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    places = [
        f"model.layers.{layer}.{'mlp' if target == 'up_proj' else 'self_attn'}.{target}"
        for layer in (0, 1)
        for target in settings.targets
    ]
    assert {name for name in trained if "lora_" in name} == {
        f"{place}.lora_{side}.default.weight" for place in places for side in "AB"
    }
    assert {name.split(".")[-2] for name in trained if "lora_" not in name} == set(extra)
    assert model.get_output_embeddings().weight.requires_grad == (tied and settings.train_embed_norm)


def test_adapters_start_at_nothing_from_their_seed():
    batch = batch_of(20)
    model, plain = adapted(), network(configuration())
    assert torch.equal(lora.logits(model, batch, "cpu"), lora.logits(plain, batch, "cpu"))
    a = {
        seed: adapted(seed=seed).model.layers[0].self_attn.q_proj.lora_A["default"].weight for seed in (0, 1)
    }
    assert torch.equal(
        a[0], model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    ) and not torch.equal(a[0], a[1])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
def test_the_chunked_loss_trains_adapters(checkpointing):
    model, batch = adapted(Lora(train_embed_norm=True)), batch_of(30, 20)
    fill(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    is_prompt = batch.pop("shift_prompt")
    assert not is_prompt.any()
    found = model(**batch)
    found["loss_sum"].backward()
    expected = torch.nn.functional.cross_entropy(
        lora.logits(model, batch, "cpu").flatten(0, 1), batch["shift_labels"].flatten(), reduction="sum"
    )
    assert found["loss_sum"].item() == pytest.approx(float(expected), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert (
            parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        ) == parameter.requires_grad, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_merged_is_unmerged(model_type, dtype, tmp_path):
    """qwen2 has biases on q, k and v, which stay where they are."""
    settings = Lora(r=4, alpha=12.0, targets=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])
    model = network(configuration(model_type))
    names = set(model.state_dict())
    loss.attach(model)
    lora.inject(model, settings, 0)
    fill(model)
    model.to(dtype)
    batch, before = batch_of(40, 25), network(configuration(model_type)).to(dtype)
    expected = lora.logits(model, batch, "cpu")
    assert (expected - lora.logits(before, batch, "cpu")).std() > 0.1 * expected.std()
    traces = lora.merge(model)
    assert set(model.state_dict()) == names and not lora._layers(model)
    model.save_pretrained(tmp_path)
    assert lora.verify_merged(tmp_path, batch, expected, traces, "cpu") < (
        1e-5 if dtype == torch.float32 else 5e-2
    )
    weight = before.model.layers[1].mlp.down_proj.weight
    assert not torch.equal(
        load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.down_proj.weight"], weight
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lost", ["one adapter", "half an adapter", "a norm"])
def test_a_merge_that_lost_something_is_refused(tmp_path, lost, dtype):
    model, batch = adapted(), batch_of(40)
    fill(model)
    model.to(dtype)
    plain = network(configuration()).to(dtype)
    expected, traces = lora.logits(model, batch, "cpu"), lora.merge(model)
    merged, before = model.model.layers[1], plain.model.layers[1]
    with torch.no_grad():
        if lost == "a norm":
            merged.input_layernorm.weight.mul_(0.7)
        else:
            part = 1.0 if lost == "one adapter" else 0.5
            merged.self_attn.v_proj.weight.lerp_(before.self_attn.v_proj.weight, part)
    model.save_pretrained(tmp_path)
    message = {
        "one adapter": r"model: -?\d% of the adapter of model.layers.1.self_attn.v_proj",
        "half an adapter": r"model: (49|50|51)% of",
        "a norm": "other logits",
    }
    with pytest.raises(RuntimeError, match=message[lost]):
        lora.verify_merged(tmp_path, batch, expected, traces, "cpu")


def test_adapters_that_rounding_hides_are_let_through(tmp_path):
    """After a step or two in bf16, an adapter may be less than half the last bit of every weight."""
    model, batch = adapted(), batch_of(40)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=1e-6)
    model.to(torch.bfloat16)
    expected, traces = lora.logits(model, batch, "cpu"), lora.merge(model)
    model.save_pretrained(tmp_path)
    assert lora.verify_merged(tmp_path, batch, expected, traces, "cpu") < 0.1


def test_an_adapter_that_was_not_gathered_is_refused():
    model = adapted()
    model.model.layers[0].self_attn.k_proj.lora_A["default"].weight.data = torch.empty(0)
    with pytest.raises(RuntimeError, match="layers.0.self_attn.k_proj"):
        lora.merge(model)


@pytest.mark.parametrize(
    "given",
    [
        {"r": 0},
        {"r": 8.0},
        {"alpha": 0},
        {"dropout": 1.0},
        {"targets": []},
        {"targets": ["lm_head"]},
        {"rank": 8},
        {"train_embed_norm": 1},
    ],
)
def test_settings_are_strict(given):
    with pytest.raises(ValidationError):
        Lora.model_validate(given)


def test_the_recipe_says_what_is_adapted(recipe_file):
    path = recipe_file()

    def settings(method: str, *overrides):
        recipe = schema.load(path, [f"train.lora{override}" for override in overrides])
        return Experiment.of(recipe, method).adapters

    assert (
        settings("endprompt") is None
        and settings("endprompt", "={}") == Lora()
        and settings("endprompt", ".r=4", ".alpha=8") == Lora(r=4, alpha=8.0)
    )
    assert settings("longlora") == Lora(r=8, alpha=16.0, dropout=0.0, train_embed_norm=True)
    assert (
        settings("longlora", ".r=64") == Lora(r=64, train_embed_norm=True)
        and settings("longlora", "=null") is None
    )
    loaded = schema.load(path, ["train.lora.r=4"])
    again = path.with_name("again.yaml")
    again.write_text(Experiment.of(loaded, "longlora").dump())
    assert schema.load(again).train == loaded.train and loaded.train["lora"] == {"r": 4}


@pytest.mark.parametrize(
    "override, words",
    [
        (".rank=8", "unknown key train.lora.rank; known here: r, alpha"),
        (".r=0", "train.lora.r"),
        ("=8", "train.lora"),
        (".targets=[lm_head]", "train.lora.targets.0"),
        (".dropout=.nan", "train.lora.dropout"),
    ],
)
def test_bad_settings_are_named(recipe_file, override, words):
    with pytest.raises(BadInput) as caught:
        schema.load(recipe_file(), [f"train.lora{override}"])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_group_size(recipe_file):
    def found(method: str, *overrides):
        return Experiment.of(schema.load(recipe_file(), overrides), method)

    assert found("longlora").attended == 128
    other = found("endprompt")
    assert other.attended == other.row_length and "s2_group_size" not in other.method.Options.model_fields
    for key in ("method_options", "model"):  # the second is what it was called before
        assert found("longlora", f"{key}.s2_group_size=96").attended == 96
        with pytest.raises(BadInput, match="s2_group_size: .*greater than 1"):
            found("longlora", f"{key}.s2_group_size=1")


def test_longlora_is_what_its_authors_trained():
    method, model = methods.get("longlora"), network(configuration())
    assert method.fills == "target" and method.rope == "linear"
    with method.attention(model, method.Options(), 64):
        assert model.config._attn_implementation == s2.NAME
    assert model.config._attn_implementation != s2.NAME
    assert method.adapters == {"r": 8, "alpha": 16.0, "train_embed_norm": True}
    own = [one.name for one in methods.METHODS.values() if type(one).attention != methods.Method.attention]
    assert own == ["longlora", "longrope2"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base) -> Path:
    """Rows of 128 tokens or fewer to 512; 6 steps, a checkpoint every 2."""
    folder = tmp_path_factory.mktemp("lora")
    texts = [text for sentences in (4, 12, 40) for text in tiny_documents(12, sentences, seed=sentences)]
    path = folder / "small.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"name_or_path": str(base)},
                "lengths": {"physical": 128, "target": 512},
                "data": {
                    "corpus": str(write_jsonl(folder / "corpus.jsonl", texts)),
                    "tokens": 48 * 128,
                    "prompt_loss_weight": 0.5,
                },
                "train": {
                    "deepspeed": str(REPOSITORY / "ds_configs/zero3.json"),
                    "per_device_train_batch_size": 4,
                    "learning_rate": 2e-3,
                    "warmup_steps": 1,
                    "logging_steps": 1,
                    "save_steps": 2,
                    "save_total_limit": 10,
                },
            }
        )
    )
    return path


@pytest.fixture(scope="module")
def longlora(recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("longlora")
    folder = prepared(recipe, "longlora", out)
    run(train(recipe, "longlora", out, ranks=2))
    return folder


def summary(folder: Path) -> dict:
    return json.loads((folder / "train.json").read_text())


@pytest.mark.distributed
def test_longlora_trains_under_two_zero3_ranks_and_reloads(longlora, base):
    from transformers import AutoModelForCausalLM

    found = summary(longlora)
    assert (
        found["world_size"] == 2
        and found["steps"] == 6
        and found["probe"] > 1e-3
        and found["merge_difference"] < 1e-4
    )
    assert found["history"][-1]["loss"] < found["history"][0]["loss"] - 0.1
    model = AutoModelForCausalLM.from_pretrained(longlora / "model")
    rope.verify(model.get_decoder().rotary_emb, model.config, rope.Linear(2.0), 10000.0)
    assert model.config.max_position_embeddings == 512 and model.config._attn_implementation == "sdpa"
    assert model.config.endprompt["s2_group_size"] == 128 and model.config.endprompt["lora"]["r"] == 8


def test_longlora_changes_what_it_says_and_nothing_else(longlora, base):
    before, after = load_file(base / "model.safetensors"), weights(longlora)
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {
        name
        for name in after
        if any(word in name for word in ("embed", "norm", "q_proj", "k_proj", "v_proj", "o_proj"))
    }
    for name in changed:
        if "proj" in name:  # what a merge of rank 8 adds
            ranks = torch.linalg.svdvals(after[name] - before[name])
            assert ranks[8:].max() < 1e-4 * ranks[0] < ranks[0], name


@pytest.mark.slow
@pytest.mark.distributed
def test_a_resumed_longlora_is_the_same(recipe, longlora, tmp_path):
    folder = prepared(recipe, "longlora", tmp_path)
    script = tmp_path / "killed.py"
    script.write_text("""
import os, signal
from endprompt.training import checkpoint
def die(self, args, state, control, **kwargs):
    if state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.MarkComplete.on_step_end = die
from endprompt.cli import main
main()
""")
    run([*TORCHRUN, script, "train", recipe, "longlora", "--out", tmp_path], expect=1)
    run(train(recipe, "longlora", tmp_path, ranks=2))
    assert summary(folder)["resumed_from"] == "checkpoint-2"
    assert_same(weights(folder), weights(longlora), tolerance=0)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "patch",
    [
        pytest.param(
            "lora.gathered = lambda parameters, write: contextlib.nullcontext()", marks=pytest.mark.slow
        ),
        "gathered = lora.gathered\nlora.gathered = lambda parameters, write: gathered(parameters, False)",
    ],
    ids=["nothing gathered", "nothing written back"],
)
def test_a_careless_merge_under_zero3_is_refused(recipe, tmp_path, patch):
    """DeepSpeed may still hold small parameters whole after a forward pass: then nothing is lost on reading,
    and all on writing.
    """
    folder = prepared(recipe, "longlora", tmp_path)
    script = tmp_path / "careless.py"
    script.write_text(
        "import contextlib\nfrom endprompt.training import lora\n"
        f"{patch}\nfrom endprompt.cli import main\nmain()\n"
    )
    output = run([*TORCHRUN, script, "train", recipe, "longlora", "--out", tmp_path], expect=1)
    assert re.search(
        r"endprompt: merge: model\S+ has a weight of \(0,\)|endprompt: merged model: -?0% of the adapter of"
        r" model",
        output,
    ), output[-4000:]
    assert not (folder / "model").exists()


@pytest.mark.distributed
@pytest.mark.slow
def test_endprompt_with_lora_under_zero2(recipe, tmp_path, base):
    folder = prepared(recipe, "endprompt", tmp_path)
    run(
        train(
            recipe,
            "endprompt",
            tmp_path,
            "--set",
            f"train.deepspeed={REPOSITORY / 'ds_configs/zero2.json'}",
            "--set",
            "train.lora.r=4",
        )
    )
    assert summary(folder)["merge_difference"] < 1e-4
    before, after = load_file(base / "model.safetensors"), weights(folder)
    assert {name.split(".")[-2] for name in after if not torch.equal(before[name], after[name])} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }


@pytest.mark.distributed
def test_lceg_saves_the_frequencies_it_trained_with(recipe, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = prepared(recipe, "lceg", tmp_path)
    run(train(recipe, "lceg", tmp_path, "--set", "train.learning_rate=1e-3", ranks=2))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    scaling = rope.Ntk(1, 256, 512)
    theta = 10000.0 * 2 ** (32 / 30)
    assert model.config.rope_parameters == {
        "rope_type": "default",
        "rope_theta": pytest.approx(theta, rel=1e-12),
    }
    assert model.config.max_position_embeddings == 512
    rope.verify(model.get_decoder().rotary_emb, model.config, scaling, 10000.0)
