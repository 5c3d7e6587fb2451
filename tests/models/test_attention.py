"""Attention: the banded computation equals the dense one, and positions enter only as differences.

Shapes: B sequences, H heads, T tokens, S slots, D width, K numbers per head, W window.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ltm_pyro.models import attention
from ltm_pyro.models.attention import CrossAttention, Rotation, rotary, windowed_attention

EPS32 = np.finfo(np.float32).eps
# Rotation angles are computed in float32, whatever the dtype of x: the frequency and its product with the position are
# rounded, so the angle at position n is off by 2n·eps at most.
ROTARY_ROUNDING = 2 * EPS32

# Lengths below, at and above the window, multiples of it and not; the window of one token too.
LENGTHS_AND_WINDOWS = [
    (1, 1),
    (5, 1),
    (3, 4),
    (4, 4),
    (5, 4),
    (7, 4),
    (8, 4),
    (9, 4),
    (13, 4),
    (10, 5),
    (7, 6),
    (11, 2),
]


def random_qkv(length, head_dim=6, batch_size=2, num_heads=3):
    shape = 3, batch_size, num_heads, length, head_dim
    return tuple(x.requires_grad_() for x in torch.randn(shape, dtype=torch.float64).unbind())


def naive_windowed_attention(q_BHTK, k_BHTK, v_BHTK, window):
    """One query after the other, over a slice of the keys: no mask and no block."""
    rows = []
    for n in range(q_BHTK.shape[2]):
        visible = slice(max(0, n - window + 1), n + 1)
        scores = (k_BHTK[:, :, visible] * q_BHTK[:, :, n : n + 1]).sum(-1) / math.sqrt(q_BHTK.shape[-1])
        exponentials = scores.exp()
        probabilities = exponentials / exponentials.sum(-1, keepdim=True)
        rows.append((probabilities[..., None] * v_BHTK[:, :, visible]).sum(2))
    return torch.stack(rows, dim=2)


def rotated(x_K, position):
    """Rotation of one head's numbers as complex multiplication, in float64."""
    half = len(x_K) // 2
    frequencies = 10_000.0 ** (-2 * np.arange(half) / len(x_K))
    turned = (x_K[:half] + 1j * x_K[half:]) * np.exp(1j * position * frequencies)
    return np.concatenate([turned.real, turned.imag])


@pytest.mark.parametrize(("length", "window"), LENGTHS_AND_WINDOWS)
def test_windowed_attention_and_its_gradients_equal_dense_attention(length, window):
    inputs = random_qkv(length)
    out = windowed_attention(*inputs, window)
    naive = naive_windowed_attention(*inputs, window)
    torch.testing.assert_close(out, naive, rtol=1e-12, atol=1e-12)

    direction = torch.randn_like(naive)
    gradients = torch.autograd.grad((out * direction).sum(), inputs)
    naive_gradients = torch.autograd.grad((naive * direction).sum(), inputs)
    torch.testing.assert_close(gradients, naive_gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_queries", [0, 1, 2, 5, 8])
@pytest.mark.parametrize(("length", "window"), [(8, 1), (8, 2), (8, 4), (9, 4), (11, 4), (12, 4), (13, 4), (8, 9)])
def test_queries_of_the_last_positions_alone_see_what_they_see_among_all(length, window, num_queries):
    q, k, v = random_qkv(length)
    last = q[:, :, length - num_queries :]
    out = windowed_attention(last, k, v, window)
    expected = naive_windowed_attention(q, k, v, window)[:, :, length - num_queries :]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(out)
    gradients = torch.autograd.grad((out * direction).sum(), (q, k, v))
    expected_gradients = torch.autograd.grad((expected * direction).sum(), (q, k, v))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("changed", ["key", "value"])
@pytest.mark.parametrize(("length", "window"), LENGTHS_AND_WINDOWS)
def test_a_position_is_seen_from_itself_and_the_window_minus_one_after_it_and_from_nowhere_else(
    length, window, changed
):
    q, k, v = (x.detach() for x in random_qkv(length))
    before = windowed_attention(q, k, v, window)
    for position in range(length):
        other = (k if changed == "key" else v).clone()
        other[:, :, position] += 1.0
        after = windowed_attention(q, other, v, window) if changed == "key" else windowed_attention(q, k, other, window)
        seen = torch.zeros(length, dtype=torch.bool)
        seen[position : position + window] = True
        if changed == "key":
            # A query that sees a single key takes its value, whatever the key is.
            seen[: 1 if window > 1 else length] = False
        assert torch.equal((after != before).any(-1), seen.expand(2, 3, length))


def test_windowed_attention_takes_what_layout_the_attention_kernel_returns(monkeypatch):
    # The memory-efficient kernel of CUDA returns [B, H, T, K] as a view of memory laid out as [B, T, H, K].
    kernel = attention.F.scaled_dot_product_attention

    def kernel_of_cuda(*args, **kwargs):
        return kernel(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", kernel_of_cuda)
    for length in (3, 9):
        inputs = random_qkv(length)
        out = windowed_attention(*inputs, window=4)
        torch.testing.assert_close(out, naive_windowed_attention(*inputs, window=4), rtol=1e-12, atol=1e-12)


def dense_varlen_attn(q, k, v, first_q, first_k, num_q, num_k, *, window_size):
    """What the documentation of `varlen_attn` says, of texts of one length each: [N, H, K]."""
    left, right = window_size
    assert right == 0
    texts = zip(first_q[:-1].tolist(), first_q[1:].tolist(), first_k[:-1].tolist(), first_k[1:].tolist(), strict=True)
    outputs = []
    for q0, q1, k0, k1 in texts:
        assert (q1 - q0, k1 - k0) == (num_q, num_k)
        query = torch.arange(q1 - q0)[:, None] + num_k - num_q
        key = torch.arange(k1 - k0)
        is_seen = (key <= query) & (key >= query - left)
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], k[k0:k1]) / q.shape[-1] ** 0.5
        shares = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", shares, v[k0:k1]))
    return torch.cat(outputs)


@pytest.mark.parametrize("num_queries", [2, 5, 13])
@pytest.mark.parametrize("window", [1, 4, 13])
def test_flash_attention_is_asked_for_what_the_window_leaves(window, num_queries, monkeypatch):
    q, k, v = random_qkv(13)
    monkeypatch.setattr(attention, "varlen_attn", dense_varlen_attn)
    out = attention._flash_attention(q[:, :, 13 - num_queries :], k, v, window)
    expected = naive_windowed_attention(q, k, v, window)[:, :, 13 - num_queries :]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changed", "takes"),
    [({}, True), ({"is_cuda": False}, False), ({"dtype": torch.float32}, False), ({"shape": (2, 3, 9, 12)}, False)],
)
def test_flash_attention_is_for_half_precision_on_cuda_and_not_where_attention_is_written_out(changed, takes):
    x = SimpleNamespace(**{"is_cuda": True, "dtype": torch.bfloat16, "shape": (2, 3, 9, 16)} | changed)
    assert attention._takes_flash_attention(x) == takes
    with attention.written_out():
        assert not attention._takes_flash_attention(x)
    assert attention._takes_flash_attention(x) == takes


@pytest.mark.skipif(not attention.HAS_WINDOWS, reason="this version of torch has no FlashAttention with windows")
def test_flash_attention_takes_what_it_is_given():
    """Its own shapes and dtypes, without numbers; forward and backward."""
    with FakeTensorMode():
        heads = torch.randn(2, 9, 9, 8, dtype=torch.bfloat16, requires_grad=True)
        q, k, v = heads.transpose(1, 2).chunk(3, dim=1)
        out = attention._flash_attention(q[:, :, 4:], k, v, 4)
        (gradient,) = torch.autograd.grad(out.sum(), heads)
    assert (out.shape, out.dtype) == ((2, 3, 5, 8), torch.bfloat16)
    assert (gradient.shape, gradient.dtype) == (heads.shape, torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("num_queries", [100, 300])
@pytest.mark.parametrize("window", [1, 64, 300])
def test_on_cuda_half_precision_says_the_same(window, num_queries, monkeypatch):
    calls = []
    flash = attention._flash_attention
    monkeypatch.setattr(attention, "_flash_attention", lambda *args: calls.append(1) or flash(*args))
    heads = torch.randn(2, 300, 6, 64, dtype=torch.float64)
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        own = heads.to(device, dtype).requires_grad_()
        q, k, v = own.transpose(1, 2).chunk(3, dim=1)
        out = windowed_attention(q[:, :, 300 - num_queries :], k, v, window)
        (gradient,) = torch.autograd.grad(out.square().sum(), own)
        results.append((out.detach().cpu().double(), gradient.cpu().double()))
    assert bool(calls) == (attention.HAS_WINDOWS and (window, num_queries) != (300, 300))
    for value, expected in zip(*results, strict=True):
        assert (value - expected).norm() < 0.02 * expected.norm()


def test_rotary_is_complex_multiplication_by_the_position():
    length, head_dim = 300, 8
    x = torch.randn(2, 3, length, head_dim, dtype=torch.float64)
    expected = np.stack([[[rotated(x[b, h, n].numpy(), n) for n in range(length)] for h in range(3)] for b in range(2)])
    tolerance = length * ROTARY_ROUNDING * float(x.abs().max())
    np.testing.assert_allclose(rotary(x).numpy(), expected, rtol=0, atol=tolerance)


def test_rotation_has_the_gradient_of_finite_differences_and_so_has_its_gradient():
    x = torch.randn(2, 4, 3, 6, dtype=torch.float64, requires_grad=True)
    rotation = Rotation.at(torch.arange(5), 6, torch.float64)
    assert torch.autograd.gradcheck(rotation, x)
    assert torch.autograd.gradgradcheck(rotation, x)
    assert rotation(x)[:, 1:].ne(x[:, 1:]).all()


def test_rotary_leaves_position_zero_as_it_is():
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    assert torch.equal(rotary(x)[:, :, 0], x[:, :, 0])


def test_rotary_keeps_norms():
    x = torch.randn(2, 3, 500, 8, dtype=torch.float64)
    # Sine and cosine are rounded to float32: their squares sum to one within two roundings.
    torch.testing.assert_close(rotary(x).norm(dim=-1), x.norm(dim=-1), rtol=2 * EPS32, atol=0)


def test_rotary_scores_depend_on_the_difference_of_positions_only():
    length, head_dim = 200, 8
    q_K, k_K = torch.randn(2, head_dim, dtype=torch.float64)
    q = rotary(q_K.expand(1, 1, length, head_dim))[0, 0]
    k = rotary(k_K.expand(1, 1, length, head_dim))[0, 0]
    scores = q @ k.T
    tolerance = float(length * 2 * ROTARY_ROUNDING * q_K.norm() * k_K.norm())
    by_difference = []
    for difference in range(-50, 51):
        diagonal = scores.diagonal(difference)
        assert diagonal.max() - diagonal.min() <= tolerance
        by_difference.append(diagonal[0])
    assert len({round(float(score), 2) for score in by_difference}) > 50


def test_rotary_tells_neighbouring_positions_apart_in_bfloat16():
    # bfloat16 has 8 significant bits: as a bfloat16 number, position 257 is 256.
    x = torch.ones(1, 1, 1024, 8, dtype=torch.bfloat16)
    turned = rotary(x)
    assert turned.dtype == torch.bfloat16
    expected = np.stack([rotated(np.ones(8), n) for n in range(1024)])
    # Two products and a sum of numbers below 1, each rounded to eps.
    tolerance = 4 * torch.finfo(torch.bfloat16).eps
    np.testing.assert_allclose(turned[0, 0].double().numpy(), expected, rtol=0, atol=tolerance)


@pytest.fixture
def cross_attention():
    module = CrossAttention(width=12, num_heads=3).double()
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return module.requires_grad_(False)


def test_cross_attention_is_softmax_over_slots_whose_keys_alone_are_rotated(cross_attention):
    x_BTD = torch.randn(2, 5, 12, dtype=torch.float64)
    z_BSD = torch.randn(2, 7, 12, dtype=torch.float64)
    query, key_value, output = (
        getattr(cross_attention, name).weight.numpy() for name in ("query", "key_value", "output")
    )
    expected = np.zeros((2, 5, 12))
    for b in range(2):
        keys, values = np.split(z_BSD[b].numpy() @ key_value.T, 2, axis=-1)
        for n in range(5):
            q = query @ x_BTD[b, n].numpy()
            heads = []
            for head in (slice(0, 4), slice(4, 8), slice(8, 12)):
                weights = np.exp([q[head] @ rotated(keys[s, head], s) / 2 for s in range(7)])
                heads.append(weights @ values[:, head] / weights.sum())
            expected[b, n] = output @ np.concatenate(heads)
    # A rounded angle moves a score by a few times its rounding, and the output by as much of its size.
    tolerance = 7 * ROTARY_ROUNDING * 10 * np.abs(expected).max()
    found = cross_attention(x_BTD, z_BSD).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def test_slots_are_not_exchangeable(cross_attention):
    x_BTD = torch.randn(2, 5, 12, dtype=torch.float64)
    z_BSD = torch.randn(2, 3, 12, dtype=torch.float64)
    out = cross_attention(x_BTD, z_BSD)
    for order in ([1, 0, 2], [0, 2, 1], [2, 1, 0], [1, 2, 0], [2, 0, 1]):
        change = (cross_attention(x_BTD, z_BSD[:, order]) - out).norm(dim=-1) / out.norm(dim=-1)
        assert change.min() > 1e-3


def test_every_token_sees_a_slot_at_the_same_angle_wherever_it_stands(cross_attention):
    x_BTD = torch.randn(2, 1, 12, dtype=torch.float64).expand(2, 400, 12)
    out = cross_attention(x_BTD, torch.randn(2, 3, 12, dtype=torch.float64))
    torch.testing.assert_close(out, out[:, :1].expand_as(out), rtol=1e-12, atol=1e-12)


def test_a_sequence_attends_to_its_own_thought_vectors_only(cross_attention):
    x_BTD = torch.randn(3, 5, 12, dtype=torch.float64)
    z_BSD = torch.randn(3, 2, 12, dtype=torch.float64)
    before = cross_attention(x_BTD, z_BSD)
    z_BSD[1] += 1.0
    differs = (cross_attention(x_BTD, z_BSD) != before).all(-1)
    assert differs.tolist() == [[False] * 5, [True] * 5, [False] * 5]
