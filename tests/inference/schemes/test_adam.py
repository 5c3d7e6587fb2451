"""Adam on values, against torch.optim.Adam."""

import pytest
import torch

from ltm_pyro.inference.schemes.adam import adam_step


def torch_adam(value, gradients, learning_rate, epsilon):
    """torch.optim.Adam with its default moments, on a sequence of gradients."""
    weight = torch.nn.Parameter(value.clone())
    optimizer = torch.optim.Adam([weight], lr=learning_rate, eps=epsilon)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def ours(value, gradients, learning_rate, epsilon):
    first = second = torch.zeros_like(value)
    for step, gradient in enumerate(gradients):
        steps = torch.full((len(value),), step)
        value, first, second = adam_step(value, gradient, first, second, steps, learning_rate, epsilon)
    return value


@pytest.mark.parametrize("epsilon", [1e-8, 1.0])
@pytest.mark.parametrize("event_shape", [(), (4,), (2, 3)])
def test_steps_are_those_of_torch_adam(event_shape, epsilon):
    value = torch.randn(3, *event_shape, dtype=torch.float64)
    sizes = torch.logspace(-3, 3, 20, dtype=torch.float64).view(-1, *[1] * value.dim())
    gradients = torch.randn(20, 3, *event_shape, dtype=torch.float64) * sizes
    expected = torch_adam(value, gradients, 0.3, epsilon)
    assert torch.allclose(ours(value, gradients, 0.3, epsilon), expected, rtol=1e-12, atol=1e-12)


def test_each_sequence_is_at_a_step_of_its_own():
    value = torch.randn(2, 4, dtype=torch.float64)
    gradients = torch.randn(6, 2, 4, dtype=torch.float64)
    zero = torch.zeros_like(value)
    late, late_first, late_second = value, zero, zero
    for step in range(5):
        steps = torch.tensor([step, step])
        late, late_first, late_second = adam_step(late, gradients[step], late_first, late_second, steps, 0.1, 1e-8)
    # The first sequence takes its first step, the second its sixth.
    mixed = [torch.stack([a[0], b[1]]) for a, b in ((value, late), (zero, late_first), (zero, late_second))]
    result, _, _ = adam_step(mixed[0], gradients[5], *mixed[1:], torch.tensor([0, 5]), 0.1, 1e-8)
    assert torch.allclose(result[0], torch_adam(value[0], gradients[5:, 0], 0.1, 1e-8), rtol=1e-12, atol=1e-12)
    assert torch.allclose(result[1], torch_adam(value[1], gradients[:, 1], 0.1, 1e-8), rtol=1e-12, atol=1e-12)


def test_values_may_lie_on_another_device_than_the_step_counts():
    """The counts are on the CPU, z where the decoder is; `meta` has a device's rules without needing one."""
    value = torch.zeros(2, 4, device="meta")
    for result in adam_step(value, value, value, value, torch.tensor([0, 5]), 0.1, 1e-8):
        assert result.device.type == "meta"
