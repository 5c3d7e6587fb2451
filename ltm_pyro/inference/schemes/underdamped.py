"""Underdamped Langevin dynamics: chains with a momentum, by the BAOAB splitting, without accepting or refusing.

    p ← p + (h/2) Aᵀ ∇_z log p(x, z)                   B
    z ← z + (h/2) A p                                  A
    p ← e^(-γ h) p + √(1 - e^(-2 γ h)) ε,  ε ~ N(0, I)  O
    z ← z + (h/2) A p                                  A
    p ← p + (h/2) Aᵀ ∇_z log p(x, z)                   B

(Leimkuhler & Matthews 2013), with A = I or, after `vi_steps`, the square root of q's covariance. On a Gaussian
posterior the chain has exactly the posterior's variances at any stable step, that is one below twice the smallest scale
of A⁻¹ z; on other posteriors it has an error of order h².
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ltm_pyro.inference.base import Batch, Model, StepInfo, require_settings
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.schemes.chains import EvaluatedChains, EvaluatedState, evaluate


@dataclass(frozen=True)
class UnderdampedState(EvaluatedState):
    momentum: Tensor
    """[B, C, *event_shape]: p, in units in which a mass is 1."""


@dataclass(frozen=True)
class Underdamped(EvaluatedChains):
    """Chains of underdamped Langevin dynamics."""

    step_size: float = 0.3
    """The time h of a step [units of z, whose prior has scale 1].
    A chain is stable if it is below twice the smallest posterior scale."""
    friction: float = 2.0
    """The rate γ at which a chain forgets its momentum [1 / unit of time].
    With a large one it moves as in langevin; with a small one it oscillates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_settings(self, "step_size", "friction")

    def init(self, model: Model, batch: Batch, rng: Noise, warm: Tensor | None = None) -> UnderdampedState:
        start = super().init(model, batch, rng, warm)
        momentum = rng.normal(
            "momentum", start.sequence_ids, start.step, start.z.shape[2:], (self.num_chains,), like=start.z
        )
        return UnderdampedState(**vars(start), momentum=momentum.transpose(0, 1).contiguous())

    def step(
        self, model: Model, state: UnderdampedState, batch: Batch, rng: Noise
    ) -> tuple[UnderdampedState, StepInfo]:
        event_shape = state.z.shape[2:]
        noise = rng.normal("underdamped", state.sequence_ids, state.step, event_shape, (self.num_chains,), like=state.z)
        start, momentum = state.point, state.momentum.transpose(0, 1)
        half, units = 0.5 * self.step_size, state.units
        kept = math.exp(-self.friction * self.step_size)
        momentum = momentum + half * units.transpose_times(start.gradient)
        z = start.z + half * units.times(momentum)
        momentum = kept * momentum + math.sqrt(1 - kept**2) * noise
        point = evaluate(model, batch, z + half * units.times(momentum))
        momentum = momentum + half * units.transpose_times(point.gradient)
        new = state.moved_to(point, momentum=momentum.transpose(0, 1).contiguous())
        return new, StepInfo(-start.log_density.mean(0))
