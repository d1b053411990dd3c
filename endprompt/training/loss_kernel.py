"""Cross entropy and its gradient in one pass a row, for GPUs: a Triton kernel, imported only where it can
run.
"""

import torch
import triton
import triton.language as tl

BLOCK = 8192  # entries of the vocabulary at a time


@triton.jit
def _row(logits, stride, labels, weights, nll, vocabulary, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    there = label >= 0
    at_label = tl.load(logits + tl.where(there, label, 0)).to(tl.float32)
    tl.debug_barrier()  # every thread has read it before one writes the gradient over it
    peak, total = -float("inf"), 0.0
    for start in range(0, vocabulary, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        values = tl.load(logits + entries, mask=entries < vocabulary, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(values, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(values - higher), 0)
        peak = higher
    normalizer = peak + tl.log(total)
    tl.store(nll + row, tl.where(there, normalizer - at_label, 0.0))
    if GRADIENT:
        scale = tl.where(there, tl.load(weights + row), 0.0)
        for start in range(0, vocabulary, BLOCK):
            entries = start + tl.arange(0, BLOCK)
            values = tl.load(logits + entries, mask=entries < vocabulary, other=-float("inf")).to(tl.float32)
            gradient = (tl.exp(values - normalizer) - tl.where(entries == label, 1.0, 0.0)) * scale
            tl.store(logits + entries, gradient.to(logits.dtype.element_ty), mask=entries < vocabulary)


def rows(
    logits: torch.Tensor, labels: torch.Tensor, token_weights: torch.Tensor, needs_gradient: bool
) -> torch.Tensor:
    """Cross entropy float32 [n] of ``logits`` [n, V] against ``labels`` int64 [n] (negative: none, 0 is
    given), in nats.

    needs_gradient: ``logits`` is overwritten by the gradient of the sum over rows of token_weights (float32
    [n]) x cross entropy. The arithmetic is in float32.
    """
    nll = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        _row[(len(logits),)](
            logits,
            logits.stride(0),
            labels.contiguous(),
            token_weights.contiguous(),
            nll,
            logits.shape[1],
            GRADIENT=needs_gradient,
            BLOCK=min(BLOCK, triton.next_power_of_2(logits.shape[1])),
            num_warps=16,
        )
    return nll
