"""The saved model's weights averaged with the base's: after adapters are merged, before sharpening."""

import json
import shutil
import sys

import family_models
import pytest
import torch
import training
from conftest import run_main
from safetensors.torch import load_file, save_file

from endprompt import Failure
from endprompt.bases import sharpen
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment
from endprompt.training import averaging


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
