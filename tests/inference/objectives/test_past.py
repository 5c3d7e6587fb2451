"""The objective `past`: z of a block from the blocks before it, and one backward pass a block."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from ltm_pyro.inference import PRIOR, SCHEMES, SequenceNoise
from ltm_pyro.inference.base import log_joint
from ltm_pyro.inference.objectives.past import Past
from ltm_pyro.inference.schemes.map import MAP
from ltm_pyro.inference.streaming import Stream
from ltm_pyro.inference.svi import SlowLoss


def in_block(texts, start, end):
    """All of the texts, weighted on the positions of a block: what `TokenBatch.block` cuts out, uncut."""
    positions = torch.arange(texts.weights.shape[1])
    return texts.with_weights(texts.weights * ((positions >= start) & (positions < end)))


@pytest.mark.parametrize("block_size", [1, 3, 100])
@pytest.mark.parametrize("name", ["map", "vi", "langevin"])
def test_its_gradient_is_that_of_each_block_at_a_z_inferred_from_the_blocks_before_it(name, block_size, ltm, texts):
    """Written out on whole texts, whose blocks are chosen by their weights, and with z from a stream."""
    scheme, ours, other = SCHEMES[name](num_steps=2), copy.deepcopy(ltm), copy.deepcopy(ltm)
    length = texts.weights.shape[1]
    loss = Past(block_size).backward(ours, ours, scheme, texts, SequenceNoise(3), 7.0)
    stream, nats = Stream(scheme, other, texts, SequenceNoise(3)), torch.zeros((), dtype=torch.float64)
    for start in range(0, length, block_size):
        nats = nats - log_joint(other, in_block(texts, start, start + block_size), stream.draw()).log_likelihood.sum()
        stream.read(block_size)
    (nats / 7).backward()
    assert loss == SlowLoss(nelbo=pytest.approx(nats.item(), rel=1e-10))
    for (weight_name, weight), other_weight in zip(ours.named_parameters(), other.parameters(), strict=True):
        expected = torch.zeros_like(weight) if other_weight.grad is None else other_weight.grad
        torch.testing.assert_close(weight.grad, expected, rtol=1e-8, atol=1e-10, msg=weight_name)


def test_the_gradient_of_z_from_the_pass_of_the_weights_is_the_one_that_a_stream_takes_itself(ltm, texts):
    """Otherwise training would infer another z than evaluation."""
    streams = []

    class Noted(Stream):
        def __init__(self, *args):
            super().__init__(*args)
            streams.append(self)

    import ltm_pyro.inference.objectives.past as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Stream", Noted)
        Past(2).backward(ltm, ltm, MAP(num_steps=1), texts, SequenceNoise(0), 5.0)
    alone = Stream(MAP(num_steps=1), ltm, texts, SequenceNoise(0))
    while alone.num_read < streams[0].num_read:
        alone.read(2)
    assert alone.num_read > 2
    torch.testing.assert_close(streams[0].state.z, alone.state.z, rtol=1e-9, atol=1e-12)


def test_without_thinking_it_is_the_likelihood_of_whole_texts_at_the_start(ltm, texts):
    model = copy.deepcopy(ltm)
    loss = Past(3).backward(model, model, MAP(num_steps=0), texts, SequenceNoise(0), 1.0)
    z = torch.zeros(len(texts), *ltm.config.latent_shape, dtype=torch.float64)
    assert loss.nelbo == pytest.approx(-log_joint(ltm, texts, z).log_likelihood.sum().item(), rel=1e-10)
    assert (loss.kl, loss.num_unusable) == (0, 0)


def test_a_block_whose_gradient_is_not_finite_is_skipped_and_counted(ltm, texts, monkeypatch):
    absorb, calls = MAP.absorb, []

    def failing(self, state, evidence, prior):
        calls.append(len(calls))
        fails = (torch.arange(len(evidence.z)) == 1) & (len(calls) == 1)
        gradient = torch.where(fails[:, None, None, None], math.nan, evidence.gradient)
        return absorb(self, state, dataclasses.replace(evidence, gradient=gradient), prior)

    monkeypatch.setattr(MAP, "absorb", failing)
    loss = Past(2).backward(ltm, ltm, MAP(num_steps=1), texts, SequenceNoise(0), 1.0)
    assert loss.num_skipped_fast_steps == 1
    assert math.isfinite(loss.nelbo)


def test_a_block_needs_a_token():
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        Past(block_size=0)


def test_a_prior_is_never_moved_by_what_is_read(ltm, texts):
    stream = Stream(PRIOR, ltm, texts, SequenceNoise(0))
    before = PRIOR.mean(stream.state)
    stream.read(2)
    assert PRIOR.mean(stream.state).equal(before)
