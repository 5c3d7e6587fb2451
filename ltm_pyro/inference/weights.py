"""Estimates of log p(x) from weights w with E[w] = p(x): importance sampling, plain or annealed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ltm_pyro.inference.posterior import import_arviz

SMALLEST_TAIL = 5
"""The number of draws that ArviZ needs in the tail to fit its shape."""


@dataclass(frozen=True)
class ImportanceWeights:
    """The weights of K draws or chains for each of B sequences, E[w] = p(x).

    -log of their mean is in expectation an upper bound on -log p(x), for any K, since the logarithm is concave.
    """

    log_weights: Tensor
    """[K, B] float64, nats."""

    @property
    def nats(self) -> Tensor:
        """[B]: -log of the mean weight."""
        return math.log(len(self.log_weights)) - self.log_weights.logsumexp(0)

    @property
    def effective_sample_size(self) -> Tensor:
        """[B]: (Σ w)² / Σ w², from 1 (one draw has all the weight, and `nats` is far above -log p(x)) to K."""
        return self.log_weights.softmax(0).square().sum(0).reciprocal()

    @property
    def monte_carlo_standard_error(self) -> Tensor:
        """[B]: the standard error of `nats` by the delta method; nan for K = 1. It is too small if the effective sample
        size is."""
        num_draws = len(self.log_weights)
        squared_variation = (num_draws / self.effective_sample_size - 1) * num_draws / (num_draws - 1 or math.nan)
        return (squared_variation.clamp(min=0) / num_draws).sqrt()

    @property
    def pareto_k(self) -> Tensor:
        """[B]: k̂, the shape of the tail of the weights, by ArviZ's Pareto-smoothed importance sampling.

        Above `highest_pareto_k` the mean of the weights and its standard error are not to be trusted (Vehtari et al.
        2024, arXiv 1507.02646; Yao et al. 2018, arXiv 1802.02538). It is nan if there are too few draws to fit a tail,
        or if all weights are equal.
        """
        log_weights = self.log_weights.T.contiguous().numpy()
        num_draws = log_weights.shape[1]
        shapes = np.full(len(log_weights), np.nan)
        if min(num_draws / 5, 3 * math.sqrt(num_draws)) >= SMALLEST_TAIL:
            with np.errstate(invalid="ignore"):  # of weights that are all 0 there is no tail to fit
                varied = np.ptp(log_weights, axis=1) > 0
            shapes[varied] = _psis_shape(log_weights[varied])
        return torch.from_numpy(shapes)


def highest_pareto_k(num_draws: int) -> float:
    """The largest k̂ at which the mean of this many weights can be trusted: 0.7, and less for fewer than 2,200.

    It is min(0.7, 1 - 1 / log10 K) (Vehtari et al. 2024, eq. 14).
    """
    return min(0.7, 1 - 1 / math.log10(num_draws))


def _psis_shape(log_weights: np.ndarray) -> np.ndarray:
    """k̂, [B], for log weights of [B, K]."""
    arviz, is_new = import_arviz()
    if is_new:
        from arviz_stats.base import array_stats

        # ArviZ 1.x expects log-likelihoods, which it negates.
        return np.asarray(array_stats.psislw(-log_weights)[1])
    return np.asarray(arviz.psislw(log_weights)[1])
