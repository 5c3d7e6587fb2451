"""The paper's objective (Kong et al. 2025, algorithm 1): z of a text is inferred from all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ltm_pyro.inference.base import Model, PosteriorScheme
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.objectives.base import TextBatch, infer_and_score
from ltm_pyro.inference.svi import SlowLoss


@dataclass(frozen=True)
class Whole:
    """The whole sequence, which is the paper's objective; the loss is that of the whole sequence."""

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
        return infer_and_score(model, synchronised, scheme, batch, batch, rng, num_tokens)
