"""`vi` reads a text block by block: the posterior is that of all blocks, on a model whose posterior is known."""

from __future__ import annotations

import dataclasses

import pyro
import pyro.distributions as dist
import pytest
import torch

from ltm_pyro.inference import SequenceNoise
from ltm_pyro.inference.base import BlockEvidence
from ltm_pyro.inference.schemes.vi import VI, VIState
from ltm_pyro.inference.streaming import Stream

NOISE_SCALE = 2.0
PRIOR_MEAN, PRIOR_SCALE = 0.7, 1.5


def noisy_looks(batch):
    """x_t ~ N(z, s²) for every position t, z ~ N(m, c²)."""
    num_dims = batch.x.shape[-1]
    with pyro.plate("sequences", len(batch), dim=-1):
        z = pyro.sample("z", dist.Normal(batch.x.new_full((num_dims,), PRIOR_MEAN), PRIOR_SCALE).to_event(1))
        looks = dist.Normal(z[:, None], NOISE_SCALE).to_event(1).mask(batch.weights.bool()).to_event(1)
        pyro.sample("x", looks, obs=batch.x)


@pytest.fixture(scope="module")
def looks(positions):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 20_000, generator=generator, dtype=torch.float64) * NOISE_SCALE
    x += torch.randn(2, 1, 20_000, generator=generator, dtype=torch.float64) * PRIOR_SCALE + PRIOR_MEAN
    weights = torch.ones(2, 12, dtype=torch.float64)
    weights[1, 9:] = 0
    return positions(x, weights, torch.arange(2))


def exact_posterior(batch):
    """Mean [B, d] and precision [B, 1], in closed form."""
    precision = PRIOR_SCALE**-2 + batch.weights.sum(1, keepdim=True) * NOISE_SCALE**-2
    total = (batch.x * batch.weights[..., None]).sum(1) * NOISE_SCALE**-2
    return (PRIOR_MEAN * PRIOR_SCALE**-2 + total) / precision, precision


def absorbed(scheme, batch, sizes, seed=0):
    """Mean and precision after reading blocks of these sizes."""
    stream = Stream(scheme, noisy_looks, batch, SequenceNoise(seed))
    for size in sizes:
        stream.read(size)
    return stream.state.mean, (-2 * stream.state.log_scale).exp()


@pytest.mark.parametrize("sizes", [(12,), (4, 4, 4), (1,) * 12, (2, 7, 3)])
@pytest.mark.parametrize("is_reversed", [False, True])
def test_blocks_absorbed_one_by_one_in_any_cut_and_order_give_the_posterior_of_all(looks, sizes, is_reversed):
    mean, precision = exact_posterior(looks)
    batch = looks.in_order(torch.arange(12).flip(0)) if is_reversed else looks
    found_mean, found_precision = absorbed(VI(num_steps=1), batch, sizes)
    # The curvature is the mean over 20,000 dimensions of g ε / σ: one draw knows it to a few hundredths.
    assert (found_precision / precision - 1).abs().max() < 0.1
    error = (found_mean - mean) * precision.sqrt()
    assert error.square().mean(1).sqrt().max() < 0.15
    # That is far from the prior: the test could fail.
    prior_error = (PRIOR_MEAN - mean) * precision.sqrt()
    assert prior_error.square().mean(1).sqrt().min() > 1


def test_a_block_without_weight_changes_nothing(looks):
    stream = Stream(VI(num_steps=1), noisy_looks, looks, SequenceNoise(0))
    stream.read(9)
    before = stream.state
    stream.read(3)
    assert stream.state.mean[1].equal(before.mean[1])
    torch.testing.assert_close(stream.state.log_scale[1], before.log_scale[1], rtol=0, atol=1e-12)
    assert not stream.state.mean[0].equal(before.mean[0])


def test_with_less_memory_the_posterior_is_that_of_texts_whose_older_blocks_count_less(looks):
    memory, size = 0.5, 3
    _, precision = absorbed(VI(num_steps=1, memory=memory), looks, [3] * 4)
    # Before each block, memory goes to the power of what was learned, and the rest to the prior.
    learned = sum(memory ** (3 - number) * size for number in range(4)) * NOISE_SCALE**-2
    expected = PRIOR_SCALE**-2 + learned
    assert (precision[0] / expected - 1).abs().max() < 0.1
    forgetful, _ = absorbed(VI(num_steps=1, memory=0.0), looks, [3] * 4)
    last = dataclasses.replace(looks, weights=looks.weights * (torch.arange(12) >= 9))
    mean, precision = exact_posterior(last)
    error = ((forgetful - mean) * precision.sqrt())[0]
    assert error.square().mean().sqrt() < 0.15


def test_with_two_steps_a_block_counts_two_thirds_when_it_is_new_and_the_rest_when_it_is_read_again(looks):
    counts = torch.tensor([1.0, 2 / 3], dtype=torch.float64).repeat_interleave(torch.tensor([8, 4]))
    precision = PRIOR_SCALE**-2 + (looks.weights * counts).sum(1, keepdim=True) * NOISE_SCALE**-2
    _, found = absorbed(VI(num_steps=2), looks, (4, 4, 4))
    assert (found / precision - 1).abs().max() < 0.08


@pytest.mark.parametrize("memory", [0.0, 0.5])
def test_it_forgets_once_a_block_however_many_steps_there_are(looks, memory):
    """Without memory, two steps leave two thirds of the newest block and a third of the one before."""
    _, found = absorbed(VI(num_steps=2, memory=memory), looks, (4, 4, 4))
    # Before the newest: what the earlier updates left, in the order in which they read.
    learned = 0.0
    for number in range(3):
        learned = memory * learned + (2 / 3 + (1 / 3 if number else 0)) * 4 * NOISE_SCALE**-2
    expected = PRIOR_SCALE**-2 + learned
    assert (found[0] / expected - 1).abs().max() < 0.1


def test_blocks_that_say_nothing_of_z_do_not_make_q_narrower():
    """A gradient without curvature, again and again: its noise would add up if it only counted where it is positive."""
    num_dims, scheme = 1000, VI(num_steps=1)
    prior = dist.Normal(torch.zeros(4, num_dims, dtype=torch.float64), 1.0).to_event(1)
    generator = torch.Generator().manual_seed(0)
    zeros = torch.zeros(4, dtype=torch.int64)
    state = VIState(zeros, zeros, zeros, *torch.zeros(3, 4, num_dims, dtype=torch.float64))
    for _ in range(400):
        noise = torch.randn(4, num_dims, generator=generator, dtype=torch.float64)
        z = state.mean + state.log_scale.exp() * noise
        gradient = torch.randn(4, num_dims, generator=generator, dtype=torch.float64)
        state = scheme.absorb(state, BlockEvidence(z, gradient, 1.0, is_new=True), prior)
    assert (-2 * state.log_scale).exp().mean() < 5


@pytest.mark.parametrize("num_steps", [1, 2])
def test_every_block_is_read_at_a_draw_with_noise_of_its_own(looks, recording, num_steps):
    noise = recording(0)
    stream = Stream(VI(num_steps=num_steps), noisy_looks, looks, noise)
    for _ in range(3):
        stream.read(4)
    draws = [numbers for _, numbers in noise.normals]
    assert len(draws) == (3 if num_steps == 1 else 1 + 2 + 2)
    for number, draw in enumerate(draws):
        assert all((draw * other).mean().abs() < 0.05 for other in draws[:number])


@pytest.mark.parametrize("memory", [-0.1, 1.1, float("nan")])
def test_memory_is_a_part(memory):
    with pytest.raises(ValueError, match="memory must be from 0 to 1"):
        VI(memory=memory)
