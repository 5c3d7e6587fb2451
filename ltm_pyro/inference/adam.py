"""Adam on local state held as values: `torch.optim.Adam` keeps its moments in itself, where they could not be stored,
indexed or skipped by sequence."""

from __future__ import annotations

from torch import Tensor

# The fast loop takes few steps: moments shorter than Adam's usual 0.9 and 0.999 would be noise, longer ones never warm.
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


def adam_step(
    value: Tensor, gradient: Tensor, first_moment: Tensor, second_moment: Tensor, step: Tensor, learning_rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Adam (Kingma & Ba 2015, algorithm 1), each sequence at its own step.

    Args:
        value: [B, ...], as `gradient` and both moments.
        step: [B] int64, steps taken before this one.

    Returns:
        new value, first moment and second moment.
    """
    count = (step + 1).view(-1, *[1] * (value.dim() - 1)).to(value.dtype)
    first_moment = BETA_1 * first_moment + (1 - BETA_1) * gradient
    second_moment = BETA_2 * second_moment + (1 - BETA_2) * gradient.square()
    corrected_scale = (second_moment / (1 - BETA_2**count)).sqrt() + EPSILON
    return value - learning_rate * first_moment / (1 - BETA_1**count) / corrected_scale, first_moment, second_moment
