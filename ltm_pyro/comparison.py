"""What a comparison of schemes shows: the table and the plots."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.figures import Figure
from ltm_pyro.inference import Posterior
from ltm_pyro.inference.diagnostics import Mixing
from ltm_pyro.report import finite_or_null, number_text, print_rows

HIGHEST_R_HAT = 1.1
"""Above it chains are still so far apart that their effective sample size has no meaning."""
MOST_TRACES = 4
"""Sequences whose traces are drawn."""


@dataclass(frozen=True)
class Comparison:
    """What a scheme gave for B sequences, and at what cost."""

    name: str
    num_gradients: int
    """Gradient evaluations for each sequence, all chains together."""
    gaussian_gradients: int
    """Those of the Gaussian around points or draws, which are not among them; 0 where the scheme has a density."""
    seconds: float
    """Of inference, for all sequences together."""
    bound: Figure
    """The ELBO of q: the scheme's own, or the Gaussian around its point or draws."""
    weights: Figure
    """The importance weights of that q."""
    posterior: Posterior
    """Draws of the scheme itself."""
    q: TorchDistribution | None
    """What they were drawn from, where that has a density."""
    mixing: Mixing | None
    """Of chains."""
    acceptance: float | None
    """In the second half of the steps, where proposals may be refused."""
    objective: str
    """What each step lowers."""
    objectives: Tensor
    """[T, B]: its estimates, in nats per token."""
    curve: list[tuple[int, float]]
    """(gradient evaluations, those of the Gaussian among them; nats per token of the bound) at budgets up to the whole,
    each of a run of its own."""
    kl_per_slot: Tensor
    """[L, S]: KL of the marginals of q from the prior, nats, mean over the sequences."""

    def record(self) -> dict[str, Any]:
        """The line of the table, as in `comparison.json`."""
        bound, mixing = self.bound.record(), self.mixing
        r_hat = None if mixing is None else mixing.largest_r_hat.max().item()
        sizes = mixing.effective_sample_size if mixing is not None and r_hat <= HIGHEST_R_HAT else None
        # The same as the sum over the sequences by the gradients of all of them.
        per_gradient = None if sizes is None else sizes.mean().item() / self.num_gradients
        return {
            "inference": self.name,
            "gradients_per_sequence": self.num_gradients,
            "gradients_of_gaussian": self.gaussian_gradients,
            "inference_seconds": self.seconds,
            **bound,
            "pareto_k": self.weights.record()["pareto_k"],
            "num_draws": self.posterior.samples.shape[:2].numel(),
            "effective_sample_size": None if sizes is None else sizes.median().item(),
            "effective_sample_size_per_gradient": per_gradient,
            "effective_sample_size_per_second": None if sizes is None else sizes.sum().item() / self.seconds,
            "r_hat": r_hat,
            "acceptance": self.acceptance,
            "bound_by_gradients": self.curve,
        }


LEGEND = """\
bound: -ELBO in nats/token ± Monte Carlo error, an upper bound on -log p(x); of map and of chains, that of a Gaussian
around the point or the mean of the draws. KL: its rate, in nats/token. gradients: evaluations for each sequence, those
of all its chains, + those for that Gaussian. k̂: tail shape of the importance weights of that q, median over texts;
above 0.7 q is far from the posterior. R̂: the largest of all numbers of z; above 1.01 the chains have not mixed. ESS:
effective sample size of a number of z (above the number of draws where they alternate), median over z and texts, and
per gradient and second of all texts; none where R̂ is above 1.1."""


def print_table(results: list[Comparison]) -> None:
    """The table: with lines on a terminal, as Markdown elsewhere."""
    rows = []
    for result in results:
        record = result.record()
        size = record["effective_sample_size"]
        error = record["monte_carlo_standard_error"]
        rows.append(
            {
                "inference": result.name,
                "T": str(record["fast_steps"]),
                "gradients": f"{result.num_gradients} + {result.gaussian_gradients}".removesuffix(" + 0"),
                "seconds": number_text(result.seconds, 1),
                "bound": number_text(record["nats_per_token"], 4, error),
                "valid": "yes" if record["valid_bound"] else "NOT A BOUND",
                "KL": number_text(record["kl_nats_per_token"], 4),
                "k̂": number_text(record["pareto_k"], 2),
                "ESS": "" if size is None else f"{size:.1f} of {record['num_draws']}",
                "ESS/gradient": number_text(record["effective_sample_size_per_gradient"], 4),
                "ESS/second": number_text(record["effective_sample_size_per_second"], 2),
                "R̂": number_text(record["r_hat"], 3),
                "accepted": number_text(record["acceptance"], 2),
            }
        )
    print_rows(rows, words=("inference", "valid"))
    print(LEGEND)


def write(results: list[Comparison], out: Path) -> None:
    """Write `comparison.json` and the plots into the folder."""
    partial, path = out / "comparison.partial", out / "comparison.json"
    records = [finite_or_null(result.record()) for result in results]
    partial.write_text(json.dumps(records, indent=2, allow_nan=False) + "\n")
    os.replace(partial, path)
    plots = {"bound": bound_plot, "objectives": objectives_plot, "kl": kl_plot}
    if len(results) > 1:
        plots["agreement"] = agreement_plot
    for name, plot in plots.items():
        plot(results).savefig(out / f"{name}.png", dpi=130)


def _canvas(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def bound_plot(results: list[Comparison]) -> Any:
    """The ELBO against gradient evaluations, all schemes in one picture."""
    canvas = _canvas(7, 4.5)
    axes = canvas.add_subplot()
    for result in results:
        gradients, values = zip(*result.curve, strict=True)
        axes.plot(gradients, values, marker="o", markersize=4, label=result.name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("gradient evaluations for each sequence, each point a run of its own")
    axes.set_ylabel("bound, -ELBO [nats/token]")
    # Chains that have just started may have a bound of hundreds of nats, which would hide all else.
    finite = [value for result in results for _, value in result.curve if np.isfinite(value)]
    ends = [result.curve[-1][1] for result in results if np.isfinite(result.curve[-1][1])]
    if ends:
        low, high = min(finite), max(*ends, np.median(finite))
        if low < high:
            axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
    axes.legend()
    axes.grid(alpha=0.3)
    return canvas


def objectives_plot(results: list[Comparison]) -> Any:
    """What each step lowers, for the first sequences: a row for each scheme, since schemes lower different things."""
    canvas = _canvas(7, 1.7 * len(results) + 0.4)
    for axes, result in zip(np.atleast_1d(canvas.subplots(len(results), 1)), results, strict=True):
        values = result.objectives[:, :MOST_TRACES].numpy()
        axes.plot(np.arange(len(values)), values, linewidth=0.8)
        axes.set_title(result.name, fontsize="medium", loc="left")
        axes.set_ylabel(f"{result.objective}\n[nats/token]", fontsize="small")
        finite = values[np.isfinite(values)]
        low, high = np.quantile(finite, [0, 0.98]) if len(finite) else (0, 0)
        if low < high:
            axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
    axes.set_xlabel("step")
    canvas.suptitle("what each step lowers, a line for each of the first texts", fontsize="medium")
    return canvas


def kl_plot(results: list[Comparison]) -> Any:
    """KL per layer and slot as a heat map for each scheme."""
    canvas = _canvas(1.4 + 2.4 * len(results), 2.8)
    highest = max(result.kl_per_slot.max().item() for result in results)
    all_axes = np.atleast_1d(canvas.subplots(1, len(results)))
    for axes, result in zip(all_axes, results, strict=True):
        image = axes.imshow(result.kl_per_slot.numpy(), vmin=0, vmax=highest, cmap="viridis", aspect="auto")
        axes.set_title(result.name, fontsize="medium")
        axes.set_xlabel("slot")
        axes.set_xticks(range(result.kl_per_slot.shape[1]))
        axes.set_yticks(range(result.kl_per_slot.shape[0]))
    all_axes[0].set_ylabel("layer")
    canvas.colorbar(image, ax=list(all_axes), label="KL of a slot [nats]")
    return canvas


def _moments(result: Comparison) -> dict[str, np.ndarray]:
    """Mean and scale of every number of z, flattened: exact where q has a density, else of the draws."""
    if result.q is not None:
        moments = {"mean": result.q.mean, "scale": result.q.stddev}
    else:
        draws = result.posterior.samples.flatten(0, 1)
        moments = {"mean": draws.mean(0)}
        if len(draws.unique(dim=0)) > 1:
            moments["scale"] = draws.std(0)
    return {what: values.flatten().cpu().numpy() for what, values in moments.items()}


def agreement_plot(results: list[Comparison]) -> Any:
    """Mean and scale of every number of z by each scheme, against those by the first."""
    first, *others = results
    canvas = _canvas(2.8 * len(others) + 0.6, 5.6)
    grid = canvas.subplots(2, len(others), squeeze=False)
    moments = {result.name: _moments(result) for result in results}
    for column, other in enumerate(others):
        for axes, what in zip(grid[:, column], ("mean", "scale"), strict=True):
            x, y = (moments[name].get(what) for name in (first.name, other.name))
            if x is None or y is None:
                axes.text(0.5, 0.5, "a point has no scale", ha="center", transform=axes.transAxes)
                axes.set_axis_off()
                continue
            low, high = min(x.min(), y.min()), max(x.max(), y.max())
            axes.plot([low, high], [low, high], color="black", linewidth=0.8)
            axes.scatter(x, y, s=3, alpha=0.4)
            axes.set_xlabel(f"{what} by {first.name}", fontsize="small")
            axes.set_ylabel(f"{what} by {other.name}", fontsize="small")
    return canvas
