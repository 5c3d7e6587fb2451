"""The prequential code: every block of a text is predicted with z inferred from the tokens before it.

    Σ_blocks -log (1/K) Σ_k p(x_block | z_k, x_<block),     z_k ~ q(z; x_<block)

A sum of -log probabilities that are each fixed before their block is seen is a valid code length (Dawid 1984), whatever
the quality of q: the figure to hold against a model without z. It is not a bound on the model's own -log p(x), and
may lie on either side of it.

Draws may also count by how well they explain what stands before the block:

    Σ_blocks -log Σ_k w_k p(x_block | z_k, x_<block) / Σ_k w_k,     w_k = p(x_<block, z_k) / q(z_k; x_<block)

The weights are fixed before the block is seen as well, so that it is still a code. With many draws it comes to the
model's own -log p(x), whatever q is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.errors import require_whole
from ltm_pyro.inference.base import (
    Batch,
    Model,
    PosteriorScheme,
    frozen,
    infer,
    log_joint,
    log_likelihood,
    require_full_weights,
)
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.schemes.prior import PRIOR
from ltm_pyro.inference.streaming import BlockedBatch, Stream, block_of, num_positions, which_go_on
from ltm_pyro.inference.surroundings import entry

Density = Callable[[PosteriorScheme, Any, Any, Any, Noise], TorchDistribution]
"""A q with a density, batch_shape [B], of a scheme, its state, the model, what z was inferred from, and noise."""


@dataclass(frozen=True)
class Prequential:
    """The code length of a batch."""

    block_nats: Tensor
    """[number of blocks, B] float64; 0 for a block that is all padding."""
    num_samples: int
    """K, the number of draws of z for each block."""
    token_nats: Tensor | None = None
    """[B, T] float64: the part of each token, given all before it; 0 for padding. None if it was not asked for."""

    @property
    def nats(self) -> Tensor:
        """[B]: the code length of each text."""
        return self.block_nats.sum(0)


@entry()
@torch.no_grad()
def prequential(
    model: Model,
    batch: BlockedBatch,
    scheme: PosteriorScheme,
    block_size: int,
    num_samples: int,
    rng: Noise,
    is_streaming: bool = False,
    density: Density | None = None,
    by_token: bool = False,
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
        density: makes a q with a density of a scheme's posterior. Then its draws are weighted, which costs as many
            passes over all that stands before a block as there are draws, and the first block is always scored with
            draws from the prior.
        by_token: whether to give the part of each token too, for a program with a method `token_log_probs(batch, z)`.
            It is -log of its probability given all before it, by the chain rule: within a block each token is predicted
            by all draws, which count by how well they predicted the tokens of the block before it.

    Raises:
        ValueError: if the batch is empty, a position weighs anything but 0 or 1, a block has no position, or there is
            to be no draw.
    """
    require_whole("block_size", block_size, 1)
    require_whole("num_samples", num_samples, 1)
    require_full_weights(batch)
    stream = Stream(scheme, model, batch, rng) if is_streaming else None
    starts = range(0, num_positions(batch), block_size)
    # Of one piece: small tensors between the large ones, which they outlive, would keep their memory from being freed.
    block_nats = torch.zeros(len(starts), len(batch), dtype=torch.float64)
    token_nats = torch.zeros(batch.weights.shape, dtype=torch.float64) if by_token else None
    texts = torch.arange(len(batch))  # those that go on
    for number, start in enumerate(starts):
        goes_on = which_go_on(batch, start)
        if goes_on is not None:
            batch, texts = batch[goes_on], texts[goes_on]
            if stream is not None:
                stream.keep(goes_on)
        read, block = batch.cut(start), block_of(model, batch, start, start + block_size)
        log_weights = None
        if not start and (stream is None or density is not None):
            prior = PRIOR.distribution(infer(PRIOR, model, read, rng), rng, "prior")
            draws = prior.sample((num_samples,))
        else:
            used, state, noise = (
                (scheme, infer(scheme, model, read, rng), rng)
                if stream is None
                else (stream.scheme, stream.state, stream.rng)
            )
            if density is None:
                draws = used.posterior(state, num_samples, noise).samples.flatten(0, 1)
            else:
                q = density(used, state, model, read, noise)
                draws = q.sample((num_samples,))
                log_weights = _log_weights(model, read, q, draws)
        if token_nats is None:
            block_nats[number, texts] = _block_nats(model, block, draws, log_weights)
        else:
            of_tokens = _token_nats(model, block, draws, log_weights)
            size = min(block_size, num_positions(batch) - start)
            token_nats[texts, start : start + size] = of_tokens[:, -size:]
            block_nats[number, texts] = of_tokens.sum(1)
        if stream is not None and start + block_size < num_positions(batch):
            stream.read(block_size)
    return Prequential(block_nats, num_samples, token_nats)


def _block_nats(model: Model, block: Batch, draws: Tensor, log_weights: Tensor | None) -> Tensor:
    """-log of the weighted mean over draws of the probability of a block, [B]; without weights, of the plain mean."""
    with frozen(model, block) as block:
        # One draw at a time: memory does not grow with their number.
        log_probs = torch.stack([log_likelihood(model, block, z).double().cpu() for z in draws])
    log_weights = torch.zeros_like(log_probs) if log_weights is None else log_weights
    return log_weights.logsumexp(0) - (log_weights + log_probs).logsumexp(0)


def _token_nats(model: Any, block: Batch, draws: Tensor, log_weights: Tensor | None) -> Tensor:
    """-log of the probability of each token of a block, [B, T], whose sums are those of :func:`_block_nats`.

    With L_n the log of the weighted sum over draws of the probability of the first n tokens, it is L_{n-1} - L_n.
    """
    with frozen(model, block) as block:
        log_probs = torch.stack([model.token_log_probs(block, z).double().cpu() for z in draws])
    log_weights = torch.zeros(log_probs.shape[:2], dtype=torch.float64) if log_weights is None else log_weights
    so_far = (log_weights.unsqueeze(2) + log_probs.cumsum(2)).logsumexp(0)
    return torch.cat([log_weights.logsumexp(0).unsqueeze(1), so_far], 1).diff(dim=1).neg()


def _log_weights(model: Model, read: BlockedBatch, q: TorchDistribution, draws: Tensor) -> Tensor:
    """log p(x, z) / q(z) of draws of q, [K, B] float64, for what has been read."""
    log_weights = []
    with frozen(model, read) as read:
        for z in draws:
            joint = log_joint(model, read, z)
            # Each term in float64, as in `iwae`.
            log_p = joint.log_likelihood.double().cpu() + joint.log_prior.double().cpu()
            log_weights.append(log_p - q.log_prob(z).double().cpu())
    return torch.stack(log_weights)
