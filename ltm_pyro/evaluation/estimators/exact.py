"""-log p(x) itself, for a model without z: since nothing is drawn, the ELBO of the prior is exact."""

from __future__ import annotations

from ltm_pyro.evaluation.estimators.base import Estimate, Estimator, EstimatorSettings, Meaning
from ltm_pyro.evaluation.inferred import Inferred
from ltm_pyro.inference import bounds


def estimate(inferred: Inferred, settings: EstimatorSettings) -> Estimate:
    found = bounds.elbo(inferred.model, inferred.batch, inferred.q(), num_samples=1)
    return Estimate(found.nelbo, None, 1, kl=found.kl)


EXACT = Estimator(estimate, "-log p(x) itself, for a model without z", Meaning.EXACT, needs_z=False)
