"""MAP: the maximum is known where the posterior is Gaussian."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from ltm_pyro.inference import SequenceNoise, infer
from ltm_pyro.inference.schemes.map import MAP


@pytest.fixture
def world(linear_gaussian):
    return linear_gaussian.random(num_observed=6, num_latent=3, noise_scale=0.7)


@pytest.mark.parametrize(("num_steps", "learning_rate", "epsilon"), [(2000, 0.02, 1e-8), (1000, 0.5, 1.0)])
def test_map_is_the_posterior_mean_where_the_posterior_is_gaussian(world, num_steps, learning_rate, epsilon):
    # With a small epsilon Adam comes to no rest: its second moment decays to where a step is too long for the
    # curvature, and z then leaves the optimum by a part of the rate, time and again. At 0.1 that is so from step 270
    # on, and how near it is at step 2,000 is a matter of rounding; at 0.02 the first time is beyond step 9,000.
    batch = world.sample(5)
    state = infer(MAP(num_steps, learning_rate=learning_rate, epsilon=epsilon), world, batch, SequenceNoise(0))
    assert torch.allclose(state.z, world.posterior_mean(batch.x), atol=1e-6)


def test_map_starts_at_the_mean_of_the_prior_or_where_it_is_told():
    def shifted(batch):
        with pyro.plate("sequences", len(batch), dim=-1):
            pyro.sample("z", dist.Normal(torch.tensor([2.0, -3.0]), 0.5).to_event(1))

    class Three:
        sequence_ids = torch.arange(3)

        def __len__(self):
            return 3

    assert MAP().init(shifted, Three(), SequenceNoise(0)).z.tolist() == [[2, -3]] * 3
    warm = torch.randn(3, 2)
    assert MAP().init(shifted, Three(), SequenceNoise(0), warm).z.equal(warm)


def test_map_reports_the_negative_log_joint_where_a_step_started(world):
    batch, scheme = world.sample(5), MAP()
    warm = torch.randn(5, 3, dtype=torch.float64)
    state = scheme.init(world, batch, SequenceNoise(0), warm)
    _, info = scheme.step(world, state, batch, SequenceNoise(0))
    expected = world.neg_log_likelihood(warm, batch.x) + world.neg_log_prior(warm)
    assert torch.allclose(info.objective, expected, rtol=1e-12)


def test_steps_are_those_of_torch_adam_on_the_negative_log_joint(world):
    batch = world.sample(5)
    z = torch.nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))
    optimizer = torch.optim.Adam([z], lr=0.2, eps=0.3)
    for _ in range(20):
        optimizer.zero_grad()
        (world.neg_log_likelihood(z, batch.x) + world.neg_log_prior(z)).sum().backward()
        optimizer.step()
    state = infer(MAP(20, learning_rate=0.2, epsilon=0.3), world, batch, SequenceNoise(0))
    assert torch.allclose(state.z, z.detach(), rtol=1e-10)


def test_the_guide_and_the_draws_are_the_point(world):
    batch, scheme = world.sample(5), MAP(3, learning_rate=0.3)
    state = infer(scheme, world, batch, SequenceNoise(0))
    trace = poutine.trace(scheme.guide(world, state, batch, SequenceNoise(0))).get_trace(batch)
    assert trace.nodes["z"]["value"].equal(state.z)
    samples = scheme.posterior(state, 4, SequenceNoise(0)).samples
    assert samples.equal(state.z.expand(1, 4, 5, 3))
