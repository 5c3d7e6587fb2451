"""Tasks: a trained model scored by what it writes, instead of by probabilities.

A task is a function from a :class:`Sitting` to scores; `TASKS` lists them. z is inferred from what a model is given to
read, as in `python -m ltm_pyro.generate`.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch
import tyro
from tqdm import tqdm

from ltm_pyro.data.gsm8k import Problem, final_number, load_gsm8k
from ltm_pyro.evaluation.figures import chosen_sequences
from ltm_pyro.inference import PosteriorScheme, SequenceNoise
from ltm_pyro.models import Sampling
from ltm_pyro.runs.continuation import Tokens, infer_thoughts
from ltm_pyro.runs.trained import TrainedModel
from ltm_pyro.tasks.text_quality import Scorer, Words, distinct_share, mauve, self_bleu, unigram_entropy


@dataclass(frozen=True)
class TaskSettings:
    """How answers of --task are drawn."""

    shots: int = 5
    """gsm8k: problems with their worked answers that stand before each problem."""
    attempts: int = 1
    """gsm8k: answers drawn for each problem, each with a z of its own."""
    max_new_tokens: int = 256
    """Tokens of an answer, or of a free text, at most."""
    scorer: str | None = None
    """free-text: a causal language model of Hugging Face's transformers, a folder or a name on its hub, for generative
    perplexity and MAUVE. Default: without them."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        for name, least in (("shots", 0), ("attempts", 1), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")


@dataclass(frozen=True)
class Sitting:
    """A model, and how it is to be asked."""

    ltm: TrainedModel
    scheme: PosteriorScheme
    settings: TaskSettings
    data: str | None
    """Where the task has its material from, as --data says it; None for the task's own."""
    texts: Callable[[], list[str]]
    """Reads the documents that `data` names, or those that the run has held out."""
    num_items: int
    """Problems, passages or texts at most. 0: all."""
    batch_size: int
    seed: int

    def chosen(self, num_items: int) -> np.ndarray:
        """The items that are scored: the same ones every time."""
        return chosen_sequences(num_items, self.num_items or num_items)

    def answers(
        self, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling, num_answers: int = 1
    ) -> list[list[str]]:
        """What the model writes after each prompt, so many times, each with a draw of z given the prompt."""
        tokens = [self.ltm.tokenizer.encode_ordinary(prompt) for prompt in prompts]
        return [
            self.ltm.decode(rows)
            for rows in self.written(tokens, [max_new_tokens] * len(prompts), sampling, num_answers)
        ]

    def written(
        self, prompts: Sequence[Tokens], max_new_tokens: Sequence[int], sampling: Sampling, num_answers: int = 1
    ) -> Iterator[torch.Tensor]:
        """The same in tokens: [num_answers, the most of the batch] for each prompt."""
        model = self.ltm.model
        rng = SequenceNoise(self.seed)
        generator = torch.Generator(model.decoder.embedding.weight.device).manual_seed(self.seed)
        starts = range(0, len(prompts), self.batch_size)
        for start in tqdm(starts, unit="batch", disable=not sys.stderr.isatty(), leave=False):
            part = list(prompts[start : start + self.batch_size])
            z = infer_thoughts(self.ltm, part, self.scheme, num_answers, rng, start).flatten(0, 1)
            repeated = [prompt for prompt in part for _ in range(num_answers)]
            most = max(max_new_tokens[start : start + self.batch_size])
            rows = model.generate(z, most, repeated, sampling, generator)
            yield from rows.view(len(part), num_answers, most)


@dataclass(frozen=True)
class Score:
    """One line of what a task gave."""

    metric: str
    value: float
    standard_error: float | None
    """Over the items; None where the value is not a mean over them."""
    num_items: int
    meaning: str

    @classmethod
    def share(cls, metric: str, is_right: Sequence[float], meaning: str) -> Score:
        """A mean over items, of which each is right, wrong, or right so often."""
        values = np.asarray(is_right, dtype=float)
        error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(metric, float(values.mean()), error, len(values), meaning)


def gsm8k(sitting: Sitting) -> list[Score]:
    """Exact match of the final number; the demonstrations are problems of the training set."""
    train, test = load_gsm8k(sitting.data)
    asked = [test[index] for index in sitting.chosen(len(test))]
    pick = np.random.Generator(np.random.Philox(key=[sitting.seed, 1]))
    shown = [[train[i] for i in pick.choice(len(train), sitting.settings.shots, replace=False)] for _ in asked]
    is_right = [
        [final_number(_up_to_next_question(answer)) == problem.final for answer in answers]
        for problem, answers in zip(asked, _answered(sitting, asked, shown), strict=True)
    ]
    meaning = f"final number exactly right; {sitting.settings.shots} demonstrations from the training set"
    return _of_attempts(sitting, is_right, meaning)


def gsm8k_published(sitting: Sitting) -> list[Score]:
    """As the published figures of this model class were counted: demonstrations from the test set, and an answer is
    right if the digits of the final number occur anywhere in it."""
    _, test = load_gsm8k(sitting.data)
    chosen = sitting.chosen(len(test))
    pick = np.random.Generator(np.random.Philox(key=[sitting.seed, 2]))
    asked, shown = [], []
    for index in chosen:
        others = np.delete(np.arange(len(test)), index)
        asked.append(test[index])
        shown.append([test[i] for i in pick.choice(others, sitting.settings.shots, replace=False)])
    is_right = [
        [f"{problem.final}" in answer.replace(",", "") for answer in answers]
        for problem, answers in zip(asked, _answered(sitting, asked, shown), strict=True)
    ]
    meaning = (
        f"digits of the final number anywhere in the answer; {sitting.settings.shots} demonstrations from the TEST "
        "set: not comparable with exact match"
    )
    return _of_attempts(sitting, is_right, meaning)


def prompt_of(problem: Problem, shown: Sequence[Problem]) -> str:
    """A problem behind demonstrations, up to where its answer begins."""
    worked = [f"Question: {other.question}\nAnswer: {other.answer}\n\n" for other in shown]
    return "".join(worked) + f"Question: {problem.question}\nAnswer:"


def _answered(sitting: Sitting, asked: Sequence[Problem], shown: Sequence[Sequence[Problem]]) -> list[list[str]]:
    prompts = [prompt_of(problem, demonstrations) for problem, demonstrations in zip(asked, shown, strict=True)]
    settings = sitting.settings
    return sitting.answers(prompts, settings.max_new_tokens, settings.sampling, settings.attempts)


def _up_to_next_question(answer: str) -> str:
    """Without the problems that a model goes on to ask itself."""
    return answer.partition("\nQuestion:")[0]


def _of_attempts(sitting: Sitting, is_right: list[list[bool]], meaning: str) -> list[Score]:
    num_attempts = sitting.settings.attempts
    scores = [Score.share("pass@1", [float(np.mean(row)) for row in is_right], meaning)]
    if num_attempts > 1:
        any_right = f"any of {num_attempts} answers is right: {meaning}"
        scores.append(Score.share(f"pass@{num_attempts}", [float(any(row)) for row in is_right], any_right))
    return scores


def last_word(sitting: Sitting) -> list[Score]:
    """LAMBADA's task (Paperno et al. 2016): the last word of a passage, given all before it."""
    encode = sitting.ltm.tokenizer.encode_ordinary
    passages = [text.rstrip() for text in sitting.texts() if len(text.split()) > 1]
    prompts, targets = [], []
    for index in sitting.chosen(len(passages)):
        before = passages[index][: -len(passages[index].split()[-1])]
        prompts.append(encode(before.rstrip()))
        targets.append(encode(passages[index][len(before.rstrip()) :]))
    lengths = [len(target) for target in targets]
    rows = sitting.written(prompts, lengths, Sampling(temperature=0.0))
    is_right = [row[0, : len(target)].tolist() == target for row, target in zip(rows, targets, strict=True)]
    meaning = "the most likely tokens, one after another, are those of the last word; z from one draw given the rest"
    return [Score.share("last word", [float(right) for right in is_right], meaning)]


def free_text(sitting: Sitting) -> list[Score]:
    """How varied, and to a scorer how natural, texts from the prior are, beside as many held-out texts cut to the same
    number of tokens."""
    settings, scorer = sitting.settings, None
    if settings.scorer is not None:
        scorer = Scorer(settings.scorer, sitting.ltm.model.decoder.embedding.weight.device)
    has_bleu = importlib.util.find_spec("sacrebleu") is not None
    if not has_bleu:
        print("note: self-BLEU is left out; it needs sacrebleu, which the extra 'quality' installs", file=sys.stderr)
    held_out = sitting.texts()
    chosen = [held_out[index] for index in sitting.chosen(len(held_out))]
    decode, encode = sitting.ltm.tokenizer.decode, sitting.ltm.tokenizer.encode_ordinary
    by_side = {
        "model": [text for (text,) in sitting.answers([""] * len(chosen), settings.max_new_tokens, settings.sampling)],
        "held-out text": [decode(encode(text)[: settings.max_new_tokens]) for text in chosen],
    }
    scores, scored = [], {}
    for side, texts in by_side.items():
        words = [text.split() for text in texts]

        def add(metric: str, value: float, meaning: str, side: str = side, words: Words = words) -> None:
            about = f"{meaning}, of {len(words)} texts with {sum(map(len, words)):,} words, on which it depends"
            scores.append(Score(f"{metric}, {side}", value, None, len(words), about))

        for n in (1, 2, 3, 4):
            add(f"distinct-{n}", distinct_share(words, n), f"share of different {n}-grams")
        add("unigram entropy", unigram_entropy(words), "nats a word")
        if has_bleu and len(texts) > 1:
            meaning = "BLEU-4 of a text against all others, from 0 to 1: high where they are alike"
            scores.append(Score.share(f"self-BLEU, {side}", self_bleu(texts), meaning))
        if scorer is not None:
            scored[side] = scorer.score(texts)
            meaning = f"perplexity of the texts under {settings.scorer}: low also where they repeat themselves"
            add("generative perplexity", scored[side].perplexity, meaning)
    if scorer is not None:
        meaning = (
            f"likeness of both sets in the hidden states of {settings.scorer}; its authors take thousands of texts"
        )
        scores.append(Score("MAUVE", mauve(*scored.values()), None, len(chosen), meaning))
    return scores


TASKS: dict[str, Callable[[Sitting], list[Score]]] = {
    "gsm8k": gsm8k,
    "gsm8k-published-protocol": gsm8k_published,
    "last-word": last_word,
    "free-text": free_text,
}
