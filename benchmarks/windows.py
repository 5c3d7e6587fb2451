"""Attention within a window by FlashAttention, beside that by blocks of the band: the same numbers, and in what time?

    python benchmarks/windows.py [--device cuda] [--toy]

The package takes FlashAttention on a CUDA device in half precision. Elsewhere it computes blocks of W queries and 2 W
keys, and hides half of the scores behind a mask. The script prints what the part "windows" of on_device.py writes; on a
CPU, that of the blocks alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from timing import seconds_in_turns
from torch import Tensor

from ltm_pyro.config import preset
from ltm_pyro.models import attention
from ltm_pyro.models.attention import windowed_attention

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def by_blocks(q_BHTK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor, window: int) -> Tensor:
    """What `windowed_attention` computes, without FlashAttention."""
    with mock.patch.object(attention, "HAS_WINDOWS", False):
        return windowed_attention(q_BHTK, k_BHNK, v_BHNK, window)


def with_gradient(way: Attention, heads_BTHK: Tensor, num_queries: int, window: int) -> tuple[Tensor, Tensor]:
    """The output of the last queries, and the gradient of its sum of squares for all heads.

    Args:
        heads_BTHK: heads of queries, keys and values, as the decoder lays them out.
    """
    heads_BTHK = heads_BTHK.detach().requires_grad_()
    q, k, v = heads_BTHK.transpose(1, 2).chunk(3, dim=1)
    out = way(q[:, :, q.shape[2] - num_queries :], k, v, window)
    (gradient,) = torch.autograd.grad(out, heads_BTHK, 2 * out.detach())
    return out.detach(), gradient


def differences(way: Attention, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """By how much output and gradient differ from float64 on the CPU, relative to their norms."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    for length, num_queries, window in ((300, 300, 64), (300, 170, 64), (256, 256, 256), (40, 40, 64)):
        heads = torch.randn(2, length, 6, 64, dtype=torch.float64, generator=generator)
        expected = with_gradient(windowed_attention, heads, num_queries, window)
        values = with_gradient(way, heads.to(device, dtype), num_queries, window)
        for what, value, right in zip(("output", "gradient"), values, expected, strict=True):
            difference = (value.double().cpu() - right).norm() / right.norm()
            found[f"{what}, {num_queries} of {length}, window {window}"] = difference.item()
    return found


def compare(device: torch.device, is_toy: bool = False) -> dict[str, Any]:
    """The differences, and the milliseconds of a forward and backward pass in a layer of preset small."""
    ways: dict[str, Attention] = {"blocks": by_blocks}
    if device.type == "cuda" and attention.HAS_WINDOWS:
        ways["flash"] = windowed_attention
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape, batch_size = preset("small").model, 1 if is_toy else 64
    heads = torch.randn(batch_size, shape.length, 3 * shape.num_heads, shape.head_dim, device=device, dtype=dtype)
    works: dict[str, Callable[[], object]] = {
        name: functools.partial(with_gradient, way, heads, shape.length, shape.window) for name, way in ways.items()
    }
    seconds = seconds_in_turns(works, 1 if is_toy else 20, device)
    return {
        name: {
            "differences": differences(way, device, dtype),
            "milliseconds": 1e3 * statistics.median(seconds[name]),
        }
        for name, way in ways.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--toy", action="store_true", help="one text, once")
    options = parser.parse_args()
    print(json.dumps(compare(torch.device(options.device), options.toy), indent=2))


if __name__ == "__main__":
    main()
