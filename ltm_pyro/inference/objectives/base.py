"""The protocol of an objective: from what z is inferred in training, and what the slow step scores."""

from __future__ import annotations

from typing import Protocol, Self

from torch import Tensor

from ltm_pyro.inference.base import Batch, Model, PosteriorScheme, infer
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.svi import SlowLoss, elbo_backward


class TextBatch(Batch, Protocol):
    """A batch of texts, whose tokens stand in an order."""

    @property
    def weights(self) -> Tensor:
        """[B, T]: the weight of each token in the log-likelihood."""
        ...

    def prefix(self, num_tokens: Tensor) -> Self:
        """The same texts, each weighted up to so many tokens ([B]) and not beyond."""
        ...


class Objective(Protocol):
    """One micro-batch of a slow step. Each objective has a file of its own; `OBJECTIVES` lists them."""

    def __call__(
        self,
        model: Model,
        synchronised: Model,
        scheme: PosteriorScheme,
        batch: TextBatch,
        rng: Noise,
        num_tokens: float,
    ) -> SlowLoss:
        """Infer z, and add the gradient of the loss per token to the weights' `.grad`.

        Args:
            model: what z is inferred with.
            synchronised: the same model, where a backward pass of it takes the mean of the gradients over processes.
            rng: the noise of each sequence. Its purposes and steps are the objective's choice.
            num_tokens: what the summed loss is divided by: the predicted tokens of all batches that share one update.
        """
        ...


def infer_and_score(
    model: Model,
    synchronised: Model,
    scheme: PosteriorScheme,
    evidence: TextBatch,
    batch: TextBatch,
    rng: Noise,
    num_tokens: float,
) -> SlowLoss:
    """Infer z from the evidence, then add the gradient of the negative ELBO of the batch."""
    state = infer(scheme, model, evidence, rng)
    loss = elbo_backward(synchronised, scheme.guide(model, state, evidence, rng), batch, num_tokens)
    return loss + SlowLoss(
        num_skipped_fast_steps=int(state.num_skipped.sum()),
        # Where no sequence could take any step, the posteriors are no better than their start.
        num_unusable=int(scheme.num_steps > 0 and not (state.num_skipped < state.step).any()),
    )
