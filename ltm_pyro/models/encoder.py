"""The networks that propose z from a text (inference `amortized`): plain PyTorch, no Pyro.

:class:`Encoder` reads a whole text. L·S learned queries, one for each slot of z, stand in front of the embedded tokens.
Blocks without a causal mask run over all of them (bidirectional self-attention with rotary positions, SwiGLU; RMSNorm
before each of the two and once at the end, no biases). The outputs at the queries are the mean and the log scale of
q(z|x).

:class:`RecurrentEncoder` reads a text block by block, and turns q(z) before a block into q(z) after it. Each slot of z
attends to the decoder's hidden states and takes up how wrong the predictions were that were made there. Gates decide
how much of the slot's mean and log scale is replaced (as in the Block-Recurrent Transformer, Hutchins et al. 2022,
arXiv 2203.07852, section 3.2).

Shapes: B sequences, T tokens, L layers, S slots, D width, N = L·S + T positions, Q = L·S slots of all layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltm_pyro.models.attention import join_heads, rotary, split_heads
from ltm_pyro.models.decoder import DecoderConfig, SwiGLU, draw_weights
from ltm_pyro.models.stacked import StackedLinear


class BidirectionalAttention(nn.Module):
    """Self-attention of every position to every other, with rotary positions."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = StackedLinear(width, width, 3)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x_BND: Tensor, log_weights_BN: Tensor) -> Tensor:
        q, k, v = (split_heads(x, self.num_heads) for x in self.query_key_value(x_BND).chunk(3, dim=-1))
        bias = log_weights_BN[:, None, None]  # of the keys, the same for every head and query
        seen = F.scaled_dot_product_attention(rotary(q), rotary(k), v, attn_mask=bias)
        attended: Tensor = self.output(join_heads(seen))
        return attended


class EncoderBlock(nn.Module):
    """One layer: self-attention and SwiGLU, each added to the residual stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attention_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.self_attention = BidirectionalAttention(config.width, config.num_heads)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.feed_forward = SwiGLU(config.width, config.hidden)

    def forward(self, x_BND: Tensor, log_weights_BN: Tensor) -> Tensor:
        x_BND = x_BND + self.self_attention(self.self_attention_norm(x_BND), log_weights_BN)
        fed_BND: Tensor = self.feed_forward(self.feed_forward_norm(x_BND))
        return x_BND + fed_BND


class Encoder(nn.Module):
    """Mean and log scale of q(z|x) from the embedded tokens of a text, in units of the prior's mean and scale.

    Without training it returns zeros, which stand for the prior's own mean and scale.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        # An embedding of their numbers, so that they are drawn as that of tokens is.
        self.queries = nn.Embedding(config.num_layers * config.num_slots, config.width)
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_layers))
        self.final_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.head = StackedLinear(config.width, config.width, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew as the decoder's are drawn, from torch's global generator, and set the head to 0."""
        draw_weights(self)
        nn.init.zeros_(self.head.weight)

    def forward(self, x_BTD: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log scale, [B, L, S, D] each.

        Args:
            x_BTD: the embedded tokens.
            weights_BT: how often each token counts as a key of attention. A token of weight 0 has no influence at all;
                where all tokens of a text have weight 0, the queries attend to each other alone.
        """
        queries_QD = self.queries.weight
        num_queries = len(queries_QD)
        # In front, so that the position of a token does not depend on how much padding follows.
        x_BND = torch.cat([queries_QD.expand(len(x_BTD), -1, -1), x_BTD], dim=1)
        log_weights_BN = F.pad(weights_BT.to(x_BTD.dtype).log(), (num_queries, 0))
        for block in self.blocks:
            x_BND = block(x_BND, log_weights_BN)
        proposed = self.head(self.final_norm(x_BND[:, :num_queries]))
        mean, log_scale = proposed.unflatten(1, self.config.latent_shape[:2]).chunk(2, dim=-1)
        return mean, log_scale


REMEMBER = 2.0
"""The bias of the gates before training: of what a posterior was, the share σ(2) = 0.88 stays at every block."""
SHARPNESS = 2.0
"""The scale of the logits of attention before training, where queries and keys have length √K in each head of size K.
Less would have each slot take up the mean over the block."""


class RecurrentEncoder(nn.Module):
    """Mean and log scale of q(z) after a block, from those before it, in units of the prior's mean and scale.

        q_i = (1 - γ) q_{i-1} + γ c,    γ and c made from q_{i-1} and the block

    for mean and log scale alike, elementwise. Without training γ is small, c is random for the mean, and 0 for the log
    scale, which stands for that of the prior.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.slots = nn.Embedding(config.num_layers * config.num_slots, width)
        self.posterior = nn.Linear(2 * width, width, bias=False)
        self.slot_norm = nn.RMSNorm(width, eps=1e-5)
        self.error_norm = nn.RMSNorm(width, eps=1e-5)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.sharpness = nn.Parameter(torch.empty(()))
        self.final_norm = nn.RMSNorm(width, eps=1e-5)
        self.head = StackedLinear(width, width, 3)
        self.remember = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, from torch's global generator.

        Projections keep the scale of what they are given: where all is small at first, every text looks the same to it.
        """
        width = self.config.width
        nn.init.normal_(self.slots.weight)
        for linear in (self.posterior, self.query, self.key, self.value):
            nn.init.normal_(linear.weight, std=width**-0.5)
        nn.init.zeros_(self.head.weight)
        nn.init.normal_(self.head.weight[:width], std=width**-0.5)
        nn.init.constant_(self.sharpness, SHARPNESS)
        nn.init.constant_(self.remember, REMEMBER)

    def forward(
        self, hidden_BTD: Tensor, error_BTD: Tensor, weights_BT: Tensor, mean_BLSD: Tensor, log_scale_BLSD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and log scale after the block, [B, L, S, D] each.

        Args:
            hidden_BTD: the decoder's hidden states, which predict the tokens of the block.
            error_BTD: the gradient of the log-probability of each token with respect to its hidden state.
            weights_BT: how often each token counts as a key of attention. A token of weight 0 has no influence at all;
                where all tokens of a text have weight 0, its posterior stays as it is.
        """
        num_heads, size = self.config.num_heads, (self.config.width // self.config.num_heads,)
        before = torch.cat([mean_BLSD, log_scale_BLSD], dim=-1).flatten(1, 2).to(hidden_BTD.dtype)
        slots_BQD = self.slot_norm(self.slots.weight + self.posterior(before))
        q = F.rms_norm(split_heads(self.query(slots_BQD), num_heads), size) * self.sharpness
        k = F.rms_norm(split_heads(self.key(hidden_BTD), num_heads), size)
        v = split_heads(self.value(self.error_norm(error_BTD)), num_heads)
        # A key in front, whose value is 0, stands for nothing: without it, an empty block would have no key at all.
        k, v = (F.pad(x, (0, 0, 1, 0)) for x in (k, v))
        bias = F.pad(weights_BT.to(q.dtype).log(), (1, 0))[:, None, None]
        attended_BQD = join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
        proposed = self.head(self.final_norm(attended_BQD)).unflatten(1, self.config.latent_shape[:2])
        mean, log_scale, gate = proposed.to(mean_BLSD.dtype).chunk(3, dim=-1)
        is_read = (weights_BT != 0).any(1)[:, None, None, None]
        share = torch.sigmoid(gate - self.remember) * is_read
        return mean_BLSD.lerp(mean, share), log_scale_BLSD.lerp(log_scale, share)
