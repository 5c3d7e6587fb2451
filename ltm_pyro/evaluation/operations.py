"""Floating-point operations, counted while the code runs: a multiplication and an addition are two.

PyTorch's `FlopCounterMode` counts matrix products, including those of attention at positions that its mask hides. What
is linear in the number of activations (norms, softmax, rotary positions, optimiser) is left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from ltm_pyro.data import token_batch
from ltm_pyro.evaluation.estimators import Estimator, EstimatorSettings
from ltm_pyro.evaluation.inferred import Inference, Inferred
from ltm_pyro.inference import PosteriorScheme, SequenceNoise
from ltm_pyro.inference.objectives import Objective
from ltm_pyro.models import LatentThoughtModel, TokenBatch
from ltm_pyro.models.attention import written_out


def count(work: Callable[[], object]) -> int:
    """The operations of calling `work`."""
    # The attention kernels of the CPU are not known to the counter; it counts the same computation written out.
    in_place = {torch.ops.aten.addmm_: _of_product_added}  # nor is the sum in place
    with written_out(), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        work()
    return int(counter.get_total_flops())


def _of_product_added(total: torch.Size, a: torch.Size, b: torch.Size, **unused: object) -> int:
    return 2 * a[0] * a[1] * b[1]


def of_training(model: LatentThoughtModel, scheme: PosteriorScheme, objective: Objective) -> float:
    """Operations per token of a training step: inference of z, and the gradient of the weights.

    A step is taken and thrown away: the weights, their `.grad` and torch's global generator are as before.
    """
    batch, rng = _full_sequence(model), SequenceNoise(0)

    def step() -> None:
        objective.backward(model, model, scheme, batch, rng, batch.tokens.numel())

    gradients = {weight: weight.grad for weight in model.parameters()}
    model.zero_grad()  # an existing gradient would be changed in place
    try:
        with torch.random.fork_rng(devices=[]):
            return count(step) / batch.tokens.numel()
    finally:
        for weight, gradient in gradients.items():
            weight.grad = gradient


def of_estimate(
    model: LatentThoughtModel,
    estimator: Estimator,
    inference: Inference,
    settings: EstimatorSettings,
    length: int | None = None,
) -> float:
    """Operations per token of a figure: inference of z, and all draws that are scored.

    Args:
        length: the tokens of a sequence; None for those of the model's.
    """
    batch = _full_sequence(model, length)
    inferred = Inferred(model, batch, inference, SequenceNoise(0))
    return count(lambda: estimator.estimate(inferred, settings)) / batch.tokens.numel()


def _full_sequence(model: LatentThoughtModel, length: int | None = None) -> TokenBatch:
    """One sequence without padding; the count does not depend on which tokens it holds."""
    tokens = torch.zeros(1, length or model.config.length, dtype=torch.int64)
    return token_batch(tokens).to(model.decoder.embedding.weight.device)
