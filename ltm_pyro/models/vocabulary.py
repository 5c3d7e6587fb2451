"""The vocabulary term: log-probabilities of given tokens, without ever holding the logits of all positions.

With V in the tens of thousands the logits of a batch are its largest tensor by far, and a fast step needs nothing of
them but one log-probability a position and its slope. Both are computed here for some positions at a time, in one pass:

    log p_n = w_{x_n} · h_n - log Σ_v exp(w_v · h_n),      ∂ log p_n / ∂ h_n = w_{x_n} - Σ_v p_v w_v
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_LOGITS = 2**23
"""Logits that are held at a time: 32 MiB in float32."""


def target_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, num_unused: int = 0) -> Tensor:
    """log softmax(hidden weightᵀ) at the targets, [N], at least in float32.

    Where the weights have a gradient and the logits do not fit at once, they are computed again in the backward pass.

    Args:
        hidden: [N, D].
        weight: [V + num_unused, D].
        targets: [N] int64, below V.
        num_unused: the last rows of the weights that are no target. Left out here and not by the caller, the weights
            have one gradient and not a copy of it.
    """
    return _TargetLogProbs.apply(hidden, weight, targets, num_unused)


class _TargetLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, num_unused: int) -> Tensor:
        ctx.vocab_size = len(weight) - num_unused
        all_weights, weight = weight, weight[: ctx.vocab_size]
        # At least float32: a sum of a thousand log-probabilities in bfloat16 would lose nats.
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        chunks = _chunks(len(hidden), len(weight))
        ctx.kept = None
        for rows in chunks:
            exponentials, totals, log_probs[rows] = _softmax_parts(hidden[rows], weight, targets[rows], dtype)
            if slope is not None:
                mean_weight = (exponentials.to(weight.dtype) @ weight) / totals.to(weight.dtype)
                slope[rows] = weight[targets[rows]] - mean_weight
            if ctx.needs_input_grad[1] and len(chunks) == 1:
                ctx.kept = exponentials, totals
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(slope, hidden, all_weights, targets)
        else:
            ctx.save_for_backward(slope)
        return log_probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        slope, *inputs = ctx.saved_tensors
        hidden_gradient = None if slope is None else gradient[:, None].to(slope.dtype) * slope
        if not ctx.needs_input_grad[1]:
            return hidden_gradient, None, None, None
        hidden, all_weights, targets = inputs
        weight_gradient = torch.zeros_like(all_weights)
        weight = all_weights[: ctx.vocab_size]
        for rows in _chunks(len(hidden), len(weight)):
            parts = ctx.kept or _softmax_parts(hidden[rows], weight, targets[rows], gradient.dtype)
            # Of the logits: gradient · (one-hot - probabilities).
            slopes = parts[0] * (-gradient[rows, None] / parts[1])
            slopes.scatter_add_(1, targets[rows, None], gradient[rows, None])
            weight_gradient[: ctx.vocab_size].addmm_(slopes.to(weight.dtype).T, hidden[rows])
        return hidden_gradient, weight_gradient, None, None


def _softmax_parts(hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """exp(logits - their maximum), [n, V]; its sum, [n, 1]; the log-probability of the targets, [n]."""
    logits = F.linear(hidden, weight).to(dtype)
    highest = logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, targets[:, None]) - highest
    exponentials = logits.sub_(highest).exp_()
    totals = exponentials.sum(-1, keepdim=True)
    return exponentials, totals, (chosen - totals.log()).squeeze(-1)


def _chunks(num_rows: int, vocab_size: int) -> list[slice]:
    size = max(1, MOST_LOGITS // vocab_size)
    return [slice(start, start + size) for start in range(0, num_rows, size)]
