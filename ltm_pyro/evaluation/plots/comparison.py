"""The plots of `compare`: schemes side by side.

Chains that have not mixed stand apart from what can be trusted, those that have diverged are left out where a figure
would be drawn, and panels that are to be compared share their axes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ltm_pyro.evaluation.comparison import Comparison
from ltm_pyro.evaluation.plots import style

MOST_OBJECTIVES = 4
"""The largest number of sequences whose objectives are plotted."""
MOST_TRACES = 2
"""The largest number of sequences whose chains are plotted."""
MOST_SLOTS_WITH_NUMBERS = 16
"""The largest number of slots in a row of the map of KL in which each cell has room for its number."""
MOST_POINTS = 5000
"""The largest number of numbers of z in a plot of agreement; of more, every so many-th is drawn."""


def plots(results: list[Comparison]) -> dict[str, Any]:
    """The plots, by the names of their files."""
    found = {"bound": bound_plot(results), "objectives": objectives_plot(results), "kl": kl_plot(results)}
    if len(results) > 1:
        found["agreement"] = agreement_plot(results)
    if any(result.has_chains for result in results):
        found["traces"] = traces_plot(results)
    return found


def _title(result: Comparison) -> str:
    """The name of a scheme, and how its chains are where they are not well."""
    if result.num_diverged:
        return f"{result.name}: diverged"
    if result.has_kl:
        return result.name
    return f"{result.name}: not mixed ({'no R̂' if result.r_hat is None else f'R̂ {result.r_hat:.2f}'})"


def _look(results: list[Comparison], result: Comparison) -> dict[str, Any]:
    """The colour and the mark of a scheme, the same in all plots of a comparison."""
    number = results.index(result)
    return {
        "color": style.COLOURS[number % len(style.COLOURS)],
        "marker": style.MARKERS[number % len(style.MARKERS)],
        "markerfacecolor": None if result.has_kl else "white",
    }


@style.in_style
def bound_plot(results: list[Comparison]) -> Any:
    """The ELBO against gradient evaluations, with the errors of the table.

    Chains that have not mixed are in a panel of their own, with a scale of their own: their bounds may be many times as
    large.
    """
    shown = [result for result in results if not result.num_diverged]
    groups = {"": [result for result in shown if result.has_kl]}
    if any(not result.has_kl for result in shown):
        groups["chains that have not mixed, on a scale of their own"] = [each for each in shown if not each.has_kl]
    groups = {title: group for title, group in groups.items() if group} or {"": []}
    canvas = style.new_canvas(3.0)
    panels = canvas.subplots(1, len(groups), sharex=True, squeeze=False)[0]
    handles = {}
    for axes, (title, group) in zip(panels, groups.items(), strict=True):
        for result in group:
            gradients, values, errors = zip(*result.curve, strict=True)
            bars = None if None in errors else errors
            handles[result.name] = axes.errorbar(gradients, values, yerr=bars, **_look(results, result))
        axes.set_title(title, color=style.FAINT)
        axes.set_xlabel("gradient evaluations for each text,\nwith those of a Gaussian around points or draws")
        axes.grid(alpha=0.5)
        # Chains that have just started may have a bound of hundreds of nats, which would hide all else.
        finite = [value for result in group for _, value, _ in result.curve if np.isfinite(value)]
        ends = [result.curve[-1][1] for result in group if np.isfinite(result.curve[-1][1])]
        if ends:
            _set_limits(axes, min(finite), max(*ends, np.median(finite)))
            above = sum(1 for value in finite if value > axes.get_ylim()[1])
            if above:
                note = f"{above} point{'s' * (above != 1)} above"
                style.add_note(axes, note)
    panels[0].set_xscale("log", base=2)
    panels[0].xaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel("bound, -ELBO [nats/token]")
    canvas.suptitle(
        "How good the posterior is for what it costs: lower is better\n"
        "each point is a separate run; bars: Monte Carlo error"
    )
    if handles:
        style.add_legend(canvas, list(handles.values()), list(handles))
    return canvas


@style.in_style
def objectives_plot(results: list[Comparison]) -> Any:
    """The objective in each step, for the first sequences: a row for each scheme.

    The rows of schemes with the same objective share their axes, but for chains that have not mixed.
    """
    canvas = style.new_canvas(1.15 * len(results) + 0.6)
    rows = np.atleast_1d(canvas.subplots(len(results), 1, sharex=True))
    ranges: dict[str, tuple[float, float]] = {}
    for axes, result in zip(rows, results, strict=True):
        values = result.objectives[:, :MOST_OBJECTIVES].numpy()
        # Texts differ from each other by far more than a step changes.
        values = values - np.median(values[len(values) // 2 :], axis=0)
        axes.set_prop_cycle(color=style.COLOURS)
        lines = axes.plot(np.arange(len(values)), values, linewidth=0.8)
        axes.set_title(_title(result), loc="left")
        axes.set_ylabel(f"{result.objective}\n[nats/token]")
        finite = values[np.isfinite(values)]
        if len(finite):
            low, high = np.quantile(finite, [0, 0.98])
            _set_limits(axes, low, high)
            if result.has_kl:
                before = ranges.get(result.objective, (low, high))
                ranges[result.objective] = min(before[0], low), max(before[1], high)
    for axes, result in zip(rows, results, strict=True):
        if result.has_kl and result.objective in ranges:
            _set_limits(axes, *ranges[result.objective])
    rows[-1].set_xlabel("step of inference")
    canvas.suptitle(
        "The objective in each step, less its median over the second half of the steps\n"
        "optimisers lower it, chains sample"
    )
    ids = results[0].posterior.sequence_ids[:MOST_OBJECTIVES].tolist()
    style.add_legend(canvas, lines, [f"text {sequence}" for sequence in ids])
    return canvas


@style.in_style
def traces_plot(results: list[Comparison]) -> Any:
    """The kept draws of chains, a line for each chain: log joint, and the first and the last number of z.

    A row for each scheme of chains and each of the first sequences; chains that have not mixed come last. Rows of the
    same text share their axes, unless chains have diverged.
    """
    of_chains = sorted(
        (result for result in results if result.has_chains), key=lambda each: (each.num_diverged > 0, not each.has_kl)
    )
    num_texts = min(MOST_TRACES, len(results[0].posterior.sequence_ids))
    canvas = style.new_canvas(1.15 * len(of_chains) * num_texts + 0.6)
    grid = canvas.subplots(len(of_chains) * num_texts, 3, squeeze=False)
    rows = iter(grid)
    first_row: dict[int, Any] = {}
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
            row[0].set_title(f"{_title(result)}, text {sequence}", loc="left")
            for axes, (what, values) in zip(row, panels.items(), strict=True):
                axes.set_prop_cycle(color=style.COLOURS)
                # A chain of few draws shows each of them.
                marker = "." if values.shape[1] <= 32 else None
                lines = axes.plot(values.T.numpy(), linewidth=0.8, marker=marker, markersize=3)
                axes.set_ylabel(what)
                axes.xaxis.get_major_locator().set_params(integer=True)
            if not result.num_diverged:
                for axes, of_first in zip(row, first_row.setdefault(text, row), strict=True):
                    if axes is not of_first:
                        axes.sharey(of_first)
                        axes.autoscale(axis="y")
    for axes in grid[-1]:
        axes.set_xlabel("kept draw")
    canvas.suptitle("The draws of chains: those that have mixed move through the same values")
    style.add_legend(canvas, lines, [f"chain {chain}" for chain in range(len(lines))])
    return canvas


@style.in_style
def kl_plot(results: list[Comparison]) -> Any:
    """KL per layer and slot as a heat map for each scheme, with its numbers; those that have none are named."""
    shown = {result.name: result.kl_per_slot for result in results if result.has_kl and result.kl_per_slot is not None}
    omitted = [_why_no_kl(result) for result in results if result.name not in shown]
    highest = max((kl.nats.max().item() for kl in shown.values()), default=0)
    num_layers, num_slots = next((tuple(kl.nats.shape) for kl in shown.values()), (1, 1))
    has_numbers = num_slots <= MOST_SLOTS_WITH_NUMBERS
    columns = int(style.WIDTH / (0.9 + 0.32 * num_slots)) if has_numbers else 1
    columns = max(1, min(len(shown), columns))
    num_rows = -(-len(shown) // columns)
    canvas = style.new_canvas(num_rows * (0.65 + 0.24 * num_layers) + 0.7 + 0.15 * len(omitted))
    title = ["How much each slot of z says: KL from the prior, mean over texts"]
    if shown and not has_numbers:
        title.append("Σ: all slots of a layer [nats]")
    canvas.suptitle("\n".join([*title, *omitted]))
    if not shown:
        return canvas
    grid = canvas.subplots(num_rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flatten()[len(shown) :]:
        axes.set_axis_off()
    for axes, (name, kl) in zip(grid.flatten(), shown.items(), strict=False):
        nats = kl.nats.numpy()
        axes.set_title(name)
        # Each cell as it is: to smooth them would mix layers.
        picture = axes.imshow(nats, vmin=0, vmax=highest, cmap="cividis", aspect="auto", interpolation="nearest")
        axes.set_yticks(range(num_layers))
        if has_numbers:
            axes.set_xticks(range(num_slots))
            for (layer, slot), value in np.ndenumerate(nats):
                colour = "black" if value > 0.6 * highest else "white"
                axes.text(slot, layer, f"{value:#.3g}".rstrip("."), ha="center", va="center", color=colour, fontsize=6)
        else:
            sums = axes.secondary_yaxis("right")
            sums.set_yticks(range(num_layers), [f"Σ {layer:.4g}" for layer in nats.sum(1)])
            sums.tick_params(length=0)
    for number, axes in enumerate(grid.flatten()[: len(shown)]):
        if number + columns >= len(shown):  # nothing is below it
            axes.set_xlabel("slot")
            axes.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel("layer")
    label = "KL of a slot [nats]" + (", estimated from draws" if any(kl.is_estimate for kl in shown.values()) else "")
    canvas.colorbar(picture, ax=list(grid.flatten()), label=label, aspect=25, fraction=0.05)
    return canvas


def _why_no_kl(result: Comparison) -> str:
    if result.has_kl:
        reason = "the slots of the prior are not independent"
    elif result.num_diverged:
        reason = "diverged"
    else:
        reason = "no R̂: too few draws" if result.r_hat is None else f"R̂ = {result.r_hat:.2f}: not mixed"
    return f"omitted: {result.name} ({reason})"


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


@style.in_style
def agreement_plot(results: list[Comparison]) -> Any:
    """Mean and scale of every number of z by each scheme, against those by the first.

    All panels of a row share their axes, whose limits are those of the schemes that are well: chains that have not
    mixed or have diverged come last, in grey, and part of their points may lie outside.
    """
    first, *others = results
    others = sorted(others, key=lambda each: (each.num_diverged > 0, not each.has_kl))
    columns = max(3, len(others))
    canvas = style.new_canvas(
        2 * (style.WIDTH - 0.4) / columns + 1.2, (style.WIDTH - 0.4) / columns * len(others) + 0.4
    )
    grid = canvas.subplots(2, len(others), squeeze=False, sharex="row", sharey="row")
    moments = {result.name: _moments(result) for result in results}
    for row, what in zip(grid, ("mean", "scale"), strict=True):
        well = [moments[result.name][what] for result in results if result.has_kl and what in moments[result.name]]
        every = [found[what] for found in moments.values() if what in found]
        values = np.concatenate(well or every or [np.zeros(1)])
        values = values[np.isfinite(values)]
        limits = (values.min(), values.max()) if len(values) else (0.0, 0.0)
        drawn: list[Any] = []
        for axes, other in zip(row, others, strict=True):
            x, y = (moments[name].get(what) for name in (first.name, other.name))
            if x is None or y is None:
                axes.text(0.5, 0.5, "a point has\nno scale", ha="center", va="center", transform=axes.transAxes)
                axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
                axes.set_box_aspect(1)
                continue
            every_so_many = -(-len(x) // MOST_POINTS)
            colour = _look(results, other)["color"] if other.has_kl else style.FAINT
            axes.axline((limits[0], limits[0]), slope=1, color="black", linewidth=0.6)
            points = axes.scatter(
                x[::every_so_many], y[::every_so_many], s=2, alpha=0.4, color=colour, linewidths=0, rasterized=True
            )
            points.set_label(other.name)
            drawn.append(axes)
            _set_limits(axes, limits[0], limits[1], top=0.05)
            axes.set_xlim(axes.get_ylim())
            axes.set_box_aspect(1)
            axes.locator_params(nbins=4)
            axes.set_xlabel(f"{what} by {first.name}")
            low, high = axes.get_ylim()
            outside = 1 - ((y >= low) & (y <= high)).mean()
            if outside >= 0.005:
                note = f"{outside:.0%} outside"
                style.add_note(axes, note)
        for axes in drawn[:1]:
            axes.tick_params(labelleft=True)
    for axes, other in zip(grid[0], others, strict=True):
        axes.set_title(_title(other).replace(": ", ":\n"), color="black" if other.has_kl else style.FAINT)
    for row, what in zip(grid, ("mean", "scale"), strict=True):
        row[0].set_ylabel(f"{what} by the scheme above")
    canvas.suptitle(f"Whether schemes agree with {_title(first)}\na point for each number of z, on the line if equal")
    return canvas


def _set_limits(axes: Any, low: float, high: float, top: float = 0.15) -> None:
    """Let an axis of values reach a little beyond these, unless they are the same."""
    if low < high:
        axes.set_ylim(low - 0.05 * (high - low), high + top * (high - low))
