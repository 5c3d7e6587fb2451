"""Posteriors as Pyro guides: one site "z" under the plate "sequences", as in the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.inference.base import LATENT, PLATE, Guide, State
from ltm_pyro.inference.noise import Noise


class DrawnNormal(dist.Normal):
    """A normal distribution whose draws are made from given noise, and not from torch's global generator.

    Made by :func:`normal`, since `torch.distributions.Normal.expand` forbids a constructor of our own.
    """

    draw: Callable[[torch.Size], Tensor]
    """Standard normal numbers for outer dimensions of the given shape: [*outer, B, *event_shape]."""
    num_dims: int
    """Dimensions of [B, *event_shape]."""

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> DrawnNormal:
        new = super().expand(batch_shape, _instance)
        new.draw, new.num_dims = self.draw, self.num_dims
        return new

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.loc + self.scale * self.draw(shape[: len(shape) - self.num_dims])

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)


def normal(mean: Tensor, scale: Tensor, draw: Callable[[torch.Size], Tensor]) -> TorchDistribution:
    """q(z) = N(mean, scale²), batch_shape [B], for mean and scale of [B, *event_shape]."""
    base = DrawnNormal(mean, scale)
    base.draw, base.num_dims = draw, mean.dim()
    return base.to_event(mean.dim() - 1)


def fresh_noise(state: State, event: Tensor, rng: Noise, purpose: str) -> Callable[[torch.Size], Tensor]:
    """Noise for the sequences of `state` that is new in every call of the function that is returned.

    Args:
        event: gives the event shape ([B, *event_shape]), the dtype and the device.
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
    return dist.Delta(z, event_dim=z.dim() - 1)
