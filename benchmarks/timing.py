"""Timing of functions in turns, and the rate of a large matrix product, which is the limit of the arithmetic."""

from __future__ import annotations

import contextlib
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator

import torch


def machine(device: torch.device) -> str:
    """A line with the software and the hardware on which a table was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} thread(s)"
    return f"Python {platform.python_version()}, torch {torch.__version__}, {device}, {name}"


def seconds_in_turns(
    functions: dict[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: bool = True
) -> dict[str, list[float]]:
    """The seconds of each function, timed in turns (A B A B …), so that other load on the machine affects all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + warm_up):
        for name, function in functions.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median_seconds(work: Callable[[], object], rounds: int, device: torch.device) -> float:
    """The median seconds over the rounds, after one warm-up."""
    return statistics.median(seconds_in_turns({"work": work}, rounds, device)["work"])


def matrix_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """The operations per second of a large matrix product."""
    a, b = (torch.randn(4096, 4096, device=device, dtype=dtype) for _ in range(2))
    if device.type != "cuda":
        return 2 * 4096**3 / median_seconds(lambda: a @ b, 5, device)
    # A product takes a fraction of a millisecond there, less than the host takes to start one and wait for it.
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for count in (20, 200):  # the first ones are a warm-up
        start.record()
        for _ in range(count):
            torch.mm(a, b)
        end.record()
        end.synchronize()
    return 2 * 4096**3 * count / (1e-3 * start.elapsed_time(end))


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float]]:
    """Receives, at the end of its block, the peak memory in it [MB]: of a CUDA device, or else of this process since it
    began."""
    found: list[float] = []
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found.append(torch.cuda.max_memory_allocated(device) / 2**20)
    else:
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
