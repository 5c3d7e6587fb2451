"""Natural-gradient VI: its step against closed forms of Gaussian posteriors, its optimum, and how soon it is there."""

from __future__ import annotations

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ltm_pyro.inference import BatchNoise, SequenceNoise, bounds, infer
from ltm_pyro.inference.schemes.adam_vi import AdamVI
from ltm_pyro.inference.schemes.vi import VI
from ltm_pyro.models import TokenBatch

COPIES = 20_000


@pytest.fixture
def world(linear_gaussian):
    return linear_gaussian.random(num_observed=6, num_latent=3, noise_scale=0.4)


def copies_of(world):
    """One text under many names, so that a step of all of them is many draws of one step."""
    x = world.sample(1).x
    return type(world.sample(1))(x.expand(COPIES, -1), torch.arange(COPIES))


def test_the_path_gradient_is_on_average_that_of_the_mean_and_the_curvature(world):
    """Of a linear-Gaussian posterior: E[g] = Λ (μ - m), and E[g ε / σ] = Λ_ii - 1/σ_i², whatever μ and σ are.

    A small rate makes a step linear in them, up to ρ² / 2; after many steps every dimension has its own curvature.
    """
    batch, rate = copies_of(world), 1e-4
    scheme = VI(num_steps=10**12, learning_rate=rate)
    start = scheme.init(world, batch, SequenceNoise(0))
    start = dataclasses.replace(
        start, mean=start.mean + 0.3, log_scale=start.log_scale - 1.0, step=torch.full_like(start.step, 10**6)
    )
    state, _ = scheme.step(world, start, batch, BatchNoise(torch.Generator().manual_seed(0)))
    precision = start.log_scale[0].mul(-2).exp()
    curvature = ((-2 * state.log_scale).exp() - precision) / rate
    expected = world.precision.diagonal() - precision
    error = curvature.std(0) / math.sqrt(COPIES)
    assert ((curvature.mean(0) - expected).abs() < 5 * error + 0.02 * expected.abs()).all()
    gradient = (start.mean - state.mean) * (-2 * state.log_scale).exp() / rate
    expected = world.precision @ (start.mean[0] - world.posterior_mean(batch.x[:1])[0])
    error = gradient.std(0) / math.sqrt(COPIES)
    assert ((gradient.mean(0) - expected).abs() < 5 * error).all()


def test_the_first_step_changes_every_precision_by_their_mean_change(world):
    """One draw says little of single dimensions: on average all move by the mean of Λ_ii - 1/σ_i²."""
    batch, rate = copies_of(world), 1e-4
    scheme = VI(num_steps=10, learning_rate=rate)
    start = scheme.init(world, batch, SequenceNoise(0))
    start = dataclasses.replace(start, log_scale=start.log_scale - 1.0)
    state, _ = scheme.step(world, start, batch, BatchNoise(torch.Generator().manual_seed(0)))
    change = ((-2 * state.log_scale).exp() - (-2 * start.log_scale).exp()) / rate
    expected = (world.precision.diagonal() - math.exp(2)).mean()
    error = change.std(0) / math.sqrt(COPIES)
    assert torch.allclose(change, change[:, :1].expand_as(change), rtol=1e-6)
    assert ((change.mean(0) - expected).abs() < 5 * error + 0.02 * abs(expected)).all()


@pytest.mark.parametrize(
    "rng", [SequenceNoise(0), BatchNoise(torch.Generator().manual_seed(0))], ids=["keyed", "batch"]
)
def test_every_second_step_mirrors_the_draw_of_the_one_before_and_the_next_is_new(world, rng):
    batch, scheme, noises = world.sample(5), VI(num_steps=4), []
    infer(scheme, world, batch, rng, watch=lambda state, info: noises.append(state.noise))
    assert noises[2].equal(-noises[1])
    assert noises[4].equal(-noises[3])
    assert (noises[3].abs() != noises[1].abs()).all()


def test_noise_alone_takes_the_precision_nowhere(scaled):
    """Far from a narrow posterior the gradient at μ hides the curvature; the precision must not run away from it."""
    model, batch = scaled([0.5, -1.0], [[0.02, 0.9]] * 64)
    state = infer(VI(num_steps=100), model, batch, SequenceNoise(0))
    assert ((state.mean - batch.mean).abs() < batch.scales).all()
    assert torch.allclose(state.log_scale.exp(), batch.scales, rtol=0.3)


def test_without_correlations_the_path_gradient_vanishes_at_the_optimum(scaled):
    """g has no noise there: whatever ε is drawn, q stays where it is."""
    model, batch = scaled([0.3, -0.5], [[0.05, 0.9], [0.2, 0.4]])
    scheme = VI(num_steps=10)
    start = scheme.init(model, batch, SequenceNoise(0))
    optimum = dataclasses.replace(start, mean=batch.mean.clone(), log_scale=batch.scales.log())
    state, _ = scheme.step(model, optimum, batch, SequenceNoise(0))
    assert torch.allclose(state.mean, optimum.mean, atol=1e-10)
    assert torch.allclose(state.log_scale, optimum.log_scale, atol=1e-10)


def test_it_converges_to_the_mean_field_optimum(linear_gaussian):
    """Mean of the posterior, variances 1 / Λ_ii."""
    world, _ = linear_gaussian.with_posterior_variances([0.9, 0.5, 0.05])
    batch = world.sample(50)
    scales = world.precision.diagonal().rsqrt()
    errors = []
    for num_steps in (100, 800):
        state = infer(VI(num_steps=num_steps), world, batch, SequenceNoise(0))
        errors.append(((state.mean - world.posterior_mean(batch.x)) / scales).square().mean().sqrt())
    # What is left of the noise of the steps; step sizes that end at 0 get rid of it.
    assert errors[1] < 0.25
    assert errors[1] < 0.6 * errors[0]
    assert (state.log_scale.exp() / scales - 1).mean(0).abs().max() < 0.05


def test_sixteen_steps_give_a_better_bound_than_those_of_adam(linear_gaussian):
    world, _ = linear_gaussian.with_posterior_variances([0.9, 0.2, 0.02, 0.005])
    batch, rng = world.sample(40), SequenceNoise(0)
    found = {}
    for name, scheme in (("natural", VI(16)), ("adam", AdamVI(16)), ("fast adam", AdamVI(16, 0.3, 1e-8))):
        state = infer(scheme, world, batch, rng)
        found[name] = bounds.elbo(world, batch, scheme.distribution(state, rng), 64).nelbo.mean().item()
    assert found["natural"] < min(found["adam"], found["fast adam"]) - 0.5


def test_a_step_moves_by_at_most_a_scale_and_narrows_by_at_most_a_factor(linear_gaussian):
    """From far away, on a posterior a hundred times as narrow as the prior."""
    world, _ = linear_gaussian.with_posterior_variances([1e-4, 1e-4])
    batch, rng = copies_of(world), BatchNoise(torch.Generator().manual_seed(0))
    scheme = VI(num_steps=10)
    start = scheme.init(world, batch, rng, warm=torch.full((COPIES, 2), 30.0, dtype=torch.float64))
    state, _ = scheme.step(world, start, batch, rng)
    assert ((state.mean - start.mean).abs() <= 1 + 1e-12).all()
    assert ((state.mean - start.mean).abs() > 0.99).any()
    narrowing = (-2 * state.log_scale).exp()
    assert narrowing.max() == pytest.approx(math.e)
    assert narrowing.min() >= 1


def test_no_step_is_taken_to_where_there_is_no_density():
    """A likelihood with a pole: beyond it the density is not a number, and the step there does not count as flat."""

    def model(batch):
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=torch.float64), 0.1).to_event(1))
            pyro.factor("likelihood", -5 * (0.3 + z).log().sum(-1))

    batch = TokenBatch(torch.zeros(200, 1, dtype=torch.int64), torch.ones(200, 1), torch.arange(200), torch.ones(200))
    with pyro.validation_enabled(False):
        state = infer(VI(num_steps=8), model, batch, SequenceNoise(0))
    assert (state.mean > -0.3).double().mean() > 0.9


def test_a_difference_that_is_no_more_than_rounding_does_not_hold_a_step_back(scaled):
    """A constant of a million nats, in float32, hides the curvature: the step is that of the gradient."""

    def model_with(constant):
        def model(batch):
            with pyro.plate("sequences", len(batch), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
                pyro.factor("likelihood", constant - 0.1 * (z - batch.mean).square().sum(-1))

        return model

    _, batch = scaled(0.5, [[0.9, 0.9]] * 50)
    batch = type(batch)(batch.mean.float(), batch.scales.float(), batch.sequence_ids)
    means = [infer(VI(num_steps=4), model_with(constant), batch, SequenceNoise(0)).mean for constant in (0.0, 1e6)]
    assert torch.allclose(means[0], means[1], atol=1e-4)


def test_the_precision_stays_positive_and_at_least_the_priors(world):
    batch, rng = copies_of(world), BatchNoise(torch.Generator().manual_seed(0))
    scheme = VI(num_steps=4, learning_rate=1.0)
    state = scheme.init(world, batch, rng)
    for _ in range(4):
        state, _ = scheme.step(world, state, batch, rng)
        assert (state.log_scale <= 0).all()
        assert state.log_scale.isfinite().all()
    assert (state.log_scale == 0).any()


def test_the_step_size_falls_along_a_cosine_to_nothing():
    step_sizes = VI(num_steps=4, learning_rate=0.4)._step_sizes(torch.tensor([0, 1, 2, 3, 4, 9]))
    expected = [0.4, 0.2 * (1 + math.sqrt(0.5)), 0.2, 0.2 * (1 - math.sqrt(0.5)), 0.0, 0.0]
    assert step_sizes.tolist() == pytest.approx(expected, abs=1e-7)


def test_the_objective_of_a_step_is_an_unbiased_estimate_of_the_negative_elbo(world):
    batch = copies_of(world)
    scheme = VI()
    start = scheme.init(world, batch, SequenceNoise(0))
    start = dataclasses.replace(start, mean=start.mean + 0.3, log_scale=start.log_scale - 0.5)
    _, info = scheme.step(world, start, batch, BatchNoise(torch.Generator().manual_seed(0)))
    mean, scale = start.mean[:1], start.log_scale[:1].exp()
    expected = (world.expected_nll(mean, scale, batch.x[:1]) + world.kl(mean, scale)).item()
    assert abs(info.objective.mean() - expected) < 5 * info.objective.std() / math.sqrt(COPIES)


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.5, math.nan])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match="learning_rate"):
        VI(learning_rate=rate)


def test_a_step_on_every_fourth_position_is_that_on_all_on_average(ltm, texts):
    """4,000 copies of a text with noise of their own; the same draws of z in both, so that only positions differ."""
    copies = dataclasses.replace(texts[torch.zeros(4000, dtype=torch.int64)], sequence_ids=torch.arange(4000))
    rng = SequenceNoise(0)
    objectives, means = [], []
    for stride in (1, 4):
        scheme = VI(num_steps=1, stride=stride, learning_rate=1e-3)
        state, info = scheme.step(ltm, scheme.init(ltm, copies, rng), copies, rng)
        objectives.append(info.objective)
        means.append(state.mean)
    for all_positions, some in (objectives, means):
        difference = (some - all_positions).flatten(1) if some.dim() > 1 else (some - all_positions)[:, None]
        error = difference.std(0) / math.sqrt(4000)
        assert (difference.mean(0).abs() < 5 * error).all()
        assert (error > 0).all()
    # The positions are drawn anew for every text and step.
    assert len((objectives[1] - objectives[0]).round(decimals=6).unique()) > 100


def test_a_stride_needs_positions(world):
    batch, scheme = world.sample(2), VI(stride=2)
    with pytest.raises(ValueError, match="every"):
        scheme.step(world, scheme.init(world, batch, SequenceNoise(0)), batch, SequenceNoise(0))
