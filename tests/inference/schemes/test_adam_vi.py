"""Mean-field AdamVI: its optimum and its objective are known where the posterior is Gaussian."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from ltm_pyro.inference import BatchNoise, SequenceNoise, infer
from ltm_pyro.inference.schemes.adam_vi import AdamVI


@pytest.fixture
def world(linear_gaussian):
    return linear_gaussian.random(num_observed=6, num_latent=3, noise_scale=0.4)


def test_vi_converges_to_the_mean_field_optimum(linear_gaussian):
    """Mean of the posterior, variances 1 / Λ_ii, which are not those of the posterior, (Λ⁻¹)_ii."""
    world, _ = linear_gaussian.with_posterior_variances((0.05, 0.3, 0.8))
    num_fits = 256
    batch = world.sample(1)[torch.zeros(num_fits, dtype=torch.int64)]
    rng = BatchNoise(torch.Generator().manual_seed(0))
    state = AdamVI(epsilon=1e-8).init(world, batch, rng)
    for learning_rate, num_steps in ((0.1, 500), (0.02, 500), (learning_rate_at_the_end := 0.005, 1000)):
        scheme = AdamVI(learning_rate=learning_rate, epsilon=1e-8)
        mean, log_variance = torch.zeros(2, num_fits, 3, dtype=torch.float64)
        for step in range(num_steps):
            state, _ = scheme.step(world, state, batch, rng)
            if step >= num_steps // 2:
                mean += state.mean / (num_steps // 2)
                log_variance += 2 * state.log_scale / (num_steps // 2)
    # Fits differ by their noise alone, so their spread tells the error; Adam's own bias is of the order of its rate.
    for value, optimum in (
        (mean, world.posterior_mean(batch.x)[0]),
        (log_variance, -world.precision.diagonal().log()),
    ):
        standard_error = value.std(0) / math.sqrt(num_fits)
        assert ((value.mean(0) - optimum).abs() < 5 * standard_error + learning_rate_at_the_end).all()
    # The test can tell the optimum from the variances of the posterior.
    assert (world.precision.inverse().diagonal() * world.precision.diagonal() > 1.2).all()


def test_the_objective_of_a_step_is_an_unbiased_estimate_of_the_negative_elbo(world):
    num_draws = 20_000
    batch = world.sample(1)[torch.zeros(num_draws, dtype=torch.int64)]
    warm, scheme = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), AdamVI(initial_scale=0.3)
    rng = BatchNoise(torch.Generator().manual_seed(0))
    state = scheme.init(world, batch, rng, warm.expand(num_draws, 3))
    _, info = scheme.step(world, state, batch, rng)
    scale = torch.full((1, 3), 0.3, dtype=torch.float64)
    expected = world.expected_nll(warm[None], scale, batch.x[:1]) + world.kl(warm[None], scale)
    standard_error = (world.nll_variance(warm[None], scale, batch.x[:1]) / num_draws).sqrt()
    assert abs(info.objective.mean() - expected) < 5 * standard_error


@pytest.mark.parametrize("noise", ["fresh", "reused"])
def test_steps_are_those_of_torch_adam_on_the_reparameterised_elbo(world, recording, noise):
    batch, rng = world.sample(5), recording()
    scheme = AdamVI(20, learning_rate=0.2, epsilon=0.3, initial_scale=0.5, noise=noise)
    state = infer(scheme, world, batch, rng)
    mean = torch.nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))
    log_scale = torch.nn.Parameter(torch.full((5, 3), math.log(0.5), dtype=torch.float64))
    optimizer = torch.optim.Adam([mean, log_scale], lr=0.2, eps=0.3)
    draws = [numbers for _, numbers in rng.normals]
    for step in range(20):
        optimizer.zero_grad()
        scale = log_scale.exp()
        z = mean + scale * draws[0 if noise == "reused" else step]
        (world.neg_log_likelihood(z, batch.x) + world.kl(mean, scale)).sum().backward()
        optimizer.step()
    assert len(draws) == (1 if noise == "reused" else 20)
    assert torch.allclose(state.mean, mean.detach(), rtol=1e-9, atol=1e-12)
    assert torch.allclose(state.log_scale, log_scale.detach(), rtol=1e-9, atol=1e-12)


def test_every_step_draws_new_noise_and_every_later_use_noise_that_no_step_has_seen(world, recording):
    batch, rng, scheme = world.sample(5), recording(), AdamVI(num_steps=4)
    state = infer(scheme, world, batch, rng)
    guide = scheme.guide(world, state, batch, rng)
    for _ in range(2):
        guide()
    q = scheme.distribution(state, rng)
    for _ in range(3):
        q.rsample()
    scheme.posterior(state, 6, rng)
    numbers = torch.cat([numbers.flatten() for _, numbers in rng.normals])
    assert len(numbers) == (4 + 2 + 3 + 6) * 5 * 3
    assert len(numbers.unique()) == len(numbers)


def test_reused_noise_is_that_of_the_guide_but_never_of_the_bound(world):
    batch, rng = world.sample(5), SequenceNoise(0)
    scheme = AdamVI(num_steps=4, noise="reused")
    state = infer(scheme, world, batch, rng)
    guide = scheme.guide(world, state, batch, rng)
    at_the_fit = state.mean + state.log_scale.exp() * state.noise
    for _ in range(2):
        assert poutine.trace(guide).get_trace().nodes["z"]["value"].equal(at_the_fit)
    scale = state.log_scale.exp()
    for draw in (scheme.distribution(state, rng).rsample(), scheme.posterior(state, 1, rng).samples[0, 0]):
        assert not torch.isin((draw - state.mean) / scale, state.noise).any()


def test_only_with_fresh_noise_is_the_loss_a_bound():
    """What it is worth at reused noise is in test_bounds.py."""
    assert AdamVI(noise="fresh").loss_is_bound
    assert not AdamVI(noise="reused").loss_is_bound


class Three:
    """A batch of three of which nothing is observed."""

    sequence_ids = torch.arange(3)

    def __len__(self):
        return 3


def shifted_prior(batch):
    with pyro.plate("sequences", len(batch), dim=-1):
        pyro.sample("z", dist.Normal(torch.tensor([2.0, -3.0]).double(), 0.5).to_event(1))


def test_vi_starts_at_the_prior_or_where_it_is_told():
    state = AdamVI().init(shifted_prior, Three(), SequenceNoise(0))
    assert state.mean.tolist() == [[2, -3]] * 3
    assert torch.allclose(state.log_scale.exp(), torch.tensor(0.5, dtype=torch.float64), rtol=1e-15)
    warm = torch.randn(3, 2, dtype=torch.float64)
    state = AdamVI(initial_scale=0.1).init(shifted_prior, Three(), SequenceNoise(0), warm)
    assert state.mean.equal(warm)
    assert torch.allclose(state.log_scale.exp(), torch.tensor(0.05, dtype=torch.float64), rtol=1e-15)


@pytest.mark.parametrize("epsilon", [1e-8, 1.0])
def test_q_stays_exactly_at_the_prior_where_no_token_counts(ltm, texts, epsilon):
    nothing = texts.prefix(torch.zeros(5))
    state = infer(AdamVI(num_steps=8, learning_rate=0.3, epsilon=epsilon), ltm, nothing, SequenceNoise(0))
    assert state.mean.equal(torch.zeros_like(state.mean))
    assert state.log_scale.equal(torch.zeros_like(state.mean))


def test_the_guide_is_the_gaussian_of_the_state(world):
    batch, scheme, rng = world.sample(5), AdamVI(num_steps=4, learning_rate=0.3), SequenceNoise(0)
    state = infer(scheme, world, batch, rng)
    site = poutine.trace(scheme.guide(world, state, batch, rng)).get_trace(batch).nodes["z"]
    assert site["fn"].mean.equal(state.mean)
    assert site["fn"].stddev.equal(state.log_scale.exp())
    standardised = (site["value"] - state.mean) / state.log_scale.exp()
    log_density = (-0.5 * standardised.square() - state.log_scale - 0.5 * math.log(2 * math.pi)).sum(-1)
    assert torch.allclose(site["fn"].log_prob(site["value"]), log_density, rtol=1e-10)


@pytest.mark.parametrize("noise", ["fresh", "reused"])
def test_draws_have_the_mean_and_scale_of_q(world, noise):
    batch, rng, num_draws = world.sample(5), SequenceNoise(0), 5000
    scheme = AdamVI(num_steps=10, learning_rate=0.3, noise=noise)
    state = infer(scheme, world, batch, rng)
    samples = scheme.posterior(state, num_draws, rng).samples
    assert samples.shape == (1, num_draws, 5, 3)
    standardised = (samples[0] - state.mean) / state.log_scale.exp()
    assert (standardised.mean(0).abs() < 5 / math.sqrt(num_draws)).all()
    assert ((standardised.var(0) - 1).abs() < 5 * math.sqrt(2 / num_draws)).all()
    # Draws are independent of each other.
    neighbours = (standardised[1:] * standardised[:-1]).mean(0)
    assert (neighbours.abs() < 5 / math.sqrt(num_draws)).all()
