"""The objective that meets in training what generation meets: z of a text is inferred from a part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch

from ltm_pyro.inference.base import Model, PosteriorScheme
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.objectives.base import TextBatch, infer_and_score
from ltm_pyro.inference.svi import SlowLoss

AnyTextBatch = TypeVar("AnyTextBatch", bound=TextBatch)


@dataclass(frozen=True)
class Prefix:
    """A prefix of random length; the loss is that of the whole sequence."""

    figure: ClassVar[str] = "elbo"
    block_size: ClassVar[None] = None

    def backward(
        self,
        model: Model,
        synchronised: Model,
        scheme: PosteriorScheme,
        batch: TextBatch,
        rng: Noise,
        num_tokens: float,
    ) -> SlowLoss:
        return infer_and_score(model, synchronised, scheme, random_prefix(batch, rng), batch, rng, num_tokens)


def random_prefix(batch: AnyTextBatch, rng: Noise) -> AnyTextBatch:
    """Each text weighted up to a split point of its own, uniform from 0 (z from the prior) to all its tokens."""
    num_tokens = batch.weights.sum(1).cpu()
    fraction = rng.uniform("split", batch.sequence_ids, torch.zeros_like(batch.sequence_ids))
    return batch.prefix((fraction * (num_tokens + 1)).floor())
