"""The code of the notebooks runs.

Numbers of steps, draws and texts are cut here; the outputs that stand in the notebooks are those of full runs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
CUTS = {
    r"^(NUM_\w+) = \d+$": r"\1 = 10",
    r"\b(num_steps|num_samples|num_kept)=\d\d+": r"\1=4",
    r"([\[(])0, [\d, ]+, 64([\])])": r"\g<1>0, 4\2",  # the numbers of steps that are compared
    r", 800, rng\)": ", 16, rng)",  # the draws of 4 chains that keep 4
}
"""What is replaced, wherever a notebook has it."""


@pytest.mark.filterwarnings("ignore:More chains:UserWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_code_of_a_notebook_runs(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] or "print(" not in "".join(cell["source"]) for cell in cells), "saved without outputs"
    code = "\n".join("".join(cell["source"]) for cell in cells)
    assert re.search(next(iter(CUTS)), code, flags=re.MULTILINE)
    for pattern, replacement in CUTS.items():
        code = re.sub(pattern, replacement, code, flags=re.MULTILINE)
    exec(compile(code, str(path), "exec"), {})
