"""The paper's objective (Kong et al. 2025, algorithm 1): z of a text is inferred from all of it."""

from __future__ import annotations

from dataclasses import dataclass

from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.objectives.base import AnyTextBatch, InferredAtOnce


@dataclass(frozen=True)
class Whole(InferredAtOnce):
    """The whole sequence, which is the paper's objective; the loss is that of the whole sequence."""

    def evidence(self, batch: AnyTextBatch, rng: Noise) -> AnyTextBatch:
        return batch
