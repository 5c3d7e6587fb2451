"""The order in which training sees the sequences: a pure function of the seed and the step."""

from __future__ import annotations

import functools

import numpy as np


def batch_indices(seed: int, step: int, batch_size: int, num_sequences: int) -> np.ndarray:
    """The sequences of the batch at one step, [batch_size] int64.

    The epochs, each a permutation of all the sequences, form one endless stream; the batch is positions
    `step * batch_size` to `(step + 1) * batch_size` of it. Nothing is kept between steps, so a run that resumes at a
    step goes on as if it had never stopped. A batch that spans two epochs may hold a sequence twice, and one larger
    than `num_sequences` always does.

    Args:
        seed: of the permutations, from 0 to 2**64 - 1.
        step: from 0.
        batch_size: at least 1.
        num_sequences: at least 1.
    """
    start, stop = step * batch_size, (step + 1) * batch_size
    pieces = []
    for epoch in range(start // num_sequences, (stop - 1) // num_sequences + 1):
        offset = epoch * num_sequences
        pieces.append(_permutation(seed, epoch, num_sequences)[max(start - offset, 0) : stop - offset])
    return np.concatenate(pieces)


@functools.lru_cache(maxsize=2)  # a batch at the border of two epochs needs both
def _permutation(seed: int, epoch: int, num_sequences: int) -> np.ndarray:
    # A counter-based generator: seed and epoch are its key, so each pair has a stream of its own.
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    return generator.permutation(num_sequences)
