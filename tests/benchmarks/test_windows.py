"""The script that measures another kernel: it asks that kernel for what the package computes.

The kernel runs on CUDA devices alone. In its place stands what its documentation says of it.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ltm_pyro.models.attention import windowed_attention


@pytest.fixture
def windows(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    module = importlib.import_module("windows")
    if not module.has_varlen_windows():
        pytest.skip("this version of torch has no varlen_attn with windows")
    return module


def documented(q, k, v, starts_q, starts_k, max_q, max_k, window_size):
    """One text after another; where there are fewer queries than keys, they are the last."""
    left, right = window_size
    out = []
    for number in range(len(starts_q) - 1):
        of_q, of_k = (slice(starts[number], starts[number + 1]) for starts in (starts_q, starts_k))
        scores = torch.einsum("qhd,khd->hqk", q[of_q], k[of_k]) * q.shape[-1] ** -0.5
        assert scores.shape[1:] == (max_q, max_k)
        distance = torch.arange(max_q)[:, None] + max_k - max_q - torch.arange(max_k)[None]
        scores = scores.masked_fill((distance > left) | (distance < -right), -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[of_k]))
    return torch.cat(out)


@pytest.mark.parametrize(("length", "num_queries", "window"), [(9, 9, 4), (9, 5, 4), (9, 1, 1), (3, 3, 8), (8, 6, 8)])
def test_the_other_kernel_is_asked_for_the_same(windows, length, num_queries, window, monkeypatch):
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", documented)
    heads = torch.randn(2, length, 9, 4, dtype=torch.float64)
    found, expected = (
        windows.with_gradient(attention, heads, num_queries, window)
        for attention in (windows.by_varlen, windowed_attention)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_other_kernel_takes_what_it_is_given(windows):
    """Its own shapes and dtypes, without numbers; forward and backward."""
    with FakeTensorMode():
        heads = torch.randn(2, 9, 9, 4, dtype=torch.bfloat16)
        out, gradient = windows.with_gradient(windows.by_varlen, heads, 5, 4)
    assert out.shape == (2, 3, 5, 4)
    assert gradient.shape == heads.shape
    assert out.dtype == gradient.dtype == torch.bfloat16
