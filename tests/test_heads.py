"""Sharpening that is learnt, and YaRN without its factor."""

import json
import sys

import pytest
import torch
import training
from conftest import run_main
from networks import configuration, network
from safetensors.torch import load_file
from test_averaging import SCRIPT

from endprompt import BadInput, Failure
from endprompt.bases import sharpen
from endprompt.positions import rope
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment
from endprompt.recipe.training_keys import Lora
from endprompt.training import heads, lora


def drawn(model) -> None:
    """Factors between 0.5 and 1.5."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(heads.NAME):
                parameter.copy_((torch.rand(parameter.shape) - 0.5) / heads.GAIN)


def logits(model):
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_what_is_folded_is_what_was_trained(model_type):
    model, plain = (network(configuration(model_type)) for _ in range(2))
    names = list(plain.state_dict())
    heads.attach(model)
    assert torch.equal(logits(model), logits(plain))  # they begin at 1
    drawn(model)
    trained = logits(model)
    assert not torch.allclose(trained, logits(plain), atol=1e-2)
    told = heads.fold(model)
    assert 0.5 <= told["least"] < told["mean"] < told["most"] <= 1.5
    assert list(model.state_dict()) == names
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-4)
    with pytest.raises(Failure, match="no factors of heads"):
        heads.fold(model)


def test_each_head_has_its_own():
    model = network(configuration())
    heads.attach(model)
    drawn(model)
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    factors = 1 + heads.GAIN * model.model.layers[0].self_attn.q_proj.sharpness.detach()
    heads.fold(model)
    after = model.model.layers[0].self_attn.q_proj.weight
    assert torch.allclose(after, before * factors.repeat_interleave(8)[:, None])
    assert len(set(factors.tolist())) == 4


def test_under_adapters_they_are_trained_and_folded_first():
    model = network(configuration())
    heads.attach(model)
    lora.inject(model, Lora(r=2), 0)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(heads.NAME))
    heads.train(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(name.endswith(heads.NAME) for name in trained) == 2
    assert all("lora_" in name or name.endswith(heads.NAME) for name in trained)
    drawn(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    expected = logits(model)
    heads.fold(model)
    lora.merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_a_gradient_reaches_them():
    model = network(configuration()).train()
    heads.attach(model)
    ids = torch.arange(3, 43)[None]
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        assert layer.self_attn.q_proj.sharpness.grad.abs().min() > 0


@pytest.mark.parametrize("model_type", ["qwen3", "olmo2", "phi3"])
def test_queries_that_take_no_factor_a_head(model_type):
    with pytest.raises(BadInput, match=f"rope.sharpen_heads: queries of a {model_type} model"):
        heads.check(configuration(model_type, pad_token_id=0))


@pytest.mark.parametrize(
    "options", [["train.deepspeed=null"], ["train.lora={r: 4}"], []], ids=["alone", "lora", "zero3"]
)
def test_a_trained_model(recipe_file, tmp_path, base, options):
    """Plain weights and what config.json and the card say; the constant is multiplied in beside."""
    path, method = recipe_file(data={"tokens": 64 * 16}), "pose_sharp"
    code, _, error = run_main("prepare", path, method, "--out", tmp_path / "1", "--workers", 1)
    assert code == 0, error
    script = SCRIPT.replace('("0", "0.3")', '("1",)').replace('f"train.base_share={share}"', "")
    script = script.replace("[*settings, ]", "settings")
    given = [*options, "train.max_steps=2", "train.learning_rate=0.01", "rope.sharpen_heads=true"]
    training.run([sys.executable, "-c", script, path, tmp_path, method, *given])
    run = tmp_path / "1/small/pose_sharp"
    saved = load_file(run / "model/model.safetensors")
    assert not any(heads.NAME in name for name in saved)
    assert saved.keys() == load_file(base / "model.safetensors").keys()
    note = json.loads((run / "model/config.json").read_text())["endprompt"]
    # The first step has no learning rate yet; the second moves each by GAIN times it at most.
    told = note["sharpened_heads"]
    assert 1 - 0.2 < told["least"] < told["most"] < 1 + 0.2 and told["most"] - told["least"] > 1e-4
    assert note["sharpened"] == pytest.approx(sharpen.factor(1.0, 256, 512))
    assert "Queries of each head are multiplied" in (run / "model/README.md").read_text()


def test_a_base_that_takes_none_is_refused_before_training(recipe_file, tmp_path, tokenizer, base):
    from networks import saved

    folder = saved(tmp_path / "qwen3", base, "qwen3")
    path = recipe_file(model={"name_or_path": str(folder)})
    out = ("--out", tmp_path / "o")
    assert run_main("prepare", path, "pose", *out, "--workers", 1)[0] == 0
    code, _, error = run_main("train", path, "pose", *out, "--set", "rope.sharpen_heads=true")
    assert code == 2 and "rope.sharpen_heads: queries of a qwen3 model" in error


# -- YaRN's factor -------------------------------------------------------------------------------------------


def scheme(*overrides, recipe_file, method="pose"):
    return Experiment.of(schema.load(recipe_file(), overrides), method).scaling


def test_yarn_without_its_factor(recipe_file):
    """The same frequencies; cos and sin as they are; in config.json, in a built model, and read again."""
    own = scheme("rope.type=yarn", recipe_file=recipe_file)
    plain = scheme("rope.type=yarn", "rope.yarn_factor=false", recipe_file=recipe_file)
    assert own.attention_factor > 1.05 and plain.attention_factor == 1.0
    assert (own.inv_freq(1e4, 16) == plain.inv_freq(1e4, 16)).all()
    assert "attention_factor" not in own.hf_parameters(1e4, 16)
    config = configuration()
    rope.apply(config, rope.extended(rope.Asked("yarn", yarn_factor=False), rope.Default(), 64, 512), 512)
    built = network(config).model.rotary_emb
    rope.verify(built, config, rope.Yarn(8.0, 64, given=1.0), 500000.0)
    with pytest.raises(Failure, match="multiplies cos and sin by 1"):
        rope.verify(built, config, rope.Yarn(8.0, 64), 500000.0)
    again = rope.own_scheme(config)
    assert again == rope.Yarn(8.0, 64, given=1.0) and again.times(2.0) == rope.Yarn(16.0, 64, given=1.0)
    further = rope.extended(rope.Asked("yarn", yarn_factor=False), again, 512, 1024)
    assert further == rope.Yarn(16.0, 64, given=1.0)


@pytest.mark.parametrize(
    "asked, own, said",
    [
        ("linear", rope.Default(), "rope.yarn_factor: linear has none"),
        ("yarn", rope.Yarn(2.0, 64), "rope.yarn_factor: the base was trained with it"),
    ],
)
def test_where_there_is_no_factor_to_leave_out(asked, own, said):
    with pytest.raises(BadInput, match=said):
        rope.extended(rope.Asked(asked, yarn_factor=False), own, 64, 512)


def test_a_method_of_another_type_says_so(recipe_file):
    with pytest.raises(BadInput, match="rope.yarn_factor: linear has none"):
        scheme("rope.yarn_factor=false", recipe_file=recipe_file)
    assert (
        scheme("rope.yarn_factor=false", recipe_file=recipe_file, method="pose_sharp").attention_factor == 1
    )
