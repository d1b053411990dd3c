"""The divergence between two predictions of the same tokens that never builds the full logits matrix.

As in ``loss``, chunks of tokens go through the output layer one after another, and the gradient of a chunk is
formed right after its logits.  Two chunks of logits are held at a time, and some five tensors of their size.
"""

from collections.abc import Callable

import torch
from torch import nn

from endprompt.training import loss

ELEMENTS = {"cuda": 2**26, "cpu": 2**23}  # logits held of each of the two


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, token_weights, chunk, divisor):
        needs = ctx.needs_input_grad[:3]
        grads = [
            torch.zeros(one.shape, dtype=torch.float32, device=one.device)
            if need and one is not None
            else None
            for one, need in zip((hidden, weight, bias), needs, strict=True)
        ]
        found = torch.zeros_like(token_weights)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            own = torch.log_softmax(nn.functional.linear(hidden[part], weight, bias).float() / divisor, -1)
            other = torch.log_softmax(target(part).float(), -1)
            share = other.exp()
            found[part] = (share * (other - own)).sum(-1)
            gradient = own.exp_().sub_(share).mul_(token_weights[part, None] / divisor)
            if grads[2] is not None:
                grads[2] += gradient.sum(0)
            gradient = gradient.to(hidden.dtype)
            if grads[0] is not None:
                grads[0][part] = gradient @ weight
            if grads[1] is not None:
                grads[1] += gradient.t() @ hidden[part]
        tensors = zip((hidden, weight, bias), grads, strict=True)
        ctx.save_for_backward(*(None if grad is None else grad.to(one.dtype) for one, grad in tensors))
        ctx.mark_non_differentiable(found)
        return (found * token_weights).sum(), found

    @staticmethod
    def backward(ctx, grad_loss, _):
        grads = (None if grad is None else loss.scaled(grad, grad_loss) for grad in ctx.saved_tensors)
        return *grads, None, None, None, None


def chunked_divergence(
    layer: tuple, target: Callable[[slice], torch.Tensor], token_weights, divisor: float = 1.0, chunk=None
):
    """Sum over tokens of token_weights x KL(target || own), with gradient to the own side alone.

    layer: hidden [N, D], weight [V, D], bias [V] or None of the own side; logits are divided by ``divisor``.
    target: logits [n, V] of a slice of the tokens, without gradient.  token_weights float32 [N].  Returns
    (sum, float32 scalar with gradient; divergence float32 [N] without), both in nats.
    """
    hidden, weight, bias = loss.as_autocast(*layer)
    chunk = chunk or max(16, ELEMENTS.get(hidden.device.type, ELEMENTS["cpu"]) // weight.shape[0])
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return _ChunkedDivergence.apply(hidden, weight, bias, target, token_weights, chunk, divisor)


def logits_of(head, hidden, divisor: float) -> Callable[[slice], torch.Tensor]:
    """The logits of a slice of ``hidden`` [N, D] under the output layer ``head``, as constants."""
    bias = None if head.bias is None else head.bias.detach()
    hidden, weight, bias = loss.as_autocast(hidden.detach(), head.weight.detach(), bias)

    @torch.no_grad()
    def logits(part: slice) -> torch.Tensor:
        return nn.functional.linear(hidden[part], weight, bias).float() / divisor

    return logits
