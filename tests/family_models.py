"""Tiny random models of the families that people have: each with the keys of its config.json as the hub has
them, and with its own RoPE, window and special values; only widths, and lengths alike, are smaller."""

import contextlib
import json
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import run_main, tiny_documents, write_jsonl

from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment

SIZE = {
    "vocab_size": 896,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


@dataclass(frozen=True)
class Model:
    """target: tokens, from the window that ``keys`` state; rope: of the recipe; keys: of config.json, beside
    SIZE."""

    type: str
    window: int
    target: int
    keys: dict[str, Any] = field(default_factory=dict)
    rope: str | None = None


def _llama3(factor: float) -> dict:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }


def _longrope(pairs: int) -> dict:
    return {
        "type": "longrope",
        "short_factor": [1.0 + 0.05 * i for i in range(pairs)],
        "long_factor": [1.0 + 4.0 * i for i in range(pairs)],
    }


_FULL, _LOCAL = "full_attention", "sliding_attention"
_GRANITE = {"attention_multiplier": 0.0625, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
_GEMMA = {
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "num_hidden_layers": 6,
    "sliding_window_pattern": 6,
    "sliding_window": 16,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "tie_word_embeddings": True,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "attention_factor": 0.1 * math.log(8) + 1,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_PHI = {"pad_token_id": 2, "sliding_window": 4096}
_GLM = {"partial_rotary_factor": 0.5, "num_key_value_heads": 1, "attention_bias": True, "pad_token_id": 2}
_QWEN2 = {"rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 1024, "max_window_layers": 1}
_QWEN3 = {**_QWEN2, "head_dim": 32, "sliding_window": None}
MODELS = {
    "Llama-2": Model("llama", 64, 512, {"rope_theta": 1e4, "num_key_value_heads": 4}),
    "Llama-3": Model("llama", 64, 512, {"rope_theta": 5e5}),
    "Llama-3.1": Model("llama", 1024, 4096, {"rope_theta": 5e5, "rope_scaling": _llama3(8.0)}, "llama3"),
    "Llama-3.2": Model(
        "llama",
        1024,
        4096,
        {"rope_theta": 5e5, "rope_scaling": _llama3(32.0), "tie_word_embeddings": True},
        "llama3",
    ),
    "CodeLlama": Model("llama", 128, 512, {"rope_theta": 1e6, "num_key_value_heads": 4}, "theta"),
    "TinyLlama": Model("llama", 64, 256, {"rope_theta": 1e4, "num_key_value_heads": 1}, "yarn"),
    "SmolLM2": Model(
        "llama",
        64,
        512,
        {
            "rope_theta": 1e5,
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
    ),
    "Yi": Model("llama", 64, 512, {"rope_theta": 5e6, "pad_token_id": 0}),
    "DeepSeek-LLM": Model("llama", 64, 512, {"rope_theta": 1e4, "num_key_value_heads": 4}),
    "DeepSeek-Coder": Model(
        "llama", 256, 1024, {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"
    ),
    "Falcon3": Model("llama", 64, 512, {"rope_theta": 1000042, "head_dim": 32}),
    "Mistral-7B-v0.3": Model("mistral", 64, 512, {"rope_theta": 1e6, "sliding_window": None}),
    "Mistral-Small-24B": Model(
        "mistral", 64, 512, {"rope_theta": 1e8, "sliding_window": None, "head_dim": 8}
    ),
    "Mixtral": Model(
        "mixtral",
        64,
        512,
        {
            "rope_theta": 1e6,
            "sliding_window": None,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.02,
        },
    ),
    "Qwen2": Model("qwen2", 64, 512, _QWEN2),
    "Qwen2.5-0.5B": Model("qwen2", 64, 512, {**_QWEN2, "tie_word_embeddings": True}),
    "Qwen3-8B": Model("qwen3", 80, 512, _QWEN3, "yarn"),
    "Qwen3-0.6B": Model("qwen3", 80, 512, {**_QWEN3, "tie_word_embeddings": True}),
    "Qwen3-30B-A3B": Model(
        "qwen3_moe",
        80,
        512,
        {
            **_QWEN3,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        },
    ),
    "OLMo-2": Model("olmo2", 64, 512, {"rope_theta": 5e5, "num_key_value_heads": 4}),
    "OLMo-3": Model(
        "olmo3",
        512,
        2048,
        {
            "rope_theta": 5e5,
            "rope_scaling": _YARN,
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "layer_types": [_LOCAL, _LOCAL, _LOCAL, _FULL],
            "sliding_window": 32,
        },
        "yarn",
    ),
    "SmolLM3": Model(
        "smollm3",
        64,
        512,
        {
            "rope_theta": 5e6,
            "pad_token_id": 2,
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 1, 1, 0],
            "no_rope_layer_interval": 4,
            "layer_types": [_FULL] * 4,
            "use_sliding_window": False,
            "sliding_window": None,
            "tie_word_embeddings": True,
        },
    ),
    "Granite-3.0-2B": Model(
        "granite",
        64,
        512,
        {**_GRANITE, "logits_scaling": 8.0, "rope_theta": 1e4, "tie_word_embeddings": True},
    ),
    "Granite-3.0-1B-like": Model(
        "granite", 64, 512, {**_GRANITE, "logits_scaling": 6.0, "rope_theta": 1e7}, "theta"
    ),
    "Phi-3-mini-128k": Model(
        "phi3",
        2048,
        4096,
        {
            **_PHI,
            "rope_theta": 1e4,
            "rope_scaling": _longrope(8),
            "original_max_position_embeddings": 64,
            "num_key_value_heads": 4,
        },
        "longrope",
    ),
    "Phi-4": Model(
        "phi3",
        64,
        512,
        {
            **_PHI,
            "rope_theta": 250000,
            "rope_scaling": None,
            "original_max_position_embeddings": 64,
            "sliding_window": None,
        },
        "yarn",
    ),
    "Phi-4-mini": Model(
        "phi3",
        2048,
        4096,
        {
            **_PHI,
            "rope_theta": 1e4,
            "rope_scaling": _longrope(6),
            "original_max_position_embeddings": 64,
            "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True,
        },
        "longrope",
    ),
    "GLM-4-9B": Model("glm", 128, 512, {**_GLM, "rope_theta": 5e6, "head_dim": 16}),
    "GLM-4-0414": Model("glm4", 64, 512, {**_GLM, "rope_theta": 1e4, "head_dim": 16}, "yarn"),
    "Gemma-3-1B": Model("gemma3_text", 64, 512, _GEMMA),
    "Gemma-3-4B text": Model(
        "gemma3_text",
        256,
        1024,
        {**_GEMMA, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        "linear",
    ),
    "Apertus": Model(
        "apertus",
        512,
        2048,
        {"rope_theta": 12e6, "rope_scaling": _llama3(8.0), "hidden_act": "xielu", "pad_token_id": 3},
        "llama3",
    ),
}


def written(name: str) -> dict:
    """Its config.json."""
    model = MODELS[name]
    keys = {**SIZE, "model_type": model.type, "max_position_embeddings": model.window, **model.keys}
    return {key: value for key, value in keys.items() if value is not None or key in model.keys}


def saved(folder: Path, keys: dict, tokenizer_from: Path) -> Path:
    """A model of random weights with that config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(keys))
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            elif "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    network.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(keys))  # not as transformers 5 writes it
    for file in tokenizer_from.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def experiment(folder: Path, name: str, base: Path, **sections) -> Experiment:
    """Rows of 64 tokens, 2 steps of 4 rows; its shards are there.  sections: of the recipe, which replace or
    extend its own."""
    model = MODELS[name]
    if not (folder / "model").is_dir():
        saved(folder / "model", written(name), base)
        write_jsonl(folder / "corpus.jsonl", tiny_documents(8, 18))
    tree: dict[str, Any] = {
        "model": {"name_or_path": str(folder / "model")},
        "lengths": {"physical": 64, "target": model.target},
        "data": {"corpus": str(folder / "corpus.jsonl"), "tokens": 8 * 64},
        "rope": {"type": model.rope},
        "train": {
            "deepspeed": None,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "gradient_checkpointing": False,
            "logging_steps": 1,
        },
    }
    title = "-".join(["run", *sections])
    for section, values in sections.items():
        tree[section] = {**tree[section], **values}
    path = folder / f"{title}.yaml"
    path.write_text(yaml.safe_dump(tree))
    code, _, error = run_main("prepare", path, "endprompt", "--out", folder / "out", "--workers", 1)
    assert code == 0, error
    return Experiment.of(schema.load(path), "endprompt", folder / "out")


def table() -> str:
    """The models that are tried, as docs/models.md lists them."""
    lines = ["| model | type | positions, before and after | rope.type |", "|---|---|---|---|"]
    for name, model in MODELS.items():
        lines.append(
            f"| {name} | `{model.type}` | {model.window} -> {model.target} | {model.rope or 'linear'} |"
        )
    return "\n".join(lines)


@contextlib.contextmanager
def environment():
    """As it was before, afterwards."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
