"""No inference: the posterior is taken to be the prior, whatever the text says.

    q(z) = p(z)

Every figure can be computed with it, and shows what inference adds. Draws are keyed by sequence like all noise: those
of a Gaussian prior are made from the noise's own standard normal numbers; those of any other distribution are drawn
sequence by sequence from torch's generator, which each sequence seeds from the noise and which is restored afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ltm_pyro.inference.base import (
    Batch,
    Guide,
    IndexedBatch,
    Model,
    State,
    StepInfo,
    first_fields,
    ids_of,
    is_independent_normal,
    latent_prior,
)
from ltm_pyro.inference.guides import Sizes, fresh_noise, guide_of, normal
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.surroundings import entry


@dataclass(frozen=True)
class GaussianPriorState(State):
    """A prior whose dimensions are independent Gaussians."""

    prior_mean: Tensor
    """[B, *event_shape]: the mean of p(z)."""
    prior_scale: Tensor
    """[B, *event_shape]: the standard deviation of p(z)."""


@dataclass(frozen=True)
class PriorState(State):
    """Any other prior, which is not a tensor, so that this state cannot be stored."""

    priors: tuple[TorchDistribution, ...]
    """[B]: p(z) of each sequence, batch_shape [1]."""

    def __getitem__(self, index: slice | Tensor) -> Self:
        rows = torch.arange(len(self), device=self.step.device)[index]
        priors = tuple(self.priors[row] for row in rows.tolist())
        return type(self)(self.sequence_ids[rows], self.step[rows], self.num_skipped[rows], priors)

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:
        return cls(
            torch.cat([state.sequence_ids for state in states]),
            torch.cat([state.step for state in states]),
            torch.cat([state.num_skipped for state in states]),
            tuple(prior for state in states for prior in state.priors),
        )


AnyPriorState = GaussianPriorState | PriorState


@dataclass(frozen=True)
class PriorScheme:
    """The prior, with no inference at all."""

    has_density: ClassVar[bool] = True
    has_chains: ClassVar[bool] = False
    can_absorb: ClassVar[bool] = False
    needs_encoder: ClassVar[bool] = False
    loss_is_bound: ClassVar[bool] = True
    num_steps: ClassVar[int] = 0
    num_draws: ClassVar[None] = None
    num_gradients: ClassVar[int] = 0

    def init(self, model: Model, batch: Batch, rng: Noise, warm: Tensor | None = None) -> AnyPriorState:
        """The prior of every sequence; `warm` has no effect.

        Args:
            batch: one from which sequences can be selected, unless the prior is an independent Gaussian.
        """
        prior = latent_prior(model, batch)
        if is_independent_normal(prior):
            mean, scale = prior.mean.detach().clone(), prior.stddev.detach().clone()
            return GaussianPriorState(*first_fields(batch, mean), mean, scale)
        indexed = cast(IndexedBatch, batch)
        priors = tuple(latent_prior(model, indexed[row : row + 1]) for row in range(len(batch)))
        return PriorState(*first_fields(batch, ids_of(batch)), priors)

    def step(self, model: Model, state: Any, batch: Batch, rng: Noise) -> tuple[Any, StepInfo]:
        """The protocol demands a step, and the prior is where no step has been taken: `infer` never asks for one.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the prior takes no steps")

    def mean(self, state: AnyPriorState) -> Tensor:
        """The mean of the prior, [B, *event_shape]."""
        if isinstance(state, GaussianPriorState):
            return state.prior_mean
        return torch.cat([prior.mean for prior in state.priors])

    @entry()
    def distribution(self, state: AnyPriorState, rng: Noise, purpose: str = "distribution") -> TorchDistribution:
        """p(z), batch_shape [B]; each draw of the object that is returned uses new noise, which no step has seen."""
        if isinstance(state, GaussianPriorState):
            draw = fresh_noise(state, state.prior_mean, rng, purpose)
            return normal(state.prior_mean, state.prior_scale, draw)
        return DrawnPrior(state.priors, _fresh_seeds(state, rng, purpose))

    def guide(self, model: Model, state: AnyPriorState, batch: Batch, rng: Noise) -> Guide:
        """p(z), drawn afresh."""
        return guide_of(self.distribution(state, rng, purpose="guide"))

    def posterior(self, state: AnyPriorState, num_samples: int, rng: Noise) -> Posterior:
        """Independent draws from p(z): one chain."""
        q = self.distribution(state, rng, purpose="posterior")
        return Posterior(q.sample((1, num_samples)), state.sequence_ids)


PRIOR = PriorScheme()


class DrawnPrior(TorchDistribution):
    """p(z) of B sequences, whose draws are made from a seed for each of them.

    Args:
        priors: p(z) of each sequence, batch_shape [1].
        seeds: gives a seed for each sequence, other ones in every call.
    """

    arg_constraints = {}  # noqa: RUF012 - the name and form that torch's distributions have
    has_rsample = True  # no parameter that is fitted reaches a draw

    def __init__(self, priors: tuple[TorchDistribution, ...], seeds: Callable[[], list[int]]) -> None:
        self.priors, self.seeds = priors, seeds
        super().__init__(torch.Size([len(priors)]), priors[0].event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint | None:
        """That of the priors."""
        return self.priors[0].support

    @property
    def mean(self) -> Tensor:
        """[B, *event_shape]."""
        return torch.cat([prior.mean for prior in self.priors])

    @property
    def variance(self) -> Tensor:
        """[B, *event_shape]: the variance of each dimension."""
        return torch.cat([prior.variance for prior in self.priors])

    def log_prob(self, value: Tensor) -> Tensor:
        """[*sample_shape, B] for a value of [*sample_shape, B, *event_shape]."""
        dim = value.dim() - len(self.event_shape) - 1
        return torch.cat([prior.log_prob(value.narrow(dim, row, 1)) for row, prior in enumerate(self.priors)], dim=-1)

    def rsample(self, sample_shape: Sizes = ()) -> Tensor:
        """[*sample_shape, B, *event_shape], with no gradient."""
        return self.sample(sample_shape)

    @entry()
    def sample(self, sample_shape: Sizes = ()) -> Tensor:
        """[*sample_shape, B, *event_shape]."""
        draws = []
        # All devices by name: torch warns of several that were not asked for.
        with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
            for prior, seed in zip(self.priors, self.seeds(), strict=True):
                torch.manual_seed(seed)
                draws.append(prior.sample(torch.Size(sample_shape)))
        return torch.cat(draws, dim=len(sample_shape))


def _fresh_seeds(state: State, rng: Noise, purpose: str) -> Callable[[], list[int]]:
    """Seeds for the sequences of `state` that are new in every call of the function that is returned."""
    calls = itertools.count()

    def seeds() -> list[int]:
        steps = torch.full_like(state.sequence_ids, next(calls))
        return [int(value * 2**53) for value in rng.uniform(purpose, state.sequence_ids, steps).tolist()]

    return seeds
