"""Every test starts with Pyro's validation on, an empty parameter store and the same seed."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pyro
import pytest
import torch

from ltm_pyro import cli, train
from ltm_pyro.config import preset
from ltm_pyro.data import get_tokenizer
from ltm_pyro.evaluation import inferred
from ltm_pyro.models import DecoderConfig, LatentThoughtModel
from ltm_pyro.runs.checkpoint import Progress
from ltm_pyro.runs.trained import TrainedModel

# The models here are too small to gain from more threads, which wait for each other wherever a core is busy.
torch.set_num_threads(1)
# pytest-xdist says how wide its own terminal is, which is no matter of the commands'.
os.environ.pop("COLUMNS", None)
# A job in the background of a shell script ignores Ctrl-C, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY_SHAPE = (
    "--model.width 16 --model.num-heads 2 --model.hidden 24 --model.num-layers 2 --model.window 8 --model.length 32"
)
FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def pytest_collection_finish() -> None:
    """Garbage is searched for among what the tests make, and not again and again in all that was imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


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


@pytest.fixture
def run_main(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command of a `main` in this process: (exit status, standard output, standard error)."""

    def run(main: Callable[[list[str]], int], *args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.run(main, args)
        return exit.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def short_fits() -> Iterator[None]:
    """A Gaussian around a point or draws is fitted in 4 steps, as the estimates of a tiny model need no more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inferred, "GAUSSIAN_STEPS", 4)
        yield


@pytest.fixture(scope="session")
def tiny_options() -> list[str]:
    """Options of `train` for a model that takes a step in milliseconds, with z of 2 slots a layer, on a CPU."""
    options = "--inference vi --infer-from whole --model.num-slots 2 --batch-size 4 --validation-samples 2 --device cpu"
    return shlex.split(f"{TINY_SHAPE} {options}")


@pytest.fixture(scope="session")
def untrained() -> TrainedModel:
    """A model of bytes at its initial weights, which ends a text at every 257th token or so."""
    shape = DecoderConfig(num_layers=1, width=8, num_heads=1, hidden=8, num_slots=2, window=4, length=16)
    encoding = get_tokenizer("bytes")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LatentThoughtModel(shape, encoding.n_vocab, 256)
    return TrainedModel(model, encoding, preset("tiny", "vi", "whole"), Path("run"), {}, Progress())


@pytest.fixture(scope="session")
def write_corpus() -> Callable[[Path], Path]:
    """Writes 60 short documents as `text.jsonl` into a folder, and returns the path."""

    def write(folder: Path) -> Path:
        path = folder / "text.jsonl"
        texts = [f"Sentence number {n} says that {n} plus {n} makes {2 * n}. " * (1 + n % 3) for n in range(60)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return write


@pytest.fixture(scope="session")
def write_text() -> Callable[[Path], Path]:
    """Writes one document of 200 short sentences to a path, and returns the path."""

    def write(path: Path) -> Path:
        path.write_text("".join(f"Sentence number {n} says that {n} plus {n} makes {2 * n}.\n" for n in range(200)))
        return path

    return write


@pytest.fixture(scope="session")
def train_run(tiny_options: list[str], write_corpus: Callable[[Path], Path]) -> Callable[..., None]:
    """Trains a tiny model for three steps on `write_corpus`: `train_run(folder, scheme, *options)`.

    The run is named after the scheme.
    """

    def run(folder: Path, scheme: str, *options: str) -> None:
        model = [*tiny_options, "--steps", "3", "--validation-sequences", "2", "--inference", scheme]
        if scheme == "none":
            model += ["--model.num-slots", "0"]
        paths = ["--data", str(write_corpus(folder)), "--out", str(folder / scheme)]
        assert train.main([*model, *paths, *options]) == 0

    return run
