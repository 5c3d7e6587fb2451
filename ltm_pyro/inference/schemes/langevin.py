"""Unadjusted Langevin dynamics: draws of z by noisy gradient steps.

    z ← z + s A Aᵀ ∇_z [log p(x | z) + log p(z)] + √(2 s) A ε,    ε ~ N(0, I)

on the summed log joint (Kong et al. 2025, section 2; Roberts & Tweedie 1996), with A = I or, after `vi_steps`, the
square root of q's covariance. Unadjusted: where A⁻¹ z is Gaussian with variance v, it is sampled with variance
v / (1 - s / 2v), and the chain diverges where s > 2v.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ltm_pyro.inference.base import Batch, Model, StepInfo, log_joint, require_settings
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.schemes.chains import Chains, ChainState


@dataclass(frozen=True)
class Langevin(Chains):
    """Chains of unadjusted Langevin dynamics."""

    step_size: float = 0.05
    """The step size s, half the variance of a step's noise [units of z squared, whose prior has variance 1].
    A chain is stable if it is below twice the smallest posterior variance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_settings(self, "step_size")

    def step(self, model: Model, state: ChainState, batch: Batch, rng: Noise) -> tuple[ChainState, StepInfo]:
        event_shape = state.z.shape[2:]
        noise = rng.normal("langevin", state.sequence_ids, state.step, event_shape, (self.num_chains,), like=state.z)
        with torch.enable_grad():
            z = state.z.transpose(0, 1).detach().requires_grad_()
            joint = log_joint(model, batch, z, num_sample_dims=1)
            log_density = joint.log_likelihood + joint.log_prior
            (gradient,) = torch.autograd.grad(log_density.sum(), z)
        drift = self.step_size * state.units.times(state.units.transpose_times(gradient))
        diffusion = (2 * self.step_size) ** 0.5 * state.units.times(noise)
        return state.moved(z.detach() + drift + diffusion), StepInfo(-log_density.detach().mean(0))
