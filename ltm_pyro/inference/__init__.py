"""Posteriors over z given x, for any Pyro program with a latent site "z" under the plate "sequences".

To add a scheme: write it in a file of its own after the protocol in `base.py`, and add it to SCHEMES. The commands
then have it as `--inference NAME`, with its settings as `--NAME.setting`.
"""

from ltm_pyro.inference.base import PosteriorScheme, State, StepInfo, infer, log_joint
from ltm_pyro.inference.noise import BatchNoise, Noise, SequenceNoise
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.schemes import PRIOR, SCHEMES

__all__ = [
    "PRIOR",
    "SCHEMES",
    "BatchNoise",
    "Noise",
    "Posterior",
    "PosteriorScheme",
    "SequenceNoise",
    "State",
    "StepInfo",
    "infer",
    "log_joint",
]
