"""Guides: the one site they have, and densities and draws of their Gaussians against formulas written out here."""

import itertools
import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import Independent, Normal, kl_divergence

from ltm_pyro.inference import BatchNoise, SequenceNoise, State
from ltm_pyro.inference.guides import fresh_noise, guide_of, normal, point

MEAN = torch.tensor([[[0.3, -1.0, 2.0], [0.0, 0.5, 1.5]], [[0.1, 0.2, 0.3], [-0.4, 4.0, 0.0]]], dtype=torch.float64)
SCALE = torch.tensor([[[0.5, 1.0, 2.0], [0.1, 0.7, 1.5]], [[1.0, 1.2, 0.3], [0.4, 0.9, 3.0]]], dtype=torch.float64)
"""Two sequences, z of [2, 3]."""


def state_of(*sequence_ids):
    ids = torch.tensor(sequence_ids)
    return State(ids, torch.zeros_like(ids), torch.zeros_like(ids))


def counting_draw():
    """Noise whose numbers are 0, 1, 2, …, so that one sees where they end up."""
    counter = itertools.count()

    def draw(outer):
        shape = (*outer, *MEAN.shape)
        count = math.prod(shape)
        return torch.tensor([next(counter) for _ in range(count)], dtype=torch.float64).view(shape)

    return draw


def test_draws_are_the_mean_plus_the_scale_times_the_given_noise():
    q = normal(MEAN, SCALE, counting_draw())
    numbers = torch.arange(12.0, dtype=torch.float64).view(MEAN.shape)
    assert q.rsample().equal(MEAN + SCALE * numbers)
    # Nothing is drawn twice.
    assert q.rsample().equal(MEAN + SCALE * (numbers + 12))
    outer = torch.arange(24.0, 24 + 72, dtype=torch.float64).view(2, 3, *MEAN.shape)
    assert q.sample((2, 3)).equal(MEAN + SCALE * outer)


def test_draws_of_an_expanded_gaussian_are_each_drawn_anew():
    expanded = normal(MEAN, SCALE, counting_draw()).expand(torch.Size([3, 2]))
    numbers = torch.arange(36.0, dtype=torch.float64).view(3, *MEAN.shape)
    assert expanded.batch_shape == (3, 2)
    assert expanded.rsample().equal(MEAN + SCALE * numbers)


def test_draws_have_the_pathwise_gradient():
    mean, scale = MEAN.clone().requires_grad_(), SCALE.clone().requires_grad_()
    noise = torch.randn_like(MEAN)
    normal(mean, scale, lambda outer: noise).rsample().sum().backward()
    assert mean.grad.equal(torch.ones_like(MEAN))
    assert scale.grad.equal(noise)


def test_density_and_divergence_are_those_of_the_formula():
    q = normal(MEAN, SCALE)
    assert (q.batch_shape, q.event_shape) == ((2,), (2, 3))
    z = torch.randn_like(MEAN)
    log_density = -0.5 * ((z - MEAN) / SCALE).square() - SCALE.log() - 0.5 * math.log(2 * math.pi)
    assert torch.allclose(q.log_prob(z), log_density.sum((1, 2)), rtol=1e-14)
    prior = Independent(Normal(torch.zeros_like(MEAN), torch.ones_like(MEAN)), 2)
    expected = 0.5 * (MEAN.square() + SCALE.square() - 1 - 2 * SCALE.log()).sum((1, 2))
    assert torch.allclose(kl_divergence(q, prior), expected, rtol=1e-14)


@pytest.mark.parametrize("rng", [SequenceNoise(0), BatchNoise(torch.Generator())], ids=lambda rng: type(rng).__name__)
def test_fresh_noise_is_new_in_every_call_and_for_every_sequence(rng):
    draw = fresh_noise(state_of(4, 9), MEAN, rng, "guide")
    draws = [draw(torch.Size(outer)) for outer in ((), (), (5,), (3, 2))]
    assert [tuple(numbers.shape) for numbers in draws] == [(2, 2, 3), (2, 2, 3), (5, 2, 2, 3), (3, 2, 2, 2, 3)]
    numbers = torch.cat([numbers.flatten() for numbers in draws])
    assert numbers.dtype == torch.float64
    assert len(numbers.unique()) == len(numbers)


def test_fresh_noise_of_a_sequence_does_not_depend_on_its_batch():
    def draws(*ids):
        draw = fresh_noise(state_of(*ids), MEAN[: len(ids)], SequenceNoise(0), "guide")
        return torch.stack([draw(torch.Size()) for _ in range(3)])

    assert draws(9).equal(draws(4, 9)[:, 1:])


def test_a_guide_has_the_one_site_z_under_the_plate_of_the_model():
    for distribution in (normal(MEAN, SCALE, lambda outer: torch.zeros_like(MEAN)), point(MEAN)):
        trace = poutine.trace(guide_of(distribution)).get_trace("whatever", the="model", takes=1)
        assert trace.stochastic_nodes == ["sequences", "z"]
        (plate,) = trace.nodes["z"]["cond_indep_stack"]
        assert (plate.name, plate.dim, plate.size) == ("sequences", -1, 2)
        assert trace.nodes["z"]["value"].equal(MEAN)


def test_a_point_has_all_its_mass_there():
    q = point(MEAN)
    assert (q.batch_shape, q.event_shape) == ((2,), (2, 3))
    assert q.sample((4,)).equal(MEAN.expand(4, 2, 2, 3))
    assert q.log_prob(MEAN).tolist() == [0, 0]
    assert q.log_prob(MEAN + 1e-3).tolist() == [-math.inf, -math.inf]


def test_draws_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    guide_of(normal(MEAN, SCALE, fresh_noise(state_of(4, 9), MEAN, SequenceNoise(0), "guide")))()
    assert torch.random.get_rng_state().equal(before)


def test_pyro_evaluates_a_guide_at_many_particles_at_once(linear_gaussian):
    """Under the outer plate of Pyro's vectorised ELBO, every particle has a draw of its own."""
    world = linear_gaussian.random(num_observed=5, num_latent=3, noise_scale=0.7)
    batch = world.sample(2)
    mean, scale = MEAN[:, 0], SCALE[:, 0]
    num_particles = 5000
    guide = guide_of(normal(mean, scale, fresh_noise(state_of(0, 1), mean, SequenceNoise(0), "guide")))
    elbo = TraceMeanField_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
    estimate = elbo.loss(world, guide, batch)
    expected = (world.expected_nll(mean, scale, batch.x) + world.kl(mean, scale)).sum()
    standard_error = (world.nll_variance(mean, scale, batch.x).sum() / num_particles).sqrt()
    assert abs(estimate - expected) < 5 * standard_error
    assert len(pyro.get_param_store()) == 0
