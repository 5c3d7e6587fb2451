"""What a task is, what it is given, and what it returns."""

from __future__ import annotations

import abc
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from ltm_pyro.data import encode
from ltm_pyro.evaluation.figures import chosen_sequences
from ltm_pyro.inference import PosteriorScheme, SequenceNoise
from ltm_pyro.models import Sampling
from ltm_pyro.runs.continuation import Continuation, Tokens, infer_thoughts
from ltm_pyro.runs.trained import TrainedModel, texts_to_score


@dataclass(frozen=True)
class TaskResult:
    """One metric of a task."""

    metric: str
    value: float
    standard_error: float | None
    """The standard error over the items; None where the value is not a mean over them."""
    num_items: int
    meaning: str

    @classmethod
    def mean(cls, metric: str, values: Sequence[float], meaning: str) -> TaskResult:
        """The mean over items: of 0 and 1 for wrong and right, or of each item's own share."""
        array = np.asarray(values, dtype=float)
        error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
        return cls(metric, float(array.mean()), error, len(array), meaning)


@dataclass(frozen=True)
class TaskContext:
    """A trained model that is to answer, and how it is asked."""

    ltm: TrainedModel
    scheme: PosteriorScheme
    """How z is inferred from what the model is given to read."""
    num_items: int = 64
    """At most this many problems, passages or texts. 0: all."""
    batch_size: int = 16
    """Problems, passages or texts that are answered together."""
    seed: int = 0
    """Seed of all draws."""

    def chosen(self, num_items: int) -> list[int]:
        """The numbers of the items that are asked, out of so many: the same ones every time."""
        return [int(number) for number in chosen_sequences(num_items, self.num_items or num_items)]

    def texts(self, data: str | None, text_column: str | None) -> list[str]:
        """The documents that `data` names; with None, those that the run has held out of its own corpus.

        Raises:
            InputError: if they cannot be loaded.
        """
        return texts_to_score(self.ltm, data, text_column).texts(self.ltm.tokenizer)

    def answers(
        self, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling, num_answers: int = 1
    ) -> list[list[str]]:
        """`num_answers` texts that the model writes after each prompt, each given its own draw of z."""
        tokens = [encode(prompt, self.ltm.tokenizer).tolist() for prompt in prompts]
        return [
            [self.ltm.decode(torch.tensor([answer]))[0] for answer in answers]
            for answers in self.written(tokens, [max_new_tokens] * len(prompts), sampling, num_answers)
        ]

    def written(
        self, prompts: Sequence[Tokens], max_new_tokens: Sequence[int], sampling: Sampling, num_answers: int = 1
    ) -> Iterator[list[Tokens]]:
        """The same in tokens: `num_answers` rows after each prompt, each up to and including its end-of-text.

        Args:
            max_new_tokens: at least this many tokens after each prompt, unless its text ends before.
        """
        rng, generator = SequenceNoise(self.seed), torch.Generator(self.ltm.device).manual_seed(self.seed)
        starts = range(0, len(prompts), self.batch_size)
        for start in tqdm(starts, unit="batch", disable=not sys.stderr.isatty(), leave=False):
            part = prompts[start : start + self.batch_size]
            z = infer_thoughts(self.ltm, part, self.scheme, num_answers, rng, start).flatten(0, 1)
            repeated = [prompt for prompt in part for _ in range(num_answers)]
            rows = Continuation(self.ltm, repeated, z, sampling, generator).finish(
                max(max_new_tokens[start : start + self.batch_size])
            )
            yield from (rows[first : first + num_answers] for first in range(0, len(rows), num_answers))


@dataclass(frozen=True)
class Task(abc.ABC):
    """What a model is asked to write, and how that is scored.

    A task is a frozen dataclass of its own settings, whose docstrings are the help of its options. The first sentence
    of its own docstring is its help in `python -m ltm_pyro.tasks --help`.
    """

    @abc.abstractmethod
    def score(self, context: TaskContext) -> list[TaskResult]:
        """Ask the model, and score what it writes.

        Raises:
            InputError: if the data of the task cannot be loaded.
        """
