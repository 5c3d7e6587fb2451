"""Attention of the decoder: causal within a window, and across to the thought vectors.

Shapes: B sequences, H heads, T tokens, S slots, D width, K = D / H numbers per head, W window, R tokens in a ring.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ltm_pyro.models.stacked import StackedLinear

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # of versions of torch before it
    varlen_attn = None  # type: ignore[assignment]
HAS_WINDOWS = varlen_attn is not None and "window_size" in inspect.signature(varlen_attn).parameters
"""Whether this version of torch has FlashAttention with windows, which the first versions of `varlen_attn` lacked."""
_is_written_out = False

ROTARY_BASE = 10_000.0


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34): the rotation at each of some positions.

    The first half of a head's numbers are the real, the second half the imaginary parts of the K/2 rotated pairs.
    Scores of rotated queries and keys depend on the difference of their positions only. The tables are the same for
    all layers, so the decoder makes them once.
    """

    cos: Tensor
    """[..., T, 1, K/2]; at least in float32."""
    sin: Tensor
    """[..., T, 1, K/2]."""

    @classmethod
    def at(cls, positions: Tensor, head_dim: int, dtype: torch.dtype = torch.float32) -> Rotation:
        """The rotation at these positions, [..., T]."""
        # At least in float32: bfloat16 cannot tell position 256 from 257.
        dtype = torch.promote_types(dtype, torch.float32)
        exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim
        angles = positions[..., None, None].to(dtype) * ROTARY_BASE**-exponents
        return cls(angles.cos(), angles.sin())

    def __call__(self, x_BTHK: Tensor) -> Tensor:
        """x, rotated. The rotation may be that of more positions than T."""
        length = x_BTHK.shape[-3]
        cos, sin = (table[..., :length, :, :].to(x_BTHK.dtype) for table in (self.cos, self.sin))
        rotated: Tensor = _Rotated.apply(x_BTHK, cos, sin)  # type: ignore[no-untyped-call]  # as all of torch's
        return rotated


class _Rotated(torch.autograd.Function):
    """x with its pairs rotated. The gradient is rotated back.

    Autograd would take about twice as many passes over the numbers: on a CPU, where these take as long as attention
    itself, and in compiled code, which makes no single pass of the gradient of a concatenation of parts.
    """

    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x_BTHK, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotated.apply(gradient, cos, -sin), None, None  # type: ignore[no-untyped-call]


def _rotated(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imaginary = x_BTHK.chunk(2, dim=-1)
    if torch.compiler.is_compiling():  # a compiler makes one pass of this by itself, and is slowed by changes in place
        return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    out = x_BTHK.clone()
    new_real, new_imaginary = out.chunk(2, dim=-1)
    new_real.mul_(cos).addcmul_(imaginary, sin, value=-1)
    new_imaginary.mul_(cos).addcmul_(real, sin)
    return out


def rotary(x_BHTK: Tensor) -> Tensor:
    """x rotated to positions 0 … T − 1."""
    num_positions, head_dim = x_BHTK.shape[-2:]
    rotation = Rotation.at(torch.arange(num_positions, device=x_BHTK.device), head_dim, x_BHTK.dtype)
    return rotation(x_BHTK.transpose(-2, -3)).transpose(-2, -3)


def windowed_attention(q_BHTK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor, window: int) -> Tensor:
    """Causal attention in which position n sees positions n − W + 1 … n, that is W of them, itself included.

    Only the blocks of the band are computed: a block of W queries sees its own block of keys and the one before it, so
    time and memory grow with T·W and not with T². FlashAttention leaves out most of what is hidden within the blocks,
    too. It is used for half precision on a CUDA device.

    Args:
        q_BHTK: queries of the last T of the N positions.
        k_BHNK: keys of all positions.
        v_BHNK: values of all positions.
    """
    batch_size, num_heads, length, head_dim = q_BHTK.shape
    num_before = min(k_BHNK.shape[2] - length, window - 1)  # positions before the queries that any of them sees
    k_BHNK, v_BHNK = (x[:, :, x.shape[2] - length - num_before :] for x in (k_BHNK, v_BHNK))
    hides_keys = length > window or num_before > 0
    if HAS_WINDOWS and hides_keys and _takes_flash_attention(q_BHTK):
        return _flash_attention(q_BHTK, k_BHNK, v_BHNK, window)
    if length <= window:
        return _band_attention(q_BHTK, k_BHNK, v_BHNK, window)
    num_blocks = -(-length // window)
    behind, in_front = num_blocks * window - length, window - num_before
    q = torch.unflatten(F.pad(q_BHTK, (0, 0, 0, behind)), 2, (num_blocks, window))
    # With a block of keys in front of the first, every block of queries has one before its own.
    padded = (F.pad(x, (0, 0, in_front, behind)) for x in (k_BHNK, v_BHNK))
    k, v = (torch.unflatten(x, 2, (num_blocks + 1, window)) for x in padded)
    k, v = (torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=3) for x in (k, v))
    # All blocks share one mask, which hides a single key in front of the first. Where there are more, it stands alone.
    num_alone = 0 if in_front == 1 else 1
    q_rest, k_rest, v_rest = (x[:, :, num_alone:].flatten(1, 2) for x in (q, k, v))
    rest = _band_attention(q_rest, k_rest, v_rest, window)
    # Not `view`: CUDA kernels return a layout of their own.
    out = rest.reshape(batch_size, num_heads, -1, head_dim)
    if num_alone:
        first = _band_attention(q[:, :, 0], k[:, :, 0, in_front:], v[:, :, 0, in_front:], window)
        out = torch.cat([first, out], dim=2)
    return out[:, :, :length]


def _band_attention(q_BHTK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor, window: int) -> Tensor:
    """What :func:`windowed_attention` computes, with all N keys for each query, most of which a mask may hide."""
    length, num_before = q_BHTK.shape[2], k_BHNK.shape[2] - q_BHTK.shape[2]
    if not num_before:  # the window hides nothing: there are no more queries than it is long
        return F.scaled_dot_product_attention(q_BHTK, k_BHNK, v_BHNK, is_causal=True)
    query = torch.arange(length, device=q_BHTK.device)[:, None] + num_before
    key = torch.arange(num_before + length, device=q_BHTK.device)[None, :]
    in_band = (key > query - window) & (key <= query)  # in two dimensions, as kernels take it
    return F.scaled_dot_product_attention(q_BHTK, k_BHNK, v_BHNK, attn_mask=in_band)


def _takes_flash_attention(x_BHTK: Tensor) -> bool:
    """Whether the device and the dtype are FlashAttention's."""
    is_half = x_BHTK.dtype in (torch.bfloat16, torch.float16)
    return x_BHTK.is_cuda and is_half and x_BHTK.shape[-1] % 8 == 0 and not _is_written_out


@contextlib.contextmanager
def written_out() -> Iterator[None]:
    """A block in which attention is products and a softmax, whose operations PyTorch counts on every device."""
    global _is_written_out
    before, _is_written_out = _is_written_out, True
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _is_written_out = before


def _flash_attention(q_BHTK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor, window: int) -> Tensor:
    """What :func:`windowed_attention` computes. The gradient has no gradient itself."""
    batch_size, length, num_keys = len(q_BHTK), q_BHTK.shape[2], k_BHNK.shape[2]
    texts = torch.arange(batch_size + 1, dtype=torch.int32, device=q_BHTK.device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTK, k_BHNK, v_BHNK))
    # The last query stands where the last key stands. A window there does not count the query's own position.
    out: Any = varlen_attn(q, k, v, texts * length, texts * num_keys, length, num_keys, window_size=(window - 1, 0))
    return torch.unflatten(out, 0, (batch_size, length)).transpose(1, 2)


def split_heads(x_BTD: Tensor, num_heads: int) -> Tensor:
    """Reshape [B, T, D] to [B, H, T, K]."""
    return torch.unflatten(x_BTD, -1, (num_heads, -1)).transpose(1, 2)


def join_heads(x_BHTK: Tensor) -> Tensor:
    """Reshape [B, H, T, K] to [B, T, D]."""
    return x_BHTK.transpose(1, 2).flatten(2)


@dataclass(frozen=True, eq=False)
class Ring:
    """Keys and values of the last R tokens of each text: R is the window, or less where the texts stay shorter.

    The order of keys does not matter to attention, so the next token takes the place of the oldest.
    """

    k_BHRK: Tensor
    """The keys, rotated to the positions of their tokens."""
    v_BHRK: Tensor
    """The values."""

    @classmethod
    def of_last(cls, k_BHTK: Tensor, v_BHTK: Tensor, index_BR: Tensor) -> Ring:
        """A ring that holds the tokens with these indices."""
        index = index_BR[:, None, :, None].expand(-1, k_BHTK.shape[1], -1, k_BHTK.shape[3])
        return cls(k_BHTK.gather(2, index), v_BHTK.gather(2, index))

    def put(self, place_1: Tensor, k_BH1K: Tensor, v_BH1K: Tensor) -> None:
        """Replace the token in this place by another."""
        self.k_BHRK.index_copy_(2, place_1, k_BH1K)
        self.v_BHRK.index_copy_(2, place_1, v_BH1K)


class SelfAttention(nn.Module):
    """Causal self-attention within a window, with rotary positions."""

    def __init__(self, width: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.query_key_value = StackedLinear(width, width, 3)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor, rotation: Rotation, num_outputs: int | None = None) -> Tensor:
        """Attention of the last `num_outputs` positions to all; None for that of every position."""
        q, k, v = self._heads(x_BTD, rotation)
        q = q[:, :, 0 if num_outputs is None else q.shape[2] - num_outputs :]
        attended: Tensor = self.output(join_heads(windowed_attention(q, k, v, self.window)))
        return attended

    def read(self, x_BTD: Tensor, rotation: Rotation, index_BR: Tensor) -> tuple[Tensor, Ring]:
        """What `forward` returns, and a ring of the tokens with these indices, from which `step` continues."""
        q, k, v = self._heads(x_BTD, rotation)
        attended = self.output(join_heads(windowed_attention(q, k, v, self.window)))
        return attended, Ring.of_last(k, v, index_BR)

    def step(self, x_B1D: Tensor, ring: Ring, place_1: Tensor, rotation: Rotation, is_seen_BR: Tensor) -> Tensor:
        """Attention of one token of each text, which takes its place in the ring.

        Args:
            place_1: the place that the token takes, the same for all texts.
            rotation: at the tokens' positions, [B, 1].
            is_seen_BR: whether each place of the ring holds a token of the text, the new one included.
        """
        q, k, v = self._heads(x_B1D, rotation)
        ring.put(place_1, k, v)
        seen = F.scaled_dot_product_attention(q, ring.k_BHRK, ring.v_BHRK, attn_mask=is_seen_BR[:, None, None])
        attended: Tensor = self.output(join_heads(seen))
        return attended

    def _heads(self, x_BTD: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated to their positions, and values."""
        heads_BTHK = torch.unflatten(self.query_key_value(x_BTD), -1, (3 * self.num_heads, -1))
        turned_BTHK, v_BTHK = heads_BTHK.split_with_sizes([2 * self.num_heads, self.num_heads], dim=-2)
        q, k = rotation(turned_BTHK).transpose(1, 2).chunk(2, dim=1)
        return q, k, v_BTHK.transpose(1, 2)


class CrossAttention(nn.Module):
    """Attention of every token to the S thought vectors of a layer.

    The position of the thought vectors' keys is a choice: key s is rotated to position s, and queries are not rotated
    at all. So every token, wherever it stands, sees slot s at the same angle. Without any position the slots of a layer
    would be exchangeable, and the posterior would have S! equal modes in each layer, which no mean-field q can
    describe. With positions along the text, as in the reference implementation, a late token would see the thought
    vectors at a distance of a thousand, and what a slot means would depend on where in the text it is read.

    A text has few thought vectors and many tokens, so the weights of queries and output are taken into keys and values:
    of a head h with keys k_s and values v_s, the score of a token's state x is (W_h x) · k_s = x · (W_hᵀ k_s), and what
    it adds to the output is V_h Σ_s p_s v_s = Σ_s p_s (V_h v_s). A token then costs two products with S vectors of D
    numbers for each head, instead of two with D x D weights, which is less where S is below K.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = StackedLinear(width, width, 2)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor, u_BSD: Tensor) -> Tensor:
        """What tokens in these states read of the thought vectors."""
        return self.attend(x_BTD, *self.keys_values(u_BSD))

    def keys_values(self, u_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """W_hᵀ k_s and V_h v_s of all heads and slots, [B, H·S, D] each: all that tokens see of the thought vectors."""
        k, v = (split_heads(x, self.num_heads) for x in self.key_value(u_BSD).chunk(2, dim=-1))
        return self.taken_in(rotary(k), v)

    def taken_in(self, k_BHSK: Tensor, v_BHSK: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with the weights of queries and output taken in, [B, H·S, D] each."""
        query_HKD = torch.unflatten(self.query.weight, 0, (self.num_heads, -1))
        output_HKD = torch.unflatten(self.output.weight.T, 0, (self.num_heads, -1))
        keys, values = (
            torch.einsum("bhsk,hkd->bhsd", x, weight)  # one product for each head
            for x, weight in ((k_BHSK, query_HKD), (v_BHSK, output_HKD))
        )
        return keys.flatten(1, 2), values.flatten(1, 2)

    def attend(self, x_BTD: Tensor, keys_BND: Tensor, values_BND: Tensor) -> Tensor:
        """Attention to what :meth:`keys_values` has returned."""
        scores = torch.unflatten(torch.matmul(x_BTD, keys_BND.mT), -1, (self.num_heads, -1))
        scale = (x_BTD.shape[-1] // self.num_heads) ** -0.5
        # At least in float32, as attention's kernels do it.
        weights = (scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale).softmax(-1)
        return torch.matmul(weights.flatten(-2).to(values_BND.dtype), values_BND)
