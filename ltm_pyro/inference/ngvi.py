"""Natural-gradient variational inference: a diagonal Gaussian q(z) per sequence, as `vi` has it, by Newton-like steps.

With z = μ + σ ε, ε ~ N(0, I), and the path derivative of the negative ELBO (Roeder, Wu & Duvenaud 2017, eq. 8)

    g = -∇_z log p(x, z) - ε / σ,     E[g] = ∂/∂μ,     E[g ε / σ] = 2 ∂/∂σ² = diag E[-∇² log p(x, z)] - 1/σ²

a step of rate ρ moves the precision s = 1/σ² towards the curvature and the mean by the gradient over it

    s ← s + ρ e + ½ ρ² e² / s,  e = g ε / σ        (Lin, Schmidt & Khan 2020, eq. 11: s stays positive)
    μ ← μ - ρ g / s

(Khan & Rue 2023, arXiv 2107.04562, section 5.2). Every dimension so has a step of its own length, and near the optimum
g itself vanishes where the posterior has no correlations, so that one draw a step is enough. Far from it one draw says
little of the curvature: e is held between -s and 3 s, and μ moves by at most σ. The precision does not fall
below the prior's: what the text says of z makes q narrower, never wider.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

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

MOST_EXCESS = 3
"""What a step may add to the precision, in its own size; with the quadratic term it grows to 8.5 times at most."""


@dataclass(frozen=True)
class NGVIState(State):
    mean: Tensor
    """[B, *event_shape]: μ."""
    log_scale: Tensor
    """[B, *event_shape]: log σ."""


@dataclass(frozen=True)
class NGVI:
    """Mean-field Gaussian posterior of z, by natural gradients, from the prior."""

    num_steps: int = 16
    """Steps of inference for each sequence (T)."""
    learning_rate: float = 0.3
    """ρ of the first step, of which 1 would be a whole Newton step; a cosine takes it to 0 after T of them."""

    has_density: ClassVar[bool] = True
    loss_is_bound: ClassVar[bool] = True
    num_draws: ClassVar[None] = None

    def __post_init__(self) -> None:
        require_positive(self, "learning_rate")
        if self.learning_rate > 1:
            raise ValueError(f"learning_rate must be at most 1, not {self.learning_rate}")

    @property
    def num_gradients(self) -> int:
        """One a step."""
        return self.num_steps

    def init(self, model: Model, batch: Batch, rng: Noise, warm: Tensor | None = None) -> NGVIState:
        prior = latent_prior(model, batch)
        mean = (prior.mean if warm is None else warm).detach().clone()
        log_scale = prior.stddev.detach().log().expand_as(mean).clone()
        return NGVIState(*first_fields(batch), mean, log_scale)

    def step(self, model: Model, state: NGVIState, batch: Batch, rng: Noise) -> tuple[NGVIState, StepInfo]:
        noise = rng.normal("ngvi", state.sequence_ids, state.step, state.mean.shape[1:], like=state.mean)
        scale = state.log_scale.exp()
        with torch.enable_grad():
            z = (state.mean + scale * noise).detach().requires_grad_()
            joint = log_joint(model, batch, z)
            log_density = joint.log_likelihood + joint.log_prior
            (gradient,) = torch.autograd.grad(-log_density.sum(), z)
        log_q = normal(state.mean, scale, draw=None).log_prob(z.detach())
        path_gradient = gradient - noise / scale
        rate = self._rates(state.step).to(gradient).view(-1, *[1] * (gradient.dim() - 1))
        precision = scale**-2
        excess = (rate * path_gradient * noise / scale).clamp(-precision, MOST_EXCESS * precision)
        precision = precision + excess + 0.5 * excess.square() / precision
        precision = precision.maximum(joint.prior.variance.reciprocal())
        # Not finite where the gradient is not, so that the guard sees it behind the bounds.
        mean = state.mean - (rate * path_gradient / precision).clamp(-scale, scale) + 0 * path_gradient
        new = NGVIState(state.sequence_ids, state.step + 1, state.num_skipped, mean, -0.5 * precision.log())
        return new, StepInfo((log_q - log_density).detach())

    def _rates(self, step: Tensor) -> Tensor:
        """ρ of a step with this number, [B]."""
        progress = (step / max(1, self.num_steps)).clamp(max=1)
        return self.learning_rate * (1 + (math.pi * progress).cos()) / 2

    def mean(self, state: NGVIState) -> Tensor:
        """μ, [B, *event_shape]."""
        return state.mean

    def distribution(self, state: NGVIState, rng: Noise, purpose: str = "distribution") -> TorchDistribution:
        """q(z), batch_shape [B]; each draw of the object that is returned uses new noise, which no step has seen."""
        return normal(state.mean, state.log_scale.exp(), fresh_noise(state, state.mean, rng, purpose))

    def guide(self, model: Model, state: NGVIState, batch: Batch, rng: Noise) -> Guide:
        """q(z), drawn afresh."""
        return guide_of(self.distribution(state, rng, purpose="guide"))

    def posterior(self, state: NGVIState, num_samples: int, rng: Noise) -> Posterior:
        """Independent draws from q: one chain."""
        q = self.distribution(state, rng, purpose="posterior")
        return Posterior(q.sample((1, num_samples)), state.sequence_ids)
