"""Estimates of log p(x) from weights w with E[w] = p(x): importance sampling, plain or annealed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


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
        """[B]: (Σ w)² / Σ w², from 1 (one draw bears it all, and `nats` is far above -log p(x)) to K."""
        return self.log_weights.softmax(0).square().sum(0).reciprocal()

    @property
    def monte_carlo_standard_error(self) -> Tensor:
        """[B]: of `nats`, by the delta method; nan for K = 1. Too small where the effective sample size is."""
        num_draws = len(self.log_weights)
        squared_variation = (num_draws / self.effective_sample_size - 1) * num_draws / (num_draws - 1 or math.nan)
        return (squared_variation.clamp(min=0) / num_draws).sqrt()
