"""The loop of training: slow steps, validation, metrics, checkpoints, and the closing report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ltm_pyro.config import NO_INFERENCE, TrainConfig, micro_batch_size, preset, scheme_of
from ltm_pyro.data import (
    PackedSequences,
    TokenizedCorpus,
    batch_indices,
    stream_positions,
)
from ltm_pyro.errors import InputError
from ltm_pyro.evaluation import figures
from ltm_pyro.evaluation.estimators import EstimatorSettings
from ltm_pyro.evaluation.inferred import Inference, held_at_start, inference_of
from ltm_pyro.files import durable
from ltm_pyro.files.stop import StopSignal
from ltm_pyro.inference import COMMON_SCHEME, PRIOR, PosteriorScheme, SequenceNoise
from ltm_pyro.inference.svi import SlowLoss, WeightOptimizer, accumulating
from ltm_pyro.models import LatentThoughtModel, TokenBatch
from ltm_pyro.runs import checkpoint
from ltm_pyro.runs.checkpoint import Progress
from ltm_pyro.runs.continuation import infer_thoughts
from ltm_pyro.runs.run import Run
from ltm_pyro.runs.trained import TrainedModel
from ltm_pyro.training.load import LoadOfOthers
from ltm_pyro.training.processes import Processes
from ltm_pyro.training.progress import ProgressDisplay
from ltm_pyro.training.tensorboard import TensorBoard

if TYPE_CHECKING:  # it takes a second to import, and only --sharded needs it
    from ltm_pyro.training.sharded import ShardedWeights

MAX_SKIPS_IN_A_ROW = 5
LONGEST_SAMPLE = 256
"""The most tokens of a text that the closing report shows."""


class Diverged(Exception):
    """Several steps in a row had values that are not finite."""


@dataclass
class Training:
    """A run that is being trained, with everything that the loop needs."""

    trained: TrainedModel
    """The model that is trained, its settings, and the progress of the run."""
    corpus: TokenizedCorpus
    synchronised: torch.nn.Module
    """The same model; its backward pass averages gradients over the processes, but not those of split weights."""
    scheme: PosteriorScheme
    optimizer: WeightOptimizer
    train: PackedSequences
    """The sequences of the training text."""
    validation: PackedSequences
    """The sequences of the held-out text."""
    device: torch.device
    processes: Processes
    sharded: ShardedWeights | None = None
    """The weights as they are split between processes; None where every process has all of them."""
    board: TensorBoard | None = None
    """The writer of TensorBoard's curves; None without --tensorboard."""

    @property
    def config(self) -> TrainConfig:
        """The settings."""
        return self.trained.config

    @property
    def model(self) -> LatentThoughtModel:
        """The model that is trained."""
        return self.trained.model

    @property
    def progress(self) -> Progress:
        """The progress of the run, which every step updates."""
        return self.trained.progress

    @property
    def run(self) -> Run:
        """The folder of the run."""
        return Run(self.trained.path)

    @property
    def is_alone_on_cpu(self) -> bool:
        """Whether one process trains on a CPU."""
        return self.device.type == "cpu" and self.processes.size == 1

    def whole_weights(self) -> contextlib.AbstractContextManager[None]:
        """A block in which this process holds all weights. All processes enter it together."""
        return contextlib.nullcontext() if self.sharded is None else self.sharded.whole()

    def is_stopped(self, stop: StopSignal) -> bool:
        """Whether a signal has asked any process to stop. If so, all processes stop, with the same signal.

        Only the result of this method may decide what to do next: a signal may just have reached one process alone.
        """
        received = next((number for number in self.processes.gather(stop.received) if number), None)
        if received is not None:
            stop.received = received
        return received is not None


def slow_step(training: Training, stop: StopSignal) -> SlowLoss | None:
    """Infer z of every sequence of the batch, then take one step on the weights, which are whole until then.

    Returns:
        what the step saw, summed over all processes; None if a signal asked to stop before the step was taken.

    Raises:
        Diverged: after several steps in a row were skipped because a value was not finite.
    """
    config, progress, processes = training.config, training.progress, training.processes
    objective = config.objective
    num_tokens = tokens_of_step(training)
    batches = processes.by_all(lambda: micro_batches(training))
    # Each sequence has noise of its own, so it does not matter which process has it, or together with which others.
    rng = SequenceNoise(config.seed, training.device)
    loss = SlowLoss()
    for number, batch in enumerate(batches, 1):
        if training.is_stopped(stop):
            training.optimizer.discard()
            return None
        loss += SlowLoss(num_tokens=int(batch.weights.sum()), num_bytes=int(batch.num_bytes.sum()))
        batch = batch.to(training.device)
        with contextlib.nullcontext() if number == len(batches) else accumulating(training.synchronised):
            # Gradients are averaged over the processes. Each process divides by its share of the tokens, so that the
            # average is the gradient per token of all of them.
            share = num_tokens / processes.size
            loss += objective.backward(training.model, training.synchronised, training.scheme, batch, rng, share)
    loss = sum(processes.gather(loss.on_host()), SlowLoss())
    if training.sharded is not None:
        training.sharded.average_gradients()
    if training.optimizer.update(progress.step, is_usable=not loss.num_unusable and bool(np.isfinite(loss.nelbo))):
        progress.skips_in_a_row = 0
    else:
        progress.skips_in_a_row += 1
        progress.num_skipped_steps += 1
    progress.step += 1
    progress.tokens_seen += num_tokens
    if progress.skips_in_a_row >= MAX_SKIPS_IN_A_ROW:
        raise Diverged(f"{MAX_SKIPS_IN_A_ROW} steps in a row had values that are not finite")
    return loss


def tokens_of_step(training: Training) -> int:
    """The predicted tokens of the batch, of all processes together."""
    config, sequences = training.config, training.train
    indices = batch_indices(config.seed, training.progress.step, config.batch_size, len(sequences))
    return int(sequences.num_tokens[indices].sum())


def micro_batches(training: Training) -> list[TokenBatch]:
    """This process's part of the batch, in pieces that are inferred together.

    The sequence ids are positions in the endless stream of the data, so no step reuses the noise of another.
    """
    config, sequences, processes = training.config, training.train, training.processes
    position = training.progress.step, config.batch_size
    ranks = processes.rank, processes.size
    indices = batch_indices(config.seed, *position, len(sequences), *ranks)
    size = micro_batch_size(config, training.device, processes.size)
    positions = stream_positions(*position, *ranks)
    return [
        dataclasses.replace(sequences.batch(part), sequence_ids=torch.from_numpy(ids))
        for part, ids in zip(indices.reshape(-1, size), positions.reshape(-1, size), strict=True)
    ]


def train_record(training: Training, loss: SlowLoss, tokens_per_second: float) -> dict[str, Any]:
    """The line of a training step in `metrics.jsonl`: the estimate of its own loss, from one draw of z."""
    progress, scheme, objective = training.progress, training.scheme, training.config.objective
    # A code needs no density: every block is scored with a z that was there before it.
    is_code, has_z = objective.block_size is not None, training.config.inference != NO_INFERENCE
    kl = None if is_code and has_z else loss.kl
    values: dict[str, Any] = dict(figures.per_token(loss.nelbo, kl, loss.num_tokens, loss.num_bytes))
    values["nll_nats_per_token"] = loss.nll / loss.num_tokens
    estimator, is_valid = objective.figure if has_z else "exact", is_code or scheme.loss_is_bound
    if not is_code and not scheme.has_density:
        values |= dict.fromkeys(("nelbo_nats_per_token", "kl_nats_per_token", "bits_per_byte", "perplexity"))
        values["neg_log_joint_nats_per_token"] = loss.nelbo / loss.num_tokens
        estimator = "neg-log-joint"
    elif not is_valid:
        estimator = "reused-noise"
    return {
        "split": "train",
        "step": progress.step,
        "tokens_seen": progress.tokens_seen,
        "estimator": estimator,
        "num_samples": 1,
        "valid_bound": is_valid and bool(np.isfinite(loss.nelbo)),
        **values,
        "learning_rate": training.optimizer.learning_rate(progress.step - 1),
        "gradient_norm": training.optimizer.gradient_norm,
        "fast_steps": scheme.num_steps,
        "num_skipped_steps": progress.num_skipped_steps,
        "num_skipped_fast_steps": loss.num_skipped_fast_steps,
        "tokens_per_second": tokens_per_second,
        "seconds": progress.seconds,
    }


def held_out(
    training: Training, chosen: npt.NDArray[np.int64], inference: Inference, stop: StopSignal
) -> figures.Figure | None:
    """The objective's figure of these held-out sequences; None if a signal asked to stop meanwhile.

    Every process scores a part of them; the figure is that of all.
    """
    config, validation, processes = training.config, training.validation, training.processes
    size = min(micro_batch_size(config, training.device, processes.size), -(-len(chosen) // processes.size))

    def batches() -> Iterator[TokenBatch]:
        for start in range(0, len(chosen), size * processes.size):
            if training.is_stopped(stop):
                return
            part = chosen[start + size * processes.rank :][:size]
            batch = processes.by_all(functools.partial(_batch_of, validation, part))
            if batch is not None:
                yield batch.to(training.device)

    settings = EstimatorSettings(num_samples=config.validation_samples)
    rng = SequenceNoise(config.seed)
    names = [config.objective.figure]
    (figure,) = figures.score(training.model, batches(), validation.document_ids, names, inference, settings, rng)
    if training.is_stopped(stop):
        return None
    first, *others = processes.gather(figure)
    for other in others:
        first.join(other)
    return first


def _batch_of(sequences: PackedSequences, indices: np.ndarray) -> TokenBatch | None:
    return sequences.batch(indices) if len(indices) else None


def train(training: Training, stop: StopSignal) -> None:
    """Take slow steps until the last one, or until a signal asks to stop.

    A checkpoint is saved in both cases, and before the first step, so that a run can be resumed after any crash.

    Raises:
        Diverged: see :func:`slow_step`.
        WriteError: if a file of the run cannot be written. No checkpoint is saved then, as a line of metrics may be
            missing.
    """
    progress = training.progress
    try:
        with ProgressDisplay(progress.step, training.config.steps, has_bar=training.processes.is_first) as display:
            save(training)
            take_steps(training, stop, display)
    except (OSError, InputError, torch.OutOfMemoryError):
        # The output is closed, the disk that it is written to is full, the data is damaged, or a GPU's memory is full.
        # The other processes may not know of it yet.
        if training.sharded is None:
            save(training)
        raise
    save(training)


def take_steps(training: Training, stop: StopSignal, display: ProgressDisplay) -> None:
    """The loop of :func:`train`: validate where it is due, take a slow step, log, save."""
    config, progress = training.config, training.progress
    validated = training.processes.by_first(
        lambda: {record["step"] for record in training.run.read_metrics() if record.get("split") == "validation"}
    )
    tokens_logged, seconds_logged = progress.tokens_seen, progress.seconds
    load = LoadOfOthers(torch.get_num_threads()) if training.is_alone_on_cpu else None
    while progress.step < config.steps and not training.is_stopped(stop):
        # Before the step and not after it, so that a run that was stopped in between still validates.
        if progress.step and progress.step % config.validate_every == 0 and progress.step not in validated:
            chosen = figures.validation_sequences(len(training.validation), config.validation_sequences)
            with training.whole_weights():
                figure = held_out(training, chosen, inference_of(config), stop)
            if figure is None:
                return
            # Before its line is written: after a crash in between, the resumed run does both again.
            lowest = keep_if_best(training, figure)
            log(training, held_out_record(training, "validation", figure))
            display.say(f"step {progress.step}: held-out text, {figure}")
            if lowest is not None:
                display.say(
                    f"  it was lower after step {lowest['step']}: if it goes on to rise, the model is learning its "
                    "texts by heart; other commands take the lowest with --which best"
                )
        started = time.perf_counter()
        with training.whole_weights():
            loss = slow_step(training, stop)
        if loss is None:
            return
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        record = None
        if progress.step % config.log_every == 0 or progress.step == config.steps:
            rate = (progress.tokens_seen - tokens_logged) / (progress.seconds - seconds_logged)
            record = train_record(training, loss, rate)
            log(training, record)
            tokens_logged, seconds_logged = progress.tokens_seen, progress.seconds
        display.step(record, seconds)
        if record is not None and load is not None and (hint := load.hint()) is not None:
            display.say(f"  {hint}")
            load = None  # once is enough
        # Not after a skipped step, which may have failed because of the weights.
        if progress.step % config.checkpoint_every == 0 and not progress.skips_in_a_row:
            save(training)


def save(training: Training) -> None:
    """Write a checkpoint of the present step, if there is none. Where weights are split, all processes do so together.

    Raises:
        FloatingPointError, WriteError: as :func:`ltm_pyro.runs.checkpoint.save`.
    """
    processes, folder, progress = training.processes, training.run.checkpoints, training.progress
    optimizer, num_kept = training.optimizer.algorithm, training.config.num_checkpoints
    if training.sharded is None:
        if processes.is_first:
            checkpoint.save(folder, training.model, optimizer, progress, num_kept)
        return
    target = checkpoint.path_of(folder, progress)
    if processes.by_first(target.exists):
        return

    def write_parts(partial: Path) -> dict[str, str]:
        processes.gather(None)  # until the first process has made the folder
        sums = processes.gather(processes.by_all(lambda: checkpoint.write_part(partial, optimizer, processes.group)))
        return {name: digest for of_one in sums for name, digest in of_one.items()}

    # Before the first step there are no moments, and no process has a part of them.
    parts = write_parts if optimizer.state else None
    weights = training.model.state_dict()
    with training.sharded.whole():
        if processes.is_first:
            weights |= {name: weight.detach() for name, weight in training.model.named_parameters()}
            checkpoint.save(folder, weights, optimizer, progress, num_kept, parts)
        elif parts is not None:
            parts(durable.partial_of(target))


def keep_if_best(training: Training, figure: figures.Figure) -> dict[str, Any] | None:
    """Save a checkpoint and mark it as the best, if its held-out figure is better than all earlier ones.

    Returns:
        the record of the best figure, where this one is worse; in the first process only.
    """
    # Earlier versions validated on other sequences, and did not say so.
    run, record = training.run, {"step": training.progress.step, "sequences": "reserved", **figure.record()}
    # Not after a skipped step, which may have failed because of the weights.
    if training.progress.skips_in_a_row:
        return None
    is_best = training.processes.by_first(lambda: checkpoint.is_best(run.checkpoints, record))
    if is_best:
        save(training)
    if not training.processes.is_first:
        return None
    if is_best:
        checkpoint.mark_best(run.newest_checkpoint(), record)
        return None
    best = checkpoint.best_checkpoint(run.checkpoints)
    return None if best is None or not figure.is_valid else checkpoint.read_best(best)


def log(training: Training, record: dict[str, Any]) -> None:
    """Write a line to `metrics.jsonl`, and to TensorBoard with --tensorboard."""
    if training.processes.is_first:
        training.run.append_metrics(record)
    if training.board is not None:
        training.board.add(record)


def held_out_record(training: Training, split: str, figure: figures.Figure) -> dict[str, Any]:
    """The line of a held-out figure in `metrics.jsonl`."""
    progress = training.progress
    return {"split": split, "step": progress.step, "tokens_seen": progress.tokens_seen, **figure.record()}


def report(training: Training, stop: StopSignal) -> None:
    """Close with figures on held-out text and with two texts from the model.

    The figures are by the run's own scheme, by a common one, so that runs of all schemes have a figure in common,
    and with z from the prior. Where training infers z block by block, they are with this thinking and without it.
    """
    config, corpus, trained = training.config, training.corpus, training.trained
    inferences = [inference_of(config)]
    is_streaming = config.objective.block_size is not None
    if is_streaming:
        inferences.append(held_at_start(config))
    elif config.inference != NO_INFERENCE:
        # A run without fast steps does not say how many the common scheme should take: with none, it would be the
        # prior.
        fast_steps = config.fast_steps or preset(config.preset, infer_from="whole").fast_steps
        inferences += [inference_of(config, COMMON_SCHEME, fast_steps), Inference.from_prior()]
    order_zero = figures.order_zero_bits_per_byte(corpus.validation.documents, trained.tokenizer)
    print(f"\nheld-out text of {corpus.name} (entropy of all its single bytes: {order_zero:.3f} bits/byte)", flush=True)
    found, num_validation = [], config.validation_sequences
    # A report is to take no longer than a short training.
    num_scored = min(4 * num_validation, max(num_validation, config.steps))
    chosen = figures.chosen_sequences(len(training.validation), num_scored, num_validation)
    for inference in dict.fromkeys(inferences):
        figure = held_out(training, chosen, inference, stop)
        if figure is None:
            return
        log(training, held_out_record(training, "report", figure))
        print(f"  {figure}", flush=True)
        found.append(figure)
    if is_streaming and len(found) == 2 and found[0].num_bytes:
        gain, error = figures.difference(*found)
        in_documents = "" if error is None else f" ± {error:.4f} (over documents)"
        print(f"  thinking changes the code length by {gain:+.4f}{in_documents} bits/byte", flush=True)
    if not training.processes.is_first:
        return
    start = "as it is before a text is read" if is_streaming else "from the prior"
    z_from = "" if config.inference == NO_INFERENCE else f", z {start}"
    print(f"\nthe beginnings of two texts from the model{z_from}")
    z = infer_thoughts(trained, [[], []], scheme_of(config) if is_streaming else PRIOR, 1, SequenceNoise(config.seed))
    tokens = trained.model.generate(z[:, 0], min(config.model.length, LONGEST_SAMPLE))
    for text in trained.decode(tokens):
        print(f"  {text!r}")
