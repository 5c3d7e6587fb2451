"""The plot of `evaluate`: figures over the steps of inference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ltm_pyro.evaluation import figures
from ltm_pyro.evaluation.plots import style
from ltm_pyro.evaluation.report import Row
from ltm_pyro.inference.posterior import import_matplotlib

Value = tuple[float, float | None]
"""A number and its standard error, where there is one."""


@style.in_style
def fast_steps_plot(rows: list[Row]) -> Any:
    """Bits per byte over the steps of inference, for the valid figures, and the differences; both as in the table.

    Models without z are level lines. Figures whose z comes from chains that have not mixed are below, on a scale of
    their own; those of chains that have diverged are nowhere.
    """
    shown = [row for row in rows if row.figure.is_valid and row.figure.num_bytes and not row.figure.num_diverged]
    curves: dict[str, list[Row]] = {}
    for row in shown:
        z_from = "no z" if row.figure.z_from is None else row.figure.z_from
        curves.setdefault(f"{row.run.name}: {row.estimator}, {z_from}", []).append(row)
    apart = {name for name, points in curves.items() if any(point.figure.num_unmixed != 0 for point in points)}
    groups = {"": [name for name in curves if name not in apart], APART: [name for name in curves if name in apart]}
    groups = {title: names for title, names in groups.items() if names} or {"": []}
    quantities = {"bits per byte": _bits_per_byte}
    if any(row.reference(rows) for row in shown):
        quantities["Δ bits per byte, from the first"] = functools.partial(_difference, rows)
    canvas = style.new_canvas(2.3 * len(groups) + 0.7)
    grid = canvas.subplots(len(groups), len(quantities), sharex=True, squeeze=False)
    handles: dict[str, Any] = {}
    for panels, (title, names) in zip(grid, groups.items(), strict=True):
        panels[0].set_title(title, color=style.FAINT, loc="left")
        for axes, (quantity, value_of) in zip(panels, quantities.items(), strict=True):
            for name in names:
                handles[name] = _draw(axes, list(curves).index(name), curves[name], value_of) or handles.get(name)
            axes.set_ylabel(quantity)
            axes.grid(alpha=0.5)
    axes = grid[0, 0]
    axes.set_xscale("symlog", base=2, linthresh=1)
    ticker = import_matplotlib().ticker
    steps = sorted({row.figure.fast_steps for row in rows if row.figure.z_from is not None})
    axes.xaxis.set_major_locator(ticker.FixedLocator(steps))
    axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
    axes.xaxis.set_minor_locator(ticker.FixedLocator([]))
    for axes in grid[-1]:
        axes.set_xlabel("steps of inference, T")
    texts = ", ".join(dict.fromkeys(row.run.texts.name for row in rows))
    sizes = sorted({row.figure.num_sequences for row in rows})
    canvas.suptitle(
        f"What a byte costs after T steps of inference\n{texts}: {' or '.join(map(str, sizes))} pieces; "
        "bars: standard error over documents"
    )
    if handles:
        style.add_legend(canvas, list(handles.values()), list(handles))
    return canvas


APART = "z from chains that have not mixed, or keep too few draws to say, on a scale of their own"
"""What is said above the figures that stand apart."""


def _bits_per_byte(row: Row) -> Value | None:
    record = row.figure.record()
    return record["bits_per_byte"], record["bits_per_byte_standard_error"]


def _difference(rows: list[Row], row: Row) -> Value | None:
    reference = row.reference(rows)
    if reference is None and any(other.reference(rows) is row for other in rows):
        return 0.0, None  # what others are compared with
    return figures.difference(row.figure, reference.figure) if reference else None


def _draw(axes: Any, number: int, points: list[Row], value_of: Callable[[Row], Value | None]) -> Any:
    """A curve of figures with their errors, or the level of a model without z; None where nothing is to be drawn."""
    found = [(point.figure, value) for point in points if (value := value_of(point)) is not None]
    if not found:
        return None
    colour = style.COLOURS[number % len(style.COLOURS)]
    if points[0].figure.z_from is None:
        _, (level, _) = found[0]
        return axes.axhline(level, color=colour, linestyle=["--", ":", "-."][number % 3])
    errors = [error for _, (_, error) in found]
    # Curves a little beside each other, so that all bars of the same T can be seen.
    beside = 0.03 * number
    return axes.errorbar(
        [figure.fast_steps + beside * max(1, figure.fast_steps) for figure, _ in found],
        [value for _, (value, _) in found],
        yerr=None if not any(errors) else [error or 0.0 for error in errors],
        marker=style.MARKERS[number % len(style.MARKERS)],
        color=colour,
        markerfacecolor="white" if any(figure.num_unmixed != 0 for figure, _ in found) else None,
    )
