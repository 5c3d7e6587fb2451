"""Latent Thought Models as Pyro programs, with swappable posterior inference."""

from ltm_pyro import data, inference, models
from ltm_pyro.cli import __version__
from ltm_pyro.errors import InputError, WriteError
from ltm_pyro.evaluation.model import LTM, from_pretrained, load
from ltm_pyro.runs.pretrained import save_pretrained
from ltm_pyro.runs.trained import TrainedModel

__all__ = [
    "LTM",
    "InputError",
    "TrainedModel",
    "WriteError",
    "__version__",
    "data",
    "from_pretrained",
    "inference",
    "load",
    "models",
    "save_pretrained",
]
