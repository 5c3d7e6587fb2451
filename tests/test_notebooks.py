"""The code of the notebooks runs.

Every line `NUM_… = …` is cut to 10 here; the outputs that stand in the notebooks are those of full runs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.filterwarnings("ignore:More chains:UserWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_code_of_a_notebook_runs(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] or "print(" not in "".join(cell["source"]) for cell in cells), "saved without outputs"
    code = "\n".join("".join(cell["source"]) for cell in cells)
    code, num_cuts = re.subn(r"^(NUM_\w+) = \d+$", r"\1 = 10", code, flags=re.MULTILINE)
    assert num_cuts >= 1
    exec(compile(code, str(path), "exec"), {})
