"""Calibration: uniform for the exact posterior, and every way of being wrong is seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from ltm_pyro.inference import SequenceNoise, State
from ltm_pyro.inference.base import first_fields
from ltm_pyro.inference.calibration import LOG_LIKELIHOOD, Calibration, calibrate
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.schemes.adam_vi import AdamVI
from ltm_pyro.inference.schemes.hmc import HMC
from ltm_pyro.inference.schemes.langevin import Langevin
from ltm_pyro.inference.schemes.mala import MALA

NUM_TEXTS, NUM_DRAWS, NUM_BINS = 400, 19, 20


@dataclass(frozen=True)
class GivenState(State):
    mean: Tensor


@dataclass(frozen=True)
class Given:
    """Draws from a Gaussian around the exact posterior mean, in closed form: exact, or wrong in a known way."""

    world: object
    widen: float = 1.0
    shift: float = 0.0
    num_steps: int = 0
    num_draws: ClassVar[None] = None

    def init(self, model, batch, rng, warm=None):
        return GivenState(*first_fields(batch, batch.x), self.world.posterior_mean(batch.x))

    def posterior(self, state, num_samples, rng):
        covariance = torch.linalg.inv(self.world.precision)
        scale = torch.linalg.cholesky(covariance) * self.widen
        steps = torch.zeros_like(state.sequence_ids)
        noise = rng.normal("given", state.sequence_ids, steps, state.mean.shape[1:], (1, num_samples), like=state.mean)
        return Posterior(state.mean + self.shift * covariance.diagonal().sqrt() + noise @ scale.T, state.sequence_ids)


def drawn(world, seed=3):
    """(batch, z), drawn together."""
    generator = torch.Generator().manual_seed(seed)
    num_observed, num_latent = world.loadings.shape
    z = torch.randn(NUM_TEXTS, num_latent, generator=generator, dtype=torch.float64)
    noise = torch.randn(NUM_TEXTS, num_observed, generator=generator, dtype=torch.float64)
    return z, z @ world.loadings.T + world.noise_scale * noise


@pytest.fixture
def calibrated_by(linear_gaussian):
    """A world whose posterior is correlated, and a function that gives the calibration of a scheme on it."""
    world, _ = linear_gaussian.with_posterior_variances([0.9, 0.4, 0.02])
    z, x = drawn(world)
    batch = type(world.sample(1))(x, torch.arange(NUM_TEXTS))

    def of(scheme) -> Calibration:
        return calibrate(world, batch, z, scheme, NUM_DRAWS, SequenceNoise(0))

    return world, of


def test_the_exact_posterior_is_calibrated(calibrated_by):
    world, of = calibrated_by
    result = of(Given(world))
    assert result.ranks.shape == (NUM_TEXTS, 4)
    assert result.names == ("z[0]", "z[1]", "z[2]", LOG_LIKELIHOOD)
    assert (result.ranks.min(), result.ranks.max()) == (0, NUM_DRAWS)
    assert result.p_value(NUM_BINS) > 0.01
    assert np.abs(result.spread - 1).max() < 5 * math.sqrt(0.8 / NUM_TEXTS)  # a uniform's relative variance of squares


@pytest.mark.parametrize(
    "scheme",
    [
        MALA(num_steps=300, num_chains=NUM_DRAWS),
        HMC(num_steps=40, num_chains=NUM_DRAWS),
    ],
    ids=["mala", "hmc"],
)
def test_an_exact_sampler_is_calibrated(scheme, calibrated_by):
    """Each of its chains gives one draw, so that the draws of a text are independent."""
    _, of = calibrated_by
    result = of(scheme)
    assert result.p_value(NUM_BINS) > 0.01
    assert np.abs(result.spread - 1).max() < 5 * math.sqrt(0.8 / NUM_TEXTS)


def test_chains_that_refuse_nothing_are_too_wide(calibrated_by):
    """Langevin of step s has the variance v / (1 - s / 2v) in a direction of variance v: here four times the 0.02."""
    _, of = calibrated_by
    result = of(Langevin(num_steps=100, num_chains=NUM_DRAWS, step_size=0.03))
    assert result.p_value(NUM_BINS) < 1e-3
    # Draws that are too wide explain the text too badly.
    assert result.ranks[:, 3].mean() > 0.6 * NUM_DRAWS


@pytest.mark.parametrize(("wrong", "narrow"), [({"widen": 0.7}, True), ({"widen": 1.4}, False), ({"shift": 0.4}, None)])
def test_a_posterior_that_is_too_narrow_too_wide_or_shifted_is_seen(wrong, narrow, calibrated_by):
    world, of = calibrated_by
    result = of(Given(world, **wrong))
    assert result.p_value(NUM_BINS) < 1e-3
    if narrow is not None:
        assert ((result.spread[:3] > 1) == narrow).all()
    low, high = result.band(NUM_BINS)
    histogram = result.histogram(NUM_BINS)
    assert ((histogram < low) | (histogram > high)).any(1).sum() >= 3


def test_mean_field_is_too_narrow_where_the_posterior_is_correlated(calibrated_by):
    """As it must be: the best diagonal Gaussian has the variances 1 / Λ_ii, below those of the marginals."""
    _, of = calibrated_by
    result = of(AdamVI(num_steps=400, learning_rate=0.05, epsilon=1e-8))
    assert (result.spread[:3] > 1.2).all()
    assert result.p_value(NUM_BINS) < 1e-3


def test_a_fit_to_reused_noise_is_off(calibrated_by):
    _, of = calibrated_by
    fit = AdamVI(num_steps=200, learning_rate=0.3, epsilon=1e-8, initial_scale=math.exp(-2.5), noise="reused")
    result = of(fit)
    assert result.p_value(NUM_BINS) < 1e-3
    # Its mean hides the noise and its scale grows to the prior's, so that its draws explain the text far too badly.
    assert result.ranks[:, 3].mean() > 0.8 * NUM_DRAWS


def test_inference_knows_nothing_of_the_true_z(calibrated_by, linear_gaussian):
    """Were another z given as the true one, the draws would be the same."""
    world, _ = calibrated_by
    _, x = drawn(world)
    batch = type(world.sample(1))(x, torch.arange(NUM_TEXTS))
    far = torch.full((NUM_TEXTS, 3), 50.0, dtype=torch.float64)
    ranks = calibrate(world, batch, far, Given(world), NUM_DRAWS, SequenceNoise(0)).ranks
    assert (ranks[:, :3] == NUM_DRAWS).all()
    assert (ranks[:, 3] == 0).all()


def test_draws_that_equal_the_truth_leave_the_rank_uniform(calibrated_by):
    """All values equal: any rank is as good as any other."""

    @dataclass(frozen=True)
    class Constant(Given):
        def posterior(self, state, num_samples, rng):
            return Posterior(torch.zeros(1, num_samples, len(state), 3, dtype=torch.float64), state.sequence_ids)

    world, _ = calibrated_by
    _, x = drawn(world)
    batch = type(world.sample(1))(x, torch.arange(NUM_TEXTS))
    zero = torch.zeros(NUM_TEXTS, 3, dtype=torch.float64)
    result = calibrate(world, batch, zero, Constant(world), NUM_DRAWS, SequenceNoise(0))
    assert result.p_value(NUM_BINS) > 0.01
    assert set(np.unique(result.ranks)) == set(range(NUM_DRAWS + 1))


def uniform(num_ranks: int, seed: int) -> Calibration:
    ranks = np.random.default_rng(seed).integers(0, 20, (num_ranks, 1))
    return Calibration(ranks, ("z",), 19)


def test_the_band_holds_all_bins_of_uniform_ranks_as_often_as_it_says():
    """2,000 histograms: the share inside has a standard error of 0.7 %; counts are whole, so it may be above."""
    inside, significant = 0, 0
    low, high = uniform(150, 0).band(10, probability=0.9)  # the same for all
    for seed in range(2000):
        result = uniform(150, seed)
        histogram = result.histogram(10)
        inside += bool(((histogram >= low) & (histogram <= high)).all())
        significant += result.p_values(10)[0] < 0.1
    assert 0.9 - 5 * 0.007 < inside / 2000 < 0.97
    assert significant / 2000 < 0.1 + 5 * 0.007


def test_a_histogram_counts_every_rank_once():
    result = uniform(150, 0)
    assert result.histogram(5).sum() == 150
    assert result.histogram(20)[0, 3] == (result.ranks == 3).sum()
    with pytest.raises(ValueError, match="evenly"):
        result.histogram(7)


def test_a_single_bad_bin_has_the_p_value_of_the_binomial():
    """One bin of two is as surprising as the other: the bound counts both, four tails of the binomial."""
    ranks = np.repeat([0, 1], [60, 40])[:, None]
    p = Calibration(ranks, ("z",), 1).p_values(2)[0]
    assert p == pytest.approx(4 * stats.binom(100, 0.5).sf(59))


@pytest.mark.parametrize("num_numbers", [1_537, 12_289, 100_000])
def test_however_many_numbers_there_are_ranks_that_are_all_wrong_are_seen(num_numbers):
    ranks = np.zeros((30, num_numbers), dtype=np.int64)
    names = tuple(map(str, range(num_numbers)))
    # All of 30 ranks in one bin of 10, which has the probability 1e-30, in any of 10 bins.
    expected = num_numbers * 10 * 1e-30
    assert Calibration(ranks, names, 19).p_value(10) == pytest.approx(expected, rel=1e-6)


def test_uniform_ranks_of_many_numbers_are_not_rejected_more_often_than_stated():
    generator = np.random.default_rng(1)
    names = tuple(map(str, range(200)))
    p_values = [Calibration(generator.integers(0, 20, (100, 200)), names, 19).p_value(20) for _ in range(300)]
    assert np.mean(np.array(p_values) < 0.1) < 0.1 + 5 * math.sqrt(0.1 * 0.9 / 300)


def test_more_draws_than_there_are_cannot_be_ranked(calibrated_by):
    _, of = calibrated_by
    with pytest.raises(ValueError, match="19 draws"):
        of(Langevin(num_chains=4))
