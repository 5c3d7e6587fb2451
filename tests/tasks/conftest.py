"""A model whose answers are written by hand, and the sums that it is asked."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from ltm_pyro.config import preset
from ltm_pyro.data import get_tokenizer
from ltm_pyro.inference import PRIOR
from ltm_pyro.models import DecoderConfig, LatentThoughtModel, Sampling
from ltm_pyro.runs.checkpoint import Progress
from ltm_pyro.runs.trained import TrainedModel
from ltm_pyro.tasks import TaskContext

SHAPE = DecoderConfig(num_layers=1, width=8, num_heads=1, hidden=8, num_slots=1, window=4, length=16)


@dataclasses.dataclass(frozen=True)
class Scripted(TaskContext):
    """A context whose model answers what `answer(prompt, number of the answer)` says, and remembers the prompts."""

    answer: Callable[[str, int], str] = lambda prompt, number: ""
    documents: Sequence[str] = ()
    """What `texts` reads."""
    asked: list[str] = dataclasses.field(default_factory=list)
    """The prompts."""

    def texts(self, data: str | None, text_column: str) -> list[str]:
        return list(self.documents)

    def written(
        self, prompts: Sequence[list[int]], max_new_tokens: Sequence[int], sampling: Sampling, num_answers: int = 1
    ) -> Iterator[list[list[int]]]:
        encoding, end = self.ltm.tokenizer, self.ltm.model.end_of_text
        for prompt in prompts:
            text = encoding.decode(prompt)
            self.asked.append(text)
            yield [[*encoding.encode_ordinary(self.answer(text, number)), end] for number in range(num_answers)]


@pytest.fixture(scope="session")
def ltm() -> TrainedModel:
    encoding = get_tokenizer("bytes")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LatentThoughtModel(SHAPE, encoding.n_vocab, 256)
    return TrainedModel(model, encoding, preset("tiny"), Path("run"), {}, Progress())


@pytest.fixture
def scripted(ltm: TrainedModel) -> Callable[..., Scripted]:
    def build(answer: Callable[[str, int], str], documents: Sequence[str] = (), num_items: int = 0) -> Scripted:
        return Scripted(ltm, PRIOR, num_items, 4, 0, answer, documents)

    return build


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a hundred sums to learn from and ten to be asked, those of 10 to 19 and 1."""
    folder = tmp_path_factory.mktemp("sums")
    for split, numbers in (("train", range(100, 200)), ("test", range(10, 20))):
        rows = [{"question": f"What is {n} + 1?", "answer": f"It is {n} + 1.\n#### {n + 1}"} for n in numbers]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(scope="session")
def number_asked() -> Callable[[str], int]:
    """The number in the last question of a prompt."""
    return lambda prompt: int(re.findall(r"What is (\d+) \+ 1\?", prompt)[-1])
