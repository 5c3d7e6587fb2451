"""Free text: how varied, and how natural to another language model, the texts of a model are."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ltm_pyro import cli
from ltm_pyro.data import encode
from ltm_pyro.models import Sampling
from ltm_pyro.tasks.base import Task, TaskContext, TaskResult
from ltm_pyro.tasks.text_quality import (
    ReadTexts,
    TextReader,
    Words,
    distinct_share,
    mauve,
    self_bleu,
    unigram_entropy,
)


@dataclass(frozen=True)
class FreeText(Task):
    """Texts with z from the prior, compared with as many held-out texts: how varied they are, and how natural to a
    scorer. The held-out texts are cut to the same number of tokens."""

    data: str | None = None
    """Texts to compare with: what python -m ltm_pyro.evaluate takes as --data.
    Default: what the run has held out of its own corpus."""
    text_column: str | None = None
    """Column that holds the text, in files and data sets with columns. Default: text, or a benchmark set's own."""
    max_new_tokens: int = 256
    """Largest number of tokens of a text."""
    scorer: str | None = None
    """A causal language model of Hugging Face's transformers, for generative perplexity and MAUVE:
    a folder, or a name on its hub. Default: these figures are omitted."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        cli.require_at_least(self, max_new_tokens=1)

    def score(self, context: TaskContext) -> list[TaskResult]:
        reader = None if self.scorer is None else TextReader(self.scorer, context.ltm.device)
        has_bleu = importlib.util.find_spec("sacrebleu") is not None
        if not has_bleu:
            print("note: self-BLEU is omitted; it needs sacrebleu, which the extra 'quality' installs", file=sys.stderr)
        held_out = context.texts(self.data, self.text_column)
        chosen = [held_out[number] for number in context.chosen(len(held_out))]
        tokenizer = context.ltm.tokenizer
        answers = context.answers([""] * len(chosen), self.max_new_tokens, self.sampling)
        by_side = {
            "model": [text for (text,) in answers],
            "held-out text": [
                tokenizer.decode(encode(text, tokenizer)[: self.max_new_tokens].tolist()) for text in chosen
            ],
        }
        results: list[TaskResult] = []
        read: dict[str, ReadTexts] = {}
        for side, texts in by_side.items():
            words = [text.split() for text in texts]
            results += variety(side, words)
            if has_bleu and len(texts) > 1:
                meaning = "BLEU-4 of each text against all others, from 0 to 1: high where the texts are alike"
                results.append(TaskResult.mean(f"self-BLEU, {side}", self_bleu(texts), meaning))
            if reader is not None:
                read[side] = reader.read(texts)
                meaning = f"perplexity of the texts under {self.scorer}, which is also low where they repeat themselves"
                results.append(_of_words("generative perplexity", side, words, read[side].perplexity, meaning))
        if reader is not None:
            meaning = (
                f"similarity of the two sets of texts in the hidden states of {self.scorer}; its authors use "
                "thousands of texts"
            )
            results.append(TaskResult("MAUVE", mauve(*read.values()), None, len(chosen), meaning))
        return results


def variety(side: str, words: Words) -> list[TaskResult]:
    """How varied the words of the texts are: shares of different n-grams, and the entropy of single words."""
    shares = [
        _of_words(f"distinct-{n}", side, words, distinct_share(words, n), f"share of distinct {n}-grams")
        for n in (1, 2, 3, 4)
    ]
    return [*shares, _of_words("unigram entropy", side, words, unigram_entropy(words), "nats a word")]


def _of_words(metric: str, side: str, words: Words, value: float, meaning: str) -> TaskResult:
    """A metric that is not a mean over texts, and depends on their number and length."""
    meaning += (
        f"; it depends on the number and the length of the texts: {len(words)} with {sum(map(len, words)):,} words"
    )
    return TaskResult(f"{metric}, {side}", value, None, len(words), meaning)
