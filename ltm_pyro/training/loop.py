"""The loop of training: slow steps, validation, metrics, checkpoints, and the closing report."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch

from ltm_pyro.config import NO_INFERENCE, TrainConfig, micro_batch_size, preset
from ltm_pyro.data import (
    PackedSequences,
    TokenizedCorpus,
    batch_indices,
    places,
)
from ltm_pyro.errors import InputError
from ltm_pyro.evaluation import figures
from ltm_pyro.evaluation.estimators import EstimatorSettings
from ltm_pyro.evaluation.inferred import Inference, inference_of
from ltm_pyro.files.stop import StopSignal
from ltm_pyro.inference import Noise, SequenceNoise, infer
from ltm_pyro.inference.svi import SlowLoss, WeightOptimizer, elbo_backward
from ltm_pyro.models import LatentThoughtModel, TokenBatch
from ltm_pyro.runs import checkpoint
from ltm_pyro.runs.checkpoint import Progress
from ltm_pyro.runs.run import Run
from ltm_pyro.runs.trained import TrainedModel
from ltm_pyro.training.processes import Processes, accumulating
from ltm_pyro.training.progress import Console
from ltm_pyro.training.tensorboard import TensorBoard

MAX_SKIPS_IN_A_ROW = 5


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
        inferences += [inference_of(config, "vi", vi_steps), Inference.from_prior()]
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
