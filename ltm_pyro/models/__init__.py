"""The generative model: p(z) and p(x | z), as Pyro programs, and the encoder that proposes z from a text. Knows
nothing of inference, data or files.

To add a prior, write it in `ltm.py` at site "z"; to change the networks, `decoder.py` and `encoder.py`.
"""

from ltm_pyro.models.batch import TokenBatch
from ltm_pyro.models.decoder import Decoder, DecoderConfig
from ltm_pyro.models.generation import Sampling, generate
from ltm_pyro.models.ltm import LatentThoughtModel, simulate
from ltm_pyro.models.tokens import TokenSequence

__all__ = [
    "Decoder",
    "DecoderConfig",
    "LatentThoughtModel",
    "Sampling",
    "TokenBatch",
    "TokenSequence",
    "generate",
    "simulate",
]
