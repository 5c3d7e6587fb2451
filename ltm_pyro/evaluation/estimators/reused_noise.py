"""The figure of the reference implementation: the "ELBO" at the very noise that q was fitted to. It is NOT a bound."""

from __future__ import annotations

import dataclasses

from ltm_pyro.evaluation.estimators.base import Estimate, Estimator, EstimatorSettings, Meaning
from ltm_pyro.evaluation.inferred import Inferred
from ltm_pyro.inference import bounds, infer


def estimate(inferred: Inferred, settings: EstimatorSettings) -> Estimate:
    inference = inferred.inference
    scheme = dataclasses.replace(inference.reused, num_steps=inference.scheme.num_steps)
    state = infer(scheme, inferred.model, inferred.batch, inferred.rng)
    found = bounds.reused_noise(inferred.model, inferred.batch, scheme, state)
    return Estimate(found.nelbo, "adamvi fitted to reused noise", 1, kl=found.kl)


REUSED_NOISE = Estimator(
    estimate, "the published figure of this model class, which is NOT a bound", Meaning.NOT_A_BOUND
)
