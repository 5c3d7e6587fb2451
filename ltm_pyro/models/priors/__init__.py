"""Priors p(z), one in each file, and PRIORS, which lists them.

To add a prior: write a subclass of :class:`~ltm_pyro.models.priors.base.Prior` in a file of its own here, and give it a
line in PRIORS. Training then has it as `--model.prior NAME`.
"""

from __future__ import annotations

from ltm_pyro.models.priors.affine import Affine
from ltm_pyro.models.priors.base import Prior
from ltm_pyro.models.priors.scaled import Scaled
from ltm_pyro.models.priors.standard import Standard

PRIORS: dict[str, type[Prior]] = {
    "standard": Standard,
    "affine": Affine,
    "scaled": Scaled,
}

__all__ = ["PRIORS", "Prior"]
