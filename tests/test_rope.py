"""RoPE frequencies against transformers' own, and guards against a scaling that silently did not happen."""

import copy

import numpy as np
import pytest
import torch
from networks import THETA, configuration, network
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from endprompt import BadInput
from endprompt.positions import rope


def scaled(model_type="llama", factor=8.0, **changes):
    config = configuration(model_type, **changes)
    rope.apply(config, rope.Linear(factor), int(64 * factor))
    return config


@pytest.mark.parametrize("theta", [1e4, 1e5, 5e5, 1e6])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(
    "scaling",
    [rope.Default(), rope.Linear(1.0), rope.Linear(2.0), rope.Linear(8.0), rope.Linear(32 / 3)],
    ids=str,
)
def test_frequencies_are_those_of_transformers(theta, head_dim, scaling):
    config = configuration(
        hidden_size=4 * head_dim,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    rope.apply(config, scaling, 1024)
    expected = scaling.inv_freq(theta, head_dim)
    built = LlamaRotaryEmbedding(config).inv_freq.double().numpy()
    assert expected.dtype == np.float64 and expected.shape == (head_dim // 2,)
    np.testing.assert_allclose(built, expected, rtol=3e-6)
    if isinstance(scaling, rope.Linear):
        np.testing.assert_allclose(
            ROPE_INIT_FUNCTIONS["linear"](config, "cpu")[0].double().numpy(), expected, rtol=3e-6
        )


def test_frequencies_by_hand():
    np.testing.assert_allclose(rope.Default().inv_freq(10000.0, 4), [1.0, 0.01], rtol=1e-14)
    np.testing.assert_allclose(rope.Linear(4.0).inv_freq(10000.0, 4), [0.25, 0.0025], rtol=1e-14)


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_factor_one_is_the_identity(theta):
    np.testing.assert_array_equal(rope.Linear(1.0).inv_freq(theta, 64), rope.Default().inv_freq(theta, 64))


def test_interpolated_positions_turn_by_the_original_angles():
    """Position 8 p under factor 8 is position p of the model as it came (paper Eq. 2)."""
    x, positions = torch.zeros(1, 1, 1), torch.arange(64)[None]
    before = LlamaRotaryEmbedding(configuration())(x, positions)
    after = LlamaRotaryEmbedding(scaled(factor=8.0))(x, 8 * positions)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("theta", [500000.0, 100000.0])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_apply_keeps_theta(model_type, theta):
    config = configuration(model_type, rope_parameters={"rope_type": "default", "rope_theta": theta})
    rope.apply(config, rope.Linear(8.0), 512)
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": theta, "factor": 8.0}
    assert config.max_position_embeddings == 512


def test_default_leaves_the_window_alone():
    config = configuration()
    rope.apply(config, rope.Default(), 512)
    assert (
        config.rope_parameters == {"rope_type": "default", "rope_theta": THETA}
        and config.max_position_embeddings == 64
    )


SCHEMES = [rope.Linear(8.0), rope.Ntk(8, 64, 512), rope.Ntk(4, 64, 512), rope.Yarn(8.0, 64)]


def built(scaling, theta=THETA, model_type="llama", **changes):
    """The config with ``scaling`` and 512 positions, and its rotary module."""
    config = configuration(
        model_type, rope_parameters={"rope_type": "default", "rope_theta": theta}, **changes
    )
    rope.apply(config, scaling, 512)
    return config, LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(
    "factor, original", [(1.0, 512), (2.0, 4096), (8.0, 8192), (16.0, 64), (32 / 3, 768)]
)
def test_yarn_is_that_of_transformers(theta, head_dim, factor, original):
    scaling = rope.Yarn(factor, original)
    config = configuration(
        hidden_size=4 * head_dim,
        head_dim=head_dim,
        max_position_embeddings=original,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    rope.apply(config, scaling, round(original * factor))
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    np.testing.assert_allclose(inv_freq.double().numpy(), scaling.inv_freq(theta, head_dim), rtol=3e-6)
    assert attention_factor == pytest.approx(scaling.attention_factor, rel=1e-12)


def dynamic(factor, window, theta=THETA, model_type="llama", **changes):
    """The config that transformers' own, length-dependent ``dynamic`` scaling takes."""
    parameters = {"rope_type": "dynamic", "factor": factor, "rope_theta": theta}
    return configuration(model_type, max_position_embeddings=window, rope_parameters=parameters, **changes)


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(
    "factor, original, target",
    [(1, 512, 4096), (4, 8192, 65536), (8, 8192, 65536), (8, 256, 2048), (7, 8192, 100_000)],
)
def test_ntk_holds_what_dynamic_has_at_the_target_length(theta, head_dim, factor, original, target):
    scaling = rope.Ntk(factor, original, target)
    shape = {"hidden_size": 4 * head_dim, "head_dim": head_dim}
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](
        dynamic(factor, original, theta, **shape), "cpu", seq_len=target
    )
    np.testing.assert_allclose(scaling.inv_freq(theta, head_dim), expected.double().numpy(), rtol=3e-6)
    parameters = {"rope_type": "default", "rope_theta": theta}
    config = configuration(max_position_embeddings=original, rope_parameters=parameters, **shape)
    rope.apply(config, scaling, target)
    np.testing.assert_allclose(
        LlamaRotaryEmbedding(config).inv_freq.double().numpy(), scaling.inv_freq(theta, head_dim), rtol=3e-6
    )
    assert config.max_position_embeddings == target and config.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_ntk_gives_dynamics_logits_at_the_target_and_the_same_frequencies_below(model_type):
    """Rows of the target length train the target's frequencies; a shorter row must be read with them too
    (LCEG's evaluation).
    """
    config = configuration(model_type)
    rope.apply(config, rope.Ntk(4, 64, 512), 512)
    held, moving = network(config), network(dynamic(4.0, 64, model_type=model_type))
    ids = torch.randint(3, 96, (1, 512), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = held(ids).logits
        assert (whole - moving(ids).logits).abs().max() == 0.0
        rope.forget(moving)
        # The twin: inside the window, dynamic scaling reads a row otherwise than it was trained.
        short = ids[:, :48]
        torch.testing.assert_close(held(short).logits, whole[:, :48])
        assert (moving(short).logits - whole[:, :48]).abs().max() > 1e-2


def test_ntk_and_yarn_by_hand():
    # d = 4, theta = 16, L / C = 8, factor 4: theta grows by 29^(4/2) = 841.
    np.testing.assert_allclose(rope.Ntk(4, 64, 512).inv_freq(16.0, 4), [1.0, (16 * 841) ** -0.5], rtol=1e-14)
    assert rope.Ntk(4, 64, 512).hf_parameters(16.0, 4) == {"rope_type": "default", "rope_theta": 16.0 * 841}
    # d = 16, C = 64: the wave that turns once within C has index 8 ln(64 / 2 pi) / ln 10^4 = 2.02, so the
    # ramp runs from 0 to 3.
    kept = rope.Yarn(8.0, 64).inv_freq(1e4, 16) / rope.Default().inv_freq(1e4, 16)
    np.testing.assert_allclose(kept, [1, 1 - 7 / 24, 1 - 14 / 24] + 5 * [1 / 8], rtol=1e-12)
    assert rope.Yarn(8.0, 64).attention_factor == pytest.approx(1.2079441541679836)


@pytest.mark.parametrize("scaling", SCHEMES, ids=str)
def test_verify_passes_every_scheme_and_leaves_no_trace(scaling):
    config, rotary = built(scaling)
    before = copy.deepcopy(rotary.state_dict()), rotary.inv_freq.clone()
    assert rope.verify(rotary, config, scaling, THETA) < 3e-6
    assert torch.equal(rotary.inv_freq, before[1])
    positions = torch.arange(48)[None]
    for one, other in zip(
        rotary(torch.zeros(1), positions),
        LlamaRotaryEmbedding(config)(torch.zeros(1), positions),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scaling", SCHEMES, ids=str)
@pytest.mark.parametrize(
    "other",
    [*SCHEMES, rope.Default(), rope.Yarn(4.0, 64), rope.Yarn(8.0, 4096), rope.Ntk(8, 128, 512)],
    ids=str,
)
def test_verify_tells_the_schemes_apart(scaling, other):
    config, rotary = built(scaling)
    if scaling != other:
        with pytest.raises(RuntimeError, match="RoPE check"):
            rope.verify(rotary, config, other, THETA)


@pytest.mark.parametrize("scaling", SCHEMES, ids=str)
def test_verify_refuses_another_theta_for_every_scheme(scaling):
    config, rotary = built(scaling, theta=1e4)
    with pytest.raises(RuntimeError, match="RoPE check"):
        rope.verify(rotary, config, scaling, THETA)


def test_scaling_that_looks_at_the_rows_length_is_refused():
    """Its frequencies at rest are those of no scaling, and at the target those of ``ntk``: neither passes for
    the other.
    """
    config = dynamic(4.0, 64)
    rotary = LlamaRotaryEmbedding(config)
    rotary(torch.zeros(1), torch.tensor([[511]]))
    np.testing.assert_allclose(
        rotary.inv_freq.double().numpy(), SCHEMES[2].inv_freq(THETA, 8), rtol=3e-6
    )  # the trap
    with pytest.raises(RuntimeError, match="computes 'dynamic'"):
        rope.verify(rotary, config, SCHEMES[2], THETA)


def test_yarn_without_its_attention_factor_is_refused():
    config, rotary = built(SCHEMES[3])
    rotary.attention_scaling = 1.0
    with pytest.raises(RuntimeError, match="multiplies cos and sin by 1"):
        rope.verify(rotary, config, SCHEMES[3], THETA)


@pytest.mark.parametrize("scaling", SCHEMES, ids=str)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_every_scheme_reloads_in_plain_transformers(tmp_path, model_type, scaling):
    config, _ = built(scaling, model_type=model_type)
    model = network(config)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    theta = scaling.stretched(THETA, 8) if isinstance(scaling, rope.Ntk) else THETA
    assert (
        again.config.rope_parameters == model.config.rope_parameters
        and again.config.rope_parameters["rope_theta"] == theta
    )
    assert rope.verify(again.get_decoder().rotary_emb, again.config, scaling, THETA) < 3e-6
    ids, positions = (
        torch.randint(3, 96, (1, 20), generator=torch.Generator().manual_seed(1)),
        torch.cat([torch.arange(12), torch.arange(504, 512)])[None],
    )
    with torch.no_grad():
        assert torch.equal(
            again(ids, position_ids=positions).logits, model(ids, position_ids=positions).logits
        )


def test_lceg_rounds_half_of_the_factor_up():
    from endprompt import methods

    def chosen(name, rope_type, target=65536):
        return rope.scaling_for(rope_type, 8192, target, methods.get(name).whole_factor)

    assert methods.get("lceg").rope == "ntk" and chosen("lceg", "ntk") == rope.Ntk(4, 8192, 65536)
    assert chosen("lceg", "yarn") == rope.Yarn(8.0, 8192) and chosen("lceg", "linear") == rope.Linear(8.0)
    assert chosen("endprompt", "ntk") == rope.Ntk(4, 8192, 65536)
    # 100,000 / 8192 is 12.2, of which LCEG's code takes the half and rounds it up; LongLoRA's rounds the
    # whole.
    assert chosen("lceg", "ntk", 100_000) == rope.Ntk(7, 8192, 100_000)
    assert chosen("longlora", "linear", 100_000) == rope.Linear(13.0)
    assert chosen("endprompt", "linear", 100_000) == rope.Linear(100_000 / 8192)


def test_no_method_is_trained_under_a_scaling_that_looks_at_the_rows_length():
    from endprompt import methods

    assert {method.rope for method in methods.METHODS.values()} <= {
        None,
        *rope.TYPES,
    } and "dynamic" not in rope.TYPES
    for name in rope.TYPES:
        config = configuration()
        asked = rope.Asked(name, long_factor=(8.0,) * 4 if name == "longrope" else None)
        rope.apply(config, rope.extended(asked, rope.Default(), 64, 512), 512)
        rotary = LlamaRotaryEmbedding(config)
        before = rotary.inv_freq.clone()
        rotary(torch.zeros(1), torch.tensor([[511]]))
        assert torch.equal(rotary.inv_freq, before)


def test_scaling_for():
    assert rope.scaling_for("ntk", 8192, 65536) == rope.Ntk(4, 8192, 65536) and rope.scaling_for(
        "yarn", 8192, 65536
    ) == rope.Yarn(8.0, 8192)
    assert rope.scaling_for("linear", 8192, 65536) == rope.Linear(8.0)
    assert rope.scaling_for(None, 8192, 65536) == rope.Default()
    with pytest.raises(BadInput, match=r"rope\.type.*'cubic'.*linear"):
        rope.scaling_for("cubic", 8192, 65536)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_verify_passes_on_a_built_model(model_type):
    model = network(scaled(model_type))
    assert rope.verify(model.get_decoder().rotary_emb, model.config, rope.Linear(8.0), THETA) < 1e-6


def test_verify_passes_when_head_dim_is_not_hidden_over_heads():
    model = network(scaled(head_dim=16))
    assert rope.verify(model.get_decoder().rotary_emb, model.config, rope.Linear(8.0), THETA) < 1e-6


@pytest.mark.parametrize(
    "scaling, theta",
    [
        (rope.Linear(7.99), THETA),
        (rope.Linear(1.0), THETA),
        (rope.Default(), THETA),
        (rope.Linear(8.0), 10000.0),
    ],
)
def test_verify_refuses_another_factor_or_theta(scaling, theta):
    model = network(scaled())
    with pytest.raises(RuntimeError, match="RoPE check.*differs"):
        rope.verify(model.get_decoder().rotary_emb, model.config, scaling, theta)


def test_verify_refuses_another_number_of_frequencies_and_nan():
    model = network(scaled())
    rotary = model.get_decoder().rotary_emb
    inv_freq = rotary.inv_freq
    rotary.inv_freq = inv_freq[:3]
    with pytest.raises(RuntimeError, match="3 frequencies, 4 were expected"):
        rope.verify(rotary, model.config, rope.Linear(8.0), THETA)
    rotary.inv_freq = torch.full_like(inv_freq, torch.nan)
    with pytest.raises(RuntimeError, match="differs"):
        rope.verify(rotary, model.config, rope.Linear(8.0), THETA)


def test_a_factor_set_on_a_built_model_does_nothing_and_is_refused():
    model = network(configuration())
    before = model.get_decoder().rotary_emb.inv_freq.clone()
    rope.apply(model.config, rope.Linear(8.0), 512)
    assert torch.equal(model.get_decoder().rotary_emb.inv_freq, before)
    with pytest.raises(RuntimeError, match="RoPE check"):
        rope.verify(model.get_decoder().rotary_emb, model.config, rope.Linear(8.0), THETA)


def test_frequencies_cast_to_bf16_are_refused():
    model = network(scaled()).bfloat16()
    assert model.get_decoder().rotary_emb.inv_freq.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="RoPE check"):
        rope.verify(model.get_decoder().rotary_emb, model.config, rope.Linear(8.0), THETA)


def test_weights_loaded_in_bf16_keep_float32_frequencies(tmp_path):
    network(scaled()).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    rope.verify(model.get_decoder().rotary_emb, model.config, rope.Linear(8.0), THETA)


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated")
def test_theta_wiped_before_apply_is_refused():
    config = configuration()
    config.rope_scaling = {"rope_type": "linear", "factor": 8.0}
    assert config.rope_parameters.get("rope_theta") is None  # the trap is still there
    with pytest.raises(BadInput, match="no rope_theta"):
        rope.apply(config, rope.Linear(8.0), 512)


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated")
def test_theta_wiped_after_apply_is_detected():
    config = scaled()
    config.rope_scaling = {"rope_type": "linear", "factor": 8.0}
    assert config.rope_parameters.get("rope_theta") is None
    # A reader that falls back to 10000, as many do, builds this:
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 10000.0}
    with pytest.raises(RuntimeError, match="rope_theta 500000"):
        rope.verify(LlamaRotaryEmbedding(config), config, rope.Linear(8.0), THETA)


@pytest.mark.parametrize(
    "parameters", [{}, {"rope_type": "default"}, {"rope_type": "default", "rope_theta": None}]
)
def test_config_without_theta_is_refused(parameters):
    config = configuration()
    config.rope_parameters = parameters
    with pytest.raises(BadInput, match="no rope_theta"):
        rope.apply(config, rope.Linear(8.0), 512)


def test_scaled_config_is_refused():
    config = scaled()
    before = copy.deepcopy(config.rope_parameters)
    with pytest.raises(BadInput, match="scaled already.*'linear'"):
        rope.apply(config, rope.Linear(2.0), 1024)
    assert config.rope_parameters == before


@pytest.mark.parametrize(
    "parameters", [{"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 8.5}]
)
def test_other_scalings_are_refused_too(parameters):
    config = configuration(rope_parameters=None, rope_scaling=parameters, rope_theta=10000.0)
    with pytest.raises(BadInput, match="scaled already"):
        rope.apply(config, rope.Linear(8.0), 512)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_saved_model_reloads_in_plain_transformers(tmp_path, model_type):
    model = network(scaled(model_type))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(3, 96, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, unscaled = model(ids).logits, network(configuration(model_type))(ids).logits
        assert torch.equal(again(ids).logits, logits)
    assert torch.equal(again.get_decoder().rotary_emb.inv_freq, model.get_decoder().rotary_emb.inv_freq)
    assert (
        again.config.max_position_embeddings == 512
        and again.config.rope_parameters == model.config.rope_parameters
    )
    assert (
        logits - unscaled
    ).abs().max() > 1e-2  # the weights are the same, so only the scaling tells them apart
