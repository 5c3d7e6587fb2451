"""Underdamped Langevin by BAOAB: on Gaussians it has the exact variance of z at any step below the limit."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from ltm_pyro.inference import BatchNoise, infer
from ltm_pyro.inference.schemes.underdamped import Underdamped

VARIANCES = (0.12, 0.25, 0.5)
"""Of the posterior, along the axes of its rotation. The limit of the step size is 2 √0.12 = 0.69."""


@pytest.fixture
def rotated(linear_gaussian):
    """The model with these variances, and the rotation."""
    return linear_gaussian.with_posterior_variances(VARIANCES)


def generator_noise(seed=0):
    return BatchNoise(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("step_size", "friction"), [(0.62, 0.5), (0.62, 4.0), (0.2, 2.0)])
def test_chains_have_the_covariance_of_the_posterior_at_a_step_of_any_stable_size(rotated, step_size, friction):
    model, rotation = rotated
    num_chains, num_sequences = 10_000, 2
    batch = model.sample(num_sequences)
    scheme = Underdamped(num_steps=100, step_size=step_size, friction=friction, num_chains=num_chains)
    state = infer(scheme, model, batch, generator_noise())
    deviations = (state.z - model.posterior_mean(batch.x)[:, None]) @ rotation
    v = torch.tensor(VARIANCES, dtype=torch.float64)
    assert (deviations.mean(1).abs() < 5 * (v / num_chains).sqrt()).all()
    count = num_sequences * num_chains
    covariance = deviations.flatten(0, 1).T @ deviations.flatten(0, 1) / count
    spread = (torch.outer(v, v) * (1 + torch.eye(3)) / count).sqrt()
    assert ((covariance - v.diag()).abs() < 5 * spread).all()
    # The momentum pays: its variance along an axis is 1 - h² / 4v (Leimkuhler & Matthews 2013).
    p = (state.momentum @ rotation).flatten(0, 1)
    temperature = 1 - step_size**2 / (4 * v)
    assert ((p.square().mean(0) - temperature).abs() < 5 * temperature * math.sqrt(2 / count)).all()


def test_chains_diverge_above_twice_the_smallest_scale(rotated):
    model, _ = rotated
    batch = model.sample(2)
    for step_size, is_stable in ((0.66, True), (0.72, False)):
        scheme = Underdamped(num_steps=400, step_size=step_size, num_chains=20)
        distance = infer(scheme, model, batch, generator_noise()).z.abs().max()
        assert (distance < 10) == is_stable


def test_a_step_is_kick_drift_friction_drift_kick(rotated, recording):
    model, _ = rotated
    batch, rng = model.sample(4), recording()
    h, friction = 0.3, 1.5
    scheme = Underdamped(step_size=h, friction=friction, num_chains=3, vi_steps=20)
    state = scheme.init(model, batch, rng)
    new, info = scheme.step(model, state, batch, rng)
    noise = rng.normals[-1][1].transpose(0, 1)
    mean, scale = model.posterior_mean(batch.x)[:, None], state.scale[:, None]

    def kicked(momentum, z):
        return momentum - h / 2 * scale * ((z - mean) @ model.precision)

    momentum = kicked(state.momentum, state.z)
    z = state.z + h / 2 * scale * momentum
    momentum = math.exp(-friction * h) * momentum + math.sqrt(1 - math.exp(-2 * friction * h)) * noise
    z = z + h / 2 * scale * momentum
    assert torch.allclose(new.z, z, rtol=1e-10)
    assert torch.allclose(new.momentum, kicked(momentum, z), rtol=1e-10, atol=1e-10)
    x = batch.x[:, None]
    objective = (model.neg_log_likelihood(state.z, x) + model.neg_log_prior(state.z)).mean(1)
    assert torch.allclose(info.objective, objective, rtol=1e-12)
    assert info.acceptance is None


def test_in_the_scales_of_q_a_step_may_be_longer_than_the_posterior_is_wide(scaled):
    """A step of 0.5 is five times the limit of a scale of 0.05; in the scales of q it samples it exactly."""
    model, batch = scaled([0.3, -0.5], [[0.05, 0.9]] * 2)
    num_chains = 10_000
    scheme = Underdamped(num_steps=60, step_size=0.5, num_chains=num_chains, vi_steps=300)
    state = infer(scheme, model, batch, generator_noise())
    z = (state.z - batch.mean[:, None]) / batch.scales[:, None]
    assert (z.mean(1).abs() < 5 / math.sqrt(num_chains)).all()
    assert ((z.square().mean(1) - 1).abs() < 5 * math.sqrt(2 / num_chains)).all()
    without = infer(dataclasses.replace(scheme, vi_steps=0, num_chains=20), model, batch, generator_noise())
    assert without.z.abs().max() > 1e6


def test_momenta_start_as_standard_normal_numbers_that_have_nothing_to_do_with_z(rotated):
    model, _ = rotated
    state = Underdamped(num_chains=5000).init(model, model.sample(1), generator_noise())
    z, momentum = state.z[0], state.momentum[0]
    assert (momentum.mean(0).abs() < 5 / math.sqrt(5000)).all()
    assert ((momentum.var(0) - 1).abs() < 5 * math.sqrt(2 / 5000)).all()
    assert (torch.corrcoef(torch.cat([z, momentum], 1).T)[:3, 3:].abs() < 5 / math.sqrt(5000)).all()


@pytest.mark.parametrize("setting", ["step_size", "friction"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_settings_that_must_be_positive_are_checked(setting, value):
    with pytest.raises(ValueError, match=setting):
        Underdamped(**{setting: value})
