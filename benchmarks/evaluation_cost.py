"""Measure time and memory of an evaluation. Memory must not grow with the number of draws or sequences.

    python benchmarks/evaluation_cost.py RUN [--device cuda]

RUN is a folder that `python -m ltm_pyro.train` has written. Each line of the table is a separate process with the
command `python -m ltm_pyro.evaluate RUN --estimators elbo --fast-steps 16 --num-sequences N --num-samples K`. It shows
the wall time, including loading and imports, and the peak memory: of the process, or with --device cuda of the device.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time

import torch

CASES = ((25, 16), (25, 64), (25, 256), (100, 64), (400, 16))
"""Pairs (number of sequences, number of draws)."""


ON_A_DEVICE = """
import sys, torch
from ltm_pyro import evaluate
status = evaluate.main(sys.argv[2:])
open(sys.argv[1], "w").write(str(torch.cuda.max_memory_allocated() / 2**20))
sys.exit(status)
"""
"""Evaluates, and then writes the peak memory of the device [MB] to the file that the first argument names."""


def measure(args: list[str], device: str) -> tuple[float, float]:
    """Wall time [s] and peak memory [MB] of an evaluation."""
    with tempfile.NamedTemporaryFile("r") as peak:
        way = ["-c", ON_A_DEVICE, peak.name] if device == "cuda" else ["-m", "ltm_pyro.evaluate"]
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, *way, *args, "--device", device], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"failed: evaluate {' '.join(args)}")
        seconds = time.perf_counter() - started
        return seconds, float(peak.read()) if device == "cuda" else usage.ru_maxrss / 1024  # Linux counts in KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| sequences | draws | seconds | peak memory [MB] |")
    print("|---|---|---|---|")
    for num_sequences, num_samples in CASES:
        numbers = {"--fast-steps": 16, "--num-sequences": num_sequences, "--num-samples": num_samples}
        args = [options.run, "--estimators", "elbo", *(str(part) for option in numbers.items() for part in option)]
        seconds, megabytes = measure(args, options.device)
        print(f"| {num_sequences} | {num_samples} | {seconds:.0f} | {megabytes:.0f} |", flush=True)


if __name__ == "__main__":
    main()
