"""What is written for ArviZ: its values, and that ArviZ's functions work on it."""

from __future__ import annotations

import arviz
import matplotlib
import numpy as np
import pytest
import torch

from ltm_pyro.inference import SCHEMES, SequenceNoise, infer
from ltm_pyro.inference.export import evaluate_draws, to_arviz
from ltm_pyro.inference.posterior import import_arviz
from ltm_pyro.inference.weights import ImportanceWeights

TEXTS = ["one", "two"]
_, IS_NEW = import_arviz()


@pytest.fixture
def exported(linear_gaussian, tmp_path):
    """(file as ArviZ reads it, draws, world, batch, q) of a scheme on a linear-Gaussian world."""
    world = linear_gaussian.random(num_observed=5, num_latent=3, noise_scale=0.8)
    batch, rng = world.sample(2), SequenceNoise(0)

    def export(name, num_draws, **settings):
        scheme = SCHEMES[name](**settings)
        state = infer(scheme, world, batch, rng)
        posterior = scheme.posterior(state, num_draws, rng)
        q = scheme.distribution(state, rng) if scheme.has_density else None
        data = to_arviz(posterior, evaluate_draws(posterior, world, batch), TEXTS, {"x": batch.x.numpy()}, q)
        data.to_netcdf(str(tmp_path / "posterior.nc"))
        return arviz.from_netcdf(str(tmp_path / "posterior.nc")), posterior.samples, world, batch, q

    return export


def test_densities_are_those_of_the_closed_forms(exported):
    data, z, world, batch, q = exported("vi", 30, num_steps=20)
    likelihood = -world.neg_log_likelihood(z, batch.x)
    assert np.allclose(data.log_likelihood["log_p"], likelihood)
    assert np.allclose(data.sample_stats["lp"], likelihood - world.neg_log_prior(z))
    normal = torch.distributions.Normal(q.mean, q.stddev)
    assert np.allclose(data.sample_stats["log_q"], normal.log_prob(z).sum(-1))
    assert np.allclose(data.observed_data["x"], batch.x)
    assert [str(text) for text in data.log_likelihood["text"].values] == TEXTS


def test_without_a_density_there_is_no_log_q(exported):
    data, *_ = exported("hmc", 20, num_steps=40, num_chains=2, num_kept=10)
    assert set(data.sample_stats.data_vars) == {"lp"}


@pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")  # of ArviZ's own calls
def test_arviz_summarises_diagnoses_and_plots_the_chains(exported):
    matplotlib.use("Agg")
    data, z, world, batch, _ = exported("hmc", 1600, num_steps=800, num_chains=4, num_kept=400)
    summary = arviz.summary(data, round_to="none")
    assert len(summary) == 2 * 3
    assert np.allclose(summary["mean"], z.mean((0, 1)).flatten())
    mean = world.posterior_mean(batch.x).flatten().numpy()
    assert (np.abs(summary["mean"] - mean) < 5 * summary["mcse_mean"]).all()
    assert (arviz.rhat(data)["z"] < 1.01).all()
    assert (arviz.ess(data)["z"] > 400).all()
    if IS_NEW:
        assert arviz.plot_trace(data, var_names=["z"], coords={"sequence": [1]}).viz["figure"] is not None
        return
    axes = arviz.plot_trace(data, var_names=["z"], coords={"sequence": [1]}, compact=False)
    assert axes.shape == (3, 2)
    drawn = axes[2, 1].get_lines()[0].get_ydata()
    assert np.allclose(drawn, z[0, :, 1, 2])
    axes[0, 0].figure.clear()


def test_arviz_smooths_the_log_weights_of_a_q(exported):
    data, *_ = exported("adamvi", 500, num_steps=2)
    log_weights = (data.sample_stats["lp"] - data.sample_stats["log_q"]).values.reshape(500, 2)
    if IS_NEW:
        from arviz_stats.base import array_stats

        smoothed, shapes = array_stats.psislw(-log_weights, axis=0)
        smoothed = np.moveaxis(smoothed, -1, 0)
    else:
        smoothed, shapes = (values.T for values in arviz.psislw(log_weights.T))
    assert np.allclose(
        np.exp(smoothed - smoothed.max(0)).sum(0), np.exp(log_weights - log_weights.max(0)).sum(0), rtol=0.1
    )
    assert np.allclose(shapes, ImportanceWeights(torch.from_numpy(log_weights)).pareto_k)
