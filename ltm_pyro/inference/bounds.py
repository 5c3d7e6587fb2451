"""Estimates of log p(x) from a posterior q(z), for any prior.

All are in nats, and one for each sequence of a batch. They refuse position weights other than 0 and 1, which would make
them estimates of something else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.inference.base import (
    Batch,
    Model,
    PosteriorScheme,
    State,
    exact_kl,
    frozen,
    keep_finite,
    kl,
    log_joint,
    require_full_weights,
)
from ltm_pyro.inference.guides import normal
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.schemes.adam_vi import AdamVI, AdamVIState
from ltm_pyro.inference.schemes.vi import VI, VIState
from ltm_pyro.inference.surroundings import entry
from ltm_pyro.inference.weights import ImportanceWeights


@dataclass(frozen=True)
class Elbo:
    """Monte Carlo estimate of the negative ELBO, an upper bound on -log p(x) in expectation."""

    nll: Tensor
    """[B]: -E_q log p(x | z), the distortion."""
    kl: Tensor
    """[B]: KL(q ‖ p), the rate; exact if it has a closed form, and otherwise estimated from the same draws."""
    variance: Tensor
    """[B]: variance of what one draw of z contributes to the bound; nan if there was only one."""
    num_samples: int
    """The number of draws of z that the estimate averages."""

    @property
    def nelbo(self) -> Tensor:
        """[B]: the bound."""
        return self.nll + self.kl

    @property
    def monte_carlo_standard_error(self) -> Tensor:
        """[B]: the standard error of `nelbo`, over the draws of z."""
        return (self.variance / self.num_samples).sqrt()


@entry()
@torch.no_grad()
def elbo(model: Model, batch: Batch, q: TorchDistribution, num_samples: int) -> Elbo:
    """Estimate the negative ELBO of q from draws of q.

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
    squares, kl_mean = torch.zeros_like(mean), torch.zeros_like(mean)
    exact: Tensor | None = None
    with frozen(model, batch) as batch:
        for count in range(1, num_samples + 1):
            z = q.rsample()
            joint = log_joint(model, batch, z)
            estimate = -joint.log_likelihood.double().cpu()
            if count == 1:
                exact = exact_kl(q, joint.prior)
            if exact is None:
                # Each term in float64, as in `iwae`.
                log_ratio = q.log_prob(z).double().cpu() - joint.log_prior.double().cpu()
                estimate = estimate + log_ratio
                kl_mean += (log_ratio - kl_mean) / count
            # Welford's update: a difference of large sums would lose the variance.
            deviation = estimate - mean
            mean += deviation / count
            squares += deviation * (estimate - mean)
    variance = squares / (num_samples - 1) if num_samples > 1 else torch.full_like(squares, torch.nan)
    if exact is None:
        return Elbo(mean - kl_mean, kl_mean, variance, num_samples)
    return Elbo(mean, exact.double().cpu(), variance, num_samples)


@entry()
@torch.no_grad()
def iwae(model: Model, batch: Batch, q: TorchDistribution, num_samples: int) -> ImportanceWeights:
    """The importance-weighted bound with draws from q (Burda, Grosse & Salakhutdinov 2016, eq. 8).

    In expectation it is an upper bound on -log p(x), and tighter with more draws. It is of little use if
    KL(posterior ‖ q) is far above log K, which the effective sample size shows.

    Args:
        q: batch_shape [B], with a density.
        num_samples: K, the number of draws.

    Raises:
        ValueError: if a position of the batch weighs anything but 0 or 1, or there is to be no draw.
    """
    require_full_weights(batch)
    if num_samples < 1:
        raise ValueError(f"an estimate needs at least one draw, not {num_samples}")
    log_weights = []
    with frozen(model, batch) as batch:
        for _ in range(num_samples):
            z = q.rsample()
            joint = log_joint(model, batch, z)
            # Each term in float64: they are thousands of nats, and their sum may be a few.
            log_p = joint.log_likelihood.double().cpu() + joint.log_prior.double().cpu()
            log_weights.append(log_p - q.log_prob(z).double().cpu())
    return ImportanceWeights(torch.stack(log_weights))


@entry()
@torch.no_grad()
def reused_noise(model: Model, batch: Batch, scheme: AdamVI, state: AdamVIState) -> Elbo:
    """The figure of the reference implementation: the "ELBO" at the very noise that q was fitted to. It is NO bound.

    Raises:
        ValueError: if the scheme has drawn fresh noise, so that there is none to reuse.
    """
    require_full_weights(batch)
    if scheme.noise != "reused":
        raise ValueError('only a scheme with noise="reused" has noise to reuse')
    scale = state.log_scale.exp()
    q, z = normal(state.mean, scale), state.mean + scale * state.noise
    with frozen(model, batch) as batch:
        joint = log_joint(model, batch, z)
        rate = kl(q, joint.prior, z).double().cpu()
    return Elbo(-joint.log_likelihood.double().cpu(), rate, torch.full_like(rate, torch.nan), 1)


@entry()
def gaussian_around(
    scheme: PosteriorScheme, state: State, model: Model, batch: Batch, rng: Noise, fit: VI
) -> tuple[VI, VIState]:
    """Fit a Gaussian around the point or the draws of a scheme without a density, so that there is an ELBO.

    Its mean is the mean of the scheme's draws and stays there; its scales are fitted by `fit` with noise of their own.
    """
    centre = scheme.mean(state)
    with frozen(model, batch) as batch:
        fitted = fit.init(model, batch, rng, warm=centre)
        for _ in range(fit.num_steps):
            moved, _ = fit.step(model, fitted, batch, rng)
            fitted = dataclasses.replace(keep_finite(fitted, moved), mean=centre)
    return fit, fitted
