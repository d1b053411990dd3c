"""Bytes that autograd keeps for the backward pass: counted, on tensors without data."""

from typing import Any


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


def activations(about, rows: int, length: int, dtype, autocast: bool = False) -> tuple[int, int]:
    """(bytes that one decoder layer keeps for its backward pass, bytes that the rest of the decoder does),
    for ``rows`` of ``length`` tokens.

    dtype: of the weights; autocast: from float32 weights to bfloat16.  The copies of weights that it makes
    are left out.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import LlamaConfig, LlamaForCausalLM

    def counted(layers: int) -> int:
        config = LlamaConfig(
            hidden_size=about.hidden_size,
            intermediate_size=about.intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=about.num_attention_heads,
            num_key_value_heads=about.num_key_value_heads,
            vocab_size=256,
            head_dim=getattr(about, "head_dim", None),
        )
        config._attn_implementation = _attention()
        # autocast does not see meta tensors, but fake ones of a CPU, which have no data either.
        with FakeTensorMode() if autocast else torch.device("meta"):
            network = LlamaForCausalLM(config).train()
            if not autocast:
                network.to(dtype)
            inputs = {
                "input_ids": torch.zeros(rows, length, dtype=torch.int64),
                "position_ids": torch.zeros(rows, length, dtype=torch.int64),
            }
            with Kept(network) as kept, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = network.get_decoder()(**inputs, use_cache=False).last_hidden_state
        del out
        matrices = layers * sum(
            parameter.numel()
            for parameter in network.get_decoder().layers[0].parameters()
            if parameter.dim() == 2
        )
        return kept.bytes - (2 * matrices if autocast else 0)

    one, two = counted(1), counted(2)
    return two - one, 2 * one - two
