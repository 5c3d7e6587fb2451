"""A normal prior whose mean and scale are learned, written as a map of a standard normal z.

    z ~ N(0, I),    u = m + s · z        elementwise, with m and s in R^{L×S×D}

The thought vectors u so have the prior N(m, s²), while z keeps the scale that the schemes' step sizes are made for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ltm_pyro.models.priors.standard import Standard


class Affine(Standard):
    """A standard normal z, whose thought vectors are a learned mean plus a learned scale times z.

    The mean is a learned start: what the layers attend to before anything of a text has been read. The scale says how
    far one step of inference moves each dimension. The mean starts at 0 and the scale at 1, which is the prior
    `standard`.
    """

    summary = "N(0, I), mapped to thought vectors by a learned mean and scale of each dimension"

    def __init__(self, latent_shape: tuple[int, int, int]) -> None:
        super().__init__(latent_shape)
        self.mean = nn.Parameter(torch.zeros(latent_shape))
        """m, [L, S, D]."""
        self.scale = nn.Parameter(torch.ones(latent_shape))
        """s, [L, S, D]. Its sign does not matter to the distribution of u."""

    def thoughts(self, z: Tensor) -> Tensor:
        return self.mean + self.scale * z
