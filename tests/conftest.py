"""Every test starts with Pyro's validation on, an empty parameter store and the same seed."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pyro
import pytest
import torch

# The models here are too small to gain from more threads, which wait for each other wherever a core is busy.
torch.set_num_threads(1)

FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


@pytest.fixture(autouse=True)
def fresh_pyro() -> Iterator[None]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield


@pytest.fixture
def dies_before() -> Callable[[int, Callable[[], object]], bool]:
    """Does something in a child that ends at once, and cleans nothing up, before its n-th operation on files, from 0.

    Returns whether there was one. What it wrote and what it renamed stays, as after SIGKILL.
    """

    def run(number: int, action: Callable[[], object]) -> bool:
        child = os.fork()
        if child == 0:
            left = number

            def count(event: str, args: tuple[object, ...]) -> None:
                nonlocal left
                if event in FILE_OPERATIONS:
                    left -= 1
                    if left < 0:
                        os._exit(9)

            status = 1
            try:
                sys.addaudithook(count)
                action()
                status = 0
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        return status == 9

    return run


@pytest.fixture
def full_beyond() -> Callable[[int], AbstractContextManager[None]]:
    """A block in which no file can grow beyond so many bytes: what does not fit is cut off and an OSError."""

    @contextlib.contextmanager
    def limited(num_bytes: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
