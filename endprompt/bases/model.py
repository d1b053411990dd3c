"""The base model of a recipe, loaded and scaled; and the names of this room's other files."""

import copy
import functools
from pathlib import Path
from typing import Any

from endprompt import BadInput
from endprompt.bases import families, quantized
from endprompt.bases.lengths import GENERATION_KEYS, TOKENIZER_KEYS, WINDOW_KEYS, first_length, window
from endprompt.bases.loading import SUPPORTED, load_config, load_tokenizer, load_weights, without_reports
from endprompt.bases.locating import Named, check_folder, commit, locate
from endprompt.bases.locating import fingerprint as fingerprint_of
from endprompt.bases.refusals import (
    CHANGES_ATTENTION,
    FACTORS,
    check_ids,
    check_vocabulary,
    refuse_kernels,
    refuse_other_kinds,
    refuse_untied,
)
from endprompt.bases.saving import forget_code, state_length, stated_lengths
from endprompt.bases.unreadable import MEND, UNREADABLE, reason
from endprompt.positions import rope

__all__ = [
    "CHANGES_ATTENTION",
    "FACTORS",
    "GENERATION_KEYS",
    "MEND",
    "SUPPORTED",
    "TOKENIZER_KEYS",
    "UNREADABLE",
    "WINDOW_KEYS",
    "Base",
    "Named",
    "attention_implementation",
    "build",
    "check_folder",
    "check_ids",
    "check_vocabulary",
    "forget_code",
    "load_config",
    "load_tokenizer",
    "load_weights",
    "locate",
    "first_length",
    "pad_token_id",
    "reason",
    "refuse_kernels",
    "refuse_other_kinds",
    "refuse_untied",
    "state_length",
    "stated_lengths",
    "supported_attention",
    "window",
    "without_reports",
]


def pad_token_id(tokenizer, embeddings: int = 2**31) -> int:
    """What rows are filled up with: the tokenizer's own padding where the model has an embedding for it, else
    the end of a document.
    """
    padding = tokenizer.pad_token_id
    return tokenizer.eos_token_id if padding is None or padding >= embeddings else padding


def attention_implementation(recipe: Named, cuda: bool) -> str:
    """flash_attention_2 where it is installed and there is a GPU, else sdpa; the recipe may name another."""
    from transformers.utils import is_flash_attn_2_available

    wanted = recipe.model.attn_implementation
    if wanted == "flash_attention_2" and not (cuda and is_flash_attn_2_available()):
        raise BadInput(
            "model.attn_implementation: flash_attention_2 needs a GPU and the package flash-attn; use sdpa,"
            " or null to choose automatically"
        )
    return wanted or ("flash_attention_2" if cuda and is_flash_attn_2_available() else "sdpa")


def supported_attention(recipe: Named, cuda: bool, config) -> str | None:
    """``attention_implementation`` for a model of any type; None, transformers' choice, if its class lacks it
    and the recipe names none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    chosen, kind = attention_implementation(recipe, cuda), MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    supports = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}.get(chosen, "")
    return chosen if recipe.model.attn_implementation or getattr(kind, supports, False) else None


class Base:
    """The base model that a recipe names: found once, its config and tokenizer read once, when asked for.

    Whatever is read raises BadInput on unusable files (see ``locate``, ``load_config``, ``load_tokenizer``).
    """

    def __init__(self, recipe: Named):
        self.recipe = recipe
        self.name = recipe.model.name_or_path

    @functools.cached_property
    def arguments(self) -> dict:
        """Those that find the model for ``from_pretrained``."""
        return locate(self.recipe)

    @functools.cached_property
    def config(self):
        """The checked config, as it came: whoever changes it takes a copy."""
        return load_config(self.recipe, self.arguments)

    @functools.cached_property
    def tokenizer(self):
        return load_tokenizer(self.recipe, self.arguments)

    @property
    def folder(self) -> Path:
        return Path(self.arguments["pretrained_model_name_or_path"])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of its weights, or the hub's commit."""
        if self.folder.is_dir():
            return fingerprint_of(self.folder, self.recipe.model.gguf_file)
        return str(commit(str(self.folder), self.recipe.model.revision))

    @functools.cached_property
    def own_scheme(self) -> rope.Scheme:
        """The RoPE that the base came with."""
        return rope.own_scheme(self.config)

    @property
    def window(self) -> int:
        """Tokens that the base reads as it came."""
        return window(self.recipe, self.config, self.own_scheme)

    @property
    def original_length(self) -> int:
        """The window that pretraining taught, C: of a base that this program extended, the first one's."""
        return first_length(self.config, self.window)

    def check_vocabulary(self) -> None:
        """Raises BadInput unless the tokenizer's separator is a token that the model has an embedding for."""
        check_vocabulary(self.tokenizer, self.config, f"model: the tokenizer of {self.name!r}")

    def attention_implementation(self, cuda: bool) -> str:
        """Raises BadInput on one that is not there, or that cannot count windows in positions."""
        chosen = attention_implementation(self.recipe, cuda)
        if chosen != "flash_attention_2" or not families.of(self.config).local:
            return chosen
        if self.recipe.model.attn_implementation:
            raise BadInput(
                "model.attn_implementation: flash_attention_2 counts the sliding windows of a"
                f" {self.config.model_type} model in tokens, and rows with jumps need positions; use sdpa, or"
                " null"
            )
        return "sdpa"


def build(base: Base, scaling: rope.Scaling, dtype, cuda: bool, quantize: bool = False):
    """The base model with its RoPE in place before it is built and its inv_freq checked afterwards.

    dtype: a torch dtype of the weights, or "auto", the files'.  quantize: whether the layers' matrices are
    read into 4 bits (see ``quantized``).  Under ZeRO-3 (a live TrainingArguments with a
    stage 3 file) parameters load partitioned, except a GGUF file's, which every rank holds whole until
    DeepSpeed starts. Raises BadInput on unusable files and on weights that are missing from them; Failure if
    the frequencies are not the expected ones."""
    config = copy.deepcopy(base.config)
    theta: Any = rope.parameters(config).get("rope_theta")
    rope.apply(config, scaling, base.recipe.lengths.target)
    arguments = dict(base.arguments)
    if base.recipe.model.gguf_file:
        from transformers import GgufConfig

        # Else the model stays marked as quantized, and transformers refuses to train and to save it.
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    if quantize:
        arguments |= quantized.loading(dtype, cuda)
    model = load_weights(
        f"model.name_or_path: the weights of {base.name!r}",
        **arguments,
        config=config,
        dtype=dtype,
        attn_implementation=base.attention_implementation(cuda),
    )
    if quantize:
        quantized.settle(model)
    # transformers takes config.json's pad_token_id for it, and torch gives that row no gradient; it may be
    # the separator of documents.
    model.get_input_embeddings().padding_idx = None
    rope.verify(model.get_decoder().rotary_emb, model.config, scaling, theta)
    return model
