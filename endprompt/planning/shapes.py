"""A model's shape: where it is known from, and how many weights it makes."""

from types import SimpleNamespace

from endprompt.bases import model
from endprompt.recipe.schema import Recipe

# From the config.json of each, where the files are not at hand.
SHAPES = {
    name: dict(
        zip(
            (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "vocab_size",
                "tie_word_embeddings",
            ),
            values,
            strict=True,
        )
    )
    for name, values in {
        "meta-llama/Meta-Llama-3-8B": (4096, 14336, 32, 32, 8, 128256, False),
        "meta-llama/Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256, True),
        "meta-llama/Llama-2-7b-hf": (4096, 11008, 32, 32, 32, 32000, False),
        "mistralai/Mistral-7B-v0.3": (4096, 14336, 32, 32, 8, 32768, False),
        "HuggingFaceTB/SmolLM2-135M": (576, 1536, 30, 9, 3, 49152, True),
    }.items()
}


def shape(recipe: Recipe):
    """What of the model's config the costs depend on: from its files where they are local, from ``SHAPES`` or
    the hub's cache, else None.
    """
    name = recipe.model.name_or_path
    if name.startswith("package:") or recipe.path(name):
        return model.load_config(recipe)
    if name in SHAPES:
        return SimpleNamespace(**SHAPES[name])
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=recipe.model.revision)
    return model.load_config(recipe) if isinstance(cached, str) else None


def _projected(about) -> tuple[int, int]:
    """(width of all query heads, width of all key heads)"""
    head_dim = getattr(about, "head_dim", None) or about.hidden_size // about.num_attention_heads
    return (
        about.num_attention_heads * head_dim,
        (about.num_key_value_heads or about.num_attention_heads) * head_dim,
    )


def parameter_count(about) -> int:
    heads, kv = _projected(about)
    layer = (
        about.hidden_size * (2 * heads + 2 * kv)
        + 3 * about.hidden_size * about.intermediate_size
        + 2 * about.hidden_size
    )
    return (
        about.num_hidden_layers * layer
        + about.vocab_size * about.hidden_size * (1 if about.tie_word_embeddings else 2)
        + about.hidden_size
    )


def trained_share(about, adapters) -> float:
    """The share of weights that have gradients and optimizer states; all of them without LoRA."""
    if adapters is None:
        return 1.0
    heads, kv = _projected(about)
    sides = {
        "q_proj": about.hidden_size + heads,
        "k_proj": about.hidden_size + kv,
        "v_proj": about.hidden_size + kv,
        "o_proj": heads + about.hidden_size,
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), about.hidden_size + about.intermediate_size),
    }
    trained = about.num_hidden_layers * adapters.r * sum(sides[target] for target in adapters.targets)
    if adapters.train_embed_norm:
        trained += (
            about.vocab_size * about.hidden_size + (2 * about.num_hidden_layers + 1) * about.hidden_size
        )
    return trained / parameter_count(about)
