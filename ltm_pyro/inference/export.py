"""The export of draws of z to ArviZ, together with the log joint of each draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.inference.base import Batch, Model, frozen, log_joint
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.surroundings import entry


@dataclass(frozen=True)
class DrawTerms:
    """The terms of the log joint of every draw of a posterior, in nats; float64, on the CPU."""

    log_likelihood: Tensor
    """[chain, draw, B]: log p(x | z)."""
    log_prior: Tensor
    """[chain, draw, B]: log p(z)."""

    @property
    def log_joint(self) -> Tensor:
        """[chain, draw, B]: log p(x, z)."""
        return self.log_likelihood + self.log_prior


@entry()
@torch.no_grad()
def evaluate_draws(posterior: Posterior, model: Model, batch: Batch) -> DrawTerms:
    """Evaluate the program at every draw.

    Memory does not grow with the number of draws, only with that of chains.
    """
    log_likelihoods, log_priors = [], []
    with frozen(model, batch) as batch:
        for z in posterior.samples.unbind(1):  # the same draw of all chains
            joint = log_joint(model, batch, z, num_sample_dims=1)
            log_likelihoods.append(joint.log_likelihood.double().cpu())
            log_priors.append(joint.log_prior.double().cpu())
    return DrawTerms(torch.stack(log_likelihoods, 1), torch.stack(log_priors, 1))


@torch.no_grad()
def to_arviz(
    posterior: Posterior,
    terms: DrawTerms,
    texts: Sequence[str] | None = None,
    observed: dict[str, np.ndarray] | None = None,
    q: TorchDistribution | None = None,
) -> Any:
    """The draws as ArviZ's container (see :meth:`Posterior.to_arviz`), with the log joint of each.

    Groups: `posterior` (z), `sample_stats` (`lp`, the log joint, and with `q` also `log_q`), `log_likelihood` (`log_p`,
    log p(x | z) of each text), and `observed_data` if `observed` is given. lp - log_q are the log-weights of importance
    sampling.

    Args:
        terms: those of the draws, from :func:`evaluate_draws`.
        texts: the text of each sequence, which becomes the coordinate `text`.
        observed: arrays of [B, …], by name.
        q: the distribution of the draws, batch_shape [B], if it has a density.
    """
    groups: dict[str, dict[str, np.ndarray]] = {
        "sample_stats": {"lp": terms.log_joint.numpy()},
        "log_likelihood": {"log_p": terms.log_likelihood.numpy()},
    }
    if q is not None:
        groups["sample_stats"]["log_q"] = q.log_prob(posterior.samples).double().cpu().numpy()
    if observed is not None:
        groups["observed_data"] = observed
    return posterior.to_arviz(groups, texts)
