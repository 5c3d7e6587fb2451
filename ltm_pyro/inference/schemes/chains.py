"""What all schemes of Markov chains share: where chains start, which draws they keep, and the posterior made of those.

A scheme of chains is a subclass of `Chains` with a method `step`. With `vi_steps` its chains start at draws of a
Gaussian q(z) = N(μ, A Aᵀ) that `vi` has fitted, or `lowrank` with `vi_rank`. Its moves are made in units of A: it then
runs in A⁻¹ z, where a posterior whose dimensions differ in scale, or depend on each other, is nearly round.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.inference.base import (
    Batch,
    Guide,
    Model,
    State,
    first_fields,
    flat,
    infer,
    log_joint,
    require_real,
    require_settings,
)
from ltm_pyro.inference.guides import guide_of, point
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.schemes.leapfrog import like_events
from ltm_pyro.inference.schemes.lowrank import LowRank, units_of
from ltm_pyro.inference.schemes.prior import PRIOR
from ltm_pyro.inference.schemes.units import Units
from ltm_pyro.inference.schemes.vi import VI


@dataclass(frozen=True)
class ChainState(State):
    z: Tensor
    """[B, C, *event_shape]: where the C chains of each sequence stand."""
    scale: Tensor
    """[B, *event_shape]: the scale of moves in each dimension: σ of `vi_steps`, or 1 without them."""
    directions: Tensor
    """[B, d, r]: directions in z / scale, orthonormal, in which moves are stretched; r = 0 without `vi_rank`."""
    stretch: Tensor
    """[B, r]: by how much."""
    draws: Tensor
    """[B, C, K, *event_shape]: the last K draws of each chain, the newest at the end."""

    @property
    def units(self) -> Units:
        """The units A of the moves."""
        return Units(self.scale, self.directions, self.stretch)

    def moved(self, z: Tensor, **changes: Tensor) -> Self:
        """The state one step later, with the chains at z, [C, B, *event_shape]: chains first, as in a program."""
        z = z.transpose(0, 1).contiguous()
        draws = torch.cat([self.draws[:, :, 1:], z.unsqueeze(2)], dim=2)
        return dataclasses.replace(self, step=self.step + 1, z=z, draws=draws, **changes)


@dataclass(frozen=True)
class Chains:
    """Settings and methods of every scheme of chains."""

    num_steps: int = 16
    """The number of steps of inference for each sequence (T)."""
    num_chains: int = 1
    """The number of chains of each sequence, which are run side by side."""
    num_kept: int = 1
    """The number of draws that each chain keeps, which are its last ones. More than one show the posterior."""
    vi_steps: int = 0
    """The number of steps of mean-field VI before the chains, which then start at its draws and move in its scales.
    0: they start at draws of the prior, and move equally far in every dimension."""
    vi_rank: int = 0
    """The number of directions in which the moves are stretched beside that.
    They are found by lowrank, which takes the place of VI in those steps.
    Its last third takes a direction each, at two gradients a step."""

    has_density: ClassVar[bool] = False
    has_chains: ClassVar[bool] = True
    can_absorb: ClassVar[bool] = False
    needs_encoder: ClassVar[bool] = False
    loss_is_bound: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_settings(self, "num_chains", "num_kept")
        if self.vi_rank and self.vi_steps < 3:
            raise ValueError(f"vi_rank = {self.vi_rank} needs vi_steps of 3 or more, but they are {self.vi_steps}")

    @property
    def num_warmup(self) -> int:
        """The number of first steps whose points are not kept, since the chain still adapts its settings in them."""
        return 0

    @property
    def num_draws(self) -> int:
        """The number of draws that the chains keep."""
        return self.num_chains * self._num_kept_after(self.num_steps)

    @property
    def num_gradients(self) -> int:
        """The gradients of the log joint for each sequence: one for each step and chain, and those before."""
        return self._num_gradients_before + self.num_chains * self.num_steps

    def init(self, model: Model, batch: Batch, rng: Noise, warm: Tensor | None = None) -> Any:
        """The chains start at draws of the prior, or of q with `vi_steps`; or all of them at `warm`.

        Raises:
            ValueError: if p(z) is not a distribution over all real numbers.
        """
        fit = self._fit
        start: TorchDistribution
        if fit is None:
            start = PRIOR.distribution(PRIOR.init(model, batch, rng), rng, "init")
            require_real(start)
        else:
            start = fit.distribution(infer(fit, model, batch, rng, warm), rng, "init")
        if warm is None:
            z = start.sample((self.num_chains,)).transpose(0, 1).contiguous()
        else:
            z = warm.detach().unsqueeze(1).repeat_interleave(self.num_chains, 1)
        units = Units.diagonal(torch.ones_like(z[:, 0])) if fit is None else units_of(start)
        draws = z.unsqueeze(2).repeat_interleave(self.num_kept, 2)
        return ChainState(*first_fields(batch, z), z=z, **vars(units), draws=draws)

    def guide(self, model: Model, state: ChainState, batch: Batch, rng: Noise) -> Guide:
        """All mass at the position of one chain, picked uniformly for each sequence."""
        uniform = rng.uniform("guide", state.sequence_ids, state.step).to(state.z.device)
        sequence, chain = torch.arange(len(state), device=state.z.device), (uniform * self.num_chains).long()
        return guide_of(point(state.z[sequence, chain]))

    def posterior(self, state: ChainState, num_samples: int, rng: Noise) -> Posterior:
        """The last draws of every chain, `num_samples` in all.

        Raises:
            ValueError: if that is not a multiple of the chains, or more draws than were taken and kept of any sequence.
        """
        num_draws, remainder = divmod(num_samples, self.num_chains)
        num_kept = self._num_kept_after(int(state.step.min()))
        if remainder or not 1 <= num_draws <= num_kept:
            raise ValueError(
                f"{num_samples} draws cannot come from {self.num_chains} chains with {num_kept} draws each: "
                "raise num_kept and num_steps, or ask for a multiple of num_chains"
            )
        return Posterior(state.draws[:, :, -num_draws:].movedim(0, 2), state.sequence_ids)

    def mean(self, state: ChainState) -> Tensor:
        """Mean over the draws that the chains of each sequence have kept, [B, *event_shape]."""
        counts = [self._num_kept_after(step) for step in state.step.tolist()]
        means = torch.empty_like(state.draws[:, 0, 0])
        for count in set(counts):
            rows = torch.tensor([other == count for other in counts])
            means[rows] = state.draws[rows][:, :, -count:].mean((1, 2))
        return means

    @property
    def _fit(self) -> VI | LowRank | None:
        """The scheme whose q the chains start at."""
        if self.vi_rank:
            return LowRank(self.vi_steps, self.vi_rank)
        return VI(self.vi_steps) if self.vi_steps else None

    @property
    def _num_gradients_before(self) -> int:
        return 0 if self._fit is None else self._fit.num_gradients

    def _num_kept_after(self, num_steps: int) -> int:
        # Where a chain stands is always one draw, also before the first step.
        return min(self.num_kept, max(1, num_steps - self.num_warmup))


@dataclass(frozen=True)
class Point:
    """Where C chains of B sequences stand, with the log joint there."""

    z: Tensor
    """[C, B, *event_shape]."""
    log_density: Tensor
    """[C, B], nats: log p(x, z)."""
    gradient: Tensor
    """[C, B, *event_shape]: ∇_z log p(x, z)."""


def evaluate(model: Model, batch: Batch, z: Tensor) -> Point:
    """The log joint and its gradient at z, [C, B, *event_shape].

    If z, the density or the gradient is not finite, density and gradient are taken to be 0, so that no chain moves
    there.
    """
    with torch.enable_grad():
        # A program may refuse parameters that are not numbers, for the sake of one chain.
        at = z.detach().nan_to_num(0.0, 0.0, 0.0).requires_grad_()
        joint = log_joint(model, batch, at, num_sample_dims=1)
        log_density = joint.log_likelihood + joint.log_prior
        (gradient,) = torch.autograd.grad(log_density.sum(), at)
    is_finite = log_density.isfinite()
    for values in (z, gradient):
        is_finite = is_finite & flat(values.isfinite(), 2).all(-1)
    log_density = torch.where(is_finite, log_density.detach(), -torch.inf).to(z)
    return Point(z, log_density, torch.where(like_events(is_finite, z), gradient, 0.0))


@dataclass(frozen=True)
class EvaluatedState(ChainState):
    """The state of chains that keep the log joint where they stand, so that a step need not evaluate it anew."""

    log_density: Tensor
    """[B, C], nats: log p(x, z); minus infinity where it or its gradient is not finite."""
    gradient: Tensor
    """[B, C, *event_shape]: ∇_z log p(x, z)."""

    @property
    def point(self) -> Point:
        """Where the chains stand."""
        return Point(*(value.transpose(0, 1) for value in (self.z, self.log_density, self.gradient)))

    def moved_to(self, point: Point, **changes: Tensor) -> Self:
        """The state one step later, with the chains at the point."""
        return self.moved(point.z, **_sequences_first(point), **changes)


@dataclass(frozen=True)
class EvaluatedChains(Chains):
    """Chains whose state is an `EvaluatedState`."""

    @property
    def num_gradients(self) -> int:
        """The gradients of the log joint for each sequence: those of `Chains`, and one where each chain starts."""
        return super().num_gradients + self.num_chains

    def init(self, model: Model, batch: Batch, rng: Noise, warm: Tensor | None = None) -> Any:
        start = super().init(model, batch, rng, warm)
        return EvaluatedState(**vars(start), **_sequences_first(evaluate(model, batch, start.z.transpose(0, 1))))


def _sequences_first(point: Point) -> dict[str, Tensor]:
    """The log joint and its gradient at a point, [B, C, ...]."""
    return {name: getattr(point, name).transpose(0, 1).contiguous() for name in ("log_density", "gradient")}
