"""A model that this program extended is extended again, from the file that it saved, whatever its family."""

import copy
import json
import shutil

import family_models
import numpy as np
import pytest
from family_models import MODELS

from endprompt import BadInput
from endprompt.bases import older_readers
from endprompt.positions import rope
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment

KINDS = ("linear", "yarn", "theta", "ntk", "llama3")
# Every model by its own scheme; those that are not scaled by the others too.
CASES = [
    (name, kind)
    for name, model in MODELS.items()
    for kind in ((model.rope,) if model.keys.get("rope_scaling") else KINDS)
]


@pytest.fixture
def experiment(recipe_file, base):
    """experiment(a new folder, config.json as a mapping or none, target, kind)"""

    def make(folder, written, target, kind):
        if written is not None:
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(written))
        for file in base.glob("tokenizer*"):
            shutil.copy(file, folder)
        path = recipe_file(
            model={"name_or_path": str(folder)}, lengths={"target": target}, rope={"type": kind}
        )
        return Experiment.of(schema.load(path), "short")

    return make


@pytest.fixture
def extended(experiment, tmp_path):
    """extended(name, kind) -> (the experiment, the folder of what it saves, without weights)"""

    def make(name, kind):
        model = MODELS[name]
        written = family_models.written(name)
        if (written.get("sliding_window") or 0) > model.window:  # its windows would cut the second stage
            written["sliding_window"] = 2**20
        first = experiment(tmp_path / "first", written, model.target, kind)
        config = copy.deepcopy(first.base.config)
        rope.apply(config, first.scaling, model.target)
        config.endprompt = {"original_length": model.window, "target_length": model.target}
        config.save_pretrained(tmp_path / "model")
        older_readers.state_rope(tmp_path / "model")
        return first, tmp_path / "model"

    return make


def edit(folder, change) -> None:
    path = folder / "config.json"
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))


@pytest.mark.parametrize("name, kind", CASES)
def test_what_was_saved_is_read_and_extended_again(experiment, extended, name, kind):
    """As it was trained; and two stages have the frequencies of one, where docs/models.md says so."""
    model = MODELS[name]
    first, folder = extended(name, kind)
    phi = first.scaling.name == "longrope"
    again = experiment(folder, None, 2 * model.target, "longrope" if phi else kind)
    base, start = again.base, rope.parameters(first.base.config)["rope_theta"]
    assert base.window == model.target and base.original_length == model.window
    theta, dims = rope.parameters(base.config)["rope_theta"], rope.rotary_dimensions(base.config)
    trained = first.scaling.inv_freq(start, dims)
    np.testing.assert_allclose(base.own_scheme.inv_freq(theta, dims), trained, rtol=1e-9)
    assert base.own_scheme.attention_factor == pytest.approx(first.scaling.attention_factor)
    if phi and kind == "yarn":
        with pytest.raises(BadInput, match="attention_factor.*not known"):
            again.scaling  # noqa: B018 (refuses)
        return
    twice = again.scaling.inv_freq(theta, dims)
    whole = experiment(first.base.folder, None, 2 * model.target, kind).scaling.inv_freq(start, dims)
    of_one = kind != "ntk" and not (phi and kind == "llama3")
    assert np.allclose(twice, whole, rtol=1e-9, atol=0) == of_one


def _set(*path):
    """A change of config.json: the value at the end of ``path``, the last of it, becomes the last."""

    def change(told):
        *places, key, value = path
        for place in places:
            told = told[place]
        told[key] = value

    return change


PAIRS = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
# (a model, what is changed in its saved config.json, what is said)
CONTRADICTIONS = {
    "another share of RoPE": (
        "GLM-4-9B",
        _set("rope_parameters", "partial_rotary_factor", 0.25),
        r"partial_rotary_factor in its config.json is 0\.(5 and 0\.2|2)5.*keep the right one",
    ),
    "another share in a scaling of the older form": (
        "GLM-4-0414",
        _set("rope_scaling", "partial_rotary_factor", 0.25),
        "partial_rotary_factor in its config.json is 0.5 and 0.25",
    ),
    "another factor": (
        "GLM-4-9B",
        _set("rope_scaling", "factor", 2.0),
        "rope_scaling and rope_parameters .*disagree",
    ),
    "other factors of pairs": (
        "Phi-4-mini",
        _set("rope_scaling", "long_factor", PAIRS),
        "rope_scaling and rope_parameters .*disagree",
    ),
    "another factor of cos and sin than the older form has": (
        "Phi-4-mini",
        _set("rope_parameters", "attention_factor", 1.0),
        "rope_scaling and rope_parameters .*disagree",
    ),
    "another factor than the older form has": (
        "Phi-3-mini-128k",
        _set("rope_parameters", "factor", 2.0),
        "rope_scaling and rope_parameters .*disagree",
    ),
    "another first window than the older form has": (
        "Phi-3-mini-128k",
        _set("rope_parameters", "original_max_position_embeddings", 128),
        "rope_scaling and rope_parameters .*disagree",
    ),
    "another theta of the layers with a window": (
        "OLMo-3",
        _set("rope_local_base_freq", 1e4),
        r"rope_theta of the layers with a sliding window \(rope_local_base_freq\) .*10000.0 and 500000.0",
    ),
    "another theta of Gemma's": (
        "Gemma-3-1B",
        _set("rope_local_base_freq", 2e4),
        r"rope_theta of the layers with a sliding window \(rope_local_base_freq\) .*20000.0 and 10000",
    ),
    "a first window of a theta that was raised": (
        "Phi-4",
        _set("original_max_position_embeddings", 32),
        "original_max_position_embeddings in its config.json is 32, and its window 512",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_disagrees_in_a_saved_file_is_refused(experiment, extended, name):
    model, change, said = CONTRADICTIONS[name]
    _, folder = extended(model, MODELS[model].rope if model != "Phi-4" else "theta")
    experiment(folder, None, 2 * MODELS[model].target, "theta").base.config  # noqa: B018 (the twin)
    edit(folder, change)
    with pytest.raises(BadInput, match=said) as error:
        experiment(folder, None, 2 * MODELS[model].target, "theta").base.config  # noqa: B018 (refuses)
    assert "\n" not in str(error.value)


def test_a_local_theta_is_no_key_of_other_families(experiment, extended):
    _, folder = extended("Llama-3", "linear")
    edit(folder, _set("rope_local_base_freq", 1e4))
    with pytest.raises(BadInput, match="rope_local_base_freq .*a scaled RoPE under another name"):
        experiment(folder, None, 1024, "linear").base.config  # noqa: B018 (refuses)
