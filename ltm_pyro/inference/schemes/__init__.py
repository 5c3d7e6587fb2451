"""Schemes of posterior inference, one in each file, and SCHEMES, which lists them.

To add a scheme: write it in a file of its own here, after the protocol in `ltm_pyro/inference/base.py`, and give it a
line in SCHEMES. The commands then have it as `--inference NAME`, with its settings as `--NAME.setting`.
"""

from ltm_pyro.inference.schemes.adam_vi import AdamVI
from ltm_pyro.inference.schemes.amortized import Amortized
from ltm_pyro.inference.schemes.hmc import HMC
from ltm_pyro.inference.schemes.langevin import Langevin
from ltm_pyro.inference.schemes.lowrank import LowRank
from ltm_pyro.inference.schemes.mala import MALA
from ltm_pyro.inference.schemes.map import MAP
from ltm_pyro.inference.schemes.underdamped import Underdamped
from ltm_pyro.inference.schemes.vi import VI

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

__all__ = ["PRIOR", "SCHEMES"]
