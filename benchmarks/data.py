"""Measure the cost of preparing a corpus, compared with a plain loop over its documents, and of reading batches.

    python benchmarks/data.py TEXTS [--tokenizer gpt2] [--copies 1 4]

TEXTS is a file or folder that `python -m ltm_pyro.prepare` accepts. The loop reads the documents with the same code,
calls tiktoken for each of them in one process, and stores nothing; preparation also hashes and writes. Both are timed
in turns, without the start of Python. If other programs are running, the processor time is more reliable than the
elapsed time. Memory is that of the command, summed over all of its processes (Linux only).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyro
import torch
from timing import machine, seconds_in_turns

from ltm_pyro import train
from ltm_pyro.config import micro_batch_size, preset
from ltm_pyro.data import batch_indices, get_tokenizer, open_corpus
from ltm_pyro.data.preparation import PreparationSettings, num_cores, prepare
from ltm_pyro.data.prepared import Manifest
from ltm_pyro.files.stop import StopSignal
from ltm_pyro.training import loop
from ltm_pyro.training.processes import Processes

CPU = torch.device("cpu")


def total(manifest: Manifest, name: str) -> int:
    """The sum of a field, such as the number of tokens, over all shards."""
    return sum(getattr(shard, name) for shard in (*manifest.train, *manifest.validation))


def rates(options: argparse.Namespace, folder: Path) -> None:
    encoding = get_tokenizer(options.tokenizer)
    processes = num_cores()
    outs = (folder / f"out-{number}" for number in itertools.count())
    manifests = []

    def loop() -> None:
        source = open_corpus(options.texts)
        for split in filter(None, (source.train, source.validation)):
            for text, _ in split:
                encoding.encode_ordinary(text)

    def prepared_in(processes: int) -> None:
        settings = PreparationSettings(options.texts, tokenizer=options.tokenizer)
        manifests.append(prepare(settings, next(outs), StopSignal(), processes=processes)[0])

    work = {
        "a loop of tiktoken": loop,
        "prepare, 1 process": lambda: prepared_in(1),
        f"prepare, {processes} processes": lambda: prepared_in(processes),
    }
    processor: dict[str, list[float]] = {name: [] for name in work}
    seconds = seconds_in_turns(
        {name: with_processor_time(function, processor[name]) for name, function in work.items()}, options.rounds, CPU
    )
    num_tokens, num_bytes = (total(manifests[0], name) for name in ("num_tokens", "num_bytes"))
    print(f"{num_bytes:,} bytes of text, {num_tokens:,} tokens of {options.tokenizer}; median of {options.rounds}\n")
    print("| | seconds | processor seconds | tokens/s | MB of text/s | times the loop |\n|---|---|---|---|---|---|")
    reference = statistics.median(seconds["a loop of tiktoken"])
    for name, measured in seconds.items():
        median = statistics.median(measured)
        cells = [name, f"{median:.2f} ({min(measured):.2f}-{max(measured):.2f})"]
        cells += [f"{statistics.median(processor[name]):.2f}", f"{num_tokens / median:,.0f}"]
        cells += [f"{num_bytes / median / 1e6:.1f}", f"{reference / median:.2f}"]
        print(f"| {' | '.join(cells)} |")


def with_processor_time(function: Callable[[], object], spent: list[float]) -> Callable[[], object]:
    """The function, which also appends to `spent` the processor time [s] of this process and of its ended children."""

    def measured() -> None:
        before = sum(os.times()[:4])
        function()
        spent.append(sum(os.times()[:4]) - before)

    return measured


def batches(options: argparse.Namespace, folder: Path) -> None:
    data = folder / "batches"
    prepare(PreparationSettings(options.texts), data, StopSignal())
    config = dataclasses.replace(preset("tiny"), data=str(data), out=str(folder / "run"), device="cpu")
    with contextlib.ExitStack() as lock:
        training = train.start_run(config, Processes(), lock)
    steps = itertools.count()

    def read() -> None:
        indices = batch_indices(config.seed, next(steps), config.batch_size, len(training.train))
        for part in indices.reshape(-1, micro_batch_size(config, torch.device("cpu"))):
            training.train.batch(part)

    read()
    reads = []
    for _ in range(200):
        started = time.perf_counter()
        read()
        reads.append(time.perf_counter() - started)
    stop = StopSignal()
    step = statistics.median(
        seconds_in_turns({"step": lambda: loop.slow_step(training, stop)}, options.rounds, CPU)["step"]
    )
    reading = statistics.median(reads)
    print(
        f"\nA batch of preset tiny ({config.batch_size} sequences of {config.model.length} of {len(training.train):,}, "
        f"drawn from all of them): {reading * 1e3:.2f} ms; a training step: {step * 1e3:.0f} ms; "
        f"reading is {reading / step:.2%} of it"
    )


def memory(options: argparse.Namespace, folder: Path) -> None:
    print("\n| copies of the text | bytes of text | seconds of the command | peak memory [MB] |\n|---|---|---|---|")
    for copies in options.copies:
        source = folder / f"copies-{copies}"
        source.mkdir()
        for number, original in itertools.product(range(copies), originals(Path(options.texts))):
            (source / f"{number:03d}-{original.name}").symlink_to(original.resolve())
        out = folder / f"memory-{copies}"
        command = [sys.executable, "-m", "ltm_pyro.prepare", str(source), "--tokenizer", options.tokenizer]
        started = time.perf_counter()
        process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.PIPE, text=True)
        peak = 0
        while process.poll() is None:
            peak = max(peak, sum(map(proportional_memory, tree(process.pid))))
            time.sleep(0.1)
        if process.returncode:
            sys.exit(f"failed: {' '.join(command)}")
        said = process.stdout.read().split(" bytes of text")[0].split(", ")[-1]
        seconds = time.perf_counter() - started
        print(f"| {copies} | {said} | {seconds:.1f} | {peak / 1024:.0f} |", flush=True)


def originals(texts: Path) -> list[Path]:
    """The files of a folder, or the file itself."""
    return sorted(path for path in texts.rglob("*") if path.is_file()) if texts.is_dir() else [texts]


def tree(process: int) -> Iterator[int]:
    """The id of a process, and the ids of all its descendants."""
    yield process
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # the process has ended
        return
    for child in map(int, children):
        yield from tree(child)


def proportional_memory(process: int) -> int:
    """Resident memory in KiB, in which memory shared by several processes is divided among them."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # the process has ended
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", metavar="TEXTS", help="a file or folder of texts")
    parser.add_argument("--tokenizer", default="gpt2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--copies",
        type=int,
        nargs="+",
        default=[1, 4],
        help="numbers of copies of the text for which memory is measured",
    )
    options = parser.parse_args()
    print(f"{machine(CPU)}, {num_cores()} cores ({os.cpu_count()} in the machine)\n")
    with tempfile.TemporaryDirectory() as folder, pyro.validation_enabled(False):
        rates(options, Path(folder))
        batches(options, Path(folder))
        memory(options, Path(folder))


if __name__ == "__main__":
    main()
