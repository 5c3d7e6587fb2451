"""Estimates from importance weights, on weights whose mean is known."""

from __future__ import annotations

import math

import pytest
import torch

from ltm_pyro.inference.weights import ImportanceWeights


def lognormal(num_draws, num_sequences, spread, seed=0):
    """Weights with E[w] = 1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_draws, num_sequences, generator=generator, dtype=torch.float64)
    return ImportanceWeights(spread * noise - spread**2 / 2)


def test_the_mean_over_k_is_never_worse_than_the_average_over_disjoint_halves():
    """-log is convex, so this holds for every set of weights, and not only on average."""
    weights = lognormal(64, 200, 2.0)
    halves = [ImportanceWeights(weights.log_weights[:32]), ImportanceWeights(weights.log_weights[32:])]
    assert (weights.nats <= (halves[0].nats + halves[1].nats) / 2 + 1e-12).all()


def test_equal_weights_have_no_error_and_all_draws_count():
    weights = ImportanceWeights(torch.full((10, 3), -2.5, dtype=torch.float64))
    assert torch.allclose(weights.nats, torch.full((3,), 2.5, dtype=torch.float64))
    assert torch.allclose(weights.effective_sample_size, torch.full((3,), 10.0, dtype=torch.float64))
    assert weights.monte_carlo_standard_error.abs().max() < 1e-7


def test_one_weight_that_bears_all_is_an_effective_sample_of_one():
    log_weights = torch.full((10, 1), -1000.0, dtype=torch.float64)
    log_weights[3] = -7.0
    weights = ImportanceWeights(log_weights)
    assert weights.effective_sample_size.item() == 1
    assert abs(weights.nats.item() - (7 + math.log(10))) < 1e-12


def test_the_standard_error_is_that_of_repetitions():
    weights = lognormal(400, 2000, 0.7)
    exact = math.sqrt((math.exp(0.49) - 1) / 400)  # a lognormal's coefficient of variation over the root of K
    assert abs(weights.nats.std() / exact - 1) < 5 / math.sqrt(2 * 2000) + 0.03
    assert abs(weights.monte_carlo_standard_error.mean() / exact - 1) < 0.05


def test_of_one_draw_the_error_is_unknown():
    assert lognormal(1, 3, 1.0).monte_carlo_standard_error.isnan().all()


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_the_tail_of_pareto_weights_has_their_shape(shape):
    """log w = k E with E exponential has a Pareto tail of shape k.

    The largest 3 √K of K draws tell k to about (1 + k) / √(3 √K), here 0.14 at most (de Haan & Ferreira 2006, section
    3.4); the prior of ArviZ's fit pulls it to 0.5 by 5 % or so.
    """
    exponential = -torch.rand(4000, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log()
    shapes = ImportanceWeights(shape * exponential).pareto_k
    assert shapes.shape == (40,)
    assert abs(shapes.mean() - shape) < 0.05 + 5 * 0.15 / math.sqrt(40)


def test_no_shape_without_a_tail():
    assert lognormal(20, 3, 1.0).pareto_k.isnan().all()
    equal = torch.zeros(100, 2, dtype=torch.float64)
    equal[:, 1] = lognormal(100, 1, 1.0).log_weights[:, 0]
    assert ImportanceWeights(equal).pareto_k.isnan().tolist() == [True, False]


def test_the_error_of_two_weights_by_hand():
    """1 and 3: a mean of 2, whose standard error is 1; half of it, in the logarithm."""
    weights = ImportanceWeights(torch.tensor([[1.0], [3.0]], dtype=torch.float64).log())
    assert weights.monte_carlo_standard_error.item() == pytest.approx(0.5)


def test_equal_weights_have_a_finite_error_whatever_their_number():
    """The effective sample size of K equal weights is K but for rounding, which may be upwards."""
    for num_draws in range(2, 200):
        error = ImportanceWeights(torch.zeros(num_draws, 1, dtype=torch.float64)).monte_carlo_standard_error
        assert error.item() < 1e-7
