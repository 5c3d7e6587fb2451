"""The order in which training sees the sequences: a pure function of the seed, the step and the rank."""

from __future__ import annotations

import functools

import numpy as np


def batch_indices(
    seed: int, step: int, batch_size: int, num_sequences: int, rank: int = 0, num_ranks: int = 1
) -> np.ndarray:
    """The sequences of a process's part of the batch at one step, [batch_size / num_ranks] int64.

    The epochs, each a permutation of all the sequences, form one endless stream; the batch is what stands at the
    :func:`stream_positions` of the step. Nothing is kept between steps, so a run that resumes at a step continues as if
    it had never stopped, even with another number of processes. A batch that spans two epochs may hold a sequence
    twice, and one larger than `num_sequences` always does.

    Args:
        seed: the seed of the permutations, from 0 to 2**64 - 1.
        step: the number of the step, from 0.
        batch_size: the sequences of all processes together; a multiple of the number of processes.
        num_sequences: how many sequences there are, at least 1.
        rank: the number of the process, from 0.
        num_ranks: how many processes share the batch.
    """
    positions = stream_positions(step, batch_size, rank, num_ranks)
    epochs, offsets = np.divmod(positions, num_sequences)
    pieces = [permuted(offsets[epochs == epoch], seed, int(epoch), num_sequences) for epoch in np.unique(epochs)]
    return np.concatenate(pieces)


def stream_positions(step: int, batch_size: int, rank: int = 0, num_ranks: int = 1) -> np.ndarray:
    """The positions in the endless stream of the sequences of :func:`batch_indices`, [batch_size / num_ranks] int64.

    No two steps or processes share a position, so it can stand for the noise of a sequence at a step.
    """
    size = batch_size // num_ranks
    start = step * batch_size + rank * size
    return np.arange(start, start + size)


LONGEST_HELD = 2**20
"""The most sequences whose permutation is drawn as a whole and held: 8 MiB."""
NUM_ROUNDS = 10


def permuted(offsets: np.ndarray, seed: int, epoch: int, num_sequences: int) -> np.ndarray:
    """What stands at these offsets of the permutation of an epoch, int64."""
    if num_sequences <= LONGEST_HELD:
        held: np.ndarray = _permutation(seed, epoch, num_sequences)[offsets]
        return held
    return keyed_permutation(offsets, seed, epoch, num_sequences)


def keyed_permutation(offsets: np.ndarray, seed: int, epoch: int, size: int) -> np.ndarray:
    """What stands at these offsets of a permutation of `size` numbers, of which nothing else is computed or held.

    A Feistel network is a permutation of the numbers of 2 k bits, whatever its rounds compute (Luby & Rackoff 1988).
    A number that it takes beyond `size` is taken on until it is not, which makes it a permutation of fewer numbers
    (cycle walking: Black & Rogaway 2002, section 3).

    Args:
        offsets: [N] int64, from 0 to size - 1.
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    philox = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    keys = np.asarray(philox.random_raw(NUM_ROUNDS), dtype=np.uint64)
    numbers, outside = offsets.astype(np.uint64), np.arange(len(offsets))
    while len(outside):
        left, right = numbers[outside] >> half, numbers[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        numbers[outside] = left << half | right
        outside = outside[numbers[outside] >= size]
    return numbers.astype(np.int64)


def _mixed(words: np.ndarray) -> np.ndarray:
    """Each of these words of 64 bits as another that looks random (the output function of SplitMix64: Steele et al.
    2014, figure 17)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = words ^ (words >> np.uint64(31))
    return mixed


@functools.lru_cache(maxsize=2)  # a batch at the border of two epochs needs both
def _permutation(seed: int, epoch: int, num_sequences: int) -> np.ndarray:
    # A counter-based generator: seed and epoch are its key, so each pair has a stream of its own.
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    return generator.permutation(num_sequences)
