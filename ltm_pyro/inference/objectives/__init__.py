"""Objectives of training, one in each file, and OBJECTIVES, which lists them.

To add an objective: write it in a file of its own here, after the protocol in `base.py`, and give it a line in
OBJECTIVES. `python -m ltm_pyro.train` then has it as `--infer-from NAME`, and the first sentence of its docstring is
its help text. Its fields become options, `--FIELD`, so no two objectives may have a field of the same name.
"""

from ltm_pyro.inference.objectives.base import Objective, TextBatch
from ltm_pyro.inference.objectives.past import Past
from ltm_pyro.inference.objectives.prefix import Prefix
from ltm_pyro.inference.objectives.whole import Whole

OBJECTIVES: dict[str, type[Objective]] = {
    "whole": Whole,
    "prefix": Prefix,
    "past": Past,
}

__all__ = ["OBJECTIVES", "Objective", "TextBatch"]
