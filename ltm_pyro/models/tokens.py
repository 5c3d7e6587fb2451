"""p(x | z) as a Pyro distribution: `log_prob` is teacher forcing, `sample` is generation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ltm_pyro.models.decoder import Decoder


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
    """

    arg_constraints = {}  # noqa: RUF012 - the name and form that torch's distributions have
    has_rsample = False

    def __init__(
        self, decoder: Decoder, z: Tensor, end_of_text: int, length: int, weights: Tensor | None = None
    ) -> None:
        if z.shape[-3:] != decoder.config.latent_shape:
            raise ValueError(f"z is {tuple(z.shape)}, its last dimensions must be {decoder.config.latent_shape}")
        self.decoder = decoder
        self.z = z
        self.end_of_text = end_of_text
        self.weights = weights
        super().__init__(torch.Size(z.shape[:-3]), torch.Size([length]), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.integer_interval(0, self.decoder.vocab_size - 2), 1)

    def expand(self, batch_shape: torch.Size, _instance: TokenSequence | None = None) -> TokenSequence:
        z = self.z.expand(*batch_shape, *self.decoder.config.latent_shape)
        return TokenSequence(self.decoder, z, self.end_of_text, self.event_shape[0], self.weights)

    def token_log_probs(self, value: Tensor) -> Tensor:
        """log p(x_n | z, x_<n) at every position, unweighted: [*batch_shape, T] for a value of [..., T] tokens."""
        if value.dtype != torch.int64:
            raise ValueError(f"tokens must be int64, not {value.dtype}")
        shape = torch.broadcast_shapes(self.batch_shape, value.shape[:-1])
        tokens_BT = value.expand(*shape, -1).reshape(-1, value.shape[-1])
        z_BLSD = self._expanded_z(shape)
        inputs_BT = F.pad(tokens_BT[:, :-1], (1, 0), value=self.decoder.begin_of_text)
        logits_BTV = self.decoder.logits(self.decoder(inputs_BT, z_BLSD))
        # At least float32: a sum of a thousand log-probabilities in bfloat16 would lose nats.
        logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        # Not `cross_entropy`, which ignores the id -100.
        log_probs_BT = logits_BTV.log_softmax(-1).gather(-1, tokens_BT[..., None]).squeeze(-1)
        return log_probs_BT.view(*shape, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x | z) = Σ_n weight_n · log p(x_n | z, x_<n) in nats, [*batch_shape], for [..., T] tokens."""
        weights = self._until_end_of_text(value) if self.weights is None else self.weights
        return (self.token_log_probs(value) * weights).sum(-1)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Generate texts: [*sample_shape, *batch_shape, T] tokens, drawn with torch's global generator."""
        shape = torch.Size(sample_shape) + self.batch_shape
        z_BLSD = self._expanded_z(shape)
        length = self.event_shape[0]
        inputs_BT = z_BLSD.new_full((len(z_BLSD), length + 1), self.end_of_text, dtype=torch.int64)
        inputs_BT[:, 0] = self.decoder.begin_of_text
        has_ended = torch.zeros(len(z_BLSD), dtype=torch.bool, device=z_BLSD.device)
        for n in range(1, length + 1):
            logits_BV = self.decoder.logits(self.decoder(inputs_BT[:, :n], z_BLSD)[:, -1])
            drawn = torch.multinomial(logits_BV.float().softmax(-1), 1).squeeze(-1)
            inputs_BT[:, n] = drawn.masked_fill(has_ended, self.end_of_text)
            has_ended |= drawn == self.end_of_text
            if has_ended.all():
                break
        return inputs_BT[:, 1:].reshape(*shape, length)

    def _expanded_z(self, shape: torch.Size) -> Tensor:
        """z for every text of a batch of this shape, in one dimension: [B, L, S, D]."""
        # Not -1 for B, which z without slots leaves open.
        return self.z.expand(*shape, -1, -1, -1).reshape(shape.numel(), *self.decoder.config.latent_shape)

    def _until_end_of_text(self, value: Tensor) -> Tensor:
        """1 up to and including the first end-of-text, 0 after it."""
        is_end = (value == self.end_of_text).long()
        return is_end.cumsum(-1) - is_end == 0
