"""GSM8K by the protocol of the published figures of this model class, which is kept to reproduce them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ltm_pyro.data.gsm8k import Problem, load_gsm8k
from ltm_pyro.tasks.base import TaskContext, TaskResult
from ltm_pyro.tasks.gsm8k import GSM8K


@dataclass(frozen=True)
class GSM8KPublished(GSM8K):
    """GSM8K by the protocol of the published figures of this model class, which is not comparable with
    exact match. The demonstrations are problems of the test set, and an answer is right if the digits of the final
    number occur anywhere in it."""

    def score(self, context: TaskContext) -> list[TaskResult]:
        _, test = load_gsm8k(self.data)
        self.require_enough(test[1:])  # all but the one that is asked
        pick = np.random.Generator(np.random.Philox(key=[context.seed, 2]))
        asked, shown = [], []
        for number in context.chosen(len(test)):
            others = np.delete(np.arange(len(test)), number)
            asked.append(test[number])
            shown.append([test[i] for i in pick.choice(others, self.shots, replace=False)])
        meaning = (
            f"digits of the final number anywhere in the answer; {self.shots} demonstrations from the TEST "
            "set: not comparable with exact match"
        )
        return self.pass_rates(context, asked, shown, has_digits_anywhere, meaning)


def has_digits_anywhere(answer: str, problem: Problem) -> bool:
    """Whether the digits of the problem's final number occur in the answer, within a longer number too."""
    return f"{problem.final}" in answer.replace(",", "")
