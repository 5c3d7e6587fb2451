"""Train a Latent Thought Model: python -m ltm_pyro.train [--inference=vi] [--infer-from past]

Two rates (Kong et al. 2025, algorithm 1). Fast: posterior inference of each sequence's own z, weights frozen, from the
whole sequence or block by block. Slow: one step on the weights, with the posteriors just inferred.

All randomness of a step is a pure function of the seed, the step and the position of a sequence in the batch. So a
run that is stopped and resumed ends, on a CPU and with the same number of threads, with bit for bit the same weights as
one that never stopped. Several processes take the same steps as a single one, except for rounding:

    torchrun --nproc-per-node=N -m ltm_pyro.train ...
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pyro
import tiktoken
import torch
import tyro

from ltm_pyro import cli
from ltm_pyro.config import (
    NO_INFERENCE,
    TrainConfig,
    differences,
    from_dict,
    micro_batch_size,
    option_of,
    options_of_scheme,
    preset,
    refuse_unused_settings,
    scheme_of,
    to_dict,
    validate,
)
from ltm_pyro.data import (
    PACKING,
    PackedSequences,
    TokenizedCorpus,
    absolute,
    get_tokenizer,
    is_there,
    load_tokenized_corpus,
)
from ltm_pyro.data.prepared import is_prepared, verify
from ltm_pyro.errors import InputError, RunError, WriteError
from ltm_pyro.files.lock import locked
from ltm_pyro.files.stop import StopSignal
from ltm_pyro.inference import SCHEMES
from ltm_pyro.inference.objectives import OBJECTIVES
from ltm_pyro.inference.svi import WeightOptimizer
from ltm_pyro.models import LatentThoughtModel
from ltm_pyro.runs import checkpoint
from ltm_pyro.runs.checkpoint import Progress
from ltm_pyro.runs.migrations import migrated
from ltm_pyro.runs.run import Run, check_is_free, create_run, read_settings, resolved_against
from ltm_pyro.runs.trained import TrainedModel, build_model
from ltm_pyro.training import tensorboard
from ltm_pyro.training.loop import Diverged, Training, report, train
from ltm_pyro.training.processes import Processes, is_restarted, joined
from ltm_pyro.training.progress import time_text
from ltm_pyro.training.tensorboard import TensorBoard

if TYPE_CHECKING:  # it takes a second to import, and only --sharded needs it
    from ltm_pyro.training.sharded import ShardedWeights

COMMON = (
    "inference",
    "preset",
    "config",
    "data",
    "infer_from",
    "steps",
    "fast_steps",
    "batch_size",
    "seed",
    "out",
    "resume",
)
"""The settings that `--help` explains."""

OF_Z = (
    "inference",
    "infer_from",
    "fast_steps",
    "model.num_slots",
    "model.thoughts",
    "model.prior",
    "model.encoder_layers",
    "model.encoder_reads",
)
"""The settings that follow from how z is inferred, if they are not given."""

CHANGEABLE = {
    "data",
    "steps",
    "device",
    "compile",
    "micro_batch_size",
    "sharded",
    "out",
    "resume",
    "log_every",
    "tensorboard",
    "validate_every",
    "validation_sequences",
    "validation_samples",
    "checkpoint_every",
    "num_checkpoints",
}
"""Settings that a resumed run may change."""


def first_options(args: Sequence[str]) -> argparse.Namespace:
    """The options that decide what the defaults of all others are."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--config")
    parser.add_argument("--inference")
    parser.add_argument("--infer-from")
    parser.add_argument("--model.thoughts", dest="thoughts")
    parser.add_argument("--model.hidden", dest="hidden", type=int)
    parser.add_argument("--device")
    parser.add_argument("--out")
    parser.add_argument("--resume", action="store_true")
    try:
        return parser.parse_known_args([_with_dashes(arg) for arg in args])[0]
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None


def _with_dashes(arg: str) -> str:
    """An option as it is documented: it may also be written with underscores."""
    name, equals, value = arg.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if name.startswith("--") else arg


def resumed_run(args: Sequence[str]) -> Run | None:
    """The run that --resume names, or the one that the processes had begun before torchrun started them again; None
    for a new run.

    Raises:
        InputError: if it cannot be resumed.
    """
    known = first_options(args)
    if is_restarted() and known.out is None:
        raise InputError("processes that are started again find their run only with --out FOLDER")
    if not known.resume and not (is_restarted() and checkpoint.all_checkpoints(Run(Path(known.out)).checkpoints)):
        return None
    if known.out is None:
        raise InputError("--resume needs --out FOLDER, the run to resume")
    run = Run(Path(known.out))
    # A folder that holds no run is not locked, as that would leave a file in it.
    run.read_config()
    run.newest_checkpoint()
    return run


def parse(args: Sequence[str], resumed: Run | None = None) -> TrainConfig:
    """The settings of the run that is resumed, or else those of the preset, changed by the arguments.

    Args:
        resumed: the run that :func:`resumed_run` found. Its folder must be locked, so that its settings stay as they
            are read here.
    """
    if resumed is None:
        config = parse_options(default_of(first_options(args)), args)
        validate(config)
        check_new(config)
        if config.out is not None:
            check_is_free(config.out, can_resume=True)
        return config
    if first_options(args).config is not None:
        raise InputError("--config: a run that is resumed has its settings; leave it out")
    old, _ = resumed.read_config()
    config = parse_options(old, args)
    validate(config)
    for name, (before, after) in differences(old, config).items():
        if name not in CHANGEABLE:
            raise InputError(
                f"{option_of(name)} is {before} in {resumed.path} and cannot become {after} on --resume: "
                "start a new run"
            )
    return config


def check_new(config: TrainConfig) -> None:
    """Check what a new run must not have; earlier versions took it, and their runs are read all the same.

    Raises:
        InputError: if a setting has no meaning beside another.
    """
    rates = config.optimizer
    if rates.final_learning_rate > rates.learning_rate:
        raise InputError(
            f"--optimizer.final-learning-rate {rates.final_learning_rate:g} is above the highest, "
            f"--optimizer.learning-rate {rates.learning_rate:g}"
        )
    stride = getattr(config.schemes.get(config.inference), "stride", 1)
    if stride > config.model.length:
        raise InputError(
            f"--{config.inference}.stride {stride} leaves no position of a sequence of {config.model.length} tokens"
        )


def default_of(known: argparse.Namespace) -> TrainConfig:
    """The settings that the options change: those of the preset, and those of the file that --config names.

    Raises:
        InputError: if the file cannot be read, or holds something else than settings.
    """
    given: dict[str, Any] = {}
    if known.config is not None:
        try:
            given = read_settings(Path(known.config))
        except FileNotFoundError:
            raise InputError(f"--config {known.config}: there is no such file") from None
        given = migrated(given) if "version" in given else given
        given = {name: value for name, value in given.items() if name not in ("resolved", "out", "resume", "config")}
    if known.inference is not None and given.get("inference", known.inference) != known.inference:
        # What the file says of z is of another scheme.
        given = {name: value for name, value in given.items() if name not in OF_Z}
        if isinstance(given.get("model"), dict):
            given["model"] = {name: value for name, value in given["model"].items() if f"model.{name}" not in OF_Z}
    model = given["model"] if isinstance(given.get("model"), dict) else {}
    default = preset(
        known.preset or given.get("preset", TrainConfig.preset),
        known.inference or given.get("inference"),
        known.infer_from or given.get("infer_from"),
        known.thoughts or model.get("thoughts"),
        known.hidden or model.get("hidden"),
    )
    if not given:
        return default
    first = {"inference": known.inference, "infer_from": known.infer_from, "preset": known.preset}
    given |= {name: value for name, value in first.items() if value is not None}
    try:
        return from_dict(_merged(to_dict(default), given))
    except InputError as error:
        raise InputError(f"--config {known.config}: {error}") from None


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Values, of which those that the changes name are replaced; sections are merged."""
    merged = dict(values)
    for name, change in changes.items():
        both = isinstance(values.get(name), dict) and isinstance(change, dict)
        merged[name] = _merged(values[name], change) if both else change
    return merged


def parse_options(default: TrainConfig, args: Sequence[str]) -> TrainConfig:
    """The settings changed by the arguments, in which each scheme's settings are options under its name.

    Raises:
        InputError: if the arguments cannot be understood.
    """
    # tyro makes options of the fields of a class. Which schemes there are is known to the registry alone, so this class
    # is put together here: it has a field for each scheme in the place of the one for all of them. So it is with the
    # objectives, whose options have no prefix.
    # Only what is used has options: the scheme and the objective of the run.
    hidden = Annotated[Any, tyro.conf.Fixed, tyro.conf.Suppress]
    used = [default.inference] if default.inference in SCHEMES else []
    refuse_unused_settings(args, used, default.infer_from)
    sections = {name: options_of_scheme(SCHEMES[name]) for name in used}
    unprefixed = {
        name: Annotated[OBJECTIVES[name], tyro.conf.arg(name="")]
        for name in [default.infer_from]
        if dataclasses.fields(OBJECTIVES[name])
    }
    fields = [
        *((name, hidden, field(default=None)) for name in ("schemes", "objectives")),
        *((name, section, field(default=None)) for name, section in {**sections, **unprefixed}.items()),
    ]
    options = dataclasses.make_dataclass("TrainConfig", fields, bases=(TrainConfig,), frozen=True)
    options.__doc__ = TrainConfig.__doc__
    values = {name: section(**vars(default.schemes[name])) for name, section in sections.items()}
    values |= {name: default.objectives[name] for name in unprefixed}
    unchanged = options(**vars(default) | values | {"schemes": None, "objectives": None})
    given = vars(cli.parse(unchanged, args, "train", COMMON))
    schemes = {**default.schemes, **{name: SCHEMES[name](**vars(given[name])) for name in sections}}
    objectives = {**default.objectives, **{name: given[name] for name in unprefixed}}
    settings = {name: given[name] for name in vars(default)}
    return TrainConfig(**settings | {"schemes": schemes, "objectives": objectives})


@dataclass(frozen=True)
class Loaded:
    """What the settings of a run name: its corpus, tokenizer and model, before the first step."""

    data: str
    """Where the corpus is."""
    corpus: TokenizedCorpus
    tokenizer: tiktoken.Encoding
    model: LatentThoughtModel
    optimizer: WeightOptimizer
    train: PackedSequences
    validation: PackedSequences
    device: torch.device
    sharded: ShardedWeights | None = None
    """The weights as they are split between processes; None where every process has all of them."""

    def resolved(self, processes: Processes) -> dict[str, str]:
        """What the settings were resolved to."""
        parts = {f"corpus_{part.replace(' ', '_')}": text for part, text in self.corpus.parts.items()}
        place = {"corpus_path": absolute(self.data)}
        return resolved_against(self.corpus.sha256, self.tokenizer, self.device, processes.size) | place | parts


def load(config: TrainConfig, processes: Processes) -> Loaded:
    """Load the corpus and build the model, with new weights.

    Raises:
        InputError: if a setting cannot be used.
    """
    if config.batch_size % processes.size:
        raise InputError(f"--batch-size {config.batch_size} cannot be divided evenly among {processes.size} processes")
    if config.sharded and processes.size == 1:
        raise InputError(
            "--sharded splits weights between processes, and there is one: start several with torchrun, or leave it "
            "out (on --resume: --no-sharded)"
        )
    if config.sharded:
        try:
            import ltm_pyro.runs.parts
            import ltm_pyro.training.sharded  # noqa: F401 - older versions of torch lack what these two import
        except ImportError as error:
            raise InputError(f"--sharded does not work with PyTorch {torch.__version__}: {error}") from None
    if config.tensorboard:
        tensorboard.check_is_installed()
    device = cli.pick_device(config.device)
    if device.type == "cuda":
        processes.require_gpus()
    elif config.precision == "bfloat16" and processes.is_first and not cli.has_bfloat16():
        print(
            "warning: this processor has no instructions for bfloat16, and takes several times as long with it as "
            "with --precision float32",
            file=sys.stderr,
        )
    tokenizer = get_tokenizer(config.tokenizer)
    if is_prepared(config.data):
        # Opening it only checks sizes, and the model would learn from a flipped bit. Each machine may have a copy.
        verify(Path(config.data).expanduser(), processes.local_rank, processes.local_size)
    corpus = load_tokenized_corpus(config.data, config.text_column, tokenizer)
    pack, length = PACKING[config.packing], config.model.length
    num_tokens = corpus.train.num_tokens
    if num_tokens < length:
        raise InputError(
            f"the training text of {config.data} has {num_tokens:,} tokens, but one sequence needs {length:,}: "
            "give more text or a smaller --model.length"
        )
    pyro.set_rng_seed(config.seed)
    model = build_model(config, tokenizer, device)
    if config.compile:
        model.decoder.compile()
    return Loaded(
        config.data,
        corpus,
        tokenizer,
        model,
        WeightOptimizer(model, config.optimizer, config.steps),
        pack(corpus.train, tokenizer, length),
        pack(corpus.validation.documents, tokenizer, length),
        device,
    )


def load_in_all(config: TrainConfig, processes: Processes) -> Loaded:
    """Do :func:`load` in all processes. With --sharded each then keeps its part of the weights."""
    loaded = processes.patient.by_all(lambda: load(config, processes))
    if not config.sharded:
        return loaded
    from ltm_pyro.training.sharded import ShardedWeights

    sharded = ShardedWeights(loaded.model, processes)
    optimizer = WeightOptimizer(loaded.model, config.optimizer, config.steps)
    loaded = dataclasses.replace(loaded, sharded=sharded, optimizer=optimizer)
    gc.collect()  # the optimiser of the whole weights is part of a cycle, and would hold on to them
    return loaded


def start_run(config: TrainConfig, processes: Processes, open_until_end: contextlib.ExitStack) -> Training:
    """Begin a new run. Its folder is made last, so that settings which cannot be used leave nothing behind.

    Args:
        open_until_end: receives what the first process opens, such as the lock of the folder.
    """
    loaded = load_in_all(config, processes)
    resolved = loaded.resolved(processes)

    def create() -> Path:
        run = create_run(config.out, f"{loaded.corpus.name}-{config.preset}-{config.inference}")
        open_until_end.enter_context(locked(run.path))
        run.write_config(dataclasses.replace(config, out=str(run.path)), resolved)
        return run.path

    path = processes.by_first(create)
    trained = TrainedModel(loaded.model, loaded.tokenizer, config, path, resolved, Progress())
    return _training(loaded, trained, processes, open_until_end)


def resume_run(run: Run, config: TrainConfig, processes: Processes, open_until_end: contextlib.ExitStack) -> Training:
    """Continue a run, whose folder is locked, from its newest checkpoint that can be read.

    Args:
        open_until_end: as in :func:`start_run`.
    """
    old, before = run.read_config()
    # Its name may lead nowhere, or elsewhere, from this folder. What it is, is checked by its hash.
    place = before.get("corpus_path", config.data)
    place = place if config.data == old.data and is_there(place) else config.data
    loaded = load_in_all(dataclasses.replace(config, data=place), processes)
    resolved = loaded.resolved(processes)

    def restore() -> Progress:
        for name in ("corpus_sha256", "tokenizer_sha256"):
            if before.get(name) != resolved[name]:
                what = name.removesuffix("_sha256")
                raise InputError(f"the {what} is not the one that {run.path} was trained with: its hash has changed")
        if config.steps < (reached := checkpoint.read_progress(run.newest_checkpoint()).step):
            raise InputError(f"--steps {config.steps}: {run.path} has taken {reached} steps already; give no fewer")
        progress, damage = run.restore(loaded.model, loaded.optimizer.algorithm)
        if damage:
            print(f"warning: {damage}", file=sys.stderr)
        run.write_config(dataclasses.replace(config, resume=False), resolved)
        return progress

    def follow() -> None:
        # The others read the checkpoint that the first process has gone back to.
        if not processes.is_first:
            checkpoint.load_weights(run.newest_checkpoint(), loaded.model)
            checkpoint.load_progress(run.newest_checkpoint(), loaded.optimizer.algorithm)

    progress = processes.patient.by_first(restore)
    processes.patient.by_all(follow)
    trained = TrainedModel(loaded.model, loaded.tokenizer, config, run.path, resolved, progress)
    return _training(loaded, trained, processes, open_until_end)


def _training(
    loaded: Loaded, trained: TrainedModel, processes: Processes, open_until_end: contextlib.ExitStack
) -> Training:
    training = Training(
        trained,
        loaded.corpus,
        processes.synchronised(loaded.model) if loaded.sharded is None else loaded.model,
        scheme_of(trained.config),
        loaded.optimizer,
        loaded.train,
        loaded.validation,
        loaded.device,
        processes,
        loaded.sharded,
    )
    if trained.config.tensorboard and processes.is_first:
        board = TensorBoard(trained.path / tensorboard.FOLDER, trained.progress.step)
        training.board = open_until_end.enter_context(board)
    return training


def main(args: Sequence[str]) -> int:
    with joined(first_options(args).device != "cpu") as processes, contextlib.ExitStack() as open_until_end:
        run = processes.by_all(lambda: resumed_run(args))
        if run is not None:  # before its settings are read: another process may be changing them
            processes.by_first(lambda: open_until_end.enter_context(locked(run.path)))
        config = processes.by_all(lambda: parse(args, run))
        if run is None:
            return carry_out(start_run(config, processes, open_until_end))
        return carry_out(resume_run(run, config, processes, open_until_end))


def carry_out(training: Training) -> int:
    """Train, report, and say how it ended.

    Returns:
        the exit status.

    Raises:
        RunError: if training cannot continue; the message says what is saved.
    """
    config, run, num_processes = training.config, training.run, training.processes.size
    thinking = f"{config.inference} with {config.fast_steps} fast step{'s' * (config.fast_steps != 1)}"
    where = "in each of" if training.sharded is None else "split between"
    go_on = f"continue with: python -m ltm_pyro.train --out {shlex.quote(str(run.path))} --resume"
    print(
        f"{run.path}: {training.trained.num_weights:,} weights on {training.device.type}"
        f"{'' if training.model.decoder.compute_dtype is None else ', with matrix products in bfloat16'}"
        f"{f', {where} {num_processes} processes' if num_processes > 1 else ''}, "
        f"{'no z' if config.inference == NO_INFERENCE else thinking}; "
        f"{len(training.train):,} pieces of up to {config.model.length:,} tokens to train on, "
        f"{len(training.validation):,} held out"
        f"{f'; continuing after step {training.progress.step:,}' if training.progress.step else ''}",
        flush=True,
    )
    cli.print_parts(training.corpus.name, training.corpus.parts)
    if training.progress.step >= config.steps:
        print(f"All {config.steps:,} steps are taken already; --resume --steps N takes more, to N in all.", flush=True)
    else:
        pieces = "piece" if config.batch_size == 1 else f"{config.batch_size:,} pieces"
        print(f"Below is the loss of single steps, which rises and falls with how hard their {pieces} are.", flush=True)
    with StopSignal() as stop, cli.numerics_of_commands():
        try:
            train(training, stop)
            if not training.is_stopped(stop):
                with training.whole_weights():
                    report(training, stop)
        except (Diverged, FloatingPointError) as error:
            newest = run.newest_checkpoint()
            raise RunError(f"{error} (step {training.progress.step}); the last good checkpoint is {newest}") from None
        except torch.OutOfMemoryError as error:
            if num_processes > 1:  # the others wait for this one, until torchrun ends them for its error
                raise
            size = micro_batch_size(config, training.device)
            raise RunError(
                f"the memory of the GPU is full with {size} sequences at a time; {go_on} --micro-batch-size "
                f"{max(1, size // 2)} ({str(error).splitlines()[0]})"
            ) from None
        except WriteError as error:
            saved = checkpoint.all_checkpoints(run.checkpoints)
            hint = (
                f"the last checkpoint is {saved[-1]}; make room, and {go_on}" if saved else "there is no checkpoint yet"
            )
            raise RunError(f"{error}; {hint}") from None
        is_stopped = training.is_stopped(stop)
    if is_stopped and stop.received is not None:
        name = signal.Signals(stop.received).name
        print(f"\nstopped by {name}: saved {run.newest_checkpoint()}; {go_on}", flush=True)
        return 128 + stop.received
    print(f"\n{time_text(training.progress.seconds)} of training; the run is in {run.path}")
    quoted = shlex.quote(str(run.path))
    print(f"next: python -m ltm_pyro.report {quoted} (a page to look at)")
    print(f"      python -m ltm_pyro.generate {quoted} --prompt …")
    if config.inference != NO_INFERENCE:
        print(f"      {' '.join(baseline_of(config))} (a baseline, for evaluate to compare)")
    return 0


def _is_changed(config: TrainConfig) -> bool:
    """Whether a run has other settings than those of its preset and scheme."""
    default = preset(config.preset, config.inference, config.infer_from)
    return bool(differences(default, dataclasses.replace(config, out=None, resume=False, device=default.device)))


def baseline_of(config: TrainConfig) -> list[str]:
    """The command that trains a model without z, with the settings of a run that are not about z."""
    default = preset(config.preset, config.inference, config.infer_from)
    changed = {
        name: value
        for name, (_, value) in differences(default, config).items()
        if name not in (*OF_Z, "out", "resume", "preset", "sharded")
        and name.partition(".")[0] not in (*SCHEMES, *OBJECTIVES)
    }
    options = [text for name, value in changed.items() for text in _as_given(option_of(name), value)]
    of_preset = ["--preset", config.preset] if config.preset != TrainConfig.preset else []
    return ["python -m ltm_pyro.train --inference none", *of_preset, *options]


def _as_given(option: str, value: Any) -> list[str]:
    """An option with its value, as in a command line; a flag has none."""
    if isinstance(value, bool):
        return [option if value else option.replace("--", "--no-", 1)]
    return [option, shlex.quote(str(value))]


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
