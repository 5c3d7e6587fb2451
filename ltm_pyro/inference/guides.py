"""Posteriors as Pyro guides: one site "z" under the plate "sequences", as in the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.inference.base import LATENT, PLATE, Guide, State
from ltm_pyro.inference.noise import Noise

Sizes = torch.Size | list[int] | tuple[int, ...]
"""How torch's distributions take shapes."""


class DrawnNormal(dist.Normal):
    """A normal distribution whose draws are made from given noise, and not from torch's global generator.

    Made by :func:`normal`, since `torch.distributions.Normal.expand` forbids a constructor of our own.
    """

    draw: Callable[[torch.Size], Tensor]
    """Makes standard normal numbers for outer dimensions of the given shape: [*outer, B, *event_shape]."""
    num_dims: int
    """The number of dimensions of [B, *event_shape]."""

    def expand(self, batch_shape: Sizes, _instance: Any = None) -> DrawnNormal:
        new = cast(DrawnNormal, super().expand(batch_shape, _instance))  # type: ignore[no-untyped-call]  # torch's
        new.draw, new.num_dims = self.draw, self.num_dims
        return new

    def rsample(self, sample_shape: Sizes = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.loc + self.scale * self.draw(shape[: len(shape) - self.num_dims])

    def sample(self, sample_shape: Sizes = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)


def normal(mean: Tensor, scale: Tensor, draw: Callable[[torch.Size], Tensor] | None = None) -> TorchDistribution:
    """q(z) = N(mean, scale²), batch_shape [B], for mean and scale of [B, *event_shape].

    Args:
        draw: standard normal numbers for outer dimensions of the given shape, [*outer, B, *event_shape]. Without it the
            distribution serves for its density alone.
    """
    base = DrawnNormal(mean, scale)
    base.draw, base.num_dims = draw or _no_draws, mean.dim()
    return cast(TorchDistribution, base.to_event(mean.dim() - 1))  # type: ignore[no-untyped-call]  # Pyro's


def _no_draws(outer: torch.Size) -> Tensor:
    raise TypeError("this distribution was made without noise, so it cannot be sampled")


def fresh_noise(state: State, event: Tensor, rng: Noise, purpose: str) -> Callable[[torch.Size], Tensor]:
    """A source of noise for the sequences of `state`, which is new in every call of the function that is returned.

    Args:
        event: has the event shape ([B, *event_shape]), the dtype and the device of the noise.
    """
    calls = itertools.count()

    def draw(outer: torch.Size) -> Tensor:
        steps = torch.full_like(state.sequence_ids, next(calls))
        return rng.normal(purpose, state.sequence_ids, steps, event.shape[1:], tuple(outer), like=event)

    return draw


def guide_of(distribution: TorchDistribution) -> Guide:
    """The guide that draws "z" from a distribution of batch_shape [B], whatever it is called with."""

    def guide(*args: object, **kwargs: object) -> None:
        with pyro.plate(PLATE, distribution.batch_shape[-1], dim=-1):
            pyro.sample(LATENT, distribution)

    return guide


def point(z: Tensor) -> TorchDistribution:
    """All mass at z, [B, *event_shape]."""
    delta: TorchDistribution = dist.Delta(z, event_dim=z.dim() - 1)  # type: ignore[no-untyped-call]  # Pyro's
    return delta
