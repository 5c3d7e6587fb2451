"""Measure whether thinking helps: code lengths of held-out text with z of the past, against models without z.

    python benchmarks/thinking.py --data DATA [--out FOLDER] [--seeds 0 1 2] [--steps N] [--optimizer adamw]
        [-- OPTIONS OF TRAIN]

For each seed, these models are trained on the same corpus:

- "no z": the decoder without z, an autoregressive model with a window of 16;
- "past": the same network, with z of each block inferred from the blocks before it (--infer-from past --inference map).
  z is a change of weights (--model.thoughts fast-weights), and 0 at its start: held there, the two are one network;
- "no z, equal operations": "no z" trained for as many more steps as make its training operations those of "past";
- with --window N, "no z, window N": "no z" with that window, which shows what a longer memory of the text is worth.

All are scored on the same held-out sequences: models without z by their exact -log p(x), "past" by the length of the
code that predicts each block with z of the blocks before it, with several numbers of fast steps. "no z" is scored with
dynamic evaluation too (Krause et al. 2018, arXiv 1709.07432): after each block, one gradient step on all weights, or on
the norms alone, at a rate that was chosen on other sequences. That is also a code.

Differences are paired over documents, and ± is their standard error over documents. Runs that are finished are not
trained again. The table goes to FOLDER/thinking.md, the loss by position to FOLDER/by-position.png, and all figures to
FOLDER/thinking.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timing import machine
from torch import nn

from ltm_pyro import evaluate, train
from ltm_pyro.evaluation import figures
from ltm_pyro.evaluation.estimators import BlockNats, Estimate, EstimatorSettings
from ltm_pyro.evaluation.figures import Figure
from ltm_pyro.evaluation.inferred import inference_of
from ltm_pyro.evaluation.report import ScoredRun
from ltm_pyro.inference.base import log_likelihood
from ltm_pyro.models import TokenBatch
from ltm_pyro.runs.run import Run

NO_Z, PAST = "no z", "past"
SHAPE = ["--model.window", "16", "--model.length", "2048", "--batch-size", "4"]
"""The reach of the decoder (46 tokens) is far shorter than a sequence, so that z has something to remember."""
OPTIMIZERS = {
    "muon": [],  # as preset tiny has it
    "adamw": [
        *("--optimizer.algorithm", "adamw", "--optimizer.learning-rate", "4e-3"),
        *("--optimizer.warmup-steps", "50", "--optimizer.beta-1", "0.9"),
    ],
}
OPTIONS = {
    NO_Z: ["--inference", "none"],
    PAST: [
        *("--infer-from", "past", "--inference", "map"),
        *("--model.thoughts", "fast-weights", "--model.num-slots", "344", "--model.prior", "scaled"),
    ],
}
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
"""Rates of dynamic evaluation: the root mean square of the change of a weight in a step."""
NUM_TO_TUNE = 8
"""The number of held-out sequences that choose the rate of dynamic evaluation. They are not scored."""


def trained(folder: Path, seed: int, options: list[str]) -> str:
    """The folder of a run with these options, which is trained if there is none."""
    if not (folder / "config.yaml").exists():
        train.main([*SHAPE, *options, "--seed", str(seed), "--out", str(folder)])
    config, _ = Run(folder).read_config()
    if not any(record.get("split") == "report" for record in Run(folder).read_metrics()):
        train.main(["--out", str(folder), "--resume", "--steps", str(config.steps)])
    return str(folder)


def opened(folder: str, length: int | None = None) -> ScoredRun:
    """A run and the text that it has held out, in sequences of this length or as in training."""
    return evaluate.load_run(folder, evaluate.EvaluateConfig(runs=(folder,), length=length), torch.device("cpu"))


def scored(run: ScoredRun, num_sequences: int, fast_steps: int | None = None, num_samples: int = 64) -> Figure:
    """The figure of a run: the exact one of a model without z, the prequential code of one with z.

    Args:
        num_samples: the draws of z for each block, of a scheme that has several.
    """
    estimator = EstimatorSettings(num_samples=num_samples)
    settings = evaluate.EvaluateConfig(estimators=("prequential",), num_sequences=num_sequences, settings=estimator)
    (row,) = evaluate.score(run, inference_of(run.trained.config, fast_steps=fast_steps), settings)
    return row.figure


def parameters(model: nn.Module, which: str) -> list[nn.Parameter]:
    """The weights that dynamic evaluation moves."""
    norms = [weight for module in model.modules() if isinstance(module, nn.RMSNorm) for weight in module.parameters()]
    return norms if which == "norms" else list(model.parameters())


def texts_of(run: ScoredRun, first: int, last: int) -> Iterator[TokenBatch]:
    """Held-out sequences one by one, those from `first` to `last` - 1 in the order in which they are chosen."""
    for index in figures.chosen_sequences(len(run.packed), last)[first:]:
        yield run.packed.batch(torch.tensor([index]).numpy())


def code_of(run: ScoredRun, text: TokenBatch, which: str, rate: float, block_size: int) -> torch.Tensor:
    """The nats of each block of a text, [number of blocks, 1], by dynamic evaluation. Rate 0: without."""
    model = copy.deepcopy(run.trained.model) if rate else run.trained.model
    weights, nats = parameters(model, which), []
    z = torch.zeros(1, *model.config.latent_shape)
    for start in range(0, text.tokens.shape[1], block_size):
        with torch.set_grad_enabled(rate > 0):
            loss = -log_likelihood(model, text.block(start, start + block_size, model.reach), z).sum()
        nats.append(loss.detach().double())
        if rate and loss:
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for weight, gradient in zip(weights, gradients, strict=True):
                    # Each tensor moves by the rate, whatever the size of its gradient: better than one rate for all.
                    weight -= rate * gradient / (gradient.square().mean().sqrt() + 1e-12)
    return torch.stack(nats)[:, None]


def by_code(run: ScoredRun, which: str, rate: float, block_size: int, first: int, last: int) -> Figure:
    """The figure of held-out sequences by dynamic evaluation."""
    figure = Figure("prequential", 0)
    for text in texts_of(run, first, last):
        nats = code_of(run, text, which, rate, block_size)
        estimate = Estimate(nats.sum(0), f"dynamic evaluation of {which}", 1, by_block=BlockNats(block_size, nats))
        figure.add(estimate, text, run.packed.document_ids[text.sequence_ids.cpu()])
    return figure


def dynamically_evaluated(run: ScoredRun, num_sequences: int, which: str, block_size: int) -> tuple[Figure, float]:
    """The figure by dynamic evaluation, and its rate, which was chosen on other sequences."""

    def nats(rate: float) -> float:
        return by_code(run, which, rate, block_size, num_sequences, num_sequences + NUM_TO_TUNE).nats

    rate = min(RATES, key=nats)
    return by_code(run, which, rate, block_size, 0, num_sequences), rate


def figures_of(seed: int, chosen: argparse.Namespace, given: list[str]) -> list[dict[str, Any]]:
    """All rows of a seed, as records."""
    steps, window, num_sequences, size = chosen.steps, chosen.window, chosen.num_sequences, chosen.block_size

    def run_of(name: str, options: list[str], steps: int = steps) -> ScoredRun:
        folder = chosen.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
        return opened(trained(folder, seed, [*options, "--steps", str(steps), *given]))

    no_z, past = run_of(NO_Z, OPTIONS[NO_Z]), run_of(PAST, [*OPTIONS[PAST], "--block-size", str(size)])
    exact = scored(no_z, num_sequences)
    positions = by_code(no_z, "nothing", 0.0, size, 0, num_sequences)
    records = [record(seed, NO_Z, no_z, exact, exact) | {"by_position": positions.by_position()}]
    ratio = past.training_operations_per_token / no_z.training_operations_per_token
    longer = run_of("no z, equal operations", OPTIONS[NO_Z], math.ceil(steps * ratio))
    records.append(record(seed, "no z, equal operations", longer, scored(longer, num_sequences), exact))
    if window is not None:
        name = f"no z, window {window}"
        wide = run_of(name, [*OPTIONS[NO_Z], "--model.window", str(window)])
        records.append(record(seed, name, wide, scored(wide, num_sequences), exact))
    for which in ("all weights", "norms"):
        figure, rate = dynamically_evaluated(no_z, num_sequences, which, size)
        records.append(record(seed, f"no z, dynamic evaluation of {which}", no_z, figure, exact) | {"rate": rate})
    for fast_steps in (0, 1, 2, 4):
        figure = scored(past, num_sequences, fast_steps)
        records.append(record(seed, f"past, T = {fast_steps}", past, figure, exact))
    return records


def record(seed: int, name: str, run: ScoredRun, figure: Figure, reference: Figure) -> dict[str, Any]:
    """A row of the table, with its difference from the reference."""
    gain, error = (None, None) if figure is reference else figures.difference(figure, reference)
    return {
        "seed": seed,
        "model": name,
        **figure.record(),
        "by_position": figure.by_position(),
        "difference_bits_per_byte": gain,
        "difference_standard_error": error,
        "training_operations": run.training_operations,
        "training_steps": run.trained.progress.step,
    }


def table(records: list[dict[str, Any]]) -> str:
    """Bits per byte of each model, and the difference from "no z": for each seed, and the mean over seeds."""
    seeds = sorted({found["seed"] for found in records})
    lines = [
        '| model | training, T operations | bits/byte | less "no z" (standard deviation over seeds) | '
        + " | ".join(f"seed {seed}" for seed in seeds)
        + " |",
        "|---|---|---|---|" + "---|" * len(seeds),
    ]
    for name in dict.fromkeys(found["model"] for found in records):
        rows = [found for found in records if found["model"] == name]
        bits = statistics.mean(row["bits_per_byte"] for row in rows)
        gains = [row["difference_bits_per_byte"] for row in rows]
        mean = ""
        if None not in gains:
            spread = f" ({statistics.stdev(gains):.3f})" if len(gains) > 1 else ""
            mean = f"{statistics.mean(gains):+.3f}{spread}"
        cells = " | ".join(_gain(row) for row in rows)
        lines.append(f"| {name} | {rows[0]['training_operations'] / 1e12:.1f} | {bits:.3f} | {mean} | {cells} |")
    return "\n".join(lines)


def _gain(row: dict[str, Any]) -> str:
    gain, error = row["difference_bits_per_byte"], row["difference_standard_error"]
    if gain is None:
        return f"{row['bits_per_byte']:.3f}"
    return f"{gain:+.3f}" if error is None else f"{gain:+.3f} ± {error:.3f}"


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Bits per token by position, the mean over seeds, for the models that have such figures."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7, 4), layout="constrained")
    axes = canvas.add_subplot()
    for name in dict.fromkeys(found["model"] for found in records):
        rows = [found["by_position"] for found in records if found["model"] == name and found["by_position"]]
        if not rows or name in ("past, T = 2", "past, T = 4"):
            continue
        size = rows[0][1]["first"] if len(rows[0]) > 1 else 0
        where = [place["first"] + size / 2 for place in rows[0]]
        bits = [statistics.mean(row[n]["nats_per_token"] for row in rows) / math.log(2) for n in range(len(where))]
        axes.plot(where, bits, marker="o", markersize=3, label=name)
    axes.set_xlabel("position in the text [tokens]")
    axes.set_ylabel("bits per token")
    axes.grid(alpha=0.3)
    canvas.legend(loc="outside lower center", ncols=2, fontsize="small")
    canvas.savefig(path, dpi=150)


def main() -> None:
    own, _, options = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a corpus, as --data of ltm_pyro.train")
    parser.add_argument("--out", type=Path, default=Path("thinking"), help="folder of the runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="slow steps of each model")
    parser.add_argument("--optimizer", default="muon", choices=list(OPTIMIZERS))
    parser.add_argument("--block-size", type=int, default=128, help="tokens of a block")
    parser.add_argument("--window", type=int, help="the window of the model with a longer memory")
    parser.add_argument("--num-sequences", type=int, default=64, help="held-out sequences that are scored")
    chosen = parser.parse_args(own.split())
    chosen.out.mkdir(parents=True, exist_ok=True)
    given = [*OPTIMIZERS[chosen.optimizer], "--data", chosen.data, *options.split()]
    records = []
    for seed in chosen.seeds:
        records += figures_of(seed, chosen, given)
        (chosen.out / "thinking.json").write_text(json.dumps(records, indent=1))
        command = f"`python benchmarks/thinking.py {' '.join(sys.argv[1:])}`"
        text = f"{command}\n\n{machine(torch.device('cpu'))}\n\n{table(records)}\n"
        (chosen.out / "thinking.md").write_text(text)
        plot(records, chosen.out / "by-position.png")
    print(text)


if __name__ == "__main__":
    main()
