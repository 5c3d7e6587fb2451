"""How far a model's figures lie from the truth: both sides of -log p(x), on texts that the model itself wrote.

Bidirectional Monte Carlo (Grosse, Ghahramani & Adams 2015, arXiv 1511.02543): where a text was drawn together with
its z, that z is an exact draw from p(z | x), and annealing can also be run backwards from it. Forward and backward
chains bound -log p(x) from above and from below. On real text only the upper side is available; the certificate shows
how tight the same estimators are where both sides are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltm_pyro.evaluation.estimators import ESTIMATORS, EstimatorSettings
from ltm_pyro.evaluation.estimators.ais import annealing_plan
from ltm_pyro.evaluation.figures import ratio_error
from ltm_pyro.evaluation.inferred import Inference, Inferred
from ltm_pyro.inference import SequenceNoise, ais
from ltm_pyro.models import LatentThoughtModel, simulate


@dataclass(frozen=True)
class Certificate:
    """Figures of -log p(x) for N texts from the model, each [N] float64 in nats."""

    num_tokens: Tensor
    """Predicted tokens of each text."""
    lower: Tensor
    """Reverse annealing: in expectation at most -log p(x)."""
    upper: Tensor
    """Forward annealing: in expectation at least -log p(x)."""
    elbo: Tensor
    """-ELBO of the q that both started from: in expectation at least -log p(x)."""

    def record(self) -> dict[str, Any]:
        """Nats per token of all texts, the width between the sides, and how far the ELBO may be off."""
        values = {"lower": self.lower, "upper": self.upper, "elbo": self.elbo}
        gaps = {"gap": self.upper - self.lower, "elbo_excess": self.elbo - self.lower}
        record: dict[str, Any] = {"num_sequences": len(self.lower), "num_tokens": int(self.num_tokens.sum())}
        for name, nats in (values | gaps).items():
            record[f"{name}_nats_per_token"] = (nats.sum() / self.num_tokens.sum()).item()
        for name, nats in gaps.items():
            # Over texts: their chains are independent, while those of one text share a start.
            record[f"{name}_standard_error"] = ratio_error(
                list(zip(nats.tolist(), self.num_tokens.tolist(), strict=True))
            )
        return record


def certify(
    model: LatentThoughtModel,
    inference: Inference,
    settings: EstimatorSettings,
    num_texts: int,
    batch_size: int,
    seed: int,
) -> Certificate:
    """Draw texts from the model and bound -log p(x) of each from both sides.

    Neither q nor the temperatures and step sizes know the z that made a text.

    Args:
        inference: how q is made, where the chains start.
        num_texts: N.
        batch_size: texts that are annealed together.
    """
    rng = SequenceNoise(seed)
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, num_texts, batch_size):
        z, batch = simulate(model, min(batch_size, num_texts - start), first_id=start, seed=seed)
        inferred = Inferred(model, batch, inference, rng)
        q = inferred.q("annealing")
        plan = annealing_plan(inferred, q, settings)
        upper = ais.forward_ais(model, batch, q, plan, rng).nats
        lower = ais.reverse_ais(model, batch, q, plan, z, rng).nats
        nelbo = ESTIMATORS["elbo"].estimate(inferred, settings).nats
        parts.append((batch.weights.sum(1).cpu().double(), lower, upper, nelbo))
    return Certificate(*(torch.cat(values) for values in zip(*parts, strict=True)))
