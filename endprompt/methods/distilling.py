"""Parts of methods that hold two predictions of the same tokens together."""

from typing import Any

from pydantic import Field, field_validator

from endprompt.methods.pose import ChunkOptions


class DistillingOptions(ChunkOptions):
    kl_weight: float = Field(1.0, gt=0, description="of the divergence of a token, beside its cross entropy")

    @field_validator("kl_weight", mode="before")
    @classmethod
    def real(cls, value):
        return float(value) if type(value) is int else value


def of_rows(options: Any) -> dict[str, Any]:
    """Those of ``DistillingOptions`` that change rows."""
    return options.model_dump(mode="json", include=set(ChunkOptions.model_fields))


def contiguous(batch: dict):
    """Int64 [rows, length]: positions 0..n-1 of a batch; padding stands at the last one."""
    return batch["attention_mask"].cumsum(-1).sub(1).clamp_min(0)


def hidden_states(network, batch: dict, position_ids):
    """[rows, length, width]: the last ones of ``batch`` at ``position_ids``, as training attends: padding is
    on the right, where causal attention hides it."""
    import torch

    seen = torch.ones_like(batch["attention_mask"])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": seen, "position_ids": position_ids}
    return network.get_decoder()(**inputs, use_cache=False).last_hidden_state


def divergence(network, hidden, target, weights, head=None):
    """Sum over tokens of weights x KL(target || hidden), in nats, with gradient to ``hidden`` and the output
    layer on its side alone.

    hidden, target [rows, length, width]; weights float32 [rows, length], of ``batch["shift_weights"]``.
    head: the target's output layer, the network's own unless given.  The full logits are never built."""
    return network.get_output_embeddings()(hidden, shift_weights=weights, target=target, target_head=head)[0]
