"""Plots as inline SVG, which takes its colours from the style of the page."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ltm_pyro.evaluation.report import in_units

WIDTH, HEIGHT = 420, 270
"""The size of a plot [units of its own, about a pixel each]."""
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 42
"""The margins, which hold the labels of the axes."""
BEGINNING = 0.05
"""The part of the plot, from the left, in which values may lie above it: they would leave no room for the others."""


@dataclass(frozen=True)
class Curve:
    """A line in a plot."""

    name: str
    """What the line is of."""
    style: int
    """The number of its colour and dashes, from 0."""
    points: list[tuple[float, float]]
    """Where it goes through, from left to right; at least one point."""


def plot(name: str, curves: Sequence[Curve], x_label: str, y_label: str, has_marks: bool) -> str:
    """Lines in a plot with labelled axes.

    Args:
        name: what the plot is called for a reader who cannot see it; also makes it differ from others of the page, and
            so must consist of words.
        has_marks: whether each point has a mark that shows its numbers.
    """
    most_x = max(x for curve in curves for x, _ in curve.points)
    shown = [y for curve in curves for y in _after_beginning(curve, most_x)]
    low, high = min(shown), max(shown)
    space = 0.06 * (high - low) or 0.5
    low, high = max(0.0, low - space), high + space

    def place(x: float, y: float) -> tuple[float, float]:
        across = x / (1.03 * most_x) if most_x else 0.0  # with room for the last mark
        up = (y - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    clip = "inside-" + name.replace(" ", "-")
    bottom, middle = HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(name)}">',
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{HEIGHT - TOP - BOTTOM}"/></clipPath>',
    ]
    for tick in ticks(low, high, 5):
        _, y = place(0, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in ticks(0, most_x, 5):
        x, _ = place(tick, low)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{in_units(tick)}</text>')
    parts += [
        f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}"/>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(x_label)}</text>',
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
        f"{html.escape(y_label)}</text>",
        f'<g clip-path="url(#{clip})">',
    ]
    for curve in curves:
        places = [place(x, y) for x, y in curve.points]
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line s{curve.style}" points="{way}"/>')
        if has_marks or len(places) == 1:
            for (x, y), (tokens, value) in zip(places, curve.points, strict=True):
                title = html.escape(f"{curve.name}: {value:.4f} after {in_units(tokens)}")
                parts.append(
                    f'<circle class="mark s{curve.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{title}</title>'
                    "</circle>"
                )
    return "".join([*parts, "</g></svg>"])


def key(style: int) -> str:
    """A piece of a curve, for a legend."""
    return (
        '<svg class="key" viewBox="0 0 34 10" aria-hidden="true">'
        f'<polyline class="line s{style}" points="1,5 33,5"/></svg>'
    )


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, at most about so many."""
    if high <= low:
        return [low]
    step = round_up((high - low) / most)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def round_up(value: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is no smaller than a positive value."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def _after_beginning(curve: Curve, most_x: float) -> list[float]:
    return [y for x, y in curve.points if x >= BEGINNING * most_x] or [curve.points[-1][1]]
