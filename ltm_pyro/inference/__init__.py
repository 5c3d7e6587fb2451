"""Posteriors over z given x, for any Pyro program with a latent site "z" under the plate "sequences".

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
]
