"""Muon: the optimiser of matrices whose steps go in all directions by the same amount.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); step sizes as in Liu et al. 2025 (arXiv 2502.16982,
eq. 4), so that learning rate and weight decay mean what they mean for AdamW. `torch.optim.Muon` is the same method in
bfloat16, which a processor without instructions for it computes ten times more slowly than float32. Nor can it step on
weights that are split between processes.
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
    """AdamW, but Muon for the matrices of those groups that have `is_muon=True`.

    Args:
        groups: groups of weights as any optimiser of torch takes them.
        momentum: the decay of the mean of a matrix's gradients.
        others: the settings of AdamW; `lr` and `weight_decay` are also those of Muon.

    Raises:
        ValueError: if a weight of a group with `is_muon=True` is no matrix.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float = 0.95, **others: Any) -> None:
        super().__init__(groups, **others)
        for group in self.param_groups:
            group.setdefault("is_muon", False)
            group["momentum"] = momentum
            if group["is_muon"] and any(weight.dim() != 2 for weight in group["params"]):
                raise ValueError("Muon steps on matrices alone")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step on all weights that have a gradient."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["is_muon"]]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for weight in group["params"] if group["is_muon"] else []:
                if weight.grad is not None:
                    self._step_on_matrix(weight, weight.grad, group)
        return loss

    def _step_on_matrix(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[weight], group["momentum"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # as AdamW counts
            state["momentum_buffer"] = torch.zeros_like(weight)
        state["step"] += 1
        mean = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        direction = _orthogonal(gradient.lerp(mean, momentum))  # as Nesterov looks ahead
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(direction, alpha=-group["lr"] * STEP_SIZE * math.sqrt(max(weight.shape)))


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


def _orthogonal(matrix: Tensor) -> Tensor:
    """:func:`orthogonalised` of a matrix that may be split between processes: each computes the whole, and keeps its
    part."""
    if not hasattr(matrix, "device_mesh"):
        return orthogonalised(matrix)
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(matrix, DTensor)
    mesh = matrix.device_mesh
    whole = DTensor.from_local(orthogonalised(matrix.full_tensor()), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=matrix.placements)
