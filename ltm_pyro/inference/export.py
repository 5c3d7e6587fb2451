"""Draws of z, with all that ArviZ can use of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.inference.base import Batch, Model, frozen, log_joint, prepared
from ltm_pyro.inference.posterior import Posterior


@dataclass(frozen=True)
class DrawTerms:
    """The two terms of log p(x, z) at draws of z, [chain, draw, B] float64 on the CPU, in nats."""

    log_likelihood: Tensor
    """log p(x | z)."""
    log_prior: Tensor
    """log p(z)."""

    @property
    def log_joint(self) -> Tensor:
        """log p(x, z)."""
        return self.log_likelihood + self.log_prior


@torch.no_grad()
def evaluate_draws(posterior: Posterior, model: Model, batch: Batch) -> DrawTerms:
    """What the model says of each draw."""
    samples = posterior.samples
    terms = []
    with frozen(model):
        batch = prepared(model, batch)
        # One draw at a time: memory does not grow with their number.
        for z in samples.flatten(0, 1):
            joint = log_joint(model, batch, z)
            terms.append(torch.stack([joint.log_likelihood, joint.log_prior]).double().cpu())
    return DrawTerms(*torch.stack(terms, dim=1).reshape(2, *samples.shape[:3]))


def to_arviz(
    posterior: Posterior,
    terms: DrawTerms,
    texts: Sequence[str] | None = None,
    observed: dict[str, np.ndarray] | None = None,
    q: TorchDistribution | None = None,
) -> Any:
    """The draws as ArviZ's container (see :meth:`Posterior.to_arviz`), with what the model says of each.

    Groups: `posterior` (z), `sample_stats` (`lp`, the log joint, and with `q` also `log_q`), `log_likelihood` (`log_p`,
    log p(x | z) of each text), and `observed_data` where `observed` is given. lp - log_q are the log-weights of
    importance sampling.

    Args:
        terms: what :func:`evaluate_draws` gives for these draws.
        texts: becomes the coordinate `text` of the dimension `sequence`.
        observed: arrays of [B, …], by name.
        q: what the draws were drawn from, batch_shape [B], where that has a density.
    """
    groups: dict[str, dict[str, np.ndarray]] = {
        "sample_stats": {"lp": terms.log_joint.numpy()},
        "log_likelihood": {"log_p": terms.log_likelihood.numpy()},
    }
    if q is not None:
        with torch.no_grad():
            groups["sample_stats"]["log_q"] = q.log_prob(posterior.samples).double().cpu().numpy()
    if observed is not None:
        groups["observed_data"] = observed
    return posterior.to_arviz(groups, texts)
