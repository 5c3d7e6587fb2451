"""Objectives of training, one in each file, and OBJECTIVES, which lists them.

To add an objective: write it in a file of its own here, after the protocol in `base.py`, and give it a line in
OBJECTIVES. `python -m ltm_pyro.train` then has it as `--infer-from NAME`, and the first sentence of its docstring is
its help.
"""

from ltm_pyro.inference.objectives.base import Objective, TextBatch
from ltm_pyro.inference.objectives.prefix import prefix
from ltm_pyro.inference.objectives.whole import whole

OBJECTIVES: dict[str, Objective] = {"whole": whole, "prefix": prefix}

__all__ = ["OBJECTIVES", "Objective", "TextBatch"]
