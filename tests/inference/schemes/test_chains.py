"""What the schemes of chains share: where they start, the scales they move in, and points that are not finite."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ltm_pyro.inference import SCHEMES, BatchNoise, SequenceNoise, infer
from ltm_pyro.inference.schemes.chains import evaluate
from ltm_pyro.inference.schemes.lowrank import LowRank
from ltm_pyro.inference.schemes.vi import VI

CHAINS = ("langevin", "mala", "hmc", "underdamped")


@pytest.fixture(params=CHAINS)
def chains(request):
    """Every scheme of chains, to build with settings."""
    return SCHEMES[request.param]


@pytest.fixture
def world(linear_gaussian):
    return linear_gaussian.random(num_observed=6, num_latent=3, noise_scale=0.7)


def test_chains_start_at_draws_of_the_q_that_vi_steps_have_fitted(chains, world):
    """Their number is large and q known, so that the moments of the starts can be held against those of q."""
    batch, rng, num_chains = world.sample(2), SequenceNoise(0), 20_000
    state = chains(num_chains=num_chains, vi_steps=30).init(world, batch, rng)
    q = infer(VI(num_steps=30), world, batch, rng)
    scale = q.log_scale.exp()
    assert state.scale.equal(scale)
    deviations = (state.z - q.mean[:, None]) / scale[:, None]
    assert (deviations.mean(1).abs() < 5 / math.sqrt(num_chains)).all()
    assert ((deviations.var(1) - 1).abs() < 5 * math.sqrt(2 / num_chains)).all()
    # Which are not those of the prior.
    assert (q.mean.abs() > 0.1).any()
    assert (scale < 0.8).any()


def test_a_warm_start_stands_above_the_draws_of_q_whose_scales_are_kept(chains, world):
    batch, rng, warm = world.sample(2), SequenceNoise(0), torch.full((2, 3), 0.3, dtype=torch.float64)
    state = chains(num_chains=4, vi_steps=30).init(world, batch, rng, warm)
    assert state.z.equal(warm[:, None].expand(2, 4, 3))
    assert (state.scale < 0.9).any()


def test_without_vi_steps_all_dimensions_move_alike(chains, world):
    state = infer(chains(num_steps=2), world, world.sample(2), SequenceNoise(0))
    assert (state.scale == 1).all()


def test_with_a_rank_chains_start_at_draws_of_lowrank_and_move_in_the_shape_of_its_covariance(chains, world):
    batch, rng, num_chains = world.sample(2), SequenceNoise(0), 20_000
    state = chains(num_chains=num_chains, vi_steps=30, vi_rank=2).init(world, batch, rng)
    q = LowRank(30, 2).distribution(infer(LowRank(30, 2), world, batch, rng), rng)
    root = state.units.times(torch.eye(3, dtype=torch.float64).unsqueeze(1).expand(3, 2, 3)).permute(1, 2, 0)
    covariance = root @ root.mT
    assert torch.allclose(covariance.diagonal(dim1=1, dim2=2), q.variance, rtol=1e-9)
    assert (covariance[:, 0, 1:].abs() > 0.01).all()
    whitened = torch.linalg.solve(root, (state.z - q.mean[:, None]).mT)
    moments = whitened @ whitened.mT / num_chains
    assert (moments - torch.eye(3, dtype=torch.float64)).abs().max() < 5 * math.sqrt(2 / num_chains)


@pytest.mark.parametrize("name", ["langevin", "underdamped", "mala", "hmc"])
def test_with_a_rank_chains_mix_along_a_narrow_direction_that_no_dimension_shows(name, linear_gaussian):
    """A variance of 0.002 beside 0.9, across the axes: the one direction is what `vi` cannot scale."""
    model, rotation = linear_gaussian.with_posterior_variances((0.002, *[0.9] * 7))
    batch, rng = model.sample(2), SequenceNoise(0)
    scheme = SCHEMES[name](num_steps=60, num_chains=200, vi_steps=60, vi_rank=8)
    z = (infer(scheme, model, batch, rng).z - model.posterior_mean(batch.x)[:, None]) @ rotation
    ratio = z.var(1) / torch.tensor((0.002, *[0.9] * 7), dtype=torch.float64)
    assert (ratio > 0.6).all()
    assert (ratio < 1.6).all()


@pytest.mark.parametrize("setting", ["vi_steps", "vi_rank"])
def test_negative_steps_and_ranks_are_refused(chains, setting):
    with pytest.raises(ValueError, match=setting):
        chains(**{setting: -1})


def test_a_rank_without_steps_that_could_find_it_is_refused(chains):
    with pytest.raises(ValueError, match="vi_steps"):
        chains(vi_rank=4, vi_steps=2)


@pytest.mark.parametrize("before", [{}, {"vi_steps": 7}, {"vi_steps": 7, "vi_rank": 2}])
def test_the_number_of_gradients_counts_those_before_the_chains(chains, before, world):
    """Against a count of the chains that are evaluated."""
    batch, scheme = world.sample(2), chains(num_steps=3, num_chains=2, **before)
    counted = 0

    def model(batch):
        nonlocal counted
        z = pyro.poutine.trace(world).get_trace(batch).nodes["z"]["value"]
        if z.requires_grad:
            counted += z.shape.numel() // (len(batch) * 3)

    infer(scheme, model, batch, SequenceNoise(0))
    assert counted == scheme.num_gradients


@pytest.mark.parametrize("setting", ["num_chains", "num_kept"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_settings_that_must_be_positive_are_checked(chains, setting, value):
    with pytest.raises(ValueError, match=setting):
        chains(**{setting: value})


def test_in_the_scales_of_q_chains_reach_a_mean_far_off_in_units_of_the_narrowest_scale(chains, scaled):
    """Scales of 0.02 beside 0.9: alike in all dimensions, with steps that suit the narrow one, they would not."""
    model, batch = scaled([0.5, -1.0], [[0.02, 0.9]] * 2)
    rng = BatchNoise(torch.Generator().manual_seed(0))
    z = infer(chains(num_steps=60, num_chains=500, vi_steps=300), model, batch, rng).z
    # Steps differ, and so does the stationary variance of the unadjusted ones: up to twice the posterior's.
    assert ((z.mean(1) - batch.mean).abs() < 5 * batch.scales * math.sqrt(2 / 500)).all()
    ratio = z.var(1) / batch.scales**2
    assert (ratio > 0.7).all()
    assert (ratio < 2).all()


def test_the_scale_of_a_sequence_is_its_own(chains, scaled):
    """A batch of sequences that are far apart in scale: each is sampled in its own."""
    model, batch = scaled(0.0, [[0.9], [0.3], [0.07]])
    rng = BatchNoise(torch.Generator().manual_seed(0))
    state = infer(chains(num_steps=60, num_chains=400, vi_steps=300), model, batch, rng)
    assert (state.scale / batch.scales - 1).abs().max() < 0.4
    assert ((state.z.var(1) / batch.scales**2).log().abs() < math.log(2)).all()


# --- points that are not finite


def half(failure):
    """z ~ N(0, 1), of which what lies below 0 fails: by no density, by one that is no number, or by its gradient."""

    def model(batch):
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=torch.float64), 1).to_event(1)).squeeze(-1)
            if failure == "gradient":
                # Its value is 0 everywhere, and its slope below 0 that of a root at 0.
                root = torch.where(z < 0, z - z.detach(), 1.0).sqrt()
                pyro.factor("half", torch.where(z < 0, root, root - 1))
            else:
                pyro.factor("half", torch.where(z < 0, failure, 0.0))

    return model


class Sequences:
    """A batch of which nothing is observed."""

    def __init__(self, num_sequences):
        self.sequence_ids = torch.arange(num_sequences)

    def __len__(self):
        return len(self.sequence_ids)


@pytest.mark.parametrize("failure", [-math.inf, math.inf, math.nan, "gradient"])
def test_where_anything_is_not_finite_there_is_no_density_and_no_slope(failure):
    z = torch.tensor([-1.0, 2.0, math.nan, math.inf], dtype=torch.float64).view(1, 4, 1)
    with pyro.validation_enabled(False):
        at = evaluate(half(failure), Sequences(4), z)
    expected = -2 - 0.5 * math.log(2 * math.pi)
    assert at.log_density.flatten().tolist() == [-math.inf, pytest.approx(expected), -math.inf, -math.inf]
    assert at.gradient.flatten().tolist() == [0, -2, 0, 0]


@pytest.mark.parametrize("name", ["mala", "hmc"])
@pytest.mark.parametrize("failure", [-math.inf, math.inf, math.nan, "gradient"])
def test_proposals_that_are_not_finite_are_refused_and_the_rest_is_sampled_exactly(name, failure, assert_mean):
    """Half a normal distribution is left: mean √(2/π), second moment 1. No step is skipped."""
    batch, rng = Sequences(2), BatchNoise(torch.Generator().manual_seed(0))
    scheme = SCHEMES[name](num_steps=100, num_chains=200, num_kept=50)
    warm = torch.ones(2, 1, dtype=torch.float64)
    with pyro.validation_enabled(False):
        state = infer(scheme, half(failure), batch, rng, warm)
    assert state.num_skipped.tolist() == [0, 0]
    samples = scheme.posterior(state, scheme.num_draws, rng).samples
    assert (samples > 0).all()
    assert_mean(samples, math.sqrt(2 / math.pi), at_most=0.02)
    assert_mean(samples.square(), 1.0, at_most=0.04)


@pytest.mark.parametrize("name", ["mala", "hmc"])
def test_a_chain_that_starts_where_there_is_no_density_skips_steps_until_it_is_out(name):
    """From nearer than 1, where a step of length 1 gets out with a chance of a sixth, a hundred steps are enough."""
    batch, rng = Sequences(100), SequenceNoise(0)
    with pyro.validation_enabled(False):
        start = SCHEMES[name]().init(half(-math.inf), batch, rng).z.flatten()
        state = infer(SCHEMES[name](num_steps=100), half(-math.inf), batch, rng)
    z = state.z.flatten()
    assert (z[start > -1] > 0).all()
    assert (state.num_skipped[start > 0] == 0).all()
    assert (state.num_skipped[start < 0] > 0).any()
    assert state.num_skipped[z < 0].tolist() == [100] * (z < 0).sum()
    assert z[z < 0].equal(start[z < 0])
