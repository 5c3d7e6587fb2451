"""The protocol of an objective: from what z is inferred in training, and what the slow step scores."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol, Self, TypeVar

from torch import Tensor

from ltm_pyro.inference.base import Model, PosteriorScheme, infer
from ltm_pyro.inference.noise import Noise
from ltm_pyro.inference.streaming import BlockedBatch
from ltm_pyro.inference.svi import SlowLoss, as_number, elbo_backward


class TextBatch(BlockedBatch, Protocol):
    """A batch of texts, whose tokens stand in an order."""

    def prefix(self, num_tokens: Tensor) -> Self:
        """The same texts, each weighted up to so many tokens ([B]) and not beyond."""
        ...


AnyTextBatch = TypeVar("AnyTextBatch", bound=TextBatch)


class Objective(Protocol):
    """What training lowers. Each objective has a file of its own; `OBJECTIVES` lists them.

    It is a frozen dataclass of its settings, which become options. The first sentence of its docstring is its help.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    figure: ClassVar[str]
    """The figure that the loss of a scheme with a density estimates, and that held-out text is scored with: a name in
    `ltm_pyro.evaluation.estimators.ESTIMATORS`."""

    @property
    def block_size(self) -> int | None:
        """The tokens in a block, where z is inferred from the blocks before it; None where it is inferred at once."""
        ...

    def backward(
        self,
        model: Model,
        synchronised: Model,
        scheme: PosteriorScheme,
        batch: TextBatch,
        rng: Noise,
        num_tokens: float,
    ) -> SlowLoss:
        """Infer z for one micro-batch, and add the gradient of the loss per token to the weights' `.grad`.

        Args:
            model: what z is inferred with.
            synchronised: the same model, where a backward pass of it takes the mean of the gradients over processes.
            rng: the noise of each sequence. Its purposes and steps are the objective's choice.
            num_tokens: what the summed loss is divided by: the predicted tokens of all batches that share one update.
        """
        ...


class InferredAtOnce(ABC):
    """An objective that infers z of each text once, from a part of it, and whose loss is that of the whole text."""

    figure: ClassVar[str] = "elbo"
    block_size: ClassVar[None] = None

    @abstractmethod
    def evidence(self, batch: AnyTextBatch, rng: Noise) -> AnyTextBatch:
        """The texts, weighted on the tokens that z is inferred from."""

    def backward(
        self,
        model: Model,
        synchronised: Model,
        scheme: PosteriorScheme,
        batch: TextBatch,
        rng: Noise,
        num_tokens: float,
    ) -> SlowLoss:
        """Infer z from the evidence, then add the gradient of the negative ELBO of the batch."""
        evidence = self.evidence(batch, rng)
        state = infer(scheme, model, evidence, rng)
        loss = elbo_backward(synchronised, scheme.guide(model, state, evidence, rng), batch, num_tokens)
        return loss + SlowLoss(
            num_skipped_fast_steps=as_number(state.num_skipped.sum()),
            # Where no sequence could take any step, the posteriors are no better than their start.
            num_unusable=as_number((state.num_skipped >= state.step).all().long()) if scheme.num_steps else 0,
        )
