"""Every objective: what z is inferred from, what the slow step scores, and what it counts."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from ltm_pyro.inference import SequenceNoise, infer
from ltm_pyro.inference.objectives import OBJECTIVES
from ltm_pyro.inference.objectives.prefix import random_prefix
from ltm_pyro.inference.schemes.vi import VI
from ltm_pyro.inference.svi import SlowLoss, elbo_backward


class Watched(VI):
    """VI that notes what it is shown."""

    seen: list[torch.Tensor] = []  # noqa: RUF012  a note of a test, not a setting

    def init(self, model, batch, rng, warm=None):
        self.seen.append(batch.weights.clone())
        return super().init(model, batch, rng, warm)


@pytest.fixture
def watched():
    Watched.seen.clear()
    return Watched(num_steps=2)


def test_of_the_whole_all_is_evidence_and_of_a_prefix_what_stands_before_the_split(ltm, texts, watched):
    for name in ("whole", "prefix"):
        OBJECTIVES[name]().backward(ltm, ltm, watched, texts, SequenceNoise(3), 1.0)
    whole, prefix = watched.seen
    assert whole.equal(texts.weights)
    lengths, all_lengths = prefix.sum(1), texts.weights.sum(1)
    assert prefix.equal(texts.weights * (torch.arange(texts.weights.shape[1]) < lengths[:, None]))
    assert (lengths <= all_lengths).all()
    assert (lengths < all_lengths).any()


@pytest.mark.parametrize("name", ["whole", "prefix"])
def test_an_objective_adds_the_gradient_of_all_tokens_at_the_posterior_of_its_evidence(name, ltm, texts):
    """Written out: infer from the evidence, then Pyro's ELBO of the whole text, whichever the objective is."""
    scheme, ours, other = VI(num_steps=2), copy.deepcopy(ltm), copy.deepcopy(ltm)
    evidence = {"whole": lambda rng: texts, "prefix": lambda rng: random_prefix(texts, rng)}[name](SequenceNoise(3))
    loss = OBJECTIVES[name]().backward(ours, ours, scheme, texts, SequenceNoise(3), 7.0)
    state = infer(scheme, other, evidence, SequenceNoise(3))
    expected = elbo_backward(other, scheme.guide(other, state, evidence, SequenceNoise(3)), texts, 7.0)
    assert loss == expected
    for weight, other_weight in zip(ours.parameters(), other.parameters(), strict=True):
        assert weight.grad.equal(other_weight.grad)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_taken_of_the_synchronised_model(name, ltm, texts):
    synchronised = copy.deepcopy(ltm)
    OBJECTIVES[name]().backward(ltm, synchronised, VI(num_steps=1), texts, SequenceNoise(0), 1.0)
    assert all(weight.grad is None for weight in ltm.parameters())
    assert all(weight.grad is not None for weight in synchronised.parameters())


@dataclasses.dataclass(frozen=True)
class Failing(VI):
    """VI whose first steps of the last sequences are not finite."""

    num_failing_steps: int = 0
    num_failing_sequences: int = 0

    def step(self, model, state, batch, rng):
        new, info = super().step(model, state, batch, rng)
        first = len(batch) - self.num_failing_sequences
        fails = (state.step < self.num_failing_steps) & (torch.arange(len(batch)) >= first)
        return dataclasses.replace(new, mean=torch.where(fails[:, None, None, None], math.nan, new.mean)), info


@pytest.mark.parametrize(
    ("num_steps", "failing_steps", "failing_sequences", "skipped", "unusable"),
    [(3, 0, 0, 0, 0), (3, 2, 5, 10, 0), (3, 3, 4, 12, 0), (3, 3, 5, 15, 1), (0, 0, 5, 0, 0)],
)
def test_skipped_steps_are_counted_and_a_batch_in_which_none_was_taken_is_unusable(
    num_steps, failing_steps, failing_sequences, skipped, unusable, ltm, texts
):
    """Of five sequences. Without any steps to take, nothing has failed."""
    scheme = Failing(num_steps, num_failing_steps=failing_steps, num_failing_sequences=failing_sequences)
    loss = OBJECTIVES["whole"]().backward(ltm, ltm, scheme, texts, SequenceNoise(0), 1.0)
    assert (loss.num_skipped_fast_steps, loss.num_unusable) == (skipped, unusable)
    assert loss == dataclasses.replace(
        SlowLoss(loss.nelbo, loss.kl), num_skipped_fast_steps=skipped, num_unusable=unusable
    )


def test_split_points_are_uniform_from_nothing_to_all(texts):
    """By sequence id, and not by place: 4,000 sequences of 4 tokens, split at 0 to 4; 5 standard errors of a count."""
    one = texts[torch.zeros(4000, dtype=torch.int64)]
    one = dataclasses.replace(
        one,
        sequence_ids=torch.arange(4000),
        weights=(torch.arange(texts.weights.shape[1]) < 4).double().expand(4000, -1),
    )
    counts = torch.bincount(random_prefix(one, SequenceNoise(0)).weights.sum(1).long(), minlength=5)
    assert len(counts) == 5
    assert ((counts - 800).abs() < 5 * math.sqrt(4000 * 0.2 * 0.8)).all()
