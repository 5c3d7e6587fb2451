"""Annealed importance sampling against the exact evidence of linear-Gaussian worlds."""

from __future__ import annotations

import math

import pytest
import torch

from ltm_pyro.inference import SequenceNoise, infer
from ltm_pyro.inference.ais import forward_ais, pilot, reverse_ais
from ltm_pyro.inference.schemes.lowrank import LowRank
from ltm_pyro.inference.schemes.vi import VI

NUM_CHAINS = 8
NUM_TEXTS = 40


def simulated(linear_gaussian, num_observed, num_latent, num_texts=NUM_TEXTS):
    """A world, texts of it with the exact -log p(x) of each, and the z that made them."""
    world = linear_gaussian.random(num_observed=num_observed, num_latent=num_latent, noise_scale=0.7)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(num_texts, num_latent, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_texts, num_observed, generator=generator, dtype=torch.float64)
    batch = world.sample(num_texts)
    batch = type(batch)(z @ world.loadings.T + world.noise_scale * noise, batch.sequence_ids)
    return world, batch, world.neg_log_evidence(batch.x), z


def both_sides(world, batch, z, num_temperatures, num_fast_steps):
    """Estimates of -log p(x) from above and from below, [B] each."""
    scheme = VI(num_steps=num_fast_steps)
    q = scheme.distribution(infer(scheme, world, batch, SequenceNoise(1)), SequenceNoise(1))
    plan = pilot(world, batch, q, SequenceNoise(2), num_temperatures, num_leapfrogs=5, num_chains=NUM_CHAINS)
    forward = forward_ais(world, batch, q, plan, SequenceNoise(3)).log_weights
    reverse = reverse_ais(world, batch, q, plan, z, SequenceNoise(4)).log_weights
    log_chains = math.log(NUM_CHAINS)
    return -(forward.logsumexp(0) - log_chains), (-reverse).logsumexp(0) - log_chains


@pytest.mark.parametrize(("num_observed", "num_latent"), [(6, 4), (24, 12), (8, 32)])
@pytest.mark.parametrize("num_fast_steps", [0, 50])
def test_the_two_sides_bracket_the_exact_value_and_close_in_on_it(
    linear_gaussian, num_observed, num_latent, num_fast_steps
):
    world, batch, exact, z = simulated(linear_gaussian, num_observed, num_latent)
    gaps = []
    for num_temperatures in (3, 20):
        upper, lower = both_sides(world, batch, z, num_temperatures, num_fast_steps)
        above, below = upper - exact, exact - lower
        assert above.mean() > -3 * above.std() / math.sqrt(NUM_TEXTS)
        assert below.mean() > -3 * below.std() / math.sqrt(NUM_TEXTS)
        gaps.append(upper - lower)
    if num_fast_steps == 0:  # From a q that is near the posterior there is no gap left to close.
        closed = gaps[0] - gaps[1]
        assert closed.mean() > 3 * closed.std() / math.sqrt(NUM_TEXTS)


def test_the_weights_are_unbiased(linear_gaussian):
    """E[w] = p(x), in probability and not only in its logarithm: from few temperatures, with many chains."""
    world, batch, exact, _ = simulated(linear_gaussian, 6, 4, num_texts=4)
    scheme = VI(num_steps=50)
    q = scheme.distribution(infer(scheme, world, batch, SequenceNoise(1)), SequenceNoise(1))
    plan = pilot(world, batch, q, SequenceNoise(2), num_temperatures=10, num_leapfrogs=3, num_chains=4000)
    weights = (forward_ais(world, batch, q, plan, SequenceNoise(3)).log_weights + exact).exp()
    assert ((weights.mean(0) - 1).abs() < 5 * weights.std(0) / math.sqrt(4000)).all()


def test_one_temperature_is_importance_sampling_from_q(linear_gaussian):
    """With a single step from q to the posterior no transition is made, and w = p(x, z) / q(z)."""
    world, batch, _, z = simulated(linear_gaussian, 6, 4, num_texts=4)
    scheme = VI(num_steps=0)
    q = scheme.distribution(infer(scheme, world, batch, SequenceNoise(1)), SequenceNoise(1))
    plan = pilot(world, batch, q, SequenceNoise(2), num_temperatures=1, num_leapfrogs=1, num_chains=2)
    weights = reverse_ais(world, batch, q, plan, z, SequenceNoise(4)).log_weights
    # q is the prior here, so the weight is the likelihood of z.
    assert torch.allclose(weights, -world.neg_log_likelihood(z, batch.x).expand(2, 4), rtol=1e-10)


def test_chains_start_at_draws_of_q_with_its_correlations(linear_gaussian):
    """From a q whose dimensions are strongly correlated, with a single step: E[w] = p(x) for draws of q alone."""
    world, _ = linear_gaussian.with_posterior_variances([0.9, 0.5, 0.05])
    batch = world.sample(4)
    scheme = LowRank(num_steps=200)
    q = scheme.distribution(infer(scheme, world, batch, SequenceNoise(1)), SequenceNoise(1))
    plan = pilot(world, batch, q, SequenceNoise(2), num_temperatures=1, num_leapfrogs=1, num_chains=20_000)
    weights = (forward_ais(world, batch, q, plan, SequenceNoise(3)).log_weights + world.neg_log_evidence(batch.x)).exp()
    assert ((weights.mean(0) - 1).abs() < 5 * weights.std(0) / math.sqrt(20_000)).all()
    assert weights.std(0).max() < 1


def test_a_plan_rises_from_zero_to_one_and_its_steps_are_accepted(linear_gaussian):
    world, batch, _, _ = simulated(linear_gaussian, 6, 4, num_texts=1)
    scheme = VI(num_steps=100)
    q = scheme.distribution(infer(scheme, world, batch, SequenceNoise(1)), SequenceNoise(1))
    plan = pilot(world, batch, q, SequenceNoise(2), num_temperatures=20, num_leapfrogs=5, num_chains=NUM_CHAINS)
    assert (plan.betas.diff(dim=0) > 0).all()
    assert (plan.betas[0] == 0).all()
    assert (plan.betas[-1] == 1).all()
    assert (forward_ais(world, batch, q, plan, SequenceNoise(3)).acceptance > 0.5).all()


def test_what_a_text_is_given_does_not_depend_on_its_batch(linear_gaussian):
    world, batch, _, z = simulated(linear_gaussian, 6, 4, num_texts=6)
    upper, lower = both_sides(world, batch, z, 8, 10)
    part = torch.tensor([4, 1])
    upper_part, lower_part = both_sides(world, batch[part], z[part], 8, 10)
    assert torch.allclose(upper[part], upper_part, rtol=1e-9)
    assert torch.allclose(lower[part], lower_part, rtol=1e-9)
