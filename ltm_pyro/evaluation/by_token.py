"""The prequential code token by token, and the characters that tokens stand for.

Within a block the code is that of the mean over K draws of z, and so is each token given the block's tokens before it:

    -log p(x_n | x_<n) = log Σ_k p(x_{<n in block} | z_k) - log Σ_k p(x_{≤n in block} | z_k)

The probability of a token is fixed before the token is seen, so its nats are its part of a valid code length, and those
of a block sum to the nats of the block.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

import tiktoken
from torch import Tensor

from ltm_pyro.data import token_num_bytes
from ltm_pyro.evaluation.estimators import Estimate, EstimatorSettings
from ltm_pyro.evaluation.estimators.prequential import code_of, estimate_of
from ltm_pyro.evaluation.inferred import Inferred


def code_by_token(inferred: Inferred, settings: EstimatorSettings) -> tuple[Estimate, Tensor]:
    """The figure `prequential` of each text of a batch, and the nats of each of its tokens.

    Returns:
        the figure, and [B, T] float64: -log p of each token given those before it; 0 for padding. The sum over a text
        is its figure.
    """
    code = code_of(inferred, settings, by_token=True)
    assert code.token_nats is not None
    return estimate_of(code, inferred, settings), code.token_nats


@dataclass(frozen=True)
class Piece:
    """The smallest part of a text that can be shown: the tokens of a character, or a token of several characters."""

    text: str
    """The characters; empty for an end-of-text, which stands for none."""
    start: int
    """The position of the first of its tokens."""
    stop: int
    """The position after the last of its tokens."""


def pieces(tokens: Sequence[int], encoding: tiktoken.Encoding) -> list[Piece]:
    """A text cut between characters: a piece ends as soon as its tokens are whole characters.

    What is left of a character that the beginning or the end of the text has cut is shown as U+FFFD.
    """
    num_bytes = token_num_bytes(encoding)
    found: list[Piece] = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    start, text = 0, ""
    for position, token in enumerate(tokens):
        is_text = bool(num_bytes[token])
        if not is_text and start < position:  # a character that stays cut
            found.append(Piece(text + decoder.decode(b"", final=True), start, position))
            decoder.reset()
            start, text = position, ""
        text += decoder.decode(encoding.decode_single_token_bytes(token)) if is_text else ""
        if not decoder.getstate()[0]:  # no bytes wait for the rest of their character
            found.append(Piece(text, start, position + 1))
            start, text = position + 1, ""
    if start < len(tokens):
        found.append(Piece(text + decoder.decode(b"", final=True), start, len(tokens)))
    return found
