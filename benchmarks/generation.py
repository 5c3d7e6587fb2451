"""Compare the speed of generation with that of the published implementation's own `generate`, in one process.

    python benchmarks/generation.py --reference PATH [--rounds 3] [--reference-tokens 2] [--json FILE]

PATH is a clone of https://github.com/mingluzhao/Latent-Thought-LM, the reference; none of its code is copied here. Both
models have preset small (3 layers, width 512, vocabulary 50,258) and write one text of 1,024 new tokens in float32 at
temperature 1. Our weights are copied into the reference's model. Before anything is timed, both models must give the
same log p(x | z); `vs_reference.py` explains how this is done.

The two take turns: our model writes 128 tokens, then the reference continues the same text for `--reference-tokens`
tokens, and so on. The reference reads the whole text again for every token, so its time for a token changes little
within a stretch of 128 tokens. Its time for 1,024 tokens is therefore extrapolated from the tokens that it wrote.
`--reference-tokens 128` times all of them.

The limit of the speed is the time to read every weight that a token needs once. The read rate is measured with a
matrix-vector product with a matrix of the same size, in both layouts, and with a sum over that matrix. The last table
is for 10,000 tokens with preset tiny and one thread. It shows whether a token costs the same at every position.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from timing import machine, seconds_in_turns
from torch import Tensor
from vs_reference import VOCAB_SIZE, Ours, Theirs, copy_weights, import_reference, log_likelihoods

from ltm_pyro.config import preset
from ltm_pyro.models import Decoder
from ltm_pyro.models.generation import stream
from ltm_pyro.models.vector_products import VectorLinear

STRETCH = 128
"""The number of tokens that our model writes before the reference takes its turn."""
NO_TOKEN = -1
"""Used as the id of end-of-text, so that no text ends before all its tokens are written."""


def stretches(decoder: Decoder, z_BLSD: Tensor, num_tokens: int, generator: torch.Generator) -> Iterator[Any]:
    """Write one text; for every stretch, yield the tokens of the text so far and the seconds that the stretch took."""
    texts = stream(decoder, z_BLSD, NO_TOKEN, num_tokens, generator=generator)
    tokens: list[int] = []
    while True:
        started = time.perf_counter()
        new = [int(token) for token in itertools.islice(texts, STRETCH)]
        if not new:
            return
        seconds = time.perf_counter() - started
        tokens += new
        yield tokens, seconds


def weights_per_token(decoder: Decoder) -> int:
    """The number of weights that a token needs: all except those of cross-attention, and the thoughts' keys and values.

    The embeddings are included, since their table is also the output layer.
    """
    attending = [block.cross_attention for block in decoder.blocks if block.attends]
    of_z = sum(weight.numel() for module in attending for weight in module.parameters())
    keys_and_values = 2 * decoder.config.num_heads * decoder.config.num_slots * decoder.config.width * len(attending)
    return sum(weight.numel() for weight in decoder.parameters()) - of_z + keys_and_values


def bandwidths(num_weights: int, width: int, rounds: int) -> dict[str, float]:
    """The rates, in bytes per second, at which this number of weights is read."""
    matrix, vector = torch.randn(num_weights // width, width), torch.randn(1, width)
    laid_out = VectorLinear(matrix)
    functions = {
        "matrix-vector product, [out, in]": lambda: F.linear(vector, matrix),
        "matrix-vector product, as our output layer": lambda: laid_out(vector),
        "sum of all elements": lambda: matrix.sum(),
    }
    seconds = seconds_in_turns(functions, rounds, torch.device("cpu"))
    return {name: 4 * matrix.numel() / statistics.median(values) for name, values in seconds.items()}


@torch.no_grad()
def beside_the_reference(options: argparse.Namespace) -> dict[str, Any]:
    """The seconds per token of both models, by stretch."""
    config = preset("small")
    tokens = torch.randint(VOCAB_SIZE - 2, (1, config.model.length))
    ours = Ours(config, tokens, 1)
    theirs = Theirs(import_reference(options.reference, use_kernels=False), config, tokens, use_kernels=False)
    copy_weights(ours.model, theirs.model)
    mine, other = log_likelihoods(ours, theirs)
    print(f"log p(x | z) of the same text at the same z: ours {mine:.2f}, reference {other:.2f} nats")
    if abs(mine - other) > 1e-5 * abs(other):
        raise SystemExit("the log-likelihoods differ: the two models are not the same")
    theirs.model.eval()
    decoder = ours.model.decoder
    z = torch.randn(1, *config.model.latent_shape)
    num_stretches = config.model.length // STRETCH
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in range(num_stretches)] for name in ("ours", "reference")}
    read: list[dict[str, float]] = []
    for number in range(options.rounds):
        before = [decoder.begin_of_text]
        generator = torch.Generator().manual_seed(number)
        for place, (written, mine) in enumerate(stretches(decoder, z, config.model.length, generator)):
            started = time.perf_counter()
            theirs.model.generate(torch.tensor([before]), z.flatten(1, 2), options.reference_tokens)
            seconds["reference"][place].append((time.perf_counter() - started) / options.reference_tokens)
            seconds["ours"][place].append(mine / STRETCH)
            before = [decoder.begin_of_text, *written]
        read.append(bandwidths(weights_per_token(decoder), config.model.width, 5))
    by_name = {name: [found[name] for found in read] for name in read[0]}
    return {"seconds": seconds, "bandwidths": by_name, "bytes_per_token": 4 * weights_per_token(decoder)}


@torch.no_grad()
def far_beyond(options: argparse.Namespace) -> list[list[float]]:
    """The seconds per token for 10,000 tokens with preset tiny, by stretch and round.

    One thread is used, since the preset is too small to gain from more.
    """
    torch.set_num_threads(1)
    shape = preset("tiny").model
    decoder, z = Decoder(shape, 258), torch.randn(1, *shape.latent_shape)
    rounds = [
        [seconds / STRETCH for _, seconds in stretches(decoder, z, 10_000 // STRETCH * STRETCH, torch.Generator())]
        for _ in range(options.rounds)
    ]
    return [list(of_stretch) for of_stretch in zip(*rounds, strict=True)]


def spread(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    """The median and the range, as text."""
    return f"{statistics.median(values) * scale:.{digits}f} ({min(values) * scale:.{digits}f}-" + (
        f"{max(values) * scale:.{digits}f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True, help="folder of a clone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--reference-tokens",
        type=int,
        default=2,
        help="number of tokens that the reference writes in each stretch of 128",
    )
    parser.add_argument("--json", help="file to which all times are written")
    options = parser.parse_args()
    print(f"{machine(torch.device('cpu'))}\n")
    torch.manual_seed(0)
    found = beside_the_reference(options)
    ours, reference = (found["seconds"][name] for name in ("ours", "reference"))
    print(f"\nmilliseconds a token, median (range) of {options.rounds} rounds\n")
    print("| tokens | ours | reference | reference / ours |")
    print("|---|---|---|---|")
    for place, (mine, theirs) in enumerate(zip(ours, reference, strict=True)):
        first = place * STRETCH
        ratio = statistics.median(theirs) / statistics.median(mine)
        print(f"| {first + 1}-{first + STRETCH} | {spread(mine, 1e3)} | {spread(theirs, 1e3)} | {ratio:.1f} |")
    rates = {
        name: [1 / statistics.mean(of_round) for of_round in zip(*values, strict=True)]
        for name, values in found["seconds"].items()
    }
    ratio = statistics.median(rates["ours"]) / statistics.median(rates["reference"])
    print(f"\ntokens a second over {len(ours) * STRETCH:,} tokens\n")
    print("| ours | reference | ours / reference |")
    print("|---|---|---|")
    print(f"| {spread(rates['ours'])} | {spread(rates['reference'], digits=2)} | {ratio:.1f} |")
    print(f"\nthe limit: reading the {found['bytes_per_token'] / 1e6:.0f} MB of weights that a token needs\n")
    print("| read by | GB/s | tokens a second | ours |")
    print("|---|---|---|---|")
    for name, bandwidth in found["bandwidths"].items():
        limits = [rate / found["bytes_per_token"] for rate in bandwidth]
        share = statistics.median(rates["ours"]) / statistics.median(limits)
        print(f"| {name} | {spread(bandwidth, 1e-9)} | {spread(limits, digits=0)} | {share:.0%} |")
    far = far_beyond(options)
    print(f"\npreset tiny (window {preset('tiny').model.window}), one thread, milliseconds a token\n")
    print("| tokens | ours |\n|---|---|")
    for place in (0, 1, 3, 7, 15, 31, len(far) - 1):
        print(f"| {place * STRETCH + 1:,}-{(place + 1) * STRETCH:,} | {spread(far[place], 1e3, 3)} |")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({**found, "tiny": far}, file, indent=2)


if __name__ == "__main__":
    with pyro.validation_enabled(False):
        main()
