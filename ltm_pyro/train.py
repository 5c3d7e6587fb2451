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
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

from ltm_pyro import checkpoint, cli, figures, tensorboard
from ltm_pyro.checkpoint import Progress
from ltm_pyro.config import (
    NO_INFERENCE,
    TrainConfig,
    differences,
    inference_of,
    micro_batch_size,
    preset,
    scheme_of,
    validate,
)
from ltm_pyro.console import Console, time_text
from ltm_pyro.data import (
    PACKING,
    PackedSequences,
    TokenizedCorpus,
    batch_indices,
    get_tokenizer,
    load_tokenized_corpus,
    places,
)
from ltm_pyro.data.prepared import is_prepared, verify
from ltm_pyro.errors import InputError, RunError, WriteError
from ltm_pyro.estimators import EstimatorSettings, Inference
from ltm_pyro.inference import Noise, SequenceNoise, infer
from ltm_pyro.inference.svi import SlowLoss, WeightOptimizer, elbo_backward
from ltm_pyro.lock import locked
from ltm_pyro.models import LatentThoughtModel, TokenBatch
from ltm_pyro.processes import Processes, accumulating, joined
from ltm_pyro.run import Run, TrainedModel, build_model, check_is_free, create_run, resolved_against
from ltm_pyro.stop import StopSignal
from ltm_pyro.tensorboard import TensorBoard

MAX_SKIPS_IN_A_ROW = 5
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


class Diverged(Exception):
    """Several steps in a row had values that are not finite."""


@dataclass
class Training:
    """All that a slow step needs."""

    config: TrainConfig
    model: LatentThoughtModel
    synchronised: torch.nn.Module
    """The model, whose gradients are the means over the processes."""
    scheme: Any
    optimizer: WeightOptimizer
    train: PackedSequences
    validation: PackedSequences
    device: torch.device
    progress: Progress
    processes: Processes
    board: TensorBoard | None = None
    """Where metrics also go."""

    def is_stopped(self, stop: StopSignal) -> bool:
        """Whether a signal has asked any of the processes to stop: then all of them are, by the same signal.

        Only what this returns may decide what to do next: a signal may have come to one process in between.
        """
        received = next((number for number in self.processes.gather(stop.received) if number), None)
        if received is not None:
            stop.received = received
        return received is not None


@dataclass(frozen=True)
class StepResult:
    """What one slow step saw, summed over its sequences, those of all processes."""

    loss: SlowLoss
    num_tokens: int
    num_bytes: int
    num_skipped_fast_steps: int
    """Fast steps of single sequences that were left out because a value was not finite."""


def slow_step(training: Training, stop: StopSignal) -> StepResult | None:
    """Infer z of every sequence of the batch, then take one step on the weights.

    Returns:
        None where a signal asked to stop on the way; the step has not been taken then.

    Raises:
        Diverged: after several steps in a row that were not finite, and have been skipped.
    """
    config, progress, processes = training.config, training.progress, training.processes
    num_tokens = tokens_of_step(training)
    nelbo = rate = 0.0
    num_bytes, num_skipped_fast_steps, is_usable = 0, 0, True
    batches = processes.by_all(lambda: micro_batches(training))
    # Each sequence has noise of its own, so that it matters neither which process it falls to, nor with which others.
    rng = SequenceNoise(config.seed, training.device)
    for number, batch in enumerate(batches, 1):
        if training.is_stopped(stop):
            training.optimizer.discard()
            return None
        batch = batch.to(training.device)
        observed = batch if config.infer_from == "whole" else random_prefix(batch, rng)
        state = infer(training.scheme, training.model, observed, rng)
        guide = training.scheme.guide(training.model, state, observed, rng)
        with contextlib.nullcontext() if number == len(batches) else accumulating(training.synchronised):
            # Of the sum over all processes, whose mean is taken.
            loss = elbo_backward(training.synchronised, guide, batch, num_tokens / processes.size)
        nelbo, rate = nelbo + loss.nelbo, rate + loss.rate
        num_bytes += int(batch.num_bytes.sum())
        num_skipped_fast_steps += int(state.num_skipped.sum())
        # Where no sequence could take any step, the posteriors are no better than their start.
        is_usable &= config.fast_steps == 0 or bool((state.num_skipped < state.step).any())
    parts = processes.gather((nelbo, rate, num_bytes, num_skipped_fast_steps, not is_usable))
    nelbo, rate, num_bytes, num_skipped_fast_steps, num_unusable = map(sum, zip(*parts, strict=True))
    if training.optimizer.update(progress.step, is_usable=not num_unusable and np.isfinite(nelbo)):
        progress.skips_in_a_row = 0
    else:
        progress.skips_in_a_row += 1
        progress.num_skipped_steps += 1
    progress.step += 1
    progress.tokens_seen += num_tokens
    if progress.skips_in_a_row >= MAX_SKIPS_IN_A_ROW:
        raise Diverged(f"{MAX_SKIPS_IN_A_ROW} steps in a row had values that are not finite")
    return StepResult(SlowLoss(nelbo, rate), num_tokens, num_bytes, num_skipped_fast_steps)


def tokens_of_step(training: Training) -> int:
    """The predicted tokens of the batch, of all processes together."""
    config, sequences = training.config, training.train
    indices = batch_indices(config.seed, training.progress.step, config.batch_size, len(sequences))
    return int(sequences.num_tokens[indices].sum())


def micro_batches(training: Training) -> list[TokenBatch]:
    """This process's part of the batch, in pieces that are inferred together.

    The ids of the sequences are their places in the order of the data: no step meets the noise of another.
    """
    config, sequences, processes = training.config, training.train, training.processes
    position = training.progress.step, config.batch_size
    ranks = processes.rank, processes.size
    indices = batch_indices(config.seed, *position, len(sequences), *ranks)
    size = micro_batch_size(config, processes.size)
    return [
        dataclasses.replace(sequences.batch(part), sequence_ids=torch.from_numpy(ids))
        for part, ids in zip(indices.reshape(-1, size), places(*position, *ranks).reshape(-1, size), strict=True)
    ]


def random_prefix(batch: TokenBatch, rng: Noise) -> TokenBatch:
    """Each text weighted up to a split point of its own, uniform from 0 (z from the prior) to all its tokens."""
    num_tokens = batch.weights.sum(1).cpu()
    fraction = rng.uniform("split", batch.sequence_ids, torch.zeros_like(batch.sequence_ids))
    return batch.prefix((fraction * (num_tokens + 1)).floor())


def train_record(training: Training, result: StepResult, tokens_per_second: float) -> dict[str, Any]:
    """The line of a training step in `metrics.jsonl`: the estimate of its own loss, from one draw of z."""
    progress, scheme, loss = training.progress, training.scheme, result.loss
    values = figures.per_token(loss.nelbo, loss.rate, result.num_tokens, result.num_bytes)
    if not scheme.has_density:
        values |= dict.fromkeys(("nelbo_nats_per_token", "kl_nats_per_token", "bits_per_byte", "perplexity"))
        values["neg_log_joint_nats_per_token"] = loss.nelbo / result.num_tokens
    estimator = "elbo" if scheme.loss_is_bound else "reused-noise" if scheme.has_density else "neg-log-joint"
    return {
        "split": "train",
        "step": progress.step,
        "tokens_seen": progress.tokens_seen,
        "estimator": "exact" if training.config.inference == NO_INFERENCE else estimator,
        "num_samples": 1,
        "valid_bound": scheme.loss_is_bound and bool(np.isfinite(loss.nelbo)),
        **values,
        "learning_rate": training.optimizer.learning_rate(progress.step - 1),
        "gradient_norm": training.optimizer.gradient_norm,
        "fast_steps": scheme.num_steps,
        "num_skipped_steps": progress.num_skipped_steps,
        "num_skipped_fast_steps": result.num_skipped_fast_steps,
        "tokens_per_second": tokens_per_second,
        "seconds": progress.seconds,
    }


def held_out(training: Training, num_sequences: int, inference: Inference, stop: StopSignal) -> figures.Figure | None:
    """The bound on held-out texts, z inferred from each as a whole; None if a signal asked to stop on the way.

    Every process scores a part of them; the figure is that of all.
    """
    config, validation, processes = training.config, training.validation, training.processes
    chosen = figures.chosen_sequences(len(validation), num_sequences)
    size = min(micro_batch_size(config, processes.size), -(-len(chosen) // processes.size))

    def batches() -> Iterator[TokenBatch]:
        for start in range(0, len(chosen), size * processes.size):
            if training.is_stopped(stop):
                return
            part = chosen[start + size * processes.rank :][:size]
            batch = processes.by_all(lambda part=part: validation.batch(part) if len(part) else None)
            if batch is not None:
                yield batch.to(training.device)

    settings = EstimatorSettings(num_samples=config.validation_samples)
    rng = SequenceNoise(config.seed)
    (figure,) = figures.score(training.model, batches(), validation.document_ids, ["elbo"], inference, settings, rng)
    if training.is_stopped(stop):
        return None
    first, *others = processes.gather(figure)
    for other in others:
        first.join(other)
    return first


def train(training: Training, run: Run, stop: StopSignal) -> None:
    """Take slow steps until the last one, or until a signal asks to stop.

    A checkpoint stands at the end of both, and before the first step, so that a run can go on from any crash.

    Raises:
        Diverged: see :func:`slow_step`.
        WriteError: if a file of the run cannot be written. Nothing is saved then: the metrics may lack a line of it.
    """
    progress = training.progress
    try:
        with Console(progress.step, training.config.steps, has_bar=training.processes.is_first) as console:
            save(training, run)
            take_steps(training, run, stop, console)
    except (OSError, InputError):
        # The output has gone, the disk that it is written to is full, or the data is damaged.
        save(training, run)
        raise
    save(training, run)


def take_steps(training: Training, run: Run, stop: StopSignal, console: Console) -> None:
    """The loop of :func:`train`: validate where it is due, take a slow step, log, save."""
    config, progress = training.config, training.progress
    validated = training.processes.by_first(
        lambda: {record["step"] for record in run.read_metrics() if record.get("split") == "validation"}
    )
    tokens_logged, seconds_logged, steps_logged = progress.tokens_seen, progress.seconds, progress.step
    while progress.step < config.steps and not training.is_stopped(stop):
        # Before the step and not after it, so that a run that was stopped in between catches up.
        if progress.step and progress.step % config.validate_every == 0 and progress.step not in validated:
            figure = held_out(training, config.validation_sequences, inference_of(config), stop)
            if figure is None:
                return
            # Before its line: after a crash in between, the resumed run does both again.
            keep_if_best(training, run, figure)
            log(training, run, held_out_record(training, "validation", figure))
            console.say(f"step {progress.step}: held-out text, {figure}")
        started = time.perf_counter()
        result = slow_step(training, stop)
        if result is None:
            return
        progress.seconds += time.perf_counter() - started
        record = None
        elapsed = progress.seconds - seconds_logged
        seconds_per_step = elapsed / (progress.step - steps_logged)
        if progress.step % config.log_every == 0 or progress.step == config.steps:
            record = train_record(training, result, (progress.tokens_seen - tokens_logged) / elapsed)
            log(training, run, record)
            tokens_logged, seconds_logged, steps_logged = progress.tokens_seen, progress.seconds, progress.step
        console.step(record, seconds_per_step)
        # Not after a skip: the weights may be what made the step fail.
        if progress.step % config.checkpoint_every == 0 and not progress.skips_in_a_row:
            save(training, run)


def save(training: Training, run: Run) -> None:
    """Write a checkpoint of where the run stands, if there is none."""
    if training.processes.is_first:
        checkpoint.save(
            run.checkpoints,
            training.model,
            training.optimizer.adamw,
            training.progress,
            training.config.num_checkpoints,
        )


def keep_if_best(training: Training, run: Run, figure: figures.Figure) -> None:
    """Save a checkpoint and mark it as the best, if this figure of it is better than all before."""
    record = {"step": training.progress.step, **figure.record()}
    # After a skip the weights may be what made the step fail.
    is_candidate = training.processes.is_first and not training.progress.skips_in_a_row
    if is_candidate and checkpoint.is_best(run.checkpoints, record):
        save(training, run)
        checkpoint.mark_best(run.newest_checkpoint(), record)


def log(training: Training, run: Run, record: dict[str, Any]) -> None:
    """Write a line to `metrics.jsonl`, and where it was asked for to TensorBoard."""
    if training.processes.is_first:
        run.append_metrics(record)
    if training.board is not None:
        training.board.add(record)


def held_out_record(training: Training, split: str, figure: figures.Figure) -> dict[str, Any]:
    """The line of a held-out figure in `metrics.jsonl`."""
    progress = training.progress
    return {"split": split, "step": progress.step, "tokens_seen": progress.tokens_seen, **figure.record()}


def report(training: Training, run: Run, corpus: TokenizedCorpus, trained: TrainedModel, stop: StopSignal) -> None:
    """Close with held-out figures, also of z drawn from the prior, and two texts."""
    config = training.config
    inferences = [inference_of(config)]
    if config.inference != NO_INFERENCE:
        # Of a run that takes no fast steps, VI would be the prior.
        vi_steps = config.fast_steps or preset(config.preset).fast_steps
        inferences += [inference_of(config, "vi", vi_steps), Inference.without()]
    order_zero = figures.order_zero_bits_per_byte(corpus.validation.documents, trained.tokenizer)
    print(f"\nheld-out text of {corpus.name} (entropy of all its single bytes: {order_zero:.3f} bits/byte)", flush=True)
    for inference in dict.fromkeys(inferences):
        figure = held_out(training, 4 * config.validation_sequences, inference, stop)
        if figure is None:
            return
        log(training, run, held_out_record(training, "report", figure))
        print(f"  {figure}", flush=True)
    if not training.processes.is_first:
        return
    print("\ntwo texts from the model" + ("" if config.inference == NO_INFERENCE else ", z from the prior"))
    with pyro.get_param_store().scope(), torch.no_grad():
        tokens = training.model(num_sequences=2)
    for text in trained.decode(tokens):
        print(f"  {text!r}")


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


def set_up(config: TrainConfig, processes: Processes) -> tuple[Training, TokenizedCorpus, TrainedModel]:
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
    return training, corpus, TrainedModel(model, encoding, config)


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
    training, corpus, trained = processes.by_all(lambda: set_up(config, processes))
    resolved = resolved_against(corpus.sha256, trained.tokenizer, training.device, processes.size)
    run = Run(processes.by_first(go_on if config.resume else begin))
    processes.by_all(follow)
    training.synchronised = processes.synchronised(training.model)
    if config.tensorboard and processes.is_first:
        board = TensorBoard(run.path / tensorboard.FOLDER, training.progress.step)
        training.board = open_until_end.enter_context(board)
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
