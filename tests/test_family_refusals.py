"""What is refused of a family's config.json: one line that names the key, exit code 2, nothing written."""

import json
import re
import shutil

import family_models
import pytest
from conftest import REPOSITORY, run_main, tiny_documents, write_jsonl
from family_models import MODELS
from networks import configuration, network

from endprompt import BadInput
from endprompt.bases import families, loading
from endprompt.recipe import schema

LOCAL, FULL = "sliding_attention", "full_attention"
NESTED = {
    FULL: {"rope_type": "default", "rope_theta": 1e6},
    LOCAL: {"rope_type": "default", "rope_theta": 1e4},
}


def _nested(**changes) -> dict:
    return {"rope_parameters": {kind: {**NESTED[kind], **changes.get(kind, {})} for kind in NESTED}}


# (a model of tests/family_models.py, what is changed in its config.json, what is said)
WRONG = [
    # windows that cut a row
    ("Mistral-7B-v0.3", {"sliding_window": 64}, "sliding window of 64 tokens, which would cut a row"),
    ("Mixtral", {"sliding_window": 500}, "sliding window of 500 tokens"),
    ("Mixtral", {"sliding_window": 500, "use_sliding_window": False}, "sliding window of 500 tokens"),
    ("Phi-3-mini-128k", {"sliding_window": 2047}, "sliding window of 2047 tokens"),
    ("Phi-4", {"sliding_window": 511, "use_sliding_window": False}, "sliding window of 511 tokens"),
    ("Qwen3-8B", {"use_sliding_window": True, "sliding_window": 128}, "sliding window of 128 tokens"),
    ("Qwen3-30B-A3B", {"use_sliding_window": True, "sliding_window": 128}, "sliding window of 128 tokens"),
    ("SmolLM3", {"use_sliding_window": True, "sliding_window": 128}, "sliding window of 128 tokens"),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": -1}, "sliding window of -1 tokens"),
    # local layers
    (
        "Gemma-3-1B",
        {"sliding_window": 65},
        "sliding_window .* 65, no number of .* window of 64",
    ),
    ("Gemma-3-1B", {"sliding_window": 0}, "sliding_window .* 0, no number of tokens within"),
    ("Gemma-3-1B", {"sliding_window": None}, "sliding_window .* None, no number of tokens within"),
    (
        "OLMo-3",
        {"sliding_window": 1024},
        "sliding_window .* 1024, no number of .* window of 512",
    ),
    ("Gemma-3-1B", {"layer_types": [LOCAL] * 6}, "layer_types .*none that could see a longer row"),
    ("OLMo-3", {"layer_types": [LOCAL] * 4}, "layer_types .*none that could see a longer row"),
    ("Gemma-3-1B", {"layer_types": [LOCAL, FULL]}, "[Ll]ayer_types"),
    (
        "OLMo-3",
        {"layer_types": ["chunked_attention", FULL, FULL, FULL]},
        "layer_types.*in another way",
    ),
    ("Qwen3-8B", {"layer_types": [LOCAL, FULL]}, "layer_types.*in another way"),
    (
        "Gemma-3-1B",
        _nested(sliding_attention={"rope_type": "linear", "factor": 2.0}),
        "rope_parameters.sliding_attention .*must keep a plain RoPE",
    ),
    (
        "Gemma-3-1B",
        _nested(full_attention={"partial_rotary_factor": 0.5}),
        "rope_parameters.full_attention.partial_rotary_factor .*RoPE on a part of each head",
    ),
    ("Gemma-3-1B", _nested(full_attention={"rope_theta": "1e6"}), "rope_theta .*'1e6', no positive number"),
    ("Gemma-3-1B", {"final_logit_softcapping": 30.0}, "final_logit_softcapping .* 30.0: soft-capping"),
    ("Gemma-3-1B", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping .* 50.0: soft-capping"),
    ("Gemma-3-1B", {"use_bidirectional_attention": True}, "use_bidirectional_attention .*later tokens"),
    # layers without RoPE
    ("SmolLM3", {"no_rope_layers": [0, 0, 0, 0]}, "no_rope_layers .*leaves no RoPE to scale"),
    ("SmolLM3", {"no_rope_layers": [1, 1, 0]}, "no_rope_layers .*must be 4 values, one a layer"),
    ("SmolLM3", {"no_rope_layers": [1, 1, 2, 0]}, "no_rope_layers .*attend in another way"),
    ("Qwen3-8B", {"no_rope_layers": [1, 0]}, "no_rope_layers .*attend in another way"),
    ("Llama-3", {"no_rope_layer_interval": 4}, "no_rope_layer_interval .*layers without RoPE"),
    # scaled logits, attention, residuals
    ("Granite-3.0-2B", {"logits_scaling": 0}, "logits_scaling .* 0, and must be a positive number"),
    ("Granite-3.0-2B", {"logits_scaling": -8.0}, "logits_scaling .* -8.0, and must be a positive number"),
    ("Granite-3.0-2B", {"attention_multiplier": 0.0}, "attention_multiplier .* 0.0, and must be a positive"),
    ("Granite-3.0-2B", {"residual_multiplier": float("inf")}, "residual_multiplier .* inf, and must be"),
    ("Granite-3.0-2B", {"logits_scaling": "8"}, "logits_scaling"),
    ("Llama-3", {"logits_scaling": 8.0}, "logits_scaling .*scaled logits"),
    ("Mistral-7B-v0.3", {"attention_multiplier": 0.5}, "attention_multiplier .*scaled attention"),
    ("Qwen3-8B", {"embedding_multiplier": 12.0}, "embedding_multiplier .*scaled attention, residuals"),
    # partial RoPE
    ("GLM-4-9B", {"partial_rotary_factor": 1.5}, "partial_rotary_factor .* 1.5, and must be the share"),
    ("GLM-4-9B", {"partial_rotary_factor": -0.5}, "partial_rotary_factor .* -0.5, and must be the share"),
    ("GLM-4-0414", {"partial_rotary_factor": 0.1}, "partial_rotary_factor .* 0.1, and must be the share"),
    ("GLM-4-9B", {"partial_rotary_factor": "half"}, "partial_rotary_factor"),
    ("Llama-3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor .*RoPE on a part of each head"),
    ("Qwen3-8B", {"partial_rotary_factor": 0.25}, "partial_rotary_factor .*RoPE on a part of each head"),
    ("OLMo-2", {"rotary_pct": 0.25}, "rotary_pct .*RoPE on a part of each head"),
    # longrope
    ("Phi-4", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "longrope.*got linear"),
    ("Phi-3-mini-128k", {"original_max_position_embeddings": None}, "original_max_position_embeddings"),
    ("Phi-4", {"original_max_position_embeddings": 32}, "original_max_position_embeddings .* 32, and its"),
    ("Phi-4-mini", {"partial_rotary_factor": 1.0}, "factor"),
    # experts
    ("Mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok .* 5, and must be .*layer's 4 experts"),
    ("Qwen3-30B-A3B", {"num_experts_per_tok": 0}, "num_experts_per_tok .* 0, and must be"),
    # heads
    ("Qwen3-8B", {"num_key_value_heads": 3}, "num_key_value_heads .* 3, and must be a divisor"),
    ("OLMo-2", {"num_key_value_heads": -4}, "num_key_value_heads"),
    ("Qwen3-8B", {"head_dim": 33}, "head_dim|inv_freq|dimension"),
    # other attention
    (
        "Qwen2",
        {"dual_chunk_attention_config": {"chunk_size": 64}},
        "dual_chunk.*Qwen2.5-1M",
    ),
    ("Qwen3-8B", {"use_dual_chunk_attention": True}, "use_dual_chunk_attention .*Qwen2.5-1M"),
    ("Llama-3.1", {"attention_chunk_size": 8192}, "attention_chunk_size .*Llama-4"),
    ("Apertus", {"qk_norm": True}, "qk_norm .*unknown to this type"),
    ("Qwen2", {"use_qk_norm": True}, "use_qk_norm .*unknown to this type"),
    # a scheme of its own that is not that of the recipe
    ("Qwen3-8B", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic NTK"),
    ("Granite-3.0-2B", {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "mrope"),
    # other kinds of models
    ("Llama-3", {"model_type": "gemma2"}, "'gemma2' is not supported: .*tanh.*take Gemma-3"),
    ("Llama-3", {"model_type": "gpt_oss"}, "'gpt_oss' is not supported: .*sink"),
    ("Llama-3", {"model_type": "mamba"}, "'mamba' is not supported: .*carry a state"),
    ("Llama-3", {"model_type": "cohere2"}, "'cohere2' is not supported: .*logit_scale"),
    ("Llama-3", {"model_type": "deepseek_v3"}, "'deepseek_v3' is not supported: .*latent attention"),
    ("Llama-3", {"model_type": "gemma3"}, "'gemma3' is not supported: .*gemma3_text"),
    ("Llama-3", {"model_type": "stablelm"}, "'stablelm' is not supported; the RoPE of llama"),
    (
        "Llama-3",
        {"model_type": "chatglm", "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}},
        "trust_remote_code",
    ),
]


_GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group"}}
# What config.json says of weights that are quantized already -> as which they are refused
QUANTIZED = [
    ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "awq"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}, "gptq"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
    ({"load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes"),
    ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, "fp8"),
    ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "mxfp4"),
    ({"quant_method": "compressed-tensors", "config_groups": {"group_0": _GROUP}}, "compressed-tensors"),
    ({"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, "'quant_algo': 'FP8'"),
    ({"quant_method": "a format of tomorrow"}, "a format of tomorrow"),
]


@pytest.mark.parametrize("said, name", QUANTIZED, ids=[name for _, name in QUANTIZED])
def test_weights_that_are_quantized_are_refused(recipe_file, tmp_path, base, said, name):
    """By every command that reads the base, before anything is written."""
    text = write_jsonl(tmp_path / "text.jsonl", tiny_documents(8, 18))
    for key in ("quantization_config", "compression_config"):
        folder = folder_of(tmp_path / key, base, "Qwen3-8B", {key: said})
        recipe = recipe_file(model={"name_or_path": str(folder)}, lengths={"target": 512})
        out = tmp_path / "out"
        init = ("init", folder, "--target", 512, "--corpus", text, "--out", tmp_path / "my.yaml")
        for command in (("prepare", recipe, "short", "--out", out), init):
            code, _, err = run_main(*command)
            told = [line for line in err.splitlines() if not line.startswith("warning: ")]
            assert code == 2 and len(told) == 1 and "Traceback" not in err, err
            assert f"model: {key} in its config.json says that its weights are quantized" in told[0]
            assert name in told[0] and "name the unquantized model" in told[0]
            assert "train.lora.quantize: nf4" in told[0]
        assert not out.exists() and not (tmp_path / "my.yaml").exists()


@pytest.mark.parametrize("nothing", [None, {}])
def test_a_key_that_quantizes_nothing_is_not_refused(recipe_file, tmp_path, base, nothing):
    folder = folder_of(tmp_path, base, "Qwen3-8B", {"quantization_config": nothing})
    recipe = recipe_file(
        model={"name_or_path": str(folder)}, lengths={"target": 512}, rope={"type": "linear"}
    )
    assert loading.load_config(schema.load(recipe)).model_type == "qwen3"


@pytest.mark.parametrize("raised", [ImportError, ModuleNotFoundError, NotImplementedError, RuntimeError])
def test_quantized_weights_that_cannot_be_read_are_told_in_a_line(monkeypatch, raised):
    """As `evaluate --model` meets them: a package is missing, or a GPU."""
    from transformers import AutoModelForCausalLM

    def load(**_):
        raise raised("Loading an AWQ quantized model requires gptqmodel")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(BadInput, match="the weights of x cannot be loaded: Loading an AWQ") as error:
        loading.load_weights("--model: the weights of x")
    assert "\n" not in str(error.value)
    # The twin: what has nothing to do with the files is no bad input.
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda **_: (_ for _ in ()).throw(RuntimeError("no memory"))
    )
    with pytest.raises(RuntimeError, match="no memory"):
        loading.load_weights("--model: the weights of x")


def folder_of(tmp_path, base, name: str, changes: dict):
    """A base's files without weights: what is wrong is told before they are looked for."""
    folder = tmp_path / "model"
    folder.mkdir(parents=True)
    keys = {**family_models.written(name), **changes}
    if "rope_parameters" in changes:
        keys = {key: one for key, one in keys.items() if key not in ("rope_theta", "rope_local_base_freq")}
    (folder / "config.json").write_text(json.dumps(keys))
    for file in base.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize(
    "name, changes, said", WRONG, ids=[f"{name}-{'-'.join(changes)}" for name, changes, _ in WRONG]
)
def test_refused(recipe_file, tmp_path, base, name, changes, said):
    folder = folder_of(tmp_path, base, name, changes)
    recipe = recipe_file(
        model={"name_or_path": str(folder)},
        lengths={"target": MODELS[name].target},
        rope={"type": MODELS[name].rope},
    )
    code, out, err = run_main("prepare", recipe, "endprompt", "--out", tmp_path / "out")
    told = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert (code, out) == (2, "") and "Traceback" not in err, err
    assert len(told) == 1 and told[0].startswith("endprompt: "), err
    assert re.search(said, told[0]), told[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", MODELS)
def test_the_twin_is_not_refused(recipe_file, tmp_path, base, name):
    folder = folder_of(tmp_path, base, name, {})
    recipe = recipe_file(
        model={"name_or_path": str(folder)},
        lengths={"target": MODELS[name].target},
        rope={"type": MODELS[name].rope},
    )
    assert loading.load_config(schema.load(recipe)).model_type == MODELS[name].type


@pytest.mark.parametrize("name", sorted(families.REFUSED))
def test_every_refusal_says_why_and_what_works(name):
    from types import SimpleNamespace

    with pytest.raises(BadInput, match=f"'{name}' is not supported: ") as error:
        families.of(SimpleNamespace(model_type=name))
    assert "\n" not in str(error.value) and "llama, mistral" in str(error.value)


def gguf_of(path, *more: str, metadata=None):
    """A Llama with frequencies that its file divides by ``more``, or by what ``metadata`` (a function) adds
    to a writer."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(5e5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(96)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in network(configuration(num_key_value_heads=4)).state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    for name in more:
        writer.add_tensor(name, np.ones(4, np.float32))
    if metadata:
        metadata(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", loading.LOST)
def test_a_gguf_file_that_lost_its_scaling_is_refused(recipe_file, tmp_path, name):
    (tmp_path / "model").mkdir()
    given = {"name_or_path": str(tmp_path / "model"), "gguf_file": "x.gguf"}
    gguf_of(tmp_path / "model/x.gguf")
    recipe = recipe_file(model=given)
    loading.load_config(schema.load(recipe))
    gguf_of(tmp_path / "model/x.gguf", name)
    code, out, err = run_main("prepare", recipe, "endprompt", "--out", tmp_path / "out")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert f"model.gguf_file: x.gguf holds {name}" in err and "safetensors" in err


def _says(kind: str, factor: float | None = None):
    def add(writer):
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        if factor is not None:
            writer.add_rope_scaling_factor(factor)
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(16)

    return add


# what is said of a scaling -> (what of it is told, None where it scales nothing)
METADATA = {
    "linear": (_says("linear", 4.0), "llama.rope.scaling.type linear"),
    "yarn": (_says("yarn", 4.0), "llama.rope.scaling.type yarn"),
    "longrope": (_says("longrope"), "llama.rope.scaling.type longrope"),
    "a factor alone": (lambda writer: writer.add_rope_scaling_factor(4.0), "llama.rope.scaling.factor 4.0"),
    "the former name": (
        lambda writer: writer.add_float32("llama.rope.scale_linear", 2.0),
        "llama.rope.scale_linear 2.0",
    ),
    "none": (_says("none", 4.0), None),
    "a factor of 1": (lambda writer: writer.add_rope_scaling_factor(1.0), None),
    "of another architecture": (lambda writer: writer.add_float32("qwen2.rope.scaling.factor", 4.0), None),
}


@pytest.mark.parametrize("name", METADATA)
def test_a_gguf_file_whose_metadata_scale_its_rope_is_refused(recipe_file, tmp_path, name):
    """transformers reads it as an unscaled one, and the factor for the target would stand alone."""
    add, said = METADATA[name]
    (tmp_path / "model").mkdir()
    gguf_of(tmp_path / "model/x.gguf", metadata=add)
    recipe = recipe_file(model={"name_or_path": str(tmp_path / "model"), "gguf_file": "x.gguf"})
    if said is None:
        loading.load_config(schema.load(recipe))
        return
    code, out, err = run_main("prepare", recipe, "endprompt", "--out", tmp_path / "out")
    assert (code, out) == (2, "") and err.count("\n") == 1 and not (tmp_path / "out").exists(), err
    assert f"model.gguf_file: x.gguf says {said}, a scaling which" in err and "safetensors" in err


def test_the_page_holds_the_tables():
    page = (REPOSITORY / "docs/models.md").read_text()
    for mark, text in families.tables().items():
        found = page.partition(f"<!-- {mark} -->\n")[2].partition(f"\n<!-- /{mark} -->")[0]
        assert found == text, f"docs/models.md: {mark}; python -m endprompt.bases.families"
    assert f"{len(MODELS)} of them" in page
