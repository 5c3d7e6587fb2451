"""Sequential Monte Carlo over blocks: particles from the prior that read a text, are drawn anew and moved."""

from __future__ import annotations

from ltm_pyro.evaluation.estimators.base import BlockNats, Estimate, Estimator, EstimatorSettings, Meaning
from ltm_pyro.evaluation.estimators.prequential import block_size_of
from ltm_pyro.evaluation.inferred import Inferred
from ltm_pyro.inference.smc import smc


def estimate(inferred: Inferred, settings: EstimatorSettings) -> Estimate:
    block_size = block_size_of(inferred, settings)
    found = smc(inferred.model, inferred.batch, block_size, settings.num_chains, settings.num_leapfrogs, inferred.rng)
    return Estimate(
        found.nats,
        "particles",
        settings.num_chains,
        effective_sample_size=found.effective_sample_size,
        by_block=BlockNats(block_size, found.block_nats),
    )


SMC = Estimator(
    estimate,
    "sequential Monte Carlo over blocks, a bound and a code; it does not depend on the scheme of inference. At a cost "
    "that grows with the square of the length",
    Meaning.UPPER_BOUND,
    uses=("block_size", "num_leapfrogs", "num_chains"),
)
