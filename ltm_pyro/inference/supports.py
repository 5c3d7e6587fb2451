"""Programs whose z is positive, in an interval, or on a simplex, as programs with z on the real numbers.

With the bijection T = `torch.distributions.biject_to(support)`, as in Pyro's own guides, the program
`unconstrained(model)` has at site "z"

    u = T⁻¹(z),     p(u) = p(z) |dz/du|  at z = T(u)

and reads z = T(u) from there on. The volume of the map is part of the prior, so p(x) stays what it was, and so does the
meaning of every bound. All of inference takes place in u: states, draws, densities, scales and step sizes are those of
u. `constrained` takes draws back to z.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import Dirichlet, TransformedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Transform, biject_to, constraints

from ltm_pyro.inference.base import LATENT, Batch, Model, flat, frozen, is_real, latent_prior
from ltm_pyro.inference.posterior import Posterior

GRID_SIZE = 65
"""The points of the grid on which moments are summed."""
WIDTH = 6.0
"""The half width of the next grid, in standard deviations as the last one shows them."""
FIRST_WIDTH = 300.0
"""The half width of the first grid: exp(±300) is a number in double precision."""
NUM_GRIDS = 9
"""Each grid is up to 5 times as wide as the one before, or down to 5 times as narrow: enough for standard deviations
from 1e-4 to 1e4."""


def unconstrained(model: Model) -> Unconstrained:
    """The same program with z on the real numbers: what inference is to be given where z is constrained.

        program = unconstrained(model)
        state = infer(scheme, program, batch, rng)
        z = program.constrained(batch, scheme.posterior(state, 100, rng)).samples

    A program whose z is on the real numbers already stays as it is, bit for bit.
    """
    return Unconstrained(model)


class Unconstrained(nn.Module):
    """See :func:`unconstrained`. It holds the program's weights, and has all attributes of the program, such as its
    methods `precompute` and `encode`; the mean and log scale that `encode` gives are those of u."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Where the program is a module it is among the submodules, which are attributes of this kind as well.
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, batch: Batch) -> Any:
        """Run the program; site "z" is u, and what the program reads is z.

        Raises:
            ValueError: if z is discrete, or no bijection from the real numbers to its support is known.
        """
        with _Unconstraining():
            return self.model(batch)

    def transform(self, batch: Batch) -> Transform:
        """T, which takes u to z. Values may have any dimensions in front of [B, *event_shape].

        Raises:
            ValueError: as in :meth:`forward`.
        """
        with frozen(self.model), torch.no_grad():
            return _bijection_to_support_of(latent_prior(self.model, batch))

    def constrained(self, batch: Batch, posterior: Posterior) -> Posterior:
        """Draws of z for draws of u.

        Args:
            batch: what they were inferred from.

        Raises:
            ValueError: as in :meth:`forward`.
        """
        return dataclasses.replace(posterior, samples=self.transform(batch)(posterior.samples))


class _Unconstraining(Messenger):
    """Within its block, site "z" is u for all handlers outside of it, and z for the program inside."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == LATENT:
            transform = _bijection_to_support_of(msg["fn"])
            if not is_real(msg["fn"].support):
                msg["fn"] = UnconstrainedPrior(msg["fn"], [transform.inv])

    def _pyro_post_sample(self, msg: Any) -> None:
        # The handlers outside have taken note of u by now: they come first on the way back. One that leaves the program
        # at the site, to read the prior alone, has drawn no value.
        if msg["name"] == LATENT and isinstance(msg["fn"], UnconstrainedPrior) and msg["value"] is not None:
            msg["value"] = msg["fn"].constrained(msg["value"])


def _bijection_to_support_of(prior: Distribution) -> Transform:
    """T, from the real numbers to where the prior has a density.

    Raises:
        ValueError: if it is discrete, or no such map is known.
    """
    support: Any = prior.support
    if support.is_discrete:
        raise ValueError(f'site "{LATENT}" is discrete ({support}), and has no gradient to infer it by: sum over it')
    while not isinstance(support, constraints.independent) and hasattr(support, "base_constraint"):
        support = support.base_constraint  # that of the components of a mixture
    try:
        transform: Transform = biject_to(support)
    except NotImplementedError:
        raise ValueError(
            f'site "{LATENT}" has the support {support}, to which no bijection from the real numbers is known'
        ) from None
    return transform


def _inside(transform: Transform, u: Tensor) -> Tensor:
    """Whether the numbers z = T(u) are inside of the support, where exp(u) is neither 0 nor infinite; shaped as u."""
    is_inside: Tensor = transform.inv(transform(u)).isfinite()
    return is_inside


class UnconstrainedPrior(TransformedDistribution):  # type: ignore[misc]  # Pyro's
    """p(u). Its moments say where inference starts and how long its steps are; the density needs none of them.

    Where u is so large that z is rounded to the end of its support, the density is taken to be 0, and the program reads
    the z of u = 0 in its place, for which it need not be prepared less than for any other.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """[*sample_shape, *batch_shape], nats, for u of [*sample_shape, *batch_shape, *event_shape]."""
        safe, is_inside = self._safe(value)
        return torch.where(is_inside, super().log_prob(safe), -math.inf)

    def constrained(self, value: Tensor) -> Tensor:
        """z = T(u)."""
        z: Tensor = self._transform(self._safe(value)[0])
        return z

    @property
    def mean(self) -> Tensor:
        """[*batch_shape, *event_shape]: of u; see :func:`_moments`."""
        return _moments(self.base_dist)[0]

    @property
    def variance(self) -> Tensor:
        """[*batch_shape, *event_shape]: of u in each dimension; see :func:`_moments`."""
        return _moments(self.base_dist)[1]

    @property
    def _transform(self) -> Transform:
        transform: Transform = self.transforms[0].inv
        return transform

    def _safe(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u, with 0 for events that are not inside of the support; and which are, [*sample_shape, *batch_shape]."""
        num_outer = u.dim() - len(self.event_shape)
        is_inside = flat(_inside(self._transform, u.detach()), num_outer).all(-1)
        return torch.where(is_inside.view(*is_inside.shape, *[1] * len(self.event_shape)), u, 0.0), is_inside


def _moments(prior: Distribution) -> tuple[Tensor, Tensor]:
    """Mean and variance of u, for a p(z) whose numbers are independent, or a Dirichlet distribution.

    A gamma variable's logarithm, a beta variable's logit and so on have moments in closed form, but each other ones.
    Sums over a grid serve for all of them, have no noise, and depend on no other sequence of the batch. (They leave out
    what lies beyond six standard deviations: of a long tail some per cent.)

    Raises:
        NotImplementedError: if the prior is of neither kind. So a distribution of torch says that it cannot state its
            moments, and :func:`~ltm_pyro.inference.base.moments` makes a sentence of it.
    """
    while isinstance(prior, Independent):
        prior = prior.base_dist
    if isinstance(prior, Dirichlet):
        return _moments_of_sticks(prior.concentration)
    if prior.event_shape:
        raise NotImplementedError("moments of u are known only where the numbers of z are independent")
    transform = _bijection_to_support_of(prior)

    def log_density(u: Tensor) -> Tensor:
        is_inside = _inside(transform, u)
        u = torch.where(is_inside, u, 0.0)
        z = transform(u)
        log_volume: Tensor = transform.log_abs_det_jacobian(u, z)  # type: ignore[no-untyped-call]  # torch's
        log_density = prior.log_prob(z) + log_volume
        return torch.where(is_inside, log_density, -math.inf)

    like = prior.log_prob(transform(torch.zeros(())))  # of the right shape, dtype and device
    mean, variance = _moments_on_grids(log_density, like.double())
    return mean.to(like), variance.to(like)


def _moments_on_grids(log_density: Callable[[Tensor], Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a density of single numbers, [*shape] of `like`, which need not be normalised.

    Each grid lies around the mean that the last one has found, in the width that it has found.
    """
    grid = torch.linspace(-1, 1, GRID_SIZE, dtype=like.dtype, device=like.device).view(-1, *[1] * like.dim())
    mean, width = torch.zeros_like(like), torch.full_like(like, FIRST_WIDTH)
    variance = width.square()
    for _ in range(NUM_GRIDS):
        u = mean + width * grid
        weights = log_density(u).nan_to_num(-math.inf, -math.inf, -math.inf).softmax(0)
        mean = (weights * u).sum(0)
        variance = (weights * (u - mean).square()).sum(0)
        spacing = width * (2 / (GRID_SIZE - 1))
        width = WIDTH * torch.maximum(variance.sqrt(), spacing)
    return mean, variance


def _moments_of_sticks(concentration: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the logits of a Dirichlet variable's sticks, for a concentration of [..., K]: [..., K - 1].

    Of what is left after the numbers before it, number k takes a share that is a beta variable. PyTorch's bijection
    adds log(K - k) to its logit, for which all numbers are equal at u = 0.
    """
    rest = concentration.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    own = concentration[..., :-1]
    offset = torch.arange(own.shape[-1], 0, -1, dtype=own.dtype, device=own.device).log()
    trigamma = torch.polygamma(1, own) + torch.polygamma(1, rest)
    return torch.digamma(own) - torch.digamma(rest) + offset, trigamma
