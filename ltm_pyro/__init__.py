"""Latent Thought Models as Pyro programs, with swappable posterior inference."""

from ltm_pyro import data, inference, models
from ltm_pyro.errors import InputError
from ltm_pyro.run import TrainedModel, load

__all__ = ["InputError", "TrainedModel", "data", "inference", "load", "models"]
