"""Streaming inference: what a stream reads, in which order, and what it costs."""

from __future__ import annotations

import itertools

import pytest
import torch

from ltm_pyro.data.synthetic import token_batch
from ltm_pyro.inference import SCHEMES, SequenceNoise, infer
from ltm_pyro.inference.base import log_joint
from ltm_pyro.inference.schemes.langevin import Langevin
from ltm_pyro.inference.schemes.map import MAP
from ltm_pyro.inference.streaming import NoiseOfUpdate, Stream, gradient_of_block, shares

ABSORBING = [name for name, scheme in SCHEMES.items() if scheme.can_absorb]


def in_block(texts, start, end):
    """All of the texts, weighted on the positions of a block alone."""
    positions = torch.arange(texts.weights.shape[1])
    return texts.with_weights(texts.weights * ((positions >= start) & (positions < end)))


def test_the_gradient_of_a_block_is_that_of_its_tokens_in_the_whole_text(ltm, texts):
    z = torch.randn(5, *ltm.config.latent_shape, dtype=torch.float64)
    leaf = z.clone().requires_grad_()
    expected = torch.autograd.grad(-log_joint(ltm, in_block(texts, 4, 8), leaf).log_likelihood.sum(), leaf)[0]
    found = gradient_of_block(ltm, texts.block(4, 8, ltm.reach), z)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert all(weight.grad is None for weight in ltm.parameters())


def test_a_point_moves_by_its_step_for_the_first_block_and_in_proportion_to_the_gradient_after_it(ltm, texts):
    """Written out with whole texts: length / root of the mean over blocks of the mean square of the gradients."""
    scheme, texts = MAP(num_steps=1, block_step=0.4), texts[torch.tensor([0, 3, 4])]
    stream = Stream(scheme, ltm, texts, SequenceNoise(0))
    z, squares = torch.zeros(3, *ltm.config.latent_shape, dtype=torch.float64), []
    for number, start in enumerate(range(0, 12, 3)):
        gradient = gradient_of_block(ltm, in_block(texts, start, start + 3), z)
        squares.append(gradient.square().flatten(1).mean(1))
        z = z - 0.4 * gradient / (sum(squares) / len(squares)).sqrt()[:, None, None, None]
        stream.read(3)
        torch.testing.assert_close(stream.state.z, z, rtol=1e-8, atol=1e-11)
        if not number:
            moved = stream.state.z.square().flatten(1).mean(1).sqrt()
            torch.testing.assert_close(moved, torch.full((3,), 0.4, dtype=torch.float64))


@pytest.mark.parametrize("name", ABSORBING)
def test_a_block_without_a_token_leaves_a_text_as_it_is(name, ltm_that_reads_blocks, texts):
    """The third text has one token, and so nothing in its second block."""
    stream = Stream(SCHEMES[name](num_steps=1), ltm_that_reads_blocks, texts, SequenceNoise(0))
    stream.read(4)
    before = stream.scheme.mean(stream.state)
    stream.read(4)
    after = stream.scheme.mean(stream.state)
    assert after[2].equal(before[2])
    assert not after[0].equal(before[0])


@pytest.mark.parametrize("name", ABSORBING)
def test_what_is_absorbed_of_a_text_does_not_depend_on_the_others(name, ltm_that_reads_blocks, texts):
    scheme = SCHEMES[name](num_steps=2)

    def read(batch):
        stream = Stream(scheme, ltm_that_reads_blocks, batch, SequenceNoise(0))
        for _ in range(3):
            stream.read(4)
        return scheme.mean(stream.state)

    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(read(texts[order]), read(texts)[order], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(read(texts[3:4]), read(texts)[3:4], rtol=1e-9, atol=1e-12)


def test_more_steps_read_the_blocks_before_again_the_latest_first(ltm, texts, monkeypatch):
    seen, block = [], type(texts).block

    def noted(self, start, end, reach):
        seen.append((start, end))
        return block(self, start, end, reach)

    monkeypatch.setattr(type(texts), "block", noted)
    stream = Stream(MAP(num_steps=3), ltm, texts, SequenceNoise(0))
    for _ in range(3):
        stream.read(5)
    assert seen == [(0, 5), (5, 10), (0, 5), (10, 12), (5, 10), (0, 5)]


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_over_all_updates_a_block_counts_once(num_steps):
    assert sum(shares(num_steps)) == pytest.approx(1)
    assert all(later == earlier / 2 for earlier, later in itertools.pairwise(shares(num_steps)))
    assert shares(0) == []


def test_a_scheme_that_cannot_absorb_infers_again_from_all_that_was_read_and_starts_where_it_was(ltm, texts):
    scheme = Langevin(num_steps=2, num_chains=2)
    stream = Stream(scheme, ltm, texts, SequenceNoise(0))
    stream.read(4)
    first = infer(scheme, ltm, texts.cut(4), SequenceNoise(0))
    assert scheme.mean(stream.state).equal(scheme.mean(first))
    stream.read(4)
    second = infer(scheme, ltm, texts.cut(8), NoiseOfUpdate(SequenceNoise(0), 1), scheme.mean(first))
    assert scheme.mean(stream.state).equal(scheme.mean(second))


@pytest.mark.parametrize("name", [name for name in ABSORBING if not SCHEMES[name].needs_encoder])
def test_before_anything_is_read_and_without_steps_z_is_from_the_start(name, ltm, texts):
    scheme = SCHEMES[name](num_steps=0)
    stream = Stream(scheme, ltm, texts, SequenceNoise(0))
    assert stream.posterior(3).samples.flatten(0, 1).shape[:2] == (3, 5)
    stream.read(6)
    assert not scheme.mean(stream.state).any()


def test_a_block_costs_the_same_wherever_it_stands(ltm):
    """So the time for a text grows with its length only: what a block reads is counted in positions."""
    texts = token_batch(torch.randint(10, (2, 400), generator=torch.Generator().manual_seed(0)))
    texts = texts.with_weights(texts.weights.double())
    sizes, block = [], type(texts).block

    def noted(self, start, end, reach):
        part = block(self, start, end, reach)
        sizes.append(part.tokens.shape[1])
        return part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(texts), "block", noted)
        stream = Stream(MAP(num_steps=1), ltm, texts, SequenceNoise(0))
        while stream.num_read < 400:
            stream.read(20)
    assert len(sizes) == 20
    assert set(sizes[2:]) == {20 + ltm.reach - 1}
