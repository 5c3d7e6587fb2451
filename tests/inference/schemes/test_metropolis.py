"""The warm-up of MALA and HMC, and that what they sample afterwards is the posterior."""

from __future__ import annotations

import pytest
import torch
from pyro.ops.dual_averaging import DualAveraging

from ltm_pyro.inference import SCHEMES, BatchNoise, SequenceNoise, infer

TARGETS = {"mala": 0.574, "hmc": 0.8}
VARIANCES = (0.02, 0.1, 0.9)
"""Of a posterior that is badly scaled, along the axes of a rotation, so that it is correlated too."""


@pytest.fixture(params=TARGETS)
def name(request):
    return request.param


def generator_noise(seed=0):
    return BatchNoise(torch.Generator().manual_seed(seed))


def steps_of(scheme, model, batch, rng):
    """Every state of `infer` but the first, and what each step saw."""
    state = scheme.init(model, batch, rng)
    for _ in range(scheme.num_steps):
        state, info = scheme.step(model, state, batch, rng)
        yield state, info


@pytest.mark.parametrize("before", [{}, {"vi_steps": 100}, {"vi_steps": 100, "vi_rank": 2}])
def test_the_second_half_of_the_steps_has_the_moments_of_the_posterior(name, before, linear_gaussian, assert_mean):
    """Along the axes of the rotation: mean, variances and covariances, in units of the posterior's scales."""
    model, rotation = linear_gaussian.with_posterior_variances(VARIANCES)
    batch, rng = model.sample(2), generator_noise()
    num_steps = {"mala": 800, "hmc": 300}[name]
    scheme = SCHEMES[name](num_steps=num_steps, num_chains=50, num_kept=num_steps // 2, **before)
    state = infer(scheme, model, batch, rng)
    samples = scheme.posterior(state, scheme.num_draws, rng).samples
    z = (samples - model.posterior_mean(batch.x)) @ rotation / torch.tensor(VARIANCES, dtype=torch.float64).sqrt()
    assert_mean(z, 0.0, at_most=0.1)
    products = z[..., :, None] * z[..., None, :]
    assert_mean(products, torch.eye(3, dtype=torch.float64), at_most=0.15)
    assert state.num_skipped.tolist() == [0, 0]


SCALES = torch.tensor([0.95, 0.3, 0.1, 0.03, 0.01])[:, None] * torch.linspace(0.5, 1, 8)
"""Of five sequences whose posteriors are up to a hundredfold apart in scale, in eight dimensions."""


def test_every_sequence_has_the_acceptance_it_is_to_have(name, scaled):
    model, batch = scaled(0.0, SCALES)
    scheme = SCHEMES[name](num_steps=400, num_chains=16)
    infos = [info for _, info in steps_of(scheme, model, batch, generator_noise())]
    assert all(((info.acceptance >= 0) & (info.acceptance <= 1)).all() for info in infos)
    acceptance = torch.stack([info.acceptance for info in infos[200:]]).mean(0)
    # The error over 200 steps of 16 chains is below 0.01; the mean of log ε lags behind it a little.
    assert ((acceptance - TARGETS[name]).abs() < 0.05).all()


def test_a_short_warm_up_gets_away_from_a_start_that_is_far_too_long(name, scaled):
    """Eight steps of sixteen, on a posterior thirty times as narrow as the prior, where a first step is never held."""
    model, batch = scaled(0.0, SCALES[3:4])
    scheme = SCHEMES[name](num_steps=16, num_chains=8)
    infos = [info.acceptance.item() for _, info in steps_of(scheme, model, batch, generator_noise())]
    assert infos[0] < 1e-3
    assert sum(infos[8:]) / 8 > 0.1


def test_the_step_size_is_that_of_pyros_dual_averaging_and_is_frozen_after_the_first_half(name, scaled):
    model, batch = scaled(0.0, SCALES)
    scheme, rng = SCHEMES[name](num_steps=41, num_chains=3), SequenceNoise(0)
    first = scheme.init(model, batch, rng).log_step_size
    averages = [DualAveraging(prox_center=value) for value in first.tolist()]
    for number, (state, info) in enumerate(steps_of(scheme, model, batch, rng), start=1):
        if number <= 20:
            for average, acceptance in zip(averages, info.acceptance.tolist(), strict=True):
                average.step(TARGETS[name] - acceptance)
        latest, mean = zip(*(average.get_state() for average in averages), strict=True)
        expected = latest if number < 20 else mean
        assert state.log_step_size.tolist() == pytest.approx(expected, rel=1e-10)


def test_the_step_size_of_a_sequence_has_no_part_in_anothers(name, scaled):
    model, batch = scaled(0.0, SCALES)
    scheme, rng = SCHEMES[name](num_steps=30, num_chains=2), SequenceNoise(0)
    whole = infer(scheme, model, batch, rng).log_step_size
    assert (whole.exp() / SCALES[:, 0]).log().abs().max() < 2
    for index in range(5):
        alone = infer(scheme, model, batch[index : index + 1], rng).log_step_size
        assert torch.allclose(alone, whole[index : index + 1], rtol=1e-10)


def test_draws_of_the_warm_up_are_none(name, scaled):
    model, batch = scaled(0.0, SCALES)
    scheme = SCHEMES[name](num_steps=9, num_chains=2, num_kept=7)
    assert scheme.num_draws == 2 * 5
    state = infer(scheme, model, batch, SequenceNoise(0))
    assert scheme.posterior(state, 10, SequenceNoise(0)).samples.shape == (2, 5, 5, 8)
    with pytest.raises(ValueError, match="num_steps"):
        scheme.posterior(state, 12, SequenceNoise(0))


def test_a_refused_chain_stands_still_and_an_accepted_one_knows_where_it_stands(name, linear_gaussian):
    model = linear_gaussian.random(num_observed=6, num_latent=3, noise_scale=0.3)
    batch, rng = model.sample(4), SequenceNoise(0)
    scheme = SCHEMES[name](num_steps=12, num_chains=5)
    before, num_refused = scheme.init(model, batch, rng), 0
    for state, info in steps_of(scheme, model, batch, rng):
        x = batch.x[:, None]
        log_density = -model.neg_log_likelihood(state.z, x) - model.neg_log_prior(state.z)
        gradient = -(state.z - model.posterior_mean(batch.x)[:, None]) @ model.precision
        assert torch.allclose(state.log_density, log_density, rtol=1e-10)
        assert torch.allclose(state.gradient, gradient, rtol=1e-8, atol=1e-8)
        assert torch.allclose(info.objective, -before.log_density.mean(1), rtol=1e-12)
        num_refused += (state.z == before.z).all(-1).sum().item()
        before = state
    assert 0 < num_refused < 12 * 20
