"""The prior of Kong et al. 2025 (arXiv 2502.01567, section 2): z ~ N(0, I), and the thought vectors are z itself."""

from __future__ import annotations

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.models.priors.base import Prior


class Standard(Prior):
    """The standard normal distribution. It has no parameters."""

    summary = "N(0, I), the paper's"

    def distribution(self, like: Tensor) -> TorchDistribution:
        zero = like.new_zeros(self.latent_shape)
        return dist.Independent(dist.Normal(zero, zero + 1), 3)
