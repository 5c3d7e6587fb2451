"""The importance-weighted bound of Burda, Grosse & Salakhutdinov (2016), with draws from q."""

from __future__ import annotations

import dataclasses

from ltm_pyro.evaluation.estimators.base import Estimate, Estimator, EstimatorSettings, Meaning
from ltm_pyro.evaluation.inferred import Inferred
from ltm_pyro.inference import bounds
from ltm_pyro.inference.weights import ImportanceWeights


def estimate(inferred: Inferred, settings: EstimatorSettings) -> Estimate:
    weights = bounds.iwae(inferred.model, inferred.batch, inferred.q(), settings.num_samples)
    return dataclasses.replace(of_weights(weights, inferred.inference.z_from), pareto_k=weights.pareto_k)


def of_weights(weights: ImportanceWeights, z_from: str) -> Estimate:
    """The estimate that importance weights give, whatever they come from."""
    return Estimate(
        weights.nats,
        z_from,
        len(weights.log_weights),
        variance=weights.monte_carlo_standard_error.square(),
        effective_sample_size=weights.effective_sample_size,
    )


IWAE = Estimator(
    estimate,
    "importance-weighted, a tighter bound where q is close to the posterior",
    Meaning.UPPER_BOUND,
    uses=("num_samples",),
)
