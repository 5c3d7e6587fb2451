"""The structured Gaussian: its density and KL against the full covariance written out, its optimum in closed form."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from ltm_pyro.inference import SequenceNoise, bounds, infer
from ltm_pyro.inference.adam_vi import AdamVI
from ltm_pyro.inference.lowrank import LowRank, LowRankNormal

B, EVENT, D, RANK = 3, (2, 1, 3), 6, 2


@pytest.fixture
def q() -> LowRankNormal:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def draw(outer: torch.Size) -> torch.Tensor:
        return normal(*outer, B, D + RANK)

    return LowRankNormal(normal(B, *EVENT), normal(B, *EVENT).exp(), normal(B, D, RANK), len(EVENT), draw)


def written_out(q: LowRankNormal) -> MultivariateNormal:
    covariance = q.factor @ q.factor.transpose(-1, -2) + torch.diag_embed(q.scale.flatten(1).square())
    return MultivariateNormal(q.mean.flatten(1), covariance)


def test_density_variance_and_kl_are_those_of_the_covariance_written_out(q):
    full = written_out(q)
    value = torch.randn(5, B, *EVENT, dtype=torch.float64)
    assert (q.batch_shape, q.event_shape) == ((B,), EVENT)
    assert torch.allclose(q.log_prob(value), full.log_prob(value.flatten(2)))
    assert torch.allclose(q.variance.flatten(1), full.variance)
    prior_mean, prior_scale = torch.randn(EVENT, dtype=torch.float64), torch.rand(EVENT, dtype=torch.float64) + 0.5
    prior = Independent(Normal(prior_mean, prior_scale).expand((B, *EVENT)), 3)
    expected = kl_divergence(full, MultivariateNormal(prior_mean.flatten(), torch.diag(prior_scale.flatten().square())))
    assert torch.allclose(kl_divergence(q, prior), expected)


def test_draws_have_that_mean_and_covariance(q):
    """20,000 draws: an entry of the covariance has a standard error of at most √2 of the largest variance / √20,000."""
    draws = q.rsample((20_000,)).flatten(2)
    full = written_out(q)
    largest = full.variance.max().item()
    assert (draws.mean(0) - full.mean).abs().max() < 5 * math.sqrt(largest / 20_000)
    centred = draws - draws.mean(0)
    covariance = torch.einsum("nbi,nbj->bij", centred, centred) / len(draws)
    assert (covariance - full.covariance_matrix).abs().max() < 5 * math.sqrt(2 / 20_000) * largest


def test_outer_plates_expand_it(q):
    outer = q.expand((4, B))
    assert outer.batch_shape == (4, B)
    assert outer.rsample().shape == (4, B, *EVENT)
    value = torch.randn(4, B, *EVENT, dtype=torch.float64)
    assert torch.allclose(outer.log_prob(value), q.log_prob(value))


def test_a_full_rank_reaches_the_posterior_where_a_diagonal_cannot(linear_gaussian):
    """On a linear-Gaussian world the posterior is such a Gaussian, so the bound becomes exact."""
    world, _ = linear_gaussian.with_posterior_variances([0.9, 0.5, 0.05])
    batch = world.sample(20)
    exact = world.neg_log_evidence(batch.x)
    rng = SequenceNoise(0)
    excess = {}
    for name, scheme in (
        ("diagonal", AdamVI(num_steps=600, learning_rate=0.05, epsilon=1e-8)),
        ("low rank", LowRank(num_steps=600, rank=2, learning_rate=0.05, epsilon=1e-8)),
    ):
        state = infer(scheme, world, batch, rng)
        estimate = bounds.elbo(world, batch, scheme.distribution(state, rng), 400)
        excess[name] = (estimate.nelbo - exact).mean().item()
        error = estimate.monte_carlo_standard_error.square().sum().sqrt().item() / 20
        assert excess[name] > -5 * error
    # Of the best diagonal Gaussian: KL(q ‖ posterior) = ½ Σ log Λ_ii - ½ log |Λ|.
    precision = world.precision
    best = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()
    assert best > 0.3
    assert excess["diagonal"] > 0.9 * best
    assert excess["low rank"] < 0.3 * best


def test_the_objective_of_a_step_is_an_unbiased_estimate_of_the_negative_elbo(linear_gaussian):
    world = linear_gaussian.random(num_observed=4, num_latent=3, noise_scale=0.7)
    batch = world.sample(1)
    scheme = LowRank(num_steps=5, rank=2)
    state = infer(scheme, world, batch, SequenceNoise(0))
    copies = 4000
    many = type(batch)(batch.x.expand(copies, -1), torch.arange(copies))
    states = {name: value.expand(copies, *value.shape[1:]) for name, value in vars(state).items()}
    repeated = type(state)(**{**states, "sequence_ids": many.sequence_ids})
    objective = scheme.step(world, repeated, many, SequenceNoise(1))[1].objective
    q = scheme.distribution(state, SequenceNoise(2))
    full = MultivariateNormal(q.mean, q.factor @ q.factor.transpose(-1, -2) + torch.diag_embed(q.scale.square()))
    residual = batch.x - q.mean @ world.loadings.T
    spread = torch.einsum("oi,bij,oj->b", world.loadings, full.covariance_matrix, world.loadings)
    nll = 0.5 * (residual.square().sum(-1) + spread) / world.noise_scale**2
    nll = nll + 0.5 * 4 * math.log(2 * math.pi * world.noise_scale**2)
    prior = MultivariateNormal(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    expected = (nll + kl_divergence(full, prior)).item()
    assert abs(objective.mean() - expected) < 5 * objective.std() / math.sqrt(copies)


@pytest.mark.parametrize(("name", "value"), [("rank", 0), ("learning_rate", 0.0), ("epsilon", -1.0)])
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(LowRank(), **{name: value})
