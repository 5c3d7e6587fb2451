"""A normal prior whose scale is learned, written as a map of a standard normal z.

    z ~ N(0, I),    u = s z        with one s for each slot of each layer, in R^{L×S}

The thought vectors u so have the prior N(0, s²), while z keeps the scale that the schemes' step sizes are made for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ltm_pyro.models.priors.standard import Standard

START = 0.01
"""The scale before training. Weights of the decoder begin with about the same."""


class Scaled(Standard):
    """A standard normal z, whose thought vectors are z times a learned scale of each slot, which starts small.

    The scale says how far one step of inference moves a slot. It is made for thoughts that are fast weights, where
    vectors of the scale of z would drown the weights that they are added to.
    """

    summary = "N(0, I), mapped to thought vectors by a learned scale of each slot, which starts small"

    def __init__(self, latent_shape: tuple[int, int, int]) -> None:
        super().__init__(latent_shape)
        # Learned on a logarithmic scale, so that steps of AdamW are in proportion to it.
        self.log_scale = nn.Parameter(torch.full((*latent_shape[:2], 1), START).log())
        """log s, [L, S, 1]."""

    def thoughts(self, z: Tensor) -> Tensor:
        return z * self.log_scale.exp()
