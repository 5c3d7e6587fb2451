"""The prior as a posterior: its draws are those of p(z) whatever that is, and figures with it are p(x) itself."""

from __future__ import annotations

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ltm_pyro.inference import PRIOR, BatchNoise, SequenceNoise, ais, bounds, infer
from ltm_pyro.inference.prequential import prequential
from ltm_pyro.inference.schemes.vi import VI

NUM_DRAWS = 2000


def q_of(model, batch, rng=None, purpose="distribution"):
    rng = rng or SequenceNoise(0)
    return PRIOR.distribution(infer(PRIOR, model, batch, rng), rng, purpose)


def assert_averages(values, expected):
    """Over the first dimension, to 5 standard errors."""
    assert ((values.mean(0) - expected).abs() < 5 * values.std(0) / math.sqrt(len(values))).all()


@pytest.mark.parametrize("is_keyed", [True, False])
def test_draws_are_those_of_the_prior(other_prior, is_keyed):
    """Their means and squares, and their mean density, which tells a mixture from a Gaussian with its moments."""
    rng = SequenceNoise(0) if is_keyed else BatchNoise(torch.Generator().manual_seed(0))
    z = q_of(other_prior, other_prior.sample(2), rng).sample((NUM_DRAWS,))
    assert z.shape == (NUM_DRAWS, 2, 2)
    prior = other_prior.log_prior(other_prior.grid).exp()
    for function in (lambda z: z[..., 0], lambda z: z[..., 1], lambda z: z.square().sum(-1), other_prior.log_prior):
        assert_averages(function(z), other_prior.integral(prior * function(other_prior.grid)))


def test_density_and_moments_are_those_of_the_prior(other_prior):
    q, z = q_of(other_prior, other_prior.sample(4)), torch.randn(7, 4, 2, dtype=torch.float64)
    assert (q.batch_shape, q.event_shape) == ((4,), (2,))
    assert torch.allclose(q.log_prob(z), other_prior.log_prior(z))
    prior = other_prior.log_prior(other_prior.grid).exp()
    mean = torch.stack([other_prior.integral(prior * other_prior.grid[..., i])[0] for i in range(2)])
    square = torch.stack([other_prior.integral(prior * other_prior.grid[..., i] ** 2)[0] for i in range(2)])
    assert torch.allclose(q.mean, mean.expand(4, 2))
    assert torch.allclose(q.stddev, (square - mean**2).sqrt().expand(4, 2))


def test_draws_depend_on_seed_id_purpose_and_call_alone(other_prior):
    batch, index, before = other_prior.sample(5), torch.tensor([3, 1]), torch.random.get_rng_state()
    q, part = q_of(other_prior, batch), q_of(other_prior, batch[index])
    first, second = q.sample((3,)), q.sample((3,))
    assert part.sample((3,)).equal(first[:, index])
    assert part.sample((3,)).equal(second[:, index])
    torch.random.manual_seed(7)
    assert q_of(other_prior, batch).sample((3,)).equal(first)
    others = [second, q_of(other_prior, batch, SequenceNoise(1)).sample((3,))]
    others.append(q_of(other_prior, batch, purpose="another").sample((3,)))
    others.append(first[:, [1, 2, 3, 4, 0]])
    for other in others:
        assert (other != first).all()
    torch.random.set_rng_state(before)
    q.sample()
    assert torch.random.get_rng_state().equal(before)


def test_states_can_be_indexed_and_joined(other_prior):
    batch, rng = other_prior.sample(5), SequenceNoise(0)
    state = infer(PRIOR, other_prior, batch, rng)
    expected = PRIOR.posterior(state, 4, rng)
    for index in (slice(1, 3), torch.tensor([4, 0]), torch.arange(5) % 2 == 0):
        part = PRIOR.posterior(state[index], 4, rng)
        assert part.samples.equal(expected.samples[:, :, index])
        assert part.sequence_ids.equal(batch.sequence_ids[index])
    joined = type(state).join([state[3:], state[:3]])
    order = [3, 4, 0, 1, 2]
    assert PRIOR.posterior(joined, 4, rng).samples.equal(expected.samples[:, :, order])
    assert PRIOR.mean(joined).equal(PRIOR.mean(state)[order])


def test_of_a_standard_normal_prior_it_is_vi_before_its_first_step(linear_gaussian):
    """Bit for bit, as runs without inference have been scored."""
    world = linear_gaussian.random(num_observed=6, num_latent=3, noise_scale=0.7)
    batch, rng, vi = world.sample(4), SequenceNoise(0), VI(num_steps=0)
    states = [infer(scheme, world, batch, rng) for scheme in (PRIOR, vi)]
    samples = [scheme.posterior(state, 3, rng).samples for scheme, state in zip((PRIOR, vi), states, strict=True)]
    assert samples[0].equal(samples[1])
    figures = [
        bounds.elbo(world, batch, scheme.distribution(state, rng), 5)
        for scheme, state in zip((PRIOR, vi), states, strict=True)
    ]
    assert figures[0].nelbo.equal(figures[1].nelbo)


def test_its_bound_is_the_expected_distortion_at_no_rate(other_prior):
    batch = other_prior.sample(3)
    estimate = bounds.elbo(other_prior, batch, q_of(other_prior, batch), 300)
    expected, _ = other_prior.expected_nll(batch.x)
    assert estimate.kl.abs().max() < 1e-12
    assert ((estimate.nelbo - expected).abs() < 5 * estimate.monte_carlo_standard_error).all()


def test_the_mean_of_its_importance_weights_is_the_evidence(other_prior):
    """w = p(x | z) is bounded, so that the error of the mean is known."""
    batch = other_prior.sample(3)
    weights = bounds.iwae(other_prior, batch, q_of(other_prior, batch), 300)
    assert_averages((weights.log_weights + other_prior.neg_log_evidence(batch.x)).exp(), 1.0)


def test_annealing_from_it_gives_the_evidence(other_prior):
    """The chains start at the prior itself: a Gaussian with a mixture's moments would still be right, but not its draws
    with the mixture's density, nor the reverse."""
    batch, rng = other_prior.sample(3), SequenceNoise(0)
    q = q_of(other_prior, batch)
    plan = ais.pilot(other_prior, batch, q, rng, num_temperatures=6, num_leapfrogs=2, num_chains=300)
    weights = ais.forward_ais(other_prior, batch, q, plan, rng)
    assert_averages((weights.log_weights + other_prior.neg_log_evidence(batch.x)).exp(), 1.0)
    assert ((weights.acceptance > 0.4) & (weights.acceptance < 1)).all()


@dataclasses.dataclass(frozen=True)
class Weighted:
    x: torch.Tensor
    weights: torch.Tensor
    sequence_ids: torch.Tensor

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return Weighted(self.x[index], self.weights[index], self.sequence_ids[index])

    def cut(self, num_positions):
        return dataclasses.replace(self, x=self.x[:, :num_positions], weights=self.weights[:, :num_positions])

    def block(self, start, end, reach):
        block = self.cut(end)
        return dataclasses.replace(block, weights=block.weights * (torch.arange(block.x.shape[1]) >= start))


def test_the_first_block_of_the_prequential_code_is_scored_under_the_prior(other_prior):
    """One block is all of x, so that the code is an estimate of -log p(x) with draws of the prior."""

    def model(batch):
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", other_prior.prior())
            log_probs = dist.Normal(z @ other_prior.loadings.T, other_prior.noise_scale).log_prob(batch.x)
            pyro.factor("x", (log_probs * batch.weights).sum(-1))

    texts = other_prior.sample(200)
    batch = Weighted(texts.x, torch.ones_like(texts.x), texts.sequence_ids)
    code = prequential(model, batch, VI(), 3, 32, SequenceNoise(0))
    assert_averages((other_prior.neg_log_evidence(texts.x) - code.nats).exp(), 1.0)


def test_there_is_no_step_of_it(other_prior):
    batch, rng = other_prior.sample(2), SequenceNoise(0)
    state = infer(PRIOR, other_prior, batch, rng)
    assert (PRIOR.num_steps, PRIOR.num_gradients, state.step.tolist()) == (0, 0, [0, 0])
    with pytest.raises(NotImplementedError):
        PRIOR.step(other_prior, state, batch, rng)
