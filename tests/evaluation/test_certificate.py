"""Both sides of -log p(x) on texts from a model: they hold the integral over z, which is known here, and close."""

from __future__ import annotations

import math

import pytest
import torch

from ltm_pyro.evaluation import certificate
from ltm_pyro.evaluation.certificate import Certificate, certify
from ltm_pyro.evaluation.estimators import EstimatorSettings
from ltm_pyro.evaluation.inferred import Inference
from ltm_pyro.inference import SequenceNoise
from ltm_pyro.inference.schemes.adam_vi import AdamVI
from ltm_pyro.models import DecoderConfig, LatentThoughtModel, simulate

INFERENCE = Inference("vi", AdamVI(num_steps=8))
NUM_TEXTS = 100


@pytest.fixture(scope="module")
def ltm() -> LatentThoughtModel:
    """A model of five symbols whose z has two dimensions, and decides what it writes."""
    torch.manual_seed(9)
    config = DecoderConfig(num_layers=1, width=2, num_heads=1, hidden=4, num_slots=1, window=2, length=6)
    model = LatentThoughtModel(config, vocab_size=6, end_of_text=4).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=2.2 if "cross_attention" in name else 1.5)
    return model


def integral(model: LatentThoughtModel, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """-log ∫ p(x | z) N(z) dz of one text, by the trapezoidal rule on a square of ±7."""
    axis = torch.linspace(-7, 7, 141, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    inputs = torch.cat([torch.tensor([model.decoder.begin_of_text]), tokens[:-1]]).expand(len(z), -1)
    with torch.no_grad():
        log_probs = model.decoder.logits(model.decoder(inputs, z.view(-1, 1, 1, 2))).log_softmax(-1)
    log_joint = (log_probs[:, torch.arange(len(tokens)), tokens] * weights).sum(1) - 0.5 * z.square().sum(1)
    return -log_joint.logsumexp(0) + math.log(2 * math.pi) - 2 * math.log(0.1)


def test_the_sides_hold_the_integral_and_close_as_temperatures_are_added(ltm):
    """In expectation, so that each is tested to three of its own standard errors over texts.

    The last line holds by three or four of them, over seeds.
    """
    _, batch = simulate(ltm, NUM_TEXTS, first_id=0, seed=5)
    # Many of the texts are the same, but for what follows their end.
    written = torch.stack([batch.tokens.where(batch.weights > 0, ltm.end_of_text), batch.weights.long()], dim=1)
    different, index = written.unique(dim=0, return_inverse=True)
    exact = torch.stack([integral(ltm, *text) for text in different])[index]
    gaps = []
    for num_temperatures in (1, 24):
        settings = EstimatorSettings(num_samples=16, num_temperatures=num_temperatures, num_leapfrogs=3, num_chains=4)
        sides = certify(ltm, INFERENCE, settings, NUM_TEXTS, batch_size=NUM_TEXTS, seed=5)
        gap = sides.upper - sides.lower
        for excess in (sides.upper - exact, exact - sides.lower, sides.elbo - exact, gap):
            assert excess.mean() > -3 * excess.std() / math.sqrt(NUM_TEXTS)
        gaps.append(gap)
    assert gaps[0].mean() > 3 * gaps[0].std() / math.sqrt(NUM_TEXTS)
    assert gaps[1].mean() < 0.4 * gaps[0].mean()


def test_texts_are_drawn_with_the_z_that_made_them(ltm):
    """Given z, a text's first token has the probability that the decoder says; and z has the prior."""
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    z, batch = simulate(ltm, 2000, first_id=7, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's randomness is left alone
    assert batch.sequence_ids.tolist() == list(range(7, 2007))
    assert z.mean().abs() < 5 / math.sqrt(4000)
    assert abs(z.std() - 1) < 5 / math.sqrt(2 * 4000)
    with torch.no_grad():
        first = torch.full((2000, 1), ltm.decoder.begin_of_text)
        probabilities = ltm.decoder.logits(ltm.decoder(first, z))[:, 0].softmax(-1)
    drawn = torch.nn.functional.one_hot(batch.tokens[:, 0], 5) - probabilities
    assert drawn.mean(0).abs().max() < 5 * 0.5 / math.sqrt(2000)
    # With z shuffled the same would not hold text by text.
    assert (drawn * (probabilities - probabilities.mean(0))).mean(0).abs().max() < 5 * 0.25 / math.sqrt(2000)
    ends = batch.tokens == ltm.end_of_text
    assert (batch.weights.sum(1)[ends.any(1)] == ends.long().argmax(1)[ends.any(1)] + 1).all()
    again, _ = simulate(ltm, 2000, first_id=7, seed=1)
    other, _ = simulate(ltm, 2000, first_id=7, seed=2)
    assert again.equal(z)
    assert not other.equal(z)


def test_neither_q_nor_the_temperatures_know_that_z(ltm, monkeypatch):
    """Reverse chains start at the z of the text; were it told to the forward side, that would no longer be a bound."""
    seen = []
    original = certificate.ais.reverse_ais

    def spy(model, batch, q, plan, z, rng):
        seen.append((q.mean, plan, z))
        return original(model, batch, q, plan, z, rng)

    monkeypatch.setattr(certificate.ais, "reverse_ais", spy)
    settings = EstimatorSettings(num_samples=2, num_temperatures=3, num_leapfrogs=1, num_chains=2)
    sides = certify(ltm, INFERENCE, settings, 3, batch_size=3, seed=0)
    real = simulate(ltm, 3, first_id=0, seed=0)
    monkeypatch.setattr(certificate, "simulate", lambda *args, **kwargs: (real[0] + 1, real[1]))
    shifted = certify(ltm, INFERENCE, settings, 3, batch_size=3, seed=0)
    assert torch.equal(sides.upper, shifted.upper)
    assert torch.equal(sides.elbo, shifted.elbo)
    assert not torch.equal(sides.lower, shifted.lower)
    (q_mean, plan, z), (other_mean, other_plan, other_z) = seen
    assert torch.equal(q_mean, other_mean)
    assert torch.equal(plan.betas, other_plan.betas)
    assert torch.equal(plan.step_sizes, other_plan.step_sizes)
    assert torch.equal(z + 1, other_z)


def test_the_record_is_totals_over_totals():
    rows = [[4.0, 6.0], [8.0, 15.0], [8.4, 15.6], [9.0, 18.0]]
    record = Certificate(*(torch.tensor(row, dtype=torch.float64) for row in rows)).record()
    assert record["num_tokens"] == 10
    assert record["lower_nats_per_token"] == pytest.approx(2.3)
    assert record["upper_nats_per_token"] == pytest.approx(2.4)
    assert record["elbo_nats_per_token"] == pytest.approx(2.7)
    assert record["gap_nats_per_token"] == pytest.approx(0.1)
    assert record["gap_standard_error"] == pytest.approx(0, abs=1e-12)  # 0.1 nats a token in both texts
    assert record["elbo_excess_nats_per_token"] == pytest.approx(0.4)
    # Without the first text the excess is 3 nats in 6 tokens, without the second 1 in 4; in both 0.4 nats a token.
    assert record["elbo_excess_standard_error"] == pytest.approx(math.sqrt((0.1**2 + 0.15**2) / 2))


def test_one_text_has_no_error_over_texts():
    one = torch.ones(1, dtype=torch.float64)
    assert Certificate(one, one, one, one).record()["gap_standard_error"] is None


def test_every_batch_has_texts_of_its_own_and_each_text_noise_of_its_own(ltm, monkeypatch):
    texts, streams = [], []

    def spy(*args, **kwargs):
        drawn = simulate(*args, **kwargs)
        texts.append(drawn)
        return drawn

    class Recording(SequenceNoise):
        def normal(self, purpose, sequence_ids, steps, *args, **kwargs):
            streams.extend(zip([purpose] * len(steps), sequence_ids.tolist(), steps.tolist(), strict=True))
            return super().normal(purpose, sequence_ids, steps, *args, **kwargs)

    monkeypatch.setattr(certificate, "simulate", spy)
    monkeypatch.setattr(certificate, "SequenceNoise", Recording)
    settings = EstimatorSettings(num_samples=2, num_temperatures=3, num_leapfrogs=1, num_chains=2)
    sides = certify(ltm, INFERENCE, settings, 5, batch_size=2, seed=0)
    assert sides.record()["num_sequences"] == 5
    assert torch.cat([batch.sequence_ids for _, batch in texts]).tolist() == [0, 1, 2, 3, 4]
    z = torch.cat([z for z, _ in texts]).flatten(1)
    assert len(z.unique(dim=0)) == 5
    assert len(set(streams)) == len(streams)


def test_another_seed_anneals_the_same_texts_by_other_chains(ltm, monkeypatch):
    drawn = simulate(ltm, 3, first_id=0, seed=0)
    monkeypatch.setattr(certificate, "simulate", lambda *args, **kwargs: drawn)
    settings = EstimatorSettings(num_samples=2, num_temperatures=3, num_leapfrogs=1, num_chains=2)
    first, again, other = (certify(ltm, INFERENCE, settings, 3, batch_size=3, seed=seed) for seed in (0, 0, 1))
    for name in ("lower", "upper", "elbo"):
        assert getattr(first, name).equal(getattr(again, name))
        assert (getattr(first, name) != getattr(other, name)).all()
