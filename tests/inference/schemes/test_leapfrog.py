"""The leapfrog path and the rule of acceptance, against the linear map of a harmonic oscillator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ltm_pyro.inference.schemes.leapfrog import transition
from ltm_pyro.inference.schemes.units import Units


@dataclass(frozen=True)
class Oscillator:
    """Where chains stand in log f(z) = -k |z|² / 2, with k = 3."""

    z: Tensor
    label: Tensor
    """[C, B]: something else that is known there."""

    @property
    def log_density(self):
        return -1.5 * self.z.square().sum(-1)

    @property
    def gradient(self):
        return -3 * self.z


def along_axes(scale):
    """Units for 4 sequences with the scale [d] in each."""
    return Units.diagonal(scale.expand(4, -1))


def place(z):
    return Oscillator(z, z.sum(-1))


@pytest.fixture
def numbers():
    """Starts and momenta of 5 chains and 4 sequences in 2 dimensions."""
    return torch.randn(2, 5, 4, 2, dtype=torch.float64)


@pytest.mark.parametrize("num_leapfrogs", [1, 3, 10])
def test_a_path_is_the_power_of_a_matrix_and_its_acceptance_the_change_of_energy(numbers, num_leapfrogs):
    z, momentum = numbers
    stride = torch.tensor([0.3, 0.9], dtype=torch.float64)
    end, acceptance = transition(
        place(z), place, torch.ones(4), along_axes(stride), num_leapfrogs, momentum, torch.zeros(5, 4)
    )
    for dim, h in enumerate(stride.tolist()):
        half_kick = torch.tensor([[1, 0], [-3 * h / 2, 1]], dtype=torch.float64)
        drift = torch.tensor([[1, h], [0, 1]], dtype=torch.float64)
        leapfrog = torch.linalg.matrix_power(half_kick @ drift @ half_kick, num_leapfrogs)
        moved = torch.stack([z[..., dim], momentum[..., dim]], -1) @ leapfrog.T
        assert torch.allclose(end.z[..., dim], moved[..., 0], rtol=1e-10)
        momentum = momentum.clone()
        momentum[..., dim] = moved[..., 1]
    energy = 1.5 * z.square().sum(-1) + 0.5 * numbers[1].square().sum(-1)
    new_energy = 1.5 * end.z.square().sum(-1) + 0.5 * momentum.square().sum(-1)
    assert torch.allclose(acceptance, (energy - new_energy).exp().clamp(max=1), rtol=1e-10)
    assert end.label.equal(end.z.sum(-1))


def test_every_chain_is_accepted_or_refused_by_itself_with_all_that_is_known_of_it(numbers):
    z, momentum = numbers
    start, step_size, units = place(z), torch.full((5, 4), 0.8, dtype=torch.float64), along_axes(torch.ones(2))
    moved, acceptance = transition(start, place, step_size, units, 2, momentum, torch.zeros(5, 4))
    uniform = torch.rand(5, 4, dtype=torch.float64)
    end, again = transition(start, place, step_size, units, 2, momentum, uniform)
    assert again.equal(acceptance)
    accepted = uniform < acceptance
    assert accepted.any()
    assert not accepted.all()
    assert end.z[accepted].equal(moved.z[accepted])
    assert end.z[~accepted].equal(z[~accepted])
    assert end.label.equal(torch.where(accepted, moved.label, start.label))


@dataclass(frozen=True)
class Stated:
    """Where the density is what one says it is."""

    z: Tensor
    log_density: Tensor
    gradient: Tensor


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (-1.0, -1.5, math.exp(-0.5)),
        (-1.5, -1.0, 1.0),
        (-1.0, -math.inf, 0.0),
        (-1.0, math.inf, 0.0),
        (-1.0, math.nan, 0.0),
        (-math.inf, -1.0, 1.0),
        (-math.inf, -math.inf, 0.0),
        (math.nan, -1.0, 0.0),
    ],
)
def test_what_has_no_finite_density_is_refused(before, after, expected):
    zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    density = torch.zeros(1, 1, dtype=torch.float64)
    _, acceptance = transition(
        Stated(zero, density + before, zero),
        lambda z: Stated(z, density + after, zero),
        torch.tensor([0.1]),
        Units.diagonal(torch.ones(1, 1)),
        1,
        zero + 1,
        torch.zeros(1, 1),
    )
    assert acceptance.item() == pytest.approx(expected)


@dataclass(frozen=True)
class Gaussian:
    """Log density -zᵀ P z / 2 of each of 4 sequences, with P [4, 2, 2]."""

    z: Tensor
    precision: Tensor

    @property
    def log_density(self):
        return 0.5 * (self.z * self.gradient).sum(-1)

    @property
    def gradient(self):
        return -(self.precision @ self.z.unsqueeze(-1)).squeeze(-1)


def test_a_path_in_units_is_the_path_of_what_is_measured_in_them(numbers):
    """With z = A u, moves of z in units of A are moves of u, whose density is that of A u."""
    u, momentum = numbers
    roots = 2 * torch.eye(2, dtype=torch.float64) + torch.randn(4, 2, 2, dtype=torch.float64)
    precision = roots @ roots.mT + torch.eye(2, dtype=torch.float64)
    directions = torch.linalg.qr(torch.randn(4, 2, 1, dtype=torch.float64))[0]
    stretch = torch.tensor([[0.2], [0.7], [1.0], [3.0]], dtype=torch.float64)
    units = Units(torch.rand(4, 2, dtype=torch.float64) + 0.5, directions, stretch)
    change = torch.diag_embed(stretch - 1)
    root = torch.diag_embed(units.scale) @ (torch.eye(2) + directions @ change @ directions.mT)

    def of_z(z):
        return Gaussian(z, precision.expand(5, 4, 2, 2))

    def of_u(u):
        return Gaussian(u, (root.mT @ precision @ root).expand(5, 4, 2, 2))

    z = (root @ u.unsqueeze(-1)).squeeze(-1)
    step_size, uniform = torch.tensor([0.1, 0.2, 0.3, 0.4]).double(), torch.zeros(5, 4)
    end, acceptance = transition(of_z(z), of_z, step_size, units, 3, momentum, uniform)
    expected, of_expected = transition(of_u(u), of_u, step_size, along_axes(torch.ones(2)), 3, momentum, uniform)
    assert torch.allclose(end.z, (root @ expected.z.unsqueeze(-1)).squeeze(-1), rtol=1e-9)
    assert torch.allclose(acceptance, of_expected, rtol=1e-9)
    assert not torch.allclose(end.z, z)


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 3)])
def test_units_are_a_matrix_and_its_transpose(event_shape):
    num_dims, rank = math.prod(event_shape), 1
    scale = torch.rand(4, *event_shape, dtype=torch.float64) + 0.5
    directions = torch.linalg.qr(torch.randn(4, num_dims, rank, dtype=torch.float64))[0]
    stretch = torch.rand(4, rank, dtype=torch.float64) + 0.5
    units, values = Units(scale, directions, stretch), torch.randn(5, 4, *event_shape, dtype=torch.float64)
    inner = torch.eye(num_dims) + directions @ torch.diag_embed(stretch - 1) @ directions.mT
    root = scale.view(4, num_dims, 1) * inner
    flat = values.view(5, 4, num_dims, 1)
    assert torch.allclose(units.times(values), (root @ flat).view_as(values), rtol=1e-10)
    assert torch.allclose(units.transpose_times(values), (root.mT @ flat).view_as(values), rtol=1e-10)
