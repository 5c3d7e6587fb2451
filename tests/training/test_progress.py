from __future__ import annotations

import pytest

from ltm_pyro.training.progress import time_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (5, "5 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3 * 60 + 20, "3 min 20 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (2 * 3600 + 5 * 60, "2 h 05 min"),
        (26 * 3600 + 59 * 60 + 59, "26 h 59 min"),
    ],
)
def test_a_time_reads_in_its_two_largest_units(seconds, text):
    assert time_text(seconds) == text
