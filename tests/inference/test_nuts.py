"""Pyro's No-U-Turn sampler: held against closed forms, and the schemes of chains against it."""

from __future__ import annotations

import random

import numpy as np
import pyro
import pytest
import torch

from ltm_pyro.inference import SCHEMES, BatchNoise, infer
from ltm_pyro.inference.nuts import nuts
from ltm_pyro.models import DecoderConfig, LatentThoughtModel, TokenBatch


def test_draws_have_the_moments_of_the_posterior(linear_gaussian, assert_mean):
    model, rotation = linear_gaussian.with_posterior_variances((0.05, 0.6))
    batch = model.sample(2)
    posterior = nuts(model, batch, num_chains=2, num_warmup=60, num_draws=150, seed=0)
    assert posterior.samples.shape == (2, 150, 2, 2)
    assert posterior.sequence_ids.equal(batch.sequence_ids)
    scales = torch.tensor([0.05, 0.6], dtype=torch.float64).sqrt()
    z = (posterior.samples - model.posterior_mean(batch.x)) @ rotation / scales
    assert_mean(z, 0.0, at_most=0.16)
    assert_mean(z[..., :, None] * z[..., None, :], torch.eye(2, dtype=torch.float64), at_most=0.25)
    # Two chains are two, and two sequences too.
    assert (posterior.samples[0] != posterior.samples[1]).any()


def test_a_sequence_depends_on_the_seed_and_its_id_and_not_on_its_batch(linear_gaussian):
    model = linear_gaussian.random(num_observed=4, num_latent=2, noise_scale=0.7)
    batch = model.sample(3)

    def draws(batch, seed):
        return nuts(model, batch, num_chains=1, num_warmup=3, num_draws=4, seed=seed).samples

    whole = draws(batch, seed=0)
    assert draws(batch[torch.tensor([2, 0])], seed=0).equal(whole[:, :, [2, 0]])
    assert not draws(batch, seed=1).equal(whole)


def test_generators_store_weights_and_output_are_as_they_were(ltm, texts, capfd):
    weights = {name: weight.detach().clone() for name, weight in ltm.named_parameters()}
    states = torch.random.get_rng_state(), random.getstate()
    posterior = nuts(ltm, texts[:2], num_chains=1, num_warmup=2, num_draws=2, seed=0)
    assert posterior.samples.shape == (1, 2, 2, 2, 2, 8)
    assert not posterior.samples.requires_grad
    assert torch.random.get_rng_state().equal(states[0])
    assert random.getstate() == states[1]
    assert len(pyro.get_param_store()) == 0
    for name, weight in ltm.named_parameters():
        assert weight.equal(weights[name])
        assert weight.requires_grad
        assert weight.grad is None
    assert all(module.training for module in ltm.modules())
    assert capfd.readouterr() == ("", "")


# --- the schemes against it, on a Latent Thought Model


@pytest.fixture(scope="module")
def sharp():
    """A model of five symbols whose z of four dimensions decides what it writes, and a text of it.

    The posterior has one mode, with scales of 0.45 to 0.9.
    """
    config = DecoderConfig(num_layers=1, width=4, num_heads=1, hidden=4, num_slots=1, window=2, length=24)
    model = LatentThoughtModel(config, vocab_size=6, end_of_text=4).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(0.7 * torch.randn(weight.shape, generator=generator))
    tokens = torch.tensor([[3, 3, 3, 0, 1, 1, 3, 3, 3, 3, 0, *[4] * 13]])
    return model, TokenBatch(tokens, torch.ones(1, 24, dtype=torch.float64), torch.tensor([0]), torch.tensor([24]))


@pytest.fixture(scope="module")
def gold(sharp):
    model, batch = sharp
    with pyro.validation_enabled(False):
        return nuts(model, batch, num_chains=1, num_warmup=80, num_draws=200, seed=0).samples.flatten(2)


@pytest.fixture
def moments(standard_errors):
    """Means and second moments of draws [chain, draw, d], and their Monte Carlo standard errors."""

    def of(samples):
        values = torch.cat([samples, (samples[..., :, None] * samples[..., None, :]).flatten(2)], 2).numpy()
        return values.mean((0, 1)), standard_errors(values)

    return of


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mala", {"num_steps": 300, "num_kept": 150}),
        ("mala", {"num_steps": 300, "num_kept": 150, "vi_steps": 100}),
        ("hmc", {"num_steps": 60, "num_kept": 30}),
        ("hmc", {"num_steps": 60, "num_kept": 30, "vi_steps": 100}),
    ],
)
def test_the_exact_schemes_agree_with_it_on_a_latent_thought_model(name, settings, sharp, gold, moments):
    model, batch = sharp
    scheme, rng = SCHEMES[name](num_chains=80, **settings), BatchNoise(torch.Generator().manual_seed(0))
    with pyro.validation_enabled(False):
        state = infer(scheme, model, batch, rng)
    samples = scheme.posterior(state, scheme.num_draws, rng).samples.flatten(2)
    (value, error), (expected, expected_error) = moments(samples), moments(gold)
    assert (abs(value - expected) < 5 * np.hypot(error, expected_error)).all()
    assert error.max() < 0.05
    assert expected_error.max() < 0.2
    # The posterior is not the prior.
    assert abs(expected[:4]).max() > 0.5
    assert samples.std((0, 1)).min() < 0.5
