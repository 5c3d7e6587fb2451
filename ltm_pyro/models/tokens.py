"""p(x | u) as a Pyro distribution, u the thought vectors: `log_prob` is teacher forcing, `sample` is generation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ltm_pyro.models.decoder import BelowZ, Decoder
from ltm_pyro.models.generation import generate

_Shape = torch.Size | list[int] | tuple[int, ...]


def until_end_of_text(tokens: Tensor, end_of_text: int) -> Tensor:
    """Whether each of [..., T] tokens belongs to the text: true up to and including the first end-of-text."""
    is_end = (tokens == end_of_text).long()
    return is_end.cumsum(-1) - is_end == 0


class TokenSequence(TorchDistribution):
    """The distribution of a text's tokens given its thought vectors.

    The event is a sequence x_1 … x_T of ids below V − 1; the begin-of-text token before x_1 is implicit. The text ends
    with the first end-of-text, which is predicted and scored like any other token. What follows it is not scored, and
    `sample` fills it with end-of-text. So the probabilities of all texts that end by position T, and of all that have
    not ended there, sum to one.

    Where `weights` are given, they say how much each position counts instead. Padding, positions that z is not inferred
    from, and several texts in one sequence (each after the end-of-text of the one before) are expressed by them.

    Args:
        decoder: the network.
        u: thought vectors, [*batch_shape, L, S, D].
        end_of_text: id of the token that ends a text.
        length: T, the number of positions that `sample` fills.
        weights: [*batch_shape or what broadcasts to it, T], or None.
        below_z: the decoder's `below_z` of the tokens that `log_prob` will be asked for, where it has been computed
            already, [*batch_shape or what broadcasts to it, T, D].
        previous: the token before the first, [*batch_shape or what broadcasts to it]; None for begin-of-text. `sample`
            always begins a text.
        num_context: the number of positions at the beginning whose weight is 0 in every text. They are read as context,
            and no time is spent on their probabilities.

    Raises:
        ValueError: if u has not the shape of the decoder's thought vectors.
    """

    arg_constraints = {}  # noqa: RUF012 - the name and form that torch's distributions have
    has_rsample = False

    def __init__(
        self,
        decoder: Decoder,
        u: Tensor,
        end_of_text: int,
        length: int,
        weights: Tensor | None = None,
        below_z: BelowZ | None = None,
        previous: Tensor | None = None,
        num_context: int = 0,
    ) -> None:
        if u.shape[-3:] != decoder.config.latent_shape:
            shape = decoder.config.latent_shape
            raise ValueError(f"the thought vectors are {tuple(u.shape)}; their last dimensions must be {shape}")
        self.decoder = decoder
        self.u = u
        self.end_of_text = end_of_text
        self.weights = weights
        self.below_z = below_z
        self.previous = previous
        self.num_context = num_context
        super().__init__(torch.Size(u.shape[:-3]), torch.Size([length]), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        # torch's constraints have no types.
        tokens = constraints.integer_interval(0, self.decoder.vocab_size - 2)  # type: ignore[no-untyped-call]
        return constraints.independent(tokens, 1)  # type: ignore[no-untyped-call]

    def expand(self, batch_shape: _Shape, _instance: TokenSequence | None = None) -> TokenSequence:
        u = self.u.expand(*batch_shape, *self.decoder.config.latent_shape)
        fixed = (self.weights, self.below_z, self.previous, self.num_context)
        return TokenSequence(self.decoder, u, self.end_of_text, self.event_shape[0], *fixed)

    def token_log_probs(self, value: Tensor) -> Tensor:
        """log p(x_n | u, x_<n) at every position, unweighted: [*batch_shape, T] for a value of [..., T] tokens.

        It is 0 at the first `num_context` positions.
        """
        return self._log_probs_where(torch.ones((), dtype=torch.bool, device=value.device), value)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x | u) = Σ_n weight_n · log p(x_n | u, x_<n) in nats, [*batch_shape], for [..., T] tokens.

        On a CPU, positions of weight 0 take no time in the vocabulary term.
        """
        weights = until_end_of_text(value, self.end_of_text) if self.weights is None else self.weights
        return (self._log_probs_where(weights != 0, value) * weights).sum(-1)

    def _log_probs_where(self, counts: Tensor, value: Tensor) -> Tensor:
        """log p(x_n | u, x_<n) at the positions that count, and 0 or the same elsewhere: [*batch_shape, T]."""
        if value.dtype != torch.int64:
            raise ValueError(f"tokens must be int64, not {value.dtype}")
        # A function of torch that has no types.
        shape = torch.broadcast_shapes(self.batch_shape, value.shape[:-1])  # type: ignore[no-untyped-call]
        tokens_BT = value.expand(*shape, -1).reshape(-1, value.shape[-1])
        counts_BT = counts.expand(*shape, value.shape[-1]).reshape(tokens_BT.shape)
        below = None if self.below_z is None else self.below_z.expand(shape)
        previous_B = None if self.previous is None else self.previous.expand(shape).flatten()
        inputs_BT = self.decoder.inputs(tokens_BT, previous_B)
        hidden_BTD = self.decoder(inputs_BT, self._expanded_u(shape), below, self.num_context)
        tokens_BT, counts_BT = tokens_BT[:, self.num_context :], counts_BT[:, self.num_context :]
        # To choose the positions that count, the host would wait for a device.
        log_probs = log_probs_of_chosen if hidden_BTD.device.type == "cpu" else log_probs_of_all
        log_probs_BT = log_probs(self.decoder, hidden_BTD, tokens_BT, counts_BT)
        return F.pad(log_probs_BT, (self.num_context, 0)).view(*shape, -1)

    @torch.no_grad()
    def sample(self, sample_shape: _Shape = ()) -> Tensor:
        """Generate texts: [*sample_shape, *batch_shape, T] tokens, drawn with torch's global generator."""
        shape = torch.Size(sample_shape) + self.batch_shape
        tokens_BT = generate(self.decoder, self._expanded_u(shape), self.end_of_text, self.event_shape[0])
        return tokens_BT.reshape(*shape, -1)

    def _expanded_u(self, shape: torch.Size) -> Tensor:
        """The thought vectors of every text of a batch of this shape, flattened: [B, L, S, D]."""
        # Not -1 for B: where there are no slots, u has no numbers from which B could be worked out.
        return self.u.expand(*shape, -1, -1, -1).reshape(shape.numel(), *self.decoder.config.latent_shape)


def log_probs_of_chosen(decoder: Decoder, hidden_BTD: Tensor, tokens_BT: Tensor, is_chosen_BT: Tensor) -> Tensor:
    """Log-probabilities [B, T] of the tokens that follow the hidden states where they are chosen, and 0 elsewhere."""
    log_probs_N = decoder.log_probs(hidden_BTD[is_chosen_BT], tokens_BT[is_chosen_BT])
    return log_probs_N.new_zeros(tokens_BT.shape).masked_scatter(is_chosen_BT, log_probs_N)


def log_probs_of_all(decoder: Decoder, hidden_BTD: Tensor, tokens_BT: Tensor, is_chosen_BT: Tensor) -> Tensor:
    """Log-probabilities [B, T] of the tokens that follow the hidden states where they are chosen, and others elsewhere.

    Hidden states that are not chosen have no part in them, whatever they hold: 0 times what is not a number is none.
    """
    hidden_BTD = hidden_BTD.where(is_chosen_BT[..., None], 0)
    return decoder.log_probs(hidden_BTD.flatten(0, 1), tokens_BT.flatten()).view(tokens_BT.shape)
