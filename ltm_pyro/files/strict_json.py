"""JSON by its standard, which has no numbers that are not finite: they become null."""

from __future__ import annotations

import json
import math


def dumps(value: object, indent: int | None = None) -> str:
    """A value as JSON text, with null for every number in it that is not finite.

    Raises:
        TypeError: if it holds something that JSON cannot express.
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value
