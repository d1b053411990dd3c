"""Weighted next-token loss (paper Eq. 11) that never builds the full logits matrix.

The output layer keeps its class, name and weight; while training it can also return the loss of hidden
states, chunk by chunk over tokens.  The gradient of a chunk is formed right after its logits, in the forward
pass, so three matrix products serve where recomputation would need four (the idea of Liger-Kernel's fused
linear cross-entropy, in plain PyTorch).

What that holds, counted above hidden states, weight and the gradients of both, for N tokens, V entries, D
wide, in bfloat16: full logits  12 N V bytes: the log-probabilities that cross entropy keeps, their gradient
and the logits', in float32 each on a GPU     2 chunk V, the logits, which a Triton kernel turns into their
gradient in place; 4 V D more with over ``ROUNDINGS`` chunks; 2 V D in the backward pass, while the weight's
gradient is scaled elsewhere    about 14 chunk V, for logits in both types, logsumexp and the gradient; 4 V D,
the weight's gradient summed in float32 At 8192 x 128,256 x 2048 that is 12.6 GB, 0.53 GB (4.2 %) in 4 chunks
and 1.3 GB (10 %) in 63.  The sum over chunks moves 4 V D bytes a chunk in the weight's type and 12 V D in
float32, 66 GB in 63 chunks, which is why a GPU takes few.  Blocks of the vocabulary over all tokens would
need neither sum nor buffer, but a fourth matrix product; on a CPU they took 0.90 of the time in float32 and
1.20 in bfloat16 (4096 x 32,000 x 128), so tokens are what is cut.
"""

import functools
import sys
import types
from typing import cast

import torch
from torch import nn

from endprompt import Failure
from endprompt.bases import families

CHUNK_ELEMENTS = 2**24  # logits held at a time; 64 MiB in float32
GPU_CHUNK_ELEMENTS = 2**28  # 512 MiB in bfloat16
# As many chunks may sum the weight's gradient in its own type: each product sums in float32 and rounds once,
# and so few roundings are lost in that of the logits.
ROUNDINGS = 8


def _rows(logits, labels, token_weights, needs_gradient):
    """(cross entropy [n] float32, gradient of logits [n, V] float32 or None) of a chunk's rows."""
    target = labels.clamp_min(0)[:, None]
    logits = logits.float()
    log_normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
    nll = (log_normalizer - logits.gather(1, target))[:, 0] * (labels >= 0)
    if not needs_gradient:
        return nll, None
    scale = token_weights[:, None]
    gradient = logits.sub_(log_normalizer).exp_()
    gradient.scatter_add_(1, target, torch.full_like(scale, -1.0))
    return nll, gradient.mul_(scale * (labels[:, None] >= 0))


def row_kernel(hidden):
    """``loss_kernel.rows`` where it can run (a GPU with Triton, which comes with torch there) and gives what
    plain operations give, else None: then those do it.
    """
    if not hidden.is_cuda:
        return None
    try:
        from endprompt.training import loss_kernel
    except ImportError:
        return None
    return loss_kernel.rows if agrees(loss_kernel.rows, hidden.device, hidden.dtype) else None


@functools.cache
def agrees(kernel, device, dtype) -> bool:
    """Whether ``kernel`` gives the cross entropy and gradients of ``_rows`` on a small random batch; once a
    process, as compilers and devices differ.
    """
    generator = torch.Generator(device).manual_seed(0)
    logits = 4 * torch.randn(17, 20011, generator=generator, device=device)
    labels = torch.randint(-1, logits.shape[1], (17,), generator=generator, device=device)
    labels[0], weights = -1, torch.rand(17, generator=generator, device=device)
    logits = logits.to(dtype)
    expected, gradient = _rows(logits.clone(), labels, weights, True)
    found = kernel(logits, labels, weights, True)
    if torch.allclose(found, expected, atol=1e-4, rtol=1e-4) and torch.allclose(
        logits.float(), gradient.to(dtype).float(), atol=1e-6, rtol=2e-2
    ):
        return True
    print(
        "warning: the loss' Triton kernel gives other values than plain operations on this device; those are"
        " used, which is slower",
        file=sys.stderr,
    )
    return False


def _chunk(vocabulary: int, kernel) -> int:
    if not kernel:
        return max(16, CHUNK_ELEMENTS // vocabulary)
    return max(128, GPU_CHUNK_ELEMENTS // vocabulary // 128 * 128)  # whole tiles of a matrix product


def scaled(gradient, scale):
    """gradient x scale (float32, no dimensions) in the gradient's type, each product rounded once.

    A scale that is rounded to bf16 first is wrong by up to 0.39 %, everywhere alike.  What remains is the
    rounding of bf16 products, which has a mean of its own (0.2 % at most) only for scales within 0.4 % of a
    power of two.
    """
    if gradient.dtype == scale.dtype:
        return gradient * scale
    # torch takes a number's type from the other operand; with one dimension it counts as float32, and a GPU
    # makes no copy.
    return torch.mul(gradient, scale[None], out=torch.empty_like(gradient))


def as_autocast(*tensors):
    """The tensors (or None) in autocast's type where it is on: weights are float32 masters then, and products
    would mix types.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(
        tensor if tensor is None else tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors
    )


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, token_weights, chunk, kernel, divisor):
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_any = needs_hidden or needs_weight or bias is not None and needs_bias
        nll = torch.zeros_like(token_weights)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        sum_type = weight.dtype if kernel and len(hidden) <= ROUNDINGS * chunk else torch.float32
        grad_weight = (
            torch.zeros(weight.shape, dtype=sum_type, device=weight.device) if needs_weight else None
        )
        grad_bias = (
            torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
            if bias is not None and needs_bias
            else None
        )
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = nn.functional.linear(hidden[part], weight, bias)
            if divisor != 1:
                logits /= divisor
            if kernel:
                nll[part] = kernel(logits, labels[part], token_weights[part], needs_any)
                gradient = logits
            else:
                nll[part], gradient = _rows(logits, labels[part], token_weights[part], needs_any)
            del logits
            if needs_any:
                if grad_bias is not None:
                    grad_bias += gradient.sum(0, dtype=torch.float32) / divisor
                gradient = gradient.to(hidden.dtype)
                if divisor != 1:
                    gradient /= divisor
                if grad_hidden is not None:
                    grad_hidden[part] = gradient @ weight
                if grad_weight is not None:
                    if weight.dtype == sum_type:
                        grad_weight.addmm_(gradient.t(), hidden[part])
                    else:  # summing many chunks in bf16 would lose the small ones
                        grad_weight += gradient.t() @ hidden[part]
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(nll)
        return (nll * token_weights).sum(), nll

    @staticmethod
    def backward(ctx, grad_loss, _):
        grads = (None if grad is None else scaled(grad, grad_loss) for grad in ctx.saved_tensors)
        return *grads, None, None, None, None, None


def chunked_linear_cross_entropy(hidden, weight, labels, token_weights, bias=None, chunk=None):
    """Sum over tokens of token_weights * cross entropy of ``hidden @ weight.T + bias`` against ``labels``.

    hidden [N, D]; weight [V, D]; bias [V] or None; labels int64 [N], negative where there is no target;
    token_weights float32 [N]. Returns (sum, float32 scalar with gradient; cross entropy float32 [N] without
    gradient, 0 where there is no target), both in nats.
    """
    return _divided((hidden, weight, bias), labels, token_weights, 1.0, chunk)


def _divided(layer, labels, token_weights, divisor: float, chunk=None):
    """``chunked_linear_cross_entropy`` of logits that are divided by ``divisor``; layer: (hidden, weight,
    bias)."""
    hidden, weight, bias = as_autocast(*layer)
    kernel = row_kernel(hidden)
    chunk = chunk or _chunk(weight.shape[0], kernel)
    if not torch.is_grad_enabled():  # inside the function, parameters would still ask for a gradient
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return _ChunkedLinearCrossEntropy.apply(
        hidden, weight, bias, labels, token_weights, chunk, kernel, divisor
    )


def liger_kernel(hidden):
    """Liger's fused linear cross-entropy where it can run (a GPU, and the package of the ``gpu`` extra), else
    None.
    """
    if not hidden.is_cuda:
        return None
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyFunction.apply


class LossHead(nn.Linear):
    """An output layer that also computes the loss.

    The loss has to live inside this module's forward: under ZeRO-3 the weight is whole only there.
    uniform: every target has weight 1.  Then Liger's kernel, which knows no weights a token, gives the same
        sum and is used on a GPU.
    divisor: of the logits, where the model has one.
    target, target_head: hidden states whose predictions, under another output layer or this one, are held to
        instead of labels.
    """

    uniform, divisor = False, 1.0

    def forward(self, hidden, shift_labels=None, shift_weights=None, target=None, target_head=None):
        if target is not None:
            from endprompt.training import divergence

            layer = hidden.flatten(0, 1), self.weight, self.bias
            logits = divergence.logits_of(target_head or self, target.flatten(0, 1), self.divisor)
            total, each = divergence.chunked_divergence(layer, logits, shift_weights.flatten(), self.divisor)
            return total, each.view(shift_weights.shape)
        if shift_labels is None:
            return super().forward(hidden)
        if self.uniform and self.divisor == 1 and (kernel := liger_kernel(hidden)):
            # ignore_index -100, no z-loss, no smoothing, summed; weight gradients of the chunks accumulate in
            # float32, as ours do.
            hidden, weight, bias = as_autocast(hidden, self.weight, self.bias)
            total = kernel(
                hidden.flatten(0, 1),
                weight,
                shift_labels.flatten(),
                bias,
                None,
                -100,
                0.0,
                0.0,
                "sum",
                None,
                False,
                torch.float32,
            )[0]
            return total, None
        layer = hidden.flatten(0, 1), self.weight, self.bias
        total, nll = _divided(layer, shift_labels.flatten(), shift_weights.flatten(), self.divisor)
        return total, nll.view(shift_labels.shape)


def seen_by_all(attention_mask):
    """A mask of ones for rows that are padded on the right alone, as the collator's are: causal attention
    hides that padding from every token anyway.

    With a zero in it, transformers builds the square [length, length] of the mask, which keeps
    scaled_dot_product_attention from its flash kernels.
    """
    return torch.ones_like(attention_mask)


def _forward_with_loss(
    self,
    input_ids=None,
    attention_mask=None,
    position_ids=None,
    shift_labels=None,
    shift_weights=None,
    with_hidden=False,
    **kwargs,
):
    if shift_labels is None:
        return type(self).forward(
            self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )
    # Mixture of experts: config.json says whether the router's load is part of the loss.
    balanced = getattr(self.config, "output_router_logits", False)
    found = self.get_decoder()(
        input_ids=input_ids,
        attention_mask=None if attention_mask is None else seen_by_all(attention_mask),
        position_ids=position_ids,
        use_cache=False,
        **({"output_router_logits": True} if balanced else {}),
    )
    loss_sum, nll = self.get_output_embeddings()(found.last_hidden_state, shift_labels, shift_weights)
    if balanced:
        loss_sum = loss_sum + shift_weights.sum() * _imbalance(self, found.router_logits, attention_mask)
    hidden = {"hidden": found.last_hidden_state} if with_hidden else {}
    return {"loss_sum": loss_sum, "nll": nll, **hidden}


def _imbalance(model, router_logits, attention_mask) -> torch.Tensor:
    """The router's loss of a micro-batch as the model's own forward adds it to the mean over tokens."""
    experts, chosen = model.num_experts, model.num_experts_per_tok
    family = sys.modules[type(model).__module__]
    loss = family.load_balancing_loss_func(router_logits, experts, chosen, attention_mask)
    return model.router_aux_loss_coef * loss


def attach(model, uniform: bool = False) -> None:
    """Gives a causal model a forward that returns {"loss_sum", "nll"}, and with ``with_hidden`` the last
    hidden states under "hidden", when called with shift_labels and shift_weights.

    Padding must stand on the right, and the model be causal (see seen_by_all).
    uniform: promise that every target's weight is 1 (see LossHead); nll is None where Liger's kernel made the
        sum. Parameters, their names and the state dict stay as they are.  Raises Failure if the output layer
        is not a plain nn.Linear.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise Failure(f"the output layer is {type(head).__name__}, not nn.Linear; its loss cannot be chunked")
    head.__class__ = LossHead
    family = families.BY_TYPE.get(model.config.model_type)
    cast(LossHead, head).uniform = uniform
    if family is not None and family.divisor is not None:
        cast(LossHead, head).divisor = float(getattr(model.config, family.divisor))
    model.forward = types.MethodType(_forward_with_loss, model)


def leave_uncompiled() -> None:
    """Keeps torch.compile out of the loss, whose loop over chunks it would unroll."""
    if not hasattr(LossHead.forward, "_torchdynamo_disable"):
        # A method is replaced: whoever holds the class gets the uncompiled one.
        LossHead.forward = torch.compiler.disable(LossHead.forward)  # type: ignore[method-assign]
