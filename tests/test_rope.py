"""RoPE frequencies against transformers' own, and guards against a scaling that silently did not happen."""

import copy

import numpy as np
import pytest
import torch
from networks import THETA, configuration, network
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from endprompt import BadInput, rope


def scaled(model_type="llama", factor=8.0, **changes):
    config = configuration(model_type, **changes)
    rope.apply(config, rope.Linear(factor), int(64 * factor))
    return config


@pytest.mark.parametrize("theta", [1e4, 1e5, 5e5, 1e6])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("scaling", [rope.Default(), rope.Linear(1.0), rope.Linear(2.0), rope.Linear(8.0), rope.Linear(32 / 3)], ids=str)
def test_frequencies_are_those_of_transformers(theta, head_dim, scaling):
    config = configuration(hidden_size=4 * head_dim, head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta})
    rope.apply(config, scaling, 1024)
    expected = scaling.inv_freq(theta, head_dim)
    built = LlamaRotaryEmbedding(config).inv_freq.double().numpy()
    assert expected.dtype == np.float64 and expected.shape == (head_dim // 2,)
    np.testing.assert_allclose(built, expected, rtol=3e-6)
    if isinstance(scaling, rope.Linear):
        np.testing.assert_allclose(ROPE_INIT_FUNCTIONS["linear"](config, "cpu")[0].double().numpy(), expected, rtol=3e-6)


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
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": THETA} and config.max_position_embeddings == 64


def test_scaling_for():
    assert rope.scaling_for("linear", 8192, 65536) == rope.Linear(8.0)
    assert rope.scaling_for(None, 8192, 65536) == rope.Default()
    with pytest.raises(BadInput, match=r"rope\.type.*'ntk'.*linear"):
        rope.scaling_for("ntk", 8192, 65536)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_verify_passes_on_a_built_model(model_type):
    model = network(scaled(model_type))
    assert rope.verify(model.get_decoder().rotary_emb.inv_freq, model.config, rope.Linear(8.0), THETA) < 1e-6


def test_verify_passes_when_head_dim_is_not_hidden_over_heads():
    model = network(scaled(head_dim=16))
    assert rope.verify(model.get_decoder().rotary_emb.inv_freq, model.config, rope.Linear(8.0), THETA) < 1e-6


@pytest.mark.parametrize("scaling, theta", [(rope.Linear(7.99), THETA), (rope.Linear(1.0), THETA), (rope.Default(), THETA), (rope.Linear(8.0), 10000.0)])
def test_verify_refuses_another_factor_or_theta(scaling, theta):
    model = network(scaled())
    with pytest.raises(RuntimeError, match="RoPE check.*differs"):
        rope.verify(model.get_decoder().rotary_emb.inv_freq, model.config, scaling, theta)


def test_verify_refuses_another_number_of_frequencies_and_nan():
    model = network(scaled())
    inv_freq = model.get_decoder().rotary_emb.inv_freq
    with pytest.raises(RuntimeError, match="3 frequencies, 4 were expected"):
        rope.verify(inv_freq[:3], model.config, rope.Linear(8.0), THETA)
    with pytest.raises(RuntimeError, match="differs"):
        rope.verify(torch.full_like(inv_freq, torch.nan), model.config, rope.Linear(8.0), THETA)


def test_a_factor_set_on_a_built_model_does_nothing_and_is_refused():
    model = network(configuration())
    before = model.get_decoder().rotary_emb.inv_freq.clone()
    rope.apply(model.config, rope.Linear(8.0), 512)
    assert torch.equal(model.get_decoder().rotary_emb.inv_freq, before)
    with pytest.raises(RuntimeError, match="RoPE check"):
        rope.verify(model.get_decoder().rotary_emb.inv_freq, model.config, rope.Linear(8.0), THETA)


def test_frequencies_cast_to_bf16_are_refused():
    model = network(scaled()).bfloat16()
    assert model.get_decoder().rotary_emb.inv_freq.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="RoPE check"):
        rope.verify(model.get_decoder().rotary_emb.inv_freq, model.config, rope.Linear(8.0), THETA)


def test_weights_loaded_in_bf16_keep_float32_frequencies(tmp_path):
    network(scaled()).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    rope.verify(model.get_decoder().rotary_emb.inv_freq, model.config, rope.Linear(8.0), THETA)


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
        rope.verify(LlamaRotaryEmbedding(config).inv_freq, config, rope.Linear(8.0), THETA)


@pytest.mark.parametrize("parameters", [{}, {"rope_type": "default"}, {"rope_type": "default", "rope_theta": None}])
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


@pytest.mark.parametrize("parameters", [{"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 2.0}])
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
    assert again.config.max_position_embeddings == 512 and again.config.rope_parameters == model.config.rope_parameters
    assert (logits - unscaled).abs().max() > 1e-2  # the weights are the same, so only the scaling tells them apart
