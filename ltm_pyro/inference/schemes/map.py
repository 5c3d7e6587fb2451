"""Maximum a posteriori: one point z per sequence.

    z* = argmax_z log p(x | z) + log p(z), by Adam on the summed log joint.

A point has no density, so MAP has no ELBO; `bounds.gaussian_around` fits a Gaussian around it that has one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.inference.base import (
    Batch,
    BlockEvidence,
    Guide,
    Model,
    State,
    StepInfo,
    first_fields,
    latent_prior,
    log_joint,
    moments,
    require_settings,
)
from ltm_pyro.inference.guides import guide_of, point
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.schemes.adam import adam_step
from ltm_pyro.inference.schemes.block_step import block_step


@dataclass(frozen=True)
class MAPState(State):
    z: Tensor
    """[B, *event_shape]: the point."""
    first_moment: Tensor
    """[B, *event_shape]: Adam's running mean of the gradient."""
    second_moment: Tensor
    """[B, *event_shape]: Adam's running mean of its square."""
    mean_squares: Tensor
    """[B]: the mean square of the gradients of the blocks that were absorbed, summed over them."""


@dataclass(frozen=True)
class MAP:
    """The most probable point (maximum a posteriori), found by Adam. It starts at the prior's mean."""

    num_steps: int = 16
    """The number of steps of inference for each sequence (T)."""
    learning_rate: float = 0.1
    """The step size of Adam [units of z, whose prior has scale 1]."""
    epsilon: float = 1.0
    """Adam's epsilon [nats per unit of z].
    Gradients below it move z in proportion to them, those above it by the learning rate."""

    block_step: float = 0.3
    """The distance that a block moves z on average, where blocks are absorbed one by one (--infer-from past).
    It is the root mean square over the numbers of z.
    Several fast steps share it, the newest block with the largest part."""

    has_density: ClassVar[bool] = False
    has_chains: ClassVar[bool] = False
    can_absorb: ClassVar[bool] = True
    needs_encoder: ClassVar[bool] = False
    loss_is_bound: ClassVar[bool] = False
    num_draws: ClassVar[int] = 1

    @property
    def num_gradients(self) -> int:
        """One gradient a step."""
        return self.num_steps

    def __post_init__(self) -> None:
        require_settings(self, "learning_rate", "epsilon", "block_step")

    def init(self, model: Model, batch: Batch, rng: Noise, warm: Tensor | None = None) -> MAPState:
        z = (moments(latent_prior(model, batch))[0] if warm is None else warm).detach().clone()
        return MAPState(*first_fields(batch, z), z, torch.zeros_like(z), torch.zeros_like(z), z.new_zeros(len(z)))

    def step(self, model: Model, state: MAPState, batch: Batch, rng: Noise) -> tuple[MAPState, StepInfo]:
        with torch.enable_grad():
            z = state.z.detach().requires_grad_()
            joint = log_joint(model, batch, z)
            objective = -(joint.log_likelihood + joint.log_prior)
            (gradient,) = torch.autograd.grad(objective.sum(), z)
        z, first_moment, second_moment = adam_step(
            z.detach(), gradient, state.first_moment, state.second_moment, state.step, self.learning_rate, self.epsilon
        )
        moved = dataclasses.replace(
            state, step=state.step + 1, z=z, first_moment=first_moment, second_moment=second_moment
        )
        return moved, StepInfo(objective.detach())

    def absorb(self, state: MAPState, evidence: BlockEvidence, prior: TorchDistribution) -> MAPState:
        """One step against the gradient, of length `block_step` on average over the blocks."""
        z, mean_squares = block_step(evidence.z, state.mean_squares, state.step, evidence, self.block_step)
        return dataclasses.replace(state, step=state.step + 1, z=z, mean_squares=mean_squares)

    def guide(self, model: Model, state: MAPState, batch: Batch, rng: Noise) -> Guide:
        """All mass at z."""
        return guide_of(point(state.z))

    def posterior(self, state: MAPState, num_samples: int, rng: Noise) -> Posterior:
        """The point, `num_samples` times: one chain."""
        return Posterior(state.z.expand(1, num_samples, *state.z.shape), state.sequence_ids)

    def mean(self, state: MAPState) -> Tensor:
        """The point, [B, *event_shape]."""
        return state.z
