"""Shifted sparse attention (LongLoRA, arXiv 2309.12307, section 3.2) in the form that cannot see the future.

A row is cut into groups of g tokens and attention stays inside a group.  The first half of the heads (rounded
up) have their borders at g, 2g, ...; for the others they are moved by half a group, to g/2, 3g/2, ...  Cut at
borders, every group is a stretch of the row, so causal inside a group is causal in the row.  (The original
rolls the row by g/2 instead, which puts its end and its beginning into one group, and under a causal mask
over the rolled order the beginning then sees the end.)

It is for training only: a module in eval mode attends in full, and ``uninstall`` gives the model its own
attention back.
"""

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

NAME = "endprompt_s2"


def borders(length: int, group: int, shifted: bool) -> list[int]:
    """Where the groups of a row of ``length`` tokens start: [0, g, 2g, ...], or shifted [0, g/2, 3g/2, ...]
    with g/2 rounded down.
    """
    return [0, *range(group // 2 if shifted else group, length, group)]


def _cut(x: torch.Tensor, first: int, group: int) -> torch.Tensor:
    """[batch, ..., length, width] with groups that start at 0, first, first + group, ... -> [batch, groups,
    ..., group, width].

    Groups that are too short are filled with zeros at their end, where a causal mask hides them.
    """
    head, tail = x[..., :first, :], x[..., first:, :]
    x = torch.cat(
        [pad(head, (0, 0, 0, group - head.shape[-2])), pad(tail, (0, 0, 0, -tail.shape[-2] % group))], -2
    )
    return x.unflatten(-2, (-1, group)).movedim(-3, 1)


def _join(x: torch.Tensor, first: int, length: int) -> torch.Tensor:
    """Undoes ``_cut``."""
    group = x.shape[-2]
    x = x.movedim(1, -3).flatten(-3, -2)
    return torch.cat([x[..., : min(first, length), :], x[..., group : group + max(length - first, 0), :]], -2)


def shifted_sparse_attention(
    query, key, value, group: int, padding=None, scale: float | None = None, dropout: float = 0.0
) -> torch.Tensor:
    """Causal attention within groups; half of the heads have their borders moved by half a group.

    query [batch, heads, length, head_dim]; key and value the same, or with fewer heads that divide those of
    query; padding: bool [batch, length], True for tokens, or None.  Returns [batch, heads, length, head_dim];
    what stands at padding has no meaning. No row or batchmate changes the borders, so that a row's result
    does not depend on the batch it is in.  One group spans a row, and this is full attention, where length <=
    group // 2.  Memory: rows, not squares; with padding on the left, group x length.
    """
    heads, length = query.shape[1:3]
    # Before the heads are halved: with grouped queries, the halves need not hold whole groups of heads.
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    if padding is not None and not (padding[:, 1:] & ~padding[:, :-1]).any():
        padding = None  # on the right alone: the causal mask hides it from every token
    found = []
    for shifted, part in ((False, slice(0, (heads + 1) // 2)), (True, slice((heads + 1) // 2, heads))):
        if (
            part.start == heads
        ):  # a single head has no second half, and torch 2.11 divides by zero on an empty one
            continue
        first = max(group // 2, 1) if shifted else group
        q, k, v = (_cut(x[:, part], first, group).flatten(0, 1) for x in (query, key, value))
        if padding is None:
            out = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scale)
        else:
            seen = _cut(padding[:, None, :, None], first, group).flatten(0, 1).transpose(-1, -2)
            causal = torch.ones(group, group, dtype=torch.bool, device=q.device).tril()
            itself = torch.eye(
                group, dtype=torch.bool, device=q.device
            )  # else padding sees nothing, and a softmax over nothing is not a number
            out = scaled_dot_product_attention(
                q, k, v, attn_mask=causal & seen | itself, dropout_p=dropout, scale=scale
            )
        found.append(_join(out.unflatten(0, (len(query), -1)), first, length))
    return torch.cat(found, 1)


def _forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """transformers' attention interface: query [batch, heads, length, head_dim] -> ([batch, length, heads,
    head_dim], None).

    attention_mask: bool [batch, keys] or None, as transformers' mask function for FlashAttention leaves it.
    """
    if module.training:
        if query.shape[2] != key.shape[2]:
            raise RuntimeError("shifted sparse attention trains on whole rows, without a key-value cache")
        return (
            shifted_sparse_attention(
                query, key, value, module.s2_group_size, attention_mask, scaling, dropout
            )
            .transpose(1, 2)
            .contiguous(),
            None,
        )
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is not None or 1 < queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)[
            None, None
        ]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :] | torch.eye(
                queries, keys, dtype=torch.bool, device=query.device
            ).roll(keys - queries, 1)
        attention_mask = mask
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling)


def install(model, group_size: int) -> str:
    """Switches ``model`` to shifted sparse attention with groups of ``group_size`` tokens; returns the
    attention it had, for ``uninstall``.

    The size is kept on the modules, not in the config, which is saved.  Raises ValueError if a group is less
    than two tokens.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    if group_size < 2:
        raise ValueError(f"groups of {group_size} token cannot be shifted by half; use 2 or more")
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(
        NAME, flash_attention_mask
    )  # the padding as it is, or None: never a square
    before = model.config._attn_implementation
    for layer in model.get_decoder().layers:
        layer.self_attn.s2_group_size = group_size
    model.set_attn_implementation(NAME)
    return before


def uninstall(model, before: str) -> None:
    model.set_attn_implementation(before)
