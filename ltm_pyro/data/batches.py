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
    pieces = [_permutation(seed, epoch, num_sequences)[offsets[epochs == epoch]] for epoch in np.unique(epochs)]
    return np.concatenate(pieces)


def stream_positions(step: int, batch_size: int, rank: int = 0, num_ranks: int = 1) -> np.ndarray:
    """The positions in the endless stream of the sequences of :func:`batch_indices`, [batch_size / num_ranks] int64.

    No two steps or processes share a position, so it can stand for the noise of a sequence at a step.
    """
    size = batch_size // num_ranks
    start = step * batch_size + rank * size
    return np.arange(start, start + size)


@functools.lru_cache(maxsize=2)  # a batch at the border of two epochs needs both
def _permutation(seed: int, epoch: int, num_sequences: int) -> np.ndarray:
    # A counter-based generator: seed and epoch are its key, so each pair has a stream of its own.
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    return generator.permutation(num_sequences)
