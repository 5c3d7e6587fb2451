"""The randomness of inference: a source of noise that is passed in explicitly, in two forms.

`BatchNoise` draws from a `torch.Generator` for the whole batch at once. Use it in training loops of your own.
`SequenceNoise` draws from a separate stream for each sequence, so that what is inferred for a sequence depends neither
on its batch-mates, nor on their number or order, nor on the number of processes. Evaluation,
`ltm_pyro.train` and the tests use it.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ltm_pyro.errors import require_whole
from ltm_pyro.inference import philox


class Noise(Protocol):
    """A source of random numbers for a batch of sequences.

    Both methods return [*sample_shape, B, *event_shape]. `sequence_ids` and `steps` are [B] int64: the sequences, and
    the step of inference that each is at. `purpose` names what the numbers are for: numbers for one purpose are
    independent of those for another.
    """

    def normal(
        self,
        purpose: str,
        sequence_ids: Tensor,
        steps: Tensor,
        event_shape: torch.Size,
        sample_shape: tuple[int, ...] = (),
        *,
        like: Tensor,
    ) -> Tensor:
        """Standard normal numbers, with dtype and device of `like`."""
        ...

    def uniform(self, purpose: str, sequence_ids: Tensor, steps: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """Numbers from [0, 1), float64, on the device where numbers are drawn; [*sample_shape, B]."""
        ...


class BatchNoise:
    """Noise from one generator for the whole batch. Every call draws anew, whatever its arguments are."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def normal(
        self,
        purpose: str,
        sequence_ids: Tensor,
        steps: Tensor,
        event_shape: torch.Size,
        sample_shape: tuple[int, ...] = (),
        *,
        like: Tensor,
    ) -> Tensor:
        shape = (*sample_shape, len(sequence_ids), *event_shape)
        return torch.randn(shape, generator=self.generator, dtype=like.dtype, device=self.generator.device).to(like)

    def uniform(self, purpose: str, sequence_ids: Tensor, steps: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
        shape = (*sample_shape, len(sequence_ids))
        return torch.rand(shape, generator=self.generator, dtype=torch.float64, device=self.generator.device)


class SequenceNoise:
    """Noise that is a pure function of (seed, sequence id, purpose, step).

    Each such key has a stream of NumPy's counter-based Philox generator (Salmon et al. 2011). The numbers are drawn in
    float32 on the CPU and then converted, so that a run in float64 or on another device sees the same numbers.

    Args:
        seed: from 0 to 2**64 - 1.
        device: where numbers are drawn. A device other than the CPU computes them itself, for all sequences at once
            (`philox.py`): nothing is copied there and the host does not wait, but they are not those of the CPU.

    Raises:
        ValueError: if the seed is not such a number.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        require_whole("seed", seed, 0)
        if seed >= 2**64:
            raise ValueError(f"seed must be below 2**64, not {seed}")
        self.seed = seed
        self.device = torch.device(device)
        self._by_numpy = self.device.type == "cpu"

    def normal(
        self,
        purpose: str,
        sequence_ids: Tensor,
        steps: Tensor,
        event_shape: torch.Size,
        sample_shape: tuple[int, ...] = (),
        *,
        like: Tensor,
    ) -> Tensor:
        shape = (*sample_shape, *event_shape)
        if not self._by_numpy:
            ids, steps = sequence_ids.to(self.device), steps.to(self.device)
            numbers = philox.normal(self._key(purpose), ids, steps, math.prod(shape))
            return numbers.view(-1, *shape).movedim(0, len(sample_shape)).to(like)
        draws = [
            generator.standard_normal(math.prod(shape), dtype=np.float32).reshape(shape)
            for generator in self._generators(purpose, sequence_ids, steps)
        ]
        return torch.from_numpy(np.stack(draws, axis=len(sample_shape))).to(like)

    def uniform(self, purpose: str, sequence_ids: Tensor, steps: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
        if not self._by_numpy:
            ids, steps = sequence_ids.to(self.device), steps.to(self.device)
            numbers = philox.uniform(self._key(purpose), ids, steps, math.prod(sample_shape))
            return numbers.view(-1, *sample_shape).movedim(0, -1)
        draws = [generator.random(sample_shape) for generator in self._generators(purpose, sequence_ids, steps)]
        return torch.from_numpy(np.stack(draws, axis=-1))

    def _key(self, purpose: str) -> int:
        """A number of 64 bits for the seed and the purpose."""
        digest = hashlib.blake2b(struct.pack("<Q", self.seed) + purpose.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def _generators(self, purpose: str, sequence_ids: Tensor, steps: Tensor) -> list[np.random.Generator]:
        # Key and counter are separate in Philox: no two (seed, id, purpose, step) share a stream. The first counter
        # word counts the numbers drawn.
        purpose_id = zlib.crc32(purpose.encode())
        return [
            np.random.Generator(
                np.random.Philox(
                    key=np.array([self.seed, sequence_id], dtype=np.uint64),
                    counter=np.array([0, 0, step, purpose_id], dtype=np.uint64),
                )
            )
            for sequence_id, step in zip(sequence_ids.tolist(), steps.tolist(), strict=True)
        ]
