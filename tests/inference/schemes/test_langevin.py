"""Unadjusted Langevin: it has a stationary distribution of its own, and a step size at which it diverges."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from ltm_pyro.inference import BatchNoise, SequenceNoise, infer
from ltm_pyro.inference.schemes.langevin import Langevin

VARIANCES = (0.12, 0.25, 0.5)
"""Of the posterior, along the axes of its rotation."""


@pytest.fixture
def rotated(linear_gaussian):
    """The model with these variances, and the rotation."""
    return linear_gaussian.with_posterior_variances(VARIANCES)


def generator_noise(seed=0):
    return BatchNoise(torch.Generator().manual_seed(seed))


def test_chains_have_the_stationary_moments_of_the_discretised_chain(rotated):
    """Mean as the posterior; along each axis the variance v / (1 - s / 2v), which is well above v."""
    model, rotation = rotated
    step_size, num_chains, num_sequences = 0.16, 10_000, 2
    batch = model.sample(num_sequences)
    # The slowest axis forgets its start by 1 - 0.16 / 0.5 a step: after 60 of them 1e-10 is left.
    scheme = Langevin(num_steps=60, step_size=step_size, num_chains=num_chains)
    z = infer(scheme, model, batch, generator_noise()).z
    deviations = (z - model.posterior_mean(batch.x)[:, None]) @ rotation
    v = torch.tensor(VARIANCES, dtype=torch.float64)
    stationary = v / (1 - step_size / (2 * v))

    error_of_mean = deviations.mean(1) / (stationary / num_chains).sqrt()
    assert (error_of_mean.abs() < 5).all()
    covariance = deviations.flatten(0, 1).T @ deviations.flatten(0, 1) / (num_sequences * num_chains)
    spread = (torch.outer(stationary, stationary) * (1 + torch.eye(3)) / (num_sequences * num_chains)).sqrt()
    assert ((covariance - stationary.diag()).abs() < 5 * spread).all()
    # The test can tell that from the variance of the posterior itself.
    assert ((stationary - v) > 10 * spread.diagonal()).all()


def test_in_the_scales_of_q_chains_have_the_stationary_covariance_of_the_scaled_chain(rotated):
    """Of z ← z - s P Λ (z - mean) + √(2 s P) ε with P = diag(σ²): the S of S = (I - s P Λ) S (I - s P Λ)ᵀ + 2 s P."""
    model, _ = rotated
    step_size, num_chains = 0.5, 10_000
    batch = model.sample(2)
    scheme = Langevin(num_steps=60, step_size=step_size, num_chains=num_chains, vi_steps=50)
    state = infer(scheme, model, batch, generator_noise())
    for z, scale, mean in zip(state.z, state.scale, model.posterior_mean(batch.x), strict=True):
        metric = scale.square().diag()
        keep = torch.eye(3) - step_size * metric @ model.precision
        stationary = 2 * step_size * metric
        for _ in range(20):  # S = Σ_k A^k (2 s P) (A^k)ᵀ, twice as many terms each time
            stationary, keep = stationary + keep @ stationary @ keep.T, keep @ keep
        variances = stationary.diagonal()
        assert ((z.mean(0) - mean).abs() < 5 * (variances / num_chains).sqrt()).all()
        covariance = (z - mean).T @ (z - mean) / num_chains
        spread = ((torch.outer(variances, variances) + stationary.square()) / num_chains).sqrt()
        assert ((covariance - stationary).abs() < 5 * spread).all()
        # The test can tell that from the covariance of the posterior itself.
        assert ((stationary - model.precision.inverse()).diagonal() > 10 * spread.diagonal()).any()


def test_chains_diverge_where_the_step_size_is_above_twice_a_posterior_variance(rotated):
    model, rotation = rotated
    batch = model.sample(2)

    def distance(step_size):
        scheme = Langevin(num_steps=200, step_size=step_size, num_chains=50)
        z = infer(scheme, model, batch, generator_noise()).z
        return ((z - model.posterior_mean(batch.x)[:, None]) @ rotation)[..., 0].square().mean().sqrt()

    # A step multiplies the distance by |1 - s / v|: by 1.083 above twice the smallest variance, 0.24, 0.917 below.
    assert distance(0.26) > 0.26 * (0.26 / 0.12 - 1) ** 190
    stationary = math.sqrt(0.12 / (1 - 0.22 / 0.24))
    # One hundred chains: the relative error of their spread is 1 / sqrt(200).
    assert abs(distance(0.22) / stationary - 1) < 5 / math.sqrt(200)


def test_a_step_is_the_gradient_of_the_log_joint_and_noise_of_twice_the_step_size(rotated, recording):
    model, _ = rotated
    batch, rng = model.sample(4), recording()
    scheme = Langevin(num_steps=1, step_size=0.07, num_chains=3)
    state = scheme.init(model, batch, rng)
    new, info = scheme.step(model, state, batch, rng)
    (_, noise) = rng.normals[-1]
    mean = model.posterior_mean(batch.x)[:, None]
    expected = state.z - 0.07 * (state.z - mean) @ model.precision + math.sqrt(0.14) * noise.transpose(0, 1)
    assert torch.allclose(new.z, expected, rtol=1e-12)
    x = batch.x[:, None]
    objective = (model.neg_log_likelihood(state.z, x) + model.neg_log_prior(state.z)).mean(1)
    assert torch.allclose(info.objective, objective, rtol=1e-12)


class Sequences:
    """A batch of which nothing is observed."""

    def __init__(self, num_sequences):
        self.sequence_ids = torch.arange(num_sequences)

    def __len__(self):
        return len(self.sequence_ids)


def shifted_prior(batch):
    with pyro.plate("sequences", len(batch), dim=-1):
        pyro.sample("z", dist.Normal(torch.tensor([2.0, -3.0]).double(), 0.5).to_event(1))


def test_chains_start_at_draws_of_the_prior():
    num_sequences, num_chains = 2000, 5
    state = Langevin(num_chains=num_chains).init(shifted_prior, Sequences(num_sequences), SequenceNoise(0))
    z = (state.z - torch.tensor([2.0, -3.0])) / 0.5
    count = num_sequences * num_chains
    assert (z.mean((0, 1)).abs() < 5 / math.sqrt(count)).all()
    assert ((z.var((0, 1)) - 1).abs() < 5 * math.sqrt(2 / count)).all()
    assert len(z.flatten(0, 1).unique(dim=0)) == count


def test_chains_start_where_they_are_told():
    warm = torch.randn(3, 2, dtype=torch.float64)
    state = Langevin(num_chains=4).init(shifted_prior, Sequences(3), SequenceNoise(0), warm)
    assert state.z.equal(warm[:, None].expand(3, 4, 2))


def test_chains_of_a_sequence_are_independent(rotated):
    model, _ = rotated
    scheme = Langevin(num_steps=20, step_size=0.1, num_chains=2)
    z = infer(scheme, model, model.sample(1)[torch.zeros(5000, dtype=torch.int64)], generator_noise()).z
    for i in range(3):
        assert abs(torch.corrcoef(z[:, :, i].T)[0, 1]) < 5 / math.sqrt(5000)


def test_the_draws_of_a_chain_are_where_it_stood_in_its_last_steps(rotated):
    model, _ = rotated
    batch, scheme = model.sample(4), Langevin(num_steps=7, step_size=0.1, num_chains=3, num_kept=4)
    rng = SequenceNoise(0)
    state, path = scheme.init(model, batch, rng), []
    for _ in range(7):
        state, _ = scheme.step(model, state, batch, rng)
        path.append(state.z)
    inferred = infer(scheme, model, batch, rng)
    samples = scheme.posterior(inferred, 12, rng).samples
    assert samples.shape == (3, 4, 4, 3)
    for draw in range(4):
        assert samples[:, draw].equal(path[3 + draw].transpose(0, 1))
    # Fewer draws are the latest ones.
    assert scheme.posterior(inferred, 6, rng).samples.equal(samples[:, 2:])


@pytest.mark.parametrize("num_samples", [0, 4, 5, 15])
def test_draws_that_were_not_kept_cannot_be_asked_for(rotated, num_samples):
    model, _ = rotated
    scheme = Langevin(num_steps=7, step_size=0.1, num_chains=3, num_kept=4)
    state = infer(scheme, model, model.sample(2), SequenceNoise(0))
    with pytest.raises(ValueError, match="3 chains"):
        scheme.posterior(state, num_samples, SequenceNoise(0))


def test_draws_that_were_never_taken_cannot_be_asked_for(rotated):
    """Of five to be kept, two steps have made two; where the chain started is no draw."""
    model, _ = rotated
    scheme = Langevin(num_steps=2, step_size=0.1, num_kept=5)
    state = infer(scheme, model, model.sample(2), SequenceNoise(0))
    assert scheme.posterior(state, 2, SequenceNoise(0)).samples.shape == (1, 2, 2, 3)
    with pytest.raises(ValueError, match="num_steps"):
        scheme.posterior(state, 3, SequenceNoise(0))


@pytest.mark.parametrize("rng", [SequenceNoise(0), generator_noise()], ids=lambda rng: type(rng).__name__)
def test_the_guide_is_one_chain_picked_uniformly_for_each_sequence(rng):
    num_sequences, num_chains = 4000, 4
    scheme = Langevin(num_chains=num_chains)
    batch = Sequences(num_sequences)
    state = scheme.init(shifted_prior, batch, SequenceNoise(0))
    z = poutine.trace(scheme.guide(shifted_prior, state, batch, rng)).get_trace().nodes["z"]["value"]
    is_chain = (z[:, None] == state.z).all(-1)
    assert (is_chain.sum(1) == 1).all()
    frequency = is_chain.double().mean(0)
    standard_error = math.sqrt(0.25 * 0.75 / num_sequences)
    assert ((frequency - 0.25).abs() < 5 * standard_error).all()
