"""Annealed importance sampling (Neal 2001): the weights of chains that go from q to the posterior."""

from __future__ import annotations

from pyro.distributions import TorchDistribution

from ltm_pyro.evaluation.estimators.base import Estimate, Estimator, EstimatorSettings, Meaning
from ltm_pyro.evaluation.estimators.iwae import of_weights
from ltm_pyro.evaluation.inferred import Inferred
from ltm_pyro.inference import ais


def estimate(inferred: Inferred, settings: EstimatorSettings) -> Estimate:
    q = inferred.q("annealing")
    plan = annealing_plan(inferred, q, settings)
    weights = ais.forward_ais(inferred.model, inferred.batch, q, plan, inferred.rng)
    return of_weights(weights, f"{inferred.inference.z_from}, annealed")


def annealing_plan(inferred: Inferred, q: TorchDistribution, settings: EstimatorSettings) -> ais.AnnealingPlan:
    """Temperatures and step sizes of the texts, from a pilot whose randomness no scored chain sees."""
    return ais.pilot(
        inferred.model,
        inferred.batch,
        q,
        inferred.rng,
        settings.num_temperatures,
        settings.num_leapfrogs,
        settings.num_chains,
    )


AIS = Estimator(
    estimate,
    "annealed importance sampling, as a rule the tightest bound, at some hundred times the cost",
    Meaning.UPPER_BOUND,
    uses=("num_temperatures", "num_leapfrogs", "num_chains"),
)
