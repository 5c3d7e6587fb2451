"""The command that compares schemes: its budget, its files, its table, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import zlib
from collections.abc import Callable
from pathlib import Path

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from ltm_pyro import cli, compare, train
from ltm_pyro.config import preset
from ltm_pyro.errors import InputError
from ltm_pyro.evaluation import comparison
from ltm_pyro.evaluation.comparison import Comparison
from ltm_pyro.evaluation.figures import chosen_sequences
from ltm_pyro.evaluation.inferred import Inferred, inference_of
from ltm_pyro.evaluation.plots import comparison as plots
from ltm_pyro.evaluation.plots import style
from ltm_pyro.inference import SCHEMES, SequenceNoise, bounds, infer, log_joint
from ltm_pyro.inference.diagnostics import Mixing
from ltm_pyro.models import LatentThoughtModel, TokenBatch
from ltm_pyro.runs.trained import TrainedModel, load

SCHEMES_OF_A_RUN = [name for name in SCHEMES if name != "amortized"]
"""All that need no encoder."""
FAST = shlex.split("--device cpu --num-sequences 3 --num-samples 30 --num-chains 2 --gradients 42")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_options: list[str]) -> Path:
    """A folder with a run of `vi`, one with an encoder, and one without z."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"text": f"Ünit {n} of {2 * n}."} for n in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data", str(folder / "text.jsonl"), "--steps", "3", "--validation-sequences", "2"]
    common = [*tiny_options, *data, "--model.num-slots", "3"]
    assert train.main([*common, "--out", str(folder / "vi"), "--fast-steps", "2"]) == 0
    encoder = [*common, "--out", str(folder / "amortized"), "--inference", "amortized", "--model.encoder-layers", "1"]
    assert train.main(encoder) == 0
    none = [*common, "--out", str(folder / "none"), "--inference", "none", "--model.num-slots", "0"]
    assert train.main(none) == 0
    return folder


@pytest.fixture
def command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process, in that folder: (exit status, standard output, standard error)."""
    monkeypatch.chdir(folder)

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.run(compare.main, [*FAST, *args])
        return exit.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def compared(folder: Path) -> Path:
    """The results for every scheme."""
    out = folder / "all"
    assert compare.main([str(folder / "vi"), *FAST, "--inference", *SCHEMES_OF_A_RUN, "--out", str(out)]) == 0
    return out


CONFIG = compare.CompareConfig(gradients=64, num_chains=2, num_samples=30, seed=5)


@pytest.fixture(scope="module")
def trained(folder: Path) -> TrainedModel:
    return load(folder / "vi")


@pytest.fixture(scope="module")
def batch(trained: TrainedModel) -> TokenBatch:
    """Three texts."""
    return trained.batch(["Ünit 1 of 2.", "Ünit 17 of 34.", "Ünit"])


@pytest.fixture(scope="module")
def results(trained: TrainedModel, batch: TokenBatch) -> dict[str, Comparison]:
    """What comes of a density, a point and chains, under CONFIG."""
    return {
        name: compare.compared(
            compare.within_budget(inference_of(trained.config, name), CONFIG),
            trained.model,
            batch,
            torch.arange(3),
            CONFIG,
        )
        for name in ("vi", "map", "mala")
    }


def noise_of(name: str, seed: int) -> SequenceNoise:
    words = np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)
    return SequenceNoise(int(words[0]))


def records_of(out: Path) -> dict[str, dict]:
    return {record["inference"]: record for record in json.loads((out / "comparison.json").read_text())}


@pytest.mark.parametrize("gradients", [20, 300])
@pytest.mark.parametrize("name", SCHEMES_OF_A_RUN)
def test_a_scheme_takes_as_many_steps_as_the_budget_has_and_no_more(name, gradients):
    config = compare.CompareConfig(gradients=gradients, num_chains=3)
    inference = compare.within_budget(inference_of(preset("tiny"), name), config)
    scheme = inference.scheme
    assert scheme.num_gradients <= gradients
    assert scheme.num_steps >= 1
    assert dataclasses.replace(scheme, num_steps=scheme.num_steps + 1).num_gradients > gradients
    if scheme.num_draws not in (1, None):
        # The second half of every chain.
        assert scheme.num_draws == 3 * (scheme.num_steps - scheme.num_steps // 2)


def test_a_budget_below_one_step_is_refused_by_the_name_of_the_scheme():
    with pytest.raises(InputError, match="--gradients 5 is too few for hmc, whose first step takes 24"):
        compare.within_budget(inference_of(preset("tiny"), "hmc"), compare.CompareConfig(gradients=5))


def test_the_table_says_what_each_scheme_cost_and_gave(compared):
    records = records_of(compared)
    assert list(records) == SCHEMES_OF_A_RUN
    for name, record in records.items():
        assert record["valid_bound"] is True
        assert 21 < record["gradients_per_sequence"] <= 42
        assert record["monte_carlo_standard_error"] > 0
        assert record["inference_seconds"] > 0
        steps = [gradients for gradients, *_ in record["bound_by_gradients"]]
        assert steps == sorted(steps)
        # Those of the Gaussian around a point or draws come on top, and are in the curve.
        assert record["gradients_of_gaussian"] == (0 if SCHEMES[name].has_density else 16)
        assert steps[-1] == record["gradients_per_sequence"] + record["gradients_of_gaussian"]
        assert record["bound_by_gradients"][-1][1] == record["nats_per_token"]
        # hmc has kept two draws a chain, too few to say.
        is_chain = name in ("langevin", "mala", "underdamped")
        assert (record["r_hat"] is not None) == is_chain
        assert (record["acceptance"] is not None) == (name in ("mala", "hmc"))
        has_mixed = is_chain and record["r_hat"] <= 1.1
        # The mean of chains that have not mixed is off, and so is the KL of a Gaussian around it.
        has_kl = has_mixed if name in ("langevin", "mala", "underdamped", "hmc") else True
        assert (record["kl_nats_per_token"] is not None) == has_kl
        if has_kl:
            terms = record["nll_nats_per_token"] + record["kl_nats_per_token"]
            assert record["nelbo_nats_per_token"] == pytest.approx(terms)
        for key in ("", "_per_gradient", "_per_second"):
            assert (record[f"effective_sample_size{key}"] is not None) == has_mixed


def test_the_bound_is_that_of_evaluate(compared, trained):
    """Computed anew with the functions that have tests of their own."""
    record = records_of(compared)["vi"]
    data = arviz.from_netcdf(str(compared / "vi" / "posterior.nc"))
    batch = trained.batch([str(text) for text in data.posterior["text"].values])
    batch = dataclasses.replace(batch, sequence_ids=torch.tensor(data.posterior["sequence"].values))
    scheme, rng = inference_of(trained.config, "vi", 42).scheme, noise_of("vi", 0)
    state = infer(scheme, trained.model, batch, rng)
    expected = bounds.elbo(trained.model, batch, scheme.distribution(state, rng), 30)
    assert record["nelbo_nats_per_token"] == pytest.approx(
        (expected.nelbo.sum() / batch.weights.sum()).item(), rel=1e-5
    )
    assert record["num_tokens"] == batch.weights.sum()


def test_a_point_of_the_curve_is_a_run_of_that_many_gradients(results, trained, batch):
    """Not a state on the way of a longer run, which has other step sizes and another warm-up."""
    # mala takes a gradient where each of its two chains starts, two a step, and 16 for its Gaussian.
    assert [gradients for gradients, *_ in results["vi"].curve] == [1, 2, 4, 8, 16, 32, 64]
    assert [gradients for gradients, *_ in results["mala"].curve] == [16 + n for n in (4, 8, 16, 32, 64)]
    for name, gradients, num_steps in (("vi", 8, 8), ("mala", 32, 7)):
        inference, rng = inference_of(trained.config, name, num_steps), noise_of(name, 5)
        scheme, model = inference.scheme, trained.model
        if name == "mala":
            scheme = dataclasses.replace(scheme, num_chains=2, num_kept=4)
        state = infer(scheme, model, batch, rng)
        if name == "mala":
            scheme, state = bounds.gaussian_around(scheme, state, model, batch, rng, inference.gaussian)
        expected = bounds.elbo(model, batch, scheme.distribution(state, rng), 16).nelbo.sum() / batch.weights.sum()
        assert {at: value for at, value, _ in results[name].curve}[gradients] == pytest.approx(
            expected.item(), rel=1e-5
        )


def test_a_scheme_has_noise_of_its_own_whatever_it_is_compared_with(compared, command):
    draws = {}
    for name in ("vi", "adamvi", "lowrank"):
        z = arviz.from_netcdf(str(compared / name / "posterior.nc")).posterior["z"].values
        draws[name] = (z - z.mean((0, 1))) / z.std((0, 1))
    for one, other in (("vi", "adamvi"), ("vi", "lowrank"), ("adamvi", "lowrank")):
        correlation = (draws[one] * draws[other]).mean()
        assert abs(correlation) < 5 / draws[one].size ** 0.5
    assert command("vi", "--inference", "map", "adamvi", "--out", "others")[0] == 0
    for file in (compared, Path("others")):
        z = arviz.from_netcdf(str(file / "adamvi" / "posterior.nc")).posterior["z"].values
        assert np.array_equal((z - z.mean((0, 1))) / z.std((0, 1)), draws["adamvi"])


def test_the_agreement_is_in_exact_moments_where_there_are_such(results):
    """Not in those of the draws, which are off by their number."""
    canvas = plots.agreement_plot([results["vi"], with_mixing(results["mala"], 1.0), results["map"]])
    mean, _, scale, no_scale = canvas.axes
    q, draws = results["vi"].q, results["mala"].posterior.samples.flatten(0, 1)
    for axes, of_q, of_draws in ((mean, q.mean, draws.mean(0)), (scale, q.stddev, draws.std(0))):
        points = axes.collections[0].get_offsets()
        assert np.allclose(points, torch.stack([of_q.flatten(), of_draws.flatten()], dim=1))
    assert not no_scale.collections


def with_mixing(result: Comparison, r_hat: float, sizes: tuple[float, ...] = (8.0, 2.0, 5.0)) -> Comparison:
    """The same, as if its chains had mixed so well."""
    sizes, r_hats = torch.tensor(sizes).double(), torch.tensor([1.0, r_hat, 1.0]).double()
    return dataclasses.replace(result, mixing=Mixing(sizes, r_hats))


def test_the_acceptance_is_that_after_the_warm_up(results, trained, batch):
    scheme = dataclasses.replace(inference_of(trained.config, "mala", 31).scheme, num_chains=2)
    seen = []
    infer(
        scheme, trained.model, batch, noise_of("mala", 5), watch=lambda _, info: info and seen.append(info.acceptance)
    )
    accepted = [acceptance.mean().item() for acceptance in seen]
    assert results["mala"].acceptance == pytest.approx(np.mean(accepted[scheme.num_warmup :]), rel=1e-6)
    assert abs(np.mean(accepted) - np.mean(accepted[scheme.num_warmup :])) > 1e-3  # so that it would be noticed


def test_effective_sample_sizes_are_per_gradient_and_second_of_all_texts(results):
    """In the 4 seconds and the 62 gradients of each of 3 texts all of their draws were made."""
    result = dataclasses.replace(with_mixing(results["mala"], 1.05), seconds=4.0, num_gradients=62)
    record = result.record()
    assert record["effective_sample_size"] == 5
    assert record["effective_sample_size_per_second"] == pytest.approx((8 + 2 + 5) / 4)
    assert record["effective_sample_size_per_gradient"] == pytest.approx((8 + 2 + 5) / (3 * 62))


def test_chains_that_have_not_mixed_have_no_kl(results):
    well, badly = with_mixing(results["mala"], 1.09), with_mixing(results["mala"], 1.11)
    unknown = dataclasses.replace(results["mala"], mixing=None)
    assert well.record()["kl_nats_per_token"] == results["mala"].bound.record()["kl_nats_per_token"]
    assert badly.record()["kl_nats_per_token"] is None
    assert unknown.record()["kl_nats_per_token"] is None
    high = dataclasses.replace(badly.kl_per_slot, nats=1000 + badly.kl_per_slot.nats)
    huge = dataclasses.replace(badly, kl_per_slot=high)
    canvas = plots.kl_plot([results["vi"], huge, unknown])
    with_map = [axes for axes in canvas.axes if axes.images]
    assert [axes.get_title() for axes in with_map] == ["vi"]
    assert with_map[0].images[0].norm.vmax == pytest.approx(results["vi"].kl_per_slot.nats.max().item())
    title = canvas.get_suptitle()
    assert "omitted: mala (R̂ = 1.11: not mixed)" in title
    assert "omitted: mala (no R̂: too few draws)" in title
    assert not plots.kl_plot([huge]).axes


@pytest.fixture(scope="module")
def diverged(trained, batch) -> Comparison:
    """Langevin with steps that are too long for the prior alone: its variance is 1, and s may be at most 2."""
    inference = compare.within_budget(inference_of(trained.config, "langevin"), CONFIG)
    inference = dataclasses.replace(inference, scheme=dataclasses.replace(inference.scheme, step_size=50.0))
    with cli.numerics_of_commands():
        return compare.compared(inference, trained.model, batch, torch.arange(3), CONFIG)


def cells_of(out: str) -> dict[str, dict[str, str]]:
    """The rows of a Markdown table by their first cell."""
    head, _, *rows = [line.strip("| ").split("|") for line in out.splitlines() if line.startswith("|")]
    names = [cell.strip() for cell in head]
    return {row[0].strip(): dict(zip(names, map(str.strip, row), strict=False)) for row in rows}


def test_chains_that_have_diverged_are_named_and_have_no_figures(diverged, results, capsys, tmp_path):
    assert diverged.num_diverged == 3
    comparison.print_table([results["vi"], diverged])
    out = capsys.readouterr().out
    row = cells_of(out)["langevin (DIVERGED)"]
    assert {name for name, cell in row.items() if cell} == {"inference", "T", "gradients", "seconds"}
    assert "langevin has diverged on 3 of 3 pieces" in out
    assert cells_of(out)["vi"]["bound"]
    record = diverged.record()
    assert record["num_diverged"] == 3
    assert all(record[name] is None for name in ("nats_per_token", "bits_per_byte", "kl_nats_per_token", "r_hat"))
    for others in ([], [results["vi"]]):  # a plot of nothing is no error
        compare.write([*others, diverged], tmp_path, "png")
    canvas = plots.bound_plot([results["vi"], diverged])
    assert len(canvas.axes) == 1
    assert [text.get_text() for text in canvas.legends[0].get_texts()] == ["vi"]


def test_chains_that_have_not_mixed_are_drawn_apart(results):
    """The bounds with the errors of the table, in one panel for what is well and in another for what is not."""
    badly = dataclasses.replace(with_mixing(results["mala"], 1.83), name="badly")
    well = with_mixing(results["mala"], 1.05)
    of_well, of_badly = plots.bound_plot([results["vi"], badly, well]).axes
    assert (len(of_well.containers), len(of_badly.containers)) == (2, 1)
    for axes, number, result in ((of_well, 0, results["vi"]), (of_well, 1, well), (of_badly, 0, badly)):
        curve, _, (bars,) = axes.containers[number]
        record = result.record()
        assert curve.get_ydata()[-1] == record["nats_per_token"]
        low, high = bars.get_segments()[-1][:, 1]
        assert (high - low) / 2 == pytest.approx(record["monte_carlo_standard_error"])
    assert "not mixed" in of_badly.get_title()
    for axes in (of_well, of_badly):
        above = sum((curve.get_ydata() > axes.get_ylim()[1]).sum() for curve, *_ in axes.containers)
        noted = [int(text.get_text().split()[0]) for text in axes.texts if text.get_text().endswith("above")]
        assert noted == ([above] if above else [])
    agreement = plots.agreement_plot([results["vi"], badly, well])
    titles = [axes.get_title() for axes in agreement.axes[:2]]
    assert titles == ["mala", "badly:\nnot mixed (R̂ 1.83)"]
    # The limits are those of what is well, and all panels of a row have them.
    assert agreement.axes[0].get_xlim() == agreement.axes[1].get_xlim() == agreement.axes[1].get_ylim()
    wide = dataclasses.replace(badly.posterior, samples=3 * badly.posterior.samples)
    traces = plots.traces_plot([dataclasses.replace(badly, posterior=wide), well])
    assert [axes.get_title(loc="left").partition(",")[0] for axes in traces.axes[::6]] == [
        "mala",
        "badly: not mixed (R̂ 1.83)",
    ]
    first = traces.axes[0]
    for panel in range(3):
        assert traces.axes[panel].get_ylim() == traces.axes[6 + panel].get_ylim()
    assert first.get_ylim() != traces.axes[3].get_ylim()  # of another text


def test_panels_of_the_same_objective_share_their_axes(results):
    vi, of_point = results["vi"], results["map"]
    other = dataclasses.replace(vi, name="other", objectives=vi.objectives[:8] * 2)
    canvas = plots.objectives_plot([vi, other, of_point])
    of_vi, of_other, of_map = canvas.axes
    assert of_vi.get_ylim() == of_other.get_ylim() != of_map.get_ylim()
    assert of_vi.get_xlim() == of_other.get_xlim() == of_map.get_xlim()


def test_a_legend_takes_none_of_the_width_of_a_plot(results):
    """However long its labels are; and nothing lies over anything else."""
    long = [dataclasses.replace(results[name], name=f"{name} with a very long name " * 2) for name in ("vi", "map")]
    for draw in (plots.bound_plot, plots.objectives_plot):
        canvas = draw(long)
        canvas.draw_without_rendering()
        (legend,) = canvas.legends
        box = legend.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= canvas.bbox.x1
        assert box.y1 <= min(axes.get_tightbbox().y0 for axes in canvas.axes)
        assert canvas.get_size_inches()[0] == style.WIDTH


@pytest.mark.parametrize("file_format", style.FORMATS)
def test_plots_have_the_format_that_is_asked_for(results, tmp_path, file_format):
    compare.write([results["vi"]], tmp_path, file_format)
    begins = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    for name in ("bound", "objectives", "kl"):
        contents = (tmp_path / f"{name}.{file_format}").read_bytes()
        assert contents.startswith(begins[file_format])
        # Letters stay letters, which can be searched and set in the font of a paper.
        assert file_format != "svg" or b"How" in contents or b"The objective" in contents
        assert file_format != "pdf" or b"/Type3" not in contents


def test_chains_that_have_not_mixed_are_named_and_those_that_have_are_not(results, capsys):
    well, badly = with_mixing(results["mala"], 1.09), with_mixing(results["mala"], 1.83)
    unknown = dataclasses.replace(results["mala"], mixing=None)
    for result, mark, sentence in (
        (well, "mala", None),
        (badly, "mala (NOT MIXED)", "mala has not mixed (R̂ is 1.83)"),
        (unknown, "mala (NOT MIXED)", "mala has not mixed (it keeps too few draws for R̂)"),
    ):
        assert result.num_diverged == 0
        comparison.print_table([results["vi"], result])
        out = capsys.readouterr().out
        assert list(cells_of(out)) == ["vi", mark]
        assert cells_of(out)[mark]["bound"]
        assert (sentence or "mala has not") in out or sentence is None
        assert ("has not mixed (" in out) == (sentence is not None)
        assert "mala: 2 chains of each text, with the last 16 draws of each kept." in out


def test_the_heat_map_has_the_kl_of_each_layer_in_its_row(results):
    """By the formula for Gaussians, from q alone."""
    result = results["vi"]
    mean, scale = result.q.mean.double(), result.q.stddev.double()
    kl = (0.5 * (mean**2 + scale**2 - 1) - scale.log()).sum(-1).mean(0)
    assert kl.shape == (2, 3)
    assert not torch.allclose(kl, kl.flip(0), rtol=1e-3)
    axes = plots.kl_plot([result]).axes[0]
    image = axes.images[0]
    assert np.allclose(image.get_array(), kl, rtol=1e-4, atol=1e-6)
    # Row 0 is drawn where the axis says 0.
    assert axes.get_ylabel() == "layer"
    left, right, bottom, top = image.get_extent()
    assert (left, right) == (-0.5, 2.5)
    for (layer, slot), text in zip(np.ndindex(2, 3), axes.texts, strict=True):
        assert text.get_position() == (slot, layer)
        assert float(text.get_text()) == pytest.approx(kl[layer, slot].item(), rel=5e-3)
    assert (bottom, top) == ((1.5, -0.5) if image.origin == "upper" else (-0.5, 1.5))


class OfAnotherPrior(torch.nn.Module):
    """A program with the model's likelihood, and another prior for z."""

    def __init__(self, model: LatentThoughtModel, prior: dist.TorchDistribution) -> None:
        super().__init__()
        self.model, self.config, self.prior = model, model.config, prior

    def forward(self, batch: TokenBatch) -> torch.Tensor:
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", self.prior)
        return pyro.condition(self.model, data={"z": z})(batch)


def inferred_under(prior: dist.TorchDistribution, trained: TrainedModel, batch: TokenBatch) -> Inferred:
    """A Gaussian of mean 0.5 and scale 0.2 in each dimension, held against another prior."""
    inference, rng = inference_of(trained.config, "vi", 0), SequenceNoise(0)
    state = infer(inference.scheme, trained.model, batch, rng)
    state = dataclasses.replace(state, mean=torch.full_like(state.mean, 0.5))
    inferred = Inferred(OfAnotherPrior(trained.model, prior), batch, inference, rng, state)
    base = dist.Normal(torch.full_like(state.mean, 0.5), 0.2).to_event(3)
    inferred.q = lambda purpose: base
    return inferred


def test_the_kl_of_a_slot_is_from_the_programs_own_prior(trained, batch):
    shape = trained.model.config.latent_shape
    prior = dist.Normal(torch.full(shape, 2.0), 3.0).to_event(3)
    kl = comparison.kl_per_slot(inferred_under(prior, trained, batch), 8)
    # KL(N(0.5, 0.2²) ‖ N(2, 3²)) in each of a slot's dimensions.
    expected = math.log(3 / 0.2) + (0.2**2 + 1.5**2) / (2 * 9) - 0.5
    assert torch.allclose(kl.nats, torch.full(shape[:2], shape[2] * expected), rtol=1e-5)
    assert not kl.is_estimate


def test_the_kl_of_a_slot_without_a_closed_form_is_an_estimate_from_draws(trained, batch):
    """Against Student's t, whose expected log density under the Gaussian is summed here on a grid."""
    shape = trained.model.config.latent_shape
    prior = dist.StudentT(torch.full(shape, 3.0)).to_event(3)
    kl = comparison.kl_per_slot(inferred_under(prior, trained, batch), 400)
    z = torch.linspace(-1, 2, 3001, dtype=torch.float64)
    log_q = dist.Normal(0.5, 0.2).log_prob(z)
    integrand = log_q.exp() * (log_q - dist.StudentT(torch.tensor(3.0, dtype=torch.float64)).log_prob(z))
    expected = integrand.sum().item() * 0.001
    # One draw of the difference varies by less than 1: five standard errors of 400 draws, 3 texts and D dimensions.
    num_draws = 400 * 3 * shape[2]
    assert torch.allclose(kl.nats / shape[2], torch.full(shape[:2], expected), atol=5 / num_draws**0.5)
    assert kl.is_estimate
    assert abs(expected) > 10 * 5 / num_draws**0.5  # so that it would be told from none


def test_a_slot_has_no_kl_where_the_prior_does_not_tell_slots_apart(trained, batch, results):
    shape = trained.model.config.latent_shape
    parts = dist.Normal(torch.stack([torch.ones(shape), -torch.ones(shape)]), 1.0).to_event(3)
    prior = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts)
    assert comparison.kl_per_slot(inferred_under(prior, trained, batch), 8) is None
    without = dataclasses.replace(results["vi"], kl_per_slot=None)
    canvas = plots.kl_plot([without, results["map"]])
    assert [axes.get_title() for axes in canvas.axes if axes.images] == ["map"]
    assert "omitted: vi (the slots of the prior are not independent)" in canvas.get_suptitle()


def test_the_traces_are_those_of_each_chain(results, trained, batch):
    result = results["mala"]
    canvas = plots.traces_plot([results["vi"], result])
    samples = result.posterior.samples
    assert len(canvas.axes) == 2 * 3  # two texts of the one scheme that has chains
    for text in range(2):
        joint, first, last = canvas.axes[3 * text : 3 * text + 3]
        for chain in range(2):
            at = log_joint(trained.model, batch, samples[chain, 4])
            expected = (at.log_likelihood + at.log_prior)[text].item()
            assert joint.lines[chain].get_ydata()[4] == pytest.approx(expected, rel=1e-5)
            assert np.array_equal(first.lines[chain].get_ydata(), samples[chain, :, text, 0, 0, 0])
            assert np.array_equal(last.lines[chain].get_ydata(), samples[chain, :, text, 1, 2, 15])
        assert len(joint.lines) == len(first.lines) == len(last.lines) == 2


def test_the_draws_can_be_read_by_arviz_with_their_texts_and_densities(compared, trained):
    for name in SCHEMES_OF_A_RUN:
        data = arviz.from_netcdf(str(compared / name / "posterior.nc"))
        z = data.posterior["z"]
        assert z.dims == ("chain", "draw", "sequence", "layer", "slot", "dim")
        assert z.shape[2:] == (2, 2, 3, 16)
        assert z.shape[0] * z.shape[1] == records_of(compared)[name]["num_draws"]
        texts = [str(text) for text in data.posterior["text"].values]
        assert all(text.startswith("Ünit ") for text in texts)
        # What the model says of a draw, computed from the file alone.
        batch = trained.batch(texts)
        joint = log_joint(trained.model, batch, torch.tensor(z.values[-1, -1]))
        likelihood = data.log_likelihood["log_p"].values[-1, -1]
        assert np.allclose(likelihood, joint.log_likelihood.detach(), rtol=1e-5)
        lp = data.sample_stats["lp"].values[-1, -1]
        assert np.allclose(lp, (joint.log_likelihood + joint.log_prior).detach(), rtol=1e-5)
        tokens = data.observed_data["tokens"].values
        assert [text.strip() for text in trained.decode(torch.tensor(tokens))] == texts
        if name != "map":  # a single point has no spread
            assert len(arviz.summary(data, kind="stats")) == 2 * 2 * 3 * 16


def test_the_plots_are_there(compared):
    for name in ("bound", "objectives", "kl", "agreement", "traces"):
        assert (compared / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_reader_that_goes_away_does_not_cost_the_results(command, monkeypatch):
    def gone(results):
        raise BrokenPipeError

    monkeypatch.setattr(comparison, "print_table", gone)
    assert command("vi", "--inference", "map", "--gradients", "20", "--out", "unread")[0] == 1
    assert records_of(Path("unread"))["map"]
    assert Path("unread/bound.png").exists()


def test_it_says_so_where_z_of_whole_texts_is_not_what_a_run_was_trained_for(command, folder, train_run, tmp_path):
    train_run(tmp_path, "map", "--infer-from", "past", "--block-size", "8", "--steps", "1")
    status, out, _ = command(str(tmp_path / "map"), "--inference", "map", "--gradients", "20", "--out", "there")
    assert status == 0
    assert "was trained to infer z block by block" in out
    status, out, _ = command("vi", "--inference", "map", "--gradients", "20", "--out", "whole")
    assert status == 0
    assert "block by block" not in out


def test_what_is_printed_is_a_table_and_where_the_results_are(command):
    status, out, err = command("vi", "--inference", "map", "--out", "one")
    assert (status, err) == (0, "")
    (line,) = [line for line in out.splitlines() if line.startswith("| map")]
    record = records_of(Path("one"))["map"]
    assert " 42 + 16 |" in line
    assert f"{record['nats_per_token']:.4f} ± {record['monte_carlo_standard_error']:.4f}" in line
    assert out.splitlines()[-1].endswith(": one")
    assert not Path("one/agreement.png").exists()  # with nothing
    assert not Path("one/traces.png").exists()  # no chains


def test_an_encoder_is_refined_within_the_budget(command):
    assert command("amortized", "--inference", "amortized", "vi", "--out", "refined")[0] == 0
    records = records_of(Path("refined"))
    assert [record["gradients_per_sequence"] for record in records.values()] == [42, 42]
    assert records["amortized"]["valid_bound"] is True


def test_without_out_the_folder_is_numbered(command):
    for number in ("", "-2"):
        assert command("vi", "--inference", "map", "--gradients", "2")[0] == 0
        assert Path(f"vi/comparison{number}/map/posterior.nc").exists()


def test_the_sequences_are_those_of_evaluate(command, folder):
    assert command("vi", "--inference", "map", "--gradients", "1", "--out", "chosen")[0] == 0
    data = arviz.from_netcdf("chosen/map/posterior.nc")
    num_sequences = 3  # the held-out part of 60 short documents
    # Validation has one of them, at most half.
    assert data.posterior["sequence"].values.tolist() == chosen_sequences(num_sequences, 2).tolist()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "give the folder of a RUN"),
        (["nowhere"], "there is no run nowhere"),
        (["none"], "without z"),
        (["vi", "--inference"], "--inference"),
        (["vi", "--inference", "none"], "none"),
        (["vi", "--inference", "vi", "amortized"], "has no encoder"),
        (["vi", "--gradients", "0"], "--gradients must be at least 1, not 0"),
        (["vi", "--num-samples", "1"], "--num-samples must be at least 2, not 1"),
        (["vi", "--num-chains", "1"], "--num-chains must be at least 2, not 1: R̂ needs two chains"),
        (["vi", "--num-sequences", "0"], "--num-sequences must be at least 1, not 0"),
        (["vi", "--seed", "-1"], "--seed"),
        (["vi", "--data", "missing.txt"], "missing.txt"),
        (["vi", "--out", "vi"], "--out vi holds a run already: give another folder"),
        (["vi", "--out", "text.jsonl"], "--out text.jsonl cannot be used"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(args, says, command):
    status, out, err = command(*args)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_what_is_finished_is_kept_when_a_later_scheme_is_interrupted(command, monkeypatch):
    original = compare.compared

    def interrupted(inference, *args):
        if inference.name == "map":
            raise KeyboardInterrupt
        return original(inference, *args)

    monkeypatch.setattr(compare, "compared", interrupted)
    status, out, _ = command("vi", "--inference", "vi", "map", "--gradients", "4", "--out", "broken")
    assert status == 130
    assert list(records_of(Path("broken"))) == ["vi"]
    assert Path("broken/vi/posterior.nc").exists()
    assert "| vi" in out


def test_nothing_is_left_where_the_first_scheme_is_interrupted(command, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "compared", interrupted)
    status, out, _ = command("vi", "--inference", "map", "--out", "nothing")
    assert (status, out) == (130, "")
    assert not Path("nothing").exists()
