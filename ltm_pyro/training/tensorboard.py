"""The lines of `metrics.jsonl`, also as curves for TensorBoard: tensorboard --logdir runs"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ltm_pyro.errors import InputError

FOLDER = "tensorboard"


def check_is_installed() -> None:
    """Check that files for TensorBoard can be written.

    Raises:
        InputError: if its package is missing.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs the package tensorboard: pip install tensorboard")


class TensorBoard:
    """Writes records into a folder of events, one curve for each number.

    Args:
        folder: the folder of the events, which is made if it does not exist.
        step: the number of steps taken so far; what an earlier process has written for later steps is hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        # TensorBoard takes a while to import, and is optional.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()

    def add(self, record: dict[str, Any]) -> None:
        """Write the numbers of a record as SPLIT/KEY, or SPLIT/POSTERIOR/KEY for the closing report. Null is left out.

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
