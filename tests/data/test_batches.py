"""The order of batches, as a pure function of seed, step and rank."""

import tracemalloc

import numpy as np
import pytest
import scipy.stats

from ltm_pyro.data import batches
from ltm_pyro.data.batches import batch_indices, keyed_permutation, stream_positions


@pytest.fixture(params=["held", "computed where it is needed"], autouse=True)
def way(request, monkeypatch):
    """Both ways to find what stands at a place; the second one is for many sequences."""
    if request.param != "held":
        monkeypatch.setattr(batches, "LONGEST_HELD", 0)


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


# --- permutations that are computed where they are needed

SIZES = [*range(1, 70), 255, 256, 257, 1000, 4095, 4096, 4097, 65537]


@pytest.mark.parametrize("size", SIZES)
def test_each_number_stands_once_in_a_permutation(size):
    assert np.sort(keyed_permutation(np.arange(size), 3, 1, size)).tolist() == list(range(size))


def test_every_number_is_as_likely_at_every_place():
    """The chi-square statistic of a table of 50 places and 50 numbers, from 4000 permutations."""
    size, num_keys = 50, 4000
    counts = np.zeros((size, size))
    for seed in range(num_keys):
        counts[np.arange(size), keyed_permutation(np.arange(size), seed, 0, size)] += 1
    expected = num_keys / size
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert scipy.stats.chi2.sf(statistic, (size - 1) ** 2) > 1e-6
    assert scipy.stats.chi2.cdf(statistic, (size - 1) ** 2) > 1e-6


def test_neighbours_of_a_large_permutation_have_nothing_to_do_with_each_other():
    size, count = 60_000_000, 20_000
    found = keyed_permutation(np.arange(count), 7, 0, size) / size
    assert scipy.stats.kstest(found, "uniform").pvalue > 1e-6
    other_epoch = keyed_permutation(np.arange(count), 7, 1, size) / size
    for other in (np.roll(found, 1), np.roll(found, 2), np.arange(count) / count, other_epoch):
        assert abs(np.corrcoef(found, other)[0, 1]) < 5 / np.sqrt(count)


def test_a_place_of_a_large_permutation_costs_no_memory_for_the_others():
    tracemalloc.start()
    batch_indices(0, 10**6, 512, 10**12)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
