"""The generative model: p(z) and p(x | z), as Pyro programs, and the encoder that proposes z from a text. Knows
nothing of inference, data or files.

The program is in `ltm.py`, the networks are in `decoder.py` and `encoder.py`, and a prior is one file in `priors/`.
"""

from ltm_pyro.models.batch import TokenBatch
from ltm_pyro.models.decoder import Decoder, DecoderConfig
from ltm_pyro.models.generation import Sampling, generate
from ltm_pyro.models.ltm import LatentThoughtModel, simulate
from ltm_pyro.models.priors import PRIORS, Prior
from ltm_pyro.models.tokens import TokenSequence

__all__ = [
    "PRIORS",
    "Decoder",
    "DecoderConfig",
    "LatentThoughtModel",
    "Prior",
    "Sampling",
    "TokenBatch",
    "TokenSequence",
    "generate",
    "simulate",
]
