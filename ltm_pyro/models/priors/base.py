"""What a prior is: a distribution of z, and a map from z to the thought vectors that the decoder attends to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pyro.distributions import TorchDistribution
from torch import Tensor, nn


class Prior(nn.Module, ABC):
    """p(z), and the map u = U(z) from z to the thought vectors u.

    Posterior inference, bounds and files are about z; the decoder sees u alone. A prior may be learned through either
    part: its parameters are weights of the model, which the slow step trains with the others.

    Shapes: L decoder layers, S slots a layer, D width.

    Args:
        latent_shape: [L, S, D], the shape of z of one sequence.
    """

    summary: ClassVar[str]
    """What the prior is, in a few words: its line in the help of `--model.prior`."""

    def __init__(self, latent_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.latent_shape = latent_shape

    @abstractmethod
    def distribution(self, like: Tensor) -> TorchDistribution:
        """p(z) of one sequence: batch_shape [], event_shape [L, S, D].

        Any distribution will do whose `sample`, `log_prob` and `expand` work. Most posterior schemes also start at its
        `mean` and `stddev`. Where it has no KL divergence in closed form, that is estimated from draws.

        Args:
            like: a tensor whose dtype (at least float32) and device z has.
        """

    def thoughts(self, z: Tensor) -> Tensor:
        """U(z), the thought vectors of each z, [..., L, S, D]: z itself unless a prior says otherwise."""
        return z
