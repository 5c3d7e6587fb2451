"""`amortized` reads a text block by block: what its encoder should learn is known where the posterior is Gaussian."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, pyro_method
from torch import nn

from ltm_pyro.inference import SequenceNoise
from ltm_pyro.inference.objectives.past import Past
from ltm_pyro.inference.schemes.amortized import Amortized
from ltm_pyro.inference.streaming import Stream
from ltm_pyro.inference.svi import OptimizerConfig, WeightOptimizer

NOISE_SCALE = 2.0
NUM_DIMS = 16


class Reader(PyroModule):
    """x_t ~ N(z, s²), z ~ N(0, I); the encoder takes up the sum of a block by a learned gain, and a learned scale."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.log_shrinkage = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, batch):
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(batch.x.new_zeros(NUM_DIMS), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[:, None], NOISE_SCALE).to_event(2), obs=batch.x)

    @pyro_method
    def encode(self, batch, mean=None, log_scale=None):
        start = batch.x.new_zeros(len(batch), NUM_DIMS)
        mean, log_scale = start if mean is None else mean, start if log_scale is None else log_scale
        is_read = float(batch.x.shape[1] > 0)
        return mean + self.gain * batch.x.sum(1), log_scale - self.log_shrinkage * is_read


@pytest.fixture
def looks(positions):
    """Six looks at z of each of some texts."""

    def draw(num_texts, seed):
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(num_texts, 1, NUM_DIMS, generator=generator, dtype=torch.float64)
        noise = torch.randn(num_texts, 6, NUM_DIMS, generator=generator, dtype=torch.float64)
        weights = torch.ones(num_texts, 6, dtype=torch.float64)
        return positions(z + NOISE_SCALE * noise, weights, torch.arange(num_texts) + num_texts * seed)

    return draw


def test_trained_by_the_next_block_the_encoder_finds_the_mean_of_the_posterior(looks):
    """Of a block of three looks it is the sum over s² + 3. The scale shrinks, since a block is scored by one draw."""
    model, scheme = Reader(), Amortized(num_steps=0)
    settings = OptimizerConfig(3e-2, 1e-4, 0, weight_decay=0.0, max_gradient_norm=float("inf"))
    optimizer = WeightOptimizer(model, settings, num_steps=150)
    for step in range(150):
        batch = looks(200, seed=step)
        Past(block_size=3).backward(model, model, scheme, batch, SequenceNoise(0), batch.weights.sum().item())
        assert optimizer.update(step)
    # Each text says something of 16 gains; the last steps average over some 50 batches of 200 texts.
    assert model.gain.item() == pytest.approx(1 / (NOISE_SCALE**2 + 3), rel=0.05)
    assert model.log_shrinkage.item() > 0.5


def test_a_gradient_moves_the_mean_beyond_what_the_encoder_proposes(looks):
    model, batch = Reader(), looks(5, seed=0)
    with torch.no_grad():
        model.gain += 0.1
    moved = Stream(Amortized(num_steps=1, block_step=0.4), model, batch, SequenceNoise(0))
    alone = Stream(Amortized(num_steps=0), model, batch, SequenceNoise(0))
    for stream in (moved, alone):
        stream.read(3)
        assert not stream.state.mean.requires_grad
    torch.testing.assert_close(alone.state.mean, 0.1 * batch.x[:, :3].sum(1))
    distance = (moved.state.mean - alone.state.mean).square().mean(1).sqrt()
    torch.testing.assert_close(distance, torch.full((5,), 0.4, dtype=torch.float64))
    assert all(weight.grad is None for weight in model.parameters())


def test_nothing_of_the_encoder_is_left_in_pyros_store(looks):
    pyro.clear_param_store()
    model, batch = Reader(), looks(5, seed=0)
    Stream(Amortized(num_steps=0), model, batch, SequenceNoise(0)).read(3)
    Past(block_size=3).backward(model, model, Amortized(num_steps=1), batch, SequenceNoise(0), 1.0)
    assert not list(pyro.get_param_store().keys())


@pytest.mark.parametrize("block_step", [0.0, float("nan")])
def test_a_step_is_positive(block_step):
    with pytest.raises(ValueError, match="block_step must be positive"):
        Amortized(block_step=block_step)
