"""Figures against closed forms."""

import dataclasses
import itertools
import math

import pyro
import pytest
import torch

from ltm_pyro.inference import BatchNoise, SequenceNoise, bounds, infer
from ltm_pyro.inference.schemes.adam_vi import AdamVI
from ltm_pyro.inference.schemes.langevin import Langevin
from ltm_pyro.inference.schemes.map import MAP


def batch_noise(seed=0):
    return BatchNoise(torch.Generator().manual_seed(seed))


@pytest.fixture
def world(linear_gaussian):
    return linear_gaussian.random(num_observed=6, num_latent=3, noise_scale=0.7)


def fitted(world, batch, num_steps=20):
    """A scheme and its state, q somewhere between the prior and its optimum."""
    scheme = AdamVI(num_steps, learning_rate=0.2, epsilon=1e-8)
    return scheme, infer(scheme, world, batch, SequenceNoise(0))


# --- the ELBO


def test_the_elbo_is_the_mean_of_the_formula_at_its_draws(world, recording):
    batch, rng = world.sample(5), recording(1)
    scheme, state = fitted(world, batch)
    estimate = bounds.elbo(world, batch, scheme.distribution(state, rng), num_samples=64)
    scale = state.log_scale.exp()
    noise = torch.stack([numbers for _, numbers in rng.normals])
    assert noise.shape == (64, 5, 3)
    nll = world.neg_log_likelihood(state.mean + scale * noise, batch.x)
    assert torch.allclose(estimate.nll, nll.mean(0), rtol=1e-10)
    assert torch.allclose(estimate.kl, world.kl(state.mean, scale), rtol=1e-10)
    assert torch.allclose(estimate.nelbo, nll.mean(0) + world.kl(state.mean, scale), rtol=1e-10)
    standard_error = (nll.var(0, unbiased=True) / 64).sqrt()
    assert torch.allclose(estimate.monte_carlo_standard_error, standard_error, rtol=1e-8)


@pytest.mark.parametrize("num_steps", [0, 5, 60])
def test_the_elbo_is_within_its_error_of_the_closed_form_and_above_the_exact_evidence(world, num_steps):
    batch = world.sample(100)
    scheme, state = fitted(world, batch, num_steps)
    estimate = bounds.elbo(world, batch, scheme.distribution(state, SequenceNoise(1)), num_samples=256)
    scale = state.log_scale.exp()
    exact_nll = world.expected_nll(state.mean, scale, batch.x)
    error = (world.nll_variance(state.mean, scale, batch.x) / 256).sqrt()
    assert ((estimate.nll - exact_nll).abs() < 5 * error).all()
    assert (estimate.nelbo > world.neg_log_evidence(batch.x) - 5 * error).all()
    # Over all sequences, the errors average out.
    assert abs((estimate.nll - exact_nll).mean()) < 5 * error.square().sum().sqrt() / 100


def test_the_best_mean_field_bound_is_that_of_the_closed_form(linear_gaussian):
    """VI's q, from the fit to the figure: no part of the formula comes from the package."""
    world, _ = linear_gaussian.with_posterior_variances((0.05, 0.3, 0.8))
    batch, rng = world.sample(20), batch_noise()
    state = AdamVI(epsilon=1e-8).init(world, batch, rng)
    for learning_rate in (0.1, 0.02, 0.005):
        scheme = AdamVI(learning_rate=learning_rate, epsilon=1e-8)
        for _ in range(500):
            state, _ = scheme.step(world, state, batch, rng)
    estimate = bounds.elbo(world, batch, scheme.distribution(state, rng), num_samples=256)
    mean, scale = world.posterior_mean(batch.x), world.precision.diagonal().rsqrt().expand(20, 3)
    best = world.expected_nll(mean, scale, batch.x) + world.kl(mean, scale)
    error = (world.nll_variance(mean, scale, batch.x) / 256).sqrt()
    # At its optimum the bound is flat: a q that is off by 5 % of its scale in three dimensions is 3 · 0.05² nats worse.
    assert ((estimate.nelbo - best).abs() < 5 * error + 3 * 0.05**2).all()
    assert (best > world.neg_log_evidence(batch.x) + 0.1).all()


def test_the_standard_error_is_the_spread_of_repeated_estimates(world):
    """Four thousand estimates from 16 draws each, of the same text."""
    num_repeats = 4000
    batch = world.sample(1)[torch.zeros(num_repeats, dtype=torch.int64)]
    scheme = AdamVI(initial_scale=0.5)
    state = scheme.init(world, batch, batch_noise(), torch.tensor([0.5, -1.0, 0.3]).double().expand(num_repeats, 3))
    estimate = bounds.elbo(world, batch, scheme.distribution(state, batch_noise()), num_samples=16)
    exact = world.nll_variance(state.mean[:1], state.log_scale[:1].exp(), batch.x[:1]).item() / 16
    # Both are means over the repeats, the first of squared deviations.
    for squares in (
        (estimate.nelbo - estimate.nelbo.mean()).square(),
        estimate.monte_carlo_standard_error.square(),
    ):
        assert abs(squares.mean() - exact) < 5 * squares.std() / math.sqrt(num_repeats)


def test_of_a_single_draw_the_error_is_unknown(world):
    batch = world.sample(5)
    scheme, state = fitted(world, batch)
    estimate = bounds.elbo(world, batch, scheme.distribution(state, SequenceNoise(1)), num_samples=1)
    assert estimate.nelbo.isfinite().all()
    assert estimate.monte_carlo_standard_error.isnan().all()


def test_the_elbo_of_the_prior_has_no_kl_and_the_likelihood_of_random_thoughts(world):
    batch = world.sample(50)
    scheme, state = fitted(world, batch, num_steps=0)
    estimate = bounds.elbo(world, batch, scheme.distribution(state, SequenceNoise(1)), num_samples=64)
    assert estimate.kl.tolist() == [0] * 50
    assert estimate.nelbo.equal(estimate.nll)


@pytest.mark.parametrize("weight", [0.5, 4.0, -1.0, math.nan])
def test_figures_refuse_positions_that_are_weighted(ltm, texts, weight):
    scheme = AdamVI(num_steps=1, noise="reused")
    state = infer(scheme, ltm, texts, SequenceNoise(0))
    weights = texts.weights.clone()
    weights[1, 2] = weight
    weighted = texts.with_weights(weights)
    with pytest.raises(ValueError, match="weights"):
        bounds.elbo(ltm, weighted, scheme.distribution(state, SequenceNoise(0)), num_samples=2)
    with pytest.raises(ValueError, match="weights"):
        bounds.iwae(ltm, weighted, scheme.distribution(state, SequenceNoise(0)), num_samples=2)
    with pytest.raises(ValueError, match="weights"):
        bounds.reused_noise(ltm, weighted, scheme, state)


@pytest.mark.parametrize("figure", [bounds.elbo, bounds.iwae])
def test_figures_need_a_draw(world, figure):
    batch = world.sample(5)
    scheme, state = fitted(world, batch)
    with pytest.raises(ValueError, match="draw"):
        figure(world, batch, scheme.distribution(state, SequenceNoise(0)), num_samples=0)


def test_figures_leave_weights_gradients_store_and_generator_alone(ltm, texts):
    for number, weight in enumerate(ltm.parameters()):
        weight.grad = torch.full_like(weight, number + 0.5)
    before = torch.random.get_rng_state()
    rng, scheme = SequenceNoise(0), AdamVI(num_steps=2, noise="reused")
    state = infer(scheme, ltm, texts, rng)
    figures = [
        bounds.elbo(ltm, texts, scheme.distribution(state, rng), num_samples=2),
        bounds.reused_noise(ltm, texts, scheme, state),
    ]
    weights = bounds.iwae(ltm, texts, scheme.distribution(state, rng), num_samples=2)
    point = infer(MAP(num_steps=2), ltm, texts, rng)
    bounds.gaussian_around(MAP(), point, ltm, texts, rng, AdamVI(num_steps=2))
    for number, weight in enumerate(ltm.parameters()):
        assert (weight.grad == number + 0.5).all()
        assert weight.requires_grad
    assert ltm.training
    assert not any(figure.nelbo.requires_grad for figure in figures)
    assert not weights.log_weights.requires_grad
    assert torch.random.get_rng_state().equal(before)
    assert len(pyro.get_param_store()) == 0


# --- the importance-weighted bound


def test_importance_weights_are_those_of_the_formula_at_their_draws(world, recording):
    batch, rng = world.sample(5), recording(1)
    scheme, state = fitted(world, batch)
    weights = bounds.iwae(world, batch, scheme.distribution(state, rng), num_samples=64)
    noise = torch.stack([numbers for _, numbers in rng.normals])
    assert noise.shape == (64, 5, 3)
    z = state.mean + state.log_scale.exp() * noise
    log_q = (-0.5 * noise.square() - state.log_scale - 0.5 * math.log(2 * math.pi)).sum(-1)
    expected = -world.neg_log_likelihood(z, batch.x) - world.neg_log_prior(z) - log_q
    assert torch.allclose(weights.log_weights, expected, rtol=1e-10)
    assert torch.allclose(weights.nats, -expected.exp().mean(0).log(), rtol=1e-10)


def test_importance_weights_from_the_exact_posterior_are_all_the_evidence(linear_gaussian):
    """Orthogonal loadings: the posterior is a mean-field one, and the one draw of q is enough."""
    world = linear_gaussian(torch.diag(torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)), noise_scale=0.7)
    batch, scheme = world.sample(20), AdamVI()
    state = scheme.init(world, batch, SequenceNoise(0), world.posterior_mean(batch.x))
    posterior = dataclasses.replace(state, log_scale=-0.5 * world.precision.diagonal().log().expand(20, 3))
    weights = bounds.iwae(world, batch, scheme.distribution(posterior, SequenceNoise(0)), num_samples=4)
    assert torch.allclose(-weights.log_weights, world.neg_log_evidence(batch.x).expand(4, 20), rtol=1e-10)


def test_the_importance_weighted_bound_is_above_the_evidence_and_tighter_than_the_elbo(world):
    batch = world.sample(400)
    scheme, state = fitted(world, batch, num_steps=10)
    exact = world.neg_log_evidence(batch.x)
    gaps = []
    for num_samples in (1, 4, 64):
        q = scheme.distribution(state, SequenceNoise(num_samples))
        excess = bounds.iwae(world, batch, q, num_samples).nats - exact
        gap, error = excess.mean(), excess.std() / math.sqrt(len(excess))
        assert gap > -5 * error
        gaps.append((gap, error))
    for (loose, error), (tight, other_error) in itertools.pairwise(gaps):
        assert loose > tight + 5 * math.hypot(error, other_error)


# --- the reference's figure


def test_the_figure_at_reused_noise_is_the_formula_there(world):
    batch, scheme = world.sample(5), AdamVI(20, learning_rate=0.2, epsilon=1e-8, noise="reused")
    state = infer(scheme, world, batch, SequenceNoise(0))
    figure = bounds.reused_noise(world, batch, scheme, state)
    scale = state.log_scale.exp()
    assert torch.allclose(figure.nll, world.neg_log_likelihood(state.mean + scale * state.noise, batch.x), rtol=1e-10)
    assert torch.allclose(figure.kl, world.kl(state.mean, scale), rtol=1e-10)
    assert figure.monte_carlo_standard_error.isnan().all()


@pytest.mark.parametrize("noise_scale", [1.0, 0.1])
def test_the_figure_at_reused_noise_falls_below_the_exact_evidence_where_the_bound_does_not(
    linear_gaussian, noise_scale
):
    """Of 64 numbers explained by 512, T = 64 steps: below -log p(x) for every datum, with the very same q."""
    world = linear_gaussian.random(num_observed=64, num_latent=512, noise_scale=noise_scale)
    batch = world.sample(20)
    scheme = AdamVI(64, learning_rate=0.3, epsilon=1e-8, initial_scale=math.exp(-2.5), noise="reused")
    state = infer(scheme, world, batch, SequenceNoise(0))
    exact = world.neg_log_evidence(batch.x)
    assert (bounds.reused_noise(world, batch, scheme, state).nelbo < exact - 5).all()
    estimate = bounds.elbo(world, batch, scheme.distribution(state, SequenceNoise(0)), num_samples=64)
    assert (estimate.nelbo > exact + 5 * estimate.monte_carlo_standard_error).all()


def test_there_is_no_noise_to_reuse_where_it_was_fresh(world):
    batch = world.sample(5)
    scheme, state = fitted(world, batch)
    with pytest.raises(ValueError, match="reused"):
        bounds.reused_noise(world, batch, scheme, state)


# --- a Gaussian around points and draws


FIT = AdamVI(num_steps=600, learning_rate=0.01, epsilon=1e-8, initial_scale=0.5)


def test_a_gaussian_around_map_is_near_the_mean_field_optimum(linear_gaussian):
    world, _ = linear_gaussian.with_posterior_variances((0.05, 0.3, 0.8))
    batch, rng = world.sample(50), SequenceNoise(0)
    scheme = MAP(1000, learning_rate=0.5)
    point = infer(scheme, world, batch, rng)
    gaussian, q = bounds.gaussian_around(scheme, point, world, batch, rng, FIT)
    assert q.mean.equal(point.z)
    mean, scale = world.posterior_mean(batch.x), world.precision.diagonal().rsqrt().expand(50, 3)
    best = world.expected_nll(mean, scale, batch.x) + world.kl(mean, scale)
    estimate = bounds.elbo(world, batch, gaussian.distribution(q, rng), num_samples=256)
    error = estimate.monte_carlo_standard_error
    assert (estimate.nelbo > world.neg_log_evidence(batch.x) - 5 * error).all()
    # The scales end within a fifth of the best ones, as Adam's noise has it: 0.2² nats a dimension above the optimum.
    assert ((q.log_scale - scale.log()).abs() < 0.2).all()
    assert ((estimate.nelbo - best).abs() < 5 * error + 3 * 0.2**2).all()


def test_a_gaussian_around_draws_is_centred_on_their_mean_and_is_a_bound(world):
    batch, rng = world.sample(50), SequenceNoise(0)
    scheme = Langevin(num_steps=50, step_size=0.05, num_chains=4)
    state = infer(scheme, world, batch, rng)
    gaussian, q = bounds.gaussian_around(scheme, state, world, batch, rng, FIT)
    assert torch.allclose(q.mean, state.z.mean(1), rtol=1e-12)
    estimate = bounds.elbo(world, batch, gaussian.distribution(q, rng), num_samples=256)
    error = estimate.monte_carlo_standard_error
    assert (estimate.nelbo > world.neg_log_evidence(batch.x) - 5 * error).all()
    # It is worth something: better than the prior, by nats.
    zero = torch.zeros(50, 3, dtype=torch.float64)
    assert estimate.nelbo.mean() < world.expected_nll(zero, zero + 1, batch.x).mean() - 1


def test_the_scales_around_draws_are_fitted_with_noise_that_the_draws_have_not_seen(world, recording):
    batch, scheme = world.sample(5), Langevin(num_steps=10, step_size=0.05)
    rng = recording()
    state = infer(scheme, world, batch, rng)
    of_the_draws = torch.cat([numbers.flatten() for _, numbers in rng.normals])
    rng = recording()
    bounds.gaussian_around(scheme, state, world, batch, rng, AdamVI(num_steps=10))
    of_the_fit = torch.cat([numbers.flatten() for _, numbers in rng.normals])
    assert len(of_the_fit) == 10 * 5 * 3
    assert not torch.isin(of_the_fit, of_the_draws).any()


def test_a_step_that_fails_leaves_the_gaussian_of_its_sequence_as_it_was(world, failing):
    batch, rng, scheme = world.sample(4), SequenceNoise(0), MAP(num_steps=10)
    point = infer(scheme, world, batch, rng)
    fit = AdamVI(num_steps=10, learning_rate=0.2)
    _, healthy = bounds.gaussian_around(scheme, point, world, batch, rng, fit)
    model = failing(world, "nan", bad_ids=(1,), bad_evaluations=(4,))
    _, q = bounds.gaussian_around(scheme, point, model, batch, rng, fit)
    assert q.log_scale.isfinite().all()
    assert q.log_scale[[0, 2, 3]].equal(healthy.log_scale[[0, 2, 3]])
    assert q.num_skipped.tolist() == [0, 1, 0, 0]
