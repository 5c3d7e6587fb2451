"""A step of Hamiltonian Monte Carlo: a path of leapfrogs, and the rule that accepts or refuses where it ends.

    p ← p + (ε/2) Aᵀ ∇ log f(z)       repeated L times from a momentum p ~ N(0, I)
    z ← z + ε A p
    p ← p + (ε/2) Aᵀ ∇ log f(z)

    accepted with probability min(1, f(z') exp(-|p'|²/2) / f(z) exp(-|p|²/2))

(Neal 2011, sections 5.2.3, 5.3.2 and 5.4.2.4), which leaves f invariant whatever ε > 0, the units A and L are, if they
do not depend on where the chain stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ltm_pyro.inference.base import flat
from ltm_pyro.inference.schemes.units import Units


class EvaluatedDensity(Protocol):
    """A density f, evaluated at z: a dataclass whose fields all begin with the dimensions [C, B]."""

    @property
    def z(self) -> Tensor:
        """[C, B, *event_shape]."""
        ...

    @property
    def log_density(self) -> Tensor:
        """[C, B]: log f(z), up to a constant."""
        ...

    @property
    def gradient(self) -> Tensor:
        """[C, B, *event_shape]: the gradient of log f at z."""
        ...


P = TypeVar("P", bound=EvaluatedDensity)


def transition(
    start: P,
    evaluate: Callable[[Tensor], P],
    step_size: Tensor,
    units: Units,
    num_leapfrogs: int,
    momentum: Tensor,
    uniform: Tensor,
) -> tuple[P, Tensor]:
    """Take one step of every chain. Each is accepted or refused by itself.

    A proposal whose density is not finite is refused.

    Args:
        start: the density where the chains stand.
        evaluate: evaluates the density at a z.
        step_size: ε, [B] or [C, B].
        units: A, for each sequence.
        num_leapfrogs: L.
        momentum: [C, B, *event_shape], standard normal.
        uniform: [C, B], from [0, 1).

    Returns:
        the density where the chains stand now, and the probability with which each accepted, [C, B].
    """
    at, step_size = start, like_events(step_size, start.z)
    before = start.log_density - _kinetic(momentum)
    for _ in range(num_leapfrogs):
        momentum = momentum + 0.5 * step_size * units.transpose_times(at.gradient)
        at = evaluate(at.z + step_size * units.times(momentum))
        momentum = momentum + 0.5 * step_size * units.transpose_times(at.gradient)
    after = at.log_density - _kinetic(momentum)
    acceptance = torch.where(after.isfinite(), (after - before).clamp(max=0).exp(), 0.0).nan_to_num(0.0)
    accepted = uniform.to(acceptance) < acceptance
    kept = {
        name: torch.where(like_events(accepted, value), value, getattr(start, name)) for name, value in vars(at).items()
    }
    return type(start)(**kept), acceptance


def _kinetic(momentum: Tensor) -> Tensor:
    return 0.5 * flat(momentum.square(), 2).sum(-1)


def like_events(values: Tensor, z: Tensor) -> Tensor:
    """Values of [B] or [C, B], with as many dimensions as z, [C, B, *event_shape]."""
    return values.view(*values.shape, *[1] * (z.dim() - 2))
