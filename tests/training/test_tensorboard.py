"""What TensorBoard is given: the numbers of the lines of metrics, read back by its own reader."""

from __future__ import annotations

import importlib.util
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ltm_pyro import train
from ltm_pyro.errors import InputError
from ltm_pyro.training import tensorboard
from ltm_pyro.training.tensorboard import TensorBoard

MORE = "--fast-steps 2 --log-every 1 --validation-sequences 4 --validate-every 2"


@pytest.fixture
def small(tiny_options: list[str]) -> list[str]:
    """Options of a tiny model, validated after every other step."""
    return [*tiny_options, *shlex.split(MORE)]


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: value by step, by name."""
    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {name: {event.step: event.value for event in reader.Scalars(name)} for name in reader.Tags()["scalars"]}


@pytest.fixture
def data(tmp_path: Path, write_text: Callable[[Path], Path]) -> str:
    return str(write_text(tmp_path / "text.txt"))


def test_every_number_of_the_metrics_is_a_point_of_a_curve(small, data, tmp_path):
    """Also over a stop: the steps that were written and then taken again are there once, with their last values."""
    run = tmp_path / "run"
    assert train.main([*small, "--tensorboard", "--data", data, "--steps", "5", "--out", str(run)]) == 0
    (run / "checkpoints/step-00000005").rename(tmp_path / "lost")
    assert train.main(["--out", str(run), "--resume", "--validate-every", "3"]) == 0
    expected: dict[str, dict[int, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        name = record["split"] if record["split"] != "report" else f"report/{record['posterior']}"
        for key, value in record.items():
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                expected.setdefault(f"{name}/{key}", {})[record["step"]] = pytest.approx(value, rel=1e-6)
    assert "train/nll_nats_per_token" in expected
    assert "report/the prior/bits_per_byte" in expected
    assert curves(run / "tensorboard") == expected


def test_a_run_without_the_flag_has_no_such_folder(small, data, tmp_path):
    assert train.main([*small, "--data", data, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run/tensorboard").exists()


def test_without_the_package_it_is_refused_before_anything_is_written(small, data, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        tensorboard.importlib.util,
        "find_spec",
        lambda name, *args: None if name == "tensorboard" else find_spec(name, *args),
    )
    with pytest.raises(InputError, match="pip install tensorboard"):
        train.main([*small, "--tensorboard", "--data", data, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_points_of_a_model_without_z_have_a_name_too(tmp_path):
    with TensorBoard(tmp_path, 0) as board:
        board.add({"split": "report", "step": 3, "posterior": None, "nats_per_token": 1.5, "valid_bound": True})
        board.add({"split": "train", "step": 3, "nll_nats_per_token": 2.5, "perplexity": None, "estimator": "exact"})
    assert curves(tmp_path) == {"report/no z/nats_per_token": {3: 1.5}, "train/nll_nats_per_token": {3: 2.5}}


def test_points_of_steps_that_are_taken_again_are_hidden(tmp_path):
    """Those after the step where a run goes on, also if it does not come as far as before."""
    for start, steps in ((0, range(1, 6)), (3, [4])):
        with TensorBoard(tmp_path, start) as board:
            for step in steps:
                board.add({"split": "train", "step": step, "nll_nats_per_token": start + step / 2})
    assert curves(tmp_path) == {"train/nll_nats_per_token": {1: 0.5, 2: 1.0, 3: 1.5, 4: 5.0}}
