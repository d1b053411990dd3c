"""RoPE schemes: frequencies against transformers' own, extension of scaled bases, and what is refused."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, run_main
from networks import configuration as configuration_of
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from endprompt import BadInput
from endprompt.positions import base_scheme, rope

DIMS = 16
LONG = tuple(1 + 0.75 * i for i in range(DIMS // 2))
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * (DIMS // 2),
    "long_factor": list(LONG),
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALED = {"linear": {"rope_type": "linear", "factor": 4.0}, "yarn": YARN, "llama3": LLAMA3}
SCALED["longrope"] = LONGROPE


def configuration(**changes):
    return configuration_of(**{"head_dim": DIMS, **changes})


def scaled(parameters: dict, window: int = 256, theta: float = 5e5):
    return configuration(
        max_position_embeddings=window, rope_parameters={"rope_theta": theta, **copy.deepcopy(parameters)}
    )


def asked(name: str, **values) -> rope.Asked:
    return rope.Asked(name, **values)


def built(config) -> tuple[np.ndarray, float]:
    module = LlamaRotaryEmbedding(config)
    return module.inv_freq.double().numpy(), module.attention_scaling


EXTENDED = [
    rope.extended(asked("linear"), rope.Default(), 64, 512),
    rope.extended(asked("yarn"), rope.Default(), 64, 512),
    rope.extended(asked("theta"), rope.Default(), 64, 512),
    rope.extended(asked("theta", theta=3e6), rope.Default(), 64, 512),
    rope.extended(asked("ntk"), rope.Default(), 64, 512),
    rope.extended(asked("llama3"), rope.Default(), 64, 512),
    rope.extended(asked("longrope", long_factor=LONG), rope.Default(), 64, 512),
    rope.Yarn(8.0, 64, fast=16, slow=2, truncate=False),
    rope.Yarn(8.0, 64, mscale=1.0, mscale_all_dim=0.5),
]


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("scheme", EXTENDED, ids=lambda scheme: str(scheme)[:40])
def test_frequencies_are_those_of_transformers(scheme, theta):
    config = configuration(rope_parameters={"rope_type": "default", "rope_theta": theta})
    rope.apply(config, scheme, 512)
    found, multiplied = built(config)
    np.testing.assert_allclose(found, scheme.inv_freq(theta, DIMS), rtol=3e-6)
    assert multiplied == pytest.approx(scheme.attention_factor, rel=1e-6)
    assert config.max_position_embeddings == 512
    assert rope.verify(LlamaRotaryEmbedding(config), config, scheme, theta) < 1e-5
    # Whoever reads the file computes the same, and it names a scheme that can be extended again.
    reread = configuration(**json.loads(config.to_json_string()))
    assert built(reread)[0] == pytest.approx(found)
    again = rope.own_scheme(reread)
    kept = reread.rope_parameters["rope_theta"]
    np.testing.assert_allclose(again.inv_freq(kept, DIMS), scheme.inv_freq(theta, DIMS), rtol=1e-12)
    assert again.attention_factor == pytest.approx(scheme.attention_factor)


def test_theta_follows_the_ntk_rule():
    """The slowest pair turns by 1 / s of what it did, the fastest as it did (bloc97's rule)."""
    before = rope.Default().inv_freq(1e4, 64)
    after = rope.extended(asked("theta"), rope.Default(), 64, 512).inv_freq(1e4, 64)
    assert after[0] == before[0] and after[-1] == pytest.approx(before[-1] / 8)
    given = rope.extended(asked("theta", theta=5e5), rope.Default(), 64, 512)
    np.testing.assert_allclose(given.inv_freq(1e4, 64), rope.Default().inv_freq(5e5, 64))


def test_llama3_by_hand():
    """Of two pairs in a window of 1257 tokens, one turns 200 times and the other twice."""
    scheme = rope.Llama3(8.0, 1257)
    found = scheme.inv_freq(10000.0, 4)
    assert found[0] == 1.0
    turns = 1257 * 0.01 / (2 * np.pi)
    kept = (turns - 1) / 3
    assert found[1] == pytest.approx(0.01 * (kept + (1 - kept) / 8))


@pytest.mark.parametrize("name", SCALED)
def test_two_stages_are_one_of_the_product(name):
    """8 and 4 times one after the other, each from the config of the one before, are 32 times at once."""
    theta, first = 5e5, scaled(SCALED[name])
    once, twice = copy.deepcopy(first), first
    for target in (2048, 8192):
        own = rope.own_scheme(twice)
        step = rope.extended(asked(name), own, twice.max_position_embeddings, target)
        twice = copy.deepcopy(twice)
        rope.apply(twice, step, target)
    whole = rope.extended(asked(name), rope.own_scheme(once), 256, 8192)
    rope.apply(once, whole, 8192)
    assert once.rope_parameters["factor"] == twice.rope_parameters["factor"] == 32 * SCALED[name]["factor"]
    np.testing.assert_allclose(step.inv_freq(theta, DIMS), whole.inv_freq(theta, DIMS), rtol=1e-12)
    np.testing.assert_array_equal(built(once)[0], built(twice)[0])
    assert built(once)[1] == built(twice)[1]
    if name in ("yarn", "llama3", "longrope"):
        assert twice.rope_parameters["original_max_position_embeddings"] == 64


def test_theta_twice_is_theta_once():
    config = configuration()
    theta = config.rope_parameters["rope_theta"]
    for window, target in ((64, 512), (512, 4096)):
        step = rope.extended(asked("theta"), rope.own_scheme(config), window, target)
        rope.apply(config, step, target)
    whole = rope.extended(asked("theta"), rope.Default(), 64, 4096)
    np.testing.assert_allclose(built(config)[0], whole.inv_freq(theta, DIMS), rtol=3e-6)


def test_ntk_twice_is_not_ntk_once():
    """And the page of models does not say so."""
    config = configuration()
    theta = config.rope_parameters["rope_theta"]
    for window, target in ((64, 512), (512, 4096)):
        rope.apply(config, rope.extended(asked("ntk"), rope.own_scheme(config), window, target), target)
    whole = rope.extended(asked("ntk"), rope.Default(), 64, 4096).inv_freq(theta, DIMS)
    assert not np.allclose(built(config)[0][1:], whole[1:], rtol=0.1, atol=0)
    page = " ".join((REPOSITORY / "docs/models.md").read_text().split())
    claim = page[: page.index("8K -> 64K -> 512K")].rpartition(". ")[2]
    assert all(f"`{name}`" in claim for name in (*SCALED, "theta")) and "ntk" not in claim
    assert "Under `ntk` (method `lceg`) it has others" in page


@pytest.mark.parametrize("own", SCALED)
@pytest.mark.parametrize("name", rope.TYPES)
def test_other_schemes_do_not_compose(own, name):
    scheme = rope.own_scheme(scaled(SCALED[own]))
    if name == own:
        assert rope.extended(asked(name), scheme, 256, 512).factor == 2 * SCALED[own]["factor"]
        return
    values = {"long_factor": LONG} if name == "longrope" else {}
    with pytest.raises(BadInput, match=f"rope.type: .*scaled by {own} already.*set rope.type={own}"):
        rope.extended(asked(name, **values), scheme, 256, 512)


@pytest.mark.parametrize("own", ["default", *SCALED])
def test_the_base_keeps_its_own(own):
    """A method without a RoPE of its own scores a scaled base as it came."""
    parameters = SCALED.get(own, {"rope_type": "default"})
    config = scaled(parameters)
    before = copy.deepcopy(config.to_dict())
    scheme = rope.extended(asked(None), rope.own_scheme(config), 256, 2048)
    rope.apply(config, scheme, 2048)
    assert config.to_dict() == before
    rope.verify(LlamaRotaryEmbedding(config), config, scheme, 5e5)


def test_longrope_reads_every_row_alike():
    """Short factors of a base are its own; what is extended has one set."""
    config = scaled(LONGROPE)
    assert rope.own_scheme(config).short == (1.0,) * 8
    step = rope.extended(asked("longrope"), rope.own_scheme(config), 256, 2048)
    rope.apply(config, step, 2048)
    assert config.rope_parameters["short_factor"] == config.rope_parameters["long_factor"]
    module = LlamaRotaryEmbedding(config)
    before = module.inv_freq.clone()
    for last in (7, 63, 64, 2047):
        module(torch.zeros(1), torch.tensor([[last]]))
        assert torch.equal(module.inv_freq, before)


@pytest.mark.parametrize("source", [rope.Linear(8.0), rope.Yarn(8.0, 64), rope.Llama3(8.0, 64)])
def test_any_scheme_as_factors_of_pairs(source):
    config = configuration()
    theta = config.rope_parameters["rope_theta"]
    scheme = rope.as_longrope(source, 64, theta, DIMS)
    rope.apply(config, scheme, 512)
    found, multiplied = built(config)
    np.testing.assert_allclose(found, source.inv_freq(theta, DIMS), rtol=3e-6)
    assert multiplied == pytest.approx(source.attention_factor)


def test_longrope_of_another_attention_factor_is_not_extended():
    given = scaled({**LONGROPE, "attention_factor": 1.19})
    with pytest.raises(BadInput, match="attention_factor.*1.19.*not known"):
        rope.extended(asked("longrope"), rope.own_scheme(given), 256, 512)
    unscaled = scaled({**LONGROPE, "attention_factor": 1.0})
    assert rope.extended(asked("longrope"), rope.own_scheme(unscaled), 256, 512).attention_factor == 1.0
    # The same where the factors of the pairs are given.
    with pytest.raises(BadInput, match="attention_factor.*1.19.*not known"):
        rope.extended(asked("longrope", long_factor=LONG), rope.own_scheme(given), 256, 512)
    found = rope.extended(asked("longrope", long_factor=LONG), rope.own_scheme(unscaled), 256, 512)
    assert (found.attention_factor, found.long) == (1.0, tuple(LONG))


WRONG = [
    ({"rope_type": "linear"}, "lacks factor"),
    ({"rope_type": "linear", "factor": "8"}, "factor.*'8', no positive number"),
    ({"rope_type": "linear", "factor": True}, "factor.*True, no positive number"),
    ({"rope_type": "linear", "factor": -2.0}, "factor.*-2.0, no positive number"),
    ({"rope_type": "linear", "factor": float("nan")}, "factor.*nan, no positive number"),
    ({"rope_type": "linear", "factor": float("inf")}, "factor.*inf, no positive number"),
    ({"rope_type": "linear", "factor": 0.5}, "factor.*0.5, and no RoPE is scaled by less than 1"),
    ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "beta_fast.*no part of the RoPE type linear"),
    ({"rope_type": "default", "factor": 4.0}, "factor.*no part of the RoPE type default"),
    ({"rope_type": "dynamic", "factor": 4.0}, "dynamic NTK.*rope.type=ntk"),
    ({"rope_type": "proportional"}, "type 'proportional'.*not supported; default, linear"),
    ({"rope_type": ["yarn"]}, "not supported; default, linear"),
    ({"rope_type": "mrope", "mrope_section": [8, 4, 4]}, "type 'mrope'.*not supported"),
    ({"rope_type": "yarn", "factor": 4.0}, "lacks original_max_position_embeddings"),
    ({**YARN, "original_max_position_embeddings": 64.5}, "64.5, no positive number of tokens"),
    ({**YARN, "original_max_position_embeddings": 0}, "0, no positive number of tokens"),
    ({**YARN, "attention_factor": 1.5}, "attention_factor.*1.5, and YaRN's own is 1.13863"),
    ({**YARN, "beta_fast": 1, "beta_slow": 32}, "beta_slow 32.*not below beta_fast 1"),
    ({**YARN, "beta_fast": "32"}, "beta_fast.*'32', no positive number"),
    ({**YARN, "truncate": "no"}, "truncate.*'no', not true or false"),
    ({**YARN, "mscale": []}, r"mscale.*\[\], no positive number"),
    ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor 4.0.*not below high_freq_factor 4.0"),
    ({**LLAMA3, "high_freq_factor": None}, "lacks high_freq_factor"),
    ({**LLAMA3, "factor": 0}, "factor.*0, no positive number"),
    ({**LONGROPE, "long_factor": [1.0] * 7}, "long_factor.*must be 8 positive numbers"),
    ({**LONGROPE, "long_factor": [1.0] * 7 + [0.0]}, "long_factor.*must be 8 positive numbers"),
    ({**LONGROPE, "short_factor": "1" * 8}, "short_factor.*must be 8 positive numbers"),
    ({**LONGROPE, "short_factor": [1.0] * 7 + ["1"]}, "short_factor.*must be 8 positive numbers"),
    ({**LONGROPE, "attention_factor": 0}, "attention_factor.*0, no positive number"),
    ({**LONGROPE, "factor": "4"}, "factor.*'4', no positive number"),
]


@pytest.mark.parametrize("parameters, said", WRONG, ids=lambda value: str(value)[:50])
def test_malformed_parameters(parameters, said):
    with pytest.raises(BadInput, match=said) as error:
        base_scheme.written({"rope_theta": 1e4, **parameters}, DIMS, 256)
    assert "\n" not in str(error.value) and str(error.value).startswith("model: ")


@pytest.mark.parametrize("parameters", [*SCALED.values(), {"rope_type": "default"}, {"type": "default"}])
def test_well_formed_parameters(parameters):
    base_scheme.written({"rope_theta": 1e4, "partial_rotary_factor": 1.0, **parameters}, DIMS, 256)


@pytest.mark.parametrize("name", sorted(set(rope.TYPES) & set(ROPE_INIT_FUNCTIONS)))
def test_transformers_functions_agree(name):
    """The function that other rotary modules call, on the written config."""
    config = configuration()
    theta = config.rope_parameters["rope_theta"]
    values = {"long_factor": LONG} if name == "longrope" else {}
    scheme = rope.extended(asked(name, **values), rope.Default(), 64, 512)
    rope.apply(config, scheme, 512)
    found, multiplied = ROPE_INIT_FUNCTIONS[name](config, "cpu", seq_len=512)
    np.testing.assert_allclose(found.double().numpy(), scheme.inv_freq(theta, DIMS), rtol=3e-6)
    assert multiplied == pytest.approx(scheme.attention_factor)


def test_keys_of_another_type_are_refused(recipe_file, tmp_path):
    for given, said in (
        ({"type": "linear", "theta": 1e6}, "rope.theta: linear has no such value"),
        ({"theta": 1e6}, "rope.theta: linear has no such value"),
        ({"type": "yarn", "long_factor": [1.0] * 16}, "rope.long_factor: yarn has none"),
        ({"type": "longrope"}, "rope.long_factor is missing"),
        ({"type": "theta", "theta": 1.0}, "rope.theta"),
        ({"type": "theta", "theta": "big"}, "rope.theta"),
        ({"type": "longrope", "long_factor": []}, "rope.long_factor"),
        ({"type": "longrope", "long_factor": [1.0] * 7}, "rope.long_factor"),
        ({"type": "longrope", "long_factor": [1.0] * 7 + [-1.0]}, "rope.long_factor"),
    ):
        code, out, err = run_main("prepare", recipe_file(rope=given), "endprompt", "--out", tmp_path / "out")
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1, (given, err)
        assert not (tmp_path / "out").exists()
