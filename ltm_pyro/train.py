"""Train a Latent Thought Model: python -m ltm_pyro.train --inference=vi

Two rates (Kong et al. 2025, algorithm 1). Fast: T steps of posterior inference of each sequence's own z, weights
frozen. Slow: one step of stochastic variational inference on the weights, with the posteriors just inferred.

All randomness of a step is a pure function of the seed, the step and the place of a sequence in the batch. So a run
that stops and goes on ends, on a CPU and with as many threads, bit for bit where one that never stopped does; and
several processes take the steps of a single one, but for rounding:

    torchrun --nproc-per-node=N -m ltm_pyro.train ...
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pyro
import tiktoken

from ltm_pyro import cli
from ltm_pyro.config import NO_INFERENCE, TrainConfig, differences, preset, scheme_of, validate
from ltm_pyro.data import (
    PACKING,
    TokenizedCorpus,
    get_tokenizer,
    load_tokenized_corpus,
)
from ltm_pyro.data.prepared import is_prepared, verify
from ltm_pyro.errors import InputError, RunError, WriteError
from ltm_pyro.files.lock import locked
from ltm_pyro.files.stop import StopSignal
from ltm_pyro.inference.svi import WeightOptimizer
from ltm_pyro.runs import checkpoint
from ltm_pyro.runs.checkpoint import Progress
from ltm_pyro.runs.run import Run, check_is_free, create_run, resolved_against
from ltm_pyro.runs.trained import TrainedModel, build_model
from ltm_pyro.training import tensorboard
from ltm_pyro.training.loop import Diverged, Training, report, train
from ltm_pyro.training.processes import Processes, joined
from ltm_pyro.training.progress import time_text
from ltm_pyro.training.tensorboard import TensorBoard

CHANGEABLE = {
    "steps",
    "device",
    "compile",
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


def parse(args: Sequence[str]) -> TrainConfig:
    """The settings: those of the run that is resumed, or else of the preset, changed by the arguments."""
    first = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    first.add_argument("--preset", default="tiny")
    first.add_argument("--inference", default="vi")
    first.add_argument("--out")
    first.add_argument("--resume", action="store_true")
    try:
        known, _ = first.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    if not known.resume:
        config = cli.parse(preset(known.preset, known.inference), args, "train")
        validate(config)
        if config.out is not None:
            check_is_free(config.out, can_resume=True)
        return config
    if known.out is None:
        raise InputError("--resume needs --out FOLDER, the run to go on with")
    old, _ = Run(Path(known.out)).read_config()
    config = cli.parse(old, args, "train")
    validate(config)
    for name, (before, after) in differences(old, config).items():
        if name not in CHANGEABLE:
            raise InputError(
                f"--{name.replace('_', '-')} is {before} in {known.out} and cannot become {after} on --resume: "
                "start a new run"
            )
    return config


def set_up(config: TrainConfig, processes: Processes) -> tuple[Training, TokenizedCorpus, tiktoken.Encoding]:
    """Load the corpus and build the model, at the first step."""
    if config.batch_size % processes.size:
        raise InputError(f"--batch-size {config.batch_size} cannot be shared evenly by {processes.size} processes")
    if config.tensorboard:
        tensorboard.check_is_installed()
    device = cli.pick_device(config.device)
    if device.type == "cuda":
        processes.take_gpu()
    encoding = get_tokenizer(config.tokenizer)
    if processes.is_first and is_prepared(config.data):
        # Opening it checks sizes alone; a flipped bit would be learnt from.
        verify(Path(config.data).expanduser())
    corpus = load_tokenized_corpus(config.data, config.text_column, encoding)
    pack, length = PACKING[config.packing], config.model.length
    num_tokens = corpus.train.num_tokens
    if num_tokens < length:
        raise InputError(
            f"the training text of {config.data} has {num_tokens:,} tokens, and one sequence needs {length:,}: "
            "give more text or a smaller --model.length"
        )
    pyro.set_rng_seed(config.seed)
    model = build_model(config, encoding).to(device)
    if config.compile:
        model.decoder.compile()
    training = Training(
        config,
        model,
        model,
        scheme_of(config),
        WeightOptimizer(model, config.optimizer, config.steps),
        pack(corpus.train, encoding, length),
        pack(corpus.validation.documents, encoding, length),
        device,
        Progress(),
        processes,
    )
    return training, corpus, encoding


def prepare(
    config: TrainConfig, processes: Processes, open_until_end: contextlib.ExitStack
) -> tuple[Training, Run, TokenizedCorpus, TrainedModel]:
    """Load the corpus, build the model, and make the folder of the run or read it.

    Args:
        open_until_end: receives what the first process opens, the lock of the folder among it.
    """

    def begin() -> Path:
        run = create_run(config.out, f"{corpus.name}-{config.preset}-{config.inference}")
        open_until_end.enter_context(locked(run.path))
        run.write_config(dataclasses.replace(config, out=str(run.path)), resolved)
        return run.path

    def lock() -> None:
        run = Run(Path(config.out))
        run.newest_checkpoint()  # a run without one is refused before its corpus is loaded
        open_until_end.enter_context(locked(run.path))

    def go_on() -> Path:
        run = Run(Path(config.out))
        _, before = run.read_config()
        for name in ("corpus_sha256", "tokenizer_sha256"):
            if before.get(name) != resolved[name]:
                what = name.removesuffix("_sha256")
                raise InputError(f"the {what} is not the one that {run.path} was trained with: its hash has changed")
        training.progress, damage = run.restore(training.model, training.optimizer.adamw)
        if damage:
            print(f"warning: {damage}", file=sys.stderr)
        run.write_config(dataclasses.replace(config, resume=False), resolved)
        return run.path

    def follow() -> None:
        # The weights come with those of the first process, its moments from the checkpoint that it has gone back to.
        if config.resume and not processes.is_first:
            training.progress = checkpoint.load_progress(run.newest_checkpoint(), training.optimizer.adamw)

    if config.resume:
        processes.by_first(lock)
    training, corpus, encoding = processes.by_all(lambda: set_up(config, processes))
    resolved = resolved_against(corpus.sha256, encoding, training.device, processes.size)
    run = Run(processes.by_first(go_on if config.resume else begin))
    processes.by_all(follow)
    training.synchronised = processes.synchronised(training.model)
    if config.tensorboard and processes.is_first:
        board = TensorBoard(run.path / tensorboard.FOLDER, training.progress.step)
        training.board = open_until_end.enter_context(board)
    trained = TrainedModel(training.model, encoding, config, run.path, resolved, training.progress)
    return training, run, corpus, trained


def main(args: Sequence[str]) -> int:
    with joined() as processes, contextlib.ExitStack() as open_until_end:
        config = processes.by_all(lambda: parse(args))
        return carry_out(*prepare(config, processes, open_until_end))


def carry_out(training: Training, run: Run, corpus: TokenizedCorpus, trained: TrainedModel) -> int:
    """Train, report, and say how it ended: the exit status.

    Raises:
        RunError: if it cannot go on; the message says what is saved.
    """
    config, num_processes = training.config, training.processes.size
    num_weights = sum(weight.numel() for weight in training.model.parameters())
    thinking = f"{config.inference} with {config.fast_steps} fast steps"
    go_on = f"go on with: python -m ltm_pyro.train --out {shlex.quote(str(run.path))} --resume"
    print(
        f"{run.path}: {num_weights:,} weights on {training.device.type}"
        f"{f', in each of {num_processes} processes' if num_processes > 1 else ''}, "
        f"{'no z' if config.inference == NO_INFERENCE else thinking}; "
        f"{len(training.train):,} sequences to train on, {len(training.validation):,} held out",
        flush=True,
    )
    with StopSignal() as stop, pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered NaN")  # such steps are skipped and counted
        try:
            train(training, run, stop)
            if not training.is_stopped(stop):
                report(training, run, corpus, trained, stop)
        except (Diverged, FloatingPointError) as error:
            newest = run.newest_checkpoint()
            raise RunError(f"{error} (step {training.progress.step}); the last good checkpoint is {newest}") from None
        except WriteError as error:
            saved = checkpoint.all_checkpoints(run.checkpoints)
            hint = (
                f"the last checkpoint is {saved[-1]}; make room, and {go_on}" if saved else "there is no checkpoint yet"
            )
            raise RunError(f"{error}; {hint}") from None
        is_stopped = training.is_stopped(stop)
    if is_stopped:
        name = signal.Signals(stop.received).name
        print(f"\nstopped by {name}: saved {run.newest_checkpoint()}; {go_on}", flush=True)
        return 128 + stop.received
    print(f"\n{time_text(training.progress.seconds)} of training; the run is in {run.path}")
    return 0


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
