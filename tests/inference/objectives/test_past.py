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
from ltm_pyro.inference.schemes.amortized import Amortized
from ltm_pyro.inference.schemes.map import MAP
from ltm_pyro.inference.streaming import Stream
from ltm_pyro.inference.svi import OptimizerConfig, SlowLoss, WeightOptimizer


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


@pytest.mark.parametrize("scheme", [MAP(num_steps=1), Amortized(num_steps=1), Amortized(num_steps=2)])
def test_the_gradient_of_z_from_the_pass_of_the_weights_is_the_one_that_a_stream_takes_itself(
    scheme, ltm_that_reads_blocks, texts
):
    """Otherwise training would infer another z than evaluation."""
    streams = []

    class Noted(Stream):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            streams.append(self)

    import ltm_pyro.inference.objectives.past as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Stream", Noted)
        Past(2).backward(ltm_that_reads_blocks, ltm_that_reads_blocks, scheme, texts, SequenceNoise(0), 5.0)
    alone = Stream(scheme, ltm_that_reads_blocks, texts, SequenceNoise(0))
    while alone.num_read < streams[0].num_read:
        alone.read(2)
    assert alone.num_read > 2
    longest = torch.isin(alone.state.sequence_ids, streams[0].state.sequence_ids)
    assert 0 < longest.sum() < len(texts)
    torch.testing.assert_close(scheme.mean(streams[0].state), scheme.mean(alone.state)[longest], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scheme", [MAP(num_steps=1), SCHEMES["vi"](num_steps=2), SCHEMES["langevin"](num_steps=1)])
def test_a_text_that_has_ended_is_not_computed_any_more(scheme, ltm, texts, monkeypatch):
    """Its loss and its gradient are those that it has alone; so are the steps that failed."""
    sizes, block, absorb = [], type(texts).block, MAP.absorb

    def noted(self, *args):
        sizes.append(len(self))
        return block(self, *args)

    def failing(self, state, evidence, prior):
        absorbed = absorb(self, state, evidence, prior)
        fails = (state.sequence_ids % 2 == 1) & (state.step == 0)
        return dataclasses.replace(absorbed, z=absorbed.z / (~fails)[:, None, None, None])

    monkeypatch.setattr(type(texts), "block", noted)
    monkeypatch.setattr(MAP, "absorb", failing)
    together, alone = copy.deepcopy(ltm), copy.deepcopy(ltm)
    loss = Past(2).backward(together, together, scheme, texts, SequenceNoise(0), 1.0)
    num_blocks = [-(-int(length) // 2) for length in (texts.weights != 0).sum(1)]
    expected = [sum(number < own for own in num_blocks) for number in range(max(num_blocks))]
    assert len(set(expected)) > 1
    assert list(dict.fromkeys(sizes)) == list(dict.fromkeys(expected))
    lengths = (texts.weights != 0).sum(1).tolist()
    each = [texts[number : number + 1].cut(length) for number, length in enumerate(lengths)]
    losses = [Past(2).backward(alone, alone, scheme, text, SequenceNoise(0), 1.0) for text in each]
    assert loss.nelbo == pytest.approx(sum(one.nelbo for one in losses), rel=1e-10)
    for weight, other in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, other.grad, rtol=1e-8, atol=1e-10)
    if isinstance(scheme, MAP):
        assert loss.num_skipped_fast_steps == (texts.sequence_ids % 2).sum()


@pytest.mark.parametrize("num_steps", [0, 2])
def test_an_encoder_is_trained_by_the_block_after_the_one_that_it_reads(num_steps, ltm_that_reads_blocks, texts):
    """Written out: q before the newest block, and what gradients moved of it, are constants."""
    scheme, ours, other = Amortized(num_steps), copy.deepcopy(ltm_that_reads_blocks), ltm_that_reads_blocks
    loss = Past(3).backward(ours, ours, scheme, texts, SequenceNoise(3), 7.0)
    stream, nats = Stream(scheme, other, texts, SequenceNoise(3)), torch.zeros((), dtype=torch.float64)
    # Before the first block, q is the prior.
    mean = log_scale = torch.zeros(len(texts), *other.config.latent_shape, dtype=torch.float64)
    for start in range(0, 12, 3):
        moved = stream.state.mean - mean.detach()
        noise = (stream.draw() - stream.state.mean) / stream.state.log_scale.exp()
        z = mean + moved + noise * log_scale.exp()
        nats = nats - log_joint(other, in_block(texts, start, start + 3), z).log_likelihood.sum()
        before = stream.state
        stream.read(3)
        mean, log_scale = other.encode(texts.block(start, start + 3, other.reach), before.mean, before.log_scale)
    (nats / 7).backward()
    assert loss == SlowLoss(nelbo=pytest.approx(nats.item(), rel=1e-10))
    for (name, weight), (_, expected) in zip(ours.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-8, atol=1e-10, msg=name)
        assert weight.grad.any() or "prior" in name, name


def test_an_encoder_has_a_gradient_where_there_is_only_one_block(ltm_that_reads_blocks, texts):
    """It is 0, but processes wait for it."""
    Past(100).backward(ltm_that_reads_blocks, ltm_that_reads_blocks, Amortized(0), texts, SequenceNoise(0), 1.0)
    for name, weight in ltm_that_reads_blocks.encoder.named_parameters():
        assert weight.grad is not None, name
        assert not weight.grad.any(), name


def test_a_proposal_that_is_not_finite_is_skipped_and_counted_and_costs_the_step(
    ltm_that_reads_blocks, texts, monkeypatch
):
    model, propose, calls = ltm_that_reads_blocks, Amortized.propose, []

    def failing(self, model, state, block):
        calls.append(len(calls))
        proposed = propose(self, model, state, block)
        fails = (torch.arange(len(state)) == 1) & (len(calls) == 3)
        return dataclasses.replace(proposed, mean=proposed.mean / (~fails)[:, None, None, None])

    monkeypatch.setattr(Amortized, "propose", failing)
    loss = Past(2).backward(model, model, Amortized(num_steps=0), texts, SequenceNoise(0), 1.0)
    assert loss.num_skipped_fast_steps == 1
    assert math.isfinite(loss.nelbo)
    settings = OptimizerConfig(1e-3, 1e-4, 0)
    before = copy.deepcopy(model.state_dict())
    assert not WeightOptimizer(model, settings, 10).update(0)
    assert all(weight.equal(before[name]) for name, weight in model.state_dict().items())


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
    with pytest.raises(ValueError, match="block_size must be a whole number of at least 1"):
        Past(block_size=0)


def test_a_prior_is_never_moved_by_what_is_read(ltm, texts):
    stream = Stream(PRIOR, ltm, texts, SequenceNoise(0))
    before = PRIOR.mean(stream.state)
    stream.read(2)
    assert PRIOR.mean(stream.state).equal(before)
