"""Measure the training loop in several processes: tokens per second of whole steps, as the command takes them.

    python benchmarks/processes.py [--cases 1x2 1x1 2x1] [--device cpu] [--rounds 2] [-- --preset small --data …]

A case is PROCESSESxTHREADS: so many processes, by torchrun, with so many threads each. What follows -- goes to
`python -m ltm_pyro.train`. The cases take turns; the first half of the steps is a warm-up, and the rate is that of the
second half (without validation and checkpoints). The loss of the last step shows that all of them train the same model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from timing import machine


def train(processes: int, threads: int, options: argparse.Namespace) -> tuple[float, float]:
    """Tokens per second, and the loss of the last step in nats per token."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), "-m", "ltm_pyro.train"]
        half, out = options.steps // 2, Path(folder) / "run"
        command += ["--device", options.device, "--steps", str(2 * half), "--log-every", str(half), "--out", str(out)]
        command += ["--validation-sequences", "1", "--validation-samples", "1", *options.more]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if line["split"] == "train"][-1]
        return last["tokens_per_second"], last["nll_nats_per_token"] or last["nelbo_nats_per_token"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["1x2", "1x1", "2x1"], metavar="PROCESSESxTHREADS")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("more", nargs="*", help="options of the training, after --")
    options = parser.parse_args()
    cases = {case: tuple(map(int, case.split("x"))) for case in options.cases}
    found: dict[str, list[tuple[float, float]]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case, (processes, threads) in cases.items():
            found[case].append(train(processes, threads, options))
    print(f"`python benchmarks/processes.py {' '.join(sys.argv[1:])}`\n\n{machine(torch.device(options.device))}\n")
    print("| processes | threads of each | tokens/s | of the first row | nats/token of the last step |")
    print("|---|---|---|---|---|")
    rates = {case: [rate for rate, _ in pairs] for case, pairs in found.items()}
    first = statistics.median(next(iter(rates.values())))
    for case, pairs in found.items():
        middle = statistics.median(rates[case])
        spread = f"{middle:,.0f} ({min(rates[case]):,.0f} to {max(rates[case]):,.0f})"
        losses = sorted({f"{loss:.3f}" for _, loss in pairs})
        print(f"| {' | '.join(map(str, cases[case]))} | {spread} | {middle / first:.2f} | {', '.join(losses)} |")


if __name__ == "__main__":
    main()
