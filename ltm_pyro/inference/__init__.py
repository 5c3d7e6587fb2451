"""Posteriors over z given x, for any Pyro program with a latent site "z" under the plate "sequences".

To add a scheme: write it in a file of its own after the protocol in `base.py`, and add it to SCHEMES. The commands
then have it as `--inference NAME`, with its settings as `--NAME.setting`.
"""

from ltm_pyro.inference.adam_vi import AdamVI
from ltm_pyro.inference.amortized import Amortized
from ltm_pyro.inference.base import PosteriorScheme, State, StepInfo, infer, log_joint
from ltm_pyro.inference.hmc import HMC
from ltm_pyro.inference.langevin import Langevin
from ltm_pyro.inference.lowrank import LowRank
from ltm_pyro.inference.mala import MALA
from ltm_pyro.inference.map import MAP
from ltm_pyro.inference.noise import BatchNoise, Noise, SequenceNoise
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.underdamped import Underdamped
from ltm_pyro.inference.vi import VI

SCHEMES = {
    "map": MAP,
    "vi": VI,
    "lowrank": LowRank,
    "amortized": Amortized,
    "adamvi": AdamVI,
    "langevin": Langevin,
    "mala": MALA,
    "hmc": HMC,
    "underdamped": Underdamped,
}

PRIOR = VI(num_steps=0)
"""No inference: q is the prior, where VI starts."""

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
