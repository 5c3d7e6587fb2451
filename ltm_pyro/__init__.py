"""Latent Thought Models as Pyro programs, with swappable posterior inference."""

from ltm_pyro import data, inference, models
from ltm_pyro.cli import __version__
from ltm_pyro.errors import InputError, WriteError
from ltm_pyro.runs.pretrained import from_pretrained, save_pretrained
from ltm_pyro.runs.trained import TrainedModel, load

__all__ = [
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
