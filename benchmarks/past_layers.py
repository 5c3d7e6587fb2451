"""Measure what the thoughts of each layer give.

    python benchmarks/past_layers.py RUN [RUN ...] [--num-sequences 64]

For runs that were trained on the past of each block with `map` (such as those of thinking.py): the code length of
held-out text where the thoughts of all layers follow the text, of none, of one layer alone, and of all layers but one.
The others stay where they are before a text is read. The weights are the same throughout, and so is the length of a
step. ± is the standard error over documents of the paired difference from "none".
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
from ltm_pyro.evaluation.figures import Figure
from ltm_pyro.evaluation.inferred import inference_of
from ltm_pyro.evaluation.report import ScoredRun
from ltm_pyro.inference.schemes.map import MAP, MAPState


@dataclass(frozen=True)
class MAPOfLayers(MAP):
    """`map`, where blocks move the thoughts of some layers only."""

    layers: tuple[int, ...] = ()

    def absorb(self, state: MAPState, *args: Any) -> MAPState:
        moved = super().absorb(state, *args)
        follows: Tensor = torch.zeros(state.z.shape[1], dtype=torch.bool)
        follows[list(self.layers)] = True
        return dataclasses.replace(moved, z=torch.where(follows[:, None, None], moved.z, state.z))


def figure_of(run: ScoredRun, layers: tuple[int, ...], num_sequences: int) -> Figure:
    """The code length of held-out text where the thoughts of these layers follow it."""
    inference = inference_of(run.trained.config)
    scheme = inference.scheme
    if not isinstance(scheme, MAP):
        raise SystemExit(f"{run.trained.path}: was not trained with map")
    chosen = dataclasses.replace(inference, scheme=MAPOfLayers(**vars(scheme), layers=layers))
    settings = evaluate.EvaluateConfig(estimators=("prequential",), num_sequences=num_sequences)
    (row,) = evaluate.score(run, chosen, settings)
    return row.figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--num-sequences", type=int, default=64, help="held-out sequences that are scored")
    chosen = parser.parse_args()
    cells: dict[str, list[tuple[float, float, float | None]]] = {}
    for folder in chosen.runs:
        run = opened(folder)
        every = tuple(range(run.trained.config.model.num_layers))
        rows = {"none": (), "all": every}
        rows |= {f"layer {layer + 1} alone": (layer,) for layer in every}
        rows |= {f"all but layer {layer + 1}": tuple(other for other in every if other != layer) for layer in every}
        none = figure_of(run, (), chosen.num_sequences)
        for name, layers in rows.items():
            figure = none if not layers else figure_of(run, layers, chosen.num_sequences)
            gain, error = (0.0, 0.0) if figure is none else figures.difference(figure, none)
            cells.setdefault(name, []).append((figure.record()["bits_per_byte"], gain, error))
    lines = ["| layers | bits/byte | less none | " + " | ".join(chosen.runs) + " |"]
    lines.append("|---|---|---|" + "---|" * len(chosen.runs))
    for name, found in cells.items():
        bits, gain = (statistics.mean(cell[n] for cell in found) for n in (0, 1))
        each = " | ".join(f"{gain:+.3f}" + ("" if error is None else f" ± {error:.3f}") for _, gain, error in found)
        lines.append(f"| {name} | {bits:.3f} | {gain:+.3f} | {each} |")
    print(f"`python benchmarks/past_layers.py {' '.join(sys.argv[1:])}`\n\n{machine(torch.device('cpu'))}\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
