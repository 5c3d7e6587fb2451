"""The units in which chains move: a square root A of a covariance, in which a posterior is nearly round."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Units:
    """A = σ (I + V (diag(a) - I) Vᵀ): a scale for each dimension, and another for some directions in those scales."""

    scale: Tensor
    """σ, [*batch_shape, *event_shape]."""
    directions: Tensor
    """V, [*batch_shape, d, r], orthonormal; r may be 0."""
    stretch: Tensor
    """a, [*batch_shape, r]."""

    @classmethod
    def diagonal(cls, scale: Tensor) -> Units:
        """A scale for each dimension, [B, *event_shape]."""
        directions = scale.new_zeros(len(scale), scale[0].numel(), 0)
        return cls(scale, directions, directions[:, 0])

    def times(self, steps: Tensor) -> Tensor:
        """A u, for steps u in these units, [*outer, *batch_shape, *event_shape]."""
        return self.scale * self._stretched(steps)

    def transpose_times(self, gradient: Tensor) -> Tensor:
        """Aᵀ g: the gradient in these units, for g in units of z, [*outer, *batch_shape, *event_shape]."""
        return self._stretched(self.scale * gradient)

    def _stretched(self, values: Tensor) -> Tensor:
        if not self.stretch.shape[-1]:
            return values
        num_event_dims = self.scale.dim() - self.stretch.dim() + 1
        flat = values.flatten(values.dim() - num_event_dims) if num_event_dims else values.unsqueeze(-1)
        along = self.directions.mT @ flat.unsqueeze(-1)
        change = self.directions @ ((self.stretch - 1).unsqueeze(-1) * along)
        return values + change.squeeze(-1).view_as(values)
