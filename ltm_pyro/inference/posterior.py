"""Draws from the posterior of a batch of sequences, and their export to ArviZ."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor


def import_arviz() -> tuple[Any, bool]:
    """ArviZ, and whether it is 1.0 or later. Imported when it is needed, since it takes seconds."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
        import arviz
    return arviz, int(arviz.__version__.split(".")[0]) >= 1


@dataclass(frozen=True)
class Posterior:
    """Draws of z for B sequences."""

    samples: Tensor
    """[chain, draw, B, *event_shape]."""
    sequence_ids: Tensor
    """[B] int64."""

    @property
    def mean(self) -> Tensor:
        """[B, *event_shape]: mean over chains and draws."""
        return self.samples.mean((0, 1))

    def to_arviz(self) -> Any:
        """The draws as ArviZ's container: `InferenceData` in ArviZ 0.x, `xarray.DataTree` from 1.0 on.

        Group `posterior`, variable `z` with dimensions (chain, draw, sequence, layer, slot, dim), or
        (chain, draw, sequence, z_dim_0, …) for a z of other than three dimensions. The coordinate `sequence` holds the
        sequence ids.
        """
        arviz, is_new = import_arviz()
        event_dims = self.samples.dim() - 3
        names = ["layer", "slot", "dim"] if event_dims == 3 else [f"z_dim_{i}" for i in range(event_dims)]
        variables = {"z": self.samples.detach().cpu().numpy()}
        labels: dict[str, Any] = {
            "dims": {"z": ["sequence", *names]},
            "coords": {"sequence": self.sequence_ids.cpu().numpy()},
        }
        if is_new:
            return arviz.from_dict({"posterior": variables}, **labels)
        return arviz.from_dict(posterior=variables, **labels)
