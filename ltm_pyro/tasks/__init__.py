"""Tasks: a trained model is scored by what it writes, instead of by probabilities.

z is inferred from what the model is given to read, as in `python -m ltm_pyro.generate`.

To add a task: write it in a file of its own here, as a subclass of `Task` (`base.py`), and give it a line in TASKS.
`python -m ltm_pyro.tasks` then has it under that name, with its settings as options.
"""

from ltm_pyro.tasks.base import Task, TaskContext, TaskResult
from ltm_pyro.tasks.free_text import FreeText
from ltm_pyro.tasks.gsm8k import GSM8K
from ltm_pyro.tasks.gsm8k_published import GSM8KPublished
from ltm_pyro.tasks.last_word import LastWord

TASKS: dict[str, type[Task]] = {
    "gsm8k": GSM8K,
    "gsm8k-published-protocol": GSM8KPublished,
    "last-word": LastWord,
    "free-text": FreeText,
}

__all__ = ["TASKS", "Task", "TaskContext", "TaskResult"]
