"""p(x | z) as a Pyro distribution: `log_prob` is teacher forcing, `sample` is generation."""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ltm_pyro.models.decoder import BelowZ, Decoder
from ltm_pyro.models.generation import generate


class TokenSequence(TorchDistribution):
    """The distribution of a text's tokens given its thought vectors.

    The event is a sequence x_1 … x_T of ids below V − 1; the begin-of-text token before x_1 is implicit. The text ends
    with the first end-of-text: that token is predicted and paid for like any other, and what follows it counts nothing
    and is filled with end-of-text by `sample`. So the probabilities of all texts that end by position T, and of all
    that have not ended there, sum to one.

    Where `weights` are given they say what each position counts instead: this is how padding, positions that z is not
    inferred from, and several texts in one sequence (each after the end-of-text of the one before) are expressed.

    Args:
        decoder: the network.
        z: thought vectors, [*batch_shape, L, S, D].
        end_of_text: id of the token that ends a text.
        length: T, the positions that `sample` fills.
        weights: [*batch_shape or what broadcasts to it, T], or None.
        below_z: of the decoder, for the tokens that `log_prob` will be asked for, [*batch_shape or what broadcasts to
            it, T, D], where that has been computed already.
    """

    arg_constraints = {}  # noqa: RUF012 - the name and form that torch's distributions have
    has_rsample = False

    def __init__(
        self,
        decoder: Decoder,
        z: Tensor,
        end_of_text: int,
        length: int,
        weights: Tensor | None = None,
        below_z: BelowZ | None = None,
    ) -> None:
        if z.shape[-3:] != decoder.config.latent_shape:
            raise ValueError(f"z is {tuple(z.shape)}, its last dimensions must be {decoder.config.latent_shape}")
        self.decoder = decoder
        self.z = z
        self.end_of_text = end_of_text
        self.weights = weights
        self.below_z = below_z
        super().__init__(torch.Size(z.shape[:-3]), torch.Size([length]), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.integer_interval(0, self.decoder.vocab_size - 2), 1)

    def expand(self, batch_shape: torch.Size, _instance: TokenSequence | None = None) -> TokenSequence:
        z = self.z.expand(*batch_shape, *self.decoder.config.latent_shape)
        return TokenSequence(self.decoder, z, self.end_of_text, self.event_shape[0], self.weights, self.below_z)

    def token_log_probs(self, value: Tensor) -> Tensor:
        """log p(x_n | z, x_<n) at every position, unweighted: [*batch_shape, T] for a value of [..., T] tokens."""
        return self._log_probs_where(torch.ones((), dtype=torch.bool, device=value.device), value)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x | z) = Σ_n weight_n · log p(x_n | z, x_<n) in nats, [*batch_shape], for [..., T] tokens.

        Positions of weight 0 cost nothing in the vocabulary term.
        """
        weights = self._until_end_of_text(value) if self.weights is None else self.weights
        return (self._log_probs_where(weights != 0, value) * weights).sum(-1)

    def _log_probs_where(self, counts: Tensor, value: Tensor) -> Tensor:
        """log p(x_n | z, x_<n) at the positions that count, 0 or itself elsewhere: [*batch_shape, T]."""
        if value.dtype != torch.int64:
            raise ValueError(f"tokens must be int64, not {value.dtype}")
        shape = torch.broadcast_shapes(self.batch_shape, value.shape[:-1])
        tokens_BT = value.expand(*shape, -1).reshape(-1, value.shape[-1])
        counts_BT = counts.expand(*shape, value.shape[-1]).reshape(tokens_BT.shape)
        below = None if self.below_z is None else self.below_z.expand(shape)
        hidden_BTD = self.decoder(self.decoder.inputs(tokens_BT), self._expanded_z(shape), below)
        if hidden_BTD.device.type != "cpu":  # elsewhere the choice would have to wait for the device
            return self.decoder.log_probs(hidden_BTD.flatten(0, 1), tokens_BT.flatten()).view(*shape, -1)
        log_probs_N = self.decoder.log_probs(hidden_BTD[counts_BT], tokens_BT[counts_BT])
        log_probs_BT = log_probs_N.new_zeros(tokens_BT.shape).masked_scatter(counts_BT, log_probs_N)
        return log_probs_BT.view(*shape, -1)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Generate texts: [*sample_shape, *batch_shape, T] tokens, drawn with torch's global generator."""
        shape = torch.Size(sample_shape) + self.batch_shape
        tokens_BT = generate(self.decoder, self._expanded_z(shape), self.end_of_text, self.event_shape[0])
        return tokens_BT.reshape(*shape, -1)

    def _expanded_z(self, shape: torch.Size) -> Tensor:
        """z for every text of a batch of this shape, in one dimension: [B, L, S, D]."""
        # Not -1 for B, which z without slots leaves open.
        return self.z.expand(*shape, -1, -1, -1).reshape(shape.numel(), *self.decoder.config.latent_shape)

    def _until_end_of_text(self, value: Tensor) -> Tensor:
        """1 up to and including the first end-of-text, 0 after it."""
        is_end = (value == self.end_of_text).long()
        return is_end.cumsum(-1) - is_end == 0
