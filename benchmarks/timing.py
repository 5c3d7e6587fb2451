"""Seconds of work in turns, and the rate of a matrix product, the limit of the arithmetic."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch


def machine(device: torch.device) -> str:
    """A line that says what a table was made with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} thread(s)"
    return f"Python {platform.python_version()}, torch {torch.__version__}, {device}, {name}"


def seconds_in_turns(
    functions: dict[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of each, taking turns (A B A B …), so that what else the machine does falls on all of them."""
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
    """Median, after one to warm up."""
    return statistics.median(seconds_in_turns({"work": work}, rounds, device)["work"])


def matrix_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of a large matrix product."""
    a, b = (torch.randn(4096, 4096, device=device, dtype=dtype) for _ in range(2))
    return 2 * 4096**3 / median_seconds(lambda: a @ b, 5, device)
