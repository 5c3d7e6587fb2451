"""Structured variational inference: a Gaussian q(z) per sequence whose covariance is diagonal plus low rank.

    q(z) = N(μ, σ (I + V (diag(a²) - I) Vᵀ) σ)

Along r orthonormal directions V of z / σ, the Gaussian of `vi` is stretched by a, or compressed if a < 1. This
expresses how the dimensions of z depend on each other given the text, across slots and layers. The covariance of the
best Gaussian is the inverse of the curvature averaged over it, E_q[-∇² log p(x, z)] (Opper & Archambeau 2009); in
units of σ that is a matrix M, whose diagonal is 1 if `vi` has converged. Of T steps,

- two thirds are those of `vi`, which fit μ and σ;
- each of the others takes two gradients for one product M v. With the part of the noise along v replaced by ±√3, the
  nodes of Gauss-Hermite quadrature, their difference is the curvature along v averaged over q;
- the next v is the part of M v that is orthogonal to all v before (Lanczos 1950): the space that they span contains
  nearly the ends of M's spectrum, the directions in which the diagonal Gaussian is most wrong;
- within that space the eigenvalues λ of M give a = λ^-½ (Rayleigh-Ritz). No direction gets wider than the prior;
- a product is taken at one draw, so that M has noise where the posterior is not Gaussian. M is symmetric and its noise
  is not: how much vᵀMw and wᵀMv differ says how much noise there is, and M is shrunk towards the identity by its share
  (Ledoit & Wolf 2004). Without this, the correlations may make the bound worse than that of the diagonal Gaussian.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints, register_kl

from ltm_pyro.inference.base import (
    Batch,
    Guide,
    IndexedBatch,
    Model,
    StepInfo,
    flat,
    is_independent_normal,
    latent_prior,
    log_joint,
    moments,
    require_settings,
)
from ltm_pyro.inference.guides import Sizes, fresh_noise, guide_of, normal
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.schemes.units import Units
from ltm_pyro.inference.schemes.vi import VI, VIState
from ltm_pyro.inference.surroundings import entry

NODE = math.sqrt(3)
"""The outer node of three-point Gauss-Hermite quadrature, whose middle node cancels from a difference."""


class LowRankNormal(TorchDistribution):
    """N(mean, σ (I + V (diag(a²) - I) Vᵀ) σ) over an event of any shape, whose draws are made from given noise.

    Args:
        mean: [*batch_shape, *event_shape].
        scale: σ, [*batch_shape, *event_shape].
        directions: V, [*batch_shape, d, r], where d is the number of elements of the event; its columns are
            orthonormal, or their stretch is 1.
        stretch: a, [*batch_shape, r].
        event_dim: the number of dimensions of the event.
        draw: makes standard normal numbers for outer dimensions of the given shape: [*outer, B, *event_shape].
    """

    arg_constraints = {}  # noqa: RUF012 - the name and form that torch's distributions have
    has_rsample = True
    support = constraints.real

    def __init__(
        self,
        mean: Tensor,
        scale: Tensor,
        directions: Tensor,
        stretch: Tensor,
        event_dim: int,
        draw: Callable[[torch.Size], Tensor],
    ) -> None:
        batch_shape, event_shape = mean.shape[: mean.dim() - event_dim], mean.shape[mean.dim() - event_dim :]
        self.loc, self.scale, self.directions, self.stretch, self.draw = mean, scale, directions, stretch, draw
        super().__init__(batch_shape, event_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """[*batch_shape, *event_shape]."""
        return self.loc

    @property
    def units(self) -> Units:
        """The square root of the covariance."""
        return Units(self.scale, self.directions, self.stretch)

    @property
    def variance(self) -> Tensor:
        """[*batch_shape, *event_shape]: the diagonal of the covariance."""
        change = (self.directions.square() * (self.stretch.square() - 1).unsqueeze(-2)).sum(-1)
        return self.scale.square() * (1 + change.view_as(self.scale))

    def expand(self, batch_shape: Sizes, _instance: Distribution | None = None) -> LowRankNormal:
        mean, scale = (value.expand(*batch_shape, *self.event_shape) for value in (self.mean, self.scale))
        directions = self.directions.expand(*batch_shape, *self.directions.shape[-2:])
        stretch = self.stretch.expand(*batch_shape, self.stretch.shape[-1])
        return LowRankNormal(mean, scale, directions, stretch, len(self.event_shape), self.draw)

    def log_prob(self, value: Tensor) -> Tensor:
        standard = self._flat((value - self.mean) / self.scale)
        along = self._along(standard)
        square = standard.square().sum(-1) + (along.square() * (self.stretch.pow(-2) - 1)).sum(-1)
        return -0.5 * (square + standard.shape[-1] * math.log(2 * math.pi)) - self._log_volume

    def rsample(self, sample_shape: Sizes = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        noise = self.draw(shape[:-1])
        return self.mean + self.units.times(noise)

    def sample(self, sample_shape: Sizes = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    @property
    def _log_volume(self) -> Tensor:
        """log of the square root of the covariance's determinant, [*batch_shape]."""
        return self._flat(self.scale.log()).sum(-1) + self.stretch.log().sum(-1)

    def _flat(self, value: Tensor) -> Tensor:
        """[..., *event_shape] to [..., d]."""
        return value.flatten(value.dim() - len(self.event_shape)) if self.event_shape else value.unsqueeze(-1)

    def _along(self, standard: Tensor) -> Tensor:
        """Vᵀ of numbers [..., d]: [..., r]."""
        return (self.directions.transpose(-1, -2) @ standard.unsqueeze(-1)).squeeze(-1)


def units_of(q: TorchDistribution) -> Units:
    """The units in which q is round, if it is Gaussian; otherwise its standard deviations.

    Raises:
        ValueError: if q has no standard deviation.
    """
    if isinstance(q, LowRankNormal):
        return q.units
    return Units.diagonal(moments(q)[1])


@register_kl(LowRankNormal, Independent)  # type: ignore[no-untyped-call,untyped-decorator]  # torch's
def _kl_to_diagonal(q: LowRankNormal, p: Independent[Any]) -> Tensor:
    """KL(q ‖ p) to a Gaussian whose dimensions are independent, [*batch_shape].

    Raises:
        NotImplementedError: if p is not such a Gaussian. This is how `kl_divergence` says that there is no closed form.
    """
    if not is_independent_normal(p):
        raise NotImplementedError("the KL has a closed form only for a Gaussian prior")
    distance = (q.variance + (q.mean - p.mean).square()) / p.variance
    prior_volume = q._flat(0.5 * p.variance.expand_as(q.mean).log()).sum(-1)
    return 0.5 * q._flat(distance - 1).sum(-1) + prior_volume - q._log_volume


@dataclass(frozen=True)
class LowRankState(VIState):
    directions: Tensor
    """[B, d, r]: v of the products taken so far and of the next one, orthonormal; 0 in columns not yet reached."""
    products: Tensor
    """[B, d, r]: M v, each the mean of the products taken with it; 0 in columns not yet reached."""
    prior_scale: Tensor
    """[B, *event_shape]: the scale of p(z), which no direction exceeds."""


@dataclass(frozen=True)
class LowRank:
    """A Gaussian with correlated dimensions (diagonal plus low rank), fitted by steps of vi and products of the
    curvature."""

    num_steps: int = 16
    """The number of steps of inference for each sequence (T).
    The last third finds correlations, at two gradients a step."""
    rank: int = 32
    """The largest number r of directions in which dimensions of z vary together.
    Each takes one of the last third of the steps; further steps refine them in turn."""
    learning_rate: float = 0.5
    """The step size of the first step, as in vi."""

    has_density: ClassVar[bool] = True
    has_chains: ClassVar[bool] = False
    can_absorb: ClassVar[bool] = False
    needs_encoder: ClassVar[bool] = False
    loss_is_bound: ClassVar[bool] = True
    num_draws: ClassVar[None] = None

    def __post_init__(self) -> None:
        require_settings(self, "rank")
        self.diagonal  # noqa: B018 - checks the learning rate

    @property
    def num_products(self) -> int:
        """The number of steps that take a product of the curvature with a direction."""
        return self.num_steps // 3

    @property
    def diagonal(self) -> VI:
        """The scheme of the steps before those."""
        return VI(self.num_steps - self.num_products, self.learning_rate)

    @property
    def num_gradients(self) -> int:
        """One gradient a step of `vi`, and two a product."""
        return self.num_steps + self.num_products

    def init(self, model: Model, batch: Batch, rng: Noise, warm: Tensor | None = None) -> LowRankState:
        start = self.diagonal.init(model, batch, rng, warm)
        num_dims = start.mean[0].numel()
        nothing = start.mean.new_zeros(len(batch), num_dims, min(self.rank, self.num_products, num_dims))
        prior_scale = moments(latent_prior(model, batch))[1].expand_as(start.mean).clone()
        return LowRankState(**vars(start), directions=nothing, products=nothing.clone(), prior_scale=prior_scale)

    def step(self, model: Model, state: LowRankState, batch: Batch, rng: Noise) -> tuple[LowRankState, StepInfo]:
        """Take one step. Sequences that are due for another kind of step than others are taken apart.

        Args:
            batch: one from which sequences can be selected, if they stand at different steps.
        """
        if not state.directions.shape[-1]:
            return self._diagonal_step(model, state, batch, rng)
        # The number of the product that a sequence is due for; -1 for a step of `vi`.
        numbers = (state.step - self.diagonal.num_steps).clamp(min=-1)
        different = sorted(set(numbers.tolist()))
        if len(different) == 1:
            return self._step(different[0], model, state, batch, rng)
        rows = [torch.nonzero(numbers == number)[:, 0] for number in different]
        indexed = cast(IndexedBatch, batch)
        taken = [
            self._step(number, model, state[index], indexed[index], rng)
            for number, index in zip(different, rows, strict=True)
        ]
        in_order = torch.cat(rows).argsort()
        objective = torch.cat([info.objective for _, info in taken])[in_order]
        return LowRankState.join([new for new, _ in taken])[in_order], StepInfo(objective)

    def _step(
        self, number: int, model: Model, state: LowRankState, batch: Batch, rng: Noise
    ) -> tuple[LowRankState, StepInfo]:
        """Take the product with this number, or for -1 a step of `vi`."""
        if number < 0:
            return self._diagonal_step(model, state, batch, rng)
        return self._product(number, model, state, batch, rng)

    def _diagonal_step(
        self, model: Model, state: LowRankState, batch: Batch, rng: Noise
    ) -> tuple[LowRankState, StepInfo]:
        new, info = self.diagonal.step(model, state, batch, rng)
        return dataclasses.replace(state, **vars(new)), info

    def _product(
        self, number: int, model: Model, state: LowRankState, batch: Batch, rng: Noise
    ) -> tuple[LowRankState, StepInfo]:
        """Take the product M v for one direction, and find the next direction from it."""
        scale, rank = state.log_scale.exp(), state.directions.shape[-1]
        noise = rng.normal("lowrank", state.sequence_ids, state.step, state.mean.shape[1:], like=state.mean)
        directions, products, index = state.directions.clone(), state.products.clone(), number % rank
        if number == 0:
            start = rng.normal("lowrank-start", state.sequence_ids, state.step, state.mean.shape[1:], like=state.mean)
            directions[..., 0] = _unit(flat(start))
        v = directions[..., index]
        across = flat(noise) - v * (v * flat(noise)).sum(1, keepdim=True)
        nodes = torch.stack([across + NODE * v, across - NODE * v]).view(2, *state.mean.shape)
        with torch.enable_grad():
            z = (state.mean + scale * nodes).detach().requires_grad_()
            joint = log_joint(model, batch, z, num_sample_dims=1)
            log_density = joint.log_likelihood + joint.log_prior
            (gradient,) = torch.autograd.grad(-log_density.sum(), z)
        one, other = flat(scale * gradient, 2)
        product = (one - other) / (2 * NODE)
        products[..., index] += (product - products[..., index]) / (number // rank + 1)
        if number + 1 < rank:
            new = _orthogonal(product, directions)
            # Where no product leads out of the space that is known already, any other direction may.
            other = _orthogonal(flat(noise), directions)
            directions[..., number + 1] = torch.where(new.any(1, keepdim=True), new, other)
        # The mean over both nodes counts the second moment along v as 3 instead of 1.
        log_q = normal(state.mean, scale).log_prob(z.detach())
        objective = (log_q - log_density).mean(0) - (v * (product - v)).sum(1) * (NODE**2 - 1) / 2
        new_state = dataclasses.replace(state, step=state.step + 1, directions=directions, products=products)
        return new_state, StepInfo(objective.detach())

    def mean(self, state: LowRankState) -> Tensor:
        """μ, [B, *event_shape]."""
        return state.mean

    @entry()
    def distribution(self, state: LowRankState, rng: Noise, purpose: str = "distribution") -> TorchDistribution:
        """q(z), batch_shape [B]; each draw of the object that is returned uses new noise, which no step has seen."""
        scale = state.log_scale.exp()
        is_known = state.products.any(-2)
        curvature = _shrunk(state.directions.mT @ state.products, is_known)
        eigenvalues, rotation = torch.linalg.eigh(curvature)
        directions = (state.directions * is_known.unsqueeze(-2)) @ rotation
        # A library chooses one of the two signs of an eigenvector. States keep it, and are to be the same everywhere.
        largest = directions.abs().argmax(-2, keepdim=True)
        directions = directions * directions.gather(-2, largest).sign()
        of_prior = (directions.square() * flat((scale / state.prior_scale).square()).unsqueeze(-1)).sum(-2)
        stretch = eigenvalues.maximum(of_prior).rsqrt()
        draw = fresh_noise(state, state.mean, rng, purpose)
        return LowRankNormal(state.mean, scale, directions, stretch, state.mean.dim() - 1, draw)

    def guide(self, model: Model, state: LowRankState, batch: Batch, rng: Noise) -> Guide:
        """q(z), drawn afresh."""
        return guide_of(self.distribution(state, rng, purpose="guide"))

    def posterior(self, state: LowRankState, num_samples: int, rng: Noise) -> Posterior:
        """Independent draws from q: one chain."""
        q = self.distribution(state, rng, purpose="posterior")
        return Posterior(q.sample((1, num_samples)), state.sequence_ids)


def _shrunk(curvature: Tensor, is_known: Tensor) -> Tensor:
    """VᵀMV without the share of it that is noise, [B, r, r]; the identity where no product is known.

    Args:
        curvature: Vᵀ(MV), [B, r, r], whose columns come from different draws.
        is_known: [B, r], the directions whose products have been taken.
    """
    identity = torch.eye(curvature.shape[-1], dtype=curvature.dtype, device=curvature.device)
    both = is_known.unsqueeze(-1) & is_known.unsqueeze(-2)
    excess = torch.where(both, 0.5 * (curvature + curvature.mT) - identity, 0)
    # Entries of the symmetric and of the antisymmetric part have the same noise, half of the variance of one of the
    # matrix. Noise that favours no direction has twice that variance on the diagonal, where it cannot be seen.
    off_diagonal = torch.where(both, 0.5 * (curvature - curvature.mT), 0).square().sum((-1, -2))
    num_known = is_known.sum(-1)
    noise = off_diagonal * (1 + 4 / (num_known - 1).clamp(min=1))
    share = noise / excess.square().sum((-1, -2)).clamp(min=torch.finfo(curvature.dtype).tiny)
    return identity + (1 - share).clamp(min=0).view(-1, 1, 1) * excess


def _orthogonal(vectors: Tensor, directions: Tensor) -> Tensor:
    """The parts of vectors [B, d] that are orthogonal to orthonormal directions [B, d, r], scaled to length 1.

    0 where the rest is no more than rounding errors: scaled up, they would not be orthogonal, and what is computed from
    the directions would be no density.
    """
    rest = _unit(vectors)
    for _ in range(2):  # a single pass leaves rounding errors along the others
        rest = rest - (directions @ (directions.mT @ rest.unsqueeze(-1))).squeeze(-1)
    is_rounding = rest.norm(dim=1, keepdim=True) < math.sqrt(torch.finfo(rest.dtype).eps)
    return torch.where(is_rounding, 0, _unit(rest))


def _unit(vectors: Tensor) -> Tensor:
    """Vectors [B, d], scaled to length 1; 0 stays 0."""
    length: Tensor = vectors.norm(dim=1, keepdim=True)
    return vectors / length.clamp(min=torch.finfo(vectors.dtype).tiny)
