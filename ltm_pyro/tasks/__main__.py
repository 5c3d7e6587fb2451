"""Trained models scored by what they write: python -m ltm_pyro.tasks TASK RUN [RUN ...]

Tasks ask for the answers to problems, for the last word of passages, or for free text. docs/tasks.md explains them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ltm_pyro import cli
from ltm_pyro.config import NO_INFERENCE, InferenceName, SchemeSettings, parse_naming_schemes
from ltm_pyro.errors import InputError
from ltm_pyro.evaluation.inferred import inferences_of
from ltm_pyro.evaluation.report import number_text, print_rows, records_json
from ltm_pyro.files.output import Output
from ltm_pyro.inference import SCHEMES
from ltm_pyro.runs.trained import load
from ltm_pyro.tasks import TASKS, Task, TaskContext

if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[tuple(TASKS)]


@dataclass(frozen=True)
class TaskChoice:
    """Score trained models by what they write, instead of by probabilities.

    The task comes first. `python -m ltm_pyro.tasks TASK --help` explains its options.
    """

    task: Annotated[
        TaskName,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="TASK", help_behavior_hint="(required)"),
        cli.choices("What the models are asked to write.", TASKS),
    ]


@dataclass(frozen=True)
class TasksConfig:
    """Score trained models by what they write."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")] = ()
    """Folders of runs; demo is the model that comes with the package."""
    task_settings: tyro.conf.OmitArgPrefixes[Task] = field(default_factory=next(iter(TASKS.values())))
    inference: Annotated[
        tuple[InferenceName, ...],
        cli.choices(
            "How z is inferred from the text that a model is given; several are compared.\n"
            "Default: as the run was trained.\nnone: z is drawn from the prior",
            SCHEMES,
        ),
    ] = ()
    fast_steps: tuple[int, ...] = ()
    """Steps of inference (T); several are compared. Default: as the run was trained."""
    num_items: int = 64
    """Largest number of problems, passages or texts, drawn from all of them, the same ones every time. 0: all."""
    batch_size: int = 16
    """Problems, passages or texts that are answered together. Another size draws other answers."""
    seed: int = 0
    """Seed of all draws."""
    which: str = "newest"
    """Checkpoint of a run: newest, best (by the validations in training), or the number of a step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""
    json: str | None = None
    """File for all results, replaced where it exists."""


def parse(args: Sequence[str]) -> tuple[str, TasksConfig, SchemeSettings]:
    """The name of the task, the settings, and those of schemes.

    Raises:
        InputError: if they cannot be used.
        SystemExit: with status 0, after `--help`.
    """
    name = args[0] if args else ""
    if name not in TASKS:
        if name not in ("--help", "-h"):
            problem = f"{name} is not a TASK" if name else "give a TASK and then a RUN"
            raise InputError(f"{problem}: choose one of {', '.join(TASKS)} (--help explains them)")
        cli.parse(TaskChoice(next(iter(TASKS))), ["--help"], "tasks")
    config, settings = parse_naming_schemes(TasksConfig(task_settings=TASKS[name]()), args[1:], f"tasks {name}")
    if not config.runs:
        raise InputError("give at least one RUN, a folder that python -m ltm_pyro.train has written")
    cli.require_at_least(config, num_items=0, batch_size=1)
    cli.require_seed(config.seed)
    if any(steps < 0 for steps in config.fast_steps):
        raise InputError("--fast-steps must not be negative")
    return name, config, settings


def main(args: Sequence[str]) -> int:
    name, config, settings = parse(args)
    device = cli.pick_device(config.device)
    models = [load(path, device, config.which).with_settings(settings) for path in config.runs]
    # All runs are checked before the first is scored: one may not have what is asked for.
    plan = [
        (path, ltm, inference)
        for path, ltm in zip(config.runs, models, strict=True)
        for inference in inferences_of(ltm.config, config.inference, config.fast_steps)
    ]
    json = Output("--json", config.json) if config.json else None
    records: list[dict[str, Any]] = []

    def contents() -> bytes:
        return records_json({"task": name, **dataclasses.asdict(config)}, tasks=records)

    with cli.numerics_of_commands(), cli.result_alone(json):
        try:
            for path, ltm, inference in plan:
                context = TaskContext(ltm, inference.scheme, config.num_items, config.batch_size, config.seed)
                has_z = ltm.config.inference != NO_INFERENCE
                about = {
                    "run": path,
                    "task": name,
                    "z_from": inference.name if has_z else None,
                    "fast_steps": inference.scheme.num_steps if has_z else None,
                }
                results = config.task_settings.score(context)
                records += [about | dataclasses.asdict(result) for result in results]
                if json:
                    json.update(contents())
        finally:
            # Also after Ctrl-C: the results that are finished are not lost. In a file before they are printed, as a
            # reader of what is printed may go away.
            try:
                if records and json:
                    json.finish(contents())
            finally:
                if records:
                    print_results(records)
        if json:
            print(f"\nall results: {config.json}")
    return 0


def print_results(records: list[dict[str, Any]]) -> None:
    """Print a table of the results, and what each metric means."""
    rows = [
        {
            "run": record["run"],
            "task": record["task"],
            "z from": record["z_from"] or "",
            "T": "" if record["fast_steps"] is None else str(record["fast_steps"]),
            "metric": record["metric"],
            "value": number_text(record["value"], 4, record["standard_error"]),
            "items": str(record["num_items"]),
        }
        for record in records
    ]
    has_errors = any(record["standard_error"] is not None for record in records)
    explanations = {"value": "± standard error over items"} if has_errors else {}
    print_rows(rows, ("run", "task", "z from", "metric"), explanations)
    for metric, meaning in dict.fromkeys((record["metric"], record["meaning"]) for record in records):
        print(f"{metric}: {meaning}")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
