"""Attention of the decoder: causal within a window, and across to the thought vectors.

Shapes: B sequences, H heads, T tokens, S slots, D width, K = D / H numbers per head, W window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROTARY_BASE = 10_000.0


def rotary(x_BHTK: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34) of positions 0 … T − 1.

    The first half of a head's numbers are the real, the second half the imaginary parts of the K/2 rotated pairs.
    Scores of rotated queries and keys depend on the difference of their positions only.
    """
    num_positions, head_dim = x_BHTK.shape[-2:]
    # Angles at least in float32: bfloat16 cannot tell position 256 from 257.
    dtype = torch.promote_types(x_BHTK.dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, device=x_BHTK.device, dtype=dtype) / head_dim
    positions = torch.arange(num_positions, device=x_BHTK.device, dtype=dtype)
    angles = torch.outer(positions, ROTARY_BASE**-exponents)
    cos, sin = angles.cos().to(x_BHTK.dtype), angles.sin().to(x_BHTK.dtype)
    real, imaginary = x_BHTK.chunk(2, dim=-1)
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)


def windowed_attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, window: int) -> Tensor:
    """Causal attention in which position n sees positions n − W + 1 … n, that is W of them, itself included.

    Computed on the blocks of the band alone: a block of W queries sees its own block of keys and the one before it, so
    time and memory grow with T·W and not with T².
    """
    batch_size, num_heads, length, head_dim = q_BHTK.shape
    if length <= window:
        return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
    num_blocks = -(-length // window)
    padding = num_blocks * window - length
    q, k, v = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (num_blocks, window)) for x in (q_BHTK, k_BHTK, v_BHTK))
    first = F.scaled_dot_product_attention(q[:, :, 0], k[:, :, 0], v[:, :, 0], is_causal=True)
    # The others have a block before them, and so one mask in common: kernels take it as it is, in two dimensions.
    k, v = (torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=3).flatten(1, 2) for x in (k, v))
    query = torch.arange(window, device=q.device)[:, None]
    key = torch.arange(2 * window, device=q.device)[None, :]
    in_band = (key > query) & (key <= query + window)
    others = F.scaled_dot_product_attention(q[:, :, 1:].flatten(1, 2), k, v, attn_mask=in_band)
    # Not `view`: CUDA kernels return their own layout.
    others = others.reshape(batch_size, num_heads, -1, head_dim)
    return torch.cat([first, others], dim=2)[:, :, :length]


def split_heads(x_BTD: Tensor, num_heads: int) -> Tensor:
    """[B, T, D] to [B, H, T, K]."""
    return x_BTD.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(x_BHTK: Tensor) -> Tensor:
    """[B, H, T, K] to [B, T, D]."""
    return x_BHTK.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Causal self-attention within a window, with rotary positions."""

    def __init__(self, width: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (split_heads(x, self.num_heads) for x in self.query_key_value(x_BTD).chunk(3, dim=-1))
        return self.output(join_heads(windowed_attention(rotary(q), rotary(k), v, self.window)))


class CrossAttention(nn.Module):
    """Attention of every token to the S thought vectors of a layer.

    The position of z's keys is a choice: key s is rotated to position s, and queries are not rotated at all. So every
    token, wherever it stands, sees slot s at the same angle. Without any position the slots of a layer would be
    exchangeable, and the posterior would have S! equal modes in each layer, which no mean-field q can
    describe. With positions along the text, as in the reference implementation, a late token would see z
    at a distance of a thousand and a slot's meaning would change with the place it is read from.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, query_BTD: Tensor, z_BSD: Tensor) -> Tensor:
        """Attention of the queries, `self.query` of the tokens' states, which does not depend on z."""
        k, v = (split_heads(x, self.num_heads) for x in self.key_value(z_BSD).chunk(2, dim=-1))
        q = split_heads(query_BTD, self.num_heads)
        return self.output(join_heads(F.scaled_dot_product_attention(q, rotary(k), v)))
