from __future__ import annotations

import dataclasses

import pytest
import torch

from ltm_pyro.config import preset
from ltm_pyro.inference import PRIOR, SCHEMES, SequenceNoise, infer
from ltm_pyro.inference.objectives.past import Past
from ltm_pyro.inference.streaming import Stream
from ltm_pyro.models import Sampling, TokenBatch
from ltm_pyro.models import generate as generate_tokens
from ltm_pyro.runs.continuation import Continuation, Reader, Rethinking, infer_thoughts
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

    def infer_again(rows: list[int], texts: list[list[int]], num_before: int) -> torch.Tensor:
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
    assert list(continuation.write(0, Rethinking(1, lambda rows, texts, number: torch.zeros(0)))) == []
    assert continuation.texts == [[]] * NUM_TEXTS


@pytest.fixture(scope="module")
def reading(untrained: TrainedModel) -> TrainedModel:
    """A model that counts as trained to read blocks of five tokens."""
    config = preset("tiny", "map", "past")
    config = dataclasses.replace(config, objectives={**config.objectives, "past": Past(block_size=5)})
    return dataclasses.replace(untrained, config=config)


def as_batch(tokens: list[int], sequence_id: int) -> TokenBatch:
    ids = torch.tensor([sequence_id])
    return TokenBatch(torch.tensor([tokens]), torch.ones(1, len(tokens)), ids, torch.zeros_like(ids))


TEXT = torch.randint(200, (33,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("name", ["map", "vi"])
def test_of_a_model_that_reads_blocks_the_whole_blocks_of_a_prompt_are_read_one_by_one(name, reading):
    """However long it is: it is twice as long as the model's sequences. The last three of its tokens are no block."""
    scheme = SCHEMES[name](num_steps=2)
    found = infer_thoughts(reading, [TEXT, TEXT[:3]], scheme, 2, SequenceNoise(0), first_id=7)
    stream = Stream(scheme, reading.model, as_batch(TEXT, 7), SequenceNoise(0))
    for _ in range(6):
        stream.read(5)
    assert found[0].equal(stream.posterior(2).samples.flatten(0, 1)[:, 0])
    start = Stream(scheme, reading.model, as_batch(TEXT[:3], 8), SequenceNoise(0))
    assert found[1].equal(start.posterior(2).samples.flatten(0, 1)[:, 0])


@pytest.mark.parametrize("name", ["map", "vi"])
def test_what_is_read_on_is_what_is_read_at_once(name, reading):
    scheme = SCHEMES[name](num_steps=1)
    reader = Reader(reading, scheme, len(TEXT), SequenceNoise(0), 3)
    seen = []
    for num_tokens in (0, 3, 7, 14, 15, 33):
        seen.append(reader.read(TEXT[:num_tokens], 2))
        assert seen[-1].equal(infer_thoughts(reading, [TEXT[:num_tokens]], scheme, 2, SequenceNoise(0), 3)[0])
    assert seen[0].equal(seen[1])
    assert not seen[1].equal(seen[2])


def test_reading_on_costs_the_same_wherever_the_text_stands(reading, monkeypatch):
    sizes, block = [], TokenBatch.block

    def noted(self, start, end, reach):
        part = block(self, start, end, reach)
        sizes.append(part.tokens.shape[1])
        return part

    monkeypatch.setattr(TokenBatch, "block", noted)
    text = TEXT * 30
    reader = Reader(reading, SCHEMES["map"](num_steps=2), len(text), SequenceNoise(0), 0)
    for num_tokens in range(10, len(text) + 1, 10):
        before = len(sizes)
        reader.read(text[:num_tokens])
        if num_tokens > 20:
            assert sizes[before:] == [5 + reading.model.reach - 1] * 4


def test_before_a_prompt_a_point_is_where_inference_starts_and_not_a_draw(reading, untrained):
    scheme = SCHEMES["map"](num_steps=1)
    assert not infer_thoughts(reading, [[]], scheme, 1, SequenceNoise(0)).any()
    assert infer_thoughts(untrained, [[]], scheme, 1, SequenceNoise(0)).any()


def test_z_of_a_model_that_reads_whole_texts_is_not_inferred_block_by_block(untrained):
    whole = dataclasses.replace(untrained, config=preset("tiny", "map", "whole"))
    with pytest.raises(ValueError, match="block by block"):
        Reader(whole, SCHEMES["map"](num_steps=1), 10, SequenceNoise(0), 0)


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
