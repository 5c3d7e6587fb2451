"""Figures of trained models that can be trusted: python -m ltm_pyro.evaluate RUN [RUN ...]

Every figure says what it is: an upper bound on -log p(x), the length of a code, exact, or (`reused-noise`, kept to
reproduce published figures) not valid. docs/metrics.md explains them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from tqdm import tqdm

from ltm_pyro import cli
from ltm_pyro.config import NO_INFERENCE, InferenceName, TrainConfig
from ltm_pyro.data import CORPORA, PACKING
from ltm_pyro.errors import InputError
from ltm_pyro.evaluation import figures, operations, report
from ltm_pyro.evaluation.certificate import certify
from ltm_pyro.evaluation.estimators import ESTIMATORS, EstimatorSettings, of_models
from ltm_pyro.evaluation.inferred import Inference, inferences_of
from ltm_pyro.evaluation.report import Row, ScoredRun
from ltm_pyro.files.numbering import free_path
from ltm_pyro.inference import SequenceNoise
from ltm_pyro.models import TokenBatch
from ltm_pyro.runs.trained import load, num_validation_sequences, texts_to_score

WITH_Z = of_models(with_z=True)
"""The figures to choose from; a model without z has only one."""

if TYPE_CHECKING:
    EstimatorName = str
else:
    EstimatorName = Literal[tuple(WITH_Z)]


@dataclass(frozen=True)
class EvaluateConfig:
    """Score held-out text with trained models, by figures that say what they are and whether they are valid."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")] = ()
    """Folders of runs; demo is the model that comes with the package.
    Differences are taken from the same figure of the first."""
    data: Annotated[
        str | None,
        cli.choices("Text to score. By default it is what the run has held out of its own corpus.", CORPORA),
    ] = None
    text_column: str = "text"
    """Column that holds the text (.jsonl, .parquet, Hugging Face)."""
    inference: tuple[InferenceName, ...] = ()
    """How z is inferred; several are compared. none: z from the prior.
    Default: as the run was trained."""
    fast_steps: tuple[int, ...] = ()
    """Steps of inference (T). Several give a scaling curve, and a plot of it.
    Default: as the run was trained."""
    estimators: Annotated[
        tuple[EstimatorName, ...] | None,
        cli.choices(
            "Figures for -log p(x). Default: elbo, iwae and prequential; for a run that was trained with --infer-from "
            "past, prequential alone, as its z is no summary of a whole text.",
            WITH_Z,
        ),
    ] = None
    certify: int = 0
    """Texts to draw from the model, on which -log p(x) is bounded from both sides. 0: none.
    Costs twice as much as ais."""
    settings: Annotated[EstimatorSettings, tyro.conf.arg(name="")] = field(default_factory=EstimatorSettings)
    length: int | None = None
    """Tokens of a sequence that the text is cut into. Default: as in training.
    In a longer one, z has more of the text to be inferred from. It makes no difference to --certify."""
    num_sequences: int = 64
    """Sequences to score, drawn from all of the text, the same ones every time. 0: all.
    Of the run's own held-out text, those that validation used in training are left out (not with another --length)."""
    batch_size: int = 16
    """Sequences that are scored together. Figures do not depend on it; the texts that --certify draws do."""
    seed: int = 0
    """Seed of all draws."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""
    json: str | None = None
    """File for all figures, replaced where it exists."""
    plot: str | None = None
    """File for the plot over --fast-steps (.png), replaced where it exists.
    Default, for several of them: fast-steps.png in the folder of the first run, numbered if that exists."""


def parse(args: Sequence[str]) -> EvaluateConfig:
    """The settings.

    Raises:
        InputError: if they cannot be used.
    """
    if any(arg.partition("=")[0] == "--task" for arg in args):
        raise InputError("tasks have a separate command: python -m ltm_pyro.tasks TASK RUN [RUN ...]")
    config = cli.parse(EvaluateConfig(), args, "evaluate")
    if not config.runs:
        raise InputError("give at least one RUN, a folder that python -m ltm_pyro.train has written")
    cli.require_at_least(config, batch_size=1, num_sequences=0, certify=0)
    cli.require_seed(config.seed)
    if any(steps < 0 for steps in config.fast_steps):
        raise InputError("--fast-steps must not be negative")
    if config.estimators == ():
        raise InputError(f"give at least one of --estimators {' '.join(WITH_Z)}")
    if config.length is not None:
        cli.require_at_least(config, length=1)
    if config.plot is not None and not config.plot.endswith(".png"):
        raise InputError(f"--plot {config.plot} must end in .png")
    cli.require_file_path("--json", config.json)
    cli.require_file_path("--plot", config.plot)
    return config


def load_run(path: str, config: EvaluateConfig, device: torch.device) -> ScoredRun:
    """The model of a run and the text to score with it.

    Raises:
        InputError: if there is no such run, or its text cannot be read.
    """
    trained = load(path, device)
    length = config.length or trained.config.model.length
    if (config.settings.block_size or 0) > length:
        raise InputError(f"--block-size {config.settings.block_size} is more than the {length} tokens of a sequence")
    texts = texts_to_score(trained, config.data, config.text_column)
    packed = PACKING[trained.config.packing](texts.documents, trained.tokenizer, length)
    return ScoredRun(trained, texts, packed, num_validation_sequences(trained, config.data, length))


def default_estimators(config: TrainConfig) -> tuple[str, ...]:
    """The figures of a run where none are asked for."""
    return ("elbo", "iwae", "prequential") if config.objective.block_size is None else ("prequential",)


def score(run: ScoredRun, inference: Inference, config: EvaluateConfig) -> list[Row]:
    """The figures of a run with z inferred in one way."""
    trained, packed = run.trained, run.packed
    chosen = figures.chosen_sequences(len(packed), config.num_sequences or len(packed), run.num_validation)

    def batches() -> Iterator[TokenBatch]:
        title = f"{trained.path.name}, {inference.z_from}, T = {inference.scheme.num_steps}"
        parts = [chosen[start : start + config.batch_size] for start in range(0, len(chosen), config.batch_size)]
        for part in tqdm(parts, desc=title, unit="batch", disable=not sys.stderr.isatty(), leave=False):
            yield packed.batch(part).to(trained.device)

    scored = figures.score(
        trained.model,
        batches(),
        packed.document_ids,
        config.estimators or default_estimators(trained.config),
        inference,
        config.settings,
        SequenceNoise(config.seed),
    )
    rows = []
    for figure in scored:
        estimator = ESTIMATORS[figure.estimator]
        cost = operations.of_estimate(trained.model, estimator, inference, config.settings, config.length)
        rows.append(Row(run, figure, inference.name, cost, run.pairing(len(chosen))))
    return rows


def main(args: Sequence[str]) -> int:
    config = parse(args)
    device = cli.pick_device(config.device)
    loaded = [load_run(path, config, device) for path in config.runs]
    # For all runs before the first is scored: one may not have what is asked for.
    plan = [(run, inferences_of(run.trained.config, config.inference, config.fast_steps)) for run in loaded]
    rows: list[Row] = []
    certificates: list[dict[str, Any]] = []
    with cli.numerics_of_commands():
        try:
            for run, ways in plan:
                for inference in ways:
                    rows += (new := score(run, inference, config))
                    save(config, rows, certificates)
                    if not sys.stdout.isatty():
                        for row in new:
                            print(f"{row.run.name}: {row.figure}", flush=True)
                    if config.certify and run.trained.config.inference != NO_INFERENCE:
                        certificates.append(certified(run, inference, config))
                        save(config, rows, certificates)
        finally:
            # Also after Ctrl-C: the figures that are finished are not lost.
            if rows:
                report.print_report(rows, certificates)
    if config.plot or len(set(config.fast_steps)) > 1:
        path = config.plot or free_path(loaded[0].trained.results, "fast-steps", ".png")
        report.plot(rows, path)
        print(f"\nplot: {path}")
    if config.json:
        print(f"\nall figures: {config.json}")
    return 0


def certified(run: ScoredRun, inference: Inference, config: EvaluateConfig) -> dict[str, Any]:
    """Both sides of -log p(x) on texts from the model."""
    certificate = certify(run.trained.model, inference, config.settings, config.certify, config.batch_size, config.seed)
    names = {"run": run.name, "inference": inference.name, "fast_steps": inference.scheme.num_steps}
    return names | certificate.record()


def save(config: EvaluateConfig, rows: list[Row], certificates: list[dict[str, Any]]) -> None:
    """Write the JSON file, if one is asked for."""
    if config.json:
        report.write_json(config.json, dataclasses.asdict(config), rows, certificates)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
