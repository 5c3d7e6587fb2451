"""The prequential code token by token, and the characters that tokens stand for.

Within a block the code is that of the mean over K draws of z, and so is each token given the block's tokens before it:

    -log p(x_n | x_<n) = log Σ_k p(x_{<n in block} | z_k) - log Σ_k p(x_{≤n in block} | z_k)

The probability of a token is fixed before the token is seen, so its nats are its part of a valid code length, and those
of a block sum to the nats of the block.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import pyro
import tiktoken
import torch
from torch import Tensor

from ltm_pyro.data import token_num_bytes
from ltm_pyro.evaluation.estimators import Estimate, EstimatorSettings
from ltm_pyro.evaluation.estimators.prequential import estimate
from ltm_pyro.evaluation.inferred import Inferred
from ltm_pyro.inference.base import LATENT, frozen
from ltm_pyro.models import LatentThoughtModel, TokenBatch
from ltm_pyro.models.tokens import TokenSequence


def code_by_token(inferred: Inferred, settings: EstimatorSettings) -> tuple[Estimate, Tensor]:
    """The figure `prequential` of each text of a batch, and the nats of each of its tokens.

    Returns:
        the figure, and [B, T] float64: -log p of each token given those before it; 0 for padding. The sum over a text
        is its figure.
    """
    parts: list[Tensor] = []

    def watch(block: TokenBatch, draws: Tensor) -> None:
        # One draw at a time: memory does not grow with their number by more than these numbers.
        log_probs = torch.stack([token_log_probs(inferred.model, block, z) for z in draws])
        means = log_probs.cumsum(-1).logsumexp(0) - math.log(len(draws))
        parts.append(-means.diff(prepend=means.new_zeros(len(means), 1)))

    found = estimate(inferred, settings, watch)
    return found, torch.cat(parts, dim=1)


@torch.no_grad()
def token_log_probs(model: LatentThoughtModel, block: TokenBatch, z: Tensor) -> Tensor:
    """log p of each token of a block given z and the tokens before it, [B, positions of the block] float64, in nats.

    Args:
        block: a batch whose first `num_context` positions are only read, and have no place in what is returned.
        z: [B, L, S, D].
    """
    with frozen(model, block) as read:
        trace = pyro.poutine.trace(pyro.poutine.condition(model, data={LATENT: z})).get_trace(read)
        likelihood = cast(TokenSequence, trace.nodes["tokens"]["fn"])  # the distribution of the program itself
        log_probs = likelihood.token_log_probs(block.tokens)
    return (log_probs.double() * block.weights)[:, block.num_context :].cpu()


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
