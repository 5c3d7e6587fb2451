"""Measure whether thinking helps: code lengths of held-out text with z of the past, against the same network without.

    python benchmarks/thinking.py --data DATA [--out FOLDER] [--seeds 0 1 2] [--steps N] [-- OPTIONS OF TRAIN]

For each seed, two models are trained on the same batches:

- "no z": the decoder without z, an autoregressive model with the same window;
- "past": the same network, with z of each block inferred from the blocks before it (--infer-from past --inference map).
  z is a change of weights (--model.thoughts fast-weights), and 0 at its start: held there, the two are one network.

Both are scored on the same held-out sequences: "no z" by its exact -log p(x), "past" by the length of the code that
predicts each block with z of the blocks before it, also with other numbers of fast steps than in training. Differences
are paired over documents, and ± is their standard error over documents. Runs that are finished are not trained again.
The table goes to FOLDER/thinking.md, and all figures of a seed to FOLDER/seed-N.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from timing import machine

from ltm_pyro import evaluate, train
from ltm_pyro.runs.run import Run

MODELS = {
    "no z": ["--inference", "none"],
    "past": [
        *("--infer-from", "past", "--inference", "map"),
        *("--model.thoughts", "fast-weights", "--model.num-slots", "344", "--model.prior", "scaled"),
    ],
}
SHAPE = ["--model.window", "16", "--model.length", "2048", "--batch-size", "4"]
"""The reach of the decoder (46 tokens) is far shorter than a sequence, so that z has something to remember."""


def trained(out: Path, model: str, seed: int, options: list[str]) -> str:
    """The folder of a run of the model, which is trained if there is none."""
    folder = out / f"{model.replace(' ', '-')}-{seed}"
    if not (folder / "config.yaml").exists():
        train.main([*SHAPE, *MODELS[model], "--seed", str(seed), *options, "--out", str(folder)])
    config, _ = Run(folder).read_config()
    if not any(record.get("split") == "report" for record in Run(folder).read_metrics()):
        train.main(["--out", str(folder), "--resume", "--steps", str(config.steps)])
    return str(folder)


def scored(out: Path, seed: int, folders: dict[str, str], num_sequences: int) -> dict[str, dict[str, Any]]:
    """The figures of a seed's models by name, that of "past" for several numbers of fast steps."""
    path = out / f"seed-{seed}.json"
    common = ["--estimators", "prequential", "--num-sequences", str(num_sequences), "--json", str(path)]
    plot = ["--plot", str(out / f"seed-{seed}.png")]
    status = evaluate.main([*folders.values(), "--fast-steps", "0", "1", "2", *common, *plot])
    assert status == 0
    found = {}
    for figure in json.loads(path.read_text())["figures"]:
        model = next(name for name, folder in folders.items() if folder == figure["run"])
        found[model if model == "no z" else f"{model}, T = {figure['fast_steps']}"] = figure
    return found


def table(by_seed: dict[int, dict[str, dict[str, Any]]]) -> str:
    """Bits per byte of each model, and the difference from "no z": for each seed, and the mean over seeds."""
    seeds = list(by_seed)
    lines = [
        '| model | bits/byte | less "no z", mean over seeds | ' + " | ".join(f"seed {seed}" for seed in seeds) + " |",
        "|---|---|---|" + "---|" * len(seeds),
    ]
    for name in by_seed[seeds[0]]:
        figures = [by_seed[seed][name] for seed in seeds]
        bits = statistics.mean(figure["bits_per_byte"] for figure in figures)
        gains = [figure["difference_bits_per_byte"] for figure in figures]
        cells = [_gain(figure) for figure in figures]
        mean = "" if None in gains else f"{statistics.mean(gains):+.4f}"
        lines.append(f"| {name} | {bits:.4f} | {mean} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gain(figure: dict[str, Any]) -> str:
    gain, error = figure["difference_bits_per_byte"], figure["difference_standard_error"]
    if gain is None:
        return ""
    return f"{gain:+.4f}" if error is None else f"{gain:+.4f} ± {error:.4f}"


def main() -> None:
    own, _, options = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a corpus, as --data of ltm_pyro.train")
    parser.add_argument("--out", type=Path, default=Path("thinking"), help="folder of the runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000, help="slow steps of each model")
    parser.add_argument("--num-sequences", type=int, default=64, help="held-out sequences that are scored")
    chosen = parser.parse_args(own.split())
    given = ["--data", chosen.data, "--steps", str(chosen.steps), *options.split()]
    chosen.out.mkdir(parents=True, exist_ok=True)
    by_seed = {}
    for seed in chosen.seeds:
        folders = {model: trained(chosen.out, model, seed, given) for model in MODELS}
        by_seed[seed] = scored(chosen.out, seed, folders, chosen.num_sequences)
    command = f"`python benchmarks/thinking.py {' '.join(sys.argv[1:])}`"
    text = f"{command}\n\n{machine(torch.device('cpu'))}\n\n{table(by_seed)}\n"
    (chosen.out / "thinking.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
