"""Mean-field variational inference by natural gradients: a diagonal Gaussian q(z) per sequence.

With z = μ + σ ε, ε ~ N(0, I), and the path derivative of the negative ELBO (Roeder, Wu & Duvenaud 2017, eq. 8)

    g = -∇_z log p(x, z) - ε / σ,     E[g] = ∂/∂μ,     E[g ε / σ] = 2 ∂/∂σ² = diag E[-∇² log p(x, z)] - 1/σ²

a step of rate ρ moves the precision s = 1/σ² towards the curvature and the mean by the gradient over it

    s ← s exp(ρ e / s),  e ≈ g ε / σ        (to second order Lin, Schmidt & Khan 2020, eq. 11: s stays positive)
    μ ← μ - ρ g / s

(Khan & Rue 2023, arXiv 2107.04562, section 5.2). So steps are as long as the curvature allows, and near the optimum g
itself vanishes where the posterior has no correlations. One draw is enough for a step, since

- every second step takes the draw of the one before with its sign reversed. What g is at μ cancels from their sum of
  g ε, and the noise of ε from their sum of g (antithetic draws, one gradient a step);
- the curvature of one of d dimensions is hidden by the noise of all the others, their mean is not: e is drawn towards
  its mean over the dimensions by λ = d / (d + 50 t) after t steps;
- far from the optimum one draw says little: log s moves by at most 1, up as down, so that noise alone takes it nowhere,
  and μ by at most σ. The precision does not fall below the prior's: what the text says of z makes q narrower, never
  wider.

What each of these gives, and what Adam needs for the same bound: benchmarks/results/steps.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
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
from ltm_pyro.inference.guides import fresh_noise, guide_of, normal
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.posterior import Posterior

DIMENSIONS_A_STEP = 50
"""Dimensions for which a step more gives as much reason to believe in their own curvature."""


@dataclass(frozen=True)
class VIState(State):
    mean: Tensor
    """[B, *event_shape]: μ."""
    log_scale: Tensor
    """[B, *event_shape]: log σ."""
    noise: Tensor
    """[B, *event_shape]: ε of the last step, whose mirror image every second step takes."""


@dataclass(frozen=True)
class VI:
    """Mean-field Gaussian posterior of z, by natural gradients, from the prior."""

    num_steps: int = 16
    """Steps of inference for each sequence (T)."""
    learning_rate: float = 0.5
    """ρ of the first step, of which 1 would be a whole Newton step; a cosine takes it to 0 after T of them."""
    stride: int = 1
    """A step is taken on every stride-th position of a text, from a random first one, each counted stride times:
    on average the log-likelihood of all positions, at a part of its cost (on a CPU) and with more noise. 1: all."""

    has_density: ClassVar[bool] = True
    has_chains: ClassVar[bool] = False
    needs_encoder: ClassVar[bool] = False
    loss_is_bound: ClassVar[bool] = True
    num_draws: ClassVar[None] = None

    def __post_init__(self) -> None:
        require_positive(self, "learning_rate", "stride")
        if self.learning_rate > 1:
            raise ValueError(f"learning_rate must be at most 1, not {self.learning_rate}")

    @property
    def num_gradients(self) -> int:
        """One a step."""
        return self.num_steps

    def init(self, model: Model, batch: Batch, rng: Noise, warm: Tensor | None = None) -> VIState:
        prior = latent_prior(model, batch)
        mean = (prior.mean if warm is None else warm).detach().clone()
        log_scale = prior.stddev.detach().log().expand_as(mean).clone()
        return VIState(*first_fields(batch), mean, log_scale, torch.zeros_like(mean))

    def step(self, model: Model, state: VIState, batch: Batch, rng: Noise) -> tuple[VIState, StepInfo]:
        noise = rng.normal("vi", state.sequence_ids, state.step, state.mean.shape[1:], like=state.mean)
        noise = torch.where(_by_sequence(state.step.to(noise.device) % 2 == 1, noise), -state.noise, noise)
        scale = state.log_scale.exp()
        with torch.enable_grad():
            z = (state.mean + scale * noise).detach().requires_grad_()
            joint = log_joint(model, self._subsampled(state, batch, rng), z)
            log_density = joint.log_likelihood + joint.log_prior
            (gradient,) = torch.autograd.grad(-log_density.sum(), z)
        log_q = normal(state.mean, scale, draw=None).log_prob(z.detach())
        path_gradient = gradient - noise / scale
        rate = _by_sequence(self._rates(state.step).to(gradient), gradient)
        excess = self._shrunk(path_gradient * noise / scale, state.step)
        log_scale = state.log_scale - 0.5 * (rate * excess * scale.square()).clamp(-1, 1)
        log_scale = log_scale.minimum(joint.prior.stddev.log())
        # Not finite where the gradient is not, so that the guard sees it behind the bounds.
        mean = state.mean - (rate * path_gradient * (2 * log_scale).exp()).clamp(-scale, scale) + 0 * path_gradient
        new = VIState(state.sequence_ids, state.step + 1, state.num_skipped, mean, log_scale, noise)
        return new, StepInfo((log_q - log_density).detach())

    def _subsampled(self, state: VIState, batch: Batch, rng: Noise) -> Any:
        """The batch weighted on every stride-th position."""
        if self.stride == 1:
            return batch
        if not hasattr(batch, "every"):
            raise ValueError("a stride needs a batch with a method `every`, as TokenBatch has it")
        first = rng.uniform("positions", state.sequence_ids, state.step)
        return batch.every(self.stride, (first * self.stride).long())

    def _shrunk(self, excess: Tensor, step: Tensor) -> Tensor:
        """Every dimension's excess drawn towards the mean over all dimensions, less and less."""
        num_dims = excess[0].numel()
        share = num_dims / (num_dims + DIMENSIONS_A_STEP * step.to(excess))
        mean = _by_sequence(excess.flatten(1).mean(1), excess)
        return excess + _by_sequence(share, excess) * (mean - excess)

    def _rates(self, step: Tensor) -> Tensor:
        """ρ of a step with this number, [B]."""
        progress = (step / max(1, self.num_steps)).clamp(max=1)
        return self.learning_rate * (1 + (math.pi * progress).cos()) / 2

    def mean(self, state: VIState) -> Tensor:
        """μ, [B, *event_shape]."""
        return state.mean

    def distribution(self, state: VIState, rng: Noise, purpose: str = "distribution") -> TorchDistribution:
        """q(z), batch_shape [B]; each draw of the object that is returned uses new noise, which no step has seen."""
        return normal(state.mean, state.log_scale.exp(), fresh_noise(state, state.mean, rng, purpose))

    def guide(self, model: Model, state: VIState, batch: Batch, rng: Noise) -> Guide:
        """q(z), drawn afresh."""
        return guide_of(self.distribution(state, rng, purpose="guide"))

    def posterior(self, state: VIState, num_samples: int, rng: Noise) -> Posterior:
        """Independent draws from q: one chain."""
        q = self.distribution(state, rng, purpose="posterior")
        return Posterior(q.sample((1, num_samples)), state.sequence_ids)


def _by_sequence(values: Tensor, like: Tensor) -> Tensor:
    """[B] to the number of dimensions of [B, *event_shape]."""
    return values.view(-1, *[1] * (like.dim() - 1))
