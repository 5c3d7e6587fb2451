"""Streaming inference: z of a text from the blocks that have been read of it, one after another.

    q_0 = p(z), or a point at its mean for a scheme of points;    q_i = absorb(q_{i-1}, b_i)

(streaming variational Bayes: Broderick et al. 2013, arXiv 1307.6769). A scheme that can absorb does so from one
gradient of the block's log-likelihood, whatever came before, or by an encoder that reads the block: a text of any
length is read in memory that does not grow, and in time that grows with its length only. With T steps it also reads the
T - 1 blocks before that one again, one gradient each: the newest block counts most, and each one before it half as much
as the next. In all, a block counts once. (Several steps on the newest block alone make the next prediction worse than a
single one does.) Every other scheme infers z again from all that has been read, starting at the mean of its last
posterior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, Self, cast

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ltm_pyro.inference.base import (
    LATENT,
    Batch,
    BlockEvidence,
    IndexedBatch,
    Model,
    PosteriorScheme,
    StreamingEncoderScheme,
    StreamingScheme,
    absorbs_by_encoder,
    can_absorb,
    frozen,
    infer,
    keep_finite,
    latent_prior,
    log_likelihood,
)
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.schemes.prior import PRIOR
from ltm_pyro.inference.surroundings import entry, normal_tensors


class BlockedBatch(IndexedBatch, Protocol):
    """A batch of texts, whose observations stand in an order and can be read in blocks."""

    @property
    def weights(self) -> Tensor:
        """[B, T]: the weight of each position in the log-likelihood."""
        ...

    def cut(self, num_positions: int) -> Self:
        """The first positions alone."""
        ...

    def block(self, start: int, end: int, reach: int) -> Self:
        """The texts weighted on positions `start` to `end` - 1 only.

        Args:
            reach: positions further than this before the end of a prediction's own do not matter to it. They may be
                left out.
        """
        ...


def num_positions(batch: BlockedBatch) -> int:
    """T, the number of positions of the longest text of the batch."""
    return batch.weights.shape[1]


def which_go_on(batch: BlockedBatch, start: int) -> Tensor | None:
    """Which texts have a position from `start` on that counts, [B]; None where all have one.

    A text that has ended need not be computed any more, which in a batch of texts of many lengths saves much. On a
    device all go on: to ask for their lengths would be a wait, and a compiler would be asked for another shape.
    """
    if batch.weights.device.type != "cpu":
        return None
    goes_on = (batch.weights[:, start:] != 0).any(1)
    return None if goes_on.all() or not goes_on.any() else goes_on


def block_of(model: Model, batch: BlockedBatch, start: int, end: int) -> Any:
    """Positions `start` to `end` - 1 of each text, with as much of what stands before them as the program reads.

    A program that reads all of the past has no attribute `reach`.
    """
    return batch.block(start, end, getattr(model, "reach", num_positions(batch) + 1))


class Stream:
    """z of the texts of a batch while they are read, a block at a time.

    Nothing of a position that has not been read reaches the posterior.

    Args:
        batch: the texts.
        rng: the noise of each sequence.
        trains_encoder: whether draws carry the gradient of an encoder: that of its reading of the newest block. The
            posterior before that block is a constant.
    """

    @entry()
    def __init__(
        self, scheme: PosteriorScheme, model: Model, batch: BlockedBatch, rng: Noise, trains_encoder: bool = False
    ) -> None:
        batch = normal_tensors(batch)
        self.model, self.batch, self._trains_encoder = model, batch, trains_encoder
        self._rng, self._num_updates = rng, 0
        self._infer_with = scheme
        self.num_read = 0
        """The number of positions that have been read."""
        # A scheme that cannot absorb would have to infer from nothing, where the posterior is the prior.
        self.scheme: PosteriorScheme = scheme if can_absorb(scheme) else PRIOR
        """What `state` is a state of."""
        with frozen(model):
            self.state = self.scheme.init(model, batch.cut(0), rng)
            self._prior = latent_prior(model, batch.cut(0))
        if trains_encoder and absorbs_by_encoder(self.scheme):
            # It changes nothing, but so each of the encoder's weights has a gradient, which processes wait for.
            self._propose(self.scheme, batch.cut(0))

    @property
    def rng(self) -> Noise:
        """The noise of what is drawn from the present posterior: that of the next one is new."""
        return NoiseOfUpdate(self._rng, self._num_updates)

    @entry()
    def draw(self) -> Tensor:
        """A draw of z given what has been read, [B, *event_shape], without gradient but for that of an encoder."""
        if absorbs_by_encoder(self.scheme):
            return self.scheme.distribution(self.state, self.rng, "guide").rsample()
        read = self.batch.cut(self.num_read)
        guide = self.scheme.guide(self.model, self.state, read, self.rng)
        value = poutine.trace(guide).get_trace(read).nodes[LATENT]["value"]
        return cast(Tensor, value).detach()

    @entry()
    def keep(self, index: Tensor) -> None:
        """Go on with these texts alone, and forget the others."""
        self.batch, self.state = self.batch[index], self.state[index]
        with frozen(self.model):
            self._prior = latent_prior(self.model, self.batch.cut(0))

    def posterior(self, num_samples: int) -> Posterior:
        """Draws of z given what has been read."""
        return self.scheme.posterior(self.state, num_samples, self.rng)

    @entry()
    def continued(self, batch: BlockedBatch) -> None:
        """Go on with the same texts, of which more positions are known now."""
        self.batch = normal_tensors(batch)

    def block(self, size: int) -> Any:
        """The next block, of at most `size` positions."""
        return block_of(self.model, self.batch, self.num_read, min(self.num_read + size, num_positions(self.batch)))

    @entry()
    def read(self, size: int, z: Tensor | None = None, gradient: Tensor | None = None) -> None:
        """Infer z from the next block as well; without effect where all has been read.

        Args:
            size: the number of positions of the block.
            z: a draw of z before the block was read, with
            gradient: the gradient of -log p(block | z) there, where they are known already.
        """
        if self.num_read >= num_positions(self.batch):
            return
        block, start = self.block(size), self.num_read
        self.num_read = min(self.num_read + size, num_positions(self.batch))
        if not can_absorb(self.scheme):
            warm = self.scheme.mean(self.state) if self.scheme is self._infer_with else None
            self.scheme = self._infer_with
            self.state = infer(self.scheme, self.model, self.batch.cut(self.num_read), self.rng, warm)
            self._num_updates += 1
            return
        steps = shares(self.scheme.num_steps)[: 1 + math.ceil(start / size)]
        # Where training knows the gradient: before an encoder has read the block.
        newest = self._evidence(block, steps[0], True, z, gradient) if steps else None
        if absorbs_by_encoder(self.scheme):
            self._propose(self.scheme, block)
            self._num_updates += 1
        if newest is not None:
            self._absorb(self.scheme, newest)
        for number, share in enumerate(steps[1:]):  # more steps read more of the past again, and not the same block
            end = start - number * size
            again = block_of(self.model, self.batch, max(0, end - size), end)
            self._absorb(self.scheme, self._evidence(again, share, False))

    def _evidence(
        self, block: Any, share: float, is_new: bool, z: Tensor | None = None, gradient: Tensor | None = None
    ) -> BlockEvidence:
        """What a block says at a draw of z; `z` and `gradient` are those of :meth:`read`."""
        if z is None or gradient is None:
            z = self.draw()
            gradient = gradient_of_block(self.model, block, z)
        return BlockEvidence(z, gradient, share, is_new)

    def _absorb(self, scheme: StreamingScheme, evidence: BlockEvidence) -> None:
        self.state = keep_finite(self.state, scheme.absorb(self.state, evidence, self._prior))
        self._num_updates += 1

    def _propose(self, scheme: StreamingEncoderScheme, block: Any) -> None:
        """Let the encoder read a block, from a posterior that is a constant."""
        self.state = self.state.detached()
        if self._trains_encoder:
            with pyro.get_param_store().scope():  # the global one would hold on to the weights
                proposed = scheme.propose(self.model, self.state, block)
        else:
            with frozen(self.model), torch.no_grad():
                proposed = scheme.propose(self.model, self.state, block)
        self.state = keep_finite(self.state, proposed)


def shares(num_steps: int) -> list[float]:
    """How much the blocks count that are read in one update, the newest first: each half as much as the one before."""
    return [2.0**-number / (2 - 2.0 ** (1 - num_steps)) for number in range(num_steps)]


@dataclass(frozen=True)
class NoiseOfUpdate:
    """The noise of a stream after so many updates: for every purpose, independent of that after any other number."""

    noise: Noise
    num_updates: int

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
        return self.noise.normal(self._here(purpose), sequence_ids, steps, event_shape, sample_shape, like=like)

    def uniform(self, purpose: str, sequence_ids: Tensor, steps: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return self.noise.uniform(self._here(purpose), sequence_ids, steps, sample_shape)

    def _here(self, purpose: str) -> str:
        return f"{purpose} after update {self.num_updates}" if self.num_updates else purpose


def gradient_of_block(model: Model, block: Batch, z: Tensor) -> Tensor:
    """The gradient of -log p(block | z) with respect to z, [B, *event_shape]; that of the weights is not touched."""
    with frozen(model), torch.enable_grad():
        z, block = normal_tensors(z), normal_tensors(block)
        z = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(-log_likelihood(model, block, z).sum(), z)
    return gradient
