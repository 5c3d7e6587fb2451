"""Measure time and memory of an evaluation. Memory must not grow with the number of draws or sequences.

    python benchmarks/evaluation_cost.py RUN

RUN is a folder that `python -m ltm_pyro.train` has written. Each line of the table is a separate process with the
command `python -m ltm_pyro.evaluate RUN --estimators elbo --fast-steps 16 --num-sequences N --num-samples K`. It shows
the wall time, including loading and imports, and the peak memory.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time

import torch

CASES = ((25, 16), (25, 64), (25, 256), (100, 64), (400, 16))
"""Pairs (number of sequences, number of draws)."""


def measure(command: list[str]) -> tuple[float, float]:
    """Wall time [s] and peak resident memory [MB] of a command."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024  # Linux counts in KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run")
    run = parser.parse_args().run
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| sequences | draws | seconds | peak memory [MB] |")
    print("|---|---|---|---|")
    for num_sequences, num_samples in CASES:
        options = {"--fast-steps": 16, "--num-sequences": num_sequences, "--num-samples": num_samples}
        command = [sys.executable, "-m", "ltm_pyro.evaluate", run, "--estimators", "elbo"]
        command += [str(part) for option in options.items() for part in option]
        seconds, megabytes = measure(command)
        print(f"| {num_sequences} | {num_samples} | {seconds:.0f} | {megabytes:.0f} |", flush=True)


if __name__ == "__main__":
    main()
