"""A model that was extended is extended again: 256 -> 2048 -> 4096, against one run of 256 -> 4096."""

import json

import family_models
import numpy as np
import pytest
import torch
from conftest import run_main, tiny_documents, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM

from endprompt import BadInput
from endprompt.bases import sharpen
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment
from endprompt.training import run as training

WHOLE = sharpen.factor(1.0, 256, 4096)  # 12 / 8, of which 11 / 8 come with the first stage


@pytest.fixture
def stage(tmp_path):
    """stage(name, model, target, rope) -> the experiment, prepared"""
    write_jsonl(tmp_path / "corpus.jsonl", tiny_documents(8, 18))

    def make(name, model, target, rope) -> Experiment:
        tree = {
            "model": {"name_or_path": str(model)},
            "lengths": {"physical": 64, "target": target},
            "data": {"corpus": str(tmp_path / "corpus.jsonl"), "tokens": 512},
            "rope": {"type": rope, "sharpen": 1.0},
            "train": {
                "deepspeed": None,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-3,
                "gradient_checkpointing": False,
            },
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(tree))
        return Experiment.of(schema.load(path), "endprompt", tmp_path / "out")

    return make


def trained(experiment) -> dict:
    """Its config.json."""
    path = experiment.recipe.folder / f"{experiment.recipe.name}.yaml"
    code, _, error = run_main("prepare", path, "endprompt", "--out", experiment.out, "--workers", 1)
    assert code == 0, error
    with family_models.environment():
        training.train(experiment)
    return json.loads((experiment.run / "model/config.json").read_text())


def frequencies(folder) -> np.ndarray:
    network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return network.get_decoder().rotary_emb.inv_freq.double().numpy()


@pytest.mark.parametrize("kind", ["linear", "yarn", "theta"])
def test_two_stages_are_one(stage, base, kind):
    first = stage("first", base, 2048, kind)
    one = trained(first)
    assert one["endprompt"]["original_length"] == 256 and one["max_position_embeddings"] == 2048
    second = stage("second", first.run / "model", 4096, kind)
    assert second.base.window == 2048 and second.base.original_length == 256
    two = trained(second)
    whole = stage("whole", base, 4096, kind)
    theta = whole.base.config.rope_parameters["rope_theta"]
    expected = whole.scaling.inv_freq(theta, len(frequencies(base)) * 2)
    np.testing.assert_allclose(frequencies(second.run / "model"), expected, rtol=3e-6)
    # The twin: one stage alone has others.
    assert not np.allclose(frequencies(first.run / "model"), expected, rtol=1e-3)
    note = two["endprompt"]
    assert (note["original_length"], note["target_length"]) == (256, 4096)
    assert two["max_position_embeddings"] == 4096
    if kind == "yarn":
        assert two["rope_parameters"]["original_max_position_embeddings"] == 256
    # Sharpened by the whole factor, and once: the second run adds what the first lacks.
    assert one["endprompt"]["sharpened"] == pytest.approx(11 / 8)
    assert note["sharpened"] == pytest.approx(WHOLE) and second.sharpness == pytest.approx(WHOLE * 8 / 11)
    assert whole.sharpness == pytest.approx(WHOLE)


def test_weights_are_sharpened_once(stage, base, monkeypatch):
    """What training left, times the part that was missing."""
    first = stage("first", base, 2048, "linear")
    trained(first)
    second = stage("second", first.run / "model", 4096, "linear")
    kept = {}

    def seen(folder, t):
        kept.update(t=t, before=AutoModelForCausalLM.from_pretrained(folder).state_dict())
        return sharpen_on_disk(folder, t)

    sharpen_on_disk = sharpen.sharpen
    monkeypatch.setattr(sharpen, "sharpen", seen)
    trained(second)
    after = AutoModelForCausalLM.from_pretrained(second.run / "model").state_dict()
    assert kept["t"] == pytest.approx(12 / 11)
    for name, one in kept["before"].items():
        torch.testing.assert_close(after[name], one * (kept["t"] if "q_proj" in name else 1))


def test_another_scheme_on_top_is_refused(stage, base):
    first = stage("first", base, 2048, "linear")
    trained(first)
    for kind in ("yarn", "theta", "ntk", "llama3"):
        second = stage(kind, first.run / "model", 4096, kind)
        with pytest.raises(BadInput, match="scaled by linear already.*set rope.type=linear"):
            _ = second.scaling
