"""How well chains have mixed, as the diagnostics of Vehtari et al. 2021 (arXiv 1903.08008) say of the numbers of z, and
whether they have diverged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import Tensor

from ltm_pyro.inference.base import Batch, Model, infer
from ltm_pyro.inference.export import DrawTerms, evaluate_draws
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.posterior import Posterior, import_arviz
from ltm_pyro.inference.schemes.prior import PRIOR

MOST_SIZES = 256
"""Effective sample sizes are those of at most about this many numbers of z, spread evenly over a larger one."""


HIGHEST_R_HAT = 1.1
"""The largest R̂ of chains that are said to have mixed. Above it they are too far apart for their mean to say much; from
1.01 on they are so for precise work."""
PRIOR_DRAWS = 16
"""Draws of the prior, to whose log joint that of chains is compared."""
NATS_PER_NUMBER = 10.0
"""How far below the log joint of the prior's draws that of a chain may be, for each number of z."""


@dataclass(frozen=True)
class Mixing:
    """The diagnostics of B sequences."""

    effective_sample_size: Tensor
    """[B]: bulk effective sample size by ArviZ, the median over the numbers of z, of a large z over some of them."""
    largest_r_hat: Tensor
    """[B]: rank-normalised split R̂, the largest over all numbers of z. Above 1.01 the chains have not mixed."""


def mixing(posterior: Posterior) -> Mixing | None:
    """Diagnose the chains of each sequence; None for fewer than 4 draws a chain, or if all draws are equal."""
    arviz, is_new = import_arviz()
    samples = posterior.samples.detach().cpu().double().unsqueeze(-1).flatten(3)
    if samples.shape[1] < 4 or samples.std((0, 1)).max() == 0:
        return None
    # A number that is the same in all draws says nothing of the others.
    largest = [np.fmax.reduce(r_hat(one.numpy())) for one in samples.unbind(2)]
    values = samples[..., :: -(-samples.shape[-1] // MOST_SIZES)].numpy()
    if is_new:
        from arviz_stats.base import array_stats

        sizes = array_stats.ess(values, chain_axis=0, draw_axis=1)
    else:
        columns = values.reshape(*values.shape[:2], -1)
        sizes = np.array([arviz.ess(columns[..., i]) for i in range(columns.shape[-1])]).reshape(values.shape[2:])
    return Mixing(torch.as_tensor(sizes).nanquantile(0.5, dim=1), torch.tensor(np.array(largest)))


def r_hat(draws: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rank-normalised split R̂ of many numbers at once (Vehtari et al. 2021, section 4); ArviZ takes one at a time.

    Args:
        draws: [chains, draws, n], at least 4 draws.

    Returns:
        [n]; infinite where no chain moves but they differ, nan for a number that is the same in all draws, and for a
        single chain, which has none to be compared with.
    """
    if len(draws) < 2:
        return np.full(draws.shape[2], np.nan)
    half = draws.shape[1] // 2
    split = np.concatenate([draws[:, :half], draws[:, -half:]])
    folded = np.abs(split - np.median(split, axis=(0, 1)))
    return np.asarray(np.fmax(_ratio_of_variances(split), _ratio_of_variances(folded)))


def _ratio_of_variances(draws: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """R̂ of the normal scores of [chains, draws, n]: the deviation of all draws over that within the chains."""
    num_chains, num_draws, _ = draws.shape
    ranks = stats.rankdata(draws.reshape(num_chains * num_draws, -1), axis=0)
    scores = stats.norm.ppf((ranks - 3 / 8) / (num_chains * num_draws + 1 / 4)).reshape(draws.shape)
    within = scores.var(1, ddof=1).mean(0)
    between = scores.mean(1).var(0, ddof=1)
    is_still, is_same = np.ptp(draws, axis=1).max(0) == 0, np.ptp(draws, axis=(0, 1)) == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.sqrt((num_draws - 1) / num_draws + between / within)
    return np.where(is_same, np.nan, np.where(is_still, np.inf, ratio))


def diverged(posterior: Posterior, terms: DrawTerms, model: Model, batch: Batch, rng: Noise) -> Tensor:
    """Whether a chain of each sequence is where no posterior can be, [B].

    With E over the posterior and E₀ over the prior, E log p(x | z) ≥ log p(x) ≥ E₀ log p(x | z) (the first since
    KL(posterior ‖ prior) ≥ 0, the second by Jensen's inequality), and a posterior is seldom much wider than its prior.
    So the log joint of draws of the posterior is not far below that of draws of the prior. A chain whose steps are too
    long for the curvature is far below it: its distance grows by a factor in each step.

    Args:
        posterior: the draws of the chains.
        terms: those of the draws, from :func:`~ltm_pyro.inference.export.evaluate_draws`.
        batch: what z was inferred from.
    """
    q = PRIOR.distribution(infer(PRIOR, model, batch, rng), rng, "diverged")
    draws = q.sample(torch.Size([PRIOR_DRAWS])).unsqueeze(0)
    of_prior = evaluate_draws(Posterior(draws, posterior.sequence_ids), model, batch).log_joint[0]
    num_dims = posterior.samples[0, 0, 0].numel()
    lowest = of_prior.mean(0) - NATS_PER_NUMBER * (num_dims + of_prior.std(0))
    return ~(terms.log_joint.mean(1) >= lowest).all(0)  # not a number is no place either
