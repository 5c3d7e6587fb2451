"""Test whether the figure at the noise that q was fitted to is a bound on -log p(x).

The answer is known for two linear-Gaussian models, whose -log p(x) has a closed form, and for uniformly random tokens,
which no model can code in fewer than log V nats per token. In each case, q(z) of every text is fitted by T steps of
Adam to one noise draw, as in the reference implementation of Latent Thought Models. Computed at that same noise, the
negative "ELBO" falls below the smallest possible value. The figure of the same q with fresh noise does not, and neither
does that of a q that was fitted with fresh noise. As a control, a model trained with fresh noise scores the random
tokens as well.

This takes about three minutes on one thread, and prints a Markdown table followed by all settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from torch import Tensor

from ltm_pyro.data import UniformLanguage, token_batch
from ltm_pyro.inference import BatchNoise, SequenceNoise, bounds, infer
from ltm_pyro.inference.schemes.adam_vi import AdamVI
from ltm_pyro.inference.svi import OptimizerConfig, WeightOptimizer, elbo_backward
from ltm_pyro.models import DecoderConfig, LatentThoughtModel

REUSED = AdamVI(num_steps=64, learning_rate=0.3, epsilon=1e-8, initial_scale=math.exp(-2.5), noise="reused")
"""The fit as in the reference."""
FRESH = dataclasses.replace(REUSED, noise="fresh")
"""The same fit except for the noise, so that nothing else can explain the difference."""
NUM_DRAWS = 64
"""The number of draws of z for each text, in every figure that is a bound."""

NUM_SYMBOLS = 16
DECODER = DecoderConfig(num_layers=2, width=64, num_heads=2, hidden=128, num_slots=4, window=16, length=32)
WEIGHT_SCALE = 1 / math.sqrt(DECODER.width)
"""The scale of the initial weights. With the decoder's own 0.02, the text would not depend on z after this small number
of slow steps."""
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=10)
BATCH_SIZE = 8
NUM_SLOW_STEPS = 150

SETTINGS = (
    f"Fit of q: Adam, T = {REUSED.num_steps}, rate {REUSED.learning_rate}, epsilon {REUSED.epsilon:g}, from mean 0 and "
    f"log σ² = {2 * math.log(REUSED.initial_scale):g}. Reused: one noise draw for all steps. Fresh: a new draw in each "
    "step, nothing else changed; at so high a rate that gives a bound, but no tight one. In the reference the rate is "
    "for log σ², and falls to a tenth; here it is for log σ, and constant.",
    f"Figures with fresh noise: {NUM_DRAWS} draws of z for each text, none of which the fit has seen.",
    "Linear-Gaussian: z ~ N(0, I) has d numbers, x | z ~ N(Wz, s²I) has n; the entries of W are drawn from N(0, 1/d); "
    "float64. Best mean-field q in closed form: with Λ = I + WᵀW/s², means Λ⁻¹Wᵀx/s² and variances 1/Λᵢᵢ.",
    f"Random symbols: {DECODER.num_layers} layers, width {DECODER.width}, {DECODER.num_heads} heads, hidden width "
    f"{DECODER.hidden}, {DECODER.num_slots} slots a layer, window {DECODER.window}, texts of {DECODER.length} tokens; "
    f"{NUM_SLOW_STEPS} slow steps of {BATCH_SIZE} new texts, AdamW, rate {OPTIMIZER.learning_rate:g} to "
    f"{OPTIMIZER.final_learning_rate:g}, warm-up {OPTIMIZER.warmup_steps} steps; q is fitted in training as in the "
    f"scoring. The weights start at scale {WEIGHT_SCALE:g} (1/√width) and not at the decoder's 0.02, from which the "
    "text does not depend on z after so few slow steps.",
    "±: standard error over texts, of one draw of W and of one training. Below: share of texts whose figure at reused "
    "noise is below the exact one, or below the floor (a single text may be by chance; the mean of many may not).",
)


@dataclass(frozen=True)
class Vectors:
    """A batch of vectors, [B, n]."""

    x: Tensor
    sequence_ids: Tensor

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Comparison:
    """Figures of the same texts, each [N], in `unit`."""

    world: str
    unit: str
    known: str
    """What `exact` is: the exact -log p(x) ("exact"), or the least that any model can reach on average ("floor")."""
    exact: Tensor
    reused: Tensor
    """The figures at the noise that q was fitted to."""
    rescored: Tensor
    """The figures of the same q, with fresh noise."""
    refitted: Tensor
    """The figures of a q that was both fitted and scored with fresh noise."""
    best: Tensor | None = None
    """The figures of the best mean-field q, in closed form."""

    @property
    def figures(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three figures, each [N]."""
        return self.reused, self.rescored, self.refitted

    @property
    def share_below(self) -> float:
        """The share of the texts whose figure at reused noise is below `exact`."""
        return (self.reused < self.exact).double().mean().item()

    def record(self) -> dict[str, Any]:
        """Means and standard errors, as plain numbers."""
        names = ("exact", "reused", "rescored", "refitted", "best")
        figures = {
            name: dict(zip(("mean", "standard_error"), mean_and_error(getattr(self, name)), strict=True))
            for name in names
            if getattr(self, name) is not None
        }
        about = {"world": self.world, "unit": self.unit, "known": self.known, "num_texts": len(self.exact)}
        return about | figures | {"share_below": self.share_below}


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean over the texts, and its standard error."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


def scores(model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Negative ELBOs of the texts [B], in nats: at reused noise, of the same q with fresh noise, of a fresh fit."""
    rng = SequenceNoise(0)
    reused, fresh = infer(REUSED, model, batch, rng), infer(FRESH, model, batch, rng)
    return (
        bounds.reused_noise(model, batch, REUSED, reused).nelbo,
        bounds.elbo(model, batch, REUSED.distribution(reused, rng), NUM_DRAWS).nelbo,
        bounds.elbo(model, batch, FRESH.distribution(fresh, rng), NUM_DRAWS).nelbo,
    )


def linear_gaussian(num_observed: int, num_latent: int, noise_scale: float, num_texts: int = 400) -> Comparison:
    """z ~ N(0, I_d), x | z ~ N(W z, s² I_n): the figures of data drawn from the model itself."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    loadings = normal(num_observed, num_latent) / math.sqrt(num_latent)
    zero = loadings.new_zeros(num_latent)

    def model(batch: Vectors) -> None:
        with pyro.plate("sequences", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(zero, 1).to_event(1))
            pyro.sample("x", dist.Normal(z @ loadings.T, noise_scale).to_event(1), obs=batch.x)

    x = normal(num_texts, num_latent) @ loadings.T + noise_scale * normal(num_texts, num_observed)
    return Comparison(
        f"linear-Gaussian, n = {num_observed}, d = {num_latent}, s = {noise_scale:g}",
        "nats per datum",
        "exact",
        neg_log_evidence(loadings, noise_scale, x),
        *scores(model, Vectors(x, torch.arange(num_texts))),
        best=best_mean_field(loadings, noise_scale, x),
    )


def neg_log_evidence(loadings: Tensor, noise_scale: float, x: Tensor) -> Tensor:
    """-log p(x), [N] in nats, of data [N, n] under the linear-Gaussian model: x ~ N(0, W Wᵀ + s² I)."""
    covariance = loadings @ loadings.T + noise_scale**2 * torch.eye(len(loadings), dtype=x.dtype)
    return -dist.MultivariateNormal(x.new_zeros(len(loadings)), covariance).log_prob(x)


def best_mean_field(loadings: Tensor, noise_scale: float, x: Tensor) -> Tensor:
    """Negative ELBO, [N] in nats, of the best diagonal Gaussian q for data [N, n] under the linear-Gaussian model.

    With Λ = I + WᵀW/s² it has means Λ⁻¹Wᵀx/s² and variances 1/Λ_ii (Bishop 2006, section 10.1.2).
    """
    num_observed, num_latent = loadings.shape
    precision = torch.eye(num_latent, dtype=x.dtype) + loadings.T @ loadings / noise_scale**2
    variance = 1 / precision.diagonal()
    mean = torch.linalg.solve(precision, (x @ loadings).T / noise_scale**2).T
    squares = (x - mean @ loadings.T).square().sum(-1) + (loadings.square() @ variance).sum()
    nll = 0.5 * squares / noise_scale**2 + 0.5 * num_observed * math.log(2 * math.pi * noise_scale**2)
    return nll + 0.5 * (mean.square() + variance - 1 - variance.log()).sum(-1)


def uniform_tokens(trained_with: AdamVI, num_slow_steps: int = NUM_SLOW_STEPS, num_texts: int = 128) -> Comparison:
    """The figures of a Latent Thought Model trained on random symbols, for texts that it has not seen."""
    language = UniformLanguage(NUM_SYMBOLS)
    model = train(trained_with, language, num_slow_steps)
    held_out = token_batch(language.sample(num_texts, DECODER.length, torch.Generator().manual_seed(2)))
    return Comparison(
        f"{NUM_SYMBOLS} random symbols, trained with {trained_with.noise} noise",
        "nats per token",
        "floor",
        -language.log_prob(held_out.tokens) / DECODER.length,
        *(figure / DECODER.length for figure in scores(model, held_out)),
    )


def train(scheme: AdamVI, language: UniformLanguage, num_slow_steps: int) -> LatentThoughtModel:
    """A small model after this number of slow steps, each on new texts.

    Raises:
        RuntimeError: if a slow step was not finite.
    """
    pyro.set_rng_seed(0)
    # The last id, begin-of-text, has no logit, so the floor is log V for the V symbols. Any symbol may serve as
    # end-of-text, since every position of a text of fixed length is counted.
    model = LatentThoughtModel(DECODER, vocab_size=language.vocab_size + 1, end_of_text=language.vocab_size - 1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(WEIGHT_SCALE / 0.02)
    optimizer = WeightOptimizer(model, OPTIMIZER, num_slow_steps)
    generator = torch.Generator().manual_seed(1)
    rng = BatchNoise(generator)
    for step in range(num_slow_steps):
        batch = token_batch(language.sample(BATCH_SIZE, DECODER.length, generator))
        state = infer(scheme, model, batch, rng)
        elbo_backward(model, scheme.guide(model, state, batch, rng), batch, batch.tokens.numel())
        if not optimizer.update(step):
            raise RuntimeError(f"slow step {step} was not finite")
    return model


def table(comparisons: list[Comparison]) -> str:
    """The comparisons as a Markdown table, one row for each world."""

    def with_error(values: Tensor, digits: int) -> str:
        mean, error = mean_and_error(values)
        return f"{mean:.{digits}f} ± {error:.{digits}f}"

    lines = [
        "| world | texts | exact, or floor | reported with reused noise | below | same q, fresh noise "
        "| fitted with fresh noise | best mean-field q |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in comparisons:
        is_floor = c.known == "floor"
        digits = 3 if is_floor else 1
        cells = [
            f"{c.world} ({c.unit})",
            str(len(c.exact)),
            f"{c.exact.mean():.4f}" if is_floor else with_error(c.exact, digits),
            with_error(c.reused, digits),
            f"{c.share_below:.0%}",
            with_error(c.rescored, digits),
            with_error(c.refitted, digits),
            "" if c.best is None else with_error(c.best, digits),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(comparisons: list[Comparison], path: Path) -> None:
    """A figure with one panel for each world; worlds with the same unit have the same scale."""
    canvas = Figure(figsize=(3.6 * len(comparisons), 4.8), layout="constrained")
    panels = canvas.subplots(1, len(comparisons), squeeze=False)[0]
    for axes, c in zip(panels, comparisons, strict=True):
        alike = [other for other in comparisons if other.unit == c.unit]
        draw_panel(axes, c, highest=max(figure.mean().item() for other in alike for figure in other.figures))
    # All panels show the same quantities, so they share one legend.
    legend = {name: mark for axes in panels for mark, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    canvas.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend), frameon=False)
    canvas.savefig(path, dpi=150)


def draw_panel(axes: Axes, c: Comparison, highest: float) -> None:
    """The three figures of a world as points with their standard errors, and the known values as lines.

    Args:
        highest: the highest figure that must fit into the panel.
    """
    digits = 2 if c.known == "floor" else 1

    def text(value: float) -> str:
        return f"{value:.{digits}f}".replace("-", "−")

    if c.known == "floor":
        axes.set_ylim(0, 1.15 * highest)
    else:
        # Values range from below 0 to hundreds of nats: the scale is linear up to 10 and logarithmic above.
        axes.set_yscale("symlog", linthresh=10)
        axes.set_ylim(min(-10, 2 * c.reused.mean().item()), 2 * highest)
        axes.yaxis.set_major_locator(FixedLocator([-10, -5, 0, 5, 10, 20, 50, 100, 200, 500, 1000]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_ylabel(f"negative ELBO [{c.unit}]")
    axes.set_title(c.world.replace(", ", "\n", 1), fontsize="medium")
    axes.set_xticks(range(3), ["reused noise,\nas reported", "same q,\nfresh noise", "fitted with\nfresh noise"])
    axes.set_xlim(-0.6, 2.6)

    lines = [(c.exact.mean().item(), "-", "black", f"exact −log p(x), or the floor log {NUM_SYMBOLS}")]
    if c.best is not None:
        lines.append((c.best.mean().item(), "--", "gray", "best mean-field q"))
    for level, style, color, name in lines:
        axes.axhline(level, linestyle=style, color=color, label=name, zorder=1)
        axes.annotate(text(level), (2.55, level), (0, -4), textcoords="offset points", ha="right", va="top")
    level = c.exact.mean().item()
    axes.axhspan(axes.get_ylim()[0], level, color="tab:red", alpha=0.1, linewidth=0, label="too low for a bound")
    for place, (figure, color) in enumerate(zip(c.figures, ("tab:red", "tab:blue", "tab:green"), strict=True)):
        mean, error = mean_and_error(figure)
        axes.errorbar(place, mean, yerr=error, marker="o", markersize=5, capsize=5, color=color)
        axes.annotate(text(mean), (place, mean), (0, 8), textcoords="offset points", ha="center")


def write(comparisons: list[Comparison], about: dict[str, str], folder: Path) -> None:
    """Write `validity.md`, `.json` and `.png` into this folder, and replace older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "validity.md").write_text(report(comparisons, about), encoding="utf-8")
    record = about | {"settings": SETTINGS, "comparisons": [c.record() for c in comparisons]}
    (folder / "validity.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    plot(comparisons, folder / "validity.png")


def report(comparisons: list[Comparison], about: dict[str, str]) -> str:
    """The table, followed by how it was made and by the settings."""
    heading = (
        "# Is the figure at the noise that q was fitted to a bound?\n\n"
        "Negative ELBOs: means over texts, the lower the better. No bound is below the third column.\n"
    )
    lines = [f"{name.capitalize()}: {value}" for name, value in about.items()]
    return "\n".join([heading, table(comparisons), *(f"- {line}" for line in (*lines, *SETTINGS))]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="also write validity.md, validity.json and validity.png into this folder, and replace older ones",
    )
    folder = parser.parse_args().out
    # Such small matrices gain nothing from more threads, and with one the digits do not depend on the number of cores.
    torch.set_num_threads(1)
    start, start_cpu = time.perf_counter(), time.process_time()
    comparisons = []
    for make in (
        lambda: linear_gaussian(8, 32, noise_scale=0.1),
        lambda: linear_gaussian(64, 512, noise_scale=0.3),
        lambda: uniform_tokens(trained_with=REUSED),
        lambda: uniform_tokens(trained_with=FRESH),
    ):
        comparisons.append(make())
        print(f"{time.perf_counter() - start:.0f} s: {comparisons[-1].world}", file=sys.stderr, flush=True)
    packages = ", ".join(f"{name} {version(name)}" for name in ("ltm-pyro", "torch", "pyro-ppl", "numpy"))
    about = {
        "command": f"`{shlex.join(['python', *sys.argv])}`",
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), one thread on the CPU",
        "time": f"{time.perf_counter() - start:.0f} s, of which {time.process_time() - start_cpu:.0f} s of CPU time",
        "versions": f"Python {platform.python_version()}, {packages}",
    }
    print(report(comparisons, about), end="")
    if folder is not None:
        write(comparisons, about, folder)


if __name__ == "__main__":
    main()
