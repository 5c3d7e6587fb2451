"""The step that the gradient of a block takes, for schemes that keep no precision of z."""

from __future__ import annotations

import torch
from torch import Tensor

from ltm_pyro.inference.base import BlockEvidence, flat


def block_step(
    z: Tensor, sum_of_squares: Tensor, num_steps: Tensor, evidence: BlockEvidence, length: float
) -> tuple[Tensor, Tensor]:
    """One step against the gradient, whose length is in proportion to it.

    On average over the blocks it is `length`, or the block's share of it. So a block that says little moves z little,
    and one without a token not at all.

    Args:
        z: what is moved, [B, *event_shape].
        sum_of_squares: the sum of the squares of all gradients before, [B, *event_shape].
        num_steps: their number, [B].
        length: the root mean square over the numbers of z.

    Returns:
        the new z, and the new sum of squares.
    """
    gradient = evidence.gradient
    sum_of_squares = sum_of_squares + gradient.square()
    mean_square = flat(sum_of_squares).mean(1) / (num_steps + 1).to(gradient)
    rms = mean_square.sqrt().clamp(min=torch.finfo(gradient.dtype).tiny)
    scale = length * evidence.share / rms
    return z - scale.view(-1, *[1] * (z.dim() - 1)) * gradient, sum_of_squares
