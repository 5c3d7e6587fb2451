"""A batch: what belongs to a sequence stays together, and a prefix weighs its first positions only."""

import dataclasses

import pytest
import torch

from ltm_pyro.models import TokenBatch

TOKENS = torch.arange(12).view(3, 4)
WEIGHTS = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.5, 0.0], [2.0, 1.0, 0.0, 0.0]])
SEQUENCE_IDS = torch.tensor([70, 80, 90])
NUM_BYTES = torch.tensor([40, 30, 20])


@pytest.fixture
def batch():
    return TokenBatch(TOKENS.clone(), WEIGHTS.clone(), SEQUENCE_IDS.clone(), NUM_BYTES.clone())


def assert_holds(batch, tokens, weights, sequence_ids, num_bytes):
    assert torch.equal(batch.tokens, tokens)
    assert torch.equal(batch.weights, weights)
    assert torch.equal(batch.sequence_ids, sequence_ids)
    assert torch.equal(batch.num_bytes, num_bytes)


def test_length_is_the_number_of_sequences(batch):
    assert len(batch) == 3


@pytest.mark.parametrize(
    "index",
    [slice(1, 3), slice(0, 0), slice(None, None, 2), torch.tensor([2, 0, 2]), torch.tensor([True, False, True])],
)
def test_an_index_selects_whole_sequences(batch, index):
    assert_holds(batch[index], TOKENS[index], WEIGHTS[index], SEQUENCE_IDS[index], NUM_BYTES[index])


def test_with_weights_replaces_the_weights_and_nothing_else(batch):
    weights = torch.rand(3, 4)
    assert_holds(batch.with_weights(weights), TOKENS, weights, SEQUENCE_IDS, NUM_BYTES)
    assert_holds(batch, TOKENS, WEIGHTS, SEQUENCE_IDS, NUM_BYTES)


def test_a_prefix_keeps_the_weights_of_its_first_tokens_and_zeroes_the_rest(batch):
    prefix = batch.prefix(torch.tensor([0, 3, 1]))
    weights = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.5, 0.0], [2.0, 0.0, 0.0, 0.0]])
    assert_holds(prefix, TOKENS, weights, SEQUENCE_IDS, NUM_BYTES)
    assert prefix.weights.dtype == WEIGHTS.dtype
    assert_holds(batch, TOKENS, WEIGHTS, SEQUENCE_IDS, NUM_BYTES)


@pytest.mark.parametrize(("num_tokens", "weights"), [(0, torch.zeros(3, 4)), (4, WEIGHTS), (9, WEIGHTS)])
def test_the_empty_prefix_weighs_nothing_and_the_full_one_all(batch, num_tokens, weights):
    assert torch.equal(batch.prefix(torch.full((3,), num_tokens)).weights, weights)


def test_every_stride_th_position_counts_for_all_on_average(batch):
    thinned = [batch.every(3, torch.full((len(batch),), first)) for first in range(3)]
    assert torch.stack([part.weights for part in thinned]).mean(0).allclose(batch.weights)
    assert set(thinned[0].weights.unique().tolist()) <= {0.0, *(3 * batch.weights.unique()).tolist()}
    # Each sequence from a first position of its own.
    firsts = torch.arange(len(batch)) % 3
    mixed = batch.every(3, firsts).weights
    for row, first in enumerate(firsts.tolist()):
        assert mixed[row].equal(thinned[first].weights[row])
    assert thinned[0].tokens is batch.tokens


def test_a_cut_keeps_the_first_positions_alone(batch):
    assert_holds(batch.cut(2), TOKENS[:, :2], WEIGHTS[:, :2], batch.sequence_ids, NUM_BYTES)
    assert batch.cut(100).tokens.equal(TOKENS)


@pytest.mark.parametrize("previous", [None, torch.zeros(len(TOKENS), dtype=torch.int64)])
def test_to_moves_all_tensors_and_keeps_the_rest(batch, previous):
    batch = dataclasses.replace(batch, previous=previous, num_context=1)
    moved = batch.to("meta")
    tensors = {name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert {name for name, value in vars(moved).items() if getattr(value, "is_meta", False)} == tensors
    assert moved.num_context == 1
    again = batch.to("cpu")
    assert all(getattr(again, name).equal(getattr(batch, name)) for name in tensors)


@pytest.mark.parametrize(
    ("tokens", "weights"),
    [
        (TOKENS[0], WEIGHTS[0]),
        (TOKENS[None], WEIGHTS[None]),
        (TOKENS, WEIGHTS[:, :3]),
        (TOKENS, WEIGHTS[:2]),
        (TOKENS, WEIGHTS[0]),
    ],
)
def test_tokens_and_weights_of_unequal_or_wrong_shape_are_refused(tokens, weights):
    with pytest.raises(ValueError, match=r"tokens .* and weights .* \[B, T\]"):
        TokenBatch(tokens, weights, SEQUENCE_IDS, NUM_BYTES)


@pytest.mark.parametrize(
    ("sequence_ids", "num_bytes"),
    [(SEQUENCE_IDS[:2], NUM_BYTES), (SEQUENCE_IDS, NUM_BYTES[:2]), (SEQUENCE_IDS[:, None], NUM_BYTES)],
)
def test_ids_and_bytes_of_another_number_than_the_sequences_are_refused(sequence_ids, num_bytes):
    with pytest.raises(ValueError, match="sequence_ids and num_bytes"):
        TokenBatch(TOKENS, WEIGHTS, sequence_ids, num_bytes)


def test_one_sequence_alone_is_no_batch(batch):
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        batch[0]


def test_a_block_has_its_own_weights_and_before_it_what_its_predictions_depend_on(batch):
    block = batch.block(2, 3, reach=2)  # token 2 is predicted from inputs 1 and 2, which are tokens 0 and 1
    assert_holds(block, TOKENS[:, 1:3], WEIGHTS[:, 1:3] * torch.tensor([0.0, 1.0]), SEQUENCE_IDS, NUM_BYTES)
    assert block.previous.equal(TOKENS[:, 0])
    assert batch.weights.equal(WEIGHTS)
    assert block[1:].previous.equal(TOKENS[1:, 0])
    assert block.to("meta").previous.device.type == "meta"


def test_a_block_of_which_all_of_the_text_is_in_reach_starts_where_the_text_does(batch):
    block = batch.block(1, 9, reach=100)
    assert_holds(block, TOKENS, WEIGHTS * torch.tensor([0.0, 1.0, 1.0, 1.0]), SEQUENCE_IDS, NUM_BYTES)
    assert block.previous is None
    assert batch.block(2, 4, reach=1).block(0, 1, reach=1).previous.equal(TOKENS[:, 1])
    with pytest.raises(ValueError, match=r"previous must be \[B\]"):
        TokenBatch(TOKENS, WEIGHTS, SEQUENCE_IDS, NUM_BYTES, previous=TOKENS[:2, 0])
