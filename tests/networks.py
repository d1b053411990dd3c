"""Small random models and rows that several test files use."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch

from endprompt.positions import plans

THETA = 500000.0


def scheme(kind: str | None, window: int, target: int, dims: int = 8):
    """The RoPE ``kind`` of an unscaled base; longrope's factors grow from pair to pair."""
    from endprompt.positions import rope

    pairs = dims // 2
    factors = tuple(1 + (target / window - 1) * (pair + 1) / pairs for pair in range(pairs))
    asked = rope.Asked(kind, long_factor=factors if kind == "longrope" else None)
    return rope.extended(asked, rope.Default(), window, target)


def configuration(model_type: str = "llama", **changes):
    """Config of a two-layer model with grouped-query attention; vocabulary 96, window 64, rope_theta
    500000.
    """
    from transformers import AutoConfig

    shape = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    }
    if model_type == "mistral":
        shape["sliding_window"] = None
    return AutoConfig.for_model(model_type, **{**shape, **changes})


def network(config, seed: int = 0):
    """The model of ``config`` with random weights, large enough to tell logits apart."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def saved(folder: Path, tokenizer_from: Path, model_type: str = "llama", **changes) -> Path:
    """A model folder with random weights and the tokenizer of another."""
    vocabulary = json.loads((tokenizer_from / "config.json").read_text())["vocab_size"]
    network(configuration(model_type, vocab_size=vocabulary, **changes)).save_pretrained(folder)
    for file in tokenizer_from.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


LENGTHS = dict.fromkeys(
    (
        "n_positions",
        "n_ctx",
        "max_seq_len",
        "max_seq_length",
        "seq_length",
        "seq_len",
        "model_max_length",
        "max_sequence_length",
        "max_target_positions",
        "max_model_len",
    ),
    64,
)


def short_everywhere(folder: Path, model_max_length: int) -> None:
    """Makes every length that the files of a model in ``folder`` can state say 64 tokens, and the tokenizer's
    own ``model_max_length``."""

    def change(name: str, **values) -> None:
        path = folder / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))

    change("config.json", **LENGTHS, use_cache=True)
    change(
        "generation_config.json",
        max_length=64,
        max_cache_len=64,
        max_new_tokens=32,
        eos_token_id=2,
        bos_token_id=1,
        temperature=0.9,
        top_p=0.6,
    )
    change("tokenizer_config.json", model_max_length=model_max_length, max_len=64)
    change(
        "tokenizer.json",
        truncation={"direction": "Left", "max_length": 64, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 2,
            "pad_type_id": 0,
            "pad_token": "</s>",
        },
    )


def row(a: int, b: int, target: int, vocabulary: int, seed: int = 0, prompt_weight: float = 0.1) -> dict:
    """A shard row of random tokens: the ``endprompt`` method's if b > 0, else a contiguous one."""
    rng = np.random.default_rng(seed)
    plan = plans.text_then_end_prompt if b else plans.contiguous
    weights = [0.0] + [1.0] * (a - 1) + [prompt_weight] * b
    return {
        "input_ids": rng.integers(3, vocabulary, a + b).tolist(),
        "position_ids": plan(a, b, target, rng).tolist(),
        "loss_weights": weights,
        "text_length": a,
        "prompt_length": b,
        "prompt_name": "EP_1" if b else "",
        "document_ids": ["random#0"],
    }
