"""The saved model's weights averaged with the base's: after adapters are merged, before sharpening."""

import json
import shutil
import sys

import family_models
import pytest
import torch
import training
import yaml
from conftest import run_main
from safetensors.torch import load_file, save_file

from endprompt import Failure
from endprompt.bases import sharpen
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment
from endprompt.runs import averaging


def test_a_share_of_each():
    one, other = {"a": torch.tensor([1.0, 3.0]), "b": torch.ones(2)}, {"a": torch.tensor([5.0, -1.0])}
    with pytest.raises(Failure, match="the saved b is \\(2,\\), and the base lacks it"):
        averaging.mixed(one, other, 0.25)
    with pytest.raises(Failure, match="the saved b is \\(2,\\), and the base has it as \\(3,\\)"):
        averaging.mixed(one, {**other, "b": torch.ones(3)}, 0.25)
    found = averaging.mixed(one, {**other, "b": torch.zeros(2)}, 0.25)
    assert found["a"].tolist() == [2.0, 2.0] and found["b"].tolist() == [0.75, 0.75]


def test_in_float32_and_back():
    one, other = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125])
    found = averaging.mixed({"a": one}, {"a": other}, 0.9)["a"]
    assert found.dtype == torch.bfloat16 and found.item() == 1.0078125


def test_which_share(recipe_file):
    def share(method, *overrides):
        return Experiment.of(schema.load(recipe_file(), overrides), method).base_share

    assert (share("pose"), share("longrecipe")) == (0.0, 0.5)
    assert share("pose", "train.base_share=0.25") == share("longrecipe", "train.base_share=0.25") == 0.25
    assert share("longrecipe", "train.base_share=0") == 0.0


@pytest.mark.parametrize("name", ["Mixtral", "Phi-4-mini", "Gemma-3-1B"])
def test_names_of_every_family(recipe_file, tmp_path, base, name):
    """Fused, tied and single weights: a base averaged with itself is itself, and with zeros a share of it."""
    model = family_models.saved(tmp_path / "model", family_models.written(name), base)
    lengths = {"physical": 64, "target": family_models.MODELS[name].target}
    path = recipe_file(model={"name_or_path": str(model)}, lengths=lengths)
    recipe = schema.load(path, ["train.base_share=0.25"])
    shutil.copytree(model, tmp_path / "same")
    averaging.average(tmp_path / "same", Experiment.of(recipe, "pose"), False)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "same"))
    training.assert_same(before, after, 0)
    assert json.loads((tmp_path / "same/config.json").read_text())["endprompt"] == {"base_share": 0.25}
    zeros = {key: torch.zeros_like(value) for key, value in before.items()}
    save_file(zeros, tmp_path / "same/model.safetensors", {"format": "pt"})
    averaging.average(tmp_path / "same", Experiment.of(recipe, "pose"), False)
    quarter = {key: value * 0.25 for key, value in before.items()}
    training.assert_same(quarter, load_file(tmp_path / "same/model.safetensors"), 1e-7)


SCRIPT = """
import sys
from pathlib import Path
from endprompt.recipe import experiment
from endprompt.training import run
recipe, out, method, *settings = sys.argv[1:]
for share in ("0", "0.3"):
    given = [*settings, f"train.base_share={share}"]
    run.train(experiment.resolve(recipe, given, method, Path(out, share)))
"""


@pytest.mark.parametrize(
    "options",
    [["train.deepspeed=null"], pytest.param(["train.lora={r: 4}"], marks=pytest.mark.slow)],
    ids=["whole", "lora"],
)
def test_a_trained_model(recipe_file, tmp_path, base, options):
    """Merged first where there are adapters (under ZeRO-3), then averaged, then sharpened."""
    path, method = recipe_file(data={"tokens": 64 * 16}), "pose_sharp"
    given = [*options, "train.max_steps=2", "train.learning_rate=0.01"]
    for share in ("0", "0.3"):
        code, _, error = run_main("prepare", path, method, "--out", tmp_path / share, "--workers", 1)
        assert code == 0, error
    training.run([sys.executable, "-c", SCRIPT, path, tmp_path, method, *given])
    trained, averaged = (training.weights(tmp_path / share / "small" / method) for share in ("0", "0.3"))
    before, t = load_file(base / "model.safetensors"), sharpen.factor(1.0, 256, 512)
    moved = 0
    for name, tensor in trained.items():
        by = t if "q_proj" in name else 1.0
        expected = 0.7 * tensor + 0.3 * before[name].float() * by
        torch.testing.assert_close(averaged[name], expected, rtol=0, atol=2e-6)
        moved += not torch.allclose(tensor, before[name].float() * by, atol=1e-4)
    assert moved >= 8
    note = json.loads((tmp_path / "0.3/small/pose_sharp/model/config.json").read_text())["endprompt"]
    assert note["base_share"] == 0.3 and note["sharpened"] == pytest.approx(t)
    assert "base_share" not in (tmp_path / "0/small/pose_sharp/model/config.json").read_text()
    exported = shared(tmp_path / "0/small/pose_sharp", tmp_path / "copy", 0.3)
    training.assert_same(averaged, load_file(exported / "model.safetensors"), 2e-6)
    assert json.loads((exported / "config.json").read_text())["endprompt"] == note
    assert "70.0% of what was trained, 30.0% of the base's" in (exported / "README.md").read_text()


def shared(run, to, share, *options):
    """The copy of ``run``'s model with that share of the base."""
    code, _, error = run_main("export", run, "--to", to, "--share", share, *options)
    assert code == 0, error
    return to


def run_of(folder, model, recipe, **note):
    """A run's folder whose saved model is ``model``, unchanged by training."""
    (folder / "run").mkdir(parents=True)
    shutil.copytree(model, folder / "run/model")
    (folder / "run/recipe.yaml").write_text(Experiment.of(recipe, "pose_sharp").dump())
    path = folder / "run/model/config.json"
    config = json.loads(path.read_text())
    lengths = {"original_length": 64, "target_length": recipe.lengths.target}
    path.write_text(json.dumps({**config, "endprompt": {"method": "pose_sharp", **lengths, **note}}))
    return folder / "run"


@pytest.mark.parametrize("name", ["Llama-2", "Mixtral", "Phi-4-mini", "Gemma-3-1B", "Qwen3-0.6B"])
def test_sharpened_weights_are_averaged_with_sharpened_ones(recipe_file, tmp_path, base, name):
    """Fused queries, norms behind them, norms that count from 0: a base that is only sharpened, averaged with
    itself, is itself, bit for bit but for the order of rounding."""
    model = family_models.saved(tmp_path / "model", family_models.written(name), base)
    lengths = {"physical": 64, "target": family_models.MODELS[name].target}
    recipe = schema.load(recipe_file(model={"name_or_path": str(model)}, lengths=lengths))
    run, before = run_of(tmp_path, model, recipe), load_file(model / "model.safetensors")
    sharpen.sharpen(run / "model", 1.5)
    sharp = load_file(run / "model/model.safetensors")
    found = load_file(shared(run, tmp_path / "copy", 0.25) / "model.safetensors")
    training.assert_same(sharp, found, 1e-6)
    # The twin: with the base's own queries it is another.
    plain = averaging.mixed(sharp, before, 0.25)
    moved = [key for key in sharp if not torch.allclose(plain[key], sharp[key], atol=1e-4)]
    assert moved and all(not torch.equal(sharp[key], before[key]) for key in moved)


@pytest.mark.parametrize("exact", [True, False])
def test_by_position_the_average_is_not_sharpened(recipe_file, tmp_path, base, exact):
    """Nor is it where the base was sharpened already, by an extension before this one."""
    model = family_models.saved(tmp_path / "model", family_models.written("Llama-2"), base)
    target = family_models.MODELS["Llama-2"].target
    t = sharpen.factor(1.0, 64, target)
    recipe = schema.load(
        recipe_file(model={"name_or_path": str(model)}, lengths={"physical": 64, "target": target})
    )
    before, by = load_file(model / "model.safetensors"), t
    if not exact:  # the base as it is then found
        path = model / "config.json"
        note = {"method": "pose_sharp", "sharpened": 1.1, "sharpened_from": 64, "original_length": 64}
        path.write_text(json.dumps({**json.loads(path.read_text()), "endprompt": note}))
        before = {key: value / (1.1 if "q_proj" in key else 1.0) for key, value in before.items()}
        by = t / 1.1
    run = run_of(tmp_path, model, recipe, **({} if exact else {"sharpened": 1.1, "sharpened_from": 64}))
    path = run / "model/config.json"  # as training writes the RoPE
    parameters = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **parameters}))
    sharpen.sharpen(run / "model", by)
    found = load_file(shared(run, tmp_path / "copy", 0.25, "--position-dependent") / "model.safetensors")
    training.assert_same(before, found, 1e-6)


def test_what_cannot_be_averaged_is_refused(recipe_file, tmp_path, base):
    model = family_models.saved(tmp_path / "model", family_models.written("Llama-2"), base)
    target = family_models.MODELS["Llama-2"].target
    recipe = schema.load(
        recipe_file(model={"name_or_path": str(model)}, lengths={"physical": 64, "target": target})
    )
    run = run_of(tmp_path, model, recipe)

    def refused(said, share=0.5):
        code, _, error = run_main("export", run, "--to", tmp_path / "copy", "--share", share)
        assert code == 2 and said in error and len(error.strip().splitlines()) == 1, error
        assert sorted(path.name for path in tmp_path.iterdir()) == names

    names = sorted(path.name for path in tmp_path.iterdir())
    for share in (0, 1, -0.5, 2, "nan"):
        refused("--share: a number above 0 and below 1 is wanted", share)
    config = (run / "model/config.json").read_text()
    (run / "model/config.json").write_text(config.replace('"method"', '"base_share": 0.25, "method"'))
    refused("the model is an average with 25.0% of the base already")
    (run / "model/config.json").write_text(config.replace('"method"', '"some"'))
    refused("does not name the method")
    (run / "model/config.json").write_text(config)
    fingerprint = Experiment.of(recipe, "pose_sharp").base.fingerprint
    (run / "train.json").write_text(json.dumps({"base": "0" * len(fingerprint)}))
    refused("is another base now than the one that was trained")
    (run / "train.json").write_text(json.dumps({"base": fingerprint}))
    shutil.rmtree(shared(run, tmp_path / "copy", 0.5))  # the twin
    (run / "train.json").unlink()
    resolved = (run / "recipe.yaml").read_text()
    flash = resolved.replace("attn_implementation: null", "attn_implementation: flash_attention_2")
    assert flash != resolved
    (run / "recipe.yaml").write_text(flash)
    shutil.rmtree(shared(run, tmp_path / "copy", 0.5))  # how attention is computed is nothing to weights
    (run / "recipe.yaml").unlink()
    refused("recipe.yaml")
    (run / "recipe.yaml").write_text(resolved)
    before = load_file(model / "model.safetensors")
    wider = {**yaml.safe_load((model / "config.json").read_text()), "intermediate_size": 128}
    (model / "config.json").write_text(json.dumps(wider))
    for key in before:
        if "gate_proj" in key or "up_proj" in key:
            before[key] = torch.zeros(128, 64)
        elif "down_proj" in key:
            before[key] = torch.zeros(64, 128)
    save_file(before, model / "model.safetensors", {"format": "pt"})
    refused("it is another base than the one that was trained")
    shutil.rmtree(model)
    names.remove("model")
    refused("model.name_or_path")
