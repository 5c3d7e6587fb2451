"""Muon: the optimiser of matrices whose steps go in all directions by the same amount.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); step sizes as in Liu et al. 2025 (arXiv 2502.16982,
eq. 4), so that learning rate and weight decay mean what they mean for AdamW. `torch.optim.Muon` is the same method in
bfloat16, which processors without instructions for it compute slowly. Nor can it step on weights that are split between
processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = 3.4445, -4.7750, 2.0315
NUM_ITERATIONS = 5
STEP_SIZE = 0.2
"""The root mean square of a step on a matrix, in learning rates: about that of AdamW's steps."""


class Muon(torch.optim.AdamW):
    """AdamW, but Muon for the matrices of those groups that have `num_maps`.

    Args:
        groups: groups of weights as any optimiser of torch takes them. Where a group has `num_maps`, each of its
            weights is so many matrices of one size, one above the other.
        settings: those of AdamW. `lr`, `weight_decay` and the first of `betas`, the decay of the mean of the gradients,
            are also those of Muon.

    Raises:
        ValueError: if a weight of a group with `num_maps` is not so many matrices.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, **settings)
        for group in self.param_groups:
            num_maps = group.setdefault("num_maps", 0)
            if num_maps and any(weight.dim() != 2 or len(weight) % num_maps for weight in group["params"]):
                raise ValueError(f"Muon steps on matrices alone, here {num_maps} in one weight")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step on all weights that have a gradient."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["num_maps"]]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for weight in group["params"] if group["num_maps"] else []:
                if weight.grad is not None:
                    self._step_on_matrix(weight, weight.grad, group)
        return loss

    def _step_on_matrix(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[weight], group["betas"][0]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # as AdamW counts
            state["momentum_buffer"] = torch.zeros_like(weight)
        state["step"] += 1
        mean = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        direction = _orthogonal(gradient.lerp(mean, momentum), group["num_maps"])  # as Nesterov looks ahead
        largest = max(len(weight) // group["num_maps"], weight.shape[1])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(direction, alpha=-group["lr"] * STEP_SIZE * math.sqrt(largest))


def orthogonalised(matrix: Tensor) -> Tensor:
    """The matrix with singular values near 1 (0.7 to 1.2) in the place of its own, by Newton-Schulz iterations.

    Singular values below about a hundredth of the matrix's norm come less near to 1.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NUM_ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def _orthogonal(stack: Tensor, num_maps: int) -> Tensor:
    """:func:`orthogonalised` of matrices one above the other, which may be split between processes: each computes the
    whole, and keeps its part."""
    if not hasattr(stack, "device_mesh"):
        return torch.cat([orthogonalised(matrix) for matrix in stack.chunk(num_maps)])
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(stack, DTensor)
    mesh, whole = stack.device_mesh, _orthogonal(stack.full_tensor(), num_maps)
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=stack.placements)
