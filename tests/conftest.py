"""Every test starts with Pyro's validation on, an empty parameter store and the same seed."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pytest
import torch

# The models here are too small to gain from more threads, which wait for each other wherever a core is busy.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_pyro() -> Iterator[None]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield
