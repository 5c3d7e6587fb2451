"""The prequential code: it is a code, and no shorter on average than the entropy of what it encodes."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ltm_pyro.data.synthetic import token_batch
from ltm_pyro.inference import PRIOR, SCHEMES, SequenceNoise
from ltm_pyro.inference.bounds import gaussian_around
from ltm_pyro.inference.prequential import prequential
from ltm_pyro.inference.schemes.vi import VI
from ltm_pyro.models import DecoderConfig, LatentThoughtModel

NUM_SAMPLES = 4
SETTINGS = {
    name: scheme(num_steps=3, **({"num_chains": NUM_SAMPLES} if scheme.has_chains else {}))
    for name, scheme in SCHEMES.items()
}


@pytest.fixture
def ltm():
    """A model of a language of three symbols whose z has a say in what follows."""
    config = DecoderConfig(
        num_layers=2,
        width=8,
        num_heads=2,
        hidden=8,
        num_slots=2,
        window=2,
        length=4,
        encoder_layers=1,
        encoder_reads="block",
    )
    model = LatentThoughtModel(config, vocab_size=4, end_of_text=2).double()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.7)
    return model


@pytest.mark.parametrize("scheme", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("block_size", "is_streaming"), [(1, False), (2, False), (3, False), (1, True), (3, True)])
def test_the_probabilities_of_all_texts_sum_to_one(ltm, scheme, block_size, is_streaming):
    texts = torch.tensor(list(itertools.product(range(3), repeat=4)))
    batch = dataclasses.replace(token_batch(texts), sequence_ids=torch.zeros(len(texts), dtype=torch.int64))
    batch = batch.with_weights(batch.weights.double())
    code = prequential(ltm, batch, scheme, block_size, NUM_SAMPLES, SequenceNoise(0), is_streaming)
    assert code.block_nats.shape == (math.ceil(4 / block_size), 81)
    assert abs((-code.nats).exp().sum() - 1) < 1e-9
    assert code.nats.std() > 0.1  # the texts differ in probability


def own_density(scheme, state, model, read, rng):
    """q itself, or a Gaussian around points and draws."""
    if not scheme.has_density:
        scheme, state = gaussian_around(scheme, state, model, read, rng, VI(num_steps=2))
    return scheme.distribution(state, rng, "weighted")


@pytest.mark.parametrize("scheme", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("block_size", "is_streaming"), [(1, False), (3, False), (1, True), (3, True)])
def test_with_weighted_draws_the_probabilities_of_all_texts_sum_to_one(ltm, scheme, block_size, is_streaming):
    texts = torch.tensor(list(itertools.product(range(3), repeat=4)))
    batch = dataclasses.replace(token_batch(texts), sequence_ids=torch.zeros(len(texts), dtype=torch.int64))
    batch = batch.with_weights(batch.weights.double())
    rng = SequenceNoise(0)
    code = prequential(ltm, batch, scheme, block_size, NUM_SAMPLES, rng, is_streaming, own_density)
    assert abs((-code.nats).exp().sum() - 1) < 1e-9
    plain = prequential(ltm, batch, scheme, block_size, NUM_SAMPLES, rng, is_streaming)
    start = prequential(ltm, batch, PRIOR, block_size, NUM_SAMPLES, rng)
    assert code.block_nats[0].equal(start.block_nats[0])
    assert not torch.allclose(code.block_nats[1], plain.block_nats[1])


@pytest.mark.parametrize("density", [None, own_density], ids=["plain", "weighted"])
@pytest.mark.parametrize("is_streaming", [False, True], ids=["anew", "streaming"])
@pytest.mark.parametrize("scheme", SETTINGS.values(), ids=SETTINGS)
def test_no_score_changes_with_later_tokens(ltm, scheme, is_streaming, density):
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(3, (5, 4), generator=generator)
    others = texts.clone()
    others[:, 3] = (texts[:, 3] + 1) % 3
    codes = [
        prequential(ltm, token_batch(tokens), scheme, 1, NUM_SAMPLES, SequenceNoise(0), is_streaming, density)
        for tokens in (texts, others)
    ]
    assert codes[0].block_nats[:3].equal(codes[1].block_nats[:3])
    assert not codes[0].block_nats[3].equal(codes[1].block_nats[3])


@pytest.mark.parametrize("density", [None, own_density], ids=["plain", "weighted"])
@pytest.mark.parametrize("block_size", [1, 3])
def test_the_parts_of_tokens_are_those_of_a_code_and_add_up_to_the_blocks(ltm, block_size, density):
    """Of all texts with the same beginning, the probabilities of the next token sum to one."""
    texts = torch.tensor(list(itertools.product(range(3), repeat=4)))
    batch = dataclasses.replace(token_batch(texts), sequence_ids=torch.zeros(len(texts), dtype=torch.int64))
    batch = batch.with_weights(batch.weights.double())
    args = (ltm, batch, VI(num_steps=2), block_size, NUM_SAMPLES, SequenceNoise(0), False, density)
    plain, code = prequential(*args), prequential(*args, by_token=True)
    assert plain.token_nats is None
    assert code.token_nats.shape == texts.shape
    assert torch.allclose(code.block_nats, plain.block_nats, rtol=1e-6)
    assert torch.allclose(code.token_nats.sum(1), code.nats, rtol=1e-12)
    probabilities = (-code.token_nats).exp().view(3, 3, 3, 3, 4)
    for position in range(4):
        of_next = probabilities[..., position].movedim(position, 0)
        assert torch.allclose(of_next.sum(0), torch.ones(3, 3, 3, dtype=torch.float64), rtol=1e-6)


@pytest.mark.parametrize(
    ("block_size", "num_samples", "mentioned"), [(0, 1, "block_size"), (1.5, 1, "block_size"), (1, 0, "num_samples")]
)
def test_there_is_a_position_in_a_block_and_a_draw_for_it(ltm, block_size, num_samples, mentioned):
    batch = token_batch(torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match=f"{mentioned} must be a whole number of at least 1"):
        prequential(ltm, batch, VI(num_steps=1), block_size, num_samples, SequenceNoise(0))
    with pytest.raises(ValueError, match="the batch is empty"):
        prequential(ltm, batch[:0], VI(num_steps=1), 1, 1, SequenceNoise(0))


def test_padding_costs_no_token(ltm):
    batch = token_batch(torch.tensor([[0, 1, 1, 2, 1], [2, 1, 0, 0, 0]]))
    batch = batch.with_weights(torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 0, 0, 0]]))
    code = prequential(ltm, batch, VI(num_steps=1), 2, NUM_SAMPLES, SequenceNoise(0), by_token=True)
    assert code.token_nats[1, 2:].tolist() == [0, 0, 0]
    assert (code.token_nats[0] > 0).all()
    assert (code.token_nats[1, :2] > 0).all()


@pytest.mark.parametrize("is_streaming", [False, True])
@pytest.mark.parametrize("settings", [{}, {"by_token": True}, {"density": own_density}])
def test_a_text_that_has_ended_costs_nothing_more_and_changes_no_other(ltm, is_streaming, settings, monkeypatch):
    weights = (torch.arange(7) < torch.tensor([3, 7, 0, 4])[:, None]).double()
    texts = torch.randint(3, (4, 7), generator=torch.Generator().manual_seed(0))
    batch = token_batch(texts).with_weights(weights)
    sizes, block = [], type(batch).block

    def noted(self, *args):
        sizes.append(len(self))
        return block(self, *args)

    def code_of(batch):
        return prequential(ltm, batch, VI(1), 2, NUM_SAMPLES, SequenceNoise(0), is_streaming, **settings)

    monkeypatch.setattr(type(batch), "block", noted)
    code, num_chosen = code_of(batch), list(dict.fromkeys(sizes))
    # Of the blocks that begin at 0, 2, 4 and 6.
    assert num_chosen == [3, 1]
    alone = [code_of(batch[number : number + 1]) for number in range(4)]
    torch.testing.assert_close(code.nats, torch.cat([one.nats for one in alone]), rtol=1e-9, atol=1e-12)
    assert code.nats[2] == 0
    if code.token_nats is not None:
        parts = torch.cat([one.token_nats for one in alone])
        torch.testing.assert_close(code.token_nats, parts, rtol=1e-9, atol=1e-12)


def test_what_is_inferred_from_earlier_tokens_reaches_a_score(ltm):
    """The window is two tokens and there are two layers: the first token reaches the fourth through z alone, or not."""
    texts = torch.tensor([[0, 1, 1, 1, 1, 1], [2, 1, 1, 1, 1, 1]])
    batch = dataclasses.replace(token_batch(texts), sequence_ids=torch.zeros(2, dtype=torch.int64))
    blind = prequential(ltm, batch, VI(num_steps=0), 1, NUM_SAMPLES, SequenceNoise(0))
    thinking = prequential(ltm, batch, VI(num_steps=3), 1, NUM_SAMPLES, SequenceNoise(0))
    assert torch.allclose(blind.block_nats[5, 0], blind.block_nats[5, 1], rtol=1e-9)
    assert abs(thinking.block_nats[5, 0] - thinking.block_nats[5, 1]) > 1e-3


@dataclasses.dataclass(frozen=True)
class WeightedObservations:
    x: torch.Tensor
    weights: torch.Tensor
    sequence_ids: torch.Tensor

    def __len__(self):
        return len(self.x)

    def cut(self, num_positions):
        return dataclasses.replace(self, x=self.x[:, :num_positions], weights=self.weights[:, :num_positions])

    def block(self, start, end, reach):
        block = self.cut(end)
        return dataclasses.replace(block, weights=block.weights * (torch.arange(block.x.shape[1]) >= start))


def test_on_texts_of_the_model_it_is_no_shorter_than_the_exact_value_and_thinking_shortens_it(linear_gaussian):
    world = linear_gaussian.random(num_observed=8, num_latent=3, noise_scale=0.5)

    def model(batch):
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
            log_probs = dist.Normal(z @ world.loadings[: batch.x.shape[1]].T, world.noise_scale).log_prob(batch.x)
            pyro.factor("x", (log_probs * batch.weights).sum(-1))

    generator = torch.Generator().manual_seed(0)
    num_texts = 300
    z = torch.randn(num_texts, 3, generator=generator, dtype=torch.float64)
    x = z @ world.loadings.T + world.noise_scale * torch.randn(num_texts, 8, generator=generator, dtype=torch.float64)
    batch = WeightedObservations(x, torch.ones_like(x), torch.arange(num_texts))
    codes = [
        prequential(model, batch, VI(num_steps, learning_rate=0.1), 2, 32, SequenceNoise(1)).nats
        for num_steps in (0, 60)
    ]
    for code in codes:
        excess = code - world.neg_log_evidence(x)
        assert excess.mean() > -3 * excess.std() / math.sqrt(num_texts)
    gain = codes[0] - codes[1]
    assert gain.mean() > 5 * gain.std() / math.sqrt(num_texts)
    # With weights even draws from the prior, which are far from the posterior, come close to the exact value.
    exact = world.neg_log_evidence(x)
    weighted = prequential(model, batch, VI(0), 2, 32, SequenceNoise(1), density=own_density).nats
    better = (codes[0] - weighted).mean() / (codes[0] - exact).mean()
    assert better > 0.3
    many = prequential(model, batch, VI(60, learning_rate=0.1), 2, 500, SequenceNoise(1), density=own_density).nats
    assert ((many - exact).mean() / (codes[1] - exact).mean()).abs() < 0.1


def test_bad_blocks_and_weights_are_refused(ltm):
    batch = token_batch(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="block"):
        prequential(ltm, batch, VI(num_steps=1), 0, NUM_SAMPLES, SequenceNoise(0))
    with pytest.raises(ValueError, match="weights"):
        prequential(ltm, batch.with_weights(batch.weights / 2), VI(num_steps=1), 2, NUM_SAMPLES, SequenceNoise(0))


def test_the_first_block_is_scored_with_all_draws_from_the_models_prior():
    """z ~ N(2, 0.5²) and x | z ~ N(z, 1), so x ~ N(2, 1.25).

    With K draws the code is longer than the exact value by Var(w) / (2 K), here some 1e-4 nats at K = 1000.
    """
    num_texts, num_samples = 100, 1000
    x = 2 + math.sqrt(1.25) * torch.randn(num_texts, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def model(batch):
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.full((1,), 2.0, dtype=torch.float64), 0.5).to_event(1))
            pyro.factor("x", (dist.Normal(z, 1.0).log_prob(batch.x) * batch.weights).sum(-1))

    batch = WeightedObservations(x, torch.ones_like(x), torch.arange(num_texts))
    code = prequential(model, batch, VI(num_steps=0), 1, num_samples, SequenceNoise(0)).nats
    excess = code + dist.Normal(2.0, math.sqrt(1.25)).log_prob(x[:, 0])
    # Of one text, the coefficient of variation of p(x | z) is below 1 but in the tails.
    assert excess.abs().median() < 1 / math.sqrt(num_samples)
    assert abs(excess.mean()) < 5 / math.sqrt(num_samples * num_texts) + 2e-3
