"""Sequential Monte Carlo: an unbiased estimate where p(x) is known, and a code on all texts of a small language."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ltm_pyro.data.synthetic import token_batch
from ltm_pyro.inference import PRIOR, SequenceNoise, bounds, infer, smc
from ltm_pyro.inference.smc import _drawn

COPIES, NOISE_SCALE = 3000, 0.6


def noisy_looks(batch):
    """z ~ N(0, I), and x_t ~ N(z, s²) for every position t that counts."""
    with pyro.plate("sequences", len(batch), dim=-1):
        z = pyro.sample("z", dist.Normal(batch.x.new_zeros(batch.x.shape[-1]), 1).to_event(1))
        log_probs = dist.Normal(z.unsqueeze(-2), NOISE_SCALE).log_prob(batch.x).sum(-1)
        pyro.factor("x", (batch.weights * log_probs).sum(-1))


def exact(batch):
    """[B]: -log p(x), from the covariance s² I + 1 1ᵀ of the looks at one dimension."""
    nats = []
    for x, weights in zip(batch.x, batch.weights, strict=True):
        seen = x[weights > 0]
        covariance = NOISE_SCALE**2 * torch.eye(len(seen), dtype=x.dtype) + 1
        looks = torch.distributions.MultivariateNormal(torch.zeros(len(seen), dtype=x.dtype), covariance)
        nats.append(-looks.log_prob(seen.T).sum())
    return torch.stack(nats)


@pytest.fixture
def looks(positions):
    """One text of six looks at two dimensions, far from the mean of the prior, and one of four."""
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([1.5, -2.0], dtype=torch.float64) + NOISE_SCALE * torch.randn(
        2, 6, 2, generator=generator, dtype=torch.float64
    )
    weights = torch.ones(2, 6, dtype=torch.float64)
    weights[1, 4:] = 0
    return positions(x, weights, torch.arange(2))


def copies_of(batch, text):
    """One text under many names, so that it has many independent estimates."""
    x, weights = (values[text].expand(COPIES, *values.shape[1:]) for values in (batch.x, batch.weights))
    return type(batch)(x, weights, torch.arange(COPIES))


@pytest.mark.parametrize("text", [0, 1])
@pytest.mark.parametrize("block_size", [1, 2, 6])
def test_the_estimate_of_the_evidence_is_unbiased(looks, text, block_size):
    batch = copies_of(looks, text)
    found = smc.smc(noisy_looks, batch, block_size, 6, 2, SequenceNoise(0))
    ratio = (exact(looks)[text] - found.nats).exp()
    error = ratio.std() / math.sqrt(COPIES)
    assert error < 0.15
    assert abs(ratio.mean() - 1) < 5 * error
    assert (found.block_nats[-1] == 0).all() == (text == 1 and block_size < 6)  # all padding


def test_moves_and_new_draws_bring_it_closer_than_draws_from_the_prior(looks):
    batch = copies_of(looks, 0)
    rng = SequenceNoise(0)
    prior = PRIOR.distribution(infer(PRIOR, noisy_looks, batch, rng), rng)
    plain = bounds.iwae(noisy_looks, batch, prior, 6).nats - exact(looks)[0]
    moved = smc.smc(noisy_looks, batch, 1, 6, 2, rng).nats - exact(looks)[0]
    assert plain.mean() > 1
    assert 0 < moved.mean() < 0.3 * plain.mean()


@pytest.mark.parametrize("block_size", [1, 2])
def test_the_probabilities_of_all_texts_sum_to_one(ltm, block_size):
    """With the same noise for all: whatever the particles are, each block is predicted before it is seen."""
    texts = torch.tensor(list(itertools.product(range(10), repeat=3)))
    batch = dataclasses.replace(token_batch(texts), sequence_ids=torch.zeros(len(texts), dtype=torch.int64))
    batch = batch.with_weights(batch.weights.double())
    found = smc.smc(ltm, batch, block_size, 4, 2, SequenceNoise(0))
    assert found.nats.std() > 0.1
    assert abs((-found.nats).exp().sum() - 1) < 1e-9


def test_no_block_is_scored_with_what_follows_it(ltm, texts):
    others = dataclasses.replace(texts, tokens=texts.tokens.clone())
    others.tokens[:, 8] = (texts.tokens[:, 8] + 1) % 9
    codes = [smc.smc(ltm, batch, 2, 4, 2, SequenceNoise(0)).block_nats for batch in (texts, others)]
    assert codes[0][:4].equal(codes[1][:4])
    assert not codes[0][5].equal(codes[1][5])


def test_a_text_does_not_depend_on_its_batch_mates(ltm, texts):
    order = torch.tensor([3, 0, 4, 2, 1])
    whole = smc.smc(ltm, texts, 3, 4, 2, SequenceNoise(0)).nats
    assert torch.allclose(smc.smc(ltm, texts[order], 3, 4, 2, SequenceNoise(0)).nats, whole[order], rtol=1e-9)


def test_a_text_that_no_particle_allows_costs_infinitely_much_and_the_others_what_they_cost(looks):
    def bounded(batch):
        """As `noisy_looks`, but the first text is impossible from its second block on."""
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(batch.x.new_zeros(2), 1).to_event(1))
            log_probs = dist.Normal(z.unsqueeze(-2), NOISE_SCALE).log_prob(batch.x).sum(-1)
            is_out = (batch.sequence_ids == 0) & (batch.x == looks.x[0, 2]).all(-1).any(-1)
            pyro.factor("x", (batch.weights * log_probs).sum(-1) + torch.where(is_out, -torch.inf, 0.0))

    with pyro.validation_enabled(False):
        found = smc.smc(bounded, looks, 2, 4, 2, SequenceNoise(0))
    assert found.nats.isinf().tolist() == [True, False]
    assert found.effective_sample_size.isfinite().all()


def test_particles_are_drawn_in_proportion_to_their_weights():
    generator = torch.Generator().manual_seed(0)
    log_weights = torch.randn(5, 1, generator=generator, dtype=torch.float64).expand(5, 20_000)
    uniform = torch.rand(20_000, generator=generator, dtype=torch.float64)
    due = torch.ones(20_000, dtype=torch.bool)
    chosen, after = _drawn(log_weights, uniform, due)
    counts = torch.stack([(chosen == k).double().sum(0) for k in range(5)])
    expected = 5 * log_weights[:, 0].softmax(0)
    assert torch.allclose(counts.mean(1), expected, atol=5 * 0.5 / math.sqrt(20_000))
    assert (counts - expected[:, None]).abs().max() < 1  # systematic: never off by a whole one
    assert (after == 0).all()
    chosen, after = _drawn(log_weights, uniform, ~due)
    assert (chosen == torch.arange(5)[:, None]).all()
    assert after.equal(log_weights)


def test_blocks_and_particles_are_needed(ltm, texts):
    with pytest.raises(ValueError, match="not 0 and 4"):
        smc.smc(ltm, texts, 0, 4, 2, SequenceNoise(0))
    with pytest.raises(ValueError, match="not 2 and 0"):
        smc.smc(ltm, texts, 2, 0, 2, SequenceNoise(0))
    with pytest.raises(ValueError, match="weights"):
        smc.smc(ltm, texts.with_weights(0.5 * texts.weights), 2, 4, 2, SequenceNoise(0))
