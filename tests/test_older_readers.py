"""What transformers 4 and mlx-lm read of a saved model: the older keys agree with the newer ones, and a model
whose keys do not is no model.

The readers themselves run in tests/test_engines.py.
"""

import json
import math

import numpy as np
import pytest
from networks import THETA, configuration, network, scheme
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from endprompt import Failure
from endprompt.bases import older_readers
from endprompt.positions import rope, schemes
from endprompt.training import checkpoint

HEAD = 8  # dimensions of a head of the networks here
KINDS = (*rope.TYPES, None)


def save(folder, tokenizer, kind="linear", model_type="llama"):
    """A model scaled by ``kind`` from 64 to 512, as a run leaves it; its scaling."""
    config = configuration(model_type, vocab_size=896)
    scaling = scheme(kind, 64, 512)
    rope.apply(config, scaling, 512)
    tokenizer.model_max_length = 512
    network(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    older_readers.complete(folder, tokenizer)
    return scaling


@pytest.fixture
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


def change(path, *removed, **changes):
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in tree.items() if key not in removed} | changes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_older_keys_say_what_the_newer_ones_say(tmp_path, tokenizer, model_type, kind):
    scaling = save(tmp_path, tokenizer, kind, model_type)
    told = json.loads((tmp_path / "config.json").read_text())
    parameters = told["rope_parameters"]
    assert told["rope_theta"] == parameters["rope_theta"]
    if scaling.hf_type == "default":
        assert "rope_scaling" not in told
    else:
        assert {**told["rope_scaling"], "rope_theta": told["rope_theta"]} == parameters
    # transformers 5 reads it as before, and says so in the newer key alone when it saves.
    found = AutoConfig.from_pretrained(tmp_path)
    assert found.rope_parameters == parameters
    assert not hasattr(found, "rope_theta") and "rope_scaling" not in found.to_diff_dict()
    checkpoint.verify_saved(tmp_path, scaling, THETA, 512, HEAD)


def phi(folder, tokenizer, attention_factor=None):
    """A Phi-3 in longrope; the formula's factor of cos and sin unless one is given."""
    config = configuration("phi3", vocab_size=896, pad_token_id=0)
    factors = tuple(1.0 + pair for pair in range(HEAD // 2))
    scaling = schemes.LongRope(factors, 64, 8.0, given=attention_factor)
    rope.apply(config, scaling, 512)
    tokenizer.model_max_length = 512
    network(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    older_readers.complete(folder, tokenizer)
    return scaling


def test_phi_has_the_three_keys_that_transformers_4_takes(tmp_path, tokenizer):
    scaling = phi(tmp_path, tokenizer)
    told = json.loads((tmp_path / "config.json").read_text())
    assert set(told["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    checkpoint.verify_saved(tmp_path, scaling, THETA, 512, HEAD)
    # The twin: with another factor of cos and sin three keys would be misread, and all are there.
    phi(tmp_path, tokenizer, 1.0)
    assert json.loads((tmp_path / "config.json").read_text())["rope_scaling"]["attention_factor"] == 1.0


def test_it_may_be_done_twice_and_after_another_scaling(tmp_path, tokenizer):
    save(tmp_path, tokenizer, "yarn")
    before = (tmp_path / "config.json").read_text()
    older_readers.complete(tmp_path, tokenizer)
    assert (tmp_path / "config.json").read_text() == before
    change(tmp_path / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 7e5})
    older_readers.state_rope(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["rope_theta"] == 7e5 and "rope_scaling" not in told


# name -> (scaling, keys that are removed, keys that are changed)
WRONG = {
    "no theta": ("linear", ["rope_theta"], {}),
    "no scaling": ("linear", ["rope_scaling"], {}),
    "neither": ("yarn", ["rope_theta", "rope_scaling"], {}),
    "another theta": ("linear", [], {"rope_theta": 10000.0}),
    "the base's theta": ("ntk", [], {"rope_theta": THETA}),
    "another factor": ("linear", [], {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "another type": ("linear", [], {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}),
    "no factor": ("linear", [], {"rope_scaling": {"rope_type": "linear"}}),
    "yarn of the new window": ("yarn", [], {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}),
    "yarn of another sharpness": (
        "yarn",
        [],
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 1.0,
            }
        },
    ),
    "a half turned": ("linear", [], {"partial_rotary_factor": 0.5}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_model_that_older_readers_would_read_otherwise_is_refused(tmp_path, tokenizer, name):
    kind, removed, changed = WRONG[name]
    scaling = save(tmp_path, tokenizer, kind)
    trained = scaling.inv_freq(THETA, HEAD), scaling.attention_factor
    older_readers.verify_rope(tmp_path, *trained)
    change(tmp_path / "config.json", *removed, **changed)
    with pytest.raises(Failure, match="transformers 4 and mlx-lm"):
        older_readers.verify_rope(tmp_path, *trained)
    # transformers 5 prefers some of these keys.
    with pytest.raises(
        (Failure, KeyError), match="RoPE check|transformers 4|Missing required keys|dimensions of a head"
    ):
        checkpoint.verify_saved(tmp_path, scaling, THETA, 512, HEAD)


OTHERS = {
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 8.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.5],
        "original_max_position_embeddings": 64,
    },
    "yarn without rounding": {
        "rope_type": "yarn",
        "factor": 4.0,
        "truncate": False,
        "beta_fast": 16.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "original_max_position_embeddings": 64,
    },
    "default": {"rope_type": "default"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_schemes_are_read_as_transformers_builds_them(tmp_path, tokenizer, name):
    """As a base may bring them: our reading of the older keys against transformers' module."""
    parameters = {**OTHERS[name], "rope_theta": THETA}
    config = configuration(rope_parameters=parameters, max_position_embeddings=512, hidden_size=32)
    built = network(config)
    built.save_pretrained(tmp_path)
    older_readers.state_rope(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == built.config.rope_parameters
    frequencies, factor = older_readers.read_rope(json.loads((tmp_path / "config.json").read_text()))
    rotary = built.model.rotary_emb
    if name == "longrope":  # which has its long factors beyond the original window alone
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        wanted, scale = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=512)
    else:
        wanted, scale = rotary.inv_freq, rotary.attention_scaling
    np.testing.assert_allclose(frequencies, wanted.double().numpy(), rtol=1e-6)
    assert math.isclose(factor, scale, rel_tol=1e-9)


def test_the_layers_of_full_attention_are_told_where_layers_differ(tmp_path):
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": parameters, "head_dim": HEAD}))
    older_readers.state_rope(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["rope_theta"] == 1e6 and told["rope_local_base_freq"] == 1e4
    assert told["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    older_readers.verify_rope(tmp_path, rope.Linear(8.0).inv_freq(1e6, HEAD), 1.0)


# The tokenizer


def settings(folder) -> dict:
    return json.loads((folder / "tokenizer_config.json").read_text())


def test_extra_tokens_are_named_as_both_know_them(tmp_path, tokenizer, tiny_text):
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|one|>", "<|two|>"]})
    save(tmp_path, tokenizer)
    told = settings(tmp_path)
    assert "extra_special_tokens" not in told
    assert told["additional_special_tokens"][-2:] == ["<|one|>", "<|two|>"]
    found = AutoTokenizer.from_pretrained(tmp_path)
    text = f"{tiny_text[0]}<|two|> so<|one|>"
    assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert found.extra_special_tokens == tokenizer.extra_special_tokens


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("end", [True, False])
def test_marks_of_begin_and_end_are_where_the_tokenizer_writes_them(tmp_path, begin, end):
    """transformers 4's class for Llama, and llama.cpp, go by these two keys."""
    made = Tokenizer(models.BPE({"a": 0, "b": 1, "<s>": 2, "</s>": 3}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    single = " ".join([*(["<s>"] if begin else []), "$A", *(["</s>"] if end else [])])
    made.post_processor = processors.TemplateProcessing(single, None, [("<s>", 2), ("</s>", 3)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    configuration().save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    older_readers.state_tokenizer(tmp_path, fast)
    told = settings(tmp_path)
    assert (told["add_bos_token"], told["add_eos_token"]) == (begin, end)
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"  # 4.57 does not know TokenizersBackend
    assert AutoTokenizer.from_pretrained(tmp_path)("ab")["input_ids"] == fast("ab")["input_ids"]


def test_another_tokenizer_in_the_folder_is_refused(tmp_path, base):
    """transformers builds the tokenizer of some types from the vocabulary alone: what was read from one
    folder may be another in the next."""
    first = AutoTokenizer.from_pretrained(base)
    save(tmp_path, first)
    older_readers.verify_tokenizer(tmp_path, first)
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    tree["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(Failure, match="another tokenizer"):
        older_readers.verify_tokenizer(tmp_path, first)


@pytest.mark.slow
def test_what_was_trained_on_two_ranks_is_complete(two_ranks):
    folder = two_ranks / "model"
    told = json.loads((folder / "config.json").read_text())
    assert told["rope_theta"] == 10000.0 and told["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    older_readers.verify_rope(folder, rope.Linear(4.0).inv_freq(10000.0, 32), 1.0)
    assert settings(folder)["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoModelForCausalLM.from_pretrained(folder).config.rope_parameters == told["rope_parameters"]
