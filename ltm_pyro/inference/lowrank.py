"""Structured variational inference: a Gaussian q(z) per sequence whose covariance is diagonal plus low rank.

    q(z) = N(μ, diag(σ²) + U Uᵀ),     z = μ + σ ε + U η,   ε ~ N(0, I), η ~ N(0, I_r)

(Ong, Nott & Smith 2018, arXiv 1701.03208, section 3), by Adam on the reparameterised gradient, the KL in closed form. U
couples all of z, across slots and layers: what the text says of one thought given another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, LowRankMultivariateNormal, constraints, kl_divergence, register_kl

from ltm_pyro.inference.adam import adam_step
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
from ltm_pyro.inference.guides import fresh_noise, guide_of
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.posterior import Posterior

INITIAL_FACTOR = 0.01
"""Scale of the entries of U at the start, in prior scales. At U = 0 its gradient is zero on average."""


class LowRankNormal(TorchDistribution):
    """N(mean, diag(scale²) + U Uᵀ) over an event of any shape, whose draws are made from given noise.

    Args:
        mean: [*batch_shape, *event_shape].
        scale: [*batch_shape, *event_shape].
        factor: U, [*batch_shape, d, r], where d is the number of elements of the event.
        event_dim: dimensions of the event.
        draw: standard normal numbers for outer dimensions of the given shape: [*outer, B, d + r].
    """

    arg_constraints = {}  # noqa: RUF012 - the name and form that torch's distributions have
    has_rsample = True
    support = constraints.real

    def __init__(
        self, mean: Tensor, scale: Tensor, factor: Tensor, event_dim: int, draw: Callable[[torch.Size], Tensor]
    ) -> None:
        batch_shape, event_shape = mean.shape[: mean.dim() - event_dim], mean.shape[mean.dim() - event_dim :]
        self.loc, self.scale, self.factor, self.draw = mean, scale, factor, draw
        super().__init__(batch_shape, event_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """[*batch_shape, *event_shape]."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """[*batch_shape, *event_shape]: the diagonal of the covariance."""
        return self.scale.square() + self.factor.square().sum(-1).view_as(self.scale)

    @property
    def flat(self) -> LowRankMultivariateNormal:
        """The same over the elements of the event in one dimension, [*batch_shape, d]."""
        mean, variance = (value.flatten(len(self.batch_shape)) for value in (self.mean, self.scale.square()))
        return LowRankMultivariateNormal(mean, self.factor, variance, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: LowRankNormal | None = None) -> LowRankNormal:
        event_shape = self.event_shape
        mean, scale = (value.expand(*batch_shape, *event_shape) for value in (self.mean, self.scale))
        factor = self.factor.expand(*batch_shape, *self.factor.shape[-2:])
        return LowRankNormal(mean, scale, factor, len(event_shape), self.draw)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.flat.log_prob(value.flatten(value.dim() - len(self.event_shape)))

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        num_elements = self.event_shape.numel()
        noise = self.draw(shape[:-1])
        common = (self.factor @ noise[..., num_elements:, None]).squeeze(-1)
        own = noise[..., :num_elements].reshape(shape + self.event_shape)
        return self.mean + self.scale * own + common.reshape(shape + self.event_shape)

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)


@register_kl(LowRankNormal, Independent)
def _kl_to_diagonal(q: LowRankNormal, p: Independent) -> Tensor:
    """To a Gaussian whose dimensions are independent."""
    mean, variance = (
        value.expand(*q.batch_shape, *q.event_shape).flatten(len(q.batch_shape)) for value in (p.mean, p.variance)
    )
    no_factor = torch.zeros_like(mean)[..., None]
    return kl_divergence(q.flat, LowRankMultivariateNormal(mean, no_factor, variance, validate_args=False))


@dataclass(frozen=True)
class LowRankState(State):
    mean: Tensor
    """[B, *event_shape]: μ."""
    mean_first_moment: Tensor
    mean_second_moment: Tensor
    log_scale: Tensor
    """[B, *event_shape]: log σ."""
    log_scale_first_moment: Tensor
    log_scale_second_moment: Tensor
    factor: Tensor
    """[B, d, r]: U."""
    factor_first_moment: Tensor
    factor_second_moment: Tensor


@dataclass(frozen=True)
class LowRank:
    """Gaussian posterior of z with a covariance of diagonal plus low rank, by Adam, from the prior."""

    num_steps: int = 16
    """Steps of inference for each sequence (T)."""
    rank: int = 4
    """r, the directions in which dimensions of z vary together."""
    learning_rate: float = 0.1
    """Step size of Adam on the mean, the directions [units of z, whose prior has scale 1] and the log scale."""
    epsilon: float = 0.2
    """Adam's epsilon [nats per unit of z], as of vi."""

    has_density: ClassVar[bool] = True
    loss_is_bound: ClassVar[bool] = True
    num_draws: ClassVar[None] = None

    def __post_init__(self) -> None:
        require_positive(self, "rank", "learning_rate", "epsilon")

    @property
    def num_gradients(self) -> int:
        """One a step."""
        return self.num_steps

    def init(self, model: Model, batch: Batch, rng: Noise, warm: Tensor | None = None) -> LowRankState:
        prior = latent_prior(model, batch)
        mean = (prior.mean if warm is None else warm).detach().clone()
        log_scale = prior.stddev.detach().log().expand_as(mean).clone()
        shape = torch.Size([prior.event_shape.numel(), self.rank])
        noise = rng.normal("lowrank-init", batch.sequence_ids, torch.zeros_like(batch.sequence_ids), shape, like=mean)
        factor = INITIAL_FACTOR * log_scale.exp().flatten(1)[..., None] * noise
        fields = []
        for value in (mean, log_scale, factor):
            fields += [value, torch.zeros_like(value), torch.zeros_like(value)]
        return LowRankState(*first_fields(batch), *fields)

    def step(self, model: Model, state: LowRankState, batch: Batch, rng: Noise) -> tuple[LowRankState, StepInfo]:
        noise = rng.normal("lowrank", state.sequence_ids, state.step, _noise_shape(state), like=state.mean)
        with torch.enable_grad():
            parameters = [value.detach().requires_grad_() for value in (state.mean, state.log_scale, state.factor)]
            q = _normal(*parameters, draw=lambda outer: noise)
            joint = log_joint(model, batch, q.rsample())
            objective = kl_divergence(q, joint.prior) - joint.log_likelihood
            gradients = torch.autograd.grad(objective.sum(), parameters)
        names = ("mean", "log_scale", "factor")
        fields: list[Tensor] = []
        for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
            fields += adam_step(
                parameter.detach(),
                gradient,
                getattr(state, f"{name}_first_moment"),
                getattr(state, f"{name}_second_moment"),
                state.step,
                self.learning_rate,
                self.epsilon,
            )
        new = LowRankState(state.sequence_ids, state.step + 1, state.num_skipped, *fields)
        return new, StepInfo(objective.detach())

    def mean(self, state: LowRankState) -> Tensor:
        """μ, [B, *event_shape]."""
        return state.mean

    def distribution(self, state: LowRankState, rng: Noise, purpose: str = "distribution") -> TorchDistribution:
        """q(z), batch_shape [B]; each draw of the object that is returned uses new noise, which no step has seen."""
        like = state.mean.new_empty(len(state), *_noise_shape(state))
        return _normal(state.mean, state.log_scale, state.factor, draw=fresh_noise(state, like, rng, purpose))

    def guide(self, model: Model, state: LowRankState, batch: Batch, rng: Noise) -> Guide:
        """q(z), drawn afresh."""
        return guide_of(self.distribution(state, rng, purpose="guide"))

    def posterior(self, state: LowRankState, num_samples: int, rng: Noise) -> Posterior:
        """Independent draws from q: one chain."""
        q = self.distribution(state, rng, purpose="posterior")
        return Posterior(q.sample((1, num_samples)), state.sequence_ids)


def _normal(mean: Tensor, log_scale: Tensor, factor: Tensor, draw: Callable[[torch.Size], Tensor]) -> LowRankNormal:
    return LowRankNormal(mean, log_scale.exp(), factor, mean.dim() - 1, draw)


def _noise_shape(state: LowRankState) -> torch.Size:
    """[d + r]: of the noise of one draw."""
    return torch.Size([sum(state.factor.shape[1:])])
