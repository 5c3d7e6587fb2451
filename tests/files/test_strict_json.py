"""JSON as other programs read it: no number in it that JSON does not have."""

from __future__ import annotations

import json
import math

import pytest

from ltm_pyro.files import strict_json


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_numbers_that_are_not_finite_become_null_however_deep_they_lie():
    value = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, 2)}], "d": "NaN", "e": None, "f": True}
    text = strict_json.dumps(value)
    expected = {"a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "NaN", "e": None, "f": True}
    assert json.loads(text, parse_constant=refuse) == expected


def test_finite_values_are_written_as_json_writes_them():
    value = {"name": "é", "figures": [0.1, 1e300, -0.0], "nested": {"n": 3}}
    for indent in (None, 2):
        assert strict_json.dumps(value, indent) == json.dumps(value, indent=indent)


def test_what_json_has_no_form_for_is_refused():
    with pytest.raises(TypeError):
        strict_json.dumps({"x": object()})
