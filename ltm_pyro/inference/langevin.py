"""Unadjusted Langevin: draws of z by noisy gradient steps.

    z ← z + s ∇_z [log p(x | z) + log p(z)] + √(2 s) ε,    ε ~ N(0, I)

on the summed log joint (Kong et al. 2025, section 2; Roberts & Tweedie 1996). Unadjusted: a Gaussian posterior of
variance v is sampled with variance v / (1 - s / 2v), and the chain diverges where s > 2v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ltm_pyro.inference.base import (
    Batch,
    Guide,
    Model,
    State,
    StepInfo,
    first_fields,
    latent_prior,
    log_joint,
    require_positive,
)
from ltm_pyro.inference.guides import guide_of, point
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.posterior import Posterior


@dataclass(frozen=True)
class LangevinState(State):
    z: Tensor
    """[B, C, *event_shape]: where the C chains of each sequence stand."""
    draws: Tensor
    """[B, C, K, *event_shape]: the last K draws of each chain, the newest last."""


@dataclass(frozen=True)
class Langevin:
    """Draws of z by unadjusted Langevin, from draws of the prior."""

    num_steps: int = 16
    """Steps of inference for each sequence (T)."""
    step_size: float = 0.05
    """s, half the variance of a step's noise [units of z squared, whose prior has variance 1].
    Stable below twice the smallest posterior variance."""
    num_chains: int = 1
    """Chains of each sequence, run side by side."""
    num_kept: int = 1
    """Draws that each chain keeps, the last ones; more than one serve a look at the posterior."""

    has_density: ClassVar[bool] = False
    loss_is_bound: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_positive(self, "step_size", "num_chains", "num_kept")

    @property
    def num_draws(self) -> int:
        """The draws that the chains keep."""
        return self.num_chains * min(self.num_kept, max(1, self.num_steps))

    def init(self, model: Model, batch: Batch, rng: Noise, warm: Tensor | None = None) -> LangevinState:
        """Draws from a Gaussian with the prior's mean and scale (the LTM's prior itself); or all chains at `warm`."""
        prior = latent_prior(model, batch)
        if warm is None:
            noise = rng.normal(
                "init",
                batch.sequence_ids,
                torch.zeros_like(batch.sequence_ids),
                prior.event_shape,
                (self.num_chains,),
                like=prior.mean,
            )
            z = (prior.mean + prior.stddev * noise).transpose(0, 1).detach().contiguous()
        else:
            z = warm.detach().unsqueeze(1).repeat_interleave(self.num_chains, 1)
        return LangevinState(*first_fields(batch), z, z.unsqueeze(2).repeat_interleave(self.num_kept, 2))

    def step(self, model: Model, state: LangevinState, batch: Batch, rng: Noise) -> tuple[LangevinState, StepInfo]:
        event_shape = state.z.shape[2:]
        noise = rng.normal("langevin", state.sequence_ids, state.step, event_shape, (self.num_chains,), like=state.z)
        with torch.enable_grad():
            z = state.z.transpose(0, 1).detach().requires_grad_()
            joint = log_joint(model, batch, z, num_sample_dims=1)
            log_density = joint.log_likelihood + joint.log_prior
            (gradient,) = torch.autograd.grad(log_density.sum(), z)
        z = (z.detach() + self.step_size * gradient + (2 * self.step_size) ** 0.5 * noise).transpose(0, 1)
        draws = torch.cat([state.draws[:, :, 1:], z.unsqueeze(2)], dim=2)
        new = LangevinState(state.sequence_ids, state.step + 1, state.num_skipped, z, draws)
        return new, StepInfo(-log_density.detach().mean(0))

    def guide(self, state: LangevinState, rng: Noise) -> Guide:
        """All mass where one chain stands, picked uniformly for each sequence."""
        sequence = torch.arange(len(state))
        chain = (rng.uniform("guide", state.sequence_ids, state.step) * self.num_chains).long()
        return guide_of(point(state.z[sequence, chain]))

    def posterior(self, state: LangevinState, num_samples: int, rng: Noise) -> Posterior:
        """The last draws of every chain, `num_samples` in all.

        Raises:
            ValueError: if that is no multiple of the chains, or more draws than were taken and kept.
        """
        num_draws, remainder = divmod(num_samples, self.num_chains)
        # Before the first step a chain stands where it started: that counts as its one draw.
        num_kept = min(self.num_kept, max(1, int(state.step.min())))
        if remainder or not 1 <= num_draws <= num_kept:
            raise ValueError(
                f"{num_samples} draws cannot come from {self.num_chains} chains with {num_kept} draws each: "
                "raise num_kept and num_steps, or ask for a multiple of num_chains"
            )
        return Posterior(state.draws[:, :, -num_draws:].movedim(0, 2), state.sequence_ids)

    def mean(self, state: LangevinState) -> Tensor:
        """Mean over the chains, where they stand, [B, *event_shape]."""
        return state.z.mean(1)
