"""Figures of trained models that can be trusted: python -m ltm_pyro.evaluate RUN [RUN ...]

Every figure says what it is: an upper bound on -log p(x), the length of a code, exact, or (`reused-noise`, kept to
reproduce published figures) not valid. docs/metrics.md explains them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from tqdm import tqdm

from ltm_pyro import cli
from ltm_pyro.config import NO_INFERENCE, InferenceName, SchemeSettings, TrainConfig, parse_naming_schemes
from ltm_pyro.data import CORPORA, PACKING
from ltm_pyro.errors import InputError
from ltm_pyro.evaluation import figures, operations, report
from ltm_pyro.evaluation.certificate import certify
from ltm_pyro.evaluation.estimators import ESTIMATORS, EstimatorSettings, of_models
from ltm_pyro.evaluation.inferred import Inference, inferences_of
from ltm_pyro.evaluation.plots import style
from ltm_pyro.evaluation.plots.fast_steps import fast_steps_plot
from ltm_pyro.evaluation.report import Row, ScoredRun
from ltm_pyro.files.numbering import free_path
from ltm_pyro.files.output import Output
from ltm_pyro.inference import SequenceNoise
from ltm_pyro.models import TokenBatch
from ltm_pyro.runs.trained import load, num_validation_sequences, texts_to_score

WITH_Z = of_models(with_z=True)
"""The figures to choose from; a model without z has only one."""

if TYPE_CHECKING:
    EstimatorName = str
else:
    EstimatorName = Literal[tuple(WITH_Z)]


COMMON = (
    "runs",
    "data",
    "inference",
    "fast_steps",
    "estimators",
    "length",
    "num_sequences",
    "json",
    "plot",
)
"""The settings that `--help` explains."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Score held-out text with trained models, by figures that say what they are."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")] = ()
    """Folders of runs; demo is the model that comes with the package.
    Differences are taken from the same figure of the first."""
    data: Annotated[
        str | None,
        cli.choices("Text to score. By default it is what the run has held out of its own corpus.", CORPORA),
    ] = None
    text_column: str | None = None
    """Column that holds the text, in files and data sets with columns. Default: text, or a benchmark set's own."""
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
    which: str = "newest"
    """Checkpoint of a run: newest, best (by the validations in training), or the number of a step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""
    json: str | None = None
    """File for all figures, replaced where it exists; - for standard output, where nothing else is printed then."""
    plot: str | None = None
    """File for the plot over --fast-steps (.png, .pdf or .svg), replaced where it exists.
    Default, for several of them: fast-steps.png in the folder of the first run, numbered if that exists."""


def parse(args: Sequence[str]) -> tuple[EvaluateConfig, SchemeSettings]:
    """The settings, and those of schemes.

    Raises:
        InputError: if they cannot be used.
    """
    if any(arg.partition("=")[0] == "--task" for arg in args):
        raise InputError("tasks have a separate command: python -m ltm_pyro.tasks TASK RUN [RUN ...]")
    config, settings = parse_naming_schemes(EvaluateConfig(), args, "evaluate", COMMON)
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
    if config.plot is not None and _plot_format(config.plot) not in style.FORMATS:
        raise InputError(f"--plot {config.plot} must end in {', '.join(f'.{name}' for name in style.FORMATS)}")
    return config, settings


def _plot_format(path: str) -> str:
    return Path(path).suffix.lower().removeprefix(".")


def load_run(
    path: str, config: EvaluateConfig, device: torch.device, settings: SchemeSettings | None = None
) -> ScoredRun:
    """The model of a run and the text to score with it.

    Args:
        settings: settings of schemes that take the place of the run's.

    Raises:
        InputError: if there is no such run, or its text cannot be read.
    """
    trained = load(path, device, config.which).with_settings(settings or {})
    length = config.length or trained.config.model.length
    if (config.settings.block_size or 0) > length:
        raise InputError(f"--block-size {config.settings.block_size} is more than the {length} tokens of a sequence")
    texts = texts_to_score(trained, config.data, config.text_column)
    packed = PACKING[trained.config.packing](texts.documents, trained.tokenizer, length)
    return ScoredRun(trained, texts, packed, num_validation_sequences(trained, texts, length))


def refuse_what_does_nothing(config: EvaluateConfig, runs: Sequence[TrainConfig]) -> None:
    """Check that every option has something to act on.

    Raises:
        InputError: if one has nothing.
    """
    with_z = [run for run in runs if run.inference != NO_INFERENCE]
    for option in ("inference", "fast_steps", "estimators", "certify"):
        if getattr(config, option) and not with_z:
            flag = option.replace("_", "-")
            raise InputError(f"--{flag}: there is no z to infer in {' '.join(config.runs)}; leave it out")
    chosen = config.estimators or [name for run in with_z for name in default_estimators(run)]
    used = {setting for name in [*chosen, *(["ais"] if config.certify else [])] for setting in ESTIMATORS[name].uses}
    for setting, value in vars(config.settings).items():
        if value != getattr(EstimatorSettings(), setting) and setting not in used:
            of = ", ".join(name for name, estimator in ESTIMATORS.items() if setting in estimator.uses)
            raise InputError(f"--{setting.replace('_', '-')} is a setting of {of}, which is not among --estimators")


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
    rows, num_words = [], packed.num_words(chosen)
    for figure in scored:
        estimator = ESTIMATORS[figure.estimator]
        cost = operations.of_estimate(trained.model, estimator, inference, config.settings, config.length)
        rows.append(Row(run, figure, inference.name, cost, run.pairing(len(chosen)), num_words))
    return rows


def main(args: Sequence[str]) -> int:
    config, settings = parse(args)
    json = Output("--json", config.json) if config.json else None
    device = cli.pick_device(config.device)
    loaded = [load_run(path, config, device, settings) for path in config.runs]
    # For all runs before the first is scored: one may not have what is asked for.
    refuse_what_does_nothing(config, [run.trained.config for run in loaded])
    plan = [(run, inferences_of(run.trained.config, config.inference, config.fast_steps)) for run in loaded]
    plot_path = config.plot
    if plot_path is None and len(set(config.fast_steps)) > 1:
        plot_path = str(free_path(loaded[0].trained.results, "fast-steps", ".png"))
    plot = Output("--plot", plot_path) if plot_path else None
    rows: list[Row] = []
    certificates: list[dict[str, Any]] = []

    def contents() -> bytes:
        return report.figures_json(dataclasses.asdict(config), rows, certificates)

    with cli.numerics_of_commands(), cli.result_alone(json):
        try:
            for run, ways in plan:
                for inference in ways:
                    rows += (new := score(run, inference, config))
                    if json:
                        json.update(contents())
                    if not sys.stdout.isatty():
                        for row in new:
                            print(f"{row.run.name}: {row.figure}", flush=True)
                    if config.certify and run.trained.config.inference != NO_INFERENCE:
                        certificates.append(certified(run, inference, config))
            if plot:
                plot.finish(style.image(fast_steps_plot(rows), _plot_format(plot.path)))
        finally:
            # Also after Ctrl-C: the figures that are finished are not lost. In files before they are printed, as a
            # reader of what is printed may go away.
            try:
                if rows and json:
                    json.finish(contents())
            finally:
                if rows:
                    report.print_report(rows, certificates)
        if json:
            print(f"\nall figures: {config.json}")
        if plot:
            print(f"\nplot: {plot.path}")
    return 0


def certified(run: ScoredRun, inference: Inference, config: EvaluateConfig) -> dict[str, Any]:
    """Both sides of -log p(x) on texts from the model."""
    certificate = certify(run.trained.model, inference, config.settings, config.certify, config.batch_size, config.seed)
    names = {"run": run.name, "inference": inference.name, "fast_steps": inference.scheme.num_steps}
    return names | certificate.record()


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
