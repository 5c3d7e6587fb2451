"""The order of batches, as a pure function of seed, step and rank."""

import numpy as np
import pytest

from ltm_pyro.data import batches
from ltm_pyro.data.batches import batch_indices, stream_positions


def stream(seed, num_steps, batch_size, num_sequences):
    return np.concatenate([batch_indices(seed, step, batch_size, num_sequences) for step in range(num_steps)])


@pytest.mark.parametrize(("batch_size", "num_sequences"), [(4, 12), (5, 12), (12, 12), (30, 12), (1, 12), (3, 1)])
def test_each_epoch_holds_each_sequence_once(batch_size, num_sequences):
    order = stream(0, 5 * num_sequences, batch_size, num_sequences)
    epochs = order[: len(order) // num_sequences * num_sequences].reshape(-1, num_sequences)
    assert (np.sort(epochs, axis=1) == np.arange(num_sequences)).all()
    assert order.shape == (5 * num_sequences * batch_size,)


def test_the_order_does_not_depend_on_how_the_stream_is_cut():
    assert stream(3, 60, 1, 7).tolist() == stream(3, 4, 15, 7).tolist() == stream(3, 12, 5, 7).tolist()


def test_a_batch_computed_alone_is_that_of_the_run():
    run = [batch_indices(1, step, 5, 12).tolist() for step in range(20)]
    for step in (17, 2, 9):
        batches._permutation.cache_clear()
        assert batch_indices(1, step, 5, 12).tolist() == run[step]


def test_epochs_and_seeds_have_orders_of_their_own():
    epochs = {tuple(batch_indices(seed, epoch, 50, 50)) for seed in (0, 1, 2**64 - 1) for epoch in range(3)}
    assert len(epochs) == 9


def test_writing_into_a_batch_leaves_the_order_alone():
    first = batch_indices(0, 0, 4, 12)
    expected = first.tolist()
    first[:] = -1
    assert batch_indices(0, 0, 4, 12).tolist() == expected


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6])
def test_processes_share_a_batch_whatever_their_number(num_ranks):
    for step in range(9):  # some of them span two epochs of 7
        parts = [batch_indices(2, step, 6, 7, rank, num_ranks) for rank in range(num_ranks)]
        assert {len(part) for part in parts} == {6 // num_ranks}
        assert np.concatenate(parts).tolist() == batch_indices(2, step, 6, 7).tolist()


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_place_belongs_to_one_step_and_one_process(num_ranks):
    """Together they are all numbers from 0, whoever has them."""
    taken = [stream_positions(step, 6, rank, num_ranks) for step in range(5) for rank in range(num_ranks)]
    assert np.concatenate(taken).tolist() == list(range(30))


def test_a_place_says_which_sequence_of_which_epoch_it_is():
    for step in range(9):
        alone = [batch_indices(2, int(place), 1, 7)[0] for place in stream_positions(step, 6)]
        assert batch_indices(2, step, 6, 7).tolist() == alone
