"""A model's shape: where it is known from, and how many weights it makes."""

from types import SimpleNamespace
from typing import Any

from endprompt.bases import counting, model
from endprompt.recipe.schema import Recipe

# From the config.json of each, where the files are not at hand: (hidden_size, intermediate_size,
# num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size, tie_word_embeddings), then what
# differs from Llama's config.
_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
_QWEN3 = {"model_type": "qwen3", "head_dim": 128}
SHAPES: dict[str, dict[str, Any]] = {
    name: dict(zip(_KEYS, values, strict=True)) | more
    for name, values, more in (
        ("meta-llama/Meta-Llama-3-8B", (4096, 14336, 32, 32, 8, 128256, False), {}),
        ("meta-llama/Llama-3.1-8B", (4096, 14336, 32, 32, 8, 128256, False), {}),
        ("meta-llama/Llama-3.2-1B", (2048, 8192, 16, 32, 8, 128256, True), {}),
        ("meta-llama/Llama-2-7b-hf", (4096, 11008, 32, 32, 32, 32000, False), {}),
        ("mistralai/Mistral-7B-v0.3", (4096, 14336, 32, 32, 8, 32768, False), {}),
        ("HuggingFaceTB/SmolLM2-135M", (576, 1536, 30, 9, 3, 49152, True), {}),
        ("Qwen/Qwen3-8B", (4096, 12288, 36, 32, 8, 151936, False), _QWEN3),
        ("Qwen/Qwen3-0.6B", (1024, 3072, 28, 16, 8, 151936, True), _QWEN3),
    )
}


def shape(recipe: Recipe):
    """What of the model's config the costs depend on: from its files where they are local, from ``SHAPES`` or
    the hub's cache, else None.
    """
    name = recipe.model.name_or_path
    if name.startswith("package:") or recipe.path(name):
        return model.load_config(recipe)
    if name in SHAPES:
        return counting.configured(SimpleNamespace(**SHAPES[name]))
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=recipe.model.revision)
    return model.load_config(recipe) if isinstance(cached, str) else None


def parameter_count(about) -> int:
    return counting.parameters(about)


def trained_share(about, adapters) -> float:
    """The share of weights that have gradients and optimizer states; all of them without LoRA."""
    if adapters is None:
        return 1.0
    trained = counting.adapted(about, adapters.targets, adapters.r)
    if adapters.train_embed_norm:
        trained += counting.embeddings_and_norms(about)
    return trained / parameter_count(about)
