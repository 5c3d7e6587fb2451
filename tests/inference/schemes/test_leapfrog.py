"""The leapfrog path and the rule of acceptance, against the linear map of a harmonic oscillator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ltm_pyro.inference.schemes.leapfrog import transition


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
    end, acceptance = transition(place(z), place, stride, num_leapfrogs, momentum, torch.zeros(5, 4))
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
    start, stride = place(z), torch.tensor(0.8, dtype=torch.float64)
    moved, acceptance = transition(start, place, stride, 2, momentum, torch.zeros(5, 4))
    uniform = torch.rand(5, 4, dtype=torch.float64)
    end, again = transition(start, place, stride, 2, momentum, uniform)
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
        torch.tensor(0.1),
        1,
        zero + 1,
        torch.zeros(1, 1),
    )
    assert acceptance.item() == pytest.approx(expected)
