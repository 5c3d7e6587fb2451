"""Hamiltonian Monte Carlo: what its paths have beyond a step of MALA."""

from __future__ import annotations

import math

import pytest
import torch

from ltm_pyro.inference import BatchNoise, infer
from ltm_pyro.inference.posterior import import_arviz
from ltm_pyro.inference.schemes.hmc import HMC


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_a_path_has_at_least_one_leapfrog(value):
    with pytest.raises(ValueError, match="num_leapfrogs"):
        HMC(num_leapfrogs=value)


class FixedSize(HMC):
    """Paths of the same length, with or without the jitter of HMC."""

    def init(self, model, batch, rng, warm=None):
        start = super().init(model, batch, rng, warm)
        # Ten leapfrogs are half a period of an oscillation of scale 0.5, and a whole one of scale 0.25.
        size = torch.full_like(start.log_step_size, math.log(0.5 * math.pi / 10))
        return type(start)(**{**vars(start), "log_step_size": size})

    @property
    def num_warmup(self):
        return 0


class Still(BatchNoise):
    """Noise without jitter."""

    def uniform(self, purpose, *args):
        drawn = super().uniform(purpose, *args)
        return torch.full_like(drawn, 0.5) if purpose == "jitter" else drawn


def effective_draws(noise, scaled):
    """Of the squares of z, for each draw that was made: [scale 0.5, scale 0.25]."""
    model, batch = scaled(0.0, [[0.5, 0.25]])
    scheme, rng = (
        FixedSize(num_steps=60, num_chains=100, num_kept=60, num_leapfrogs=10),
        noise(torch.Generator().manual_seed(0)),
    )
    samples = scheme.posterior(infer(scheme, model, batch, rng), scheme.num_draws, rng).samples
    arviz, _ = import_arviz()
    squares = samples[:, :, 0].square().numpy()
    return [float(arviz.ess(squares[:, :, dim])) / squares[:, :, dim].size for dim in range(2)]


def test_no_dimension_stands_still_because_a_path_is_as_long_as_its_period(scaled):
    """Half a period turns z to -z, a whole one comes back to it: neither forgets how far out z is."""
    assert max(effective_draws(Still, scaled)) < 0.05
    assert min(effective_draws(BatchNoise, scaled)) > 0.2
