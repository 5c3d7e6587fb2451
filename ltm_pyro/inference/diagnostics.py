"""How well chains have mixed, by ArviZ: of the log joint and of the dimensions of z."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ltm_pyro.inference.posterior import Posterior, import_arviz

MOST_DIMENSIONS = 256
"""Of z of a sequence; of more, as many are taken at even distances."""


@dataclass(frozen=True)
class Mixing:
    """Of B sequences."""

    effective_sample_size: Tensor
    """[B]: bulk effective sample size, the median over the dimensions of z (Vehtari et al. 2021, arXiv 1903.08008)."""
    largest_r_hat: Tensor
    """[B]: rank-normalised split R̂, the largest over the dimensions of z. Above 1.01 the chains have not mixed."""


def mixing(posterior: Posterior) -> Mixing | None:
    """Diagnostics of the chains of each sequence; None for fewer than 4 draws a chain, or draws that are all equal."""
    arviz, is_new = import_arviz()
    samples = posterior.samples.detach().cpu().double().flatten(3)
    if samples.shape[1] < 4 or samples.std((0, 1)).max() == 0:
        return None
    stride = max(1, samples.shape[-1] // MOST_DIMENSIONS)
    values = samples[..., ::stride].numpy()
    if is_new:
        from arviz_stats.base import array_stats

        sizes = array_stats.ess(values, chain_axis=0, draw_axis=1)
        r_hats = array_stats.rhat(values, chain_axis=0, draw_axis=1)
    else:
        columns = values.reshape(*values.shape[:2], -1)
        sizes, r_hats = (
            np.array([function(columns[..., i]) for i in range(columns.shape[-1])]).reshape(values.shape[2:])
            for function in (arviz.ess, arviz.rhat)
        )
    sizes, r_hats = torch.as_tensor(sizes), torch.as_tensor(r_hats)
    return Mixing(sizes.nanquantile(0.5, dim=1), r_hats.amax(1))
