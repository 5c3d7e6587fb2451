"""What a comparison of schemes shows: the table and the plots."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from ltm_pyro.evaluation.figures import Figure
from ltm_pyro.evaluation.inferred import Inferred
from ltm_pyro.evaluation.report import number_text, print_rows, tail_text
from ltm_pyro.files import durable, strict_json
from ltm_pyro.inference import Posterior
from ltm_pyro.inference.base import frozen, latent_prior
from ltm_pyro.inference.diagnostics import HIGHEST_R_HAT, Mixing
from ltm_pyro.inference.export import DrawTerms
from ltm_pyro.inference.posterior import import_matplotlib

MOST_OBJECTIVES = 4
"""The largest number of sequences whose objectives are plotted."""
MOST_TRACES = 2
"""The largest number of sequences whose chains are plotted."""


@dataclass(frozen=True)
class SlotKL:
    """How much each slot of z says: KL of the marginals of q from the prior, summed over a slot's dimensions."""

    nats: Tensor
    """[L, S]: mean over the sequences."""
    is_estimate: bool
    """Whether it was estimated from draws of q, since it has no closed form."""


@torch.no_grad()
def kl_per_slot(inferred: Inferred, num_samples: int) -> SlotKL | None:
    """The KL of each slot; None where the dimensions of the prior are not independent, so that no slot has one alone.

    The marginal of each number of z under q is a Gaussian.

    Args:
        num_samples: draws of z where the KL has no closed form.
    """
    q = inferred.q("kl per slot")
    marginals: TorchDistribution = dist.Normal(q.mean, q.stddev)
    with frozen(inferred.model):
        prior = latent_prior(inferred.model, inferred.batch)
    while isinstance(prior, Independent):
        prior = prior.base_dist
    if prior.event_shape:
        return None
    try:
        kl, is_estimate = kl_divergence(marginals, prior), False
    except NotImplementedError:
        z = q.sample(torch.Size([num_samples]))
        kl, is_estimate = (marginals.log_prob(z) - prior.log_prob(z)).mean(0), True
    return SlotKL(kl.sum(-1).mean(0).cpu(), is_estimate)


@dataclass(frozen=True)
class Comparison:
    """What a scheme gave for B sequences, and at what cost."""

    name: str
    """The name of the scheme."""
    num_gradients: int
    """Gradient evaluations for each sequence, all chains together."""
    gaussian_gradients: int
    """Additional ones, for the Gaussian around points or draws; 0 if the scheme has a density."""
    seconds: float
    """Time of inference, for all sequences together."""
    bound: Figure
    """The ELBO of q: the scheme's own, or the Gaussian around its point or draws."""
    weights: Figure
    """The importance weights of that q."""
    posterior: Posterior
    """Draws of the scheme itself."""
    q: TorchDistribution | None
    """What they were drawn from, where that has a density."""
    terms: DrawTerms
    """What the model says of those draws."""
    has_chains: bool
    """Whether they come from Markov chains."""
    mixing: Mixing | None
    """How well chains have mixed; None for other schemes, and where too few draws are kept to say."""
    acceptance: float | None
    """Share of the proposals that were accepted in the second half of the steps; None where none can be refused."""
    objective: str
    """What each step estimates. Optimisers lower it; chains sample, and lower it only at first."""
    objectives: Tensor
    """[T, B]: the estimates, in nats per token; for chains, the mean over them."""
    curve: list[tuple[int, float]]
    """The bound at budgets up to the whole, each from a separate run: gradient evaluations, including those of the
    Gaussian, and nats per token."""
    kl_per_slot: SlotKL | None
    """How much each slot says; None where the prior does not tell slots apart."""

    @property
    def num_diverged(self) -> int:
        """Texts on which a chain has diverged: it is where no posterior can be, and what comes of it is no figure."""
        return self.bound.num_diverged

    @property
    def r_hat(self) -> float | None:
        """The largest R̂ over all numbers of z and all sequences."""
        return None if self.mixing is None else self.mixing.largest_r_hat.max().item()

    @property
    def has_kl(self) -> bool:
        """Whether the KL means something: around the mean of chains that have not mixed it is Monte Carlo error."""
        return not self.has_chains or (not self.num_diverged and self.r_hat is not None and self.r_hat <= HIGHEST_R_HAT)

    @property
    def mark(self) -> str:
        """What the name of the scheme is marked with in the table: nothing where all is well."""
        if self.num_diverged:
            return " (DIVERGED)"
        return "" if self.has_kl else " (NOT MIXED)"

    @property
    def remark(self) -> str | None:
        """What is to be said of its chains, and what can be done; None where all is well."""
        num_texts = len(self.posterior.sequence_ids)
        if self.num_diverged:
            return (
                f"{self.name} has diverged on {self.num_diverged} of {num_texts} texts: its steps are too long for the "
                "curvature there, and its figures are left out. Set a smaller step size in training's "
                f"--{self.name}.step-size, give it --{self.name}.vi-steps and --{self.name}.vi-rank, or take a scheme "
                "that refuses such steps: mala or hmc."
            )
        if self.has_kl:
            return None
        why = "it keeps too few draws for R̂" if self.r_hat is None else f"R̂ is {self.r_hat:.2f}"
        return f"{self.name} has not mixed ({why}): its draws are not yet the posterior's. Give it more --gradients."

    def record(self) -> dict[str, Any]:
        """The line of the table, as in `comparison.json`."""
        bound = self.bound.record()
        sizes = self.mixing.effective_sample_size if self.mixing is not None and self.has_kl else None
        # The same as the sum over the sequences by the gradients of all of them.
        per_gradient = None if sizes is None else sizes.mean().item() / self.num_gradients
        return {
            "inference": self.name,
            "gradients_per_sequence": self.num_gradients,
            "gradients_of_gaussian": self.gaussian_gradients,
            "inference_seconds": self.seconds,
            **bound,
            "kl_nats_per_token": bound["kl_nats_per_token"] if self.has_kl else None,
            **{key: self.weights.record()[key] for key in ("pareto_k", "heavy_tailed")},
            "num_diverged": self.num_diverged,
            "num_draws": self.posterior.samples.shape[:2].numel(),
            "effective_sample_size": None if sizes is None else sizes.median().item(),
            "effective_sample_size_per_gradient": per_gradient,
            "effective_sample_size_per_second": None if sizes is None else sizes.sum().item() / self.seconds,
            "r_hat": None if self.num_diverged else self.r_hat,
            "acceptance": self.acceptance,
            "bound_by_gradients": self.curve,
        }


LEGEND = """\
bound: -ELBO in nats/token ± Monte Carlo error, an upper bound on -log p(x). For map and chains it is that of a Gaussian
around the point or around the mean of the draws. KL: KL(q ‖ p), the part of the bound that pays for z, in nats/token.
gradients: evaluations for each sequence, all chains together, + those for that Gaussian. k̂: tail shape of the
importance weights of that q, median over texts, and the share of texts whose k̂ is too high for the weights to be
trusted, since q is far from the posterior. R̂: the largest over all numbers of z; above 1.01 the chains have not mixed.
ESS: effective sample size of a number of z (larger than the number of draws where they alternate), median over z and
texts, and per gradient and second of all texts. KL and ESS are omitted for chains that have not mixed (R̂ unknown or
above 1.1), and all figures of chains that have diverged."""


def print_table(results: list[Comparison]) -> None:
    """The table: with lines on a terminal, as Markdown elsewhere."""
    rows = []
    for result in results:
        record = result.record()
        size = record["effective_sample_size"]
        error = record["monte_carlo_standard_error"]
        rows.append(
            {
                "inference": result.name + result.mark,
                "T": str(record["fast_steps"]),
                "gradients": f"{result.num_gradients} + {result.gaussian_gradients}".removesuffix(" + 0"),
                "seconds": number_text(result.seconds, 1),
                "bound": number_text(record["nats_per_token"], 4, error),
                "valid": "" if result.num_diverged else "yes" if record["valid_bound"] else "NOT A BOUND",
                "KL": number_text(record["kl_nats_per_token"], 4),
                "k̂": tail_text(record),
                "ESS": "" if size is None else f"{size:.1f} of {record['num_draws']}",
                "ESS/gradient": number_text(record["effective_sample_size_per_gradient"], 4),
                "ESS/second": number_text(record["effective_sample_size_per_second"], 2),
                "R̂": number_text(record["r_hat"], 3),
                "accepted": number_text(record["acceptance"], 2),
            }
        )
    print_rows(rows, words=("inference", "valid"))
    print(LEGEND)
    for result in results:
        if result.has_chains:
            num_chains, num_kept = result.posterior.samples.shape[:2]
            print(f"\n{result.name}: {num_chains} chains of each text, with the last {num_kept} draws of each kept.")
    for result in results:
        if result.remark is not None:
            print(f"\n{result.remark}")


def write(results: list[Comparison], out: Path) -> None:
    """Write `comparison.json` and the plots into the folder."""
    records = strict_json.dumps([result.record() for result in results], indent=2)
    durable.write(out / "comparison.json", f"{records}\n".encode())
    plots = {"bound": bound_plot, "objectives": objectives_plot, "kl": kl_plot}
    if len(results) > 1:
        plots["agreement"] = agreement_plot
    if any(result.has_chains for result in results):
        plots["traces"] = traces_plot
    with np.errstate(over="ignore", invalid="ignore"):  # in numbers of chains that have diverged
        for name, plot in plots.items():
            plot(results).savefig(out / f"{name}.png", dpi=130)


def _canvas(width: float, height: float) -> Any:
    return import_matplotlib().figure.Figure(figsize=(width, height), layout="constrained")


def bound_plot(results: list[Comparison]) -> Any:
    """The ELBO against gradient evaluations, all schemes in one picture."""
    canvas = _canvas(7, 4.5)
    axes = canvas.add_subplot()
    for result in (result for result in results if not result.num_diverged):
        gradients, values = zip(*result.curve, strict=True)
        axes.plot(gradients, values, marker="o", markersize=4, label=result.name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("gradient evaluations for each sequence (each point is a separate run)")
    axes.set_ylabel("bound, -ELBO [nats/token]")
    # Chains that have just started may have a bound of hundreds of nats, which would hide all else.
    finite = [value for result in results if not result.num_diverged for _, value in result.curve if np.isfinite(value)]
    ends = [result.curve[-1][1] for result in results if not result.num_diverged and np.isfinite(result.curve[-1][1])]
    if ends:
        low, high = min(finite), max(*ends, np.median(finite))
        if low < high:
            axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
    if axes.lines:  # not all have diverged
        axes.legend()
    axes.grid(alpha=0.3)
    return canvas


def objectives_plot(results: list[Comparison]) -> Any:
    """The objective in each step, for the first sequences: a row for each scheme, since the objectives differ."""
    canvas = _canvas(8, 1.7 * len(results) + 0.5)
    for axes, result in zip(np.atleast_1d(canvas.subplots(len(results), 1)), results, strict=True):
        values = result.objectives[:, :MOST_OBJECTIVES].numpy()
        # Texts differ from each other by far more than a step changes.
        values = values - np.median(values[len(values) // 2 :], axis=0)
        lines = axes.plot(np.arange(len(values)), values, linewidth=0.8)
        axes.set_title(result.name, fontsize="medium", loc="left")
        axes.set_ylabel(f"{result.objective}\n[nats/token]", fontsize="small")
        finite = values[np.isfinite(values)]
        low, high = np.quantile(finite, [0, 0.98]) if len(finite) else (0, 0)
        if low < high:
            axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
    axes.set_xlabel("step")
    texts = [f"text {sequence}" for sequence in results[0].posterior.sequence_ids[:MOST_OBJECTIVES].tolist()]
    canvas.legend(lines, texts, loc="outside right upper", fontsize="small")
    title = (
        "the objective in each step, minus its median over the second half of the steps\n"
        "(optimisers lower it, chains sample)"
    )
    canvas.suptitle(title, fontsize="medium")
    return canvas


def traces_plot(results: list[Comparison]) -> Any:
    """The kept draws of chains, a line for each chain: log joint, and the first and the last number of z.

    A row for each scheme of chains and each of the first sequences.
    """
    of_chains = [result for result in results if result.has_chains]
    num_texts = min(MOST_TRACES, len(results[0].posterior.sequence_ids))
    canvas = _canvas(10, 1.6 * len(of_chains) * num_texts + 0.6)
    grid = canvas.subplots(len(of_chains) * num_texts, 3, squeeze=False)
    rows = iter(grid)
    for result in of_chains:
        samples = result.posterior.samples.cpu()
        # In [layer, slot, dim]: a number that all of the model reads, and one that only its last layer does.
        first, last = [0, 0, 0], [size - 1 for size in samples.shape[3:]]
        log_joint = result.terms.log_joint
        for text, sequence in enumerate(result.posterior.sequence_ids[:num_texts].tolist()):
            joint, z = log_joint[:, :, text], samples[:, :, text]
            panels = {"log p(x, z) [nats]": joint}
            panels |= {f"z{index}": z.flatten(2)[:, :, place] for index, place in ((first, 0), (last, -1))}
            row = next(rows)
            row[0].set_title(f"{result.name}, text {sequence}", fontsize="medium", loc="left")
            for axes, (what, values) in zip(row, panels.items(), strict=True):
                # A chain of few draws shows each of them.
                marker = "." if values.shape[1] <= 32 else None
                lines = axes.plot(values.T.numpy(), linewidth=0.8, marker=marker, markersize=3)
                axes.set_ylabel(what, fontsize="small")
                axes.tick_params(labelsize="small")
                axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in grid[-1]:
        axes.set_xlabel("kept draw", fontsize="small")
    names = [f"chain {chain}" for chain in range(len(lines))]
    canvas.legend(lines, names, loc="outside upper right", ncols=min(len(names), 8), fontsize="small")
    return canvas


def kl_plot(results: list[Comparison]) -> Any:
    """KL per layer and slot as a heat map for each scheme; omitted for chains that have not mixed."""
    canvas = _canvas(1.4 + 2.4 * len(results), 2.8)
    known = {result.name: result.kl_per_slot for result in results if result.has_kl}
    shown = {name: kl for name, kl in known.items() if kl is not None}
    highest = max((kl.nats.max().item() for kl in shown.values()), default=0)
    all_axes = np.atleast_1d(canvas.subplots(1, len(results)))
    image = None
    for axes, result in zip(all_axes, results, strict=True):
        axes.set_title(result.name, fontsize="medium")
        if result.name not in shown:
            if result.has_kl:
                reason = "the slots of the prior\nare not independent"
            else:
                reason = "no R̂: too few draws" if result.r_hat is None else f"R̂ = {result.r_hat:.2f}: not mixed"
                reason = "diverged" if result.num_diverged else reason
            axes.text(0.5, 0.5, f"{reason}\nKL omitted", ha="center", va="center", transform=axes.transAxes)
            axes.set_xticks([])
            axes.set_yticks([])
            continue
        nats = shown[result.name].nats
        image = axes.imshow(nats.numpy(), vmin=0, vmax=highest, cmap="viridis", aspect="auto")
        axes.set_xlabel("slot")
        axes.set_ylabel("layer")
        axes.set_xticks(range(nats.shape[1]))
        axes.set_yticks(range(nats.shape[0]))
    if image is not None:
        is_estimate = any(kl.is_estimate for kl in shown.values())
        label = "KL of a slot [nats]" + (", estimated from draws" if is_estimate else "")
        canvas.colorbar(image, ax=list(all_axes), label=label)
    return canvas


def _moments(result: Comparison) -> dict[str, npt.NDArray[Any]]:
    """Mean and scale of every number of z, flattened: those of q where it has a density, else those of the draws."""
    if result.q is not None:
        moments = {"mean": result.q.mean, "scale": result.q.stddev}
    else:
        draws = result.posterior.samples.flatten(0, 1)
        moments = {"mean": draws.mean(0)}
        if (draws != draws[0]).any():
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
