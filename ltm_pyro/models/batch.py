"""A batch of token sequences, as the generative model reads it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ltm_pyro.models.decoder import BelowZ


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """B sequences of T predicted tokens.

    The begin-of-text token that starts every sequence is not among the tokens: it is never predicted, and
    :class:`~ltm_pyro.models.tokens.TokenSequence` puts it in front of them by itself.
    """

    tokens: Tensor
    """[B, T] int64; what follows a sequence's end is padding, of any valid id."""

    weights: Tensor
    """[B, T] float: what each position counts in the log-likelihood. 0 for padding and for positions that z is not
    inferred from, 1 elsewhere (1/rate where positions are subsampled in a fast step)."""

    sequence_ids: Tensor
    """[B] int64, on the CPU: names the noise of each sequence, so that a result does not depend on its batch-mates."""

    num_bytes: Tensor
    """[B] int64, on the CPU: bytes of the text that each sequence encodes (special tokens have none)."""

    below_z: BelowZ | None = None
    """What `LatentThoughtModel.precompute` has computed of these tokens, since it does not depend on z."""

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2 or self.weights.shape != self.tokens.shape:
            shapes = f"tokens {tuple(self.tokens.shape)} and weights {tuple(self.weights.shape)}"
            raise ValueError(f"{shapes} must both be [B, T]")
        batch_size = (len(self.tokens),)
        if self.sequence_ids.shape != batch_size or self.num_bytes.shape != batch_size:
            raise ValueError("sequence_ids and num_bytes must be [B]")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: slice | Tensor) -> TokenBatch:
        """The sequences that the index selects, as a batch."""
        return TokenBatch(self.tokens[index], self.weights[index], self.sequence_ids[index], self.num_bytes[index])

    def with_weights(self, weights: Tensor) -> TokenBatch:
        """The same texts, their positions weighted otherwise."""
        return dataclasses.replace(self, weights=weights)

    def prefix(self, num_tokens: Tensor) -> TokenBatch:
        """The same texts, weighted on their first `num_tokens` ([B]) positions only."""
        positions = torch.arange(self.tokens.shape[1], device=self.weights.device)
        return self.with_weights(self.weights * (positions < num_tokens.to(self.weights.device)[:, None]))

    def every(self, stride: int, first: Tensor) -> TokenBatch:
        """The same texts, weighted on every `stride`-th position only, by `stride` times as much.

        Where `first` ([B]) is uniform from 0 to stride - 1, the log-likelihood is that of all positions on average.
        """
        positions = torch.arange(self.tokens.shape[1], device=self.weights.device)
        is_chosen = (positions - first.to(self.weights.device)[:, None]) % stride == 0
        return self.with_weights(self.weights * stride * is_chosen)

    def cut(self, num_positions: int) -> TokenBatch:
        """The first positions of the texts alone; `num_bytes` stays that of the whole texts."""
        tokens, weights = self.tokens[:, :num_positions], self.weights[:, :num_positions]
        return dataclasses.replace(self, tokens=tokens, weights=weights, below_z=None)

    def to(self, device: torch.device | str) -> TokenBatch:
        """The batch with what the decoder reads on `device`."""
        tokens, weights = self.tokens.to(device), self.weights.to(device)
        return dataclasses.replace(self, tokens=tokens, weights=weights, below_z=None)
