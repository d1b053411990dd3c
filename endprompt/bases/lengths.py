"""The window of a base, and the keys by which its files state one."""

import os
import sys

from endprompt import BadInput
from endprompt.bases import sharpen
from endprompt.bases.locating import Named
from endprompt.positions import rope

# Where a config.json may state the window besides max_position_embeddings.  vLLM takes the least of what it
# finds, SGLang the first.
WINDOW_KEYS = (
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
)
GENERATION_KEYS = ("max_length", "max_cache_len")  # tokens of a prompt with its answer
TOKENIZER_KEYS = ("max_length", "max_len")  # besides model_max_length


def window(recipe: Named, config, own: rope.Scheme) -> int:
    """Tokens that the base reads as it came.

    own: its RoPE.  Some configs of a scaled base go on stating the window before the scaling; YaRN's users
    are told to add the scaling alone, to configs that state more than the window that it starts from.
    """
    if recipe.model.original_length:
        return recipe.model.original_length
    stated = config.max_position_embeddings
    first = getattr(own, "original_length", None)
    if first is None or sharpen.note(config).get("target_length") == stated:
        return stated
    scaled = round(first * getattr(own, "factor", 1.0))
    if isinstance(own, rope.Yarn):
        return max(stated, scaled)
    return scaled if stated <= first else stated


def refuse_doubtful(recipe: Named, config, own: rope.Scheme, tokenizer_says=None) -> None:
    """Raises BadInput if the window of a scaled base cannot be told: other keys of its config.json state
    another one, its tokenizer the one after a scaling that does not say from which length, or the recipe
    names the one before the scaling.  Warns where nothing but max_position_embeddings tells it.

    own: its RoPE; tokenizer_says: the model_max_length of its tokenizer_config.json, if any.  Its factor is
    multiplied by target / window, so that a window that is too short by the factor has it multiplied twice.
    """
    factor, given = getattr(own, "factor", 1.0), recipe.model.original_length
    if factor == 1:
        return
    stated, first = config.max_position_embeddings, getattr(own, "original_length", 0)
    if given:
        if given <= first:
            raise BadInput(
                f"model.original_length {given}: the model's RoPE is scaled by {own.name} from {first} tokens"
                f" already, by {factor:g}, so that it reads more; remove it, or take the scaling out of its"
                " config.json if the weights were trained without it"
            )
        return
    found = window(recipe, config, own)
    for key in WINDOW_KEYS:
        value = getattr(config, key, None)
        if value is not None and value not in (stated, found):
            raise BadInput(
                f"model: {key} in its config.json is {value!r:.60}, and max_position_embeddings {stated}: one"
                f" of them is the window before its scaling ({own.name}, factor {factor:g}); set"
                " model.original_length to the tokens that it reads as it came"
            )
    agreed = {getattr(config, key, None) for key in WINDOW_KEYS} - {None}
    a_part = rope.parameters(config) is not config.rope_parameters  # Gemma-3's: of some layers alone
    if not isinstance(own, rope.Linear) or a_part or agreed or sharpen.note(config):
        return
    # LongLoRA and Vicuna state the window before the scaling, DeepSeek-Coder the one after it.
    scaled = round(stated * factor)
    if tokenizer_says == scaled:
        raise BadInput(
            f"model: model_max_length in its tokenizer_config.json is {scaled}, and max_position_embeddings"
            f" in its config.json {stated}, which may be the window before its scaling (linear, factor"
            f" {factor:g}); set model.original_length to the tokens that it reads as it came"
        )
    if tokenizer_says != stated and os.environ.get("RANK", "0") == "0":
        print(
            "warning: model: its config.json does not say from which length its RoPE is scaled (linear,"
            f" factor {factor:g}); max_position_embeddings, {stated}, is taken for the tokens that it reads"
            f" as it came; if these are {scaled}, set model.original_length",
            file=sys.stderr,
        )


def first_length(config, window: int) -> int:
    """The window C that the base had before this program extended it for the first time, which its
    config.json notes; ``window`` where it never did.  Raises BadInput on a note that is no such length."""
    found = sharpen.note(config).get("original_length", window)
    if type(found) is not int or found < 1:
        raise BadInput(
            f"model: endprompt.original_length in its config.json is {found!r:.60}, no positive number of"
            " tokens; mend it"
        )
    return found
