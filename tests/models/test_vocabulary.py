"""The vocabulary term against PyTorch's own softmax: values, gradients, memory."""

from __future__ import annotations

import pytest
import torch

from ltm_pyro.models import vocabulary
from ltm_pyro.models.vocabulary import target_log_probs


def inputs(num_rows=23, width=5, vocab_size=7, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(num_rows, width, generator=generator, dtype=torch.float64)).to(dtype)
    weight = torch.randn(vocab_size, width, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocab_size, (num_rows,), generator=generator)
    return hidden, weight, targets


def materialised(hidden, weight, targets):
    return (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


@pytest.mark.parametrize("num_unused", [0, 1])
@pytest.mark.parametrize(
    ("block", "multiple"),
    [
        ((1, 1), 1),
        ((4, 3), 1),
        ((23, 7), 1),
        ((1000, 1000), 1),
        ((4, 4), 4),
        ((4, 4), 2),
        ((5, 8), 8),
        ((1000, 64), 32),
    ],
)
def test_values_and_gradients_are_those_of_all_logits_at_once(block, multiple, num_unused, monkeypatch):
    """However many logits are held at a time, one, some that do not divide their number, or all, and however many
    tokens there are to fill a block up."""
    monkeypatch.setattr(vocabulary, "CPU_BLOCK", block)
    monkeypatch.setattr(vocabulary, "CPU_MULTIPLE", multiple)
    hidden, weight, targets = inputs(vocab_size=7 + num_unused)
    targets = targets % 7
    upstream = torch.linspace(-2, 3, 23, dtype=torch.float64)

    def gradients_of(function):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        values = function(h, w)
        return values.detach(), *torch.autograd.grad((values * upstream).sum(), (h, w))

    found = gradients_of(lambda h, w: target_log_probs(h, w, targets, num_unused))
    expected = gradients_of(lambda h, w: materialised(h, w[:7], targets))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    without_slope = target_log_probs(hidden, weight, targets, num_unused)
    assert torch.allclose(without_slope, expected[0], rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own, of parts of PyTorch that it uses
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_compiled_kernels_say_the_same(dtype, monkeypatch):
    monkeypatch.setattr(vocabulary, "CPU_BLOCK", (16, 4))
    monkeypatch.setattr(vocabulary, "CPU_MULTIPLE", 4)  # so that the last block is filled up
    hidden, weight, targets = inputs(dtype=torch.float32)
    results = []
    for is_compiled in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        values = target_log_probs(h, w, targets, dtype=dtype, is_compiled=is_compiled)
        results.append((values.detach(), *torch.autograd.grad(values.sum(), (h, w))))
    for ours, expected in zip(*results, strict=True):
        # A kernel rounds to bfloat16 only where it writes.
        assert torch.allclose(
            ours, expected, rtol=1e-5 if dtype is None else 2e-2, atol=1e-5 if dtype is None else 5e-2
        )


@pytest.mark.parametrize("frozen", [None, "weight", "hidden"])
def test_gradients_can_be_differentiated_again(frozen):
    """Against finite differences, in every argument that has a gradient."""
    hidden, weight, targets = inputs(num_rows=4, width=3, vocab_size=5, scale=1.0)
    hidden.requires_grad_(frozen != "hidden")
    weight.requires_grad_(frozen != "weight")

    def values(hidden, weight):
        return target_log_probs(hidden, weight, targets, num_unused=1)

    targets = targets % 4
    assert torch.autograd.gradcheck(values, (hidden, weight))
    assert torch.autograd.gradgradcheck(values, (hidden, weight))


def test_weights_that_are_also_those_of_an_embedding_have_one_gradient_however_it_is_taken():
    """Hidden states that depend on the weights: with a graph, without one, and by PyTorch's own softmax."""
    _, weight, targets = inputs(num_rows=9, width=4, vocab_size=6)
    found = []
    for function, create_graph in ((materialised, True), (target_log_probs, False), (target_log_probs, True)):
        w = weight.clone().requires_grad_()
        hidden = torch.tanh(w[targets.roll(1)] @ weight[:4])
        found.append(torch.autograd.grad(function(hidden, w, targets).sum(), w, create_graph=create_graph)[0])
    assert torch.allclose(found[0], found[1])
    assert torch.allclose(found[0], found[2])
    norms = [torch.autograd.grad(gradient.square().sum(), w)[0] for gradient in found[2:]]
    assert norms[0].isfinite().all()


@pytest.mark.parametrize("block", [(4, 3), (1000, 1000)])
def test_rows_that_are_no_target_take_no_part(block, monkeypatch):
    monkeypatch.setattr(vocabulary, "CPU_BLOCK", block)
    hidden, weight, targets = inputs()
    results = []
    more = torch.cat([weight, torch.full((2, 5), 9.0, dtype=torch.float64)])
    for function, start in (
        (lambda h, w: target_log_probs(h, w, targets, num_unused=2), more),
        (target_log_probs, weight),
    ):
        w = start.clone().requires_grad_()
        values = function(hidden, w) if start is more else function(hidden, w, targets)
        results.append((values.detach(), torch.autograd.grad(values.sum(), w)[0]))
    assert torch.allclose(results[0][0], results[1][0])
    assert torch.allclose(results[0][1][:7], results[1][1])
    assert (results[0][1][7:] == 0).all()


@pytest.mark.parametrize("frozen", ["weight", "hidden", "both"])
def test_what_is_frozen_has_no_gradient_and_the_other_keeps_its_own(frozen):
    hidden, weight, targets = inputs()
    h = hidden.clone().requires_grad_(frozen == "weight")
    w = weight.clone().requires_grad_(frozen == "hidden")
    values = target_log_probs(h, w, targets)
    assert values.requires_grad == (frozen != "both")
    if frozen == "both":
        return
    values.sum().backward()
    expected_h, expected_w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    materialised(expected_h, expected_w, targets).sum().backward()
    if frozen == "weight":
        assert w.grad is None
        assert torch.allclose(h.grad, expected_h.grad)
    else:
        assert h.grad is None
        assert torch.allclose(w.grad, expected_w.grad)


@pytest.mark.parametrize("block", [(4, 3), (1000, 1000)])
def test_large_logits_neither_overflow_nor_vanish(block, monkeypatch):
    monkeypatch.setattr(vocabulary, "CPU_BLOCK", block)
    hidden, weight, targets = inputs(dtype=torch.float32, scale=1000.0)
    h = hidden.clone().requires_grad_()
    values = target_log_probs(h, weight, targets)
    expected = materialised(hidden.double(), weight.double(), targets)
    assert torch.allclose(values.double(), expected, rtol=1e-5, atol=1e-2)
    values.sum().backward()
    assert h.grad.isfinite().all()


def test_bfloat16_is_summed_in_float32():
    """The exponentials of a thousand symbols: in bfloat16 their sum would be off by percents."""
    hidden, weight, targets = inputs(num_rows=50, vocab_size=1000, width=16, dtype=torch.bfloat16, scale=0.1)
    values = target_log_probs(hidden, weight, targets)
    assert values.dtype == torch.float32
    expected = materialised(hidden.double(), weight.double(), targets)
    assert (values - expected).abs().max() < 0.01


def test_the_probabilities_of_all_tokens_sum_to_one_in_bfloat16_too():
    """The total is over the very logits, rounded as they are, that the targets have."""
    hidden, weight, _ = inputs(num_rows=1, vocab_size=5000, width=16, dtype=torch.bfloat16)
    log_probs = target_log_probs(hidden.expand(5000, -1), weight, torch.arange(5000))
    assert log_probs.double().exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_no_more_than_a_block_of_logits_is_held():
    """Memory that the forward and backward pass take at most, as PyTorch's own profiler counts it."""
    hidden, weight, targets = inputs(num_rows=1200, vocab_size=8000, dtype=torch.float32)
    with torch.profiler.profile(profile_memory=True) as profiler:
        target_log_probs(hidden.requires_grad_(), weight.requires_grad_(), targets).sum().backward()
    largest = max(event.cpu_memory_usage for event in profiler.events() if event.name.startswith("aten::"))
    assert largest <= 4 * vocabulary.CPU_BLOCK[0] * vocabulary.CPU_BLOCK[1]


def test_no_rows_give_no_values():
    hidden, weight, targets = inputs(num_rows=0)
    h = hidden.requires_grad_()
    values = target_log_probs(h, weight.requires_grad_(), targets)
    assert values.shape == (0,)
    values.sum().backward()
    assert weight.grad.abs().max() == 0
