"""Attention within a window by `varlen_attn`, beside that of the package: the same numbers, and in what time?

    python benchmarks/windows.py [--device cuda] [--toy]

The package computes blocks of W queries and 2 W keys, and hides half of the scores behind a mask. FlashAttention, which
`varlen_attn` calls, leaves out most of what is hidden and copies no keys. It runs on CUDA devices alone, so that no
test on a CPU could say that it is right: it is not in the package. (Nor is FlexAttention, which takes no gradients on a
CPU.) The script prints what the part "windows" of on_device.py writes; on a CPU, that of the package alone.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from timing import seconds_in_turns
from torch import Tensor

from ltm_pyro.config import preset
from ltm_pyro.models.attention import windowed_attention

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def has_varlen_windows() -> bool:
    """Whether this version of torch has a `varlen_attn` with windows, as 2.13 has; its first versions had none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "window_size" in inspect.signature(varlen_attn).parameters


def by_varlen(q_BHTK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor, window: int) -> Tensor:
    """What `windowed_attention` computes, in bfloat16 or float16 on a CUDA device, and without second derivatives."""
    from torch.nn.attention.varlen import varlen_attn

    batch_size, length, num_keys = len(q_BHTK), q_BHTK.shape[2], k_BHNK.shape[2]
    texts = torch.arange(batch_size + 1, dtype=torch.int32, device=q_BHTK.device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTK, k_BHNK, v_BHNK))
    # The last query stands where the last key stands. A window there does not count the query's own position.
    out = varlen_attn(q, k, v, texts * length, texts * num_keys, length, num_keys, window_size=(window - 1, 0))
    return torch.unflatten(out, 0, (batch_size, length)).transpose(1, 2)


def with_gradient(attention: Attention, heads_BTHK: Tensor, num_queries: int, window: int) -> tuple[Tensor, Tensor]:
    """The output of the last queries, and the gradient of its sum of squares for all heads.

    Args:
        heads_BTHK: heads of queries, keys and values, as the decoder lays them out.
    """
    heads_BTHK = heads_BTHK.detach().requires_grad_()
    q, k, v = heads_BTHK.transpose(1, 2).chunk(3, dim=1)
    out = attention(q[:, :, q.shape[2] - num_queries :], k, v, window)
    (gradient,) = torch.autograd.grad(out, heads_BTHK, 2 * out.detach())
    return out.detach(), gradient


def differences(attention: Attention, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """By how much output and gradient differ from float64 on the CPU, relative to their norms."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    for length, num_queries, window in ((300, 300, 64), (300, 170, 64), (256, 256, 256), (40, 40, 64)):
        heads = torch.randn(2, length, 6, 64, dtype=torch.float64, generator=generator)
        expected = with_gradient(windowed_attention, heads, num_queries, window)
        values = with_gradient(attention, heads.to(device, dtype), num_queries, window)
        for what, value, right in zip(("output", "gradient"), values, expected, strict=True):
            difference = (value.double().cpu() - right).norm() / right.norm()
            found[f"{what}, {num_queries} of {length}, window {window}"] = difference.item()
    return found


def compare(device: torch.device, is_toy: bool = False) -> dict[str, Any]:
    """The differences, and the milliseconds of a forward and backward pass in a layer of preset small."""
    ways: dict[str, Attention] = {"package": windowed_attention}
    if device.type == "cuda" and has_varlen_windows():
        ways["varlen"] = by_varlen
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape, batch_size = preset("small").model, 1 if is_toy else 64
    heads = torch.randn(batch_size, shape.length, 3 * shape.num_heads, shape.head_dim, device=device, dtype=dtype)
    works: dict[str, Callable[[], object]] = {
        name: functools.partial(with_gradient, attention, heads, shape.length, shape.window)
        for name, attention in ways.items()
    }
    seconds = seconds_in_turns(works, 1 if is_toy else 20, device)
    return {
        name: {
            "differences": differences(attention, device, dtype),
            "milliseconds": 1e3 * statistics.median(seconds[name]),
        }
        for name, attention in ways.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--toy", action="store_true", help="one text, once")
    options = parser.parse_args()
    print(json.dumps(compare(torch.device(options.device), options.toy), indent=2))


if __name__ == "__main__":
    main()
