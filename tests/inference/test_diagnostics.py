"""Mixing of chains: held against chains whose effective sample size is known."""

from __future__ import annotations

import math

import arviz
import numpy as np
import pyro
import pytest
import torch

from ltm_pyro.inference import SCHEMES, Posterior, SequenceNoise, infer
from ltm_pyro.inference.diagnostics import HIGHEST_R_HAT, diverged, mixing, r_hat
from ltm_pyro.inference.export import evaluate_draws


def autoregressive(coefficient, num_chains=4, num_draws=4000, event_shape=(2,), num_sequences=1):
    """Stationary chains x ← a x + √(1 - a²) ε, of which a draw is worth (1 - a) / (1 + a) independent ones."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_draws, num_chains, num_sequences, *event_shape)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    draws = [noise[0]]
    for step in noise[1:]:
        draws.append(coefficient * draws[-1] + (1 - coefficient**2) ** 0.5 * step)
    return torch.stack(draws, dim=1)


@pytest.mark.parametrize("coefficient", [0.0, 0.5, 0.9])
def test_the_effective_sample_size_is_that_of_the_chain(coefficient):
    found = mixing(Posterior(autoregressive(coefficient), torch.tensor([0])))
    expected = 16_000 * (1 - coefficient) / (1 + coefficient)
    assert found.effective_sample_size.item() == pytest.approx(expected, rel=0.15)
    assert found.largest_r_hat.item() < 1.01


def test_a_sequence_and_a_dimension_are_looked_at_by_themselves():
    samples = autoregressive(0.5, num_draws=300, event_shape=(3, 2), num_sequences=2)
    samples[0, :, 1, 2, 1] += 3  # one chain of one number of the second sequence stands elsewhere
    found = mixing(Posterior(samples, torch.tensor([0, 1])))
    assert found.largest_r_hat[0] < 1.05
    assert found.largest_r_hat[1] > 1.3
    expected = arviz.rhat(np.ascontiguousarray(samples[:, :, 1, 2, 1].numpy()))
    assert found.largest_r_hat[1].item() == pytest.approx(float(expected))
    sizes = [float(arviz.ess(samples[:, :, 0, i, j].numpy())) for i in range(3) for j in range(2)]
    assert found.effective_sample_size[0].item() == pytest.approx(np.median(sizes))


@pytest.mark.parametrize("num_draws", [4, 9, 50])
def test_r_hat_of_many_numbers_is_that_of_arviz(num_draws):
    generator = np.random.default_rng(0)
    draws = generator.standard_normal((3, num_draws, 6)) * generator.uniform(0.5, 2, (3, 1, 6))
    draws[0, :, 1] += 2
    draws[..., 2] = draws[..., 2].round()  # ties
    expected = [float(arviz.rhat(np.ascontiguousarray(draws[..., i]))) for i in range(6)]
    assert r_hat(draws) == pytest.approx(np.array(expected), rel=1e-12)


def test_a_number_that_never_moves_and_a_single_chain_have_no_r_hat_and_stuck_chains_an_infinite_one():
    draws = np.random.default_rng(0).standard_normal((4, 10, 4))
    draws[..., 1] = 1.0
    draws[..., 2] = np.array([1.0, -1.0, 1.0, -1.0])[:, None]
    draws[..., 3] = np.array([0.3, -1.7, 0.9, 2.0])[:, None]
    found = r_hat(draws)
    assert np.isnan(found).tolist() == [False, True, False, False]
    assert np.isinf(found).tolist() == [False, False, True, True]
    assert np.isnan(r_hat(draws[:1])).all()


def test_a_number_that_never_moves_hides_no_other():
    samples = autoregressive(0.0, num_draws=200, event_shape=(3,))
    samples[..., 1] = 2.0
    samples[0, ..., 2] += 50
    assert mixing(Posterior(samples, torch.tensor([0]))).largest_r_hat.item() > 1.4


@pytest.mark.parametrize("number", [0, 1, 767, 1535])
def test_one_of_many_numbers_in_which_chains_disagree_is_seen(number):
    samples = torch.randn(4, 200, 1, 1536, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert mixing(Posterior(samples, torch.tensor([0]))).largest_r_hat.item() < 1.1
    samples[0, :, 0, number] += 50
    assert mixing(Posterior(samples, torch.tensor([0]))).largest_r_hat.item() > 1.4


def test_of_many_dimensions_the_median_size_is_that_of_some():
    found = mixing(Posterior(autoregressive(0.0, num_draws=20, event_shape=(600,)), torch.tensor([0])))
    assert 40 < found.effective_sample_size.item() < 160


@pytest.mark.parametrize("samples", [torch.zeros(2, 10, 1, 3), torch.randn(2, 3, 1, 3)])
def test_points_and_few_draws_have_none(samples):
    assert mixing(Posterior(samples, torch.tensor([0]))) is None


@pytest.mark.parametrize("name", ["langevin", "underdamped"])
def test_a_chain_whose_steps_are_too_long_is_said_to_diverge_and_no_other_text(scaled, name):
    """Langevin's distance grows by |1 - s / v| in each step where s is above twice the posterior variance v."""
    program, batch = scaled([[0.3] * 4], [[0.01] * 4, [0.8] * 4, [0.7] * 4])
    scheme = SCHEMES[name](num_steps=16, num_chains=2, num_kept=8)
    posterior = scheme.posterior(infer(scheme, program, batch, SequenceNoise(0)), 16, SequenceNoise(0))
    terms = evaluate_draws(posterior, program, batch)
    assert diverged(posterior, terms, program, batch, SequenceNoise(0)).tolist() == [True, False, False]
    # One chain of several is enough, and so is a number that is none.
    good = posterior.samples[:, :, 1:]
    for value in (1e4, math.nan, math.inf):
        samples = good.clone()
        samples[1, :, 1, 0] = value
        spoilt = Posterior(samples, posterior.sequence_ids[1:])
        with pyro.validation_enabled(False):
            terms = evaluate_draws(spoilt, program, batch[1:])
            found = diverged(spoilt, terms, program, batch[1:], SequenceNoise(0))
        assert found.tolist() == [False, True]


@pytest.mark.parametrize("scale", [0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_exact_draws_of_a_posterior_have_not_diverged(scaled, mean, scale):
    """However sharp it is, and however far from the prior: these draws are of the closed form."""
    program, batch = scaled([[mean] * 4], [[scale] * 4] * 3)
    noise = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    posterior = Posterior(mean + scale * noise, batch.sequence_ids)
    terms = evaluate_draws(posterior, program, batch)
    assert not diverged(posterior, terms, program, batch, SequenceNoise(0)).any()


def test_chains_that_are_apart_have_not_mixed_and_not_diverged(scaled):
    program, batch = scaled([[0.0] * 4], [[0.5] * 4] * 3)
    noise = 0.1 * torch.randn(2, 20, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    posterior = Posterior(noise + torch.tensor([-0.5, 0.5]).view(2, 1, 1, 1), batch.sequence_ids)
    terms = evaluate_draws(posterior, program, batch)
    assert not diverged(posterior, terms, program, batch, SequenceNoise(0)).any()
    assert (mixing(posterior).largest_r_hat > HIGHEST_R_HAT).all()
