"""Metropolis-adjusted Langevin: its step is that of the textbook, written out with the densities of its proposals."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from ltm_pyro.inference import SequenceNoise
from ltm_pyro.inference.schemes.langevin import Langevin
from ltm_pyro.inference.schemes.mala import MALA


class Uniform(SequenceNoise):
    """Noise of which the uniform numbers are all alike, so that a step shows its acceptance."""

    def __init__(self, value):
        super().__init__(0)
        self.value = value

    def uniform(self, purpose, sequence_ids, steps, sample_shape=()):
        return torch.full((*sample_shape, len(sequence_ids)), self.value, dtype=torch.float64)


@pytest.mark.parametrize(("vi_steps", "longest"), [(0, 0.6), (20, 1.5)])
def test_a_step_is_a_langevin_step_accepted_by_the_ratio_of_metropolis_and_hastings(linear_gaussian, vi_steps, longest):
    model = linear_gaussian.random(num_observed=6, num_latent=3, noise_scale=0.5)
    batch = model.sample(40)
    scheme = MALA(num_chains=6, vi_steps=vi_steps)
    state = scheme.init(model, batch, Uniform(0.0))
    # A step length of each sequence's own, from short to long.
    sizes = torch.linspace(0.2, longest, 40, dtype=torch.float64).log()
    state = dataclasses.replace(state, log_step_size=sizes)
    proposal, info = scheme.step(model, state, batch, Uniform(0.0))
    mean, x = model.posterior_mean(batch.x)[:, None], batch.x[:, None]

    def log_density(z):
        return -model.neg_log_likelihood(z, x) - model.neg_log_prior(z)

    step_size = 0.5 * (2 * state.log_step_size).exp()[:, None, None]  # s = ε² / 2
    variance = 2 * step_size * state.scale[:, None] ** 2

    def log_proposal(new, old):
        drift = -0.5 * variance * ((old - mean) @ model.precision)
        return (-0.5 * (new - old - drift) ** 2 / variance).sum(-1)

    # With uniform numbers of 0 all is accepted whose acceptance is not 0: this is the proposal.
    moved = (proposal.z != state.z).any(-1)
    log_ratio = log_density(proposal.z) - log_density(state.z)
    log_ratio = log_ratio + log_proposal(state.z, proposal.z) - log_proposal(proposal.z, state.z)
    acceptance = log_ratio.exp().clamp(max=1)
    assert moved.all()
    assert torch.allclose(info.acceptance, acceptance.mean(1), rtol=1e-8)
    assert (acceptance < 0.7).sum() > 10
    assert (acceptance == 1).sum() > 10
    # With others, those that are accepted are the ones whose acceptance is above.
    partly, _ = scheme.step(model, state, batch, Uniform(0.3))
    accepted = (partly.z != state.z).any(-1)
    assert accepted.equal(acceptance > 0.3)
    assert partly.z[accepted].equal(proposal.z[accepted])


def test_its_proposals_are_the_steps_of_langevin_at_the_same_noise(linear_gaussian):
    model = linear_gaussian.random(num_observed=6, num_latent=3, noise_scale=0.5)
    batch = model.sample(5)

    class Same(Uniform):
        def normal(self, purpose, *args, **kwargs):
            return super().normal("any", *args, **kwargs)

    scheme = MALA(num_chains=2)
    state = scheme.init(model, batch, Same(0.0))
    state = dataclasses.replace(state, log_step_size=torch.full_like(state.log_step_size, math.log(0.4)))
    proposal, _ = scheme.step(model, state, batch, Same(0.0))
    langevin = Langevin(num_chains=2, step_size=0.08)
    expected, _ = langevin.step(model, langevin.init(model, batch, Same(0.0)), batch, Same(0.0))
    assert torch.allclose(proposal.z, expected.z, rtol=1e-10)
