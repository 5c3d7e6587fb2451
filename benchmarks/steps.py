"""What steps of inference are worth: the valid bound that each way of stepping reaches, and when.

    python benchmarks/steps.py RUN [--reference PATH]

RUN is a trained run. Held-out texts of its corpus; the ELBO with draws that no fit has seen, in nats a text; seconds of
`infer` for all of these texts. The first way is the yardstick: Adam as in the reference implementation with fresh noise
and from the prior, 64 steps; for every other way the table says after how many steps it is as good, and in what part
of the time. With a clone of the reference, the yardstick's time is that of 64 of the reference's own steps, on a model
of the same shape; without, of ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import platform
import statistics
import time
from typing import Any

import pyro
import torch
from vs_reference import Theirs, import_reference

import ltm_pyro
from ltm_pyro.data import PACKING, load_corpus
from ltm_pyro.figures import chosen_sequences
from ltm_pyro.inference import SCHEMES, BatchNoise, SequenceNoise, bounds, infer
from ltm_pyro.inference.adam_vi import AdamVI
from ltm_pyro.inference.vi import VI

STEPS = (1, 2, 4, 8, 16, 32, 64)
REFERENCE_STEPS = 64


class OwnCurvature(VI):
    """`vi` in which every dimension has the curvature that its own noise says."""

    def _shrunk(self, excess: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return excess


class NewDraws(VI):
    """`vi` whose draws are never mirrored."""

    def step(self, model: Any, state: Any, batch: Any, rng: Any) -> Any:
        new = rng.normal("new", state.sequence_ids, state.step, state.mean.shape[1:], like=state.mean)
        return super().step(model, dataclasses.replace(state, noise=new), batch, rng)


class NewDrawsAndOwnCurvature(OwnCurvature, NewDraws):
    """`vi` without either."""


WAYS = {
    "Adam of the reference, fresh noise, from the prior": lambda t: AdamVI(t, 0.34, 1e-8),
    "the same from scale exp(-2.5), as the reference starts": lambda t: AdamVI(t, 0.34, 1e-8, math.exp(-2.5)),
    "`adamvi` (rate 0.1, epsilon 0.2)": AdamVI,
    "`adamvi`, rate 0.03, epsilon 1e-8": lambda t: AdamVI(t, 0.03, 1e-8),
    "`vi` (natural gradient, rate 0.5)": VI,
    "`vi`, rate 0.3": lambda t: VI(t, 0.3),
    "`vi`, rate 0.7": lambda t: VI(t, 0.7),
    "`vi` without mirrored draws": NewDraws,
    "`vi` without shared curvature": OwnCurvature,
    "`vi` without both": NewDrawsAndOwnCurvature,
    "`vi`, every 4th position": lambda t: VI(t, stride=4),
    "`vi`, every 4th position, rate 0.3": lambda t: VI(t, 0.3, stride=4),
    "`lowrank`": SCHEMES["lowrank"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="folder of a trained run")
    parser.add_argument("--reference", help="folder of a clone of the reference implementation")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--draws", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2, help="of the noise of inference")
    options = parser.parse_args()
    ltm = ltm_pyro.load(options.run)
    config, corpus = ltm.config, load_corpus(ltm.config.data, ltm.config.text_column)
    held_out = PACKING[config.packing](corpus.validation, ltm.tokenizer, config.model.length)
    texts = held_out.batch(chosen_sequences(len(held_out), options.sequences))

    def reached(scheme: Any) -> tuple[float, float, float]:
        """Bound and KL [nats a text], and seconds."""
        nelbo, kl, seconds = [], [], []
        for seed in range(options.seeds):
            started = time.perf_counter()
            state = infer(scheme, ltm.model, texts, BatchNoise(torch.Generator().manual_seed(seed)))
            seconds.append(time.perf_counter() - started)
            q = scheme.distribution(state, SequenceNoise(0))
            estimate = bounds.elbo(ltm.model, texts, q, options.draws)
            nelbo.append(estimate.nelbo.mean().item())
            kl.append(estimate.kl.mean().item())
        return statistics.mean(nelbo), statistics.mean(kl), min(seconds)

    prior, *_ = reached(VI(0))
    best, kl, _ = reached(VI(256))
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    print(
        f"{len(texts)} texts of {corpus.name}, {texts.weights.sum() / len(texts):.0f} tokens on average; z of "
        f"{math.prod(config.model.latent_shape)} dimensions; {options.draws} draws; mean of {options.seeds} seeds"
    )
    print(f"z from the prior: {prior:.2f} nats a text; `vi` after 256 steps: {best:.2f}, of which KL {kl:.2f}\n")
    yardstick, _, seconds = reached(next(iter(WAYS.values()))(REFERENCE_STEPS))
    whose = "ours"
    if options.reference:
        # The reference knows neither our vocabulary nor texts of different lengths; for its time they do not matter.
        theirs = Theirs(import_reference(options.reference, False), config, texts.tokens, False, ltm.tokenizer.n_vocab)
        theirs.fast_step()
        times = []
        for _ in range(8):
            started = time.perf_counter()
            theirs.fast_step()
            times.append(time.perf_counter() - started)
        seconds, whose = REFERENCE_STEPS * statistics.median(times), "the reference"
    print(f"The yardstick: {yardstick:.2f} nats a text, {REFERENCE_STEPS} steps of {whose} in {seconds:.1f} s\n")
    print("| steps T | " + " | ".join(map(str, STEPS)) + " | as good at T | part of its time |")
    print("|---|" + "---|" * (len(STEPS) + 2))
    for way, scheme in WAYS.items():
        found = {t: reached(scheme(t)) for t in STEPS}
        good = next((t for t in STEPS if found[t][0] <= yardstick), None)
        cells = [f"{nelbo:.2f} ({its_kl:.1f})" for nelbo, its_kl, _ in found.values()]
        part = "" if good is None else f"1/{seconds / found[good][2]:.0f}"
        print(f"| {way} | {' | '.join(cells)} | {good or 'no'} | {part} |", flush=True)
    print("\nNats a text, of which KL in brackets.")


if __name__ == "__main__":
    with pyro.validation_enabled(False):
        main()
