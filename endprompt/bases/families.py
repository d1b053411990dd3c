"""The families of models that can be extended, one entry each, and those that cannot, with the reason.

    python -m endprompt.bases.families    # the tables of docs/models.md

The entry says what differs from Llama; transformers' own module of the family is where it comes from.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from endprompt import BadInput
from endprompt.positions import rope

LOCAL = "sliding_attention"  # as ``layer_types`` names it


@dataclass(frozen=True)
class Family:
    """A ``model_type`` of transformers.

    models: bases of it, for the page.  note: what is done for it, for the page.
    queries: the module of ``self_attn`` whose output are the queries, and whose weights sharpening
        multiplies: where queries are normalized, what a projection is multiplied by is divided out again.
    offset: its norm multiplies by offset + weight.
    own: keys of config.json that belong to the family, and that ``refusals`` refuses of others.
    switch: whether ``use_sliding_window`` decides about ``sliding_window``; else the window is there whatever
        that says.
    local: some layers have a sliding window and a RoPE of their own, which stay as they are.
    longrope_alone: whether transformers builds no other scaled RoPE for it.
    fused: {module: the projections that it holds one after another}.
    divisor: the key of config.json by which logits are divided.
    experts: how config.json names the width of an expert; None: a dense model.
    halves: whether component i of a head turns with component i + half, all of them, and ``q_proj`` gives
        the queries: what ``endprompt.evaluation.theory`` measures.
    """

    type: str
    models: str
    note: str = ""
    queries: str = "q_proj"
    offset: float = 0.0
    own: tuple[str, ...] = ()
    switch: bool = True
    local: bool = False
    longrope_alone: bool = False
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    divisor: str | None = None
    experts: str | None = None
    halves: bool = True


_GATE_UP = ("gate_up_proj", ("gate_proj", "up_proj"))
_QKV = ("qkv_proj", ("q_proj", "k_proj", "v_proj"))
_NORMED = "sharpening multiplies the norm of the queries"
_EXPERTS = "experts are fused in memory and single in the files; the router's loss is config.json's own"
_WINDOWS = (
    "layers with a sliding window keep it, and their RoPE, and are not sharpened; in training they attend to"
    " what is less than the window away by position"
)

FAMILIES = (
    Family(
        "llama",
        "Llama-2, Llama-3, Llama-3.1, Llama-3.2, CodeLlama, TinyLlama, SmolLM2, Yi, DeepSeek-LLM,"
        " DeepSeek-Coder, Falcon3",
        "Llama-3.1 and 3.2 are extended by rope.type llama3, DeepSeek-Coder by linear: their own schemes",
    ),
    Family("mistral", "Mistral-7B-v0.3, Mistral-Nemo, Mistral-Small-24B", switch=False),
    Family("mixtral", "Mixtral-8x7B-v0.1", _EXPERTS, switch=False, experts="intermediate_size"),
    Family("qwen2", "Qwen2, Qwen2.5"),
    Family("qwen3", "Qwen3-0.6B to Qwen3-32B", _NORMED, queries="q_norm", halves=False),
    Family(
        "qwen3_moe",
        "Qwen3-30B-A3B, Qwen3-235B-A22B",
        f"{_NORMED}; {_EXPERTS}",
        queries="q_norm",
        experts="moe_intermediate_size",
        halves=False,
    ),
    Family("olmo2", "OLMo-2-1B to OLMo-2-32B", _NORMED, queries="q_norm", halves=False),
    Family(
        "olmo3",
        "OLMo-3-7B, OLMo-3-32B",
        f"{_NORMED}; {_WINDOWS}; extended by rope.type yarn, its own scheme",
        queries="q_norm",
        own=("rope_local_base_freq",),  # as a model that was extended here says it to older readers
        local=True,
        halves=False,
    ),
    Family(
        "smollm3",
        "SmolLM3-3B",
        "layers without RoPE stay without, and are sharpened as the others are",
        own=("no_rope_layers", "no_rope_layer_interval"),
        halves=False,
    ),
    Family(
        "granite",
        "Granite-3.0 to Granite-3.3",
        "scaled embeddings, residuals and attention are the model's own; the loss divides logits as it does",
        own=("logits_scaling", "attention_multiplier", "residual_multiplier", "embedding_multiplier"),
        divisor="logits_scaling",
        halves=False,
    ),
    Family(
        "phi3",
        "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        "every scaling is written as longrope, with one factor a pair; sharpening multiplies the queries'"
        " rows of qkv_proj",
        queries="qkv_proj",
        own=("partial_rotary_factor",),
        switch=False,
        longrope_alone=True,
        fused=(_QKV, _GATE_UP),
        halves=False,
    ),
    Family(
        "glm",
        "GLM-4-9B (the files ending in -hf)",
        "RoPE on half of each head",
        own=("partial_rotary_factor",),
        fused=(_GATE_UP,),
        halves=False,
    ),
    Family(
        "glm4",
        "GLM-4-9B-0414, GLM-4-32B-0414",
        "RoPE on half of each head",
        own=("partial_rotary_factor",),
        fused=(_GATE_UP,),
        halves=False,
    ),
    Family(
        "gemma3_text",
        "Gemma-3-270M, Gemma-3-1B",
        f"{_NORMED}; {_WINDOWS}",
        queries="q_norm",
        offset=1.0,
        own=("sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"),
        local=True,
        halves=False,
    ),
    Family(
        "apertus",
        "Apertus-8B, Apertus-70B",
        f"{_NORMED}; extended by rope.type llama3, its own scheme",
        queries="q_norm",
        halves=False,
    ),
)
BY_TYPE = {family.type: family for family in FAMILIES}

_STATES = "its layers carry a state from token to token, so that a jump in positions skips nothing"
_TABLE = "its positions are a table or ALiBi, and no RoPE that could be scaled"
_MLA = "it turns a small part of each head apart from the rest (latent attention), by a RoPE of its own kind"
_SIGHT = "it reads images too, with positions in several dimensions"
_PLAIN = "take a text model of this list"
# {model_type: (why it is refused, what works in its place)}
REFUSED: dict[str, tuple[str, str]] = {
    "gemma": ("it is not checked here", "take Gemma-3 (gemma3_text)"),
    "gemma2": (
        "it caps attention scores and logits by a tanh, which the loss here would not see",
        "take Gemma-3 (gemma3_text)",
    ),
    "gemma3": (
        "it reads images too",
        "take Gemma-3-1B, or put model.language_model into a Gemma3ForCausalLM (gemma3_text) and save that",
    ),
    "llama4": (f"{_SIGHT}, and cuts attention into chunks", "take Llama-3.1"),
    "llama4_text": ("it cuts attention into chunks and scales scores by position", "take Llama-3.1"),
    "gpt_oss": ("each head has a sink beside its keys, whose weight sharpening would change", _PLAIN),
    "ministral3": ("its scores grow with the position already", "take Mistral-Small-24B (mistral)"),
    "cohere": ("its logits are multiplied by logit_scale, which the loss would not see", _PLAIN),
    "cohere2": ("its logits are multiplied by logit_scale, which the loss would not see", _PLAIN),
    "deepseek_v2": (_MLA, "take DeepSeek-LLM or DeepSeek-Coder (llama)"),
    "deepseek_v3": (_MLA, "take DeepSeek-LLM or DeepSeek-Coder (llama)"),
    **dict.fromkeys(
        ("mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "granitemoehybrid", "qwen3_next", "rwkv"),
        (_STATES, "take a model whose layers all attend"),
    ),
    **dict.fromkeys(("gpt2", "opt", "gptj", "mpt", "bloom", "xglm"), (_TABLE, "take a model with RoPE")),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama", "mistral3", "llava"),
        (_SIGHT, _PLAIN),
    ),
    **dict.fromkeys(
        ("chatglm", "qwen", "baichuan", "internlm", "internlm2", "phi3small"),
        ("it runs Python code of its own, whose attention is not known here", _PLAIN),
    ),
}


def of(config) -> Family:
    """The family of a base's ``config``.  Raises BadInput, with the reason, if it has none."""
    kind = config.model_type
    if kind in BY_TYPE:
        return BY_TYPE[kind]
    known = ", ".join(BY_TYPE)
    if kind in REFUSED:
        why, instead = REFUSED[kind]
        raise BadInput(f"model: type {kind!r} is not supported: {why}; {instead} (types that work: {known})")
    raise BadInput(f"model: type {kind!r} is not supported; the RoPE of {known} models is")


def local_layers(config) -> list[bool]:
    """Of each layer, whether it has a window that is narrower than the target, and a RoPE of its own."""
    kinds = getattr(config, "layer_types", None) if BY_TYPE[config.model_type].local else None
    return [kind == LOCAL for kind in kinds or [""] * config.num_hidden_layers]


def written_scheme(config, scheme: rope.Scheme, window: int) -> rope.Scheme:
    """``scheme`` as a config of the family can say it.

    config: the base's, unscaled or in its own scheme; window: tokens that it reads.
    """
    family = BY_TYPE.get(config.model_type)
    if family is None or not family.longrope_alone or scheme.hf_type in ("default", "longrope"):
        return scheme
    theta = rope.parameters(config)["rope_theta"]
    return rope.as_longrope(scheme, window, theta, rope.rotary_dimensions(config))


def query_rows(config) -> int | None:
    """Rows of the queries in a fused projection; None: all of the module's."""
    if BY_TYPE[config.model_type].queries != "qkv_proj":
        return None
    return config.num_attention_heads * rope.head_dimension(config)


def adapted(config, targets: Sequence[str]) -> list[str]:
    """The modules that hold the projections ``targets``, names of Llama's, in a model of ``config``.

    Raises BadInput if a module holds others too, or if there is no such module.
    """
    family = BY_TYPE.get(config.model_type)
    if family is None:
        return list(targets)
    wanted, feed_forward = set(targets), {"gate_proj", "up_proj", "down_proj"}
    if family.experts and wanted & feed_forward:
        raise BadInput(
            f"train.lora.targets: {sorted(wanted & feed_forward)[0]} of a {family.type} model are experts in"
            " one tensor, which adapters of single matrices do not fit; take q_proj, k_proj, v_proj, o_proj"
        )
    if family.type == "apertus" and "gate_proj" in wanted:
        raise BadInput("train.lora.targets: an apertus model has no gate_proj; remove it")
    found = []
    for module, parts in family.fused:
        if there := wanted & set(parts):
            if lacking := sorted(set(parts) - wanted):
                raise BadInput(
                    f"train.lora.targets: {module} of a {family.type} model holds {', '.join(parts)} in one"
                    f" matrix; name {lacking[0]} too, or leave {sorted(there)[0]} out"
                )
            found.append(module)
            wanted -= there
    return [*found, *(target for target in targets if target in wanted)]


def experts(config) -> tuple[int, int, int] | None:
    """(experts of a layer, those that a token meets, width of one); None: a dense model."""
    family = BY_TYPE.get(config.model_type)
    if family is None or family.experts is None:
        return None
    return config.num_local_experts, config.num_experts_per_tok, getattr(config, family.experts)


def _table() -> Iterator[str]:
    yield "| type | models | what is special |"
    yield "|---|---|---|"
    for family in FAMILIES:
        yield f"| `{family.type}` | {family.models} | {family.note or 'nothing'} |"


def _refused() -> Iterator[str]:
    yield "| type | why | in its place |"
    yield "|---|---|---|"
    groups: dict[tuple[str, str], list[str]] = {}
    for kind, said in REFUSED.items():
        groups.setdefault(said, []).append(f"`{kind}`")
    for (why, instead), kinds in groups.items():
        yield f"| {', '.join(kinds)} | {why} | {instead} |"


def tables() -> dict[str, str]:
    """The generated parts of docs/models.md by their marks."""
    found: dict[str, Any] = {"families": _table(), "refused": _refused()}
    return {mark: "\n".join(lines) for mark, lines in found.items()}


if __name__ == "__main__":
    for mark, text in tables().items():
        print(f"<!-- {mark} -->\n{text}\n<!-- /{mark} -->")
