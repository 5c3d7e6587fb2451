"""Draws and their export to ArviZ."""

import os
import subprocess
import sys
from pathlib import Path

import arviz
import numpy as np
import pytest
import torch

from ltm_pyro.inference import Posterior, SequenceNoise, infer
from ltm_pyro.inference.posterior import _folders_for_files
from ltm_pyro.inference.schemes.langevin import Langevin

IDS = torch.tensor([31, 4, 159])


def posterior_of(*event_shape, num_chains=2, num_draws=50):
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(num_chains, num_draws, len(IDS), *event_shape, generator=generator, dtype=torch.float64)
    return Posterior(samples, IDS)


def test_the_mean_is_over_chains_and_draws():
    posterior = Posterior(torch.arange(24.0).view(2, 3, 1, 4), torch.tensor([0]))
    # Of draw k, the number i is 4 k + i; the mean of k is 2.5.
    assert posterior.mean.tolist() == [[10, 11, 12, 13]]


def test_thoughts_are_exported_by_layer_slot_and_dim():
    posterior = posterior_of(3, 2, 4)
    z = posterior.to_arviz()["posterior"]["z"]
    assert z.dims == ("chain", "draw", "sequence", "layer", "slot", "dim")
    assert np.array_equal(z.values, posterior.samples.numpy())
    assert z.coords["sequence"].values.tolist() == [31, 4, 159]
    chosen = z.sel(chain=1, draw=7, sequence=159, layer=2, slot=1, dim=3).item()
    assert chosen == posterior.samples[1, 7, 2, 2, 1, 3].item()


@pytest.mark.parametrize("event_shape", [(), (4,), (4, 2)])
def test_a_z_of_other_than_three_dimensions_is_exported_too(event_shape):
    posterior = posterior_of(*event_shape)
    z = posterior.to_arviz()["posterior"]["z"]
    assert z.dims == ("chain", "draw", "sequence", *[f"z_dim_{i}" for i in range(len(event_shape))])
    assert np.array_equal(z.values, posterior.samples.numpy())


def test_arviz_summarises_every_number_of_every_sequence():
    posterior = posterior_of(2, 1, 2)
    summary = arviz.summary(posterior.to_arviz(), round_to="none")
    assert len(summary) == 3 * 2 * 1 * 2
    assert np.allclose(np.asarray(summary["mean"], dtype=float), posterior.mean.flatten().numpy(), atol=1e-12)
    assert "z[159, 1, 0, 1]" in summary.index


def test_chains_that_mix_have_an_r_hat_of_one_and_chains_apart_do_not(linear_gaussian):
    world = linear_gaussian.random(num_observed=4, num_latent=2, noise_scale=1.0)
    batch = world.sample(3)
    scheme = Langevin(num_steps=1500, step_size=0.3, num_chains=4, num_kept=1000)
    posterior = scheme.posterior(infer(scheme, world, batch, SequenceNoise(0)), 4000, SequenceNoise(0))
    assert posterior.samples.shape == (4, 1000, 3, 2)
    r_hat = arviz.rhat(posterior.to_arviz())["z"].values
    # The bound of Vehtari et al. 2021 (arXiv 1903.08008).
    assert (r_hat < 1.01).all()
    # Now one prior standard deviation apart.
    moved = posterior.samples + torch.arange(4).view(4, 1, 1, 1)
    assert (arviz.rhat(Posterior(moved, posterior.sequence_ids).to_arviz())["z"].values > 1.1).all()


def test_draws_that_are_one_point_repeated_and_carry_a_gradient_can_be_exported():
    point = torch.arange(6.0).view(3, 2).requires_grad_()
    z = Posterior((2 * point).expand(1, 4, 3, 2), IDS).to_arviz()["posterior"]["z"]
    assert z.values.tolist() == [4 * [[[0, 2], [4, 6], [8, 10]]]]


def test_further_groups_and_the_texts_go_with_the_draws_and_through_a_file(tmp_path):
    samples = torch.randn(2, 5, 3, 1, 2, 4)
    log_likelihood, tokens = np.random.default_rng(0).normal(size=(2, 5, 3)), np.arange(21).reshape(3, 7)
    groups = {"log_likelihood": {"log_p": log_likelihood}, "observed_data": {"tokens": tokens}}
    posterior = Posterior(samples, torch.tensor([4, 7, 5]))
    posterior.to_arviz(groups, texts=["one", "two", "drei ü"]).to_netcdf(str(tmp_path / "posterior.nc"))
    data = arviz.from_netcdf(str(tmp_path / "posterior.nc"))
    assert data.posterior["z"].dims == ("chain", "draw", "sequence", "layer", "slot", "dim")
    assert data.log_likelihood["log_p"].dims == ("chain", "draw", "sequence")
    assert data.observed_data["tokens"].dims[0] == "sequence"
    assert np.array_equal(data.observed_data["tokens"].values, tokens)
    second = data.posterior["z"].sel(sequence=7)
    assert np.array_equal(second.values, samples[:, :, 1].numpy())
    assert str(second["text"].values) == "two"


WITHOUT_A_HOME = """
import torch
from ltm_pyro.evaluation.plots.style import image, new_canvas
from ltm_pyro.inference import Posterior
from ltm_pyro.inference.diagnostics import mixing
posterior = Posterior(torch.randn(2, 20, 1, 3), torch.tensor([0]))
assert mixing(posterior) is not None
assert posterior.to_arviz()["posterior"]["z"].shape == (2, 20, 1, 3)
canvas = new_canvas(2)
canvas.add_subplot().set_title("a title")
image(canvas, "png")
"""


@pytest.mark.parametrize("home", ["/proc/nope", "a file", None])
def test_draws_and_plots_need_no_home(home, tmp_path):
    """As in a container: no folder that can be made or written, or no name of one. Nobody prints anything either."""
    (tmp_path / "a file").touch()
    hidden = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    if home is not None:
        environment["HOME"] = str(tmp_path / home)
    else:
        # Python then asks for the home of the user, which may be one that can be written.
        environment |= {"XDG_CACHE_HOME": "/proc/nope", "XDG_CONFIG_HOME": "/proc/nope"}
    command = [sys.executable, "-c", WITHOUT_A_HOME]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


def test_the_folders_of_libraries_are_only_changed_while_they_are_imported(monkeypatch, tmp_path):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "a file"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    before = dict(os.environ)
    with _folders_for_files():
        folder = Path(os.environ["XDG_CACHE_HOME"])
        assert folder.is_dir()
        assert os.environ["MPLCONFIGDIR"] == str(folder)
    assert dict(os.environ) == before
    monkeypatch.setenv("HOME", str(tmp_path))
    with _folders_for_files():
        assert dict(os.environ) == {**before, "HOME": str(tmp_path)}


def test_each_group_is_listed_once():
    posterior = Posterior(torch.randn(2, 5, 3, 2), torch.arange(3))
    data = posterior.to_arviz({"log_likelihood": {"log_p": np.zeros((2, 5, 3))}}, texts=["one", "two", "three"])
    groups = [str(group).strip("/") for group in (data.groups() if callable(data.groups) else data.groups)]
    assert sorted(filter(None, groups)) == ["log_likelihood", "posterior"]
    assert str(data["posterior"]["text"].values[1]) == "two"
