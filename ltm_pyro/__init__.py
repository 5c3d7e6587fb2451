"""Latent Thought Models as Pyro programs, with swappable posterior inference."""

import importlib

from ltm_pyro import data, inference, models
from ltm_pyro.errors import InputError, WriteError
from ltm_pyro.run import TrainedModel, load

__all__ = [
    "InputError",
    "TrainedModel",
    "WriteError",
    "data",
    "from_pretrained",
    "inference",
    "load",
    "models",
    "save_pretrained",
]


def __getattr__(name: str) -> object:
    # Not above: `pretrained` is a command too, and Python warns of one that its package has imported already.
    if name in ("from_pretrained", "save_pretrained"):
        return getattr(importlib.import_module("ltm_pyro.pretrained"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
