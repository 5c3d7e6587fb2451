"""The objective that meets in training what generation meets: z of a text is inferred from a part of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ltm_pyro.inference.base import ids_of
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.objectives.base import AnyTextBatch, InferredAtOnce


@dataclass(frozen=True)
class Prefix(InferredAtOnce):
    """A prefix of random length; the loss is that of the whole sequence."""

    def evidence(self, batch: AnyTextBatch, rng: Noise) -> AnyTextBatch:
        return random_prefix(batch, rng)


def random_prefix(batch: AnyTextBatch, rng: Noise) -> AnyTextBatch:
    """Each text weighted up to a split point of its own, uniform from 0 (z from the prior) to all its tokens."""
    num_tokens, ids = batch.weights.sum(1), ids_of(batch)
    fraction = rng.uniform("split", ids, torch.zeros_like(ids)).to(num_tokens.device)
    return batch.prefix((fraction * (num_tokens + 1)).floor())
