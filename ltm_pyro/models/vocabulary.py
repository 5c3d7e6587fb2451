"""The vocabulary term: log-probabilities of given tokens, without ever holding the logits of all positions.

With V in the tens of thousands the logits of a batch are its largest tensor by far, and a fast step needs nothing of
them but one log-probability a position and its slope:

    log p_n = w_{x_n} · h_n - log Σ_v exp(w_v · h_n),      ∂ log p_n / ∂ h_n = w_{x_n} - Σ_v p_v w_v

Both sums over v are taken in one pass over blocks of the vocabulary, with a running maximum (the online softmax of
Milakov & Gimelshein 2018, arXiv 1805.02867, algorithm 3; as FlashAttention has it over keys). A block of logits stays
in the cache, and its products are as square as a processor likes them.

Shapes: N positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CPU_BLOCK = (512, 2048)
"""Positions and tokens whose logits are held at a time: 4 MiB in float32."""
DEVICE_BLOCK = (8192, 8192)
"""The same where a product has to be large to be fast: 256 MiB in float32."""


def target_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, num_unused: int = 0) -> Tensor:
    """log softmax(hidden weightᵀ) at the targets, [N], at least in float32.

    The logits are computed again in the backward pass if the weights have a gradient.

    Args:
        hidden: [N, D].
        weight: [V + num_unused, D].
        targets: [N] int64, below V.
        num_unused: the last rows of the weights that are no target. Left out here and not by the caller, the weights
            have one gradient and not a copy of it.

    Raises:
        IndexError: if a target is no id below V.
    """
    return _TargetLogProbs.apply(hidden, weight, targets, num_unused)


class _TargetLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, num_unused: int) -> Tensor:
        ctx.vocab_size = len(weight) - num_unused
        needs_slope, needs_weight_gradient, *_ = ctx.needs_input_grad
        # At least float32: a sum of a thousand log-probabilities in bfloat16 would lose nats.
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        chosen, log_total = (torch.empty(len(hidden), dtype=dtype, device=hidden.device) for _ in range(2))
        slope = torch.empty_like(hidden) if needs_slope else None
        weight[: ctx.vocab_size, 0].index_select(0, targets)  # fails on ids that are none, here or on the device
        for rows in _blocks(len(hidden), hidden.device, 0):
            used = weight[: ctx.vocab_size]
            chosen[rows], log_total[rows], mean_weight = _softmax(hidden[rows], used, targets[rows], needs_slope)
            if needs_slope:
                slope[rows] = used[targets[rows]] - mean_weight
        if needs_weight_gradient:
            ctx.save_for_backward(slope, hidden, weight, targets, log_total)
        else:
            ctx.save_for_backward(slope)
        return chosen - log_total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        slope, *inputs = ctx.saved_tensors
        hidden_gradient = None if slope is None else (gradient[:, None] * slope).to(slope.dtype)
        if not ctx.needs_input_grad[1]:
            return hidden_gradient, None, None, None
        hidden, weight, targets, log_total = inputs
        # Of the logits: gradient · (one-hot - probabilities).
        weight_gradient = torch.zeros_like(weight)
        weight_gradient.index_add_(0, targets, (gradient[:, None] * hidden).to(weight.dtype))
        for tokens in _blocks(ctx.vocab_size, hidden.device, 1):
            for rows in _blocks(len(hidden), hidden.device, 0):
                logits = torch.mm(hidden[rows], weight[tokens].T).to(gradient.dtype)
                slopes = logits.sub_(log_total[rows, None]).exp_().mul_(gradient[rows, None])
                weight_gradient[tokens].addmm_(slopes.to(weight.dtype).T, hidden[rows], alpha=-1)
        return hidden_gradient, weight_gradient, None, None


def _softmax(hidden: Tensor, weight: Tensor, targets: Tensor, needs_mean: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of some positions: the targets' logits, [n]; log Σ_v exp(logit_v), [n]; Σ_v p_v w_v, [n, D], if it is needed."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    highest = torch.full((len(hidden), 1), -torch.inf, dtype=dtype, device=hidden.device)
    total, chosen = torch.zeros_like(highest), torch.zeros_like(highest)
    weighted = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if needs_mean else None
    for tokens in _blocks(len(weight), hidden.device, 1):
        block = weight[tokens]
        logits = torch.mm(hidden, block.T).to(dtype)
        # The very logits that the total is over, rounded as they are: the probabilities sum to one.
        place = (targets - tokens.start)[:, None]
        is_here = (place >= 0) & (place < len(block))
        chosen = torch.where(is_here, logits.gather(1, place.clamp(0, len(block) - 1)), chosen)
        lower, highest = highest, torch.maximum(highest, logits.amax(1, keepdim=True))
        shrinkage = (lower - highest).exp_()
        exponentials = logits.sub_(highest).exp_()
        total = total.mul_(shrinkage).add_(exponentials.sum(1, keepdim=True))
        if needs_mean:
            weighted = weighted.mul_(shrinkage).add_(torch.mm(exponentials.to(block.dtype), block))
    mean = weighted / total if needs_mean else None
    return chosen.squeeze(1), (highest + total.log()).squeeze(1), mean


def _blocks(size: int, device: torch.device, dim: int) -> Iterator[slice]:
    """Slices that cover `size` positions (dim 0) or tokens (dim 1)."""
    step = (CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK)[dim]
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
