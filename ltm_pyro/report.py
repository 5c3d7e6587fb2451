"""A page about runs, with texts coloured by what thinking gains: python -m ltm_pyro.report RUN [RUN ...]

The page is a single HTML file, to be opened in a browser; it needs no network. docs/report.md explains what it shows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

from ltm_pyro import cli, evaluate
from ltm_pyro.data import CORPORA
from ltm_pyro.errors import InputError
from ltm_pyro.evaluation import figures
from ltm_pyro.evaluation.estimators import EstimatorSettings
from ltm_pyro.evaluation.page import RunContent, content_of, render
from ltm_pyro.evaluation.report import ScoredRun
from ltm_pyro.files.output import Output
from ltm_pyro.models import TokenBatch
from ltm_pyro.runs.run import Run


@dataclass(frozen=True)
class ReportConfig:
    """Write a page about trained models: curves, figures, samples, coloured texts."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")] = ()
    """Folders of runs; demo is the model that comes with the package.
    Differences are taken from the same figure of the first."""
    out: str = "report.html"
    """File for the page, replaced where it exists; - for standard output."""
    data: Annotated[
        str | None,
        cli.choices("Text to score. By default it is what the run has held out of its own corpus.", CORPORA),
    ] = None
    text_column: str | None = None
    """Column that holds the text, in files and data sets with columns. Default: text, or a benchmark set's own."""
    num_sequences: int = 8
    """Sequences to score and to show, drawn from all of the text, the same ones every time. 0: all.
    The page grows with them: by about 0.2 MB for 2,048 tokens and a run."""
    num_samples: int = 16
    """Draws of z for each text, or for each block of it. A scheme of points or chains gives all draws that it has."""
    block_size: int | None = None
    """Tokens that are predicted from one inference of z.
    Default: as the run was trained (--infer-from past), else an eighth of a sequence.
    An eighth takes as long as inferring z of 3.5 whole sequences for each."""
    batch_size: int = 16
    """Sequences that are scored together. Figures do not depend on it."""
    seed: int = 0
    """Seed of all draws."""
    which: str = "newest"
    """Checkpoint of a run: newest, best (by the validations in training), or the number of a step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""


def parse(args: Sequence[str]) -> ReportConfig:
    """The settings.

    Raises:
        InputError: if they cannot be used.
    """
    config = cli.parse(ReportConfig(), args, "report")
    if not config.runs:
        raise InputError("give at least one RUN, a folder that python -m ltm_pyro.train has written")
    cli.require_at_least(config, batch_size=1, num_sequences=0, num_samples=1, block_size=1)
    cli.require_seed(config.seed)
    return config


def content(run: ScoredRun, metrics: list[dict[str, Any]], scoring: evaluate.EvaluateConfig) -> RunContent:
    """What the page shows of a run."""
    trained, packed = run.trained, run.packed
    chosen = figures.chosen_sequences(len(packed), scoring.num_sequences or len(packed), run.num_validation)

    def batches() -> Iterator[TokenBatch]:
        parts = [chosen[start : start + scoring.batch_size] for start in range(0, len(chosen), scoring.batch_size)]
        for part in tqdm(parts, desc=trained.path.name, unit="batch", disable=not sys.stderr.isatty(), leave=False):
            yield packed.batch(part).to(trained.device)

    estimators = evaluate.default_estimators(trained.config)
    return content_of(run, metrics, batches(), estimators, scoring.settings, scoring.seed)


def main(args: Sequence[str]) -> int:
    config = parse(args)
    out = Output("--out", config.out)
    device = cli.pick_device(config.device)
    scoring = evaluate.EvaluateConfig(
        data=config.data,
        text_column=config.text_column,
        settings=EstimatorSettings(config.num_samples, config.block_size),
        num_sequences=config.num_sequences,
        batch_size=config.batch_size,
        seed=config.seed,
        which=config.which,
    )
    # All of them before the first is scored: one may not be what it should.
    loaded = [evaluate.load_run(path, scoring, device) for path in config.runs]
    metrics = [Run(run.trained.path).read_metrics() for run in loaded]
    with cli.numerics_of_commands(), cli.result_alone(out):
        contents = [content(run, lines, scoring) for run, lines in zip(loaded, metrics, strict=True)]
        out.finish(render(contents).encode())
        print(f"page: {config.out}")
    return 0


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
