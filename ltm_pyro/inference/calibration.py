"""Simulation-based calibration: does a scheme infer the true posterior?

If a text was drawn from the model together with its z, that z is one more draw of p(z | x). So its rank among L
independent draws of the scheme's posterior is uniform on 0 … L, for every number that can be computed from z (Talts et
al. 2018, arXiv 1804.06788, theorem 1). If the posterior is too narrow, the true z lies at the ends; if it is too wide,
in the middle; if it is shifted, on one side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ltm_pyro.inference.base import Batch, Model, PosteriorScheme, flat, frozen, ids_of, infer, log_joint
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.surroundings import entry

LOG_LIKELIHOOD = "log p(x | z)"


@dataclass(frozen=True)
class Calibration:
    """Ranks of N true values among L draws, for Q numbers computed from z."""

    ranks: np.ndarray
    """[N, Q] int64, from 0 to L."""
    names: tuple[str, ...]
    """[Q]: the names of the numbers, which are z's dimensions and the log-likelihood."""
    num_draws: int
    """L, the number of draws among which each rank was taken."""

    def histogram(self, num_bins: int) -> np.ndarray:
        """Counts of ranks in bins of equal width, [Q, num_bins].

        Raises:
            ValueError: if the L + 1 ranks do not fill the bins evenly.
        """
        if (self.num_draws + 1) % num_bins:
            raise ValueError(f"{self.num_draws + 1} ranks do not fill {num_bins} bins evenly")
        bins = self.ranks // ((self.num_draws + 1) // num_bins)
        return np.asarray((bins[:, :, None] == np.arange(num_bins)).sum(0))

    def band(self, num_bins: int, probability: float = 0.95) -> tuple[int, int]:
        """The counts between which all bins of a histogram of uniform ranks lie, with at least this probability.

        The band is simultaneous in the bins of one number, not in the Q numbers.
        """
        counts = np.arange(len(self.ranks) + 1)
        inside = counts[self._p_values_of_bins(counts, num_bins) > 1 - probability]
        return int(inside.min()), int(inside.max())

    def p_values(self, num_bins: int) -> np.ndarray:
        """[Q]: at most this share of histograms of uniform ranks has a bin as surprising as the worst one here.

        By exact sums of the binomial distribution of a bin, and Bonferroni's correction for the number of bins. So a
        p-value can be as small as the ranks make it.
        """
        return np.asarray(self._p_values_of_bins(self.histogram(num_bins), num_bins).min(1))

    def p_value(self, num_bins: int) -> float:
        """The p-value of all Q numbers together, by Bonferroni's correction: small if the posterior is wrong."""
        return float(min(1.0, self.p_values(num_bins).min() * len(self.names)))

    def _p_values_of_bins(self, counts: np.ndarray, num_bins: int) -> np.ndarray:
        """The probability that any of the bins is as surprising as one with this count, at most."""
        num_ranks = len(self.ranks)
        binomial, every = stats.binom(num_ranks, 1 / num_bins), np.arange(num_ranks + 1)
        surprise = np.minimum(binomial.cdf(every), binomial.sf(every - 1))
        order = surprise.argsort()
        # The tolerance lets counts that are equally surprising count as such, whatever their rounding.
        num_as_surprising = np.searchsorted(surprise[order], surprise * (1 + 1e-9), side="right")
        of_bin = np.cumsum(binomial.pmf(every)[order])[num_as_surprising - 1]
        return np.asarray(np.minimum(1, num_bins * of_bin)[counts])

    @property
    def spread(self) -> np.ndarray:
        """[Q]: mean squared distance of the ranks from their middle, over that of uniform ranks.

        It is 1 for a calibrated posterior, up to 3 for one that is too narrow, and down to 0 for one that is too wide.
        """
        middle = self.num_draws / 2
        uniform = ((np.arange(self.num_draws + 1) - middle) ** 2).mean()
        return np.asarray(((self.ranks - middle) ** 2).mean(0) / uniform)


@entry()
def calibrate(
    model: Model, batch: Batch, z: Tensor, scheme: PosteriorScheme, num_draws: int, rng: Noise
) -> Calibration:
    """Rank the z that made the texts among draws of a scheme's posterior.

    The draws must be independent. The draws of one chain are not: give a scheme of chains a `num_chains` of at least
    `num_draws`, and let each chain keep one draw.

    Args:
        batch: N observations, each drawn from the model together with a z.
        z: those z, [N, *event_shape]; inference does not see them.
        num_draws: L, the number of draws.

    Raises:
        ValueError: if the scheme has fewer draws.
    """
    if scheme.num_draws is not None and scheme.num_draws < num_draws:
        raise ValueError(f"{num_draws} draws were requested, but the scheme has {scheme.num_draws}")
    state = infer(scheme, model, batch, rng)
    draws = scheme.posterior(state, num_draws, rng).samples.flatten(0, 1)
    with frozen(model, batch) as batch, torch.no_grad():
        truth = _numbers(model, batch, z)
        smaller = torch.zeros(truth.shape, dtype=torch.int64)
        equal = torch.zeros_like(smaller)
        for draw in draws:
            values = _numbers(model, batch, draw)
            smaller += values < truth
            equal += values == truth
    ids = ids_of(batch)
    # Ties are broken at random, which keeps the rank uniform.
    uniform = torch.stack(
        [rng.uniform(f"tie-{number}", ids, torch.zeros_like(ids)) for number in range(truth.shape[1])],
        dim=1,
    )
    ranks = smaller + (uniform * (equal + 1)).floor().long()
    indices = np.ndindex(*z.shape[1:])
    names = tuple(f"z[{', '.join(map(str, index))}]" if index else "z" for index in indices)
    return Calibration(ranks.numpy(), (*names, LOG_LIKELIHOOD), num_draws)


def _numbers(model: Model, batch: Batch, z: Tensor) -> Tensor:
    """[N, Q]: the dimensions of z, and its log-likelihood, which is the most sensitive (Modrák et al. 2023)."""
    log_likelihood = log_joint(model, batch, z).log_likelihood
    return torch.cat([flat(z), log_likelihood[:, None]], dim=1).double().cpu()
