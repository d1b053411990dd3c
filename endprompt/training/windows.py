"""Layers with a sliding window of their own, in rows whose positions jump.

transformers counts such a window in tokens of the row.  In a row that leaves out what lies between its parts
the tokens behind a jump would then meet keys that are thousands of positions away, under angles that no row
without a jump shows these layers, whose RoPE is not scaled.  Counted in positions, they meet what they would
meet if the row were whole.
"""

import torch

from endprompt.bases import families


def attach(network) -> None:
    """Makes the decoder of ``network`` count the windows of its layers in positions, where a row's jump.

    Nothing changes in a family without such layers, nor in rows without a jump.
    """
    family = families.BY_TYPE.get(network.config.model_type)
    if family is not None and family.local and any(families.local_layers(network.config)):
        network.get_decoder().register_forward_pre_hook(_by_position, with_kwargs=True)


def _by_position(decoder, args, kwargs):
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is None or isinstance(mask, dict) or kwargs.get("past_key_values") is not None:
        return None
    if bool((positions.diff(dim=-1) == 1).all()):
        return None
    return args, {**kwargs, "attention_mask": masks(decoder, positions, mask)}


def masks(decoder, positions: torch.Tensor, padding: torch.Tensor | None) -> dict:
    """{kind of layer: what is added to scores [rows, 1, length, length]}; None: causal attention to all.

    positions: int64 [rows, length]; padding: [rows, length], 0 where there is no token, or None.
    """
    length, device = positions.shape[1], positions.device
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    near = (positions[:, :, None] - positions[:, None, :] < decoder.config.sliding_window)[:, None]
    hidden = padding is not None and not bool(padding.all())
    if hidden and padding is not None:
        itself = torch.eye(length, dtype=torch.bool, device=device)[None, None]
        causal = causal & padding[:, None, None, :].bool() | itself
    whole = hidden or decoder.config._attn_implementation == "eager"
    return {
        "full_attention": _added(causal, decoder) if whole else None,
        families.LOCAL: _added(causal & near, decoder),
    }


def _added(seen: torch.Tensor, decoder) -> torch.Tensor:
    """0 where a key is seen, else the lowest number.  Of a mask of yes and no, every layer would make such a
    tensor of its own, and keep it for the backward pass.
    """
    kind, dtype = seen.device.type, decoder.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    lowest = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, lowest)
