"""The objective that trains what the code length of a text measures: z of each block is inferred from the past.

    loss = Σ_i E_{z ~ q_{i-1}} [-log p(b_i | z, x_<)],    q_i = absorb(q_{i-1}, b_i)

for the blocks b_1, b_2, … of a text, where q_0 is p(z), or a point at its mean for a scheme of points. This is
variational filtering (Marino et al. 2018, arXiv 1811.05090) with the model's own weights learned by the same pass. No
KL divergence is paid, since z is inferred from what the reader has read already.

The gradient is of first order: z is a constant for it, but for what the newest block changed of it through an encoder.
So the gradient of a block's loss with respect to z, from which the next posterior is made, and that with respect to the
weights come from one backward pass.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

from ltm_pyro.errors import require_whole
from ltm_pyro.inference.base import Model, PosteriorScheme, State
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.objectives.base import TextBatch
from ltm_pyro.inference.streaming import Stream, num_positions, which_go_on
from ltm_pyro.inference.svi import SlowLoss, accumulating, as_number, predict_backward


@dataclass(frozen=True)
class Past:
    """For each block, the blocks before it; the loss is the code length of the blocks."""

    block_size: int = 128
    """past: the number of tokens in a block."""

    figure: ClassVar[str] = "prequential"

    def __post_init__(self) -> None:
        require_whole("block_size", self.block_size, 1)

    def backward(
        self,
        model: Model,
        synchronised: Model,
        scheme: PosteriorScheme,
        batch: TextBatch,
        rng: Noise,
        num_tokens: float,
    ) -> SlowLoss:
        loss, stream = SlowLoss(), Stream(scheme, model, batch, rng, trains_encoder=True)
        while True:
            is_last = stream.num_read + self.block_size >= num_positions(batch)
            z, block = stream.draw(), stream.block(self.block_size)
            with nullcontext() if is_last else accumulating(synchronised):
                of_block, gradient = predict_backward(synchronised, z, block, num_tokens)
            loss += of_block
            if is_last:
                break
            stream.read(self.block_size, z, gradient)
            goes_on = which_go_on(stream.batch, stream.num_read)
            if goes_on is not None:
                loss += _skipped_of(stream.state[~goes_on])
                stream.keep(goes_on)
        return loss + _skipped_of(stream.state)


def _skipped_of(state: State) -> SlowLoss:
    return SlowLoss(num_skipped_fast_steps=as_number(state.num_skipped.sum()))
