"""Figures of trained models that can be trusted: python -m ltm_pyro.evaluate RUN [RUN ...]

Every figure says what it is: an upper bound on -log p(x), the length of a code, exact, or (`reused-noise`, kept to
reproduce published figures) not valid. docs/metrics.md explains them.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pyro
import torch
import tyro
from tqdm import tqdm

from ltm_pyro import cli
from ltm_pyro.config import NO_INFERENCE, InferenceName, TrainConfig, scheme_of
from ltm_pyro.data import PACKING, PackedSequences, TokenizedTexts
from ltm_pyro.errors import InputError
from ltm_pyro.evaluation import figures, operations, report
from ltm_pyro.evaluation.certificate import certify
from ltm_pyro.evaluation.estimators import ESTIMATORS, EXACT, EstimatorSettings, Inference, inference_of
from ltm_pyro.evaluation.report import Row, Source
from ltm_pyro.files.numbering import free_path
from ltm_pyro.inference import SequenceNoise
from ltm_pyro.models import TokenBatch
from ltm_pyro.runs.trained import TrainedModel, load, texts_to_score

EstimatorName = Literal[tuple(ESTIMATORS)]  # type: ignore[valid-type]


@dataclass(frozen=True)
class EvaluateConfig:
    """Score held-out text with trained models, by figures that say what they are and whether they are valid."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")] = ()
    """Folders of runs. Differences are taken from the same figure of the first."""
    data: str | None = None
    """Text to score: a file, a folder, a Hugging Face data set, or a set of the field by name
    (ptb, wikitext-2, wikitext-103, lm1b, lambada, ag-news, pubmed, arxiv; NAME=PATH for a local copy).
    Default: what the run has held out of its own corpus."""
    text_column: str = "text"
    """Column that holds the text (.jsonl, .parquet, Hugging Face)."""
    inference: tuple[InferenceName, ...] = ()
    """How z is inferred; several are compared. none: z from the prior.
    Default: as the run was trained."""
    fast_steps: tuple[int, ...] = ()
    """Steps of inference (T). Several give a scaling curve, and a plot of it.
    Default: as the run was trained."""
    estimators: tuple[EstimatorName, ...] = ("elbo", "iwae", "prequential")
    """Figures. elbo: -E log p(x|z) + KL, a bound.
    iwae: importance-weighted, a tighter bound where q is close.
    ais: annealed importance sampling, the tightest bound, some hundred times the cost.
    prequential: every block predicted from the tokens before it, a code length.
    reused-noise: the published figure of this model class, which is NOT a bound."""
    certify: int = 0
    """Texts to draw from the model, on which -log p(x) is bounded from both sides. 0: none.
    Costs as much as ais, twice."""
    settings: Annotated[EstimatorSettings, tyro.conf.arg(name="")] = field(default_factory=EstimatorSettings)
    num_sequences: int = 64
    """Sequences to score, drawn from all of the text, the same ones every time. 0: all."""
    batch_size: int = 16
    """Sequences that are scored together. Figures do not depend on it, but which texts --certify draws does."""
    seed: int = 0
    """Seed of all draws."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""
    json: str | None = None
    """File for all figures, replaced where it exists."""
    plot: str | None = None
    """File for the plot over --fast-steps (.png), replaced where it exists.
    Default, for several of them: fast-steps.png in the folder of the first run, numbered if that exists."""


@dataclass(frozen=True)
class Loaded:
    """A run, ready to be scored."""

    trained: TrainedModel
    texts: TokenizedTexts
    packed: PackedSequences
    source: Source


def parse(args: Sequence[str]) -> EvaluateConfig:
    """The settings.

    Raises:
        InputError: if they cannot be used.
    """
    if any(arg.partition("=")[0] == "--task" for arg in args):
        raise InputError("--task has a command of its own: python -m ltm_pyro.tasks TASK RUN [RUN ...]")
    config = cli.parse(EvaluateConfig(), args, "evaluate")
    if not config.runs:
        raise InputError("give at least one RUN, a folder that python -m ltm_pyro.train has written")
    if config.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, not {config.batch_size}")
    for name in ("num_sequences", "certify", "seed"):
        if getattr(config, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} must not be negative, but is {getattr(config, name)}")
    if config.seed >= 2**32:
        raise InputError(f"--seed must be below 2^32, not {config.seed}")
    if any(steps < 0 for steps in config.fast_steps):
        raise InputError("--fast-steps must not be negative")
    if not config.estimators:
        raise InputError(f"give at least one of --estimators {' '.join(ESTIMATORS)}")
    if config.plot is not None and not config.plot.endswith(".png"):
        raise InputError(f"--plot {config.plot} must end in .png")
    for option in ("json", "plot"):
        path = getattr(config, option)
        if path is not None and (not Path(path).absolute().parent.is_dir() or Path(path).is_dir()):
            raise InputError(f"--{option} {path}: there is no folder for such a file")
    return config


def load_run(path: str, config: EvaluateConfig, device: torch.device) -> Loaded:
    """The model of a run and the text to score with it.

    Raises:
        InputError: if there is no such run, or its text cannot be had.
    """
    trained = load(path, device)
    texts = texts_to_score(trained, config.data, config.text_column)
    length = trained.config.model.length
    if (config.settings.block_size or 0) > length:
        raise InputError(f"--block-size {config.settings.block_size} is more than the {length} tokens of a sequence")
    packed = PACKING[trained.config.packing](texts.documents, trained.tokenizer, length)
    progress = trained.progress
    training = operations.of_training(trained.model, scheme_of(trained.config))
    num_weights = trained.num_weights
    source = Source(
        path, trained.config, num_weights, progress.step, progress.tokens_seen, training, texts.name, texts.sha256
    )
    return Loaded(trained, texts, packed, source)


def inferences(config: EvaluateConfig, trained: TrainConfig) -> list[Inference]:
    """The ways in which z of a run is inferred, each once.

    Raises:
        InputError: if one of them needs what the run does not have.
    """
    if trained.inference == NO_INFERENCE:
        return [Inference.without()]
    names = config.inference or (trained.inference,)
    steps = config.fast_steps or (trained.fast_steps,)
    return list(dict.fromkeys(inference_of(trained, name, number) for name in names for number in steps))


def score(loaded: Loaded, inference: Inference, config: EvaluateConfig) -> list[Row]:
    """The figures of a run with z inferred in one way."""
    model, packed = loaded.trained.model, loaded.packed
    chosen = figures.chosen_sequences(len(packed), config.num_sequences or len(packed))
    device = model.decoder.embedding.weight.device

    def batches() -> Iterator[TokenBatch]:
        title = f"{Path(loaded.source.run).name}, {inference.posterior}, T = {inference.scheme.num_steps}"
        parts = [chosen[start : start + config.batch_size] for start in range(0, len(chosen), config.batch_size)]
        for part in tqdm(parts, desc=title, unit="batch", disable=not sys.stderr.isatty(), leave=False):
            yield packed.batch(part).to(device)

    rng = SequenceNoise(config.seed)
    scored = figures.score(model, batches(), packed.document_ids, config.estimators, inference, config.settings, rng)
    trained = loaded.trained.config
    pairing = (loaded.texts.sha256, trained.tokenizer, trained.packing, trained.model.length, len(chosen))
    rows = []
    for figure in scored:
        estimator = ESTIMATORS.get(figure.estimator, EXACT)
        cost = operations.of_estimate(model, estimator, inference, config.settings)
        rows.append(Row(loaded.source, figure, inference.name, cost, pairing))
    return rows


def main(args: Sequence[str]) -> int:
    config = parse(args)
    device = cli.pick_device(config.device)
    loaded = [load_run(path, config, device) for path in config.runs]
    # Of all runs before the first is scored: one may not have what is asked for.
    plan = [(run, inferences(config, run.trained.config)) for run in loaded]
    rows: list[Row] = []
    certificates: list[dict[str, Any]] = []
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered NaN")  # such steps are left out
        try:
            for run, ways in plan:
                for inference in ways:
                    rows += (new := score(run, inference, config))
                    save(config, rows, certificates)
                    if not sys.stdout.isatty():
                        for row in new:
                            print(f"{row.source.run}: {row.figure}", flush=True)
                    if config.certify and run.trained.config.inference != NO_INFERENCE:
                        certificates.append(certified(run, inference, config))
                        save(config, rows, certificates)
        finally:
            # Also after Ctrl-C: the figures that are finished are not lost.
            if rows:
                report.print_report(rows, certificates)
    if config.plot or len(set(config.fast_steps)) > 1:
        path = config.plot or free_path(Path(config.runs[0]), "fast-steps", ".png")
        report.plot(rows, path)
        print(f"\nplot: {path}")
    if config.json:
        print(f"\nall figures: {config.json}")
    return 0


def certified(run: Loaded, inference: Inference, config: EvaluateConfig) -> dict[str, Any]:
    """Both sides of -log p(x) on texts from the model."""
    certificate = certify(run.trained.model, inference, config.settings, config.certify, config.batch_size, config.seed)
    names = {"run": run.source.run, "inference": inference.name, "fast_steps": inference.scheme.num_steps}
    return names | certificate.record()


def save(config: EvaluateConfig, rows: list[Row], certificates: list[dict[str, Any]]) -> None:
    """Write the JSON file, if one is asked for."""
    if config.json:
        report.write_json(config.json, dataclasses.asdict(config), rows, certificates)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
