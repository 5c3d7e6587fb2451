"""Draws docs/picture.svg, the picture of the README: python docs/picture.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BLUE, ORANGE, GREY = "#2f6fab", "#c8641b", "#555555"
SCHEMES = "posterior $q(z) \\approx p(z\\,|\\,x)$\nby any scheme: vi, map,\nlangevin, hmc, amortized, …"


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str, size: float = 11) -> None:
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.04", fc="white", ec=colour, lw=1.8)
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color="black")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 16, "color": colour, "lw": 1.8}
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **style))


def main() -> None:
    plt.rcParams |= {"font.family": "DejaVu Sans", "svg.hashsalt": "ltm_pyro", "mathtext.fontset": "dejavusans"}
    figure, axes = plt.subplots(figsize=(10, 3.6))
    axes.set(xlim=(0, 10), ylim=(0, 3.6))
    axes.axis("off")
    box(axes, 0.15, 2.2, 1.9, 0.9, "prior\n$p(z)$", GREY)
    box(axes, 3.1, 2.2, 2.1, 0.9, "thought $z$\nvectors for each layer", GREY, size=10)
    box(axes, 6.3, 2.2, 3.5, 0.9, "causal transformer, weights $\\beta$\n$p_\\beta(x\\,|\\,z)$, short window", GREY)
    box(axes, 6.3, 0.35, 3.5, 0.8, "text $x$", GREY)
    box(axes, 1.55, 0.25, 3.65, 1.0, SCHEMES, BLUE, size=10)
    arrow(axes, (2.1, 2.65), (3.04, 2.65), GREY)
    arrow(axes, (5.26, 2.65), (6.24, 2.65), GREY)
    arrow(axes, (8.05, 2.14), (8.05, 1.2), GREY)
    axes.text(5.75, 2.78, "attended to", ha="center", fontsize=8.5, color=GREY)
    axes.text(8.15, 1.67, "writes", va="center", fontsize=9, color=GREY)
    arrow(axes, (6.24, 0.75), (5.26, 0.75), BLUE)
    arrow(axes, (4.15, 1.31), (4.15, 2.14), BLUE)
    axes.text(
        4.02,
        1.72,
        "fast: T steps of posterior inference\nfor each text, weights fixed",
        ha="right",
        va="center",
        fontsize=9.5,
        color=BLUE,
    )
    arrow(axes, (5.2, 1.25), (6.6, 2.14), ORANGE, bend=-0.15)
    axes.text(
        6.1,
        1.55,
        "slow: one step\non the weights β",
        ha="left",
        va="center",
        fontsize=9.5,
        color=ORANGE,
    )
    figure.savefig(Path(__file__).with_name("picture.svg"), bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
