"""Adam on local state held as values: `torch.optim.Adam` keeps its moments in itself, where they could not be stored,
indexed or skipped by sequence."""

from __future__ import annotations

from torch import Tensor

BETA_1, BETA_2 = 0.9, 0.999


def adam_step(
    value: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    step: Tensor,
    learning_rate: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Adam (Kingma & Ba 2015, algorithm 1), each sequence at its own step.

    Args:
        value: [B, ...], as `gradient` and both moments.
        step: [B] int64, steps taken before this one.
        learning_rate: the longest step.
        epsilon: gradients well below it move the value in proportion, those well above it by the learning rate.

    Returns:
        new value, first moment and second moment.
    """
    count = (step + 1).view(-1, *[1] * (value.dim() - 1)).to(value)
    first_moment = BETA_1 * first_moment + (1 - BETA_1) * gradient
    second_moment = BETA_2 * second_moment + (1 - BETA_2) * gradient.square()
    corrected_scale = (second_moment / (1 - BETA_2**count)).sqrt() + epsilon
    return value - learning_rate * first_moment / (1 - BETA_1**count) / corrected_scale, first_moment, second_moment
