"""Schemes of posterior inference, each in a file of its own, and SCHEMES, which lists them.

To add a scheme, write it in a file of its own here that follows the protocol in `ltm_pyro/inference/base.py`, and give
it a line in SCHEMES. The commands then offer it as `--inference NAME`, with its settings as `--NAME.setting`, and the
first sentence of its docstring as its help text. PRIOR is what the commands call "none".
"""

from ltm_pyro.inference.base import PosteriorScheme
from ltm_pyro.inference.schemes.adam_vi import AdamVI
from ltm_pyro.inference.schemes.amortized import Amortized
from ltm_pyro.inference.schemes.hmc import HMC
from ltm_pyro.inference.schemes.langevin import Langevin
from ltm_pyro.inference.schemes.lowrank import LowRank
from ltm_pyro.inference.schemes.mala import MALA
from ltm_pyro.inference.schemes.map import MAP
from ltm_pyro.inference.schemes.prior import PRIOR
from ltm_pyro.inference.schemes.underdamped import Underdamped
from ltm_pyro.inference.schemes.vi import VI

SCHEMES: dict[str, type[PosteriorScheme]] = {
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

DEFAULT_SCHEME = "map"
"""The scheme of training where none is named, and z is inferred block by block."""
COMMON_SCHEME = "vi"
"""The scheme of training where none is named, and z of a text is inferred at once. Training then reports its bound
beside that of every other scheme, so that all runs have a figure in common."""
COMPARED_SCHEMES = ("vi", "map", "langevin", "mala")
"""The schemes that are compared where none are named: a density, a point, and chains without and with correction."""

__all__ = ["COMMON_SCHEME", "COMPARED_SCHEMES", "DEFAULT_SCHEME", "PRIOR", "SCHEMES"]
