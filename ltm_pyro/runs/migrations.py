"""Config files of earlier versions, brought to the current version one step at a time.

A file has its version under the key `version`. The versions of files without this key are recognised by what
they lack:

version 0   no `model.encoder_layers`; the settings of a scheme may hold `num_steps` and `num_kept`, and those of `map`
            and `vi` may lack `epsilon`, which was 1e-8
version 1   no `precision`: `vi` is fitted by Adam, as `adamvi` is today
version 2   `lowrank.epsilon`: `lowrank` is fitted by Adam, with another meaning of its settings
version 3   no `num_checkpoints`
version 4   no `tensorboard`
version 5   no `version`, no `model.prior`
version 6   no `model.thoughts`
version 7   no `model.encoder_reads`
version 8   `text_column` is never null, and "text" also where a benchmark set has a column of its own
version 9   `micro_batch_size` is never null, and 8 also on a GPU; `precision` is never auto
version 10  no `sharded`
version 11  no `optimizer.algorithm`
version 12  the current version

A new scheme, and a new setting of one, need no version: :func:`ltm_pyro.config.from_dict` completes schemes by their
defaults.

To add a version: write a function that changes values of the last version to the next, and add it to MIGRATIONS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ltm_pyro.errors import InputError

Values = dict[str, Any]


def _before_the_encoder(values: Values) -> None:
    if isinstance(values.get("model"), dict):
        values["model"].setdefault("encoder_layers", 0)
    for section in values.values():
        if isinstance(section, dict):
            for name in ("num_steps", "num_kept"):
                section.pop(name, None)
    for scheme in ("map", "vi"):
        if isinstance(values.get(scheme), dict):
            values[scheme].setdefault("epsilon", 1e-8)


def _when_vi_was_fitted_by_adam(values: Values) -> None:
    values.setdefault("precision", "float32")
    values.setdefault("compile", False)
    if "vi" in values:
        values["adamvi"] = values.pop("vi")
    if values.get("inference") == "vi":
        values["inference"] = "adamvi"


def _when_lowrank_was_fitted_by_adam(values: Values) -> None:
    # That scheme no longer exists: a run that was trained with it lacks the present settings, and is refused.
    if isinstance(values.get("lowrank"), dict) and "epsilon" in values["lowrank"]:
        del values["lowrank"]


def _before_the_number_of_checkpoints(values: Values) -> None:
    values.setdefault("num_checkpoints", 2)


def _before_tensorboard(values: Values) -> None:
    values.setdefault("tensorboard", False)


def _before_priors(values: Values) -> None:
    if isinstance(values.get("model"), dict):
        values["model"].setdefault("prior", "standard")


def _before_fast_weights(values: Values) -> None:
    if isinstance(values.get("model"), dict):
        values["model"].setdefault("thoughts", "attended")


def _before_encoders_of_blocks(values: Values) -> None:
    if isinstance(values.get("model"), dict):
        values["model"].setdefault("encoder_reads", "text")


def _before_columns_by_default(values: Values) -> None:
    if values.get("text_column") == "text":
        values["text_column"] = None


def _before_defaults_by_device(values: Values) -> None:
    if values.get("micro_batch_size") == 8:
        values["micro_batch_size"] = None


def _before_sharding(values: Values) -> None:
    values.setdefault("sharded", False)


def _before_muon(values: Values) -> None:
    if isinstance(values.get("optimizer"), dict):
        values["optimizer"].setdefault("algorithm", "adamw")


MIGRATIONS: list[Callable[[Values], None]] = [
    _before_the_encoder,
    _when_vi_was_fitted_by_adam,
    _when_lowrank_was_fitted_by_adam,
    _before_the_number_of_checkpoints,
    _before_tensorboard,
    _before_priors,
    _before_fast_weights,
    _before_encoders_of_blocks,
    _before_columns_by_default,
    _before_defaults_by_device,
    _before_sharding,
    _before_muon,
]
"""The n-th, counted from 0, changes values of version n into those of version n + 1, in place."""

VERSION = len(MIGRATIONS)
"""The version of the config files that are written."""


def migrated(values: Values) -> Values:
    """The settings in a config file, as a file of the current version has them, without the key `version`.

    Raises:
        InputError: if the file is of a later version, or its version is not a number.
    """
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
    version = values.pop("version") if "version" in values else _version_by_keys(values)
    if type(version) is not int or version < 0:
        raise InputError(f"the settings of the run cannot be read: version is {version!r}")
    if version > VERSION:
        raise InputError(
            f"the settings of the run are of version {version}, but this ltm_pyro reads versions up to {VERSION}: "
            "install a newer ltm_pyro"
        )
    for migrate in MIGRATIONS[version:]:
        migrate(values)
    return values


def _version_by_keys(values: Values) -> int:
    model, lowrank = values.get("model"), values.get("lowrank")
    if isinstance(model, dict) and "encoder_layers" not in model:
        return 0
    if "precision" not in values:
        return 1
    if isinstance(lowrank, dict) and "epsilon" in lowrank:
        return 2
    if "num_checkpoints" not in values:
        return 3
    return 4 if "tensorboard" not in values else 5
