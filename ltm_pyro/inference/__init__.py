"""Posteriors over z given x, for any Pyro program with a continuous latent site "z" under the plate "sequences".

Where z is constrained (positive, in an interval, on a simplex), `unconstrained(model)` is the program to infer it in.

To add a scheme, write it in a file of its own in `schemes/` that follows the protocol in `base.py`, and add it to
SCHEMES. The commands then offer it as `--inference NAME`, with its settings as `--NAME.setting`.
"""

from ltm_pyro.inference.base import (
    ChainScheme,
    DensityScheme,
    PosteriorScheme,
    State,
    StepInfo,
    can_absorb,
    frozen,
    has_chains,
    has_density,
    infer,
    kl,
    log_joint,
)
from ltm_pyro.inference.noise import BatchNoise, Noise, SequenceNoise
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.schemes import COMMON_SCHEME, COMPARED_SCHEMES, DEFAULT_SCHEME, PRIOR, SCHEMES
from ltm_pyro.inference.supports import unconstrained

__all__ = [
    "COMMON_SCHEME",
    "COMPARED_SCHEMES",
    "DEFAULT_SCHEME",
    "PRIOR",
    "SCHEMES",
    "BatchNoise",
    "ChainScheme",
    "DensityScheme",
    "Noise",
    "Posterior",
    "PosteriorScheme",
    "SequenceNoise",
    "State",
    "StepInfo",
    "can_absorb",
    "frozen",
    "has_chains",
    "has_density",
    "infer",
    "kl",
    "log_joint",
    "unconstrained",
]
