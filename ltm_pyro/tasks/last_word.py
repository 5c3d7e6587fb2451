"""LAMBADA's task (Paperno et al. 2016, arXiv 1606.06031): the last word of a passage, given all before it."""

from __future__ import annotations

from dataclasses import dataclass

from ltm_pyro.data import encode
from ltm_pyro.errors import InputError
from ltm_pyro.models import Sampling
from ltm_pyro.tasks.base import Task, TaskContext, TaskResult


@dataclass(frozen=True)
class LastWord(Task):
    """The last word of each passage, given the words before it (LAMBADA). The model writes its most likely tokens."""

    data: str | None = None
    """Passages, one a document, such as lambada: what python -m ltm_pyro.evaluate takes as --data.
    Default: what the run has held out of its own corpus."""
    text_column: str | None = None
    """Column that holds the text, in files and data sets with columns. Default: text, or a benchmark set's own."""

    def score(self, context: TaskContext) -> list[TaskResult]:
        tokenizer = context.ltm.tokenizer
        passages = [text.rstrip() for text in context.texts(self.data, self.text_column) if len(text.split()) > 1]
        if not passages:
            raise InputError("no text has two words, so there is no last word to predict")
        prompts, targets = [], []
        for number in context.chosen(len(passages)):
            passage = passages[number]
            before = passage[: -len(passage.split()[-1])].rstrip()
            prompts.append(encode(before, tokenizer).tolist())
            targets.append(encode(passage[len(before) :], tokenizer).tolist())
        written = context.written(prompts, [len(target) for target in targets], Sampling(temperature=0.0))
        is_right = [answer[: len(target)] == target for (answer,), target in zip(written, targets, strict=True)]
        meaning = "the most likely tokens, one after another, spell the last word; z is one draw given the other words"
        return [TaskResult.mean("last word", [float(right) for right in is_right], meaning)]
