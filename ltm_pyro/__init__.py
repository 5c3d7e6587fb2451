"""Latent Thought Models as Pyro programs, with swappable posterior inference."""

from ltm_pyro.errors import InputError, WriteError, end_in_one_line_when_interrupted

end_in_one_line_when_interrupted()  # before the imports that take long

from ltm_pyro import data, inference, models  # noqa: E402
from ltm_pyro.cli import __version__  # noqa: E402
from ltm_pyro.evaluation.model import LTM, from_pretrained, load  # noqa: E402
from ltm_pyro.runs.pretrained import save_pretrained  # noqa: E402
from ltm_pyro.runs.trained import TrainedModel  # noqa: E402

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
