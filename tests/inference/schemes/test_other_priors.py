"""What every scheme keeps to under priors that are not N(0, I): another Gaussian, a mixture, one without moments."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ltm_pyro.inference import SCHEMES, BatchNoise, SequenceNoise, bounds, infer
from ltm_pyro.inference.schemes.vi import VI

NUM_STEPS = 5
CHAINS = [name for name, scheme in SCHEMES.items() if scheme.has_chains]


@pytest.mark.parametrize("name", SCHEMES)
def test_under_any_prior_a_sequence_depends_on_its_noise_alone(name, other_prior):
    scheme = SCHEMES[name](num_steps=NUM_STEPS)
    batch, rng, before = other_prior.sample(6), SequenceNoise(0), torch.random.get_rng_state()
    whole = infer(scheme, other_prior, batch, rng)
    index = torch.tensor([4, 0])
    for name, value in vars(infer(scheme, other_prior, batch[index], rng)).items():
        assert torch.allclose(value, getattr(whole[index], name), rtol=1e-12, atol=1e-12), name
    assert torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize("name", SCHEMES)
def test_under_any_prior_inference_explains_the_observations_better_than_the_prior(name, other_prior):
    """Averaged over 100 sequences, by more than half of what the exact posterior gains."""
    scheme = SCHEMES[name](num_steps=20)
    batch, rng = other_prior.sample(100), BatchNoise(torch.Generator().manual_seed(0))
    samples = scheme.posterior(infer(scheme, other_prior, batch, rng), scheme.num_draws or 1, rng).samples
    inferred = -other_prior.log_likelihood(samples, batch.x).mean()
    prior, exact = (nll.mean() for nll in other_prior.expected_nll(batch.x))
    assert inferred < (prior + exact) / 2


@pytest.mark.parametrize("name", SCHEMES)
def test_under_any_prior_the_bound_is_that_of_the_posterior_that_was_inferred(name, other_prior):
    """By quadrature, KL included; a scheme without a density has it through the Gaussian around its draws."""
    scheme, batch, rng = SCHEMES[name](num_steps=NUM_STEPS), other_prior.sample(3), SequenceNoise(0)
    state = infer(scheme, other_prior, batch, rng)
    if not scheme.has_density:
        scheme, state = bounds.gaussian_around(scheme, state, other_prior, batch, rng, VI(num_steps=5))
    q = scheme.distribution(state, rng)
    log_q, log_prior = q.log_prob(other_prior.grid.expand(-1, 3, -1)), other_prior.log_prior(other_prior.grid)
    assert torch.allclose(other_prior.integral(log_q.exp()), torch.ones(3, dtype=torch.float64), atol=1e-6)
    kl = other_prior.integral(log_q.exp() * (log_q - log_prior))
    nll = other_prior.integral(-log_q.exp() * other_prior.log_likelihood(other_prior.grid, batch.x))
    assert (nll + kl > other_prior.neg_log_evidence(batch.x)).all()
    estimate = bounds.elbo(other_prior, batch, q, 200)
    assert ((estimate.nelbo - nll - kl).abs() < 5 * estimate.monte_carlo_standard_error).all()
    # The standard error of the KL's estimate is at most that of a log density ratio of some nats.
    assert ((estimate.kl - kl).abs() < 5 * 4 / math.sqrt(200)).all()
    assert (estimate.monte_carlo_standard_error < 0.5).all()


@pytest.mark.parametrize("name", CHAINS)
def test_chains_start_at_draws_of_the_prior(name, other_prior):
    """Two thousand of them: their mean and their density, which tells a mixture from a Gaussian with its moments."""
    batch, rng, scheme = other_prior.sample(2), SequenceNoise(0), SCHEMES[name](num_steps=0, num_chains=2000)
    starts = scheme.posterior(infer(scheme, other_prior, batch, rng), 2000, rng).samples[:, 0]
    prior = other_prior.log_prior(other_prior.grid).exp()
    for values, on_grid in (
        (starts[..., 0], other_prior.grid[..., 0]),
        (starts[..., 1], other_prior.grid[..., 1]),
        (other_prior.log_prior(starts), other_prior.log_prior(other_prior.grid)),
    ):
        expected = other_prior.integral(prior * on_grid)
        assert ((values.mean(0) - expected).abs() < 5 * values.std(0) / math.sqrt(2000)).all()
    # Different sequences start at different draws.
    assert not starts[:, 0].equal(starts[:, 1])


def cauchy(batch):
    """Its prior has neither a mean nor a standard deviation."""
    with pyro.plate("sequences", len(batch), dim=-1):
        z = pyro.sample("z", dist.Cauchy(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(torch.cat([z, z], -1), 0.7).to_event(1), obs=batch.x)


cauchy.encode = lambda batch: (batch.x[:, :3], torch.zeros_like(batch.x[:, :3]))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_prior_without_moments_serves_chains_and_is_refused_by_the_others(name, observations):
    batch, rng = observations(torch.ones(2, 6, dtype=torch.float64), torch.arange(2)), SequenceNoise(0)
    scheme = SCHEMES[name](num_steps=3)
    if scheme.has_chains:
        assert infer(scheme, cauchy, batch, rng).z.isfinite().all()
    else:
        with pytest.raises(ValueError, match="no mean and standard deviation"):
            infer(scheme, cauchy, batch, rng)
