"""The prequential code: every block of a text is predicted with z inferred from the tokens before it.

    Σ_blocks -log (1/K) Σ_k p(x_block | z_k, x_<block),     z_k ~ q(z; x_<block)

A sum of -log probabilities that are each fixed before their block is seen is a valid code length (Dawid 1984), whatever
the quality of q: the figure to hold against a model without z. It is not a bound on the model's own -log p(x), and
may lie on either side of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ltm_pyro.inference.base import (
    Batch,
    Model,
    PosteriorScheme,
    frozen,
    infer,
    log_joint,
    require_full_weights,
)
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.schemes.prior import PRIOR


class SequentialBatch(Batch, Protocol):
    """A batch whose observations stand in an order, each with a weight in the log-likelihood."""

    @property
    def weights(self) -> Tensor:
        """[B, T]: 1 for what is observed, 0 for padding."""
        ...

    def with_weights(self, weights: Tensor) -> Any:
        """The same observations with other weights."""
        ...

    def cut(self, num_positions: int) -> Any:
        """The first positions alone."""
        ...


@dataclass(frozen=True)
class Prequential:
    """The code length of a batch."""

    block_nats: Tensor
    """[number of blocks, B] float64; 0 for a block that is all padding."""
    num_samples: int
    """K, the number of draws of z for each block."""

    @property
    def nats(self) -> Tensor:
        """[B]: the code length of each text."""
        return self.block_nats.sum(0)


@torch.no_grad()
def prequential(
    model: Model, batch: SequentialBatch, scheme: PosteriorScheme, block_size: int, num_samples: int, rng: Noise
) -> Prequential:
    """The code length of each text, whose blocks are scored one after another.

    The first block is scored with draws from the prior, every other with draws of the scheme's posterior given the
    positions before it. Nothing else of the text reaches the draws.

    Args:
        block_size: the number of positions in a block.
        num_samples: K, the number of draws of z for each block. Their *whole-block* probabilities are averaged.

    Raises:
        ValueError: if a position weighs anything but 0 or 1, or a block has no position.
    """
    if block_size < 1:
        raise ValueError(f"a block needs at least one position, not {block_size}")
    require_full_weights(batch)
    positions = torch.arange(batch.weights.shape[1], device=batch.weights.device)
    block_nats = []
    for start in range(0, batch.weights.shape[1], block_size):
        block = batch.with_weights(batch.weights * (positions >= start)).cut(start + block_size)
        if start:
            state = infer(scheme, model, batch.cut(start), rng)
            draws = scheme.posterior(state, num_samples, rng).samples.flatten(0, 1)
        else:
            prior = PRIOR.distribution(infer(PRIOR, model, batch, rng), rng, "prior")
            draws = prior.sample((num_samples,))
        with frozen(model, block) as block:
            # One draw at a time: memory does not grow with their number.
            log_probs = torch.stack([log_joint(model, block, z).log_likelihood.double().cpu() for z in draws])
        block_nats.append(math.log(len(draws)) - log_probs.logsumexp(0))
    return Prequential(torch.stack(block_nats), num_samples)
