"""Train a Latent Thought Model: python -m ltm_pyro.train --inference=vi

Two rates (Kong et al. 2025, algorithm 1). Fast: T steps of posterior inference of each sequence's own z, weights
frozen. Slow: one step of stochastic variational inference on the weights, with the posteriors just inferred.

All randomness of a step is a pure function of the seed and the step, so a run that stops and goes on ends with the
same weights as one that never stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyro
import torch
from tqdm import tqdm

from ltm_pyro import checkpoint, cli, figures
from ltm_pyro.checkpoint import Progress
from ltm_pyro.config import TrainConfig, differences, preset, scheme_of, validate
from ltm_pyro.data import PACKING, Corpus, PackedSequences, batch_indices, get_tokenizer, load_corpus
from ltm_pyro.errors import InputError
from ltm_pyro.inference import BatchNoise, Noise, SequenceNoise, infer
from ltm_pyro.inference.svi import SlowLoss, WeightOptimizer, elbo_backward
from ltm_pyro.models import LatentThoughtModel, TokenBatch
from ltm_pyro.run import Run, TrainedModel, build_model, create_run, resolved_against

MAX_SKIPS_IN_A_ROW = 5
CHANGEABLE = {
    "steps",
    "device",
    "out",
    "resume",
    "log_every",
    "validate_every",
    "validation_sequences",
    "validation_samples",
    "checkpoint_every",
}
"""Settings that a resumed run may change."""


class Diverged(Exception):
    """Several steps in a row had values that are not finite."""


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the current step; a second one acts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()


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
    skips_in_a_row: int = 0


@dataclass(frozen=True)
class StepResult:
    """What one slow step saw, summed over its sequences."""

    loss: SlowLoss
    num_tokens: int
    num_bytes: int
    num_skipped_fast_steps: int
    """Fast steps of single sequences that were left out because a value was not finite."""


def slow_step(training: Training) -> StepResult:
    """Infer z of every sequence of the batch, then take one step on the weights.

    Raises:
        Diverged: after several steps in a row that were not finite, and have been skipped.
    """
    config, progress = training.config, training.progress
    indices = batch_indices(config.seed, progress.step, config.batch_size, len(training.train))
    micro_batches = [training.train.batch(part) for part in indices.reshape(-1, config.micro_batch_size)]
    num_tokens = int(sum(batch.weights.sum() for batch in micro_batches))
    nelbo = rate = 0.0
    num_skipped_fast_steps, is_usable = 0, True
    for number, batch in enumerate(micro_batches):
        batch = batch.to(training.device)
        rng = BatchNoise(generator_of(config.seed, progress.step, number, training.device))
        observed = batch if config.infer_from == "whole" else random_prefix(batch, rng)
        state = infer(training.scheme, training.model, observed, rng)
        loss = elbo_backward(training.model, training.scheme.guide(state, rng), batch, num_tokens)
        nelbo, rate = nelbo + loss.nelbo, rate + loss.rate
        num_skipped_fast_steps += int(state.num_skipped.sum())
        # Where no sequence could take a step, the posteriors are no better than their start.
        is_usable &= not bool((state.num_skipped > 0).all())
    if training.optimizer.update(progress.step, is_usable=is_usable and np.isfinite(nelbo)):
        training.skips_in_a_row = 0
    else:
        training.skips_in_a_row += 1
        progress.num_skipped_steps += 1
    progress.step += 1
    progress.tokens_seen += num_tokens
    if training.skips_in_a_row >= MAX_SKIPS_IN_A_ROW:
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
    config, progress, loss = training.config, training.progress, result.loss
    has_density = training.scheme.has_density
    is_bound = has_density and getattr(training.scheme, "noise", "fresh") == "fresh"
    values = figures.per_token(loss.nll, loss.rate, result.num_tokens, result.num_bytes)
    if not has_density:
        values |= dict.fromkeys(("nelbo_nats_per_token", "kl_nats_per_token", "bits_per_byte", "perplexity"))
        values["neg_log_joint_nats_per_token"] = loss.nelbo / result.num_tokens
    return {
        "split": "train",
        "step": progress.step,
        "tokens_seen": progress.tokens_seen,
        "estimator": "elbo" if is_bound else "reused-noise" if has_density else "neg-log-joint",
        "num_samples": 1,
        "valid_bound": is_bound,
        **values,
        "learning_rate": training.optimizer.learning_rate(progress.step - 1),
        "fast_steps": config.fast_steps,
        "num_skipped_steps": progress.num_skipped_steps,
        "num_skipped_fast_steps": result.num_skipped_fast_steps,
        "tokens_per_second": tokens_per_second,
        "seconds": progress.seconds,
    }


def scheme_name(config: TrainConfig) -> str:
    """What to call the posteriors of a run's scheme."""
    is_reused = config.inference == "vi" and config.vi.noise == "reused"
    return "vi fitted to reused noise" if is_reused else config.inference


def held_out(training: Training, num_sequences: int, scheme: Any, name: str, stop: StopSignal) -> figures.HeldOut:
    """The bound on held-out texts; on those scored so far, if a signal asks to stop."""
    config = training.config
    # Always the same texts, drawn from all of them.
    order = np.random.Generator(np.random.Philox(key=[config.seed, 0])).permutation(len(training.validation))

    def batches() -> Iterator[TokenBatch]:
        chosen = order[:num_sequences]
        for start in range(0, len(chosen), config.micro_batch_size):
            if start and stop.received:
                return
            yield training.validation.batch(chosen[start : start + config.micro_batch_size]).to(training.device)

    gaussian = dataclasses.replace(config.vi, num_steps=figures.GAUSSIAN_STEPS, noise="fresh")
    return figures.held_out_elbo(
        training.model, batches(), scheme, name, config.validation_samples, SequenceNoise(config.seed), gaussian
    )


class Console:
    """Progress for people: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, first_step: int, num_steps: int) -> None:
        is_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=not is_terminal, leave=False)
        self.num_steps = num_steps

    def step(self, record: dict[str, Any] | None, seconds_per_step: float) -> None:
        """Count a step; `record` is its line of metrics, if it has one."""
        self.bar.update()
        if record is None:
            return
        name = "nelbo" if record["nelbo_nats_per_token"] is not None else "neg_log_joint"
        text = f"{name} {record[f'{name}_nats_per_token']:.3f} nats/token"
        if self.bar.disable:
            left = time_text((self.num_steps - record["step"]) * seconds_per_step)
            print(
                f"step {record['step']}/{self.num_steps}  {text}  nll {record['nll_nats_per_token']:.3f}  "
                f"{record['tokens_per_second']:,.0f} tokens/s  {left} left",
                flush=True,
            )
        else:
            self.bar.set_postfix_str(f"{text}, {record['tokens_per_second']:,.0f} tokens/s")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def time_text(seconds: float) -> str:
    """5 s, 3 min 20 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def train(training: Training, run: Run, stop: StopSignal) -> None:
    """Take slow steps until the last one, or until a signal asks to stop; a checkpoint stands at the end of both."""
    config, progress = training.config, training.progress
    console = Console(progress.step, config.steps)
    tokens_logged, seconds_logged, steps_logged = progress.tokens_seen, progress.seconds, progress.step
    saved_at = None
    while progress.step < config.steps and not stop.received:
        started = time.perf_counter()
        result = slow_step(training)
        progress.seconds += time.perf_counter() - started
        record = None
        elapsed = progress.seconds - seconds_logged
        seconds_per_step = elapsed / (progress.step - steps_logged)
        if progress.step % config.log_every == 0 or progress.step == config.steps:
            record = train_record(training, result, (progress.tokens_seen - tokens_logged) / elapsed)
            run.append_metrics(record)
            tokens_logged, seconds_logged, steps_logged = progress.tokens_seen, progress.seconds, progress.step
        console.step(record, seconds_per_step)
        if progress.step % config.validate_every == 0 and progress.step < config.steps and not stop.received:
            figure = held_out(training, config.validation_sequences, training.scheme, scheme_name(config), stop)
            run.append_metrics({"step": progress.step, "tokens_seen": progress.tokens_seen, **figure.record()})
            console.say(f"step {progress.step}: held-out {sentence(figure)}")
        if progress.step % config.checkpoint_every == 0:
            checkpoint.save(run.checkpoints, training.model, training.optimizer.adamw, progress)
            saved_at = progress.step
    console.bar.close()
    if saved_at != progress.step:
        checkpoint.save(run.checkpoints, training.model, training.optimizer.adamw, progress)


def sentence(figure: figures.HeldOut) -> str:
    """A bound in words."""
    record = figure.record()
    kl_bits = figure.kl / np.log(2) / figure.num_bytes
    return (
        f"at most {figure.bits_per_byte:.3f} bits/byte, of which KL {kl_bits:.3f} "
        f"({record['nelbo_nats_per_token']:.3f} ± {record['monte_carlo_standard_error']:.3f} nats/token; "
        f"ELBO, z from {figure.posterior}, {figure.num_sequences} texts, {figure.num_samples} draws)"
    )


def report(training: Training, run: Run, corpus: Corpus, trained: TrainedModel, stop: StopSignal) -> None:
    """Close with held-out figures, also of z drawn from the prior, and two texts."""
    config = training.config
    num_sequences = 4 * config.validation_sequences
    prior = dataclasses.replace(config.vi, num_steps=0, initial_scale=1.0, noise="fresh")
    vi = dataclasses.replace(config.vi, num_steps=config.fast_steps, noise="fresh")
    posteriors = [(training.scheme, scheme_name(config))] if training.scheme != vi else []
    order_zero = figures.order_zero_bits_per_byte(corpus.validation)
    print(f"\nheld-out text of {corpus.name} (entropy of its single bytes: {order_zero:.3f} bits/byte):", flush=True)
    for scheme, name in [*posteriors, (vi, "vi"), (prior, "the prior")]:
        figure = held_out(training, num_sequences, scheme, name, stop)
        if stop.received:
            return
        run.append_metrics(
            {"step": training.progress.step, "tokens_seen": training.progress.tokens_seen, **figure.record()}
        )
        print(f"  {sentence(figure)}", flush=True)
    print("\ntwo texts from the model (z from the prior):")
    with pyro.get_param_store().scope(), torch.no_grad():
        tokens = training.model(num_sequences=2)
    for text in trained.decode(tokens):
        print(f"--- {text!r}")


def parse(args: Sequence[str]) -> TrainConfig:
    """The settings: those of the run that is resumed, or else of the preset, changed by the arguments."""
    first = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    first.add_argument("--preset", default="tiny")
    first.add_argument("--out")
    first.add_argument("--resume", action="store_true")
    try:
        known, _ = first.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    if not known.resume:
        config = cli.parse(preset(known.preset), args, "train")
        validate(config)
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


def pick_device(name: str) -> torch.device:
    """The device of that name; auto is cuda where there is one.

    Raises:
        InputError: if it is cuda and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no CUDA device here; use --device cpu")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def prepare(config: TrainConfig) -> tuple[Training, Run, Corpus, TrainedModel]:
    """Load the corpus, build the model, and make the folder of the run or read it."""
    device = pick_device(config.device)
    run = Run(Path(config.out)) if config.resume else None
    newest = run.newest_checkpoint() if run else None
    encoding = get_tokenizer(config.tokenizer)
    corpus = load_corpus(config.data, config.text_column)
    pack = PACKING[config.packing]
    packed = pack(corpus.train, encoding, config.model.length)
    validation = pack(corpus.validation, encoding, config.model.length)
    resolved = resolved_against(corpus.sha256, encoding, device)
    pyro.set_rng_seed(config.seed)
    model = build_model(config, encoding).to(device)
    optimizer = WeightOptimizer(model, config.optimizer, config.steps)
    progress = Progress()
    if run is None:
        run = create_run(config.out, f"{corpus.name}-{config.preset}-{config.inference}")
        config = dataclasses.replace(config, out=str(run.path))
        run.write_config(config, resolved)
    else:
        _, before = run.read_config()
        for name in ("corpus_sha256", "tokenizer_sha256"):
            if before.get(name) != resolved[name]:
                what = name.removesuffix("_sha256")
                raise InputError(f"the {what} is not the one that {run.path} was trained with: its hash has changed")
        checkpoint.load_weights(newest, model)
        progress = checkpoint.load_progress(newest, optimizer.adamw)
        run.forget_metrics_after(progress.step)
        run.write_config(dataclasses.replace(config, resume=False), resolved)
    training = Training(config, model, scheme_of(config), optimizer, packed, validation, device, progress)
    return training, run, corpus, TrainedModel(model, encoding, config)


def main(args: Sequence[str]) -> int:
    config = parse(args)
    training, run, corpus, trained = prepare(config)
    num_weights = sum(weight.numel() for weight in training.model.parameters())
    print(
        f"{run.path}: {num_weights:,} weights on {training.device}, {config.inference} with {config.fast_steps} fast "
        f"steps; {len(training.train):,} sequences to train on, {len(training.validation):,} held out",
        flush=True,
    )
    go_on = f"python -m ltm_pyro.train --out {run.path} --resume"
    with StopSignal() as stop, pyro.validation_enabled(False):
        try:
            train(training, run, stop)
            if not stop.received:
                report(training, run, corpus, trained, stop)
        except Diverged as error:
            saved = checkpoint.all_checkpoints(run.checkpoints)
            kept = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint had been saved yet"
            print(f"error: {error} (step {training.progress.step}); {kept}", file=sys.stderr)
            return 1
    newest = run.newest_checkpoint()
    if stop.received:
        name = signal.Signals(stop.received).name
        print(f"\nstopped by {name} at step {training.progress.step}: saved {newest}; go on with: {go_on}", flush=True)
        return 128 + stop.received
    print(f"\n{time_text(training.progress.seconds)} of training; the run is in {run.path}")
    return 0


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
