"""Philox4x32-10 (Salmon et al. 2011, section 3.3): random numbers that are a pure function of a key and a counter.

It is written in elementwise operations of PyTorch, so that a device computes the numbers of all sequences at once from
ids and steps that it holds already. A device's own generator has one seed for all that it draws, which the host sets:
it would have to be set anew for each sequence.

Words of 32 bits are held in int64, whose product of two words wraps around 2**64 as that of unsigned numbers does.

Shapes: B sequences, N numbers of each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
NUM_ROUNDS = 10
WORD = 0xFFFFFFFF
"""The largest word, and the mask of the low one of an int64."""

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Four random words for each counter of four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        product_0, product_1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            _high(product_1) ^ c1 ^ k0,
            product_1 & WORD,
            _high(product_0) ^ c3 ^ k1,
            product_0 & WORD,
        )
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def _high(product: Tensor) -> Tensor:
    # The shift of a signed number fills in its sign.
    return (product >> 32) & WORD


def words(key: int, ids: Tensor, steps: Tensor, num_blocks: int) -> Words:
    """Four random words [B, num_blocks] for each block of each sequence.

    Args:
        key: from 0 to 2**64 - 1.
        ids: [B] int64.
        steps: [B] int64, from 0 to 2**32 - 1.
        num_blocks: at most 2**32.
    """
    block = torch.arange(num_blocks, device=ids.device).expand(len(ids), -1)
    of_sequence = (steps & WORD, ids & WORD, (ids >> 32) & WORD)
    step, low, high = (word[:, None].expand_as(block) for word in of_sequence)
    return philox((block, step, low, high), (key & WORD, key >> 32))


def normal(key: int, ids: Tensor, steps: Tensor, num_numbers: int) -> Tensor:
    """Standard normal numbers [B, N], float32, by the transformation of Box & Muller (1958).

    None is further from 0 than 6.8, which a normal number is once in 10**11.
    """
    w0, w1, w2, w3 = words(key, ids, steps, -(-num_numbers // 4))
    radius = (-2 * _unit(torch.stack([w0, w2], dim=2)).log()).sqrt()
    angle = 2 * math.pi * _unit(torch.stack([w1, w3], dim=2))
    # The numbers of a block stand together, so that the first ones do not depend on how many there are.
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=3).flatten(1)[:, :num_numbers]


def _unit(word: Tensor) -> Tensor:
    """Numbers of (0, 1], float32."""
    return word.float() * 2.0**-32 + 2.0**-33


def uniform(key: int, ids: Tensor, steps: Tensor, num_numbers: int) -> Tensor:
    """Numbers [B, N] from [0, 1), float64: multiples of 2**-53."""
    w0, w1, w2, w3 = words(key, ids, steps, -(-num_numbers // 2))
    high, low = torch.stack([w0, w2], dim=2), torch.stack([w1, w3], dim=2)
    return (((high << 21) | (low >> 11)).double() * 2.0**-53).flatten(1)[:, :num_numbers]
