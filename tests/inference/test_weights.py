"""Estimates from importance weights, on weights whose mean is known."""

from __future__ import annotations

import math

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
