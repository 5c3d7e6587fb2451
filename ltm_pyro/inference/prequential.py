"""The prequential code: every block of a text is predicted with z inferred from the tokens before it.

    Σ_blocks -log (1/K) Σ_k p(x_block | z_k, x_<block),     z_k ~ q(z; x_<block)

A sum of -log probabilities that are each fixed before their block is seen is a valid code length (Dawid 1984), whatever
the quality of q: the figure to hold against a model without z. It is not a bound on the model's own -log p(x), and
may lie on either side of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ltm_pyro.inference.base import Model, PosteriorScheme, frozen, infer, log_likelihood, require_full_weights
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.schemes.prior import PRIOR
from ltm_pyro.inference.streaming import BlockedBatch, Stream, block_of, num_positions


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
    model: Model,
    batch: BlockedBatch,
    scheme: PosteriorScheme,
    block_size: int,
    num_samples: int,
    rng: Noise,
    is_streaming: bool = False,
) -> Prequential:
    """The code length of each text, whose blocks are scored one after another.

    Every block is scored with draws of the scheme's posterior given the positions before it. Nothing else of the text
    reaches the draws.

    Args:
        block_size: the number of positions in a block.
        num_samples: K, the number of draws of z for each block. Their *whole-block* probabilities are averaged.
        is_streaming: whether the posterior before a block is made from that before the block before it
            (`streaming.py`). Otherwise it is inferred anew from all positions before the block, and the first block is
            scored with draws from the prior.

    Raises:
        ValueError: if a position weighs anything but 0 or 1, or a block has no position.
    """
    if block_size < 1:
        raise ValueError(f"a block needs at least one position, not {block_size}")
    require_full_weights(batch)
    stream = Stream(scheme, model, batch, rng) if is_streaming else None
    block_nats = []
    for start in range(0, num_positions(batch), block_size):
        block = block_of(model, batch, start, start + block_size)
        if stream is not None:
            draws = stream.posterior(num_samples).samples.flatten(0, 1)
        elif start:
            state = infer(scheme, model, batch.cut(start), rng)
            draws = scheme.posterior(state, num_samples, rng).samples.flatten(0, 1)
        else:
            prior = PRIOR.distribution(infer(PRIOR, model, batch, rng), rng, "prior")
            draws = prior.sample((num_samples,))
        with frozen(model, block) as block:
            # One draw at a time: memory does not grow with their number.
            log_probs = torch.stack([log_likelihood(model, block, z).double().cpu() for z in draws])
        block_nats.append(math.log(len(draws)) - log_probs.logsumexp(0))
        if stream is not None and start + block_size < num_positions(batch):
            stream.read(block_size)
    return Prequential(torch.stack(block_nats), num_samples)
