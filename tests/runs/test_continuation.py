from __future__ import annotations

import pytest
import torch

from ltm_pyro.inference import PRIOR, SCHEMES, SequenceNoise, infer
from ltm_pyro.models import Sampling
from ltm_pyro.models import generate as generate_tokens
from ltm_pyro.runs.continuation import Continuation, Rethinking, infer_thoughts
from ltm_pyro.runs.trained import TrainedModel

NUM_TEXTS = 64
PROMPT = [1, 2, 3]


@pytest.fixture
def continuation(untrained: TrainedModel) -> Continuation:
    z = torch.ones(NUM_TEXTS, *untrained.model.config.latent_shape)
    return Continuation(untrained, [PROMPT] * NUM_TEXTS, z, Sampling(), torch.Generator().manual_seed(0))


def test_texts_are_those_of_one_generation_up_to_their_end_of_text(untrained, continuation):
    generator, z = torch.Generator().manual_seed(0), continuation.z_BLSD.clone()
    end = untrained.model.end_of_text
    rows = generate_tokens(untrained.model.decoder, z, end, 40, continuation.prompts, Sampling(), generator).tolist()
    expected = [row[: row.index(end) + 1] if end in row else row for row in rows]
    assert continuation.finish(40) == expected
    lengths = [len(row) for row in expected]
    assert min(lengths) < max(lengths) == 40


def test_tokens_come_in_turn_as_they_are_written(continuation):
    events = list(continuation.write(40))
    position = [0] * NUM_TEXTS
    for row, token in events:
        assert continuation.texts[row][position[row]] == token
        position[row] += 1
    assert position == [len(text) for text in continuation.texts]
    expected = [row for step in range(40) for row in range(NUM_TEXTS) if len(continuation.texts[row]) > step]
    assert [row for row, _ in events] == expected


def test_z_of_texts_that_have_ended_is_not_inferred_again(untrained, continuation):
    calls = []

    def infer_again(texts: list[list[int]], num_before: int) -> torch.Tensor:
        calls.append(([list(tokens) for tokens in texts], num_before))
        return torch.full((len(texts), *untrained.model.config.latent_shape), float(-num_before))

    start = continuation.z_BLSD.clone()
    written = continuation.finish(40, Rethinking(10, infer_again))
    lengths = [len(tokens) for tokens in written]
    assert min(lengths) < 30
    assert max(lengths) == 40
    for tokens in written:
        assert (untrained.model.end_of_text in tokens) == (
            len(tokens) < 40 or tokens[-1] == untrained.model.end_of_text
        )
    assert [number for _, number in calls] == [0, 1, 2]
    for texts, number in calls:
        position = 10 * (number + 1)
        unfinished = [tokens for tokens in written if len(tokens) > position]
        assert texts == [[*PROMPT, *tokens[:position]] for tokens in unfinished]
    for length, before, after in zip(lengths, start, continuation.z_BLSD, strict=True):
        num_inferences = (length - 1) // 10
        expected = torch.full_like(after, float(1 - num_inferences)) if num_inferences else before
        assert torch.equal(after, expected)


def test_no_tokens_are_asked_for_and_none_are_written(continuation):
    assert list(continuation.write(0, Rethinking(1, lambda texts, number: torch.zeros(0)))) == []
    assert continuation.texts == [[]] * NUM_TEXTS


@pytest.mark.parametrize("name", ["map", "langevin"])
def test_given_nothing_z_is_drawn_from_the_prior(name, untrained):
    rng = SequenceNoise(0)
    z = infer_thoughts(untrained, [[5, 6], [], [7]], SCHEMES[name](num_steps=2), 3, rng)
    batch = untrained.token_batch([[5, 6], [], [7]])
    prior = PRIOR.posterior(infer(PRIOR, untrained.model, batch, rng), 3, rng).samples[0].transpose(0, 1)
    assert torch.equal(z[1], prior[1])
    assert not torch.equal(z[0], prior[0])
    assert not torch.equal(z[2], prior[2])


def test_every_draw_is_of_a_chain_of_its_own_whatever_the_settings_say(untrained):
    rng, length = SequenceNoise(0), untrained.config.model.length
    tokens = list(range(100)) * (1 + length // 100)  # longer than a sequence
    z = infer_thoughts(
        untrained, [tokens], SCHEMES["langevin"](num_steps=2, num_chains=2, num_kept=2), 3, rng, first_id=9
    )
    scheme = SCHEMES["langevin"](num_steps=2, num_chains=3)
    state = infer(scheme, untrained.model, untrained.token_batch([tokens[-length:]], 9), rng)
    assert torch.equal(z[0], state.z[0])
