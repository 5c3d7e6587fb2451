"""The network that proposes z from a text (inference `amortized`): plain PyTorch, no Pyro.

L·S learned queries, one for each slot of z, stand in front of the embedded tokens. Blocks without a causal mask
run over all of them (bidirectional self-attention with rotary positions, SwiGLU; RMSNorm before each of the two and
once at the end, no biases). The outputs at the queries are the mean and the log scale of q(z|x).

Shapes: B sequences, T tokens, L layers, S slots, D width, N = L·S + T positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltm_pyro.models.attention import join_heads, rotary, split_heads
from ltm_pyro.models.decoder import DecoderConfig, SwiGLU, draw_weights


class BidirectionalAttention(nn.Module):
    """Self-attention of every position to every other, with rotary positions."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
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
        self.head = nn.Linear(config.width, 2 * config.width, bias=False)
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
