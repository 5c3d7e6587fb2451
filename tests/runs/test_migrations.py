"""Config files of earlier versions, each written by the code of its time: they are read as what they meant then.

All of them are of the same run: vi with a learning rate of 0.07, one step.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ltm_pyro.config import TrainConfig, preset
from ltm_pyro.errors import InputError
from ltm_pyro.inference.schemes.adam_vi import AdamVI
from ltm_pyro.inference.schemes.map import MAP
from ltm_pyro.inference.schemes.vi import VI
from ltm_pyro.inference.svi import OptimizerConfig
from ltm_pyro.runs.migrations import MIGRATIONS, VERSION, migrated
from ltm_pyro.runs.run import Run

FILES = Path(__file__).parent / "data/configs"


def values_of(version: int | str) -> dict[str, Any]:
    values = yaml.safe_load((FILES / f"version-{version}.yaml").read_text())
    del values["resolved"]
    return values


def read(version: int | str, folder: Path) -> TrainConfig:
    shutil.copy(FILES / f"version-{version}.yaml", folder / "config.yaml")
    config, resolved = Run(folder).read_config()
    assert resolved["pyro"] == "1.9.2"
    return config


def expected(**changes: Any) -> TrainConfig:
    """What all of these runs have in common, and what one has apart."""
    tiny = preset("tiny", "vi", "whole")
    model = dataclasses.replace(tiny.model, num_layers=2, width=16, num_heads=2, hidden=24, num_slots=2)
    common = dataclasses.replace(
        tiny,
        model=dataclasses.replace(model, window=8, length=32),
        data="text.txt",
        device="cpu",
        steps=1,
        fast_steps=1,
        batch_size=4,
        validate_every=150,
        validation_sequences=2,
        validation_samples=2,
        checkpoint_every=150,
        precision="float32",
        optimizer=OptimizerConfig(),
    )
    return dataclasses.replace(common, **changes)


def with_schemes(**changed: Any) -> dict[str, Any]:
    return {**preset("tiny").schemes, **changed}


def test_a_run_by_vi_of_adam_is_one_by_adamvi(tmp_path):
    """The vi of versions 0 and 1 is adamvi today; the runs lack what is newer than they are."""
    schemes = with_schemes(adamvi=AdamVI(learning_rate=0.07))
    for version, out in ((0, "run-f01372b"), (1, "run-9e572de")):
        assert read(version, tmp_path) == expected(inference="adamvi", schemes=schemes, out=out)


def test_the_oldest_run_has_adams_usual_epsilon(tmp_path):
    schemes = with_schemes(adamvi=AdamVI(learning_rate=0.07, epsilon=1e-8), map=MAP(epsilon=1e-8))
    config = expected(inference="adamvi", schemes=schemes, out="run-df4e039", micro_batch_size=4)
    config = dataclasses.replace(config, validate_every=200, checkpoint_every=200)
    assert read("0-three-schemes", tmp_path) == config


@pytest.mark.parametrize(
    ("version", "out"),
    [
        (2, "run-6128d96"),
        (3, "run-68a201c"),
        (4, "run-ab880bc"),
        (5, "run-90d6f9a"),
        (6, "run-9438ebc"),
        (7, "run-beb93e2"),
        (10, "run-2f29746"),
        (11, "run-b97232f"),
    ],
)
def test_a_run_by_vi_of_natural_gradients_stays_one(version, out, tmp_path):
    assert read(version, tmp_path) == expected(schemes=with_schemes(vi=VI(learning_rate=0.07)), out=out)


def test_a_run_from_before_defaults_depended_on_the_device_keeps_its_precision(tmp_path):
    config = read(9, tmp_path)
    assert (config.precision, config.micro_batch_size) == ("float32", None)


def test_every_step_has_a_file_that_needs_it():
    """A file of version n is taken through the functions from n on, and n is the version it is found to be."""
    assert VERSION == 12
    for version in range(VERSION):
        values = migrated(values_of(version))
        assert migrated(values | {"version": VERSION}) == values
        assert migrated(values_of(version) | {"version": version}) == values
        kept = {name: dict(part) if isinstance(part, dict) else part for name, part in values_of(version).items()}
        MIGRATIONS[version](kept)
        assert kept != values_of(version)


def test_a_run_that_was_trained_by_lowrank_of_adam_is_refused(tmp_path):
    values = values_of(2) | {"inference": "lowrank", "resolved": {}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=r"missing \[.*lowrank"):
        Run(tmp_path).read_config()


@pytest.mark.parametrize("version", [VERSION + 1, 1000])
def test_a_file_of_a_newer_version_is_refused_in_one_line_that_says_so(version, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values_of(5) | {"version": version, "resolved": {}}))
    with pytest.raises(
        InputError, match=f"are of version {version}, but this ltm_pyro reads versions up to 12"
    ) as error:
        Run(tmp_path).read_config()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("version", [-1, "6", None, True, 6.0])
def test_a_version_that_is_no_number_is_refused(version):
    with pytest.raises(InputError, match="version is"):
        migrated(values_of(5) | {"version": version})


def test_what_is_written_is_of_the_version_of_now(tmp_path):
    Run(tmp_path).write_config(preset("tiny"), {})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["version"] == VERSION
    # Taken for a file of before, it would say another scheme.
    assert Run(tmp_path).read_config() == (preset("tiny"), {})
