"""Measure that reading on costs the same wherever a text stands, in memory that does not grow.

    python benchmarks/streams.py [--lengths 1000 10000 100000 1000000] [--rethink 64] [--rounds 3]

A model of preset tiny with new weights reads texts of random bytes, since neither time nor memory depends on weights or
text. For each length this measures, in a process of its own for each,

- the code length by streaming (what `evaluate --estimators prequential --length N` does with one text): time a token,
  and the peak of the memory of the process, of which the tokens themselves are 12 bytes each;
- writing 4 x --rethink tokens after a prompt of that length, with z inferred again after every --rethink tokens: time a
  written token, without that of reading the prompt.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from timing import machine

from ltm_pyro.config import preset, scheme_of
from ltm_pyro.data import get_tokenizer, token_batch
from ltm_pyro.inference import SequenceNoise
from ltm_pyro.inference.prequential import prequential
from ltm_pyro.models import LatentThoughtModel, Sampling
from ltm_pyro.runs.checkpoint import Progress
from ltm_pyro.runs.continuation import Continuation, Reader, Rethinking, infer_thoughts
from ltm_pyro.runs.trained import TrainedModel


def model() -> TrainedModel:
    """Preset tiny with new weights."""
    config = preset("tiny")
    torch.manual_seed(0)
    ltm = LatentThoughtModel(config.model, 258, 256)
    return TrainedModel(ltm, get_tokenizer("bytes"), config, Path("run"), {}, Progress())


def measured(length: int, rethink: int, rounds: int) -> dict[str, float]:
    """The figures of one length, in this process."""
    ltm = model()
    scheme = scheme_of(ltm.config)
    tokens = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0))
    block_size = ltm.config.objective.block_size or length
    started = time.perf_counter()
    prequential(ltm.model, token_batch(tokens), scheme, block_size, 1, SequenceNoise(0), is_streaming=True)
    scoring = (time.perf_counter() - started) / length
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    prompt = tokens[0].tolist()
    z = infer_thoughts(ltm, [prompt[-1000:]], scheme, 1, SequenceNoise(0))[:, 0]
    num_tokens = 4 * rethink
    reader = Reader(ltm, scheme, length + (rounds + 1) * num_tokens, SequenceNoise(0), 0)
    reader.read(prompt)

    def read_on(rows: list[int], texts: list[list[int]], num_before: int) -> torch.Tensor:
        return reader.read(texts[0])

    writing = []
    for _ in range(rounds + 1):
        # Always the most likely token: with these weights that is never end-of-text.
        text = Continuation(ltm, [prompt], z, Sampling(temperature=0), torch.Generator().manual_seed(0))
        started = time.perf_counter()
        text.finish(num_tokens + 1, Rethinking(rethink, read_on))
        writing.append((time.perf_counter() - started) / (num_tokens + 1))
        if len(text.texts[0]) != num_tokens + 1:
            raise RuntimeError("the text has ended early")
        prompt = [*prompt, *text.texts[0][:num_tokens]]
    # The first round is a warm-up.
    return {"scoring": scoring, "peak": peak, "writing": statistics.median(writing[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--rethink", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--here", action="store_true", help="measure the first length in this process, and print JSON")
    chosen = parser.parse_args()
    if chosen.here:
        print(json.dumps(measured(chosen.lengths[0], chosen.rethink, chosen.rounds)))
        return
    print(f"`python benchmarks/streams.py {' '.join(sys.argv[1:])}`\n\n{machine(torch.device('cpu'))}\n")
    print("| tokens | scoring, µs a token | peak memory, MB | writing with --rethink, µs a token |\n|---|---|---|---|")
    for length in chosen.lengths:
        options = ["--rethink", str(chosen.rethink), "--rounds", str(chosen.rounds), "--here"]
        command = [sys.executable, __file__, "--lengths", str(length), *options]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        scoring, writing, peak = found["scoring"] * 1e6, found["writing"] * 1e6, found["peak"] / 1e6
        print(f"| {length:,} | {scoring:.0f} | {peak:.0f} | {writing:.0f} |", flush=True)


if __name__ == "__main__":
    main()
