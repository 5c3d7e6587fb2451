"""Train a Latent Thought Model: python -m ltm_pyro.train --inference=vi

Two rates (Kong et al. 2025, algorithm 1). Fast: T steps of posterior inference of each sequence's own z, weights
frozen. Slow: one step of stochastic variational inference on the weights, with the posteriors just inferred.

All randomness of a step is a pure function of the seed and the step. So a run that stops and goes on ends, on a CPU and
with as many threads, bit for bit where one that never stopped does.
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

from ltm_pyro import checkpoint, cli, figures
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
from ltm_pyro.data import PACKING, PackedSequences, TokenizedCorpus, batch_indices, get_tokenizer, load_tokenized_corpus
from ltm_pyro.errors import InputError, WriteError
from ltm_pyro.estimators import EstimatorSettings, Inference
from ltm_pyro.inference import BatchNoise, Noise, SequenceNoise, infer
from ltm_pyro.inference.svi import SlowLoss, WeightOptimizer, elbo_backward
from ltm_pyro.lock import locked
from ltm_pyro.models import LatentThoughtModel, TokenBatch
from ltm_pyro.run import Run, TrainedModel, build_model, check_is_free, create_run, resolved_against
from ltm_pyro.stop import StopSignal

MAX_SKIPS_IN_A_ROW = 5
CHANGEABLE = {
    "steps",
    "device",
    "compile",
    "out",
    "resume",
    "log_every",
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
    scheme: Any
    optimizer: WeightOptimizer
    train: PackedSequences
    validation: PackedSequences
    device: torch.device
    progress: Progress


@dataclass(frozen=True)
class StepResult:
    """What one slow step saw, summed over its sequences."""

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
    config, progress = training.config, training.progress
    indices = batch_indices(config.seed, progress.step, config.batch_size, len(training.train))
    micro_batches = [training.train.batch(part) for part in indices.reshape(-1, micro_batch_size(config))]
    num_tokens = int(sum(batch.weights.sum() for batch in micro_batches))
    nelbo = rate = 0.0
    num_skipped_fast_steps, is_usable = 0, True
    for number, batch in enumerate(micro_batches):
        if stop.received:
            training.optimizer.discard()
            return None
        batch = batch.to(training.device)
        rng = BatchNoise(generator_of(config.seed, progress.step, number, training.device))
        observed = batch if config.infer_from == "whole" else random_prefix(batch, rng)
        state = infer(training.scheme, training.model, observed, rng)
        guide = training.scheme.guide(training.model, state, observed, rng)
        loss = elbo_backward(training.model, guide, batch, num_tokens)
        nelbo, rate = nelbo + loss.nelbo, rate + loss.rate
        num_skipped_fast_steps += int(state.num_skipped.sum())
        # Where no sequence could take any step, the posteriors are no better than their start.
        is_usable &= config.fast_steps == 0 or bool((state.num_skipped < state.step).any())
    if training.optimizer.update(progress.step, is_usable=is_usable and np.isfinite(nelbo)):
        progress.skips_in_a_row = 0
    else:
        progress.skips_in_a_row += 1
        progress.num_skipped_steps += 1
    progress.step += 1
    progress.tokens_seen += num_tokens
    if progress.skips_in_a_row >= MAX_SKIPS_IN_A_ROW:
        raise Diverged(f"{MAX_SKIPS_IN_A_ROW} steps in a row had values that are not finite")
    num_bytes = sum(int(batch.num_bytes.sum()) for batch in micro_batches)
    return StepResult(SlowLoss(nelbo, rate), num_tokens, num_bytes, num_skipped_fast_steps)


def generator_of(seed: int, step: int, micro_batch: int, device: torch.device) -> torch.Generator:
    """The generator of one micro-batch: nothing of it depends on the steps before."""
    (state,) = np.random.SeedSequence([seed, step, micro_batch]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


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
        "fast_steps": scheme.num_steps,
        "num_skipped_steps": progress.num_skipped_steps,
        "num_skipped_fast_steps": result.num_skipped_fast_steps,
        "tokens_per_second": tokens_per_second,
        "seconds": progress.seconds,
    }


def held_out(training: Training, num_sequences: int, inference: Inference, stop: StopSignal) -> figures.Figure | None:
    """The bound on held-out texts, z inferred from each as a whole; None if a signal asked to stop on the way."""
    config, validation = training.config, training.validation
    chosen = figures.chosen_sequences(len(validation), num_sequences)
    size = micro_batch_size(config)

    def batches() -> Iterator[TokenBatch]:
        for start in range(0, len(chosen), size):
            if stop.received:
                return
            yield validation.batch(chosen[start : start + size]).to(training.device)

    settings = EstimatorSettings(num_samples=config.validation_samples)
    rng = SequenceNoise(config.seed)
    (figure,) = figures.score(training.model, batches(), validation.document_ids, ["elbo"], inference, settings, rng)
    return None if stop.received else figure


def train(training: Training, run: Run, stop: StopSignal) -> None:
    """Take slow steps until the last one, or until a signal asks to stop.

    A checkpoint stands at the end of both, and before the first step, so that a run can go on from any crash.

    Raises:
        Diverged: see :func:`slow_step`.
        WriteError: if a file of the run cannot be written. Nothing is saved then: the metrics may lack a line of it.
    """
    progress = training.progress
    try:
        with Console(progress.step, training.config.steps) as console:
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
    validated = {record["step"] for record in run.read_metrics() if record.get("split") == "validation"}
    tokens_logged, seconds_logged, steps_logged = progress.tokens_seen, progress.seconds, progress.step
    while progress.step < config.steps and not stop.received:
        # Before the step and not after it, so that a run that was stopped in between catches up.
        if progress.step and progress.step % config.validate_every == 0 and progress.step not in validated:
            figure = held_out(training, config.validation_sequences, inference_of(config), stop)
            if figure is None:
                return
            # Before its line: after a crash in between, the resumed run does both again.
            keep_if_best(training, run, figure)
            log(training, run, "validation", figure)
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
            run.append_metrics(record)
            tokens_logged, seconds_logged, steps_logged = progress.tokens_seen, progress.seconds, progress.step
        console.step(record, seconds_per_step)
        # Not after a skip: the weights may be what made the step fail.
        if progress.step % config.checkpoint_every == 0 and not progress.skips_in_a_row:
            save(training, run)


def save(training: Training, run: Run) -> Path:
    """Write a checkpoint of where the run stands, if there is none."""
    return checkpoint.save(
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
    if not training.progress.skips_in_a_row and checkpoint.is_best(run.checkpoints, record):
        checkpoint.mark_best(save(training, run), record)


def log(training: Training, run: Run, split: str, figure: figures.Figure) -> None:
    """Write a held-out figure to `metrics.jsonl`."""
    progress = training.progress
    run.append_metrics({"split": split, "step": progress.step, "tokens_seen": progress.tokens_seen, **figure.record()})


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
        log(training, run, "report", figure)
        print(f"  {figure}", flush=True)
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


def prepare(
    config: TrainConfig, open_until_end: contextlib.ExitStack
) -> tuple[Training, Run, TokenizedCorpus, TrainedModel]:
    """Load the corpus, build the model, and make the folder of the run or read it.

    Args:
        open_until_end: receives the lock of the folder.
    """
    device = cli.pick_device(config.device)
    run = Run(Path(config.out)) if config.resume else None
    if run:
        run.newest_checkpoint()  # a run without one is refused before its corpus is loaded
        open_until_end.enter_context(locked(run.path))
    encoding = get_tokenizer(config.tokenizer)
    corpus = load_tokenized_corpus(config.data, config.text_column, encoding)
    pack, length = PACKING[config.packing], config.model.length
    packed = pack(corpus.train, encoding, length)
    validation = pack(corpus.validation.documents, encoding, length)
    num_tokens = corpus.train.num_tokens
    if num_tokens < length:
        raise InputError(
            f"the training text of {config.data} has {num_tokens:,} tokens, and one sequence needs {length:,}: "
            "give more text or a smaller --model.length"
        )
    resolved = resolved_against(corpus.sha256, encoding, device)
    pyro.set_rng_seed(config.seed)
    model = build_model(config, encoding).to(device)
    if config.compile:
        model.decoder.compile()
    optimizer = WeightOptimizer(model, config.optimizer, config.steps)
    progress = Progress()
    if run is None:
        run = create_run(config.out, f"{corpus.name}-{config.preset}-{config.inference}")
        open_until_end.enter_context(locked(run.path))
        config = dataclasses.replace(config, out=str(run.path))
        run.write_config(config, resolved)
    else:
        _, before = run.read_config()
        for name in ("corpus_sha256", "tokenizer_sha256"):
            if before.get(name) != resolved[name]:
                what = name.removesuffix("_sha256")
                raise InputError(f"the {what} is not the one that {run.path} was trained with: its hash has changed")
        progress, damage = run.restore(model, optimizer.adamw)
        if damage:
            print(f"warning: {damage}", file=sys.stderr)
        run.write_config(dataclasses.replace(config, resume=False), resolved)
    training = Training(config, model, scheme_of(config), optimizer, packed, validation, device, progress)
    return training, run, corpus, TrainedModel(model, encoding, config)


def main(args: Sequence[str]) -> int:
    config = parse(args)
    with contextlib.ExitStack() as open_until_end:
        return carry_out(*prepare(config, open_until_end))


def carry_out(training: Training, run: Run, corpus: TokenizedCorpus, trained: TrainedModel) -> int:
    """Train, report, and say how it ended: the exit status."""
    config = training.config
    num_weights = sum(weight.numel() for weight in training.model.parameters())
    thinking = f"{config.inference} with {config.fast_steps} fast steps"
    go_on = f"go on with: python -m ltm_pyro.train --out {shlex.quote(str(run.path))} --resume"
    print(
        f"{run.path}: {num_weights:,} weights on {training.device}, "
        f"{'no z' if config.inference == NO_INFERENCE else thinking}; "
        f"{len(training.train):,} sequences to train on, {len(training.validation):,} held out",
        flush=True,
    )
    with StopSignal() as stop, pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered NaN")  # such steps are skipped and counted
        try:
            train(training, run, stop)
            if not stop.received:
                report(training, run, corpus, trained, stop)
        except (Diverged, FloatingPointError) as error:
            newest = run.newest_checkpoint()
            print(
                f"error: {error} (step {training.progress.step}); the last good checkpoint is {newest}", file=sys.stderr
            )
            return 1
        except WriteError as error:
            saved = checkpoint.all_checkpoints(run.checkpoints)
            hint = (
                f"the last checkpoint is {saved[-1]}; make room, and {go_on}" if saved else "there is no checkpoint yet"
            )
            print(f"error: {error}; {hint}", file=sys.stderr)
            return 1
    if stop.received:
        name = signal.Signals(stop.received).name
        print(f"\nstopped by {name}: saved {run.newest_checkpoint()}; {go_on}", flush=True)
        return 128 + stop.received
    print(f"\n{time_text(training.progress.seconds)} of training; the run is in {run.path}")
    return 0


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
