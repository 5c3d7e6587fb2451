"""The step of a point or a mean that absorbs the blocks of a text one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from ltm_pyro.inference.base import BlockEvidence, flat


def block_step(
    z: Tensor, mean_squares: Tensor, num_steps: Tensor, evidence: BlockEvidence, length: float
) -> tuple[Tensor, Tensor]:
    """One step against the gradient, whose length is in proportion to it.

    On average over the blocks it is `length`, or the block's share of it. So a block that says little moves z little,
    and one without a token not at all.

    Args:
        z: what is moved, [B, *event_shape].
        mean_squares: the mean square of a gradient over the numbers of z, summed over all gradients before, [B].
        num_steps: their number, [B].
        length: the root mean square over the numbers of z.

    Returns:
        the new z, and the new sum of mean squares.
    """
    gradient = evidence.gradient
    numbers = flat(gradient)
    mean_squares = mean_squares + torch.linalg.vector_norm(numbers, dim=1).square() / numbers.shape[1]
    rms = (mean_squares / (num_steps + 1).to(gradient)).sqrt().clamp(min=torch.finfo(gradient.dtype).tiny)
    scale = length * evidence.share / rms
    # In one pass: z of a batch does not fit into a processor's cache.
    return torch.addcmul(z, scale.view(-1, *[1] * (z.dim() - 1)), gradient, value=-1), mean_squares
