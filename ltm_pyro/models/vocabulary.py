"""The vocabulary term: log-probabilities of given tokens, without ever holding the logits of all positions.

With V in the tens of thousands the logits are by far the largest tensor of a batch, and all that a fast step needs of
them is one log-probability a position and its slope:

    log p_n = w_{x_n} · h_n - log Σ_v exp(w_v · h_n),      ∂ log p_n / ∂ h_n = w_{x_n} - Σ_v p_v w_v

Both sums over v are taken in one pass over blocks of the vocabulary, with a running maximum (the online softmax of
Milakov & Gimelshein 2018, arXiv 1805.02867, algorithm 3; as FlashAttention has it over keys). A block of logits stays
in the cache, and its products are as square as a processor likes them.

Shapes: N positions, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

CPU_BLOCK = (512, 2048)
"""The numbers of positions and of tokens whose logits are held at a time: 4 MiB in float32."""
DEVICE_BLOCK = (8192, 8192)
"""The same numbers for devices whose products must be large to be fast: 256 MiB in float32."""
CPU_MULTIPLE, DEVICE_MULTIPLE = 1, 128
"""The number of tokens is filled up to a multiple of this one. Products of a GPU are slow where rows of logits begin at
odd addresses."""


def target_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    num_unused: int = 0,
    dtype: torch.dtype | None = None,
    is_compiled: bool = False,
) -> Tensor:
    """log softmax(hidden weightᵀ) at the targets, [N], at least in float32.

    The logits are computed again in the backward pass if the weights have a gradient. Where a gradient is to be
    differentiated once more (`create_graph=True`), the backward pass holds the logits of all positions.

    Args:
        hidden: [N, D].
        weight: [V + num_unused, D].
        targets: [N] int64, below V.
        num_unused: number of rows at the end of the weights that are never a target. They are passed and left out
            here, since a caller's slice of the weights would copy their gradient.
        dtype: dtype of the products; None for that of the arguments. Sums are kept at least in float32.
        is_compiled: whether `torch.compile` makes kernels of what is done with a block of logits. Each of its passes
            over the block reads and writes all of it, which is what takes the time on a GPU. There are kernels for each
            size of a block, so the number of positions should not change often.

    Raises:
        IndexError: if a target is not an id below V.
    """
    # `Function.apply` has no types.
    log_probs: Tensor = _TargetLogProbs.apply(hidden, weight, targets, num_unused, dtype, is_compiled)  # type: ignore[no-untyped-call]
    return log_probs


class _TargetLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        num_unused: int,
        dtype: torch.dtype | None,
        is_compiled: bool,
    ) -> Tensor:
        ctx.is_compiled = is_compiled
        ctx.vocab_size = len(weight) - num_unused
        ctx.weight_dtype = weight.dtype
        needs_slope, needs_weight_gradient, *_ = ctx.needs_input_grad
        log_probs = torch.empty(len(hidden), dtype=_sum_dtype(hidden), device=hidden.device)
        log_total = torch.empty_like(log_probs)
        slope = torch.empty_like(hidden) if needs_slope else None
        weight[: ctx.vocab_size, 0].index_select(0, targets)  # fails where one is not an id, here or on the device
        ctx.product_dtype = dtype
        ctx.save_for_backward(slope, hidden, weight, targets, log_total if needs_weight_gradient else None)
        hidden, used = hidden.to(dtype or hidden.dtype), _filled_up(weight, ctx.vocab_size, dtype)
        add_block = _kernel(_add_block, is_compiled)
        for rows in _blocks(len(hidden), hidden.device, 0):
            chosen, log_total[rows], mean_weight = _softmax(
                hidden[rows], used, ctx.vocab_size, targets[rows], needs_slope, add_block
            )
            log_probs[rows] = chosen - log_total[rows]
            if slope is not None and mean_weight is not None:
                slope[rows] = (used[targets[rows]] - mean_weight).to(slope.dtype)
        return log_probs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        slope, hidden, weight, targets, log_total = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated, so it must be a function of the arguments
            return (*_differentiable(ctx, gradient, hidden, weight, targets), None, None, None, None)
        hidden_gradient = None if slope is None else (gradient[:, None] * slope).to(slope.dtype)
        if not ctx.needs_input_grad[1]:
            return hidden_gradient, None, None, None, None, None
        num_rows = len(weight)
        hidden, weight = hidden.to(ctx.product_dtype or hidden.dtype), _filled_up(weight, num_rows, ctx.product_dtype)
        # The gradient of the logits is gradient · (one-hot - probabilities).
        weight_gradient = torch.zeros(weight.shape, dtype=ctx.weight_dtype, device=weight.device)
        weight_gradient.index_add_(0, targets, (gradient[:, None] * hidden).to(ctx.weight_dtype))
        slopes_of = _kernel(_slopes_of, ctx.is_compiled)
        for tokens in _blocks(_filled_size(ctx.vocab_size, hidden.device), hidden.device, 1):
            for rows in _blocks(len(hidden), hidden.device, 0):
                logits = _logits(hidden[rows], weight[tokens], _num_filled(tokens, ctx.vocab_size))
                slopes = slopes_of(logits, log_total[rows, None], gradient[rows, None])
                weight_gradient[tokens] -= torch.mm(slopes.T, hidden[rows])
        return hidden_gradient, weight_gradient[:num_rows], None, None, None, None


def _differentiable(
    ctx: Any, gradient: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the hidden states and of the weights, with a graph of their own."""
    # Written out, and not by `torch.autograd.grad`: where the weights are also those of an embedding, the hidden states
    # depend on them, and their gradient would be counted twice.
    rows, columns = (x.to(ctx.product_dtype or x.dtype) for x in (hidden, weight[: ctx.vocab_size]))
    slopes = -gradient[:, None] * (rows @ columns.T).to(gradient.dtype).softmax(1)
    slopes = slopes.scatter_add(1, targets[:, None], gradient[:, None]).to(rows.dtype)
    needs_hidden, needs_weight, *_ = ctx.needs_input_grad
    of_hidden = (slopes @ columns).to(hidden.dtype) if needs_hidden else None
    if not needs_weight:
        return of_hidden, None
    num_unused = len(weight) - ctx.vocab_size
    return of_hidden, torch.nn.functional.pad((slopes.T @ rows).to(weight.dtype), (0, 0, 0, num_unused))


Seen = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""What is known of n positions after some blocks of tokens: the highest logit, the sum of the exponentials of logits
less that, and the target's logit, [n, 1] each; and the sum of the exponentials times the tokens' weights, [n, D], where
it is needed."""


def _filled_size(vocab_size: int, device: torch.device) -> int:
    """The number of tokens, filled up for the products of a device."""
    multiple = CPU_MULTIPLE if device.type == "cpu" else DEVICE_MULTIPLE
    return -(-vocab_size // multiple) * multiple


def _filled_up(weight: Tensor, num_rows: int, dtype: torch.dtype | None) -> Tensor:
    """So many rows of the weights in a dtype, and rows of zeros up to what a device's products need."""
    num_missing = _filled_size(num_rows, weight.device) - num_rows
    weight = weight[:num_rows].to(dtype or weight.dtype)
    return torch.nn.functional.pad(weight, (0, 0, 0, num_missing)) if num_missing else weight


def _num_filled(tokens: slice, vocab_size: int) -> int:
    """How many rows at the end of a block of tokens are there to fill it up."""
    stop: int = tokens.stop
    return max(0, stop - vocab_size)


def _logits(hidden: Tensor, weight: Tensor, num_filled: int) -> Tensor:
    """The logits of a block of tokens, [n, v]; -inf for what is there to fill it up."""
    logits = torch.mm(hidden, weight.T)
    if num_filled:
        logits[:, len(weight) - num_filled :] = -torch.inf
    return logits


def _add_block(hidden: Tensor, weight: Tensor, num_filled: int, index: Tensor, seen: Seen) -> Seen:
    """What is known after one more block of tokens.

    Args:
        weight: the weights of the block, [v, D], of which the last `num_filled` rows are there to fill it up.
        index: the position of the target in the block, [n, 1]; outside of it for a target in another block.
    """
    highest, total, chosen, weighted = seen
    rounded = _logits(hidden, weight, num_filled)
    # The very logits that the total is over, rounded as they are: the probabilities sum to one.
    logits = rounded.to(total.dtype)
    is_here = (index >= 0) & (index < len(weight))
    chosen = torch.where(is_here, logits.gather(1, index.clamp(0, len(weight) - 1)), chosen)
    lower, highest = highest, torch.maximum(highest, logits.amax(1, keepdim=True))
    shrinkage = (lower - highest).exp()
    exponentials = logits.sub_(highest).exp_()
    total = total * shrinkage + exponentials.sum(1, keepdim=True)
    if weighted is not None:
        weighted = weighted.mul_(shrinkage).add_(torch.mm(exponentials.to(rounded.dtype), weight))
    return highest, total, chosen, weighted


def _slopes_of(logits: Tensor, log_total: Tensor, gradient: Tensor) -> Tensor:
    """Probabilities times the gradient of each position, [n, v]."""
    return logits.to(gradient.dtype).sub_(log_total).exp_().mul_(gradient).to(logits.dtype)


def _kernel(function: Callable[P, R], is_compiled: bool) -> Callable[P, R]:
    return _compiled(function) if is_compiled else function


@functools.cache
def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _softmax(
    hidden: Tensor,
    weight: Tensor,
    vocab_size: int,
    targets: Tensor,
    needs_mean: bool,
    add_block: Callable[[Tensor, Tensor, int, Tensor, Seen], Seen],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The targets' logits, [n]; log Σ_v exp(logit_v), [n]; and Σ_v p_v w_v, [n, D], where it is needed."""
    dtype = _sum_dtype(hidden)
    highest = torch.full((len(hidden), 1), -torch.inf, dtype=dtype, device=hidden.device)
    weighted = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if needs_mean else None
    seen: Seen = highest, torch.zeros_like(highest), torch.zeros_like(highest), weighted
    for tokens in _blocks(len(weight), hidden.device, 1):
        index = (targets - tokens.start)[:, None]
        seen = add_block(hidden, weight[tokens], _num_filled(tokens, vocab_size), index, seen)
    highest, total, chosen, weighted = seen
    mean = None if weighted is None else weighted / total
    return chosen.squeeze(1), (highest + total.log()).squeeze(1), mean


def _sum_dtype(hidden: Tensor) -> torch.dtype:
    # At least float32: a sum of a thousand log-probabilities in bfloat16 would lose nats.
    return torch.promote_types(hidden.dtype, torch.float32)


def _blocks(size: int, device: torch.device, dim: int) -> Iterator[slice]:
    """Slices that cover `size` positions (dim 0) or tokens (dim 1)."""
    step = (CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK)[dim]
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
