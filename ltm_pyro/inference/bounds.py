"""Figures for log p(x).

For the texts x of a batch, all in nats and per sequence. A figure refuses position weights other than 0 and 1, which
would make it a figure of something else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import kl_divergence

from ltm_pyro.inference.base import (
    Batch,
    Model,
    PosteriorScheme,
    State,
    frozen,
    keep_finite,
    log_joint,
    prepared,
    require_full_weights,
)
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.schemes.adam_vi import AdamVI, AdamVIState
from ltm_pyro.inference.schemes.vi import VI, VIState
from ltm_pyro.inference.weights import ImportanceWeights


@dataclass(frozen=True)
class Elbo:
    """Monte Carlo estimate of the negative ELBO, an upper bound on -log p(x) in expectation."""

    nll: Tensor
    """[B]: -E_q log p(x | z), the distortion."""
    kl: Tensor
    """[B]: KL(q ‖ p), the rate; exact."""
    variance: Tensor
    """[B]: variance of the distortion of one draw of z; nan where there was only one."""
    num_samples: int
    """Draws of z that `nll` averages."""

    @property
    def nelbo(self) -> Tensor:
        """[B]: the bound."""
        return self.nll + self.kl

    @property
    def monte_carlo_standard_error(self) -> Tensor:
        """[B]: of `nelbo`, over the draws of z."""
        return (self.variance / self.num_samples).sqrt()


@torch.no_grad()
def elbo(model: Model, batch: Batch, q: TorchDistribution, num_samples: int) -> Elbo:
    """-ELBO of q, at draws of its own.

    It is a bound if q was made without those draws: pass a scheme's `distribution`, whose noise no step has seen.
    Memory does not grow with `num_samples`.

    Args:
        q: batch_shape [B], with a density.

    Raises:
        ValueError: if a position of the batch weighs anything but 0 or 1, or there is to be no draw.
    """
    require_full_weights(batch)
    if num_samples < 1:
        raise ValueError(f"an estimate needs at least one draw, not {num_samples}")
    mean = torch.zeros(len(batch), dtype=torch.float64)
    squares = torch.zeros_like(mean)
    with frozen(model):
        batch = prepared(model, batch)
        for count in range(1, num_samples + 1):
            joint = log_joint(model, batch, q.rsample())
            # Welford's update: a difference of large sums would lose the variance.
            deviation = -joint.log_likelihood.double().cpu() - mean
            mean += deviation / count
            squares += deviation * (-joint.log_likelihood.double().cpu() - mean)
        kl = kl_divergence(q, joint.prior).double().cpu()
    variance = squares / (num_samples - 1) if num_samples > 1 else torch.full_like(squares, torch.nan)
    return Elbo(mean, kl, variance, num_samples)


@torch.no_grad()
def iwae(model: Model, batch: Batch, q: TorchDistribution, num_samples: int) -> ImportanceWeights:
    """Importance-weighted bound with draws from q (Burda, Grosse & Salakhutdinov 2016, eq. 8).

    In expectation an upper bound on -log p(x), tighter with more draws. Of little use where KL(posterior ‖ q) is far
    above log K, which the effective sample size shows.

    Args:
        q: batch_shape [B], with a density.
        num_samples: K.

    Raises:
        ValueError: if a position of the batch weighs anything but 0 or 1, or there is to be no draw.
    """
    require_full_weights(batch)
    if num_samples < 1:
        raise ValueError(f"an estimate needs at least one draw, not {num_samples}")
    log_weights = []
    with frozen(model):
        batch = prepared(model, batch)
        for _ in range(num_samples):
            z = q.rsample()
            joint = log_joint(model, batch, z)
            # Each term in float64: they are thousands of nats, and their sum may be a few.
            terms = (joint.log_likelihood, joint.log_prior, -q.log_prob(z))
            log_weights.append(sum(term.double().cpu() for term in terms))
    return ImportanceWeights(torch.stack(log_weights))


@torch.no_grad()
def reused_noise(model: Model, batch: Batch, scheme: AdamVI, state: AdamVIState) -> Elbo:
    """The figure of the reference implementation: the "ELBO" at the very noise that q was fitted to. NOT a bound.

    Raises:
        ValueError: if the scheme has drawn fresh noise, so that there is none to reuse.
    """
    require_full_weights(batch)
    if scheme.noise != "reused":
        raise ValueError('only a scheme with noise="reused" has noise to reuse')
    with frozen(model):
        joint = log_joint(model, batch, state.mean + state.log_scale.exp() * state.noise)
    kl = kl_divergence(scheme.distribution(state, rng=None), joint.prior).double().cpu()
    return Elbo(-joint.log_likelihood.double().cpu(), kl, torch.full_like(kl, torch.nan), 1)


def gaussian_around(
    scheme: PosteriorScheme, state: State, model: Model, batch: Batch, rng: Noise, fit: VI
) -> tuple[VI, VIState]:
    """A Gaussian around the points or draws of a scheme that has no density, so that it has an ELBO.

    The centre is the mean of the scheme's draws and is held; the scales are fitted by `fit` with noise of their own.
    """
    centre = scheme.mean(state)
    with frozen(model):
        batch = prepared(model, batch)
        fitted = fit.init(model, batch, rng, warm=centre)
        for _ in range(fit.num_steps):
            moved, _ = fit.step(model, fitted, batch, rng)
            fitted = dataclasses.replace(keep_finite(fitted, moved), mean=centre)
    return fit, fitted
