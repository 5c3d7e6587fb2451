"""Figures for -log p(x), one in each file, and ESTIMATORS, which lists them.

To add a figure: write a file here after `base.py` and the others, and give it a line in ESTIMATORS. The command
`python -m ltm_pyro.evaluate` then has it as `--estimators NAME`, and its help, tables and plots show what it states.
"""

from ltm_pyro.evaluation.estimators.ais import AIS
from ltm_pyro.evaluation.estimators.base import BlockNats, Estimate, Estimator, EstimatorSettings, Meaning
from ltm_pyro.evaluation.estimators.elbo import ELBO
from ltm_pyro.evaluation.estimators.exact import EXACT
from ltm_pyro.evaluation.estimators.iwae import IWAE
from ltm_pyro.evaluation.estimators.prequential import PREQUENTIAL, WEIGHTED
from ltm_pyro.evaluation.estimators.reused_noise import REUSED_NOISE
from ltm_pyro.evaluation.estimators.smc import SMC

ESTIMATORS: dict[str, Estimator] = {
    "elbo": ELBO,
    "iwae": IWAE,
    "ais": AIS,
    "prequential": PREQUENTIAL,
    "weighted": WEIGHTED,
    "smc": SMC,
    "reused-noise": REUSED_NOISE,
    "exact": EXACT,
}


def of_models(with_z: bool) -> dict[str, Estimator]:
    """The figures of models with z, or those of models without."""
    return {name: estimator for name, estimator in ESTIMATORS.items() if estimator.needs_z is with_z}


__all__ = ["ESTIMATORS", "BlockNats", "Estimate", "Estimator", "EstimatorSettings", "Meaning", "of_models"]
