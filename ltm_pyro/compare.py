"""Posteriors of one model by several schemes, side by side: python -m ltm_pyro.compare RUN --inference vi map mala

Every scheme infers z of the same texts, and none may spend more gradient evaluations than another.
"""

from __future__ import annotations

import bisect
import dataclasses
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from ltm_pyro import cli
from ltm_pyro.config import NO_INFERENCE, SchemeSettings, parse_naming_schemes
from ltm_pyro.data import PACKING
from ltm_pyro.errors import InputError
from ltm_pyro.evaluation import comparison, figures
from ltm_pyro.evaluation.comparison import Comparison, kl_per_slot
from ltm_pyro.evaluation.estimators import ESTIMATORS, EstimatorSettings
from ltm_pyro.evaluation.figures import Figure
from ltm_pyro.evaluation.inferred import Inference, Inferred, inference_of
from ltm_pyro.evaluation.plots import style
from ltm_pyro.evaluation.plots.comparison import plots
from ltm_pyro.files import durable, strict_json
from ltm_pyro.files.numbering import create_folder
from ltm_pyro.inference import COMPARED_SCHEMES, SCHEMES, SequenceNoise, StepInfo, infer
from ltm_pyro.inference.diagnostics import diverged, mixing
from ltm_pyro.inference.export import evaluate_draws, to_arviz
from ltm_pyro.models import LatentThoughtModel, TokenBatch
from ltm_pyro.runs.run import check_is_free
from ltm_pyro.runs.trained import load, num_validation_sequences, texts_to_score
from ltm_pyro.training.progress import time_text

if TYPE_CHECKING:
    SchemeName = str
else:
    SchemeName = Literal[tuple(SCHEMES)]

SAMPLES_OF_CURVE = 16
"""Draws of z for the bounds at smaller budgets, which are drawn as a curve."""


COMMON = (
    "run",
    "inference",
    "gradients",
    "data",
    "num_sequences",
    "plot_format",
    "out",
)
"""The settings that `--help` explains."""


@dataclass(frozen=True)
class CompareConfig:
    """Infer z of the same texts by several schemes at the same cost, and compare.

    It writes a table of bounds, costs and mixing, plots, and the draws for ArviZ.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ""
    """Folder of a run; or demo, the model that comes with the package."""
    inference: Annotated[
        tuple[SchemeName, ...],
        cli.choices(
            "Schemes to compare, each with the run's settings for it. The plots compare the others with the first.",
            SCHEMES,
        ),
    ] = COMPARED_SCHEMES
    gradients: int = 256
    """The largest number of gradient evaluations for a sequence, all its chains together.
    A scheme without a density takes 16 more, to fit a Gaussian around its point or draws.
    Its bound, KL and k-hat are those of that Gaussian."""
    num_chains: int = 4
    """Chains of the schemes that sample, at least two, as R-hat needs. The second half of each is kept."""
    num_samples: int = 64
    """Draws of z for the bound and for k-hat. As many are written, if q has a density."""
    data: str | None = None
    """The texts, as in evaluate. Default: what the run has held out of its own corpus."""
    text_column: str | None = None
    """Column that holds the text, in files and data sets with columns. Default: text, or a benchmark set's own."""
    num_sequences: int = 4
    """Sequences to infer z of, drawn from all of the text, the same ones every time."""
    seed: int = 0
    """Seed of all draws."""
    which: str = "newest"
    """Checkpoint of a run: newest, best (by the validations in training), or the number of a step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""
    plot_format: Literal["png", "pdf", "svg"] = "png"
    """Format of the plots."""
    out: str | None = None
    """Folder for the table, the draws and the plots. Default: RUN/comparison, numbered if that exists."""


def parse(args: Sequence[str]) -> tuple[CompareConfig, SchemeSettings]:
    """The settings, and those of schemes.

    Raises:
        InputError: if they cannot be used.
    """
    config, settings = parse_naming_schemes(CompareConfig(), args, "compare", COMMON)
    if not config.run:
        raise InputError("give the folder of a RUN that python -m ltm_pyro.train has written")
    if not config.inference:
        raise InputError(f"give at least one of --inference {' '.join(SCHEMES)}")
    if config.num_chains < 2:
        raise InputError(f"--num-chains must be at least 2, not {config.num_chains}: R̂ needs two chains")
    cli.require_at_least(config, num_samples=2, num_sequences=1, gradients=1)
    cli.require_seed(config.seed)
    if config.out is not None:
        check_is_free(config.out)
    for name, given in settings.items():
        if "num_chains" in given:
            raise InputError(f"--{name}.num-chains: all schemes of chains have the same number here; give --num-chains")
    return config, settings


def within_budget(inference: Inference, config: CompareConfig) -> Inference:
    """The scheme with as many steps as the gradient evaluations allow.

    Raises:
        InputError: if not even one step is allowed.
    """
    if inference.scheme.has_chains:
        inference = inference.with_settings(num_chains=config.num_chains)

    def needed(num_steps: int) -> int:
        return inference.with_settings(num_steps=num_steps).scheme.num_gradients

    num_steps = bisect.bisect_right(range(1, config.gradients + 1), config.gradients, key=needed)
    if num_steps < 1:
        raise InputError(
            f"--gradients {config.gradients} is too few for {inference.name}, whose first step takes {needed(1)}"
        )
    inference = inference.with_settings(num_steps=num_steps)
    return inference.with_settings(num_kept=num_steps - num_steps // 2) if inference.scheme.has_chains else inference


def at_smaller_budgets(inference: Inference, config: CompareConfig) -> list[Inference]:
    """The scheme with a half, a quarter, … of the gradient evaluations, down to its first step; the fewest first."""
    found: list[Inference] = []
    for halvings in range(1, config.gradients.bit_length()):
        try:
            smaller = dataclasses.replace(config, gradients=config.gradients >> halvings)
            found.insert(0, within_budget(inference, smaller))
        except InputError:
            break
    return found


def noise_of(name: str, seed: int) -> SequenceNoise:
    """The noise of a scheme, the same whatever it is compared with; shared noise would make schemes agree."""
    return SequenceNoise(int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0]))


def compared(
    inference: Inference, model: LatentThoughtModel, batch: TokenBatch, document_ids: Tensor, config: CompareConfig
) -> Comparison:
    """Infer z of the texts by one scheme, and look at the posteriors.

    For the curve it is run again at every smaller budget: where step sizes or the warm-up depend on the number of
    steps, a state in the middle of a long run is not what a short run gives.
    """
    scheme, rng = inference.scheme, noise_of(inference.name, config.seed)
    objectives: list[Tensor] = []
    acceptances: list[Tensor] = []

    def watch(state: Any, info: StepInfo | None) -> None:
        if info is not None:
            objectives.append(info.objective)
        if info is not None and info.acceptance is not None:
            acceptances.append(info.acceptance)

    def figure(name: str, inferred: Inferred, num_samples: int) -> Figure:
        found = Figure(name, inferred.inference.scheme.num_steps)
        found.add(ESTIMATORS[name].estimate(inferred, EstimatorSettings(num_samples)), batch, document_ids)
        return found

    def point(at: Inference, bound: Figure) -> tuple[int, float, float | None]:
        record = bound.record()
        gradients = at.scheme.num_gradients + gaussian_gradients
        return gradients, bound.nats / bound.num_tokens, record["monte_carlo_standard_error"]

    gaussian_gradients = 0 if scheme.has_density else inference.gaussian.num_gradients
    # Before the time is taken: what runs first pays for what torch does once.
    curve = []
    for smaller in at_smaller_budgets(inference, config):
        curve.append(point(smaller, figure("elbo", Inferred(model, batch, smaller, rng), SAMPLES_OF_CURVE)))
    started = time.perf_counter()
    state = infer(scheme, model, batch, rng, watch=watch)
    seconds = time.perf_counter() - started
    num_draws = config.num_samples if scheme.num_draws is None else scheme.num_draws
    posterior = scheme.posterior(state, num_draws, rng)
    inferred = Inferred(model, batch, inference, rng, state)
    terms = evaluate_draws(posterior, model, batch)
    bound = figure("elbo", inferred, config.num_samples)
    weights = figure("iwae", inferred, config.num_samples)
    if scheme.has_chains:
        bound.num_diverged = int(diverged(posterior, terms, model, batch, rng).sum())
        weights.num_diverged = bound.num_diverged
    return Comparison(
        name=inference.name,
        num_gradients=scheme.num_gradients,
        gaussian_gradients=gaussian_gradients,
        seconds=seconds,
        bound=bound,
        weights=weights,
        posterior=posterior,
        q=inferred.q() if scheme.has_density else None,
        terms=terms,
        has_chains=scheme.has_chains,
        # Numbers of a chain that has diverged are too large for sums of their squares.
        mixing=mixing(posterior) if scheme.has_chains and not bound.num_diverged else None,
        acceptance=torch.stack(acceptances[len(acceptances) // 2 :]).mean().item() if acceptances else None,
        objective="-ELBO" if scheme.has_density else "-log p(x, z)",
        objectives=(torch.stack(objectives) / batch.weights.sum(1)).cpu(),
        curve=[*curve, point(inference, bound)],
        kl_per_slot=kl_per_slot(inferred, config.num_samples),
    )


def write(results: list[Comparison], out: Path, plot_format: str) -> None:
    """Write `comparison.json` and the plots into the folder."""
    records = strict_json.dumps([result.record() for result in results], indent=2)
    durable.write(out / "comparison.json", f"{records}\n".encode())
    with np.errstate(over="ignore", invalid="ignore"):  # in numbers of chains that have diverged
        for name, canvas in plots(results).items():
            durable.write(out / f"{name}.{plot_format}", style.image(canvas, plot_format))


def main(args: Sequence[str]) -> int:
    config, settings = parse(args)
    device = cli.pick_device(config.device)
    trained = load(config.run, device, config.which).with_settings(settings)
    if trained.config.inference == NO_INFERENCE:
        raise InputError(f"{config.run} is a model without z: there is no posterior to compare")
    names = dict.fromkeys(config.inference)
    inferences = [within_budget(inference_of(trained.config, name), config) for name in names]
    texts = texts_to_score(trained, config.data, config.text_column)
    packed = PACKING[trained.config.packing](texts.documents, trained.tokenizer, trained.config.model.length)
    num_validation = num_validation_sequences(trained, texts, trained.config.model.length)
    chosen = figures.chosen_sequences(len(packed), config.num_sequences, num_validation)
    batch, document_ids = packed.batch(chosen).to(device), packed.document_ids[torch.from_numpy(chosen)]
    written, observed = trained.texts(batch), {"tokens": batch.tokens.cpu().numpy()}
    out = create_folder(config.out, trained.results, "comparison")
    results: list[Comparison] = []
    if trained.config.objective.block_size is not None:
        print(
            f"{config.run} was trained to infer z block by block (--infer-from past). Here z is inferred from whole "
            "pieces at once: its bounds are no measure of that model."
        )
    with cli.numerics_of_commands():
        try:
            for inference in tqdm(inferences, unit="scheme", disable=not sys.stderr.isatty(), leave=False):
                started = time.perf_counter()
                result = compared(inference, trained.model, batch, document_ids, config)
                draws = to_arviz(result.posterior, result.terms, written, observed, result.q)
                (out / inference.name).mkdir()
                draws.to_netcdf(str(out / inference.name / "posterior.nc"))
                results.append(result)
                if not sys.stdout.isatty():
                    all_in_all = time.perf_counter() - started
                    print(
                        f"{result.name}: {time_text(result.seconds)} of inference, {time_text(all_in_all)} with "
                        "shorter runs, bounds and draws",
                        flush=True,
                    )
        finally:
            # Also after Ctrl-C: what is finished is not lost.
            if results:
                print(f"{config.run} on {texts.name}: {len(batch)} pieces, {result.bound.num_tokens:,} tokens")
                write(results, out, config.plot_format)  # first, as a reader of the table may go away
                comparison.print_table(results)
                print(f"\ntable, plots, and draws (NAME/posterior.nc, for ArviZ): {out}")
            elif not any(out.iterdir()):
                out.rmdir()
    return 0


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
