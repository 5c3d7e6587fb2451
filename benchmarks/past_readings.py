"""Measure what is gained or lost where the same weights read the past in another way.

    python benchmarks/past_readings.py RUN [RUN ...] [--num-sequences 64]

For runs that were trained on the past of each block (such as those of thinking.py and past_variants.py): the code
length of held-out text where z stays as it is before a text is read ("none"), where it follows the text as in training
("all"), and

- for `map`, where only the thoughts of some layers follow the text; and where z forgets, that is, shrinks by some
  percent before each block;
- for `vi`, where each block is predicted with the mean of the posterior in the place of draws.

± is the standard error over documents of the paired difference from "none".
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import torch
from thinking import opened
from timing import machine
from torch import Tensor

from ltm_pyro import evaluate
from ltm_pyro.evaluation import figures
from ltm_pyro.evaluation.estimators import EstimatorSettings
from ltm_pyro.evaluation.figures import Figure
from ltm_pyro.evaluation.inferred import inference_of
from ltm_pyro.evaluation.report import ScoredRun
from ltm_pyro.inference import PosteriorScheme
from ltm_pyro.inference.guides import guide_of, point
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.schemes.map import MAP, MAPState
from ltm_pyro.inference.schemes.vi import VI, VIState

NUM_SAMPLES = 8
"""Draws of z for a block, of a scheme that has several."""


@dataclass(frozen=True)
class ChangedMAP(MAP):
    """`map`, where blocks move the thoughts of some layers only, and z shrinks before each block."""

    layers: tuple[int, ...] | None = None
    """None: all."""
    kept: float = 1.0

    def absorb(self, state: MAPState, evidence: Any, prior: Any) -> MAPState:
        if self.kept < 1 and evidence.is_new:
            evidence = dataclasses.replace(evidence, z=self.kept * evidence.z)
        moved = super().absorb(state, evidence, prior)
        if self.layers is None:
            return moved
        follows: Tensor = torch.zeros(state.z.shape[1], dtype=torch.bool)
        follows[list(self.layers)] = True
        return dataclasses.replace(moved, z=torch.where(follows[:, None, None], moved.z, state.z))


@dataclass(frozen=True)
class MeanOfVI(VI):
    """`vi`, whose posterior is used by its mean alone."""

    def guide(self, model: Any, state: VIState, batch: Any, rng: Any) -> Any:
        return guide_of(point(state.mean))

    def posterior(self, state: VIState, num_samples: int, rng: Any) -> Posterior:
        return Posterior(state.mean.expand(1, num_samples, *state.mean.shape), state.sequence_ids)


def readings(scheme: PosteriorScheme, num_layers: int) -> dict[str, PosteriorScheme]:
    """The ways of reading to compare, by their names."""
    none = dataclasses.replace(scheme, num_steps=0)  # type: ignore[type-var]
    if isinstance(scheme, VI):
        settings = vars(scheme)
        return {"none": none, "all": scheme, "all, mean": MeanOfVI(**settings), "none, mean": MeanOfVI(**vars(none))}
    if not isinstance(scheme, MAP):
        raise SystemExit("only runs that were trained with map or vi can be compared")
    every = range(num_layers)
    chosen = {f"layer {layer + 1} alone": (layer,) for layer in every}
    chosen |= {f"all but layer {layer + 1}": tuple(other for other in every if other != layer) for layer in every}
    rows: dict[str, PosteriorScheme] = {"none": none, "all": scheme}
    rows |= {name: ChangedMAP(**vars(scheme), layers=layers) for name, layers in chosen.items()}
    return rows | {f"all, forgetting {100 - 100 * kept:.0f} %": ChangedMAP(**vars(scheme), kept=kept) for kept in KEPT}


KEPT = (0.98, 0.95, 0.9, 0.8)


def figure_of(run: ScoredRun, scheme: PosteriorScheme, num_sequences: int) -> Figure:
    """The code length of held-out text that is read by this scheme."""
    inference = dataclasses.replace(inference_of(run.trained.config), scheme=scheme)
    settings = evaluate.EvaluateConfig(
        estimators=("prequential",),
        num_sequences=num_sequences,
        settings=EstimatorSettings(num_samples=NUM_SAMPLES),
    )
    (row,) = evaluate.score(run, inference, settings)
    return row.figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--num-sequences", type=int, default=64, help="held-out sequences that are scored")
    chosen = parser.parse_args()
    cells: dict[str, list[tuple[float, float, float | None]]] = {}
    for folder in chosen.runs:
        run = opened(folder)
        schemes = readings(inference_of(run.trained.config).scheme, run.trained.config.model.num_layers)
        none = figure_of(run, schemes["none"], chosen.num_sequences)
        for name, scheme in schemes.items():
            figure = none if name == "none" else figure_of(run, scheme, chosen.num_sequences)
            gain, error = (0.0, 0.0) if figure is none else figures.difference(figure, none)
            cells.setdefault(name, []).append((figure.record()["bits_per_byte"], gain, error))
    lines = ["| follows the text | bits/byte | less none | " + " | ".join(chosen.runs) + " |"]
    lines.append("|---|---|---|" + "---|" * len(chosen.runs))
    for name, found in cells.items():
        bits, gain = (statistics.mean(cell[n] for cell in found) for n in (0, 1))
        each = " | ".join(f"{gain:+.4f}" + ("" if error is None else f" ± {error:.4f}") for _, gain, error in found)
        lines.append(f"| {name} | {bits:.3f} | {gain:+.4f} | {each} |")
    print(f"`python benchmarks/past_readings.py {' '.join(sys.argv[1:])}`\n\n{machine(torch.device('cpu'))}\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
