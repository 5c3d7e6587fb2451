"""What an evaluation shows: the table and the JSON file of its figures."""

from __future__ import annotations

import functools
import math
import os
import platform
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch

from ltm_pyro.config import NO_INFERENCE, scheme_of
from ltm_pyro.data import PackedSequences, TokenizedTexts
from ltm_pyro.evaluation import figures, operations
from ltm_pyro.evaluation.estimators import ESTIMATORS, Meaning
from ltm_pyro.evaluation.figures import Figure
from ltm_pyro.files import strict_json
from ltm_pyro.runs.trained import TrainedModel


@dataclass(frozen=True, eq=False)
class ScoredRun:
    """A trained model and the text that it is scored on."""

    trained: TrainedModel
    texts: TokenizedTexts
    packed: PackedSequences
    """The text, cut into the model's sequences."""
    num_validation: int = 0
    """The sequences asked for in validation, which are left out of what is scored; 0 for text that it did not see."""

    @property
    def name(self) -> str:
        """The folder of the run."""
        return self.trained.name

    def pairing(self, num_sequences: int) -> tuple[object, ...]:
        """What is equal for runs whose first so many chosen sequences are the same ones."""
        config = self.trained.config
        return (self.texts.sha256, config.tokenizer, config.packing, self.packed.length, num_sequences)

    @functools.cached_property
    def training_operations_per_token(self) -> float:
        """Operations of training for each token, counted when they are first shown."""
        config = self.trained.config
        return operations.of_training(self.trained.model, scheme_of(config), config.objective)

    @property
    def training_operations(self) -> float:
        """Operations of all training."""
        return self.training_operations_per_token * self.trained.progress.tokens_seen

    def __str__(self) -> str:
        config, progress = self.trained.config, self.trained.progress
        z_from = "no z" if config.inference == NO_INFERENCE else f"{config.inference}, T = {config.fast_steps}"
        return (
            f"{self.name}: {self.trained.num_weights:,} weights, {z_from}; "
            f"{progress.step:,} slow steps on {progress.tokens_seen:,} tokens, "
            f"{in_units(self.training_operations_per_token)} operations a token, "
            f"{in_units(self.training_operations)} in all"
        )


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the table: a figure, and what it cost."""

    run: ScoredRun
    figure: Figure
    inference: str
    """The name of the scheme."""
    operations: float
    """Operations of this figure for each token that is scored."""
    pairing: tuple[object, ...]
    """Equal for figures of the same sequences."""
    num_words: int = 0
    """Words of the text that is scored."""

    @property
    def word_perplexity(self) -> float | None:
        """Perplexity of a word; None where there are no words, or chains have diverged."""
        return None if self.figure.num_diverged else figures.perplexity(self.figure.nats, self.num_words)

    def reference(self, rows: list[Row]) -> Row | None:
        """What differences are taken from: the same figure of the first run, or its exact one, if of the same text.

        None as well where chains of either have diverged.
        """
        alike = (
            row
            for row in rows
            if row.run is rows[0].run
            and (row.estimator == self.estimator or ESTIMATORS[row.estimator].meaning is Meaning.EXACT)
        )
        found = next(alike, None)
        is_comparable = found is not None and found is not self and found.pairing == self.pairing
        are_figures = found is not None and not (found.figure.num_diverged or self.figure.num_diverged)
        return found if is_comparable and are_figures and self.figure.num_bytes else None

    @property
    def estimator(self) -> str:
        """The name of the estimator."""
        return self.figure.estimator

    def record(self, rows: list[Row]) -> dict[str, Any]:
        """The line under the names that docs/metrics.md explains, as one of these rows."""
        run, reference = self.run, self.reference(rows)
        difference, error = figures.difference(self.figure, reference.figure) if reference else (None, None)
        return {
            "run": run.name,
            "inference": self.inference,
            "step": run.trained.progress.step,
            "tokens_seen": run.trained.progress.tokens_seen,
            "data": run.texts.name,
            "data_sha256": run.texts.sha256,
            **self.figure.record(),
            "word_perplexity": self.word_perplexity,
            "num_words": self.num_words,
            "num_diverged": self.figure.num_diverged,
            "num_unmixed": self.figure.num_unmixed,
            "by_position": self.figure.by_position(),
            "training_operations_per_token": run.training_operations_per_token,
            "training_operations": run.training_operations,
            "test_operations_per_token": self.operations,
            "difference_bits_per_byte": difference,
            "difference_standard_error": error,
            "difference_from": rows.index(reference) if reference else None,
        }


def figures_json(settings: dict[str, Any], rows: list[Row], certificates: list[dict[str, Any]]) -> bytes:
    """All figures as JSON."""
    return records_json(settings, figures=[row.record(rows) for row in rows], certificates=certificates)


def records_json(settings: dict[str, Any], **records: list[dict[str, Any]]) -> bytes:
    """Lists of records by name, as JSON; numbers that are not finite become null."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "pyro": pyro.__version__}
    contents = {"settings": settings, "versions": versions, **records}
    return f"{strict_json.dumps(contents, indent=2)}\n".encode()


UNLIMITED = 1000
"""The width of a table in a file or a pipe [characters]."""
LONGEST_LINE = 100
"""The width of explanations where there is room for more [characters]."""

EXPLANATIONS = {
    "nats/token": "-log p(x) for each token ± standard error over documents",
    "bits/byte": "the same for each byte, in bits",
    "Δ bits/byte": (
        "the difference from the first row of the same figure, or from the exact figure of the first run, paired over "
        "documents; empty where a run reads other pieces"
    ),
    "perplexity": "exp(nats/token)",
    "word perplexity": "exp(nats/word), where a word is what stands between white space",
    "rate": "KL(q ‖ p), what z costs, in bits/token",
    "distortion": "-E log p(x | z), what the text costs where z is known, in bits/token",
    "MC error": (
        "the Monte Carlo error of nats/token over the draws of z; it is left out where k̂ of any text is too high for "
        "it to be trusted"
    ),
    "ESS": "effective sample size of the importance weights, median over texts",
    "k̂": "tail shape of the importance weights, median over texts, and the share of texts whose k̂ is too high",
    "op/token": "floating-point operations of the figure for each token of a sequence",
}
"""What the columns of the table mean."""


def print_report(rows: list[Row], certificates: list[dict[str, Any]]) -> None:
    """Print the runs, the table and the certificates: with lines on a terminal, as Markdown elsewhere."""
    for run in dict.fromkeys(str(row.run) for row in rows):
        print(run)
    for line in dict.fromkeys(_text_scored(row) for row in rows):
        print(line)
    cells = [_cells(row, rows) for row in rows]
    print_rows(cells, ("run", "figure", "z from", "meaning"), EXPLANATIONS)
    remarks: dict[tuple[str, str], list[int]] = {}
    for figure in (row.figure for row in rows if row.figure.chains):
        remarks.setdefault((str(figure.z_from), _chains_text(figure)), []).append(figure.fast_steps)
    for (z_from, remark), steps in remarks.items():
        print(f"\n{z_from}, T = {', '.join(map(str, dict.fromkeys(steps)))}: {remark}")
    for certificate in certificates:
        print(_certificate_text(certificate))


def _chains_text(figure: Figure) -> str:
    """What is to be said of a figure whose chains are not well, and what can be done."""
    advice = (
        "Their figures are left out. The steps are too long for the curvature: a smaller step size, vi_steps and "
        "vi_rank, or mala or hmc in training."
        if figure.num_diverged
        else "python -m ltm_pyro.compare runs several of them for longer, and shows R̂."
    )
    return f"{figure.chains}. {advice}"


def _text_scored(row: Row) -> str:
    figure = row.figure
    return (
        f"{row.run.texts.name}: {figure.num_sequences:,} of {len(row.run.packed):,} pieces, "
        f"of {len(figure.documents):,} documents, "
        f"{figure.num_tokens:,} tokens, {row.num_words:,} words, {figure.num_bytes:,} bytes"
    )


def print_rows(rows: list[dict[str, str]], words: tuple[str, ...], explanations: Mapping[str, str]) -> None:
    """Print a table: with lines on a terminal, as Markdown elsewhere, or as paragraphs where there is no room for it.

    Args:
        rows: cells by the name of their column. A column that is empty throughout is left out.
        words: the columns that hold words and not numbers.
        explanations: what columns mean, printed below for those that are there.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    is_terminal = sys.stdout.isatty()
    console = Console(
        width=None if is_terminal else _width_elsewhere(),
        highlight=False,
        markup=False,
        force_terminal=is_terminal,
        force_jupyter=False,  # in a notebook it is Markdown too
    )
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    width = sum(3 + max(len(name), *(len(row[name]) for row in rows)) for name in names)
    if width > console.width:
        for row in rows:
            print("\n" + ", ".join(row[name] for name in names if name in words and row[name]))
            numbers = "; ".join(f"{name} {row[name]}" for name in names if name not in words and row[name])
            print(textwrap.fill(numbers, console.width, initial_indent="  ", subsequent_indent="  "))
    else:
        table = Table(box=box.SIMPLE_HEAD if is_terminal else box.MARKDOWN)
        for name in names:
            table.add_column(name, no_wrap=not is_terminal, justify="left" if name in words else "right")
        for row in rows:
            table.add_row(*(Text(row[name]) for name in names))
        print()
        console.print(table)
    print()
    for name, text in explanations.items():
        if name in names:
            print(textwrap.fill(f"{name}: {text}", min(console.width, LONGEST_LINE), subsequent_indent="  "))


def _width_elsewhere() -> int:
    """The width of what is no terminal: that of the one beside it, where errors go, or what `COLUMNS` says."""
    if columns := os.environ.get("COLUMNS", "").strip():
        return int(columns) if columns.isdecimal() and int(columns) else UNLIMITED
    try:
        return os.get_terminal_size(sys.__stderr__.fileno()).columns if sys.__stderr__ else UNLIMITED
    except (OSError, ValueError):  # it is none, or closed
        return UNLIMITED


def _cells(row: Row, rows: list[Row]) -> dict[str, str]:
    """A line of the table for people."""
    figure, values = row.figure, row.figure.record()
    estimator = ESTIMATORS[figure.estimator]
    has_z = figure.z_from is not None
    reference = row.reference(rows)
    difference = figures.difference(figure, reference.figure) if reference else None
    size = values["effective_sample_size"]
    names = {
        "run": row.run.name,
        "figure": figure.estimator,
        "z from": figure.z_from or "",
        "T": str(figure.fast_steps) if has_z else "",
    }
    meaning = "not finite" if estimator.is_valid and not figure.is_valid else estimator.meaning.value
    return names | {
        "meaning": "DIVERGED" if figure.num_diverged else meaning,
        "nats/token": number_text(values["nats_per_token"], 4, values["standard_error"]),
        "bits/byte": number_text(values["bits_per_byte"], 4, values["bits_per_byte_standard_error"]),
        "Δ bits/byte": number_text(difference[0], 4, difference[1], sign="+") if difference else "",
        "perplexity": number_text(values["perplexity"], 2),
        "word perplexity": "" if row.word_perplexity is None else f"{row.word_perplexity:.4g}",
        "rate": number_text(values["kl_nats_per_token"], 3, in_bits=True) if has_z else "",
        "distortion": number_text(values["nll_nats_per_token"], 3, in_bits=True) if has_z else "",
        "MC error": number_text(values["monte_carlo_standard_error"], 4),
        "ESS": "" if size is None else f"{size:.1f} of {figure.num_samples}",
        "k̂": tail_text(values),
        "op/token": in_units(row.operations),
    }


def number_text(
    value: float | None, digits: int, error: float | None = None, sign: str = "", in_bits: bool = False
) -> str:
    """A figure with so many digits, and its error; empty where there is none."""
    if value is None or not math.isfinite(value):
        return ""
    value = value / math.log(2) if in_bits else value
    return f"{value:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def tail_text(record: dict[str, Any]) -> str:
    """The median k̂ of a figure's record, and the share of texts for which it is too high, if there are any."""
    if not record["heavy_tailed"]:
        return number_text(record["pareto_k"], 2)
    return f"{number_text(record['pareto_k'], 2)} ({record['heavy_tailed']:.0%} high)".strip()


def in_units(value: float) -> str:
    """A count in thousands (k), millions (M), … with three digits."""
    units = iter(("", "k", "M", "G", "T", "P", "E", "Z", "Y", "R", "Q"))
    unit = next(units)
    while value >= 999.5:
        value, unit = value / 1000, next(units)
    return f"{value:.3g} {unit}".rstrip()


def _certificate_text(certificate: dict[str, Any]) -> str:
    def with_error(name: str) -> str:
        error = certificate[f"{name}_standard_error"]
        return f"{certificate[f'{name}_nats_per_token']:.4f}" + ("" if error is None else f" ± {error:.4f}")

    return (
        f"\ncertificate of {certificate['run']} ({certificate['inference']}, T = {certificate['fast_steps']}), on "
        f"{certificate['num_sequences']} texts drawn from the model ({certificate['num_tokens']:,} tokens): "
        f"-log p(x) is bounded by {certificate['lower_nats_per_token']:.4f} from below and by "
        f"{certificate['upper_nats_per_token']:.4f} nats/token from above (annealing backwards and forwards; gap "
        f"{with_error('gap')}); the ELBO, {certificate['elbo_nats_per_token']:.4f}, is {with_error('elbo_excess')} "
        "above the lower bound"
    )
