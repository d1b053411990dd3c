"""Bytes that autograd keeps for the backward pass: counted, on tensors without data."""

import contextlib
import copy
from typing import Any

from endprompt.bases import counting, families


class Kept:
    """Counts, inside, the bytes that autograd keeps for the backward pass: each storage once, those of
    ``network``'s parameters not at all.
    """

    def __init__(self, network):
        self.parameters = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
        self.storages: dict[int, Any] = {}  # held, so that no address serves twice

    def __enter__(self):
        import torch

        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def _note(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.parameters:
            self.storages[storage._cdata] = storage
        return tensor

    def __exit__(self, *exception):
        self.hooks.__exit__(*exception)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def _attention():
    """A name under which transformers finds attention that keeps what FlashAttention keeps (queries, keys,
    values, output, one float32 a query), on any device.
    """
    import torch
    from transformers import AttentionInterface

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value):
            out = torch.empty_like(query)
            ctx.save_for_backward(
                query, key, value, out, torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
            )
            return out

        @staticmethod
        def backward(ctx, gradient):
            query, key, value, *_ = ctx.saved_tensors
            return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)

    def attend(module, query, key, value, attention_mask, **kwargs):
        return Attend.apply(query, key, value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("endprompt_counted", attend)
    return "endprompt_counted"


@contextlib.contextmanager
def _default(dtype):
    """Inside, new tensors of floats are of ``dtype``: fake ones cannot be turned into it."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _cut(about, layers: int):
    """The config of a model of the same family and width, with as many layers."""
    found = copy.deepcopy(counting.configured(about))
    for key in ("layer_types", "no_rope_layers"):
        if getattr(found, key, None) is not None:
            setattr(found, key, list(getattr(found, key))[:layers])
    found.num_hidden_layers, found.vocab_size, found.pad_token_id = layers, 256, None
    found._attn_implementation = _attention()
    return found


def activations(about, rows: int, length: int, dtype, autocast: bool = False) -> tuple[int, int]:
    """(bytes that one decoder layer keeps for its backward pass, bytes that the rest of the decoder does),
    for ``rows`` of ``length`` tokens.

    dtype: of the weights; autocast: from float32 weights to bfloat16.  The copies of weights that it makes
    are left out.  A mixture of experts is counted in bfloat16, the only type in which its kernel runs without
    data, and without autocast.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    mixed = families.experts(counting.configured(about)) is not None
    autocast, double = autocast and not mixed, mixed and not autocast and dtype == torch.float32
    dtype = torch.bfloat16 if mixed else dtype

    def counted(layers: int) -> int:
        config = _cut(about, layers)
        # Neither autocast nor experts see meta tensors, but fake ones of a CPU, which have no data either.
        fake = autocast or mixed
        with (
            FakeTensorMode() if fake else torch.device("meta"),
            _default(torch.float32 if autocast else dtype),
        ):
            network = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).train()
            if mixed:
                network.set_experts_implementation("grouped_mm")
            zeros = torch.zeros(rows, length, dtype=torch.int64, device="cpu" if fake else "meta")
            inputs = {"input_ids": zeros, "position_ids": zeros}
            with Kept(network) as kept, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = network.get_decoder()(**inputs, use_cache=False).last_hidden_state
        del out
        matrices = layers * sum(
            parameter.numel()
            for parameter in network.get_decoder().layers[0].parameters()
            if parameter.dim() == 2
        )
        return kept.bytes * (2 if double else 1) - (2 * matrices if autocast else 0)

    one, two = counted(1), counted(2)
    return two - one, 2 * one - two
