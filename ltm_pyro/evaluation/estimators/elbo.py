"""The negative evidence lower bound: -E_q log p(x | z) + KL(q ‖ p), the mean over draws that the fit of q never saw."""

from __future__ import annotations

from ltm_pyro.evaluation.estimators.base import Estimate, Estimator, EstimatorSettings, Meaning
from ltm_pyro.evaluation.inferred import Inferred
from ltm_pyro.inference import bounds


def estimate(inferred: Inferred, settings: EstimatorSettings) -> Estimate:
    found = bounds.elbo(inferred.model, inferred.batch, inferred.q(), settings.num_samples)
    return Estimate(
        found.nelbo,
        inferred.inference.z_from,
        found.num_samples,
        kl=found.kl,
        variance=found.monte_carlo_standard_error.square(),
    )


ELBO = Estimator(estimate, "-E log p(x|z) + KL, a bound", Meaning.UPPER_BOUND, uses=("num_samples",))
