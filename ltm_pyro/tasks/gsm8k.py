"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): a number is asked for, behind problems with worked answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import tyro

from ltm_pyro import cli
from ltm_pyro.data.gsm8k import Problem, final_number, load_gsm8k
from ltm_pyro.errors import InputError
from ltm_pyro.models import Sampling
from ltm_pyro.tasks.base import Task, TaskContext, TaskResult


@dataclass(frozen=True)
class GSM8K(Task):
    """Word problems of grade school, scored by exact match of the final number. The demonstrations are problems of the
    training set."""

    data: str | None = None
    """Folder with train.jsonl and test.jsonl. Default: the data set on the Hugging Face hub."""
    shots: int = 5
    """Problems with their worked answers that stand before each problem."""
    attempts: int = 1
    """Answers that are drawn for each problem, each given its own draw of z."""
    max_new_tokens: int = 256
    """Largest number of tokens of an answer."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        cli.require_at_least(self, shots=0, attempts=1, max_new_tokens=1)

    def score(self, context: TaskContext) -> list[TaskResult]:
        train, test = load_gsm8k(self.data)
        asked = [test[number] for number in context.chosen(len(test))]
        self.require_enough(train)
        pick = np.random.Generator(np.random.Philox(key=[context.seed, 1]))
        shown = [[train[i] for i in pick.choice(len(train), self.shots, replace=False)] for _ in asked]
        meaning = f"final number exactly right; {self.shots} demonstrations from the training set"
        return self.pass_rates(context, asked, shown, has_right_final_number, meaning)

    def require_enough(self, problems: Sequence[Problem]) -> None:
        """Check that there are problems enough for the demonstrations.

        Raises:
            InputError: if there are not.
        """
        if self.shots > len(problems):
            raise InputError(f"--shots {self.shots} is more than the {len(problems)} problems that can be shown")

    def pass_rates(
        self,
        context: TaskContext,
        asked: Sequence[Problem],
        shown: Sequence[Sequence[Problem]],
        is_right: Callable[[str, Problem], bool],
        meaning: str,
    ) -> list[TaskResult]:
        """pass@1, the share of answers that are right, and with k attempts pass@k, the share of problems with a right
        answer.

        Args:
            shown: the demonstrations before each problem that is asked.
            is_right: whether an answer counts as right for a problem.
        """
        prompts = [prompt_of(problem, demonstrations) for problem, demonstrations in zip(asked, shown, strict=True)]
        answers = context.answers(prompts, self.max_new_tokens, self.sampling, self.attempts)
        right = [[is_right(answer, problem) for answer in row] for problem, row in zip(asked, answers, strict=True)]
        results = [TaskResult.mean("pass@1", [float(np.mean(row)) for row in right], meaning)]
        if self.attempts > 1:
            any_right = f"at least one of {self.attempts} answers is right: {meaning}"
            results.append(TaskResult.mean(f"pass@{self.attempts}", [float(any(row)) for row in right], any_right))
        return results


def prompt_of(problem: Problem, shown: Sequence[Problem]) -> str:
    """The demonstrations and then the problem, up to where its answer begins."""
    worked = [f"Question: {other.question}\nAnswer: {other.answer}\n\n" for other in shown]
    return "".join(worked) + f"Question: {problem.question}\nAnswer:"


def has_right_final_number(answer: str, problem: Problem) -> bool:
    """Whether the final number is that of the problem, in the answer before any question that the model adds itself."""
    return final_number(answer.partition("\nQuestion:")[0]) == problem.final
