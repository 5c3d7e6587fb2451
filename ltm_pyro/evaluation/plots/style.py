"""What all plots share: their size, their colours, their legend, and the formats that they are written in."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

from ltm_pyro.inference.posterior import import_matplotlib

FORMATS = ("png", "pdf", "svg")
"""The formats of plots, by the ends of files' names."""

WIDTH = 6.75
"""The width of the text in a paper of two columns [inches]."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours that readers who cannot tell red from green can tell apart (Okabe and Ito 2008)."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""Marks that tell lines apart where there is no colour."""

FAINT = "#888888"
"""The colour of what is not the point of a plot."""

_STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "figure.titlesize": 9,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.4,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "errorbar.capsize": 2,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,  # letters that stay letters, as publishers ask
    "svg.fonttype": "none",
}

Parameters = ParamSpec("Parameters")


def in_style(draw: Callable[Parameters, Any]) -> Callable[Parameters, Any]:
    """Let a function draw in the style of these plots, whatever the style of its surroundings is."""

    @functools.wraps(draw)
    def drawn(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Any:
        with import_matplotlib().rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


def new_canvas(height: float, width: float = WIDTH) -> Any:
    """An empty figure of this size [inches]."""
    return import_matplotlib().figure.Figure(figsize=(width, height))


def add_legend(canvas: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Put a legend below the plot, where it takes none of its width; the canvas grows by its rows."""
    width, height = canvas.get_size_inches()
    columns = max(1, min(len(labels), int(width / (0.5 + 0.06 * max(map(len, labels))))))
    canvas.set_size_inches(width, height + 0.17 * -(-len(labels) // columns))
    canvas.legend(handles, labels, loc="outside lower center", ncols=columns)


def add_note(axes: Any, text: str) -> None:
    """Write a few words into the upper right corner of a panel, over what lies there."""
    box = {"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 1}
    axes.text(0.98, 0.97, text, ha="right", va="top", bbox=box, zorder=5, transform=axes.transAxes)


def image(canvas: Any, file_format: str) -> bytes:
    """A figure as the contents of a file.

    Args:
        file_format: one of :data:`FORMATS`.
    """
    contents = io.BytesIO()
    with import_matplotlib().rc_context(_STYLE):
        canvas.savefig(contents, format=file_format, dpi=200)
    return contents.getvalue()
