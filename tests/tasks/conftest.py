"""A model whose answers are written by hand, and the sums that it is asked."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence

import pytest

from ltm_pyro.inference import PRIOR
from ltm_pyro.models import Sampling
from ltm_pyro.runs.trained import TrainedModel
from ltm_pyro.tasks import TaskContext


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


@pytest.fixture
def scripted(untrained: TrainedModel) -> Callable[..., Scripted]:
    def build(answer: Callable[[str, int], str], documents: Sequence[str] = (), num_items: int = 0) -> Scripted:
        return Scripted(untrained, PRIOR, num_items, 4, 0, answer, documents)

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
