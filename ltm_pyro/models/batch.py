"""A batch of token sequences, as the generative model reads it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ltm_pyro.models.decoder import BelowZ


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """B sequences of T predicted tokens. All tensors are on the same device.

    What stands in front of the tokens is not among them, as it is not predicted here. At the beginning of a text that
    is the begin-of-text token, which :class:`~ltm_pyro.models.tokens.TokenSequence` puts there by itself.
    """

    tokens: Tensor
    """[B, T] int64. What follows a sequence's end is padding, which may hold any valid id."""

    weights: Tensor
    """[B, T] float: how much each position counts in the log-likelihood. 0 for padding and for positions that z is not
    inferred from, 1 elsewhere (where a fast step subsamples positions: 1 / their share)."""

    sequence_ids: Tensor
    """[B] int64: the key of each sequence's noise, so that results do not depend on batch-mates."""

    num_bytes: Tensor
    """[B] int64: the number of bytes of the text that each sequence encodes (special tokens have none)."""

    previous: Tensor | None = None
    """[B] int64: the token in front of each sequence, where the tokens are a part of longer texts; None for
    begin-of-text."""

    num_context: int = 0
    """The number of positions at the beginning that are only read, and have weight 0 in every sequence."""

    below_z: BelowZ | None = None
    """What `LatentThoughtModel.precompute` has computed from these tokens: the part that does not depend on z."""

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2 or self.weights.shape != self.tokens.shape:
            shapes = f"tokens {tuple(self.tokens.shape)} and weights {tuple(self.weights.shape)}"
            raise ValueError(f"{shapes} must both be [B, T]")
        batch_size = (len(self.tokens),)
        if self.sequence_ids.shape != batch_size or self.num_bytes.shape != batch_size:
            raise ValueError("sequence_ids and num_bytes must be [B]")
        if self.previous is not None and self.previous.shape != batch_size:
            raise ValueError("previous must be [B]")
        if not 0 <= self.num_context <= self.tokens.shape[1]:
            raise ValueError(f"num_context {self.num_context} must be at most the number of positions")

    def __repr__(self) -> str:
        return f"TokenBatch(tokens {list(self.tokens.shape)} on {self.tokens.device})"

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: slice | Tensor) -> TokenBatch:
        """The sequences that the index selects, as a batch."""
        previous = None if self.previous is None else self.previous[index]
        fields = (self.tokens[index], self.weights[index], self.sequence_ids[index], self.num_bytes[index])
        return TokenBatch(*fields, previous, self.num_context)

    def with_weights(self, weights: Tensor) -> TokenBatch:
        """The same texts with other weights of their positions."""
        return dataclasses.replace(self, weights=weights)

    def prefix(self, num_tokens: Tensor) -> TokenBatch:
        """The same texts, weighted on their first `num_tokens` ([B]) positions only."""
        positions = torch.arange(self.tokens.shape[1], device=self.weights.device)
        return self.with_weights(self.weights * (positions < num_tokens[:, None].to(positions.device)))

    def every(self, stride: int, first: Tensor) -> TokenBatch:
        """The same texts, weighted on every `stride`-th position only, each by `stride` times as much.

        Where `first` ([B]) is uniform from 0 to stride - 1, the log-likelihood has that of all positions as its mean.
        """
        positions = torch.arange(self.tokens.shape[1], device=self.weights.device)
        is_chosen = (positions - first.to(self.weights.device)[:, None]) % stride == 0
        return self.with_weights(self.weights * stride * is_chosen)

    def cut(self, num_positions: int) -> TokenBatch:
        """The texts cut to their first positions; `num_bytes` stays that of the whole texts."""
        tokens, weights = self.tokens[:, :num_positions], self.weights[:, :num_positions]
        num_context = min(self.num_context, num_positions)
        return dataclasses.replace(self, tokens=tokens, weights=weights, num_context=num_context, below_z=None)

    def block(self, start: int, end: int, reach: int) -> TokenBatch:
        """The texts weighted on positions `start` to `end` - 1 only, without the positions that do not matter there.

        Positions before the block stay, with weight 0, as far as its predictions depend on them, so that the
        probabilities of its tokens are those in the whole texts. `num_bytes` stays that of the whole texts.

        Args:
            reach: the number of inputs that the prediction of a token depends on.
        """
        first = max(0, start - (reach - 1))
        tokens, weights = self.tokens[:, first:end], self.weights[:, first:end].clone()
        weights[:, : start - first] = 0
        previous = self.tokens[:, first - 1] if first else self.previous
        num_context = min(start - first, tokens.shape[1])
        return dataclasses.replace(
            self, tokens=tokens, weights=weights, previous=previous, num_context=num_context, below_z=None
        )

    def to(self, device: torch.device | str) -> TokenBatch:
        """The batch on `device`. The host does not wait for a copy to a GPU."""
        device = torch.device(device)
        return TokenBatch(
            tokens=_to_device(self.tokens, device),
            weights=_to_device(self.weights, device),
            sequence_ids=_to_device(self.sequence_ids, device),
            num_bytes=_to_device(self.num_bytes, device),
            previous=None if self.previous is None else _to_device(self.previous, device),
            num_context=self.num_context,
        )


def _to_device(value: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and value.device.type == "cpu":  # only memory that is pinned is copied without a wait
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)
