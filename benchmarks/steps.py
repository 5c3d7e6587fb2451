"""What T steps of inference are worth: the valid bound that each way of stepping reaches, on a trained model.

    python benchmarks/steps.py

The model is the small one of notebooks/02: 12 symbols, every text with a distribution over them of its own, z of 16
dimensions, trained by `vi`. 128 held-out texts; the ELBO with 64 draws that no fit has seen, in nats a text; the mean of
three seeds of the noise of inference, and their range.
"""

from __future__ import annotations

import argparse
import math
import platform

import pyro
import torch

from ltm_pyro.data import UnigramLanguage, token_batch
from ltm_pyro.inference import SCHEMES, BatchNoise, SequenceNoise, bounds, infer
from ltm_pyro.inference.svi import OptimizerConfig, WeightOptimizer, elbo_backward
from ltm_pyro.models import DecoderConfig, LatentThoughtModel

LENGTH, SYMBOLS = 32, 12
LANGUAGE = UnigramLanguage(SYMBOLS, concentration=0.2)
STEPS = (1, 2, 4, 8, 16, 24, 32, 64)
WAYS = {
    "Adam of the reference, fresh noise, from scale exp(-2.5)": (
        "vi",
        {"learning_rate": 0.34, "epsilon": 1e-8, "initial_scale": math.exp(-2.5)},
    ),
    "the same from the prior": ("vi", {"learning_rate": 0.34, "epsilon": 1e-8}),
    "`vi` as it comes (Adam, rate 0.1, epsilon 0.2)": ("vi", {}),
    "`vi`, rate 0.03, epsilon 1e-8": ("vi", {"learning_rate": 0.03, "epsilon": 1e-8}),
    "`ngvi` as it comes (natural gradient, rate 0.3)": ("ngvi", {}),
    "`ngvi`, rate 0.2": ("ngvi", {"learning_rate": 0.2}),
    "`ngvi`, rate 0.5": ("ngvi", {"learning_rate": 0.5}),
    "`lowrank`, rate 0.1, epsilon 0.2": ("lowrank", {}),
}


def trained() -> LatentThoughtModel:
    """The model; its weights start so that z has a say."""
    pyro.set_rng_seed(0)
    shape = DecoderConfig(num_layers=1, width=8, num_heads=1, hidden=16, num_slots=2, window=2, length=LENGTH)
    model = LatentThoughtModel(shape, vocab_size=SYMBOLS + 2, end_of_text=SYMBOLS)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=shape.width**-0.5)
    rates = OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=20)
    optimizer = WeightOptimizer(model, rates, 300)
    generator = torch.Generator().manual_seed(0)
    scheme, noise = SCHEMES["vi"](num_steps=8, learning_rate=0.2, epsilon=0.01), BatchNoise(generator)
    for step in range(300):
        batch = token_batch(LANGUAGE.sample(32, LENGTH, generator))
        state = infer(scheme, model, batch, noise)
        elbo_backward(model, scheme.guide(model, state, batch, noise), batch, batch.tokens.numel())
        optimizer.update(step)
    return model


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    model = trained()
    texts = token_batch(LANGUAGE.sample(128, LENGTH, torch.Generator().manual_seed(11)))

    def bound(name: str, settings: dict[str, float], num_steps: int, seed: int) -> bounds.Elbo:
        scheme = SCHEMES[name](num_steps=num_steps, **settings)
        state = infer(scheme, model, texts, BatchNoise(torch.Generator().manual_seed(seed)))
        return bounds.elbo(model, texts, scheme.distribution(state, SequenceNoise(0)), 64)

    print(f"Python {platform.python_version()}, torch {torch.__version__}; -log p(x) of the language itself: ", end="")
    print(
        f"{-LANGUAGE.log_prob(texts.tokens).mean():.2f}; z from the prior: {bound('vi', {}, 0, 0).nelbo.mean():.2f}; "
    )
    best = bound("ngvi", {}, 500, 0)
    print(f"`ngvi` after 500 steps: {best.nelbo.mean():.2f}, of which KL {best.kl.mean():.2f}\n")
    print("| steps T | " + " | ".join(map(str, STEPS)) + " |")
    print("|---|" + "---|" * len(STEPS))
    for way, (name, settings) in WAYS.items():
        cells = []
        for num_steps in STEPS:
            values = [bound(name, settings, num_steps, seed).nelbo.mean().item() for seed in (1, 2, 3)]
            cells.append(f"{sum(values) / 3:.2f} ({min(values):.2f}-{max(values):.2f})")
        print(f"| {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    with pyro.validation_enabled(False):
        main()
