"""Several linear maps of the same input, computed in one product."""

from __future__ import annotations

from torch import nn


class StackedLinear(nn.Linear):
    """Linear maps of one input, without bias. Their outputs stand side by side, their matrices one above the other.

    Args:
        num_maps: the number of maps, each of `out_features` numbers. An optimiser that treats a matrix as a whole needs
            it to tell them apart.
    """

    def __init__(self, in_features: int, out_features: int, num_maps: int) -> None:
        super().__init__(in_features, num_maps * out_features, bias=False)
        self.num_maps = num_maps
