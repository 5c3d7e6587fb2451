"""The lines of `metrics.jsonl`, also as curves for TensorBoard: tensorboard --logdir runs"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ltm_pyro.errors import InputError

FOLDER = "tensorboard"


def check_is_installed() -> None:
    """Check that TensorBoard can be written for.

    Raises:
        InputError: if its package is missing.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs the package tensorboard: pip install tensorboard")


class TensorBoard:
    """Writes records into a folder of events, one curve for each number.

    Args:
        folder: of the events, made if it is not there.
        step: where the run stands; what an earlier process has written of later steps is hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        # It takes a while to import, and is optional.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()

    def add(self, record: dict[str, Any]) -> None:
        """Write the numbers of a record: SPLIT/KEY, in the closing report SPLIT/POSTERIOR/KEY; null has no point.

        Raises:
            OSError: if they cannot be written.
        """
        parts = [record["split"]]
        if record["split"] == "report":
            parts.append(record["posterior"] or "no z")
        for key, value in record.items():
            if key != "step" and type(value) in (int, float):
                self._writer.add_scalar("/".join([*parts, key]), value, record["step"])
        self._writer.flush()
